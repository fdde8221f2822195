"""Small objectives of the kinds that the interface must carry; what is random in them depends on content alone, so that
they do not depend on how a batch is shared out."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.supervised import supervised


def adversarial(forward: Forward) -> dict[str, Tensor]:
    """Asks for gradients with respect to embeddings: one ascent step from a perturbation, then smoothness."""
    noisy = (forward.embeddings + 0.01 * torch.sin(1000 * forward.embeddings)).detach().requires_grad_()
    distance = sum(
        (forward.again(embeddings=noisy).outputs[name] - clean.detach()).square().sum()
        for name, clean in forward.outputs.items()
    )
    (gradient,) = torch.autograd.grad(distance, noisy)
    away = forward.again(embeddings=forward.embeddings + gradient / gradient.norm(dim=1, keepdim=True))
    return {
        name: loss + (forward.outputs[name] - away.outputs[name]).square().mean(1)
        for name, loss in supervised(forward).items()
    }


def masked(forward: Forward) -> dict[str, Tensor]:
    """Looks at token states and makes its own targets, from the step: every third token is masked."""
    ids, layout = forward.sentences.input_ids, forward.sentences.layout
    chosen = (ids + forward.step) % 3 == 0
    hidden = forward.again(sentences=replace(forward.sentences, input_ids=torch.where(chosen, 4, ids))).hidden
    errors = (hidden - forward.hidden.detach()).square().mean(1) * chosen
    per_sequence = torch.zeros(len(layout), device=ids.device).index_add(0, layout.sequence, errors)
    tasks = forward.batch.tasks
    parts = per_sequence.split([part.sequences for part in tasks.values()])
    own = {name: errors.view(-1, len(part)).sum(0) for (name, part), errors in zip(tasks.items(), parts)}
    return {name: loss + own[name] for name, loss in supervised(forward).items()}


def twice(forward: Forward) -> dict[str, Tensor]:
    """Two passes with different dropout, which should agree."""
    other = forward.again()
    return {
        name: loss + (forward.outputs[name] - other.outputs[name]).square().mean(1)
        for name, loss in supervised(forward).items()
    }


class Taught:
    """Follows a teacher, a copy of the model that is not trained."""

    def __init__(self, teacher: torch.nn.Module):
        self.teacher = deepcopy(teacher).eval().requires_grad_(False)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        targets = self.teacher(forward.batch)
        return {name: (forward.outputs[name] - targets[name]).square().mean(1) for name in targets}


OBJECTIVES = {"supervised": supervised, "adversarial": adversarial, "masked": masked, "twice": twice}
