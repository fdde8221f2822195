"""Options and configuration files: what is refused, by which words, and how long a message may be."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro
import yaml
from known_tasks import TASKS
from pydantic import Field
from small_runs import CORPUS

from minbert.data.errors import DataError, UserError
from minbert.data.reading import read_small, read_yaml
from minbert.data.sources.course import read_course
from minbert.launch.commands.evaluate import EvaluateOptions
from minbert.launch.commands.export import ExportOptions
from minbert.launch.main import main
from minbert.launch.options import build_run_config, parse, read_run_options
from minbert.launch.sweep import elements
from minbert.launch.words import read_options
from minbert.trainer.config import parse_config
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.memory import require_memory
from minbert.trainer.model.weights import TINY, read_config, write_shape
from minbert.trainer.processes.stop import Stopped, StopRequest

SMALL = ["--data", CORPUS, "--train-limit", "40", "--eval-limit", "20", "--batch-size", "4", "--trackers"]
SMALL += ["--tasks", "sst"]


def written(folder: Path, content: str | bytes, name: str = "some.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Configuration files


def test_yaml_means_what_it_looks_like(tmp_path):
    text = (
        "time: 8:00:00\nday: 2024-01-01\naccount: 0123\nword: no\nflag: true\nrate: 1.5\nsmall: 1e-5\nnone: ~\nempty:\n"
    )
    assert read_yaml(written(tmp_path, text)) == {
        "time": "8:00:00", "day": "2024-01-01", "account": "0123", "word": "no", "flag": True, "rate": 1.5,
        "small": "1e-5", "none": None, "empty": None,
    }  # fmt: skip
    config = parse_config(read_yaml(written(tmp_path, "lr: 1e-5\nkeep_best: yes\nrun: 2024-01-01\n")), "file")
    assert (config.optimizer.lr, config.budget.keep_best, config.run) == (1e-5, True, Path("2024-01-01"))


def test_what_we_write_reads_back_the_same(tmp_path):
    words = ["8:00:00", "1e5", "1e-5", "0123", "0x1f", "no", "~", "1_000", "2024-01-01", ".inf", "1.", "089", "<<", "="]
    content = {f"k{number}": word for number, word in enumerate(words)} | {"i": 10, "f": 2.5, "n": None, "b": False}
    assert read_yaml(written(tmp_path, yaml.safe_dump(content))) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "line 3: 'lr' was given before, in line 1"),
        ("optimizer: {lr: 1, lr: 2}\n", "line 1: 'lr' was given before"),
        ("lr: 1\noptimizer: {lr: 2}\n", "lr is given twice, alone and under optimizer"),
        ("optimizer: adamw\nlr: 0.1\n", "optimizer is a group of options (lr, head_lr"),
        ("optimizer: {batch_size: 3}\n", "batch_size is no option under optimizer: it stands alone, or under batch"),
        ("optimizer: {1: 2}\n", "unknown key 1 under optimizer"),
        ("self: 1\n", "unknown key 'self'"),
        ("batch: {self: 1}\n", "unknown key 'self' under batch"),
        ("lr: .inf\n", "lr: input should be a finite number"),
        ("lr: .nan\n", "lr: input should be a finite number"),
        ("timeout: .inf\n", "timeout: input should be a finite number"),
        ("seed: 18446744073709551616\n", "seed: input should be less than 4294967296"),
        ("batch_size: 1000000000000000000000\n", "batch_size: input should be less than 2147483648"),
        ("epochs: 1:30\n", "epochs: input should be a valid number"),
        ("seed: " + "9" * 5000 + "\n", "is not valid YAML"),
        ("cache: ~nobody-of-that-name/x\n", "cache: Could not determine home directory"),
        ("data: ~nobody-of-that-name/x\n", "data: Could not determine home directory"),
        ('run: "a\\0b"\n', "run: a path cannot hold a NUL byte"),
        (b"lr: \0", "is not valid YAML"),
        (b"\xef\xbb\xbflr: 1\nrun: caf\xe9\n", "some.yaml:2: byte 0xe9 (offset 17) is not UTF-8"),
        ("lr: " + "[" * 5000, "nested too deeply"),
        ("a: &a [*a]\n", "aliases stand for too much"),
        ("a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30)), "too much"),
        ("lr: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("lr: !!int x\n", "is not valid YAML"),
        ("aggregator: cagrad:c=1e400\n", "c must be a number, not '1e400'"),
        ("lr: " + "x" * 200_000 + "\n", "lr: input should be a valid number"),
        ("? " + "x" * 200_000 + "\n: 1\n", "unknown key 'xxx"),
        ("trackers: [" + ", ".join(["[]"] * 5000) + "]\n", "more lines"),
        ("".join(f"key{n}: 1\n" for n in range(5000)), "more lines"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_a_few_words(tmp_path, capsys, content, message):
    assert main(["train", "--config", str(written(tmp_path, content))]) == 2
    said = capsys.readouterr().err
    assert message in said and "some.yaml" in said and len(said) < 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"]


def test_what_is_no_small_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe", "no regular file"), ("folder", "is a folder"), ("none", "No such file")):
        assert main(["train", "--config", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_small(written(tmp_path, "long"), 3)
    read, write = os.pipe()  # as `--config <(command)` has it
    os.write(write, b"lr: 0.5\n")
    os.close(write)
    assert read_yaml(Path(f"/dev/fd/{read}")) == {"lr": 0.5}
    os.close(read)


def test_a_mistake_under_a_heading_is_named_where_a_run_is_in_the_folder(tmp_path):
    file = written(tmp_path, "optimizer: {batch_size: 3}\n")
    with pytest.raises(UserError, match="no option under optimizer"):
        build_run_config({"config": file})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 130, "num_attention_heads": 4}, "hidden_size 130 is not divisible by num_attention_heads 4"),
        ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer"),
        ({"num_attention_heads": 0}, "num_attention_heads: Input should be greater than or equal to 1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
        ({"pad_token_id": 100}, "pad_token_id 100 is not below vocab_size 100"),
        ({"vocab_size": None}, "vocab_size"),
        ({"model_type": ["x" * 10_000] * 1000}, "only 'bert' is supported"),
    ],
)
def test_an_encoder_of_no_shape_is_refused(tmp_path, change, message):
    import json

    write_shape(tmp_path, BertConfig(vocab_size=100, **TINY))
    assert read_config(tmp_path).hidden_size == 128
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        read_config(tmp_path)
    assert str(file) in str(refusal.value) and len(str(refusal.value)) < 2000


# The command line

TYPES = {"flag": bool, "names": tuple[str, ...], "some": Annotated[tuple[int, ...], Field(min_length=1)], "word": str}


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--flag=false --word a", {"flag": False, "word": "a"}),
        ("--flag=true", {"flag": True}),
        ("--word=--x", {"word": "--x"}),
        ("--names=--x --names=-y", {"names": ("--x", "-y")}),
        ("--names", {"names": ()}),
    ],
)
def test_values_may_be_attached(line, options):
    assert read_options(TYPES, line.split(), "test") == (options, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--flag=perhaps", "--flag must be a valid boolean"),
        ("--word --x", "--word needs a value; one that starts with -- is attached to it: --word=--x"),
        ("--names --x", "If it is a value of --names, write --names=--x"),
        ("--some", "--some needs a value"),
        ("--word=", "--word needs a value"),
        ("--some " + "9" * 5000, "--some must be"),
    ],
)
def test_a_value_that_is_none_is_refused(line, message):
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        read_options(TYPES, line.split(), "test")
    assert len(str(refusal.value)) < 500


@dataclass(frozen=True)
class Flagged:
    """A command with a flag."""

    json: bool = False


def test_flags_of_every_command_take_a_value():
    assert not parse(Flagged, ["--json=false"], "test").json
    assert parse(Flagged, ["--json=true"], "test").json
    assert build_run_config({"keep_best": False}).budget.keep_best is False


@dataclass(frozen=True)
class Placed:
    """A command with words and options."""

    run: tyro.conf.Positional[Path]
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    data: str | None = None
    splits: tuple[str, ...] = ("dev",)


def test_words_and_options_of_every_command_come_in_any_order():
    a, b, c = map(Path, "abc")
    assert parse(Placed, ["a", "--data=--x", "b", "c"], "test") == Placed(a, (b, c), "--x")
    assert parse(Placed, ["--splits=--dev", "--splits=test", "--data", "x", "a"], "test") == Placed(
        a, (), "x", ("--dev", "test")
    )
    with pytest.raises(UserError, match="usage: minbert test RUN OTHERS"):
        parse(Placed, ["--data", "x"], "test")
    with pytest.raises(UserError, match="what is 'c'"):
        parse(ExportOptions, ["a", "b", "c"], "export")
    with pytest.raises(UserError, match="--split must be 'train', 'dev' or 'test'"):
        parse(EvaluateOptions, ["a", "--split=--dev"], "evaluate")


def test_force_may_be_taken_back():
    assert read_run_options(["--force=false", "--data=--x"]) == {"force": False, "data": "--x"}


def test_a_sweeps_folders_are_what_they_are_called(tmp_path, capsys):
    assert main(["submit", "--run", str(tmp_path / "s"), "--sweep", "seed=7 9,8", "--dry-run"]) == 2
    assert "what is '9' in seed=7_9" in capsys.readouterr().err
    names = [next(iter(elements({"tasks": [value]}))) for value in ("sst sts", "sst_sts", "sst  sts", "sst:sts")]
    assert len(set(names)) == 4 and names[1] == "tasks=sst_sts"


# Data files


def test_places_count_from_the_start_of_the_file(tmp_path):
    (tmp_path / "ids-sst-train.csv").write_bytes(b"\xef\xbb\xbf\tid\tsentence\tsentiment\n0\ta\tcaf\xe9\t3\n")
    with pytest.raises(DataError, match=r"ids-sst-train.csv:2: byte 0xe9 \(offset 33\)"):
        read_course(tmp_path, TASKS["sst"], "train")


def test_a_header_of_any_length_is_quoted_in_part(tmp_path):
    (tmp_path / "ids-sst-train.csv").write_text("x" * 100_000 + "\ty" * 30_000 + "\n")
    with pytest.raises(DataError, match="has no column 'id'") as refusal:
        read_course(tmp_path, TASKS["sst"], "train")
    assert len(str(refusal.value)) < 2000


# Sizes, and stopping before there is anything to save


@pytest.mark.parametrize(
    "options",
    [
        "processes=100000",
        "hidden_layers=100000",
        "hidden_size=1000000000",
        "batch_size=2000000000",
        "zero_stage=3 hidden_size=10000000",
    ],
)
def test_sizes_out_of_proportion_are_refused_before_there_is_a_folder(tmp_path, capsys, options):
    words = [f"--{option.replace('_', '-')}" for option in options.split()]
    assert main(["train", "--run", str(tmp_path / "run"), *words]) == 2
    assert re.search(r"needs at least [\d,.]+ GiB of memory .* this machine has [\d.]+ GiB", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_sizes_that_people_train_are_not_refused():
    base = BertConfig(30522, 768, 12, 12, 3072)
    for options in ({}, {"zero_stage": 2, "processes": 8}, {"batch_size": 256, "accumulation": 8}):
        config = parse_config(options, "test")
        require_memory(config, BertConfig(vocab_size=8192, **TINY), config.parallel.processes)
    require_memory(parse_config({"batch_size": 32}, "test"), base, 1)


def test_a_signal_is_heard_where_there_is_nothing_to_save():
    with StopRequest() as stop:
        with pytest.raises(Stopped), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")
        with pytest.raises(Stopped), stop.at_once():  # it came before
            pytest.fail("it went on")


def test_a_stop_request_while_the_model_is_built_leaves_with_its_code(tmp_path, monkeypatch, capsys):
    """The request comes inside the construction of the model, whose end is never reached."""
    from minbert.trainer.run import saved_model

    built = []

    def build(*arguments):
        signal.raise_signal(signal.SIGTERM)
        built.append(arguments)

    monkeypatch.setattr(saved_model, "MultitaskModel", build)
    run = tmp_path / "run"
    assert main(["train", "--run", str(run), *SMALL, "--steps", "2"]) == 75
    assert not built and f"minbert resume {run}" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["resume", str(run), "--steps", "2"]) == 0


# Aggregators of one's own


def test_an_aggregator_of_ones_own_travels_with_the_run_and_runs_only_in_training(tmp_path, monkeypatch, capsys):
    """It is found in the current folder, kept, and found again from elsewhere, in processes of their own."""
    (tmp_path / "here" / "ours").mkdir(parents=True)
    source = (
        "from pathlib import Path\nPath({trace!r}).open('a').write('x')\ndef mean(g): return g.diagonal() * 0 + 1\n"
    )
    trace = tmp_path / "trace"
    (tmp_path / "here" / "ours" / "__init__.py").write_text("")
    (tmp_path / "here" / "ours" / "method.py").write_text(source.format(trace=str(trace)))

    def minbert(*arguments: object, folder: str, code: int = 0) -> str:
        script = Path(sys.executable).with_name("minbert")  # not -m, which looks into the current folder by itself
        done = subprocess.run([script, *map(str, arguments)], cwd=tmp_path / folder, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    options = [*SMALL[:-1], "sst", "sts", "--steps", "2"]
    run = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    assert "no module ours" in minbert(
        "train", "--run", run, *options, "--aggregator", "ours.method:mean", folder="elsewhere", code=2
    )
    minbert("train", "--run", run, *options, "--aggregator", "ours.method:mean", folder="here")
    assert trace.read_text() == "x" and (run / "aggregator" / "ours" / "method.py").exists()
    minbert("resume", run, "--steps", "3", folder="elsewhere")
    assert trace.read_text() == "xx"
    for command in (
        ["evaluate", run],
        ["report", run],
        ["jobs", run],
        ["export", run, tmp_path / "out"],
        ["checkpoint", "list", run],
        ["predict", run],
    ):
        assert main([str(word) for word in command]) in (0, 75), command
    assert trace.read_text() == "xx"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch:nn", "'module' object is not callable"),
        ("math:sin", "cannot be used"),
        ("broken_source:f", "SyntaxError"),
        ("wrong_shape:f", "must make a tensor of 3 weights"),
        ("wrong_shape:absent", "AttributeError"),
        ("cagrad:c=-1", "c must be non-negative"),
    ],
)
def test_what_is_no_aggregator_is_refused_before_training(tmp_path, monkeypatch, capsys, name, message):
    (tmp_path / "broken_source.py").write_text("def\n")
    (tmp_path / "wrong_shape.py").write_text("def f(gramian): return gramian\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["train", "--run", str(tmp_path / "run"), "--aggregator", name, "--steps", "1"]) == 2
    assert message in capsys.readouterr().err
    for module in ("broken_source", "wrong_shape"):
        sys.modules.pop(module, None)


def test_another_deepspeed_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minbert.trainer.run.preparation.version", lambda name: "0.20.1")
    assert main(["train", "--run", str(tmp_path / "run"), "--zero-stage", "2"]) == 2
    said = capsys.readouterr().err
    assert "works on the insides of DeepSpeed >=0.19,<0.20, and 0.20.1 is installed: pip install" in said
    assert not (tmp_path / "run").exists()
