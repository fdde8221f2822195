"""Pages as their readers see them, through a real browser, and the numbers beside them."""

import csv
import os
import shutil
from pathlib import Path

from waiting import until

# What a name or an error may say, and no page may take for markup.
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
        until(lambda: self.ask(expression), expression, pause=0.5)

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
        chart = f"[...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent == '{title}')"
        self.driver.execute_script(f"{chart}.querySelector('.modebar-btn').click()")
        file = self.downloads / f"{title}.svg"
        until(file.exists, str(file), pause=0.5)
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


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
