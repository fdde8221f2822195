"""`minbert pretrain`: train the encoder as a masked language model, here or as a job on the cluster.

That is `minbert train` on one task, which this command declares from its options, with defaults of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.reading import read_yaml
from minbert.data.task import SPLITS, Split, Task, resolve_task
from minbert.launch.commands import submit, train
from minbert.launch.help import Option
from minbert.launch.options import read_command_line
from minbert.trainer.config import flat_options
from minbert.trainer.run.folder import RunFolder

TASK = "mlm"
TASKS = ("sst", "quora", "sts")  # whose texts are taken, unless something is said of texts
DEFAULTS = {"batch_size": 64, "max_length": 100, "epochs": 3, "eval_limit": 2000}
DESCRIPTION = """Train the encoder as a masked language model: from any checkpoint or, with --model tiny, from nothing.

The result is the folder `model` in the run folder, for `--model` of other runs and for transformers. Of the options
below --tasks says whose training texts are taken, and these have other defaults: batch_size=64, max_length=100,
epochs=3, eval_limit=2000."""

FILES = "FILE ..."
OPTIONS = {
    "texts": Option(
        tuple[Path, ...], (), "Text files, a sentence or document a line; instead of --tasks, or beside them.", FILES
    ),
    "dev_texts": Option(
        tuple[Path, ...], (), "Text files to score; without them a share of all texts is held out.", FILES
    ),
    "held_out": Option(float, 0.02, "That share."),
    "text_splits": Option(tuple[Split, ...], ("train",), f"Splits of the tasks to train on, of {', '.join(SPLITS)}."),
    "packed": Option(bool, False, "Lay texts end to end and cut that to max_length, instead of cutting each text off."),
    "mask_share": Option(float, 0.15, "Share of a text's tokens to hide."),
    "single_pieces": Option(bool, False, "Hide single pieces, not whole words."),
    "submit": Option(bool, False, "Train as a job on a SLURM cluster, which a job's options describe."),
}
# Where the declaration of the task's texts has them.
TEXTS = {"texts": "files", "dev_texts": "dev", "held_out": "held_out", "text_splits": "splits", "packed": "packed"}


def main(arguments: list[str]) -> int:
    line = read_command_line("pretrain", DESCRIPTION, arguments, OPTIONS | submit.OPTIONS)
    own = {name: line.command.pop(name) for name in OPTIONS.keys() & line.command.keys()}
    queued = own.pop("submit", False)
    if not queued and (job := [*line.job, *line.command]):
        raise UserError(f"--{job[0].replace('_', '-')} is for a job: add --submit")
    file = line.run.get("config")
    said = line.run if file is None else flat_options(read_yaml(file), str(file)) | line.run
    is_new = said.get("run") is None or not RunFolder(Path(said["run"])).config_file.exists()
    if is_new:
        line.run.update(defaults_beside(said))
    if is_new or own or "tasks" in said:
        line.run["tasks"] = (declare(own, said),)
    return submit.submit(line) if queued else train.train(line.run)


def declare(own: Mapping[str, Any], run: Mapping[str, Any]) -> Task:
    """The task that our own options and a run's describe; or a declaration that `tasks` names. Raises UserError."""
    texts = {theirs: own[ours] for ours, theirs in TEXTS.items() if ours in own}
    for key in texts.keys() & {"files", "dev"}:
        texts[key] = [path.expanduser().absolute() for path in texts[key]]
    known = [resolve_task(word, run.get("task_folder")) for word in run.get("tasks", () if "files" in texts else TASKS)]
    if corpora := [task for task in known if task.kind == "masked_lm"]:
        if len(known) > 1 or own:
            raise UserError(f"{corpora[0]} says itself what its texts are: no other task or option goes with it")
        return corpora[0]
    masking = {"share": own["mask_share"]} if "mask_share" in own else {}
    if "single_pieces" in own:
        masking["whole"] = not own["single_pieces"]
    title = "masked language model"
    texts |= {"tasks": known}
    return resolve_task({"name": TASK, "title": title, "kind": "masked_lm", "texts": texts, "masking": masking})


def defaults_beside(said: Mapping[str, Any]) -> dict[str, Any]:
    """Our defaults for what neither the command line nor its file says."""
    given = {*said, "epochs"} if "steps" in said else said
    return {name: value for name, value in DEFAULTS.items() if name not in given}
