"""Leaving on request: a signal sets a flag, and the processes agree on it between two steps."""

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from minbert.trainer.processes.exit_codes import ExitCode

if TYPE_CHECKING:  # PyTorch takes seconds, in which a signal would find no handler
    from minbert.trainer.processes.world import World


def stop_signals() -> list[signal.Signals]:
    """The signals that ask to stop. The end of the terminal is none for who ignores it, as under `nohup`."""
    always = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*always, signal.SIGHUP]


def leave_terminal(number: int) -> None:
    """After SIGHUP: what would be written to a terminal that is gone, and raise errors, goes nowhere."""
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)


class Stopped(BaseException):
    """Raised by a signal where nothing is there yet that could be saved; like KeyboardInterrupt, no error."""


class StopRequest:
    """Catches the signals while the block runs. A second one leaves at once, with `exit_code`, unless `patient`: a
    batch system repeats itself, and kills what has taken too long. So does a terminal that is closed: its shell and the
    system both send SIGHUP, which never counts as a second signal.

    Once there was a signal, that stays so after the block: a process that has saved and is about to end with the code
    that says so must not be killed by another signal before it gets there.
    """

    def __init__(self, patient: bool = False) -> None:
        self.signal: int | None = None
        self.exit_code: int = ExitCode.LEFT_AT_ONCE
        self.patient = patient
        self._raises = False

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.getsignal(number) for number in stop_signals()}
        self.catch()
        return self

    def catch(self) -> None:
        """Install the handlers; once more where a library has taken signals for itself."""
        for number in stop_signals():
            signal.signal(number, self._catch)

    def __exit__(self, *exception: object) -> None:
        if self.signal is None:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        leave_terminal(number)
        if self.signal is not None and not self.patient and number != signal.SIGHUP:
            os._exit(self.exit_code)
        self.signal = self.signal or number
        if self._raises:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where nothing could be lost, a signal raises Stopped; one that came before does so too."""
        self._raises = True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self._raises = False
        if self.signal is not None:
            raise Stopped

    def reached_any(self, world: "World") -> bool:
        """Whether any process was asked to stop; the same answer on all. Collective.

        The flag travels through memory of the CPU, so that asking never waits for a GPU.
        """
        import torch

        return bool(world.sum(torch.tensor([self.signal is not None], dtype=torch.int32)).item())
