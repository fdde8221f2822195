"""Texts into a pivot language and back, through EasyNMT, which sorts them by length and cuts them into batches."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from minbert.data.augmentation.apertium import Apertium
from minbert.data.augmentation.neural import NeuralModels
from minbert.data.augmentation.recipe import Decoding, Recipe
from minbert.data.augmentation.store import Translation
from minbert.data.errors import UserError


class Model(Protocol):
    """A translator that can be found by its name, asked for its revision, and opened for EasyNMT."""

    name: str
    samples: bool  # whether it can draw at random
    on_gpu: bool  # whether it computes there, if there is one

    def revision(self, source: str, target: str) -> str: ...

    def open(self) -> Any: ...


def find_model(word: str, language: str) -> Model:
    """`apertium`, or a neural translator by any of its names."""
    return Apertium(language) if word == Apertium.name else NeuralModels(word)


def recipes(model: Model, language: str, pivots: Sequence[str], decoding: Decoding, variants: int) -> list[Recipe]:
    """A recipe for each pivot and variant. Raises UserError if a model is missing, or all variants would be one."""
    if decoding.sample and not model.samples:
        raise UserError(f"--sample: {model.name} works by rules and cannot draw; more pivots give more variants")
    if variants > 1 and not decoding.sample:
        raise UserError("--variants needs --sample: a beam search gives the same each time; or give more pivots")
    if language in pivots or len(set(pivots)) < len(pivots):
        raise UserError(f"--pivot {' '.join(pivots)}: give each once, and not the language itself, {language}")
    found = []
    for pivot in pivots:
        revisions = model.revision(language, pivot), model.revision(pivot, language)
        found += [Recipe(model.name, revisions, language, pivot, decoding, variant) for variant in range(variants)]
    return found


class RoundTrip:
    """A model at work on one device. Raises UserError if EasyNMT is not installed."""

    def __init__(self, model: Model, device: str = "cpu", batch_size: int = 32):
        try:
            from easynmt import EasyNMT
        except ImportError:
            raise UserError("back translation needs EasyNMT: pip install 'minbert[translate]'") from None
        for noisy in ("transformers", "easynmt"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self.translator = model.open()
        self.engine = EasyNMT(translator=self.translator, device=device)
        self.batch_size = batch_size if model.on_gpu else 1024  # rules gain nothing from batches

    def __call__(self, texts: Sequence[str], recipe: Recipe) -> dict[str, Translation]:
        there = self._translate(texts, recipe, recipe.language, recipe.pivot)
        back = self._translate(there, recipe, recipe.pivot, recipe.language)
        return {text: Translation(*both) for text, *both in zip(texts, there, back, strict=True)}

    def close(self) -> None:
        self.translator.close()

    def _translate(self, texts: Sequence[str], recipe: Recipe, source: str, target: str) -> list[str]:
        """One leg. What is empty stays so."""
        full = [text for text in texts if text.strip()]
        decoding, options = recipe.decoding, {}
        if decoding.sample:
            import torch

            options = {"do_sample": True, "top_k": decoding.top_k, "temperature": decoding.temperature}
            key = json.dumps([decoding.seed, recipe.variant, source, target, full])
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"))
        found = iter(
            self.engine.translate_sentences(
                full,
                target_lang=target,
                source_lang=source,
                beam_size=1 if decoding.sample else decoding.beam,
                batch_size=self.batch_size,
                **options,
            )
            if full
            else []
        )
        return [" ".join(next(found).split()) if text.strip() else "" for text in texts]
