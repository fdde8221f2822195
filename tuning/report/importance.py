"""How much each hyperparameter mattered in a search: a random forest that predicts the score, and what it loses
without one of them.

Scores of trials that were stopped early are of less training than the others', so all are compared at the share of the
budget that every trial has reached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minbert.tuning.space import Choice, Distribution, Parameters
from minbert.tuning.trial import METRIC, Trial

FEWEST = 8  # trials from which anything can be learnt
FOLDS, REPEATS, TREES = 4, 5, 100


@dataclass(frozen=True)
class Importance:
    """`mean` and `deviation` (over the repeats) of the rise in squared error, as a share of the scores' variance, on
    trials that the forest has not seen, when the option's values are shuffled among them. About 0: no effect seen."""

    option: str
    mean: float
    deviation: float


@dataclass(frozen=True)
class Importances:
    """The options, the most important first, and `explained`: the share of the variance of the scores that the forest
    predicts for trials that it has not seen (R²). Where that is near or below 0, the importances mean nothing."""

    options: list[Importance]
    explained: float


def scores_at_equal_share(trials: Sequence[Trial]) -> tuple[float, np.ndarray]:
    """The share of the budget that all `trials` have reached, and each one's best score (n,) until then; of a trial
    that was first evaluated later, its first score. Every trial has an evaluation; of no trials the share is 0."""
    curves = [[(record["step"] / trial.steps, record[METRIC]) for record in trial.earned()] for trial in trials]
    share = min((curve[-1][0] for curve in curves), default=0.0)
    return share, np.array([max(score for at, score in curve if at <= max(share, curve[0][0])) for curve in curves])


def importances(
    space: Mapping[str, Distribution], parameters: Sequence[Parameters], scores: np.ndarray, seed: int = 0
) -> Importances | None:
    """Permutation importance (Breiman 2001) with repeated cross-validation; None for fewer than eight trials, or
    scores that do not differ."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    if len(scores) < FEWEST or scores.std() == 0:
        return None
    table = np.array([[_encode(kind, row[name]) for name, kind in space.items()] for row in parameters])
    losses, errors = np.zeros((REPEATS, len(space))), np.zeros(REPEATS)
    for repeat in range(REPEATS):
        for known, unseen in KFold(FOLDS, shuffle=True, random_state=seed + repeat).split(table):
            forest = RandomForestRegressor(TREES, random_state=seed + repeat).fit(table[known], scores[known])
            errors[repeat] += ((forest.predict(table[unseen]) - scores[unseen]) ** 2).sum()
            found = permutation_importance(
                forest, table[unseen], scores[unseen], scoring="neg_mean_squared_error", random_state=seed + repeat
            )
            losses[repeat] += found.importances_mean * len(unseen)
    spread = scores.var() * len(scores)
    losses, explained = losses / spread, 1 - errors / spread
    ranked = sorted(zip(space, losses.mean(0), losses.std(0, ddof=1)), key=lambda found: -found[1])
    return Importances([Importance(name, float(m), float(d)) for name, m, d in ranked], float(explained.mean()))


def _encode(kind: Distribution, value: object) -> float:
    """Numbers as they are (to a tree their scale does not matter), other choices by their place in the list."""
    return float(kind.values.index(value)) if isinstance(kind, Choice) else float(value)
