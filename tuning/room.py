"""What Ray sets aside for a trial, and how many trials its nodes hold at once."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray

from minbert.data.errors import UserError
from minbert.trainer.options import ParallelConfig
from minbert.tuning.search import Resources


class Room(NamedTuple):
    """What Ray sets aside for a trial, which lies on one node, and how many trials its nodes hold at once."""

    limits: dict[str, float]
    fitting: int


def find_room(resources: Resources, parallel: ParallelConfig) -> Room:
    """On the Ray of this process. Raises UserError if no node can hold a trial: Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    limits = limits_of(resources, parallel, nodes)
    return Room(limits, _fitting(limits, nodes))


def limits_of(resources: Resources, parallel: ParallelConfig, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a trial takes of a node; a GPU for each of its processes where there are GPUs, unless that is said
    otherwise. Raises UserError for parts of several GPUs, or a GPU that is wanted and not set aside."""
    processes, gpus = parallel.processes, resources.gpus
    if gpus is None:
        gpus = 1 if parallel.device != "cpu" and any(node.get("GPU", 0) for node in nodes) else 0
    if gpus != int(gpus) and (gpus > 1 or processes > 1):
        raise UserError(f"gpus={gpus:g}: only a trial of one process can have a part of a GPU, and then of one")
    if parallel.device == "cuda" and not gpus:
        why = "the trials get none (--gpus 0)" if resources.gpus == 0 else "Ray's nodes have none"
        raise UserError(f"device=cuda needs GPUs, and {why}")
    return {"cpu": resources.cpus * processes} | ({"gpu": gpus * processes} if gpus else {})


def _fitting(limits: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once. Raises UserError if that is none."""
    held = [min(int(node.get(name.upper(), 0) / amount + 1e-9) for name, amount in limits.items()) for node in nodes]
    if not any(held):
        wanted = " and ".join(f"{amount:g} {name.upper()}" for name, amount in limits.items())
        there = "; ".join(
            ", ".join(f"{node.get(name.upper(), 0):g} {name.upper()}" for name in limits) for node in nodes
        )
        raise UserError(
            f"a trial takes {wanted} on one node; Ray's nodes have {there}. See --cpus, --gpus, --processes."
        )
    return sum(held)
