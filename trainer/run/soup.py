"""The mean of several runs' weights as one model (Wortsman et al. 2022, "Model soups", the uniform soup).

It is written as a run folder that was never trained, which `evaluate`, `predict`, `export` and `--teachers` take like
any other.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minbert.data.differences import differences, refuse
from minbert.data.errors import UserError
from minbert.data.files import replacing, to_json
from minbert.data.task import Task
from minbert.trainer.config import RunConfig
from minbert.trainer.model.weights import read_config
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import best_weights, save_model


def write_soup(runs: Sequence[RunFolder], folder: Path) -> None:
    """Write the mean of the best models of `runs` into an empty `folder`. Raises UserError where they are no models of
    the same shape, tasks and vocabulary."""
    configs = [run.read_config() for run in runs]
    for run, config in zip(runs[1:], configs[1:]):
        different = differences(_shape(runs[0], configs[0]), _shape(run, config), *_in(runs[0], run))
        if different:
            refuse(
                "models of different shapes have no mean", different, "`minbert predict RUN RUN ...` averages outputs."
            )
    total: dict[str, Tensor] = {}
    steps = []
    for run in runs:
        state, described = best_weights(run)
        steps.append(described["step"])
        for name, tensor in state.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    mean = {name: (tensor / len(runs)).to(torch.float32) for name, tensor in total.items()}
    soup = RunFolder(folder)
    shutil.copytree(runs[0].encoder, soup.encoder)
    save_model(soup.best_model, mean, max(steps), {})
    parts = [{"run": str(run.path.absolute()), "step": step} for run, step in zip(runs, steps)]
    with replacing(soup.average) as temporary:
        temporary.write_text(to_json({"mean_of": parts}, indent=2) + "\n")
    soup.write_environment()
    soup.write_config(configs[0].model_copy(update={"run": folder.absolute()}))


def _shape(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """All that must be alike for the mean of two models to be a model."""
    shape = {name: value for name, value in asdict(read_config(run.encoder)).items() if not name.endswith("_prob")}
    heads = config.heads.model_dump(exclude={"head_dropout"}) | {"pooling": config.encoder.pooling}
    tasks: dict[str, Any] = {f"task {task.name}": task.identity for task in config.corpus.tasks}
    return shape | heads | {"tasks": sorted(config.corpus.names)} | tasks | run.vocabulary


def _in(*runs: RunFolder) -> list[str]:
    return [f"in {run.path}" for run in runs]


def require_alike(runs: Sequence[RunFolder]) -> None:
    """Raises UserError unless every run was trained on the tasks of the first, with the same labels: only then have
    their predictions a mean."""
    first = runs[0].read_config().corpus
    for run in runs[1:]:
        corpus = run.read_config().corpus
        for task in first.tasks:
            if task.name not in corpus.names:
                trained = ", ".join(corpus.names)
                raise UserError(f"{run.path} was not trained on {task.name}, as {runs[0].path} was, but on {trained}")
            require_same_labels(task, corpus.task(task.name), *_in(runs[0], run))


def require_same_labels(one: Task, other: Task, of_one: str, of_other: str) -> None:
    """Raises UserError if predictions of the two declarations do not mean the same."""
    same = ("kind", "is_pair", "label_range", "classes")
    mine, theirs = ({key: getattr(task, key) for key in same} for task in (one, other))
    if different := differences(mine, theirs, of_one, of_other):
        refuse(f"predictions of {one.name} do not mean the same", different, "Both must be of the same labels.")
