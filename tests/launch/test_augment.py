"""`minbert augment`, as a user meets it, and `minbert train --augmented` with what it wrote."""

import csv
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from small_runs import COMMAND, CORPUS
from tiny_marian import write_models
from waiting import PATIENCE, until

from minbert.data.augmentation.apertium import DATA
from minbert.launch.main import main
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder

pytest.importorskip("easynmt", reason="EasyNMT is not installed")

needs_apertium = pytest.mark.skipif(
    not shutil.which("apertium") or not (DATA / "modes" / "eng-spa.mode").exists(),
    reason="Apertium is not installed: apt-get install apertium apertium-eng-spa",
)
NEW_ROWS = ["augment", "sts", "sst", "--data", CORPUS, "--pivot", "xx", "--train-limit", "40", "--filters", "empty"]
NEW_ROWS += ["--beam", "1"]
SMALL = ["--data", CORPUS, "--steps", "3", "--eval-every", "3", "--batch-size", "4", "--eval-limit", "20", "--trackers"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("marian"))


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8", newline=""), delimiter="\t"))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "translations").rglob("*.jsonl")}


@pytest.fixture(scope="module")
def augmented(models, tmp_path_factory) -> Path:
    """New rows of the built-in similarity and sentiment by the tiny models, with nothing filtered away."""
    output = tmp_path_factory.mktemp("augmented") / "out"
    words = [*NEW_ROWS, "--translator", str(models)]
    assert main([*words, "--output", str(output)]) == 0
    return output


def test_new_rows_and_report(augmented):
    report = json.loads((augmented / "report.json").read_text())
    (way,) = report["recipes"]
    assert way["translations"] == way["kept"] + sum(way["dropped"].values())
    assert report["compared_with"][:2] == ["sts dev", "sts test"] and "sst dev" in report["compared_with"]
    for task, sides in (("sts", 3), ("sst", 1)):
        new = rows(augmented / f"{task}.tsv")
        assert len(new) == report["tasks"][task]["new_rows"] > 0
        assert len(new) + report["tasks"][task]["became_equal"] <= sides * 40
        assert {row["task"] for row in new} == {task} and {row["pivot"] for row in new} == {"xx"}
    assert {row["replaced"] for row in rows(augmented / "sts.tsv")} == {
        "sentence1",
        "sentence2",
        "sentence1+sentence2",
    }


def test_a_second_run_translates_nothing(models, augmented, capsys):
    before = {path: path.stat().st_mtime_ns for path in (augmented / "translations").rglob("*.jsonl")}
    words = [*NEW_ROWS, "--translator", str(models)]
    assert main([*words, "--output", str(augmented)]) == 0
    assert "missing" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (augmented / "translations").rglob("*.jsonl")} == before


def test_more_processes_than_the_machine_has_memory_for_are_refused(models, tmp_path, capsys):
    words = [*NEW_ROWS, "--translator", str(models), "--sample", "--variants", "100000", "--processes", "100000"]
    assert main([*words, "--output", str(tmp_path / "out")]) == ExitCode.USER_MISTAKE
    assert "100,000 processes need at least 14,648.4 GiB" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["draw", "append"])
def test_training_with_new_rows(augmented, tmp_path, mode):
    run = tmp_path / "run"
    files = [str(augmented / "sts.tsv"), str(augmented / "sst.tsv")]
    words = ["train", "--run", str(run), "--augmented", *files, "--augment-mode", mode, "--train-limit", "40", *SMALL]
    assert main([*words, "--tasks", "sts", "sst"]) == 0
    metrics = RunFolder(run).read_metrics()
    assert metrics[-1]["step"] == 3
    manifest = next(iter((run / "checkpoints").glob("*/manifest.json"))).read_text()
    identity = json.loads(manifest)["identity"]["data"]
    new = len(rows(augmented / "sts.tsv"))
    assert identity["sts"].startswith("40 examples" if mode == "draw" else f"{40 + new} examples")
    assert ("drawn in their place" in identity["sts"]) == (mode == "draw")


def test_a_run_goes_on_with_its_own_new_rows_only(augmented, tmp_path, capsys):
    file = tmp_path / "sts.tsv"
    shutil.copy(augmented / "sts.tsv", file)
    run = tmp_path / "run"
    words = ["train", "--run", str(run), "--augmented", str(file), "--train-limit", "40", "--tasks", "sts", *SMALL]
    assert main(words) == 0
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    assert main(["resume", str(run), "--steps", "6"]) == 2
    assert "examples" in capsys.readouterr().err
    file.write_text("\n".join(lines) + "\n")
    assert main(["resume", str(run), "--steps", "6"]) == 0


def test_a_resumed_run_draws_what_it_would_have(augmented, tmp_path):
    """The same steps with and without a stop between, to the last digit."""
    words = [*SMALL, "--augmented", str(augmented / "sts.tsv"), "--train-limit", "40", "--tasks", "sts"]
    words += ["--log-every", "1", "--lr-schedule", "constant"]
    assert main(["train", "--run", str(tmp_path / "whole"), *words, "--steps", "6"]) == 0
    assert main(["train", "--run", str(tmp_path / "parts"), *words, "--steps", "3"]) == 0
    assert main(["resume", str(tmp_path / "parts"), "--steps", "6"]) == 0
    losses = [
        [record["loss/sts"] for record in RunFolder(tmp_path / name).read_metrics() if "loss/sts" in record]
        for name in ("whole", "parts")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_kill_and_go_on(models, tmp_path):
    """A real process is killed after its first shard. The same command keeps that, and ends as if nothing had been."""
    words = ["augment", "sts", "--translator", str(models), "--pivot", "xx", "--train-limit", "300"]
    words += ["--filters", "empty", "--sample", "--variants", "2", "--batch-size", "16", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*COMMAND, *words, str(killed)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until(lambda: killed.is_dir() and shards(killed), "a first shard", process, pause=0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = shards(killed)
    next(killed.rglob("*.jsonl")).with_name("killed.lock").touch()  # as a kill leaves it between a shard and the next
    assert not (killed / "sts.tsv").exists()
    assert main([*words, str(whole)]) == 0
    assert 0 < len(kept) < len(shards(whole))
    assert main([*words, str(killed)]) == 0
    assert kept.items() <= shards(killed).items() and shards(killed) == shards(whole)
    assert (killed / "sts.tsv").read_bytes() == (whole / "sts.tsv").read_bytes()
    assert not list(killed.rglob("*.lock"))


def test_a_damaged_shard_is_translated_again(models, augmented, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(augmented, output)
    victim = next(iter((output / "translations").rglob("*.jsonl")))
    content = victim.read_bytes()
    victim.write_bytes(content[:100] + b"?" + content[101:])
    words = [*NEW_ROWS, "--translator", str(models)]
    assert main([*words, "--output", str(output)]) == 0
    assert shards(output) == shards(augmented)
    assert rows(output / "sts.tsv") == rows(augmented / "sts.tsv")


@needs_apertium
def test_two_commands_at_once_share_the_work(tmp_path, course_data):
    words = ["augment", "sts", "--data", str(course_data), "--translator", "apertium", "--pivot", "es"]
    words += ["--train-limit", "500", "--output", str(tmp_path / "out")]
    both = [
        subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"
    ]
    output = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    texts = [
        json.loads(line)[0]
        for content in shards(tmp_path / "out").values()
        for line in content.decode().split("\n")[:-1]
    ]
    assert len(texts) == len(set(texts))  # none was translated twice
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipes"][0]["translations"] == len(texts)


@needs_apertium
def test_real_rows_from_augmentation_to_training(tmp_path, course_data, capfd):
    """On a slice of the course's data, in several processes, into a run that scores the untouched dev rows."""
    output = tmp_path / "out"
    words = ["augment", "sts", "sst", "--data", str(course_data), "--translator", "apertium", "--pivot", "es"]
    words += ["--train-limit", "150", "--processes", "2", "--bad-rows", "skip", "--output", str(output)]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "sentences, " in done.stderr and " a second, " in done.stderr and "dropped: leakage" in done.stdout
    new = rows(output / "sts.tsv")
    assert len(new) > 150 and not any("*" in row["sentence1"] for row in new)
    files = [str(output / "sts.tsv"), str(output / "sst.tsv")]
    words = ["train", "--run", str(tmp_path / "run"), *SMALL, "--data", str(course_data), "--tasks", "sts", "sst"]
    words += ["--train-limit", "150", "--augmented", *files, "--augment-share", "0.7", "--processes", "2"]
    assert main(words) == 0
    assert "Finished: 3 of 3 steps" in capfd.readouterr().out


@needs_apertium
def test_similarity_by_the_encoder(tmp_path, course_data, minilm):
    output = tmp_path / "out"
    words = ["augment", "sts", "--data", str(course_data), "--translator", "apertium", "--pivot", "es"]
    words += ["--train-limit", "80", "--output", str(output)]
    assert main(words) == 0
    without = json.loads((output / "report.json").read_text())["recipes"][0]
    assert main([*words, "--min-similarity", "0.8"]) == 0
    report = json.loads((output / "report.json").read_text())
    dropped = report["recipes"][0]["dropped"]["similarity"]
    assert 0 < dropped < without["kept"] and report["recipes"][0]["kept"] == without["kept"] - dropped
    assert all(example["cosine"] < 0.8 for example in report["examples"]["similarity"])


def test_mistakes_are_told(tmp_path, capsys):
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    texts = tmp_path / "mlm.yaml"
    texts.write_text("name: mlm\nkind: masked_lm\ntexts: {tasks: [sts]}\n")
    cases = {
        ("sts", "--translator", "./no-such-folder"): "is no folder, and no name of the hub",
        ("stss",): "did you mean 'sts'?",
        ("sts", "sts"): "a task is named twice",
        (): "usage: minbert augment TASK",
        ("sts", "--time", "8h"): "--time is about a job; add --slurm",
        ("sts", "--max-copy", "2"): "--max-copy must be less than or equal to 1",
        ("sts", "--filters", "equals"): "--filters must be",
        (str(texts),): "has no rows of its own",
    }
    for words, message in cases.items():
        assert main(["augment", *words, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if shutil.which("apertium"):
        words = ["sts", "--translator", "apertium", "--pivot", "es"]
        assert main(["augment", *words, "--output", str(strange)]) == 2
        assert "is not empty, and no earlier augmentation" in capsys.readouterr().err
        assert os.listdir(strange) == ["thesis.tex"]
