"""The help of every command, as it stands on a terminal of 80 columns."""

import os
from itertools import pairwise

import pytest
from small_runs import minbert

from minbert.launch.help import docstrings
from minbert.launch.manual import ACTIONS, COMMANDS
from minbert.trainer.config import RunConfig

WIDTH = 80
WORDS = [(name, *action) for name in COMMANDS for action in [(a,) for a in ACTIONS.get(name, ())] or [()]]


def ragged(lines: list[str]) -> list[str]:
    """Lines that end before the first word of the next one of their paragraph had to."""
    found = []
    for line, below in pairwise(lines):
        boxed = line.startswith("│") and below.startswith("│")
        width, line, below = (WIDTH - 4, line[2:-2], below[2:-2]) if boxed else (WIDTH, line, below)
        text, word = line.rstrip(), below.split()[:1]
        indent = len(below) - len(below.lstrip())
        at_the_column = line[max(0, indent - 2) : indent].isspace() and text[indent:].strip()
        goes_on = at_the_column if indent else text and not boxed
        if goes_on and word and word[0][0] not in "╭╰│" and len(text) + 1 + len(word[0]) <= width:
            found.append(f"{text}\n{below}")
    return found


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help_fills_its_lines_and_says_nothing_of_defaults_that_are_none(words, capsys, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((WIDTH, 24)))
    assert minbert(*words, "--help") == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith(f"usage: minbert {' '.join(words)}") and "╭" in said
    assert max(map(len, lines)) <= WIDTH
    assert ragged(lines[1:]) == []
    assert "(default: )" not in said and "None" not in said


def test_what_counts_as_ragged():
    assert ragged(["Some words that could have", "been longer."])
    assert ragged([f"│ {'--x  ' + 'a' * 60:<76} │", f"│ {'     word':<76} │"])
    assert not ragged([f"│ {'--x  ' + 'a' * 69:<76} │", f"│ {'     word':<76} │"])
    assert not ragged([f"│ {'--long-option FLOAT':<76} │", f"│ {'     word':<76} │"])


def test_options_are_told_by_the_strings_below_them():
    assert docstrings(RunConfig)["seed"].startswith("Seed of the weights")
    assert docstrings(RunConfig).keys() == RunConfig.model_fields.keys() - {
        *("corpus", "encoder", "heads", "optimizer", "objective", "batch", "budget", "parallel")
    }
