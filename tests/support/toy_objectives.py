"""Small objectives of the kinds that the interface must carry, beside the real ones; what is random in them depends on
content alone, so that they do not depend on how a batch is shared out."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.choice import Sum
from minbert.trainer.objectives.proximal import Proximal
from minbert.trainer.objectives.rdrop import RDrop
from minbert.trainer.objectives.smoothness import Smoothness
from minbert.trainer.objectives.supervised import supervised


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


class WordDrop(RDrop):
    """R-Drop whose second pass is another by its tokens."""

    def another(self, forward: Forward) -> Forward:
        ids = forward.sentences.input_ids
        dropped = torch.where((ids + forward.step) % 5 == 0, 4, ids)
        return forward.again(sentences=replace(forward.sentences, input_ids=dropped))


class Taught:
    """Follows a teacher, a copy of the model that is not trained."""

    def __init__(self, teacher: torch.nn.Module):
        self.teacher = deepcopy(teacher).eval().requires_grad_(False)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        targets = self.teacher(forward.batch)
        return {name: (forward.outputs[name] - targets[name]).square().mean(1) for name in targets}


# The real ones, with perturbations so large that they show after a few steps. One task has no weight.
SMOOTH = Smoothness({"sst": 1.0, "quora": 0.5}, seed=0, variance=0.01, steps=2, step_size=0.1)
ADVERSARIAL, PROXIMAL = Sum(supervised, (SMOOTH,)), Sum(supervised, (SMOOTH, Proximal(2.0)))
DROPPING = Sum(WordDrop(supervised, {"sst": 1.0, "quora": 3.0}), (SMOOTH,))
TEACHERS_DECAY = 0.5

OBJECTIVES = {
    "supervised": supervised,
    "adversarial": ADVERSARIAL,
    "masked": masked,
    "twice": twice,
    "dropping": DROPPING,
}
TAUGHT = {"proximal": PROXIMAL}  # need a teacher's outputs
