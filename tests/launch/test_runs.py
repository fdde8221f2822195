"""Runs from outside, through the commands: what they leave, what they refuse, and how they go on."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from known_tasks import TASKS
from safetensors.torch import load_file
from small_runs import CORPUS, await_step, logged, minbert, outside, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoTokenizer
from waiting import PATIENCE

from minbert.data.sources.loading import load_examples
from minbert.launch.commands.rerun import as_words
from minbert.launch.main import main
from minbert.launch.options import job_option_types
from minbert.launch.words import read_options
from minbert.slurm.settings import resolve_settings
from minbert.trainer.run.folder import RunFolder

SMALL = ["--data", CORPUS, "--batch-size", "8", "--log-every", "2"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> RunFolder:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = outside("train", "--run", folder, *SMALL, "--steps", 12, "--eval-every", 6, "--aggregator", "pcgrad")
    assert "Best model, dev" in done.stdout and "Traceback" not in done.stderr
    return RunFolder(folder)


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_run_folder_is_complete(trained):
    names = {path.name for path in trained.path.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "code.diff", "metrics.jsonl", "gramians.jsonl", "encoder", "logs",
        "tensorboard", "checkpoints", "best.safetensors", "predictions",
    }  # fmt: skip
    environment = json.loads((trained.path / "environment.json").read_text())
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(here, capture_output=True, text=True).stdout.strip()
    assert environment["commit"] == (commit or None)  # there is none outside a checkout
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert trained.read_config().optimizer.lr == 1e-3  # resolved, not left open
    assert (trained.logs / "rank-0.log").exists()
    assert len(list(trained.checkpoints.iterdir())) == 2


def test_metrics_are_json_lines_with_rising_steps(trained):
    records = [json.loads(line, parse_constant=pytest.fail) for line in trained.metrics_file.read_text().splitlines()]
    losses = [record["step"] for record in records if "loss/sst" in record]
    assert losses == [2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in records if "dev/overall" in record] == [6, 12]
    for record in records:
        if "loss/sst" in record:
            assert record["grad_norm"] > 0 and record["lr"] > 0
            assert -1 <= record["cosine/sst-sts"] <= 1 and record["weight/quora"] > 0


def test_tensorboard_has_the_scores(trained):
    accumulator = EventAccumulator(str(trained.trackers / "metrics")).Reload()
    scores = {event.step: event.value for event in accumulator.Scalars("dev/overall")}
    expected = {r["step"]: r["dev/overall"] for r in trained.read_metrics() if "dev/overall" in r}
    assert scores == pytest.approx(expected)


def test_evaluate_gives_the_score_of_the_best_model(trained, capsys):
    assert main(["evaluate", str(trained.path), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) >= {"sst", "quora", "sts", "overall"}
    assert scores["overall"] == pytest.approx((scores["sst"] + scores["quora"] + (scores["sts"] + 1) / 2) / 3)


def test_prediction_files_have_the_course_format(trained):
    heads = {"sst": "Predicted_Sentiment", "para": "Predicted_Is_Paraphrase", "sts": "Predicted_Similiary"}
    for task, stem in (("sst", "sst"), ("quora", "para"), ("sts", "sts")):
        for split in ("dev", "test"):
            lines = (trained.predictions / f"{stem}-{split}-output.csv").read_text().split("\n")
            examples = load_examples(CORPUS, TASKS[task], split)
            assert lines[0] == f"id \t {heads[stem]} " and lines[-1] == ""
            rows = [line.split(" , ") for line in lines[1:-1]]
            assert [row[0] for row in rows] == examples.ids
            assert all(row[1].endswith(" ") for row in rows)
            values = [row[1].strip() for row in rows]
            if task == "sst":
                assert set(values) <= {"0", "1", "2", "3", "4"}
            elif task == "quora":
                assert set(values) <= {"0.0", "1.0"}
            else:
                assert all(0 <= float(value) <= 5 for value in values)


def test_export_loads_in_transformers(trained, tmp_path, capsys):
    assert main(["export", str(trained.path), str(tmp_path / "encoder")]) == 0
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    from minbert.trainer.run.saved_model import load_model

    ours, own_tokenizer, _ = load_model(trained, torch.device("cpu"))
    text = "a warm and funny film"
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded["input_ids"][0].tolist() == own_tokenizer.encode([text], 64).ids.tolist()
    with torch.no_grad():
        expected = model(**encoded).last_hidden_state
        hidden, _ = ours.bert.forward_padded(encoded["input_ids"], encoded["attention_mask"])
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    assert main(["export", str(trained.path), str(tmp_path / "encoder")]) == 2  # never over something


def test_predict_text_and_csv_agree(trained, tmp_path, capsys):
    sentences = ["a dull and tedious film", "a dazzling , wonderful film"]
    said = []
    for sentence in sentences:
        assert main(["predict", str(trained.path), "--task", "sst", "--text", sentence]) == 0
        said.append(capsys.readouterr().out.strip())
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv")):
        rows = [f'{n}{delimiter}"{sentence}"' for n, sentence in enumerate(sentences)]
        (tmp_path / name).write_text("\n".join([f"nr{delimiter}sentence", *rows]) + "\n")
        out = tmp_path / f"out-{name}"
        assert (
            main(["predict", str(trained.path), "--task", "sst", "--csv", str(tmp_path / name), "--out", str(out)]) == 0
        )
        lines = out.read_text().splitlines()
        assert lines[0] == f"nr{delimiter}sentence{delimiter}prediction"
        assert [line.split(delimiter)[-1] for line in lines[1:]] == said
    pair = ["predict", str(trained.path), "--task", "sts", "--text", "a man sings", "a man sings"]
    capsys.readouterr()
    assert main(pair) == 0
    assert 0 <= float(capsys.readouterr().out) <= 5


# --- going on ----------------------------------------------------------------------------------------------------


def stopped_after(steps: int, run: Path, arguments: list) -> subprocess.Popen:
    """Start a run and interrupt it once it has logged `steps` steps."""
    process = started("train", "--run", run, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    await_step(run, steps, process)
    process.send_signal(signal.SIGINT)
    process.stdout_text, process.stderr_text = process.communicate(timeout=PATIENCE)
    return process


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, capfd):
    """At ZeRO 3, with a method that has a state; ZeRO 2 is killed in `test_pretrain`, data parallel runs in
    `test_chaos`."""
    budget = [*SMALL, "--steps", 24, "--eval-every", 8, "--processes", 2, "--zero-stage", 3, "--aggregator", "famo"]
    assert minbert("train", "--run", tmp_path / "whole", *budget) == 0
    process = stopped_after(4, tmp_path / "parts", budget)
    assert process.returncode == 75, process.stdout_text + process.stderr_text
    assert f"minbert resume {tmp_path / 'parts'}" in process.stdout_text
    at = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    capfd.readouterr()
    assert minbert("train", "--run", tmp_path / "parts") == 0
    assert f"from step {int(at.name.removeprefix('step-'))}" in capfd.readouterr().out
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    expected, found = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_is_trained_once_more_with_other_options_and_the_code_of_then(trained, tmp_path, capsys):
    """What differs is what was asked for, and the first steps are those of the run."""
    before = trained.config_file.read_bytes()
    done = outside("rerun", trained.path, "--code", "same", "--run", tmp_path / "same", "--steps", 6, "--trackers")
    code = Path(done.stdout.splitlines()[0].removeprefix("Code: "))
    assert (code / "minbert" / "trainer" / "step.py").exists() and f"Run folder: {tmp_path / 'same'}" in done.stdout
    assert trained.config_file.read_bytes() == before
    again, first = RunFolder(tmp_path / "same"), trained.read_config()
    config = again.read_config()
    assert config.budget.steps == 6 and config.trackers == ()
    assert config.model_copy(update={"budget": first.budget, "trackers": first.trackers, "run": first.run}) == first
    for record, expected in zip(again.read_metrics(), trained.read_metrics()):
        if "loss/sst" in record and record["step"] <= 2:  # the learning rate falls faster afterwards
            assert record["loss/sst"] == pytest.approx(expected["loss/sst"], rel=0.05)
    assert main(["rerun", str(trained.path), "--run", str(trained.path)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["rerun", str(trained.path), "--nodes", "2"]) == 2
    assert "add --submit" in capsys.readouterr().err
    job = ["--submit", "--executor", "local", "--job-name", "again", "--dry-run"]
    assert main(["rerun", str(trained.path), "--run", str(tmp_path / "job"), "--lr", "1e-4", *job]) == 0
    shown = capsys.readouterr().out
    assert "job_name: again" in shown and "lr: 0.0001" in shown and not (tmp_path / "job").exists()


def test_a_jobs_settings_are_words_that_read_as_the_same():
    given = ["--time", "8h", "--nodes", "2", "--setup=module load cuda", "--setup=--x", "--qos=low"]
    settings, _ = read_options(job_option_types(), given, "submit")
    saved = json.loads(resolve_settings(settings).model_dump_json())
    again, rest = read_options(job_option_types(), as_words(saved), "submit")
    assert rest == [] and resolve_settings(again) == resolve_settings(settings)


def test_a_dying_process_is_named_and_nothing_is_left(tmp_path, capsys):
    """A method that fails on rank 1 only, and not before it was trained with."""
    (tmp_path / "failing.py").write_text(
        "import os\ncalls = []\ndef method(gramian):\n    calls.append(1)\n"
        "    if os.environ.get('RANK') == '1' and len(calls) > 4: raise RuntimeError('broken on purpose')\n"
        "    return gramian[0] * 0 + 1\n"
    )
    arguments = ["--run", tmp_path / "run", *SMALL, "--steps", 9, "--processes", 2, "--aggregator", "failing:method"]
    done = outside("train", *arguments, code=1, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert "rank 1" in done.stderr.lower() and "broken on purpose" in done.stderr
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "run")], capture_output=True).stdout
    assert main(["why", str(tmp_path / "run")]) == 75  # it can be resumed
    said = capsys.readouterr().out
    assert "rank 1 on " in said and "failed first:" in said and "broken on purpose" in said
    assert "2 processes on " in said and "from step 0" in said
