"""A run whose pairs are joint, through every command that meets pairs."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import CORPUS, minbert
from transformers import AutoModel, BertTokenizer

from minbert.launch.main import main
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import known_shape
from minbert.trainer.run.saved_model import load_model
from minbert.tuning.space import check_space, combination, grid_size, parse_space

PAIR = "a man is playing a very long song", "nobody plays the guitar"
OPTIONS = ["--tasks", "sst", "sts", "quora", "--pair-encoding", "joint", "--trackers", "--log-every", "2"]
SIZE = ["--data", CORPUS, "--steps", "6", "--batch-size", "8", "--max-length", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """Trained by two processes that share gradients and moments."""
    folder = tmp_path_factory.mktemp("joint") / "run"
    assert minbert("train", "--run", folder, *OPTIONS, *SIZE, "--processes", 2, "--zero-stage", 2) == 0
    return RunFolder(folder)


def similarity(run: RunFolder, *pair: str) -> float:
    """What transformers makes of a pair with the exported encoder and the run's head, of both orders."""
    encoder = run.path / "exported"
    if not encoder.exists():
        assert main(["export", str(run.path), str(encoder)]) == 0
    bert, tokenizer = AutoModel.from_pretrained(encoder).eval(), BertTokenizer.from_pretrained(encoder)
    head = load_model(run, torch.device("cpu"))[0].heads["sts"]
    with torch.no_grad():
        logits = []
        for first, second in (pair, pair[::-1]):
            inputs = tokenizer(first, second, truncation="longest_first", max_length=16, return_tensors="pt")
            logits.append(head(bert(**inputs).last_hidden_state.mean(1)[None]))
        return float(5 * torch.sigmoid(torch.stack(logits).mean()))


def test_free_text_in_either_order_is_as_transformers_has_it(run, capsys):
    answers = []
    for pair in (PAIR, PAIR[::-1]):
        assert main(["predict", str(run.path), "--task", "sts", "--text", *pair]) == 0
        answers.append(capsys.readouterr().out.strip())
    assert answers == [f"{similarity(run, *PAIR):.3f}"] * 2


def test_a_table_and_the_prediction_files_agree(run, tmp_path, capsys):
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["sentence2,sentence1", f"{PAIR[1]},{PAIR[0]}", "b,a"]) + "\n")
    assert main(["predict", str(run.path), "--task", "sts", "--csv", str(table)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1] == f"{PAIR[1]},{PAIR[0]},{similarity(run, *PAIR):.3f}"
    capsys.readouterr()  # what `similarity` has printed
    assert main(["evaluate", str(run.path), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    best = [record for record in run.read_metrics() if "dev/overall" in record][-1]
    own = {name: score for name, score in scores.items() if "/" not in name}  # not those beside accuracy
    assert {name: best[f"dev/{name}"] for name in own} == pytest.approx(own, abs=1e-6)
    lines = (run.predictions / "para-dev-output.csv").read_text().splitlines()[1:]
    assert len(lines) > 50 and {line.split(" , ")[1].strip() for line in lines} <= {"0.0", "1.0"}


def test_the_page_shows_both_sentences(run, tmp_path):
    assert main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "pair_encoding" in page and "similarity-sts" in page


def test_a_run_cannot_switch(run, capsys):
    """Nor can the meaning of an order: both decide what the model was trained on."""
    command = ["train", "--run", str(run.path), *OPTIONS, *SIZE]
    assert main([*command, "--pair-encoding", "siamese"]) == 2
    assert "pair_encoding" in (told := capsys.readouterr().err) and "joint" in told and "siamese" in told
    assert main([*command, "--processes", "1", "--zero-stage", "None"]) == 0


def test_whether_a_pair_is_symmetric_is_part_of_the_run(run, tmp_path, capsys):
    declaration = tmp_path / "sts.yaml"
    raw = (Path(__file__).parents[2] / "data" / "tasks" / "sts.yaml").read_text()
    declaration.write_text(raw.replace("symmetric: true", "symmetric: false"))
    options = [str(declaration) if word == "sts" else word for word in OPTIONS]
    assert main(["train", "--run", str(run.path), *options, *SIZE]) == 2
    assert "task sts: symmetric" in capsys.readouterr().err
    other = tmp_path / "run"
    assert main(["train", "--run", str(other), *options, *SIZE]) == 0
    answers = []
    for pair in (PAIR, PAIR[::-1]):
        capsys.readouterr()
        assert main(["predict", str(other), "--task", "sts", "--text", *pair]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_an_encoder_with_one_token_type_is_refused(run, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in run.encoder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    shape = json.loads((model / "config.json").read_text()) | {"type_vocab_size": 1}
    (model / "config.json").write_text(json.dumps(shape))
    assert main(["train", "--run", str(tmp_path / "run"), "--model", str(model), *OPTIONS, *SIZE]) == 2
    assert "pair_encoding=joint tells the sentences of sts and quora apart by token types" in capsys.readouterr().err


def test_both_encodings_can_be_searched():
    space = check_space(parse_space(["pair_encoding=siamese,joint", "features=baseline,siamese"]), {})
    drawn = [combination(space, number)["pair_encoding"] for number in range(grid_size(space))]
    assert sorted(drawn) == ["joint", "joint", "siamese", "siamese"]


def test_heads_have_the_width_of_what_they_see(run):
    model = load_model(run, torch.device("cpu"))[0]
    width = known_shape(run.read_config()).hidden_size
    assert {name: head.layers[1].in_features for name, head in model.heads.items()} == dict.fromkeys(model.heads, width)
