"""The page of an ablation."""

import pytest
from pages import HOSTILE, read_csv
from searches import write_curve

from minbert.launch.main import main
from minbert.tuning.ablation import Ablation
from minbert.tuning.extensions import PAPER_BASELINE

pytestmark = pytest.mark.xdist_group("report of trials")


def test_the_page_of_an_ablation(tmp_path, browser):
    folder = tmp_path / "a"
    names = ["baseline", "siamese", "unfrozen", "siamese+two_hidden_layers", "siamese+two_hidden_layers+unfrozen"]
    groups = {"alone": names[:3], "added": [names[0], names[1], names[3], names[4]]}
    groups["left_out"] = [names[4], names[3], names[0]]
    changes = {name: {} for name in names}
    ablation = Ablation(baseline=dict(PAPER_BASELINE), extensions={}, variants=changes, groups=groups, seeds=[0, 1, 2])
    ablation.write(folder)
    for trial in ablation.trials(folder):
        score = 0.5 + 0.02 * names.index(trial.variant) + 0.01 * trial.seed
        trial.status = "finished"
        if (trial.variant, trial.seed) == ("unfrozen", 2):
            trial.status, trial.error = "failed", HOSTILE
        write_curve(trial, [score - 0.2, score - 0.1, score], 40)
    assert main(["report", str(folder)]) == 0
    browser.open(folder / "report.html")
    browser.check()
    assert "unfrozen,seed=2" in browser.warnings()

    beside = {row[0]: row[1:] for row in browser.table("the-paper-s-table-beside-ours")}
    assert beside["baseline"][-1] == "0.428 / 0.510 ± 0.010"
    assert beside["+ back translation"][-1] == "0.610 / –"
    assert beside["+ encoder unfrozen"] == [
        *("0.493 / 0.490 ± 0.010", "0.853 / 0.640 ± 0.010", "0.817 / 0.590 ± 0.010", "0.752 / 0.590 ± 0.010")
    ]
    alone = {row[0]: row for row in browser.table("each-extension-alone")}
    assert alone["siamese"][-1] == "+0.020 [+0.020, +0.020], 3 of 3"
    assert alone["unfrozen (1 failed)"][-1] == "+0.040 [+0.040, +0.040], 2 of 2"
    added = {row[0]: row[-2:] for row in browser.table("added-one-after-the-other")}
    assert added["+ two_hidden_layers"] == ["+0.040 [+0.040, +0.040], 3 of 3", "+0.060 [+0.060, +0.060], 3 of 3"]
    left_out = {row[0]: row[-2:] for row in browser.table("left-out-one-at-a-time")}
    assert left_out["without unfrozen"] == ["-0.020 [-0.020, -0.020], 0 of 3", "+0.060 [+0.060, +0.060], 3 of 3"]
    assert left_out["baseline"] == ["-0.080 [-0.080, -0.080], 0 of 3", ""]
    finding = browser.ask("document.querySelector('.subtitle').textContent")
    assert finding.startswith("Best: siamese + two_hidden_layers + unfrozen, overall 0.590")
    assert "5 variants with seeds 0, 1, 2, 14 of 15 runs finished." in finding
    assert len(read_csv(folder / "report.csv")) == 15
