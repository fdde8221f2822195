"""Experiment trackers through Accelerate, which a resumed run finds again under the name that they gave it."""

import logging
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from accelerate import Accelerator

from minbert.data.errors import UserError

log = logging.getLogger(__name__)


class Trackers:
    """Sends records to a run's trackers. A tracker that fails costs a warning, not the run."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._failed = False

    def start(self, config: Mapping[str, Any], step: int, identities: dict[str, str]) -> None:
        """Begin, or go on after `step` with what `identities` (tracker -> its name for this run) remembers; the names
        of new trackers are added there. On rank 0. Raises UserError."""
        # TensorBoard forgets what an earlier start logged beyond the step from which this one goes on.
        arguments: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
        names = [getattr(kind, "value", kind) for kind in self.accelerator.log_with]
        names = [getattr(name, "name", name) for name in names]
        if "wandb" in names:
            arguments["wandb"] = {"id": identities.setdefault("wandb", uuid4().hex), "resume": "allow"}
        if "mlflow" in names and "mlflow" in identities:
            arguments["mlflow"] = {"run_id": identities["mlflow"]}
        # A run that goes on has told its configuration before, and MLflow allows it once.
        described = None if step else {name: str(value) for name, value in config.items()}
        try:
            self.accelerator.init_trackers("metrics", described, arguments)
        except Exception as error:  # each tracker fails in its own way
            text = f"of {', '.join(names)} could not be started: {type(error).__name__}: {error}"
            raise UserError(f"a tracker {text}\nSet it up, or leave it out (--trackers).") from error
        if "mlflow" in names:
            run = self.accelerator.get_tracker("mlflow", unwrap=True)
            identities.setdefault("mlflow", run.info.run_id)

    def log(self, record: Mapping[str, float], step: int) -> None:
        try:
            self.accelerator.log(dict(record), step=step)
        except Exception as error:  # a full disk, a server that is down: each tracker fails in its own way
            if not self._failed:
                log.warning("a tracker failed (%s: %s); metrics.jsonl has everything", type(error).__name__, error)
            self._failed = True

    def end(self) -> None:
        try:
            self.accelerator.end_training()
        except Exception as error:
            log.warning("a tracker could not be closed (%s: %s)", type(error).__name__, error)
