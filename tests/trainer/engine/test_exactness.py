"""The step is the same at every number of processes and every ZeRO stage: that of one dense process.

The reference is written out here: whole batches, whole gradients from autograd, torchjd's dense aggregators on the
Jacobian, torch's optimizers. Every case of one world size runs in the same processes, which the launcher starts.
"""

import json
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness_worker import OPTIMIZERS, configured
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel
from torchjd.aggregation import PCGrad, UPGrad
from toy_objectives import OBJECTIVES, TAUGHT, TEACHERS_DECAY

from minbert.data.batches.batch import Portion, make_batch
from minbert.data.sequences.tokens import load_tokenizer
from minbert.launch.options import parse_run_config
from minbert.launch.processes import launch
from minbert.trainer.engine.copies import TEACHER
from minbert.trainer.engine.optimizer import parameter_groups, rates
from minbert.trainer.processes.random_state import seed_everything, stream
from minbert.trainer.run.data import build_plan, load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare
from minbert.trainer.run.saved_model import build_model

WORKER = Path(__file__).parents[2] / "support" / "exactness_worker.py"
STAGES = [None, 0, 1, 2, 3]
STEPS = 3
# After three steps that move weights by more than a hundred times that. AdamW magnifies rounding errors where gradients
# are small: its tolerance is a thousandth of an update, the learning rate being 0.01.
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}


def case(zero_stage, aggregator="pcgrad", optimizer="sgd", **more):
    parts = [f"stage{zero_stage}", aggregator, optimizer, *(f"{key}{value}" for key, value in more.items())]
    return dict(
        name="-".join(map(str, parts)), zero_stage=zero_stage, aggregator=aggregator, optimizer=optimizer,
        **{"steps": STEPS} | more,
    )  # fmt: skip


EVERYWHERE = [case(stage, "pcgrad", optimizer) for stage, optimizer in product(STAGES, OPTIMIZERS)]
EVERYWHERE += [case(stage, "sum") for stage in STAGES]
# A head is trained at every third step, and is not there for the optimizer at the others.
EVERYWHERE += [case(stage, "sum", "adamw", task_schedule="round_robin", steps=7) for stage in STAGES]
EVERYWHERE += [
    case(stage, aggregator, "adamw", unfreezing=True, steps=5, **more)
    for stage in STAGES
    for aggregator, more in [("sum", {}), ("pcgrad", {}), ("pcgrad", {"accumulation": 2})]
]
# Stages 1 and 2 have one engine; DeepSpeed keeps gradients otherwise between the parts of a batch.
ODD = [
    case(stage, aggregator, **more)
    for stage in (None, 1, 2, 3)
    for aggregator, more in [
        ("upgrad", {"accumulation": 2}),
        ("pcgrad", {"batch_size": 3}),  # fewer examples than four processes
        ("upgrad", {"surgery_scope": "layer"}),
        ("graddrop", {}),
        ("uncertainty", {"accumulation": 2}),
        ("sum", {"accumulation": 3, "batch_size": 7}),
        ("pcgrad", {"clip": 0.05}),
        ("pcgrad", {"frozen_at": 1}),  # the lowest layer stays as it is at that step
        ("pcgrad", {"broken_step": 1}),  # NaN in one task: the step is skipped by all, as if it had not been
        ("sum", {"broken_step": 1}),
        ("famo", {"objective": "proximal"}),  # asks for the losses again, without gradients
    ]
    if stage != 1 or "accumulation" in more
]  # fmt: skip
OBJECTIVE = [
    case(stage, "pcgrad", objective=objective)
    for stage in (None, 2, 3)
    for objective in ("adversarial", "masked", "proximal")
]
# The perturbation of an example and what the teacher says of it are the same wherever it is.
OBJECTIVE += [
    case(stage, "sum", objective=objective, accumulation=2)
    for stage in (None, 2, 3)
    for objective in ("adversarial", "proximal")
]
OBJECTIVE += [case(2, "pcgrad", objective="dropping", accumulation=2), case(3, "sum", objective="dropping")]
# The average is evaluated after every step, in the place of the weights, and the training does not notice.
AVERAGED = [
    case(stage, aggregator, optimizer, average=0.6, freeze=1, steps=6)
    for stage, (aggregator, optimizer) in product(STAGES, [("pcgrad", "sgd"), ("sum", "adamw")])
]
# The order of a pair is drawn: by its place in the batch, whoever has it.
JOINT = [case(stage, "pcgrad", pair_encoding="joint", accumulation=2) for stage in (None, 2, 3)]
JOINT += [case(2, "pcgrad", pair_encoding="joint_sides", accumulation=2)]
# The tied embeddings have a part in every task's gradient; hidden tokens are few, and not as many on every process.
MASKED = [
    case(stage, aggregator, tasks=["sst", "mlm"], **more)
    for stage in (None, 2, 3)
    for aggregator, more in [("pcgrad", {}), ("sum", {"accumulation": 2}), ("pcgrad", {"batch_size": 3})]
]
# The loss of a batch is not that of its slices.
COUPLED = [
    case(stage, aggregator, tasks=["sst", loss], **more)
    for stage, aggregator, loss, more in [
        (None, "sum", "cosent", {"batch_size": 3}),  # there are processes without an example
        (2, "pcgrad", "cosent", {}),
        (3, "sum", "pearson", {}),
    ]
]
# What the others do in one backward pass, in one for each task.
PER_TASK = [case(stage, "pcgrad", per_task=True, accumulation=2) for stage in (None, 2, 3)]
ALL = EVERYWHERE + ODD + OBJECTIVE + JOINT + AVERAGED + MASKED + COUPLED + PER_TASK


def cases(processes: int) -> list[dict]:
    """What so many processes go through: two all of it, one what others are compared with, four what uneven or empty
    shards and slices of a batch could change."""
    return {
        1: [case for case in ALL if case["zero_stage"] is None] + [case(stage, "pcgrad") for stage in STAGES[1:]],
        2: ALL,
        4: [one for one in EVERYWHERE if "unfreezing" not in one and one["aggregator"] == "pcgrad"]
        + [one for one in EVERYWHERE if "task_schedule" in one and one["zero_stage"] in (2, 3)]
        + [one for one in ODD if one["zero_stage"] in (2, 3)]
        + COUPLED,
    }[processes]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> RunFolder:
    arguments = (
        "--train-limit 60 --eval-limit 10 --batch-size 6 --encoder-dropout 0 --head-dropout 0 --lr 0.01 --trackers"
    )
    folder = tmp_path_factory.mktemp("exactness") / "run"
    return prepare(parse_run_config([*arguments.split(), "--run", str(folder)]))


def results(prepared: RunFolder, processes: int) -> Path:
    """The folder with what became of every case with this many processes."""
    out = prepared.path / f"results-{processes}"
    if not out.exists():
        out.mkdir()
        file = out / "cases.json"
        file.write_text(json.dumps(cases(processes)))
        command = [sys.executable, str(WORKER), str(prepared.path), str(file), str(out)]
        assert launch(command, processes, out) == 0, (out / "rank-0.error").exists()
    return out


class Dense:
    """One process with whole batches and whole gradients."""

    def __init__(self, prepared: RunFolder, case: dict):
        self.config = configured(prepared.read_config(), case | {"zero_stage": None})
        self.steps = case["steps"]
        tokenizer = load_tokenizer(prepared.encoder)
        self.objective = (OBJECTIVES | TAUGHT)[case.get("objective", "supervised")]
        names = self.config.corpus.names
        self.splits = {name: load_split(self.config, name, "train", tokenizer) for name in names}
        self.plan = build_plan(self.config, self.splits)
        seed_everything(0)
        self.model = build_model(self.config, prepared).train()
        self.optimizer = OPTIMIZERS[case["optimizer"]](parameter_groups(self.model, self.config.optimizer))
        self.average = averaged(self.model, case["average"]) if "average" in case else None
        self.teacher = averaged(self.model, TEACHERS_DECAY, warm_up=False) if case.get("objective") in TAUGHT else None
        self.trunk = [p for p in self.model.bert.parameters() if p.requires_grad]

    def losses(self, step: int, some=slice(None)) -> list[torch.Tensor]:
        found = []
        for name in self.plan.tasks(step):
            rows = self.plan.rows(name, step)
            portion = Portion(rows[some], np.arange(len(rows))[some], len(rows[some]))
            batch = make_batch(self.splits, {name: portion}, draw=(self.plan.seed, step))
            targets = None
            if self.teacher is not None:
                targets = {TEACHER: {name: said.detach() for name, said in self.teacher.eval()(batch).items()}}
            losses, weights = self.model(batch, self.objective, step, targets)[name], batch.tasks[name].weights
            found.append(torch.dot(losses, weights) / weights.sum())
        return found

    def jacobian(self, losses: list[torch.Tensor]) -> torch.Tensor:
        rows = [torch.autograd.grad(loss, self.trunk, retain_graph=True) for loss in losses]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    def frozen(self, step: int) -> set[int]:
        """The encoder's parameters that are not trained yet at a step, which of all others is at the peak rate."""
        joined = rates(step, self.steps, self.config.optimizer, [g["name"] for g in self.optimizer.param_groups])
        return {id(p) for g in self.optimizer.param_groups if not joined[g["name"]] for p in g["params"]}

    def step(self, step: int, aggregate, clip: float = 0.0) -> list[float]:
        losses, frozen = self.losses(step), self.frozen(step)
        jacobian = self.jacobian(losses)
        sizes = [p.numel() for p in self.trunk]
        for parameter, columns in zip(self.trunk, jacobian.split(sizes, dim=1)):
            columns.mul_(id(parameter) not in frozen)
        combined = aggregate(jacobian, step)
        self.optimizer.zero_grad()
        sum(losses).backward()
        for parameter, part in zip(self.trunk, combined.split(sizes)):
            parameter.grad = None if id(parameter) in frozen else part.view_as(parameter)
        if clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        for copy in (self.average, self.teacher):
            if copy is not None:
                copy.update_parameters(self.model)
        return [loss.item() for loss in losses]


def averaged(model: torch.nn.Module, decay: float, warm_up: bool = True) -> AveragedModel:
    """PyTorch's own average, from the first weights on."""

    def follow(average: torch.Tensor, weight: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        now = min(decay, updates / (9 + updates)) if warm_up else decay  # it counts the first weights, too
        return now * average + (1 - now) * weight

    average = AveragedModel(model, avg_fn=follow)
    average.update_parameters(model)
    return average


def dense_pcgrad(jacobian: torch.Tensor, step: int) -> torch.Tensor:
    torch.manual_seed(stream(0, "aggregator", step))  # the order of the tasks is drawn from seed 0 and the step
    return PCGrad()(jacobian)


def dense_sum(jacobian: torch.Tensor, step: int) -> torch.Tensor:
    return jacobian.sum(0)


def dense_upgrad(jacobian: torch.Tensor, step: int) -> torch.Tensor:
    return UPGrad()(jacobian)


DENSE = {"pcgrad": dense_pcgrad, "sum": dense_sum, "upgrad": dense_upgrad}


def assert_same_weights(state, expected, tolerance):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")  # noqa: B023


@cache
def dense_result(path: Path, text: str):
    wanted = json.loads(text)
    dense = Dense(RunFolder(path), wanted)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    losses = {
        step: dense.step(step, DENSE[wanted["aggregator"]], wanted.get("clip", 0.0))
        for step in range(wanted["steps"])
        if step != wanted.get("broken_step")
    }
    average = None if dense.average is None else dense.average.module.state_dict()
    return before, losses, dense.model.state_dict(), average


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_stage_equals_the_dense_process(prepared, processes):
    folder = results(prepared, processes)
    for wanted in cases(processes):
        if wanted["aggregator"] not in DENSE or wanted.keys() & {"surgery_scope", "frozen_at"}:
            continue
        key = {k: v for k, v in wanted.items() if k not in ("name", "zero_stage", "accumulation", "per_task")}
        before, losses, expected, average = dense_result(prepared.path, json.dumps(key))
        state = load_file(folder / f"{wanted['name']}.safetensors")
        assert_same_weights(state, expected, TOLERANCE[wanted["optimizer"]])
        moved = max(float((state[name] - before[name]).abs().max()) for name in before)
        assert moved > 100 * TOLERANCE[wanted["optimizer"]], wanted["name"]
        if average is not None:
            found = load_file(folder / f"{wanted['name']}.average")
            assert_same_weights(found, average, TOLERANCE[wanted["optimizer"]])
            for name in average:
                fixed = name.startswith(("bert.embeddings.", "bert.layers.0.", "bert.pooler."))
                assert torch.equal(found[name], state[name]) == fixed, name
        if "objective" in wanted:
            plain = load_file(folder / f"stage{wanted['zero_stage']}-{wanted['aggregator']}-sgd.safetensors")
            assert max(float((state[name] - plain[name]).abs().max()) for name in plain) > 100 * TOLERANCE["sgd"]
        for rank in range(processes):
            history = load_file(folder / f"{wanted['name']}-rank{rank}.safetensors")
            for number, found in losses.items():
                torch.testing.assert_close(
                    history[f"losses/{number}"], torch.tensor(found, dtype=torch.float64), atol=2e-5, rtol=1e-5
                )


@pytest.mark.parametrize("processes", [2, 4])
def test_methods_without_a_dense_twin_equal_one_process(prepared, processes):
    alone, together = results(prepared, 1), results(prepared, processes)
    for wanted in cases(processes):
        if wanted not in ODD:
            continue
        plain = wanted["name"].replace(f"stage{wanted['zero_stage']}", "stageNone")
        expected = load_file(alone / f"{plain}.safetensors")
        assert_same_weights(load_file(together / f"{wanted['name']}.safetensors"), expected, 1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_weights_are_identical_on_all_ranks(prepared, processes):
    folder = results(prepared, processes)
    for wanted in cases(processes):
        first, *others = (load_file(folder / f"{wanted['name']}-rank{r}.safetensors") for r in range(processes))
        for other in others:
            for number in set(range(wanted["steps"])) - {wanted.get("broken_step")}:
                assert torch.equal(first[f"weights/{number}"], other[f"weights/{number}"]), wanted["name"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_process_holds_its_share_of_the_gradient(prepared, stage):
    """No full gradient: the shards of all ranks are a partition of the encoder."""
    held = {
        processes: [
            int(load_file(results(prepared, processes) / f"stage{stage}-pcgrad-sgd-rank{rank}.safetensors")["held"])
            for rank in range(processes)
        ]
        for processes in (1, 4)
    }
    assert sum(held[4]) == held[1][0]
    assert max(held[4]) < held[1][0] / 3


@pytest.mark.parametrize(("stage", "times"), [(1, 1), (2, 3), (3, 3)])
def test_stage_1_sends_the_gradient_of_an_accumulated_batch_once(prepared, stage, times):
    """The stages that hold no whole gradient send that of each of its parts."""
    whole, parts = (
        load_file(results(prepared, 2) / f"{one['name']}-rank0.safetensors")["sent"]
        for one in (case(stage, "sum"), case(stage, "sum", accumulation=3, batch_size=7))
    )
    assert 0 < times * whole == parts


def test_projecting_local_gradients_differs(prepared):
    """What data-parallel ports of PCGrad do (each rank projects the gradients of its own slice, the results are
    averaged) is another method, with visibly other weights after as many steps."""
    wanted = case(None)
    _, _, expected, _ = dense_result(
        prepared.path, json.dumps({k: v for k, v in wanted.items() if k not in ("name", "zero_stage")})
    )
    dense = Dense(prepared, wanted)
    for step in range(STEPS):
        halves = [dense.jacobian(dense.losses(step, slice(first, None, 2))) for first in (0, 1)]
        local = torch.stack([dense_pcgrad(half, step) for half in halves]).mean(0)
        dense.step(step, lambda jacobian, step, local=local: local)
    difference = max(float((dense.model.state_dict()[name] - expected[name]).abs().max()) for name in expected)
    assert difference > 100 * TOLERANCE["sgd"]
