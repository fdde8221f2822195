"""Search spaces: what words and files say of them, what is drawn from them, and what is refused."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.proposals import TpeProposals
from minbert.tuning.search import Earlier, NextTrial, Search
from minbert.tuning.space import (
    Choice,
    check_space,
    combination,
    draw,
    fingerprint,
    grid_size,
    paper_space,
    parse_space,
    read_space,
    refuse_ranges,
)
from minbert.tuning.strategy import SearchStrategy
from minbert.tuning.trial import Trial


def test_words_and_files_say_the_same():
    words = parse_space(["lr=loguniform(1e-5,1e-4)", "--batch-size=16,32", "head_dropout=uniform(0,0.3)"])
    file = read_space(
        {
            "lr": "loguniform(1e-5, 1e-4)",
            "batch_size": [16, 32],
            "head_dropout": {"kind": "uniform", "low": 0, "high": 0.3},
        },
        "file",
    )
    assert words == file
    assert check_space(words, {})["batch_size"] == Choice(values=(16, 32))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dropot=uniform(0,0.3)"], "no option dropot; did you mean head_dropout"),
        (["lr=uniform(1e-4,1e-5)"], "is not below"),
        (["lr=loguniform(0,1)"], "above zero"),
        (["lr=normal(0,1)"], "none of uniform"),
        (["batch_size=16,many"], "batch_size"),
        (["batch_size=uniform(8,32)"], "whole number"),
        (["batch_size=8,8"], "twice"),
        (["aggregator=sum,pcgard"], "did you mean 'pcgrad'"),
        (["head_dropout=uniform(0,1.5)"], "head_dropout"),
        (["features=int(0,1)"], "features"),
        (["run=a,b"], "cannot be searched"),
        (["lr"], "OPTION=VALUES"),
        (["lr=1e-3", "lr=1e-4"], "names lr twice"),
        (["lr=1e-3,inf"], "lr must be finite, not inf"),
        (["weight_decay=0.1,.nan"], "weight_decay must be finite, not nan"),
        (["lr=loguniform(1e-5,inf)"], "lr must be finite, not inf"),
        (["device=cpu,cuda"], "cannot be searched"),
    ],
)
def test_impossible_spaces_are_refused_before_a_trial(words, message):
    with pytest.raises(UserError, match=message):
        check_space(parse_space(words), {})


def test_an_impossible_combination_is_refused_before_a_trial():
    space = check_space(parse_space(["aggregator=sum,pcgrad", "task_schedule=all,round_robin"]), {})
    with pytest.raises(UserError, match="needs task_schedule=all"):
        Search(samples=20, space=space).check()


@given(seed=st.integers(0, 2**31), number=st.integers(0, 10_000))
def test_draws_are_a_function_of_seed_and_number_and_within_the_space(seed, number):
    space = paper_space(RunConfig())
    drawn = draw(space, seed, number)
    assert drawn == draw(space, seed, number)
    assert drawn["lr"] == draw({"lr": space["lr"]}, seed, number)["lr"]  # whatever else is searched
    for name, kind in space.items():
        low_or_values = kind.extremes()
        inside = drawn[name] in low_or_values if isinstance(kind, Choice) else kind.low <= drawn[name] <= kind.high
        assert inside, (name, drawn[name])
    parse_config(drawn, "drawn")


def test_draws_fill_the_space():
    space = check_space(parse_space(["lr=loguniform(1e-5,1e-3)", "hidden_layers=int(1,3)", "batch_size=8,16"]), {})
    drawn = [draw(space, 0, number) for number in range(600)]
    assert 0.42 < sum(parameters["lr"] < 1e-4 for parameters in drawn) / 600 < 0.58
    for name, count in (("hidden_layers", 3), ("batch_size", 2)):
        shares = Counter(parameters[name] for parameters in drawn)
        assert len(shares) == count
        assert min(shares.values()) > 0.8 * 600 / count


def test_a_grid_has_every_combination_and_no_ranges():
    space = check_space(parse_space(["hidden_layers=1,2", "features=baseline,siamese", "batch_size=8"]), {})
    drawn = [combination(space, number) for number in range(grid_size(space))]
    assert len({fingerprint(parameters) for parameters in drawn}) == 4
    with pytest.raises(UserError, match="lr has a range"):
        refuse_ranges(parse_space(["lr=uniform(0.1,0.2)"]))


def begin(search: Search, folder: Path, count: int, known: list[Trial] | None = None) -> list[Trial]:
    """At most `count` further trials."""
    make = NextTrial(search, folder, known or [])
    return [trial for trial in (make() for _ in range(count)) if trial is not None]


def next_trials(search: Search, folder: Path, count: int, known: list[Trial]) -> list[dict]:
    return [trial.parameters for trial in begin(search, folder, count, known)]


def test_a_random_search_draws_nothing_twice_and_ends_with_the_combinations(tmp_path):
    space = check_space(parse_space(["batch_size=8,16", "hidden_layers=int(1,3)", "features=baseline,siamese"]))
    search = Search(samples=100, space=space).limited()
    assert search.samples == 12
    drawn = next_trials(search, tmp_path, 100, [])
    assert len({fingerprint(parameters) for parameters in drawn}) == len(drawn) == 12
    # The same after another start, whatever was there; and what a population changed stands for what it began with.
    there = [search.new_trial(tmp_path, number, drawn[number]) for number in range(5)]
    there[2].taken_over, there[2].parameters = [{"left": {"parameters": drawn[2]}}], drawn[7]
    assert next_trials(search, tmp_path, 100, there) == drawn[5:]
    assert Search(samples=100, space=space, scheduler="pbt").limited().samples == 100
    assert len(next_trials(Search(samples=20, space=space, scheduler="pbt"), tmp_path, 100, [])) == 20
    endless = check_space(parse_space(["lr=uniform(0.1,0.2)", "batch_size=8,16"]))
    assert Search(samples=10**9, space=endless).limited().samples == 10**9
    assert not list(tmp_path.iterdir())  # a trial has a folder when its turn comes


# Another space


def space_of(*words: str):
    return check_space(parse_space(words))


def going_on(search: Search, trials: list[Trial], samples: int, *words: str) -> Search:
    space = space_of(*words)
    earlier = search.going_on_in(space, len(trials))
    return search.model_copy(update={"space": space, "earlier": earlier, "samples": samples}).limited(trials)


@pytest.mark.parametrize(
    ("words", "inside"),
    [
        (["lr=loguniform(1e-6,1e-1)", "batch_size=8,16"], ["lr", "batch_size"]),  # wider: all
        (["lr=loguniform(1e-4,1e-3)", "batch_size=8,16"], None),  # narrower: some
        (["lr=loguniform(1e-5,1e-3)", "batch_size=8,16", "clip=uniform(0.5,2)"], ["lr", "batch_size", "clip"]),
        (["lr=loguniform(1e-5,1e-3)", "batch_size=8,16", "clip=uniform(2,3)"], []),  # of which 1 is the default
        (["lr=loguniform(1e-5,1e-3)", "batch_size=8,16", "max_length=32,64"], ["lr", "batch_size", "max_length"]),
        (["lr=loguniform(1e-5,1e-3)"], []),  # batches are of 32 now
        (["lr=loguniform(1e-5,1e-3)", "batch_size=8,32"], None),
    ],
)
def test_a_search_goes_on_in_another_space_and_keeps_what_lies_in_it(tmp_path, words, inside):
    search = Search(samples=10, space=space_of("lr=loguniform(1e-5,1e-3)", "batch_size=8,16"), base={"max_length": 64})
    trials = begin(search, tmp_path, 10)
    later = going_on(search, trials, 20, *words)
    assert [later.space_of(number) for number in (0, 9, 10, 19)] == [0, 0, 1, 1] and later.first == 10
    points = [later.point(trial.number, trial.parameters) for trial in trials]
    for trial, point in zip(trials, points):
        values = trial.parameters | {"clip": 1.0, "max_length": 64}
        if inside is None:
            assert (point is not None) == all(kind.holds(trial.parameters[n]) for n, kind in later.space.items())
        else:
            assert point == ({name: values[name] for name in inside} or None)
    assert inside is not None or 0 < sum(point is not None for point in points) < 10
    drawn = next_trials(later, tmp_path, 100, trials)
    assert len(drawn) == 10 and drawn == [draw(later.space, 0, number) for number in range(10, 20)]
    assert drawn[5:] == next_trials(later, tmp_path, 100, [*trials, *begin(later, tmp_path, 5, trials)])
    later.write(tmp_path / "s")
    assert Search.read(tmp_path / "s") == later


@pytest.mark.parametrize(
    ("base", "before", "word", "point"),
    [
        ({}, {"lr": 1e-3}, "hidden_size=64,128", {"hidden_size": 128}),  # the encoder's width
        ({}, {"lr": 1e-3}, "hidden_size=int(100,200)", {"hidden_size": 128}),
        ({}, {"lr": 1e-3}, "hidden_size=64,256", None),
        ({}, {"hidden_size": None}, "hidden_size=64,128", {"hidden_size": 128}),
        ({}, {"lr": 1e-3}, "hidden_size=None,64", {"hidden_size": None}),
        ({}, {"hidden_size": 128}, "lr=1e-3,1e-4", {"lr": 1e-3}),  # as is left open now
        ({}, {"hidden_size": 64}, "lr=1e-3,1e-4", None),
        ({}, {"lr": 1e-3}, "encoder_dropout=0.0,0.1", {"encoder_dropout": 0.1}),
        ({"model": "minilm"}, {"lr": 5e-5}, "hidden_size=128,384", {"hidden_size": 384}),
        ({"model": "nobody/nothing"}, {"lr": 5e-5}, "hidden_size=128,384", None),  # and nobody is asked
        ({}, {"tasks": ["sst", "quora", "sts"]}, "lr=1e-3,1e-4", {"lr": 1e-3}),
    ],
)
def test_an_option_left_open_is_the_same_as_one_with_the_value_that_its_run_has(base, before, word, point):
    earlier = Earlier(trials=1, space={name: Choice(values=(value,)) for name, value in before.items()})
    search = Search(samples=2, space=space_of(word), earlier=(earlier,), base=base)
    assert search.point(0, before) == point


def test_a_grid_and_a_space_with_an_end_go_on_with_the_combinations_that_are_new(tmp_path):
    grid = Search(samples=1, algorithm="grid", space=space_of("batch_size=8,16", "hidden_layers=1,2")).limited()
    trials = begin(grid, tmp_path, 4)
    later = going_on(grid, trials, 4, "batch_size=8,32,16", "hidden_layers=1,2,3")
    assert later.samples == 4 + 5
    drawn = next_trials(later, tmp_path, 100, trials)
    assert len({fingerprint(each) for each in [*drawn, *(trial.parameters for trial in trials)]}) == 9
    assert drawn[3:] == next_trials(later, tmp_path, 100, [*trials, *begin(later, tmp_path, 3, trials)])
    assert later.limited([*trials, *begin(later, tmp_path, 3, trials)]).samples == 9
    assert going_on(grid, trials, 4, "batch_size=8,16", "hidden_layers=2").samples == 4  # nothing is left
    random = Search(samples=3, space=grid.space)
    assert going_on(random, begin(random, tmp_path, 3), 50, "batch_size=8,16,32", "hidden_layers=1,2").samples == 6


def test_where_a_search_cannot_go_on(tmp_path):
    space = space_of("lr=1e-3,1e-4")
    search = Search(samples=2, space=space)
    wider = going_on(search, begin(search, tmp_path, 2), 4, "lr=1e-3,1e-4,1e-5")
    with pytest.raises(UserError, match=r"has left this space .* Leave --space out"):
        wider.going_on_in(space, 3)
    assert wider.going_on_in(space, 2) == ()  # as if it had never left
    assert search.going_on_in(wider.space, 0) == ()
    with pytest.raises(UserError, match="a population does not go on"):
        Search(samples=2, space=space, scheduler="pbt").going_on_in(wider.space, 1)


def test_tpe_and_asha_learn_from_the_points_of_the_space(tmp_path):
    pytest.importorskip("optuna")
    search = Search(samples=4, algorithm="tpe", space=space_of("lr=loguniform(1e-5,1e-2)"))
    trials = [search.new_trial(tmp_path, number, {"lr": 10.0 ** -(number + 2)}) for number in range(4)]
    for trial in trials:
        trial.status, trial.score, trial.step, trial.steps = "finished", 0.1 * trial.number, 10, 10
        trial.write()
        RunFolder(trial.folder).append_metrics({"step": 10, "dev/overall": trial.score})
    later = going_on(search, trials, 8, "lr=loguniform(5e-5,5e-3)", "clip=0.5,1.0")
    study = TpeProposals(later, trials, [], lambda trial: trial.parameters, partial(later.new_trial, tmp_path)).study
    assert [trial.params for trial in study.trials] == [{"lr": 1e-3, "clip": 1}, {"lr": 1e-4, "clip": 1}]
    asha = SearchStrategy(tmp_path, later, trials).scheduler(None)
    assert {name for bracket in asha._brackets for _, rung in bracket._rungs for name in rung} == {
        "trial-0001",
        "trial-0002",
    }
