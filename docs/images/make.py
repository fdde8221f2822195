"""The pictures of the documentation, made by the commands in PICTURES: python docs/images/make.py [NAME ...]

Run it in an empty folder. What a terminal shows becomes an SVG, a page of `minbert report` a PNG, by headless Chromium.
"""

import io
import os
import pty
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text
from selenium import webdriver

HERE = Path(__file__).parent
COLUMNS = 96
HEIGHT = 760  # of a picture of a page, in pixels

# Picture -> the command whose output, or page, it shows. A later one may need what an earlier one left.
PICTURES = {
    "train.svg": "minbert train --run runs/tour --measure-every 10",
    "evaluate.svg": "minbert evaluate runs/tour",
    "predict.svg": 'minbert predict runs/tour --task sts --text "a man is playing a guitar" "a man plays the guitar"',
    "jobs.svg": "minbert jobs runs",
    "checkpoints.svg": "minbert checkpoint list runs/tour",
    "report.png": "minbert report runs/tour",
}


def main(names: list[str]) -> None:
    for name in names or PICTURES:
        command = PICTURES[name]
        print(f"{name}: {command}", flush=True)
        shown = run_in_terminal(shlex.split(command))
        if name.endswith(".svg"):
            draw(command, shown, HERE / name)
        else:
            photograph(Path(command.split()[-1]) / "report.html", "curves", HERE / name)


def run_in_terminal(command: list[str]) -> str:
    """What a program leaves on a terminal of its own. Raises CalledProcessError if it fails."""
    outer, inner = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    parts = []
    try:
        while part := os.read(outer, 65536):
            parts.append(part)
    except OSError:  # its last program has left the terminal
        pass
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, b"".join(parts))
    return b"".join(parts).decode()


def screen(shown: str) -> list[str]:
    """The lines that are left on the screen: a line that was drawn again counts as it was last."""
    lines = [""]
    row = 0
    for piece in shown.replace("\r\n", "\n").split("\n"):
        for part in piece.split("\r"):
            while (at := part.find("\x1b[1A")) >= 0:  # one line up
                row, part = max(row - 1, 0), part[:at] + part[at + 4 :]
            if "\x1b[2K" in part:
                part, lines[row] = part.replace("\x1b[2K", ""), ""
            if part:
                lines[row] = part
        row += 1
        lines += [""] * (row + 1 - len(lines))
    return lines


def draw(command: str, shown: str, path: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ {command}", style="bold"))
    for line in screen(shown):
        console.print(Text.from_ansi(line.replace("\x1b[?25l", "").replace("\x1b[?25h", "")))
    path.write_text(console.export_svg(title="minbert"))


def photograph(page: Path, section: str, path: Path) -> None:
    """The upper part of a section of a page, in few colours."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1400,2400"):
        options.add_argument(word)
    options.binary_location = shutil.which("chromium") or ""
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get(page.absolute().as_uri())
        time.sleep(5)  # until the charts are drawn
        browser.find_element("id", section).screenshot(str(path))
    with Image.open(path) as picture:
        picture.convert("RGB").crop((0, 0, picture.width, min(HEIGHT, picture.height))).quantize(64).save(
            path, optimize=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
