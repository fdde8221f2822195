"""The commands as a user meets them: disks that are full, folders, help, the sources of options, the terminal.

They are called in this process; where the process itself is the point (exit codes, pipes, terminals), they are started.
"""

import os
import pty
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_runs import COMMAND, CORPUS, minbert

from minbert.data.errors import disk_trouble
from minbert.data.files import replacing
from minbert.data.task import SPLITS
from minbert.launch.options import parse_run_config
from minbert.trainer.run import data
from minbert.trainer.run.folder import RunFolder

# Disks and files

WRITERS = [
    ("train --run {there}/run", "run/"),
    ("predict {run} --out {there}/new", "new/sst-dev-output.csv"),
    ("predict {run} --task sst --csv {run}/fine.csv --out {there}/x.csv", "x.csv"),
    ("export {run} {there}/new", "new/model.safetensors"),
    ("report {run} --out {there}/x.html", "x.html"),
    ("checkpoint convert {run} {there}/x.safetensors", "x.safetensors"),
]


@contextmanager
def no_room() -> Iterator[None]:
    """No file may grow beyond 64 bytes, which the system reports as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("command", "file"), WRITERS, ids=[command.split()[0] + file for command, file in WRITERS])
def test_a_full_disk_is_told_with_the_file(copied, capsys, command, file):
    there = copied / "there"
    with no_room():
        code = minbert(*command.format(run=copied / "run", there=there).split())
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and "Make room" in said.err
    told = r"\S* could not be written: File too large \(the disk at /"
    assert re.search(re.escape(f"{there}/{file}") + told, said.err)


def test_errors_of_other_languages_about_a_full_disk_are_understood(tmp_path):
    with no_room(), pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(9)}, tmp_path / "a")
    assert "File too large" in str(disk_trouble(caught.value))
    assert disk_trouble(ValueError("no space")) is None


def test_folders_that_may_not_be_read_or_written_are_named(copied, capsys):
    there, run, closed = copied / "there", copied / "run", copied / "closed"
    closed.mkdir()
    readers = ["evaluate {closed}/x", "resume {closed}/x", "checkpoint list {closed}/x", "report {closed}/x"]
    readers += ["predict {run} --task sst --csv {closed}/x.csv", "train --config {closed}/x.yaml"]
    there.chmod(0o555)
    closed.chmod(0)
    user = os.getuid()
    if user == 0:
        os.setresuid(65534, 65534, 0)  # root may do anything
    try:
        for command in [*readers, *(command for command, _ in WRITERS)]:
            assert minbert(*command.format(run=run, there=there, closed=closed).split()) == 2, command
            said = capsys.readouterr()
            assert str(closed if command in readers else there) in said.err, command
            assert re.search("Permission denied|may not be written to|not writable", said.err), command
            assert said.out == "", command
    finally:
        if user == 0:
            os.setresuid(0, 0, 0)
        closed.chmod(0o755)
        there.chmod(0o755)
    assert list(there.iterdir()) == []


def test_a_bad_row_is_named_by_file_and_line_or_skipped(tmp_path, course_folder, capsys):
    with (course_folder / "ids-sst-train.csv").open("a") as file:
        file.write("40\tid40\tgreat\t7\n41\tid41\tshort\n")
    arguments = ["--data", course_folder, "--tasks", "sst", "--run", tmp_path / "run", "--steps", 1, "--batch-size", 4]
    assert minbert("train", *arguments) == 2
    said = capsys.readouterr().err
    assert "ids-sst-train.csv:42: label 7 is outside 0..4" in said and "ids-sst-train.csv:43: 3 fields" in said
    assert minbert("train", *arguments, "--bad-rows", "skip") == 0


def test_the_process_ends_with_the_code_and_without_a_traceback(tmp_path):
    done = subprocess.run([*COMMAND, "train", "--lr", "fast"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minbert: --lr must be a valid number, not 'fast'\n"
    assert not list(tmp_path.iterdir())


def test_help_may_be_cut_short():
    command = f"{sys.executable} -m minbert.launch.main train --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: minbert train") and done.stderr == ""


def test_help_names_every_option_and_no_python(monkeypatch, capsys):
    from minbert.trainer.config import OPTIONS

    monkeypatch.setenv("COLUMNS", "100")
    assert minbert("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in shown for name in (*OPTIONS, "config"))
    assert "None" not in shown
    assert minbert("--help") == 0 and minbert() == 2


# Options


def test_the_later_source_of_an_option_wins(trained, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: 5\nlr: 1e-2\nbatch: {{batch_size: 7, accumulation: 2}}\nrun: {trained.path}\n")
    config = parse_run_config(["--config", str(file), "--batch-size", "9", "--lr=0.5"])
    assert (config.seed, config.optimizer.lr, config.run) == (5, 0.5, trained.path)
    assert (config.batch.batch_size, config.batch.accumulation) == (9, 2)
    assert config.budget.steps == 6  # of the run's own folder, which the file names
    assert config.heads.hidden_layers == 1  # the default
    assert parse_run_config(["--run", str(trained.path), "--lr", "None"]).optimizer.lr is None


def test_an_option_may_mend_what_a_file_leaves_inconsistent(tmp_path):
    (tmp_path / "c.yaml").write_text("extend_to: 9\nepochs: 3\n")
    assert parse_run_config(["--config", str(tmp_path / "c.yaml"), "--lr-schedule", "constant"]).budget.extend_to == 9


# What else is seen of a run


def test_a_start_reads_each_split_once(tmp_path, monkeypatch):
    """For the vocabulary, the tokens, the training and the scores."""
    asked, read = [], data.load_examples
    monkeypatch.setattr(data, "load_examples", lambda *found: asked.append((found[1].name, found[2])) or read(*found))
    options = ["--data", CORPUS, "--train-limit", "40", "--batch-size", "8", "--steps", "2", "--trackers"]
    assert minbert("train", "--run", tmp_path / "run", *options) == 0
    assert sorted(asked) == sorted((task, split) for task in ("sst", "quora", "sts") for split in SPLITS)
    asked.clear()
    with data.reading_once() as kept:
        config = RunFolder(tmp_path / "run").read_config()
        splits = [data.load_splits(config, RunFolder(tmp_path / "run"), "train") for _ in range(2)]
        assert len(asked) == len(kept) == 3 and all(splits[0][name] is splits[1][name] for name in splits[0])


def test_the_terminal_shows_progress_and_no_chatter(tmp_path):
    """DeepSpeed and its friends speak to the log only, on every rank."""
    run = tmp_path / "run"
    size = ["--data", CORPUS, "--train-limit", "40", "--eval-limit", "20", "--batch-size", "8", "--steps", "3"]
    parallel = ["--zero-stage", "2", "--processes", "2"]
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, "train", "--run", run, *size, *parallel], stdout=slave, stderr=subprocess.PIPE, env=environment
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the other end was closed
            break
    errors = process.stderr.read().decode()
    assert process.wait() == 0, errors
    assert [line for line in errors.splitlines() if "processes share" not in line] == []
    text = shown.decode()
    assert "3/3" in text and "(best so far)" in text and "overall" in text and "Best model, dev" in text
    assert "DeepSpeed" not in text and "Warning" not in text
    assert all((run / "logs" / f"rank-{rank}.log").stat().st_size for rank in (0, 1))


def test_replacing_leaves_the_old_file_after_an_error(tmp_path):
    target = tmp_path / "file"
    with replacing(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]
