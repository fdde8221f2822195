"""What a job asks of the cluster: typed settings, from defaults, the site's file, an earlier submission and options.

The site's file is YAML with the fields of `JobSettings`: $MINBERT_SITE, or ~/.config/minbert/site.yaml. It is the place
for what is the same for all of a user's jobs: partition, account, lines that set up the environment.
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from minbert.data.errors import UserError, explain
from minbert.data.reading import read_yaml

Count = Annotated[int, Field(ge=1)]
UNLIMITED = 60 * 24 * 365  # minutes that a job without a time limit has on this machine
RESERVED_PARAMETERS = frozenset(  # of submitit's: there is a field for each, or nobody's business
    (
        *("job_name", "time", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "mem", "partition"),
        *("account", "qos", "constraint", "setup", "teardown", "srun_args", "signal_delay_s", "use_srun"),
        *("stderr_to_stdout", "array_parallelism", "num_gpus"),
    )
)


class JobSettings(BaseModel):
    """The job's share of the cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """Where to run: on the cluster, as processes of this machine in the background, or in this process."""
    job_name: str | None = None
    """Name of the job; the default is the run folder's."""
    nodes: Count = 1
    """Nodes."""
    tasks_per_node: Count | None = None
    """Processes per node; the default is one per GPU, or one."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs per node."""
    cpus_per_task: Count | None = None
    """Cores per process."""
    mem: str | None = None
    """Memory per node, as sbatch takes it: `64G`."""
    time: str | None = None
    """Time limit: `8h`, `90m`, `1d12h`, `1-12:00:00`, or minutes; the default is the partition's."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    interface: str | None = None
    """Network interface for NCCL and gloo, such as `ib0`; the default is chosen by them, and by the route to the head
    node."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before the processes start: `module load cuda`."""
    srun_args: tuple[str, ...] = ()
    """More arguments of srun, such as `--container-image=...`."""
    python: str | None = None
    """Command that starts Python in the processes, such as `apptainer exec image.sif python`; the default is this
    Python."""
    array_parallelism: Count = 256
    """Elements of a sweep that may run at once."""
    max_requeues: Annotated[int, Field(ge=0)] = 50
    """How often a job may go on after its time limit, a preemption or a loss."""
    signal_before: Count = 120
    """Seconds before the time limit at which the job is told to save and leave."""
    slurm_parameters: dict[str, Any] = {}
    """Any other parameter of submitit's SLURM executor: `exclude`, `gres`, `mail_user`, ..., and
    `additional_parameters` for options of sbatch that it has no name for."""

    @field_validator("setup", "srun_args", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: Any) -> Any:
        """A file may give the lines, or the arguments, as one text."""
        if not isinstance(value, str):
            return value
        try:
            return value.splitlines() if info.field_name == "setup" else shlex.split(value)
        except ValueError as error:
            raise ValueError(f"{info.field_name}: {str(error).lower()} in {value!r}") from None

    @field_validator("time", mode="before")
    @classmethod
    def _with_a_unit(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f"time: {value} could be minutes or seconds; write 1:30:00, 90m or 8h")
        return value

    @field_validator("job_name", "mem", "partition", "account", "qos", "constraint", "reservation", mode="after")
    @classmethod
    def _one_line(cls, value: str | None, info: Any) -> str | None:
        if value is not None:
            refuse_control_characters(value, info.field_name)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "JobSettings":
        if self.gpus_per_node and self.tasks_per_node and self.tasks_per_node > self.gpus_per_node:
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node}, but gpus_per_node={self.gpus_per_node}: "
                "each process needs a GPU of its own"
            )
        if self.executor != "slurm" and self.nodes > 1:
            raise ValueError(
                f"nodes={self.nodes}, but the {self.executor} executor has this machine only; leave it out"
            )
        if self.executor == "debug" and self.tasks > 1:
            raise ValueError(f"{self.tasks} processes, but the debug executor runs in this one; use executor=local")
        if self.minutes is not None and self.minutes * 60 <= self.signal_before:
            raise ValueError(
                f"time={self.time} leaves nothing before the request to save, "
                f"signal_before={self.signal_before} seconds earlier"
            )
        _refuse_unknown(self.slurm_parameters)
        return self

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def tasks(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.processes_per_node

    @property
    def minutes(self) -> int | None:
        """The time limit. Raises ValueError if it is none."""
        return None if self.time is None else parse_time(self.time)


def refuse_control_characters(text: str, what: str) -> None:
    """Raises ValueError for a line break and the like: in a batch script the next line may be anything."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"{what}: {text!r} holds a line break or another control character")


def parse_time(text: str) -> int:
    """Minutes of `8h`, `90m`, `1d12h`, of sbatch's `[days-]hours:minutes[:seconds]`, or of a plain number of minutes.

    Raises ValueError for anything else.
    """
    text = text.strip()
    days, _, clock = text.rpartition("-")
    if text.isdecimal():
        minutes = int(text)
    elif named := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?", text):
        minutes = sum(int(n or 0) * size for n, size in zip(named.groups(), (24 * 60, 60, 1)))
    elif re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text) and (days or clock.count(":") == 2):
        hours, minute, second = (*map(int, clock.split(":")), 0, 0)[:3]
        minutes = (int(days or 0) * 24 + hours) * 60 + minute + (second > 0)
    else:
        minutes = 0
    if minutes < 1:
        raise ValueError(f"time: {text!r} is no time limit; write 8h, 90m, 1d12h, 1-12:00:00 or a number of minutes")
    return minutes


def resolve_settings(options: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> JobSettings:
    """Defaults < the site's file < `earlier`, an earlier submission's settings < `options`.

    Parameters under `slurm_parameters` are merged one by one. Raises UserError naming the file and what is wrong in it.
    """
    file = site_file()
    site: dict[str, Any] = {}
    if file.exists():
        site = read_yaml(file)
        parse_settings(site, str(file))
    merged: dict[str, Any] = {}
    for layer in (site, earlier or {}, options):
        parameters = merged.get("slurm_parameters", {}) | layer.get("slurm_parameters", {})
        merged |= layer
        merged["slurm_parameters"] = parameters
    return parse_settings(merged, "options" if not site else f"options and {file}")


def site_file() -> Path:
    named = os.environ.get("MINBERT_SITE")
    if named and not Path(named).exists():
        raise UserError(f"$MINBERT_SITE names {named}, which does not exist")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(named) if named else config / "minbert" / "site.yaml"


def parse_settings(raw: Mapping[str, Any], where: str) -> JobSettings:
    """Raises UserError with a line for every wrong key or value in `where`."""
    try:
        return JobSettings(**raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_explain(problem)}" for problem in error.errors())) from None


def parse_parameters(words: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE words as a mapping; a name alone is a flag. Raises UserError for a word without a name."""
    parameters: dict[str, Any] = {}
    for word in words:
        name, given, value = word.partition("=")
        if not name:
            raise UserError(f"--slurm-parameters takes NAME=VALUE, not {word!r}")
        parameters[name.replace("-", "_")] = value if given else True
    return parameters


def _refuse_unknown(parameters: Mapping[str, Any]) -> None:
    if not parameters:
        return
    from submitit import SlurmExecutor

    valid = sorted(SlurmExecutor._valid_parameters() - RESERVED_PARAMETERS)
    for name in parameters:
        if name in RESERVED_PARAMETERS:
            field = {"ntasks_per_node": "tasks_per_node", "num_gpus": "gpus_per_node"}.get(name, name)
            hint = f"; it is the option {field}" if field in JobSettings.model_fields else ""
            raise ValueError(f"slurm_parameters cannot set {name!r}{hint}")
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"SLURM parameter {name!r} is unknown; {hint}There are {', '.join(valid)}. "
                "Any other option of sbatch goes under additional_parameters."
            )
        if name != "additional_parameters":
            _refuse_odd_values(parameters, [name])
        elif isinstance(additional := parameters[name], Mapping):
            _refuse_odd_values(additional, additional)
        else:
            raise ValueError(
                f"additional_parameters must hold options of sbatch with their values, not {additional!r}; "
                "they are given in the site's file"
            )


def _refuse_odd_values(parameters: Mapping[Any, Any], names: Iterable[Any]) -> None:
    """What becomes a line `#SBATCH --NAME=VALUE` must fit on one."""
    for name in names:
        if not isinstance(parameters[name], str | int | float):
            raise ValueError(f"SLURM parameter {name} must be a text or a number, not {parameters[name]!r}")
        refuse_control_characters(str(name), "the name of a SLURM parameter")
        refuse_control_characters(str(parameters[name]), f"SLURM parameter {name}")


def _explain(problem: Any) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, JobSettings.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(JobSettings.model_fields)}"
        return f"unknown key {key!r}; {hint}"
    return explain(problem, key)
