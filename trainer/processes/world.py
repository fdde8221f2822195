"""This process among the others: its rank, its device, and the few collective operations the trainer needs itself.

Everything works unchanged with one process, where no process group exists.
"""

import logging
import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minbert.data.errors import UserError
from minbert.data.machine import bf16_units
from minbert.trainer.options import ParallelConfig
from minbert.trainer.processes.messages import Messages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """Rank of this process, number of processes, and the device to compute on."""

    rank: int
    size: int
    device: torch.device
    messages: Messages = field(default_factory=lambda: Messages(None, 0, 1, 0.0))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them; in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def start(parallel: ParallelConfig) -> World:
    """Join the process group that RANK, WORLD_SIZE and LOCAL_RANK describe; without them, be alone.

    Raises UserError if the device is missing or lacks the precision, or the others do not come.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(parallel)
    require_precision(parallel)
    if rank == 0:
        warn_of_emulation(parallel, device)
    torch.backends.cuda.matmul.allow_tf32 = parallel.precision == "tf32"
    if parallel.deterministic:
        _make_deterministic()
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for a GPU by itself
    timeout = timedelta(minutes=parallel.timeout)
    if size > 1:
        store = _meet(rank, size, timeout)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return World(rank, size, device, Messages(store, rank, size, timeout.total_seconds()))
    if parallel.zero_stage is not None:
        # DeepSpeed wants a process group even for one process; a store in memory needs no port.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else is to be reached, by whatever name
        backend = "gloo" if device.type == "cpu" else "nccl"
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, device)


def _make_deterministic() -> None:
    """Have PyTorch take the kernels whose results do not depend on the order in which threads come to add up."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's library is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        enable(False)  # the backward passes of fused attention add up in any order


def _meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, when all have come to it."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    return store


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(parallel: ParallelConfig) -> torch.device:
    """The configured device of this process: its own GPU, or the CPU. Raises UserError if there is none."""
    if parallel.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the libraries agree
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    require_devices(parallel, local_rank + 1)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def require_precision(parallel: ParallelConfig) -> None:
    """Raises UserError if what a run is trained on here cannot do its arithmetic."""
    if parallel.precision != "tf32":
        return
    on_gpu = parallel.device != "cpu" and torch.cuda.is_available()
    if not on_gpu or torch.cuda.get_device_capability() < (8, 0):
        lacking = torch.cuda.get_device_name() if on_gpu else "the CPU"
        raise UserError(
            f"precision=tf32 is for GPUs of compute capability 8.0 (A100) or newer, and this would run on {lacking}.\n"
            "precision=fp32 runs everywhere, and bf16 is faster than both."
        )


def warn_of_emulation(parallel: ParallelConfig, device: torch.device) -> None:
    if parallel.precision == "bf16" and device.type == "cpu" and bf16_units() is None:
        log.warning("this processor has no units for bf16 and emulates it: precision=fp32 is many times faster here")


def require_devices(parallel: ParallelConfig, processes: int) -> None:
    """Raises UserError if this machine lacks what so many processes on it are configured to compute on."""
    if parallel.device == "cpu":
        return
    if not torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if parallel.device == "cuda":
            raise UserError("device=cuda, but PyTorch sees no CUDA device here; `minbert doctor` tells more")
        if given and given not in ("-1", "NoDevFiles"):  # what stands for none
            raise UserError(
                f"this process was given GPUs (CUDA_VISIBLE_DEVICES={given}), and PyTorch sees none of them: it was "
                "built without CUDA, or the driver does not fit.\n`minbert doctor` tells more; device=cpu does without."
            )
        return
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes on this machine would need a GPU each, and it has {torch.cuda.device_count()}.\n"
            f"Start at most that many processes, or set device=cpu."
        )
