"""A small run, as tests submit it."""

from small_runs import CORPUS, minbert

SMALL = ["--data", CORPUS, "--train-limit", "120", "--eval-limit", "40", "--batch-size", "8", "--steps", "4"]
SMALL += ["--log-every", "1"]


def submit(*words: object) -> int:
    """The exit code of `minbert submit`."""
    return minbert("submit", *words)
