"""What every page has: colours that stand out, on a phone and in the dark, and options as they are typed."""

import pytest

from minbert.launch.main import main
from minbert.tuning.report.page import DARK, DIVERGING, RISING, setting

pytestmark = pytest.mark.xdist_group("report")


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


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "not set"), ((), "none"), ((5.0, 0.0), "5, 0"), (5e-5, "5e-05"), (True, "True")]
)
def test_what_an_option_is_stands_in_tables_as_it_is_typed(value, shown):
    assert setting(value) == shown
