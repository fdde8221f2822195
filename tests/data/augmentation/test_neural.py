"""Neural translators: EasyNMT's own path over small real Marian models, made here, and the same through CTranslate2."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_marian import SENTENCES, write_models
from waiting import PATIENCE

from minbert.data.augmentation.neural import NeuralModels
from minbert.data.augmentation.recipe import Decoding
from minbert.data.augmentation.round_trip import RoundTrip, find_model, recipes
from minbert.data.errors import UserError

pytest.importorskip("easynmt", reason="EasyNMT is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("marian"))


def round_trip(models: Path, decoding: Decoding, variant: int = 0, batch_size: int = 32, texts=SENTENCES):
    model = find_model(str(models), "en")
    recipe = recipes(model, "en", ["xx"], decoding, variant + 1)[variant]
    return RoundTrip(model, batch_size=batch_size)(texts, recipe)


def test_the_round_trip_is_that_of_the_models_themselves(models):
    from transformers import MarianMTModel, MarianTokenizer

    def translate(direction: str, text: str) -> str:
        folder = str(models / direction)
        tokenizer, model = MarianTokenizer.from_pretrained(folder), MarianMTModel.from_pretrained(folder)
        generated = model.generate(**tokenizer([text], return_tensors="pt"), num_beams=3)
        return " ".join(tokenizer.decode(generated[0], skip_special_tokens=True).split())

    found = round_trip(models, Decoding(beam=3))
    assert list(found) == SENTENCES
    for text, translation in list(found.items())[:3]:
        assert translation.pivot == translate("en-xx", text)
        assert translation.back == translate("xx-en", translation.pivot)
    assert len({translation.pivot for translation in found.values()}) > 1


def test_a_beam_search_does_not_depend_on_the_batches(models):
    assert round_trip(models, Decoding(), batch_size=1) == round_trip(models, Decoding(), batch_size=8)


def test_draws_are_a_function_of_seed_and_variant(models):
    def drawn(seed: int, variant: int):
        return round_trip(models, Decoding(sample=True, top_k=20, seed=seed), variant)

    first = drawn(0, 0)
    assert drawn(0, 0) == first
    assert drawn(1, 0) != first
    assert drawn(0, 1) != first


def test_empty_texts_stay_empty(models):
    assert round_trip(models, Decoding(), texts=["", SENTENCES[0]])[""] == ("", "")


def test_revisions_follow_the_contents(models, tmp_path):
    other = shutil.copytree(models, tmp_path / "copy")
    same = NeuralModels(str(models)).revision("en", "xx")
    assert NeuralModels(str(other)).revision("en", "xx") == same != NeuralModels(str(other)).revision("xx", "en")
    changed = shutil.copytree(models, tmp_path / "changed")
    (changed / "en-xx" / "generation_config.json").write_text("{}")
    assert NeuralModels(str(changed)).revision("en", "xx") != same


def test_a_missing_direction_is_named_with_what_brings_it(models):
    with pytest.raises(UserError, match=r"no model from en to de: .*en-de.*\n.*hf download Helsinki-NLP/opus-mt-en-de"):
        recipes(find_model(str(models), "en"), "en", ["de"], Decoding(), 1)


def test_a_model_for_one_direction_is_refused_for_both(models):
    with pytest.raises(UserError, match="one direction"):
        recipes(find_model(str(models / "en-xx"), "en"), "en", ["xx"], Decoding(), 1)


def test_a_name_of_the_hub_without_a_network(monkeypatch, tmp_path):
    command = [sys.executable, "-m", "minbert.launch.main", "augment", "sts", "--output", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the model Helsinki-NLP/opus-mt-en-zh, which translates en to zh, is not here" in done.stderr
    assert "hf download Helsinki-NLP/opus-mt-en-zh --local-dir models/en-zh" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_vary_is_refused(models):
    with pytest.raises(UserError, match="--variants needs --sample"):
        recipes(find_model(str(models), "en"), "en", ["xx"], Decoding(), 2)
    with pytest.raises(UserError, match="not the language itself"):
        recipes(find_model(str(models), "en"), "en", ["en"], Decoding(), 1)


@pytest.fixture(scope="module")
def converted(models, tmp_path_factory) -> Path:
    if importlib.util.find_spec("ctranslate2") is None:
        pytest.skip("CTranslate2 is not installed")
    folder = tmp_path_factory.mktemp("converted")
    for direction in ("en-xx", "xx-en"):
        files = ["tokenizer_config.json", "vocab.json", "source.spm", "target.spm"]
        command = [
            str(Path(sys.executable).with_name("ct2-transformers-converter")),
            "--model",
            str(models / direction),
        ]
        command += ["--output_dir", str(folder / direction), "--copy_files", *files]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return folder


def test_ctranslate2_translates_as_transformers_does(models, converted):
    """Word for word, where both search greedily; it stops at 256 tokens, the tiny models' generation at 16."""
    expected, found = (round_trip(folder, Decoding(beam=1)) for folder in (models, converted))
    same = sum(ours.pivot.startswith(theirs.pivot[:20]) for ours, theirs in zip(found.values(), expected.values()))
    assert same == len(SENTENCES)


def test_ctranslate2_draws(converted):
    decoding = Decoding(sample=True, top_k=20)
    first, second = (round_trip(converted, decoding, variant) for variant in (0, 1))
    assert first != second
    assert round_trip(converted, decoding, 0) == first


def test_ctranslate2_without_its_tokenizer(converted, tmp_path):
    for direction in ("en-xx", "xx-en"):
        shutil.copytree(converted / direction, tmp_path / direction)
        (tmp_path / direction / "tokenizer_config.json").unlink()
        (tmp_path / direction / "source.spm").unlink()
    with pytest.raises(UserError, match=r"lacks its tokenizer.*\nct2-transformers-converter"):
        round_trip(tmp_path, Decoding())
