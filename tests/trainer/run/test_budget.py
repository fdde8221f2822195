"""How far a run goes: properties that hold for every budget, over whatever scores the evaluations give."""

from copy import deepcopy
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from minbert.trainer.checkpoint.format import TrainingState
from minbert.trainer.options import BudgetConfig
from minbert.trainer.run.budget import Budget

scores = st.lists(st.floats(0, 1), min_size=1, max_size=60)


@st.composite
def budgets(draw) -> Budget:
    epochs = draw(st.floats(0.1, 5))
    extend_to = draw(st.none() | st.floats(epochs, 20))
    given = {"epochs": epochs, "extend_to": extend_to}
    if extend_to is None:
        given["steps"] = draw(st.none() | st.integers(1, 60))
    given[draw(st.sampled_from(["eval_every", "evaluations"]))] = draw(st.none() | st.integers(1, 12))
    given |= {"patience": draw(st.none() | st.integers(1, 4)), "save_every": draw(st.none() | st.integers(1, 12))}
    return Budget(BudgetConfig(**given), draw(st.integers(1, 12)))


def walk(budget: Budget, scores: list[float], state: TrainingState | None = None) -> list[TrainingState]:
    """The states of a run whose evaluations give these scores in turn, again and again, as the loop has them."""
    state = state or TrainingState(epochs=budget.config.passes)
    states = []
    while True:
        if budget.evaluation_is_due(state):
            budget.enter_score(state, scores[state.step % len(scores)])
        states.append(deepcopy(state))
        if budget.is_spent(state):
            return states
        state.step += 1


@given(budgets(), scores)
def test_a_run_ends_evaluated_at_the_end_of_its_budget_or_of_its_patience(budget, scores):
    *before, last = walk(budget, scores)
    assert not any(map(budget.is_spent, before))
    assert last.evaluated_at == last.step and budget.checkpoint_is_due(last)
    assert last.step == budget.total_steps(last) or last.stale_evaluations == budget.config.patience
    assert budget.planned_steps <= budget.total_steps(last)
    assert f"{last.step} of {budget.total_steps(last)} steps" in budget.ending(last)


@given(budgets(), scores)
def test_the_best_score_is_the_first_of_the_highest(budget, scores):
    states = walk(budget, scores)
    evaluated = [state.step for state in states if state.step and state.evaluated_at == state.step]
    found = {step: scores[step % len(scores)] for step in evaluated}
    best = max(found, key=lambda step: (found[step], -step))
    assert (states[-1].best_step, states[-1].best_score) == (best, found[best])
    assert states[-1].stale_evaluations == sum(step > best for step in evaluated)
    assert all(step % budget.eval_every == 0 for step in evaluated[:-1] if budget.config.extend_to is None)


@given(budgets(), scores)
def test_only_a_best_score_at_the_end_extends_the_budget_and_never_beyond_its_limit(budget, scores):
    states = walk(budget, scores)
    for before, after in pairwise(states):
        if after.epochs != before.epochs:
            assert after.step == after.best_step == budget.total_steps(before)
            assert before.epochs < after.epochs <= budget.config.extend_to


@given(budgets(), scores, st.data())
def test_a_run_that_goes_on_from_any_state_ends_as_if_it_had_not_stopped(budget, scores, data):
    states = walk(budget, scores)
    between = data.draw(st.integers(0, len(states) - 1))
    again = walk(budget, scores, deepcopy(states[between]))
    assert again[-1] == states[-1]


@given(budgets(), st.integers(1, 60))
def test_checkpoints_fall_where_they_were_asked_for(budget, step):
    state = TrainingState(step=step, epochs=1e6)  # in the middle of a long run
    every = budget.config.save_every or budget.eval_every
    if not budget.is_spent(state):
        assert budget.checkpoint_is_due(state) == (step % every == 0)
