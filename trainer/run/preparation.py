"""What must be there before the processes start: the run folder, its encoder and tokenizer, tokenised data.

It happens once, in the process that starts the others, so that mistakes in options and data show before anything runs.
"""

import difflib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import nn

from minbert.data.differences import differences, indented, refuse
from minbert.data.errors import UserError
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sequences.texts import training_texts
from minbert.data.sequences.tokens import build_vocabulary, default_cache_dir, load_tokenizer, write_vocabulary
from minbert.trainer.checkpoint.format import SAVED, damaged, folder_name, lost, published, remember, step_of
from minbert.trainer.config import MAY_CHANGE, OPTIONS, RunConfig, flatten
from minbert.trainer.evaluation.prediction_files import predicted_tasks
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.weights import TINY, find_checkpoint, is_hub_name, read_config, shape_here, write_shape
from minbert.trainer.run.budget import Budget
from minbert.trainer.run.data import build_plan, load_examples_of, load_split, load_splits
from minbert.trainer.run.folder import LOCK, RunFolder
from minbert.trainer.run.teachers import model_digest, require_teachers
from minbert.trainer.surgery.own_code import find_source, keep_source, use_source

log = logging.getLogger(__name__)

PLACES = {"files", "texts", "builtin", "course", "hub", "title"}  # of a task: where its rows are, not what they are
DEEPSPEED = ">=0.19,<0.20"
VOCABULARY_SIZE = 8192  # of a model with random weights; its words come from the training data


def new_run_path(config: RunConfig) -> Path:
    """A fresh folder under runs/, named by time and model."""
    base = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{Path(config.encoder.model).name}"
    candidates = chain([base], (base.with_name(f"{base.name}-{n}") for n in range(2, 1000)))
    return next(path for path in candidates if not path.exists())


def in_folder(config: RunConfig) -> RunConfig:
    """The configuration itself if it names its run folder, or else with a fresh one."""
    return config if config.run is not None else config.model_copy(update={"run": new_run_path(config)})


def prepare(config: RunConfig, force: bool = False, predicts: bool = False) -> RunFolder:
    """Create or reopen the run folder for `config` (`run` set) and fill in what the processes will need. Who may have
    rivals has locked it. Nothing in it changes before all is known to be well.

    `force` lets other settings replace those that a run in the folder was started with, and names them; and it goes on
    without checkpoints that are gone. `predicts`: the run will predict the test splits when it has trained, so what is
    wrong with them is to be told now.

    Raises UserError if the folder holds a run with other settings or something else, or has lost checkpoints, or cannot
    be written, or the data, the model or a tracker cannot be had.
    """
    run = RunFolder(config.folder)
    config = _pin_weights(run, resolve(config))
    _require_trackers(config.trackers)
    _require_deepspeed(config.parallel.zero_stage)
    _require_names(config.corpus.names)
    _require_run_folder(run)
    if run.config_file.exists() and (run.begun or _has_checkpoints(run)):
        _refuse_other_settings(run, config, force)
    if not force:
        require_checkpoints(run)
    _require_aggregator(run, config)
    require_teachers(config)
    with _encoder(run, config) as encoder:
        tokenizer = load_tokenizer(encoder)
        for name in config.corpus.names:
            for split in ("train", "dev"):
                load_split(config, name, split, tokenizer)
        for task in predicted_tasks(config) if predicts else ():
            if task.has("test"):
                load_examples_of(config, task.name, "test")
        _accept_loss(run)
        if encoder != run.encoder:
            shutil.rmtree(run.encoder, ignore_errors=True)
            os.replace(encoder, run.encoder)
        if not _has_checkpoints(run):
            keep_source(config.batch.aggregator, run.own_code)
        run.write_environment()
        run.write_config(config)
    return run


def require_checkpoints(run: RunFolder) -> None:
    """Raises UserError if checkpoints of the run were removed: it would start over, or go back, in silence."""
    if (step := lost(run.checkpoints)) is None:
        return
    kept = published(run.checkpoints)
    newest = f"the newest that is there is {kept[-1].name}" if kept else "no other is there"
    way = f"go on from {kept[-1].name}" if kept else "start over, with the old log and model put aside,"
    raise UserError(
        f"{run.checkpoints / folder_name(step)} is missing, up to which this run was saved; {newest}.\n"
        f"Restore it from a copy, give another --run to start anew, or {way} by --force."
    )


def _accept_loss(run: RunFolder) -> None:
    """Go on from the newest checkpoint that there is; without any, put aside what the old ones led to."""
    if lost(run.checkpoints) is None:
        return
    if kept := published(run.checkpoints):
        log.warning("--force goes on from %s: newer checkpoints are gone", kept[-1].name)
        remember(run.checkpoints, step_of(kept[-1]))
        return
    aside = next(path for n in count(1) if not (path := run.path / f"earlier-{n}").exists())
    aside.mkdir()
    log.warning("--force starts over, as all checkpoints are gone; what was there is kept in %s", aside)
    results = (
        run.checkpoints,
        run.metrics_file,
        run.gramians_file,
        run.best_model,
        run.pretrained,
        run.predictions,
        run.trackers,
        run.path / "trackers.json",
    )
    for path in (*results, run.path / SAVED):  # which comes last: a kill before leaves the run refused
        if path.exists():
            os.replace(path, aside / path.name)


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the learning rates, the epochs and the cache folder where they were left open, and make paths absolute:
    a run may be resumed from another folder than it was started from."""
    pretrained = config.encoder.model != "tiny"
    lr = config.optimizer.lr or (5e-5 if pretrained else 1e-3)
    head_lr = config.optimizer.head_lr or (1e-3 if config.encoder.freeze == "encoder" else lr)
    augmented = tuple(path.expanduser().absolute() for path in config.corpus.augmented)
    teachers = tuple(path.expanduser().absolute() for path in config.objective.teachers)
    cache = (config.corpus.cache or default_cache_dir()).expanduser().absolute()
    data, model = config.corpus.data, config.encoder.model
    if data.startswith("hub:") and data != "hub:":
        data = f"hub:{_absolute(data.removeprefix('hub:'))}"
    elif data not in ("builtin", "hub", "hub:", ""):
        data = _absolute(data)
    if model not in ("tiny", "minilm") and Path(model).expanduser().is_dir():
        model = _absolute(model)
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"lr": lr, "head_lr": head_lr}),
            "corpus": config.corpus.model_copy(update={"cache": cache, "data": data, "augmented": augmented}),
            "encoder": config.encoder.model_copy(update={"model": model}),
            "objective": config.objective.model_copy(update={"teachers": teachers}),
            "budget": config.budget.model_copy(update={"epochs": config.budget.epochs or (3 if pretrained else 5)}),
        }
    )


def left_to_encoder(config: RunConfig) -> dict[str, Any]:
    """By option, what a run makes of those that `resolve` leaves open as the encoder decides them: the width of the
    heads, and its own dropout. Those that the configuration gives, or that only the network could tell, are missing."""
    shape = shape_here(config.encoder.model, config.encoder.revision)
    if shape is None:
        return {}
    found: dict[str, Any] = {}
    if config.heads.hidden_size is None:
        found["hidden_size"] = shape.hidden_size
    if config.encoder.encoder_dropout is None and shape.hidden_dropout_prob == shape.attention_probs_dropout_prob:
        found["encoder_dropout"] = shape.hidden_dropout_prob
    return found


def _pin_weights(run: RunFolder, config: RunConfig) -> RunConfig:
    """Say which commit of a hub name's weights the run has: that of the run in the folder, or else the one that the hub
    names now. The processes then need not ask, and cannot be told different ones. Of a run with checkpoints, which hold
    its weights, the model need not be there any more."""
    model, revision = config.encoder.model, config.encoder.revision
    if _has_checkpoints(run) and run.config_file.exists():
        saved = run.read_config().encoder
        if saved.model == model and revision in (None, saved.revision):
            return config.model_copy(update={"encoder": config.encoder.model_copy(update={"revision": saved.revision})})
    if not is_hub_name(model):
        if revision is not None:
            raise UserError(f"revision={revision} is for a model of the hub, and {model} is here; leave one out")
        return config
    if revision is None and run.config_file.exists() and (saved := run.read_config().encoder).model == model:
        revision = saved.revision
    commit = find_checkpoint(model, revision).name
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"revision": commit})})


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


def identity(config: RunConfig, run: RunFolder, splits: Mapping[str, TokenisedSplit]) -> dict[str, Any]:
    """What a checkpoint must agree on to be of this run: its model, vocabulary, training data and settings."""
    shape = {name: value for name, value in asdict(read_config(run.encoder)).items() if not name.endswith("_prob")}
    heads: dict[str, Any] = {"features": config.heads.features, "pair_encoding": config.heads.pair_encoding}
    heads["head_layers"] = config.heads.hidden_layers
    heads |= {"head_size": config.heads.hidden_size, "pooling": config.encoder.pooling}
    return {
        "model": shape | heads | {"tasks": {task.name: task.identity for task in config.corpus.tasks}},
        "vocabulary": run.vocabulary,
        "data": {name: split.fingerprint() for name, split in splits.items()},
        "settings": settings(config),
    }


def known_shape(config: RunConfig) -> BertConfig | None:
    """The shape of the encoder of a run that may not be prepared yet, without a look at the network or the data."""
    folder = RunFolder(config.folder).encoder
    if (folder / "config.json").exists():
        return read_config(folder)
    if config.encoder.model == "tiny":
        return BertConfig(vocab_size=1, **TINY)
    if config.encoder.model == "minilm" or Path(config.encoder.model).expanduser().is_dir():
        return read_config(find_checkpoint(config.encoder.model))
    return None


def settings(config: RunConfig) -> dict[str, Any]:
    """The options by which a resumed run may not differ, as JSON has them. Where data and weights come from is none of
    them: their content counts."""
    sections = config.model_dump(mode="json", exclude={"run"})
    flat = {name: sections[name] if section is None else sections[section][name] for name, section in _fixed(config)}
    flat["tasks"] = [task.model_dump(mode="json", exclude=PLACES) for task in config.corpus.tasks]
    flat["teachers"] = [model_digest(RunFolder(path)) for path in config.objective.teachers]
    return {name: value for name, value in flat.items() if name not in ("data", "model", "augmented")}


def _fixed(config: RunConfig) -> list[tuple[str, str | None]]:
    """Those options and their sections."""
    free = MAY_CHANGE | {"run"}
    if config.batch.task_schedule == "annealed":
        free -= {"epochs", "steps"}  # the order of the data depends on them
    return [(name, section) for name, section in OPTIONS.items() if name not in free]


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of a prepared run's configured budget."""
    config = resolve(config)
    if config.budget.steps is not None:
        return config.budget.steps
    plan = build_plan(config, load_splits(config, RunFolder(config.folder), "train"))
    return Budget(config.budget, plan.steps_per_epoch).planned_steps


def _require_deepspeed(stage: int | None) -> None:
    """Raises UserError for a version whose insides were not looked at: a shard in another place would be a wrong
    gradient, not an error."""
    if stage is not None and not SpecifierSet(DEEPSPEED).contains(found := version("deepspeed"), prereleases=True):
        raise UserError(
            f"zero_stage={stage} works on the insides of DeepSpeed {DEEPSPEED}, and {found} is installed: "
            f"pip install 'deepspeed{DEEPSPEED}'"
        )


def _require_names(tasks: Iterable[str]) -> None:
    """Raises UserError for a task whose head could not be called by its name."""
    if taken := [name for name in tasks if hasattr(nn.ModuleDict, name)]:
        raise UserError(
            f"a task cannot be called {taken[0]!r}, which PyTorch's modules have already; choose another name"
        )


def _require_trackers(names: Iterable[str]) -> None:
    """Raises UserError for a tracker that Accelerate does not know, or would leave out because of a missing package."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"no tracker is called {name!r}{hint or '.'} There are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}."
            )
        if name not in map(str, get_available_trackers()):
            raise UserError(f"the tracker {name} needs its package: pip install {name.replace('_', '-')}")


def _require_run_folder(run: RunFolder) -> None:
    """Raises UserError if the folder cannot be made, or is somebody else's."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in run.path.iterdir()} - {LOCK, _staging(run).name}
        if not os.access(run.path, os.W_OK):
            raise PermissionError(None, "it is not writable")
    except OSError as error:
        raise UserError(f"run folder {run.path} cannot be used: {error.strerror}; give another by --run") from None
    if run.average.exists():
        raise UserError(
            f"{run.path} holds the mean of other runs' weights, which is no run to train. Give another --run; to start "
            "from its encoder, `minbert export` it and give that folder as --model"
        )
    own = {run.config_file.name, run.encoder.name, run.logs.name}  # one of them comes first
    if entries and not entries & own:
        raise UserError(
            f"{run.path} is not empty and no run folder: it has no config.yaml. Give a new folder by --run."
        )


def _has_checkpoints(run: RunFolder) -> bool:
    """Whether the run has got somewhere, even if what is left of it is damaged."""
    return bool(published(run.checkpoints) or damaged(run.checkpoints))


def _refuse_other_settings(run: RunFolder, config: RunConfig, force: bool) -> None:
    before = run.read_config()
    saved, wanted = flatten(before), flatten(config)
    fixed = [name for name, _ in _fixed(config)]
    tasks: list[str] = []
    if before.corpus.names == config.corpus.names:  # then one is declared in another way
        fixed.remove("tasks")
        for old, new in zip(before.corpus.tasks, config.corpus.tasks):
            tasks += [f"task {new.name}: {line}" for line in differences(dict(old), dict(new))]
    different = differences({name: saved[name] for name in fixed}, {name: wanted[name] for name in fixed}) + tasks
    if different and force:
        log.warning("--force overrides settings of %s:\n%s", run.path, indented(different))
    elif different:
        way = "Leave these options out to resume it, give another --run to start anew, or go on with them by --force."
        refuse(f"{run.path} holds a run with other settings", different, way)


def _require_aggregator(run: RunFolder, config: RunConfig) -> None:
    """Build it once, from the source that the run keeps if a checkpoint relies on it. Raises UserError."""
    if config.batch.aggregator == "sum":
        return
    from minbert.trainer.surgery.methods import Aggregator

    if _has_checkpoints(run):
        use_source(run.own_code)
    else:
        find_source(config.batch.aggregator)
    Aggregator(config.batch.aggregator, len(config.corpus.tasks), config.seed)


def _staging(run: RunFolder) -> Path:
    return run.encoder.with_suffix(".unfinished")


@contextmanager
def _encoder(run: RunFolder, config: RunConfig) -> Iterator[Path]:
    """A folder with the encoder's config.json and tokenizer: the run's own where a checkpoint relies on it, and a new
    one, to take its place, where an earlier start may have had other data or another model. Raises UserError."""
    missing = [task.name for task in config.corpus.tasks if not (task.builtin or task.files or task.texts)]
    if missing and config.corpus.data == "builtin":
        raise UserError(f"the built-in corpus has no task {', '.join(missing)}; use --data or other --tasks")
    if _has_checkpoints(run):
        _require_fitting(run.encoder, config)
        yield run.encoder
        return
    encoder = _staging(run)
    shutil.rmtree(encoder, ignore_errors=True)
    try:
        if config.encoder.model == "tiny":
            vocabulary = build_vocabulary(_texts(config), VOCABULARY_SIZE)
            encoder.mkdir(parents=True)
            write_vocabulary(encoder, vocabulary)
            write_shape(encoder, BertConfig(vocab_size=len(vocabulary), **TINY))
        else:
            source = find_checkpoint(config.encoder.model, config.encoder.revision)
            load_tokenizer(source)
            write_shape(encoder, read_config(source), tokenizer_from=source)
        _require_fitting(encoder, config)
        yield encoder
    finally:
        shutil.rmtree(encoder, ignore_errors=True)


def _texts(config: RunConfig) -> Iterator[str]:
    """All that is trained on."""
    for task in config.corpus.tasks:
        if task.kind == "masked_lm":
            yield from training_texts(task, config.corpus.data, config.corpus.bad_rows)
        else:
            yield from chain.from_iterable(load_examples_of(config, task.name, "train").sentences)


def _require_fitting(encoder: Path, config: RunConfig) -> None:
    shape, freeze = read_config(encoder), config.encoder.freeze
    if config.corpus.max_length > shape.max_position_embeddings:
        raise UserError(
            f"max_length={config.corpus.max_length}, but the encoder has {shape.max_position_embeddings} positions; "
            "give at most that"
        )
    pairs = [task.name for task in config.corpus.tasks if config.heads.joins(task)]
    if pairs and shape.type_vocab_size < 2:
        raise UserError(
            f"pair_encoding={config.heads.pair_encoding} tells the sentences of {' and '.join(pairs)} apart by token "
            "types, and the encoder has only one; use pair_encoding=siamese"
        )
    if isinstance(freeze, int) and freeze > shape.num_hidden_layers:
        raise UserError(f"freeze={freeze}, but the encoder has {shape.num_hidden_layers} layers; give at most that")
