"""The numbers between two lines of the log: means over the steps, rates over all processes."""

from collections import defaultdict
from collections.abc import Mapping
from math import nan
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

from minbert.trainer.processes.world import World
from minbert.trainer.result import StepResult, read


class MetricsWindow:
    """Collects step results until `close` turns them into one record. It goes on from `content`, what a window of an
    earlier start held."""

    seconds: float
    _unread: list[StepResult]

    def __init__(self, world: World, content: Mapping[str, Any] | None = None):
        self.world = world
        self._reset()
        content = content or {}
        for name, losses in content.get("losses", {}).items():
            self.losses[name] = [nan if loss is None else loss for loss in losses]  # JSON has no other word
        self.norms += content.get("norms", [])
        self.skipped = content.get("skipped", 0)

    def content(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; tokens and seconds are those of one start."""
        self.read()
        return {"losses": dict(self.losses), "norms": self.norms, "skipped": self.skipped}

    def add(self, result: StepResult) -> None:
        """Take a step's numbers without a look at them."""
        self._unread.append(result)
        self.tokens += result.tokens
        self.seconds += result.seconds

    def read(self) -> list[StepResult]:
        """Look at the numbers that have come since the last time; the steps that they are of. This waits for the
        device to have done what it was told, which is part of the time that the steps took."""
        started, results = perf_counter(), self._unread
        read(results)
        self._unread = []
        for result in results:
            for name, loss in result.losses.items():
                self.losses[name].append(loss)
            if result.skipped:
                self.skipped += 1
            else:
                self.norms.append(result.grad_norm)
        self.seconds += perf_counter() - started
        return results

    def close(self) -> dict[str, float]:
        """Mean loss of each task that had a step, mean gradient norm before clipping, tokens per second of training
        over all processes, number of skipped steps if there were any. Collective; empties the window."""
        self.read()
        tokens = self.world.sum(torch.tensor(float(self.tokens), device=self.world.device)).item()
        record = {f"loss/{name}": fmean(losses) for name, losses in self.losses.items()}
        if self.norms:
            record["grad_norm"] = fmean(self.norms)
        if self.skipped:
            record["skipped_steps"] = self.skipped
        record["tokens_per_second"] = tokens / self.seconds
        self._reset()
        return record

    def _reset(self) -> None:
        self._unread = []
        self.losses: dict[str, list[float]] = defaultdict(list)
        self.norms: list[float] = []
        self.skipped = self.tokens = 0
        self.seconds = 0.0
