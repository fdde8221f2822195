"""`minbert checkpoint list|verify|convert`: look at a run's checkpoints, check every byte, carry them elsewhere."""

import difflib
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from minbert.data.errors import UserError
from minbert.launch.options import asks_for_help, parse, parse_run_config, read_run_options
from minbert.launch.outputs import require_place
from minbert.launch.ownership import lock_runs
from minbert.trainer.checkpoint.format import MANIFEST, Damaged, Manifest, damaged, published, read_manifest, verify
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder

USAGE = """usage: minbert checkpoint ACTION ...

  list RUN               what checkpoints a run has
  verify RUN             read every byte of them and compare with what was written
  convert SOURCE TARGET  a DeepSpeed or universal checkpoint into a run folder (options of `minbert train` describe
                         the run), or a run's newest checkpoint, or one of them, into a file TARGET.safetensors"""

CONVERT = (
    "Carry a DeepSpeed or universal checkpoint, SOURCE, into the run folder TARGET, of a run that the options "
    "describe; or a run's newest checkpoint, or one of them, into a file TARGET.safetensors."
)


@dataclass
class Look:
    """Look at checkpoints."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or one checkpoint."""


def main(arguments: list[str]) -> int:
    actions = {"list": show, "verify": check, "convert": convert}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return ExitCode.FINISHED if arguments else ExitCode.USER_MISTAKE
    if arguments[0] not in actions:
        near = difflib.get_close_matches(arguments[0], actions, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(actions)}"
        raise UserError(f"`minbert checkpoint` has no action {arguments[0]!r}; {hint}")
    return actions[arguments[0]](arguments[1:])


def show(arguments: list[str]) -> int:
    folder = parse(Look, arguments, "checkpoint list").run
    problems = []
    table = Table("step", "written (UTC)", "by", "size", "best score so far")
    for path in _checkpoints(folder):
        try:
            manifest = read_manifest(path)
        except Damaged as damage:
            if not path.exists():  # the run goes on, and has removed it meanwhile
                continue
            table.add_row(path.name.removeprefix("step-").lstrip("0"), "damaged", style="red")
            problems.append(str(damage))
            continue
        state = manifest.state
        score = "" if state.best_score is None else f"{state.best_score:.3f} at {state.best_step:,}"
        table.add_row(
            f"{manifest.step:,}",
            manifest.written.replace("T", " ").removesuffix("+00:00"),
            manifest.origin,
            _size(manifest.bytes),
            score,
        )
    problems += [f"{path} was set aside when it was found damaged" for path in damaged(RunFolder(folder).checkpoints)]
    Console().print(table if table.row_count else f"{folder} has no checkpoints", highlight=False)
    for problem in problems:
        print(problem)
    return ExitCode.FINISHED


def check(arguments: list[str]) -> int:
    """Exit code 1 if anything is damaged."""
    folder = parse(Look, arguments, "checkpoint verify").run
    failed, paths = 0, _checkpoints(folder)
    for path in paths:
        try:
            manifest = read_manifest(path)
            problems = verify(path, manifest)
        except Damaged as damage:
            problems = [str(damage)]
        if problems and not path.exists():  # the run goes on, and has removed it meanwhile
            continue
        print(f"{path.name}: {'damaged' if problems else f'intact ({_size(manifest.bytes)})'}")
        for problem in problems:
            print(f"  {problem}")
        failed += bool(problems)
    if not paths:
        print(f"{folder} has no checkpoints")
    if (best := RunFolder(folder).best_model).exists():
        failed += not _check_model(best)
    return ExitCode.FAILED if failed else ExitCode.FINISHED


def _check_model(path: Path) -> bool:
    damage = _damage(path)
    print(f"{path.name}: damaged\n  {damage}" if damage else f"{path.name}: intact ({_size(path.stat().st_size)})")
    return not damage


def _damage(model: Path) -> str | None:
    from minbert.trainer.run.saved_model import read_model

    try:
        read_model(model)
    except Damaged as damage:
        return str(damage)
    return None


def convert(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        read_run_options(arguments, "checkpoint convert SOURCE TARGET", CONVERT)
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        print(USAGE)
        return ExitCode.USER_MISTAKE
    source, target, *options = Path(arguments[0]), Path(arguments[1]), *arguments[2:]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU, and print that there is none
    from minbert.trainer.run.conversion import from_deepspeed

    if target.suffix == ".safetensors":
        if options:
            raise UserError(f"what is {options[0]!r}? Writing a model takes no options")
        mends = target.absolute() == RunFolder(source).best_model.absolute() and _damage(target) is not None
        if not mends:
            require_place(target)
        with lock_runs([source]) if mends else nullcontext():
            manifest = _newest_to_safetensors(source, target)
        print(f"Wrote the weights of step {manifest.step} to {target}")
        return ExitCode.FINISHED
    from minbert.trainer.run.preparation import prepare

    if not source.is_dir():
        raise UserError(f"{source} is no folder")
    config = parse_run_config([f"--run={target}", *options], "checkpoint convert")
    with lock_runs([target]):
        checkpoint, missing = from_deepspeed(source, prepare(config))
    if missing:
        print(f"Not in {source}, and as the run would start: {', '.join(missing)}")
    print(f"Wrote {checkpoint}. To go on from it: minbert resume {target}")
    return ExitCode.FINISHED


def _newest_to_safetensors(source: Path, target: Path) -> Manifest:
    """The newest checkpoint that is still there once it has been read: a run that goes on removes old ones. Raises
    UserError if there is none, or it is damaged."""
    from minbert.trainer.run.conversion import to_safetensors

    while checkpoints := _checkpoints(source):
        try:
            return to_safetensors(checkpoints[-1], target)
        except UserError:
            if checkpoints[-1].exists():
                raise
    raise UserError(f"{source} has no checkpoints")


def _checkpoints(folder: Path) -> list[Path]:
    """Those of a run, or the one that the folder itself is."""
    if (folder / MANIFEST).exists():
        return [folder]
    if folder.parent.name == "checkpoints" and folder.is_dir():
        return [folder]
    return published(RunFolder.existing(folder).checkpoints)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
