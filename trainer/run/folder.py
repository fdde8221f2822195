"""The run folder: everything a run is and leaves behind, in one place.

config.yaml       the resolved configuration          metrics.jsonl    a line per logged step and evaluation
environment.json  versions, machine, command          logs/            one file per rank
code.diff         uncommitted changes of the code     tensorboard/     the same metrics for TensorBoard
encoder/          the encoder's shape and tokenizer   checkpoints/     what resuming needs
best.safetensors  the model with the best score       predictions/     the course's prediction files
gramians.jsonl    inner products of the tasks' gradients, layer by layer
aggregator/       the source of an aggregator of the user's own
slurm/, code/     of a submitted run: its jobs' files and records, and the code that they run
model/            of pretraining: the best model as a checkpoint for --model and transformers
saved.json        the step of the newest checkpoint that was written
trackers.json     what the experiment trackers call the run
average.json      of a mean of runs' weights, which was never trained: what it is the mean of
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from minbert.data.errors import UserError
from minbert.data.files import LineFile, lock, replacing, to_json
from minbert.data.reading import read_json, read_json_lines, read_small, read_yaml
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.processes.stop import StopRequest

log = logging.getLogger(__name__)

LOCK = ".lock"
RECORDED_PACKAGES = ("minbert", "torch", "deepspeed", "accelerate", "transformers", "tokenizers", "numpy")


class RunFolder:
    """Paths of a run, and its small files. Creating the object touches nothing on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.gramians_file = path / "gramians.jsonl"
        self.encoder = path / "encoder"
        self.logs = path / "logs"
        self.trackers = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.best_model = path / "best.safetensors"
        self.predictions = path / "predictions"
        self.pretrained = path / "model"
        self.own_code = path / "aggregator"
        self.average = path / "average.json"
        self._metrics, self._gramians = LineFile(self.metrics_file), LineFile(self.gramians_file)

    @staticmethod
    def existing(path: Path) -> "RunFolder":
        """The folder of a run that was started. Raises UserError where there is none."""
        run = RunFolder(path)
        if not run.config_file.exists():
            raise UserError(f"{path} is not a run folder: it has no config.yaml; name one that minbert train has made")
        return run

    @property
    def vocabulary(self) -> dict[str, str]:
        """The files that say what the model's tokens are, each with the beginning of its SHA-256."""
        files = [path for path in sorted(self.encoder.iterdir()) if path.name in ("vocab.txt", "tokenizer.json")]
        return {path.name: f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" for path in files}

    def read_config(self) -> RunConfig:
        return read_config_file(self.config_file)

    def write_config(self, config: RunConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.config_file) as temporary:
            temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def write_environment(self) -> None:
        """Record the versions, the machine, the command and the state of the code."""
        commit, diff = _code_state(Path(__file__).resolve().parents[2])
        record = {
            "command": sys.argv,
            "python": platform.python_version(),
            "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
            "packages": {name: _version(name) for name in RECORDED_PACKAGES},
            "commit": commit,
            "uncommitted_changes": bool(diff),
        }
        for name, text in (("environment.json", to_json(record, indent=2) + "\n"), ("code.diff", diff)):
            with replacing(self.path / name) as temporary:
                temporary.write_text(text)

    def code_state(self) -> dict[str, Any]:
        """Commit and uncommitted changes of the code, as they were when the run was started last."""
        record = read_json(self.path / "environment.json")
        diff = read_small(self.path / "code.diff")
        return {"commit": record.get("commit"), "changes_sha256": hashlib.sha256(diff).hexdigest() if diff else None}

    @contextmanager
    def locked(self, patience: float = 0.0, stop: StopRequest | None = None) -> Iterator[int | None]:
        """Own the folder: who has not locked it writes nothing there.

        A folder that is not there is made, and is removed again if the block fails before anything was started. Yields
        the lock's descriptor: the lock lasts as long as a process that has it, however that ends; None on a file
        system without locks, which does without. Raises UserError if somebody else has it, after `patience` seconds or
        when `stop` has a signal.
        """
        parents = [folder for folder in self.path.parents if not folder.exists()]
        made = self._make()
        kept = (self.path / LOCK).exists()
        descriptor = self._take(patience, stop)
        made = made and not self._entries()
        try:
            yield descriptor
        except BaseException:
            if made and not self.begun and not (self.path / "slurm" / "submission.json").exists():
                shutil.rmtree(self.path, ignore_errors=True)
                for folder in parents:
                    with suppress(OSError):  # somebody uses it
                        folder.rmdir()
            raise
        finally:
            if descriptor is not None:
                if not kept and not self.config_file.exists():  # it is no run's
                    (self.path / LOCK).unlink(missing_ok=True)
                os.close(descriptor)

    def _make(self) -> bool:
        """Whether the folder was not there. Raises UserError where it cannot be made."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
            return True
        except OSError as error:
            if self.path.is_dir():
                return False
            reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
            raise UserError(f"run folder {self.path} cannot be used: {reason}; give another") from None

    def _take(self, patience: float, stop: StopRequest | None) -> int | None:
        deadline = time.monotonic() + patience
        told = False
        while True:
            try:
                return lock(self.path / LOCK)
            except BlockingIOError:
                if time.monotonic() >= deadline or (stop and stop.signal):
                    raise UserError(
                        f"{self.path} is being trained by another process; wait for it, or stop it first"
                    ) from None
                if not told:
                    log.warning("%s is still held by an earlier start's processes: waiting for them", self.path)
                told = True
                time.sleep(0.1)
            except FileNotFoundError:
                self._make()  # a start that failed has removed it meanwhile
            except OSError as error:
                log.info("%s cannot be locked: %s", self.path, error)
                return None

    def _entries(self) -> set[str]:
        return {entry.name for entry in self.path.iterdir()} - {LOCK}

    @property
    def begun(self) -> bool:
        """Whether a process of the run has ever begun to train: each has a log."""
        return any(self.logs.glob("rank-*.log"))

    def append_metrics(self, record: dict[str, Any]) -> None:
        self._metrics.append(to_json(record))

    def append_gramians(self, record: dict[str, Any]) -> None:
        self._gramians.append(to_json(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines that hold numbers, as we write them."""
        return [
            record
            for record in read_json_lines(self.metrics_file)
            if all(isinstance(value, int | float | None) for value in record.values())
        ]

    def rewind(self, step: int) -> None:
        """Drop what was logged and measured after `step`, which the run will do again."""
        logs = [(self.metrics_file, self.read_metrics())]
        if self.gramians_file.exists():
            logs.append((self.gramians_file, read_json_lines(self.gramians_file)))
        for file, records in logs:
            with replacing(file) as temporary:
                temporary.write_text("".join(to_json(record) + "\n" for record in records if record["step"] <= step))


def read_config_file(path: Path) -> RunConfig:
    """A configuration file (YAML). Raises UserError naming the file and every key that is wrong."""
    return parse_config(read_yaml(path), str(path))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _code_state(folder: Path) -> tuple[str | None, str]:
    """Commit and uncommitted changes of the checkout `folder`; (None, "") for an installed package."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != folder:
            return None, ""  # an installed package inside somebody else's checkout
        return git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None, ""
