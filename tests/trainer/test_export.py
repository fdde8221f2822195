"""Exported folders, loaded by those that they are for: transformers, sentence-transformers, `--model`, and the hub."""

import base64
import importlib.util
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import reset_sessions

import minbert
from minbert.data.sources.examples import Examples
from minbert.launch.main import main
from minbert.trainer.config import parse_config
from minbert.trainer.evaluation.scoring import outputs
from minbert.trainer.export.folder import export_model
from minbert.trainer.model.bert import Bert
from minbert.trainer.model.multitask import Forward
from minbert.trainer.model.weights import load_weights, read_config
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import tokenise_as
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare
from minbert.trainer.run.saved_model import build_model, load_model, save_model

TEXTS = ["a warm , funny and gripping film", "A dull mess!", "the man plays the guitar " * 30]
SCORES = {"sst": 0.41234, "quora": 0.71, "sts": 0.55, "overall": 0.66}
KINDS = {
    "mean": {"train_limit": 300},
    "cls": {"pooling": "cls", "features": "baseline", "hidden_layers": 0, "max_length": 32},
    "cosine": {"losses": ["sts=cosent"]},
    "joint": {"pair_encoding": "joint", "max_length": 16, "hidden_layers": 2, "hidden_size": 24},
    "sides": {"pair_encoding": "joint_sides", "hidden_size": 24},
}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run of each kind, whose best model is the one that it would begin with."""
    made = {}
    for name, options in KINDS.items():
        path = tmp_path_factory.mktemp("runs") / name
        config = parse_config({"run": path, "cache": tmp_path_factory.getbasetemp() / "cache", **options}, "test")
        run = prepare(config)
        torch.manual_seed(3)
        model = build_model(run.read_config(), run)
        for parameter in model.parameters():  # biases of zero would hide that they are lost
            torch.nn.init.normal_(parameter, std=0.05)
        save_model(run.best_model, model.state_dict(), 7, SCORES)
        export_model(run, path.with_name("exported"))
        made[name] = run, path.with_name("exported")
    return made


@pytest.fixture(params=KINDS)
def exported(request, untrained) -> tuple[RunFolder, Path]:
    """The run, and the folder that it was exported to."""
    return untrained[request.param]


def _class_beside(folder: Path):
    """MultitaskEncoder as it lies in the folder."""
    spec = importlib.util.spec_from_file_location("multitask_encoder", folder / "multitask_encoder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MultitaskEncoder


def _split(run: RunFolder, name: str, columns: tuple[list[str], ...]):
    config = run.read_config()
    model, tokenizer, _ = load_model(run, torch.device("cpu"))
    ids = [str(row) for row in range(len(columns[0]))]
    return model, tokenise_as(config, Examples(config.corpus.task(name), "test", "", ids, columns, None), tokenizer)


def test_heads_give_what_the_run_gives(exported):
    run, folder = exported
    loaded = _class_beside(folder).from_pretrained(str(folder))
    for name, about in loaded.tasks.items():
        # The last pair is of two that are too long: who keeps the odd token?
        columns = ([*TEXTS, TEXTS[2]], [*TEXTS[::-1], TEXTS[2]]) if about["sentences"] == 2 else (TEXTS,)
        model, split = _split(run, name, columns)
        with torch.no_grad():
            theirs = loaded(name, list(zip(*columns)) if len(columns) == 2 else TEXTS)
        ours = outputs(model, run.read_config().corpus.task(name), split, World(0, 1, torch.device("cpu")))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert set(loaded.predict("sst", TEXTS)) <= set(run.read_config().corpus.task("sst").classes)
    pair = [(TEXTS[0], TEXTS[1])]
    assert loaded.predict("sts", pair) == pytest.approx(minbert.Run(run.path).predict(pair, "sts").tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["mean", "cls"])
def test_sentence_transformers_pools_as_in_training(untrained, kind):
    from sentence_transformers import SentenceTransformer

    run, folder = untrained[kind]
    model, split = _split(run, "sst", (TEXTS,))
    from minbert.data.batches.batch import Portion, make_batch

    with torch.no_grad():
        batch = make_batch({"sst": split}, {"sst": Portion.whole(torch.arange(len(TEXTS)).numpy())})
        ours = Forward(model, batch).pooled["sst"][0]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_sentence_alone_has_no_embedding_where_all_was_pairs_in_one(tmp_path):
    path = tmp_path / "run"
    run = prepare(parse_config({"run": path, "tasks": ["quora"], "pair_encoding": "joint"}, "test"))
    save_model(run.best_model, build_model(run.read_config(), run).state_dict(), 1, {"quora": 0.5, "overall": 0.5})
    export_model(run, tmp_path / "exported")
    assert not (tmp_path / "exported" / "modules.json").exists()
    assert "no embedding that was trained" in (tmp_path / "exported" / "README.md").read_text()


def test_the_encoder_is_the_start_of_another_run(exported):
    run, folder = exported
    bert = Bert(read_config(folder))
    assert load_weights(bert, folder) == []
    expected, _, _ = load_model(run, torch.device("cpu"))
    torch.testing.assert_close(bert.state_dict(), expected.bert.state_dict())
    again = parse_config({"run": run.path.with_name("again"), "model": str(folder), "max_length": 32}, "test")
    assert prepare(again).encoder.is_dir()


def test_the_card_tells_scores_configuration_and_caveats(untrained):
    run, folder = untrained["mean"]
    card = ModelCard.load(folder / "README.md")
    results = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert results == {"sst": 0.4123, "quora": 0.71, "sts": 0.55}
    text = card.text
    assert "seed 0" in text and "step 7" in text and "train_limit: 300" in text and "The built-in corpus" in text
    assert "SentenceTransformer(" in text and 'predict("sst"' in text
    assert str(run.path) not in text and str(folder) not in text


def test_the_card_tells_how_scores_vary_with_the_seed(untrained, tmp_path, capsys):
    run, _ = untrained["mean"]
    others = [run.path]
    for seed, sst in ((1, 0.4), (2, 0.5)):
        other = RunFolder(tmp_path / f"seed{seed}")
        other.write_config(run.read_config().model_copy(update={"seed": seed, "run": other.path}))
        scores = SCORES | {"sst": sst}
        other.metrics_file.write_text(json.dumps({"step": 1} | {f"dev/{name}": v for name, v in scores.items()}) + "\n")
        others.append(other.path)
    words = ["export", str(run.path), str(tmp_path / "out"), "--seeds"]
    assert main([*words, *map(str, others[1:])]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "seeds 0, 1, 2" in text and "| 0.4123 | 0.4374 ± 0.0545 |" in text
    assert main([*words[:2], str(tmp_path / "again"), "--seeds", str(untrained["cls"][0].path)]) == 2
    assert "differ in their seed only" in capsys.readouterr().err and not (tmp_path / "again").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for. Files come inside the commit, as small ones do."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repository = "someone/encoder"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self._answer({"url": f"{self.server.address}/{repository}", "name": repository})
        if self.path == "/api/validate-yaml":  # of the card's front matter
            return self._answer({"errors": [], "warnings": []})
        if self.path.startswith(f"/api/models/{repository}/preupload/"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [{"path": file["path"]} | how for file in json.loads(body)["files"]]})
        for line in body.splitlines():
            if (entry := json.loads(line))["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer({"commitUrl": "", "commitOid": "0" * 40, "success": True})

    def do_GET(self) -> None:
        self._answer({"id": "someone/encoder", "siblings": []})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files, server.created = f"http://127.0.0.1:{server.server_port}", {}, None
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    # Whatever it was when the client was imported, or last used: it keeps its sessions, those without network too.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset_sessions()
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_uploads_the_folder_to_a_private_repository(untrained, hub, tmp_path, capsys):
    run, _ = untrained["mean"]
    assert main(["export", str(run.path), str(tmp_path / "out"), "--push", "someone/encoder"]) == 0
    assert hub.created["name"] == "encoder" and hub.created["private"] is True
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert hub.files == {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in files}
    assert "someone/encoder" in capsys.readouterr().out


def test_push_without_a_network_leaves_the_folder_and_says_how_to_go_on(untrained, monkeypatch, tmp_path, capsys):
    run, _ = untrained["mean"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", str(run.path), str(tmp_path / "out"), "--push", "someone/encoder"]) == 2
    said = capsys.readouterr().err
    assert "needs the network and a login" in said and f"hf upload someone/encoder {tmp_path / 'out'}" in said
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_push_refuses_a_name_before_it_writes(untrained, tmp_path, capsys):
    run, _ = untrained["mean"]
    assert main(["export", str(run.path), str(tmp_path / "out"), "--push", "some one/a/b"]) == 2
    assert "--push some one/a/b" in capsys.readouterr().err and not (tmp_path / "out").exists()
