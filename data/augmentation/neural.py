"""Neural translators behind EasyNMT's seam: its own AutoModel over Marian, M2M, mBART and NLLB, and CTranslate2.

A translator is named by `opus-mt` (a Marian model per direction, from the hub), a hub name of a model for all
directions, or a folder: of one such model, or with a folder for each direction, DIR/en-zh and DIR/zh-en. Folders need
no network. Whether transformers or CTranslate2 runs a model, its files say.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.reading import read_json

OPUS = "opus-mt"
_HUB = "Helsinki-NLP/opus-mt-{}-{}"
WANTED = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.spm", "*.model", "*.txt"]


class NeuralModels:
    """A translator by the name that the user gave. Raises UserError where something of it is missing."""

    samples = True
    on_gpu = True

    def __init__(self, name: str):
        self.name = name if name == OPUS else Path(name).name

        self.place = name

    def revision(self, source: str, target: str) -> str:
        """SHA-256 of the files that translate from `source` to `target`."""
        return _digest(self.folder(source, target))

    def folder(self, source: str, target: str) -> Path:
        """Where the model for a direction lies; what only the hub has is fetched."""
        if self.place == OPUS:
            return _fetch(_HUB.format(source, target), source, target)
        base = Path(self.place).expanduser()
        if not base.is_dir():
            if self.place.startswith((".", "/", "~")) or self.place.count("/") != 1:
                raise UserError(
                    f"translator {self.place} is no folder, and no name of the hub. Give apertium, opus-mt, a name "
                    "such as facebook/m2m100_418M, or the folder of a model"
                )
            return _fetch(self.place, source, target)
        if (base / "config.json").exists():
            if read_json(base / "config.json").get("model_type") == "marian":
                raise UserError(
                    f"{base} is a Marian model, which translates in one direction: put it and that for the other one "
                    f"into one folder, as {source}-{target} and {target}-{source}, and give that folder"
                )
            return base
        names = [f"{source}-{target}", f"opus-mt-{source}-{target}"]
        for name in names:
            if (base / name / "config.json").exists():
                return base / name
        raise UserError(
            f"{base} has no model from {source} to {target}: it would lie in {base / names[0]} (or {names[1]}).\n"
            + _how_to_get(_HUB.format(source, target), str(base / names[0]))
        )

    def open(self) -> "NeuralTranslator":
        return NeuralTranslator(self.folder)


class NeuralTranslator:
    """The object that EasyNMT calls: a model for each direction, loaded when it is needed."""

    def __init__(self, folder: Callable[[str, str], Path]):
        self.folder = folder
        self._loaded: dict[Path, Any] = {}

    def translate_sentences(
        self, sentences: Sequence[str], source_lang: str, target_lang: str, device: str, **options: Any
    ) -> list[str]:
        folder = self.folder(source_lang, target_lang)
        if folder not in self._loaded:
            self._loaded[folder] = _load(folder)
        try:
            return self._loaded[folder].translate_sentences(
                list(sentences), source_lang=source_lang, target_lang=target_lang, device=device, **options
            )
        except KeyError as error:  # of a tokenizer's table of languages
            raise UserError(
                f"{folder} does not know the language {error}: languages are called as the model calls them, such as "
                "--language en_XX --pivot zh_CN for mBART"
            ) from None

    def close(self) -> None:
        self._loaded.clear()


class CTranslate2Model:
    """A model that CTranslate2's converter wrote, with the tokenizer's files beside it."""

    def __init__(self, folder: Path):
        try:
            import ctranslate2
        except ImportError:
            raise UserError(f"{folder} is a model of CTranslate2: pip install 'minbert[ctranslate2]'") from None
        from transformers import AutoTokenizer

        self.folder, self.library = folder, ctranslate2
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} lacks its tokenizer ({str(error).splitlines()[0]}): convert the model once more with\n"
                "ct2-transformers-converter --model MODEL --output_dir FOLDER --copy_files tokenizer_config.json "
                "vocab.json source.spm target.spm"
            ) from None
        self.translator: Any = None

    def translate_sentences(
        self,
        sentences: Sequence[str],
        source_lang: str,
        target_lang: str,
        device: str,
        beam_size: int = 5,
        do_sample: bool = False,
        top_k: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        if self.translator is None:
            kind, _, index = device.partition(":")
            threads = _threads() if kind == "cpu" else 0
            self.translator = self.library.Translator(
                str(self.folder), device=kind, device_index=int(index or 0), intra_threads=threads
            )
        tokenizer = self.tokenizer
        tokenizer.src_lang = source_lang
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(list(sentences), truncation=True).input_ids]
        prefix = _target_token(tokenizer, target_lang)
        if do_sample:
            import torch

            self.library.set_random_seed(torch.initial_seed() % 2**32)
        results = self.translator.translate_batch(
            tokens,
            target_prefix=[[prefix]] * len(tokens) if prefix else None,
            beam_size=beam_size,
            sampling_topk=top_k if do_sample else 1,
            sampling_temperature=temperature,
        )
        ids = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        return [tokenizer.decode(each, skip_special_tokens=True) for each in ids]


class _AutoModel:
    """EasyNMT's AutoModel, with the token of the target language for tokenizers that no longer have its table."""

    def __init__(self, folder: Path):
        from easynmt.models import AutoModel

        about = folder / "easynmt.json"
        arguments = read_json(about).get("model_args", {}) if about.exists() else {}
        kept = {name: arguments[name] for name in ("lang_map", "tokenizer_args") if name in arguments}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # for raw corpora
                self.model = AutoModel(str(folder), **kept)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{folder} is no model that translates: {str(error).splitlines()[0]}") from None

    def translate_sentences(self, sentences: list[str], target_lang: str, **options: Any) -> list[str]:
        tokenizer = self.model.tokenizer
        if not hasattr(tokenizer, "lang_code_to_id") and (token := _target_token(tokenizer, target_lang)):
            options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(token)
        return self.model.translate_sentences(sentences, target_lang=target_lang, **options)


def _load(folder: Path) -> Any:
    return CTranslate2Model(folder) if (folder / "model.bin").exists() else _AutoModel(folder)


def _target_token(tokenizer: Any, language: str) -> str | None:
    """What a model for many languages is told first; None for one that has a single target."""
    known = set(tokenizer.all_special_tokens)
    return next((token for token in (language, f"__{language}__") if token in known), None)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@lru_cache
def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if path.suffix.lower() in (".md", ".lock", ".msgpack", ".h5", ".ot"):  # of other frameworks, and for people
            continue
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


@lru_cache
def _fetch(name: str, source: str, target: str) -> Path:
    """The folder of a hub name, from the hub's cache if it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except Exception:
        pass  # not here yet
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # the hub's errors have no common base
        folder = f"models/{source}-{target}" if name == _HUB.format(source, target) else "models"
        raise UserError(
            f"the model {name}, which translates {source} to {target}, is not here and could not be had from the hub "
            f"({type(error).__name__}).\n{_how_to_get(name, folder)}"
        ) from None


def _how_to_get(name: str, folder: str) -> str:
    return (
        f"Where there is a network: hf download {name} --local-dir {folder}\n"
        "then copy the folder here and name it by --translator. Without any model there is --translator apertium "
        "--pivot es (apt-get install apertium apertium-eng-spa)."
    )
