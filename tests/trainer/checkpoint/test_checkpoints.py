"""Checkpoints on disk: what is written is what is read, by anybody; what is not whole is not taken."""

import json
import os
import shutil
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Barrier
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from small_runs import CORPUS, minbert
from torch.distributed import HashStore, TCPStore

from minbert.data.errors import UserError
from minbert.launch.commands import checkpoint as commands
from minbert.trainer.checkpoint.format import (
    MANIFEST,
    Damaged,
    Manifest,
    TrainingState,
    folder_name,
    prune,
    publish,
    published,
    read_manifest,
    set_aside,
    verify,
    write_hashed,
)
from minbert.trainer.checkpoint.resuming import newest_intact, refuse_another
from minbert.trainer.checkpoint.shards import Snapshot, open_shards, owned
from minbert.trainer.engine.parts import Part
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.messages import LostProcess, Messages
from minbert.trainer.processes.random_state import random_state, seed_everything, set_random_state
from minbert.trainer.processes.world import World
from minbert.trainer.run import conversion
from minbert.trainer.run.folder import RunFolder

SMALL = ["--data", CORPUS, "--train-limit", 120, "--eval-limit", 40, "--batch-size", 8]
ALONE = World(0, 1, torch.device("cpu"))


def manifest(step: int, **fields) -> Manifest:
    nothing = dict(positions={}, identity={}, config={}, code={}, shapes={}, files={})
    fields = {"written": "", "processes": 1, "zero_stage": None, "state": TrainingState(step)} | nothing | fields
    return Manifest(step=step, **fields)


def write(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint of two small files."""
    unfinished = folder / f"{folder_name(step)}.unfinished"
    unfinished.mkdir(parents=True)
    files = {name: write_hashed(unfinished / name, [content, name.encode()]) for name in ("a", "b")}
    return publish(unfinished, manifest(step, files=files))


# Tensors by name and range


def state(sizes: list[int]) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"p{n}": {kind: torch.randn(size, generator=generator) for kind in ("weight", "exp_avg")}
        for n, size in enumerate(sizes)
    }


def cut(sizes: list[int], processes: int, replicated: list[bool], tensors) -> list[list[Part]]:
    """Every process's parts: the whole of replicated parameters, of the others a contiguous share, as ZeRO cuts."""
    shares = []
    for rank in range(processes):
        parts = []
        for n, (size, everywhere) in enumerate(zip(sizes, replicated)):
            start, stop = (0, size) if everywhere else (size * rank // processes, size * (rank + 1) // processes)
            own = {kind: tensor[start:stop] for kind, tensor in tensors[f"p{n}"].items()}
            parts.append(Part(f"p{n}", start, own, everywhere))
        shares.append(parts)
    return shares


@settings(max_examples=50)
@given(
    shape=st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.booleans()), min_size=1, max_size=6),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
)
def test_what_some_processes_write_any_others_read(tmp_path_factory, shape, writers, readers):
    """Every value once on disk, and again where it was in memory, whoever held which range before and after."""
    sizes, before, after = zip(*shape)
    tensors, folder = state(sizes), tmp_path_factory.mktemp("shards")
    for rank, parts in enumerate(cut(sizes, writers, before, tensors)):
        snapshot = Snapshot()
        snapshot.take(owned(parts, rank, writers), {f"random/{rank}/torch": torch.tensor([rank], dtype=torch.uint8)})
        write_hashed(folder / f"{rank}.safetensors", snapshot.content())
    stored = [load_file(path) for path in folder.iterdir()]  # the library reads what we write
    values = sum(tensor.numel() for file in stored for key, tensor in file.items() if "/p" in key)
    assert values == 2 * sum(sizes)
    empty = {name: {kind: torch.zeros_like(t) for kind, t in kinds.items()} for name, kinds in tensors.items()}
    with open_shards(folder.iterdir()) as shards:
        for parts in cut(sizes, readers, after, empty):
            for part in parts:
                shards.fill(part)
        assert [int(shards.small(f"random/{rank}/torch")[0]) for rank in range(writers)] == list(range(writers))
    for name, kinds in tensors.items():
        assert all(torch.equal(empty[name][kind], tensor) for kind, tensor in kinds.items())


def test_a_value_that_no_file_holds_is_missed(tmp_path):
    snapshot = Snapshot()
    snapshot.take([Part("p", 0, {"weight": torch.ones(5)}, True), Part("p", 7, {"weight": torch.ones(3)}, True)], {})
    write_hashed(tmp_path / "a.safetensors", snapshot.content())
    with (
        open_shards([tmp_path / "a.safetensors"]) as shards,
        pytest.raises(Damaged, match="weight of p holds 8 of the values 0 to 10"),
    ):
        shards.fill(Part("p", 0, {"weight": torch.zeros(10)}, True))


def test_random_generators_go_on_where_they_were():
    import random

    import numpy as np

    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()]

    seed_everything(5)
    draw()
    kept = random_state()
    expected = [draw(), draw()]
    seed_everything(6)
    set_random_state(kept)
    assert [draw(), draw()] == expected


# Verification


def test_an_intact_checkpoint_verifies(tmp_path):
    path = write(tmp_path, 3)
    found = read_manifest(path)
    assert verify(path, found) == [] and found.step == 3 and published(tmp_path) == [path]


@settings(max_examples=200)
@given(name=st.sampled_from(["a", "b", MANIFEST]), data=st.data())
def test_any_change_to_any_file_is_found(tmp_path_factory, name, data):
    """A bit flipped, bytes cut off or added, or the file gone."""
    path = write(tmp_path_factory.mktemp("changed"), 3)
    content = bytearray((path / name).read_bytes())
    change = data.draw(st.sampled_from(["flip", "cut", "add", "remove"]))
    if change == "remove":
        (path / name).unlink()
    elif change == "cut":
        (path / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])
    elif change == "add":
        (path / name).write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)).replace(b"\n", b"x") + b"x")
    else:
        place = data.draw(st.integers(0, 8 * len(content) - 1))
        content[place // 8] ^= 1 << place % 8
        (path / name).write_bytes(content)
    try:
        found = read_manifest(path)
    except Damaged as damage:
        assert name == MANIFEST and str(path / name) in str(damage)
    else:
        # JSON has spaces between its words that mean nothing: such a change leaves the manifest the same.
        assert (name == MANIFEST and found == read_manifest(write(path.parent, 4)).__class__(**vars(found))) or [
            str(path / name) in problem for problem in verify(path, found)
        ] == [True]


def test_another_version_of_the_format_is_no_damage(tmp_path):
    path = write(tmp_path, 3)
    replace(read_manifest(path), format=99).write(path)
    with pytest.raises(UserError, match="has format 99; this version of minbert reads format 3"):
        read_manifest(path)


def test_the_newest_intact_one_is_taken_and_damaged_ones_are_kept_aside(tmp_path, caplog):
    good, torn, flipped = write(tmp_path, 1), write(tmp_path, 2), write(tmp_path, 3)
    (tmp_path / "step-00000004.0a1b2c3d.unfinished").mkdir()
    (torn / MANIFEST).write_text((torn / MANIFEST).read_text()[:50])
    (flipped / "b").write_bytes(b"wEightsb")
    path, found = newest_intact(tmp_path, ALONE)
    assert path == good and found.step == 1
    assert (
        f"{flipped / 'b'} is not as it was written" in caplog.text and f"{torn / MANIFEST} is not whole" in caplog.text
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {
        good.name,
        f"{torn.name}.damaged",
        f"{flipped.name}.damaged",
    }


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    path = write(tmp_path, 1)
    (path / "a").unlink()
    for said in (f"{path / 'a'} is missing", f"{path}.damaged was set aside before"):
        with pytest.raises(UserError, match=r"no checkpoint in .* is intact") as error:
            newest_intact(tmp_path, ALONE)
        assert said in str(error.value)


def test_an_empty_folder_is_a_run_that_has_not_saved_yet(tmp_path):
    assert newest_intact(tmp_path / "checkpoints", ALONE) is None


def test_a_name_is_given_anew_when_the_past_that_had_it_is_gone(tmp_path):
    write(tmp_path, 3, b"an older life")
    path = write(tmp_path, 3, b"this life")
    assert verify(path, read_manifest(path)) == [] and (path / "a").read_bytes().startswith(b"this")
    first, second = set_aside(path), set_aside(write(tmp_path, 3))
    assert first != second and first.exists() and second.exists()


# Retention


@settings(max_examples=40)
@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True).map(sorted),
    keep=st.integers(1, 3),
    every=st.one_of(st.none(), st.integers(1, 20)),
    best=st.integers(0, 60),
)
def test_retention_keeps_the_newest_the_best_and_every_nth(tmp_path_factory, steps, keep, every, best):
    folder = tmp_path_factory.mktemp("retention")
    for step in steps:
        write(folder, step)
        prune(folder, keep, every, [best])
    left = {int(path.name.partition("-")[2]) for path in published(folder)}
    newest = set(steps[-keep:])
    multiples = {step for step in steps if every and step % every == 0}
    assert left == newest | multiples | ({best} & set(steps))
    assert {path.suffix for path in folder.iterdir()} == {""}


# Other runs' checkpoints


def test_what_differs_is_named_and_can_be_forced_unless_the_weights_do_not_fit(tmp_path):
    saved = manifest(7, identity={"model": {"hidden_size": 128}, "data": {"sst": "9 examples", "sts": "4 examples"}})
    assert refuse_another(tmp_path, saved, saved.identity, force=False) == []
    data = {"model": {"hidden_size": 128}, "data": {"sst": "8 examples", "sts": "4 examples"}}
    line = "data.sst: 9 examples in the checkpoint, 8 examples here"
    with pytest.raises(UserError, match=line):
        refuse_another(tmp_path, saved, data, force=False)
    assert refuse_another(tmp_path, saved, data, force=True) == [line]
    model = data | {"model": {"hidden_size": 256}}
    with pytest.raises(UserError, match=r"model.hidden_size: 128 in the checkpoint, 256 here(.|\n)*do not fit"):
        refuse_another(tmp_path, saved, model, force=True)


# Messages between processes


@pytest.fixture(params=[HashStore, lambda: TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)])
def store(request):
    return request.param()


def together(size: int, work, store, timeout: float = 20.0) -> list:
    """`work` on so many processes, here threads. A connection to a store serves one of them at a time."""
    own = [store.clone() if isinstance(store, TCPStore) else store for _ in range(size)]
    with ThreadPool(size) as pool:
        return pool.map(lambda rank: work(Messages(own[rank], rank, size, timeout), rank), range(size))


def test_values_reach_everybody_in_order(store):
    found = together(3, lambda messages, rank: [messages.exchange("a", rank), messages.share("b", "b0")], store)
    assert found == [[[0, 1, 2], "b0"]] * 3


def test_whoever_is_missing_is_named_to_all(store):
    both = Barrier(2)

    def work(messages: Messages, rank: int) -> str:
        if rank == 2:
            return "missing"
        both.wait()
        with pytest.raises(LostProcess) as error:
            messages.exchange("save/1", rank)
        return str(error.value)

    first, second, _ = together(3, work, store, timeout=3.0)
    assert first.startswith("waited 3 s for rank 2 on ") and first.endswith("(save/1)") and second == first


def test_rank_0_decides_and_damage_that_another_rank_finds_counts(tmp_path, store):
    """Each process verifies its share of the files; all go on from the same checkpoint."""
    write(tmp_path, 1)
    (write(tmp_path, 2) / "b").write_bytes(b"wEightsb")

    def work(messages: Messages, rank: int) -> str:
        return newest_intact(tmp_path, World(rank, 2, torch.device("cpu"), messages))[0].name

    assert together(2, work, store) == ["step-00000001"] * 2


# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert minbert("train", "--run", run, *SMALL, "--steps", 3, "--save-every", 1, "--keep", 3) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def test_list_and_verify_tell_what_there_is(run, capsys):
    assert minbert("checkpoint", "verify", run) == 0
    assert [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        *(f"step-0000000{step}: intact" for step in (1, 2, 3)),
        "best.safetensors: intact",
    ]
    shard = run / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    os.truncate(shard, 1000)
    (run / "checkpoints" / "step-00000001" / MANIFEST).unlink()
    assert minbert("checkpoint", "verify", run) == ExitCode.FAILED
    said = capsys.readouterr().out
    assert f"{shard} has 1,000 bytes instead of" in said and "step-00000003: intact" in said
    assert minbert("checkpoint", "list", run) == 0
    said = capsys.readouterr().out
    assert "1 process" in said and "at 3" in said and "manifest.json is missing" in said
    assert minbert("checkpoint", "verify", run / "checkpoints" / "step-00000003") == 0
    assert "step-00000003: intact" in capsys.readouterr().out


def test_what_a_run_that_goes_on_removes_meanwhile_is_not_damaged(run, tmp_path, monkeypatch, capsys):
    """It keeps the newest checkpoints only, while others list, verify or convert those that were there."""
    checkpoints = run / "checkpoints"

    def goes_on(module: ModuleType, name: str, step: int) -> None:
        """Before `module` reads a checkpoint, the run saves `step`, and removes all others."""
        read = getattr(module, name)

        def interposed(checkpoint: Path) -> object:
            if not (new := checkpoints / folder_name(step)).exists():
                shutil.copytree(published(checkpoints)[-1], new)
                prune(checkpoints, 1, None, ())
            return read(checkpoint)

        monkeypatch.setattr(module, name, interposed)

    goes_on(commands, "read_manifest", 4)
    assert minbert("checkpoint", "verify", run) == 0
    assert "damaged" not in capsys.readouterr().out
    goes_on(commands, "read_manifest", 5)
    assert minbert("checkpoint", "list", run) == 0
    assert "damaged" not in capsys.readouterr().out
    goes_on(conversion, "read_weights", 6)
    assert minbert("checkpoint", "convert", run, tmp_path / "model.safetensors") == 0
    assert load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("checkpoint lst {run}", "has no action 'lst'; did you mean 'list'?"),
        ("checkpoint list {run}/logs", "is not a run folder"),
        ("checkpoint convert {run}/nothing {run}/other", "is no folder"),
        ("checkpoint convert {run}/encoder {run}/../other", "is no DeepSpeed checkpoint"),
        ("checkpoint convert {run} {run}/model.safetensors --steps 3", "what is '--steps'?"),
    ],
)
def test_mistakes_are_explained(run, capsys, command, message):
    assert minbert(*command.format(run=run).split()) == ExitCode.USER_MISTAKE
    assert message in capsys.readouterr().err


def test_force_names_what_it_overrides(run, capsys):
    vocabulary = run / "encoder" / "vocab.txt"
    words = vocabulary.read_text().splitlines()
    vocabulary.write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")  # after [PAD] and the like
    assert minbert("resume", run, "--steps", 4) == ExitCode.USER_MISTAKE
    said = capsys.readouterr().err
    assert "is of another run" in said and "vocabulary.vocab.txt: SHA-256" in said and "data.sst" in said
    assert minbert("resume", run, "--steps", 4, "--lr", 0.5, "--force") == 0
    said = capsys.readouterr()
    assert "overridden by --force: vocabulary.vocab.txt" in said.err and "from step 3 of 4" in said.out
    assert "lr: 0.001 in the folder, 0.5 asked for" in said.err


def test_a_model_of_another_shape_cannot_be_forced(run, capsys):
    shape = run / "encoder" / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"num_hidden_layers": 3}))
    assert minbert("resume", run, "--steps", 4, "--force") == ExitCode.USER_MISTAKE
    assert "model.num_hidden_layers: 2 in the checkpoint, 3 here" in capsys.readouterr().err


def test_two_cannot_train_in_one_folder(run, capsys):
    with RunFolder(run).locked():
        assert minbert("resume", run, "--steps", 4) == ExitCode.USER_MISTAKE
    assert "is being trained by another process" in capsys.readouterr().err


def test_the_last_words_on_the_budget_count(run, capsys):
    """The run was started with --steps 3."""
    assert minbert("resume", run, "--epochs", 0.3) == 0
    assert "from step 3 of" in capsys.readouterr().out
    assert RunFolder(run).read_config().budget.steps is None and RunFolder(run).read_metrics()[-1]["step"] > 3
