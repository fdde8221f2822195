"""The doctor: what it says on this machine, and on machines that lack something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minbert.launch.commands import doctor as module
from minbert.launch.commands.doctor import (
    SECTIONS,
    Check,
    disk,
    doctor,
    package,
    slurm_commands,
    slurm_controller,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No check remembers another test's machine."""
    module.requirements.cache_clear()
    module.import_torch.cache_clear()
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def no_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _pretend_version(monkeypatch, name: str, version: str | None) -> None:
    real = module.metadata.version

    def fake(asked: str) -> str:
        if asked != name:
            return real(asked)
        if version is None:
            raise module.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(module.metadata, "version", fake)


def test_training_can_run_where_the_tests_run(capsys):
    assert doctor() == 0
    output = capsys.readouterr().out
    assert "Training can run here." in output
    for word in (*SECTIONS, "torch", "deepspeed", "gloo", "cores", "cache folder"):
        assert word in output


def test_json_is_all_there_is_on_standard_output(capsys):
    assert doctor(json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert {check["section"] for check in answer["checks"]} == set(SECTIONS)
    assert all(check["remedy"] for check in answer["checks"] if check["ok"] is not True)


def test_it_imports_torch_only():
    script = (
        "import sys, torch\n"
        "from minbert.launch.commands.doctor import doctor; doctor(json=True)\n"
        "assert not {'deepspeed', 'transformers', 'ray', 'datasets', 'accelerate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", ["accelerate", "torchjd"])
def test_a_missing_package_that_training_needs_fails_with_the_command(monkeypatch, capsys, name):
    _pretend_version(monkeypatch, name, None)
    assert doctor() == 1
    output = capsys.readouterr().out
    assert "FAIL" in output and f"pip install '{name}" in output and "cannot run" in output


def test_a_missing_optional_package_is_a_note_that_names_the_extra(monkeypatch):
    _pretend_version(monkeypatch, "easynmt", None)
    check = package("translation", "easynmt", False, "translating data")
    assert check == Check(
        "translation", "easynmt", None, "missing", "translating data: pip install 'minbert[translate]'"
    )


def test_transformers_5_is_not_for_easynmt(monkeypatch):
    _pretend_version(monkeypatch, "transformers", "5.0.0")
    check = package("translation", "transformers", False, "EasyNMT, which needs one below 5")
    assert check.ok is None and check.found == "5.0.0" and "'minbert[translate]'" in check.remedy


def test_a_torch_that_does_not_load_is_told(monkeypatch, capsys):
    monkeypatch.setattr(module, "import_torch", lambda: (None, "libcudart.so: cannot open shared object file"))
    assert doctor() == 1
    assert "libcudart.so" in capsys.readouterr().out


def test_slurm_commands(no_commands):
    _command(no_commands, "sbatch", "exit 0")
    check = slurm_commands()
    assert check.ok is None and "sbatch" not in check.found and "srun" in check.found
    assert "apt-get install slurm-client" in check.remedy


@pytest.mark.parametrize(
    ("script", "ok", "found", "seconds"),
    [
        ("echo 'Slurmctld(primary) at head is UP'", True, "is UP", 60),
        ("echo 'Slurmctld(primary) at head is DOWN'", None, "is DOWN", 60),
        ("echo 'scontrol: error: no configuration' >&2; exit 1", None, "no configuration", 60),
        ("exec /bin/sleep 60", None, "no answer", 0.1),
    ],
)
def test_slurm_controller(no_commands, script, ok, found, seconds):
    _command(no_commands, "scontrol", script)
    check = slurm_controller(seconds)
    assert check.ok is ok and found in check.found and bool(check.remedy) is (ok is None)


def test_disk_looks_where_a_folder_would_be_made(tmp_path, monkeypatch):
    assert "free" in disk("cache folder", tmp_path / "a" / "b", "elsewhere").found
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    check = disk("cache folder", tmp_path / "a" / "b", "elsewhere")
    assert check.ok is None and "not writable" in check.found and check.remedy == "elsewhere"
    (tmp_path / "file").touch()
    assert "not writable" in disk("cache folder", tmp_path / "file", "elsewhere").found


def test_without_a_compiler(no_commands, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", str(no_commands / "python"))
    check = module.compiler()
    assert check.ok is None and "apt-get install g++" in check.remedy and "pip install ninja" in check.remedy
