"""What this machine can do: how much memory there is for us, and whether the processor computes in bf16."""

import ctypes
import gc
import sys
from pathlib import Path

GIB = 2**30
PROCESS = 150 << 20  # bytes that a process of ours has of its own, before any model


def available() -> float:
    """Bytes of memory that this machine has, or this process's control group lets it use."""
    meminfo = {line.split(":")[0]: line.split()[1] for line in _read(Path("/proc/meminfo")).splitlines()}
    return min(int(meminfo.get("MemTotal", 0)) * 1024 or float("inf"), cgroup_limit())


def cgroup_limit(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The tightest memory limit in bytes over this process's control group and its parents, of version 1 or 2."""
    limits = [float("inf")]
    for line in _read(proc).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = Path(path.lstrip("/"))
        values = [_read(folder / parent / name).strip() for parent in (group, *group.parents)]
        limits += [float(value) for value in values if value.isdigit()]
    return min(limits)


def free_memory() -> None:
    """Give back what a run leaves in its process: models hold cycles, the C library keeps what lies between other
    things, which after a few runs is more than one of them needs, and PyTorch keeps a GPU's memory for itself."""
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


def bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """What the processor multiplies bf16 with, by its name among the flags; None: it has nothing, and that is emulated,
    many times slower than fp32."""
    flags = set(_read(cpuinfo).split())
    return next((unit for unit in ("amx_bf16", "avx512_bf16", "bf16") if unit in flags), None)


def size(count: float) -> str:
    return f"{count / GIB:,.1f} GiB"


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
