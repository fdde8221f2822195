"""`python -m minbert.slurm.devcluster start|status|shell|stop`: a private SLURM cluster in the background."""

import argparse
import os
import sys
from pathlib import Path

from minbert.data.errors import UserError
from minbert.slurm.devcluster.cluster import DevCluster
from minbert.trainer.processes.exit_codes import ExitCode


def main(arguments: list[str] | None = None) -> int:
    """Returns: 0 if all is well, 1 if `status` finds a dead daemon, 2 for what the user can mend."""
    options = vars(_parser().parse_args(arguments))
    try:
        return options.pop("function")(**options) or 0
    except UserError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return ExitCode.USER_MISTAKE
    except KeyboardInterrupt:
        return ExitCode.LEFT_AT_ONCE


def start(folder: Path | None, **options: int | bool) -> None:
    """Prints what a shell evaluates to use the cluster."""
    cluster = DevCluster.start(folder, outlive=True, **options)
    for name, value in cluster.environment.items():
        print(f"export {name}={value}")
    print(f"# stop it with: python -m minbert.slurm.devcluster stop {cluster.folder}")


def status(folder: Path) -> int:
    cluster = DevCluster(folder)
    daemons = cluster.daemons()
    for name, process in daemons.items():
        print(f"{name:10} {f'process {process.pid}' if process else 'dead'}")
    if daemons.get("slurmctld"):
        print(cluster.run("sinfo"))
    return 0 if all(daemons.values()) else 1


def shell(folder: Path) -> None:
    program = os.environ.get("SHELL", "/bin/sh")
    os.execvpe(program, [program], os.environ | DevCluster(folder).environment)


def stop(folder: Path) -> None:
    DevCluster(folder).stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minbert.slurm.devcluster", description="A private SLURM cluster on this machine."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    starting = commands.add_parser("start", help="start one in the background and print what to export")
    starting.set_defaults(function=start)
    starting.add_argument("folder", nargs="?", type=Path, help="new or empty; default: a temporary one")
    starting.add_argument("--nodes", type=int, default=2)
    starting.add_argument("--cpus", type=int, default=4, help="per node, whatever the machine has (default 4)")
    starting.add_argument("--gpus", type=int, default=0, help="per node, and fake (default none)")
    starting.add_argument("--grace", type=int, default=5, help="seconds that a preempted job has left (default 5)")
    starting.add_argument("--no-accounting", dest="accounting", action="store_false", help="no MariaDB and no sacct")
    for function, text in (
        (status, "show its daemons and nodes"),
        (shell, "open a shell in which SLURM's commands mean it"),
        (stop, "end all its processes and remove its folder"),
    ):
        command = commands.add_parser(function.__name__, help=text)
        command.set_defaults(function=function)
        command.add_argument("folder", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
