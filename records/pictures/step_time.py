"""Where the time of a step goes on a CPU: `python records/pictures/step_time.py`.

Takes steps of the tiny preset on one core, prints a table, and draws step_time.svg beside this
file. Times are those in which the core worked for this process, so that other work on the machine
disturbs them little. Needs matplotlib (records/requirements.txt).
"""

import collections
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt as t

STEPS = 24
PARTS = ("attention", "MLP", "head and loss", "the rest", "Muon", "Adam")
PASSES = ("forward", "backward", "update")
COLOURS = dict(zip(PASSES, ("#79b8ff", "#388bfd", "#f0883e"), strict=True))
GREY = "#7d8590"  # can be read on light and on dark pages


class Watch:
    """Adds up the time between two calls of `switch` for the part named by the earlier one."""

    def __init__(self):
        self.current = None
        self.since = 0.0
        self.spent = collections.Counter()

    def switch(self, part: str, phase: str):
        now = time.thread_time()
        if self.current:
            self.spent[self.current] += 1000 * (now - self.since)
        self.current = part, phase
        self.since = now


def watch_module(module: torch.nn.Module, part: str, watch: Watch, after: str = "the rest"):
    """Switch where the module begins and ends; after its forward pass comes the part `after`."""
    module.register_forward_pre_hook(lambda *_: watch.switch(part, "forward"))
    module.register_forward_hook(lambda *_: watch.switch(after, "forward"))
    module.register_full_backward_pre_hook(lambda *_: watch.switch(part, "backward"))
    module.register_full_backward_hook(lambda *_: watch.switch("the rest", "backward"))


def watch_step(network: t.GPT, optimizers, watch: Watch):
    for block in network.blocks:
        if block.attn is not None:
            watch_module(block.attn, "attention", watch)
        watch_module(block.mlp, "MLP", watch)
    watch_module(network.lm_head, "head and loss", watch, after="head and loss")
    # The backward pass follows at once, and begins with the loss.
    network.register_forward_hook(lambda *_: watch.switch("head and loss", "backward"))
    for name, optimizer in zip(("Adam", "Muon"), optimizers, strict=True):
        optimizer.register_step_pre_hook(lambda *_, name=name: watch.switch(name, "update"))
        optimizer.register_step_post_hook(lambda *_: watch.switch("the rest", "update"))


def measure() -> dict[tuple[str, str], float]:
    """Milliseconds of a step for each part and pass, medians of STEPS steps."""
    torch.set_num_threads(1)
    hp = t.Hyperparameters(**t.PRESETS["tiny"])
    machine = t.Machine.detect()
    network = t.build_model(hp, 257, machine)
    optimizers = t.build_optimizers(network, hp, machine)
    watch = Watch()
    watch_step(network, optimizers, watch)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step in range(STEPS + 2):
        window = t.set_schedule(optimizers, hp.num_iterations // 2, hp, machine)
        ids = torch.randint(257, (hp.seqs_per_step, hp.train_seq_len), generator=generator)
        batches = [(sequence.int(), sequence) for sequence in ids]
        watch.spent.clear()
        watch.switch("the rest", "forward")
        t.training_step(network, optimizers, batches, window, hp.seqs_per_step, machine)
        watch.switch("the rest", "forward")
        if step >= 2:  # the first ones make the optimizers' state
            steps.append(watch.spent.copy())
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]}


def show(spent: dict[tuple[str, str], float]):
    """Print the table of milliseconds."""
    total = sum(spent.values())
    print("| part | " + " | ".join(PASSES) + " | share |")
    print("| --- " * (len(PASSES) + 2) + "|")
    for part in PARTS:
        cells = [spent.get((part, phase), 0) for phase in PASSES]
        row = " | ".join(f"{cell:.1f}" if cell else "" for cell in cells)
        print(f"| {part} | {row} | {sum(cells) / total:.0%} |")
    print(f"A step: {total:.1f} ms of one core.")


def draw(spent: dict[tuple[str, str], float], path: Path):
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots()
    total = sum(spent.values())
    ends = dict.fromkeys(PARTS, 0.0)
    for phase in PASSES:
        widths = [spent.get((part, phase), 0) for part in PARTS]
        axes.barh(PARTS, widths, left=list(ends.values()), color=COLOURS[phase], label=phase)
        for part, width in zip(PARTS, widths, strict=True):
            ends[part] += width
    for part, end in ends.items():
        label = f"{end / total:.0%}"
        style = dict(textcoords="offset points", va="center", color=GREY)
        axes.annotate(label, (end, part), (5, 0), **style)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(ends.values()))
    axes.set_xlabel("milliseconds of one core, in a step of 2 x 1024 tokens", color=GREY)
    axes.tick_params(colors=GREY)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))
    axes.legend(frameon=False, labelcolor=GREY, loc="lower right")
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "step_time"
    found = measure()
    show(found)
    picture = Path(__file__).with_suffix(".svg")
    draw(found, picture)
    print(f"They are drawn in {picture}.")
