"""`minbert evaluate RUN`: the scores of a run's best model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from minbert.data.errors import UserError
from minbert.data.files import to_json
from minbert.data.task import Split
from minbert.launch.help import open_option
from minbert.launch.options import parse
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder


@dataclass(frozen=True)
class EvaluateOptions:
    """Score the best model of a run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    split: Split = "dev"
    """Split to score; it must be labelled."""
    data: Annotated[str | None, open_option("STR")] = None
    """Other data than the run's own: `builtin`, a folder with the course's files, `hub`, or `hub:DIR`."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str]) -> int:
    options = parse(EvaluateOptions, arguments, "evaluate")
    run = RunFolder.existing(options.run)
    from minbert.launch.results import predict_splits, whole_splits
    from minbert.trainer.run.progress import score_table

    config = whole_splits(run.read_config(), options.data)
    scores = predict_splits(run, config, (options.split,), None, Console(stderr=True))[options.split]
    if not scores:
        raise UserError(
            f"the {options.split} split of {config.corpus.data} has no labels; `minbert predict` predicts it"
        )
    if options.json:
        print(to_json(scores, indent=2))
    else:
        Console().print(score_table(f"{run.path}, best model, {options.split}", config.corpus.tasks, {"score": scores}))
    return ExitCode.FINISHED
