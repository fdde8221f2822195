"""The folder that `minbert export` writes.

config.json, model.safetensors, tokenizer   the encoder: transformers.AutoModel, and `--model` of another run
heads.json, heads.safetensors               the tasks' heads, for multitask_encoder.py, which lies beside them
modules.json, 1_Pooling, 2_Dense            what makes it a sentence-transformers model
README.md                                   the model card
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minbert.data.files import replacing
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.prediction_files import predicted_tasks
from minbert.trainer.export import multitask_encoder
from minbert.trainer.export.card import model_card
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.model.weights import save_checkpoint
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import load_model


def export_model(run: RunFolder, folder: Path, seeds: Mapping[int, Mapping[str, float]] = {}) -> None:
    """Write the run's best model into an empty folder. `seeds`: scores of runs that differ from it in their seed only,
    for the card. Raises UserError if there is no model yet, and OSError."""
    model, _, described = load_model(run, torch.device("cpu"))
    config = run.read_config()
    decoder = next((head.state_dict() for head in model.decoders.values()), None)
    save_checkpoint(folder, model.bert.config, model.bert.state_dict(), run.encoder, decoder)
    tasks = predicted_tasks(config)
    if tasks:
        heads = {name: head for name, head in model.heads.items() if name not in model.decoders}
        state = {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}
        _write(folder / "heads.safetensors", save({name: tensor.contiguous() for name, tensor in state.items()}))
        _write(folder / "heads.json", _json(_describe(config, heads)))
        shutil.copyfile(multitask_encoder.__file__, folder / "multitask_encoder.py")
    if embeds_sentences(config):
        _write_sentence_transformer(folder, config, model)
    _write(folder / "README.md", model_card(run, config, model, described["scores"], described["step"], seeds).encode())


def embeds_sentences(config: RunConfig) -> bool:
    """Whether a sentence alone has an embedding that was trained: not if all that was trained saw pairs as one."""
    return any(task.kind != "masked_lm" and not config.heads.joins(task) for task in config.corpus.tasks)


def _describe(config: RunConfig, heads: dict[str, nn.Module]) -> dict[str, Any]:
    """heads.json: what the heads take and give."""
    described = {}
    for name, head in heads.items():
        task = config.corpus.task(name)
        matrices = [layer.weight for layer in head.modules() if isinstance(layer, nn.Linear)]
        described[name] = {
            "title": task.title,
            "kind": task.kind,
            "sentences": len(task.sentences),
            "pairs": config.heads.pair_encoding if task.is_pair else None,
            "symmetric": task.symmetric,
            "features": config.heads.features,
            "classes": list(task.classes),
            "range": list(task.range) if task.range else None,
            "head": "cosine" if task.is_cosine else "layers",
            "layers": [matrices[0].shape[1], *(matrix.shape[0] for matrix in matrices)] if matrices else [],
        }
    return {"pooling": config.encoder.pooling, "max_length": config.corpus.max_length, "tasks": described}


def _write_sentence_transformer(folder: Path, config: RunConfig, model: MultitaskModel) -> None:
    """Embeddings as the heads see them: the mean of the hidden states, or that of [CLS] after the pooler, which is a
    dense layer of its own there."""
    width, mean = model.bert.config.hidden_size, config.encoder.pooling == "mean"
    library = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([] if mean else [("2_Dense", "Dense")])]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"{library}.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", _json(listed))
    _write(folder / "sentence_bert_config.json", _json({"max_seq_length": config.corpus.max_length}))
    _write(folder / "config_sentence_transformers.json", _json({"similarity_fn_name": "cosine"}))
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": not mean, "pooling_mode_mean_tokens": mean}
    _write(folder / "1_Pooling" / "config.json", _json(pooling))
    if not mean:
        tanh = "torch.nn.modules.activation.Tanh"
        dense = {"in_features": width, "out_features": width, "bias": True, "activation_function": tanh}
        _write(folder / "2_Dense" / "config.json", _json(dense))
        pooler: dict[str, Tensor] = model.bert.pooler.dense.state_dict()
        state = {f"linear.{name}": tensor.contiguous() for name, tensor in pooler.items()}
        _write(folder / "2_Dense" / "model.safetensors", save(state))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
