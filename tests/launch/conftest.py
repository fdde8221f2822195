"""What the tests of the commands share."""

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
