"""The page of a run."""

import json
import shutil

import numpy as np
import pytest
from pages import read_csv

from minbert.launch.main import main
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.report.run import smoothed

pytestmark = pytest.mark.xdist_group("report")


def test_the_page_of_a_run(run, browser, capsys):
    assert main(["report", str(run), "--mistakes", "3"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    browser.open(run / "report.html")
    browser.check()
    tasks = ["Sentiment (SST-5)", "Paraphrase (Quora)", "Similarity (STS)"]
    assert browser.headings() == ["The run", "Curves", *tasks, "Gradient conflicts"]
    assert browser.warnings() == ""
    picture = browser.saved("Mean cosine by layer").read_text()
    assert picture.startswith("<svg") and "sst · quora" in picture and "layer 0" in picture

    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    shown = {row[0]: row[-1] for row in browser.table("the-run")[1:]}
    assert shown == {name: f"{score:.3f}" for name, score in scores.items() if "/" not in name}

    options = {row[0]: row[1] for row in browser.table("the-run", 1)[1:]}
    assert (options["aggregator"], options["steps"]) == ("pcgrad", "12")
    assert not options.keys() & {"lr", "head_lr", "epochs"}  # which the run filled in itself
    header, *mistakes = browser.table("sentiment-sst-5")
    assert header[1:3] == ["label", "predicted"]
    assert len(mistakes) == 3
    assert all(label != predicted for _, label, predicted, *_ in mistakes)
    assert len(browser.table("similarity-sts")[1]) == 4  # both sentences, label, predicted

    metrics = RunFolder(run).read_metrics()
    chart = "[...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent == 'Loss: sst')"
    drawn = browser.ask(f"{chart}.querySelector('.drawing').data.map(t => [t.name, [...t.x], [...t.y]])")
    for (name, steps, values), key in zip(drawn, ("loss/sst", "dev_loss/sst"), strict=True):
        assert name == ("train" if key == "loss/sst" else "dev")
        assert list(zip(steps, values)) == [(record["step"], record[key]) for record in metrics if key in record]
    rows = read_csv(run / "report.csv")
    assert [int(row["step"]) for row in rows] == [record["step"] for record in metrics]
    assert [float(row["dev/sts"]) for row in rows if row["dev/sts"]] == [
        r["dev/sts"] for r in metrics if "dev/sts" in r
    ]


def test_a_run_without_its_data_or_model_has_a_page_with_a_warning(run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("best.safetensors", "checkpoints"))
    assert main(["report", str(other)]) == 0
    assert "holds no trained model yet" in (other / "report.html").read_text()
    assert main(["report", str(run), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "page.html")]) == 0
    assert "nowhere" in (tmp_path / "page.html").read_text()


def test_a_smoothed_curve_is_the_exponential_mean_of_what_came_before():
    values = [float(value) for value in np.random.default_rng(0).normal(size=200)]
    weights = 0.9 ** np.arange(200)[::-1]  # a twentieth of 200 is ten
    expected = [np.average(values[:count], weights=weights[-count:]) for count in range(1, 201)]
    assert smoothed(values) == pytest.approx(expected)
    assert smoothed([1.0, None, 1.0]) == [1.0, None, 1.0]
