"""Making a run go on from another's newest checkpoint, as if it had been there, with other options.

Everything is put together in `taking-over/` first, when it is decided, as the other run goes on meanwhile; it takes its
places when the run is started. A kill leaves the run as it was, or to be finished by the next start.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError, disk_trouble
from minbert.data.files import replacing
from minbert.trainer.checkpoint import Damaged, Manifest, published, read_manifest, verify
from minbert.trainer.config import RunConfig, flatten, parse_config
from minbert.trainer.preparation import resolve
from minbert.trainer.run_folder import RunFolder
from minbert.tuning.space import EXPLORED
from minbert.tuning.trial import SCHEDULE_FILE

STAGING, READY = "taking-over", "ready"
ATTEMPTS = 5


def take_over(run: RunFolder, donor: RunFolder, options: Mapping[str, Any], number: int) -> int:
    """The run's `number`th time; one that is done already is not done again. Returns the step from which the run goes
    on. Nobody else may be in the run's folder."""
    done, staging = run.path / SCHEDULE_FILE, run.path / STAGING
    if done.exists() and (before := json.loads(done.read_text()))["number"] >= number:
        return before["schedule"][-1]["from_step"]
    stage(run, donor, options, number)
    record = json.loads((staging / READY).read_text())
    for entry in staging.iterdir():
        place = run.path / entry.name
        if entry.name != READY:
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(entry, place)
    with replacing(done) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(staging)
    return record["schedule"][-1]["from_step"]


def stage(run: RunFolder, donor: RunFolder, options: Mapping[str, Any], number: int) -> None:
    """Put together, unless that was done, what the run will go on from. Takes no room where files can have two names.

    Without an intact checkpoint of the donor, the run goes on from its own with the new options. By which options the
    weights came about is written down, too.
    """
    staging = run.path / STAGING
    if (staging / READY).exists() and json.loads((staging / READY).read_text())["number"] == number:
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    manifest = _copy_newest(donor, staging / run.checkpoints.name)
    if manifest is not None:
        for source in (donor.best_model, donor.metrics_file, donor.gramians_file):
            if source.exists():
                shutil.copy2(source, staging / source.name)
    config = resolve(parse_config(dict(options) | {"run": run.path}, str(run.path)))
    RunFolder(staging).write_config(config)
    schedule = [*_schedule(donor if manifest else run, manifest), {"options": _explored(config)}]
    schedule[-1]["from_step"] = manifest.step if manifest else _newest_step(run)
    with replacing(staging / READY) as temporary:
        temporary.write_text(json.dumps({"number": number, "donor": donor.path.name, "schedule": schedule}))


def _schedule(run: RunFolder, manifest: Manifest | None) -> list[dict[str, Any]]:
    """The parts up to the checkpoint of `manifest`; without one, those of the whole run."""
    file = run.path / SCHEDULE_FILE
    parts = json.loads(file.read_text())["schedule"] if file.exists() else []
    if not parts and run.config_file.exists():
        parts = [{"from_step": 0, "options": _explored(run.read_config())}]
    return [part for part in parts if manifest is None or part["from_step"] < manifest.step]


def _explored(config: RunConfig) -> dict[str, Any]:
    """The options that may change on the way."""
    return {name: value for name, value in flatten(config).items() if name in EXPLORED}


def _newest_step(run: RunFolder) -> int:
    return max((int(path.name.removeprefix("step-")) for path in published(run.checkpoints)), default=0)


def _copy_newest(donor: RunFolder, folder: Path) -> Manifest | None:
    """The donor's newest intact checkpoint, also in `folder`; the donor may be pruning them meanwhile."""
    for _ in range(ATTEMPTS):
        for checkpoint in reversed(published(donor.checkpoints)):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                copy = Path(shutil.copytree(checkpoint, folder / checkpoint.name, copy_function=_link))
                manifest = read_manifest(copy)
                if not verify(copy, manifest):
                    # What the donor's trackers call it stays the donor's.
                    replace(manifest, state=replace(manifest.state, trackers={})).write(copy)
                    return manifest
            except (OSError, Damaged, UserError) as error:
                if isinstance(error, OSError) and disk_trouble(error):
                    raise
        shutil.rmtree(folder, ignore_errors=True)
        if not published(donor.checkpoints):
            return None
    return None


def _link(source: str, target: str) -> None:
    """What was published is never changed, so one file under two names is as good as two."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
