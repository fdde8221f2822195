"""The commands that there are, and what each tells of itself.

Nothing but the standard library is imported here: `minbert doctor` runs where packages are missing.
"""

import codecs
import contextlib
import io
import re
import shutil
import sys
import textwrap
import warnings
from argparse import ArgumentParser
from importlib import import_module
from typing import Any, NoReturn, TextIO

# command -> (module, what it does). Modules are imported when they are needed: PyTorch takes seconds.
COMMANDS = {
    "train": ("minbert.launch.commands.train", "train a model"),
    "pretrain": ("minbert.launch.commands.pretrain", "train the encoder as a masked language model"),
    "resume": ("minbert.launch.commands.resume", "go on with a run, perhaps on other processes"),
    "rerun": ("minbert.launch.commands.rerun", "train what a run is once more, in a new folder, with other options"),
    "checkpoint": ("minbert.launch.commands.checkpoint", "list, verify or convert checkpoints"),
    "submit": ("minbert.launch.commands.submit", "train as a job on a SLURM cluster"),
    "jobs": ("minbert.launch.commands.jobs", "show every run: state, node, step, score"),
    "watch": ("minbert.launch.commands.watch", "show the progress of a run, a search or a folder of runs"),
    "logs": ("minbert.launch.commands.logs", "print or follow what a run prints"),
    "why": ("minbert.launch.commands.why", "why a run waits, has ended, or does not go on"),
    "cancel": ("minbert.launch.commands.cancel", "end the jobs of runs"),
    "tune": ("minbert.launch.commands.tune", "search hyperparameters, or start the full run from the best"),
    "ablate": ("minbert.launch.commands.ablate", "measure extensions alone, added up, left out, and combined"),
    "report": ("minbert.launch.commands.report", "write a page and a csv of what a run, a search or an ablation found"),
    "compare": ("minbert.launch.commands.compare", "put runs side by side: what differs, scores, curves"),
    "augment": ("minbert.launch.commands.augment", "make new training rows by back translation"),
    "evaluate": ("minbert.launch.commands.evaluate", "score the best model of a run, or of several together"),
    "predict": ("minbert.launch.commands.predict", "predict course files, a csv, or free text"),
    "average": ("minbert.launch.commands.average", "write the mean of several runs' weights as one model"),
    "export": ("minbert.launch.commands.export", "write the best model as a folder that other libraries load"),
    "completion": ("minbert.launch.commands.completion", "print a script that completes commands in a shell"),
    "doctor": ("minbert.launch.commands.doctor", "show what is installed and what is missing"),
}

# Commands of several actions, each with options of its own.
ACTIONS = {"checkpoint": ("list", "verify", "convert")}


class Help(Exception):
    """--help was among the words of a command, whose options are the fields of `kind`."""

    def __init__(self, kind: type, command: str):
        self.kind, self.program = kind, f"minbert {command}"

    def show(self) -> NoReturn:
        """Print it, drawn by tyro from the options' types, defaults and docstrings, and end the program."""
        import tyro

        paragraphs = [" ".join(part.split()) for part in (self.kind.__doc__ or "").split("\n\n")]
        description, settings, text = "\n\n".join(paragraphs), self._settings(), _Like(sys.stdout)
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
            tyro.cli(self.kind, args=["--help"], prog=self.program, description=description, config=settings)
        usage, _, shown = text.getvalue().partition("\n")
        columns = shutil.get_terminal_size().columns
        wrapper = textwrap.TextWrapper(columns, break_on_hyphens=False)
        for paragraph in paragraphs:  # which tyro leaves as long as they are, as it does the usage
            shown = shown.replace(paragraph, wrapper.fill(paragraph), 1)
        if len(plain := re.sub("\x1b.*?m", "", usage)) > columns:
            wrapper.subsequent_indent = " " * len("usage: ")
            usage = wrapper.fill(plain)
        print(f"{usage}\n{shown}", end="")
        raise SystemExit(0)

    def parser(self) -> ArgumentParser:
        """The same as a parser of the standard library, whose actions say what options there are."""
        import tyro

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tyro has nothing in its place
            return tyro.extras.get_parser(self.kind, prog=self.program, config=self._settings())

    @staticmethod
    def _settings() -> tuple[Any, ...]:
        import tyro

        return (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff, tyro.conf.FlagCreatePairsOff)


class _Like(io.StringIO):
    """Takes what would be printed to `output`, in the colours and characters that suit that."""

    def __init__(self, output: TextIO):
        super().__init__()
        self.output = output

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return codecs.lookup(self.output.encoding or "ascii").name  # as tyro compares it

    def isatty(self) -> bool:
        return self.output.isatty()


def parser_of(command: str, *action: str) -> ArgumentParser:
    """The options of a command, or of one of its actions."""
    try:
        import_module(COMMANDS[command][0]).main([*action, "--help"])
    except Help as asked:
        return asked.parser()
    raise AssertionError(f"{command} did not tell its options")
