"""What a translation depends on besides its text: the models' contents, the languages, the decoding and the variant."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property

RECIPE_FOLDER = re.compile(r".+-\d+-[0-9a-f]{16}")  # as `Recipe.folder` makes it


@dataclass(frozen=True)
class Decoding:
    """Beam search with `beam` beams, or, where `sample` is set, draws from the `top_k` most probable words at
    `temperature`, a pure function of `seed`, variant and the texts that are translated together."""

    beam: int = 5
    sample: bool = False
    top_k: int = 10
    temperature: float = 1.0
    seed: int = 0

    @property
    def decisive(self) -> dict[str, int | float | bool]:
        """What of it matters: a beam search has no temperature."""
        return {name: value for name, value in asdict(self).items() if (name == "beam") != self.sample}


@dataclass(frozen=True)
class Recipe:
    """One way from `language` through `pivot` and back. `model`: as the user named it; `revisions`: digests of what
    translates there and back, which count in its place."""

    model: str
    revisions: tuple[str, str]
    language: str
    pivot: str
    decoding: Decoding
    variant: int = 0

    @cached_property
    def identity(self) -> dict[str, object]:
        return {
            "revisions": list(self.revisions),
            "language": self.language,
            "pivot": self.pivot,
            "decoding": self.decoding.decisive,
            "variant": self.variant,
        }

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> str:
        """The name of its folder in a store."""
        return f"{self.pivot}-{self.variant}-{self.digest[:16]}"

    @property
    def source(self) -> str:
        """The model as a row names it: `apertium@4f3c9a0be1d2`, of both directions."""
        both = hashlib.sha256("".join(self.revisions).encode()).hexdigest()
        return f"{self.model}@{both[:12]}"
