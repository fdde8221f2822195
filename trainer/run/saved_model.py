"""The trained model as one file: what evaluation, prediction and export load, in one process, without DeepSpeed."""

import hashlib
import json
import logging
import os
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minbert.data.errors import UserError
from minbert.data.files import replacing, to_json
from minbert.data.sequences.tokens import Tokenizer, load_tokenizer
from minbert.trainer.checkpoint.format import Damaged, Manifest, folder_name, read_manifest, verify
from minbert.trainer.checkpoint.shards import open_shards
from minbert.trainer.config import RunConfig
from minbert.trainer.engine.copies import AVERAGE
from minbert.trainer.engine.parts import Part
from minbert.trainer.model.memory import require_memory
from minbert.trainer.model.multitask import MultitaskModel, head_part
from minbert.trainer.model.weights import read_config, save_checkpoint
from minbert.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)

NO_DIGEST = "0" * 64  # in the place of the SHA-256 while that is computed


def save_model(path: Path, state: dict[str, Tensor], step: int, scores: dict[str, float]) -> None:
    """Write parameters with the step and the dev scores they had, replacing the file at once. Raises OSError.

    The file's metadata hold the SHA-256 of all of it, in which the digest itself counts as zeros: one file, so that no
    kill can part it from its digest.
    """
    metadata = {"step": str(step), "scores": to_json(scores), "sha256": NO_DIGEST}
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, metadata)
    digest = hashlib.sha256(content).hexdigest()
    with replacing(path) as temporary:
        # Not save_file: its errors do not say what the system said, such as that the disk is full.
        temporary.write_bytes(content.replace(NO_DIGEST.encode(), digest.encode(), 1))


def save_best(run: RunFolder, config: RunConfig, state: dict[str, Tensor], step: int, scores: dict) -> None:
    """Write the best model to its file; of a run that only pretrains, a folder for `--model`, too. Raises OSError."""
    save_model(run.best_model, state, step, scores)
    if all(task.kind == "masked_lm" for task in config.corpus.tasks):
        head = f"{head_part(config.corpus.names[0])}."
        bert, decoder = (
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            for prefix in ("bert.", head)
        )
        save_checkpoint(run.pretrained, read_config(run.encoder), bert, run.encoder, decoder)


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and metadata of such a file. Raises Damaged if it is not as it was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        digest, blank = metadata["sha256"].encode(), NO_DIGEST.encode()
        intact = hashlib.sha256(content.replace(digest, blank, 1)).hexdigest().encode() == digest
        if intact:
            return load(content), metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        raise Damaged(f"{path} is not whole") from None
    raise Damaged(f"{path} is not as it was written (its SHA-256 differs)")


def read_weights(checkpoint: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """A checkpoint's parameters, whole: those that are evaluated, so averaged where it has them. Raises Damaged."""
    manifest = read_manifest(checkpoint)
    if damage := verify(checkpoint, manifest):
        raise Damaged(damage[0])
    state = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
    with open_shards(checkpoint / name for name in manifest.files if name.endswith(".safetensors")) as shards:
        for name, tensor in state.items():
            averaged = AVERAGE in manifest.copies and shards.holds("exp_avg", name)  # what is frozen is its own average
            shards.fill(Part(name, 0, {AVERAGE if averaged else "weight": tensor.view(-1)}, replicated=True))
    return manifest, state


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
    state, described = best_weights(run)
    model = build_model(run.read_config(), run)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{run.best_model} does not fit the run's model: {error}") from None
    return model.to(device).eval(), load_tokenizer(run.encoder), described


def best_weights(run: RunFolder) -> tuple[dict[str, Tensor], dict]:
    """Parameters of the best model and {"step", "scores"}; where its file is damaged, from the checkpoint of its step.
    Raises UserError."""
    try:
        state, metadata = read_model(run.best_model)
        return state, {"step": int(metadata["step"]), "scores": json.loads(metadata["scores"])}
    except Damaged as problem:
        damage = problem
    evaluations = [record for record in run.read_metrics() if record.get("dev/overall") is not None]
    best = max(evaluations, key=lambda record: record["dev/overall"], default={"step": 0})  # the first of equals
    checkpoint = run.checkpoints / folder_name(best["step"])
    try:
        state = read_weights(checkpoint)[1]
    except Damaged:
        if not run.best_model.exists():
            raise UserError(
                f"{run.path} holds no trained model yet: the first evaluation writes best.safetensors"
            ) from None
        raise UserError(
            f"{damage}, and no intact checkpoint of its step, {best['step']}, is kept (--keep-best would keep it).\n"
            "Restore it from a copy, or write the newest checkpoint's model in its place: "
            f"minbert checkpoint convert {shlex.quote(str(run.path))} {shlex.quote(str(run.best_model))}"
        ) from None
    log.warning("%s; %s, which holds the same weights, is used instead", damage, checkpoint.name)
    scores = {name.removeprefix("dev/"): value for name, value in best.items() if name.startswith("dev/")}
    return state, {"step": best["step"], "scores": scores}
