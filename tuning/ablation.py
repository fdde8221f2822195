"""An ablation: which extensions of the baseline there are, and which combinations of them are trained.

Variants are sets of extensions, named by them in the order in which they are added, so a set that several groups ask
for is trained once.

ablation.yaml            baseline, variants, groups, seeds
runs/VARIANT/seed-N/     the run folders, each with its trial.json
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from minbert.data.differences import differences, refuse
from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.trainer.config import parse_config
from minbert.tuning.extensions import BASELINE, combine
from minbert.tuning.search import Resources, read_as
from minbert.tuning.space import Parameters
from minbert.tuning.trial import Trial, read_trials

ABLATION_FILE = "ablation.yaml"

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

    @property
    def seeds_told(self) -> str:
        """`seeds 0, 1`."""
        return f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"

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


def plan(
    extensions: Mapping[str, Parameters], groups: Iterable[str], combinations: Sequence[Sequence[str]]
) -> tuple[dict[str, Parameters], dict[str, list[str]]]:
    """Variants, and which of them each group compares.

    `extensions` are in the order in which they are added. Raises UserError if two of a combination contradict each
    other.
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
            variants[name] = combine(members, extensions)
            if name not in compared.setdefault(group, []):
                compared[group].append(name)
    return {BASELINE: {}} | variants, compared


def refuse_other_ablation(folder: Path, saved: Ablation, wanted: Ablation) -> None:
    """Raises UserError naming what `wanted` changes of the runs in `folder`; variants and seeds may be added."""
    before = {name: saved.variants.get(name, change) for name, change in wanted.variants.items()}
    different = differences(saved.baseline, wanted.baseline) + differences(before, wanted.variants)
    if different:
        way = "Leave these options out to go on with it, or give another --ablation."
        refuse(f"{folder} holds another ablation", different, way)
