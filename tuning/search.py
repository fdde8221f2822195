"""A search: what is searched and how, as it lies in SEARCH/search.yaml, and its trials.

search.yaml   space, algorithm, scheduler, seed, and the options that all trials share
trials/NAME/  a trial's run folder, with its trial.json
best.yaml     the best trial's configuration, for `minbert train --config`
"""

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.trainer.config import MAY_CHANGE, RunConfig, flatten, parse_config
from minbert.trainer.preparation import resolve
from minbert.trainer.run_folder import RunFolder, read_yaml
from minbert.tuning.space import EXPLORED, Parameters, Space, draw, grid
from minbert.tuning.trial import METRIC, Trial, best, read_trials

SEARCH_FILE = "search.yaml"
Kind = TypeVar("Kind", bound=BaseModel)
# How a search samples the data and not what it finds: the full run from the best trial has them from its own options.
SUBSAMPLING = ("train_limit", "eval_limit")


class Resources(BaseModel):
    """What a trial takes, and what becomes of one that fails."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; the default is as many as fit."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """Cores of each process of a trial."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each process of a trial; a fraction lets trials share one."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a trial that fails or is lost goes on from its checkpoint."""


class Search(BaseModel):
    """What `search.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["search"] = "search"
    metric: Literal["dev/overall"] = METRIC
    mode: Literal["max"] = "max"
    seed: int = 0
    algorithm: Literal["random", "grid", "tpe"] = "random"
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    reduction: Annotated[float, Field(gt=1)] = 3.0
    grace: Annotated[float, Field(gt=0, lt=1)] = 0.1
    samples: int
    space: Space
    base: dict[str, Any] = {}
    resources: Resources = Resources()

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SEARCH_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def read(cls, folder: Path) -> "Search":
        """Raises UserError where there is no search."""
        if not (folder / SEARCH_FILE).exists():
            raise UserError(f"{folder} is not a search: it has no {SEARCH_FILE}")
        return read_as(cls, folder / SEARCH_FILE)

    def parameters(self, number: int) -> Parameters:
        """Of a trial of a random or grid search."""
        if self.algorithm == "grid":
            return next(islice(grid(self.space), number, None))
        return draw(self.space, self.seed, number)

    def options(self, parameters: Mapping[str, Any]) -> Parameters:
        """All options of a trial but its folder."""
        return {"seed": self.seed} | self.base | dict(parameters)

    def check(self) -> None:
        """Raises UserError if a trial would have a configuration that is refused, or the algorithm is not installed."""
        if self.scheduler == "pbt":
            self._check_population()
        if self.algorithm == "tpe" and find_spec("optuna") is None:
            raise UserError("algorithm=tpe needs Optuna: pip install -e '.[optuna]', or optuna")
        numbers = range(min(self.samples, 1000))
        for number in numbers:
            drawn = draw(self.space, self.seed, number) if self.algorithm == "tpe" else self.parameters(number)
            shown = ", ".join(f"{name}={value}" for name, value in drawn.items())
            parse_config(self.options(drawn), f"trial {number} ({shown})")

    def _check_population(self) -> None:
        if not EXPLORED & self.space.keys():
            raise UserError(f"scheduler=pbt changes {', '.join(sorted(EXPLORED))}; the space has none of them")
        if self.algorithm == "tpe":
            raise UserError("scheduler=pbt makes its own proposals; algorithm=tpe does not go with it")
        if self.resources.concurrent is not None:
            raise UserError("with scheduler=pbt all trials take turns; --cpus or --gpus say how many fit at once")

    def new_trial(self, folder: Path, number: int, parameters: Parameters) -> Trial:
        name = f"trial-{number:04d}"
        return Trial(folder / "trials" / name, name, number, parameters)

    def trials(self, folder: Path) -> list[Trial]:
        """All trials by number: those on disk, and those that are certain to come."""
        there = {trial.number: trial for trial in read_trials(folder / "trials")}
        if self.algorithm != "tpe":
            for number in range(self.samples):
                if number not in there:
                    there[number] = self.new_trial(folder, number, self.parameters(number))
        return [there[number] for number in sorted(there)]


def read_as(kind: type[Kind], file: Path) -> Kind:
    """What a file of ours holds. Raises UserError if somebody has spoilt it."""
    try:
        return kind(**read_yaml(file))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{file}: {place}: {problem['msg']}, not {problem['input']!r}") from None


def base_options(config: RunConfig) -> Parameters:
    """The options in which `config` differs from the defaults, as they stand in a file; paths become absolute."""
    resolved = resolve(config)
    update = {
        "corpus": config.corpus.model_copy(
            update={"data": resolved.corpus.data} | ({"cache": resolved.corpus.cache} if config.corpus.cache else {})
        ),
        "encoder": config.encoder.model_copy(update={"model": resolved.encoder.model}),
    }
    values, defaults = _plain(config.model_copy(update=update)), _plain(RunConfig())
    return {name: value for name, value in values.items() if value != defaults[name] and name not in ("run", "seed")}


def _plain(config: RunConfig) -> Parameters:
    flat: Parameters = {}
    sections = flatten(config)
    for key, value in config.model_dump(mode="json").items():
        flat |= value if isinstance(value, dict) and key not in sections else {key: value}
    return flat


def refuse_other(folder: Path, saved: Search, wanted: Search) -> None:
    """Raises UserError naming what makes `wanted` another search than the one in `folder`."""
    may_change = {"samples", "resources", "base"}
    before, now = saved.model_dump(mode="json"), wanted.model_dump(mode="json")
    different = [name for name in before if name not in may_change and before[name] != now[name]]
    lines = [f"  {name}: {before[name]} in the folder, {now[name]} asked for" for name in different]
    for name in sorted(saved.base.keys() | wanted.base.keys()):
        if name not in MAY_CHANGE - {"epochs", "steps", "eval_limit", "extend_to"}:
            old, new = saved.base.get(name), wanted.base.get(name)
            lines += [f"  {name}: {old} in the folder, {new} asked for"] if old != new else []
    if wanted.samples < saved.samples and saved.algorithm != "grid":
        lines.append(f"  samples: {saved.samples} in the folder, {wanted.samples} asked for")
    if lines:
        raise UserError(
            f"{folder} holds another search:\n" + "\n".join(lines) + "\n"
            "Leave these options out to go on with it, or give another --search."
        )


def write_best(folder: Path, trials: list[Trial]) -> Trial | None:
    """Write best.yaml, a configuration file for the full run from the best trial; None if no trial has a score."""
    winner = best(trials)
    if winner is None:
        return None
    config = RunFolder(winner.folder).read_config()
    content = config.model_dump(mode="json", exclude={"run": True, "corpus": set(SUBSAMPLING) | {"cache"}})
    head = (
        f"# The best of {len(trials)} trials: {winner.name}, {METRIC} {winner.score:.4f} within {winner.step} steps.\n"
    )
    left_out = f"# The limits of the search on the data ({', '.join(SUBSAMPLING)}) are left out.\n"
    with replacing(folder / "best.yaml") as temporary:
        temporary.write_text(head + left_out + yaml.safe_dump(content, sort_keys=False))
    return winner
