"""The weights that all sides of a comparison start from, as a folder that transformers can load, too."""

import tempfile
from pathlib import Path

from minbert.launch.options import parse_run_config
from minbert.trainer.model.bert import Bert, BertConfig
from minbert.trainer.model.weights import find_checkpoint, read_config, save_checkpoint
from minbert.trainer.processes.random_state import seed_everything
from minbert.trainer.run.preparation import prepare

BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)  # BERT-base
BERT_VOCABULARY = 30522


def starting_weights(model: str, data: str, folder: Path) -> Path:
    """The folder of a model that has weights. `tiny` and `bert-base`, a shape, get random ones, in `folder`."""
    if model not in ("tiny", "bert-base"):
        return find_checkpoint(model).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        words = ["--data", data, "--trackers", "--run", f"{scratch}/run", "--cache", f"{scratch}/cache"]
        run = prepare(parse_run_config(words))
        shape = read_config(run.encoder)
        if model == "bert-base":
            # The words are those of the data: how many rows of the embeddings are never used changes no arithmetic.
            shape = BertConfig(vocab_size=max(BERT_VOCABULARY, shape.vocab_size), **BASE)
        seed_everything(0)
        save_checkpoint(folder, shape, Bert(shape).state_dict(), run.encoder)
    return folder
