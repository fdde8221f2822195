"""Distillation: distances against PyTorch's divergence, the teachers' share over a run, and what a run of one student
and two teachers learns from, keeps and refuses."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known_tasks import COSENT, QUORA, SST, STS
from small_model import build, build_batch
from small_runs import CORPUS

from minbert.data.batches.batch import Portion, make_batch
from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.launch.options import parse_run_config
from minbert.trainer.assembly import assemble_engine, assemble_step
from minbert.trainer.engine.copies import TEACHER
from minbert.trainer.objectives.choice import build_objective
from minbert.trainer.objectives.distillation import TEACHERS, Distilled, distance
from minbert.trainer.objectives.supervised import supervised
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import build_plan, load_split, load_splits
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare, settings
from minbert.trainer.run.saved_model import load_model
from minbert.trainer.run.teachers import OutputCache, ask_teachers
from minbert.tuning.extensions import extension

CPU = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distances_are_pytorchs_divergences(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    said = (teacher / temperature).softmax(-1)
    expected = F.kl_div((student / temperature).log_softmax(-1), said, reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(distance(SST, student, said, temperature), expected)
    torch.testing.assert_close(distance(SST, teacher, said, temperature), torch.zeros(6), atol=1e-6, rtol=0)
    logit, yes = student[:, :1], (teacher[:, :1] / temperature).sigmoid()
    two = torch.cat([torch.zeros_like(logit), logit], 1) / temperature
    expected = F.kl_div(two.log_softmax(-1), torch.cat([1 - yes, yes], 1), reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(distance(QUORA, logit, yes, temperature), expected)
    certain = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]])  # a divergence from a hard label is the cross entropy
    torch.testing.assert_close(
        distance(SST, student[:1], certain), F.cross_entropy(student[:1], torch.tensor([1]))[None]
    )
    assert distance(STS, torch.zeros(1, 1), torch.tensor([[4.0]])).item() == 1.5**2
    assert distance(COSENT, torch.full((1, 1), 0.5), torch.tensor([[4.0]])).item() == 1.5**2


def test_the_share_goes_from_the_teachers_to_the_labels():
    model, batch = build(), build_batch()
    said = {TEACHERS: {"sst": torch.full((3, 5), 0.2)}}
    objective = Distilled(supervised, 11)
    plain = model(batch, supervised)
    apart = distance(SST, model(batch)["sst"], said[TEACHERS]["sst"])
    for step, share in ((0, 1.0), (4, 0.6), (10, 0.0), (99, 0.0)):
        assert objective.share_at(step) == pytest.approx(share)
        found = model(batch, objective, step, said)
        torch.testing.assert_close(found["sst"], (1 - share) * plain["sst"] + share * apart)
        assert torch.equal(found["quora"], plain["quora"])  # which nobody teaches
    assert Distilled(supervised, 1, (0.5, 0.5)).share_at(0) == 0.5


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[RunFolder]:
    """One of two tasks that sees pairs jointly, and one of sentiment alone."""
    folder, size = (
        tmp_path_factory.mktemp("teachers"),
        f"--data {CORPUS} --train-limit 40 --eval-limit 10 --batch-size 8 --steps 3 --trackers",
    )
    options = {"joint": "--tasks sts sst --pair-encoding joint", "alone": "--tasks sst --seed 1"}
    for name, more in options.items():
        assert main(["train", "--run", str(folder / name), *size.split(), *more.split()]) == 0
    return [RunFolder(folder / name) for name in options]


STUDENT = (
    f"--data {CORPUS} --train-limit 30 --eval-limit 10 --batch-size 8 --steps 4 --eval-every 4 --log-every 1".split()
)
STUDENT += ["--log-every", "1", "--trackers"]


def student(folder, teachers, *more: str) -> list[str]:
    return [*STUDENT, "--run", str(folder), "--teachers", *(str(run.path) for run in teachers), *more]


def said_by(run: RunFolder, config, name: str) -> torch.Tensor:
    """Raw outputs of all training rows of the student, in one batch."""
    model, tokenizer, _ = load_model(run, torch.device("cpu"))
    own = run.read_config()
    own = own.model_copy(update={"corpus": own.corpus.model_copy(update={"train_limit": config.corpus.train_limit})})
    split = load_split(own, name, "train", tokenizer)
    with torch.no_grad():
        rows = np.arange(len(split))
        return model(make_batch({name: split}, {name: Portion.whole(rows)}))[name]


def test_a_student_learns_from_what_its_teachers_said_once(teachers, tmp_path, capsys):
    run = prepare(
        parse_run_config(student(tmp_path / "run", teachers, "--accumulation", "2", "--distill-temperature", "2"))
    )
    config = run.read_config()
    table = ask_teachers(config, CPU, lambda: False)
    assert table.keys() == {"sst", "sts"}  # of quora nobody knows
    expected = sum((said_by(teacher, config, "sst") / 2).softmax(-1) for teacher in teachers) / 2
    torch.testing.assert_close(table["sst"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(table["sts"], 5 * said_by(teachers[0], config, "sts").sigmoid(), atol=1e-5, rtol=1e-5)

    shards = {path: path.stat().st_mtime_ns for path in (config.corpus.cache / "teachers").glob("*/*.safetensors")}
    assert all(torch.equal(table[name], again) for name, again in ask_teachers(config, CPU, lambda: True).items())
    capsys.readouterr()
    damaged = next(iter(shards))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    torch.testing.assert_close(ask_teachers(config, CPU, lambda: False), table)  # asked again
    assert re.fullmatch(rf"Asking {teachers[0].path.parent}/\w+ about \d+ rows of \w+\n", capsys.readouterr().out)
    after = {path: path.stat().st_mtime_ns for path in (config.corpus.cache / "teachers").glob("*/*.safetensors")}
    assert after.keys() == shards.keys() and {path for path in after if after[path] != shards[path]} == {damaged}

    splits = load_splits(config, run, "train")
    plan = build_plan(config, splits)
    step = assemble_step(config, assemble_engine(config, run, CPU, True), plan, splits, CPU, table)
    for part in range(2):
        batch = step.batch(plan.names, 1, part)
        said = step.said(batch, 1, part)
        assert said.keys() == {TEACHERS} and said[TEACHERS].keys() == {"sst", "sts"}
        own = plan.rows("sts", 1)[part * 4 : part * 4 + 4]
        assert torch.equal(said[TEACHERS]["sts"], table["sts"][own])
    assert TEACHER not in said and step(0).skipped is None


def test_a_run_learns_from_them_from_the_command_line(teachers, tmp_path):
    words = student(tmp_path / "run", teachers, "--losses", "sts=cosent", "--rdrop-weight", "0", "1", "0")
    assert main(["train", *words, "--aggregator", "pcgrad"]) == 0
    first, *_ = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # At the first step all that counts is how far models lie apart that know little yet; a cross entropy would be 1.6.
    assert first["loss/sst"] < 0.8 and first["loss/quora"] > 0.5
    config = RunFolder(tmp_path / "run").read_config()
    assert len(settings(config)["teachers"]) == 2 and str(tmp_path) not in json.dumps(settings(config)["teachers"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "quora"], "can teach nothing: it was trained on sts, sst, and this run is on quora"),
        (["--teachers", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_teachers_that_can_teach_nothing_are_refused(teachers, tmp_path, capsys, more, message):
    assert main(["train", *student(tmp_path / "run", teachers[:1], *more)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_cache_is_of_one_model_and_encoding(teachers, tmp_path):
    caches = {OutputCache(tmp_path, run, SST).folder for run in teachers} | {
        OutputCache(tmp_path, teachers[0], STS).folder
    }
    assert len(caches) == 3
    cache = OutputCache(tmp_path, teachers[0], SST)
    assert cache.read() == {}
    rows = {bytes([number] * 16): torch.randn(5) for number in range(4)}
    cache.add(list(rows), torch.stack(list(rows.values())))
    found = OutputCache(tmp_path, teachers[0], SST).read()
    assert found.keys() == rows.keys() and all((found[key] == rows[key].numpy()).all() for key in rows)


def test_options_choose_it(teachers):
    config = parse_run_config(["--teachers", "a", "b", "--distill-share", "0.8", "0.2", "--rdrop-weight", "1"])
    chosen = build_objective(config, 10)
    assert chosen.base == Distilled(supervised, 10, (0.8, 0.2), 1.0)
    assert extension("distilled=a,b", [])[1] == {"teachers": ["a", "b"]}
    with pytest.raises(UserError, match="distilled needs the folders of its teachers"):
        extension("distilled", [])
