"""Kills at random moments and damage at random places: a short form of `benchmarks/chaos.py`."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_damage import DAMAGE, MISSED, damage_and_look
from chaos_kills import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import CORPUS

from minbert.trainer.checkpoint.format import published

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.fixture(scope="module")
def chaos(tmp_path_factory) -> Path:
    """Runs of two processes, killed in every way."""
    out = tmp_path_factory.mktemp("chaos") / "out"
    command = [sys.executable, BENCHMARK, "--out", out, "--kills", 8, "--damages", 0]
    command += ["--steps", 24, "--save-every", 3, "--eval-every", 8, "--data", CORPUS]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_killed_runs_end_as_if_nothing_had_happened(chaos):
    result = json.loads((chaos / "results.json").read_text())
    assert {one["kind"] for one in result["kills"] + result["disturbances"]} == KINDS.keys()
    assert result["violations"] == []


@settings(max_examples=150)
@given(file=st.integers(0, 3), kind=st.sampled_from(list(DAMAGE)), rng=st.randoms(use_true_random=False))
def test_damage_is_noticed_in_every_file(chaos, file: int, kind: str, rng: random.Random):
    files = sorted(published(chaos / "reference" / "checkpoints")[-1].iterdir())
    assert len(files) == 4
    how, noticed = damage_and_look(files[file], kind, rng)
    assert noticed != MISSED, f"{files[file].name} {kind}: {how}"
