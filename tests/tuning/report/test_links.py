"""Links between the pages of searches and ablations and those of their runs."""

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from minbert.launch.main import main
from minbert.tuning.ablation import Ablation
from minbert.tuning.search import Search
from minbert.tuning.space import check_space, parse_space
from minbert.tuning.trial import Trial

pytestmark = pytest.mark.xdist_group("report")


def trained_as(run: Path, trial: Trial) -> None:
    """The trial has trained, and is what the run is."""
    shutil.copytree(run, trial.folder, ignore=shutil.ignore_patterns("checkpoints", "report.*"))
    trial.status, trial.steps, trial.step, trial.score = "finished", 12, 12, 0.5
    trial.write()


@pytest.mark.parametrize("first", ["search", "trial"])
def test_a_trial_and_its_search_lead_to_each_other_whichever_page_is_written_first(first, run, browser, tmp_path):
    wanted = Search(samples=1, space=check_space(parse_space(["aggregator=sum,pcgrad"]), {}), base={})
    folder = tmp_path / "written" / "a search, 100% #1"
    wanted.write(folder)
    trial = wanted.new_trial(folder, 0, {"aggregator": "pcgrad"})
    trained_as(run, trial)
    again = Trial(folder / "again" / trial.name / "seed-1", "x", 0, trial.parameters, variant=trial.name, seed=1)
    trained_as(run, again)
    if first == "search":
        assert main(["report", str(folder)]) == 0
    for each in (trial, again):
        assert main(["report", str(each.folder)]) == 0
    moved = tmp_path / "moved"
    (tmp_path / "written").rename(moved)
    below = "trials/trial-0000", "again/trial-0000/seed-1"
    cells = "#all-trials tbody a", "#the-best-again-with-other-seeds tbody a"
    for place, cell in zip(below, cells):
        browser.open(moved / folder.name / place / "report.html")
        for selector, leads_to in ((".above a", folder.name), (cell, Path(place).name)):
            browser.ask(f"document.querySelector('{selector}').click()")
            browser.wait("document.documentElement.dataset.drawn")
            assert Path(unquote(urlsplit(browser.driver.current_url).path)).parent.name == leads_to
    browser.check()


def test_a_page_elsewhere_leads_to_where_the_others_are(run, tmp_path, capsys):
    folder = tmp_path / "a"
    ablation = Ablation(
        baseline={}, extensions={}, variants={"baseline": {}}, groups={"alone": ["baseline"]}, seeds=[0]
    )
    ablation.write(folder)
    (trial,) = ablation.trials(folder)
    words = ["report", str(trial.folder), "--out", str(tmp_path / "out" / "own.html")]
    trained_as(run, trial)
    (tmp_path / "out").mkdir()
    assert main(words) == 0 and 'class="above"' not in (tmp_path / "out" / "own.html").read_text()
    assert not (folder / "report.html").exists()  # nothing there leads to a page elsewhere
    assert main(["report", str(trial.folder)]) == 0 and main(words) == 0
    assert 'class="above"><a href="../a/report.html">Ablation a</a>' in (tmp_path / "out" / "own.html").read_text()
    assert main(["report", str(folder), "--out", str(tmp_path / "out" / "all.html")]) == 0
    assert '<a href="../a/runs/baseline/seed-0/report.html">baseline</a>' in (tmp_path / "out" / "all.html").read_text()
    trial.status, trial.score = "failed", None
    trial.write()
    (folder / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(trial.folder)]) == 0
    assert f"The page of {folder} is not written: no run" in capsys.readouterr().out
    assert 'class="above"' not in (trial.folder / "report.html").read_text()
