"""Read NanoGPT speedrun logs, ours or the public ones, and print what they prove.

    python records/compare.py records                     # every .txt and .log below a folder
    python records/compare.py old.log new/ --sort loss --target 3.28
    python records/compare.py --vs baseline/ candidate/ --at 3.30
    python records/compare.py results/ --rule benchmark --step 3250
    python records/compare.py records --plot              # loss curves, in curves.png
    python records/compare.py records --json > runs.json

    run                steps  val loss  time (s)  step avg (ms)  peak (MiB)  GPUs
    new/seed 0.txt      1770   3.27880   179.828         101.60       30724     8
    new/seed 1.txt  900/1770   3.61000    91.000         101.11           -     8  unfinished

A run's result is its last validation. Runs of a folder that share script, settings and data are a
group; seed, machine and settings that do not change the result may differ. Each group has a summary
line: mean, spread, and whether "mean loss <= target" is proven, that is p < 0.01 in a one-sided
one-sample t-test; if not, how many more runs would prove it, were their mean and standard deviation
the same. An unfinished run is counted, but no statistic uses it. Files whose last validations agree
in step, loss and time are copies of one run, of which one counts.

--rule benchmark applies the rules of the public optimizer benchmark instead: a z-test with a known
standard deviation, at a validation that all runs of a group have, their last one or not.
https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization#rules

Listing and --rule benchmark need only Python; p-values and intervals need scipy, plots matplotlib;
both are pinned in records/requirements.txt.
"""

import argparse
import bisect
import hashlib
import json
import math
import operator
import re
import shlex
import signal
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

try:
    # Student's t, distribution function and inverse; scipy.stats has them too, but loads slower.
    from scipy.special import stdtr, stdtrit
except ImportError:
    stdtr = stdtrit = None

INSTALL = f"pip install -r {shlex.quote(str(Path(__file__).with_name('requirements.txt')))}"
TARGET = 3.28  # the speedrun's
SIGNIFICANCE = 0.01  # a record counts when p is below this
CONFIDENCE = 0.95  # of the interval of a difference
# The optimizer benchmark's: 3.09 standard deviations (p < 0.001) of 0.0013, and what 100 steps more
# change in the loss.
MARGIN = 0.004
LOSS_PER_STEP = 0.0045 / 100
ROUNDING = 1e-9  # below the last decimal of any loss, above the error of any float

# -------------------------------------------------------------------------------------------------
# Logs

RULE = re.compile("^={100}\n", re.MULTILINE)
# Lines are matched from their first character on, and with digits, so that neither the format
# strings of a script's own source nor indented examples in it pass for a step.
EVENT = re.compile(
    r"^(?:(?:step|s):(\d+)(?:/(\d+))?\s+(?=\w+:)|resumed from step (\d+)\b"
    r"|peak memory (?:allocated|consumption):\s*(\d+) MiB).*$",
    re.MULTILINE,
)
LOSS = re.compile(r"\s(?:val_loss|tel):(\d+\.?\d*|nan|inf)(?!\S)")
SETTING = re.compile(r"^([\w.-][\w. -]*): (.*)$", re.MULTILINE)
# A row of the nvidia-smi table: the GPU's index, its name, then the bus address, which rows of
# processes do not have.
GPU_ROW = re.compile(r"^\|\s+(\d+)\s+\S[^|]*\|\s*[\dA-Fa-f]{8}:[\dA-Fa-f]{2}:", re.MULTILINE)

# The lines of a head in which repetitions of a run may differ. The data's files may have any name,
# for the fingerprints of the shards are in the head, too.
VARYING = """script seed run_id log_dir save_every keep resume checkpoint first_step schedule
timeout sample val_loss_every train_files val_files coordinate_descent_tuning python torch cuda
triton hardware world_size device attention head""".split()  # noqa: SIM905


class Validation(NamedTuple):
    step: int
    loss: float | None  # nats per token; nan where the run diverged
    seconds: float | None  # training time so far; the oldest logs have none
    step_avg_ms: float | None


@dataclass
class Run:
    """One run as its log records it; None stands for what the log does not have."""

    name: str  # the log's path as given
    folder: str
    script: str  # hash of the source that the log begins with; "" without one
    settings: dict[str, str] = field(default_factory=dict)  # versions, hardware, flags
    gpus: int | None = None  # 0 on a CPU
    steps: int = 0  # the last step logged
    total_steps: int | None = None  # the planned number of steps
    memory_mib: int | None = None  # peak allocated
    validations: dict[int, Validation] = field(default_factory=dict)  # by step

    @property
    def last(self):
        """The last validation, which is the run's result."""
        return next(reversed(self.validations.values()), Validation(0, None, None, None))

    @property
    def finished(self):
        """Whether the last validation is that of the last step. The oldest logs do not have the
        planned number of steps: there a run is unfinished that trained past its last validation."""
        return bool(self.validations) and self.last.step >= (self.total_steps or self.steps)

    @property
    def experiment(self):
        """What the runs of a group have in common."""
        settings = {name: value for name, value in self.settings.items() if name not in VARYING}
        return settings | {"steps": self.total_steps or "-", "script": self.script or "-"}

    @property
    def identity(self):
        """What copies of a run agree in. At step 0 all runs do. As text, a nan equals a nan."""
        return str(self.last[:3]) if self.last.step else self.name

    def read_line(self, line):
        """Take over a match of EVENT. A log is only ever appended to: a resumed run repeats steps,
        and the later lines count."""
        step, total, resumed, memory = line.groups()
        if memory:
            self.memory_mib = int(memory)
        elif resumed:
            self.steps, known = int(resumed), self.validations.items()
            self.validations = {at: value for at, value in known if at <= self.steps}
        else:
            self.steps, self.total_steps = int(step), total and int(total)
            loss, ms = LOSS.search(line[0]), read_ms("train_time", line[0])
            if loss:
                result = self.steps, float(loss[1]), ms and ms / 1000, read_ms("step_avg", line[0])
                self.validations[self.steps] = Validation(*result)


def read_ms(name, line):
    """Milliseconds in a field of a line; None for nan and for no such field."""
    match = re.search(rf"\s{name}:(\d+\.?\d*)(ms|s)\b", line)
    return match and float(match[1]) * (1 if match[2] == "ms" else 1000)


def count_gpus(head):
    """nvidia-smi lists the machine's GPUs, world_size counts those that the run used."""
    if re.search("^hardware: cpu", head, re.MULTILINE | re.IGNORECASE):
        return 0
    world_size = re.search(r"\bworld_size:? (\d+)", head)
    return int(world_size[1]) if world_size else len(set(GPU_ROW.findall(head))) or None


def read_log(path):
    """The runs in a log file; none where it has no line of a step. Raises OSError.

    A line of 100 "=" ends the script's source; the head goes from there to the last such line
    before the steps. Where the step number falls and no run was resumed, another run begins, and
    the runs are named PATH#1, PATH#2 and so on."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.endswith("ms"):  # without a newline, the last line may have been cut in a number
        text = text[: text.rfind("\n") + 1]
    script, *parts = RULE.split(text) if RULE.search(text) else ("", text)
    if not script.strip() and len(parts) > 2:  # the oldest of these logs begin with such a line
        script, *parts = parts
    digest = hashlib.sha256(script.encode()).hexdigest()[:8] if script.strip() else ""
    runs, head = [], ""
    for part in parts:
        lines = list(EVENT.finditer(part))
        if not lines:
            head += part
            continue
        settings, gpus, head = dict(SETTING.findall(head)), count_gpus(head), ""
        for line in lines:
            if line[1] and (not runs or int(line[1]) < runs[-1].steps):
                runs.append(Run(str(path), str(path.parent), digest))
            if runs:
                runs[-1].settings, runs[-1].gpus = settings, gpus
                runs[-1].read_line(line)
    for number, run in enumerate(runs if len(runs) > 1 else (), 1):
        run.name += f"#{number}"
    return runs


def read_runs(paths):
    """The runs of the logs, and of every .txt and .log below the folders. A file without a run is
    named on stderr. Raises OSError."""
    logs = {}  # as keys, so that a file named twice is read once
    for path in paths:
        below = filter(Path.is_file, [*path.rglob("*.txt"), *path.rglob("*.log")])
        logs |= dict.fromkeys(sorted(below) if path.is_dir() else [path])
    runs = []
    for log in logs:
        found = read_log(log)
        if not found:
            print(f"{log}: no run in this file", file=sys.stderr)
        runs += found
    return runs


def drop_copies(runs):
    """One run of each identity, if possible one whose log holds the script. The others are named on
    stderr."""
    originals = {}
    for run in sorted(runs, key=lambda run: not run.script):
        original = originals.setdefault(run.identity, run)
        if original is not run:
            print(f"{run.name} is left out: a copy of {original.name}", file=sys.stderr)
    return list(originals.values())


def split_runs(name, runs):
    """Groups of runs with the same script, settings and data as {name: runs}. Where there are
    several, their names hold the first settings that tell them apart."""
    groups = {}
    for run in runs:
        groups.setdefault(frozenset(run.experiment.items()), []).append(run)
    experiments = [members[0].experiment for members in groups.values()]
    labels = [""] * len(groups)
    for setting in {setting: None for experiment in experiments for setting in experiment}:
        longer = [
            f"{label}, {setting} {experiment.get(setting, '-')}"
            for label, experiment in zip(labels, experiments, strict=True)
        ]
        if len(set(longer)) > len(set(labels)):
            labels = longer
    names = [f"{name} ({label[2:]})" if label else name for label in labels]
    return dict(zip(names, groups.values(), strict=True))


def first_reach(validations, loss):
    """(steps, seconds) at which the loss is first reached, on the straight line between the
    validations around it; None and None where it never is. Logs without times give no seconds."""
    before = None
    for now in validations.values():
        if now.loss <= loss:
            if before is None or not before.loss > loss:  # there from the start, or after a nan
                before = now
            part = (before.loss - loss) / (before.loss - now.loss or 1)
            steps = before.step + part * (now.step - before.step)
            if None in (before.seconds, now.seconds):
                return steps, None
            return steps, before.seconds + part * (now.seconds - before.seconds)
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


NO_NUMBER = "not proven: no number of runs would, the mean is not below the target"


def t_test(losses, target):
    """One-sided one-sample t-test: the probability of a mean this low if the target were the true
    one, and a plain verdict."""
    n, mean = len(losses), statistics.fmean(losses)
    if statistics.pstdev(losses) == 0:
        return None, "not proven: one run, or equal ones, have no spread, so no p-value"
    if stdtr is None:
        return None, f"no p-value without scipy: {INSTALL}"
    std = statistics.stdev(losses)

    def p_value(runs):
        """Of as many runs, had they this mean and standard deviation."""
        return float(stdtr(runs - 1, (mean - target) / std * math.sqrt(runs)))

    p, high = p_value(n), n
    if p < SIGNIFICANCE:
        return p, "proven"
    if mean > target - ROUNDING:
        return p, NO_NUMBER
    while p_value(high) >= SIGNIFICANCE:
        high *= 2
    enough = bisect.bisect_left(
        range(high), True, lo=n, key=lambda runs: p_value(runs) < SIGNIFICANCE
    )
    return p, f"not proven: {enough - n} more run(s) at this spread would be needed"


def z_test(losses, target):
    """The same by the optimizer benchmark's rule: (target - mean) * sqrt(n), and the verdict."""
    n, below = len(losses), target - statistics.fmean(losses)
    score = below * math.sqrt(n)
    if score > MARGIN - ROUNDING:
        return score, "proven"
    if not below > ROUNDING:
        return score, NO_NUMBER
    more = math.ceil(round((MARGIN / below) ** 2, 6)) - n
    return score, f"not proven: {more} more run(s) with this mean would be needed"


def results_of(runs, target, rule, step):
    """The validations that count, one of each run. The speedrun takes the last ones of finished
    runs, the benchmark those of the first step that passes, or else the last that all have."""
    if rule == "speedrun":
        return [run.last for run in runs if run.finished]
    steps = set.intersection(*(set(run.validations) for run in runs))
    results = []
    for at in sorted(steps if step is None else steps & {step}):
        results = [run.validations[at] for run in runs]
        if z_test([result.loss for result in results], target)[1] == "proven":
            break
    return results


def summarize(name, runs, target, rule, step):
    """The summary of a group: loss and time of the runs that count, the test against the target,
    and a plain verdict."""
    results = results_of(runs, target, rule, step)
    losses = [result.loss for result in results if math.isfinite(result.loss)]
    diverged = len(results) - len(losses)
    test = None
    if diverged:  # leaving these out quietly would make the rest look better than the script is
        verdict = f"not proven: {diverged} diverged"
    elif losses:
        test, verdict = (t_test if rule == "speedrun" else z_test)(losses, target)
    else:
        verdict = "not proven: no finished run, or no validation that all runs have"
    return {
        "name": name,
        "unfinished": len(runs) - len(results),
        "diverged": diverged,
        "loss": describe(losses),
        "time_s": describe([result.seconds for result in results if result.seconds is not None]),
        "target": target,
        "step": results[0].step if results and rule == "benchmark" else None,
        "p" if rule == "speedrun" else "score": test,
        "verdict": verdict,
    }


def difference(a, b, paired=False):
    """Mean of A minus mean of B, its 95% interval and a plain verdict. Paired: by the one-sample t
    of the differences of pairs; otherwise by Welch's t, for the two spreads may differ.

    None, nan and inf stand for a run without a value. The rest would be a chosen part of the runs,
    so then the means are given and the difference is not."""
    known = [[v for v in values if v is not None and math.isfinite(v)] for values in (a, b)]
    sides = list(map(describe, known))
    result = {"a": sides[0], "b": sides[1], "difference": None, "interval": None}
    if known != [a, b] or not (a and b):
        return result | {"verdict": "no comparison: a run has no value, or a set no finished run"}
    result["difference"] = center = sides[0]["mean"] - sides[1]["mean"]
    if paired:
        sides = [describe([x - y for x, y in zip(a, b, strict=True)])]
    spreads = [side["std"] for side in sides]
    if None in spreads or not any(spreads):
        return result | {
            "verdict": "no interval: a set of one run, or of equal ones, has no spread"
        }
    parts = [side["std"] ** 2 / side["n"] for side in sides]
    degrees = sum(parts) ** 2 / sum(
        part**2 / (side["n"] - 1) for part, side in zip(parts, sides, strict=True)
    )
    result["error"] = math.sqrt(sum(parts))
    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * result["error"]
    verdict = "within noise"
    if abs(center) > half:
        verdict = f"more than noise: A is {'lower' if center < 0 else 'higher'}"
    return result | {"interval": [center - half, center + half], "verdict": verdict}


# What two sets of runs are compared by: title and decimals.
MEASURES = {
    "loss": ("loss", 5),
    "time_s": ("time (s)", 3),
    "steps_to": ("steps to {:g}", 1),
    "seconds_to": ("seconds to {:g}", 3),
}


def versus(sets, at, paired=False):
    """Two sets {name: runs} against each other, by their finished runs: loss, time, and when each
    reaches a loss."""
    values = [
        [
            (run.last.loss, run.last.seconds, *first_reach(run.validations, at))
            for run in runs
            if run.finished
        ]
        for runs in sets.values()
    ]
    result = dict(zip("ab", sets, strict=True), at=at)
    for index, name in enumerate(MEASURES):
        result[name] = difference(*([row[index] for row in rows] for rows in values), paired)
    return result


def benchmark_versus(a, b):
    """Two summaries by the benchmark's rule against each other: the difference of the losses, and
    what the difference of the steps is worth, times as many runs as it has standard errors."""
    result = {"a": a["name"], "b": b["name"], "score": None}
    if None in (a["score"], b["score"]):
        return result | {"verdict": "no comparison: a set without a result"}
    gain = a["loss"]["mean"] - b["loss"]["mean"] + LOSS_PER_STEP * (a["step"] - b["step"])
    result["score"] = gain / math.sqrt(1 / a["loss"]["n"] + 1 / b["loss"]["n"])
    if abs(result["score"]) > MARGIN - ROUNDING:
        return result | {"verdict": f"{'B' if gain > 0 else 'A'} is better"}
    needed = math.ceil(2 * (MARGIN / max(abs(gain), ROUNDING)) ** 2)
    return result | {"verdict": f"not proven: about {needed:,} runs of each would be needed"}


# -------------------------------------------------------------------------------------------------
# Output: tables, JSON, plot

# The columns by what --sort calls them: title, attribute of a run, decimals.
COLUMNS = {
    "name": ("run", "name", None),
    "steps": ("steps", "steps", None),
    "loss": ("val loss", "last.loss", 5),
    "time": ("time (s)", "last.seconds", 3),
    "avg": ("step avg (ms)", "last.step_avg_ms", 2),
    "memory": ("peak (MiB)", "memory_mib", 0),
    "gpus": ("GPUs", "gpus", 0),
}


def sort_runs(runs, key):
    """By one column, smallest first; runs without a value there (or with nan) come last."""

    def order(run):
        value = operator.attrgetter(COLUMNS[key][1])(run)
        if key == "name":  # seed_10 after seed_9
            return re.sub(r"\d+", lambda digits: digits[0].zfill(9), value)
        return math.inf if value is None or value != value else value

    return sorted(runs, key=order)


def number(value, digits, sign=""):
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def table_lines(rows):
    """Rows of text in columns: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        right = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *right, last]).rstrip()


def print_runs(runs, at):
    _, _, *numbers = COLUMNS.values()
    rows = [[title for title, *_ in COLUMNS.values()]]
    rows[0] += [f"steps to {at:g}", f"seconds to {at:g}", ""] if at else [""]
    for run in runs:
        unfinished = "" if run.finished else "unfinished"
        planned = f"/{run.total_steps}" if unfinished and run.total_steps else ""
        row = [run.name, f"{run.steps}{planned}"]
        row += [number(operator.attrgetter(name)(run), digits) for _, name, digits in numbers]
        if at:
            row += map(number, first_reach(run.validations, at), (1, 3))
        rows.append([*row, unfinished])
    print(*table_lines(rows), sep="\n")


def print_summaries(summaries, target):
    """A group's row ends with its p-value, or with the benchmark's step and score."""
    test = ["p"] if "p" in summaries[0] else ["step", f"({target:g} - mean) sqrt(runs)"]
    spread = ["std", "min", "max"]
    rows = [["folder", "runs", "loss: mean", *spread, "time (s): mean", *spread, *test]]
    rows[0] += [f"mean loss <= {target:g}?"]
    for group in summaries:
        note = f" (+{group['unfinished']} unfinished)" if group["unfinished"] else ""
        row = [group["name"], f"{group['loss']['n']}{note}"]
        for part, digits in (("loss", 5), ("time_s", 3)):
            row += [number(group[part][field], digits) for field in ("mean", "std", "min", "max")]
        if "p" in group:
            row += ["-" if group["p"] is None else f"{group['p']:.3g}"]
        else:
            row += [number(group["step"], 0), number(group["score"], 5)]
        rows.append([*row, group["verdict"]])
    print("", *table_lines(rows), sep="\n")


def versus_lines(result):
    """What versus or benchmark_versus returned, as lines of text."""
    yield f"A: {result['a']}"
    yield f"B: {result['b']}"
    if "score" in result:
        yield "(loss A - loss B + 0.0045 for 100 steps less) / sqrt(1 / runs A + 1 / runs B):"
        yield f"{number(result['score'], 5)}, {result['verdict']}"
        return
    rows = [["A - B", "A mean", "runs", "B mean", "runs", "difference", "95% interval", ""]]
    for name, (title, digits) in MEASURES.items():
        row = result[name]
        cells = [title.format(result["at"])]
        for side in (row["a"], row["b"]):
            cells += [number(side["mean"], digits), str(side["n"])]
        cells += [number(row["difference"], digits, "+")]
        cells += [" to ".join(number(end, digits, "+") for end in row["interval"] or ()) or "-"]
        rows.append([*cells, row["verdict"]])
    yield from table_lines(rows)


def print_json(runs, summaries, comparison, at):
    """Everything the tables show and every validation. JSON has no nan: such a loss is null."""

    def entry(run):
        curve = [
            {"step": v.step, "loss": v.loss if math.isfinite(v.loss) else None, "time_s": v.seconds}
            for v in run.validations.values()
        ]
        last = curve[-1] if curve else {"loss": None, "time_s": None}
        steps, seconds = first_reach(run.validations, at)
        return asdict(run) | {
            "finished": run.finished,
            "val_loss": last["loss"],
            "time_s": last["time_s"],
            "step_avg_ms": run.last.step_avg_ms,
            "reaches": {"loss": at, "steps": steps, "time_s": seconds},
            "validations": curve,
        }

    result = {"runs": list(map(entry, runs)), "groups": summaries, "versus": comparison}
    print(json.dumps(result, indent=1, allow_nan=False))


def draw(groups, file, target):
    """Validation loss against steps and against time, a colour for each group. Raises ImportError,
    OSError and, for a form of file that matplotlib does not write, ValueError."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a path begins no formula
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shown = []
    for index, (name, runs) in enumerate(groups.items()):
        label = name if len(runs) > 1 else runs[0].name
        # Behind a blank, for matplotlib leaves out what begins with "_".
        axes[0].plot([], [], f"C{index}.-", label=f" {label}")
        for run in filter(lambda run: run.validations, runs):
            steps, losses, seconds, _ = zip(*run.validations.values(), strict=True)
            line = f"C{index}.{'-' if run.finished else ':'}"
            axes[0].plot(steps, losses, line)
            axes[1].plot(seconds, losses, line)
            # In its first quarter a run falls from 11 to 4, which would flatten the rest.
            late = losses[bisect.bisect_left(steps, run.steps / 4) :]
            shown += filter(math.isfinite, late)
    low, high = min(shown, default=target), max(shown, default=target)
    margin = 0.04 * (high - low) or 0.01
    for axis, unit in zip(axes, ("step", "training time (s)"), strict=True):
        axis.axhline(target, color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=unit, xlim=(0, None), ylim=(low - margin, high + margin))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle(f"dotted: unfinished runs, dashed: loss {target:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(file, dpi=120)


# -------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence and exit code 2; the usage lines stay with --help."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(argv):
    parser = Parser(description="Compare NanoGPT speedrun logs.")
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="LOG_OR_FOLDER")
    add("--sort", choices=COLUMNS, default="name", help="column to sort the runs by")
    add("--target", type=float, metavar="LOSS", help=f"loss to be proven (default {TARGET})")
    add(
        "--vs",
        nargs=2,
        type=Path,
        default=[],
        metavar=("A", "B"),
        help="two sets of runs to compare",
    )
    at_help = "when each run first reaches this loss (default with --vs and --json: the target)"
    add("--at", type=float, metavar="LOSS", help=at_help)
    rule_help = "of proof: the speedrun's t-test (default) or the optimizer benchmark's z-test"
    add("--rule", choices=("speedrun", "benchmark"), default="speedrun", help=rule_help)
    step_help = "with --rule benchmark: the step that counts (default: the first that passes)"
    add("--step", type=int, help=step_help)
    plot_help = "draw the loss curves, as .png or .svg (default curves.png)"
    add("--plot", nargs="?", const=Path("curves.png"), type=Path, metavar="FILE", help=plot_help)
    add("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.vs) == bool(arguments.paths):
        parser.error("name logs or folders, either alone or as --vs A B")
    if arguments.step is not None and arguments.rule == "speedrun":
        parser.error("--step needs --rule benchmark")
    if arguments.vs and arguments.rule == "speedrun" and stdtr is None:
        parser.error(f"--vs needs scipy: {INSTALL}")
    return parser, arguments


def read_sets(arguments):
    """The sets of --vs, or else the folders, as {name: runs} without copies. Raises OSError."""
    sets = {str(path): read_runs([path]) for path in arguments.vs}
    for run in read_runs(arguments.paths):
        sets.setdefault(run.folder, []).append(run)
    return {name: drop_copies(runs) for name, runs in sets.items()}


def check_sets(parser, sets, groups):
    """End where --vs cannot compare these two sets."""
    if set.intersection(*({run.identity for run in runs} for runs in sets.values())):
        parser.error("A and B have runs in common; name sets that have none")
    if len(groups) != 2:
        parser.error(f"--vs compares two experiments, not {len(groups)}: {', '.join(groups)}")


def plot(parser, groups, file, target):
    """Draw the curves and print where they are, or end with the reason why that cannot be."""
    try:
        draw(groups, file, target)
    except ImportError:
        parser.error(f"--plot needs matplotlib: {INSTALL}")
    except (OSError, ValueError) as error:
        parser.error(f"the plot cannot be written: {error}")
    print(f"The loss curves are in {file}.", file=sys.stderr)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")
    parser, arguments = parse_arguments(argv)
    target, rule = arguments.target or TARGET, arguments.rule
    at = arguments.at or target
    try:
        sets = read_sets(arguments)
    except OSError as error:
        parser.error(error)
    if not sets or not all(sets.values()):
        parser.exit(1, "compare.py: no run found\n")
    groups = {}
    for name, runs in sets.items():
        groups |= split_runs(name, runs)
    if arguments.vs:
        check_sets(parser, sets, groups)
    summaries = [
        summarize(name, runs, target, rule, arguments.step)
        for name, runs in groups.items()
        if rule == "benchmark" or len(runs) > 1 or name not in sets
    ]
    comparison = None
    if arguments.vs:
        comparison = versus(sets, at) if rule == "speedrun" else benchmark_versus(*summaries)
    runs = sort_runs([run for members in sets.values() for run in members], arguments.sort)
    if arguments.json:
        print_json(runs, summaries, comparison, at)
    else:
        print_runs(runs, arguments.at)
        if summaries:
            print_summaries(summaries, target)
        if comparison:
            print("", *versus_lines(comparison), sep="\n")
    if arguments.plot:
        plot(parser, groups, arguments.plot, at)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader has seen enough, as with "| head"
    main()
