"""The best trials of a search once more with other seeds: which runs, what they say, and which trial is the best."""

import json
from pathlib import Path

import pytest

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.tuning.again import candidates, runs_again, runs_in_all, verdict, winner
from minbert.tuning.search import Search
from minbert.tuning.space import check_space, parse_space
from minbert.tuning.trial import Trial

SPACE = check_space(parse_space(["lr=loguniform(1e-5,1e-2)"]))


@pytest.fixture
def search(tmp_path) -> Search:
    """Of five trials, whose scores are 0.50 to 0.54; the runs of the best two with two other seeds are to come."""
    found = Search(samples=5, space=SPACE, again=2, seeds=(1, 2))
    found.write(tmp_path)
    for number in range(5):
        trial = found.new_trial(tmp_path, number, {"lr": 1e-4 * (number + 1)})
        trial.status, trial.score, trial.step = "finished", 0.5 + 0.01 * number, 10
        trial.write()
    return found


def finish(runs: list[Trial], scores: list[float | None]) -> list[Trial]:
    for run, score in zip(runs, scores, strict=True):
        run.status, run.score = ("failed", None) if score is None else ("finished", score)
        run.write()
    return runs


def test_the_best_are_trained_with_every_seed_when_all_trials_are_over(search, tmp_path):
    trials = search.trials(tmp_path)
    runs = runs_again(search, tmp_path, trials)
    assert [run.name for run in runs] == [f"trial-000{n},seed={s}" for s in (1, 2) for n in (4, 3)]
    assert [run.folder for run in runs[:1]] == [tmp_path / "again" / "trial-0004" / "seed-1"]
    assert runs[0].parameters == trials[4].parameters and runs_in_all(search, tmp_path) == 9
    finish(runs, [0.1, 0.2, 0.3, 0.4])
    assert [run.score for run in runs_again(search, tmp_path, trials)] == [0.1, 0.2, 0.3, 0.4]
    trials[0].status = "pending"
    assert len(runs_again(search, tmp_path, trials)) == 4  # those that are there stay
    more = search.model_copy(update={"samples": 6})
    assert all(run.over for run in runs_again(more, tmp_path, trials)) and runs_in_all(more, tmp_path) == 10


def test_trials_without_a_score_are_not_counted_as_ones_to_come_again(search, tmp_path):
    for trial in search.trials(tmp_path)[1:]:
        trial.status, trial.score = "failed", None
        trial.write()
    assert runs_in_all(search, tmp_path) == 5 + 2
    assert runs_in_all(search.model_copy(update={"samples": 6}), tmp_path) == 6 + 4


def test_a_better_trial_that_came_later_is_trained_again_beside_those_of_before(search, tmp_path):
    trials = search.trials(tmp_path)
    finish(runs_again(search, tmp_path, trials), [0.53, 0.52, 0.53, 0.52])
    trials[0].score = 0.9
    runs = runs_again(search, tmp_path, trials)
    assert [run.name for run in runs if not run.over] == ["trial-0000,seed=1", "trial-0000,seed=2"]
    assert len(runs) == 6 and [run.number for run in runs] == list(range(6))


def test_the_mean_over_the_seeds_says_which_is_the_best_and_by_how_much_the_search_flatters(search, tmp_path):
    trials = search.trials(tmp_path)
    assert winner(search, trials, ())[0].name == "trial-0004"
    runs = finish(runs_again(search, tmp_path, trials), [0.51, 0.53, 0.50, 0.52])
    found = candidates(trials, runs)
    assert [each.trial.name for each in found] == ["trial-0003", "trial-0004"]
    assert found[0].flattery == pytest.approx(0.53 - 0.525) and found[1].flattery == pytest.approx(0.54 - 0.505)
    said = verdict(found)
    assert "trial-0004 is the best of the search with 0.540; over 2 other seeds it has 0.505 ± 0.007" in said
    assert "flatters it by 0.035" in said and "trial-0003 is better: 0.525 ± 0.007, +0.020 [" in said
    chosen, known = winner(search, trials, runs)
    assert chosen.name == "trial-0003" and "dev/overall 0.525 ± 0.007 (0.5300 in the search)" in known
    runs[0].status = "pending"
    assert winner(search, trials, runs)[0].name == "trial-0004"  # as long as it is not known for all


def test_one_that_failed_with_a_seed_is_not_the_best(search, tmp_path):
    trials = search.trials(tmp_path)
    runs = finish(runs_again(search, tmp_path, trials), [0.50, 0.60, 0.50, None])
    assert [each.trial.name for each in candidates(trials, runs)] == ["trial-0004", "trial-0003"]
    assert winner(search, trials, runs)[0].name == "trial-0004"


def test_the_seeds_are_others_than_the_searchs(search):
    with pytest.raises(UserError, match="flatters them"):
        search.model_copy(update={"seed": 2}).check()


def test_the_page_says_it(search, tmp_path, capsys):
    trials = search.trials(tmp_path)
    for trial in (*trials, *finish(runs_again(search, tmp_path, trials), [0.51, 0.53, 0.50, 0.52])):
        trial.steps = trial.step = 10
        trial.write()
        line = json.dumps({"step": 10, "dev/overall": trial.score}) + "\n"
        (Path(trial.folder) / "metrics.jsonl").write_text(line)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "The best again, with other seeds" in page and "The search flatters it by 0.035" in page
    assert "starts the full run from trial-0003" in page
