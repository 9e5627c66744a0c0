"""Read NanoGPT speedrun logs, ours or the public ones, and say what they prove.

    python records/compare.py records                     # every .txt and .log below a folder
    python records/compare.py old.log new/ --sort loss --target 3.28
    python records/compare.py --vs baseline/ candidate/ --at 3.30
    python records/compare.py records --plot              # loss curves, in curves.png
    python records/compare.py records --json > runs.json

    run                steps  val loss  time (s)  step avg (ms)  peak (MiB)  GPUs
    new/seed 0.txt      1770   3.27880   179.828         101.60       30724     8
    new/seed 1.txt  900/1770   3.61000    91.000         101.11           -     8  unfinished

A run's result is its last validation. A folder with several runs gets a summary line: mean, spread,
and whether "mean loss <= target" is proven, that is p < 0.01 in a one-sided one-sample t-test; if
not, how many more runs would prove it, were their mean and standard deviation the same. A run that
stops before its last step is shown as unfinished and counted, but no statistic uses it. Listing
needs only Python; p-values and intervals need scipy, plots need matplotlib; both are pinned in
records/requirements.txt.
"""

import argparse
import bisect
import json
import math
import os
import re
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

try:
    # Student's t, distribution function and inverse; scipy.stats has them too, but loads slower.
    from scipy.special import stdtr, stdtrit
except ImportError:
    stdtr = stdtrit = None

INSTALL = "pip install -r records/requirements.txt"
SIGNIFICANCE = 0.01  # a record counts when p is below this
PLOT = Path("curves.png")
TARGET = 3.28  # the speedrun's
CONFIDENCE = 0.95  # of the interval of a difference
POWER = 0.8  # how often as many runs as are said to be needed would show a difference that is there

# -------------------------------------------------------------------------------------------------
# Logs: one file holds one run

# Lines are matched from their first byte on, and with digits, so that neither the format strings of
# a script's own source nor indented examples in it pass for a step; the blank after the numbers
# leaves out the "step:15/17" of a line that was cut off.
STEP = re.compile(rb"(?:step|s):(\d+)(?:/(\d+))?\s+(?=\w+:)")
RESUMED = re.compile(rb"resumed from step (\d+)\b")
VAL_LOSS = re.compile(rb"\s(?:val_loss|tel):(\S+)")
TRAIN_TIME = re.compile(rb"\strain_time:(\d+\.?\d*)(ms|s)\b")
STEP_AVG = re.compile(rb"\sstep_avg:(\d+\.?\d*)(ms|s)\b")
MEMORY = re.compile(rb"peak memory (?:allocated|consumption):\s*(\d+) MiB")
WORLD_SIZE = re.compile(rb"world_size:\s*(\d+)\s*$")
HARDWARE = re.compile(rb"hardware:\s*(?:(cpu)\b|(\d+) x )", re.IGNORECASE)
SETTING = re.compile(rb"([\w.-][\w. -]*): (.*)")  # a line between two lines of "="
# A row of the nvidia-smi table: the GPU's index, its name, then the bus address, which rows of
# processes do not have.
GPU_ROW = re.compile(rb"\|\s+(\d+)\s+\S[^|]*\|\s*[0-9A-F]{8}:[0-9A-F]{2}:", re.IGNORECASE)


VARYING = {"seed", "run_id", "log_dir"}  # settings in which repetitions of one run differ


class Validation(NamedTuple):
    step: int
    loss: float  # nats per token; nan where the run diverged
    seconds: float | None  # training time so far; the oldest logs have none


@dataclass
class Run:
    """One run as its log tells it; None stands for what the log does not tell."""

    name: str  # the log's path as given
    folder: str
    steps: int  # the last step logged
    total_steps: int | None  # the steps that the run set out to take
    validations: list[Validation]
    step_avg_ms: float | None  # as logged with the last validation
    memory_mib: int | None  # peak allocated
    gpus: int | None  # 0 on a CPU
    settings: dict[str, str]  # versions, hardware and flags, as the log's head tells them

    @property
    def loss(self):
        return self.validations[-1].loss if self.validations else None

    @property
    def seconds(self):
        return self.validations[-1].seconds if self.validations else None

    @property
    def finished(self):
        """Whether the last validation is that of the last step. The oldest logs do not say how many
        steps were planned: there a run is unfinished that trained on past its last validation."""
        return bool(self.validations) and self.validations[-1].step >= (
            self.total_steps or self.steps
        )


def printable(path):
    return os.fsencode(path).decode(errors="replace")


def milliseconds(match):
    """The time in a match of TRAIN_TIME or STEP_AVG. None for no match: nan, no such field, a unit
    that was cut off."""
    return match and float(match[1]) * (1 if match[2] == b"ms" else 1000)


def read_validations(lines, ended):
    """The validations among the lines of steps, and the average step (ms) logged with the last one.

    A log is only ever appended to: a resumed run goes over steps that are already there, and its
    later lines count. ended: whether a newline ended the last line; if not, the file may have been
    cut within it."""
    validations, averages, decimals = [], {}, None
    for line in lines:
        if resumed := RESUMED.match(line):
            validations = [known for known in validations if known.step <= int(resumed[1])]
        if b"val_loss:" not in line and b"tel:" not in line:  # far faster than matching every line
            continue
        step, val_loss = STEP.match(line), VAL_LOSS.search(line)
        if not step or not val_loss:
            continue
        digits = len(val_loss[1].partition(b".")[2])
        # A file that ends in "val_loss:3.2" may have lost the rest of 3.2788; the losses above tell
        # how long it was.
        cut = line is lines[-1] and not ended and val_loss.end() == len(line)
        if cut and digits != decimals:
            continue
        try:
            loss = float(val_loss[1])
        except ValueError:
            continue
        while validations and validations[-1].step >= int(step[1]):
            validations.pop()
        time_ms = milliseconds(TRAIN_TIME.search(line))
        validations.append(Validation(int(step[1]), loss, time_ms and time_ms / 1000))
        averages[int(step[1])], decimals = milliseconds(STEP_AVG.search(line)), digits
    return validations, averages[validations[-1].step] if validations else None


def read_machine(lines):
    """Peak memory in MiB and the number of GPUs (0 on a CPU); None where the log does not tell."""
    memory = world_size = hardware = None
    gpu_rows = set()
    for line in lines:
        if not line.startswith((b"|", b"peak memory", b"world_size:", b"hardware:")):
            continue
        if row := GPU_ROW.match(line):
            gpu_rows.add(row[1])
        elif peak := MEMORY.match(line):
            memory = int(peak[1])
        elif world := WORLD_SIZE.match(line):
            world_size = int(world[1])
        elif machine := HARDWARE.match(line):
            hardware = 0 if machine[1] else int(machine[2])
    # nvidia-smi shows the machine, world_size what the run used of it; on a CPU it counts none.
    gpus = 0 if hardware == 0 else world_size or hardware or len(gpu_rows) or None
    return memory, gpus


def read_settings(lines):
    """The "name: value" lines between two lines of "=", which stand behind the script's source."""
    settings, inside = {}, False
    for line in lines:
        if line.startswith(b"=" * 20) and not line.strip(b"="):
            inside = not inside
        elif inside and (setting := SETTING.fullmatch(line)):
            settings[setting[1].decode()] = setting[2].decode(errors="replace")
    return settings


def read_log(path):
    """The run in a log file, or None where the file holds no line of a step. Raises OSError."""
    text = path.read_bytes()
    lines = text.splitlines()
    step_lines = [
        line for line in lines if line.startswith((b"step:", b"s:", b"resumed from step"))
    ]
    last = next(filter(None, map(STEP.match, reversed(step_lines))), None)
    if not last:
        return None
    ended = text.endswith(b"\n") or step_lines[-1] is not lines[-1]
    return Run(
        printable(path),
        printable(path.parent),
        int(last[1]),
        last[2] and int(last[2]),
        *read_validations(step_lines, ended),
        *read_machine(lines),
        read_settings(lines),
    )


def read_all(paths):
    """The runs of each path (a log, or every .txt and .log below a folder) as {path: [Run]}. A file
    met twice is read once and is one and the same Run; a file without a run is named on stderr."""
    runs, found = {}, {}
    for path in paths:
        logs = [path]
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.suffix in (".txt", ".log"))
            logs = sorted(file for file in files if file.is_file())
            if not logs:
                print(f"{printable(path)}: no .txt or .log file in this folder", file=sys.stderr)
        files = {log.resolve(): log for log in logs}
        for file, log in files.items():
            if file in runs:
                continue
            try:
                runs[file] = read_log(log)
                problem = None if runs[file] else "no run in this file"
            except OSError as error:
                runs[file], problem = None, f"not readable ({error.strerror})"
            if problem:
                print(f"{printable(log)}: {problem}", file=sys.stderr)
        found[path] = [runs[file] for file in files if runs[file]]
    return found


def first_reach(validations, loss):
    """(steps, seconds) at which the loss is first reached, on the straight line between the
    validations around it; None and None where it never is. Logs without times give no seconds."""
    before = None
    for now in validations:
        if now.loss <= loss:
            # Already there at the first look, or after a nan.
            if before is None or not before.loss > loss:
                return now.step, now.seconds
            part = (before.loss - loss) / (before.loss - now.loss)
            seconds = None
            if before.seconds is not None and now.seconds is not None:
                seconds = before.seconds + part * (now.seconds - before.seconds)
            return before.step + part * (now.step - before.step), seconds
        before = now
    return None, None


# -------------------------------------------------------------------------------------------------
# Statistics: what several runs prove


def describe(values):
    """n, mean, standard deviation (of a sample: n - 1), min and max; None where n is too small."""
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
    }


def p_value(mean, std, n, target):
    """One-sided one-sample t-test: the probability of a mean this low if the target were the true
    one."""
    return float(stdtr(n - 1, (mean - target) / (std / math.sqrt(n))))


def smallest_number(n, enough):
    """The smallest number from n on that is enough; every larger number has to be enough too."""
    high = n
    while not enough(high):
        n, high = high, 2 * high
    return bisect.bisect_left(range(high), True, lo=n, key=enough)


def runs_needed(mean, std, n, target):
    """The smallest number of runs, from n on, whose t-test would give p < 0.01 if they had this
    mean and standard deviation. The mean must lie below the target: otherwise no number would."""
    return smallest_number(n, lambda runs: p_value(mean, std, runs, target) < SIGNIFICANCE)


def summarize(name, runs, target):
    """The summary of a group: loss and time of its finished runs, p-value against the target, and a
    plain verdict."""
    finished = [run for run in runs if run.finished]
    losses = [run.loss for run in finished if math.isfinite(run.loss)]
    diverged = len(finished) - len(losses)
    loss = describe(losses)
    p = None
    if diverged:  # leaving these out quietly would make the rest look better than the script is
        verdict = f"not proven: {diverged} diverged"
    elif len(losses) < 2:
        verdict = "not proven: one run has no p-value" if losses else "not proven: no finished run"
    elif loss["std"] == 0:
        verdict = "not proven: equal losses have no spread, so no p-value"
    elif stdtr is None:
        verdict = "no p-value without scipy"
    else:
        p = p_value(loss["mean"], loss["std"], loss["n"], target)
        if p < SIGNIFICANCE:
            verdict = "proven"
        elif loss["mean"] >= target or math.isclose(loss["mean"], target):
            verdict = "not proven: no number of runs would, the mean is not below the target"
        else:
            more = runs_needed(loss["mean"], loss["std"], loss["n"], target) - loss["n"]
            verdict = (
                f"not proven: {more} more run{'s' * (more > 1)} at this spread would be needed"
            )
    return {
        "name": name,
        "unfinished": len(runs) - len(finished),
        "diverged": diverged,
        "loss": loss,
        "time_s": describe([run.seconds for run in finished if run.seconds is not None]),
        "target": target,
        "p": p,
        "verdict": verdict,
    }


def describe_both(a, b):
    """Both sets described, and the reason why they cannot be compared, or None.

    A value that is None or not finite stands for a run without one: then the rest would be a chosen
    part of the runs, so the means are given and the difference is not."""
    result = {"difference": None, "interval": None}
    lacking = []
    for label, values in (("A", a), ("B", b)):
        known = [value for value in values if value is not None and math.isfinite(value)]
        result[label.lower()] = describe(known)
        if len(known) < len(values):
            lacking.append(f"{len(values) - len(known)} of {len(values)} runs of {label}")
    problem = None
    if lacking:
        problem = f"no comparison: {' and '.join(lacking)} without a value"
    elif not a or not b:
        problem = "no comparison: a set without a finished run"
    return result, problem


def difference(a, b):
    """Mean of A minus mean of B, its 95% interval (Welch's t: the two spreads may differ) and a
    plain verdict."""
    result, problem = describe_both(a, b)
    if problem:
        return result | {"verdict": problem}
    result["difference"] = center = result["a"]["mean"] - result["b"]["mean"]
    if min(len(a), len(b)) < 2:
        return result | {"verdict": "no interval: a set of one run has no spread"}
    part_a, part_b = (result[side]["std"] ** 2 / result[side]["n"] for side in "ab")
    if part_a + part_b == 0:
        return result | {"verdict": "no interval: neither set has any spread"}
    degrees = (part_a + part_b) ** 2 / (part_a**2 / (len(a) - 1) + part_b**2 / (len(b) - 1))
    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * math.sqrt(part_a + part_b)
    verdict = "within noise"
    if abs(center) > half:
        verdict = f"more than noise: A is {'lower' if center < 0 else 'higher'}"
    return result | {"interval": [center - half, center + half], "verdict": verdict}


def paired(a, b, ratio=False):
    """Mean of A minus B over pairs of runs that share a seed, its 95% interval (one-sample t of the
    differences), a plain verdict, and how many pairs it needs to see one of this size: as many as
    show it in four cases of five. With ratio, the geometric mean of A / B, by logarithms."""
    result, problem = describe_both(a, b)
    result["needed"] = None
    if problem:
        return result | {"verdict": problem}
    back = math.exp if ratio else float
    pairs = zip(a, b, strict=True)
    changes = describe([math.log(x / y) if ratio else x - y for x, y in pairs])
    center, std, n = changes["mean"], changes["std"], changes["n"]
    result["difference"] = back(center)
    if n < 2:
        return result | {"verdict": "no interval: one pair has no spread"}
    if std == 0:  # the same run twice, or a constant by accident, of which no statistic is made
        verdict = "no interval: the differences have no spread" if center else "equal in every pair"
        return result | {"verdict": verdict}

    def quantile(pairs, probability):
        return float(stdtrit(pairs - 1, probability)) * std / math.sqrt(pairs)

    def enough(pairs):
        return quantile(pairs, (1 + CONFIDENCE) / 2) + quantile(pairs, POWER) <= abs(center)

    half = quantile(n, (1 + CONFIDENCE) / 2)
    result["interval"] = [back(center - half), back(center + half)]
    if abs(center) > std / 1000:  # for less it would be millions
        result["needed"] = smallest_number(2, enough)
    verdict = "within noise"
    if abs(center) > half:
        verdict = f"more than noise: A is {'lower' if center < 0 else 'higher'}"
    return result | {"verdict": verdict}


def versus(name_a, runs_a, name_b, runs_b, at):
    """Two sets of runs against each other, by their finished runs: loss, time, and when each
    reaches a loss."""
    sets = [[run for run in runs if run.finished] for runs in (runs_a, runs_b)]
    reached = [[first_reach(run.validations, at) for run in runs] for runs in sets]
    return {
        "a": name_a,
        "b": name_b,
        "at": at,
        "unfinished": [len(runs_a) - len(sets[0]), len(runs_b) - len(sets[1])],
        "loss": difference(*([run.loss for run in runs] for runs in sets)),
        "time_s": difference(*([run.seconds for run in runs] for runs in sets)),
        "steps_to": difference(*([steps for steps, _ in pairs] for pairs in reached)),
        "seconds_to": difference(*([seconds for _, seconds in pairs] for pairs in reached)),
    }


# -------------------------------------------------------------------------------------------------
# Output: tables, JSON, plot

# What --sort takes, and the field of a run it stands for.
SORT_KEYS = {
    "name": "name",
    "steps": "steps",
    "loss": "loss",
    "time": "seconds",
    "avg": "step_avg_ms",
    "memory": "memory_mib",
    "gpus": "gpus",
}


def sort_runs(runs, key):
    """By one column, smallest first; runs without a value there (or with nan) come last."""

    def order(run):
        value = getattr(run, SORT_KEYS[key])
        return (True, run.name) if value is None or value != value else (False, value)

    return sorted(runs, key=order)


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def table_lines(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        right = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *right, last]).rstrip()


def print_table(rows):
    """Rows of text in columns: the first and the last to the left, the others to the right."""
    for line in table_lines(rows):
        print(line)


def print_runs(runs, at):
    rows = [["run", "steps", "val loss", "time (s)", "step avg (ms)", "peak (MiB)", "GPUs"]]
    rows[0] += [f"steps to {at:g}", f"seconds to {at:g}", ""] if at else [""]
    for run in runs:
        row = [
            run.name,
            str(run.steps),
            number(run.loss, 5),
            number(run.seconds, 3),
            number(run.step_avg_ms, 2),
        ]
        row += [number(run.memory_mib, 0), number(run.gpus, 0)]
        if at:
            steps, seconds = first_reach(run.validations, at)
            row += [number(steps, 1), number(seconds, 3)]
        if not run.finished and run.total_steps:
            row[1] += f"/{run.total_steps}"
        rows.append(row + ["" if run.finished else "unfinished"])
    print_table(rows)


def print_summaries(summaries, target):
    rows = [["folder", "runs", "loss: mean", "std", "min", "max"]]
    rows[0] += ["time (s): mean", "std", "min", "max", "p", f"mean loss <= {target:g}?"]
    for group in summaries:
        notes = [f"+{group[kind]} {kind}" for kind in ("unfinished", "diverged") if group[kind]]
        untimed = group["loss"]["n"] - group["time_s"]["n"]
        notes += [f"{untimed} without time"] * (untimed > 0)
        row = [group["name"], str(group["loss"]["n"]) + (f" ({', '.join(notes)})" if notes else "")]
        for part, digits in (("loss", 5), ("time_s", 3)):
            row += [number(group[part][field], digits) for field in ("mean", "std", "min", "max")]
        rows.append(row + ["-" if group["p"] is None else f"{group['p']:.3g}", group["verdict"]])
    print()
    print_table(rows)


def print_versus(result):
    rows = [["A - B", "A mean", "runs", "B mean", "runs", "difference", "95% interval", ""]]
    at = f"{result['at']:g}"
    for title, key, digits in (
        ("loss", "loss", 5),
        ("time (s)", "time_s", 3),
        (f"steps to {at}", "steps_to", 1),
        (f"seconds to {at}", "seconds_to", 3),
    ):
        row = result[key]
        means = [
            text
            for side in "ab"
            for text in (number(row[side]["mean"], digits), str(row[side]["n"]))
        ]
        change = "-" if row["difference"] is None else f"{row['difference']:+.{digits}f}"
        ends = row["interval"] or []
        interval = " to ".join(f"{end:+.{digits}f}" for end in ends) or "-"
        rows.append([title, *means, change, interval, row["verdict"]])
    print()
    for label, side, unfinished in zip("AB", "ab", result["unfinished"], strict=True):
        note = f" ({unfinished} unfinished left out)" if unfinished else ""
        print(f"{label}: {result[side]}{note}")
    print_table(rows)


def print_json(runs, summaries, comparison, at):
    """Everything the tables say and every validation. JSON has no nan: such a loss becomes null."""

    def loss(value):
        return value if value is None or math.isfinite(value) else None

    def entry(run):
        steps, seconds = first_reach(run.validations, at)
        return asdict(run) | {
            "finished": run.finished,
            "val_loss": loss(run.loss),
            "time_s": run.seconds,
            "reaches": {"loss": at, "steps": steps, "time_s": seconds},
            "validations": [
                {"step": v.step, "loss": loss(v.loss), "time_s": v.seconds} for v in run.validations
            ],
        }

    result = {"runs": list(map(entry, runs)), "groups": summaries, "versus": comparison}
    print(json.dumps(result, indent=1, allow_nan=False))


def are_repetitions(runs):
    """Whether several runs differ in nothing but the seed, so that a mean curve makes sense."""

    def course(run):
        settings = {key: value for key, value in run.settings.items() if key not in VARYING}
        return [validation.step for validation in run.validations], settings

    return len(runs) > 1 and all(course(run) == course(runs[0]) for run in runs)


def draw_set(axes, runs, colour):
    """The curves of a set: mean and standard deviation of its finished runs where these repeat each
    other, and every other run by itself. Returns whether there is a mean curve."""
    finished = [run for run in runs if run.finished]
    repeated = are_repetitions(finished)
    if repeated:
        points = list(zip(*(run.validations for run in finished), strict=True))
        losses = [describe([validation.loss for validation in point]) for point in points]
        mean, std = ([loss[key] for loss in losses] for key in ("mean", "std"))
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        places = [[point[0].step for point in points]]
        if all(v.seconds is not None for point in points for v in point):
            places.append([statistics.fmean(v.seconds for v in point) for point in points])
        for axis, place in zip(axes, places, strict=False):
            axis.plot(place, mean, color=colour, marker=".", linewidth=1.5)
            axis.fill_between(place, low, high, color=colour, alpha=0.2, linewidth=0)
            if len(place) == 1:  # a point has no band
                axis.errorbar(place, mean, std, color=colour, capsize=3)
    for run in [run for run in runs if not (repeated and run.finished)]:
        style = {"color": colour, "marker": ".", "linewidth": 1}
        style["linestyle"] = "-" if run.finished else ":"
        losses = [validation.loss for validation in run.validations]
        axes[0].plot([validation.step for validation in run.validations], losses, **style)
        if run.seconds is not None:
            axes[1].plot([validation.seconds for validation in run.validations], losses, **style)
    return repeated


def loss_limits(runs, target):
    """The lowest and the highest loss to show, and the target where it is to be drawn.

    The first quarter of a run falls from 11 to 4 and would flatten the rest, where runs differ."""
    seen = [
        (v.step / (run.total_steps or run.steps or 1), v.loss)
        for run in runs
        for v in run.validations
        if math.isfinite(v.loss)
    ]
    shown = [loss for part, loss in seen if part >= 0.25] or [loss for _, loss in seen] or [TARGET]
    if target is None and min(shown) <= TARGET <= max(shown):
        target = TARGET
    shown += [target] * (target is not None)
    margin = 0.04 * (max(shown) - min(shown)) or 0.01
    return min(shown) - margin, max(shown) + margin, target


def draw(groups, file, target=None):
    """Validation loss against steps and against time, saved as PNG or SVG. Each group has its own
    colour; the runs of a single group have one each where they are few and no repetitions. Without
    a target 3.28 is drawn where the curves pass it. Raises ImportError and OSError."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def plain(text):  # matplotlib would set what stands between two "$" as a formula
        return text.replace("$", r"\$")

    runs = [run for members in groups.values() for run in members]
    sets = groups
    if len(groups) == 1 and len(runs) <= 10 and not are_repetitions(runs):
        sets = {run.name: [run] for run in runs}
    shared = os.path.dirname(os.path.commonprefix(list(sets)))  # said once, in the title
    colours = colormaps["tab10" if len(sets) <= 10 else "turbo"]
    low, high, target = loss_limits(runs, target)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    legend, any_mean = [], False
    for index, (name, members) in enumerate(sets.items()):
        colour = colours(index if len(sets) <= 10 else index / (len(sets) - 1))
        any_mean |= draw_set(axes, members, colour)
        label = name.removeprefix(shared).strip("/")
        label += f" ({len(members)} runs)" if len(members) > 1 else ""
        if all(run.seconds is None for run in members):
            label += " (no times in the log)"
        legend.append(Line2D([], [], color=colour, marker=".", label=plain(label)))
    if any_mean:
        legend.append(Patch(color="gray", alpha=0.3, label="mean ± standard deviation"))
    if not all(run.finished for run in runs):
        legend.append(Line2D([], [], color="gray", linestyle=":", label="unfinished"))
    if target is not None:
        style = {"color": "black", "linestyle": "--", "linewidth": 1}
        legend.append(Line2D([], [], label=f"loss {target:g}", **style))
    for axis, unit in zip(axes, ("step", "training time (s)"), strict=True):
        if target is not None:
            axis.axhline(target, **style)
        axis.set(xlabel=unit, xlim=(0, None), ylim=(low, high))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats per token)")
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    figure.suptitle(plain(f"Validation loss of {count}" + (f" in {shared}" if shared else "")))
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=120)


# -------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence and exit code 2; the usage lines stay with --help."""
        self.exit(2, f"{self.prog}: {message}\n")


def loss_value(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a loss is a number above 0, not {text!r}")
    return value


def parse_arguments(argv):
    parser = Parser(
        prog="compare.py", description="Compare NanoGPT speedrun logs.", allow_abbrev=False
    )
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="LOG_OR_FOLDER")
    add("--sort", choices=SORT_KEYS, default="name", help="column to sort the runs by")
    add("--target", type=loss_value, help=f"loss to be proven (default {TARGET})")
    add("--vs", nargs=2, type=Path, metavar=("A", "B"), help="two sets of runs to compare")
    at_help = "say when each run first reaches this loss (default with --vs and --json: the target)"
    add("--at", type=loss_value, metavar="LOSS", help=at_help)
    plot_help = f"draw the loss curves to a .png or .svg (default {PLOT})"
    add("--plot", nargs="?", const=PLOT, type=Path, metavar="FILE", help=plot_help)
    add("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.plot and arguments.plot.suffix.lower() not in (".png", ".svg"):
        if not arguments.plot.exists():
            parser.error(f"--plot writes .png or .svg, not {arguments.plot}")
        arguments.paths.append(arguments.plot)  # "--plot logs" means the logs, not the picture
        arguments.plot = PLOT
    paths = [*(arguments.vs or ()), *arguments.paths]
    if not paths:
        parser.error("name at least one log or folder")
    for path in paths:
        if not path.exists():
            parser.error(f"no such file or folder: {path}")
    if arguments.vs and stdtr is None:
        parser.error(f"--vs needs scipy: {INSTALL}")
    return parser, arguments


def plot(parser, groups, file, target):
    """Draw the curves and say where they are, or end with the reason why that cannot be."""
    try:
        draw(groups, file, target)
    except ImportError:
        parser.error(f"--plot needs matplotlib: {INSTALL}")
    except OSError as error:
        parser.error(f"the plot cannot be written: {error}")
    print(f"The loss curves are in {file}.", file=sys.stderr)


def main(argv=None):
    parser, arguments = parse_arguments(argv)
    vs, at = arguments.vs or [], arguments.at
    target = arguments.target or TARGET
    found = read_all([*vs, *arguments.paths])
    # With --vs the two sets are groups, whatever their folders; all other runs go by folder.
    groups = {printable(path): found[path] for path in vs}
    runs = {id(run): run for path in vs for run in found[path]}
    for run in (run for path in arguments.paths for run in found[path] if id(run) not in runs):
        runs[id(run)] = run
        groups.setdefault(run.folder, []).append(run)
    if not runs:
        print(f"{parser.prog}: no run found", file=sys.stderr)
        return 1
    groups_of_several = {name: members for name, members in groups.items() if len(members) > 1}
    summaries = [summarize(name, members, target) for name, members in groups_of_several.items()]
    if summaries and stdtr is None:
        print(f"p-values need scipy: {INSTALL}", file=sys.stderr)
    comparison = None
    if vs:
        a, b = vs
        comparison = versus(printable(a), found[a], printable(b), found[b], at or target)
    runs = sort_runs(runs.values(), arguments.sort)
    if arguments.json:
        print_json(runs, summaries, comparison, at or target)
    else:
        print_runs(runs, at)
        if summaries:
            print_summaries(summaries, target)
        if comparison:
            print_versus(comparison)
    if arguments.plot:
        plot(parser, groups, arguments.plot, at or arguments.target)
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as with "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
