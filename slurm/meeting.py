"""Where the processes of a job meet: rank 0 opens a store on a port of its own and leaves its place in the run folder.

No port is guessed, so jobs that share a node cannot collide. Whoever does not come is named.
"""

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.slurm.allocation import Allocation, address, interface_address, interface_towards

POLL = 0.1  # seconds between two looks for the place
_stores: list[Any] = []  # rank 0's, alive as long as the process


def join(folder: Path, allocation: Allocation, interface: str | None, timeout: float) -> None:
    """Meet the job's other processes, and set what torch.distributed's `env://` expects in this one.

    `folder`: seen by all nodes. `interface`: for gloo and NCCL; without it gloo takes the one that leads to the other
    nodes. `timeout`: seconds to wait for the others.

    Raises UserError naming who did not come, or where this process looked in vain.
    """
    if allocation.tasks == 1:
        return  # the libraries take a lone process for one of several if it has a rank
    environment = {
        "RANK": str(allocation.rank),
        "WORLD_SIZE": str(allocation.tasks),
        "LOCAL_RANK": str(_device_index(allocation)),
        "LOCAL_WORLD_SIZE": str(allocation.tasks_per_host[allocation.host_index]),
    }
    os.environ.update(environment)
    if interface:
        os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    elif "GLOO_SOCKET_IFNAME" not in os.environ and (found := _interface(allocation)):
        os.environ["GLOO_SOCKET_IFNAME"] = found
    file = folder / f"meeting-{allocation.job_id}-{allocation.restart}.json"
    if allocation.rank == 0:
        _host(file, allocation, interface, timeout)
    else:
        _come(file, allocation, timeout)


def _device_index(allocation: Allocation) -> int:
    """The GPU of this process among those it sees: sites may show each process only its own."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    on_node = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    return 0 if len(visible) == 1 and on_node > 1 else allocation.local_rank


def _interface(allocation: Allocation) -> str | None:
    if len(allocation.hosts) == 1:
        return interface_towards("127.0.0.1")  # the host's name may resolve to an address that is not reachable
    other = allocation.workers[0] if allocation.host == allocation.head else allocation.head
    return interface_towards(address(other))


def _host(file: Path, allocation: Allocation, interface: str | None, timeout: float) -> None:
    from torch.distributed import TCPStore

    listener = socket.create_server(("", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    _stores.append(store)
    place = {"port": port, "address": interface_address(interface) if interface else None, "token": uuid4().hex}
    store.set("minbert/token", place["token"])
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(place))
    _set_place("127.0.0.1", port)
    deadline, missing = time.monotonic() + timeout, []
    for rank in range(1, allocation.tasks):
        try:
            store.wait([f"minbert/arrived/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except RuntimeError:  # DistStoreError
            missing.append(f"rank {rank} on {allocation.host_of(rank)}")
    file.unlink(missing_ok=True)
    if missing:
        raise UserError(
            f"waited {timeout:g} s for {', '.join(missing)}, on {allocation.host} (port {port}). Their logs tell "
            "whether they started; if they did, name a network interface that reaches all nodes by --interface."
        )


def _come(file: Path, allocation: Allocation, timeout: float) -> None:
    from torch.distributed import TCPStore

    deadline, problem = time.monotonic() + timeout, f"{file} did not appear on {allocation.host}"
    while time.monotonic() < deadline:
        place = _read(file)
        if place:
            host = place["address"] or ("127.0.0.1" if len(allocation.hosts) == 1 else address(allocation.head))
            try:
                socket.create_connection((host, place["port"]), timeout=5).close()
                left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
                store = TCPStore(host, place["port"], is_master=False, wait_for_workers=False, timeout=left)
                if store.get("minbert/token").decode() == place["token"]:
                    store.set(f"minbert/arrived/{allocation.rank}", "")
                    _set_place(host, place["port"])
                    return
            except (OSError, RuntimeError) as error:
                problem = f"{allocation.host} cannot reach {host} port {place['port']} ({error})"
        time.sleep(POLL)
    raise UserError(
        f"rank {allocation.rank} waited {timeout:g} s for rank 0 on {allocation.head}: {problem}. If rank 0 started, "
        "the run folder is not on a file system that all nodes share, or --interface must name another network."
    )


def _read(file: Path) -> dict[str, Any] | None:
    os.listdir(file.parent)  # makes a network file system look again for what was not there
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


def _set_place(host: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
