"""Extensions of the baseline: named changes of a run's configuration, the paper's and those that came after it."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from minbert.data.errors import UserError
from minbert.data.task import Task
from minbert.trainer.config import parse_config
from minbert.trainer.surgery.methods import METHODS
from minbert.tuning.space import Parameters, read_value

# The paper's baseline: sentence embeddings side by side, one hidden layer, the encoder frozen.
BASELINE = "baseline"
PAPER_BASELINE: Parameters = {"features": "baseline", "hidden_layers": 1, "freeze": "encoder", "aggregator": "sum"}

# The paper's in its order, then further ones; an aggregator's name is one more.
EXTENSIONS: dict[str, Parameters] = {
    "siamese": {"features": "siamese"},
    "two_hidden_layers": {"hidden_layers": 2},
    "back_translation": {"augment_mode": "append"},  # and its file
    "smart": {},  # its weight
    "unfrozen": {"freeze": "none"},
    "gradual_unfreezing": {"freeze": "none", "unfreeze": "gradual"},
    "pretrained": {},  # its folder
    "joint_pairs": {"pair_encoding": "joint"},
    "joint_sides": {"pair_encoding": "joint_sides"},
    "averaged_weights": {"average_decay": 0.999},
    "layer_decay": {"layer_decay": 0.95},
    "rdrop": {},  # its weight
    "distilled": {},  # its teachers
    "label_smoothing": {"label_smoothing": [0.1]},
    "ordinal": {},  # of which tasks
    "pearson_loss": {},
    "cosent": {},
    "square_root_batches": {"batch_power": 0.5},
    "square_root_sampling": {"task_schedule": "square_root"},
    "annealed_sampling": {"task_schedule": "annealed"},
}
DEFAULT = ("siamese", "two_hidden_layers", "smart", "unfrozen", "pcgrad")

SMART_WEIGHT = 0.02  # the paper's
RDROP_WEIGHT = 1.0  # the largest of those that its authors tried on GLUE


def extension(word: str, tasks: Sequence[Task]) -> tuple[str, Parameters]:
    """Name and change of what `word` names: an extension (`pretrained=FOLDER`), an aggregator, or
    NAME=OPTION:VALUE,... defined on the spot.

    `tasks` are those of the runs. Raises UserError for an unknown name, with those that exist.
    """
    name, given, text = word.partition("=")
    known = name.replace("-", "_")
    if known in ARGUMENTS:
        return known, EXTENSIONS[known] | ARGUMENTS[known](text, tasks)
    if known in EXTENSIONS and not given:
        return known, EXTENSIONS[known]
    if given:
        return name, _defined(word, name, text)
    if known in METHODS and known != "sum":
        return known, {"aggregator": known}
    names = [*EXTENSIONS, *(method for method in METHODS if method != "sum")]
    near = difflib.get_close_matches(known, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"there is no extension {word!r}; {hint}There are {', '.join(names)}, and NAME=OPTION:VALUE")


def combination(word: str, known: Mapping[str, Parameters], tasks: Sequence[Task]) -> dict[str, Parameters]:
    """The members of `siamese+pcgrad`, each a name in `known` or what `extension` takes. Raises UserError."""
    return dict((part, known[part]) if part in known else extension(part, tasks) for part in word.split("+"))


def combine(members: Sequence[str], extensions: Mapping[str, Parameters]) -> Parameters:
    """The change that several extensions make together. Raises UserError if two of them contradict each other."""
    change: Parameters = {}
    for member in members:
        wanted = extensions[member]
        losses = [*change.get("losses", ()), *wanted.get("losses", ())]
        if losses and len({loss.partition("=")[0] for loss in losses}) == len(losses):  # of different tasks
            change, wanted = change | {"losses": losses}, wanted | {"losses": losses}
        if twice := [name for name in change.keys() & wanted.keys() if change[name] != wanted[name]]:
            raise UserError(f"{'+'.join(members)} would set {', '.join(sorted(twice))} twice; leave one of them out")
        change |= wanted
    return change


def _back_translation(text: str, tasks: Sequence[Task]) -> Parameters:
    if not text:
        raise UserError("back_translation needs a file that `minbert augment` has written: back_translation=AUGMENTED")
    return {"augmented": [text]}


def _pretrained(text: str, tasks: Sequence[Task]) -> Parameters:
    if not text:
        raise UserError("pretrained needs a folder that `minbert pretrain` has written: pretrained=MODEL")
    return {"model": text}


def _smart(text: str, tasks: Sequence[Task]) -> Parameters:
    """A weight for every task: as in the paper, only classes of single sentences (sentiment) are smoothed."""
    weight = _weight("smart", text, SMART_WEIGHT)
    weights = [weight if task.kind == "classification" and not task.is_pair else 0.0 for task in tasks]
    if not any(weights):
        raise UserError("smart is for classes of single sentences, which no task has; NAME=smart_weight:VALUE sets all")
    return {"smart_weight": weights}


def _rdrop(text: str, tasks: Sequence[Task]) -> Parameters:
    """One weight for all tasks."""
    return {"rdrop_weight": [_weight("rdrop", text, RDROP_WEIGHT)]}


def _loss(name: str, loss: str, kind: str) -> Callable[[str, Sequence[Task]], Parameters]:
    """`loss` for the task that is named, or else for all that can have it."""

    def change(text: str, tasks: Sequence[Task]) -> Parameters:
        fitting = [task.name for task in tasks if (task.ordered if kind == "ordered" else task.kind == kind)]
        chosen = [task for task in text.split(",") if task] or fitting
        if not chosen or set(chosen) - set(fitting):
            raise UserError(
                f"{name}={text}: the loss {loss} is for {kind} tasks: {', '.join(fitting) or 'there is none'}"
            )
        # A cosine has no head that could be trained over a frozen encoder.
        return {"losses": [f"{task}={loss}" for task in chosen]} | ({"freeze": "none"} if loss == "cosent" else {})

    return change


def _weight(name: str, text: str, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text}: its weight is a number, {default} if left out") from None


def _distilled(text: str, tasks: Sequence[Task]) -> Parameters:
    if not text:
        raise UserError("distilled needs the folders of its teachers: distilled=RUN or distilled=RUN,RUN")
    return {"teachers": text.split(",")}


# What the text behind an extension's name, as in `back_translation=FILE`, adds to it. Raises UserError if it needs one.
ARGUMENTS: dict[str, Callable[[str, Sequence[Task]], Parameters]] = {
    "back_translation": _back_translation,
    "pretrained": _pretrained,
    "smart": _smart,
    "rdrop": _rdrop,
    "distilled": _distilled,
    "ordinal": _loss("ordinal", "squared_emd", "ordered"),
    "pearson_loss": _loss("pearson_loss", "pearson", "regression"),
    "cosent": _loss("cosent", "cosent", "regression"),
}


def _defined(word: str, name: str, text: str) -> Parameters:
    change: Parameters = {}
    for part in text.split(","):
        option, colon, value = part.partition(":")
        if not colon or not re.fullmatch(r"\w[\w.-]*", name) or name == BASELINE:
            raise UserError(f"an extension is defined as NAME=OPTION:VALUE,OPTION:VALUE, not {word!r}")
        change[option.strip().replace("-", "_")] = read_value(value)
    parse_config(change, f"extension {name}")
    return change
