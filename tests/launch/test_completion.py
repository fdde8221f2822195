"""Completion, asked of the shells themselves."""

import contextlib
import io
import shutil
import subprocess

import pytest

from minbert.launch.main import main

# Sets the words of a command line as bash would, and prints what it completes the last with.
ASK = 'source {script}; complete_() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _minbert; echo "${COMPREPLY[*]}"; }; '


@pytest.fixture(scope="module")
def script(tmp_path_factory):

    path = tmp_path_factory.mktemp("completion") / "minbert.bash"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(["completion", "bash"]) == 0
    path.write_text(text.getvalue())
    return path


def test_bash_completes_commands_options_and_values(script):
    lines = {
        "minbert tr": "train",
        "minbert train --zero-s": "--zero-stage",
        "minbert train --zero-stage ''": "0 1 2 3",
        "minbert train --recipe paper-full mini": "minilm",
        "minbert predict RUN --spl": "--splits",
        "minbert checkpoint v": "verify",
        "minbert export ru": "",  # and bash goes on with the names of files
    }
    asked = ASK.replace("{script}", str(script)) + "; ".join(f"complete_ {line}" for line in lines)
    told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert told.stderr == ""
    assert dict(zip(lines, told.stdout.split("\n"))) == lines


def test_zsh_can_read_its_script(tmp_path, capsys):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "_minbert").write_text(capsys.readouterr().out)
    subprocess.run(["zsh", "-n", tmp_path / "_minbert"], check=True)
