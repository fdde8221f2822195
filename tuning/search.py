"""A search: what is searched and how, as it lies in SEARCH/search.yaml, and its trials.

search.yaml   space, algorithm, scheduler, seed, and the options that all trials share
trials/NAME/  a trial's run folder, with its trial.json
best.yaml     the best trial's configuration, for `minbert train --config`

A search may go on in another space. What it learns from then on comes from trials that the new space could have drawn,
whichever they were drawn from: those are its points.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minbert.data.differences import differences, refuse
from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.data.reading import read_yaml
from minbert.trainer.config import MAY_CHANGE, RunConfig, flatten, parse_config
from minbert.trainer.options import Seed
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import left_to_encoder, resolve
from minbert.tuning.space import (
    EXPLORED,
    Parameters,
    Space,
    combination,
    draw,
    draw_another,
    fingerprint,
    grid_size,
    refuse_ranges,
)
from minbert.tuning.trial import Trial, read_trials

SEARCH_FILE = "search.yaml"
Kind = TypeVar("Kind", bound=BaseModel)
# How a search samples the data and not what it finds: the full run from the best trial has them from its own options.
SUBSAMPLING = ("train_limit", "eval_limit")


class Resources(BaseModel):
    """What a trial takes, and what becomes of one that fails."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; the default is as many as fit."""
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    """Cores of each process of a trial."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """GPUs of each process of a trial; a fraction lets trials share one, 0 keeps to the CPU. The default is one where
    there are GPUs."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a trial that fails or is lost goes on from its checkpoint."""


class Earlier(BaseModel):
    """A space that the search has left."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int
    """The number of the first trial that is of a later space."""
    space: Space


class Search(BaseModel):
    """What `search.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    algorithm: Literal["random", "grid", "tpe"] = "random"
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    reduction: Annotated[float, Field(gt=1)] = 3.0
    grace: Annotated[float, Field(gt=0, lt=1)] = 0.1
    samples: int
    space: Space
    earlier: tuple[Earlier, ...] = ()
    """Spaces before `space`, the oldest first."""
    base: dict[str, Any] = {}
    again: Annotated[int, Field(ge=0)] = 0
    """How many of the best trials are trained once more with other seeds."""
    seeds: tuple[Seed, ...] = ()
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

    @property
    def spaces(self) -> list[Space]:
        """All that trials were drawn from, the newest last."""
        return [*(earlier.space for earlier in self.earlier), self.space]

    @property
    def first(self) -> int:
        """The number of the first trial that is drawn from `space`."""
        return self.earlier[-1].trials if self.earlier else 0

    def space_of(self, number: int) -> int:
        """The place in `spaces` of the one that a trial was drawn from."""
        return sum(number >= earlier.trials for earlier in self.earlier)

    def going_on_in(self, space: Space, begun: int) -> tuple[Earlier, ...]:
        """`earlier`, if the search goes on in another `space` after the trials that were `begun`. Raises UserError
        where it cannot."""
        if self.scheduler == "pbt":
            raise UserError(
                "--space: a population does not go on in another space, as its trials take over each other's options. "
                "Give another --search, for another population."
            )
        if begun == self.first:  # nothing was drawn from the space that it leaves
            return self.earlier[:-1] if self.earlier and self.earlier[-1].space == space else self.earlier
        if any(space == earlier.space for earlier in self.earlier):
            raise UserError(
                f"--space: the search has left this space for another, which {SEARCH_FILE} has. Leave --space out to "
                "go on in that."
            )
        return (*self.earlier, Earlier(trials=begun, space=self.space))

    def values(self, parameters: Mapping[str, Any]) -> Parameters:
        """The values of all options in the configuration of a trial with these parameters."""
        return self._resolved(parameters) | {name: value for name, value in parameters.items() if value is not None}

    def _resolved(self, parameters: Mapping[str, Any]) -> Parameters:
        """As a trial's run has them: what is left open has the value that comes of it."""
        config = parse_config(self.options(parameters), SEARCH_FILE)
        return _plain(resolve(config)) | left_to_encoder(config)

    def point(self, number: int, parameters: Parameters) -> Parameters | None:
        """A trial as the space could have drawn it: its values of the options that are searched now. None if it lies
        outside, for one of them or for another option that it has and the space leaves as it is.

        An option that is left open is the same as one that has the value that its run then has.
        """
        if number >= self.first:
            return parameters
        given = _plain(parse_config(self.options(parameters), SEARCH_FILE)) | parameters
        values, rest = self._resolved(parameters), self._resolved({})
        found = {}
        for name, kind in self.space.items():
            held = [value for value in (given[name], values[name]) if kind.holds(value)]
            if not held:
                return None
            found[name] = held[0]
        same = all(values[name] == rest[name] for name in parameters.keys() - self.space.keys())
        return found if same else None

    def parameters(self, number: int, known: Collection[str] = ()) -> Parameters:
        """Of the next trial of a random or grid search, which is none of those in `known`, by their fingerprint, as
        long as there is another."""
        if self.algorithm == "random":
            return draw_another(self.space, self.seed, number, known)
        left = (combination(self.space, place) for place in range(number - self.first, grid_size(self.space)))
        return next(parameters for parameters in left if fingerprint(parameters) not in known)

    def known(self, trials: Iterable[Trial]) -> set[str]:
        """Fingerprints of the points that `trials` began with."""
        points = (self.point(trial.number, trial.first_parameters) for trial in trials)
        return {fingerprint(point) for point in points if point is not None}

    def limited(self, trials: Sequence[Trial] = ()) -> "Search":
        """With no more samples than there are combinations left beside `trials`; a grid has all of them. A population
        may begin with equal trials."""
        if self.algorithm == "grid":
            refuse_ranges(self.space)
        size = grid_size(self.space)
        if self.algorithm == "grid" or (self.algorithm == "random" and self.scheduler != "pbt" and size):
            all_of_them = len(trials) + size - len(self.known(trials))
            samples = all_of_them if self.algorithm == "grid" else min(self.samples, all_of_them)
            return self.model_copy(update={"samples": samples})
        return self

    def options(self, parameters: Mapping[str, Any]) -> Parameters:
        """All options of a trial but its folder."""
        return {"seed": self.seed} | self.base | dict(parameters)

    def sources(self) -> Parameters:
        """One value of each option that is searched and decides what must be there: data, tasks and model."""
        return {name: kind.extremes()[0] for name, kind in self.space.items() if name in ("data", "tasks", "model")}

    def check(self) -> None:
        """Raises UserError if a trial would have a configuration that is refused, or the algorithm is not installed."""
        if self.scheduler == "pbt":
            self._check_population()
        if self.seed in self.seeds:
            raise UserError(
                f"--seeds: {self.seed} is the search's own seed, by which these trials were chosen: a mean with it "
                "flatters them. Give others."
            )
        if self.algorithm == "tpe" and find_spec("optuna") is None:
            raise UserError("algorithm=tpe needs Optuna: pip install -e '.[optuna]', or optuna")
        numbers = range(self.first, self.first + min(self.samples - self.first, 1000))
        for number in numbers:
            drawn = self.parameters(number) if self.algorithm == "grid" else draw(self.space, self.seed, number)
            shown = ", ".join(f"{name}={value}" for name, value in drawn.items())
            parse_config(self.options(drawn), f"trial {number} ({shown})")

    def _check_population(self) -> None:
        if not EXPLORED & self.space.keys():
            raise UserError(f"scheduler=pbt changes {', '.join(sorted(EXPLORED))}; the space has none of them")
        if self.algorithm == "tpe":
            raise UserError("scheduler=pbt makes its own proposals; algorithm=tpe does not go with it")
        if self.resources.concurrent is not None:
            raise UserError("with scheduler=pbt all trials take turns; --cpus or --gpus say how many fit at once")
        if self.again:
            raise UserError(
                "--again: a population's scores come of schedules of options, which one configuration does not repeat; "
                "minbert tune --best SEARCH --seed N trains the last options of its best trial"
            )

    def new_trial(self, folder: Path, number: int, parameters: Parameters) -> Trial:
        name = f"trial-{number:04d}"
        return Trial(folder / "trials" / name, name, number, parameters)

    def trials(self, folder: Path) -> list[Trial]:
        """Those that were begun or proposed, by number: each has its folder from then on."""
        return read_trials(folder / "trials")


class NextTrial:
    """Makes the trials of a random or grid search that are not among `trials` yet, one by one."""

    def __init__(self, search: Search, folder: Path, trials: Sequence[Trial]):
        self.search, self.folder, self.number = search, folder, 0
        self.there, self.known = {trial.number for trial in trials}, search.known(trials)

    def __call__(self) -> Trial | None:
        while self.number in self.there:
            self.number += 1
        if self.number >= self.search.samples:
            return None
        parameters = self.search.parameters(self.number, self.known)
        self.there.add(self.number)
        self.known.add(fingerprint(parameters))
        return self.search.new_trial(self.folder, self.number, parameters)


def read_as(kind: type[Kind], file: Path) -> Kind:
    """What a file of ours holds. Raises UserError if somebody has spoilt it."""
    try:
        return kind(**read_yaml(file))
    except ValidationError as error:
        raise UserError(explain(error, str(file))) from None


def explain(error: ValidationError, where: str) -> str:
    problem = error.errors()[0]
    return f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}, not {problem['input']!r}"


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


def refuse_other_search(folder: Path, saved: Search, wanted: Search) -> None:
    """Raises UserError naming what makes `wanted` another search than the one in `folder`."""
    may_change = MAY_CHANGE - {"epochs", "steps", "eval_limit", "extend_to"}
    before, now = (
        search.model_dump(mode="json", exclude={"samples", "resources", "base", "space", "earlier", "again", "seeds"})
        | {name: value for name, value in search.base.items() if name not in may_change}
        for search in (saved, wanted)
    )
    if wanted.samples < saved.samples and saved.algorithm != "grid":
        before["samples"], now["samples"] = saved.samples, wanted.samples
    if different := differences(before, now):
        way = "Leave these options out to go on with it, or give another --search."
        refuse(f"{folder} holds another search", different, way)


def write_best(folder: Path, winner: Trial, known: str) -> None:
    """Write best.yaml, a configuration file for the full run from `winner`; `known` says what makes it the best.

    A trial that has taken over from another owes its score to a history of options, which is written above the last."""
    config = RunFolder(winner.folder).read_config()
    content = config.model_dump(mode="json", exclude={"run": True, "corpus": set(SUBSAMPLING) | {"cache"}})
    lines = [known, f"The limits of the search on the data ({', '.join(SUBSAMPLING)}) are left out."]
    lines += describe_schedule(winner, Search.read(folder).space)
    with replacing(folder / "best.yaml") as temporary:
        temporary.write_text("".join(f"# {line}\n" for line in lines) + yaml.safe_dump(content, sort_keys=False))


def describe_schedule(trial: Trial, space: Space) -> list[str]:
    """By what options a trial's weights came about, if not by its own alone."""
    schedule = trial.schedule() if trial.taken_over else []
    if not schedule:
        return []
    lines = ["Its score was reached by this schedule of options, of which only the last stand below:"]
    for part in schedule:
        values = [f"{name}={value}" for name, value in part["options"].items() if name in space]
        lines.append(f"  from step {part['from_step']}: {' '.join(values)}")
    return lines
