"""Pages of runs, searches and ablations, seen through a real browser, and the numbers on them."""

import csv
import json
import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from small_runs import CORPUS
from torchmetrics.functional.classification import multiclass_calibration_error

from minbert.data.errors import UserError
from minbert.data.task import Task
from minbert.launch.main import main
from minbert.launch.results import recorded
from minbert.trainer.evaluation.prediction_files import write_predictions
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.ablation import Ablation
from minbert.tuning.extensions import PAPER_BASELINE
from minbert.tuning.report.answers import BINS, calibrate
from minbert.tuning.report.compared import _curves
from minbert.tuning.report.importance import importances, scores_at_equal_share
from minbert.tuning.report.page import DARK, DIVERGING, RISING, setting
from minbert.tuning.report.run import smoothed
from minbert.tuning.runs_compared import _predicted, bootstrap, compare_runs
from minbert.tuning.search import Search
from minbert.tuning.space import check_space, draw, parse_space
from minbert.tuning.trial import Trial

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


class Browser:
    """Chromium without a screen, and what a reader of the page would notice."""

    def __init__(self, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for word in ("--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"):
            options.add_argument(word)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium has none for root
        options.add_argument(f"--user-data-dir={profile}")
        self.downloads = profile / "downloads"
        options.add_experimental_option("prefs", {"download.default_directory": str(self.downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, page: Path, width: int = 1300) -> None:
        self.driver.set_window_size(width, 1000)
        self.driver.get(page.as_uri())
        self.wait("document.documentElement.dataset.drawn")

    def wait(self, expression: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 60).until(lambda _: self.ask(expression))

    def ask(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def check(self) -> None:
        """Nothing failed, nothing was fetched, every chart is drawn, no text was taken for markup."""
        assert self.driver.get_log("browser") == []
        assert self.ask("performance.getEntriesByType('resource').length") == 0
        charts = self.ask("[...document.querySelectorAll('.drawing')].map(d => [d.clientWidth, d.clientHeight, "
                          "d.querySelectorAll('svg path, svg rect, svg image').length])")  # fmt: skip
        assert len(charts) == int(self.ask("document.documentElement.dataset.drawn"))
        assert all(width > 200 and height > 80 and shapes > 3 for width, height, shapes in charts), charts
        assert self.ask("window.hacked") is None
        assert self.ask("document.querySelectorAll('main img').length") == 0

    def table(self, section: str, number: int = 0) -> list[list[str]]:
        """Cells of a section's table, the header first."""
        found = self.ask(
            f"[...document.querySelectorAll('#{section} table')[{number}].rows]"
            ".map(row => [...row.cells].map(cell => cell.textContent))"
        )
        assert found
        return found

    def saved(self, title: str) -> Path:
        """What the camera above a chart saves."""
        from selenium.webdriver.support.ui import WebDriverWait

        chart = f"[...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent == '{title}')"
        self.driver.execute_script(f"{chart}.querySelector('.modebar-btn').click()")
        file = self.downloads / f"{title}.svg"
        WebDriverWait(self.driver, 30).until(lambda _: file.exists())
        return file

    def at(self, chart: str, x: float, y: float) -> tuple[int, int]:
        """Where on the screen a chart, the first of a selector, has the point (x, y) of its axes; it is scrolled to."""
        script = """
            const drawing = document.querySelector(arguments[0]), { xaxis, yaxis } = drawing._fullLayout;
            drawing.scrollIntoView({ block: "center", behavior: "instant" });
            const box = drawing.querySelector(".nsewdrag").getBoundingClientRect();
            return [box.left + xaxis.d2p(arguments[1]), box.top + yaxis.d2p(arguments[2])].map(Math.round);
        """
        return tuple(self.driver.execute_script(script, chart, x, y))

    def drag(self, chart: str, start: tuple[float, float], end: tuple[float, float], shift: bool = False) -> None:
        """Draw a box with the mouse, from one point of a chart's axes to another."""
        from selenium.webdriver import ActionChains, Keys

        begin, stop = self.at(chart, *start), self.at(chart, *end)
        actions = ActionChains(self.driver)
        mouse, keys = actions.w3c_actions.pointer_action, actions.w3c_actions.key_action
        mouse.move_to_location(*begin)
        keys.pause()
        if shift:
            keys.key_down(Keys.SHIFT)
            mouse.pause()
        mouse.pointer_down().move_to_location(*stop).pointer_up()
        if shift:
            for _ in range(3):
                keys.pause()
            keys.key_up(Keys.SHIFT)
        actions.perform()

    def headings(self) -> list[str]:
        return self.ask("[...document.querySelectorAll('h2')].map(h => h.textContent)")

    def warnings(self) -> str:
        return "\n".join(self.ask("[...document.querySelectorAll('.warning')].map(p => p.textContent)"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if missing := [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.driver.quit()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINBERT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        words = ["--steps", "12", "--eval-every", "4", "--log-every", "1", "--train-limit", "60", "--batch-size", "8"]
        words += ["--data", CORPUS]
        assert main(["train", "--run", str(folder), *words, "--aggregator", "pcgrad", "--trackers"]) == 0
    return folder


def test_the_page_of_a_run(run, browser, capsys):
    assert main(["report", str(run), "--mistakes", "3"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    browser.open(run / "report.html")
    browser.check()
    tasks = ["Sentiment (SST-5)", "Paraphrase (Quora)", "Similarity (STS)"]
    assert browser.headings() == ["The run", "Curves", *tasks, "Gradient conflicts"]
    assert browser.warnings() == ""
    picture = browser.saved("Mean cosine by layer").read_text()
    assert picture.startswith("<svg") and "sst · quora" in picture and "layer 0" in picture

    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    shown = {row[0]: row[-1] for row in browser.table("the-run")[1:]}
    assert shown == {name: f"{score:.3f}" for name, score in scores.items() if "/" not in name}

    options = {row[0]: row[1] for row in browser.table("the-run", 1)[1:]}
    assert (options["aggregator"], options["steps"]) == ("pcgrad", "12")
    assert not options.keys() & {"lr", "head_lr", "epochs"}  # which the run filled in itself
    header, *mistakes = browser.table("sentiment-sst-5")
    assert header[1:3] == ["label", "predicted"]
    assert len(mistakes) == 3
    assert all(label != predicted for _, label, predicted, *_ in mistakes)
    assert len(browser.table("similarity-sts")[1]) == 4  # both sentences, label, predicted

    metrics = RunFolder(run).read_metrics()
    chart = "[...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent == 'Loss: sst')"
    drawn = browser.ask(f"{chart}.querySelector('.drawing').data.map(t => [t.name, [...t.x], [...t.y]])")
    for (name, steps, values), key in zip(drawn, ("loss/sst", "dev_loss/sst"), strict=True):
        assert name == ("train" if key == "loss/sst" else "dev")
        assert list(zip(steps, values)) == [(record["step"], record[key]) for record in metrics if key in record]
    rows = read_csv(run / "report.csv")
    assert [int(row["step"]) for row in rows] == [record["step"] for record in metrics]
    assert [float(row["dev/sts"]) for row in rows if row["dev/sts"]] == [
        r["dev/sts"] for r in metrics if "dev/sts" in r
    ]


def test_a_smoothed_curve_is_the_exponential_mean_of_what_came_before():
    values = [float(value) for value in np.random.default_rng(0).normal(size=200)]
    weights = 0.9 ** np.arange(200)[::-1]  # a twentieth of 200 is ten
    expected = [np.average(values[:count], weights=weights[-count:]) for count in range(1, 201)]
    assert smoothed(values) == pytest.approx(expected)
    assert smoothed([1.0, None, 1.0]) == [1.0, None, 1.0]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def over(cell: str, paper: str) -> str:
    """A translucent colour, rgba(r,g,b,a), on paper."""
    *rgb, alpha = (float(part) for part in cell.removeprefix("rgba(").rstrip(")").split(","))
    back = [int(paper[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(alpha * front + (1 - alpha) * b):02x}" for front, b in zip(rgb, back))


def test_what_is_drawn_and_written_stands_out_from_the_paper():
    for paper, ink, colours in (("#ffffff", "#1d232a", DARK.keys()), ("#14181d", "#e4e8ec", DARK.values())):
        assert all(contrast(colour, paper) >= 4.5 for colour in colours), paper
        cells = [cell for _, cell in (*DIVERGING, *RISING)]
        assert all(contrast(ink, over(cell, paper)) >= 4.5 for cell in cells), paper


# Runs side by side


@pytest.fixture(scope="module")
def several(run, tmp_path_factory) -> dict[str, Path]:
    """The run, once more with other predictions, and two groups of three seeds."""
    folder = tmp_path_factory.mktemp("several")
    found = {"first": folder / "first", "second": folder / "second"}
    for path in found.values():
        shutil.copytree(run, path, ignore=shutil.ignore_patterns("checkpoints"))
    second = RunFolder(found["second"])
    config = second.read_config()
    second.write_config(config.model_copy(update={"batch": config.batch.model_copy(update={"aggregator": "sum"})}))
    path = second.predictions / "sst-dev-output.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(line[: line.index(" , ")] + " , 3 " for line in lines), ""]))
    scores = {"plain": (0.50, 0.52, 0.49), "surgery": (0.53, 0.54, 0.50)}
    for name, values in scores.items():
        for seed, score in enumerate(values):
            found[f"{name},seed={seed}"] = folder / "seeds" / f"{name},seed={seed}"
            each = RunFolder(found[f"{name},seed={seed}"])
            batch = config.batch.model_copy(update={"aggregator": "pcgrad" if name == "surgery" else "sum"})
            each.write_config(config.model_copy(update={"seed": seed, "batch": batch}))
            for step in (5, 10):
                each.append_metrics({"step": step, "dev/sst": score, "dev/overall": score - 0.01 * (step == 5)})
    return found


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "not set"), ((), "none"), ((5.0, 0.0), "5, 0"), (5e-5, "5e-05"), (True, "True")]
)
def test_what_an_option_is_stands_in_tables_as_it_is_typed(value, shown):
    assert setting(value) == shown


def test_single_runs_are_compared_by_their_predictions_of_the_same_examples(several, capsys):
    first, second = RunFolder(several["first"]), RunFolder(several["second"])
    same = bootstrap(first, first, draws=50)
    assert all((each.mean, each.low, each.high) == (0, 0, 0) for each in same.values())
    found = bootstrap(first, second)
    assert found.keys() == {"sst", "quora", "sts", "overall"}
    assert (found["quora"].mean, found["sts"].low, found["sts"].high) == (0, 0, 0)
    (_, mine, labels, _), (_, theirs, _, _) = _predicted(first)["sst"], _predicted(second)["sst"]
    each = (theirs == labels).astype(float) - (mine == labels)
    assert found["sst"].mean == pytest.approx(each.mean(), abs=1e-6)
    assert found["sst"].deviation == pytest.approx(each.std() / len(each) ** 0.5, rel=0.1)
    assert found["overall"].low == pytest.approx(found["sst"].low / 3, abs=1e-6)
    assert main(["compare", str(several["first"]), str(several["second"])]) == 0
    said = capsys.readouterr().out
    assert "aggregator" in said and "pcgrad" in said and "second: the same dev examples, paired bootstrap" in said
    assert "batch_size" not in said and "paired bootstrap" in said


def test_several_labels_count_in_the_overall_difference_and_what_cannot_be_drawn_leaves_it_out(several, tmp_path):
    """The first run as one of two tasks, one with several labels; in the second run the other one is always wrong."""
    tags = {"name": "tags", "kind": "multilabel", "sentences": ["text"], "label": "tags", "classes": ["a"]}
    rows = "".join(json.dumps({"id": f"x , {n}", "text": "so", "tags": ["a"] * (n % 2)}) + "\n" for n in range(20))
    (tmp_path / "dev.jsonl").write_text(rows)
    tags = Task.model_validate(tags | {"files": {"train": tmp_path / "dev.jsonl", "dev": tmp_path / "dev.jsonl"}})
    pair = []
    for name, wrong in (("right", 0), ("wrong", 1)):
        run = RunFolder(tmp_path / name)
        shutil.copytree(several["first"], run.path)
        config = run.read_config()
        corpus = config.corpus.model_copy(update={"tasks": (config.corpus.tasks[0], tags)})
        run.write_config(config.model_copy(update={"corpus": corpus}))
        path = run.predictions / "tags-dev-output.csv"
        with recorded(run.predictions / "predictions.json", path.name, {"data": config.corpus.data}):
            write_predictions(path, tags, [f"x , {n}" for n in range(20)], [[(n + wrong) % 2] for n in range(20)])
        pair.append(run)
    found = bootstrap(*pair, draws=20)
    assert (found["tags"].mean, found["sst"].mean, found["overall"].mean) == (-1, 0, -0.5)
    for run in pair:
        (run.predictions / "tags-dev-output.csv").unlink()
    assert bootstrap(*pair, draws=20).keys() == {"sst"}


def test_seeds_are_one_column_and_paired_by_the_t_test(several):
    found = compare_runs([several[name] for name in several if "seed" in name])
    assert [group.name for group in found.groups] == ["plain (3 seeds)", "surgery (3 seeds)"]
    assert found.options == {"aggregator": ["sum", "pcgrad"]}
    spread, difference = found.groups[0].spreads()["overall"], found.differences["surgery (3 seeds)"]["overall"]
    assert (spread.mean, spread.count) == (pytest.approx((0.5 + 0.52 + 0.49) / 3), 3)
    reference = ttest_rel([0.53, 0.54, 0.50], [0.50, 0.52, 0.49]).confidence_interval()
    assert (difference.low, difference.high) == (pytest.approx(reference.low), pytest.approx(reference.high))
    with pytest.raises(UserError, match="is not a run folder"):
        compare_runs([several["first"], several["first"].parent])


def test_the_page_of_runs_compared(several, browser, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["compare", str(several["first"].parent / "seeds"), "--out", str(out)]) == 0
    assert "plain (3 seeds)" in capsys.readouterr().out
    browser.open(out)
    browser.check()
    assert browser.headings() == ["In what they differ", "Scores", "Curves over each other", "The runs"]
    assert browser.table("in-what-they-differ")[1] == ["aggregator", "sum", "pcgrad"]
    header, plain, surgery = browser.table("scores")
    assert plain[header.index("overall")] == "0.503 ± 0.015" and surgery[-1].startswith("0.523 ± 0.021\n+0.020 [")
    assert browser.ask("document.querySelector('.subtitle').textContent").startswith("Overall: plain (3 seeds) 0.503")
    assert len(browser.table("the-runs")) == 7 and browser.table("the-runs")[0][3:] == [
        *("model", "data", "code", "date", "duration")
    ]
    *_, last = browser.table("the-runs", 1)
    assert "aggregator pcgrad" in last[2]
    bars = browser.ask("document.querySelector('#curves-over-each-other .drawing').data[0].error_y.array")
    assert bars == pytest.approx([0.0153, 0.0153], abs=1e-3)
    assert len(read_csv(tmp_path / "page.csv")) == 12
    assert main(["compare", str(several["first"])]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_runs_with_other_batch_sizes_are_drawn_over_the_examples_that_they_saw(several, tmp_path):
    paths = [shutil.copytree(several[f"plain,seed={seed}"], tmp_path / str(seed)) for seed in (0, 1)]
    other = RunFolder(paths[1])
    config = other.read_config()
    size = config.batch.batch_size
    other.write_config(config.model_copy(update={"batch": config.batch.model_copy(update={"batch_size": 3 * size})}))
    for found, step in (([several["plain,seed=0"], several["surgery,seed=0"]], 1), (paths, size)):
        drawn = _curves(compare_runs(found).groups, ["sst"])[0].figure
        assert list(drawn.data[0].x) == [5 * step, 10 * step]
        assert ("examples" in drawn.layout.xaxis.title.text) == (found is paths)
    assert list(drawn.data[1].x) == [15 * size, 30 * size]


def test_a_page_is_readable_on_a_phone_and_in_the_dark(run, browser, tmp_path):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.csv").exists()
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        browser.open(tmp_path / "page.html", width=500)
        browser.check()
        assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        colour = "document.querySelector('.drawing .xtick text').style.fill"
        assert browser.ask(colour) == "rgb(154, 165, 177)"  # as the page's own, not black
        browser.ask("window.dispatchEvent(new Event('beforeprint'))")
        on_paper = f"[{colour}, Math.max(...[...document.querySelectorAll('.drawing svg')].map(s => s.clientWidth))]"
        assert browser.ask(on_paper) == ["rgb(68, 80, 92)", 640]
        browser.ask("window.dispatchEvent(new Event('afterprint'))")
        browser.wait(f"{on_paper}[0] == 'rgb(154, 165, 177)' && {on_paper}[1] < 500")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_run_without_its_data_or_model_has_a_page_with_a_warning(run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("best.safetensors", "checkpoints"))
    assert main(["report", str(other)]) == 0
    assert "holds no trained model yet" in (other / "report.html").read_text()
    assert main(["report", str(run), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "page.html")]) == 0
    assert "nowhere" in (tmp_path / "page.html").read_text()


# Searches


def write_curve(trial: Trial, scores: list[float], steps: int) -> None:
    """What a run that reached the given overall scores at equal distances leaves."""
    trial.steps, trial.score = steps, max(scores)
    trial.folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(trial.folder)
    for place, score in enumerate(scores, 1):
        trial.step = place * steps // 4
        parts = {"dev/sst": score - 0.1, "dev/quora": score + 0.05, "dev/sts": score, "dev/overall": score}
        run.append_metrics({"step": trial.step, **parts})
    trial.write()


@pytest.fixture
def search(tmp_path) -> Path:
    """Twenty-four trials whose score is a function of the learning rate, some stopped, one failed."""
    folder = tmp_path / "s"
    words = ["lr=loguniform(1e-5,1e-3)", "hidden_layers=1,2,3", "head_dropout=uniform(0,0.5)", "aggregator=sum,pcgrad"]
    wanted = Search(samples=24, space=check_space(parse_space(words), {}), base={"batch_size": 8})
    wanted.write(folder)
    for number in range(24):
        trial = wanted.new_trial(folder, number, draw(wanted.space, 0, number))
        score = 0.7 - 0.1 * abs(np.log10(trial.parameters["lr"]) + 4)
        trial.status, trial.started, trial.ended = "finished", 100.0, 175.0
        trial.turns, trial.takes = [[100.0 + number, 136.0 + number]], {"cpu": 2}
        if number == 5:
            trial.status, trial.error = "failed", HOSTILE
            trial.write()
        elif number % 3 == 0:
            trial.status, trial.stopped_by = "stopped", "asha"
            write_curve(trial, [score - 0.1], 40)
        else:
            write_curve(trial, [score - 0.1, score - 0.05, score, score - 0.01], 40)
    return folder


def assert_it_says_what_it_is_about_and_its_tables_sort_and_filter(search: Path, browser: Browser) -> None:
    about = browser.ask(
        "Object.fromEntries([...document.querySelectorAll('.facts div')]"
        ".map(d => [d.children[0].textContent, d.children[1].textContent]))"
    )
    assert about["Model"] == "tiny" and about["Data"] == "builtin: sst, quora, sts"
    assert about["Not the default"] == "batch_size 8" and about["Duration"] == "1m15s"

    def column(number: int) -> list[str]:
        rows = "[...document.querySelectorAll('#all-trials tbody tr')].filter(r => !r.hidden)"
        return browser.ask(f"{rows}.map(r => r.cells[{number}].textContent)")

    heading = "document.querySelectorAll('#all-trials th')[2].querySelector('button')"
    for clicks, falling in ((1, True), (2, False)):
        browser.driver.execute_script(f"{heading}.click()")
        scores = [float(text) for text in column(2) if text != "–"]
        assert scores == sorted(scores, reverse=falling) and len(scores) == 23 and column(2)[-1] == "–", clicks
    script = "const f = document.querySelector('#all-trials .filter input'); f.value = 'STOPPED trial-00'; "
    browser.driver.execute_script(script + "f.dispatchEvent(new Event('input'))")
    assert set(column(1)) == {"stopped"} and len(column(1)) == 8
    assert browser.ask("document.querySelector('#all-trials .filter output').textContent") == "8 of 24 rows"
    labels = browser.ask("[...document.querySelectorAll('.drawing')].map(d => d.getAttribute('aria-label'))")
    best = f"{max(t.score for t in Search.read(search).trials(search) if t.score is not None):.3g}"
    assert labels[0].startswith("The best score over the search.") and f"to {best} at 23" in labels[0]
    assert all(len(label) > 60 for label in labels)
    assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")


def assert_a_brush_selects_everywhere(search: Path, browser: Browser) -> None:
    """What plotly tells of a box in one chart, of another in a second one, of a click, and the way back."""
    trials = Search.read(search).trials(search)

    def brush(section: str, number: int, inside: str) -> None:
        """Select the points of a chart at (x, y) for which `inside` holds."""
        browser.driver.execute_script(
            f"const d = document.querySelectorAll('#{section} .drawing')[{number}];"
            "const points = d.data.flatMap((trace, curveNumber) => [...trace.x].flatMap((x, pointNumber) => {"
            f"const y = trace.y[pointNumber]; return {inside} ? [{{ curveNumber, pointNumber, x, y }}] : []; }}));"
            "d.emit('plotly_selected', { points });"
        )

    def rows() -> set[str]:
        return set(
            browser.ask("[...document.querySelectorAll('#all-trials tbody tr')].filter(r => !r.hidden).map(r => r.id)")
        )

    script = "const f = document.querySelector('#all-trials .filter input'); f.value = ''; "
    browser.driver.execute_script(script + "f.dispatchEvent(new Event('input'))")
    assert len(rows()) == 24
    brush("score-against-each-hyperparameter", 3, "x > 0.5")  # aggregator: sum | pcgrad
    surgery = {t.name for t in trials if t.score is not None and t.parameters["aggregator"] == "pcgrad"}
    assert rows() == surgery
    faint = (
        "document.querySelector('#learning-curves .drawing').data.filter(t => t.opacity < 0.1).map(t => t.meta.trial)"
    )
    assert set(browser.ask(faint)) == {t.name for t in trials if t.score is not None} - surgery
    brush("parallel-coordinates", 0, "x == 1 && y > 0.9")  # the second axis: hidden layers, the top is 3
    both = {name for name in surgery for t in trials if t.name == name and t.parameters["hidden_layers"] == 3}
    assert rows() == both and browser.ask("document.querySelector('.selected').textContent").startswith(
        f"{len(both)} of 24"
    )
    browser.driver.execute_script("document.querySelector('.selected button').click()")
    assert len(rows()) == 24 and browser.ask("document.querySelector('.selected').hidden")
    clicked = "emit('plotly_click', {points: [{curveNumber: 0, pointNumber: 2}]})"
    browser.driver.execute_script(f"document.querySelector('#best-so-far .drawing').{clicked}")
    (name,) = rows()
    assert browser.ask("document.querySelector('.selected a').getAttribute('href')") == f"#{name}"
    browser.driver.execute_script("document.querySelector('.selected button').click()")


def test_the_page_of_a_search(search, browser):
    assert main(["report", str(search)]) == 0
    browser.open(search / "report.html", width=1440)
    browser.check()
    assert_it_says_what_it_is_about_and_its_tables_sort_and_filter(search, browser)
    assert "Trials that failed" in browser.warnings()
    assert HOSTILE in browser.warnings()  # as text

    scored = [t for t in Search.read(search).trials(search) if t.score is not None]
    best = max(scored, key=lambda trial: trial.score)
    header, first, *_ = browser.table("best-configurations")
    assert first[:3] == [best.name, "finished", f"{best.score:.3f}"]
    assert first[header.index("sst")] == f"{best.score - 0.1:.3f}"  # of the best evaluation, not of the last
    assert len(browser.table("all-trials")) == 25
    bars = browser.ask("document.querySelectorAll('#importance .drawing')[0].data[0].y")
    assert bars[-1] == "lr"
    small = browser.ask(
        "[...document.querySelectorAll('#score-against-each-hyperparameter h3')].map(h => h.textContent)"
    )
    assert small == ["lr", "hidden_layers", "head_dropout", "aggregator"]
    curves = browser.ask("document.querySelector('#learning-curves .drawing').data.length")
    assert curves == 23
    paths = "[...document.querySelectorAll('#timeline-and-cost .bars path')]"
    heights = browser.ask(f"{paths}.map(bar => Math.round(bar.getBBox().height))")
    assert len(heights) == 24 and max(heights) - min(heights) < 2  # no bar covers another trial's
    costs = {row[0]: row[1:] for row in browser.table("timeline-and-cost")}
    assert costs["in all"] == ["24", "0.48", "100%", "0.02"] and costs["stopped early"][:3] == ["8", "0.16", "33%"]
    assert "33% of the cost went to trials that were stopped early" in browser.ask("document.body.textContent")
    assert_a_brush_selects_everywhere(search, browser)

    rows = read_csv(search / "report.csv")
    assert len(rows) == 24
    assert {row["trial"]: float(row["lr"]) for row in rows}[best.name] == best.parameters["lr"]
    assert rows[5]["error"] == HOSTILE


def test_a_mouse_draws_boxes_on_charts_and_axes(search, browser):
    trials = [trial for trial in Search.read(search).trials(search) if trial.score is not None]
    assert main(["report", str(search)]) == 0
    browser.open(search / "report.html", width=1440)
    shown = "[...document.querySelectorAll('#all-trials tbody tr')].filter(r => !r.hidden).map(r => r.id)"

    def expect(names: set[str]) -> None:
        browser.wait(f"{shown}.length == {len(names)}")
        assert set(browser.ask(shown)) == names

    def those(**wanted) -> set[str]:
        return {t.name for t in trials if all(t.parameters[name] == value for name, value in wanted.items())}

    scatter = "#score-against-each-hyperparameter .chart:nth-of-type(4) .drawing"  # aggregator: sum | pcgrad
    scores = [trial.score for trial in trials]
    browser.drag(scatter, (0.5, max(scores) + 0.005), (1.45, min(scores) - 0.005))
    expect(those(aggregator="pcgrad"))
    axes = "#parallel-coordinates .drawing"  # lr, hidden_layers, head_dropout, aggregator, score
    browser.drag(axes, (0.8, 1.05), (1.2, 0.8))
    expect(those(aggregator="pcgrad", hidden_layers=3))
    from selenium.webdriver.common.by import By

    browser.driver.find_element(By.CSS_SELECTOR, ".selected button").click()
    expect({f"trial-{number:04d}" for number in range(24)})
    browser.drag(axes, (0.8, 1.05), (1.2, 0.8))
    expect(those(hidden_layers=3))
    browser.drag(axes, (2.8, 0.2), (3.2, -0.05), shift=True)
    expect(those(hidden_layers=3, aggregator="sum"))
    browser.driver.find_element(By.CSS_SELECTOR, ".selected button").click()
    best = max(trials, key=lambda trial: trial.score)
    place = sorted(trials, key=lambda trial: (trial.ended or 0.0, trial.number)).index(best) + 1
    click = (place, best.score)  # the line of the best so far goes through that point
    browser.drag("#best-so-far .drawing", click, click)
    expect({best.name})


def test_importance_finds_the_option_that_matters_and_says_when_nothing_does():
    space = check_space(parse_space(["lr=loguniform(1e-5,1e-3)", "hidden_layers=1,2,3", "aggregator=sum,pcgrad"]), {})
    drawn = [draw(space, 1, number) for number in range(40)]
    scores = np.array([0.6 if p["aggregator"] == "pcgrad" else 0.5 for p in drawn])
    found = importances(space, drawn, scores)
    assert found.options[0].option == "aggregator"
    assert found.options[0].mean > 1  # shuffling doubles the variance at least
    assert found.explained > 0.95
    assert all(abs(option.mean) < 0.05 for option in found.options[1:])
    noise = np.random.default_rng(0).random(40)
    assert importances(space, drawn, noise).explained < 0.2
    assert importances(space, drawn[:7], scores[:7]) is None
    assert importances(space, drawn, np.ones(40)) is None


def test_scores_are_compared_where_every_trial_has_been(tmp_path):
    trials = [Trial(tmp_path / str(n), str(n), n, {}) for n in range(3)]
    write_curve(trials[0], [0.1, 0.5, 0.9, 0.8], 40)
    write_curve(trials[1], [0.3, 0.2], 40)
    write_curve(trials[2], [0.4, 0.6, 0.2], 400)
    share, scores = scores_at_equal_share(trials)
    assert share == 0.5
    assert scores.tolist() == [0.5, 0.3, 0.6]


def trained_as(run: Path, trial: Trial) -> None:
    """The trial has trained, and is what the run is."""
    shutil.copytree(run, trial.folder, ignore=shutil.ignore_patterns("checkpoints", "report.*"))
    trial.status, trial.steps, trial.step, trial.score = "finished", 12, 12, 0.5
    trial.write()


@pytest.mark.parametrize("first", ["search", "trial"])
def test_a_trial_and_its_search_lead_to_each_other_whichever_page_is_written_first(first, run, browser, tmp_path):
    wanted = Search(samples=1, space=check_space(parse_space(["aggregator=sum,pcgrad"]), {}), base={})
    folder = tmp_path / "written" / "a search, 100% #1"
    wanted.write(folder)
    trial = wanted.new_trial(folder, 0, {"aggregator": "pcgrad"})
    trained_as(run, trial)
    again = Trial(folder / "again" / trial.name / "seed-1", "x", 0, trial.parameters, variant=trial.name, seed=1)
    trained_as(run, again)
    if first == "search":
        assert main(["report", str(folder)]) == 0
    for each in (trial, again):
        assert main(["report", str(each.folder)]) == 0
    moved = tmp_path / "moved"
    (tmp_path / "written").rename(moved)
    below = "trials/trial-0000", "again/trial-0000/seed-1"
    cells = "#all-trials tbody a", "#the-best-again-with-other-seeds tbody a"
    for place, cell in zip(below, cells):
        browser.open(moved / folder.name / place / "report.html")
        for selector, leads_to in ((".above a", folder.name), (cell, Path(place).name)):
            browser.ask(f"document.querySelector('{selector}').click()")
            browser.wait("document.documentElement.dataset.drawn")
            assert Path(unquote(urlsplit(browser.driver.current_url).path)).parent.name == leads_to
    browser.check()


def test_a_page_elsewhere_leads_to_where_the_others_are(run, tmp_path, capsys):
    folder = tmp_path / "a"
    ablation = Ablation(
        baseline={}, extensions={}, variants={"baseline": {}}, groups={"alone": ["baseline"]}, seeds=[0]
    )
    ablation.write(folder)
    (trial,) = ablation.trials(folder)
    words = ["report", str(trial.folder), "--out", str(tmp_path / "out" / "own.html")]
    trained_as(run, trial)
    (tmp_path / "out").mkdir()
    assert main(words) == 0 and 'class="above"' not in (tmp_path / "out" / "own.html").read_text()
    assert not (folder / "report.html").exists()  # nothing there leads to a page elsewhere
    assert main(["report", str(trial.folder)]) == 0 and main(words) == 0
    assert 'class="above"><a href="../a/report.html">Ablation a</a>' in (tmp_path / "out" / "own.html").read_text()
    assert main(["report", str(folder), "--out", str(tmp_path / "out" / "all.html")]) == 0
    assert '<a href="../a/runs/baseline/seed-0/report.html">baseline</a>' in (tmp_path / "out" / "all.html").read_text()
    trial.status, trial.score = "failed", None
    trial.write()
    (folder / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(trial.folder)]) == 0
    assert f"The page of {folder} is not written: no run" in capsys.readouterr().out
    assert 'class="above"' not in (trial.folder / "report.html").read_text()


# Ablations


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


# Numbers


@given(st.integers(2, 5), st.integers(1, 200), st.integers(0, 2**31 - 1))
def test_calibration_is_torchmetrics(classes, examples, seed):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(classes, 0.4), examples)
    labels = random.integers(0, classes, examples)
    correct = probabilities.argmax(1) == labels
    wanted = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels), classes, BINS)
    found = calibrate(probabilities.max(1), correct)
    assert found.error == pytest.approx(float(wanted), abs=1e-6)
    assert found.counts.sum() == examples
    filled = found.counts > 0
    assert (found.counts[filled] * found.accuracy[filled]).sum() == pytest.approx(correct.sum())
