"""How the tasks' losses become one: the seam between "one loss per task" and "one update"."""

from collections.abc import Callable, Mapping

from torch import Tensor

Aggregator = Callable[[Mapping[str, Tensor]], Tensor]


def sum_losses(losses: Mapping[str, Tensor]) -> Tensor:
    """The plain sum, as the paper trains."""
    return sum(losses.values())


AGGREGATORS: dict[str, Aggregator] = {"sum": sum_losses}
