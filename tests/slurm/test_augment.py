"""`minbert augment --slurm` on a real SLURM: an array shares the translations out, and the last element writes all."""

import json
import shutil

import pytest
from waiting import until

from minbert.data.augmentation.apertium import DATA
from minbert.launch.main import main
from minbert.slurm.status import inspect_runs

pytest.importorskip("easynmt", reason="EasyNMT is not installed")
pytestmark = [
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(
        not shutil.which("apertium") or not (DATA / "modes" / "eng-spa.mode").exists(),
        reason="Apertium is not installed: apt-get install apertium apertium-eng-spa",
    ),
]


def test_an_array_of_translations(devcluster, monkeypatch, tmp_path, course_data, capsys):
    for name, value in devcluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MINBERT_SITE", "")
    words = ["augment", "sts", "--data", str(course_data), "--translator", "apertium", "--pivot", "es"]
    words += ["--train-limit", "400", "--output"]
    array, here = tmp_path / "array", tmp_path / "here"
    assert main([*words, str(array), "--slurm", "--elements", "2", "--processes", "1", "--time", "10m"]) == 0
    assert "Element: " in capsys.readouterr().out
    elements = [array / "elements" / number for number in "01"]

    def over() -> bool:
        reports = inspect_runs(elements)
        assert all(report.active or report.finished for report in reports), [report.summary for report in reports]
        return all(report.finished for report in reports)

    until(over, "the end of both elements", pause=1)
    assert main([*words, str(here), "--processes", "1"]) == 0
    assert (array / "sts.tsv").read_bytes() == (here / "sts.tsv").read_bytes()
    texts = [
        json.loads(line)[0]
        for path in (array / "translations").rglob("*.jsonl")
        for line in path.read_text().split("\n")[:-1]
    ]
    assert len(texts) == len(set(texts))  # none was translated twice
    assert len(list((array / "translations").rglob("*.jsonl"))) > 1


def test_a_job_is_one_process(devcluster, monkeypatch, tmp_path, capsys):
    for name, value in devcluster.environment.items():
        monkeypatch.setenv(name, value)
    words = [
        "augment",
        "sts",
        "--translator",
        "apertium",
        "--pivot",
        "es",
        "--output",
        str(tmp_path / "out"),
        "--slurm",
    ]
    assert main([*words, "--tasks-per-node", "2"]) == 2
    assert "an element is one" in capsys.readouterr().err
    assert main([*words, "--executor", "local"]) == 2
    assert "--slurm is for the cluster" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
