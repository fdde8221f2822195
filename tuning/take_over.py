"""Making a run go on from another's newest checkpoint, as if it had been there, with other options.

Everything is put together in `taking-over/` first and takes its places when it is whole, so that a kill leaves the run
as it was, or to be finished by the next call.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.trainer.checkpoint import Damaged, Manifest, folder_name, published, read_manifest, remember, verify
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.preparation import resolve, settings
from minbert.trainer.run_folder import RunFolder

STAGING, READY, DONE = "taking-over", "ready", "taken-over.json"
ATTEMPTS = 5


def take_over(run: RunFolder, donor: RunFolder, options: Mapping[str, Any], number: int) -> None:
    """The run's `number`th time; one that is done already is not done again.

    Without an intact checkpoint of the donor, the run goes on from its own newest one with the new options.
    """
    done = run.path / DONE
    if done.exists() and json.loads(done.read_text())["number"] >= number:
        return
    staging = run.path / STAGING
    if not (staging / READY).exists():
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        config = resolve(parse_config(dict(options) | {"run": run.path}, str(run.path)))
        source = donor
        if (manifest := _copy_newest(donor, staging / run.checkpoints.name)) is None:
            source, manifest = run, _copy_newest(run, staging / run.checkpoints.name)
        if manifest is not None:
            _make_own(staging / run.checkpoints.name / folder_name(manifest.step), manifest, run, config)
            remember(staging / run.checkpoints.name, manifest.step)
            for file in (source.best_model, source.metrics_file, source.gramians_file):
                if file.exists():
                    shutil.copy2(file, staging / file.name)
        RunFolder(staging).write_config(config)
        (staging / READY).write_text(json.dumps({"step": manifest.step if manifest else None}))
    step = json.loads((staging / READY).read_text())["step"]
    for entry in staging.iterdir():
        place = run.path / entry.name
        if entry.name != READY:
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(entry, place)
    with replacing(done) as temporary:
        temporary.write_text(json.dumps({"number": number, "donor": donor.path.name, "step": step}) + "\n")
    shutil.rmtree(staging)


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
    """The donor's newest intact checkpoint, copied into `folder`; the donor may be pruning them meanwhile."""
    for _ in range(ATTEMPTS):
        for checkpoint in reversed(published(donor.checkpoints)):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                copy = Path(shutil.copytree(checkpoint, folder / checkpoint.name))
                manifest = read_manifest(copy)
                if not verify(copy, manifest):
                    return manifest
            except (OSError, Damaged, UserError):
                continue
        shutil.rmtree(folder, ignore_errors=True)
        if not published(donor.checkpoints):
            return None
    return None
