"""Learning rates by part and step: when each part of the model joins, and at what rate it learns from there on."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.trainer.config import RunConfig
from minbert.trainer.engine.optimizer import first_steps, rates
from minbert.trainer.options import OptimizerConfig

ENCODER = ["embeddings", *(f"layer {number}" for number in range(6)), "pooler"]
HEADS = ["heads.sst", "heads.sts"]
DEPTH = {part: max(0, 6 - number) for number, part in enumerate(ENCODER)}  # below the top layer


@st.composite
def schedules(draw) -> tuple[OptimizerConfig, int, list[str]]:
    """Options, steps, and the encoder's parts that are trained at all, from the lowest up."""
    head_warmup = draw(st.floats(0, 0.9))
    config = OptimizerConfig(
        lr=draw(st.floats(1e-6, 1e-2)),
        head_lr=draw(st.floats(1e-6, 1e-2)),
        head_warmup=head_warmup,
        unfreeze=draw(st.sampled_from(["at_once", "gradual"])),
        unfreeze_share=draw(st.floats(max(head_warmup, 0.01), 0.99)),
        warmup=draw(st.sampled_from([0.0, 0.1, 0.5])),
        lr_schedule=draw(st.sampled_from(["linear", "cosine", "constant"])),
        layer_decay=draw(st.sampled_from([0.8, 0.95, 1.0])),
    )
    trained = ENCODER[draw(st.integers(0, len(ENCODER))) :]
    return config, draw(st.integers(1, 400)), trained


@given(schedules())
def test_parts_join_from_the_top_and_stay(schedule):
    config, total, encoder = schedule
    before: set[str] = set()
    for step in range(total):
        found = {part for part, rate in rates(step, total, config, encoder + HEADS).items() if rate}
        assert before | set(HEADS) <= found
        assert found - set(HEADS) == set(encoder[len(encoder) + len(HEADS) - len(found) :])  # its upper end
        before = found
    assert before == {*encoder, *HEADS}  # at the last step, all


@given(schedules())
def test_the_shares_say_when_the_highest_and_the_lowest_part_join(schedule):
    config, total, encoder = schedule
    starts = first_steps(total, config, encoder + HEADS)
    assert [starts[head] for head in HEADS] == [0, 0]
    if not encoder:
        return
    first = min(total - 1, round(config.head_warmup * total))
    assert starts[encoder[-1]] == first
    if config.unfreeze == "at_once":
        assert {starts[part] for part in encoder} == {first}
    elif len(encoder) > 1:
        assert starts[encoder[0]] == min(total - 1, round(config.unfreeze_share * total))
        gaps = [starts[lower] - starts[upper] for lower, upper in pairwise(encoder)]
        assert max(gaps) - min(gaps) <= 1


@given(schedules())
def test_a_part_warms_up_when_it_joins_and_then_learns_as_the_others_do(schedule):
    config, total, encoder = schedule
    starts, warmup = first_steps(total, config, encoder + HEADS), round(config.warmup * total)
    peaks = {part: config.head_lr if part in HEADS else config.lr for part in encoder + HEADS}
    for part in encoder:
        peaks[part] *= config.layer_decay ** DEPTH[part]
    for step in range(total):
        shares = {part: rate / peaks[part] for part, rate in rates(step, total, config, encoder + HEADS).items()}
        full = max(shares[part] for part in HEADS)  # trained from the beginning
        for part, first in starts.items():
            since = step - first + 1
            assert 0 <= shares[part] <= full * (1 + 1e-9)
            if since > warmup and step >= warmup:
                assert shares[part] == pytest.approx(full)
            elif since > 0 and step >= warmup:
                assert shares[part] == pytest.approx(full * since / warmup)


@given(st.integers(1, 300), st.sampled_from(["linear", "cosine", "constant"]))
def test_without_unfreezing_all_parts_learn_from_the_start(total, lr_schedule):
    config = OptimizerConfig(lr=1e-3, head_lr=1e-3, lr_schedule=lr_schedule)
    for step in range(total):
        (rate,) = set(rates(step, total, config, ENCODER + HEADS).values())
        assert rate > 0


def test_rates_fall_from_the_top_layer_down_and_heads_stand_apart():
    config = OptimizerConfig(lr=1.0, head_lr=3.0, layer_decay=0.5, warmup=0.0, lr_schedule="constant")
    found = rates(0, 10, config, ENCODER + HEADS)
    assert list(found.values()) == [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 1.0, 3.0, 3.0]
    assert rates(0, 10, config, ENCODER[3:] + HEADS) == {part: found[part] for part in ENCODER[3:] + HEADS}  # frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_warmup": 0.6, "unfreeze": "gradual"}, "head_warmup=0.6 ends after the unfreezing would"),
        ({"unfreeze": "gradual", "freeze": "encoder"}, "freeze=encoder trains the heads alone to the end"),
        ({"head_warmup": 0.1, "freeze": "encoder"}, "freeze=encoder trains the heads alone to the end"),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    encoder = {name: options.pop(name) for name in ("freeze",) if name in options}
    with pytest.raises(ValueError, match=message):
        RunConfig(optimizer=options, encoder=encoder)
