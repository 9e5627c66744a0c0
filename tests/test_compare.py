"""records/compare.py: every log form, statistics worked out by hand, the command line.

The speed of a long listing depends on the machine, so it is measured by hand and not tested:

    mkdir many; for i in {1..1500}; do cp ../shared/logs/2025-02-01_RuleTweak.txt many/$i.txt; done
    time python records/compare.py many
"""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "records" / "compare.py"
SHARED = ROOT.parent / "shared" / "logs"
sys.path.insert(0, str(ROOT / "records"))
compare = importlib.import_module("compare")
public = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public logs in ../shared/logs")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Each test writes its logs into a folder of its own, by names relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, *lines):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def read(*lines):
    """The run in a log of these lines."""
    return compare.read_log(write("a.txt", *lines))


def validated(step, steps, loss, ms):
    """The line of a validation, with 100 ms a step."""
    return f"step:{step}/{steps} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:100.00ms"


def run_log(name, loss, seconds=100.0):
    """A finished run: its losses fall from 10.8 over 3.5 half-way to the given one."""
    course = (0, 10.8258), (500, 3.5), (1000, loss)
    return write(name, *(validated(step, 1000, value, step * seconds) for step, value in course))


def row(text, start):
    """What follows the start of a table's row, its cells apart by one blank."""
    rest = next(line for line in text.splitlines() if line.startswith(start))
    return " ".join(rest.removeprefix(start).split())


def show(capsys, *arguments):
    """Exit code, standard output and standard error of compare.py."""
    try:
        code = compare.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


# -------------------------------------------------------------------------------------------------
# Reading

OLDEST = ["s:0 tel:10.968871", "s:0 trl:10.965596 lr:0.000001 norm:15.37", "s:1 trl:10.814037"]
OLDEST += ["s:128 tel:6.034447", "s:128 trl:6.01", "s:129 trl:6.00", "s:256 tel:5.231128"]
TIMELESS = [(0, 10.968871, None), (128, 6.034447, None), (256, 5.231128, None)]
MILLISECONDS = [
    "step:0/20 val_loss:10.9264 train_time:285ms step_avg:nanms",
    "step:1/20 train_loss:10.9184 train_time:74701ms step_avg:nanms",
    "step:20/20 train_time:4300ms step_avg:215.00ms train_loss:3.2533 lr:0.1",
    "step:20/20 val_loss:3.2785 train_time:4326ms step_avg:216.33ms mfu:51.00% note:x:y",
    "peak memory allocated: 30724 MiB reserved: 45952 MiB",
]
SECONDS = [
    "step:0/50 val_loss:10.82584 train_time:0.001s step_avg:nanms",
    "step:50/50 val_loss:4.66393 train_time:22.870s step_avg:0.18295s",
    "peak memory consumption: 31000 MiB",
]


@pytest.mark.parametrize(
    "lines, validations, steps, total, average, memory, finished",
    [
        (OLDEST[:-1], TIMELESS[:-1], 129, None, None, None, False),
        (OLDEST, TIMELESS, 256, None, None, None, True),
        (MILLISECONDS[:1], [(0, 10.9264, 0.285)], 0, 20, None, None, False),
        (MILLISECONDS, [(0, 10.9264, 0.285), (20, 3.2785, 4.326)], 20, 20, 216.33, 30724, True),
        (SECONDS, [(0, 10.82584, 0.001), (50, 4.66393, 22.87)], 50, 50, 182.95, 31000, True),
    ],
)
def test_forms_of_logs(lines, validations, steps, total, average, memory, finished):
    run = read(*lines)
    assert run.validations == validations and (run.loss, run.seconds) == validations[-1][1:]
    assert (run.steps, run.total_steps, run.finished) == (steps, total, finished)
    assert (run.memory_mib, run.gpus) == (memory, None)
    assert run.step_avg_ms == pytest.approx(average)


# What stands in a script's docstrings and format strings and looks like lines of a log.
SOURCE = """step:1770/1770 val_loss:1.0000 train_time:1ms step_avg:0.01ms
world_size: 64
    step:9/9 val_loss:2.0
world_size = int(os.environ["WORLD_SIZE"])
step:{step}/{n} val_loss:{x:.4f} train_time:{t:.0f}ms step_avg:{t / step:.2f}ms
s:{step} tel:{x}
peak memory allocated: {a} MiB reserved: {r} MiB"""

NVIDIA_SMI = """| NVIDIA-SMI 555.42.06     Driver Version: 555.42.06     CUDA Version: 12.5 |
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA H100 80GB HBM3          Off |   00000000:18:00.0 Off |                    0 |
| N/A   28C    P0            111W /  700W |    5786MiB /  81559MiB |      9%      Default |
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:2A:00.0 Off |                    0 |
| N/A   30C    P0            116W /  700W |    5834MiB /  81559MiB |      0%      Default |
|    0   N/A  N/A     20785      C   /usr/bin/python3                                0MiB |
|    7   N/A  N/A     20786      C   /usr/bin/python3                                0MiB |"""


def test_source_and_noise_are_not_a_run():
    steps = [validated(0, 10, 10.8, 0), "step:5/10 val_loss:none train_time:50ms"]
    steps += ["[rank0]: UserWarning: step:5/10 val_loss:1.0 train_time:1ms"]
    steps += ["step:5/10 train_time:50ms step_avg:10ms", validated(10, 10, 3.2, 100)]
    run = read(SOURCE, "=" * 100, NVIDIA_SMI, *steps)
    assert run.validations == [(0, 10.8, 0.0), (10, 3.2, 0.1)]
    assert run.memory_mib is None
    assert read(SOURCE.replace("step:1770/1770", "for example"), NVIDIA_SMI) is None


@pytest.mark.parametrize(
    "header, gpus",
    [
        ([NVIDIA_SMI], 2),
        ([NVIDIA_SMI, NVIDIA_SMI.replace("5834MiB", "9999MiB").replace(" On ", " Off")], 2),
        ([NVIDIA_SMI, "world_size: 1"], 1),
        (["hardware: 4 x NVIDIA H100 80GB HBM3"], 4),
        (["hardware: 4 x NVIDIA H100 80GB HBM3", "world_size: 2"], 2),
        (["hardware: cpu, 2 x AMD EPYC", "world_size: 2"], 0),
        (["hardware: cpu"], 0),
        (["hardware: CPU, Intel(R) Xeon(R), 8 threads a process", "world_size: 2"], 0),
        ([NVIDIA_SMI, "hardware: NVIDIA H100 80GB HBM3", "world_size: 1"], 1),
        (["world_size = 8"], None),
    ],
)
def test_gpus(header, gpus):
    assert read(*header, validated(1, 1, 3.2, 9)).gpus == gpus


@pytest.mark.parametrize(
    "last, loss, steps, seconds",
    [
        ("step:20/2", 3.5, 10, 0.1),
        ("step:20/20 ", 3.5, 10, 0.1),
        ("step:20/20 val_loss:3.2", 3.5, 20, 0.1),  # was 3.2788, as the digits above it show
        ("step:20/20 val_loss:3.2788", 3.2788, 20, None),
        ("step:20/20 val_loss:3.2788 train_time:20", 3.2788, 20, None),
        ("step:20/20 val_loss:3.2788 train_time:200m", 3.2788, 20, None),
        ("step:20/20 val_loss:3.2788 train_time:200ms step_av", 3.2788, 20, 0.2),
        ("step:15/20 train_time:15", 3.5, 15, 0.1),
        ("step:20/20 val_loss:3.2\npeak mem", 3.2, 20, None),  # shorter, but its line is whole
    ],
)
def test_cut_off_last_line(last, loss, steps, seconds):
    log = Path("a.txt")
    log.write_text(validated(10, 20, 3.5, 100) + "\n" + last)
    run = compare.read_log(log)
    assert (run.loss, run.steps, run.seconds) == (loss, steps, seconds)
    assert run.finished == (loss != 3.5)


def test_resumed_run_counts_its_later_lines():
    """It writes its script and its settings again, and then what its checkpoint was."""
    form = "step:{0}/30 val_loss:{1} train_time:{0}ms step_avg:{2}ms".format
    before = [form(0, 9.0, 6.0), form(10, 5.0, 7.0), form(20, 4.5, 8.0)]
    after = [form(10, 5.1, 7.0), form(20, 4.4, 7.0), form(30, 4.0, 7.0)]
    validations = read(*before, *after).validations
    assert [(v.step, v.loss) for v in validations] == [(0, 9), (10, 5.1), (20, 4.4), (30, 4)]
    start, rule = [SOURCE, "=" * 100, "", "hardware: CPU"], "=" * 100
    lines = [*start, "world_size: 2", "muon_lr: 0.05", "dropped: 1", rule, *before]
    lines += ["step:25/30 train_time:25ms step_avg:1ms"]
    lines += [*start, "world_size: 1", "muon_lr: 0.04", rule, "resumed from step 10 of logs/x.pt"]
    run = read(*lines, "step:11/30 train_time:11ms x:1")
    assert [v.step for v in run.validations] == [0, 10]
    assert (run.steps, run.step_avg_ms, run.finished) == (11, 7.0, False)
    assert run.settings == {"hardware": "CPU", "world_size": "1", "muon_lr": "0.04"}


def test_other_newlines_and_foreign_bytes():
    step = b"step:5/5 val_loss:3.25 train_time:7ms step_avg:1ms"
    Path("a.txt").write_bytes(b"\xff\x00\r\nFetching 4 files: 25%\r" + step + b"\r\n\xfe")
    assert compare.read_log(Path("a.txt")).validations == [(5, 3.25, 0.007)]


def test_folders_duplicates_and_files_without_a_run(capsys, monkeypatch):
    run_log("two words/run one.txt", 3.27)
    run_log("two words/deep/b.log", 3.26)
    run_log("two words/locked.txt", 3.25)
    write("two words/empty note.txt", "nothing here")
    write("two words/README.md", "step:1/1 val_loss:3.0 train_time:1ms")
    Path("bare").mkdir()
    read_log = compare.read_log

    def guarded(path):
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied")
        return read_log(path)

    monkeypatch.setattr(compare, "read_log", guarded)
    code, out, err = show(capsys, "two words", "bare", "bare/../two words/run one.txt")
    assert code == 0
    assert err.splitlines() == [
        "two words/empty note.txt: no run in this file",
        "two words/locked.txt: not readable (Permission denied)",
        "bare: no .txt or .log file in this folder",
    ]
    rows = [line.split("  ")[0] for line in out.splitlines() if "two words/" in line]
    assert rows == ["two words/deep/b.log", "two words/run one.txt"]
    nothing = "bare: no .txt or .log file in this folder\ncompare.py: no run found\n"
    assert show(capsys, "bare") == (1, "", nothing)


@public
@pytest.mark.parametrize(
    "name, steps, total, loss, seconds, average, memory, validations",
    [
        ("2024-06-06_AdamW.log", 9536, None, 3.275959, None, None, None, 76),
        ("2024-10-10_Muon.txt", 6200, 6200, 3.2785, 1339.067, 216.33, None, 51),
        ("2024-12-04_ValueEmbed_a.txt", 1530, 1530, 3.2898, 264.472, 173.99, None, 14),
        ("2024-12-04_ValueEmbed_b.txt", 1530, 1530, 3.2751, 264.608, 174.08, None, 14),
        ("2025-02-01_RuleTweak.txt", 1770, 1770, 3.2788, 179.828, 101.60, 30724, 16),
        ("seconds_unit.txt", 3350, 3350, 3.27839, 492.485, 147.03, None, None),
    ],
)
def test_public_logs(name, steps, total, loss, seconds, average, memory, validations):
    run = compare.read_log(SHARED / name)
    assert (run.steps, run.total_steps, run.loss, run.seconds) == (steps, total, loss, seconds)
    assert (run.step_avg_ms, run.memory_mib, run.finished) == (average, memory, True)
    assert validations in (None, len(run.validations))


@public
def test_public_logs_cut_anywhere_give_no_loss_of_their_own():
    text = (SHARED / "2025-02-01_RuleTweak.txt").read_bytes()
    known = {v.step: v for v in compare.read_log(SHARED / "2025-02-01_RuleTweak.txt").validations}
    log = Path("cut.txt")
    for end in range(len(text) - 400, len(text)):
        log.write_bytes(text[:end])
        for step, loss, seconds in compare.read_log(log).validations:
            assert loss == known[step].loss, text[:end][-60:]
            assert seconds in (known[step].seconds, None), text[:end][-60:]


def test_first_reach_at_its_edges():
    curve = [compare.Validation(*point) for point in ((0, 10, 0.0), (100, 4, 20), (200, 3, 30))]
    assert compare.first_reach(curve, 4.0) == (100, 20)
    assert compare.first_reach(curve, 11.0) == (0, 0)
    untimed = [validation._replace(seconds=None) for validation in curve]
    assert compare.first_reach(untimed, 3.5) == (150, None)
    assert compare.first_reach([curve[0]._replace(loss=math.nan), curve[1]], 5.0) == (100, 20)


# -------------------------------------------------------------------------------------------------
# Statistics


def t_below(t):
    """P(T < t) of Student's t with 2 degrees of freedom."""
    return (1 + t / math.sqrt(2 + t**2)) / 2


def runs_of(losses):
    """Runs of these losses; None stands for a run that was cut off."""
    runs = []
    for loss in losses:
        log = run_log("a.txt", loss or 3.1)
        if loss is None:
            write("a.txt", *log.read_text().splitlines()[:-1])
        runs.append(compare.read_log(log))
    return runs


PUBLISHED = [3.2798, 3.2804, 3.2837, 3.2808, 3.2782, 3.2801, 3.283, 3.2825, 3.2777, 3.2769]
SIX_MORE = "not proven: 6 more runs at this spread would be needed"
NO_NUMBER = "not proven: no number of runs would, the mean is not below the target"


@pytest.mark.parametrize(
    "losses, target, p, verdict",
    [
        (PUBLISHED, 3.28, pytest.approx(0.661, abs=5e-4), NO_NUMBER),
        # Ten values, +-1 around the mean: the standard error is sqrt(10 / 9) / sqrt(10) = 1/3.
        # P(T < -4) with 9 degrees of freedom, by Simpson's rule over the density.
        ([3.273, 3.279] * 5, 3.28, pytest.approx(0.001555214), "proven"),
        # One standard deviation below the target, t is sqrt(n): 2.828 at n = 8 and 3 at n = 9,
        # where tables of the one-sided 1% point have 2.998 (7 degrees of freedom) and 2.896 (8).
        # So nine runs are needed, six more than these three.
        ([3.278, 3.279, 3.280], 3.28, pytest.approx(t_below(-math.sqrt(3))), SIX_MORE),
        # The mean is 3.3, but a little less in floating point.
        ([3.3059, 3.3004, 3.2937], 3.3, pytest.approx(0.5), NO_NUMBER),
        ([3.27, None], 3.28, None, "not proven: one run has no p-value"),
        ([None], 3.28, None, "not proven: no finished run"),
        ([3.27, 3.27], 3.28, None, "not proven: equal losses have no spread, so no p-value"),
        ([3.27, 3.27, math.nan], 3.28, None, "not proven: 1 diverged"),
    ],
)
def test_verdicts_of_groups(losses, target, p, verdict):
    summary = compare.summarize("x", runs_of(losses), target)
    assert (summary["p"], summary["verdict"]) == (p, verdict)
    assert summary["unfinished"] == losses.count(None)


def test_runs_still_needed():
    # A tenth of a standard deviation below the target, t is sqrt(n) / 10: 2.33238 at n = 544 and
    # 2.33452 at n = 545. The 1% point is z + (z^3 + z) / (4 * 543) = 2.33322 there, with the normal
    # z = 2.32635.
    assert compare.runs_needed(3.2799, 0.001, 3, 3.28) == 545
    for mean in (3.2797, 3.2793, 3.2789, 3.2787):  # in the search no number may be skipped
        enough = (n for n in range(2, 1000) if compare.p_value(mean, 0.001, n, 3.28) < 0.01)
        assert compare.runs_needed(mean, 0.001, 2, 3.28) == next(enough)


def test_welch_of_unequal_spreads():
    # The means have variances of 1/3 and 2/3: the standard error is 1, and there are
    # 1 / ((1/3)^2 / 2 + (2/3)^2 / 1) = 2 degrees of freedom, t 4.30265.
    deviation = math.sqrt(2 / 3)
    result = compare.difference([1.0, 2.0, 3.0], [5 - deviation, 5 + deviation])
    assert result["difference"] == pytest.approx(-3)
    assert result["interval"] == pytest.approx([-7.30265, 1.30265], abs=1e-5)


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "more than noise: A is lower"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "more than noise: A is higher"),
        ([1.0, 3.0], [2.0, 4.0], "within noise"),
        ([1.0], [2.0, 2.1], "no interval: a set of one run has no spread"),
        ([1.0, 1.0], [2.0, 2.0], "no interval: neither set has any spread"),
        ([1.0, None], [2.0, 2.1], "no comparison: 1 of 2 runs of A without a value"),
        ([1.0, 2.0], [math.nan, 2.1], "no comparison: 1 of 2 runs of B without a value"),
        ([], [2.0, 2.1], "no comparison: a set without a finished run"),
    ],
)
def test_verdicts_of_differences(a, b, verdict):
    assert compare.difference(a, b)["verdict"] == verdict


# -------------------------------------------------------------------------------------------------
# Tables, JSON, plot


@pytest.fixture
def two_sets():
    """Two folders of three finished runs, and an unfinished one in the first."""
    for index, loss in enumerate([3.270, 3.272, 3.274]):
        run_log(f"old/seed {index}.txt", loss, 200 + index)
        run_log(f"new/seed {index}.txt", loss - 0.02, 150 + index)
    course = validated(0, 1000, 10.8, 0), validated(500, 1000, 3.5, 9000)
    write("old/killed.txt", *course, "step:612/1000 train_time:11000ms step_avg:")


HEADER = "steps val loss time (s) step avg (ms) peak (MiB) GPUs"
SUMMARY = "runs loss: mean std min max time (s): mean std min max p mean loss <="
OLD = "3 (+1 unfinished) 3.27200 0.00200 3.27000 3.27400 201.000 1.000 200.000 202.000"
NEW = "3 3.25200 0.00200 3.25000 3.25400 151.000 1.000 150.000 152.000"
# Mean 8 thousandths below the target at a standard deviation of 2: t = -4 sqrt(3) with 2 degrees
# of freedom.
ONE_MORE = f"{t_below(-4 * math.sqrt(3)):.3g} not proven: 1 more run at this spread would be needed"


@pytest.mark.parametrize(
    "arguments, start, cells",
    [
        ("old new", "new/seed 0.txt", "1000 3.25000 150.000 100.00 - -"),
        ("old new", "old/killed.txt", "612/1000 3.50000 9.000 100.00 - - unfinished"),
        ("old new", "old  ", f"{OLD} {ONE_MORE}"),
        ("old new", "new  ", f"{NEW} {t_below(-14 * math.sqrt(3)):.3g} proven"),
        ("new --target 3.26", "folder", f"{SUMMARY} 3.26?"),
        ("new --target 3.26", "new  ", f"{NEW} {ONE_MORE}"),
        ("old new --at 3.4", "run", f"{HEADER} steps to 3.4 seconds to 3.4"),
        # From 3.5 at step 500 to 3.25 at step 1000: 0.1 of 0.25 is 200 steps on, and 30 s of 75.
        ("old new --at 3.4", "new/seed 0.txt", "1000 3.25000 150.000 100.00 - - 700.0 105.000"),
        ("old --at 3.4", "old/killed.txt", "612/1000 3.50000 9.000 100.00 - - - - unfinished"),
    ],
)
def test_tables(two_sets, capsys, arguments, start, cells):
    code, out, err = show(capsys, *arguments.split())
    assert (code, err) == (0, "")
    assert row(out, start) == cells


def test_summary_of_runs_without_times(capsys):
    write("a.log", "s:9 tel:3.271")
    run_log("b.txt", 3.273)
    summary = row(show(capsys, ".")[1], ".  ")
    assert "2 (1 without time)" in summary and "100.000" in summary


ORDERS = {"name": "abc", "steps": "cab", "loss": "bca", "time": "bca", "avg": "cba"}
ORDERS |= {"memory": "acb", "gpus": "bac"}


@pytest.mark.parametrize("key", compare.SORT_KEYS)
def test_sort(capsys, key):
    peak = "peak memory allocated: {} MiB reserved: 20 MiB".format
    step = "step:{0}/{0} val_loss:{1} train_time:{2}ms step_avg:{3}ms".format
    write("a.txt", "world_size: 4", step(20, "nan", 9, 5), peak(10))
    write("b.txt", "world_size: 2", step(30, 3.2, 7, 2))
    write("c.txt", step(10, 3.3, 8, 1), peak(15))
    lines = show(capsys, ".", "--sort", key)[1].splitlines()[1:4]
    assert "".join(line.partition(".txt")[0] for line in lines) == ORDERS[key]


def test_versus(two_sets, capsys):
    code, out, err = show(capsys, "--vs", "old", "new", "--at", "3.4")
    assert (code, err) == (0, "")
    assert "A: old (1 unfinished left out)\nB: new\n" in out
    # Standard deviations of 2 thousandths and of 1 s: standard errors sqrt(2/3) of them, 4 degrees
    # of freedom, t 2.776.
    half = 2.776 * math.sqrt(2 / 3)
    interval = f"{0.02 - 0.002 * half:+.5f} to {0.02 + 0.002 * half:+.5f}"
    means = "3.27200 3 3.25200 3 +0.02000"
    assert row(out, "loss") == f"{means} {interval} more than noise: A is higher"
    assert f" +50.000 {50 - half:+.3f} to {50 + half:+.3f} " in row(out, "time (s)")
    # 0.1 of the second half's fall of 0.230, 0.228, 0.226 in A and of 0.250, 0.248, 0.246 in B.
    assert row(out, "steps to 3.4").startswith("719.3 3 701.6 3 ")
    assert row(out, "seconds to 3.4").startswith("144.582 3 105.946 3 ")
    out = show(capsys, "--vs", "old/seed 0.txt", "new")[1]
    assert "no interval: a set of one run" in out


def test_json(two_sets, capsys):
    write("new/lost.txt", "step:1/1 val_loss:nan train_time:5ms step_avg:nanms")
    code, out, _ = show(capsys, ".", "--vs", "old", "new", "--json", "--at", "3.4")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    runs = {run["name"]: run for run in result["runs"]}
    assert code == 0 and len(runs) == 8
    seed = runs["new/seed 0.txt"]
    expected = {"steps": 1000, "total_steps": 1000, "finished": True, "val_loss": 3.25}
    expected |= {"time_s": 150.0, "step_avg_ms": 100.0, "memory_mib": None, "gpus": None}
    assert expected.items() <= seed.items()
    assert seed["reaches"] == pytest.approx({"loss": 3.4, "steps": 700, "time_s": 105})
    assert seed["validations"][1] == {"step": 500, "loss": 3.5, "time_s": 75.0}
    assert runs["old/killed.txt"]["finished"] is False and runs["new/lost.txt"]["val_loss"] is None
    counts = [(group["loss"]["n"], group["diverged"]) for group in result["groups"]]
    assert counts == [(3, 0), (3, 1)]
    assert result["versus"]["loss"]["verdict"] == "no comparison: 1 of 4 runs of B without a value"
    assert result["versus"]["steps_to"]["a"]["n"] == 3


def words_in_picture(capsys, *arguments):
    """The texts in an SVG of the logs, one a line."""
    code, _, err = show(capsys, *arguments, "--plot", "curves.SVG")
    assert code == 0, err
    lines = Path("curves.SVG").read_text().splitlines()
    return [line.split("<!-- ")[1][:-4] for line in lines if "<!-- " in line]


def test_plot(two_sets, working_folder, capsys):
    Path("new").rename("_new $x_$")
    write("untimed/a.log", "s:0 tel:10.9", "s:900 tel:3.3")
    words = words_in_picture(capsys, working_folder)
    assert {"_new $x_$ (3 runs)", "old (4 runs)", "untimed (no times in the log)"} <= {*words}
    assert {"unfinished", "loss 3.28", "mean ± standard deviation"} <= {*words}
    assert {"step", "training time (s)", "validation loss (nats per token)"} <= {*words}
    assert f"Validation loss of 8 runs in {working_folder}" in words
    assert "10" not in words  # the loss at the start would squeeze all the rest


def test_plot_of_a_single_log(capsys):
    """As the trainer's last line recommends it: the title says all, and there is no legend."""
    run_log("logs/mine.txt", 3.4)
    code, _, err = show(capsys, "logs/mine.txt", "--plot")
    assert (code, err) == (0, "The loss curves are in curves.png.\n")
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    words = words_in_picture(capsys, "logs/mine.txt")
    assert words.count("logs/mine.txt: 3.4000 after step 1000") == 1
    assert "mine.txt" not in words and "loss 3.28" not in words
    assert "loss 3" in words_in_picture(capsys, "logs/mine.txt", "--target", 3)


@pytest.mark.parametrize("loss, own, drawn", [(3.27, None, 3.28), (3.29, None, None), (3.27, 3, 3)])
def test_the_target_is_drawn_where_the_curves_pass_it(loss, own, drawn):
    """Without a target of the user's 3.28 is, and only there; the first quarter is out of sight."""
    low, high, target = compare.loss_limits([compare.read_log(run_log("a.txt", loss))], own)
    assert target == drawn
    lowest = own or loss
    room = 0.08 * (3.5 - lowest)
    assert lowest - room < low < lowest and 3.5 < high < 3.5 + room


# -------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name at least one log or folder"),
        (["missing log.txt"], "no such file or folder: missing log.txt"),
        (["--vs", "old", "nowhere"], "no such file or folder: nowhere"),
        (["--vs", "old"], "argument --vs: expected 2 arguments"),
        (["old", "--tar", "3"], "unrecognized arguments: --tar"),
        (["old", "--sort", "speed"], "invalid choice: 'speed'"),
        (["old", "--target", "low"], "a loss is a number above 0, not 'low'"),
        (["old", "--target", "nan"], "a loss is a number above 0, not 'nan'"),
        (["old", "--at", "0"], "a loss is a number above 0, not '0'"),
        (["old", "--plot", "curves.pdf"], "--plot writes .png or .svg, not curves.pdf"),
        (["old", "--plot", "nowhere/curves.png"], "the plot cannot be written"),
    ],
)
def test_bad_usage_is_one_sentence(two_sets, capsys, arguments, words):
    code, _, err = show(capsys, *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1, err


def call(*arguments, **environment):
    """compare.py as a process: exit code, standard output and standard error."""
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, env=os.environ | environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_name_of_foreign_bytes():
    run_log("a.txt", 3.27).rename(os.fsdecode(b"\xff run.txt"))
    code, out, _ = call(".", PYTHONIOENCODING="utf-8:strict")
    assert code == 0 and " run.txt" in out


def test_reader_that_stops_early(two_sets):
    command = f'"{sys.executable}" "{SCRIPT}" . | true'
    stderr = subprocess.run(command, shell=True, capture_output=True, text=True).stderr
    assert "Traceback" not in stderr and "BrokenPipe" not in stderr


@pytest.mark.parametrize(
    "package, option, arguments",
    [("scipy", "--vs", ["old", "new"]), ("matplotlib", "--plot", ["a.png", "old/seed 0.txt"])],
)
def test_without_a_package(two_sets, package, option, arguments):
    """What needs it ends with one sentence, what does not goes on without it."""
    write(f"blocked/{package}.py", f"raise ImportError('no {package}')")
    install = "pip install -r records/requirements.txt"
    assert call("old/seed 0.txt", PYTHONPATH="blocked")[::2] == (0, "")
    sentence = f"compare.py: {option} needs {package}: {install}\n"
    assert call(option, *arguments, PYTHONPATH="blocked")[::2] == (2, sentence)
    code, out, err = call("old", PYTHONPATH="blocked")
    assert code == 0 and "3.27200  0.00200" in out
    assert ("no p-value without scipy" in out) == (package == "scipy")
    assert err == (f"p-values need scipy: {install}\n" if package == "scipy" else "")
