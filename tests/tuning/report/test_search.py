"""The page of a search, by its numbers and under the mouse."""

from pathlib import Path

import numpy as np
import pytest
from pages import HOSTILE, Browser, read_csv
from searches import write_curve

from minbert.launch.main import main
from minbert.tuning.search import Search
from minbert.tuning.space import check_space, draw, parse_space

pytestmark = pytest.mark.xdist_group("report of trials")


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
