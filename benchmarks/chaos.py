"""Runs that are killed again and again, at random moments and in every way, until they finish; and files that rot.

A reference run is trained undisturbed. Other runs of the same command are killed and started again; whatever happened
to them, they must end with the reference's checkpoint, best model, log and predictions, to the bit, and after every
kill each checkpoint must be intact. Then every file of the reference's newest checkpoint is damaged, which must be
noticed, and resuming must take the checkpoint before it. Everything is watched from outside; dropout is on.

    python benchmarks/chaos.py --kills 200 --out FOLDER
"""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path

import torch
import tyro
from chaos_damage import DAMAGE, MISSED, damage_and_look
from chaos_kills import KINDS, LOADING, Course, Ended, Life, newest_step
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from minbert.trainer.checkpoint.format import Damaged, damaged, published, read_manifest, verify
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.surgery.conflicts import read_gramians


@dataclass(frozen=True)
class Options:
    """Benchmark of resuming after kills and damage."""

    out: Path
    """Folder for the runs; results.json is written there. It must not exist."""
    kills: int = 200
    processes: int = 2
    zero_stage: int | None = None
    aggregator: str = "gradvac"
    """One that has a state of its own puts that to the test, too."""
    steps: int = 100
    save_every: int = 5
    eval_every: int = 20
    damages: int = 200
    """Bit flips, and truncations, of each file of a checkpoint; 0 leaves damage out."""
    data: str = "builtin"
    seed: int = 0


class Chaos:
    """The runs, the kills so far, and what should not have happened."""

    def __init__(self, options: Options):
        self.options, self.random = options, random.Random(options.seed)
        self.reference = RunFolder(options.out / "reference")
        self.violations: list[str] = []
        self.kills: list[dict] = []
        self.disturbances: list[dict] = []
        self.runs = self.late = 0  # late: lives that ended before the kill that was meant for them
        self.course = Course(options.steps, 0.0, 0.0, 0.0)
        self._kinds: list[str] = []

    def start(self, run: RunFolder) -> Life:
        o = self.options
        command = f"train --run {run.path} --seed {o.seed} --steps {o.steps} --eval-every {o.eval_every}"
        command += f" --save-every {o.save_every} --processes {o.processes} --aggregator {o.aggregator}"
        command += f" --data {o.data} --log-every 1 --batch-size 8 --train-limit 120 --eval-limit 40 --trackers"
        command += "" if o.zero_stage is None else f" --zero-stage {o.zero_stage}"
        with self.output(run).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "minbert.launch.main", *command.split()], stdout=output, stderr=output
            )
        return Life(run, process, o.processes, self.course)

    def output(self, run: RunFolder) -> Path:
        """What all lives of a run printed."""
        return run.path.with_suffix(".log")

    def train_references(self) -> None:
        """Train undisturbed, twice: a killed run can only be held to what is the same every time. The second one, which
        finds the data tokenised as the runs after it will, tells how long the parts of a life take."""
        for run in (self.reference, again := RunFolder(self.options.out / "again")):
            life, times = self.start(run), []
            for step in (1, self.options.steps):
                while life.process.poll() is None and life.step() < step:
                    time.sleep(0.02)
                times.append(time.monotonic() - life.started)
            if life.process.wait() != ExitCode.FINISHED:
                sys.exit(f"an undisturbed run failed:\n{self.output(run).read_text()}")
            times.append(time.monotonic() - life.started)
        starting, trained, ended = times
        self.course = Course(self.options.steps, starting, trained - starting, ended - trained)
        self.violations += self.differences(again)
        print(f"undisturbed: {self.course}", flush=True)

    def kill_runs(self) -> None:
        """Kill runs until there are enough kills, and let the last one finish."""
        while self.wants_more():
            self.runs += 1
            run = RunFolder(self.options.out / f"run-{self.runs}")
            before = len(self.violations)
            while len(self.violations) == before and not self.live(run):
                pass
            if len(self.violations) == before:
                self.violations += self.differences(run)
            if len(self.violations) == before:  # otherwise it is kept as it is
                shutil.rmtree(run.path)

    def wants_more(self) -> bool:
        """Whether kills are missing: as many as asked for, and of as many kinds, whose turn may not have come as there
        was nothing to load."""
        kinds = {one["kind"] for one in self.kills + self.disturbances}
        done = len(self.kills) + len(self.disturbances)
        return done < self.options.kills or len(kinds) < min(self.options.kills, len(KINDS))

    def live(self, run: RunFolder) -> bool:
        """Start a run; disturb and kill it if that is wanted and it is still training. Whether it finished."""
        newest, kind = newest_step(run), None
        life, loads = self.start(run), newest > 0
        try:
            while kind is None and self.wants_more() and newest < self.options.steps:
                kind = self.draw_kind(loads)
                wrong = KINDS[kind](life, self.random)
                if wrong is not None:
                    self.note_disturbance(run, kind, wrong)
                    kind, loads = None, False  # it has loaded long ago
        except Ended:
            kind = None
        code = self.end(life)
        if code == ExitCode.FINISHED:
            self.late += self.wants_more() and newest < self.options.steps
            expected = [path.name for path in self.reference.predictions.glob("*.csv")]
            has_predicted = all((run.predictions / name).exists() for name in expected)
            if not has_predicted and kind is None:
                self.violations.append(f"{run.path.name}: a life that nobody killed finished without predictions")
            return has_predicted  # one that is asked to stop amid them leaves them to the next start
        if kind is None:
            self.violations.append(f"{run.path.name}: exit code {code} of a life that nobody killed")
        else:
            self._kinds.remove(kind)
            self.inspect(run, life, kind, code, newest)
        return False

    def note_disturbance(self, run: RunFolder, kind: str, wrong: list[str]) -> None:
        """A life was disturbed, and must end as if it had not been."""
        self._kinds.remove(kind)
        self.violations += [f"{run.path.name} ({kind}): {line}" for line in wrong]
        self.disturbances.append({"run": run.path.name, "kind": kind})
        print(json.dumps(self.disturbances[-1]), *wrong, sep="\n  ", flush=True)

    def draw_kind(self, loads: bool) -> str:
        """At random, but so that every kind comes up equally often. `loads`: whether the life is still to load."""
        while True:
            for kind in self._kinds:
                if loads or kind != LOADING:
                    return kind
            self._kinds += self.random.sample(list(KINDS), len(KINDS))

    def end(self, life: Life) -> int | None:
        """Wait for the processes of a life to end; the launcher's exit code."""
        try:
            return life.wait_for_end(300)
        except TimeoutError as error:
            self.violations.append(f"{life.run.path.name}: {error}")
            return None

    def inspect(self, run: RunFolder, life: Life, kind: str, code: int | None, newest_before: int) -> None:
        """Look at what a kill left."""
        options, wrong = self.options, []
        for checkpoint in published(run.checkpoints):
            try:
                wrong += verify(checkpoint, read_manifest(checkpoint))
            except Damaged as problem:
                wrong.append(str(problem))
        wrong += [f"{path} was set aside" for path in damaged(run.checkpoints)]
        newest = newest_step(run)
        if newest < newest_before:
            wrong.append(f"the newest checkpoint went back from step {newest_before} to {newest}")
        trained = life.trained()
        # What an earlier life logged beyond its last checkpoint was that one's loss.
        # It may have made the log, and not come to its first step.
        lost = max(0, max((record["step"] for record in run.read_metrics()), default=0) - newest) if trained else 0
        # At a step that saves, the checkpoint of the last such step is complete, and this one may not be.
        if lost > (0 if kind == "SIGTERM" else 2 * options.save_every):
            wrong.append(f"{lost} steps lost")
        if kind == "SIGTERM" and life.all_caught and code != ExitCode.INTERRUPTED and newest < options.steps:
            wrong.append(f"exit code {code} instead of {ExitCode.INTERRUPTED:d}")
        if code == ExitCode.INTERRUPTED and lost:
            wrong.append(f"exit code {code}, and steps are lost")
        self.violations += [f"{run.path.name}, kill {len(self.kills) + 1} ({kind}): {line}" for line in wrong]
        unfinished = [sorted(path.name for path in folder.iterdir()) for folder in run.checkpoints.glob("*.unfinished")]
        kill = {"run": run.path.name, "kind": kind, "seconds": life.struck, "code": code, "trained": trained}
        kill |= {"caught": life.all_caught, "lost": lost, "newest": newest, "unfinished": unfinished}
        self.kills.append(kill)
        print(f"kill {len(self.kills)}: {json.dumps(kill)}", *wrong, sep="\n  ", flush=True)

    def differences(self, run: RunFolder) -> list[str]:
        """In what a finished run differs from the reference."""
        reference, different = self.reference, []
        for path in reference.predictions.glob("*.csv"):
            if (run.predictions / path.name).read_bytes() != path.read_bytes():
                different.append(path.name)
        ends = [published(one.checkpoints)[-1] for one in (run, reference)]
        for path in ends[1].glob("*.safetensors"):
            if not equal(ends[0] / path.name, path):  # weights, moments and random states
                different.append(f"{ends[0].name}/{path.name}")
        if not equal(run.best_model, reference.best_model):
            different.append("best.safetensors")
        if records(run) != records(reference):
            different.append("metrics.jsonl")
        gramians = [read_gramians(one.gramians_file) for one in (run, reference) if one.gramians_file.exists()]
        if gramians and not (gramians[0][:3] == gramians[1][:3] and torch.equal(gramians[0][3], gramians[1][3])):
            different.append("gramians.jsonl")
        return [f"{run.path.name} ends with another {what} than the reference" for what in different]

    def damage_files(self) -> list[dict]:
        """Damage every file of a copy of the newest checkpoint in many ways, and resume after one for each."""
        checkpoint = self.options.out / "damaged" / published(self.reference.checkpoints)[-1].name
        shutil.copytree(published(self.reference.checkpoints)[-1], checkpoint)
        cases = []
        for name, damage in zip(sorted(path.name for path in checkpoint.iterdir()), cycle(DAMAGE)):
            found: dict[str, Counter] = {kind: Counter() for kind in DAMAGE}
            for kind, repeated in product(DAMAGE, range(self.options.damages)):
                if repeated and kind in ("removed", "emptied"):
                    continue  # always the same
                how, noticed = damage_and_look(checkpoint / name, kind, self.random)
                found[kind][noticed] += 1
                if noticed == MISSED:
                    self.violations.append(f"{name} {kind} ({how}): not noticed")
            wrong = self.resume_damaged(name, damage)
            self.violations += wrong
            cases.append({"file": name, "found": found, "resumed after": damage, "equal": not wrong})
            print(json.dumps(cases[-1]), *wrong, sep="\n  ", flush=True)
        return cases

    def resume_damaged(self, name: str, damage: str) -> list[str]:
        """Train a copy of the reference on, with one file of its newest checkpoint damaged; what is wrong then."""
        run = RunFolder(self.options.out / f"damaged-{name.partition('.')[0]}")
        shutil.copytree(self.reference.path, run.path)
        last, before = published(run.checkpoints)[-1], published(run.checkpoints)[-2]
        DAMAGE[damage](last / name, self.random)
        if (code := self.end(self.start(run))) != ExitCode.FINISHED:
            return [f"{name} {damage}: exit code {code} instead of resuming"]
        said = self.output(run).read_text()
        wrong = self.differences(run)
        if f"damaged checkpoint: {last / name}" not in said:
            wrong.append(f"{name} {damage}: the damage was not named")
        if f" from step {int(before.name.partition('-')[2])} of " not in said:
            wrong.append(f"{name} {damage}: {before.name} was not taken")
        if not wrong:
            shutil.rmtree(run.path)
        return wrong


def equal(path: Path, other: Path) -> bool:
    found, expected = load_file(path), load_file(other)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def records(run: RunFolder) -> list[dict]:
    """What was logged, without the times."""
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in run.read_metrics()]


def table(kills: list[dict]) -> Table:
    shown = Table("kind of kill", "kills", "in training", "save cut short", "exit codes", "steps lost (median, most)")
    for kind in [*KINDS, "all"]:
        these = [kill for kill in kills if kind in ("all", kill["kind"])]
        lost = [kill["lost"] for kill in these if kill["trained"]]
        codes = Counter(kill["code"] for kill in these)
        shown.add_row(
            kind,
            str(len(these)),
            str(sum(kill["trained"] for kill in these)),
            str(sum(bool(kill["unfinished"]) for kill in these)),
            ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())),
            f"{statistics.median(lost):g}, {max(lost)}" if lost else "-",
        )
    return shown


def main() -> None:
    options = tyro.cli(Options)
    options.out.mkdir(parents=True)
    os.environ["MINBERT_CACHE"] = str(options.out / "cache")
    started, chaos = time.monotonic(), Chaos(options)
    chaos.train_references()
    chaos.kill_runs()
    cases = chaos.damage_files() if options.damages else []
    console = Console(width=120)
    console.print(f"{platform.machine()}, {options}", highlight=False)
    console.print(table(chaos.kills))
    console.print(f"disturbed: {dict(Counter(one['kind'] for one in chaos.disturbances))}", highlight=False)
    noticed = sum((count for case in cases for count in case["found"].values()), Counter())
    console.print(
        f"{chaos.runs} runs, {chaos.late} lives over before their kill, {(time.monotonic() - started) / 60:.0f} minutes"
    )
    console.print(f"damage: {dict(noticed)}, resumed equal: {sum(case['equal'] for case in cases)} of {len(cases)}")
    console.print(
        f"violations: {len(chaos.violations)}", *chaos.violations, sep="\n  ", highlight=False, soft_wrap=True
    )
    result = {"options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}}
    result |= {"runs": chaos.runs, "late": chaos.late, "undisturbed": asdict(chaos.course), "kills": chaos.kills}
    result |= {"disturbances": chaos.disturbances, "damage": cases, "violations": chaos.violations}
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(chaos.violations))


if __name__ == "__main__":
    main()
