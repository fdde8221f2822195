"""Files as nobody meant them: configurations, run folders, checkpoints, data.

Every command answers with a message and an exit code of ours, or does what it was asked. It shows no traceback, waits
for nothing, and leaves the neighbour's run as it was.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_runs import CORPUS

from minbert.launch.main import main
from minbert.trainer.config import OPTIONS, SECTIONS
from minbert.trainer.processes.exit_codes import ExitCode

FIXED = dict(
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CODES = {*ExitCode} - {ExitCode.LEFT_AT_ONCE}
LONGEST = 45_000  # characters of a message

scalars = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**64), 10**21, 0.5, 1e308, float("inf"), float("nan")]
) | st.sampled_from(
    ["", " ", "no", "8:00", "2024-01-01", "adamw", "~nobody-of-that-name", "torch:nn", "cagrad:c=1e400", "a\0b",
     "../..",
     "/dev/zero", "tiny", "sst", "x" * 5000, "é\u2028", "None", "dwa", "famo:lr=-1", "a:b:c", "hub:", "hub:~nobody/x"]
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["lr", "self", "a", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from([*OPTIONS, *SECTIONS, "self", "cls", "config", "force", "model_config", "lr ", "LR", "1", "~"])
junk = st.sampled_from(
    [b"", b"\0", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe", b"[" * 5000,
     b'{"step": "x"}\n{"step": 1, "dev/overall": "x"}\n',
     b'{"step": 1e999}\n{"step": []}\n7\n', b"9" * 5000, b"a: 1\na: 2\n", b"a: &a [*a]\n", b"\n" * 1000, b"x" * 100_000]
)  # fmt: skip


def outcome(capsys, *words: object) -> int:
    """Of a command in this process. Any exception but the end of the program fails the test."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err, said
    assert code in CODES, (code, said)
    assert code != ExitCode.USER_MISTAKE or "minbert: " in said.err or "Error" in said.err + said.out, said
    assert len(said.err) < LONGEST, len(said.err)
    return code


# Configurations


@settings(max_examples=150, **FIXED)
@given(st.dictionaries(keys, values, max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_configurations(tmp_path_factory, capsys, content, chance, torn):
    folder = tmp_path_factory.mktemp("config")
    text = yaml.safe_dump(content, allow_unicode=chance.random() < 0.5).encode()
    if torn and text:
        place = chance.randrange(len(text))
        text = (
            text[:place]
            + chance.choice([b"", b"\0", b"\xff", b"\t", b": ", b"[", b"&a ", b"*a", b"!!int "])
            + text[place:]
        )
    file = folder / "some.yaml"
    file.write_bytes(text)
    outcome(capsys, "submit", "--config", file, "--executor", "local", "--dry-run")
    assert [path.name for path in folder.iterdir()] == ["some.yaml"]
    shutil.rmtree(folder)


@settings(max_examples=150, **FIXED)
@given(st.lists(st.sampled_from([f"--{name.replace('_', '-')}" for name in OPTIONS]) | scalars.map(str), max_size=4))
def test_command_lines(tmp_path_factory, capsys, words):
    folder = tmp_path_factory.mktemp("line")
    outcome(capsys, "submit", *words, "--run", folder / "run", "--executor", "local", "--dry-run")
    assert not list(folder.iterdir())
    folder.rmdir()


# Run folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a finished run and its neighbour."""
    folder = tmp_path_factory.mktemp("runs")
    small = "--train-limit 24 --eval-limit 12 --batch-size 4 --steps 4 --eval-every 2 --log-every 1 --tasks sst sts"
    options = ["--data", CORPUS, *small.split(), "--measure-every", "2", "--trackers"]
    assert main(["train", "--run", str(folder / "run"), "--aggregator", "dwa", *options]) == 0
    shutil.copytree(folder / "run", folder / "neighbour")
    return folder


def digest(folder: Path) -> str:
    lines = [
        f"{path} {path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def leaves(content: object, place: tuple = ()) -> list[tuple]:
    """The places of all values in nested lists and dictionaries."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(leaf for key, value in inner for leaf in leaves(value, (*place, key)))]


def replaced(content: object, place: tuple, value: object, chance: random.Random) -> object:
    """`content` with another value, another key or nothing at a place."""
    if not place:
        return value
    content = content.copy()
    if len(place) > 1:
        content[place[0]] = replaced(content[place[0]], place[1:], value, chance)
    elif chance.random() < 0.6:
        content[place[0]] = value
    else:
        content.pop(place[0])
        if isinstance(content, dict) and chance.random() < 0.5:
            content["self"] = value
    return content


def spoil(file: Path, value: object, content: bytes, chance: random.Random) -> None:
    """Change one file, in one of the ways in which files change."""
    how = chance.choice(["value", "value", "value", "junk", "cut", "flip", "gone", "folder", "pipe", "unreadable"])
    old = file.read_bytes()
    if how == "value" and file.suffix in (".json", ".yaml"):
        nested = json.loads(old) if file.suffix == ".json" else yaml.safe_load(old)
        digested = nested.pop("sha256", None) if file.name == "manifest.json" else None
        nested = replaced(nested, chance.choice(leaves(nested)), value, chance)
        if digested and isinstance(nested, dict):
            text = json.dumps(nested, sort_keys=True)
            nested = {"sha256": hashlib.sha256(text.encode()).hexdigest()} | nested
        file.write_text(json.dumps(nested) if file.suffix == ".json" else yaml.safe_dump(nested))
    elif how in ("junk", "value"):
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(old[: chance.randrange(len(old) + 1)])
    elif how == "flip" and old:
        place = chance.randrange(len(old))
        file.write_bytes(old[:place] + bytes([old[place] ^ 1 << chance.randrange(8)]) + old[place + 1 :])
    elif how == "unreadable":
        file.unlink()
        file.symlink_to(file.name)  # root reads everything else
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)


COMMANDS = (
    "evaluate",
    "report",
    "predict",
    "jobs",
    "checkpoint verify",
    "checkpoint list",
    "logs",
    "resume",
    "resume",
)
SPOILT = (
    "config.yaml",
    "encoder/*",
    "metrics.jsonl",
    "gramians.jsonl",
    "checkpoints/*/*",
    "best.safetensors",
    "saved.json",
    "environment.json",
    "code.diff",
)


@settings(max_examples=60, **FIXED)
@given(st.randoms(use_true_random=False), values, junk, st.sampled_from(COMMANDS), st.sampled_from(SPOILT))
def test_run_folders(runs, tmp_path_factory, capsys, chance, value, content, command, pattern):
    folder = tmp_path_factory.mktemp("folder")
    shutil.copytree(runs, folder, dirs_exist_ok=True)
    before = digest(folder / "neighbour")
    spoil(chance.choice(sorted((folder / "run").glob(pattern))), value, content, chance)
    more = ["--steps", "6", "--device", "cpu"] if command == "resume" else []
    outcome(capsys, *command.split(), folder / "run", *more)
    outcome(capsys, "jobs", folder)
    assert digest(folder / "neighbour") == before
    shutil.rmtree(folder)


# Data


@settings(max_examples=60, **FIXED)
@given(st.randoms(use_true_random=False), junk, st.lists(st.text("ab\t\n\"'\r\ufeff\0,1é", max_size=30), max_size=4))
def test_data_files(runs, tmp_path_factory, capsys, chance, content, lines):
    folder = tmp_path_factory.mktemp("data")
    good = ["\tid\tsentence\tsentiment", *(f'{n}\tid{n}\tgood ""so"" {n}\t{n % 5}' for n in range(4)), *lines]
    chance.shuffle(good)
    text = "\n".join(good).encode()
    for name in ("ids-sst-train.csv", "ids-sst-dev.csv"):
        place = chance.randrange(len(text))
        file = folder / name
        file.write_bytes(chance.choice([content, text, text[:place] + content[:50] + text[place:]]))
    outcome(capsys, "evaluate", runs / "neighbour", "--data", folder)
    shutil.rmtree(folder)
