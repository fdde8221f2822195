"""The search space: for each option that is searched, the values it may take and how they are drawn.

A draw is a pure function of the seed, the trial's number and the option's name: neither the other options nor the
number of trials that run at once change it. What a space may hold is what a run's configuration takes; everything is
tried on the configuration before a trial starts.
"""

import difflib
import json
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from minbert.data.errors import UserError
from minbert.data.reading import PlainLoader
from minbert.trainer.config import OPTIONS, RunConfig, flatten, parse_config

# A trial has its folder and its share of the machine from the search.
NOT_SEARCHED = ("run", "cache", "trackers", "processes", "device")

Parameters = dict[str, Any]  # option -> value

# In population-based training: options that mean the same in the middle of a run as at its start.
EXPLORED = frozenset(["lr", "head_lr", "weight_decay", "warmup", "clip", "head_dropout", "encoder_dropout"])
RESAMPLED = 0.25  # probability of a new draw, in place of a change
FACTORS = (0.8, 1.2)
REDRAWN = 20  # times before the combinations that are left are looked through


class _Distribution(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Choice(_Distribution):
    """One of some values, all equally likely."""

    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[Any, ...], Field(min_length=1)]

    def at(self, uniform: float) -> Any:
        return self.values[min(int(uniform * len(self.values)), len(self.values) - 1)]

    def extremes(self) -> tuple[Any, ...]:
        return self.values

    def holds(self, value: Any) -> bool:
        return value in self.values


class _Range(_Distribution):
    @model_validator(mode="after")
    def _ordered(self) -> "_Range":
        if not self.low < self.high:
            raise ValueError(f"{self.low} is not below {self.high}")
        if self.kind.startswith("log") and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above zero, not at {self.low}")
        return self

    def extremes(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int) if self.kind == "int" else isinstance(value, int | float)
        return number and self.low <= value <= self.high


class Uniform(_Range):
    """A number between two others."""

    kind: Literal["uniform"] = "uniform"
    low: float
    high: float

    def at(self, uniform: float) -> float:
        return _rounded(self.low + uniform * (self.high - self.low), self)


class LogUniform(_Range):
    """A number whose logarithm is drawn evenly."""

    kind: Literal["loguniform"] = "loguniform"
    low: float
    high: float

    def at(self, uniform: float) -> float:
        return _rounded(math.exp(math.log(self.low) + uniform * math.log(self.high / self.low)), self)


class Integer(_Range):
    """A whole number, both ends included."""

    kind: Literal["int"] = "int"
    low: int
    high: int

    def at(self, uniform: float) -> int:
        return min(self.low + int(uniform * (self.high - self.low + 1)), self.high)


Distribution = Annotated[Choice | Uniform | LogUniform | Integer, Field(discriminator="kind")]
Space = dict[str, Distribution]
_KINDS = {"choice": Choice, "uniform": Uniform, "loguniform": LogUniform, "int": Integer}


def _rounded(value: float, within: Uniform | LogUniform) -> float:
    """Four digits are enough for a hyperparameter, and can be read and typed."""
    return min(max(float(f"{value:.4g}"), within.low), within.high)


def paper_space(base: RunConfig) -> Space:
    """What the paper wanted to search and could not; the learning rates depend on whether weights are pretrained."""
    pretrained = base.encoder.model != "tiny"
    return {
        "hidden_layers": Choice(values=(1, 2, 3)),
        "hidden_size": Choice(values=(128, 256, 512, 768)),
        "lr": LogUniform(low=1e-5, high=2e-4) if pretrained else LogUniform(low=2e-4, high=5e-3),
        "head_lr": LogUniform(low=5e-5, high=2e-3) if pretrained else LogUniform(low=2e-4, high=5e-3),
        "batch_size": Choice(values=(8, 16, 32)),
        "head_dropout": Uniform(low=0.0, high=0.5),
        "weight_decay": LogUniform(low=1e-5, high=1e-1),
        "aggregator": Choice(values=("sum", "pcgrad", "uncertainty")),
        "features": Choice(values=("baseline", "siamese")),
        "lr_schedule": Choice(values=("linear", "cosine", "constant")),
    }


def parse_space(words: Iterable[str]) -> Space:
    """`lr=loguniform(1e-5,1e-4) batch_size=16,32,64` as distributions. Raises UserError for anything else."""
    space: Space = {}
    for word in words:
        name, given, text = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not name or not given or not text:
            raise UserError(f"--space takes a YAML file, or OPTION=VALUES, not {word!r}")
        if name in space:
            raise UserError(f"--space names {name} twice")
        space[name] = _parse_distribution(name, text, "--space")
    return space


def read_space(content: Mapping[str, Any], where: str) -> Space:
    """A file's content: a list of values, `uniform(0, 0.3)`, or the mapping {kind, ...} for each option."""
    space: Space = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = {"kind": "choice", "values": value}
        if isinstance(value, Mapping):
            space[name] = _build(name, value, where)
        else:
            space[name] = _parse_distribution(name, str(value), where)
    return space


def _parse_distribution(name: str, text: str, where: str) -> Distribution:
    call = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if call is None:
        values = [read_value(part) for part in text.split(",")]
        return _build(name, {"kind": "choice", "values": values}, where)
    kind, arguments = call[1], [part.strip() for part in call[2].split(",")]
    if kind == "choice":
        return _build(name, {"kind": kind, "values": [read_value(part) for part in arguments]}, where)
    if kind not in _KINDS or len(arguments) != 2:
        raise UserError(
            f"{where}: {name}={text.strip()} is none of uniform(low,high), loguniform(low,high), int(low,high), "
            "or values with commas between them"
        )
    return _build(name, {"kind": kind, "low": arguments[0], "high": arguments[1]}, where)


def read_value(word: str) -> Any:
    """What a word means: a number, a truth value, nothing, or itself."""
    word = word.strip()
    try:
        value = None if word == "None" else yaml.load(word, PlainLoader)
        return float(word) if isinstance(value, str) else value  # YAML takes 1e-5 for text
    except (yaml.YAMLError, ValueError):
        return word


def _build(name: str, raw: Mapping[str, Any], where: str) -> Distribution:
    try:
        return TypeAdapter(Distribution).validate_python(dict(raw))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"][1:])
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise UserError(f"{where}: {name}: {place + ' must be ' if place else ''}{reason}") from None


def check_space(space: Space, fixed: Collection[str] = (), where: str = "the search space") -> Space:
    """The space with every value as the configuration has it.

    Raises UserError for an option that does not exist, naming the nearest, cannot be searched, is given by `fixed` at
    the same time, or has a value that the configuration refuses.
    """
    if not space:
        raise UserError(f"{where} is empty: give OPTION=VALUES")
    checked: Space = {}
    for name, distribution in space.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`minbert train --help` lists all."
            raise UserError(f"{where}: there is no option {name}; {hint}")
        if name in NOT_SEARCHED:
            raise UserError(f"{where}: {name} cannot be searched; every trial has it from the search")
        if name in fixed:
            raise UserError(f"{where}: {name} is searched, and given as an option; leave one of them out")
        if name == "epochs" and "steps" in {*space, *fixed}:
            raise UserError(f"{where}: epochs means nothing beside steps; leave one of them out")
        if infinite := [v for v in distribution.extremes() if isinstance(v, float) and not math.isfinite(v)]:
            raise UserError(f"{where}: {name} must be finite, not {infinite[0]}")
        values = [_accepted(name, value, where) for value in distribution.extremes()]
        if isinstance(distribution, Choice):
            if len({repr(value) for value in values}) < len(values):
                raise UserError(f"{where}: {name} names a value twice")
            distribution = Choice(values=tuple(values))
        elif not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{where}: {name} takes no numbers; list its values")
        elif isinstance(values[0], int) and not isinstance(distribution, Integer):
            raise UserError(f"{where}: {name} is a whole number: int({values[0]},{values[1]}), or list its values")
        checked[name] = distribution
    return checked


def _accepted(name: str, value: Any, where: str) -> Any:
    """`value` as the configuration takes it, alone: so that a wrong one is told from a wrong combination."""
    value = flatten(parse_config({name: value}, where))[name] if _stands_alone(name) else value
    return list(value) if isinstance(value, tuple) else value


def _stands_alone(name: str) -> bool:
    """Some options are only valid beside others; whole samples are checked as well."""
    return name not in ("extend_to", "task_weights", "surgery_scope", "accumulation", "task_schedule")


def draw(space: Space, seed: int, number: int, again: int = 0) -> Parameters:
    """The parameters of trial `number` of a random search; `again`: how often they were those of another trial."""
    key = (seed, number, again) if again else (seed, number)
    return {name: distribution.at(_uniform(*key, name)) for name, distribution in space.items()}


def draw_another(space: Space, seed: int, number: int, known: Collection[str]) -> Parameters:
    """The first draw for trial `number` that is none of `known`, by `fingerprint`; there must be one."""
    for again in range(REDRAWN):
        drawn = draw(space, seed, number, again)
        if fingerprint(drawn) not in known:
            return drawn
    if size := grid_size(space):
        start = int(_uniform(seed, number) * size)
        for place in range(size):
            drawn = combination(space, (start + place) % size)
            if fingerprint(drawn) not in known:
                return drawn
    return drawn


def fingerprint(parameters: Parameters) -> str:
    return json.dumps(parameters, sort_keys=True)


def _uniform(*key: int | str) -> float:
    """A number in [0, 1) that is a function of the key alone, the same on every platform."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).random()


def grid_size(space: Space) -> int:
    """The number of combinations; 0 where a range of numbers has no end of them."""
    return math.prod(len(values) for values in map(_values, space.values()))


def _values(kind: Distribution) -> Sequence[Any]:
    """All values of a list or of whole numbers; none of another range."""
    if isinstance(kind, Choice):
        return kind.values
    return range(kind.low, kind.high + 1) if isinstance(kind, Integer) else ()


def combination(space: Space, number: int) -> Parameters:
    """One of all combinations, of which the last option changes fastest."""
    parameters = {}
    for name, kind in reversed(space.items()):
        values = _values(kind)
        number, place = divmod(number, len(values))
        parameters[name] = values[place]
    return {name: parameters[name] for name in space}


def refuse_ranges(space: Space) -> None:
    """Raises UserError for a range, which a grid cannot cover."""
    ranges = [name for name, distribution in space.items() if not isinstance(distribution, Choice)]
    if ranges:
        raise UserError(f"a grid needs lists of values; {', '.join(ranges)} has a range")


def explore(space: Space, parameters: Parameters, random: np.random.Generator) -> Parameters:
    """`parameters` with those that may change drawn anew, or a fifth smaller or larger, or a value to the side."""
    changed = dict(parameters)
    for name in sorted(EXPLORED & space.keys()):
        kind = space[name]
        if random.random() < RESAMPLED:
            changed[name] = kind.at(random.random())
        elif isinstance(kind, Choice):
            place = kind.values.index(changed[name]) + random.choice((-1, 1))
            changed[name] = kind.values[min(max(place, 0), len(kind.values) - 1)]
        else:
            value = float(f"{changed[name] * random.choice(FACTORS):.4g}")
            changed[name] = type(kind.low)(min(max(value, kind.low), kind.high))
    return changed
