"""What a trained model makes of a run's splits: scores, and the course's prediction files.

Beside the files lies `predictions.json`, which tells for each of them what was predicted from what by which model.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from minbert.data.files import replacing, to_json
from minbert.data.task import Split, Task
from minbert.trainer.checkpoint.saving import now
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.prediction_files import prediction_file_name, write_predictions
from minbert.trainer.evaluation.scoring import beside, count_batches, overall, predict, score
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.processes.world import World, pick_device
from minbert.trainer.run.data import load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import PredictionProgress, score_table
from minbert.trainer.run.saved_model import load_model

REPORTED: tuple[Split, ...] = ("dev", "test")
RECORD = "predictions.json"


def is_reported(run: RunFolder) -> bool:
    """Whether all prediction files are there, and of the best model."""
    config = run.read_config()
    names = [prediction_file_name(config, task, split) for task in predicted_tasks(config) for split in REPORTED]
    files = [run.predictions / name for name in names]
    return all(file.exists() and file.stat().st_mtime >= run.best_model.stat().st_mtime for file in files)


def report(run: RunFolder, stop: StopRequest) -> None:
    """Score the best model on the whole dev splits, write all prediction files, and print a table; or leave that to
    others if `stop` has a signal."""
    config = whole_splits(run.read_config())
    machine = config.progress == "json"
    console = Console(quiet=machine)
    results = predict_splits(run, config, REPORTED, run.predictions, console, lambda: stop.signal is not None)
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


def predicted_tasks(config: RunConfig) -> list[Task]:
    """Tasks of which there are prediction files: a masked language model predicts for nobody."""
    return [task for task in config.corpus.tasks if task.kind != "masked_lm"]


def whole_splits(config: RunConfig, data: str | None = None) -> RunConfig:
    """The run's configuration, without the limit on evaluation during training, and perhaps with other data."""
    corpus = config.corpus.model_copy(update={"eval_limit": None} | ({} if data is None else {"data": data}))
    return config.model_copy(update={"corpus": corpus})


def predict_splits(
    run: RunFolder,
    config: RunConfig,
    splits: tuple[Split, ...],
    folder: Path | None,
    console: Console,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[Split, dict[str, float]] | None:
    """Predict every task's `splits` with the run's best model; scores of those that are labelled.

    The files go to `folder`, if there is one; `console` shows how far it is. None if `stopped` said so, which is asked
    before each batch. Raises UserError where data is missing.
    """
    if stopped():
        return None
    world = World(0, 1, pick_device(config.parallel))
    model, tokenizer, saved = load_model(run, world.device)
    about = {"data": config.corpus.data} | about_model(run, saved["step"]) if folder else {}
    predicted = {task.name for task in predicted_tasks(config)}
    parts = {
        (split, name): load_split(config, name, split, tokenizer)
        for split in splits
        for name in config.corpus.names
        if name in predicted or split != "test"
    }
    results: dict[Split, dict[str, float]] = {split: {} for split in splits}
    with PredictionProgress(sum(map(count_batches, parts.values())), console) as progress:
        for (split, name), tokenised in parts.items():
            task, ask = config.corpus.task(name), progress.counting(f"{name} {split}", stopped)
            if (found := predict(model, task, tokenised, world, ask)) is None:
                return None
            if tokenised.labels is not None:
                results[split][name] = score(task, found, tokenised.labels)
                more = beside(task, found, tokenised.labels)
                results[split] |= {f"{name}/{metric}": value for metric, value in more.items()}
            if folder and name in predicted:
                path = folder / prediction_file_name(config, task, split)
                write_predictions(path, task, tokenised.ids, found.tolist())
                what = {"task": name, "split": split, "rows": len(tokenised), "examples": tokenised.fingerprint()}
                write_record(folder / RECORD, path.name, what | about)
    return {
        split: scores | ({"overall": overall(config.corpus.tasks, scores)} if scores else {})
        for split, scores in results.items()
    }


def about_model(run: RunFolder, step: int) -> dict[str, Any]:
    """What a record tells of the model and the moment."""
    with run.best_model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"model": str(run.best_model.absolute()), "model_sha256": digest, "step": step, "written": now()}


def write_record(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put what there is to tell of the file `name` into the record at `path`, which may tell of others."""
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(known | {name: entry}, indent=1) + "\n")
