"""The batch plan: pure, complete, and the same whatever the number of processes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data.batches.plan import BatchPlan, _order, share

SCHEDULES = ["all", "round_robin", "proportional", "square_root", "annealed"]
plans = st.builds(
    BatchPlan,
    sizes=st.dictionaries(st.sampled_from(["sst", "quora", "sts"]), st.integers(1, 50), min_size=1),
    batch_size=st.integers(1, 12),
    schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 2**32),
    anneal_steps=st.integers(1, 100),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(plans, st.integers(0, 3000))
def test_rows_are_a_function_of_seed_step_and_task(plan, step):
    twin = replace(plan, sizes=dict(plan.sizes))
    for task in plan.tasks(step):
        rows = plan.rows(task, step)
        assert rows.shape == (plan.batch_sizes[task],)
        assert ((rows >= 0) & (rows < plan.sizes[task])).all()
        assert (rows == twin.rows(task, step)).all()


@given(plans)
def test_positions_count_what_earlier_steps_consumed(plan):
    consumed = Counter()
    for step in range(60):
        for task in plan.sizes:
            assert plan.position(task, step) == consumed[task]
        for task in plan.tasks(step):
            consumed[task] += plan.batch_sizes[task]


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**7), min_size=1), st.integers(1, 64), st.floats(0, 1)
)
def test_batches_share_out_the_examples_of_a_step_by_size(sizes, batch_size, power):
    found = BatchPlan(sizes, batch_size, power=power).batch_sizes
    total = batch_size * len(sizes)
    assert sum(found.values()) == total and min(found.values()) >= 1
    assert set(BatchPlan(sizes, batch_size).batch_sizes.values()) == {batch_size}
    weight = {task: size**power for task, size in sizes.items()}
    wanted = {task: total * weight[task] / sum(weight.values()) for task in sizes}
    raised = sum(1 - share for share in wanted.values() if share < 1)  # what those with less than one example took
    assert all(found[task] <= max(1, share + 1) and found[task] >= share - 1 - raised for task, share in wanted.items())


def test_batches_of_these_tasks():
    sizes = {"sst": 8544, "quora": 141506, "sts": 6041}
    assert BatchPlan(sizes, 32, power=0.5).batch_sizes == {"sst": 16, "quora": 66, "sts": 14}
    assert BatchPlan(sizes, 32, power=1.0).batch_sizes == {"sst": 5, "quora": 87, "sts": 4}
    assert BatchPlan(sizes, 32, power=1.0).steps_per_epoch == BatchPlan(sizes, 32).steps_per_epoch


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_positions_hold_across_blocks_of_draws(schedule):
    plan = BatchPlan({"a": 100, "b": 300, "c": 20}, 4, schedule, seed=3, anneal_steps=2000)
    counts = Counter(task for step in range(2500) for task in plan.tasks(step))
    assert {task: plan.position(task, 2500) for task in plan.sizes} == {task: 4 * counts[task] for task in plan.sizes}


@given(plans)
def test_every_row_is_visited_once_per_epoch_of_its_task(plan):
    for task, size in plan.sizes.items():
        visits = [plan.rows(task, step) for step in range(120) if task in plan.tasks(step)]
        order = np.concatenate(visits) if visits else np.zeros(0, int)
        for epoch in range(len(order) // size):
            assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(plans)
def test_no_row_is_twice_in_a_batch_unless_there_are_too_few(plan):
    for task, size in plan.sizes.items():
        for step in range(120):
            if task in plan.tasks(step):
                rows = plan.rows(task, step)
                batch_size = plan.batch_sizes[task]
                assert len(set(rows)) == batch_size or size < batch_size


@pytest.mark.parametrize("size", [13, 23, 25, 64, 1000])
def test_rows_do_not_depend_on_what_was_asked_before(size):
    """Orders of small tasks follow from each other: a resumed run finds the same."""
    expected = [BatchPlan({"a": size}, 12).rows("a", step).tolist() for step in range(200)]
    for step in (199, 150, 31, 3, 0):
        _order.cache_clear()
        assert BatchPlan({"a": size}, 12).rows("a", step).tolist() == expected[step]


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_a_partition_into_almost_equal_parts(count, parts):
    rows = np.arange(count)
    shares = [share(rows, part, parts) for part in range(parts)]
    assert (np.concatenate(shares) == rows).all()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_drawn_schedules_follow_their_probabilities():
    sizes, steps = {"a": 10_000, "b": 2_500, "c": 400}, 20_000

    def frequencies(schedule, first, last):
        plan = BatchPlan(sizes, 1, schedule, seed=1, anneal_steps=steps)
        counts = Counter(plan.tasks(step)[0] for step in range(first, last))
        return np.array([counts[task] / (last - first) for task in sizes])

    def expected(exponent):
        powers = np.array(list(sizes.values()), float) ** exponent
        return powers / powers.sum()

    assert np.allclose(frequencies("proportional", 0, steps), expected(1.0), atol=0.015)
    assert np.allclose(frequencies("square_root", 0, steps), expected(0.5), atol=0.015)
    assert np.allclose(frequencies("annealed", 0, 1000), expected(0.98), atol=0.04)
    assert np.allclose(frequencies("annealed", steps - 1000, steps), expected(0.22), atol=0.05)


def test_different_seeds_and_epochs_give_different_orders():
    plan = BatchPlan({"a": 1000}, 500)
    first, second, third = (plan.rows("a", step) for step in range(3))
    assert not (first == third).all() and set(first) != set(third)
    assert not (first == BatchPlan({"a": 1000}, 500, seed=1).rows("a", 0)).all()
    assert not set(first) & set(second)
