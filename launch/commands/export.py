"""`minbert export RUN FOLDER`: the encoder for `transformers.AutoModel.from_pretrained`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.options import parse
from minbert.launch.outputs import whole_or_gone
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder


@dataclass(frozen=True)
class ExportOptions:
    """Write the encoder of a run's best model, with its tokenizer, as `transformers` stores one."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not exist, or be empty."""


def main(arguments: list[str]) -> int:
    options = parse(ExportOptions, arguments, "export")
    run = RunFolder.existing(options.run)
    with whole_or_gone(options.folder):
        if any(options.folder.iterdir()):
            raise UserError(f"{options.folder} exists and is not an empty folder")
        from minbert.trainer.run.saved_model import export_encoder

        export_encoder(run, options.folder)
    print(f"Exported. In Python: transformers.AutoModel.from_pretrained({str(options.folder)!r})")
    return ExitCode.FINISHED
