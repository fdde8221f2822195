"""Waiting for what other processes do."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

# Seconds. Long: it only decides when a test that would never end fails, and the machine may be slow, or busy.
PATIENCE = 900.0


def until(
    condition: Callable[[], T],
    what: str,
    process: subprocess.Popen | None = None,
    *,
    seen: Callable[[], object] = str,
    pause: float = 0.05,
) -> T:
    """What `condition` returns once that is true. The test fails where `process` ends before, or where it takes too
    long, and shows what was waited for, what is `seen` then, and what a process has said whose output is a pipe."""
    end = time.monotonic() + PATIENCE
    while True:
        ended = process is not None and process.poll() is not None
        if found := condition():
            return found
        if ended or time.monotonic() > end:
            trouble = f"ended with {process.returncode} before" if ended else "waited in vain for"
            raise AssertionError(f"{trouble} {what}\n{seen()}\n{_said(process)}")
        time.sleep(pause)


def _said(process: subprocess.Popen | None) -> str:
    if process is None or not (process.stdout or process.stderr):
        return ""
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # its children may hold the pipe
        return "\n".join(said for said in process.communicate(timeout=10) if said)
    return "(its output is still held by others)"
