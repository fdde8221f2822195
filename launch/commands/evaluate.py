"""`minbert evaluate RUN...`: the scores of a run's best model, or of several runs together."""

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
    """Score the best model of a run, or the mean of what those of several runs say."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], open_option("RUN...")]
    """Run folders; the data is that of the first."""
    split: Split = "dev"
    """Split to score; it must be labelled."""
    data: Annotated[str | None, open_option("STR")] = None
    """Other data than the run's own: `builtin`, a folder with the course's files, `hub`, or `hub:DIR`."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str]) -> int:
    options = parse(EvaluateOptions, arguments, "evaluate")
    runs = [RunFolder.existing(path) for path in options.runs]
    from minbert.launch.results import predict_splits, whole_splits
    from minbert.trainer.run.progress import score_table

    config = whole_splits(runs[0].read_config(), options.data)
    scores = predict_splits(runs, config, (options.split,), None, Console(stderr=True))[options.split]
    if not scores:
        raise UserError(
            f"the {options.split} split of {config.corpus.data} has no labels; `minbert predict` predicts it"
        )
    if options.json:
        print(to_json(scores, indent=2))
    else:
        names = ", ".join(str(run.path) for run in runs)
        title = f"{names}, best model{'s, mean' if len(runs) > 1 else ''}, {options.split}"
        Console().print(score_table(title, config.corpus.tasks, {"score": scores}))
    return ExitCode.FINISHED
