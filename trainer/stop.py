"""Leaving on request: a signal sets a flag, and the processes agree on it between two steps."""

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # PyTorch takes seconds, in which a signal would find no handler
    from minbert.trainer.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LEFT_AT_ONCE = 130


class StopRequest:
    """Catches the signals while the block runs. A second one leaves at once, with `exit_code`, unless `patient`: a
    batch system repeats itself, and kills what has taken too long.

    Once there was a signal, that stays so after the block: a process that has saved and is about to end with the code
    that says so must not be killed by another signal before it gets there.
    """

    def __init__(self, patient: bool = False) -> None:
        self.signal: int | None = None
        self.exit_code: int = LEFT_AT_ONCE
        self.patient = patient

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.catch()
        return self

    def catch(self) -> None:
        """Install the handlers; once more where a library has taken signals for itself."""
        for number in SIGNALS:
            signal.signal(number, self._catch)

    def __exit__(self, *exception: object) -> None:
        if self.signal is None:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and not self.patient:
            os._exit(self.exit_code)
        self.signal = self.signal or number

    def agreed(self, world: "World") -> bool:
        """Whether any process was asked to stop; the same answer on all. Collective.

        The flag travels through memory of the CPU, so that asking never waits for a GPU.
        """
        import torch

        return bool(world.sum(torch.tensor([self.signal is not None], dtype=torch.int32)).item())
