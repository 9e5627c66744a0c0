"""records/compare.py: every form of log, statistics worked out by hand, the command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest
from helpers import ROOT

PUBLIC = ROOT.parent / "shared" / "logs"
RULE = "=" * 100


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Each test writes its logs into a folder of its own, by names relative to it."""
    monkeypatch.chdir(tmp_path)


def write(name, *lines):
    path = Path(str(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def line(step, steps, loss, ms):
    """The line of a validation, with 100 ms a step."""
    return f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{ms:.0f}ms step_avg:100.00ms"


def run_log(name, loss, ms=100, head="", script="", steps=1000):
    """A finished run: its losses fall from 10.8 over 3.5 half-way to the given one."""
    curve = {0: 10.8258, steps // 2: 3.5, steps: loss}
    lines = [line(step, steps, value, step * ms) for step, value in curve.items()]
    return write(name, script, RULE, head, RULE, *lines)


def write_set(folder, losses, **options):
    """Runs of these final losses; None stands for a run that was cut off."""
    for number, loss in enumerate(losses):
        log = run_log(f"{folder}/{number}.txt", loss or 3.1, 100 + number, **options)
        if loss is None:
            write(log, *log.read_text().splitlines()[:-1])


def show(capsys, arguments):
    """Exit code, standard output and standard error of compare.py."""
    code = 0
    try:
        compare.main(arguments.split())
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def parsed(capsys, arguments):
    """What compare.py prints as JSON: runs by name, groups by name, and the comparison."""
    _, out, _ = show(capsys, f"{arguments} --json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    runs, groups = ({each["name"]: each for each in result[key]} for key in ("runs", "groups"))
    return runs, groups, result["versus"]


def refused(capsys, words, arguments):
    code, _, err = show(capsys, arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1, err


# -------------------------------------------------------------------------------------------------
# Logs

OLDEST = ["s:0 tel:10.968871", "s:0 trl:10.965596 lr:0.000001", "s:128 tel:6.034447", "s:129 trl:6"]
START = "step:0/20 val_loss:10.9264 train_time:285ms step_avg:nanms"
END = "step:20/20 val_loss:3.2785 train_time:4326ms step_avg:216.33ms mfu:51.00% note:x:y"
PEAK = "peak memory allocated: 30724 MiB reserved: 45952 MiB"
SECONDS = "step:50/50 val_loss:4.66393 train_time:22.870s step_avg:0.18s"


@pytest.mark.parametrize(
    "lines, expected",
    [
        (OLDEST, [129, None, 6.034447, None, None, None, False]),
        (OLDEST[:3], [128, None, 6.034447, None, None, None, True]),
        ([START], [0, 20, 10.9264, 0.285, None, None, False]),
        ([START, END, PEAK], [20, 20, 3.2785, 4.326, 216.33, 30724, True]),
        ([SECONDS, "peak memory consumption: 9 MiB"], [50, 50, 4.66393, 22.87, 180, 9, True]),
    ],
)
def test_forms_of_logs(capsys, lines, expected):
    write("a.txt", *lines)
    run = parsed(capsys, "a.txt")[0]["a.txt"]
    keys = "steps total_steps val_loss time_s step_avg_ms memory_mib finished"
    assert [run[key] for key in keys.split()] == expected


# What stands in a script's docstrings and format strings and looks like lines of a log.
SOURCE = """step:1770/1770 val_loss:1.0000 train_time:1ms step_avg:0.01ms
hardware: CPU
    step:9/9 val_loss:2.0
step:{step}/{n} val_loss:{x:.4f} train_time:{t:.0f}ms
peak memory allocated: {a} MiB reserved: {r} MiB"""
NVIDIA_SMI = """
|   0  NVIDIA H100 80GB HBM3          Off |   00000000:18:00.0 Off |                    0 |
| N/A   28C    P0            111W /  700W |    5786MiB /  81559MiB |      9%      Default |
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:2A:00.0 Off |                    0 |
|    0   N/A  N/A     20785      C   /usr/bin/python3                                0MiB |
|    7   N/A  N/A     20786      C   /usr/bin/python3                                0MiB |"""


@pytest.mark.parametrize(
    "head, gpus",
    [
        (f"Running PyTorch on NVIDIA H100 with world_size 1\n{NVIDIA_SMI}", 1),
        (f"Running Python\n{RULE}\n{NVIDIA_SMI}", 2),
        ("hardware: CPU, AVX2, 2 threads\nworld_size: 2", 0),
        ("world_size = 8", None),
    ],
)
def test_source_and_noise_are_not_a_run(head, gpus):
    steps = [line(0, 10, 10.8, 0), "step:5/10 val_loss:none train_time:50ms"]
    steps += ["[rank0]: UserWarning: step:5/10 val_loss:1.0 train_time:1ms"]
    (run,) = compare.read_log(write("a.txt", SOURCE, RULE, head, RULE, *steps))
    assert list(run.validations) == [0] and (run.memory_mib, run.gpus) == (None, gpus)
    assert compare.read_log(write("b.txt", SOURCE, RULE, head, RULE)) == []


LAST = line(20, 20, 3.2788, 2000)


@pytest.mark.parametrize("end", range(1, len(LAST) + 1))
def test_log_cut_anywhere_has_no_false_loss(end):
    log = Path("a.txt")
    log.write_text(line(10, 20, 3.5, 1000) + "\n" + LAST[:end])
    (run,) = compare.read_log(log)
    assert run.last[1:3] == ((3.2788, 2.0) if LAST[:end].endswith("ms") else (3.5, 1.0))


def test_resumed_run_counts_its_later_lines():
    first = [SOURCE, RULE, "muon_lr: 0.05", "dropped: 1", RULE, line(0, 30, 9, 0)]
    first += [line(10, 30, 5, 10), line(20, 30, 4.5, 20)]
    then = ["print(1)", RULE, "muon_lr: 0.04", RULE, "resumed from step 10 of logs/x.pt"]
    (run,) = compare.read_log(write("a.txt", *first, *then))
    assert (run.steps, run.last.loss, run.settings) == (10, 5, {"muon_lr": "0.04"})
    (run,) = compare.read_log(write("a.txt", *first, *then, line(10, 30, 5.1, 11)))
    assert [v.loss for v in run.validations.values()] == [9, 5.1] and not run.finished


def test_trials_in_one_file_are_runs(capsys):
    logs = [run_log("a.txt", loss).read_text() for loss in (3.27, 3.28)]
    write("a.txt", *logs, "peak memory allocated: 9 MiB")
    runs, groups, _ = parsed(capsys, "a.txt")
    trials = {name: (run["val_loss"], run["memory_mib"]) for name, run in runs.items()}
    assert trials == {"a.txt#1": (3.27, None), "a.txt#2": (3.28, 9)}
    assert groups["."]["loss"]["n"] == 2


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="needs the public logs in ../shared/logs")
@pytest.mark.parametrize(
    "name, steps, result",
    [
        ("2024-06-06_AdamW.log", 9536, (3.275959, None, None)),
        ("2025-02-01_RuleTweak.txt", 1770, (3.2788, 179.828, 101.60)),
        ("seconds_unit.txt", 3350, (3.27839, 492.485, 147.03)),
    ],
)
def test_public_logs(name, steps, result):
    *others, run = compare.read_log(PUBLIC / name)
    assert len(others) == (19 if name == "seconds_unit.txt" else 0)
    assert run.last == (steps, *result) and run.finished


def test_copies_count_once(capsys):
    for seed, loss in enumerate([3.2790, 3.2785, 3.2797]):
        log = run_log(f"logs/{seed}.txt", loss, 100 + seed, script="import torch")
        write(f"logs/{seed}.log", "output of tee", *log.read_text().splitlines()[4:])
    group = parsed(capsys, "logs")[1]["logs"]
    assert group["loss"]["n"] == 3 and group["p"] == pytest.approx(0.058, abs=5e-4)
    assert "logs/2.log is left out: a copy of logs/2.txt" in show(capsys, "logs")[2]
    write("part/x.txt", Path("logs/1.log").read_text())
    refused(capsys, "A and B have runs in common", "--vs logs/1.txt part")
    refused(capsys, "A and B have runs in common", "--vs part part")
    for name in "ab":  # all runs of a script begin with one loss
        write(f"runs/started_{name}.txt", line(0, 10, 10.8, 0))
        write(f"runs/diverged_{name}.txt", line(10, 10, math.nan, 9))
    assert len(parsed(capsys, "runs")[0]) == 3


@pytest.mark.parametrize(
    "change, name",
    [
        ({"head": "muon_lr: 1\nseed: 2\nhardware: H100\ntorch: 2.13\nworld_size: 8"}, "logs"),
        ({"head": "muon_lr: 2\nwd: 3"}, "logs (muon_lr 2)"),
        (
            {"head": "muon_lr: 1\ntrain_shards: fingerprint 2b"},
            "logs (train_shards fingerprint 2b)",
        ),
        ({"head": "muon_lr: 1", "script": "b"}, "logs (script "),
        ({"head": "muon_lr: 1", "script": f"{RULE}\nb"}, "logs (script "),
        ({"head": "muon_lr: 1", "steps": 500}, "logs (steps 500)"),
    ],
)
def test_only_repetitions_are_pooled(capsys, change, name):
    run_log("logs/a.txt", 3.28, head="muon_lr: 1\nseed: 1")
    run_log("logs/b.txt", 1.2, **change)
    run_log("base.txt", 3.3)
    groups = parsed(capsys, "logs")[1]
    assert any(group.startswith(name) for group in groups)
    assert [group["loss"]["n"] for group in groups.values()] == ([2] if name == "logs" else [1, 1])
    if name != "logs":
        refused(capsys, "compares two experiments, not 3", "--vs logs base.txt")


# -------------------------------------------------------------------------------------------------
# Statistics


def t_below(t):
    """P(T < t) of Student's t with 2 degrees of freedom."""
    return (1 + t / math.sqrt(2 + t**2)) / 2


NO_NUMBER = "not proven: no number of runs would"


@pytest.mark.parametrize(
    "losses, p, verdict",
    [
        # Ten values, +-1 around the mean: the standard error is sqrt(10 / 9) / sqrt(10) = 1/3.
        # P(T < -4) with 9 degrees of freedom, by Simpson's rule over the density.
        ([3.273, 3.279] * 5, 0.001555214, "proven"),
        # One standard deviation below the target, t is sqrt(n): 2.828 at n = 8 and 3 at n = 9,
        # where tables of the one-sided 1% point have 2.998 (7 degrees of freedom) and 2.896 (8).
        ([3.278, 3.279, 3.280], t_below(-math.sqrt(3)), "not proven: 6 more run(s)"),
        # A tenth of one, t is sqrt(n) / 10: 2.33238 at n = 544 and 2.33452 at n = 545, and the 1%
        # point is 2.33322 there, by its expansion around the normal distribution's.
        ([3.269, 3.279, 3.289], t_below(-math.sqrt(3) / 10), "not proven: 542 more run(s)"),
        ([3.29, 3.28, 3.27], 0.5, NO_NUMBER),  # the mean is a little less in floating point
        ([3.27, 3.27, None], None, "not proven: one run, or equal ones, have no spread"),
        ([3.27, 3.28, math.nan], None, "not proven: 1 diverged"),
    ],
)
def test_speedrun_rule(capsys, losses, p, verdict):
    write_set("logs", losses)
    group = parsed(capsys, "logs")[1]["logs"]
    assert group["p"] == (p and pytest.approx(p)) and group["verdict"].startswith(verdict)


# The first two are examples in the benchmark's rules: a run of 3.276, four of 3.278 on average.
BENCHMARK = f"""
3.276 | 1000 0.00400 proven
3.276 3.278 3.278 3.280 | 1000 0.00400 proven
3.276 3.278 3.278 3.281 | 1000 0.00350 not proven: 2 more run(s)
3.278 | 1000 0.00200 not proven: 3 more run(s)
3.281 3.282 | 1000 -0.00212 {NO_NUMBER}
3.276 inf | 1000 - not proven: 1 diverged
"""


@pytest.mark.parametrize("case", BENCHMARK.strip().splitlines())
def test_benchmark_rule(capsys, case):
    losses, end = case.split(" | ")
    write_set("logs", map(float, losses.split()))
    assert end in " ".join(show(capsys, "logs --rule benchmark")[1].split())


def test_benchmark_takes_the_first_step_that_passes(capsys):
    for name, losses in {"a": (3.279, 3.277, 3.276), "b": (3.278, 3.276, 3.29)}.items():
        write(f"{name}.txt", *(line(91 + step, 99, loss, 9) for step, loss in enumerate(losses)))
    ends = {"": "92 0.00495 proven", "--step 91": "91 0.00212 not proven: 6 more run(s)"}
    ends["--step 95"] = "- - not proven: no finished run, or no validation that all runs have"
    for step, end in ends.items():
        assert end in " ".join(show(capsys, f". --rule benchmark {step}")[1].split())


def test_benchmark_of_two_sets(capsys):
    """Results 6 and 12, and 8 and 13, of the benchmark, as its rules compare them."""
    results = {6: (3375, 3.2788, 20), 12: (3325, 3.2790, 20)}
    results |= {8: (3250, 3.2778, 10), 13: (3210, 3.2785, 16)}
    for name, (steps, loss, runs) in results.items():
        write_set(name, [loss] * runs, steps=steps)
    assert "\n0.00648, B is better\n" in show(capsys, "--vs 6 12 --rule benchmark")[1]
    assert "\n-0.00648, A is better\n" in show(capsys, "--vs 12 6 --rule benchmark")[1]
    text = "\n0.00273, not proven: about 27 runs of each would be needed\n"
    assert text in show(capsys, "--vs 8 13 --rule benchmark")[1]


def test_differences_without_an_interval():
    for a, reason in ([1.0], "no interval"), ([1.0, None], "no comparison"), ([], "no comparison"):
        assert compare.difference(a, [2.0, 2.1])["verdict"].startswith(reason)


def test_intervals_of_differences():
    # The means have variances of 1/3 and 2/3: the standard error is 1, and there are
    # 1 / ((1/3)^2 / 2 + (2/3)^2 / 1) = 2 degrees of freedom, t 4.30265.
    deviation = math.sqrt(2 / 3)
    welch = compare.difference([1.0, 2.0, 3.0], [5 - deviation, 5 + deviation])
    assert welch["interval"] == pytest.approx([-7.30265, 1.30265], abs=1e-5)
    # Differences 1 2 1 2: mean 1.5, standard error 1 / sqrt(12) = 0.28868, t 3.18245.
    paired = compare.difference([11, 22, 31, 42], [10, 20, 30, 40], paired=True)
    assert paired["interval"] == pytest.approx([0.58131, 2.41869], abs=1e-5)


def test_first_reach_at_its_edges():
    start, end = compare.Validation(0, 10, 0.0, None), compare.Validation(100, 4, 20, None)
    assert compare.first_reach({0: start._replace(loss=math.nan), 100: end}, 7) == (100, 20)
    assert compare.first_reach({0: start._replace(seconds=None), 100: end}, 7) == (50, None)


# -------------------------------------------------------------------------------------------------
# Tables, plot, command line


@pytest.fixture
def two_sets():
    """Two folders of three finished runs, and an unfinished one in the first."""
    write_set("old", [3.270, 3.272, 3.274, None])
    write_set("new", [3.250, 3.252, 3.254])


# A mean of 8 thousandths below the target at a standard deviation of 2: t = -4 sqrt(3). Standard
# errors of sqrt(2/3) of 2 thousandths, 4 degrees of freedom, t 2.77645. From 3.5 at step 500 to
# 3.25 at step 1000: 0.1 of 0.25 is 200 steps on, and 20 s of 50.
LOSS = "3 (+1 unfinished) 3.27200 0.00200 3.27000 3.27400"
TIME = "101.000 1.000 100.000 102.000"
TABLES = f"""
old new | new/0.txt | 1000 3.25000 100.000 100.00 - -
old new | old/3.txt | 500/1000 3.50000 51.500 100.00 - - unfinished
old new old | old | {LOSS} {TIME} {t_below(-4 * math.sqrt(3)):.3g} not proven: 1 more run(s)
old new --at 3.4 | run | steps val loss time (s) step avg (ms) peak (MiB) GPUs steps to 3.4 seconds
old new --at 3.4 | new/0.txt | 1000 3.25000 100.000 100.00 - - 700.0 70.000
--vs old new | loss | 3.27200 3 3.25200 3 +0.02000 +0.01547 to +0.02453 more than noise: A is higher
--vs old new --at 3.4 | steps to 3.4 | 719.3 3 701.6 3 +17.7
"""


@pytest.mark.parametrize("case", TABLES.strip().splitlines())
def test_tables(two_sets, capsys, case):
    arguments, start, cells = case.split(" | ")
    code, out, err = show(capsys, arguments)
    rows = [" ".join(row.split()) for row in out.splitlines()]
    assert (code, err) == (0, "") and any(row.startswith(f"{start} {cells}") for row in rows), out


@pytest.mark.parametrize(
    "key, order", {"name": "9 10 11", "loss": "11 10 9", "gpus": "10 11 9"}.items()
)
def test_sort(capsys, key, order):
    run_log("9.txt", math.nan)
    run_log("10.txt", 3.2, head="world_size: 2")
    run_log("11.txt", 3.1, head="world_size: 4")
    lines = show(capsys, f"9.txt 11.txt 10.txt --sort {key}")[1].splitlines()
    assert [text.partition(".")[0] for text in lines[1:4]] == order.split()


def test_plot_shows_diverged_and_unfinished_runs(capsys):
    write_set(r"a$\x$b", [3.27, 3.271, math.nan, math.inf, None])
    run_log("_c.txt", 3.29)
    code, _, err = show(capsys, r"_c.txt a$\x$b --plot curves.svg")
    assert (code, err) == (0, "The loss curves are in curves.svg.\n")
    text = Path("curves.svg").read_text()
    words = [part.partition(" -->")[0].strip() for part in text.split("<!-- ")]
    assert {r"a$\x$b", "_c.txt", "dotted: unfinished runs, dashed: loss 3.28"} <= {*words}
    assert "10" not in words  # the losses of the start would squeeze the rest
    assert text.count("stroke-dasharray") == 4  # two dashed lines, and two curves dotted


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("", "name logs or folders"),
        ("missing.txt", "No such file or directory: 'missing.txt'"),
        ("old --step 9", "--step needs --rule benchmark"),
        ("old --plot curves.doc", "the plot cannot be written"),
    ],
)
def test_bad_usage_is_one_sentence(two_sets, capsys, arguments, words):
    refused(capsys, words, arguments)


def call(arguments, **environment):
    """Run compare.py from a shell: its standard output and standard error."""
    command = f"{sys.executable} {ROOT / 'records' / 'compare.py'} {arguments}"
    options = {"shell": True, "capture_output": True, "text": True}
    done = subprocess.run(command, env=os.environ | environment, **options)
    return done.stdout, done.stderr


def test_output_fits_any_reader():
    run_log("é.txt", 3.27)
    out, err = call(".", PYTHONIOENCODING="ascii")
    assert "?.txt" in out and not err
    assert call(". | true") == ("", "")


@pytest.mark.parametrize(
    "package, option", [("scipy", "--vs old new"), ("matplotlib", "old --plot")]
)
def test_missing_package_is_named(two_sets, package, option):
    write(f"blocked/{package}.py", "raise ImportError")
    out, err = call("old", PYTHONPATH="blocked")
    assert "3.27200" in out and not err
    assert f"needs {package}: pip install" in call(option, PYTHONPATH="blocked")[1]
