"""`minbert average RUN RUN... --out FOLDER`: the mean of their weights as one model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.help import open_option
from minbert.launch.options import parse
from minbert.launch.outputs import whole_or_gone
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder


@dataclass(frozen=True)
class AverageOptions:
    """Write the mean of the weights of several runs' best models (a model soup) as a folder that evaluate, predict and
    export take like a run's. The runs should have started from the same weights, heads included: from one pretrained
    model and with one --seed."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], open_option("RUN...")]
    """Run folders, two or more, with the same tasks and shapes."""
    out: Annotated[Path | None, open_option("FOLDER")] = None
    """Folder to write; it must not exist, or be empty."""


def main(arguments: list[str]) -> int:
    options = parse(AverageOptions, arguments, "average")
    runs = [RunFolder.existing(path) for path in options.runs]
    if len(runs) < 2:
        raise UserError("a mean is of two runs or more; give their folders before --out")
    if options.out is None:
        raise UserError("say with --out FOLDER where the model goes")
    configs = [run.read_config() for run in runs]
    with whole_or_gone(options.out, new=True):
        from minbert.trainer.run.soup import write_soup

        write_soup(runs, options.out)
    print(f"Wrote the mean of {len(runs)} models. Its scores: minbert evaluate {options.out}")
    if len(starts := {(config.encoder.model, config.seed) for config in configs}) > 1:
        print(
            "The runs started from different weights "
            f"({', '.join(f'{model} with seed {seed}' for model, seed in sorted(starts))}): "
            "between such models the mean is often worse than each."
        )
    return ExitCode.FINISHED
