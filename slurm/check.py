"""Whether the allocation is what was asked for: looked at from every node, before anything starts.

One short step with a task on each node tells what the node sees. All that is wrong comes in one message.
"""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from minbert.data.errors import UserError
from minbert.slurm.allocation import Allocation
from minbert.slurm.settings import JobSettings

# Prints: node | token | code | GPUs. CUDA_VISIBLE_DEVICES is SLURM's where it manages GPUs.
LOOK = """
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , '\\n' | grep -c .)
else gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); fi
echo "$SLURMD_NODENAME|$(cat {token} 2>/dev/null)|$(test -d {code} && echo yes)|$gpus"
"""


@dataclass(frozen=True)
class Node:
    """What one node sees."""

    name: str
    token: str
    code: bool
    gpus: int


def check_allocation(run: Path, code: Path, allocation: Allocation, settings: JobSettings) -> None:
    """Raises UserError naming every mismatch; call it in the batch script."""
    token = run / "slurm" / f"token-{allocation.job_id}-{allocation.restart}"
    content = uuid4().hex
    token.write_text(content)
    try:
        nodes = _read_nodes(token, code, allocation)
    finally:
        token.unlink(missing_ok=True)
    problems = mismatches(nodes, content, run, code, allocation, settings)
    if problems:
        raise UserError("the allocation is not what the run needs:\n" + "\n".join(f"  {line}" for line in problems))


def mismatches(
    nodes: list[Node], token: str, run: Path, code: Path, allocation: Allocation, settings: JobSettings
) -> list[str]:
    """A line for everything that is wrong."""
    problems = []
    if len(allocation.hosts) != settings.nodes:
        problems.append(f"asked for nodes={settings.nodes}, SLURM gave {len(allocation.hosts)}")
    if allocation.tasks != settings.tasks:
        problems.append(
            f"asked for {settings.processes_per_node} processes on each of {settings.nodes} node(s), "
            f"SLURM starts {allocation.tasks}: {_per_host(allocation)}"
        )
    if silent := set(allocation.hosts) - {node.name for node in nodes}:
        problems.append(f"no answer from {', '.join(sorted(silent))}")
    if blind := [node.name for node in nodes if node.token != token]:
        problems.append(
            f"{', '.join(blind)} does not see the run folder {run} as {allocation.head} does: "
            "it must lie on a file system that all nodes share; name another by --run"
        )
    if bare := [node.name for node in nodes if not node.code and node.name not in blind]:
        problems.append(f"{', '.join(bare)} does not see the code in {code}")
    for node in nodes if settings.gpus_per_node else []:
        tasks = dict(zip(allocation.hosts, allocation.tasks_per_host)).get(node.name, 0)
        if node.gpus < tasks:
            problems.append(
                f"{node.name} has {node.gpus} GPU(s) for {tasks} processes: "
                f"ask for tasks_per_node={node.gpus or 'N'}, or for more gpus_per_node"
            )
    return problems


def _read_nodes(token: Path, code: Path, allocation: Allocation) -> list[Node]:
    script = LOOK.format(token=shlex.quote(str(token)), code=shlex.quote(str(code)))
    count = len(allocation.hosts)
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--overlap", "sh", "-c", script]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_NTASKS_PER")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd="/")
    except subprocess.TimeoutExpired:
        raise UserError("srun started nothing on the nodes in 300 s") from None
    nodes = []
    for line in done.stdout.splitlines():
        if line.count("|") == 3:
            name, found, there, gpus = line.split("|")
            nodes.append(Node(name, found, there == "yes", int(gpus or 0)))
    if not nodes:
        raise UserError(f"srun could not start anything on the nodes: {done.stderr.strip()}")
    return nodes


def _per_host(allocation: Allocation) -> str:
    return ", ".join(f"{count} on {host}" for host, count in zip(allocation.hosts, allocation.tasks_per_host))
