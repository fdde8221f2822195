"""`minbert rerun RUN`: what another run was, in a new folder, with the code of then or of today and other options."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minbert.data.errors import UserError
from minbert.data.sequences.tokens import default_cache_dir
from minbert.launch.commands.submit import submit
from minbert.launch.commands.train import start
from minbert.launch.help import Option, help_with_run_options
from minbert.launch.options import CommandLine, asks_for_help, build_run_config, job_option_types, run_option_types
from minbert.launch.words import read_options
from minbert.slurm.old_code import code_of
from minbert.slurm.records import Records
from minbert.slurm.settings import JobSettings
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import new_run_path
from minbert.trainer.surgery.own_code import use_source

DESCRIPTION = (
    "Train what the run in the folder RUN is once more, from the start, in a new folder (--run); options override its "
    "own. RUN itself is only read."
)
OPTIONS = {
    "code": Option(
        Literal["today", "same"],
        "today",
        "The code that is here, or that RUN was trained with: the snapshot of its job, or its commit and changes.",
    ),
    "submit": Option(bool, False, "As a job, with the settings of RUN's own job where it had one."),
    "dry_run": Option(bool, False, "With --submit: print the batch script and the configuration, and do nothing."),
}


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        raise help_with_run_options("rerun RUN", DESCRIPTION, OPTIONS, {"job": JobSettings})
    own = {name: option.type for name, option in OPTIONS.items()}
    given, words = read_options(run_option_types() | job_option_types() | own, arguments[1:], "rerun")
    if not arguments or arguments[0].startswith("-") or words:
        raise UserError("usage: minbert rerun RUN [options]; RUN is the folder of the run to train once more")
    source = RunFolder.existing(Path(arguments[0]))
    job = {name: value for name, value in given.items() if name in job_option_types()}
    options = {name: value for name, value in given.items() if name not in own and name not in job}
    wanted, dry = given.get("submit", False), given.get("dry_run", False)
    if (job or dry) and not wanted:
        raise UserError(f"--{next(iter(job), 'dry_run').replace('_', '-')} is about a job; add --submit")
    run = options.get("run") or new_run_path(source.read_config())
    if "config" in options:
        raise UserError("--config would replace what the run says; give single options")
    if Path(run).absolute() == source.path.absolute() or (Path(run) / "config.yaml").exists():
        raise UserError(f"{run} holds a run already; give a new folder by --run, or go on with it by minbert resume")
    submission = Records(source.path).submission() if wanted else None
    settings = dict(submission.settings) if submission else {}
    if given.get("code") == "same":
        before = as_words({name: value for name, value in settings.items() if name not in job})
        return _with_old_code(source, Path(run), [*before, *arguments[1:]], wanted)
    use_source(source.own_code)
    options |= {"config": source.config_file, "run": Path(run)}
    if wanted:
        return submit(CommandLine({"dry_run": dry}, settings | job, options))
    return start(build_run_config(options), force=False)


def _with_old_code(source: RunFolder, run: Path, words: list[str], wanted: bool) -> int:
    """In a process of its own, which imports that code and reads `words`, the options, once more."""
    code = code_of(source.path, default_cache_dir() / "code")
    command = [sys.executable, "-m", "minbert.launch.main", "submit" if wanted else "train"]
    command += ["--config", str(source.config_file), "--run", str(run), *_overrides(words)]
    path = [str(code), *([str(source.own_code)] if source.own_code.is_dir() else [])]
    path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    print(f"Code: {code}", flush=True)
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}).returncode


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """A job's settings as they are given on a command line."""
    words = []
    for name, value in settings.items():
        values = [f"{key}={item}" for key, item in value.items()] if isinstance(value, Mapping) else value
        for each in values if isinstance(values, list | tuple) else [values]:
            words += [] if each is None else [f"--{name.replace('_', '-')}={each}"]
    return words


def _overrides(words: list[str]) -> list[str]:
    """The options as they were given, without those of this command."""
    words, kept = list(words), []
    while words:
        word = words.pop(0)
        if word in ("--run", "--code"):
            words = words[1:]
        elif not word.startswith(("--run=", "--code=", "--submit")):
            kept.append(word)
    return kept
