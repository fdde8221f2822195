"""The commands as functions, and a run as an object: what `import minbert` offers (docs/python.md).

Options are those of the command line by their names in Python, `zero_stage=2` for `--zero-stage 2`, and a mistake
raises the same `UserError`. A run is trained in processes of its own: the notebook's keeps its memory, its threads and
its signals, and an interrupt saves the run.
"""

import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

import numpy as np

from minbert.data.errors import UserError
from minbert.data.task import Split, Task
from minbert.launch.options import build_run_config
from minbert.trainer.config import RunConfig, flatten
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from minbert.tuning.runs_compared import Compared

P, T = ParamSpec("P"), TypeVar("T")
Path_ = str | Path
WIDTH = 100  # of a table, in columns
COUNTERS = ("step", "time")  # of a line of metrics.jsonl: where it stands, not what was measured


def _on_pytorch(function: Callable[P, T]) -> Callable[P, T]:
    """Import PyTorch before the first call. It cannot be imported a second time in a process, so an interrupt waits
    until it is whole: otherwise no later cell of the notebook could use it."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        if "torch" not in sys.modules and threading.current_thread() is threading.main_thread():
            heard: list[int] = []
            before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
            try:
                import torch  # noqa: F401
            finally:
                signal.signal(signal.SIGINT, before or signal.SIG_DFL)
            if heard and callable(before):
                before(heard[0], None)
        return function(*arguments, **options)

    return call


class Unfinished(Exception):
    """A run that ended before its budget: `run` is what there is of it, `code` the exit code (docs/runs.md)."""

    def __init__(self, run: "Run", code: int):
        self.run, self.code = run, code
        if code == ExitCode.INTERRUPTED:
            text = f"{run.path} was interrupted, and saved: run.resume() goes on"
        else:
            text = f"{run.path} ended with exit code {code}; what it said is above, and in {run.path / 'logs'}"
        super().__init__(text)


@dataclass(frozen=True)
class Curve:
    """Something measured n times: at which `steps` (n,) and its `values` (n,)."""

    steps: np.ndarray
    values: np.ndarray


class Run:
    """A run in its folder, over or not. Nothing is read before it is asked for, and curves are read anew each time.

    Raises UserError where there is no run.
    """

    def __init__(self, path: Path_):
        self.folder = RunFolder.existing(Path(path))
        self._loaded: tuple[int | None, tuple[Any, Any, Any]] | None = None  # when it was written, and what it is

    def __repr__(self) -> str:
        scores = self.scores if self.folder.best_model.exists() else {}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        return f"Run({str(self.path)!r}{', ' if shown else ''}{shown})"

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def config(self) -> RunConfig:
        """The resolved configuration, sections and all: `run.config.optimizer.lr`."""
        return self.folder.read_config()

    @property
    def options(self) -> dict[str, Any]:
        """The same flat, every option by its own name: `minbert.train(**run.options | {...})` is another run."""
        return {name: value for name, value in flatten(self.config).items() if name not in ("run", "recipe")}

    @property
    def step(self) -> int:
        """The step of the best model. Raises UserError if there is none yet."""
        return int(self._best["step"])

    @property
    def scores(self) -> dict[str, float]:
        """The dev scores of the best model, by task, and `overall`, as they were when it was saved (of `eval_limit`
        examples, if that is set). Raises UserError if there is none yet."""
        return json.loads(self._best["scores"])

    @property
    def _best(self) -> dict[str, str]:
        if not self.folder.best_model.exists():
            raise UserError(f"{self.path} holds no trained model yet: the first evaluation writes best.safetensors")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder.best_model, "numpy") as file:
                return file.metadata()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder.best_model} cannot be read: {error}") from None

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: each step that was logged, and each evaluation (`dev/...`)."""
        return self.folder.read_metrics()

    @property
    def curves(self) -> dict[str, Curve]:
        """Everything that was measured, by its name in metrics.jsonl: `run.curves["dev/overall"].values`."""
        points: dict[str, list[tuple[int, float]]] = {}
        for record in self.records:
            for name, value in record.items():
                if name not in COUNTERS and value is not None:
                    points.setdefault(name, []).append((record["step"], value))
        return {
            name: Curve(np.array([step for step, _ in found]), np.array([value for _, value in found], float))
            for name, found in points.items()
        }

    def frame(self) -> "pd.DataFrame":
        """The curves as a data frame, a row per logged step and a column per measurement. Needs pandas."""
        frame = _pandas().DataFrame(self.records)
        return frame.groupby("step").first() if len(frame) else frame

    def resume(self, *, force: bool = False, **options: Any) -> "Run":
        """Go on from the newest checkpoint, with options that a resumed run may change: `run.resume(epochs=12)`.

        Raises UserError for other options, and Unfinished if it ends before its budget.
        """
        if "run" in options:
            raise UserError("run.resume() goes on in the run's own folder; minbert.train(run=...) starts another")
        return _train({"run": self.path} | options, force)

    @_on_pytorch
    def evaluate(self, split: Split = "dev", data: str | None = None) -> dict[str, float]:
        """Scores of the best model on a whole split that is labelled, perhaps of other data. Raises UserError."""
        from minbert.launch.results import predict_splits, whole_splits

        if split not in get_args(Split):
            raise UserError(f"there is no split {split!r}; there are {', '.join(get_args(Split))}")
        config = whole_splits(self.config, data)
        found = predict_splits([self.folder], config, (split,), None, _silent())
        scores = found[split] if found else {}
        if not scores:
            raise UserError(f"the {split} split of {config.corpus.data} has no labels; run.predict() predicts texts")
        return scores

    @_on_pytorch
    def predict(self, texts: Sequence[str | tuple[str, str]], task: str | None = None) -> np.ndarray:
        """What the best model says of n texts, or pairs of texts: (n,) classes by number, 0 or 1, or similarities; of a
        task with several labels (n, labels) 0 or 1. `task` may be left out of a run that has one. Raises UserError."""
        from minbert.trainer.objectives.supervised import predictions

        return predictions(*self._outputs(texts, task)).numpy()

    @_on_pytorch
    def probabilities(self, texts: Sequence[str | tuple[str, str]], task: str | None = None) -> np.ndarray:
        """(n, classes) probabilities of a classifier, or (n, labels) of a task with several labels, each for itself."""
        from minbert.tuning.report.answers import probabilities

        about, raw = self._outputs(texts, task)
        if about.kind == "regression":
            raise UserError(f"{about.name} is a regression: it has no classes; run.predict() tells its values")
        return probabilities(about, raw)

    @_on_pytorch
    def export(self, folder: Path_) -> Path:
        """`minbert export`: a folder for transformers, sentence-transformers, and `model=`. Raises UserError."""
        from minbert.launch.commands.export import export

        return export(self.folder, Path(folder))

    @_on_pytorch
    def report(self, out: Path_ | None = None) -> Path:
        """`minbert report`: writes a page, by default report.html in the folder; returns where. Raises UserError."""
        from minbert.launch.commands.report import main

        path = Path(out) if out else self.path / "report.html"
        main([str(self.path), f"--out={path}"])
        return path

    def _load(self) -> tuple[Any, Any, Any]:
        """The best model, its tokenizer and the world; read again only where training has written another one."""
        from minbert.trainer.processes.world import World, pick_device
        from minbert.trainer.run.saved_model import load_model

        written = self.folder.best_model.stat().st_mtime_ns if self.folder.best_model.exists() else None
        if self._loaded is None or self._loaded[0] != written:
            world = World(0, 1, pick_device(self.config.parallel))
            self._loaded = written, (*load_model(self.folder, world.device)[:2], world)
        return self._loaded[1]

    def _outputs(self, texts: Sequence[str | tuple[str, str]], name: str | None) -> tuple[Task, Any]:
        """The task, and the model's raw outputs (n, outputs)."""
        from minbert.launch.commands.predict import find_task
        from minbert.trainer.evaluation.scoring import outputs
        from minbert.trainer.run.data import tokenise_texts

        task = find_task(self.folder, name)
        rows = [tuple(text) if isinstance(text, list | tuple) else (text,) for text in texts]
        if isinstance(texts, str) or any(len(row) != len(task.sentences) for row in rows):
            wanted = "a list of pairs of sentences" if task.is_pair else "a list of sentences"
            raise UserError(f"task {task.name} takes {wanted}")
        if not rows:
            raise UserError("there is no text to predict")
        for number, row in enumerate(rows):
            if wrong := [text for text in row if not isinstance(text, str)]:
                raise UserError(f"text {number} is {wrong[0]!r}, not a text")
        columns = [list(column) for column in zip(*rows)]
        model, tokenizer, world = self._load()
        return task, outputs(model, task, tokenise_texts(self.config, task, columns, tokenizer), world)


class Comparison:
    """Runs beside each other, as `minbert compare` tells it; printed, it is that command's tables. Runs that differ in
    their seed only are one of `names`, and a list has a value for each of these."""

    def __init__(self, found: "Compared"):
        self.names = [group.name for group in found.groups]
        self.options = found.options  # in which they differ
        self.differences = found.differences  # to the first: name -> metric -> difference with its 95% interval
        self._found = found

    @property
    def scores(self) -> dict[str, list[float | None]]:
        """Best dev scores by metric, of several seeds their mean; None where there is none."""
        means = [{name: value.mean for name, value in group.spreads().items()} for group in self._found.groups]
        return {
            name: [each.get(name) for each in means] for name in dict.fromkeys(name for each in means for name in each)
        }

    def frame(self) -> "pd.DataFrame":
        """Options and scores as a data frame, a row for each of `names`. Needs pandas."""
        return _pandas().DataFrame(self.options | self.scores, index=self.names)

    def __str__(self) -> str:
        from rich.console import Console

        from minbert.launch.commands.compare import tables

        console = Console(file=io.StringIO(), width=WIDTH)
        for table in tables(self._found):
            console.print(table)
        return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))

    __repr__ = __str__


def train(*, force: bool = False, **options: Any) -> Run:
    """`minbert train`: train the run that the options describe, or go on with the one in the folder `run`.

    Raises UserError for what can be put right, and Unfinished if the run ends before its budget.
    """
    return _train(options, force)


def runs(folder: Path_ = "runs") -> list[Run]:
    """The runs right below a folder, the oldest first."""
    found = [path.parent for path in Path(folder).glob("*/config.yaml")]
    return [Run(path) for path in sorted(found, key=lambda path: ((path / "config.yaml").stat().st_mtime, path.name))]


@_on_pytorch
def compare(*compared: Run | Path_) -> Comparison:
    """`minbert compare`: two runs or more, or their folders. Raises UserError."""
    from minbert.tuning.runs_compared import compare_runs

    if len(compared) < 2:
        raise UserError(f"comparing takes two runs or more, not {len(compared)}")
    return Comparison(compare_runs([run.path if isinstance(run, Run) else Path(run) for run in compared]))


@_on_pytorch
def _train(options: dict[str, Any], force: bool) -> Run:
    from minbert.launch.commands.train import start
    from minbert.trainer.run.preparation import in_folder

    if threading.current_thread() is not threading.main_thread():
        raise UserError("a run is started from the main thread, which hears Ctrl-C; for several, start processes")
    config = in_folder(build_run_config(options))
    code = start(config, force, apart=True)
    run = Run(config.folder)
    if code != ExitCode.FINISHED:
        raise Unfinished(run, code)
    return run


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("a data frame needs pandas: pip install pandas; `run.curves` are arrays without") from None
    return pandas


def _silent() -> Any:
    from rich.console import Console

    return Console(quiet=True)
