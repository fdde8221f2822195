"""Aggregators side by side on the same data, budget and seeds: dev scores with their spread.

Every combination is an ordinary run; one that is complete is not repeated, one that stopped is resumed.

    python benchmarks/compare_aggregators.py --data FOLDER --model minilm --out FOLDER
"""

import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from minbert.launch.options import parse_run_config
from minbert.trainer.config import RunConfig
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare
from minbert.trainer.train import Outcome, train


@dataclass(frozen=True)
class Options:
    """Comparison of aggregators."""

    out: Path
    """Folder for the runs."""
    data: str = "builtin"
    model: str = "tiny"
    aggregators: tuple[str, ...] = ("sum", "pcgrad", "upgrad", "uncertainty")
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 2e-4
    steps: int = 250
    batch_size: int = 16
    train_limit: int = 6000
    """Training examples per task, spread evenly over its file."""
    eval_limit: int = 2000
    """Dev examples per task."""


def main() -> None:
    options = tyro.cli(Options)
    console = Console()
    scores: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:  # outermost, so that an interrupted comparison is still a comparison
        for aggregator in options.aggregators:
            run = prepare(_config(options, aggregator, seed))
            if train(run) is Outcome.INTERRUPTED:
                raise SystemExit(75)
            scores.setdefault(aggregator, []).append(_final(run))
            console.print(f"{aggregator} seed {seed}: {json.dumps(scores[aggregator][-1])}", soft_wrap=True)
    console.print(f"{platform.machine()}, {options}", soft_wrap=True)
    console.print(_table(options, scores))


def _config(options: Options, aggregator: str, seed: int) -> RunConfig:
    folder = options.out / f"{aggregator.replace(':', '-')}-seed{seed}"
    arguments = f"--run {folder} --data {options.data} --model {options.model} --aggregator {aggregator} --seed {seed}"
    limits = f"--train-limit {options.train_limit} --eval-limit {options.eval_limit} --batch-size {options.batch_size}"
    budget = f"--lr {options.lr} --steps {options.steps} --eval-every {options.steps} --measure-every 25 --trackers"
    return parse_run_config(f"{arguments} {limits} {budget}".split())


def _final(run: RunFolder) -> dict[str, float]:
    """Dev scores after the last step, and the mean share of conflicting pairs of tasks."""
    records = run.read_metrics()
    scores = {key[4:]: value for key, value in records[-1].items() if key.startswith("dev/")}
    return scores | {"conflicts": statistics.fmean(r["conflicts"] for r in records if "conflicts" in r)}


def _table(options: Options, scores: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title=f"dev scores, mean and standard deviation of {len(options.seeds)} seeds", title_justify="left")
    columns = list(next(iter(scores.values()))[0])
    for heading in ("aggregator", *columns):
        table.add_column(heading)
    for aggregator, runs in scores.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
        table.add_row(aggregator, *cells)
    return table


if __name__ == "__main__":
    main()
