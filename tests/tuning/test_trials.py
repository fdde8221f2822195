"""Trials: their files, their order, when they are stopped, and what each takes of a machine."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig
from minbert.trainer.options import ParallelConfig
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.proposals import TpeProposals
from minbert.tuning.room import limits_of
from minbert.tuning.scheduler import REACHED, WORST, RememberingASHA
from minbert.tuning.search import Resources, Search
from minbert.tuning.space import (
    check_space,
    parse_space,
)
from minbert.tuning.trainable import TrialWorker
from minbert.tuning.trial import METRIC, Trial, best, better, ranked, read_trials, score_of


def test_a_trial_file_survives_writing_and_reading(tmp_path):
    trial = Trial(tmp_path / "t", "t", 3, {"lr": 1e-4}, "stopped", score=0.5, step=10, steps=40, stopped_by="asha")
    trial.write()
    assert Trial.read(tmp_path / "t") == trial
    assert read_trials(tmp_path) == [trial]


def test_the_best_trial_has_a_score_and_did_not_fail(tmp_path):
    scores = [None, 0.4, 0.6, 0.6, 0.9]
    trials = [Trial(tmp_path, f"t{n}", n, {}, "finished", score=score) for n, score in enumerate(scores)]
    trials[4].status = "failed"
    assert best(trials).number == 2
    assert best(trials[:1]) is None


def scored(folder: Path, number: int, scores: list[float], status: str = "finished") -> Trial:
    """A trial with these evaluations; NaN is what none of our own writes any more."""
    trial = Trial(folder / f"t{number}", f"t{number}", number, {"lr": 10.0 ** -(number + 1)}, status)
    trial.step = trial.steps = len(scores)
    trial.score = max((score for score in scores if score == score), default=math.nan)
    trial.write()
    lines = [json.dumps({"step": step, "dev/overall": score}) for step, score in enumerate(scores, 1)]
    (trial.folder / "metrics.jsonl").write_text("\n".join(lines))
    return Trial.read(trial.folder)


def test_a_score_that_is_no_number_ranks_last_everywhere(tmp_path):
    pytest.importorskip("optuna")
    trials = [scored(tmp_path, n, scores) for n, scores in enumerate([[math.nan], [0.2, math.nan], [0.1, 0.3]])]
    assert [trial.name for trial in ranked(trials)] == ["t2", "t1"]
    assert trials[0].score is None and "NaN" not in json.dumps([trial.score for trial in trials])
    assert [len(trial.evaluations()) for trial in trials] == [0, 1, 2]
    assert better(None, score_of({"dev/overall": math.nan})) is None

    search = Search(samples=10, space=check_space(parse_space(["lr=loguniform(1e-5,1)"])), algorithm="tpe")
    study = TpeProposals(search, trials, [], lambda trial: {}, partial(search.new_trial, tmp_path)).study
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE", "COMPLETE"]
    assert study.best_value == 0.3


def test_asha_judges_by_the_best_score_so_far_as_the_ranking_does(tmp_path):
    earlier = [scored(tmp_path, n, [score] * 10) for n, score in enumerate([0.5, 0.6, 0.7])]
    asha = RememberingASHA(0.1, 3.0, [*earlier, scored(tmp_path, 3, [math.nan] * 10)])
    asked = SimpleNamespace(config={"name": "new"})

    def decide(name: str, reached: float) -> str:
        asked.config["name"] = name
        asha.on_trial_add(None, asked)
        return asha.on_trial_result(None, asked, {"progress": 0.1, METRIC: 0.0, REACHED: reached})

    assert decide("fell back, and is among the best", 0.9) == TrialScheduler.CONTINUE
    assert decide("never was", 0.1) == TrialScheduler.STOP
    assert decide("has no number", WORST) == TrialScheduler.STOP


def test_a_worker_tells_scores_that_are_no_number_and_a_full_disk_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    trial = Trial(tmp_path / "trial", "trial", 0, {})
    trial.write()

    def train(config: RunConfig, stop: StopRequest, begin: Callable[[int], None]) -> tuple[int, str]:
        begin(4)
        run = RunFolder(config.run)
        for step, score in ((1, math.nan), (2, None), (3, 0.5), (4, 0.25)):
            run.append_metrics({"step": step, METRIC: score})
        return 1, "Traceback ...\nOSError: [Errno 28] No space left on device"

    class Worker(TrialWorker):
        def setup(self, config: dict) -> None:
            super().setup(config, train)

    config = {"folder": str(trial.folder), "options": {}, "taken_over": [], "gpus": 0}
    worker = Worker(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # nobody set a GPU aside
    results = []
    while not results or "ending" not in results[-1]:
        results.append(worker.step())
    told = [(result["at"], result[METRIC], result["best"], result[REACHED]) for result in results if METRIC in result]
    assert told == [(1, None, None, WORST), (2, None, None, WORST), (3, 0.5, 0.5, 0.5), (4, 0.25, 0.5, 0.5)]
    assert results[-1]["ending"] == "no room"
    worker.stop()


# What a trial takes


@pytest.mark.parametrize(
    ("resources", "parallel", "nodes", "limits"),
    [
        ({}, {}, [{"CPU": 4}], {"cpu": 1}),
        ({}, {"processes": 2}, [{"CPU": 4}, {"CPU": 4, "GPU": 2}], {"cpu": 2, "gpu": 2}),
        ({}, {"device": "cpu"}, [{"CPU": 4, "GPU": 2}], {"cpu": 1}),
        ({"gpus": 0}, {}, [{"CPU": 4, "GPU": 2}], {"cpu": 1}),
        ({"gpus": 0.5, "cpus": 2}, {}, [{"CPU": 4, "GPU": 2}], {"cpu": 2, "gpu": 0.5}),
        ({"gpus": 0.5}, {"processes": 2}, [{"CPU": 4, "GPU": 2}], "part of a GPU"),
        ({"gpus": 0}, {"device": "cuda"}, [{"CPU": 4, "GPU": 2}], "--gpus 0"),
        ({}, {"device": "cuda"}, [{"CPU": 4}], "nodes have none"),
    ],
)
def test_a_gpu_is_used_where_there_is_one(resources, parallel, nodes, limits):
    asked = (Resources(**resources), ParallelConfig(**parallel), nodes)
    if isinstance(limits, str):
        with pytest.raises(UserError, match=limits):
            limits_of(*asked)
    else:
        assert limits_of(*asked) == limits
