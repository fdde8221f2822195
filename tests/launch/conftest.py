"""What the tests of the commands share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minbert.launch.main import main
from minbert.trainer.run.folder import RunFolder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> RunFolder:
    """A short run, scored on whole dev splits."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    size = "--steps 6 --train-limit 200 --batch-size 8 --log-every 2 --measure-every 3"
    assert main(["train", "--run", str(folder), *size.split()]) == 0
    return RunFolder(folder)


@pytest.fixture
def copied(trained) -> Iterator[Path]:
    """The run, and a folder `there`, where any user may read."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        shutil.copytree(trained.path, place / "run")
        (place / "run" / "fine.csv").write_text("sentence\n" + 20 * "fine\n")
        (place / "there").mkdir()
        yield place


@pytest.fixture
def course_folder(tmp_path) -> Path:
    """A folder of the course's files that holds sentiment only."""
    folder = tmp_path / "course"
    folder.mkdir()
    rows = [f"{n}\tid{n}\ta film of sort {n % 7}\t{n % 5}" for n in range(40)]
    for split in ("train", "dev"):
        (folder / f"ids-sst-{split}.csv").write_text("\n".join(["\tid\tsentence\tsentiment", *rows]) + "\n")
    (folder / "ids-sst-test-student.csv").write_text("\tid\tsentence\n0\tZ9\tsome words\n1\ta1\tother words\n")
    return folder
