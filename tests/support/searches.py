"""Small searches as tests start them, what their trials leave, and what their folders tell."""

import json
import subprocess
import sys
from pathlib import Path

from small_runs import CORPUS
from waiting import PATIENCE, until

from minbert.trainer.run.folder import RunFolder
from minbert.tuning.trial import Trial, read_trials

TINY = ["--data", CORPUS, "--train-limit", "60", "--eval-limit", "20", "--batch-size", "8", "--trackers"]


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "minbert.launch.main", "tune", "--search", str(folder), *words]


def small_search(folder: Path, *words: str) -> list[str]:
    space = ["--space", "lr=loguniform(1e-4,5e-3)", "hidden_layers=1,2"]
    return command(folder, *TINY, *words, *space)


def ended(words: list[str], code: int) -> subprocess.CompletedProcess:
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def finish(words: list[str]) -> str:
    return ended(words, 0).stdout


def refused(words: list[str]) -> str:
    said = ended(words, 2).stderr
    assert "Traceback" not in said
    return said


def await_trials(folder: Path, process: subprocess.Popen, reached) -> list[Trial]:
    """The trials, once they have `reached` what is asked; of a search in this process."""

    def there() -> list[Trial] | None:
        return trials if reached(trials := trials_of(folder)) else None

    return until(there, "trials", process, seen=lambda: trials_of(folder), pause=0.2)


def trials_of(folder: Path) -> list[Trial]:
    """Those that there are so far."""
    try:
        return read_trials(folder / "trials")
    except (json.JSONDecodeError, FileNotFoundError):
        return []


def write_curve(trial: Trial, scores: list[float], steps: int) -> None:
    """What a run that reached the given overall scores at equal distances leaves."""
    trial.steps, trial.score = steps, max(scores)
    trial.folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(trial.folder)
    for place, score in enumerate(scores, 1):
        trial.step = place * steps // 4
        parts = {"dev/sst": score - 0.1, "dev/quora": score + 0.05, "dev/sts": score, "dev/overall": score}
        run.append_metrics({"step": trial.step, **parts})
    trial.write()
