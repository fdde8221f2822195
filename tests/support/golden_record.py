"""The golden record: losses, gradient norms and weights of twenty steps of a few small runs, to the last digit.

Where processor and libraries are those of the record, a run must reproduce it exactly; elsewhere to 1e-5. A change that
is meant to change the arithmetic rewrites it, and its message says why:

    python tests/support/golden_record.py
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "golden"
SHARED = "--steps 20 --eval-every 20 --log-every 1 --batch-size 8 --train-limit 300 --eval-limit 20 --max-length 48"
RUNS = {
    "sum": "",
    "pcgrad": "--aggregator pcgrad",
    "pcgrad-zero2": "--aggregator pcgrad --processes 2 --zero-stage 2",
    "accumulation": "--accumulation 4 --task-schedule round_robin",
    "joint": "--aggregator pcgrad --pair-encoding joint",
}
PACKAGES = ("torch", "numpy", "deepspeed", "tokenizers")


def environment() -> str:
    """What decides the last digits: the processor's kind and the libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [platform.processor()]
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), lines[0])
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([processor, capability, *(f"{name} {version(name)}" for name in PACKAGES)])


def run(name: str, folder: Path) -> list[tuple[str, float]]:
    """Train it; what is recorded, in order."""
    command = [sys.executable, "-m", "minbert.launch.main", "train", "--run", str(folder), "--device", "cpu"]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MINBERT_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(
        [*command, *SHARED.split(), *RUNS[name].split(), "--trackers"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        kept = [key for key in record if key.startswith(("loss/", "dev/")) or key in ("grad_norm", "lr")]
        found += [(f"step {step} {key}", record[key]) for key in kept]
    for parameter, tensor in sorted(load_file(folder / "best.safetensors").items()):
        found.append((f"norm {parameter}", float(tensor.double().norm())))
    return found


def write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"{key} {value!r}" for key, value in run(name, Path(folder) / "run")]
        (FOLDER / f"{name}.txt").write_text("\n".join([f"# {environment()}", *lines]) + "\n")
        print(f"{FOLDER / name}.txt: {len(lines)} numbers")


def read(name: str) -> tuple[str, list[tuple[str, float]]]:
    """The environment of the record, and its numbers."""
    head, *lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    pairs = (line.rpartition(" ") for line in lines)
    return head.removeprefix("# "), [(key, float(value)) for key, _, value in pairs]


if __name__ == "__main__":
    write()
