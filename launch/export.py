"""`minbert export RUN FOLDER`: the encoder for `transformers.AutoModel.from_pretrained`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from minbert.data.errors import UserError
from minbert.launch.exit_codes import ExitCode
from minbert.launch.options import parse
from minbert.trainer.run_folder import RunFolder


@dataclass(frozen=True)
class ExportOptions:
    """Write the encoder of a run's best model, with its tokenizer, as `transformers` stores one."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    folder: tyro.conf.Positional[Path]
    """Folder to write; it must not exist, or be empty."""


def main(arguments: list[str]) -> int:
    options = parse(ExportOptions, arguments, "export")
    run = RunFolder.existing(options.run)
    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        raise UserError(f"{options.folder} exists and is not an empty folder")
    from minbert.trainer.saved_model import export_encoder

    export_encoder(run, options.folder)
    print(f"Exported. In Python: transformers.AutoModel.from_pretrained({str(options.folder)!r})")
    return ExitCode.FINISHED
