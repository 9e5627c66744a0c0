"""Does an idea help? Run versions of a training script against each other and compare the runs.

    python records/race.py my_idea.py --base main --seeds 8 --preset tiny --num_iterations 130
    python records/race.py --base HEAD --preset tiny         # the changes in the working tree
    python records/race.py a.py b.py my-branch --base main --at 1.9 --plot --preset tiny
    python records/race.py records/modern/train_modern.py --base HEAD:records/modern/train_modern.py

A candidate, or the base, is a script, a git revision (its train_gpt.py, or the file that follows a
colon) or, where none is named, the working tree's train_gpt.py. A script that imports train_gpt
gets the one of its revision, or of the working tree. Candidates come first; flags that --help does
not list go to the trainer. Each version is copied at the start and may be edited during a race.

The versions run in turns, seed by seed, so that a machine whose speed drifts is fair to all. Runs
of one seed are compared with each other, and each difference has its 95% interval. There is no
verdict before all seeds have run, for who stops at a lucky moment always finds a gain.

The folder --out gets the logs, the output of failed runs and a README.md with the result. Ctrl-C
ends a race; the same command resumes it after its last finished run. Exit code: 0 with a result, 1
where a version failed or ran under other conditions, 2 for a mistake, 130 after Ctrl-C.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import compare
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import train_gpt  # noqa: E402

OWN_FLAGS = ("--seed", "--run_id", "--log_dir")  # race.py sets these
# What a log has about machine and data; a script does not choose it, so it has to be the same.
CONDITIONS = re.compile("python|torch|cuda|hardware|world_size|device|.*_shards|tokens in ")
IMPORT = re.compile(rb"^\s*(from|import) train_gpt\b", re.MULTILINE)


@dataclass
class Version:
    """A script in the race, and its runs so far."""

    label: str
    files: dict[str, bytes]  # the script, then train_gpt.py where the script imports it
    runs: dict[int, compare.Run] = field(default_factory=dict)  # finished ones, by seed
    failure: str = ""


@dataclass
class Race:
    versions: list[Version]  # the base, then the candidates
    seeds: range
    flags: list[str]  # the trainer's
    processes: int | None  # of torchrun; None for plain Python
    data: list[str]  # fingerprints of the shards
    out: Path | None

    @property
    def settings(self):
        """All that runs have to share to be of one race."""
        scripts = {
            version.label: hashlib.sha256(b"".join(version.files.values())).hexdigest()
            for version in self.versions
        }
        settings = {"flags": self.flags, "processes": self.processes, "data": self.data}
        return json.dumps(settings | {"scripts": scripts}) + "\n"

    def log(self, version, seed):
        return self.out / version.label / f"seed_{seed}.txt"


# -------------------------------------------------------------------------------------------------
# What races: scripts, flags, data, and the runs that are there already


def read(revision, path):
    """A file of a git revision, or of the working tree where that is None; path is relative to the
    folder of train_gpt.py, wherever that is in its repository. Raises UserError and OSError."""
    if revision is None:
        return (ROOT / path).read_bytes()
    git = ["git", "-C", str(ROOT), "show", f"{revision}:./{path}"]
    shown = subprocess.run(git, capture_output=True)
    if shown.returncode:
        error = shown.stderr.decode(errors="replace").strip()
        raise train_gpt.UserError(f"{revision} is no file, and git cannot show it: {error}")
    return shown.stdout


def read_files(name):
    """The files of the version that is meant by a name. Raises UserError and OSError."""
    path, revision = Path(name or ROOT / "train_gpt.py").resolve(), None
    if not path.is_file():
        revision, _, file = name.partition(":")
        path = Path(file or "train_gpt.py")
    files = {path.name: read(revision, path)}
    if IMPORT.search(files[path.name]):
        files["train_gpt.py"] = read(revision, "train_gpt.py")
    return files


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
    first, _, last = text.rpartition("-")
    seeds = range(int(first), int(last) + 1) if first else range(int(last))
    if len(seeds) < 2:
        raise argparse.ArgumentTypeError("one seed shows no spread; take at least 2, better 8")
    return seeds


def find_data(flags):
    """Fingerprints of the shards that the trainer reads with these flags; none where the preset is
    one that only the scripts have. Raises UserError."""
    parser = compare.Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name in ("preset", "train_files", "val_files"):
        parser.add_argument(f"--{name}")
    given = vars(parser.parse_known_args(flags)[0])
    if given.get("preset", "speedrun") not in train_gpt.PRESETS:
        return []
    flags = [f"--{name}={value}" for name, value in given.items()]
    hp = train_gpt.parse_arguments(flags, train_gpt)
    patterns = hp.train_files, hp.val_files
    return [train_gpt.fingerprint(train_gpt.find_shards(pattern)) for pattern in patterns]


def parse_arguments(argv):
    """The race that a command line asks for, and whether to plot, and the loss to reach."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    parser = compare.Parser(
        usage="race.py [CANDIDATE ...] [--base BASE] [--seeds N] [flags of the trainer]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", default="", help="what the candidates are compared with")
    add("--seeds", type=parse_seeds, default="8", metavar="N", help="how many, or as 8-15 (8)")
    add("--nproc", type=int, metavar="N", help="start each run by torchrun, of N processes")
    add("--at", type=float, metavar="LOSS", help="compare steps and seconds to this loss as well")
    add("--plot", action="store_true", help="draw the loss curves, OUT/curves.png")
    add("--out", type=Path, metavar="OUT", help="folder of the logs (logs/race/...)")
    arguments, flags = parser.parse_known_args(argv[len(names) :])
    if compare.stdtr is None or (arguments.plot and not importlib.util.find_spec("matplotlib")):
        parser.error(f"scipy is needed, and matplotlib for --plot: {compare.INSTALL}")
    for flag in flags:
        if flag.partition("=")[0] in OWN_FLAGS:
            parser.error(f"{flag} is set for each run; see --seeds and --out")
    if not names and not arguments.base:
        parser.error("name a candidate, or a --base to compare the working tree with")
    names = [arguments.base, *(names or [""])]
    try:
        versions = list(map(Version, make_labels(names), map(read_files, names)))
        data = find_data(flags)
    except (train_gpt.UserError, OSError) as error:
        parser.error(error)
    race = Race(versions, arguments.seeds, flags, arguments.nproc, data, arguments.out)
    if race.out:
        race.out = race.out.expanduser()
    else:  # the same folder whenever the same race is started again
        digest = hashlib.sha256(race.settings.encode()).hexdigest()[:6]
        race.out = Path("logs/race", f"{versions[1].label}_vs_{versions[0].label}-{digest}")
    return parser, race, arguments


def claim_folder(race):
    """Lock the folder of a race for as long as the returned file is open, and take over the
    finished runs in it. Raises UserError and OSError."""
    race.out.mkdir(parents=True, exist_ok=True)
    file = (race.out / "settings.json").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise train_gpt.UserError(
            f"a race is running in {race.out}; wait for its end, or choose another --out."
        ) from None
    file.seek(0)
    known = file.read()
    if known != race.settings and (known or len(list(race.out.iterdir())) > 1):
        raise train_gpt.UserError(
            f"{race.out} holds something else than a race of these scripts, flags and data (see "
            f"{file.name}); choose another --out."
        )
    if not known:
        file.write(race.settings)
        file.flush()
    for version, seed in itertools.product(race.versions, race.seeds):
        if run := read_run(race.log(version, seed)):
            version.runs[seed] = run
    return file


def read_run(log):
    """The run in a log, or None if there is none that finished with a finite loss."""
    runs = compare.read_log(log) if log.exists() else []
    return next((run for run in runs if run.finished and math.isfinite(run.last.loss)), None)


# -------------------------------------------------------------------------------------------------
# The runs


def copy_files(race, folder):
    """The script of each version, in a folder of its own below this one, by label."""
    scripts = {}
    for version in race.versions:
        copy = Path(folder, version.label)
        copy.mkdir()
        for name, content in version.files.items():
            (copy / name).write_bytes(content)
        (copy / "data").symlink_to(ROOT / "data")  # where the trainer finds shards by default
        scripts[version.label] = copy / next(iter(version.files))
    return scripts


def run_once(race, version, seed, script, lock):
    """One run from start to end. Its result, or how it failed, goes into the version."""
    log = race.log(version, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)  # of a run that did not finish
    output = log.with_suffix(".out")
    command = [sys.executable]
    if race.processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={race.processes}"]
    command += [str(script), *race.flags, "--seed", str(seed)]
    command += ["--log_dir", str(log.parent), "--run_id", log.stem]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],  # a run that outlives the race keeps the folder
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    run = read_run(log)
    if run and process.returncode == 0:
        version.runs[seed] = run
        output.unlink()
        return
    last = output.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    version.failure = f"exit code {process.returncode} with seed {seed}: {last} (all in {output})"


def run_all(race, lock):
    """Every run that is not there yet, in turns: for each seed all versions, every other time in
    the opposite order."""
    plan = [
        (version, seed)
        for index, seed in enumerate(race.seeds)
        for version in race.versions[:: -1 if index % 2 else 1]
        if seed not in version.runs
    ]
    with tempfile.TemporaryDirectory() as folder:
        scripts = copy_files(race, folder)
        for version, seed in tqdm(plan, leave=False, disable=None):
            if version.failure or race.versions[0].failure:
                continue
            run_once(race, version, seed, scripts[version.label], lock)
            text = f"{version.label} failed, {version.failure}"
            if not version.failure:
                last = version.runs[seed].last
                speed = compare.number(last.step_avg_ms, 1)
                text = f"seed {seed}  {version.label}  loss {last.loss:.4f}  {speed} ms a step"
            tqdm.write(text)


# -------------------------------------------------------------------------------------------------
# The result


def compare_settings(base, version):
    """A line for each setting that differs between the logs, and whether the comparison is fair:
    machine and data are the same, and each version has one value of all that its script sets."""
    logs = [[run.settings for run in each.runs.values()] for each in (version, base)]
    lines, fair = [], True
    for name in dict.fromkeys(name for settings in itertools.chain(*logs) for name in settings):
        ours, theirs = (sorted({settings.get(name, "-") for settings in each}) for each in logs)
        is_condition = bool(CONDITIONS.match(name))
        if len({*ours, *theirs}) > 1 and (is_condition or name not in compare.VARYING):
            text = f"{name} is {' or '.join(ours)} in {version.label}"
            lines.append(f"{text} and {' or '.join(theirs)} in {base.label}.")
            fair &= len(ours) == len(theirs) == 1 and not is_condition
    return lines, fair


def verdict(base, version, loss):
    """One sentence: better, worse, or no difference seen."""
    change, interval = loss["difference"], loss["interval"]
    if interval and not interval[0] <= 0 <= interval[1]:
        word, direction = ("better", "lower") if change < 0 else ("worse", "higher")
        text = f"{version.label} is {word} than {base.label}: its final loss is {direction}"
        return f"{text} by {abs(change):.4f}."
    start = f"No difference seen between {version.label} and {base.label}"
    if not interval:
        return f"{start}: the final loss changes by {change:+.4f} with every seed."
    # To see a difference of this size four times in five: (1.96 + 0.84)^2 by the normal
    # distribution, and two more for Student's t.
    variance = loss["error"] ** 2 * loss["a"]["n"]
    needed = math.ceil(7.85 * variance / max(change**2, 1e-12)) + 2
    return f"{start}: to see one of {abs(change):.4f}, about {needed:,} seeds would be needed."


def judge(race, version, at):
    """The lines on one candidate, and whether there is a verdict on it."""
    base = race.versions[0]
    seeds = len(version.runs.keys() & base.runs.keys())
    lines = [f"{version.label} against {base.label}, {seeds} of {len(race.seeds)} seeds", ""]
    failed = base if base.failure else version
    if failed.failure:
        return [*lines, f"No verdict: {failed.label} failed, {failed.failure}", ""], False
    if seeds < len(race.seeds):
        return [*lines, "No verdict before all seeds have run.", ""], False
    sets = {each.label: [each.runs[seed] for seed in race.seeds] for each in (version, base)}
    result = compare.versus(sets, at, paired=True)
    settings, fair = compare_settings(base, version)
    text = verdict(base, version, result["loss"])
    if not fair:
        text = f"No verdict: {version.label} and {base.label} ran under different conditions."
    return [*lines, *compare.versus_lines(result), "", *settings, text, ""], fair


def report(race, argv, parser, arguments):
    """Print the result and write it into README.md. Returns whether there is a verdict on all."""
    base, *candidates = race.versions
    # Without --at, what candidates have to reach is what all runs of the base reach.
    at = arguments.at or max((run.last.loss for run in base.runs.values()), default=1)
    judged = [judge(race, version, at) for version in candidates]
    lines = [line for more, _ in judged for line in more]
    if len(candidates) > 1:
        lines += [
            "Each is judged by itself: of 20 candidates that change nothing, one seems to.",
            "",
        ]
    print("", *lines, sep="\n")
    command = shlex.join(["python", "records/race.py", *argv])
    text = [f"# {candidates[0].label} against {base.label}", ""]
    text += ["```", f"$ {command}", *lines[:-1], "```", ""]
    text += ["The logs, one folder a version, begin with the script that wrote them.", ""]
    if arguments.plot and base.runs:
        groups = {each.label: list(each.runs.values()) for each in race.versions if each.runs}
        compare.plot(parser, groups, race.out / "curves.png", at)
        text += ["![Validation loss against steps and against time](curves.png)", ""]
    (race.out / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(f"The logs and this result are in {race.out}.")
    return all(has_verdict for _, has_verdict in judged)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    parser, race, arguments = parse_arguments(argv)
    try:
        lock = claim_folder(race)
    except (train_gpt.UserError, OSError) as error:
        parser.error(error)
    kept = sum(len(version.runs) for version in race.versions)
    total = len(race.versions) * len(race.seeds)
    labels = ", ".join(version.label for version in race.versions)
    print(f"{total} runs of {labels}; {kept} are there already")
    interrupted = 0
    try:
        run_all(race, lock)
    except KeyboardInterrupt:
        interrupted = 130
    has_verdict = report(race, argv, parser, arguments)
    return interrupted or int(not has_verdict)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
