"""The wheel: what a user without a checkout gets, and what stays here."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "trainer", "launch", "slurm", "tuning")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    # Below build/, which nobody keeps, setuptools would find what an earlier build left.
    command = [sys.executable, "-c", f"import sys; sys.argv[1:] = ['-q']; {build}"]
    subprocess.run(command, cwd=_copy(tmp_path_factory.mktemp("source")), check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def _copy(folder: Path) -> Path:
    """What git knows and what it does not ignore, without its history, as in an archive of the sources."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *ROOMS, "api"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in (*filter(None, names), "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_it_holds_every_module_and_every_file_that_they_read(wheel):
    found = set(wheel.namelist())
    wanted = {
        f"minbert/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".css", ".js") or path.name == "py.typed"
        if "devcluster" not in path.parts
    }
    assert wanted <= found, wanted - found


def test_it_holds_no_tests_and_nothing_that_only_they_use(wheel):
    assert not [name for name in wheel.namelist() if "test" in Path(name).name or "devcluster" in name]
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "minbert",
        next(name for name in wheel.namelist() if name.endswith("METADATA")).split("/")[0],
    }


def test_an_archive_without_history_has_a_version(wheel):
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert f"\nVersion: {PROJECT['tool']['setuptools_scm']['fallback_version']}\n" in metadata


def test_every_extra_but_that_of_developers_is_in_all():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["all"] == [f"minbert[{','.join(name for name in extras if name not in ('all', 'dev'))}]"]


@pytest.mark.parametrize("recipe", ["docs/containers/Dockerfile", "docs/containers/minbert.def"])
def test_containers_install_extras_that_there_are(recipe):
    text = (ROOT / recipe).read_text()
    named = text.partition("'.[")[2].partition("]")[0].split(",")
    assert named and set(named) <= PROJECT["project"]["optional-dependencies"].keys()
