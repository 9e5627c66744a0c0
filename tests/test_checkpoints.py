"""Checkpoints, and ends before the last step.

A run that is resumed is the run that was not interrupted, bit for bit, wherever it was killed. What
is damaged, or of another run, is refused with one sentence. Signals, losses that are not finite and
full disks end a run as they should, or do not end it. Processes that are killed are real ones,
forked by forked.py.
"""

import contextlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_distributed import SMALL as SMALLEST
from test_distributed import Started, machine_with_shards, torchrun
from test_run import as_flags
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import train_gpt

LIMIT = 120  # seconds, after which a test fails
SCRIPT = ROOT / "train_gpt.py"
SMALL = SMALLEST | dict(seqs_per_step=2, num_iterations=12, val_loss_every=4)
ENDLESS = dict(num_iterations=100000, save_every=5)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="kills processes and takes their room on the disk as on Linux"
)


@pytest.fixture(autouse=True)
def limited():
    """No test waits longer than LIMIT."""

    def late(*_):
        raise TimeoutError(f"the test has taken more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return machine_with_shards(tmp_path_factory.mktemp("shards"))


def polled(true, what):
    """Wait until `true()` is, and return what it says."""
    begin = time.monotonic()
    while not (found := true()):
        assert time.monotonic() - begin < LIMIT, what
        time.sleep(0.001)
    return found


# --------------------------------------------------------------------------------------------------
# Runs in this process, and what they leave


@pytest.fixture(scope="module")
def train(shards):
    """A function that runs main in this process, with the small settings and some others.

    It returns what was printed. With a code other than 0 there has to be one sentence on stderr,
    which is returned instead; otherwise there has to be nothing.
    """

    def run(folder, code=0, **settings):
        out, err = io.StringIO(), io.StringIO()
        flags = as_flags(**SMALL | shards | dict(log_dir=folder, run_id="run") | settings)
        no_gpu = unittest.mock.patch.object(torch.cuda, "is_available", lambda: False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_gpu:
            ended = train_gpt.main(flags)
        assert ended == code, (ended, err.getvalue())
        if code:
            assert_one_sentence(err.getvalue())
            return err.getvalue()
        assert not err.getvalue()
        return out.getvalue()

    return run


def complaints(said):
    """Which of the two could not be written, by the lines that say so and go on."""
    lines = said.splitlines()
    pattern = r"train_gpt\.py: (a checkpoint|the log) cannot be written \(.+\); training goes on\."
    assert all(re.fullmatch(pattern, line) for line in lines), said
    return sorted("checkpoint" if "checkpoint" in line else "log" for line in lines)


def assert_one_sentence(text):
    """But for those that say what could not be written meanwhile, each once."""
    *before, last = text.splitlines(keepends=True) or [""]
    assert len(complaints("".join(before))) == len(set(complaints("".join(before))))
    assert last.startswith("train_gpt.py: ") and last.endswith("\n"), text
    assert last[:-1].isprintable(), text


def checkpoint(folder, step, name="run"):
    return folder / name / f"step_{step:08d}.pt"


def saved_steps(folder):
    """The steps that are saved, each wholly; there is nothing else in the run's folder."""
    steps = []
    for path in sorted((folder / "run").iterdir()):
        steps.append(int(re.fullmatch(r"step_(\d{8})\.pt", path.name)[1]))
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert torch.load(path, weights_only=True)["step"] == steps[-1]
    return steps


def assert_identical(ours, theirs):
    """Bit for bit, through all dictionaries and lists."""
    leaves, form = tree_flatten(ours)
    others, other_form = tree_flatten(theirs)
    assert form == other_form
    for x, y in zip(leaves, others, strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y)
        else:
            assert x == y


def assert_same_checkpoint(path, other):
    """Weights, what the optimizers remember, random state, position; but not how long it took."""
    ours, theirs = (torch.load(name, weights_only=True) for name in (path, other))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(ours)) > 50
    for state in (ours, theirs):
        del state["ms"], state["best"], state["run_id"]
    assert_identical(ours, theirs)


TIMES = re.compile(r" train_time:(\d+)ms step_avg:[\d.]+ms")


def without_times(text):
    return [TIMES.sub("", line) for line in text.splitlines() if line.startswith("step:")]


def timed_steps(folder, name="run"):
    """The lines of steps and validations in a log; of two of the same step, the later one."""
    lines = {}
    for line in (folder / f"{name}.txt").read_text().splitlines():
        if line.startswith("step:"):
            key = line.split("/")[0], "val_loss" in line
            lines.pop(key, None)
            lines[key] = line
    return "\n".join(lines.values())


def steps(folder, name="run"):
    """The same without times, in a list."""
    return without_times(timed_steps(folder, name))


def until_step(last, lines):
    return [line for line in lines if int(line[5:].split("/")[0]) <= last]


def after_step(first, lines):
    return [line for line in lines if int(line[5:].split("/")[0]) > first]


def closing(folder):
    """What the last lines of a log say of the whole run, times and memory aside."""
    pattern = r"passes over the training tokens: [\d.]+, lowest validation loss [\d.]+"
    return re.findall(pattern, (folder / "run.txt").read_text())


def assert_same_run(folder, other):
    """To its end: the log, and the last checkpoint."""
    assert steps(folder) == steps(other)
    assert closing(folder)[-1:] == closing(other) and len(closing(other)) == 1
    times = [int(time) for time in TIMES.findall(timed_steps(folder))]
    assert times == sorted(times) and times
    last = max((other / "run").glob("*.pt"))
    assert_same_checkpoint(folder / "run" / last.name, last)


def content(folder):
    """All files below a folder, with what is in them and when they were changed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The log folder of a run that was not interrupted, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, save_every=1, keep=100, sample=30)
    assert saved_steps(folder) == list(range(1, 13))
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A function that copies that run's folder for a test, with the checkpoints of some steps."""

    def copy(*kept):
        folder = tmp_path / "logs"
        shutil.copytree(whole, folder)
        for path in (folder / "run").iterdir():
            if int(path.stem[5:]) not in kept:
                path.unlink()
        return folder

    return copy


# --------------------------------------------------------------------------------------------------
# Which are written, and when


@pytest.mark.parametrize(
    "every, keep, expected",
    [(0, 2, None), (5, 2, [10, 12]), (4, 9, [4, 8, 12]), (1, 1, [12]), (100, 2, [12])],
)
def test_checkpoints_of_multiples_and_of_the_last_step(
    every, keep, expected, train, whole, tmp_path
):
    """The newest stay, and whatever is saved, the curve is the same."""
    train(tmp_path, save_every=every, keep=keep)
    assert steps(tmp_path) == steps(whole)
    if expected is None:
        assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]
    else:
        assert saved_steps(tmp_path) == expected
        for step in expected:
            assert_same_checkpoint(checkpoint(tmp_path, step), checkpoint(whole, step))


def test_clock_stands_still_while_saving(train, tmp_path, monkeypatch):
    """A save takes an hour, by a clock that nothing else moves but a step: by one second."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*args):
            now[0] += seconds
            return function(*args)

        monkeypatch.setattr(owner, name, slow)

    takes(train_gpt, "snapshot", 1800)
    takes(train_gpt, "write_checkpoint", 1800)
    takes(train_gpt, "training_step", 1)
    train(tmp_path, save_every=1)
    assert now[0] > 12 * 3600
    found = re.findall(r"step:(\d+)/12 .*train_time:(\d+)ms", timed_steps(tmp_path))
    assert len(found) == 16 and all(int(ms) == 1000 * int(step) for step, ms in found)
    now[0] = 10**6
    train(tmp_path, resume=checkpoint(tmp_path, 11))
    assert " train_time:12000ms step_avg:1000.00ms train_loss" in timed_steps(tmp_path)


# --------------------------------------------------------------------------------------------------
# Resuming: the same run


@pytest.mark.parametrize("step", [1, 4, 7, 11, 12])
def test_resumed_run_is_the_one_that_was_not_interrupted(step, train, whole, copied):
    """From any step on: log, checkpoints and sample. The log is only appended to."""
    folder = copied(step)
    before = (folder / "run.txt").read_text()
    path = checkpoint(folder, step)
    out = train(folder, resume=path, save_every=1, keep=100, sample=30)
    assert_same_run(folder, whole)
    assert saved_steps(folder) == list(range(step, 13))
    for later in range(step, 13):
        assert_same_checkpoint(checkpoint(folder, later), checkpoint(whole, later))
    assert without_times(out) == after_step(step, steps(whole))
    log = (folder / "run.txt").read_text()
    assert log.startswith(before)
    added = log.removeprefix(before)
    assert added.startswith(SCRIPT.read_text())
    assert added.count(f"\nresumed from step {step} of {path}\n") == 1
    assert added.split("\nsample: ")[1] == before.split("\nsample: ")[1]


@pytest.mark.parametrize(
    "settings",
    [dict(dtype="bfloat16"), dict(seqs_per_step=8, repeat=False), dict(seed=3, fp8="none")],
)
def test_resumed_run_of_other_settings(settings, train, tmp_path):
    """Other activations, more micro-steps, no second pass over the tokens."""
    train(tmp_path / "whole", **settings, save_every=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    path = checkpoint(tmp_path / "resumed", 10)
    train(tmp_path / "resumed", **settings, save_every=5, resume=path)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_run_resumed_twice(train, whole, copied):
    """From a step, and then from an earlier one: the later checkpoints go with the first save."""
    folder = copied(3, 8)
    for step in (8, 3):
        train(folder, resume=checkpoint(folder, step), save_every=5, keep=100)
        assert saved_steps(folder) == [3] + [8] * (step == 8) + [5] * (step == 3) + [10, 12]
    assert_same_run(folder, whole)


def test_settings_that_do_not_shape_the_curve_may_differ(train, shards, whole, copied, tmp_path):
    """All of them at once, and shards that lie elsewhere."""
    folder = copied(5)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(shards["train_files"].parent, elsewhere)
    train(
        tmp_path / "new",
        resume=checkpoint(folder, 5),
        train_files=elsewhere / "train_?.bin",
        val_files=elsewhere / "val*.bin",
        val_tokens=500,
        val_seq_len=128,
        val_loss_every=3,
        sample=4,
        timeout=77,
        save_every=7,
        keep=1,
        coordinate_descent_tuning=True,
    )
    assert saved_steps(tmp_path / "new") == [12]
    assert_same_checkpoint(checkpoint(tmp_path / "new", 12), checkpoint(whole, 12))
    trained = [line for line in steps(tmp_path / "new") if "train_loss" in line]
    assert trained == [line for line in after_step(5, steps(whole)) if "train_loss" in line]


def test_without_a_run_id_it_is_the_checkpoints(train, whole, copied):
    folder = copied(6)
    train(folder, resume=checkpoint(folder, 6), run_id="", save_every=6)
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run.txt"]
    assert_same_run(folder, whole)


def test_another_run_id_leaves_the_first_run_alone(train, whole, copied):
    """Its log begins with its own header; and once it is there, it is not another run's."""
    folder = copied(6)
    before = content(folder)
    branch = dict(resume=checkpoint(folder, 6), run_id="branch")
    train(folder, **branch, save_every=6)
    after = content(folder)
    assert {path: found for path, found in after.items() if "branch" not in str(path)} == before
    assert (folder / "branch.txt").read_text().startswith(SCRIPT.read_text())
    assert steps(folder, "branch") == after_step(6, steps(whole))
    assert_same_checkpoint(checkpoint(folder, 12, "branch"), checkpoint(whole, 12))
    assert "branch.txt" in train(folder, 2, **branch)
    assert "run.txt" in train(folder, 2)
    assert content(folder) == after


# --------------------------------------------------------------------------------------------------
# --resume auto


def test_auto_begins_where_there_is_nothing(train, whole, tmp_path):
    train(tmp_path / "logs", resume="auto", save_every=1)
    assert_same_run(tmp_path / "logs", whole)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["run", "run.txt"]


def test_auto_begins_again_after_a_run_that_was_cut_before_its_first_checkpoint(train, tmp_path):
    (tmp_path / "run.txt").write_text("cut\n")
    train(tmp_path, resume="auto", num_iterations=1)
    assert (tmp_path / "run.txt").read_text().startswith("cut\n" + SCRIPT.read_text())
    assert [line[:9] for line in steps(tmp_path)] == ["step:0/1 ", "step:1/1 ", "step:1/1 "]


@pytest.mark.parametrize("run_id", ["run", ""])
def test_auto_takes_what_was_written_last(run_id, train, whole, copied):
    """Of a run, or of all under the folder of the logs, whose log then goes on."""
    folder = copied(2, 7, 10)
    for age, step in enumerate((10, 7, 2)):
        os.utime(checkpoint(folder, step), (10**9 - age, 10**9 - age))
    train(folder, run_id="other", num_iterations=1, save_every=1)
    os.utime(checkpoint(folder, 1, "other"), (10**9 - 10 * (run_id == ""), 10**9 - 10))
    os.utime(checkpoint(folder, 1, "other"), (2 * 10**9 - 1.5 * 10**9 * (run_id == ""),) * 2)
    out = train(folder, resume="auto", run_id=run_id, save_every=1)
    assert f"resumed from step 10 of {checkpoint(folder, 10)}\n" in out
    assert_same_run(folder, whole)
    assert saved_steps(folder) == [11, 12]  # by --keep, of the earlier ones too


def test_auto_passes_over_what_is_not_whole(train, whole, copied):
    """Truncated, altered, unfinished, newer: as a run or a disk leaves it that dies."""
    folder = copied(5, 7, 9, 10, 11, 12)
    os.truncate(checkpoint(folder, 12), 1000)
    altered(checkpoint(folder, 11))
    empty(checkpoint(folder, 10))
    newer_format(checkpoint(folder, 9))
    (folder / "run" / "unfinished").write_bytes(bytes(999))
    for step in (5, 7):
        os.utime(checkpoint(folder, step), (step, step))
    out = train(folder, resume="auto", save_every=1)
    assert f"resumed from step 7 of {checkpoint(folder, 7)}\n" in out
    assert_same_run(folder, whole)
    assert saved_steps(folder) == [11, 12]


def test_auto_with_nothing_whole_is_refused(train, copied):
    """Rather than to begin again over what can perhaps be rescued."""
    folder = copied(5, 10)
    for step in (5, 10):
        os.truncate(checkpoint(folder, step), 1000)
    before = content(folder)
    assert "step_000000" in train(folder, 2, resume="auto", save_every=1)
    assert content(folder) == before


def test_auto_after_a_step_back(train, whole, copied, monkeypatch):
    """A run that was resumed from an earlier checkpoint than its newest, and was stopped again."""
    folder = copied(4, 8, 12)
    before_step(monkeypatch, 2, lambda: send(signal.SIGTERM))
    train(folder, 128 + signal.SIGTERM, resume=checkpoint(folder, 4), save_every=4)
    assert saved_steps(folder) == [4, 6]
    monkeypatch.undo()
    train(folder, resume="auto", save_every=4)
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(eval_only=True), "--resume"),
        (dict(resume="auto", muon_lr=0.04), "--muon_lr"),
        (dict(resume="auto", run_id="another", eval_only=True), "no checkpoint"),
        (dict(resume="run"), "run"),
        (dict(resume="."), "."),
        (dict(resume="/"), "/"),
        (dict(keep=0), "--keep"),
        (dict(save_every=-1), "--save_every"),
    ],
)
def test_resuming_that_cannot_be_meant_is_refused(settings, word, train, copied):
    folder = copied(5)
    before = content(folder)
    assert word in train(folder, 2, **settings)
    assert content(folder) == before


# --------------------------------------------------------------------------------------------------
# --eval_only


@pytest.mark.parametrize("step", [4, 8, 12])
def test_eval_only_validates_a_checkpoint(step, train, whole):
    """The only line is that of the log; after the last step the sample is, too."""
    before = content(whole)
    out = train(whole, resume=checkpoint(whole, step), eval_only=True, sample=30 * (step == 12))
    expected = [line for line in steps(whole) if line.startswith(f"step:{step}/12 val_loss")]
    assert without_times(out) == expected and len(expected) == 1
    assert "tokens per second" not in out
    sample = (whole / "run.txt").read_text().split("\nsample: ")[1:]
    assert out.split("\nsample: ")[1:] == (sample if step == 12 else [])
    assert content(whole) == before


@pytest.mark.parametrize(
    "settings",
    [
        dict(run_id=""),
        dict(resume="auto"),
        dict(resume="auto", run_id=""),
        dict(log_dir="elsewhere"),
        dict(run_id="other", save_every=1, sample=3),
    ],
    ids=str,
)
def test_eval_only_leaves_everything_as_it_is(settings, train, copied, monkeypatch):
    """The log and the folder of the run, and there is no log of its own."""
    folder = copied(10)
    before = content(folder)
    monkeypatch.chdir(folder)
    out = train(folder, **dict(resume=checkpoint(folder, 10), eval_only=True) | settings)
    assert len(re.findall(r"^step:10/12 val_loss:\d\.\d{4}", out, re.MULTILINE)) == 1
    assert content(folder) == before


def test_eval_only_on_other_tokens(train, whole):
    """Of another number, as the full mean."""
    found = set()
    for tokens in (900, 128, 0):
        out = train(whole, resume=checkpoint(whole, 12), eval_only=True, val_tokens=tokens)
        found.add(re.search(r"val_loss:([\d.]+)", out)[1])
    assert len(found) == 3


# --------------------------------------------------------------------------------------------------
# What is refused

SHAPING = dict(  # another value of each setting that shapes the curve
    train_seq_len=256,
    seqs_per_step=4,
    repeat=False,
    num_layers=8,
    num_heads=2,
    head_dim=32,
    model_dim=32,
    attention_free_layers=(1, 2, 3),
    num_iterations=13,
    cooldown_frac=0.5,
    max_window=128,
    embed_lr=0.16,
    head_lr=0.005,
    scalar_lr=0.03,
    muon_lr=0.04,
    seed=1,
    fp8="none",
)
OTHERS = [
    "train_files",
    "val_files",
    "val_tokens",
    "val_seq_len",
    "dtype",
    "coordinate_descent_tuning",
    "val_loss_every",
    "sample",
    "timeout",
    "save_every",
    "keep",
    "resume",
    "eval_only",
    "log_dir",
    "run_id",
]


def test_of_each_setting_it_is_known_whether_it_shapes_the_curve():
    """A new one has to be put into one of the two lists above, and is tested there."""
    known = [*SHAPING, *OTHERS]
    assert sorted(known) == sorted(train_gpt.Hyperparameters.__dataclass_fields__)


@pytest.mark.parametrize("name", SHAPING)
def test_another_curve_is_refused(name, train, copied):
    """The setting is named, with both values; and nothing has been written."""
    folder = copied(5)
    before = content(folder)
    said = train(folder, 2, resume=checkpoint(folder, 5), **{name: SHAPING[name]})
    theirs = getattr(train_gpt.parse_arguments(as_flags(**SMALL))[0], name)
    for word in (f"--{name} ", str(theirs), str(SHAPING[name])):
        assert word in said
    assert content(folder) == before


def other_vocabulary(files):
    for path in files:
        content = bytearray(path.read_bytes())
        content[12:16] = np.array([258], dtype="<i4").tobytes()
        path.write_bytes(content)


def other_size(files):
    content = bytearray(files[1].read_bytes() + b"\1\0")
    content[8:12] = np.array([7002], dtype="<i4").tobytes()
    files[1].write_bytes(content)


def more_files(files):
    shutil.copy(files[0], files[0].with_name("train_2.bin"))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (other_vocabulary, ["vocabulary", "257", "258"]),
        (other_size, ["train_1.bin", "7001", "7002"]),
        (more_files, ["train_2.bin", "9000"]),
    ],
)
def test_other_shards_are_refused(spoil, words, train, shards, copied, tmp_path):
    folder = copied(5)
    other = tmp_path / "other"
    shutil.copytree(shards["train_files"].parent, other)
    spoil(sorted(other.iterdir()))
    files = dict(train_files=other / "train_*.bin", val_files=other / "val_*.bin")
    train(tmp_path / "fresh", **files, num_iterations=1)  # nothing is wrong with them
    for mode in (dict(), dict(eval_only=True)):
        said = train(folder, 2, resume=checkpoint(folder, 5), **files, **mode)
        assert all(word in said for word in words)


def test_other_activations_are_refused(train, copied):
    folder = copied(5)
    said = train(folder, 2, resume=checkpoint(folder, 5), dtype="bfloat16")
    assert "float32" in said and "bfloat16" in said


def newer_format(path):
    torch.save(torch.load(path, weights_only=True) | dict(format=3), path)


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def altered(path):
    """A byte of the largest member, which torch.load would read without a word."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[member.header_offset + 200 + member.file_size // 2] ^= 16
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def empty(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def text(path):
    path.write_text("step 5\n")


def another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "step 5\n")


@pytest.mark.parametrize(
    "spoil", [newer_format, truncated, altered, empty, missing, a_folder, text, another_zip]
)
def test_checkpoint_that_is_not_whole_is_refused(spoil, train, copied):
    folder = copied(5, 10)
    spoil(checkpoint(folder, 5))
    before = content(folder)
    for mode in (dict(), dict(eval_only=True)):
        said = train(folder, 2, resume=checkpoint(folder, 5), **mode)
        assert str(checkpoint(folder, 5)) in said
        assert ("format 3" in said) == (spoil is newer_format)
    assert content(folder) == before


def first_rows(leaf):
    return leaf[:1] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf


STRANGE = dict(
    list=lambda whole: [1, 2, 3],
    number=lambda whole: 3,
    tensor=lambda whole: torch.zeros(3),
    empty=lambda whole: {},
    weights=lambda whole: whole["network"],
    smaller=lambda whole: tree_map(first_rows, whole),
    later=lambda whole: whole | dict(step=13),
    no_step=lambda whole: whole | dict(step="five"),
)


def without(name):
    return lambda whole: {key: value for key, value in whole.items() if key != name}


for key in [
    "format",
    "step",
    "run_id",
    "ms",
    "best",
    "position",
    "curve",
    "network",
    "adam",
    "muon",
    "random",
]:
    STRANGE[f"without {key}"] = without(key)


@pytest.mark.parametrize("what", STRANGE)
def test_what_torch_reads_and_is_no_checkpoint_of_ours_is_refused(what, train, copied, recwarn):
    folder = copied(5)
    path = checkpoint(folder, 5)
    torch.save(STRANGE[what](torch.load(path, weights_only=True)), path)
    before = (folder / "run.txt").read_text()
    for mode in (dict(), dict(eval_only=True)):
        assert str(path) in train(folder, 2, resume=path, **mode)
    assert (folder / "run.txt").read_text().startswith(before)
    assert not recwarn.list  # they would be further lines on stderr


class Runs:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


def save_legacy(thing, path):
    torch.save(thing, path, _use_new_zipfile_serialization=False)


def save_pickle(thing, path):
    path.write_bytes(pickle.dumps(thing))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
def test_checkpoint_that_would_run_code_is_refused_and_runs_none(
    save, wrapped, train, copied, tmp_path, monkeypatch, recwarn
):
    folder = copied(5)
    path, mark = checkpoint(folder, 5), tmp_path / "mark"
    monkeypatch.setenv("MARK", str(mark))
    whole = torch.load(path, weights_only=True)
    save(whole | dict(extra=Runs()) if wrapped else Runs(), path)
    for mode in (dict(), dict(eval_only=True)):
        assert str(path) in train(folder, 2, resume=path, **mode)
        assert not mark.exists()
    assert not recwarn.list
    pickle.loads(pickle.dumps(Runs()))
    assert mark.exists()  # as it would have been


# --------------------------------------------------------------------------------------------------
# 200 random changes of a checkpoint, and of a shard


def change(draw, content, other):
    """A byte altered, the end cut off, or a part replaced by one of the other, or moved."""
    kind = draw.choice(["flip"] * 4 + ["cut", "move", "other", "other"])
    at = draw.randrange(len(content))
    size = draw.randint(1, len(content) // 3)
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ draw.randrange(1, 256)]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "other":
        return content[:at] + other[at : at + size] + content[at + size :]
    rest = content[:at] + content[at + size :]
    there = draw.randrange(len(rest))
    return rest[:there] + content[at : at + size] + rest[there:]


def test_no_change_of_a_checkpoint_is_read_wrongly(train, copied):
    """200 of them: each is refused with one sentence, or what is read is what was written.

    The latter where it concerns a part of the archive that says nothing, as between its members.
    """
    folder, draw = copied(5, 10), random.Random(1)
    path, spare = checkpoint(folder, 5), checkpoint(folder, 10)
    good, other = path.read_bytes(), spare.read_bytes()
    expected = torch.load(path, weights_only=True)
    refused = 0
    for number in range(200):
        changed = good
        while changed == good:  # parts can be equal
            changed = change(draw, good, other)
        path.write_bytes(changed)
        try:
            found = train_gpt.read_checkpoint(path)
        except train_gpt.UserError:
            refused += 1
            if number % 8 == 0:
                assert path.stem in train(folder, 2, resume=path, eval_only=True)
                os.utime(spare, (10**9, 10**9))
                assert f"of {spare}\n" in train(folder, resume="auto", eval_only=True)
        else:
            assert_identical({name: found[name] for name in expected}, expected)
    assert 150 < refused < 200
    path.write_bytes(good)
    assert f"of {path}\n" in train(folder, resume="auto", eval_only=True)


def changed_shard(draw, kind, good):
    """A byte altered that says something or a zero, a number replaced, cut off, or longer."""
    header = np.frombuffer(good[:1024], dtype="<i4").copy()
    at = draw.randrange(16) if kind == 0 else draw.randrange(16, 1024)
    if kind < 2:
        return good[:at] + bytes([good[at] ^ draw.randrange(1, 256)]) + good[at + 1 :]
    if kind == 2:
        field = draw.randrange(4)
        numbers = {-1, 0, 1, 2, 256, 258, 7000, 9001, 50257, 65536, 20240520} - {int(header[field])}
        header[field] = draw.choice(sorted(numbers))
        return header.tobytes() + good[1024:]
    if kind == 3:
        return good[: draw.randrange(len(good))]
    return good + draw.randbytes(draw.randint(1, 300))


def test_no_change_of_a_shards_header_or_length_is_trained_on(train, shards, copied, tmp_path):
    """By a run from the beginning, or by one that is resumed: 200 changes.

    None of them can give another good shard: magic number and version are fixed, the length has to
    be the header's, the vocabulary is that of all shards, and the rest is zeros.
    """
    folder, draw, other = copied(5), random.Random(2), tmp_path / "other"
    shutil.copytree(shards["train_files"].parent, other)
    paths = sorted(other.iterdir())
    files = dict(train_files=other / "train_*.bin", val_files=other / "val_*.bin")
    for number in range(200):
        path = draw.choice(paths)
        good = path.read_bytes()
        path.write_bytes(changed_shard(draw, number % 5, good))
        resumed = dict(resume=checkpoint(folder, 5), eval_only=True)
        for mode in (resumed, dict(num_iterations=1, run_id=f"fresh{number}")):
            said = train(folder, 2, **files, **mode)
            assert path.name in said or "vocabular" in said
        path.write_bytes(good)
    train(folder, resume=checkpoint(folder, 5), eval_only=True, **files)
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run.txt"]


# --------------------------------------------------------------------------------------------------
# Signals to this process


def send(number):
    """A signal that the run receives before this returns."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), number)
    time.sleep(0.1)


def before_step(monkeypatch, step, accident):
    """Let something happen in a step, of those that this process takes the first one being 1."""
    function, calls = train_gpt.training_step, [-2]  # there are two in the warm-up

    def observed(*args):
        calls[0] += 1
        if calls[0] == step:
            accident()
        return function(*args)

    monkeypatch.setattr(train_gpt, "training_step", observed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_signal_ends_the_run_after_the_step(number, step, train, whole, tmp_path, monkeypatch):
    """With a checkpoint, a validation where one is due, and the flag that goes on from there."""
    before_step(monkeypatch, step, lambda: send(number))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    said = train(tmp_path, 128 + number, save_every=100)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert f"stopped by {number.name} after step {step} of 12" in said
    assert steps(tmp_path) == until_step(step, steps(whole))
    assert saved_steps(tmp_path) == [step]
    monkeypatch.undo()
    resume = re.search(r"--resume (\S+)\.$", said)[1]
    train(tmp_path, resume=resume, save_every=100)
    assert_same_run(tmp_path, whole)


def test_signal_without_save_every_saves_nothing_and_says_so(train, tmp_path, monkeypatch):
    before_step(monkeypatch, 3, lambda: send(signal.SIGTERM))
    said = train(tmp_path, 143)
    assert "--resume" not in said and "nothing is saved, for want of --save_every" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]
    assert "step:3/12" in steps(tmp_path)[-1]


def test_signal_in_the_last_step_is_not_early(train, whole, tmp_path, monkeypatch):
    before_step(monkeypatch, 12, lambda: send(signal.SIGTERM))
    train(tmp_path, save_every=100)
    assert_same_run(tmp_path, whole)


# --------------------------------------------------------------------------------------------------
# A loss that is not finite


def not_finite_in_step(monkeypatch, step, value=math.nan):
    function, calls = train_gpt.training_step, [-2]

    def observed(*args):
        calls[0] += 1
        loss = function(*args)
        return torch.full_like(loss, value) if calls[0] == step else loss

    monkeypatch.setattr(train_gpt, "training_step", observed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run(value, train, whole, tmp_path, monkeypatch):
    """With the step, its tokens, their file, and the checkpoint to go back to."""
    not_finite_in_step(monkeypatch, 6, value)
    said = train(tmp_path, 2, save_every=3)
    assert str(checkpoint(tmp_path, 3)) in said and "train_1.bin" not in said
    for word in (f"step 6 is {value}", "sequences 10 to 11", "tokens 1280 to 1535", "train_0.bin"):
        assert word in said
    assert saved_steps(tmp_path) == [3]
    assert steps(tmp_path)[:-1] == until_step(5, steps(whole))
    assert steps(tmp_path)[-1] == f"step:6/12 train_loss:{value}"
    monkeypatch.undo()
    train(tmp_path, resume="auto", save_every=3)
    assert_same_run(tmp_path, whole)


def test_validation_that_is_not_finite_ends_the_run(train, tmp_path, monkeypatch):
    """Before its checkpoint is written."""
    losses = iter([5.0, math.nan])
    monkeypatch.setattr(train_gpt, "validate", lambda *_: next(losses))
    said = train(tmp_path, 2, save_every=2)
    assert "step 4 is nan" in said and str(checkpoint(tmp_path, 2)) in said
    assert saved_steps(tmp_path) == [2]


@pytest.mark.parametrize("step, found", [(2, "0"), (3, "012"), (4, "2"), (5, "20")])
def test_tokens_that_run_across_shards_are_in_all_of_these(
    step, found, train, tmp_path, monkeypatch
):
    """However short one is; and after the last token, the 1,250th, the first comes again."""
    files = machine_with_shards(tmp_path / "short", (700, 50, 500))
    not_finite_in_step(monkeypatch, step)
    said = train(tmp_path, 2, **files, val_loss_every=0)
    tokens = f"tokens {(step - 1) * 256} to {step * 256 - 1}"
    assert f"step {step} " in said and tokens in said and "the last checkpoint: none" in said
    assert re.findall(r"train_(\d).bin", said) == list(found)


@pytest.mark.parametrize("rate", ["embed_lr", "head_lr", "scalar_lr", "muon_lr"])
def test_no_checkpoint_has_numbers_that_are_not_finite(rate, train, tmp_path):
    """With a rate that no network survives. The step that spoils it has a good loss itself."""
    said = train(tmp_path, 2, save_every=1, keep=100, **{rate: 1e38})
    assert "the loss of step" in said
    for path in tmp_path.glob("run/*.pt"):
        for leaf in tree_leaves(torch.load(path, weights_only=True)):
            assert not isinstance(leaf, torch.Tensor) or leaf.isfinite().all(), path


# --------------------------------------------------------------------------------------------------
# Real processes


class Forked:
    """A run of one or more processes of their own, which is watched over as torchrun does."""

    def __init__(self, ask, folder, flags, processes, script, environment, out):
        self.folder, self.ask = folder, ask
        said = folder / "said"
        said.mkdir(parents=True, exist_ok=True)
        number = len(list(said.glob("*.0.err")))
        self.outs = [out or said / f"{number}.{rank}.out" for rank in range(processes)]
        self.errs = [said / f"{number}.{rank}.err" for rank in range(processes)]
        place = {}
        if processes > 1:  # they meet at a launcher's store
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place = dict(
                WORLD_SIZE=processes,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=self.store.port,
                TORCHELASTIC_USE_AGENT_STORE=True,
                TORCHELASTIC_RESTART_COUNT=0,
            )
        self.codes, self.ids, self.asked_to_end = {}, [], False
        for rank, (stdout, stderr) in enumerate(zip(self.outs, self.errs, strict=True)):
            stderr.touch()
            if processes > 1:
                place |= dict(RANK=rank, LOCAL_RANK=rank)
            question = dict(script=str(script), flags=flags, environment=place | environment)
            self.ids.append(ask(question | dict(out=str(stdout), errors=str(stderr))))

    @property
    def log(self):
        path = self.folder / "logs" / "run.txt"
        return path.read_text() if path.exists() else ""

    @property
    def errors(self):
        return "".join(file.read_text() for file in self.errs)

    @property
    def printed(self):
        return self.outs[0].read_text() if self.outs[0].exists() else ""

    def has_ended(self):
        """Whether all have; when one has failed, the others are asked to end."""
        for process in self.ids:
            if process not in self.codes:
                code = self.ask(process)
                if code is not None:
                    self.codes[process] = code
        if any(self.codes.values()) and not self.asked_to_end:
            self.asked_to_end = True
            self.send(signal.SIGTERM)
        return len(self.codes) == len(self.ids)

    def until(self, true):
        """Wait until something is the case, while the run goes on."""
        polled(lambda: true() or self.has_ended(), "the run does not get there")
        assert true(), (self.codes, self.errors)
        return self

    def until_step(self, step):
        """Wait until this run, and not one before that had the same log, has reached a step."""
        return self.until(lambda: f"\nstep:{step}/" in self.printed)

    def send(self, number, *ranks):
        for rank in ranks or range(len(self.ids)):
            if self.ids[rank] not in self.codes:
                os.kill(self.ids[rank], number)
        return self

    def end(self):
        """Wait for the exit codes."""
        polled(self.has_ended, "the run does not end")
        return [self.codes[process] for process in self.ids]


@pytest.fixture(scope="module")
def forks(shards):
    """A function that starts a run in a folder, with the small settings and some others.

    Whatever is left of it at the end is ended.
    """
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forked.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    started = []

    def ask(question):
        server.stdin.write(json.dumps(question) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def start(folder, processes=1, script=SCRIPT, out=None, environment=None, **settings):
        places = dict(log_dir=folder / "logs", run_id="run")
        flags = as_flags(**SMALL | shards | places | settings)
        started.append(Forked(ask, folder, flags, processes, script, environment or {}, out))
        return started[-1]

    yield start
    for run in started:
        run.has_ended()
        run.send(signal.SIGKILL)
    server.stdin.close()
    server.wait(LIMIT)


def newest(folder):
    """The step of the newest checkpoint."""
    steps = [int(path.stem[5:]) for path in (folder / "logs" / "run").glob("step_*.pt")]
    return max(steps, default=0)


def unfinished(folder):
    """What there is of a checkpoint that is being written, or that a run was killed over."""
    with contextlib.suppress(FileNotFoundError):
        found = (folder / "logs" / "run" / "unfinished").stat()
        return {(found.st_ino, found.st_mtime_ns)}
    return set()


def kill_often(forks, folder, kills, draw, **settings):
    """Start a run and kill it with SIGKILL, again and again.

    Some time after its start, some steps further than before, or then in the next save. Returns how
    many of these left a checkpoint that was not whole.
    """
    in_a_save = 0
    for number in range(kills):
        before, run = unfinished(folder), forks(folder, resume="auto", **settings)
        if number % 4 == 0:
            time.sleep(draw.uniform(0, 0.4))
        else:
            run.until_step(newest(folder) + draw.randint(1, 3))
            if number % 4 > 1:
                run.until(lambda before=before: unfinished(folder) - before)
            else:
                time.sleep(draw.uniform(0, 0.02))
        run.send(signal.SIGKILL)
        assert set(run.end()) == {-signal.SIGKILL}, (number, run.errors)
        assert not run.errors
        in_a_save += bool(unfinished(folder) - before)
    return in_a_save


def run_to_the_end(forks, folder, **settings):
    run = forks(folder, **settings)
    assert set(run.end()) == {0} and not run.errors, run.errors
    return folder / "logs"


@pytest.mark.parametrize("kills, threads, length", [(20, 1, 80), (3, 2, 30)])
def test_run_that_is_killed_often_is_the_one_that_was_not(kills, threads, length, forks, tmp_path):
    """Bit for bit, at random moments, saving included, by the same command each time."""
    environment = dict(OMP_NUM_THREADS=threads)
    settings = dict(num_iterations=length, save_every=2, environment=environment)
    reference = run_to_the_end(forks, tmp_path / "reference", **settings)
    in_a_save = kill_often(forks, tmp_path, kills, random.Random(threads), **settings)
    assert 0 < newest(tmp_path) < length - 4 and (kills < 20 or in_a_save > 2)
    assert_same_run(run_to_the_end(forks, tmp_path, resume="auto", **settings), reference)
    assert saved_steps(tmp_path / "logs") == [length - 2, length]


def test_two_processes_that_are_killed(forks, tmp_path):
    """Both, bit for bit; and each process's momentum was in the checkpoint of the first."""
    settings = dict(processes=2, num_iterations=36, save_every=2, timeout=30)
    reference = run_to_the_end(forks, tmp_path / "reference", **settings)
    kill_often(forks, tmp_path, 5, random.Random(3), **settings)
    assert 0 < newest(tmp_path) < 32
    assert_same_run(run_to_the_end(forks, tmp_path, resume="auto", **settings), reference)


def losses(lines):
    return [float(line.rsplit(":", 1)[1]) for line in lines]


def test_run_that_goes_on_with_another_number_of_processes(forks, tmp_path):
    """From two to one, and from one to two: the curve of one, within rounding."""
    settings = dict(num_iterations=40, save_every=10, keep=9, timeout=30)
    alone = run_to_the_end(forks, tmp_path / "alone", **settings)
    killed = forks(tmp_path / "two", processes=2, **settings)
    killed.until(lambda: newest(killed.folder) >= 10).send(signal.SIGKILL).end()
    first = newest(killed.folder)
    for processes, begin, source in ((1, first, tmp_path / "two" / "logs"), (2, 20, alone)):
        resumed = dict(resume=checkpoint(source, begin), processes=processes)
        folder = run_to_the_end(forks, tmp_path / f"to{processes}", **settings, **resumed)
        found, expected = losses(steps(folder)), losses(after_step(begin, steps(alone)))
        assert len(found) >= 40 - begin and losses(steps(alone))[-1] < losses(steps(alone))[0] - 0.5
        assert found == pytest.approx(expected, abs=1.5e-4, rel=0)


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt
changes = 0
def die(event, arguments):
    "Before the process changes something in the run's folder for the AT-th time."
    global changes
    writes = event in ("os.rename", "os.remove", "os.mkdir")
    writes |= event == "open" and bool(set("wxa+") & set(arguments[1] or ""))
    if writes and (str(arguments[0]) + "/").startswith({folder!r}):
        changes += 1
        if changes == int(os.environ["AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
sys.exit(train_gpt.main())
"""


def test_run_that_dies_before_each_change_of_its_folder(forks, tmp_path):
    """The next start finds a whole checkpoint, and never an older one than there was."""
    script = tmp_path / "dies.py"
    script.write_text(DIES.format(root=str(ROOT), folder=f"{tmp_path}/logs/run/"))
    settings = dict(script=script, resume="auto", save_every=1, num_iterations=40)
    never = dict(AT=0)
    reference = run_to_the_end(forks, tmp_path / "reference", **settings, environment=never)
    before, left = 0, set()
    for at in range(1, 14):
        run = forks(tmp_path, **settings, environment=dict(AT=at))
        assert run.end() == [-signal.SIGKILL] and not run.errors
        assert newest(tmp_path) >= before
        before = newest(tmp_path)
        if before:
            train_gpt.read_checkpoint(checkpoint(tmp_path / "logs", before))
        left.add(bool(unfinished(tmp_path)))
    assert (
        left == {True, False} and 6 < before < 36
    )  # several saves, the later ones of which delete
    assert_same_run(run_to_the_end(forks, tmp_path, **settings, environment=never), reference)
    assert saved_steps(tmp_path / "logs") == [39, 40]


# --------------------------------------------------------------------------------------------------
# Signals to real processes

SIGNALLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train_gpt
now, looks = 0.0, 0
def monotonic():
    global looks
    looks += 1
    return now
def hang(*_, **__):
    "Send SIGNAL to oneself at each of these seconds, and wait for the end."
    global now
    time.monotonic = monotonic
    for second in os.environ["SECONDS"].split():
        before, now = looks, float(second)
        print("sent at", second, flush=True)
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        while looks == before:
            time.sleep(0.01)
        time.sleep(0.1)
    time.sleep(3600)
setattr(train_gpt, os.environ["WHERE"], hang)
sys.exit(train_gpt.main())
"""


@pytest.mark.parametrize(
    "where, number, seconds, settings",
    [
        ("warm_up", signal.SIGTERM, "0", {}),
        ("warm_up", signal.SIGINT, "0", {}),
        ("read_checkpoint", signal.SIGTERM, "0", dict(resume="nothing")),
        ("validate", signal.SIGTERM, "0", dict(eval_only=True)),
        ("validate", signal.SIGTERM, "0 0.9 2", {}),
        ("validate", signal.SIGINT, "0 0.9 2", {}),
        ("validate", signal.SIGTERM, "0 0.9 2", dict(processes=2)),
    ],
)
def test_process_that_ends_at_once(where, number, seconds, settings, forks, whole, tmp_path):
    """By the first signal where there is no step to finish, by one a second later in the steps.

    Of several processes torchrun tells the end, and they are silent.
    """
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT)))
    environment = dict(WHERE=where, SIGNAL=int(number), SECONDS=seconds)
    if "eval_only" in settings:
        settings = settings | dict(resume=checkpoint(whole, 8))
    run = forks(tmp_path, script=script, environment=environment, save_every=1, **settings)
    assert set(run.end()) == {128 + number}
    expected = "" if "processes" in settings else f"train_gpt.py: stopped by {number.name}.\n"
    assert run.errors == expected
    sent = [line.split()[-1] for line in run.printed.splitlines() if line.startswith("sent")]
    assert sent == seconds.split()
    assert not list(tmp_path.rglob("step_*.pt"))


def assert_stopped_after_one_step(log, said, folder, train):
    """One line in all, with a checkpoint of the log's last step, from which the run goes on."""
    (sentence,) = [line for line in said.splitlines() if line.startswith("train_gpt.py: ")]
    last = int(re.findall(r"^step:(\d+)/", log, re.MULTILINE)[-1])
    path = checkpoint(folder / "logs", last)
    assert f"after step {last} of " in sentence and sentence.endswith(f" --resume {path}.")
    out = train(folder / "logs", resume=path, eval_only=True, num_iterations=100000)
    assert f"\nstep:{last}/100000 val_loss" in f"\n{out}"
    assert 'File "' + str(SCRIPT) not in said


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_two_processes_of_which_some_are_asked_to_end(ranks, forks, train, tmp_path):
    run = forks(tmp_path, processes=2, **ENDLESS, timeout=30).until_step(4)
    codes = run.send(signal.SIGTERM, *ranks).end()
    assert 143 in codes and set(codes) <= {143, -signal.SIGTERM}
    assert_stopped_after_one_step(run.log, run.errors, tmp_path, train)


@pytest.fixture(scope="module")
def launched(shards, tmp_path_factory):
    """Runs of two processes by torchrun: to be ended as batch systems do it, and by a keyboard."""
    runs = []
    for name in ("batch", "keyboard"):
        folder = tmp_path_factory.mktemp(name)
        places = dict(log_dir=folder / "logs", run_id="run")
        flags = as_flags(**SMALL | ENDLESS | shards | places)
        runs.append(Started(folder, [torchrun(*flags)]))
    yield runs
    for run in runs:
        run.clear()


@pytest.mark.parametrize("index, stop", [(0, os.kill), (1, os.killpg)], ids=["batch", "keyboard"])
def test_torchrun_that_is_asked_to_end(index, stop, launched, train):
    """Which it passes on, also where all have been asked already: all stop after the same step."""
    run = launched[index].until("\nstep:4/")
    stop(run.launchers[0].pid, (signal.SIGTERM, signal.SIGINT)[index])
    run.end()
    assert all(run.codes) and not run.survivors
    assert_stopped_after_one_step(run.log, run.errors[0], run.folder, train)


# --------------------------------------------------------------------------------------------------
# Other ends of two processes


def test_two_processes_with_a_loss_that_is_not_finite(forks, tmp_path):
    run = forks(tmp_path, processes=2, save_every=1, embed_lr=1e38, timeout=30)
    assert run.end()[0] == 2 and all(run.codes.values())
    assert_one_sentence(run.errors)
    (step,) = re.findall(r"the loss of step (\d+)", run.errors)
    assert f"step:{step}/12 " in steps(tmp_path / "logs")[-1]


def test_two_processes_that_validate_a_checkpoint(forks, whole, tmp_path):
    """Of one process: the same loss, once."""
    before = content(whole)
    run = forks(tmp_path, processes=2, resume=checkpoint(whole, 8), eval_only=True)
    assert run.end() == [0, 0] and not run.errors
    found = without_times("".join(out.read_text() for out in run.outs))
    expected = [line for line in steps(whole) if line.startswith("step:8/12 val_loss")]
    assert len(found) == 1 and losses(found) == pytest.approx(losses(expected), abs=1.5e-4)
    assert not run.log and content(whole) == before


@pytest.mark.parametrize("settings", [dict(muon_lr=0.04), dict(resume="missing.pt")])
def test_two_processes_that_cannot_go_on_say_so_once(settings, forks, whole, tmp_path):
    run = forks(tmp_path, processes=2, **dict(resume=checkpoint(whole, 8)) | settings)
    assert run.end()[0] == 2 and all(run.codes.values())
    assert_one_sentence(run.errors)
    assert ("--muon_lr" if "muon_lr" in settings else "missing.pt") in run.errors and not run.log


# --------------------------------------------------------------------------------------------------
# Full disks


@contextlib.contextmanager
def room(size, process=0):
    """The largest size of a file that a process can write; more room is not on the disk."""
    limits = size, resource.RLIM_INFINITY
    before = resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


def test_disk_that_is_full_for_a_while(forks, train, tmp_path):
    """The training goes on; when there is room again, the missing lines and a checkpoint come."""
    os.mkfifo(tmp_path / "out")  # no file, so that it has no limit
    out = os.fdopen(os.open(tmp_path / "out", os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0)
    printed = bytearray()

    def reached():
        """The last step that was printed."""
        with contextlib.suppress(BlockingIOError):
            printed.extend(out.read() or b"")
        return max(map(int, re.findall(rb"\nstep:(\d+)/", bytes(printed))), default=0)

    run = forks(tmp_path, out=tmp_path / "out", **ENDLESS)
    run.until(lambda: reached() > 7 and newest(tmp_path))
    with room(len(run.log) + 100, run.ids[0]):
        target = reached() + 20
        run.until(lambda: reached() > target)
        saved, length = newest(tmp_path), len(run.log)
        run.until(lambda: reached() > target + 10)
        assert newest(tmp_path) == saved and len(run.log) == length  # nothing more is written
        assert complaints(run.errors) == ["checkpoint", "log"]
    run.until(lambda: reached() and newest(tmp_path) > saved)
    last = newest(tmp_path) + 7
    run.until(lambda: reached() > last)
    run.send(signal.SIGTERM)
    polled(lambda: reached() and run.has_ended(), "the run does not end")
    assert run.end() == [143]
    end = run.errors.index("train_gpt.py: stopped")
    assert complaints(run.errors[:end]) == ["checkpoint", "log"]
    assert_stopped_after_one_step(run.log, run.errors[end:], tmp_path, train)
    line = r"^step:(\d+)/\d+ train_time:\d+ms step_avg:[\d.]+ms train_loss:\d\.\d{4}$"
    trained = [int(step) for step in re.findall(line, run.log, re.MULTILINE)]
    assert trained == list(range(1, len(trained) + 1)) and len(trained) > last
    assert len(saved_steps(tmp_path / "logs")) == 2


@pytest.mark.parametrize("stop", [False, True])
def test_disk_that_stays_full(stop, shards, whole, tmp_path, capfd, monkeypatch):
    """From the beginning to the end: said once of each, and the run ends as it would have.

    When it is stopped it says that nothing is saved, and not for want of the flag.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if stop:
        before_step(monkeypatch, 3, lambda: send(signal.SIGTERM))
    capfd.readouterr()
    places = dict(log_dir=tmp_path, run_id="run", save_every=2)
    with room(50000):
        code = train_gpt.main(as_flags(**SMALL | shards | places))
    printed = capfd.readouterr()
    said = printed.err.splitlines(keepends=True)
    if stop:
        last = said.pop()
        assert "nothing is saved" in last and "--resume" not in last and "want" not in last
    assert code == (143 if stop else 0)
    assert complaints("".join(said)) == ["checkpoint", "log"]
    assert without_times(printed.out) == until_step(3 if stop else 12, steps(whole))
    assert not list((tmp_path / "run").glob("*"))
    assert (tmp_path / "run.txt").stat().st_size <= 50000


@pytest.mark.parametrize("processes", [1, 2])
def test_stdout_on_a_full_device_does_not_end_the_training(processes, forks, whole, tmp_path):
    run = forks(tmp_path, out="/dev/full", processes=processes, save_every=6)
    assert run.end() == [0] * processes, run.errors
    assert re.fullmatch(r"train_gpt\.py: standard output cannot be written \(.*\n", run.errors)
    assert len(steps(tmp_path / "logs")) == len(steps(whole)) and "\npeak memory" in run.log
    assert saved_steps(tmp_path / "logs") == [6, 12]
