"""Population-based training: what changes, what is taken over, and what a kill in the middle leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler
from safetensors.torch import load_file
from searches import TINY, await_trials, trials_of
from small_runs import CORPUS
from waiting import PATIENCE

from minbert.launch.main import main
from minbert.trainer.checkpoint.format import MANIFEST, published, read_manifest
from minbert.trainer.config import RunConfig
from minbert.trainer.run.folder import RunFolder, read_config_file
from minbert.tuning.population import Population
from minbert.tuning.search import Search, describe_schedule
from minbert.tuning.space import EXPLORED, Choice, check_space, explore, paper_space, parse_space
from minbert.tuning.take_over import STAGING, stage, take_over
from minbert.tuning.trial import METRIC, SCHEDULE_FILE, Trial, best

OPTIONS = {"data": CORPUS, "train_limit": 60, "eval_limit": 20, "batch_size": 8, "trackers": (), "steps": 12}
OPTIONS |= {"eval_every": 3}


@given(seed=st.integers(0, 2**31), times=st.integers(1, 20))
def test_exploring_stays_within_the_space_and_changes_only_what_may_change(seed, times):
    space = paper_space(RunConfig()) | check_space(parse_space(["clip=0.5,1,2"]))
    random = np.random.default_rng(seed)
    before = {name: kind.at(random.random()) for name, kind in space.items()}
    after = before
    for _ in range(times):
        after = explore(space, after, random)
    for name, kind in space.items():
        if name not in EXPLORED:
            assert after[name] == before[name]
        elif isinstance(kind, Choice):
            assert after[name] in kind.values
        else:
            assert kind.low <= after[name] <= kind.high


def test_exploring_changes_something():
    space = check_space(parse_space(["lr=loguniform(1e-6,1)"]))
    found = {explore(space, {"lr": 1e-3}, np.random.default_rng(seed))["lr"] for seed in range(50)}
    assert {0.0008, 0.0012} < found


# Taking over


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run that is ahead, at step 9 of 12, and one that is behind."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps, lr in (("ahead", 9, 1e-3), ("behind", 6, 1e-5)):
        words = ["--steps", str(steps), "--eval-every", "3", "--lr", str(lr)]
        assert main(["train", "--run", str(folder / name), *TINY, *words]) == 0
    return folder


@pytest.fixture
def pair(runs, tmp_path) -> tuple[RunFolder, RunFolder]:
    shutil.copytree(runs, tmp_path / "runs")
    return RunFolder(tmp_path / "runs" / "behind"), RunFolder(tmp_path / "runs" / "ahead")


def files(run: RunFolder) -> dict[str, bytes]:
    kept = [run.config_file, run.best_model, run.metrics_file, *run.checkpoints.rglob("*")]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in kept if path.is_file()}


def train_on(run: RunFolder, *words: str) -> dict:
    assert main(["train", "--run", str(run.path), *TINY, "--steps", "12", "--eval-every", "3", *words]) == 0
    return load_file(run.best_model)


def test_a_run_that_takes_over_ends_as_the_other_would_with_the_new_options(pair):
    behind, ahead = pair
    options = OPTIONS | {"lr": 5e-4}
    take_over(behind, ahead, options, 1)
    assert [path.name for path in published(behind.checkpoints)] == [published(ahead.checkpoints)[-1].name]
    assert read_config_file(behind.config_file).optimizer.lr == 5e-4
    assert not (behind.path / STAGING).exists()
    taken = train_on(behind, "--lr", "5e-4")
    wanted = train_on(ahead, "--lr", "5e-4", "--head-lr", "5e-4", "--force")
    assert taken.keys() == wanted.keys()
    assert all(taken[name].equal(wanted[name]) for name in wanted)
    theirs = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in ahead.read_metrics()]
    assert [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in behind.read_metrics()] == theirs
    before = files(behind)
    take_over(behind, ahead, options, 1)  # again, as after a kill: it is done
    assert files(behind) == before


@pytest.mark.parametrize("moves", range(9))
def test_a_kill_while_taking_over_leaves_what_the_next_start_finishes(pair, monkeypatch, moves):
    behind, ahead = pair
    before = shutil.copytree(behind.path, behind.path.with_name("before"))
    take_over(behind, ahead, OPTIONS | {"lr": 5e-4}, 1)
    wanted = files(behind)
    shutil.rmtree(behind.path)
    before.rename(behind.path)
    replace, done = os.replace, 0

    def replace_some(source, target):
        nonlocal done
        if done == moves:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_some)
        take_over(behind, ahead, OPTIONS | {"lr": 5e-4}, 1)
    take_over(behind, ahead, OPTIONS | {"lr": 5e-4}, 1)
    assert files(behind) == wanted
    assert json.loads((behind.path / SCHEDULE_FILE).read_text())["number"] == 1


def test_a_run_that_takes_over_keeps_its_own_trackers(pair):
    """Two runs under one name would write over each other at the tracker's server."""
    for run, name in zip(pair, ("mine", "theirs")):
        newest = published(run.checkpoints)[-1]
        manifest = read_manifest(newest)
        manifest.state.trackers["wandb"] = name
        manifest.write(newest)
    behind, ahead = pair
    take_over(behind, ahead, OPTIONS, 1)
    assert read_manifest(published(behind.checkpoints)[-1]).state.trackers == {"wandb": "mine"}


def test_a_damaged_checkpoint_is_not_taken_over(pair):
    behind, ahead = pair
    older, newest = published(ahead.checkpoints)
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    take_over(behind, ahead, OPTIONS, 1)
    assert [path.name for path in published(behind.checkpoints)] == [older.name]
    shutil.rmtree(ahead.checkpoints)
    kept = files(behind)
    take_over(behind, ahead, OPTIONS | {"lr": 5e-4}, 2)  # nothing to take over but the options
    changed = {name for name, content in files(behind).items() if kept.get(name) != content}
    assert changed == {"config.yaml", f"checkpoints/{older.name}/{MANIFEST}"}


def test_how_the_weights_came_about_is_written_down(pair):
    """Over several take-overs, and from where the donor was when it was decided, whatever it does until then."""
    behind, ahead = pair
    third = RunFolder(ahead.path.with_name("third"))
    shutil.copytree(behind.path, third.path)
    stage(behind, ahead, OPTIONS | {"lr": 5e-4}, 1)
    shutil.rmtree(ahead.checkpoints)  # in the meantime
    assert take_over(behind, ahead, OPTIONS | {"lr": 5e-4}, 1) == 9
    train_on(behind, "--lr", "5e-4")
    assert take_over(third, behind, OPTIONS | {"lr": 2e-4}, 1) == 12
    trial = Trial(third.path, "third", 2, {"lr": 2e-4}, taken_over=[{"donor": "behind"}])
    assert [(p["from_step"], p["options"]["lr"]) for p in trial.schedule()] == [(0, 1e-3), (9, 5e-4), (12, 2e-4)]
    assert trial.evaluations() and not trial.earned()  # they are the donors'
    space = check_space(parse_space(["lr=loguniform(1e-6,1)"]))
    assert describe_schedule(trial, space)[1:] == [
        f"  from step {step}: lr={lr}" for step, lr in ((0, 1e-3), (9, 5e-4), (12, 2e-4))
    ]


# Who takes over


class Member:
    """A trial as the scheduler sees Ray's: it trains in steps of a tenth, and its scores are random."""

    def __init__(self, number: int, random: np.random.Generator):
        self.config = {"name": f"trial-{number:04d}", "parameters": {"lr": 1e-3}, "taken_over": []}
        self.status, self.random, self.progress, self.trained, self.decided = RayTrial.PENDING, random, 0.0, 0.0, []

    def is_finished(self) -> bool:
        return self.status == RayTrial.TERMINATED

    def set_config(self, config: dict) -> None:
        self.config = config

    def evaluate(self) -> dict:
        self.progress = round(self.progress + 0.1, 6)
        self.trained += 0.1
        score = None if self.random.random() < 0.1 else float(self.random.random())
        return {METRIC: score, "progress": self.progress, "taken_over": len(self.config["taken_over"])}


class Cluster:
    """`slots` trials at a time, and what the scheduler asks of Ray and of the recorder."""

    def __init__(self, members: list[Member]):
        self.members = {member.config["name"]: member for member in members}

    def get_trials(self) -> list[Member]:
        return list(self.members.values())

    def pause_trial(self, trial: Member, should_checkpoint: bool) -> None:
        trial.status = RayTrial.PAUSED

    def hear(self, name: str, result: dict) -> None:
        pass

    def take_over(self, name: str, donor: str, parameters: dict) -> dict:
        member, other = self.members[name], self.members[donor]
        assert other.progress >= member.progress, "a trial went back"
        assert member.trained >= 0.2 - 1e-6, "it took over without an interval of its own"
        member.progress, member.trained = other.progress, 0.0
        member.decided.append(donor)
        return {"parameters": parameters, "taken_over": [*member.config["taken_over"], {"donor": donor}]}


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), slots=st.integers(1, 5), samples=st.integers(2, 9))
def test_a_population_ends_however_few_fit_at_a_time(seed, slots, samples):
    space = check_space(parse_space(["lr=loguniform(1e-6,1)"]))
    search = Search(samples=samples, space=space, scheduler="pbt", grace=0.2)
    random = np.random.default_rng(seed)
    members = [Member(number, random) for number in range(samples)]
    cluster = Cluster(members)
    scheduler = Population(search, cluster)
    for member in members:
        scheduler.on_trial_add(cluster, member)
    for _ in range(samples * 10):  # each round brings whoever runs a tenth closer to the end
        while sum(m.status == RayTrial.RUNNING for m in members) < slots:
            if (chosen := scheduler.choose_trial_to_run(cluster)) is None:
                break
            chosen.status = RayTrial.RUNNING
        for member in members:
            if member.status == RayTrial.RUNNING:
                decision = scheduler.on_trial_result(cluster, member, member.evaluate())
                if member.progress >= 1:
                    member.status = RayTrial.TERMINATED
                elif decision == TrialScheduler.PAUSE:
                    member.status = RayTrial.PAUSED
    assert all(member.is_finished() for member in members)
    assert samples < 4 or slots > 1 or any(member.decided for member in members)


# A search


@pytest.mark.xdist_group("ray")
def test_a_population_that_is_killed_goes_on_and_ends_with_one_trial_at_a_time(tmp_path):
    folder = tmp_path / "s"
    words = [sys.executable, "-m", "minbert.launch.main", "tune", "--search", str(folder), *TINY, "--scheduler", "pbt"]
    words += ["--samples", "3", "--epochs", "8", "--grace", "0.2", "--space", "lr=loguniform(1e-6,5e-3)"]
    words += ["hidden_layers=1,2", "--cpus", str(len(os.sched_getaffinity(0)))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_trials(folder, process, lambda trials: any(trial.taken_over for trial in trials))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = trials_of(folder)
    assert [trial.status for trial in trials] == ["finished"] * 3
    took_over = [trial for trial in trials if trial.taken_over]
    assert took_over
    for trial in took_over:
        last = trial.taken_over[-1]
        config = read_config_file(trial.folder / "config.yaml")
        assert trial.parameters == last["parameters"]
        assert (config.optimizer.lr, config.heads.hidden_layers) == (
            trial.parameters["lr"],
            trial.parameters["hidden_layers"],
        )
        steps = [record["step"] for record in trial.evaluations()]
        assert steps == sorted(set(steps))
        assert trial.step == trial.steps == steps[-1]
        schedule = trial.schedule()
        assert schedule[-1]["options"]["lr"] == trial.parameters["lr"]
        assert trial.score == max(
            r["dev/overall"] for r in trial.evaluations() if r["step"] > schedule[-1]["from_step"]
        )
        assert len(trial.taken_over) <= 5
    winner, said = best(trials), (folder / "best.yaml").read_text()
    assert f"{winner.name}, dev/overall {winner.score:.4f}" in said
    assert ("by this schedule" in said) == bool(winner.taken_over)
