"""`minbert completion`: a script by which a shell completes commands, their options, and the values of these."""

import re
import shlex
from argparse import Action
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from minbert.data.task import DECLARATIONS
from minbert.launch.manual import ACTIONS, COMMANDS, parser_of
from minbert.launch.options import parse
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.recipe import recipes


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that completes commands: eval "$(minbert completion bash)" in ~/.bashrc, or written once as
    ~/.local/share/bash-completion/completions/minbert, or for zsh as _minbert in a folder of $fpath."""

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh"]], tyro.conf.arg(metavar="{bash,zsh}")]
    """The shell that is to complete."""


def main(arguments: list[str]) -> int:
    options = parse(CompletionOptions, arguments, "completion")
    print(_bash() if options.shell == "bash" else _zsh(), end="")
    return ExitCode.FINISHED


def _options(command: str) -> dict[str, Action]:
    """Option -> what its parser knows of it."""
    parsers = (
        [parser_of(command, action) for action in ACTIONS[command]] if command in ACTIONS else [parser_of(command)]
    )
    known = [option for parser in parsers for option in parser._actions if option.option_strings]
    return {option.option_strings[-1]: option for option in known}


def _values(option: str, action: Action) -> list[str]:
    """The words that an option may take, as far as they are known; files, otherwise."""
    names = {
        "--recipe": ["list", *recipes()],
        "--tasks": [path.stem for path in sorted(DECLARATIONS.glob("*.yaml"))],
        "--model": ["tiny", "minilm"],
        "--data": ["builtin", "hub"],
    }
    braces = re.search(r"\{([^}]*)\}", str(action.metavar))
    return names.get(option) or (braces[1].split(",") if braces else [])


def _bash() -> str:
    options, values = [], []
    for command in COMMANDS:
        known = _options(command)
        options.append(f"        {command}) words={shlex.quote(' '.join(known))} ;;")
        if command in ACTIONS:
            values.append(f"        {shlex.quote(f'{command} ')}) words={shlex.quote(' '.join(ACTIONS[command]))} ;;")
        for option, action in known.items():
            if words := _values(option, action):
                values.append(f"        {shlex.quote(f'{command} {option}')}) words={shlex.quote(' '.join(words))} ;;")
    return f"""\
_minbert() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} option="" words="" at
    for ((at = COMP_CWORD - 1; at > 1; at--)); do  # an option may take several words
        [[ ${{COMP_WORDS[at]}} == --* ]] && option=${{COMP_WORDS[at]}} && break
    done
    if ((COMP_CWORD == 1)); then
        words={shlex.quote(" ".join(COMMANDS))}
    elif [[ $word == -* ]]; then
        case $command in
{chr(10).join(options)}
        esac
    else
        case "$command $option" in
{chr(10).join(values)}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _minbert minbert
"""


def _zsh() -> str:
    commands = "\n".join(f"        {shlex.quote(f'{name}:{purpose}')}" for name, (_, purpose) in COMMANDS.items())
    cases = []
    for command in COMMANDS:
        specs = [_spec(option, action) for option, action in _options(command).items()]
        first = [f"1:action:({' '.join(ACTIONS[command])})"] if command in ACTIONS else []
        lines = " \\\n".join(f"            {shlex.quote(spec)}" for spec in (*specs, *first, "*:file:_files"))
        cases.append(f"        {command}) _arguments \\\n{lines} ;;")
    return f"""\
#compdef minbert
_minbert() {{
    local -a commands=(
{commands}
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    ((CURRENT--))
    case $command in
{chr(10).join(cases)}
    esac
}}
if [[ $funcstack[1] == _minbert ]]; then _minbert "$@"; else compdef _minbert minbert; fi
"""


def _spec(option: str, action: Action) -> str:
    """An option in the words of zsh's _arguments: `--name=[what it is]:value:(words)`."""
    about = re.sub(r"([\[\]:\\])", r"\\\1", " ".join((action.help or "").split()))
    if action.nargs == 0:
        return f"{option}[{about}]"
    words = _values(option, action)
    several = "*" if action.nargs == "*" else ""
    return f"{several}{option}=[{about}]:value:{f'({chr(32).join(words)})' if words else '_files'}"
