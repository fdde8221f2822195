"""Which objective a configuration asks for: the supervised one, and what is added to it."""

from dataclasses import dataclass

from torch import Tensor

from minbert.trainer.config import RunConfig
from minbert.trainer.model.multitask import Forward, Objective
from minbert.trainer.objectives.distillation import Distilled
from minbert.trainer.objectives.proximal import Proximal
from minbert.trainer.objectives.rdrop import RDrop
from minbert.trainer.objectives.smoothness import Smoothness
from minbert.trainer.objectives.supervised import Supervised, supervised


def build_objective(config: RunConfig, planned_steps: int) -> Objective:
    """The objective of a run of so many steps."""
    options, terms = config.objective, list[Objective]()
    base: Objective = supervised
    if any((smoothing := config.by_task("label_smoothing")).values()):
        base = Supervised(smoothing)
    if options.teachers:
        base = Distilled(base, planned_steps, options.distill_share, options.distill_temperature)
    if any((weights := config.by_task("rdrop_weight")).values()):
        base = RDrop(base, weights)
    if any((weights := config.by_task("smart_weight")).values()):
        terms.append(
            Smoothness(
                weights,
                config.seed,
                options.smart_noise,
                options.smart_steps,
                options.smart_step_size,
                options.smart_norm,
                options.smart_radius,
            )
        )
    if options.proximal_weight:
        terms.append(Proximal(options.proximal_weight))
    return Sum(base, tuple(terms)) if terms else base


@dataclass(frozen=True)
class Sum:
    """An objective and terms, which add to the losses of some of its tasks. All see the same forward pass."""

    base: Objective
    terms: tuple[Objective, ...]

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        losses = self.base(forward)
        for term in self.terms:
            losses |= {name: losses[name] + more for name, more in term(forward).items()}
        return losses
