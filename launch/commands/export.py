"""`minbert export RUN FOLDER`: the best model for transformers, sentence-transformers and the Hugging Face hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.help import open_option
from minbert.launch.options import parse
from minbert.launch.outputs import whole_or_gone
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's best model as a folder that transformers, sentence-transformers and --model load, with its heads
    and a model card; and perhaps to the Hugging Face hub."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not exist, or be empty."""
    seeds: tuple[Path, ...] = ()
    """Folders of runs that differ from it in their seed only: the card tells how the scores vary."""
    push: Annotated[str | None, open_option("USER/NAME")] = None
    """Then upload it to this repository of the hub, which is made, and private, if there is none. Needs a login:
    `hf auth login`, or the environment variable HF_TOKEN."""


def main(arguments: list[str]) -> int:
    options = parse(ExportOptions, arguments, "export")
    if options.push is not None:
        _require_repository(options.push)
    export(RunFolder.existing(options.run), options.folder, options.seeds)
    print(f"Exported. In Python: transformers.AutoModel.from_pretrained({str(options.folder)!r})")
    print(f"What else it is for: {options.folder / 'README.md'}", flush=True)
    if options.push is not None:
        print(f"Uploaded: {_push(options.folder, options.push)}")
    return ExitCode.FINISHED


def export(run: RunFolder, folder: Path, seeds: Sequence[Path] = ()) -> Path:
    """Write the run's best model into a new or empty folder; `seeds` are runs that differ in their seed only. Raises
    UserError."""
    with whole_or_gone(folder, new=True):
        from minbert.trainer.export.folder import export_model

        export_model(run, folder, _scores_by_seed(run, seeds) if seeds else {})
    return folder


def _scores_by_seed(run: RunFolder, others: Sequence[Path]) -> dict[int, dict[str, float]]:
    """Raises UserError for a run that differs in more than its seed."""
    from minbert.tuning.runs_compared import compare_runs

    found = compare_runs([run.path, *others])
    if found.options.keys() - {"seed"} or len(found.groups) > 1:
        what = ", ".join(found.options.keys() - {"seed"}) or "nothing, not even their seed"
        raise UserError(f"--seeds takes runs that differ in their seed only; these differ in {what}")
    return found.groups[0].scores


def _require_repository(name: str) -> None:
    """Raises UserError for what can be no repository, before there is work."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from None


def _push(folder: Path, name: str) -> str:
    """Upload the folder; the address of what is there now. Raises UserError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=address.repo_id, commit_message="minbert export")
    except Exception as error:  # the hub's errors, and those of the network, have no common base
        said = str(error).strip().splitlines()
        raise UserError(
            f"{name} could not be uploaded ({type(error).__name__}{': ' + said[0] if said else ''}).\n"
            f"It needs the network and a login (`hf auth login`, or HF_TOKEN). The folder is whole; to try again:\n"
            f"hf upload {name} {folder}"
        ) from None
    return str(address)
