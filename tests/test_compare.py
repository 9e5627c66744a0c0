"""Tests of records/compare.py: every log form, the statistics against values worked out by hand, the command line.

The speed of a long listing depends on the machine, so it is measured by hand and not tested:

    python tests/test_compare.py --bench      # 1,500 logs of 100 kB, seconds for one listing
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "records" / "compare.py"
SHARED = ROOT.parent / "shared" / "logs"

spec = importlib.util.spec_from_file_location("compare", SCRIPT)
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare
spec.loader.exec_module(compare)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def run_log(path, loss, seconds=100.0, steps=1000):
    """A finished run: its losses fall from 10.8 over 3.5 half-way to the given one."""
    half = f"step:{steps // 2}/{steps} val_loss:3.5000 train_time:{seconds * 500:.0f}ms step_avg:100.00ms"
    last = f"step:{steps}/{steps} val_loss:{loss:.4f} train_time:{seconds * 1000:.0f}ms step_avg:100.00ms"
    return write(path, f"step:0/{steps} val_loss:10.8258 train_time:0ms step_avg:nanms", half, last)


def table_row(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def show(capsys, *arguments):
    """Exit code, standard output and standard error of compare.py."""
    capsys.readouterr()
    try:
        code = compare.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---------------------------------------------------------------------------------------------------------
# Reading


def test_oldest_form(tmp_path):
    log = write(
        tmp_path / "main.log",
        "s:0 tel:10.968871",
        "s:0 trl:10.965596 lr:0.000001 norm:15.37",
        "s:1 trl:10.814037",
        "s:128 tel:6.034447",
        "s:128 trl:6.01",
        "s:129 trl:6.00",
        "s:256 tel:5.231128",
    )
    run = compare.read_log(log)
    assert run.validations == [(0, 10.968871, None), (128, 6.034447, None), (256, 5.231128, None)]
    assert (run.loss, run.seconds, run.step_avg_ms, run.total_steps, run.steps) == (
        5.231128,
        None,
        None,
        None,
        256,
    )
    assert run.finished
    write(log, "s:128 tel:6.034447", "s:129 trl:6.00")
    assert not compare.read_log(log).finished


def test_milliseconds_nan_average_and_fields_after_them(tmp_path):
    log = write(
        tmp_path / "a.txt",
        "step:0/20 val_loss:10.9264 train_time:285ms step_avg:nanms",
        "step:1/20 train_loss:10.9184 train_time:74701ms step_avg:nanms",
        "step:20/20 train_time:4300ms step_avg:215.00ms train_loss:3.2533 lr:0.1",
        "step:20/20 val_loss:3.2785 train_time:4326ms step_avg:216.33ms mfu:51.00% note:x:y",
        "peak memory allocated: 30724 MiB reserved: 45952 MiB",
    )
    run = compare.read_log(log)
    assert run.validations == [(0, 10.9264, 0.285), (20, 3.2785, 4.326)]
    assert (run.steps, run.total_steps, run.memory_mib, run.gpus, run.finished) == (
        20,
        20,
        30724,
        None,
        True,
    )
    assert run.step_avg_ms == pytest.approx(216.33)
    write(log, "step:0/20 val_loss:10.9264 train_time:285ms step_avg:nanms")
    assert compare.read_log(log).step_avg_ms is None


def test_seconds_and_older_memory_line(tmp_path):
    log = write(
        tmp_path / "a.txt",
        "step:0/50 val_loss:10.82584 train_time:0.001s step_avg:nanms",
        "step:50/50 val_loss:4.66393 train_time:22.870s step_avg:0.18295s",
        "peak memory consumption: 31000 MiB",
    )
    run = compare.read_log(log)
    assert (run.loss, run.seconds, run.memory_mib) == (4.66393, 22.87, 31000)
    assert run.step_avg_ms == pytest.approx(182.95)


SOURCE = '''"""A trainer. Its log ends with lines such as

step:1770/1770 val_loss:1.0000 train_time:1ms step_avg:0.01ms
world_size: 64
"""
    step:9/9 val_loss:2.0
world_size = int(os.environ["WORLD_SIZE"])
print0(f"step:{step}/{n} val_loss:{x:.4f} train_time:{t:.0f}ms")
report = f"""
step:{step}/{n} val_loss:{x:.4f} train_time:{t:.0f}ms step_avg:{t / step:.2f}ms
s:{step} tel:{x}
peak memory allocated: {a} MiB reserved: {r} MiB
"""'''

NVIDIA_SMI = """| NVIDIA-SMI 555.42.06              Driver Version: 555.42.06      CUDA Version: 12.5     |
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|=========================================+========================+======================|
|   0  NVIDIA H100 80GB HBM3          Off |   00000000:18:00.0 Off |                    0 |
| N/A   28C    P0            111W /  700W |    5786MiB /  81559MiB |      9%      Default |
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:2A:00.0 Off |                    0 |
| N/A   30C    P0            116W /  700W |    5834MiB /  81559MiB |      0%      Default |
| Processes:                                                                              |
|    0   N/A  N/A     20785      C   /usr/bin/python3                                0MiB |
|    7   N/A  N/A     20786      C   /usr/bin/python3                                0MiB |"""


def test_source_and_noise_are_not_a_run(tmp_path):
    steps = [
        "step:0/10 val_loss:10.8 train_time:0ms step_avg:nanms",
        "step:5/10 val_loss:none train_time:50ms",
        "[rank0]: UserWarning: step:5/10 val_loss:1.0 train_time:1ms",
        "step:5/10 train_time:50ms step_avg:10ms",
        "step:10/10 val_loss:3.2 train_time:100ms step_avg:10.0ms",
    ]
    run = compare.read_log(write(tmp_path / "a.txt", SOURCE, "=" * 100, NVIDIA_SMI, *steps))
    assert run.validations == [(0, 10.8, 0.0), (10, 3.2, 0.1)]
    assert run.memory_mib is None
    source = SOURCE.replace("step:1770/1770", "for example")
    assert compare.read_log(write(tmp_path / "b.txt", source, NVIDIA_SMI)) is None


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
def test_gpus(tmp_path, header, gpus):
    log = write(
        tmp_path / "a.txt", *header, "step:1/1 val_loss:3.2 train_time:100ms step_avg:10.0ms"
    )
    assert compare.read_log(log).gpus == gpus


BEFORE = "step:10/20 val_loss:3.5000 train_time:100ms step_avg:10.00ms\n"


@pytest.mark.parametrize(
    "last, loss, steps, seconds",
    [
        ("step:20/2", 3.5, 10, 0.1),
        ("step:20/20 ", 3.5, 10, 0.1),
        (
            "step:20/20 val_loss:3.2",
            3.5,
            20,
            0.1,
        ),  # was 3.2788, say: the digits of the line above show it
        ("step:20/20 val_loss:3.2788", 3.2788, 20, None),
        ("step:20/20 val_loss:3.2788 train_time:20", 3.2788, 20, None),
        ("step:20/20 val_loss:3.2788 train_time:200m", 3.2788, 20, None),
        ("step:20/20 val_loss:3.2788 train_time:200ms step_av", 3.2788, 20, 0.2),
        ("step:15/20 train_time:15", 3.5, 15, 0.1),
        (
            "step:20/20 val_loss:3.2\npeak mem",
            3.2,
            20,
            None,
        ),  # a shorter loss, but its line is whole
    ],
)
def test_cut_off_last_line(tmp_path, last, loss, steps, seconds):
    log = tmp_path / "a.txt"
    log.write_text(BEFORE + last)
    run = compare.read_log(log)
    assert (run.loss, run.steps, run.seconds) == (loss, steps, seconds)
    assert run.finished == (loss != 3.5)


def test_resumed_run_counts_its_later_lines(tmp_path):
    log = write(
        tmp_path / "a.txt",
        "step:0/30 val_loss:9.0",
        "step:10/30 val_loss:5.0",
        "step:20/30 val_loss:4.5",
        "step:10/30 val_loss:5.1",
        "step:20/30 val_loss:4.4",
        "step:30/30 val_loss:4.0",
    )
    assert compare.read_log(log).validations == [
        (0, 9, None),
        (10, 5.1, None),
        (20, 4.4, None),
        (30, 4, None),
    ]


def test_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    form = "step:{0}/30 val_loss:{1} train_time:{0}ms step_avg:{2}ms".format
    before = [form(10, 5.0, 7.0), form(20, 4.5, 8.0), "step:25/30 train_time:25ms step_avg:1ms"]
    log = write(
        tmp_path / "a.txt", *before, "resumed from step 10", "step:11/30 train_time:11ms x:1"
    )
    run = compare.read_log(log)
    assert [v.step for v in run.validations] == [10]
    assert (run.steps, run.step_avg_ms, run.finished) == (11, 7.0, False)


def test_other_newlines_and_foreign_bytes(tmp_path):
    log = tmp_path / "a.txt"
    log.write_bytes(
        b"\xff\x00\r\nFetching 4 files: 25%\rstep:5/5 val_loss:3.25 train_time:7ms step_avg:1ms\r\n\xfe"
    )
    assert compare.read_log(log).validations == [(5, 3.25, 0.007)]


def test_folders_duplicates_and_files_without_a_run(tmp_path, capsys):
    run_log(tmp_path / "two words" / "run one.txt", 3.27)
    run_log(tmp_path / "two words" / "deep" / "b.log", 3.26)
    write(tmp_path / "two words" / "empty note.txt", "nothing here")
    write(tmp_path / "two words" / "README.md", "step:1/1 val_loss:3.0 train_time:1ms")
    (tmp_path / "bare").mkdir()
    code, out, err = show(
        capsys,
        tmp_path / "two words",
        tmp_path / "bare",
        tmp_path / "bare/../two words/run one.txt",
    )
    assert code == 0
    assert err.splitlines() == [
        f"{tmp_path}/two words/empty note.txt: no run in this file",
        f"{tmp_path}/bare: no .txt or .log file in this folder",
    ]
    assert [
        line.split("two words/")[1].split("  ")[0]
        for line in out.splitlines()
        if "two words" in line
    ] == ["deep/b.log", "run one.txt"]


def test_unreadable_file_does_not_stop_the_rest(tmp_path, capsys, monkeypatch):
    run_log(tmp_path / "a.txt", 3.27)
    run_log(tmp_path / "b.txt", 3.26)
    read_log = compare.read_log

    def guarded(path):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return read_log(path)

    monkeypatch.setattr(compare, "read_log", guarded)
    code, out, err = show(capsys, tmp_path)
    assert (code, err) == (0, f"{tmp_path}/a.txt: not readable (Permission denied)\n")
    assert "b.txt" in out


def test_first_reach_is_interpolated():
    curve = [
        compare.Validation(0, 10.0, 0.0),
        compare.Validation(100, 4.0, 20.0),
        compare.Validation(200, 3.0, 30.0),
    ]
    assert compare.first_reach(curve, 3.25) == pytest.approx(
        (175, 27.5)
    )  # three quarters of the way from 4 to 3
    assert compare.first_reach(curve, 4.0) == (100, 20)
    assert compare.first_reach(curve, 11.0) == (0, 0)
    assert compare.first_reach(curve, 2.9) == (None, None)
    untimed = [validation._replace(seconds=None) for validation in curve]
    assert compare.first_reach(untimed, 3.5) == (150, None)
    assert compare.first_reach([curve[0]._replace(loss=math.nan), curve[1]], 5.0) == (100, 20)


# ---------------------------------------------------------------------------------------------------------
# Statistics


def t_below(t, degrees, points=20_000):
    """P(T < t) for t < 0, by Simpson's rule over the density of Student's t from t to 0."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(
        degrees * math.pi
    )
    density = [
        scale * (1 + (t * k / points) ** 2 / degrees) ** (-(degrees + 1) / 2)
        for k in range(points + 1)
    ]
    area = sum(
        density[k] * (1 if k in (0, points) else 4 if k % 2 else 2) for k in range(points + 1)
    )
    return 0.5 - area * abs(t) / points / 3


def runs_of(tmp_path, losses, seconds=100.0):
    logs = [
        run_log(tmp_path / f"{index}.txt", loss, seconds + index)
        for index, loss in enumerate(losses)
    ]
    return [compare.read_log(log) for log in logs]


AT_3_3 = [3.3059, 3.3004, 3.2937]  # mean 3.3, but a little less in floating point
PUBLISHED = [3.2798, 3.2804, 3.2837, 3.2808, 3.2782, 3.2801, 3.283, 3.2825, 3.2777, 3.2769]


def test_published_p_value(tmp_path):
    pytest.importorskip("scipy")
    summary = compare.summarize("x", runs_of(tmp_path, PUBLISHED), 3.28)
    assert summary["p"] == pytest.approx(0.661, abs=5e-4)
    assert (
        summary["verdict"]
        == "not proven: no number of runs would, the mean is not below the target"
    )
    # The squared deviations from the mean, in units of 1e-8, add up to 4696.9: sqrt(4696.9 / 9) = 22.845.
    assert summary["loss"] == pytest.approx(
        {"n": 10, "mean": 3.28031, "std": 0.0022845, "min": 3.2769, "max": 3.2837}, abs=1e-7
    )
    assert summary["time_s"]["mean"] == pytest.approx(104.5)


def test_four_standard_errors_below_is_proven(tmp_path):
    pytest.importorskip("scipy")
    # +-1 around the mean, ten values: the standard error is sqrt(10 / 9) / sqrt(10) = 1/3 of that unit.
    losses = [3.28 - 4 / 3 * 0.003 + sign * 0.003 for sign in (-1, 1) * 5]
    summary = compare.summarize("x", runs_of(tmp_path, losses), 3.28)
    assert summary["p"] == pytest.approx(t_below(-4, 9), rel=1e-6)
    assert summary["p"] == pytest.approx(0.00156, abs=1e-5)
    assert summary["verdict"] == "proven"


def test_runs_still_needed(tmp_path):
    pytest.importorskip("scipy")
    # One standard deviation below the target, t is sqrt(n): 2.828 at n = 8 and 3 at n = 9, where tables of the
    # one-sided 1% point have 2.998 (7 degrees of freedom) and 2.896 (8): nine runs, six more than these three.
    summary = compare.summarize("x", runs_of(tmp_path, [3.278, 3.279, 3.280]), 3.28)
    assert summary["p"] == pytest.approx(t_below(-math.sqrt(3), 2), rel=1e-6)
    assert summary["verdict"] == "not proven: 6 more runs at this spread would be needed"
    # A tenth of that distance: t is sqrt(n) / 10, that is 2.33238 at n = 544 and 2.33452 at n = 545; the 1% point is
    # z + (z^3 + z) / (4 * 543) = 2.33322 there, with z = 2.32635 of the normal distribution.
    assert compare.runs_needed(3.2799, 0.001, 3, 3.28) == 545
    for distance in (
        0.0003,
        0.0007,
        0.0011,
        0.0013,
    ):  # in the search no number of runs may be skipped
        needed = next(
            n for n in range(2, 1000) if compare.p_value(3.28 - distance, 0.001, n, 3.28) < 0.01
        )
        assert compare.runs_needed(3.28 - distance, 0.001, 2, 3.28) == needed
    at_target = compare.summarize("x", runs_of(tmp_path, AT_3_3), 3.3)
    assert at_target["verdict"].startswith("not proven: no number of runs would")


def test_groups_without_a_p_value(tmp_path):
    one, two = runs_of(tmp_path, [3.27, 3.27])
    cut = compare.read_log(
        write(tmp_path / "cut.txt", "step:10/20 val_loss:3.1 train_time:5ms step_avg:1ms")
    )
    lost = compare.read_log(
        write(tmp_path / "lost.txt", "step:20/20 val_loss:nan train_time:5ms step_avg:1ms")
    )
    for runs, verdict in [
        ([one, cut], "not proven: one run has no p-value"),
        ([cut], "not proven: no finished run"),
        ([one, two], "not proven: equal losses have no spread, so no p-value"),
        ([one, two, lost], "not proven: 1 diverged"),
    ]:
        summary = compare.summarize("x", runs, 3.28)
        assert (summary["verdict"], summary["p"]) == (verdict, None)
    assert compare.summarize("x", [one, cut], 3.28)["unfinished"] == 1
    assert compare.summarize("x", [one, cut], 3.28)["loss"]["mean"] == 3.27


def test_welch_by_hand():
    pytest.importorskip("scipy")
    # Variances 2 and 2, two runs each: standard error sqrt(2), 2 degrees of freedom, table value 4.3027.
    result = compare.difference([1.0, 3.0], [2.0, 4.0])
    half = 4.3027 * math.sqrt(2)
    assert (result["difference"], result["verdict"]) == (-1, "within noise")
    assert result["interval"] == pytest.approx([-1 - half, -1 + half], abs=1e-3)


def test_welch_of_unequal_spreads():
    pytest.importorskip("scipy")
    a, b = [3.271, 3.274, 3.270, 3.273], [3.279, 3.291, 3.284]
    result = compare.difference(a, b)
    # Deviations from the means, in thousandths: -1 2 -2 1, and -17/3 19/3 -2/3, whose squares add up to 654/9.
    part_a, part_b = 10e-6 / 3 / 4, 654e-6 / 9 / 2 / 3
    degrees = (part_a + part_b) ** 2 / (part_a**2 / 3 + part_b**2 / 2)
    half = (result["interval"][1] - result["interval"][0]) / 2
    assert t_below(-half / math.sqrt(part_a + part_b), degrees) == pytest.approx(0.025, abs=1e-5)
    assert result["difference"] == pytest.approx(-0.038 / 3)
    assert sum(result["interval"]) / 2 == pytest.approx(result["difference"])


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "more than noise: A is lower"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "more than noise: A is higher"),
        ([1.0], [2.0, 2.1], "no interval: a set of one run has no spread"),
        ([1.0, 1.0], [2.0, 2.0], "no interval: neither set has any spread"),
        ([1.0, None], [2.0, 2.1], "no comparison: 1 of 2 runs of A without a value"),
        ([1.0, 2.0], [math.nan, 2.1], "no comparison: 1 of 2 runs of B without a value"),
        ([], [2.0, 2.1], "no comparison: a set without a finished run"),
    ],
)
def test_verdicts_of_differences(a, b, verdict):
    pytest.importorskip("scipy")
    assert compare.difference(a, b)["verdict"] == verdict


# ---------------------------------------------------------------------------------------------------------
# Tables, JSON, plot


@pytest.fixture
def two_sets(tmp_path):
    """Two folders of three finished runs, and an unfinished one in the first."""
    for index, loss in enumerate([3.270, 3.272, 3.274]):
        run_log(tmp_path / "old" / f"seed {index}.txt", loss, 200 + index)
        run_log(tmp_path / "new" / f"seed {index}.txt", loss - 0.02, 150 + index)
    write(
        tmp_path / "old" / "killed.txt",
        "step:0/1000 val_loss:10.8 train_time:0ms step_avg:nanms",
        "step:500/1000 val_loss:3.5 train_time:9000ms step_avg:18.0ms",
        "step:612/1000 train_time:11000ms step_avg:",
    )
    return tmp_path


def test_table_and_summary(two_sets, capsys):
    pytest.importorskip("scipy")
    code, out, err = show(capsys, two_sets)
    assert (code, err) == (0, "")
    header, seed = out.splitlines()[0].split(), table_row(out, f"{two_sets}/new/seed 0.txt").split()
    assert " ".join(header) == "run steps val loss time (s) step avg (ms) peak (MiB) GPUs"
    assert seed[-6:] == ["1000", "3.25000", "150.000", "100.00", "-", "-"]
    assert table_row(out, f"{two_sets}/old/killed.txt").split()[-7:] == [
        "612/1000",
        "3.50000",
        "9.000",
        "18.00",
        "-",
        "-",
        "unfinished",
    ]
    # Mean 8 thousandths below the target at a standard deviation of 2: t = -4 sqrt(3) with 2 degrees of freedom.
    old, p = table_row(out, f"{two_sets}/old  "), t_below(-4 * math.sqrt(3), 2)
    assert " ".join(old.split()[1:]) == (
        f"3 (+1 unfinished) 3.27200 0.00200 3.27000 3.27400 201.000 1.000 200.000 202.000 {p:.3g} "
        "not proven: 1 more run at this spread would be needed"
    )
    assert "proven" not in show(capsys, two_sets / "old" / "seed 0.txt")[1]


def test_summary_of_runs_without_times(tmp_path, capsys):
    write(tmp_path / "a.log", "s:9 tel:3.271")
    run_log(tmp_path / "b.txt", 3.273)
    row = table_row(show(capsys, tmp_path)[1], f"{tmp_path}  ")
    assert "2 (1 without time)" in row and "100.000" in row


def test_target(two_sets, capsys):
    pytest.importorskip("scipy")
    out = show(capsys, two_sets / "new", "--target", "3.26")[1]
    assert "mean loss <= 3.26?" in out and "not proven: 1 more run " in out
    assert table_row(show(capsys, two_sets / "new")[1], f"{two_sets}/new  ").endswith(" proven")


@pytest.mark.parametrize(
    "key, order",
    [
        ("name", "abc"),
        ("steps", "cab"),
        ("loss", "bca"),
        ("time", "bca"),
        ("avg", "cba"),
        ("memory", "acb"),
        ("gpus", "bac"),
    ],
)
def test_sort(tmp_path, capsys, key, order):
    write(
        tmp_path / "a.txt",
        "world_size: 4",
        "step:20/20 val_loss:nan train_time:9ms step_avg:5ms",
        "peak memory allocated: 10 MiB reserved: 20 MiB",
    )
    write(
        tmp_path / "b.txt", "world_size: 2", "step:30/30 val_loss:3.2 train_time:7ms step_avg:2ms"
    )
    write(
        tmp_path / "c.txt",
        "step:10/10 val_loss:3.3 train_time:8ms step_avg:1ms",
        "peak memory allocated: 15 MiB reserved: 20 MiB",
    )
    out = show(capsys, tmp_path, "--sort", key)[1]
    names = [Path(line.split()[0]).stem for line in out.splitlines()[1:4]]
    assert "".join(names) == order


def test_at_adds_columns(two_sets, capsys):
    out = show(capsys, two_sets, "--at", "3.4")[1]
    assert "steps to 3.4  seconds to 3.4" in out.splitlines()[0]
    # From 3.5 at step 500 to 3.25 at step 1000: 0.1 of 0.25 is 200 steps on, and as much of 75 s.
    assert table_row(out, f"{two_sets}/new/seed 0.txt").split()[-2:] == ["700.0", "105.000"]
    assert table_row(out, f"{two_sets}/old/killed.txt").split()[-3:] == ["-", "-", "unfinished"]


def test_versus(two_sets, capsys):
    pytest.importorskip("scipy")
    code, out, err = show(capsys, "--vs", two_sets / "old", two_sets / "new", "--at", "3.4")
    assert (code, err) == (0, "")
    assert f"A: {two_sets}/old (1 unfinished left out)\nB: {two_sets}/new\n" in out
    # Standard deviations of 2 thousandths and of 1 s: errors sqrt(2/3) of them, 4 degrees of freedom, t 2.776.
    half = 2.776 * math.sqrt(2 / 3)
    loss, seconds = table_row(out, "loss"), table_row(out, "time (s)")
    assert loss.split()[1:6] == ["3.27200", "3", "3.25200", "3", "+0.02000"]
    assert (
        f"{0.02 - 0.002 * half:+.5f} to {0.02 + 0.002 * half:+.5f}  more than noise: A is higher"
        in loss
    )
    assert " ".join(seconds.split()[6:10]) == f"+50.000 {50 - half:+.3f} to {50 + half:+.3f}"
    # 0.1 of the second half's fall of 0.230, 0.228, 0.226 in A and of 0.250, 0.248, 0.246 in B.
    assert table_row(out, "steps to 3.4").split()[3:7] == ["719.3", "3", "701.6", "3"]
    assert table_row(out, "seconds to 3.4").split()[3:7:2] == ["144.582", "105.946"]
    assert (
        "no interval: a set of one run"
        in show(capsys, "--vs", two_sets / "old/seed 0.txt", two_sets / "new")[1]
    )


def test_json(two_sets, capsys):
    pytest.importorskip("scipy")
    write(two_sets / "new" / "lost.txt", "step:1/1 val_loss:nan train_time:5ms step_avg:nanms")
    code, out, _ = show(
        capsys, two_sets, "--vs", two_sets / "old", two_sets / "new", "--json", "--at", "3.4"
    )
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    runs = {Path(run["name"]).relative_to(two_sets).as_posix(): run for run in result["runs"]}
    assert code == 0 and len(runs) == 8
    seed = runs["new/seed 0.txt"]
    assert (seed["steps"], seed["total_steps"], seed["finished"], seed["val_loss"]) == (
        1000,
        1000,
        True,
        3.25,
    )
    assert (seed["time_s"], seed["step_avg_ms"], seed["memory_mib"], seed["gpus"]) == (
        150.0,
        100.0,
        None,
        None,
    )
    assert seed["reaches"] == pytest.approx({"loss": 3.4, "steps": 700, "time_s": 105})
    assert seed["validations"][1] == {"step": 500, "loss": 3.5, "time_s": 75.0}
    assert runs["old/killed.txt"]["finished"] is False and runs["new/lost.txt"]["val_loss"] is None
    assert [(group["loss"]["n"], group["diverged"]) for group in result["groups"]] == [
        (3, 0),
        (3, 1),
    ]
    assert result["versus"]["loss"]["verdict"] == "no comparison: 1 of 4 runs of B without a value"
    assert result["versus"]["steps_to"]["a"]["n"] == 3


def test_plot(two_sets, capsys):
    pytest.importorskip("matplotlib")
    (two_sets / "new").rename(two_sets / "_new $x_$")
    write(two_sets / "untimed" / "a.log", "s:0 tel:10.9", "s:900 tel:3.3")
    png, svg = two_sets / "curves.png", two_sets / "curves.SVG"
    assert show(capsys, two_sets, "--plot", png)[0] == show(capsys, two_sets, "--plot", svg)[0] == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    drawing = svg.read_text()
    for words in (
        "_new $x_$ (3 runs)",
        "old (4 runs)",
        "untimed (no times in the log)",
        "loss 3.28",
        "unfinished",
        "training time (s)",
        "step",
        "validation loss (nats per token)",
    ):
        assert f"<!-- {words}" in drawing, words
    assert "<!-- 10 " not in drawing  # the loss at the start would squeeze all the rest


# ---------------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name at least one log or folder"),
        (["missing log.txt"], "no such file or folder: missing log.txt"),
        (["--vs", "old", "nowhere"], "no such file or folder: nowhere"),
        (["--vs", "old"], "argument --vs: expected 2 arguments"),
        (["old", "--what"], "unrecognized arguments: --what"),
        (["old", "--tar", "3"], "unrecognized arguments: --tar"),
        (["old", "--sort", "speed"], "invalid choice: 'speed'"),
        (["old", "--target", "low"], "a loss is a number above 0, not 'low'"),
        (["old", "--target", "nan"], "a loss is a number above 0, not 'nan'"),
        (["old", "--at", "0"], "a loss is a number above 0, not '0'"),
        (["old", "--plot", "curves.pdf"], "--plot writes .png or .svg, not curves.pdf"),
        (["old", "--plot", "nowhere/curves.png"], "the plot cannot be written"),
    ],
)
def test_bad_usage_is_one_sentence(two_sets, capsys, monkeypatch, arguments, words):
    if "nowhere/curves.png" in arguments:
        pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    monkeypatch.chdir(two_sets)
    code, _, err = show(capsys, *arguments)
    assert code == 2
    assert words in err and len(err.splitlines()) == 1, err


def test_no_run_at_all(tmp_path, capsys):
    write(tmp_path / "note.txt", "hello")
    code, out, err = show(capsys, tmp_path)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        f"{tmp_path}/note.txt: no run in this file",
        "compare.py: no run found",
    ]


@pytest.mark.skipif(os.name != "posix", reason="names of any bytes are a matter of POSIX")
def test_name_of_foreign_bytes(tmp_path):
    log = run_log(tmp_path / "a.txt", 3.27)
    log.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff run.txt"))
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0 and b" run.txt" in done.stdout


def test_reader_that_stops_early(two_sets):
    command = f'"{sys.executable}" "{SCRIPT}" "{two_sets}" | true'
    stderr = subprocess.run(command, shell=True, capture_output=True, text=True).stderr
    assert "Traceback" not in stderr and "BrokenPipe" not in stderr


def run_without(package, tmp_path, *arguments):
    """compare.py where importing the package fails."""
    write(tmp_path / "blocked" / f"{package}.py", f"raise ImportError('no {package}')")
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "blocked")},
    )


def test_without_scipy(two_sets):
    done = run_without("scipy", two_sets, two_sets / "old")
    assert (
        done.returncode == 0
        and "3.27200  0.00200" in done.stdout
        and "no p-value without scipy" in done.stdout
    )
    assert done.stderr == "p-values need scipy: pip install -r records/requirements.txt\n"
    assert run_without("scipy", two_sets, two_sets / "old" / "seed 0.txt").stderr == ""
    done = run_without("scipy", two_sets, "--vs", two_sets / "old", two_sets / "new")
    assert done.returncode == 2
    assert done.stderr == "compare.py: --vs needs scipy: pip install -r records/requirements.txt\n"


def test_without_matplotlib(two_sets):
    assert run_without("matplotlib", two_sets, two_sets / "old/seed 0.txt").stderr == ""
    done = run_without(
        "matplotlib", two_sets, two_sets / "old/seed 0.txt", "--plot", two_sets / "a.png"
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "compare.py: --plot needs matplotlib: pip install -r records/requirements.txt\n"
    )


# ---------------------------------------------------------------------------------------------------------
# The public logs


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public logs in ../shared/logs")
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


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public logs in ../shared/logs")
def test_public_logs_cut_anywhere_give_no_loss_of_their_own(tmp_path):
    text = (SHARED / "2025-02-01_RuleTweak.txt").read_bytes()
    known = {v.step: v for v in compare.read_log(SHARED / "2025-02-01_RuleTweak.txt").validations}
    log = tmp_path / "cut.txt"
    for end in range(len(text) - 400, len(text)):
        log.write_bytes(text[:end])
        for step, loss, seconds in compare.read_log(log).validations:
            assert loss == known[step].loss and seconds in (known[step].seconds, None), text[:end][
                -60:
            ]


def bench():
    """Seconds for a listing of 1,500 logs of 100 kB: 14 kB of source, then 1,770 steps."""
    steps = "".join(
        f"step:{step}/1770 train_time:{101 * step}ms step_avg:101.60ms\n"
        + (
            f"step:{step}/1770 val_loss:{3 + 7 / (step + 1):.4f} train_time:{101 * step}ms step_avg:101.60ms\n"
            if step % 125 == 0 or step == 1770
            else ""
        )
        for step in range(1771)
    )
    text = ((SCRIPT.read_text() * 9)[: 100_000 - len(steps)] + "\n" + steps).encode()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(1500):
            (Path(folder) / f"{index}.txt").write_bytes(text)
        start = time.perf_counter()
        subprocess.run([sys.executable, SCRIPT, folder], check=True, stdout=subprocess.DEVNULL)
        print(f"1,500 logs of {len(text):,} bytes: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__" and "--bench" in sys.argv:
    bench()
