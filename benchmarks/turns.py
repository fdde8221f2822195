"""Sides that take turns: each in a process, or several, of its own, on the same machine within the same run.

A machine that others use too, or whose clock moves, is as slow for one side as for the next in a round: what is
compared is a ratio within a round, and its median and range over the rounds. Only one side runs at a time. A process
of its own for each tells their memory apart.
"""

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import socket
import statistics
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

PATIENCE = 20.0  # seconds that a process has to end

Step = Callable[[int], float]  # of a number, from 0 on: does some work, and says how much it was


class Skipped(Exception):
    """Why a side cannot take part here, and what to do about it."""


@dataclass(frozen=True)
class Side:
    """`builder`, "module:function", is called in each of the side's processes with its run and the configuration of
    that, changed by `options`, and with `arguments`; it returns the side's `Step`."""

    name: str
    builder: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class Turn:
    """`work` in tokens or whatever the side counts; `cpu` seconds of all its processes."""

    work: float
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.work / self.seconds


@dataclass
class Measured:
    """What a side did. `memory`: the most that a process of it held above what was there before the first step, and
    `loaded` that, both in MiB. `why`: it took no part, or failed."""

    name: str
    turns: list[Turn] = field(default_factory=list)
    memory: float = float("nan")
    loaded: float = float("nan")
    why: str | None = None
    failed: bool = False
    scores: dict[str, float] | None = None  # of the dev splits, where it has any


@dataclass(frozen=True)
class Ratio:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Ratio":
        return Ratio(statistics.median(values), min(values), max(values))


def speed(side: Measured, other: Measured, cpu: bool = False) -> Ratio:
    """How often the work of `other` the side does in the same time, or in the same time of the processor, round by
    round."""

    def rate(turn: Turn) -> float:
        return turn.work / (turn.cpu if cpu else turn.seconds)

    return Ratio.of([rate(mine) / rate(theirs) for mine, theirs in zip(side.turns, other.turns)])


def take_turns(
    sides: Sequence[Side],
    run: Path,
    rounds: int,
    steps: int,
    threads: int = 1,
    profiles: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Measured]:
    """`rounds` turns of `steps` steps of each side, after a first step that is not counted.

    `run` is the folder of a prepared run. `profiles` is a folder for a profile of one more step of each side, and its
    trace.
    """
    results = [Measured(side.name) for side in sides]
    with contextlib.ExitStack() as stack:
        playing: list[tuple[_Player, Measured]] = []
        for side, result in zip(sides, results):
            player = stack.enter_context(_Player(side, run, threads))
            answers = player.answers()
            if troubles := [answer for answer in answers if "why" in answer]:
                result.why, result.failed = troubles[0]["why"], troubles[0]["failed"]
                say(f"  {side.name}: {result.why.splitlines()[-1]}")
                player.close()
                continue
            result.loaded = max(answer["loaded"] for answer in answers)
            playing.append((player, result))
        for turn in range(rounds):
            for player, result in playing:
                answers = player.ask("steps", 1 + turn * steps, steps)
                done, slowest = sum(answer["work"] for answer in answers), max(a["seconds"] for a in answers)
                result.turns.append(Turn(done, slowest, sum(answer["cpu"] for answer in answers)))
                result.memory = max(answer["memory"] for answer in answers)
            shown = (f"{result.name} {result.turns[-1].rate:,.0f}/s" for _, result in playing)
            say(f"  round {turn + 1} of {rounds}: {', '.join(shown)}")
        if profiles is not None:
            profiles.mkdir(parents=True, exist_ok=True)
            for player, _ in playing:
                player.ask("profile", 1 + rounds * steps, str(profiles))
    return results


class _Player:
    """The processes of a side, which wait to be asked."""

    def __init__(self, side: Side, run: Path, threads: int):
        spawn = multiprocessing.get_context("spawn")
        port = _free_port()
        self.channels, self.processes = [], []
        for rank in range(side.processes):
            ours, theirs = spawn.Pipe()
            place = {"rank": rank, "port": port, "threads": threads}
            process = spawn.Process(target=_serve, args=(side, run, place, theirs), daemon=True)
            process.start()
            theirs.close()
            self.channels.append(ours)
            self.processes.append(process)

    def ask(self, *question: Any) -> list[dict]:
        for channel in self.channels:
            channel.send(question)
        answers = self.answers()
        for answer in answers:
            if "why" in answer:
                raise RuntimeError(answer["why"])
        return answers

    def answers(self) -> list[dict]:
        """One from each process; or, as the others may wait for it in vain, of the first that has failed alone."""
        found: list[dict] = []
        waiting = list(self.channels)
        while waiting:
            for channel in multiprocessing.connection.wait(waiting):
                waiting.remove(channel)  # type: ignore[arg-type]
                try:
                    found.append(channel.recv())  # type: ignore[union-attr]
                except EOFError:
                    found.append({"why": "its process died without a word (out of memory?)", "failed": True})
                if "why" in found[-1]:
                    return [found[-1]]
        return found

    def close(self) -> None:
        for channel in self.channels:
            channel.close()  # which ends a process that waits to be asked
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()
            process.join()

    def __enter__(self) -> "_Player":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(side: Side, run: Path, place: Mapping[str, int], channel: Connection) -> None:
    """One process of a side: build it, and answer."""
    os.environ["OMP_NUM_THREADS"] = str(place["threads"])  # before torch is imported
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if place["threads"] > 1 else "false"
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    warnings.simplefilter("ignore")
    if side.processes > 1:
        os.environ.update(RANK=str(place["rank"]), WORLD_SIZE=str(side.processes), GLOO_SOCKET_IFNAME="lo")
        os.environ.update(LOCAL_RANK=str(place["rank"]), LOCAL_WORLD_SIZE=str(side.processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place["port"]))
    try:
        step = _build(side, run, place["threads"])
        loaded = _reset_peak()
        step(0)  # allocators, kernels and the optimizer's state are there after it
        channel.send({"loaded": loaded})
        while True:
            kind, first, argument = channel.recv()
            if kind == "profile":
                _profile(step, first, Path(argument), side.name, int(place["rank"]))
                channel.send({})
                continue
            started, cpu = perf_counter(), process_time()
            work = sum(step(first + offset) for offset in range(argument))
            _synchronize()
            seconds, cpu = perf_counter() - started, process_time() - cpu
            channel.send({"work": work, "seconds": seconds, "cpu": cpu, "memory": _peak() - loaded})
    except Skipped as reason:
        channel.send({"why": str(reason), "failed": False})
    except EOFError:
        pass
    except BaseException:
        channel.send({"why": traceback.format_exc().rstrip(), "failed": True})


def _build(side: Side, run: Path, threads: int) -> Step:
    import torch

    from minbert.trainer.config import flatten, parse_config
    from minbert.trainer.run.folder import RunFolder

    torch.set_num_threads(threads)
    folder = RunFolder(run)
    config = parse_config(flatten(folder.read_config()) | dict(side.options), side.name)
    module, function = side.builder.split(":")
    return getattr(importlib.import_module(module), function)(folder, config, **side.arguments)


def _profile(step: Step, number: int, folder: Path, name: str, rank: int) -> None:
    """One step: a table of what it spent its time on, and the trace, for chrome://tracing or Perfetto."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step(number)
        _synchronize()
    if rank:
        return
    stem = name.replace(" ", "-").replace(",", "")
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=48)
    (folder / f"{stem}.txt").write_text(table)
    profiler.export_chrome_trace(str(folder / f"{stem}.json.gz"))


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> float:
    """Forget the peak so far; MiB that this process holds now, on the GPU if there is one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what loading the weights has left
    with contextlib.suppress(OSError):  # where that is not allowed, the peak is that of loading if it was higher
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
