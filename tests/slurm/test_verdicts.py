"""Why an attempt ended and whether the job goes on, judged from what is known of it."""

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from slurm_records import records_of

from minbert.slurm.controller import Job
from minbert.slurm.endings import Ending
from minbert.slurm.supervisor import KILLED, bounded, complaint
from minbert.slurm.verdict import Error, Evidence, Next, Verdict, judge

NOW = datetime(2030, 1, 1, 12)
RUNNING = Job("RUNNING", 0, False, NOW - timedelta(hours=1), NOW + timedelta(hours=7), 480)
OVER = replace(RUNNING, state="COMPLETING", ends=NOW)
PEER = Error(0, 1, "Traceback\nRuntimeError: Connection closed by peer [127.0.0.1]:4242")
OWN = Error(1, 1, "Traceback\nValueError: boom")


@pytest.mark.parametrize(
    ("what", "evidence", "ending", "following"),
    [
        ("finished", {"code": 0, "status": 0}, Ending.FINISHED, Next.NOTHING),
        ("a rank failed after the end", {"code": 0, "status": 1}, Ending.FINISHED, Next.NOTHING),
        ("warned", {"code": 75, "signal": 12, "status": 0}, Ending.TIME_LIMIT, Next.GO_ON),
        ("preempted", {"code": 75, "job": replace(RUNNING, preempted=True)}, Ending.PREEMPTED, Next.GO_ON),
        ("a signal", {"code": 75, "signal": 15}, Ending.STOPPED, Next.GO_ON),
        (
            "near the end",
            {"code": 75, "job": replace(RUNNING, ends=NOW + timedelta(minutes=1))},
            "time limit",
            Next.GO_ON,
        ),
        ("a signal too early", {"status": 143}, Ending.STOPPED, Next.GO_ON),
        ("cancelled by us", {"code": 75, "cancelled": True}, Ending.CANCELLED, Next.NOTHING),
        ("cancelled by scancel", {"code": 75, "job": OVER}, Ending.CANCELLED, Next.NOTHING),
        ("cancelled before it trained", {"status": 143, "job": OVER}, Ending.CANCELLED, Next.NOTHING),
        ("requeued", {"code": 75, "job": replace(OVER, restarts=1)}, Ending.REQUEUED, Next.LEFT_TO_SLURM),
        ("cancelled for another", {"job": replace(OVER, preempted=True)}, Ending.PREEMPTED, Next.SUBMIT_ANEW),
        ("no time to save", {"job": replace(OVER, ends=NOW + timedelta(hours=7))}, "time limit", Next.SUBMIT_ANEW),
        ("node down", {"job": replace(OVER, restarts=1), "down": ["n2"]}, "node failure", Next.LEFT_TO_SLURM),
        ("node down, no requeue", {"job": OVER, "down": ["n2"]}, "node failure", Next.SUBMIT_ANEW),
        ("an exception", {"errors": [PEER, OWN]}, Ending.FAILED, Next.NOTHING),
        ("a mistake", {"errors": [Error(0, 2, "no such file")]}, Ending.FAILED, Next.NOTHING),
        ("killed", {"errors": [PEER], "killed": "n1: task 1: Killed"}, Ending.KILLED, Next.GO_ON),
        ("out of memory", {"status": 137, "killed": "n1: task 1: Out Of Memory"}, Ending.KILLED, Next.GO_ON),
        ("a step too large", {"errors": [Error(1, 88, "does not fit"), PEER]}, Ending.OUT_OF_MEMORY, Next.GO_ON),
        ("lost contact", {"errors": [PEER]}, Ending.KILLED, Next.GO_ON),
        ("a killed step", {"status": 137}, Ending.KILLED, Next.GO_ON),
        ("no Python", {"status": 127}, Ending.FAILED, Next.NOTHING),
        ("srun's arguments", {"status": 255, "complaint": "unrecognized option '--x'"}, Ending.FAILED, Next.NOTHING),
        ("srun without a word", {"status": 255}, Ending.FAILED, Next.NOTHING),
        ("no grace", {"job": replace(OVER, restarts=1), "preempted": True}, Ending.PREEMPTED, Next.LEFT_TO_SLURM),
        ("the script killed", {"code": 75, "job": OVER, "script_killed": True}, Ending.KILLED, Next.GO_ON),
        ("the script killed, seen early", {"code": 75, "script_killed": True}, Ending.KILLED, Next.GO_ON),
        (
            "the script killed at the end",
            {"code": 0, "job": OVER, "script_killed": True},
            Ending.FINISHED,
            Next.NOTHING,
        ),
        (
            "the script killed, cancelled",
            {"code": 75, "job": OVER, "script_killed": True, "cancelled": True},
            Ending.CANCELLED,
            Next.NOTHING,
        ),
        ("SLURM is silent", {"code": 75, "job": None}, Ending.STOPPED, Next.GO_ON),
    ],
)
def test_verdicts(what, evidence, ending, following):
    verdict = judge(
        Evidence(**{"status": 1, "job": RUNNING, "restart": 0, "now": NOW, "signal_before": 120} | evidence)
    )
    assert (verdict.ending, verdict.next) == (ending, following), what


def test_every_ending_has_a_code_of_its_own():
    assert [code for code, n in Counter(ending.exit_code for ending in Ending).items() if n > 1] == [75]


def test_the_cause_is_told_in_a_line():
    assert judge(Evidence(1, RUNNING, 0, errors=[PEER, OWN])).detail == "rank 1: ValueError: boom"
    assert judge(Evidence(2, RUNNING, 0, errors=[Error(0, 2, "no file x\nGive another.")])).detail == "no file x"


def test_what_srun_says_of_a_killed_task():
    text = "srun: error: n2: task 3: Exited with exit code 1\nsrun: error: n1: tasks 0-1: Killed\n"
    assert KILLED.search(text).groups() == ("n1", "0-1", "Killed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("srun: unrecognized option '--foo=3'\nTry \"srun --help\"", "unrecognized option '--foo=3'"),
        ("srun: error: MPI: no such plugin\nsrun: error: Invalid MPI type 'x'\n", "Invalid MPI type 'x'"),
        (
            "slurmstepd-n2: error: execve(): /py: No such file\nsrun: error: n2: task 0: Exited with exit code 2",
            "execve",
        ),
        ("srun: error: n1: tasks 0-1: Killed\nsrun: Job step aborted: Waiting up to 7 seconds", ""),
        ("srun: got SIGCONT\nsrun: forcing job termination\nstep 3\n", ""),
    ],
)
def test_what_srun_complains_of(text, said):
    assert complaint(text).startswith(said) and bool(said) == bool(complaint(text))


def test_requeues_are_bounded(tmp_path):
    records = records_of(tmp_path, *[Ending.TIME_LIMIT] * 3)
    attempt, go_on = records.begin("7", 3, "n1"), Verdict(Ending.TIME_LIMIT, Next.GO_ON)
    assert bounded(go_on, records, attempt, 4) == go_on
    stopped = bounded(go_on, records, attempt, 3)
    assert stopped.next is Next.NOTHING and stopped.detail == "max_requeues=3 are used up"


def test_a_job_that_dies_twice_before_it_saves_does_not_go_on(tmp_path):
    killed = Verdict(Ending.KILLED, Next.GO_ON, "n1: task 0: Out Of Memory")
    records = records_of(tmp_path)
    assert bounded(killed, records, records.begin("7", 0, "n1"), 50) == killed
    records = records_of(tmp_path, Ending.KILLED)
    attempt = records.begin("7", 1, "n1")
    assert bounded(killed, records, attempt, 50).detail.endswith("for the second time before any checkpoint")
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert bounded(killed, records, attempt, 50) == killed
