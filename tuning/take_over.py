"""Making a run go on from another's newest checkpoint, as if it had been there, with other options.

Everything is put together in `taking-over/` first, when it is decided, as the other run goes on meanwhile; it takes its
places when the run is started. A kill leaves the run as it was, or to be finished by the next start.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError, disk_trouble
from minbert.data.files import replacing
from minbert.trainer.checkpoint.format import Damaged, Manifest, folder_name, published, read_manifest, remember, verify
from minbert.trainer.config import RunConfig, flatten, parse_config
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import resolve, settings
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
    config = resolve(parse_config(dict(options) | {"run": run.path}, str(run.path)))
    source, checkpoints = donor, staging / run.checkpoints.name
    if (manifest := _copy_newest(donor, checkpoints)) is None:
        source, manifest = run, _copy_newest(run, checkpoints)
    if manifest is not None:
        _make_own(checkpoints / folder_name(manifest.step), manifest, run, config)
        remember(checkpoints, manifest.step)
        for file in (source.best_model, source.metrics_file, source.gramians_file):
            if file.exists():
                shutil.copy2(file, staging / file.name)
    RunFolder(staging).write_config(config)
    from_step = manifest.step if manifest else 0
    schedule = [*_schedule(source, from_step), {"options": _explored(config), "from_step": from_step}]
    with replacing(staging / READY) as temporary:
        temporary.write_text(json.dumps({"number": number, "donor": donor.path.name, "schedule": schedule}))


def _schedule(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """The parts up to the checkpoint of a step."""
    file = run.path / SCHEDULE_FILE
    parts = json.loads(file.read_text())["schedule"] if file.exists() else []
    if not parts and run.config_file.exists():
        parts = [{"from_step": 0, "options": _explored(run.read_config())}]
    return [part for part in parts if part["from_step"] < step]


def _explored(config: RunConfig) -> dict[str, Any]:
    """The options that may change on the way."""
    return {name: value for name, value in flatten(config).items() if name in EXPLORED}


def _make_own(copy: Path, manifest: Manifest, run: RunFolder, config: RunConfig) -> None:
    """Let a copy of the donor's checkpoint say the run's settings, and the names that the run's trackers know it by."""
    trackers: dict[str, str] = {}
    for checkpoint in reversed(published(run.checkpoints)):
        with suppress(Damaged, UserError):
            trackers = read_manifest(checkpoint).state.trackers
            break
    replace(
        manifest,
        state=replace(manifest.state, trackers=trackers),
        identity=manifest.identity | {"settings": settings(config)},
        config=config.model_dump(mode="json"),
    ).write(copy)


def _copy_newest(donor: RunFolder, folder: Path) -> Manifest | None:
    """The donor's newest intact checkpoint, also in `folder`; the donor may be pruning them meanwhile."""
    for _ in range(ATTEMPTS):
        for checkpoint in reversed(published(donor.checkpoints)):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                copy = Path(shutil.copytree(checkpoint, folder / checkpoint.name, copy_function=_link))
                manifest = read_manifest(copy)
                if not verify(copy, manifest):
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
