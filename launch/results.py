"""What trained models make of a run's splits: scores, and the course's prediction files.

Beside the files lies `predictions.json`, which tells for each of them what was predicted from what by which model.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from minbert.data.errors import UserError
from minbert.data.files import alone, naming, replacing, to_json
from minbert.data.sequences.tokens import Tokenizer
from minbert.data.task import Split
from minbert.trainer.checkpoint.saving import now
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.averaging import mean_predictions
from minbert.trainer.evaluation.prediction_files import RECORD, predicted_tasks, prediction_file_name, write_predictions
from minbert.trainer.evaluation.scoring import beside, count_batches, outputs, overall, score
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.processes.world import World, pick_device
from minbert.trainer.run.data import load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import PredictionProgress, score_table
from minbert.trainer.run.saved_model import load_model
from minbert.trainer.run.soup import require_alike

REPORTED: tuple[Split, ...] = ("dev", "test")
PATIENCE = 60.0  # seconds for another command that writes one prediction file


def is_reported(run: RunFolder) -> bool:
    """Whether all prediction files are there, and of the best model."""
    config = run.read_config()
    tasks = predicted_tasks(config)
    names = [prediction_file_name(config, task, split) for task in tasks for split in REPORTED if task.has(split)]
    files = [run.predictions / name for name in names]
    return all(file.exists() and file.stat().st_mtime >= run.best_model.stat().st_mtime for file in files)


def report(run: RunFolder, stop: StopRequest) -> None:
    """Score the best model on the whole dev splits, write all prediction files, and print a table; or leave that to
    others if `stop` has a signal."""
    config = whole_splits(run.read_config())
    machine = config.progress == "json"
    console = Console(quiet=machine)
    results = predict_splits([run], config, REPORTED, run.predictions, console, lambda: stop.signal is not None)
    if machine:
        event = {
            "event": "results" if results else "stopped",
            "run": str(run.path),
            "scores": (results or {}).get("dev"),
        }
        print(to_json(event), flush=True)
    if results is None:
        console.print(
            f"Stopped amid the predictions; the run is finished. To get them: minbert predict {run.path}   "
            f"Scores: minbert evaluate {run.path}",
            highlight=False,
            soft_wrap=True,
        )
        return
    console.print(score_table("Best model, dev", config.corpus.tasks, {"score": results["dev"]}))
    if predicted_tasks(config):
        text = f"Predictions: {run.predictions}   Model: {run.best_model}"
    else:
        text = f"For --model, and for transformers: {run.pretrained}"
    console.print(text, highlight=False, soft_wrap=True)


def whole_splits(config: RunConfig, data: str | None = None) -> RunConfig:
    """The run's configuration, without the limit on evaluation during training, and perhaps with other data."""
    corpus = config.corpus.model_copy(update={"eval_limit": None} | ({} if data is None else {"data": data}))
    return config.model_copy(update={"corpus": corpus})


class Member(NamedTuple):
    """A run's best model, one of those whose predictions are averaged."""

    run: RunFolder
    config: RunConfig
    model: MultitaskModel
    tokenizer: Tokenizer
    step: int

    def sees(self, config: RunConfig) -> RunConfig:
        """What describes the data of `config` as this model is to see it: the same rows, in its own encoding."""
        same = ("data", "tasks", "bad_rows", "eval_limit", "train_limit", "augmented", "cache")
        corpus = self.config.corpus.model_copy(update={name: getattr(config.corpus, name) for name in same})
        return self.config.model_copy(update={"corpus": corpus})


def load_members(runs: Sequence[RunFolder], world: World) -> list[Member]:
    """The best model of each run. Raises UserError if one is missing, or they were trained on other labels."""
    require_alike(runs)
    members = []
    for run in runs:
        model, tokenizer, saved = load_model(run, world.device)
        members.append(Member(run, run.read_config(), model, tokenizer, saved["step"]))
    return members


def predict_splits(
    runs: Sequence[RunFolder],
    config: RunConfig,
    splits: tuple[Split, ...],
    folder: Path | None,
    console: Console,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[Split, dict[str, float]] | None:
    """Predict every task's `splits` with the best models of the runs, the mean of what several say; scores of those
    that are labelled. `config` is the first run's.

    The files go to `folder`, if there is one; `console` shows how far it is. A task that has no test split is left out
    of it. None if `stopped` said so, which is asked before each batch. Raises UserError where data is missing, and if
    no task has any of the splits.
    """
    if stopped():
        return None
    world = World(0, 1, pick_device(config.parallel))
    members = load_members(runs, world)
    about = {"data": config.corpus.data} | about_models(members) if folder else {}
    predicted = {task.name for task in predicted_tasks(config)}
    parts = {
        (split, task.name): [load_split(each.sees(config), task.name, split, each.tokenizer) for each in members]
        for split in splits
        for task in config.corpus.tasks
        if task.has(split) and (task.name in predicted or split != "test")
    }
    if splits == ("test",) and predicted and not parts:
        raise UserError(f"no task has a test split: the declaration of {min(predicted)} names no file in files.test")
    results: dict[Split, dict[str, float]] = {split: {} for split in splits}
    total = sum(count_batches(tokenised) for each in parts.values() for tokenised in each)
    with PredictionProgress(total, console) as progress:
        for (split, name), seen in parts.items():
            task, ask = config.corpus.task(name), progress.counting(f"{name} {split}", stopped)
            raw = []
            for member, tokenised in zip(members, seen):
                if (said := outputs(member.model, task, tokenised, world, ask)) is None:
                    return None
                raw.append(said)
            found, first = mean_predictions(task, raw), seen[0]
            if first.labels is not None:
                results[split][name] = score(task, found, first.labels)
                more = beside(task, found, first.labels)
                results[split] |= {f"{name}/{metric}": value for metric, value in more.items()}
            if folder and name in predicted:
                path = folder / prediction_file_name(config, task, split)
                what = {"task": name, "split": split, "rows": len(first), "examples": first.fingerprint()}
                with recorded(folder / RECORD, path.name, what | about):
                    write_predictions(path, task, first.ids, found.tolist())
    return {
        split: scores | ({"overall": overall(config.corpus.tasks, scores)} if scores else {})
        for split, scores in results.items()
    }


def about_models(members: Sequence[Member]) -> dict[str, Any]:
    """What a record tells of the model, or of several, and the moment."""
    told = [about_model(member.run, member.step) for member in members]
    return told[0] if len(told) == 1 else {"mean_of": told, "written": now()}


def about_model(run: RunFolder, step: int) -> dict[str, Any]:
    """What a record tells of the model and the moment."""
    with run.best_model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"model": str(run.best_model.absolute()), "model_sha256": digest, "step": step, "written": now()}


@contextmanager
def recorded(path: Path, name: str, entry: dict[str, Any]) -> Iterator[None]:
    """Write the file `name` in the block; what there is to tell of it goes into the record at `path` beside it, which
    may tell of others. Whoever writes there meanwhile is waited for: a run that ends may predict beside a command.

    Raises UserError if that takes too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = f"another command writes {path}; wait for it, or name another place"
    with naming(path), alone(path.with_name(f".{path.name}.lock"), told, PATIENCE):
        yield
        try:
            known = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(known | {name: entry}, indent=1) + "\n")
