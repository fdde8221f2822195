"""`minbert plot RUN`: the conflicts between the tasks' gradients, over time and over the layers of the encoder."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.exit_codes import ExitCode
from minbert.launch.options import open_option, parse
from minbert.launch.outputs import require_place, writing
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.surgery.conflicts import cosines, read_gramians


@dataclass(frozen=True)
class PlotOptions:
    """Draw how the tasks' gradients agree: the cosine of each pair over time and over the layers of the encoder, and
    the gradients' norms."""

    run: tyro.conf.Positional[Path]
    """Run folder; the run measured gradients if it used gradient surgery or --measure-every."""
    out: Annotated[Path | None, open_option("FILE")] = None
    """File to write (.png, .svg or .pdf); the default is conflicts.png in the run folder."""


def main(arguments: list[str]) -> int:
    options = parse(PlotOptions, arguments, "plot")
    run = RunFolder.existing(options.run)
    out = options.out or run.path / "conflicts.png"
    if not run.gramians_file.exists():
        raise UserError(f"{run.path} measured no gradients; train with gradient surgery, or with --measure-every N")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{out}: the plot can be a .png, .svg or .pdf")
    require_place(out)
    draw_conflicts(run, out)
    print(f"Plot: {out}")
    return ExitCode.FINISHED


def draw_conflicts(run: RunFolder, out: Path) -> None:
    """Write the figure. Raises UserError if nothing was measured."""
    from matplotlib.figure import Figure

    steps, tasks, layers, gramians = read_gramians(run.gramians_file)
    if not layers or len(tasks) < 2:
        raise UserError("there is nothing to compare: the tasks share no trainable parameters, or there is only one")
    pairs = list(combinations(range(len(tasks)), 2))
    names = [f"{tasks[i]} · {tasks[j]}" for i, j in pairs]
    encoder, by_layer = cosines(gramians.sum(1)), cosines(gramians)

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplot_mosaic([["time", "heat"], ["norms", "heat"]], width_ratios=[3, 2])
    over_time, norms, heat = axes["time"], axes["norms"], axes["heat"]
    for (i, j), name in zip(pairs, names):
        over_time.plot(steps, encoder[:, i, j], label=name, marker=".", linewidth=1)
    over_time.axhline(0, color="black", linewidth=0.8)
    over_time.set(title="Cosine of the tasks' gradients (encoder)", xlabel="step", ylabel="cosine")
    over_time.legend(fontsize="small")

    for t, task in enumerate(tasks):
        norms.plot(steps, gramians.sum(1)[:, t, t].sqrt(), label=task, marker=".", linewidth=1)
    norms.set(title="Norms of the tasks' gradients (encoder)", xlabel="step", ylabel="norm", yscale="log")
    norms.legend(fontsize="small")

    mean = [[float(by_layer[:, layer, i, j].mean()) for i, j in pairs] for layer in range(len(layers))]
    limit = max(0.1, max(abs(value) for row in mean for value in row))
    image = heat.imshow(mean, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    heat.set(title="Mean cosine by layer (red: conflict)", xticks=range(len(pairs)), yticks=range(len(layers)))
    heat.set_xticklabels(names, rotation=20)
    heat.set_yticklabels(layers)
    for row, values in enumerate(mean):
        for column, value in enumerate(values):
            heat.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize="small")
    figure.colorbar(image, ax=heat)
    with writing(out) as temporary:
        figure.savefig(temporary, dpi=120, format=out.suffix[1:])
