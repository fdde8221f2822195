"""The trained model as one file: what evaluation, prediction and export load, in one process, without DeepSpeed."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.data.tokens import Tokenizer, load_tokenizer
from minbert.trainer.config import RunConfig
from minbert.trainer.memory import require_memory
from minbert.trainer.model import MultitaskModel
from minbert.trainer.run_folder import RunFolder
from minbert.trainer.weights import read_config, save_checkpoint


def save_model(path: Path, state: dict[str, Tensor], step: int, scores: dict[str, float]) -> None:
    """Write parameters with the step and the dev scores they had, replacing the file at once. Raises OSError."""
    with replacing(path) as temporary:
        metadata = {"step": str(step), "scores": json.dumps(scores)}
        # Not save_file: its errors do not say what the system said, such as that the disk is full.
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}, metadata))


def build_model(config: RunConfig, run: RunFolder) -> MultitaskModel:
    """The run's model with weights not yet loaded."""
    shape = read_config(run.encoder)
    if config.encoder.encoder_dropout is not None:
        from dataclasses import replace

        dropout = config.encoder.encoder_dropout
        shape = replace(shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    require_memory(config, shape, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return MultitaskModel(config.corpus.tasks, shape, config.encoder, config.heads, config.parallel.precision)


def load_model(run: RunFolder, device: torch.device) -> tuple[MultitaskModel, Tokenizer, dict]:
    """The run's best model in evaluation mode, its tokenizer, and {"step", "scores"}. Raises UserError."""
    if not run.best_model.exists():
        raise UserError(f"{run.path} holds no trained model yet: the first evaluation writes best.safetensors")
    model = build_model(run.read_config(), run)
    with safe_open(run.best_model, framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{run.best_model} does not fit the run's model: {error}") from None
    described = {"step": int(metadata["step"]), "scores": json.loads(metadata["scores"])}
    return model.to(device).eval(), load_tokenizer(run.encoder), described


def export_encoder(run: RunFolder, folder: Path) -> None:
    """Write the best model's encoder and tokenizer as a folder for `transformers.AutoModel.from_pretrained`."""
    model, _, _ = load_model(run, torch.device("cpu"))
    save_checkpoint(folder, model.bert.config, model.bert.state_dict(), run.encoder)
