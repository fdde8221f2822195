"""Search spaces: what words and files say of them, what is drawn from them, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig, parse_config
from minbert.tuning.search import NextTrial, Search
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


def next_trials(search: Search, folder: Path, count: int, known: list[Trial]) -> list[dict]:
    make = NextTrial(search, folder, known)
    return [trial.parameters for trial in (make() for _ in range(count)) if trial is not None]


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
