"""Which options matter, and the scores that say so."""

import numpy as np
from searches import write_curve

from minbert.tuning.report.importance import importances, scores_at_equal_share
from minbert.tuning.space import check_space, draw, parse_space
from minbert.tuning.trial import Trial


def test_importance_finds_the_option_that_matters_and_says_when_nothing_does():
    space = check_space(parse_space(["lr=loguniform(1e-5,1e-3)", "hidden_layers=1,2,3", "aggregator=sum,pcgrad"]), {})
    drawn = [draw(space, 1, number) for number in range(40)]
    scores = np.array([0.6 if p["aggregator"] == "pcgrad" else 0.5 for p in drawn])
    found = importances(space, drawn, scores)
    assert found.options[0].option == "aggregator"
    assert found.options[0].mean > 1  # shuffling doubles the variance at least
    assert found.explained > 0.95
    assert all(abs(option.mean) < 0.05 for option in found.options[1:])
    noise = np.random.default_rng(0).random(40)
    assert importances(space, drawn, noise).explained < 0.2
    assert importances(space, drawn[:7], scores[:7]) is None
    assert importances(space, drawn, np.ones(40)) is None


def test_scores_are_compared_where_every_trial_has_been(tmp_path):
    trials = [Trial(tmp_path / str(n), str(n), n, {}) for n in range(3)]
    write_curve(trials[0], [0.1, 0.5, 0.9, 0.8], 40)
    write_curve(trials[1], [0.3, 0.2], 40)
    write_curve(trials[2], [0.4, 0.6, 0.2], 400)
    share, scores = scores_at_equal_share(trials)
    assert share == 0.5
    assert scores.tolist() == [0.5, 0.3, 0.6]
