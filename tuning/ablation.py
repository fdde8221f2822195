"""An ablation: which extensions of the baseline there are, and which combinations of them are trained.

An extension is a named change of the configuration. Variants are sets of extensions, named by them in the paper's
order, so a set that several groups ask for is trained once.

ablation.yaml            baseline, variants, groups, seeds
runs/VARIANT/seed-N/     the run folders, each with its trial.json
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from minbert.data.differences import differences, refuse
from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.trainer.config import parse_config
from minbert.trainer.surgery.methods import METHODS
from minbert.tuning.search import Resources, read_as
from minbert.tuning.space import Parameters, read_value
from minbert.tuning.trial import Trial, read_trials

ABLATION_FILE = "ablation.yaml"
BASELINE = "baseline"

# The paper's baseline: sentence embeddings side by side, one hidden layer, the encoder frozen.
PAPER_BASELINE: Parameters = {"features": "baseline", "hidden_layers": 1, "freeze": "encoder", "aggregator": "sum"}

# The paper's extensions in its order; an aggregator's name is one more, after these.
EXTENSIONS: dict[str, Parameters] = {
    "siamese": {"features": "siamese"},
    "two_hidden_layers": {"hidden_layers": 2},
    "unfrozen": {"freeze": "none"},
}
DEFAULT = (*EXTENSIONS, "pcgrad")

GROUPS = ("alone", "added", "left_out", "named")
TITLES = {
    "alone": "Each extension alone",
    "added": "Added one after the other",
    "left_out": "Left out one at a time",
    "named": "Named combinations",
}


class Ablation(BaseModel):
    """What `ablation.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    baseline: Parameters
    extensions: dict[str, Parameters]  # in the order in which they are added
    variants: dict[str, Parameters]  # name -> how it differs from the baseline
    groups: dict[str, list[str]]  # alone, added, left_out, named -> variants
    seeds: list[int]
    resources: Resources = Resources()

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / ABLATION_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def read(cls, folder: Path) -> "Ablation":
        """Raises UserError where there is none."""
        if not (folder / ABLATION_FILE).exists():
            raise UserError(f"{folder} is not an ablation: it has no {ABLATION_FILE}")
        return read_as(cls, folder / ABLATION_FILE)

    def options(self, trial: Trial) -> Parameters:
        """All options of a trial's run but its folder."""
        return self.baseline | self.variants[trial.variant] | {"seed": trial.seed}

    def check(self) -> None:
        """Raises UserError if a variant's configuration would be refused."""
        for name, change in self.variants.items():
            parse_config(self.baseline | change | {"seed": max(self.seeds)}, name)

    def trials(self, folder: Path) -> list[Trial]:
        """Every variant with every seed; all variants of a seed before the next seed."""
        there = {trial.name: trial for trial in read_trials(folder / "runs", "*/*")}
        trials = []
        for seed in self.seeds:
            for variant, change in self.variants.items():
                name, place = f"{variant},seed={seed}", folder / "runs" / variant / f"seed-{seed}"
                trial = there.get(name) or Trial(place, name, 0, dict(change), variant=variant, seed=seed)
                trial.number = len(trials)
                trials.append(trial)
        return trials


def extension(word: str) -> tuple[str, Parameters]:
    """Name and change of what `word` names: an extension, an aggregator, or NAME=OPTION:VALUE,... defined on the spot.

    Raises UserError for an unknown name, with those that exist.
    """
    name, given, text = word.partition("=")
    if given:
        change = {}
        for part in text.split(","):
            option, colon, value = part.partition(":")
            if not colon or not re.fullmatch(r"\w[\w.-]*", name) or name == BASELINE:
                raise UserError(f"an extension is defined as NAME=OPTION:VALUE,OPTION:VALUE, not {word!r}")
            change[option.strip().replace("-", "_")] = read_value(value)
        parse_config(change, f"extension {name}")
        return name, change
    name = word.replace("-", "_")
    if name in EXTENSIONS:
        return name, EXTENSIONS[name]
    if name in METHODS and name != "sum":
        return name, {"aggregator": name}
    known = [*EXTENSIONS, *(method for method in METHODS if method != "sum")]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"there is no extension {word!r}; {hint}There are {', '.join(known)}, and NAME=OPTION:VALUE")


def combination(word: str, known: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """The members of `siamese+pcgrad`, each a name in `known` or what `extension` takes. Raises UserError."""
    return dict((part, known[part]) if part in known else extension(part) for part in word.split("+"))


def plan(
    extensions: Mapping[str, Parameters], groups: Iterable[str], combinations: Sequence[Sequence[str]]
) -> tuple[dict[str, Parameters], dict[str, list[str]]]:
    """Variants, and which of them each group compares.

    `extensions` are in the order in which they are added. Raises UserError if two of a combination change the same
    option.
    """
    names = list(extensions)
    sets: dict[str, list[list[str]]] = {
        "alone": [[], *([name] for name in names)],
        "added": [[], *accumulate([name] for name in names)],
        "left_out": [names, *([other for other in names if other != name] for name in names), []],
        "named": [[], *([name for name in names if name in wanted] for wanted in combinations)],
    }
    variants: dict[str, Parameters] = {}
    compared: dict[str, list[str]] = {}
    for group in groups:
        for members in sets[group]:
            name = "+".join(members) or BASELINE
            variants[name] = _combine(members, extensions)
            if name not in compared.setdefault(group, []):
                compared[group].append(name)
    return {BASELINE: {}} | variants, compared


def _combine(members: Sequence[str], extensions: Mapping[str, Parameters]) -> Parameters:
    change: Parameters = {}
    for member in members:
        if twice := change.keys() & extensions[member].keys():
            raise UserError(f"{'+'.join(members)} would set {', '.join(sorted(twice))} twice; leave one of them out")
        change |= extensions[member]
    return change


def refuse_other_ablation(folder: Path, saved: Ablation, wanted: Ablation) -> None:
    """Raises UserError naming what `wanted` changes of the runs in `folder`; variants and seeds may be added."""
    before = {name: saved.variants.get(name, change) for name, change in wanted.variants.items()}
    different = differences(saved.baseline, wanted.baseline) + differences(before, wanted.variants)
    if different:
        way = "Leave these options out to go on with it, or give another --ablation."
        refuse(f"{folder} holds another ablation", different, way)
