"""Experiment trackers through Accelerate. A run is one run there, too, however often it is resumed.

What a tracker calls the run lies in the run folder (`trackers.json`) from its first start on, so a kill before the
first checkpoint does not make a second one of it; a run that takes over another's checkpoint keeps its own name.

Trackers talk to servers. They do so in a thread of their own: training waits for none of them, and what a server does
not take in time is left to metrics.jsonl, which has everything.
"""

import logging
import netrc
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from accelerate import Accelerator

from minbert.data.errors import UserError
from minbert.data.files import replacing, to_json
from minbert.data.reading import read_json

log = logging.getLogger(__name__)

START, END = 90.0, 30.0  # seconds that a tracker has to begin, and to send what is left
MOST = 10_000  # records that wait to be sent
# A server that does not answer is given up after seconds, not after the quarter of an hour that is usual.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Trackers:
    """Sends records to the trackers of the run in `folder`. A tracker that fails later costs a warning, not the run."""

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.accelerator, self.file = accelerator, folder / "trackers.json"
        names = [getattr(kind, "value", kind) for kind in accelerator.log_with]
        self.names = [getattr(name, "name", name) for name in names]
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST)
        self._thread: threading.Thread | None = None
        self._failed = False

    def start(self, config: Mapping[str, Any], step: int, identities: dict[str, str]) -> None:
        """Begin, or go on after `step` with what trackers.json and `identities`, of the checkpoint, remember: tracker
        -> its name for this run. The names of new trackers are added to both. On rank 0. Raises UserError."""
        if not self.names:
            return
        with suppress(FileNotFoundError):
            identities |= {name: str(value) for name, value in read_json(self.file).items()}
        described, known = {name: str(value) for name, value in config.items()}, bool(identities or step)
        answer: queue.Queue[Exception | None] = queue.Queue()

        def begin() -> None:
            try:
                with redirect_stdout(sys.stderr):  # what they say is no line of ours, which may be JSON
                    self._begin(described, known, step, identities)
                answer.put(None)
            except Exception as error:  # each tracker fails in its own way
                answer.put(error)

        self._thread = threading.Thread(target=self._serve, name="trackers", daemon=True)
        self._thread.start()
        self._work.put(begin)
        try:
            error = answer.get(timeout=START)
        except queue.Empty:
            error = TimeoutError(f"no answer within {START:.0f} s")
        if error is not None:
            self._thread = None
            text = f"of {', '.join(self.names)} could not be started: {type(error).__name__}: {error}"
            raise UserError(f"a tracker {text}\nSet it up, or leave it out (--trackers).") from error
        if identities:
            with replacing(self.file) as temporary:
                temporary.write_text(to_json(identities, indent=1) + "\n")

    def _begin(self, described: dict[str, str], known: bool, step: int, identities: dict[str, str]) -> None:
        # TensorBoard forgets what an earlier start logged beyond the step from which this one goes on.
        arguments: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
        title = self.file.parent.absolute().name
        if "wandb" in self.names:
            own = {"id": identities.setdefault("wandb", uuid4().hex), "resume": "allow", "name": title}
            arguments["wandb"] = own | {"dir": str(self.file.parent), **_wandb_mode()}
        if "trackio" in self.names:
            if folder := identities.get("trackio_dir") or os.environ.get("TRACKIO_DIR"):
                os.environ.setdefault("TRACKIO_DIR", identities.setdefault("trackio_dir", os.path.abspath(folder)))
            own = {"name": identities.setdefault("trackio", f"{title}-{uuid4().hex[:6]}"), "resume": "allow"}
            arguments["trackio"] = own | {"config": described}  # with every start, or it is forgotten
        if "mlflow" in self.names:
            for name, value in IMPATIENT.items():
                os.environ.setdefault(name, value)
            if "mlflow_uri" in identities:  # by default a folder where the command was typed, which may be another now
                os.environ.setdefault("MLFLOW_TRACKING_URI", identities["mlflow_uri"])
            arguments["mlflow"] = {"run_id": identities["mlflow"]} if "mlflow" in identities else {"run_name": title}
        # A run that goes on has told its configuration before, and MLflow allows it once.
        self.accelerator.init_trackers("metrics", None if known else described, arguments)
        if "mlflow" in self.names:
            import mlflow

            run = self.accelerator.get_tracker("mlflow", unwrap=True)
            identities.setdefault("mlflow", run.info.run_id)
            identities.setdefault("mlflow_uri", mlflow.get_tracking_uri())

    def log(self, record: Mapping[str, float], step: int) -> None:
        if self._thread is None:
            return
        try:
            self._work.put_nowait(lambda: self.accelerator.log(dict(record), step=step))
        except queue.Full:
            self._warn("is too slow", "records are left out")

    def end(self, patience: float = END) -> None:
        """Send what waits, within `patience` seconds."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with suppress(queue.Full):
            self._work.put_nowait(self._end)
            self._work.put_nowait(None)
        thread.join(patience)
        if thread.is_alive():
            self._warn(f"did not end within {patience:.0f} s", "what it had not sent is lost to it")

    def _end(self) -> None:
        with redirect_stdout(sys.stderr):
            self.accelerator.end_training()

    def _serve(self) -> None:
        """Everything of the trackers happens here: some of them know their run by the thread."""
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:  # a full disk, a server that is down: each tracker fails in its own way
                self._warn("failed", f"{type(error).__name__}: {error}")

    def _warn(self, what: str, more: str) -> None:
        if not self._failed:
            log.warning("a tracker %s (%s); metrics.jsonl has everything", what, more)
        self._failed = True


def _wandb_mode() -> dict[str, str]:
    """Without a key W&B would ask for one at the terminal, and without its server wait for that: then the run is kept
    in the run folder."""
    if os.environ.get("WANDB_MODE"):
        return {}
    if not _knows_key():
        why = "no key of W&B is known here (`wandb login`)"
    elif not _answers(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        why = "W&B's server cannot be reached"
    else:
        return {}
    log.warning("%s: its run is kept in the run folder, for `wandb sync`", why)
    return {"mode": "offline"}


def _knows_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        file = os.environ.get("NETRC") or Path.home() / ".netrc"
        return any("wandb" in host for host in netrc.netrc(file).hosts)
    return False


def _answers(url: str, patience: float = 5.0) -> bool:
    """Whether somebody listens there; a proxy is trusted to know."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return True
    place = urlsplit(url)
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname or "", port), patience).close()
    except OSError:
        return False
    return True
