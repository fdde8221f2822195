"""Runs side by side: what their differences are worth, in numbers and on their page."""

import json
import shutil
from pathlib import Path

import pytest
from pages import read_csv
from scipy.stats import ttest_rel

from minbert.data.errors import UserError
from minbert.data.task import Task
from minbert.launch.main import main
from minbert.launch.results import recorded
from minbert.trainer.evaluation.prediction_files import write_predictions
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.report.compared import _curves
from minbert.tuning.runs_compared import _predicted, bootstrap, compare_runs

pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def several(run, tmp_path_factory) -> dict[str, Path]:
    """The run, once more with other predictions, and two groups of three seeds."""
    folder = tmp_path_factory.mktemp("several")
    found = {"first": folder / "first", "second": folder / "second"}
    for path in found.values():
        shutil.copytree(run, path, ignore=shutil.ignore_patterns("checkpoints"))
    second = RunFolder(found["second"])
    config = second.read_config()
    second.write_config(config.model_copy(update={"batch": config.batch.model_copy(update={"aggregator": "sum"})}))
    path = second.predictions / "sst-dev-output.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(line[: line.index(" , ")] + " , 3 " for line in lines), ""]))
    scores = {"plain": (0.50, 0.52, 0.49), "surgery": (0.53, 0.54, 0.50)}
    for name, values in scores.items():
        for seed, score in enumerate(values):
            found[f"{name},seed={seed}"] = folder / "seeds" / f"{name},seed={seed}"
            each = RunFolder(found[f"{name},seed={seed}"])
            batch = config.batch.model_copy(update={"aggregator": "pcgrad" if name == "surgery" else "sum"})
            each.write_config(config.model_copy(update={"seed": seed, "batch": batch}))
            for step in (5, 10):
                each.append_metrics({"step": step, "dev/sst": score, "dev/overall": score - 0.01 * (step == 5)})
    return found


def test_single_runs_are_compared_by_their_predictions_of_the_same_examples(several, capsys):
    first, second = RunFolder(several["first"]), RunFolder(several["second"])
    same = bootstrap(first, first, draws=50)
    assert all((each.mean, each.low, each.high) == (0, 0, 0) for each in same.values())
    found = bootstrap(first, second)
    assert found.keys() == {"sst", "quora", "sts", "overall"}
    assert (found["quora"].mean, found["sts"].low, found["sts"].high) == (0, 0, 0)
    (_, mine, labels, _), (_, theirs, _, _) = _predicted(first)["sst"], _predicted(second)["sst"]
    each = (theirs == labels).astype(float) - (mine == labels)
    assert found["sst"].mean == pytest.approx(each.mean(), abs=1e-6)
    assert found["sst"].deviation == pytest.approx(each.std() / len(each) ** 0.5, rel=0.1)
    assert found["overall"].low == pytest.approx(found["sst"].low / 3, abs=1e-6)
    assert main(["compare", str(several["first"]), str(several["second"])]) == 0
    said = capsys.readouterr().out
    assert "aggregator" in said and "pcgrad" in said and "second: the same dev examples, paired bootstrap" in said
    assert "batch_size" not in said and "paired bootstrap" in said


def test_several_labels_count_in_the_overall_difference_and_what_cannot_be_drawn_leaves_it_out(several, tmp_path):
    """The first run as one of two tasks, one with several labels; in the second run the other one is always wrong."""
    tags = {"name": "tags", "kind": "multilabel", "sentences": ["text"], "label": "tags", "classes": ["a"]}
    rows = "".join(json.dumps({"id": f"x , {n}", "text": "so", "tags": ["a"] * (n % 2)}) + "\n" for n in range(20))
    (tmp_path / "dev.jsonl").write_text(rows)
    tags = Task.model_validate(tags | {"files": {"train": tmp_path / "dev.jsonl", "dev": tmp_path / "dev.jsonl"}})
    pair = []
    for name, wrong in (("right", 0), ("wrong", 1)):
        run = RunFolder(tmp_path / name)
        shutil.copytree(several["first"], run.path)
        config = run.read_config()
        corpus = config.corpus.model_copy(update={"tasks": (config.corpus.tasks[0], tags)})
        run.write_config(config.model_copy(update={"corpus": corpus}))
        path = run.predictions / "tags-dev-output.csv"
        with recorded(run.predictions / "predictions.json", path.name, {"data": config.corpus.data}):
            write_predictions(path, tags, [f"x , {n}" for n in range(20)], [[(n + wrong) % 2] for n in range(20)])
        pair.append(run)
    found = bootstrap(*pair, draws=20)
    assert (found["tags"].mean, found["sst"].mean, found["overall"].mean) == (-1, 0, -0.5)
    for run in pair:
        (run.predictions / "tags-dev-output.csv").unlink()
    assert bootstrap(*pair, draws=20).keys() == {"sst"}


def test_seeds_are_one_column_and_paired_by_the_t_test(several):
    found = compare_runs([several[name] for name in several if "seed" in name])
    assert [group.name for group in found.groups] == ["plain (3 seeds)", "surgery (3 seeds)"]
    assert found.options == {"aggregator": ["sum", "pcgrad"]}
    spread, difference = found.groups[0].spreads()["overall"], found.differences["surgery (3 seeds)"]["overall"]
    assert (spread.mean, spread.count) == (pytest.approx((0.5 + 0.52 + 0.49) / 3), 3)
    reference = ttest_rel([0.53, 0.54, 0.50], [0.50, 0.52, 0.49]).confidence_interval()
    assert (difference.low, difference.high) == (pytest.approx(reference.low), pytest.approx(reference.high))
    with pytest.raises(UserError, match="is not a run folder"):
        compare_runs([several["first"], several["first"].parent])


def test_the_page_of_runs_compared(several, browser, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["compare", str(several["first"].parent / "seeds"), "--out", str(out)]) == 0
    assert "plain (3 seeds)" in capsys.readouterr().out
    browser.open(out)
    browser.check()
    assert browser.headings() == ["In what they differ", "Scores", "Curves over each other", "The runs"]
    assert browser.table("in-what-they-differ")[1] == ["aggregator", "sum", "pcgrad"]
    header, plain, surgery = browser.table("scores")
    assert plain[header.index("overall")] == "0.503 ± 0.015" and surgery[-1].startswith("0.523 ± 0.021\n+0.020 [")
    assert browser.ask("document.querySelector('.subtitle').textContent").startswith("Overall: plain (3 seeds) 0.503")
    assert len(browser.table("the-runs")) == 7 and browser.table("the-runs")[0][3:] == [
        *("model", "data", "code", "date", "duration")
    ]
    *_, last = browser.table("the-runs", 1)
    assert "aggregator pcgrad" in last[2]
    bars = browser.ask("document.querySelector('#curves-over-each-other .drawing').data[0].error_y.array")
    assert bars == pytest.approx([0.0153, 0.0153], abs=1e-3)
    assert len(read_csv(tmp_path / "page.csv")) == 12
    assert main(["compare", str(several["first"])]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_runs_with_other_batch_sizes_are_drawn_over_the_examples_that_they_saw(several, tmp_path):
    paths = [shutil.copytree(several[f"plain,seed={seed}"], tmp_path / str(seed)) for seed in (0, 1)]
    other = RunFolder(paths[1])
    config = other.read_config()
    size = config.batch.batch_size
    other.write_config(config.model_copy(update={"batch": config.batch.model_copy(update={"batch_size": 3 * size})}))
    for found, step in (([several["plain,seed=0"], several["surgery,seed=0"]], 1), (paths, size)):
        drawn = _curves(compare_runs(found).groups, ["sst"])[0].figure
        assert list(drawn.data[0].x) == [5 * step, 10 * step]
        assert ("examples" in drawn.layout.xaxis.title.text) == (found is paths)
    assert list(drawn.data[1].x) == [15 * size, 30 * size]
