"""The masked language model equals transformers' on what our batches hide, and its weights go both ways."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from known_tasks import MLM, SST
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, BertForPreTraining
from transformers import BertConfig as TheirConfig

from minbert.data.batches.batch import Batch, Portion, make_batch
from minbert.data.sequences.masking import Masking
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sequences.texts import RowNumbers, TextSplit
from minbert.data.sequences.tokens import SPECIAL_TOKENS, write_vocabulary
from minbert.trainer.evaluation.scoring import overall, score
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.model.weights import load_weights, read_config, save_checkpoint, write_shape
from minbert.trainer.objectives.supervised import predictions, supervised
from minbert.trainer.options import EncoderConfig, HeadsConfig

SIZE = 90
SHAPE = BertConfig(
    vocab_size=SIZE,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LENGTHS = [7, 30, 12, 3, 12, 2, 18]
CLS, SEP, MASK = 2, 3, 4


def texts(lengths: list[int] = LENGTHS) -> TextSplit:
    rng = np.random.default_rng(0)
    rows = [[CLS, *rng.integers(5, SIZE, length - 2), SEP] for length in lengths]
    ids = np.array([token for row in rows for token in row], np.uint16)
    masking = Masking(MASK, np.arange(SIZE) < 5, np.arange(SIZE) % 3 == 0)
    column = Ragged(ids, ends([np.array(lengths)]))
    return TextSplit(RowNumbers(len(rows)), (column,), None, masking=masking, digest="")


def build(*tasks) -> MultitaskModel:
    torch.manual_seed(0)
    model = MultitaskModel(tasks or [MLM], SHAPE, EncoderConfig(), HeadsConfig(head_dropout=0.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of transformers' masked language model, and that model."""
    torch.manual_seed(1)
    theirs = BertForMaskedLM(TheirConfig(**dataclasses.asdict(SHAPE), hidden_act="gelu"))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", theirs.eval()


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch's one task as transformers wants it."""
    layout, part = batch.sentences.layout, batch.tasks["mlm"]
    shape = len(layout), int(layout.lengths.max())
    where = layout.sequence, layout.position
    found = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    found["input_ids"][where], found["attention_mask"][where] = batch.sentences.input_ids, 1
    found["labels"][layout.sequence[part.rows], layout.position[part.rows]] = part.labels
    return found


def mean_loss(model: MultitaskModel, batch: Batch) -> torch.Tensor:
    part = batch.tasks["mlm"]
    return (model(batch, supervised)["mlm"].double() * part.weights).sum() / part.global_size


def test_loss_and_gradients_equal_transformers(checkpoint):
    folder, theirs = checkpoint
    ours, theirs = build(), theirs.double()
    assert load_weights(ours.bert, folder, [ours.heads["mlm"]]) == ["pooler.dense.weight", "pooler.dense.bias"]
    ours = ours.double()
    split, rows = texts(), np.arange(len(LENGTHS))
    batch = make_batch({"mlm": split}, {"mlm": Portion(rows, rows, len(split.encode(rows).labels))})
    assert batch.tasks["mlm"].global_size == len(batch.tasks["mlm"].labels) == int(batch.tasks["mlm"].weights.sum())
    # Where nothing can be hidden there is nothing to learn.
    assert batch.tasks["mlm"].weights[LENGTHS.index(2)] == 0

    # `outputs` are fp32, so the losses behind them are compared.
    hidden = ours.bert(batch.sentences)[batch.tasks["mlm"].rows]
    loss = ours.heads["mlm"](hidden, batch.tasks["mlm"].labels, ours.bert.embeddings.word).mean()
    expected = theirs(**padded(batch)).loss
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    loss.backward()
    expected.backward()
    found = dict(ours.named_parameters())
    predictions_, word = theirs.cls.predictions, theirs.bert.embeddings.word_embeddings
    pairs = {
        "bert.embeddings.word.weight": word.weight,
        "heads.mlm.bias": predictions_.bias,
        "heads.mlm.dense.weight": predictions_.transform.dense.weight,
        "heads.mlm.dense.bias": predictions_.transform.dense.bias,
        "heads.mlm.norm.weight": predictions_.transform.LayerNorm.weight,
        "heads.mlm.norm.bias": predictions_.transform.LayerNorm.bias,
        "bert.layers.0.feed_forward.up.weight": theirs.bert.encoder.layer[0].intermediate.dense.weight,
        "bert.layers.1.attention.output.weight": theirs.bert.encoder.layer[1].attention.output.dense.weight,
        "bert.embeddings.position.weight": theirs.bert.embeddings.position_embeddings.weight,
    }
    for name, their in pairs.items():
        torch.testing.assert_close(found[name].grad, their.grad, atol=1e-12, rtol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_the_loss_of_a_batch_is_the_mean_over_its_hidden_tokens(checkpoint):
    """In fp32, through the objective; and of all batches together, however they are cut up."""
    folder, theirs = checkpoint
    ours, split, rows = build(), texts(), np.arange(len(LENGTHS))
    load_weights(ours.bert, folder, [ours.heads["mlm"]])
    total = len(split.encode(rows).labels)
    whole = make_batch({"mlm": split}, {"mlm": Portion(rows, rows, total)})
    with torch.no_grad():
        expected = theirs(**padded(whole)).loss.double()
        torch.testing.assert_close(mean_loss(ours, whole), expected, atol=2e-6, rtol=0)
        parts = [
            mean_loss(ours, make_batch({"mlm": split}, {"mlm": Portion(some, some, total)}))
            for some in (rows[:3], rows[3:4], rows[4:], rows[:0])
        ]
        torch.testing.assert_close(sum(parts), expected, atol=2e-6, rtol=0)
        assert parts[-1] == 0  # a filler
        # Perplexity is made of the same tokens.
        perplexity = score(MLM, predictions(MLM, ours(whole)["mlm"]), np.zeros(len(rows)))
    assert perplexity == pytest.approx(expected.exp().item(), rel=1e-5)
    assert overall([MLM], {"mlm": perplexity}) == 1 / perplexity


def test_beside_other_tasks_the_outputs_are_those_of_the_task_alone():
    model, split = build(SST, MLM).eval(), texts()
    labelled = TokenisedSplit([str(n) for n in range(4)], (texts([5, 9, 30, 4]).columns), np.arange(4, dtype="f"))
    rows = {"sst": np.arange(4), "mlm": np.array([3, 1, 6, 0])}
    splits = {"sst": labelled, "mlm": split}
    with torch.no_grad():
        together = model(make_batch(splits, {name: Portion.whole(each) for name, each in rows.items()}))
        for name in rows:
            alone = model(make_batch(splits, {name: Portion.whole(rows[name])}))[name]
            torch.testing.assert_close(together[name], alone, atol=1e-5, rtol=0)
    assert together["mlm"].shape == (4, 2) and together["mlm"][:, 1].tolist() == [
        len(split.encode(np.array([row])).labels) for row in rows["mlm"]
    ]


def test_scores_are_held_for_hidden_tokens_only(monkeypatch):
    model, rows = build(), np.arange(len(LENGTHS))
    seen = []
    model.bert.embeddings.word.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    batch = make_batch({"mlm": texts()}, {"mlm": Portion.whole(rows)}, draw=(0, 0))
    model(batch, supervised)
    assert seen == [(sum(LENGTHS), SHAPE.hidden_size), (len(batch.tasks["mlm"].labels), SIZE)]
    assert len(batch.tasks["mlm"].labels) < 0.3 * sum(LENGTHS)


def test_what_is_written_loads_in_transformers_and_here(checkpoint, tmp_path):
    folder, _ = checkpoint
    ours, out = build(), tmp_path / "out"
    write_vocabulary(folder, [*SPECIAL_TOKENS, *(f"word{n}" for n in range(SIZE - 5))])
    save_checkpoint(out, SHAPE, ours.bert.state_dict(), folder, ours.heads["mlm"].state_dict())
    theirs, info = BertForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    assert theirs.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
    assert AutoTokenizer.from_pretrained(out)("word1 word7")["input_ids"] == [CLS, 6, 12, SEP]
    split, rows = texts(), np.arange(len(LENGTHS))
    batch = make_batch({"mlm": split}, {"mlm": Portion(rows, rows, len(split.encode(rows).labels))})
    inputs = padded(batch)
    with torch.no_grad():
        torch.testing.assert_close(
            mean_loss(ours.eval(), batch), theirs.eval()(**inputs).loss.double(), atol=2e-6, rtol=0
        )
        encoder = AutoModel.from_pretrained(out).eval()
        inputs.pop("labels")
        expected = encoder(**inputs)
        hidden, pooled = ours.bert.forward_padded(**inputs)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[mask], expected.last_hidden_state[mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=2e-5, rtol=0)

    again = build()
    assert read_config(out) == SHAPE and load_weights(again.bert, out, [again.heads["mlm"]]) == []
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_checkpoint_without_the_head_says_so_and_old_names_are_known(checkpoint, tmp_path):
    _, theirs = checkpoint
    ours = build()
    before = {name: tensor.clone() for name, tensor in ours.heads["mlm"].state_dict().items()}
    theirs.bert.save_pretrained(tmp_path / "bare")
    missing = load_weights(ours.bert, tmp_path / "bare", [ours.heads["mlm"]])
    assert missing[-1] == "the masked-language-model head"
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.heads["mlm"].state_dict().items())
    assert "the masked-language-model head" not in load_weights(ours.bert, tmp_path / "bare")  # nobody asks for it
    # As Google's checkpoints were converted: gamma and beta, with the head for the next sentence.
    old = BertForPreTraining(theirs.config).state_dict()
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {re.sub(r"LayerNorm\.\w+", lambda found: names[found[0]], name): part for name, part in old.items()}
    (tmp_path / "old").mkdir()
    torch.save(renamed, tmp_path / "old" / "pytorch_model.bin")
    write_shape(tmp_path / "old", SHAPE)
    assert load_weights(ours.bert, tmp_path / "old", [ours.heads["mlm"]]) == []
    assert torch.equal(ours.heads["mlm"].norm.weight, old["cls.predictions.transform.LayerNorm.weight"])
    assert torch.equal(ours.heads["mlm"].bias, old["cls.predictions.bias"])


def test_a_perplexity_is_a_number_whatever_the_model_says():
    endless = score(MLM, torch.tensor([[1e6, 1.0]]), np.zeros(1))
    assert np.isfinite(endless) and np.isfinite(score(MLM, torch.tensor([[float("nan"), 1.0]]), np.zeros(1)))
    assert 0 < overall([MLM], {"mlm": endless}) < 1e-300
    assert score(MLM, torch.zeros(3, 2), np.zeros(3)) == 1.0
