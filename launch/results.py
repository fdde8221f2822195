"""What a trained model makes of a run's splits: scores, and the course's prediction files."""

from rich.console import Console

from minbert.data.task import Split
from minbert.trainer.config import RunConfig
from minbert.trainer.distributed import World, pick_device
from minbert.trainer.evaluation import overall, predict, score
from minbert.trainer.prediction_files import prediction_file_name, write_predictions
from minbert.trainer.preparation import load_split
from minbert.trainer.progress import score_table
from minbert.trainer.run_folder import RunFolder
from minbert.trainer.saved_model import load_model

REPORTED: tuple[Split, ...] = ("dev", "test")


def is_reported(run: RunFolder) -> bool:
    """Whether all prediction files are there, and of the best model."""
    config = run.read_config()
    names = [
        prediction_file_name(config, config.corpus.task(name), split)
        for name in config.corpus.names
        for split in REPORTED
    ]
    files = [run.predictions / name for name in names]
    return all(file.exists() and file.stat().st_mtime >= run.best_model.stat().st_mtime for file in files)


def report(run: RunFolder) -> None:
    """Score the best model on the whole dev splits, write all prediction files, and print a table."""
    config = whole_splits(run.read_config())
    scores = predict_splits(run, config, REPORTED)["dev"]
    console = Console()
    console.print(score_table("Best model, dev", config.corpus.tasks, {"score": scores}))
    console.print(f"Predictions: {run.predictions}   Model: {run.best_model}", highlight=False, soft_wrap=True)


def whole_splits(config: RunConfig, data: str | None = None) -> RunConfig:
    """The run's configuration, without the limit on evaluation during training, and perhaps with other data."""
    corpus = config.corpus.model_copy(update={"eval_limit": None} | ({} if data is None else {"data": data}))
    return config.model_copy(update={"corpus": corpus})


def predict_splits(
    run: RunFolder, config: RunConfig, splits: tuple[Split, ...], write: bool = True
) -> dict[Split, dict[str, float]]:
    """Predict every task's `splits` with the run's best model; scores of those that are labelled.

    The files go to the run's predictions folder unless `write` is off. Raises UserError where data is missing.
    """
    world = World(0, 1, pick_device(config.parallel))
    model, tokenizer, _ = load_model(run, world.device)
    results: dict[Split, dict[str, float]] = {}
    for split in splits:
        scores: dict[str, float] = {}
        for name in config.corpus.names:
            task, tokenised = config.corpus.task(name), load_split(config, name, split, tokenizer)
            predicted = predict(model, task, tokenised, world)
            if tokenised.labels is not None:
                scores[name] = score(task, predicted, tokenised.labels)
            if write:
                path = run.predictions / prediction_file_name(config, task, split)
                write_predictions(path, task, tokenised.ids, predicted.tolist())
        results[split] = scores | ({"overall": overall(config.corpus.tasks, scores)} if scores else {})
    return results
