"""minBERT against transformers.BertModel on the real MiniLM weights, padded and unpadded, values and gradients."""

import json
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from known_tasks import QUORA
from transformers import AutoModel, BertModel, BertTokenizer

from minbert.data.batches.batch import Portion, make_batch
from minbert.data.batches.layout import Sentences
from minbert.data.errors import UserError
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.tokens import load_tokenizer, tokenise
from minbert.data.sources.examples import Examples
from minbert.launch.options import parse_run_config
from minbert.trainer.model.bert import Bert, BertConfig, mean_pool, pool_sides
from minbert.trainer.model.linear import _OneDnnLinear
from minbert.trainer.model.weights import (
    find_checkpoint,
    from_transformers,
    load_weights,
    read_config,
    save_checkpoint,
    to_transformers,
)
from minbert.trainer.run.preparation import prepare

COMMITS = ["a" * 40, "b" * 40]
LENGTHS = [31, 4, 12, 12, 1, 23, 4]
SMALL = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)


@pytest.fixture(scope="module")
def ours(minilm):
    bert = Bert(read_config(minilm))
    assert load_weights(bert, minilm) == []
    return bert.eval()


@pytest.fixture(scope="module")
def reference(minilm):
    return BertModel.from_pretrained(minilm, attn_implementation="eager").eval()


def padded_inputs(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, 20_000, mask.shape, generator=generator) * mask
    types = torch.randint(0, 2, mask.shape, generator=generator) * mask
    return ids, mask, types


def laid_out(ids: np.ndarray, lengths: list[int]) -> Sentences:
    return Sentences.lay(Ragged(ids, ends([np.array(lengths)])), np.zeros_like(ids))


@pytest.mark.parametrize("lengths", [LENGTHS, [17] * 5, [128, 2]], ids=["padded", "unpadded", "long"])
def test_hidden_states_and_pooled_output_equal_transformers(ours, reference, lengths):
    ids, mask, types = padded_inputs(lengths)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, token_type_ids=types)
        hidden, pooled = ours.forward_padded(ids, mask, types)
    real = mask.bool()
    torch.testing.assert_close(hidden[real], expected.last_hidden_state[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=0)
    assert not hidden[~real].any()


@pytest.mark.parametrize("grouped", [True, False], ids=["by length", "padded attention"])
def test_gradients_equal_transformers(ours, reference, grouped):
    ids, mask, types = padded_inputs(LENGTHS, seed=1)
    weights = torch.randn(len(LENGTHS), 384, generator=torch.Generator().manual_seed(2)) / 10
    reference.zero_grad()
    expected = reference(ids, attention_mask=mask, token_type_ids=types)
    ((expected.last_hidden_state[:, 0] * weights).mean() + (expected.pooler_output * weights).mean()).backward()

    ours.zero_grad()
    sentences = Sentences.from_padded(ids, mask, types)
    if not grouped:
        sentences = replace(sentences, layout=sentences.layout.in_one())
    cls = ours(sentences)[sentences.layout.starts]
    ((cls * weights).mean() + (ours.pooler(cls) * weights).mean()).backward()

    theirs = from_transformers({name: p.grad for name, p in reference.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5, rtol=0, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3


def test_second_derivatives_of_the_linear_layer():
    """As a gradient penalty, influence functions or Hessian-vector products need them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((7, 5), (3, 5), (3,))]

    def derivatives(function):
        gradients = torch.autograd.grad(function(*tensors).tanh().square().sum(), tensors, create_graph=True)
        return gradients, torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), tensors)

    for found, expected in zip(derivatives(_OneDnnLinear.apply), derivatives(F.linear), strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
@settings(max_examples=40)
def test_sentences_do_not_see_each_other(lengths, seed):
    """Each sentence's hidden states are those it has alone, in either way of attending."""
    torch.manual_seed(seed)
    bert = Bert(SMALL).double().eval()
    ids = np.random.default_rng(seed).integers(5, 60, sum(lengths))
    together = laid_out(ids, lengths)
    with torch.no_grad():
        alone = [bert(laid_out(part, [len(part)])) for part in np.split(ids, np.cumsum(lengths)[:-1])]
        for layout in (together.layout, together.layout.in_one()):
            hidden = bert(replace(together, layout=layout))
            for number, expected in enumerate(alone):
                own = hidden[layout.starts[number] : layout.starts[number] + lengths[number]]
                torch.testing.assert_close(own, expected, atol=1e-12, rtol=0)
            means = torch.stack([part.mean(0) for part in alone])
            torch.testing.assert_close(mean_pool(hidden, layout), means, atol=1e-12, rtol=0)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    bert = Bert(SMALL)
    sentence = laid_out(np.arange(5, 11), [6])
    assert not torch.equal(bert(sentence), bert(sentence))
    bert.eval()
    assert torch.equal(bert(sentence), bert(sentence))


def test_export_loads_in_transformers_with_the_same_outputs(ours, minilm, tmp_path):
    save_checkpoint(tmp_path, ours.config, ours.state_dict(), minilm)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    ids, mask, _ = padded_inputs(LENGTHS)
    with torch.no_grad():
        hidden, pooled = ours.forward_padded(ids, mask)
        expected = loaded(ids, attention_mask=mask)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[mask.bool()], expected.last_hidden_state[mask.bool()], atol=1e-5, rtol=0)


def test_weights_survive_the_round_trip(ours, reference):
    raw = reference.state_dict()
    back = to_transformers(from_transformers(raw))
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in raw.items() if name != "embeddings.position_ids"
    }
    assert all(torch.equal(raw[name], tensor) for name, tensor in back.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_other_architectures_are_refused(minilm, tmp_path, change, message):
    raw = json.loads((minilm / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


@pytest.fixture
def hub(minilm, tmp_path, monkeypatch) -> Callable[[str], None]:
    """The hub's cache on a machine without network, with two commits of a model; a function moves its main branch."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--somebody--bert"
    for folder in ("snapshots", "refs"):
        (repository / folder).mkdir(parents=True)
    for commit in COMMITS:
        (repository / "snapshots" / commit).symlink_to(minilm, target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    move = (repository / "refs" / "main").write_text
    move(COMMITS[0])
    return move


def test_weights_of_the_hub_are_those_that_the_run_was_prepared_with(hub, tmp_path):
    """A push to the hub between the start of two processes, or before resuming, changes nothing."""
    text = f"--model somebody/bert --train-limit 20 --eval-limit 10 --trackers --run {tmp_path / 'run'}"
    assert prepare(parse_run_config(text.split())).read_config().encoder.revision == COMMITS[0]
    hub(COMMITS[1])
    run = prepare(parse_run_config(text.split()))
    config = run.read_config()
    assert config.encoder.revision == COMMITS[0]
    assert find_checkpoint(config.encoder.model, config.encoder.revision).name == COMMITS[0]
    other = prepare(parse_run_config([*text.split(), "--revision", "main", "--run", str(tmp_path / "other")]))
    assert other.read_config().encoder.revision == COMMITS[1]
    with pytest.raises(UserError, match="'somebody/bert', revision v2, is no folder here and could not be had"):
        find_checkpoint("somebody/bert", "v2")


def test_missing_weights_are_named(minilm, tmp_path, ours):
    (tmp_path / "config.json").write_bytes((minilm / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_weights(Bert(read_config(tmp_path)), tmp_path)
    state = {name: tensor for name, tensor in ours.state_dict().items() if "layers.3." not in name}
    torch.save(
        {f"bert.{name}": tensor for name, tensor in to_transformers(state).items()}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match=r"lacks the weights layers\.3"):
        load_weights(Bert(read_config(tmp_path)), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_named(minilm, tmp_path, ours, name):
    (tmp_path / "config.json").write_bytes((minilm / "config.json").read_bytes())
    if name == "pytorch_model.bin":
        torch.save(to_transformers(ours.state_dict()), tmp_path / name)
    else:
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    for size in (10**6, 100, 0):
        os.truncate(tmp_path / name, size)
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            load_weights(Bert(read_config(tmp_path)), tmp_path)


def test_joint_pairs_are_encoded_as_by_transformers(ours, reference, minilm):
    """Texts to hidden states, with sentences cut and not, in both orders."""
    pairs = [
        ("A man is playing a guitar.", "Somebody plays an instrument"),
        ("short", "a much longer sentence that will have to be cut, " * 4),
        ("the first of two long sentences " * 5, "and the second " * 9),
    ]
    columns = tuple(list(column) for column in zip(*pairs))
    examples = Examples(QUORA, "test", "", ["0", "1", "2"], columns, None)
    split = tokenise(examples, load_tokenizer(minilm), 24, joint=True)
    batch = make_batch({"quora": split}, {"quora": Portion.whole(np.arange(3))})
    tokenizer = BertTokenizer.from_pretrained(minilm)
    layout = batch.sentences.layout
    with torch.no_grad():
        hidden = ours(batch.sentences)
        sides = pool_sides(hidden, layout, batch.sentences.token_type_ids)
        for number, (first, second) in enumerate([*pairs, *((b, a) for a, b in pairs)]):
            inputs = tokenizer(first, second, truncation="longest_first", max_length=24, return_tensors="pt")
            expected = reference(**inputs)
            own = hidden[layout.sequence == number]
            torch.testing.assert_close(own, expected.last_hidden_state[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(ours.pooler(own[:1]), expected.pooler_output, atol=1e-5, rtol=0)
            types = inputs["token_type_ids"][0]
            means = torch.stack([expected.last_hidden_state[0][types == side].mean(0) for side in (0, 1)])
            torch.testing.assert_close(sides[:, number], means, atol=1e-5, rtol=0)
