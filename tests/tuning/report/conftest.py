"""What the tests of pages share: a browser, and a trained run.

Each process of the suite makes its own, so that few are to need them: tests that look at the run have the group
`report`, tests that need the browser alone `report of trials`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import Browser
from small_runs import CORPUS

from minbert.launch.main import main


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if missing := [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.driver.quit()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["--steps", "12", "--eval-every", "4", "--log-every", "1", "--train-limit", "60", "--batch-size", "8"]
    words += ["--data", CORPUS]
    assert main(["train", "--run", str(folder), *words, "--aggregator", "pcgrad", "--trackers"]) == 0
    return folder
