"""What a search costs beside the same trials run one after another by hand, each in a process of its own.

Both sides train the same trials one at a time, and take turns within one run. By hand is `minbert train` as a new
process for every trial, with and without the prediction files, which a search does not write. Start-up of a trial of
the search is the time from the end of the one before (for the first: from the start of the command) to the end of its
first step, when its metrics file is made:

    python benchmarks/search.py --trials 6 --rounds 2
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time

import tyro

from minbert.tuning.space import draw, parse_space
from minbert.tuning.trial import Trial, read_trials

SPACE = ("lr=loguniform(2e-4,2e-3)", "hidden_layers=1,2", "head_dropout=uniform(0,0.3)")
# Of both sides. The first line of the metrics tells when the first step is over.
LIKE = ("--trackers", "--log-every", "1", "--evaluations", "2")
# The same as `minbert train`, without what follows the training.
WITHOUT_PREDICTIONS = """
import sys
from minbert.launch.options import parse_run_config
from minbert.launch.worker import work
from minbert.trainer.run.preparation import prepare
sys.exit(work(prepare(parse_run_config(sys.argv[1:])), predictions=False))
"""


@dataclass(frozen=True)
class Options:
    """Benchmark of search throughput on the built-in corpus."""

    trials: int = 6
    rounds: int = 2
    """Turns that each side takes."""
    epochs: float = 5
    """Budget of each trial."""


def main() -> None:
    options = tyro.cli(Options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seconds: dict[str, list[float]] = {"search": [], "by hand": [], "by hand, no predictions": []}
    startups: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINBERT_CACHE"] = f"{folder}/cache"
        _by_hand(options, Path(folder) / "warm-up", 1, predictions=False)
        for turn in range(options.rounds):
            place = Path(folder) / str(turn)
            for side in seconds:
                started, wall = perf_counter(), time()
                if side == "search":
                    _search(options, place / "search")
                else:
                    _by_hand(options, place / "hand", options.trials, predictions=side == "by hand")
                seconds[side].append(perf_counter() - started)
                if side == "search":
                    startups.append(_startups(read_trials(place / "search" / "trials"), wall))
                shutil.rmtree(place)
                print(f"turn {turn + 1}, {side}: {seconds[side][-1]:.1f} s", flush=True)
    _print(options, seconds, startups)


def _search(options: Options, folder: Path) -> None:
    words = ["tune", "--search", str(folder), "--samples", str(options.trials), "--concurrent", "1"]
    words += ["--scheduler", "none", "--epochs", str(options.epochs), *LIKE]
    _run([sys.executable, "-m", "minbert.launch.main", *words, "--space", *SPACE])


def _by_hand(options: Options, folder: Path, trials: int, predictions: bool) -> None:
    space = parse_space(SPACE)
    command = ["-m", "minbert.launch.main", "train"] if predictions else ["-c", WITHOUT_PREDICTIONS]
    for number in range(trials):
        words = ["--run", str(folder / str(number)), "--epochs", str(options.epochs), *LIKE]
        words += [f"--{name.replace('_', '-')}={value}" for name, value in draw(space, 0, number).items()]
        _run([sys.executable, *command, *words])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _startups(trials: list[Trial], started: float) -> list[float]:
    """Seconds from the end of the trial before to the end of a trial's first step, when its metrics file is born."""
    found = []
    for trial in trials:
        born = subprocess.run(
            ["stat", "--format=%.6W", trial.folder / "metrics.jsonl"], capture_output=True, check=True
        )
        found.append(float(born.stdout) - started)
        started = trial.ended
    return found


def _print(options: Options, seconds: dict[str, list[float]], startups: list[list[float]]) -> None:
    print(f"{platform.processor() or platform.machine()}, {options}")
    for side, turns in seconds.items():
        rates = [3600 * options.trials / turn for turn in turns]
        print(f"{side:<24} {statistics.median(rates):7.0f} trials an hour (median of {len(turns)} turns)")
    for side in ("by hand", "by hand, no predictions"):
        ratios = sorted(ours / theirs for ours, theirs in zip(seconds["search"], seconds[side]))
        print(f"time / {side}: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    later = [value for turn in startups for value in turn[1:]]
    first = statistics.median(turn[0] for turn in startups)
    print(f"start-up: first trial {first:.1f} s, later {statistics.median(later):.2f} s (to {max(later):.2f})")


if __name__ == "__main__":
    main()
