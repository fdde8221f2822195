"""`minbert pretrain` from outside: what it declares, a model that gets better, and the folder that it leaves."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from known_tasks import MLM, QUORA, SST, STS
from safetensors.torch import load_file
from small_runs import minbert, outside, started
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM
from waiting import until

from minbert.data.batches.layout import Sentences
from minbert.data.sequences.tokens import load_tokenizer
from minbert.data.sources.builtin import builtin_examples
from minbert.launch.commands import pretrain
from minbert.launch.main import main
from minbert.trainer.checkpoint.format import SAVED
from minbert.trainer.options import CorpusConfig
from minbert.trainer.run.data import count_training_examples, load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import load_model

SMALL = ["--model", "tiny", "--train-limit", 400, "--eval-limit", 60, "--batch-size", 16, "--max-length", 48]
SMALL += ["--log-every", 1, "--trackers"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """A text file of the built-in reviews."""
    path = tmp_path_factory.mktemp("texts") / "reviews.txt"
    path.write_text("\n".join(builtin_examples(SST, "train").sentences[0]))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, lines) -> RunFolder:
    """A model pretrained from nothing on a text file."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    words = ["--texts", lines, "--train-limit", 1900, "--steps", 80, "--eval-every", 40]
    said = outside("pretrain", "--run", folder, *SMALL, *words).stdout
    assert f"for transformers: {folder / 'model'}" in said and "predictions" not in said.lower()
    return RunFolder(folder)


def perplexities(run: Path) -> list[float]:
    return [record["dev/mlm"] for record in RunFolder(run).read_metrics() if "dev/mlm" in record]


def test_perplexity_of_held_out_text_falls_far_below_the_vocabulary(pretrained):
    before, after = perplexities(pretrained.path)
    assert after < 0.9 * before and after < AutoTokenizer.from_pretrained(pretrained.pretrained).vocab_size / 3
    assert not pretrained.predictions.exists()


def test_the_folder_holds_the_best_model_for_transformers(pretrained):
    ours, _, _ = load_model(pretrained, torch.device("cpu"))
    theirs = AutoModel.from_pretrained(pretrained.pretrained).eval()
    inputs = AutoTokenizer.from_pretrained(pretrained.pretrained)(
        ["the film is dull", "a warm and clever comedy , again"], padding=True, return_tensors="pt"
    )
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state
        sentences = Sentences.from_padded(inputs["input_ids"], inputs["attention_mask"])
        layout, found = sentences.layout, ours.bert(sentences)
    assert mask.sum() == len(found)
    torch.testing.assert_close(found, expected[layout.sequence, layout.position], atol=2e-5, rtol=0)
    decoder = BertForMaskedLM.from_pretrained(pretrained.pretrained).cls.predictions
    assert torch.equal(decoder.bias, ours.heads["mlm"].bias) and decoder.bias.abs().max() > 0


def test_other_runs_take_the_folder(pretrained, tmp_path, capsys):
    """For the tasks, and to go on from it, which has the head."""
    common = ["--model", pretrained.pretrained, "--eval-limit", 40, "--steps", 1, "--trackers"]
    capsys.readouterr()
    assert minbert("train", "--run", tmp_path / "tasks", *common, "--train-limit", 100, "--tasks", "sst") == 0
    assert "start at random" not in "".join(capsys.readouterr())
    assert (tmp_path / "tasks" / "encoder" / "vocab.txt").read_bytes() == (
        pretrained.pretrained / "vocab.txt"
    ).read_bytes()
    words = ["--batch-size", 4, "--max-length", 48, "--lr", 1e-9]
    assert minbert("pretrain", "--run", tmp_path / "on", *common, *words) == 0
    assert "start at random" not in "".join(capsys.readouterr())
    found, expected = (load_file(run.best_model) for run in (RunFolder(tmp_path / "on"), pretrained))
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


def test_a_run_goes_on_without_the_folder_that_it_began_with(pretrained, tmp_path, capsys):
    """Its checkpoints hold the weights, and its own folder the encoder's shape and vocabulary."""
    model, run = shutil.copytree(pretrained.pretrained, tmp_path / "model"), tmp_path / "run"
    common = ["--eval-limit", 40, "--train-limit", 100, "--tasks", "sst", "--trackers"]
    assert minbert("train", "--run", run, "--model", model, *common, "--steps", 1) == 0
    shutil.rmtree(model)
    assert minbert("resume", run, "--steps", 2) == 0
    assert minbert("train", "--run", tmp_path / "new", "--model", model, *common) == 2
    assert f"model folder {model} does not exist" in capsys.readouterr().err


def test_a_checkpoint_without_the_head_starts_it_at_random_and_says_so(minilm, tmp_path, capsys):
    words = [*SMALL, "--model", minilm, "--steps", 1, "--eval-limit", 4]
    assert minbert("pretrain", "--run", tmp_path / "run", *words) == 0
    assert "has no weights for the masked-language-model head: they start at random" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--processes", 2, "--zero-stage", 2]], ids=["alone", "zero 2"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(lines, tmp_path, capfd, more):
    options = [*SMALL, "--texts", lines, "--packed", "--steps", 12, "--eval-every", 4, "--accumulation", 2, *more]
    assert minbert("pretrain", "--run", tmp_path / "whole", *options) == 0
    parts = ["pretrain", "--run", tmp_path / "parts", *options]
    with started(*parts, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        until((tmp_path / "parts" / SAVED).exists, "a checkpoint", process, pause=0.02)
        os.killpg(process.pid, signal.SIGKILL)
    capfd.readouterr()
    assert minbert(*parts) == 0
    assert "Resuming" in capfd.readouterr().out
    assert perplexities(tmp_path / "parts") == perplexities(tmp_path / "whole")
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_same_texts_are_the_same_run_and_others_are_refused(lines, tmp_path, capsys):
    options = list(map(str, ["--run", tmp_path / "run", *SMALL, "--texts", lines, "--steps", 2, "--mask-share", 0.3]))
    assert main(["pretrain", *options]) == 0
    config = RunFolder(tmp_path / "run").read_config()
    (task,) = config.corpus.tasks
    assert task.masking.share == 0.3 and task.texts.files == (lines,) and not task.texts.tasks
    assert (config.batch.batch_size, config.corpus.max_length, config.optimizer.lr) == (16, 48, 1e-3)
    assert main(["pretrain", *options]) == 0 and main(["pretrain", "--run", str(tmp_path / "run")]) == 0
    assert "was finished before" in capsys.readouterr().out
    assert main(["pretrain", *options[:-1], "0.2"]) == 2
    assert "task mlm: masking" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), "--text", "a film"]) == 2
    assert "predicts nothing" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert '"mlm"' in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Perplexity on held-out text" in (tmp_path / "run" / "report.html").read_text()


def test_beside_supervised_tasks_it_has_a_row_in_surgery_and_no_weight_in_the_score(lines, tmp_path):
    declared = {"name": "mlm", "kind": "masked_lm", "weight": 0, "texts": {"files": ["reviews.txt"]}}
    (lines.parent / "aid.yaml").write_text(yaml.safe_dump(declared))
    arguments = ["--tasks", "sst", "sts", lines.parent / "aid.yaml", "--aggregator", "pcgrad", "--steps", 2]
    arguments += ["--smart-weight", 0.1, "--proximal-weight", 0.1]  # which have nothing to say of it
    assert minbert("train", "--run", tmp_path / "run", *SMALL, *arguments) == 0
    run = RunFolder(tmp_path / "run")
    *_, scores = (record for record in run.read_metrics() if "dev/overall" in record)
    assert scores["dev/overall"] == pytest.approx((scores["dev/sst"] + (scores["dev/sts"] + 1) / 2) / 2)
    assert scores["dev/mlm"] > 2 and any("weight/mlm" in record for record in run.read_metrics())
    assert '"mlm"' in run.gramians_file.read_text()
    assert {path.name for path in run.predictions.glob("*.csv")} == {
        f"{task}-{split}-output.csv" for task in ("sst", "sts") for split in ("dev", "test")
    }
    assert not run.pretrained.exists()
    assert count_training_examples(run.read_config(), "mlm") == 400
    everything = run.read_config().model_copy(update={"corpus": CorpusConfig(tasks=(str(lines.parent / "aid.yaml"),))})
    tokenised = load_split(everything, "mlm", "train", load_tokenizer(run.encoder))
    assert count_training_examples(everything, "mlm") == len(tokenised) > 1900


def test_what_the_options_declare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"texts": (Path("a.txt"), Path("b.txt")), "dev_texts": (Path("c.txt"),)}
    task = pretrain.declare(files | {"single_pieces": True, "held_out": 0.1}, {})
    assert task.texts.files == (tmp_path / "a.txt", tmp_path / "b.txt") and task.texts.dev == (tmp_path / "c.txt",)
    assert task.texts.held_out == 0.1 and not task.texts.tasks and not task.masking.whole
    both = pretrain.declare({"texts": (Path("a.txt"),), "text_splits": ("train", "dev")}, {"tasks": ("sts",)})
    assert both.texts.tasks == (STS,) and both.texts.splits == ("train", "dev") and both.masking.whole
    assert pretrain.declare({}, {}).texts.tasks == (SST, QUORA, STS)
    (tmp_path / "aid.yaml").write_text("{name: aid, kind: masked_lm, texts: {tasks: [sts]}}")
    assert pretrain.declare({}, {"tasks": ("aid",), "task_folder": tmp_path}).name == "aid"


def test_a_new_run_has_defaults_of_its_own_unless_something_is_said(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("batch:\n  batch_size: 8\nsteps: 5\ntasks: [sts]\n")
    options = ["pretrain", "--run", str(tmp_path / "run"), "--submit", "--dry-run", "--executor", "local"]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: {value}" in shown for name, value in pretrain.DEFAULTS.items()) and "builtin: sst" in shown
    assert main([*options, "--config", str(tmp_path / "own.yaml"), "--max-length", "50"]) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("batch_size: 8", "max_length: 50", "eval_limit: 2000", "steps: 5"))
    assert "builtin: sts" in shown and "builtin: sst" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "ssst"], "there is no task 'ssst'; did you mean 'sst'?"),
        (["--mask-share", "2"], "task mlm: masking.share"),
        (["--tasks", "mlm.yaml", "--packed"], "mlm says itself what its texts are"),
    ],
)
def test_mistakes_are_told(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlm.yaml").write_text(yaml.safe_dump(MLM.model_dump(mode="json")))
    assert main(["pretrain", "--run", str(tmp_path / "run"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_job_is_the_same_run(lines, tmp_path, capsys):
    options = list(map(str, [*SMALL, "--texts", lines, "--steps", 2, "--submit"]))
    shown = tmp_path / "shown"
    assert main(["pretrain", "--run", str(shown), *options, "--dry-run", "--partition", "gpu"]) == 0
    printed = capsys.readouterr().out
    assert "partition: gpu" in printed and "kind: masked_lm" in printed and "max_length: 48" in printed
    assert not shown.exists()
    assert main(["pretrain", "--run", str(tmp_path / "run"), *options, "--executor", "debug"]) == 0
    assert (tmp_path / "run" / "model" / "config.json").exists() and len(perplexities(tmp_path / "run")) == 1
