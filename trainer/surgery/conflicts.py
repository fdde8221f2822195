"""What the Gramian of the task gradients tells: who pulls against whom, how hard, and where in the encoder."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert.data.errors import UserError
from minbert.data.reading import read_json_lines
from minbert.trainer.surgery.combination import Gramians


def cosines(gramian: Tensor) -> Tensor:
    """Cosines between the gradients of a (..., T, T) Gramian; 0 where a gradient is zero."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return (gramian / (norms[..., :, None] * norms[..., None, :])).nan_to_num(0.0)


def summary(names: Sequence[str], gramians: Gramians) -> dict[str, float]:
    """Metrics of a measured step of these tasks: cosine per pair, gradient norm per task, and the share of pairs that
    conflict (have a negative cosine)."""
    if not gramians.layers:
        return {}
    encoder = gramians.encoder.cpu()
    angles = cosines(encoder)
    pairs = list(combinations(range(len(names)), 2))
    record = {f"cosine/{names[i]}-{names[j]}": float(angles[i, j]) for i, j in pairs}
    record |= {f"gradient_norm/{name}": float(square) ** 0.5 for name, square in zip(names, encoder.diagonal())}
    if pairs:
        record["conflicts"] = sum(bool(angles[i, j] < 0) for i, j in pairs) / len(pairs)
    return record


def gramian_record(step: int, names: Sequence[str], gramians: Gramians) -> dict[str, Any]:
    """A step's Gramian of every layer, as `minbert report` reads it."""
    return {
        "step": step,
        "tasks": list(names),
        "layers": list(gramians.layers),
        "gramians": gramians.by_layer.tolist(),
    }


def read_gramians(path: Path) -> tuple[list[int], list[str], list[str], Tensor]:
    """Steps, tasks, layers and Gramians (steps, L, T, T) of such a file, of the last line for each step.

    Lines of another shape than the last one are left out. What was not
    finite is NaN. Raises UserError if there is none.
    """
    by_step = {}
    for record in read_json_lines(path):
        try:
            values = torch.from_numpy(np.array(record["gramians"], dtype=np.float64))
            if values.shape == (len(record["layers"]), len(record["tasks"]), len(record["tasks"])):
                by_step[record["step"]] = (list(map(str, record["tasks"])), list(map(str, record["layers"])), values)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            continue
    if not by_step:
        raise UserError(f"{path} holds no measurements")
    steps = sorted(by_step)
    tasks, layers, _ = by_step[steps[-1]]
    steps = [step for step in steps if by_step[step][:2] == (tasks, layers)]
    return steps, tasks, layers, torch.stack([by_step[step][2] for step in steps])
