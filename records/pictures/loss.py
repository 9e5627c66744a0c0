"""Draw the runs on tiny Shakespeare beside nanoGPT's: `python records/pictures/loss.py`.

Reads the logs in records/tiny-shakespeare-cpu, and writes loss.svg beside this file. Needs
matplotlib (records/requirements.txt).
"""

import statistics
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compare

LOGS = Path(__file__).resolve().parents[1] / "tiny-shakespeare-cpu"
NANOGPT = 118, 1.9087  # seconds and validation loss; records/tiny-shakespeare-cpu/README.md
GREY = "#7d8590"  # can be read on light and on dark pages
BLUE, ORANGE = "#388bfd", "#f0883e"


def draw(path: Path):
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    runs = compare.read_runs([LOGS])
    for run in runs:
        curve = [(validation.seconds, validation.loss) for validation in run.validations.values()]
        axes.plot(*zip(*curve, strict=True), color=BLUE, alpha=0.6, linewidth=1)
    seconds = statistics.fmean(run.last.seconds for run in runs)
    loss = statistics.fmean(run.last.loss for run in runs)
    spread = statistics.stdev(run.last.loss for run in runs)
    axes.plot([run.last.seconds for run in runs], [run.last.loss for run in runs], "o", color=BLUE)
    axes.plot(*NANOGPT, "D", color=ORANGE, markersize=8)
    axes.axhline(NANOGPT[1], color=ORANGE, linewidth=0.8, linestyle="--")
    ours = f"{len(runs)} seeds: validation loss {loss:.3f} ± {spread:.3f} after {seconds:.1f} s"
    axes.annotate(ours, (seconds, loss), (10, -16), textcoords="offset points", color=BLUE)
    theirs = f"nanoGPT's example for CPUs:\n{NANOGPT[1]:.3f} after {NANOGPT[0]} s"
    style = dict(textcoords="offset points", ha="right", color=ORANGE)
    axes.annotate(theirs, NANOGPT, (0, 12), **style)
    axes.set(xlim=(0, 125), ylim=(1.7, 3.6))
    axes.set_xlabel("seconds of training on two CPU cores", color=GREY)
    axes.set_ylabel("validation loss, nats per character", color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(color=GREY, alpha=0.2)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "loss"  # the same file each time
    picture = Path(__file__).with_suffix(".svg")
    draw(picture)
    print(f"The runs are drawn in {picture}.")
