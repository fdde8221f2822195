"""What a job asks SLURM for: options, site files, and the elements of a sweep."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from submitting import SMALL, submit

from minbert.data.errors import UserError
from minbert.launch.sweep import elements, parse_sweep
from minbert.slurm.settings import JobSettings, parse_time, resolve_settings
from minbert.slurm.submission import Task
from minbert.slurm.submission import submit as submit_tasks


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90m", 90),
        ("8h", 480),
        ("1h30m", 90),
        ("1d12h", 2160),
        ("1-12:00:00", 2160),
        ("2-0", 2880),
        ("02:30:00", 150),
        ("0:30:01", 31),
    ],
)
def test_time_limits(text, minutes):
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "8 hours", "30:00", "-5", "1:2:3:4", "h", "1.5h"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match="is no time limit"):
        parse_time(text)


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59))
def test_one_time_limit_in_two_spellings(days, hours, minutes):
    total = (days * 24 + hours) * 60 + minutes
    if total:
        assert parse_time(f"{days}-{hours:02}:{minutes:02}:00") == parse_time(f"{days}d{hours}h{minutes}m") == total


def test_processes_follow_gpus():
    assert JobSettings(nodes=2, gpus_per_node=4).tasks == 8
    assert JobSettings(gpus_per_node=4, tasks_per_node=2).tasks == 2
    assert JobSettings().tasks == 1


def test_layers_and_the_sites_file(tmp_path, monkeypatch):
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: gpu\naccount: nlp\ntime: 4h\nsetup: [module load cuda]\nslurm_parameters: {exclude: n9}\n"
    )
    monkeypatch.setenv("MINBERT_SITE", str(site))
    earlier = {"time": "8h", "nodes": 2}
    settings = resolve_settings({"nodes": 4, "slurm_parameters": {"comment": "x"}}, earlier)
    assert (settings.partition, settings.time, settings.nodes) == ("gpu", "8h", 4)
    assert settings.setup == ("module load cuda",) and settings.slurm_parameters == {"exclude": "n9", "comment": "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu\n", "unknown key 'partitoin'; did you mean 'partition'?"),
        ("nodes: zero\n", "nodes: input should be a valid integer"),
        ("time: soon\n", "'soon' is no time limit"),
        ("slurm_parameters: {exclud: n1}\n", "'exclud' is unknown; did you mean 'exclude'? There are"),
        ("slurm_parameters: {ntasks_per_node: 2}\n", "it is the option tasks_per_node"),
        ("- a\n", "must hold `key: value` lines"),
        ("time: 5400\n", "time: 5400 could be minutes or seconds; write 1:30:00"),
        ("slurm_parameters: {additional_parameters: 5}\n", "additional_parameters must hold options of sbatch"),
        ("slurm_parameters: {additional_parameters: {a: [1]}}\n", "SLURM parameter a must be a text or a number"),
        (
            'slurm_parameters: {exclude: "n1\\n#SBATCH --x"}\n',
            "SLURM parameter exclude: 'n1\\n#SBATCH --x' holds a line",
        ),
        ('account: "a\\nb"\n', "account: 'a\\nb' holds a line break"),
        ("setup: 5\n", "setup: input should be a valid tuple, not 5"),
    ],
)
def test_a_wrong_site_file_is_named(tmp_path, monkeypatch, text, said):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    monkeypatch.setenv("MINBERT_SITE", str(site))
    with pytest.raises(UserError, match=r"site\.yaml") as caught:
        resolve_settings({})
    assert said in str(caught.value)


def test_lines_and_arguments_may_be_given_as_text(tmp_path, monkeypatch):
    site = tmp_path / "site.yaml"
    site.write_text("setup: |\n  module load cuda\n  ulimit -c 0\nsrun_args: --mpi=none --label='a b'\n")
    monkeypatch.setenv("MINBERT_SITE", str(site))
    settings = resolve_settings({})
    assert settings.setup == ("module load cuda", "ulimit -c 0") and settings.srun_args == ("--mpi=none", "--label=a b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lrr", "1"], "did you mean --lr?"),
        (["--gpus-per-node", "2", "--tasks-per-node", "4"], "each process needs a GPU of its own"),
        (["--processes", "3", "--nodes", "2"], "make 2; leave --processes out"),
        (["--time", "1m"], "leaves nothing before the request to save"),
        (["--executor", "debug", "--tasks-per-node", "2"], "use executor=local"),
        (["--slurm-parameters", "exclud=n1"], "There are additional_parameters, comment,"),
        (["--job-name", "a\n#SBATCH --partition=b"], "holds a line break"),
        (["--executor", "local", "--gpus-per-node", "1"], "is built without CUDA; install one with CUDA"),
    ],
)
def test_mistakes_on_the_command_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    assert submit("--run", tmp_path / "run", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run%j", "100%", "a\\b", "a\nb"])
def test_slurm_would_misread_the_names_of_the_jobs_files(name, tmp_path, capsys):
    assert submit("--run", tmp_path / name, *SMALL, "--executor", "local") == 2
    said = capsys.readouterr().err
    assert "SLURM replaces % and" in said or "holds a line break" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_everything_and_leaves_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    job = ["--nodes", 2, "--gpus-per-node", 4, "--time", "8h", "--cpus-per-task", 6, "--reservation", "r1"]
    site = ["--setup", "module load cuda", "--srun-args=--mpi=none", "--slurm-parameters", "exclude=n9"]
    assert submit("--run", run, *SMALL, *job, *site, "--dry-run") == 0
    said = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2\n",
        "#SBATCH --ntasks-per-node=4\n",
        "#SBATCH --gpus-per-node=4\n",
        "#SBATCH --time=480\n",
        "#SBATCH --requeue\n",
        "#SBATCH --signal=USR2@120\n",
        "#SBATCH --reservation=r1\n",
        "#SBATCH --exclude=n9\n",
        "\nmodule load cuda\ntrap - ERR EXIT\nexport PYTHONPATH=",
        "--kill-on-bad-exit=1 --cpus-per-task=6 --mpi=none",
        "  processes: 8\n",
        "  batch_size: 8\n",
    ):
        assert line in said
    assert "wckey" not in said and not run.exists()


def test_a_dry_run_of_a_sweep_is_an_array(tmp_path, capsys):
    assert submit("--run", tmp_path / "sweep", "--sweep", "seed=1,2,3", "--array-parallelism", 2, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2" in said and "# also" in said and not (tmp_path / "sweep").exists()


# Sweeps


def test_the_elements_of_a_sweep():
    found = elements(parse_sweep(["seed=1,2", "aggregator=sum,cagrad:c=0.4"]))
    assert list(found) == [
        "seed=1,aggregator=sum",
        "seed=1,aggregator=cagrad_c_0.4~ab4755",
        "seed=2,aggregator=sum",
        "seed=2,aggregator=cagrad_c_0.4~ab4755",
    ]
    assert found["seed=2,aggregator=cagrad_c_0.4~ab4755"] == ["--seed", "2", "--aggregator", "cagrad:c=0.4"]


@given(st.lists(st.text("abc1.-", min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
def test_every_element_has_a_folder_of_its_own(values):
    try:
        found = elements({"x": values})
    except UserError as error:
        assert "two elements" in str(error)
    else:
        assert len(found) == len(values) and all("/" not in name for name in found)


def test_a_sweep_is_split_at_the_sites_array_limit(monkeypatch):
    parts = []
    monkeypatch.setattr("minbert.slurm.controller.largest_array", lambda: 4)
    monkeypatch.setattr("minbert.slurm.submission._submit_part", lambda tasks, *rest: parts.append(len(tasks)) or tasks)
    tasks = [Task(Path(f"/run{index}"), print) for index in range(10)]
    assert submit_tasks(tasks, JobSettings(), Path(), Path(), "x") == tasks
    assert parts == [4, 4, 2]


def test_an_open_quotation_in_the_sites_file_names_the_key(tmp_path, monkeypatch):
    file = tmp_path / "site.yaml"
    file.write_text("srun_args: '--comment=\"a b'\n")
    monkeypatch.setenv("MINBERT_SITE", str(file))
    with pytest.raises(UserError, match="srun_args: no closing quotation"):
        resolve_settings({})
