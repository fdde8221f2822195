"""Recipes: each is complete in each size, and in what order they, files and options have the word."""

import tomllib
from pathlib import Path

import pytest

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.launch.options import build_run_config, parse_run_config
from minbert.trainer.config import flatten
from minbert.trainer.recipe import RECIPES, read_recipe, recipes
from minbert.trainer.run.folder import RunFolder

SIZES = {"tiny": 128, "minilm": 384, "bert-base": 768}
NAMED = [name for name in recipes() if name not in (*SIZES, "best-minilm")]  # which is for one size
NEEDED = {"augmented": ("rows.jsonl",)}  # what some recipes have the user give


def given(*names: str) -> dict:
    return {"recipe": names} | {key: NEEDED[key] for name in names for key in read_recipe(name).get("needs", [])}


def differences(name: str) -> dict:
    """The options of a milestone that are others than the paper's setting."""
    base = flatten(build_run_config(given("paper")))
    return {key: value for key, value in flatten(build_run_config(given(name))).items() if value != base[key]}


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_what_it_is_and_holds_options(name):
    first = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0]
    assert first.startswith("# ") and first.endswith(".") and recipes()[name] == first[2:]
    assert read_recipe(name).keys() - {"needs"}
    assert build_run_config(given(name)).recipe == (name,)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMED)
def test_every_recipe_comes_in_every_size(name, size):
    config = build_run_config(given(name, size))
    assert config.encoder.model == {"bert-base": "bert-base-uncased"}.get(size, size)
    assert config.heads.hidden_size in (SIZES[size], None)
    assert config.optimizer.lr == {"tiny": 1e-3, "minilm": 5e-5, "bert-base": 1e-5}[size]
    for option in ("features", "hidden_layers", "freeze", "tasks", "smart_weight"):  # what a milestone is about stays
        assert flatten(config)[option] == flatten(build_run_config(given(name)))[option]


def test_the_milestones_are_those_of_the_paper():
    smart = {"smart_weight": (0.02, 0.0, 0.0)}
    milestones = {
        "paper-baseline": {"freeze": "encoder", "features": "baseline", "hidden_layers": 1},
        "paper-siamese": {"freeze": "encoder", "hidden_layers": 1},
        "paper-two-layers": {"freeze": "encoder"},
        "paper-back-translation": {"freeze": "encoder", "augmented": (Path("rows.jsonl"),)},
        "paper-smart": {"freeze": "encoder"} | smart,
        "paper-full": smart,
    }
    for name, expected in milestones.items():
        assert differences(name) == expected | {"recipe": (name,)}


def test_options_have_the_last_word_then_a_file_then_the_later_recipe_then_the_runs_own(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("head_dropout: 0.25\nlr: 2.0e-5\n")
    words = ["--recipe", "paper-full", "minilm", "--config", str(file), "--lr", "3e-5", "--run", str(tmp_path / "run")]
    config = parse_run_config(words)
    assert (config.optimizer.lr, config.heads.head_dropout, config.encoder.model) == (3e-5, 0.25, "minilm")
    assert config.optimizer.weight_decay == 1e-5  # paper's
    RunFolder(tmp_path / "run").write_config(config)
    again = parse_run_config(["--run", str(tmp_path / "run")])
    assert again == config and again.recipe == ("paper-full", "minilm")
    other = parse_run_config(["--run", str(tmp_path / "run"), "--recipe", "tiny"])
    assert (other.encoder.model, other.optimizer.lr, other.optimizer.weight_decay) == ("tiny", 1e-3, 1e-5)


def test_a_file_may_name_a_recipe_and_steps_end_an_extension(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("recipe: paper-siamese\nbatch_size: 4\n")
    config = parse_run_config(["--config", str(file), "--steps", "7"])
    assert (config.recipe, config.batch.batch_size, config.encoder.freeze) == (("paper-siamese",), 4, "encoder")
    assert (config.budget.steps, config.budget.extend_to) == (7, None)


def test_all_are_listed_and_an_unknown_one_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse_run_config(["--recipe", "list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    with pytest.raises(UserError, match=r"no recipe is called 'paper-fall'; did you mean 'paper-full'\? There are "):
        parse_run_config(["--recipe", "paper-fall"])


def test_a_recipe_that_needs_something_says_so():
    for name in recipes():
        for option in read_recipe(name).get("needs", []):
            with pytest.raises(UserError, match=f"the recipe {name} needs --{option}: "):
                build_run_config({"recipe": (name,)})


def test_a_wheel_has_the_recipes():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["minbert.trainer"]
    packed = {path for pattern in patterns for path in RECIPES.parent.glob(pattern)}
    assert {RECIPES / f"{name}.yaml" for name in recipes()} <= packed


@pytest.mark.parametrize("name", ["pretrain-sst", "finetune-sst", "pretrain-cfimdb", "finetune-cfimdb"])
def test_table_1_on_the_courses_files(course_data, tmp_path, capsys, name):
    """The paper's single tasks: the files that a run leaves are the course's, with every id of the split once."""
    mode, task = name.split("-")
    size = [
        "--train-limit",
        "24",
        "--eval-limit",
        "16",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--max-length",
        "64",
        "--trackers",
    ]
    run = tmp_path / "run"
    words = ["train", "--recipe", f"paper-{name}", "tiny", "--data", str(course_data), "--run", str(run), *size]
    assert main(words) == 0
    assert RunFolder(run).read_config().recipe == (f"paper-{name}", "tiny")
    rows = {"sst": {"dev": 541, "test": 2210}, "cfimdb": {"dev": 125, "test": 488}}[task]
    files = {path.name: path.read_text().splitlines() for path in (run / "predictions").glob("*.csv")}
    assert files.keys() == {f"{mode}-{task}-{split}-out.csv" for split in rows}
    for split, count in rows.items():
        header, *lines = files[f"{mode}-{task}-{split}-out.csv"]
        assert header == "id \t Predicted_Sentiment " and len(lines) == count
        identifiers, predicted = zip(*(line.split(" , ") for line in lines))
        assert len(set(identifiers)) == count and {word.strip() for word in predicted} <= set("01234")
    assert "accuracy" in capsys.readouterr().out
