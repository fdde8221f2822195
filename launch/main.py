"""The command `minbert`: finds the subcommand and turns a user's mistakes into messages and exit codes."""

import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from minbert.data.errors import UserError, machine_trouble
from minbert.launch.manual import COMMANDS, Help
from minbert.trainer.processes.exit_codes import ExitCode, leave


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return ExitCode.FINISHED if arguments else ExitCode.USER_MISTAKE
    if arguments[0] == "--version":
        print(version("minbert"))
        return ExitCode.FINISHED
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(COMMANDS)}"
            raise UserError(f"there is no command {command!r}{hint}")
        run: Callable[[list[str]], int] = import_module(COMMANDS[command][0]).main
        try:
            code = run(rest)
        except Help as asked:
            asked.show()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"minbert: {error}", file=sys.stderr)
        return ExitCode.USER_MISTAKE
    except KeyboardInterrupt:
        print("minbert: interrupted", file=sys.stderr)
        return ExitCode.LEFT_AT_ONCE
    except BrokenPipeError:  # `minbert train --help | head`
        _drop_output()
        return ExitCode.FAILED
    except Exception as error:
        if not (trouble := machine_trouble(error)):
            raise
        print(f"minbert: {trouble}", file=sys.stderr)
        _drop_output()
        return ExitCode.USER_MISTAKE


def _drop_output() -> None:
    """What standard output did not take goes nowhere: the interpreter would try once more, and say so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "usage: minbert COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`minbert COMMAND --help` tells its options."


def entry() -> NoReturn:
    """The installed command."""
    leave(main())


if __name__ == "__main__":
    entry()
