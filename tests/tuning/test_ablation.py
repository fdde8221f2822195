"""Ablations: extensions by name, variants that are trained once, differences with their intervals."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_tasks import TASKS
from searches import TINY

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.trainer.config import RunConfig, parse_config
from minbert.tuning.ablation import Ablation, plan
from minbert.tuning.comparison import paired
from minbert.tuning.extensions import DEFAULT, EXTENSIONS, PAPER_BASELINE, extension
from minbert.tuning.trial import Trial


def test_variants_that_groups_share_exist_once():
    extensions = dict(extension(word, RunConfig().corpus.tasks) for word in DEFAULT)
    variants, groups = plan(extensions, ["alone", "added", "left_out"], [])
    assert groups["alone"] == ["baseline", "siamese", "two_hidden_layers", "smart", "unfrozen", "pcgrad"]
    assert groups["added"][:3] == ["baseline", "siamese", "siamese+two_hidden_layers"]
    assert groups["left_out"][0] == groups["added"][-1] == "siamese+two_hidden_layers+smart+unfrozen+pcgrad"
    assert len(variants) == 1 + 5 + 4 + 4  # baseline, alone, added from two on, left out (one is the sum of four)
    for change in variants.values():
        parse_config(PAPER_BASELINE | change, "variant")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("back_translation", "needs a file that `minbert augment` has written: back_translation=AUGMENTED"),
        ("pretrained", "needs a folder"),
        ("smart=much", "its weight is a number"),
        ("unfrozen=1", "NAME=OPTION:VALUE"),
        ("siamse", "did you mean 'siamese'"),
        ("x=y", "NAME"),
    ],
)
def test_unknown_extensions_are_refused_with_those_that_exist(word, message):
    with pytest.raises(UserError, match=message):
        extension(word, TASKS.values())


def test_extensions_can_be_defined():
    assert extension("slow=lr:1.0e-6,warmup:0.2", []) == ("slow", {"lr": 1e-6, "warmup": 0.2})
    assert extension("more=augmented:new.tsv", []) == ("more", {"augmented": "new.tsv"})  # one of several
    _, change = extension("more=smart_weight:5 0 0", [])  # one for each task
    assert parse_config(PAPER_BASELINE | change, "variant").objective.smart_weight == (5.0, 0.0, 0.0)


def test_extensions_take_what_stands_behind_their_name():
    tasks = [TASKS[name] for name in ("sst", "quora", "sts")]
    assert extension("smart", tasks)[1] == {"smart_weight": [0.02, 0.0, 0.0]}  # sentiment alone, as in the paper
    assert extension("smart=1", tasks[::-1])[1] == {"smart_weight": [0.0, 0.0, 1.0]}
    assert extension("pretrained=/models/a=b:c", tasks)[1] == {"model": "/models/a=b:c"}
    with pytest.raises(UserError, match="which no task has"):
        extension("smart", tasks[1:])


def test_every_extension_is_a_configuration():
    given = {"back_translation": "=new.tsv", "pretrained": "=folder", "distilled": "=run,other"}
    for name in EXTENSIONS:
        _, change = extension(name + given.get(name, ""), TASKS.values())
        parse_config(PAPER_BASELINE | {"tasks": [*TASKS]} | change, name)


def test_extensions_may_agree():
    extensions = dict(extension(word, []) for word in ("unfrozen", "gradual_unfreezing"))
    variants, _ = plan(extensions, ["added"], [])
    assert variants["unfrozen+gradual_unfreezing"] == {"freeze": "none", "unfreeze": "gradual"}


def test_combinations_that_contradict_themselves_are_refused():
    extensions = dict(extension(word, []) for word in ("pcgrad", "upgrad"))
    with pytest.raises(UserError, match="aggregator twice"):
        plan(extensions, ["added"], [])


@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=8))
def test_the_interval_of_a_paired_difference_holds_its_mean(differences):
    result = paired(differences)
    assert result.low <= result.mean + 1e-12
    assert result.high >= result.mean - 1e-12
    assert result.wins == sum(value > 0 for value in differences)


def test_the_interval_is_students():
    result = paired([0.01, 0.02, 0.03])
    assert result.low == pytest.approx(0.02 - 4.303 * 0.01 / 3**0.5, abs=1e-5)
    assert paired([0.1]).low is None


def test_an_ablation_here_goes_on_and_compares(tmp_path, capsys):
    folder = tmp_path / "a"
    words = ["ablate", "--ablation", str(folder), *TINY, "--steps", "3", "--seeds", "0", "1", "--combine"]
    words += ["siamese+unfrozen", "--extensions", "siamese", "unfrozen", "--groups", "alone"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "4 variants with seeds 0, 1: 8 runs" in shown
    assert "Named combinations (mean ± deviation of seeds 0, 1)" in shown
    summary = {row["variant"]: row for row in json.loads((folder / "summary.json").read_text())}
    assert set(summary) == {"baseline", "siamese", "unfrozen", "siamese+unfrozen"}
    assert summary["unfrozen"]["difference"]["count"] == 2
    runs = {f"{name}/seed-{seed}": score for name, row in summary.items() for seed, score in row["by_seed"].items()}
    assert main(["watch", "--once", str(folder)]) == 0
    best = capsys.readouterr().out.rpartition(" ")[2].strip()
    assert runs[best] == max(runs.values())
    assert main(["why", str(folder / "runs" / best)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[2:] == ["ended"]
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/metrics.jsonl")}
    assert len(written) == 8
    assert main(["jobs", str(tmp_path), "--json"]) == 0  # from the folder above
    assert {row["run"] for row in json.loads(capsys.readouterr().out)} == {str(path.parent) for path in written}
    shutil.move(folder / "runs/unfrozen", tmp_path / "kept")
    assert main(["watch", "--once", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("6/8 over, 0 running")  # of those that there will be
    shutil.move(tmp_path / "kept", folder / "runs/unfrozen")

    lost = folder / "runs" / "unfrozen" / "seed-1"
    trial = Trial.read(lost)
    trial.status = "running"  # as a kill leaves it
    trial.write()
    assert main(["ablate", "--ablation", str(folder)]) == 0
    assert "8 runs, 7 are over" in capsys.readouterr().out
    assert Trial.read(lost).status == "finished"
    assert all(path.stat().st_mtime_ns == before for path, before in written.items() if lost not in path.parents)

    assert main(["ablate", "--ablation", str(folder), "--batch-size", "4"]) == 2
    assert "batch_size: 8 in the folder, 4 asked for" in capsys.readouterr().err


def test_a_recipe_is_a_baseline(tmp_path, capsys):
    words = ["ablate", "--ablation", str(tmp_path / "a"), "--recipe", "paper-full", "tiny", *TINY, "--steps", "1"]
    assert main([*words, "--extensions", "label_smoothing", "--groups", "alone", "--seeds", "0"]) == 0
    baseline = Ablation.read(tmp_path / "a").baseline
    expected = {"features": "siamese", "hidden_layers": 2, "freeze": "none", "aggregator": "sum"}
    assert {name: baseline[name] for name in PAPER_BASELINE} == expected
    assert baseline["smart_weight"] == [0.02, 0.0, 0.0]
    capsys.readouterr()
    assert main(words[:3]) == main([*words, "--seeds", "0"]) == 0
    assert "2 runs, 2 are over" in capsys.readouterr().out
