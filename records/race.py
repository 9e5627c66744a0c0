"""Does an idea help? Run versions of train_gpt.py against each other, and say what that shows.

    python records/race.py my_idea.py --base main --seeds 8 --preset tiny --num_iterations 130
    python records/race.py --base HEAD --preset tiny         # what is changed in the working tree
    python records/race.py a.py b.py my-branch --base main --at 1.9 --plot --preset tiny

A candidate, or the base, is a script, a git revision (its train_gpt.py) or, where none is named,
the working tree's train_gpt.py. Candidates come first; flags that --help does not list go to the
trainer. Each version is copied at the start, so the files may be edited during a race.

The versions run in turns, seed by seed, so that a machine whose speed drifts is fair to all. Runs
of one seed are compared with each other, and each difference has its 95% interval. There is no
verdict before all seeds have run, for who stops at a lucky moment always finds a gain.

Ctrl-C ends the race after the current run, a second one at once; the same command goes on later.
The logs and a README.md with the result are in the folder --out. Exit code: 0 with a result, 1
where a version crashed or ran under other conditions, 2 for a mistake, 130 where interrupted.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import compare

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

ROOT = Path(__file__).resolve().parent.parent
OWN_FLAGS = ("--seed", "--run_id", "--log_dir", "--resume", "--eval_only")  # race.py sets these
# What a log says about machine and data; a script does not choose it, so it has to be the same.
CONDITIONS = re.compile("python|torch|cuda|hardware|world_size|device|vocabulary|tokens in ")
SECONDS_TO_END = 20  # for a run that is told to stop, before it is killed


class UserError(Exception):
    """What the user can mend, in one sentence."""


@dataclass
class Version:
    """A script in the race, and its runs so far."""

    label: str
    script: bytes
    runs: dict[int, compare.Run] = field(default_factory=dict)  # finished ones, by seed
    crash: str = ""  # what happened, where a run failed


@dataclass
class Race:
    base: Version
    candidates: list[Version]
    seeds: range
    flags: list[str]  # the trainer's
    processes: int | None  # of torchrun; None for plain Python
    out: Path

    @property
    def versions(self):
        return [self.base, *self.candidates]

    @property
    def complete(self):
        return all(len(version.runs) == len(self.seeds) for version in self.versions)

    def log(self, version, seed):
        return self.out / version.label / f"seed_{seed}.txt"

    def command(self, script, version, seed):
        """The command line of one run, with this same Python."""
        launcher = [sys.executable]
        if self.processes:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={self.processes}"]
        log = self.log(version, seed)
        names = ["--log_dir", str(log.parent), "--run_id", log.stem]
        return [*launcher, str(script), *self.flags, "--seed", str(seed), *names]


# -------------------------------------------------------------------------------------------------
# What races: scripts, flags, and the runs that are there already


def read_script(name):
    """The source of a candidate: a file, a git revision's train_gpt.py, or the working tree's."""
    path = Path(name) if name else ROOT / "train_gpt.py"
    if path.is_file():
        return path.read_bytes()
    git = ["git", "-C", str(ROOT), "show", f"{name}:train_gpt.py"]
    shown = subprocess.run(git, capture_output=True)
    if shown.returncode or name.startswith("-"):
        raise UserError(
            f"{name!r} is neither a file nor a git revision with a train_gpt.py; name one of these."
        )
    return shown.stdout


def make_labels(names):
    """A short name for each version, fit for a folder and different from all others."""
    labels = []
    for name in names:
        short = Path(name).stem if Path(name).is_file() else name
        label = re.sub(r"[^\w.~^-]+", "_", short).strip("_.") or "working_tree"
        while label in labels:
            label += "_again"
        labels.append(label)
    return labels


def parse_seeds(text):
    """8 stands for the seeds 0 to 7, 8-15 for these."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"seeds are a number, as 8, or from-to, as 8-15: {text!r}")
    first, last = (int(match[1]), int(match[2])) if match[2] else (0, int(match[1]) - 1)
    if last - first < 1:
        raise argparse.ArgumentTypeError("one seed shows no spread; take at least 2, better 8")
    return range(first, last + 1)


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of processes is at least 1, not {text!r}")
    return int(text)


def parse_arguments(argv):
    """The race that a command line asks for, and whether to plot, and the loss to reach."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    parser = compare.Parser(
        prog="race.py",
        usage="race.py [CANDIDATE ...] [--base BASE] [--seeds N] [flags of the trainer]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", default="", help="what the candidates are held against")
    add("--seeds", type=parse_seeds, default="8", metavar="N", help="how many, or as 8-15 (8)")
    add("--nproc", type=positive, metavar="N", help="start each run by torchrun, of N processes")
    at_help = "steps and seconds to this loss as well"
    add("--at", type=compare.loss_value, metavar="LOSS", help=at_help)
    add("--plot", action="store_true", help="draw mean curves and their spread, OUT/curves.png")
    add("--out", type=Path, metavar="OUT", help="folder of the logs (logs/race/...)")
    arguments, flags = parser.parse_known_args(argv[len(names) :])
    if tqdm is None or compare.stdtr is None:
        parser.error(f"scipy and tqdm are needed: {compare.INSTALL}")
    for flag in flags:
        if flag.partition("=")[0] in OWN_FLAGS:
            parser.error(f"{flag} is set for each run; see --seeds and --out")
    if not names and not arguments.base:
        parser.error("name a candidate, or a --base to hold the working tree against")
    names = [arguments.base, *(names or [""])]
    try:
        scripts = [read_script(name) for name in names]
    except (UserError, OSError) as error:
        parser.error(str(error))
    versions = list(map(Version, make_labels(names), scripts))
    out = arguments.out or default_folder(versions, flags, arguments.nproc)
    race = Race(versions[0], versions[1:], arguments.seeds, flags, arguments.nproc, out)
    return parser, race, arguments


def default_folder(versions, flags, processes):
    """A folder for these scripts and settings, the same one whenever they are started again."""
    facts = [[version.script.decode(errors="replace") for version in versions], flags, processes]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]
    more = f"_and_{len(versions) - 2}_more" if len(versions) > 2 else ""
    return Path("logs/race", f"{versions[1].label}{more}_vs_{versions[0].label}-{digest}")


def keep_runs(race):
    """Take over the finished runs that the folder holds. They have to be of the same scripts and
    settings. Raises UserError."""
    settings, path = {"flags": race.flags, "processes": race.processes}, race.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(
            f"{race.out} holds a race with other settings ({path}); choose another --out."
        )
    race.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n")
    for version, seed in itertools.product(race.versions, race.seeds):
        log = race.log(version, seed)
        run = compare.read_log(log) if log.exists() else None
        if run is None:
            continue
        # A log begins with its script, with the newlines of this system.
        if not log.read_bytes().startswith(version.script.replace(b"\r\n", b"\n")):
            raise UserError(
                f"{log} is of another script than {version.label}; choose another --out."
            )
        if run.finished and math.isfinite(run.loss):
            version.runs[seed] = run


# -------------------------------------------------------------------------------------------------
# The runs


class Interrupts:
    """Counts Ctrl-C: the first one asks for an end after the current run, the second for one at
    once, as do a termination and the loss of the terminal."""

    def __init__(self):
        self.asked = 0
        self.announced = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.asked += 1 if number == signal.SIGINT else 2

    def announce(self):
        if self.asked and not self.announced:
            self.announced = True
            if self.asked == 1:
                text = "Ending after this run; Ctrl-C once more ends it at once."
                tqdm.write(text, file=sys.stderr)


def share_done(log):
    """The part of its steps that a run has taken, by the end of its log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    steps = filter(None, map(compare.STEP.match, reversed(lines)))
    last = next(steps, None)
    return int(last[1]) / int(last[2]) if last and last[2] else 0


def end_process(process):
    """Stop a run that still goes on, with all processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            continue


def said(output):
    """The line of a failed run's output that tells most: its last error, or else its last line."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    # torchrun's own ChildFailedError only says that there was another one.
    error = re.compile(r"(\[rank\d+\]: )?(?!.*ChildFailed)([\w.]*(Error|Exception)\b|\w+\.py: )")
    errors = [line for line in lines if error.match(line)]
    return (errors or lines or ["it said nothing"])[-1].strip()


def run_once(race, version, seed, script, bar, interrupts):
    """One run from start to end. Returns whether it was left to end; its result, or how it failed,
    goes into the version."""
    log, done = race.log(version, seed), bar.n
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)  # of a run that was cut off
    output = log.with_suffix(".out")
    with output.open("wb") as file:
        # A session of its own keeps the terminal's Ctrl-C away from the run.
        process = subprocess.Popen(
            race.command(script, version, seed),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and interrupts.asked < 2:
                interrupts.announce()
                bar.n = done + share_done(log)
                bar.refresh()
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            left_to_end = process.poll() is not None
            end_process(process)
    if not left_to_end:
        return False
    run = compare.read_log(log) if log.exists() else None
    finished = run is not None and run.finished and math.isfinite(run.loss)
    if process.returncode == 0 and finished:
        version.runs[seed] = run
        output.unlink()
        return True
    how = f"exit code {process.returncode}" if process.returncode else f"no finished log {log}"
    version.crash = f"{version.label} crashed with seed {seed} ({how}): {said(output)}"
    if log.exists():
        log.rename(log.with_suffix(".crashed"))
    return True


def run_all(race, interrupts):
    """Every run that is not there yet, in turns: for each seed all versions, every other time in
    the opposite order. Returns whether it came to its end."""
    width = max(len(version.label) for version in race.versions)
    plan = [
        (version, seed)
        for index, seed in enumerate(race.seeds)
        for version in race.versions[:: -1 if index % 2 else 1]
    ]
    kept = sum(len(version.runs) for version in race.versions)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(
            total=len(plan),
            initial=kept,
            bar_format="{desc} |{bar}| {percentage:3.0f}%, {remaining} left",
            dynamic_ncols=True,
            leave=False,
            disable=None,
        ) as bar,
    ):
        for version in race.versions:
            copy = Path(folder, version.label, "train_gpt.py")
            copy.parent.mkdir()
            copy.write_bytes(version.script)
        waiting = [(version, seed) for version, seed in plan if seed not in version.runs]
        for number, (version, seed) in enumerate(waiting, kept + 1):
            if interrupts.asked:
                return False
            if version.crash:
                bar.total -= 1
                continue
            bar.n = sum(len(each.runs) for each in race.versions)
            bar.set_description_str(f"run {number} of {len(plan)}: {version.label}, seed {seed}")
            script = Path(folder, version.label, "train_gpt.py")
            if not run_once(race, version, seed, script, bar, interrupts):
                return False
            if race.base.crash:
                return True
            if seed in version.runs:
                run = version.runs[seed]
                speed = f"{run.step_avg_ms or math.nan:.1f} ms a step"
                text = f"seed {seed}  {version.label:{width}}  loss {run.loss:.4f}  {speed}"
            else:
                text = version.crash
            tqdm.write(text)
    return True


# -------------------------------------------------------------------------------------------------
# The result


def compare_settings(base, version):
    """What the logs of two versions tell of settings: sentences on those that the scripts set
    differently, and on those that no script sets, which make a comparison unfair."""
    ours, theirs = (
        [run.settings for run in each.runs.values()] or [{}] for each in (version, base)
    )
    changed, unfair = [], []
    for name in dict.fromkeys(name for settings in theirs + ours for name in settings):
        here, there = (sorted({each.get(name, "-") for each in logs}) for logs in (ours, theirs))
        if name in compare.VARYING | {"script"} or (here == there and len(here) == 1):
            continue
        text = f"{name} is {' or '.join(here)} in {version.label}"
        text += f" and {' or '.join(there)} in {base.label}"
        # A script sets a value once and for all its runs.
        own = len(here) == len(there) == 1 and not CONDITIONS.match(name)
        (changed if own else unfair).append(text)
    return changed, unfair


def compare_runs(base, version, at):
    """The rows of a candidate's table, as (title, digits, paired comparison, whether a ratio)."""
    seeds = [seed for seed in version.runs if seed in base.runs]
    runs = [[each.runs[seed] for seed in sorted(seeds)] for each in (version, base)]

    def pair(value, ratio=False):
        return compare.paired(*([value(run) for run in each] for each in runs), ratio)

    rows = [
        ("final loss", 4, pair(lambda run: run.loss), False),
        ("ms a step", 1, pair(lambda run: run.step_avg_ms or None, ratio=True), True),
    ]
    for index, unit in enumerate(("steps", "seconds") if at else ()):
        title = f"{unit} to {at:g}"
        reached = pair(lambda run, index=index: compare.first_reach(run.validations, at)[index])
        rows.append((title, 1, reached, False))
    return rows


def table(rows, complete):
    """The rows as lines of text. Before all seeds have run there are no intervals to be seen."""
    cells = [["", "candidate", "base", "change", "  95% interval"]]
    for title, digits, result, ratio in rows:
        means = [compare.number(result[side]["mean"], digits) for side in "ab"]
        form = "x{:.3f}" if ratio else f"{{:+.{digits}f}}"
        change = "-" if result["difference"] is None else form.format(result["difference"])
        interval = "no spread"
        if not complete:
            interval = "-"
        elif result["interval"]:
            interval = " to ".join(map(form.format, result["interval"]))
        elif result["verdict"].startswith("no comparison"):
            interval = "a run has no value"
        elif result["verdict"].startswith("equal"):
            interval = "the same with every seed"
        cells.append([title, *means, change, f"  {interval}"])
    return list(compare.table_lines(cells))


def verdict(base, version, rows):
    """One sentence: better, worse, or no difference seen."""
    (_, _, loss, _), (_, _, time, _), *_ = rows
    change, interval = loss["difference"], loss["interval"]
    ending = ""
    if time["interval"] and not time["interval"][0] <= 1 <= time["interval"][1]:
        percent = 100 * (time["difference"] - 1)
        much = f"{percent:.1f}% longer" if percent > 0 else f"{-percent:.1f}% less time"
        ending = f", and a step takes {much}"
    if interval and not interval[0] <= 0 <= interval[1]:
        word, direction = ("better", "lower") if change < 0 else ("worse", "higher")
        text = f"{version.label} is {word} than {base.label}: its final loss is {direction}"
        return f"{text} by {abs(change):.4f}{ending}."
    start = f"No difference seen between {version.label} and {base.label}"
    if interval:
        needed = f"about {loss['needed']:,}" if loss["needed"] else "millions of"
        needed = f"{needed} seeds would be needed to see one of {abs(change):.4f} in the final loss"
        return f"{start}: {needed}{ending}."
    if change == 0:
        return f"{start}: the final loss is the same with every seed{ending}."
    return f"No verdict on {version.label}: {loss['verdict']}."


def describe_candidate(race, version, at):
    """The lines on one candidate, and whether it was compared without a flaw."""
    base = race.base
    seeds = len([seed for seed in version.runs if seed in base.runs])
    counted = f"{seeds} of {len(race.seeds)}" if seeds < len(race.seeds) else str(seeds)
    lines = [f"{version.label} against {base.label}, {counted} seeds", ""]
    changed, unfair = compare_settings(base, version) if seeds else ([], [])
    rows = compare_runs(base, version, at)
    if seeds:
        lines += [*table(rows, race.complete or seeds == len(race.seeds)), ""]
    lines += [f"By its script, {text}." for text in changed]
    lines += [f"Not the same conditions: {text}." for text in unfair]
    crash = base.crash or version.crash
    if crash:
        lines += [f"No verdict on {version.label}: {crash}"]
    elif seeds < len(race.seeds):
        lines += ["This is partial: there is no verdict before all seeds have run."]
    elif unfair:
        lines += [f"No verdict on {version.label}: it did not run under the base's conditions."]
    else:
        lines += [verdict(base, version, rows)]
    return lines, not crash and not unfair


def write_readme(race, argv, lines, picture):
    """The record: the command, the result, and where the logs are."""
    names = " and ".join(version.label for version in race.candidates)
    text = [f"# {names} against {race.base.label}", ""]
    text += ["```", f"$ {shlex.join(['python', 'records/race.py', *argv])}", *lines, "```", ""]
    text += ["The logs, one folder a version, begin with the script that wrote them.", ""]
    text += ["![Validation loss against steps and against time](curves.png)", ""] * picture
    (race.out / "README.md").write_text("\n".join(text))


def report(race, argv, parser, arguments):
    """Print and keep the result. Returns whether every candidate was compared without a flaw."""
    lines, flawless = [], True
    for version in race.candidates:
        more, fine = describe_candidate(race, version, arguments.at)
        lines += [*more, ""]
        flawless &= fine
    if len(race.candidates) > 1:
        lines += [
            "Each candidate is judged by itself: of 20 that change nothing, one seems to.",
            "",
        ]
    # Tables and short lines stay as they are; long sentences are broken for a narrow terminal.
    lines = [
        part for line in lines for part in (textwrap.wrap(line, 80) if len(line) > 80 else [line])
    ]
    print("\n" + "\n".join(lines[:-1]))
    groups = {each.label: list(each.runs.values()) for each in race.versions if each.runs}
    picture = arguments.plot and bool(groups)
    if picture:
        compare.plot(parser, groups, race.out / "curves.png", arguments.at)
    write_readme(race, argv, lines[:-1], picture)
    print(f"The logs and this result are in {race.out}.")
    return flawless


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser, race, arguments = parse_arguments(argv)
    try:
        keep_runs(race)
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))
    kept = sum(len(version.runs) for version in race.versions)
    total = len(race.versions) * len(race.seeds)
    labels = " and ".join([", ".join(each.label for each in race.candidates), race.base.label])
    seeds = f"seeds {race.seeds[0]} to {race.seeds[-1]}"
    print(f"{total} runs: {labels}, {seeds}" + (f"; {kept} are there already" if kept else ""))
    ended = run_all(race, Interrupts())
    flawless = report(race, argv, parser, arguments)
    if not ended:
        return 130
    return 0 if flawless else 1


if __name__ == "__main__":
    sys.exit(main())
