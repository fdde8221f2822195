"""What is shown of a run under way, and what its processes say of themselves."""

import json
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import CORPUS
from torch.utils.flop_counter import FlopCounterMode

from minbert.data.clock import clock
from minbert.launch.main import main
from minbert.trainer.config import RunConfig
from minbert.trainer.model.bert import Bert, BertConfig
from minbert.trainer.run import reporting
from minbert.trainer.run import standing as standings
from minbert.trainer.run.display import View, as_json, line, panel
from minbert.trainer.run.speed import flops_per_token, matmul_peak
from minbert.trainer.run.standing import Heartbeat, Standing, here, read_standing, read_standings

numbers = st.floats(-1e9, 1e9) | st.integers(-(10**6), 10**6) | st.none()
names = st.sampled_from(
    ["loss/sst", "dev/sst", "dev/quora", "dev/overall", "dev_loss/sst", "loss/sts", "lr", "head_lr", "conflicts"]
)
records = st.lists(
    st.fixed_dictionaries({"step": st.integers(0, 10**6)}).flatmap(
        lambda step: st.dictionaries(names, numbers).map(lambda found: step | found)
    ),
    max_size=5,
)


@given(records, st.integers(40, 200), st.booleans())
def test_a_panel_keeps_its_shape_and_its_width(found, width, ascii_only):
    view = View("run", ["sst", "quora", "sts"], 5000)
    empty = panel(view, width, ascii_only).plain.split("\n")
    view.processes = [replace(here(0, 1, 0, 5000), peak=1e11)]
    for record in found:
        view.take(record)
        shown = panel(view, width, ascii_only).plain.split("\n")
        assert len(shown) == len(empty) == 7
        assert all(part.isascii() for part in shown) or not ascii_only
    lines = panel(view, width, ascii_only).plain.split("\n")
    assert [text.split()[0] for text in lines[3:]] == ["sst", "quora", "sts", "overall"]
    json.dumps(as_json(view))
    assert "\n" not in line(view)


def test_numbers_have_their_places_from_the_beginning():
    view = View("run", ["sst", "quora"], 5000)
    before = panel(view, 80).plain.split("\n")
    view.processes = [Standing(0, 1, "n1", 1, began=100.0, first_step=0, total_steps=5000, step=1200, moved=700.0)]
    view.processes[0].written, view.processes[0].memory = 700.0, 3 << 30
    view.take(
        {"step": 1200, "loss/sst": 1.25, "lr": 2e-5, "head_lr": 1e-3, "tokens_per_second": 12345.6, "conflicts": 0.5}
    )
    view.take({"step": 1200, "dev/sst": 0.5, "dev/quora": 0.75, "dev/overall": 0.625, "dev_loss/sst": 1.5})
    after = panel(view, 80).plain.split("\n")
    assert [len(text) for text in before[:2]] == [len(text) for text in after[:2]]
    assert all(len(text) <= 80 for text in after)
    assert "step  1200/5000" in after[0] and " 24%" in after[0] and "10m00s" in after[0] and "31m40s left" in after[0]
    assert "12,346 tokens/s" in after[1] and "lr  2.0e-5" in after[1] and "conflict  50%" in after[1]
    assert after[3].split() == ["sst", "1.250", "0.500", "0.500"]
    assert after[5].split() == ["overall", "0.625", "0.625", "at", "1200"]
    told = "step   1200/5000  loss sst 1.250  dev sst 0.500 quora 0.750 overall 0.625  12346 tokens/s"
    assert line(view).startswith(told) and "left 31m40s" in line(view)
    shown = as_json(view)
    assert shown["losses"] == {"sst": 1.25} and shown["dev_losses"] == {"sst": 1.5}


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (5.9, "5s"), (184, "3m04s"), (3725, "1h02m"), (400000, "4d15h")]
)
def test_a_clock_needs_six_characters_at_most(seconds, text):
    assert clock(seconds) == text and len(text) <= 6


def test_the_share_of_the_peak_counts_what_any_implementation_multiplies():
    """Against PyTorch's own count of the encoder's matrix products."""
    shape = BertConfig(50, 16, 3, 2, 40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ids = torch.randint(1, 50, (4, 6))
    for freeze, frozen in (("none", 0), ("encoder", 3), (2, 2)):
        bert = Bert(shape).double()  # which PyTorch's own products serve
        for layer in bert.layers[:frozen]:
            layer.requires_grad_(False)
        bert.embeddings.requires_grad_(freeze == "none")
        with FlopCounterMode(display=False) as counted:
            hidden = bert.forward_padded(ids, torch.ones_like(ids))
            hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
            if freeze != "encoder":
                hidden.sum().backward()
        found = counted.get_flop_counts()["Global"]
        products = sum(count for kind, count in found.items() if str(kind) in ("aten.mm", "aten.addmm"))
        config = RunConfig(encoder={"freeze": freeze})
        wanted = flops_per_token(config, shape) * ids.numel()
        saved = 2 * 3 * 16 * 16 * ids.numel() if freeze == 2 else 0  # nobody needs the gradient of its input
        assert products == pytest.approx(wanted - saved, rel=0.02), freeze


def test_a_processor_has_a_peak():
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32) < 1e14


def test_a_heartbeat_tells_where_a_process_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(standings, "EVERY", 0.02)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-7.json").write_text("{}")  # of an earlier start with more processes
    with Heartbeat(logs, here(0, 2, 10, 20)) as heartbeat:
        heartbeat.moved(11)
        time.sleep(0.2)
        (found,) = read_standings(logs)
        assert (found.rank, found.processes, found.step, found.first_step) == (0, 2, 11, 10)
        assert found.memory > 1 << 20 and not found.ended and not found.waits
        assert found.seconds_left(20) == pytest.approx(9 * (found.moved - found.began), abs=0.3)
        assert not found.hangs() and found.age < 5
    found = read_standing(logs / "rank-0.json")
    assert found.ended and not found.hangs(0.0)
    (logs / "rank-0.json").write_text('{"rank": "x"')
    assert read_standings(logs) == []


def test_a_wait_for_others_is_named():
    """Of another thread, that stands in a collective operation under the step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from minbert.trainer.processes.messages import Messages

        store, said = torch.distributed.HashStore(), []
        messages = Messages(store, 0, 2, 30.0)
        thread = threading.Thread(target=lambda: said.append(messages.gather("topic", 1)))
        thread.start()
        time.sleep(0.3)
        activity, place, waits = standings.describe(sys._current_frames()[thread.ident])
        assert waits and place.startswith("trainer/processes/messages.py:") and activity == ""
        store.set("minbert/topic/1", "2")
        thread.join()
        assert said == [[1, 2]]
    finally:
        torch.distributed.destroy_process_group()


def test_no_step_for_long_is_a_hang():
    standing = Standing(0, 1, "n1", 1, began=0.0, first_step=0, total_steps=100, step=10, moved=100.0, written=105.0)
    standing.age = 200.0
    assert standing.still == 205.0 and not standing.hangs()
    standing.age = 296.0
    assert standing.hangs() and not standing.hangs(1000.0)
    standing.step = 4  # each step takes 25 s
    assert not standing.hangs()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_peak_is_of_the_precision_in_which_the_run_computes(precision, dtype, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reporting, "matmul_peak", lambda device, dtype: asked.append(dtype) or 1e9)
    small = f"--data {CORPUS} --train-limit 20 --eval-limit 8 --batch-size 4 --steps 3 --trackers --tasks sst"
    assert main(["train", "--run", str(tmp_path / "run"), *small.split(), "--precision", precision]) == 0
    assert asked == [dtype]
