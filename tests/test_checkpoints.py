"""Checkpoints, and ends before the last step: a run that is resumed is the run that was not interrupted, bit for bit, wherever it
was killed; what is damaged, or of another run, is refused with one sentence; signals, losses that are not finite, and full disks
end as they should, or do not end anything. Processes that are killed are real ones, forked by forked.py."""

import contextlib
import hashlib
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
import threading
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import train_gpt
from conftest import ROOT
from test_distributed import FORKED, OBSERVED, SCRIPT, Started, machine_with_shards, torchrun
from test_distributed import SMALL as SMALLEST
from test_run import as_flags, assert_identical

LIMIT = 120  # seconds, after which a test fails

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes and takes their room on the disk as Linux lets it")

SMALL = SMALLEST | dict(seqs_per_step=2, num_iterations=12, val_loss_every=4)
ENDLESS = dict(num_iterations=100000, save_every=5)


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


# ---------------------------------------------------------------------------------------------------------
# Runs in this process, and what they leave


@pytest.fixture(scope="module")
def train(shards):
    """A function that runs main in this process, with the small settings and some others, and returns what it printed. With a code
    other than 0 there has to be one sentence on stderr, which is returned instead; otherwise there has to be nothing."""
    def run(folder, code=0, **settings):
        out, err = io.StringIO(), io.StringIO()
        flags = as_flags(**SMALL | shards | dict(log_dir=folder, run_id="run") | settings)
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              unittest.mock.patch.object(torch.cuda, "is_available", lambda: False)):
            ended = train_gpt.main(flags)
        assert ended == code, (ended, err.getvalue())
        if code:
            assert_one_sentence(err.getvalue())
            return err.getvalue()
        assert not err.getvalue()
        return out.getvalue()
    return run


def complaints(said):
    lines = said.splitlines()
    assert all(line.startswith("train_gpt.py: ") and "cannot be written" in line for line in lines), said
    return ["checkpoint" if "checkpoint" in line else "log" for line in lines]


def assert_one_sentence(text):
    """But for those that say what could not be written meanwhile, each once."""
    *before, text = text.splitlines(keepends=True) or [""]
    assert len(complaints("".join(before))) == len(set(complaints("".join(before))))
    assert text.startswith("train_gpt.py: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert text[:-1].isprintable(), text


def checkpoint(folder, step):
    return folder / "run" / f"step_{step:08d}.pt"


def listed(path):
    """Write the manifest that makes a file a whole checkpoint, whatever it is."""
    content = path.read_bytes()
    path.with_suffix(".json").write_text(json.dumps(dict(format=1, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())))
    return path


def is_whole(path):
    """By the test's own reading of the manifest."""
    said = json.loads(path.with_suffix(".json").read_text())
    content = path.read_bytes()
    return said == dict(format=1, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def saved_steps(folder):
    """The steps of which there are whole checkpoints, after a look at everything in the run's folder."""
    names = sorted(path.name for path in (folder / "run").iterdir())
    steps = [int(re.fullmatch(r"step_(\d{8})\.pt", name)[1]) for name in names if name.endswith(".pt")]
    assert names == sorted(f"step_{step:08d}{suffix}" for step in steps for suffix in (".pt", ".json"))
    assert all(is_whole(checkpoint(folder, step)) for step in steps)
    return steps


def course(path):
    """What a checkpoint holds, but for times, and what it says of the log and of how it was made."""
    aside = "ms", "best", "run_id", "made"
    return {name: value for name, value in torch.load(path, weights_only=True).items() if name not in aside}


def assert_same_checkpoint(path, other):
    """Bit for bit: weights, what the optimizers remember, random state, position in the data."""
    ours = course(path)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(ours)) > 50
    assert_identical(ours, course(other))


TIMES = re.compile(r" train_time:\d+ms step_avg:[\d.]+ms")


def steps(folder, name="run"):
    """The lines of steps and validations in a log, without their times."""
    return [TIMES.sub("", line) for line in (folder / f"{name}.txt").read_text().splitlines() if line.startswith("step:")]


def closing(folder, name="run"):
    """What the last lines say of the whole run, times and memory aside."""
    return re.findall(r"passes over the training tokens: [\d.]+, lowest validation loss [\d.]+", (folder / f"{name}.txt").read_text())


def assert_same_run(folder, other, step=None):
    """To its end: the log, each line once, and the last checkpoint."""
    assert steps(folder) == steps(other)
    assert closing(folder)[-1:] == closing(other) and len(closing(other)) == 1
    times = [int(text) for text in re.findall(r"^step:.* train_time:(\d+)ms", (folder / "run.txt").read_text(), re.MULTILINE)]
    assert times == sorted(times)
    last = max(path for path in (other / "run").glob("*.pt"))
    assert_same_checkpoint(folder / "run" / last.name, last)


def content(folder):
    """All files below a folder, with what is in them and when they were changed."""
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The log folder of a run that was not interrupted, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, save_every=1, keep=100, sample=30)
    assert saved_steps(folder) == list(range(1, 13))
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A function that gives the test a copy of that run's folder, with the checkpoints of some steps alone."""
    def copy(*kept):
        shutil.copytree(whole, folder := tmp_path / "logs")
        for path in (folder / "run").iterdir():
            if int(path.stem[5:]) not in kept:
                path.unlink()
        return folder
    return copy


# ---------------------------------------------------------------------------------------------------------
# Which are written, and when


@pytest.mark.parametrize("every, keep, expected", [(0, 2, None), (5, 2, [10, 12]), (4, 9, [4, 8, 12]), (1, 1, [12]), (100, 2, [12])])
def test_checkpoints_of_multiples_and_the_last_step_of_which_the_newest_stay(every, keep, expected, train, whole, tmp_path):
    train(tmp_path, save_every=every, keep=keep)
    assert steps(tmp_path) == steps(whole)  # whatever is saved
    if expected is None:
        assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]
    else:
        assert saved_steps(tmp_path) == expected
        for step in expected:
            assert_same_checkpoint(checkpoint(tmp_path, step), checkpoint(whole, step))


def test_writing_goes_on_beside_the_training(train, whole, tmp_path, monkeypatch):
    """Nothing is written before another step is over, which could not be if the training waited; and what is written then is the
    state before that step."""
    taken, next_batch, save = threading.Condition(), train_gpt.DistributedDataLoader.next_batch, torch.save
    batches = []

    def observed(loader):
        with taken:
            batches.append(loader.position)
            taken.notify_all()
        return next_batch(loader)

    def slow(state, *args, **kwargs):
        assert threading.current_thread() is not threading.main_thread()
        with taken:
            assert taken.wait_for(lambda: len(batches) > 2 * state["step"] + 2 or state["step"] == 12, 30)
        return save(state, *args, **kwargs)

    monkeypatch.setattr(train_gpt.DistributedDataLoader, "next_batch", observed)
    monkeypatch.setattr(torch, "save", slow)
    train(tmp_path, save_every=3, keep=9)
    assert len(batches) == 24 and saved_steps(tmp_path) == [3, 6, 9, 12]
    for step in (3, 6, 9, 12):
        assert_same_checkpoint(checkpoint(tmp_path, step), checkpoint(whole, step))


def test_clock_stands_still_while_saving(train, tmp_path, monkeypatch):
    """A copy of the state that takes an hour, by a clock that nothing else moves but a step: one second."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*args):
            now[0] += seconds
            return function(*args)
        monkeypatch.setattr(owner, name, slow)
    takes(torch.optim.Optimizer, "state_dict", 3600)  # of which no checkpoint can do without
    takes(train_gpt, "training_step", 1)
    train(tmp_path, save_every=1)
    assert now[0] > 12 * 3600
    found = re.findall(r"^step:(\d+)/12 .*train_time:(\d+)ms", (tmp_path / "run.txt").read_text(), re.MULTILINE)
    assert len(found) == 16 and all(int(milliseconds) == 1000 * int(step) for step, milliseconds in found)
    now[0] = 10**6
    train(tmp_path, resume=checkpoint(tmp_path, 11))
    assert " train_time:12000ms step_avg:1000.00ms train_loss" in (tmp_path / "run.txt").read_text()


# ---------------------------------------------------------------------------------------------------------
# Resuming: the same run


@pytest.mark.parametrize("step", [1, 4, 7, 11, 12])
def test_resumed_run_is_the_one_that_was_not_interrupted(step, train, whole, copied):
    """Its log and its checkpoints, from any step on; lines that the log had after the checkpoint are there once."""
    folder = copied(step)
    path = checkpoint(folder, step)
    out = train(folder, resume=path, save_every=1, keep=100, sample=30)
    assert_same_run(folder, whole)
    assert saved_steps(folder) == list(range(step, 13))
    for later in range(step, 13):
        assert_same_checkpoint(checkpoint(folder, later), checkpoint(whole, later))
    assert [TIMES.sub("", line) for line in out.splitlines() if line.startswith("step:")] == [
        line for line in steps(whole) if int(line[5:].split("/")[0]) > step]
    log = (folder / "run.txt").read_text()
    assert log.count(f"resumed from {path}\n") == 1
    assert log.startswith(SCRIPT.read_text())
    assert log.split("\nsample: ")[-1] == (whole / "run.txt").read_text().split("\nsample: ")[-1]  # the sample at the end, too


@pytest.mark.parametrize("settings", [dict(dtype="bfloat16"), dict(seqs_per_step=8, repeat=False), dict(seed=3, fp8="none")])
def test_resumed_run_of_other_settings(settings, train, tmp_path):
    """Other activations, more micro-steps, no second pass over the tokens."""
    train(tmp_path / "whole", **settings, save_every=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    train(tmp_path / "resumed", **settings, save_every=5, resume=checkpoint(tmp_path / "resumed", 10))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_run_resumed_twice(train, whole, copied):
    folder = copied(3)
    for step in (3, 8):
        train(folder, resume=checkpoint(folder, step), save_every=1, keep=100)
    assert_same_run(folder, whole)


def test_settings_that_do_not_shape_the_course_may_differ(train, shards, whole, copied, tmp_path):
    """All of them at once, and shards that lie elsewhere."""
    folder = copied(5)
    shutil.copytree(shards["train_files"].parent, tmp_path / "elsewhere")
    train(tmp_path / "new", resume=checkpoint(folder, 5), train_files=tmp_path / "elsewhere" / "train_?.bin",
          val_files=tmp_path / "elsewhere" / "val*.bin", val_tokens=500, val_seq_len=128, val_loss_every=3, sample=4, timeout=77,
          save_every=7, keep=1, coordinate_descent_tuning=True)
    assert saved_steps(tmp_path / "new") == [12]
    assert_same_checkpoint(checkpoint(tmp_path / "new", 12), checkpoint(whole, 12))
    trained = [line for line in steps(whole) if "train_loss" in line]
    assert [line for line in steps(tmp_path / "new") if "train_loss" in line] == trained[5:]


def test_without_a_run_id_it_is_the_checkpoints(train, whole, copied):
    folder = copied(6)
    train(folder, resume=checkpoint(folder, 6), run_id="")
    assert all(path.name.startswith("run") for path in folder.iterdir())
    assert steps(folder) == steps(whole)


def test_another_run_id_leaves_the_first_run_alone(train, whole, copied):
    """Its log begins with its own header."""
    folder = copied(6)
    before = content(folder)
    train(folder, resume=checkpoint(folder, 6), run_id="branch", save_every=6)
    assert {path: found for path, found in content(folder).items() if "branch" not in str(path)} == before
    assert (folder / "branch.txt").read_text().startswith(SCRIPT.read_text())
    assert steps(folder, "branch") == [line for line in steps(whole) if int(line[5:].split("/")[0]) > 6]
    assert_same_checkpoint(folder / "branch" / "step_00000012.pt", checkpoint(whole, 12))


# ---------------------------------------------------------------------------------------------------------
# --resume auto


def test_auto_begins_where_there_is_nothing(train, whole, tmp_path):
    train(tmp_path / "logs", resume="auto", save_every=1)
    assert_same_run(tmp_path / "logs", whole)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["run", "run.txt"]


def test_auto_begins_again_after_a_run_that_was_cut_before_its_first_checkpoint(train, tmp_path, monkeypatch):
    """However often, and at whatever speed: no log is lost."""
    monkeypatch.setattr(time, "strftime", lambda form, *_, strftime=time.strftime: strftime(form, time.gmtime(0)))
    for number in range(3):
        with open(tmp_path / "run.txt", "a") as log:
            log.write(f"cut {number}\n")
        train(tmp_path, resume="auto", num_iterations=1)
        assert [line[:9] for line in steps(tmp_path)] == ["step:0/1 ", "step:1/1 ", "step:1/1 "]
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert len(kept) == 4 and [sum(f"cut {number}\n" in text for text in kept) for number in range(3)] == [1, 1, 1]


def test_auto_takes_the_newest_checkpoint(train, whole, copied):
    folder = copied(2, 7, 10)
    assert f"resumed from {checkpoint(folder, 10)}" in train(folder, resume="auto", save_every=1)
    assert_same_run(folder, whole)
    assert saved_steps(folder) == [11, 12]  # by --keep, of the earlier ones too


def test_auto_passes_over_what_is_not_whole(train, whole, copied):
    """Truncated, altered, without its other half, unfinished: as a run or a disk leaves it that dies."""
    folder = copied(5, 7, 8, 9, 10, 11, 12)
    os.truncate(checkpoint(folder, 12), 1000)
    checkpoint(folder, 11).with_suffix(".json").unlink()
    altered = bytearray(checkpoint(folder, 10).read_bytes())
    altered[len(altered) // 2] ^= 1
    checkpoint(folder, 10).write_bytes(altered)
    checkpoint(folder, 9).unlink()
    checkpoint(folder, 8).with_suffix(".json").write_text("")
    (folder / "run" / "unfinished").write_bytes(bytes(999))
    out = train(folder, resume="auto", save_every=1)
    assert f"resumed from {checkpoint(folder, 7)}" in out
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
    """A run that was resumed from an earlier checkpoint than its newest, and was stopped again, goes on without a gap in its log."""
    folder = copied(4, 8, 12)
    before_step(monkeypatch, 2, lambda: send(signal.SIGTERM))
    train(folder, 128 + signal.SIGTERM, resume=checkpoint(folder, 4), save_every=4)
    monkeypatch.undo()
    train(folder, resume="auto", save_every=4)
    assert_same_run(folder, whole)


def test_newest_is_the_newest_whatever_the_clock_said(train, whole, copied):
    """Where the clock of the machine was wrong once, and the earlier checkpoints are of next year by their times."""
    folder = copied(4, 5)
    for path in (folder / "run").iterdir():
        os.utime(path, (later := time.time() + 1e7, later))
    train(folder, resume="auto", save_every=3)
    assert saved_steps(folder)[-1] == 12
    assert f"resumed from {checkpoint(folder, 12)}" in train(folder, resume="auto", save_every=3)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("settings, word", [
    (dict(resume="auto", run_id=""), "--run_id"), (dict(eval_only=True), "--resume"), (dict(resume="auto", muon_lr=0.04), "--muon_lr"),
    (dict(resume="auto", run_id="another", eval_only=True), "another"), (dict(resume="auto", run_id="cut", eval_only=True), "cut"),
    (dict(resume="run"), "run"), (dict(resume="."), "."), (dict(resume="/"), "/"), (dict(keep=0), "--keep"),
    (dict(save_every=-1), "--save_every")])
def test_resuming_that_cannot_be_meant_is_refused(settings, word, train, copied):
    folder = copied(5)
    (folder / "cut.txt").write_text("a run that was cut before its first checkpoint\n")
    before = content(folder)
    assert word in train(folder, 2, **settings)
    assert content(folder) == before


# ---------------------------------------------------------------------------------------------------------
# --eval_only


@pytest.mark.parametrize("step", [4, 8, 12])
def test_eval_only_validates_a_checkpoint(step, train, whole):
    out = train(whole, resume=checkpoint(whole, step), eval_only=True)
    expected = [line for line in steps(whole) if line.startswith(f"step:{step}/12 val_loss")]
    assert [TIMES.sub("", line) for line in out.splitlines() if line.startswith("step:")] == expected
    assert len(expected) == 1 and "sample" not in out and "tokens per second" not in out


@pytest.mark.parametrize("settings", [
    dict(), dict(run_id=""), dict(resume="auto"), dict(log_dir="elsewhere"), dict(run_id="other", save_every=1, sample=3)], ids=str)
def test_eval_only_leaves_everything_as_it_is(settings, train, copied, monkeypatch):
    """The log and the folder of the run, and there is no log of its own."""
    folder = copied(5, 10)
    before = content(folder)
    monkeypatch.chdir(folder)
    out = train(folder, **dict(resume=checkpoint(folder, 10), eval_only=True) | settings)
    assert len(re.findall(r"^step:10/12 val_loss:\d\.\d{4}", out, re.MULTILINE)) == 1
    assert content(folder) == before


def test_eval_only_writes_the_sample(train, whole):
    out = train(whole, resume=checkpoint(whole, 12), eval_only=True, sample=30)
    assert out.split("\nsample: ")[-1] == (whole / "run.txt").read_text().split("\nsample: ")[-1]


def test_eval_only_ends_at_once_by_a_signal(train, whole, monkeypatch):
    """There is nothing to finish."""
    def validate(*_):
        send(signal.SIGTERM)
        raise AssertionError("the validation goes on")
    monkeypatch.setattr(train_gpt, "validate", validate)
    assert "SIGTERM" in train(whole, 143, resume=checkpoint(whole, 12), eval_only=True)


def test_eval_only_on_other_tokens(train, whole):
    """Of another number, as the full mean."""
    found = {tokens: re.search(r"val_loss:([\d.]+)", train(whole, resume=checkpoint(whole, 12), eval_only=True, val_tokens=tokens))[1]
             for tokens in (900, 128, 0)}
    assert len(set(found.values())) == 3


# ---------------------------------------------------------------------------------------------------------
# What is refused

SHAPING = dict(  # another value of each setting that shapes the course
    train_seq_len=256, seqs_per_step=4, repeat=False, num_layers=8, num_heads=2, head_dim=32, model_dim=32, attention_free_layers=(1, 2, 3),
    num_iterations=13, cooldown_frac=0.5, max_window=128, embed_lr=0.16, head_lr=0.005, scalar_lr=0.03, muon_lr=0.04, seed=1, fp8="none")
ASIDE = {"train_files", "val_files", "val_tokens", "val_seq_len", "dtype", "coordinate_descent_tuning", "val_loss_every", "sample", "timeout",
         "save_every", "keep", "resume", "eval_only", "log_dir", "run_id"}


def test_of_each_setting_it_is_known_whether_it_shapes_the_course():
    """A new one has to be put into one of the two lists above, and is tested there."""
    assert SHAPING.keys() | ASIDE == set(train_gpt.Hyperparameters.__dataclass_fields__) and not SHAPING.keys() & ASIDE


@pytest.mark.parametrize("name", SHAPING)
def test_another_course_is_refused(name, train, copied):
    """The setting is named, with both values; and the log has not been cut."""
    folder = copied(5)
    before = content(folder)
    said = train(folder, 2, resume=checkpoint(folder, 5), **{name: SHAPING[name]})
    theirs = getattr(train_gpt.parse_arguments(as_flags(**SMALL))[0], name)
    for word in (f"--{name}", str(theirs), str(SHAPING[name])):
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


@pytest.mark.parametrize("change, words", [
    (other_vocabulary, ["vocabulary", "257", "258"]), (other_size, ["train_1.bin", "7001", "7002"]), (more_files, ["train_2.bin", "9000"])])
def test_other_shards_are_refused(change, words, train, shards, copied, tmp_path):
    folder = copied(5)
    shutil.copytree(shards["train_files"].parent, other := tmp_path / "other")
    change(sorted(other.iterdir()))
    files = dict(train_files=other / "train_*.bin", val_files=other / "val_*.bin")
    train(tmp_path / "fresh", **files, num_iterations=1)  # nothing is wrong with them
    for mode in (dict(), dict(eval_only=True)):
        said = train(folder, 2, resume=checkpoint(folder, 5), **files, **mode)
        assert all(word in said for word in words)


def test_other_activations_are_refused(train, copied):
    folder = copied(5)
    said = train(folder, 2, resume=checkpoint(folder, 5), dtype="bfloat16")
    assert "float32" in said and "bfloat16" in said


def newer_format(path, other):
    said = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(said | {"format": 2}))


def truncated(path, other):
    os.truncate(path, path.stat().st_size - 1)


def longer(path, other):
    with open(path, "ab") as file:
        file.write(b"\0")


def altered(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def empty(path, other):
    path.write_bytes(b"")


def swapped_checkpoints(path, other):
    path.rename(path.with_name("aside"))
    other.rename(path)
    path.with_name("aside").rename(other)


def swapped_manifests(path, other):
    swapped_checkpoints(path.with_suffix(".json"), other.with_suffix(".json"))


def without_manifest(path, other):
    path.with_suffix(".json").unlink()


def without_checkpoint(path, other):
    path.unlink()


def a_folder(path, other):
    path.unlink()
    path.mkdir()


def manifest_of_something_else(path, other):
    path.with_suffix(".json").write_text("[1, 2]")


@pytest.mark.parametrize("spoil", [
    newer_format, truncated, longer, altered, empty, swapped_checkpoints, swapped_manifests, without_manifest, without_checkpoint, a_folder,
    manifest_of_something_else])
def test_checkpoint_that_is_not_whole_is_refused(spoil, train, copied):
    folder = copied(5, 10)
    spoil(checkpoint(folder, 5), checkpoint(folder, 10))
    before = content(folder)
    for mode in (dict(), dict(eval_only=True)):
        said = train(folder, 2, resume=checkpoint(folder, 5), **mode)
        assert str(checkpoint(folder, 5)) in said and ("format 2" in said) == (spoil is newer_format)
    assert content(folder) == before


def without(name):
    return lambda whole: {key: value for key, value in whole.items() if key != name}


def smaller(whole):
    return torch.utils._pytree.tree_map(lambda x: x[:1] if isinstance(x, torch.Tensor) and x.ndim else x, whole)


STRANGE = dict(
    list=lambda whole: [1, 2, 3], number=lambda whole: 3, tensor=lambda whole: torch.zeros(3), empty=lambda whole: {},
    weights=lambda whole: whole["modules"][0], course_alone=lambda whole: dict(course=whole["course"]), smaller=smaller,
    later=lambda whole: whole | dict(step=13), no_step=lambda whole: whole | dict(step="five"),
    **{f"without_{name}": without(name) for name in ("step", "course", "ms", "best", "modules", "position", "random")})


@pytest.mark.parametrize("what", STRANGE)
def test_what_torch_reads_and_is_no_checkpoint_of_ours_is_refused(what, train, copied, recwarn):
    """With a manifest that is right, as a file of another script may have it."""
    folder = copied(5)
    path = checkpoint(folder, 5)
    torch.save(STRANGE[what](torch.load(path, weights_only=True)), path)
    listed(path)
    before = (folder / "run.txt").read_text()
    for mode in (dict(), dict(eval_only=True)):
        assert str(path) in train(folder, 2, resume=path, **mode)
    assert before in [path.read_text() for path in folder.iterdir() if path.is_file()]  # perhaps set aside, but not lost
    assert not [str(warning.message) for warning in recwarn]  # they would be further lines on stderr


class Runs:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("save", [torch.save, lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
                                  lambda thing, path: path.write_bytes(pickle.dumps(thing))], ids=["torch", "legacy", "pickle"])
def test_checkpoint_that_would_run_code_is_refused_and_runs_none(save, wrapped, train, copied, tmp_path, monkeypatch, recwarn):
    folder = copied(5)
    path, mark = checkpoint(folder, 5), tmp_path / "mark"
    monkeypatch.setenv("MARK", str(mark))
    whole = torch.load(path, weights_only=True)
    save(whole | dict(extra=Runs()) if wrapped else Runs(), path)
    listed(path)
    for mode in (dict(), dict(eval_only=True)):
        assert str(path) in train(folder, 2, resume=path, **mode)
        assert not mark.exists()
    assert not [str(warning.message) for warning in recwarn]
    pickle.loads(pickle.dumps(Runs()))
    assert mark.exists()  # as it would have been


# ---------------------------------------------------------------------------------------------------------
# 200 random changes of a checkpoint, and of a shard


def change(draw, content, other):
    """The content with a byte altered, cut off somewhere, or with a part of itself or of the other file in another place."""
    kind, at = draw.choice(["flip"] * 4 + ["cut", "swap", "other", "other"]), draw.randrange(len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ draw.randrange(1, 256)]) + content[at + 1:]
    if kind == "cut":
        return content[:at]
    size, there = draw.randint(1, len(content) // 3), draw.randrange(len(content))
    at, there = sorted((min(at, len(content) - size), min(there, len(content) - size)))
    if kind == "other":
        return content[:at] + other[at:at + size] + content[at + size:]
    size = min(size, there - at)
    return content[:at] + content[there:there + size] + content[at + size:there] + content[at:at + size] + content[there + size:]


def test_no_change_of_a_checkpoint_is_loaded(train, copied):
    """Or gives anything but one sentence: 200 of them, and as --resume auto meets them."""
    folder, draw = copied(5, 10), random.Random(1)
    paths = [checkpoint(folder, step).with_suffix(suffix) for suffix in (".pt", ".json") for step in (5, 10)]
    good = {path: path.read_bytes() for path in paths}
    changes = 0
    while changes < 200:
        path = draw.choice(paths[:2] if changes % 3 else paths[2:])
        changed = change(draw, good[path], good[next(other for other in paths if other.suffix == path.suffix and other != path)])
        if changed == good[path]:
            continue  # parts can be equal
        path.write_bytes(changed)
        changes += 1
        assert path.stem in train(folder, 2, resume=path.with_suffix(".pt"), eval_only=True), changes
        if changes % 10 == 0:
            other = next(checkpoint(folder, step) for step in (5, 10) if checkpoint(folder, step).stem != path.stem)
            assert f"resumed from {other}" in train(folder, resume="auto", eval_only=True), changes
        path.write_bytes(good[path])
    train(folder, resume="auto", eval_only=True)  # as it was, it is read


def test_no_change_of_a_shards_header_or_length_is_trained_on(train, shards, copied, tmp_path):
    """By a run from the beginning, or by one that is resumed: 200 changes of a byte in the header, of its numbers, or of the length.
    None of them can give another good shard: magic and version are fixed, the length has to be the header's, a vocabulary is that
    of all shards, and the rest is zeros."""
    folder, draw = copied(5), random.Random(2)
    shutil.copytree(shards["train_files"].parent, other := tmp_path / "other")
    paths = sorted(other.iterdir())
    files = dict(train_files=other / "train_*.bin", val_files=other / "val_*.bin")
    accepted = []
    for number in range(200):
        path = draw.choice(paths)
        good = path.read_bytes()
        header, kind = np.frombuffer(good[:1024], dtype="<i4").copy(), number % 5
        if kind == 0:  # a byte of the fields that say something
            at = draw.randrange(16)
            changed = good[:at] + bytes([good[at] ^ draw.randrange(1, 256)]) + good[at + 1:]
        elif kind == 1:  # a byte of the zeros
            at = draw.randrange(16, 1024)
            changed = good[:at] + bytes([draw.randrange(1, 256)]) + good[at + 1:]
        elif kind == 2:  # a field, to a number that it could have elsewhere
            field = draw.randrange(4)
            header[field] = draw.choice([n for n in (-1, 0, 1, 2, 256, 258, 7000, 9001, 50257, 65536, 20240520) if n != header[field]])
            changed = header.tobytes() + good[1024:]
        elif kind == 3:
            changed = good[:draw.randrange(len(good))]
        else:
            changed = good + draw.randbytes(draw.randint(1, 300))
        path.write_bytes(changed)
        for mode in (dict(resume=checkpoint(folder, 5), eval_only=True), dict(num_iterations=1, run_id=f"fresh{number}")):
            try:
                said = train(folder, 2, **files, **mode)
                assert path.name in said or "vocabular" in said
            except AssertionError as error:
                accepted.append((number, kind, path.name, mode, str(error)[:200]))
        path.write_bytes(good)
    assert not accepted
    train(folder, resume=checkpoint(folder, 5), eval_only=True, **files)
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run.txt"]


# ---------------------------------------------------------------------------------------------------------
# Signals


def send(number):
    """A signal to this process, where it does not end the tests if train_gpt.py is not ready for it."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler), "nobody waits for the signal"
    os.kill(os.getpid(), number)


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
    assert number.name in said and f"--resume {checkpoint(tmp_path, step)}" in said
    assert steps(tmp_path) == [line for line in steps(whole) if int(line[5:].split("/")[0]) <= step]
    assert saved_steps(tmp_path) == [step]
    monkeypatch.undo()
    train(tmp_path, resume=re.search(r"--resume (\S+)", said)[1].rstrip("."), save_every=100)
    assert_same_run(tmp_path, whole)


def test_signal_without_save_every_saves_nothing_and_says_so(train, tmp_path, monkeypatch):
    before_step(monkeypatch, 3, lambda: send(signal.SIGTERM))
    said = train(tmp_path, 143)
    assert "--resume" not in said and "nothing is saved" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"] and "step:3/12" in steps(tmp_path)[-1]


def test_signal_in_the_last_step_is_not_early(train, whole, tmp_path, monkeypatch):
    before_step(monkeypatch, 12, lambda: send(signal.SIGTERM))
    train(tmp_path, save_every=100)
    assert_same_run(tmp_path, whole)


def test_second_signal_ends_the_run_in_the_step(train, tmp_path, monkeypatch):
    """If it comes more than a second after the first; torchrun passes on what the terminal has sent to all."""
    monotonic, later, sent = time.monotonic, [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + later[0])

    def accident():
        for seconds in (0, 0.1, 2):
            later[0] += seconds
            sent.append(seconds)
            send(signal.SIGTERM)
        raise AssertionError("the step goes on")
    before_step(monkeypatch, 3, accident)
    said = train(tmp_path, 143, save_every=100)
    assert sent == [0, 0.1, 2] and "SIGTERM" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"] and "step:2/12" in steps(tmp_path)[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_steps_ends_the_run_at_once(number, train, tmp_path, monkeypatch):
    def warm_up(*_):
        send(number)
        raise AssertionError("the warm-up goes on")
    monkeypatch.setattr(train_gpt, "warm_up", warm_up)
    said = train(tmp_path, 128 + number, save_every=100)
    assert number.name in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"] and not steps(tmp_path)


def test_signal_while_a_checkpoint_is_read_is_not_taken_for_its_fault(train, copied, monkeypatch):
    def load(*_, **__):
        send(signal.SIGTERM)
        raise AssertionError("the reading goes on")
    monkeypatch.setattr(torch, "load", load)
    folder = copied(5)
    before = content(folder)
    assert "SIGTERM" in train(folder, 143, resume=checkpoint(folder, 5))
    assert content(folder) == before


# ---------------------------------------------------------------------------------------------------------
# A loss that is not finite


def not_finite_in_step(monkeypatch, step, value=math.nan):
    function, calls = train_gpt.training_step, [-2]

    def observed(*args):
        calls[0] += 1
        result = function(*args)
        if calls[0] == step:
            result[0] = value
        return result
    monkeypatch.setattr(train_gpt, "training_step", observed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run(value, train, whole, tmp_path, monkeypatch):
    """With the step, its tokens, their file, and the checkpoint to go back to."""
    not_finite_in_step(monkeypatch, 6, value)
    said = train(tmp_path, 2, save_every=3)
    for word in (f"step 6 is {value}", "sequences 10 to 11", "tokens 1280 to 1535", "train_0.bin", str(checkpoint(tmp_path, 3))):
        assert word in said
    assert "train_1.bin" not in said
    polled(lambda: not (tmp_path / "run" / "unfinished").exists(), "a write goes on")
    assert saved_steps(tmp_path) == [3]
    assert steps(tmp_path)[:-1] == [line for line in steps(whole) if int(line[5:].split("/")[0]) < 6]
    assert steps(tmp_path)[-1] == f"step:6/12 train_loss:{value}"
    monkeypatch.undo()
    train(tmp_path, resume="auto", save_every=3)
    assert_same_run(tmp_path, whole)


def test_validation_that_is_not_finite_ends_the_run(train, tmp_path, monkeypatch):
    """Before its checkpoint is written."""
    losses = iter([5.0, math.nan])
    monkeypatch.setattr(train_gpt, "validate", lambda *_: next(losses))
    said = train(tmp_path, 2, save_every=2)
    assert "step 4 is nan" in said and str(checkpoint(tmp_path, 2)) in said and saved_steps(tmp_path) == [2]


def test_tokens_that_run_across_shards_are_in_all_of_these(train, tmp_path, monkeypatch):
    """However short one is; and after the last token, the 1,250th, the first comes again."""
    files = machine_with_shards(tmp_path / "short", (700, 50, 500))
    for step, found in ((2, "0"), (3, "012"), (4, "2"), (5, "20")):
        not_finite_in_step(monkeypatch, step)
        said = train(tmp_path, 2, **files, val_loss_every=0, run_id=f"run{step}")
        assert f"step {step} " in said and f"tokens {(step - 1) * 256} to {step * 256 - 1}" in said and "none" in said
        assert re.findall(r"train_(\d).bin", said) == list(found)
        monkeypatch.undo()


def test_checkpoint_that_is_named_is_the_newest_and_is_there(train, tmp_path, monkeypatch):
    """Though it is still on its way to the disk when the loss is seen, and the one before it is deleted then."""
    seen, save = threading.Event(), torch.save

    def slow(state, *args, **kwargs):
        assert state["step"] < 5 or seen.wait(30)
        time.sleep(0.1 * seen.is_set())
        return save(state, *args, **kwargs)
    monkeypatch.setattr(torch, "save", slow)
    before_step(monkeypatch, 6, seen.set)
    not_finite_in_step(monkeypatch, 6)
    said = train(tmp_path, 2, save_every=1, keep=1)
    assert saved_steps(tmp_path) == [5] and str(checkpoint(tmp_path, 5)) in said


@pytest.mark.parametrize("rate", ["embed_lr", "head_lr", "scalar_lr", "muon_lr"])
def test_no_checkpoint_has_numbers_that_are_not_finite(rate, train, tmp_path):
    """With a learning rate that no network survives. The step that spoils the weights has a good loss itself."""
    said = train(tmp_path, 2, save_every=1, keep=100, **{rate: 1e38})
    assert "the loss of step" in said
    for path in (tmp_path / "run").glob("*.pt") if (tmp_path / "run").exists() else ():
        leaves = torch.utils._pytree.tree_leaves(course(path))
        assert all(leaf.isfinite().all() for leaf in leaves if isinstance(leaf, torch.Tensor)), path


# ---------------------------------------------------------------------------------------------------------
# Real processes


class Forked:
    """A run of one or more processes of their own, at whose store they meet as at a launcher's."""

    def __init__(self, ask, folder, flags, processes, script, environment, out):
        self.folder, self.ask, self.said = folder, ask, folder / "said"
        self.said.mkdir(parents=True, exist_ok=True)
        number = len(list(self.said.glob("*.0.out")))
        self.files = [(self.said / f"{number}.{rank}.out", self.said / f"{number}.{rank}.err") for rank in range(processes)]
        place = {}
        if processes > 1:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place |= dict(WORLD_SIZE=processes, GROUP_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=self.store.port,
                          TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
        self.codes, self.ids = {}, []
        for rank, files in enumerate(self.files):
            for file in files:
                file.touch()
            more = dict(RANK=rank, LOCAL_RANK=rank) if processes > 1 else {}
            self.ids.append(ask(dict(script=str(script), flags=flags, environment=place | more | environment,
                                     out=str(out or files[0]), errors=str(files[1]))))

    @property
    def log(self):
        path = self.folder / "logs" / "run.txt"
        return path.read_text() if path.exists() else ""

    @property
    def errors(self):
        return "".join(file.read_text() for _, file in self.files)

    def has_ended(self):
        for process in [process for process in self.ids if process not in self.codes]:
            if (code := self.ask(process)) is not None:
                self.codes[process] = code
        return len(self.codes) == len(self.ids)

    def until(self, true):
        """Wait until something is the case, while the run goes on."""
        polled(lambda: true() or self.has_ended(), "the run does not get there")
        assert true(), (self.codes, self.errors)
        return self

    def until_step(self, step):
        """Wait until this run, and not one before that had the same log, has written down a step."""
        return self.until(lambda: f"\nstep:{step}/" in self.files[0][0].read_text())

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
    """A function that starts a run in a folder, with the small settings and some others; whatever is left of it at the end is ended."""
    server = subprocess.Popen([sys.executable, FORKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    started = []

    def ask(question):
        server.stdin.write(json.dumps(question) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def start(folder, processes=1, script=SCRIPT, out=None, environment={}, **settings):
        flags = as_flags(**SMALL | shards | dict(log_dir=folder / "logs", run_id="run") | settings)
        started.append(Forked(ask, folder, flags, processes, script, environment, out))
        return started[-1]
    yield start
    for run in started:
        run.has_ended()
        run.send(signal.SIGKILL)
    server.stdin.close()
    server.wait(LIMIT)


def newest(folder):
    """The step of the newest checkpoint with a manifest."""
    return max((int(path.stem[5:]) for path in (folder / "logs" / "run").glob("step_*.json")), default=0)


def not_whole(folder):
    """What is there of checkpoints that are being written, or that a run was killed over: names, numbers and times of files."""
    with contextlib.suppress(FileNotFoundError):  # there is no folder yet, or one of them is whole meanwhile
        files = {entry.name: entry.stat() for entry in os.scandir(folder / "logs" / "run")}
        return {(name, at.st_ino, at.st_mtime_ns) for name, at in files.items()
                if name == "unfinished" or name.endswith(".pt") and name.replace(".pt", ".json") not in files}
    return set()


def kill_often(forks, folder, kills, draw, **settings):
    """Start a run and kill it with SIGKILL, again and again: some time after its start, some steps further than before, or then in
    the next save. Returns how many of these left a checkpoint that was not whole."""
    in_a_save = 0
    for number in range(kills):
        before, run = not_whole(folder), forks(folder, resume="auto", **settings)
        if number % 4 == 0:
            time.sleep(draw.uniform(0, 0.4))
        else:
            run.until_step(newest(folder) + draw.randint(1, 3))
            run.until(lambda: number % 4 == 1 or not_whole(folder) - before)
            time.sleep(draw.uniform(0, 0.02) if number % 4 < 3 else 0)
        run.send(signal.SIGKILL)
        assert set(run.end()) == {-signal.SIGKILL}, (number, run.errors)
        assert not run.errors
        in_a_save += bool(not_whole(folder) - before)
    return in_a_save


def run_to_the_end(forks, folder, **settings):
    run = forks(folder, **settings)
    assert set(run.end()) == {0} and not run.errors, run.errors
    return folder / "logs"


@pytest.mark.parametrize("kills, threads, length", [(20, 1, 80), (3, 2, 30)])
def test_run_that_is_killed_often_is_the_one_that_was_not(kills, threads, length, forks, tmp_path):
    """Bit for bit, at random moments, saving included, by the same command each time."""
    settings = dict(num_iterations=length, save_every=2, environment=dict(OMP_NUM_THREADS=threads))
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


def test_run_that_goes_on_with_another_number_of_processes(forks, tmp_path):
    """From two to one and to two again: the curve of one, within rounding, by all digits of it."""
    def record(folder, processes=1, **more):
        (folder / "record").mkdir(parents=True)
        run_to_the_end(forks, folder, processes=processes, script=OBSERVED, environment=dict(RECORD=str(folder / "record")),
                       **dict(num_iterations=40, save_every=10, keep=9, timeout=30) | more)
        return json.loads((folder / "record" / "0.json").read_text())
    alone = record(tmp_path / "alone")
    killed = forks(tmp_path / "two", processes=2, num_iterations=40, save_every=10, timeout=30)
    killed.until(lambda: newest(killed.folder) >= 10).send(signal.SIGKILL).end()
    first = newest(killed.folder)
    for processes, begin, source in ((1, first, "two"), (2, 20, "alone")):
        folder = tmp_path / f"to{processes}"
        found = record(folder, processes, resume=checkpoint(tmp_path / source / "logs", begin))
        assert len(found["losses"]) == 40 - begin and alone["losses"][-1] < alone["losses"][0] - 0.5
        assert found["losses"] == pytest.approx(alone["losses"][begin:], abs=1e-4, rel=0)
        assert found["validations"] == pytest.approx(alone["validations"][-len(found["validations"]):], abs=1e-4, rel=0)
        assert f"resumed from {checkpoint(tmp_path / source / 'logs', begin)}\n" in (folder / "logs" / "run.txt").read_text()


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt
changes = 0
def die(event, arguments):
    "Before the process changes something in the run's folder for the AT-th time."
    global changes
    writes = event in ("os.rename", "os.remove", "os.mkdir") or event == "open" and set("wxa+") & set(arguments[1] or "")
    if writes and (str(arguments[0]) + "/").startswith({folder!r}):
        changes += 1
        if changes == int(os.environ["AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
sys.exit(train_gpt.main())
"""


def test_run_that_dies_before_each_change_of_its_folder(forks, whole, tmp_path):
    """Whichever was the last thing that it did to a file, the next start finds a whole checkpoint, and never an older one than
    there was."""
    script = tmp_path / "dies.py"
    script.write_text(DIES.format(root=str(ROOT), folder=f"{tmp_path}/logs/run/"))
    settings = dict(script=script, resume="auto", save_every=1, num_iterations=40)
    reference = run_to_the_end(forks, tmp_path / "reference", **settings, environment=dict(AT=0))
    before, left = 0, set()
    for at in range(1, 18):
        run = forks(tmp_path, **settings, environment=dict(AT=at))
        assert run.end() == [-signal.SIGKILL] and not run.errors
        assert newest(tmp_path) >= before
        before = newest(tmp_path)
        if before:
            assert is_whole(checkpoint(tmp_path / "logs", before))
        left.add(bool(not_whole(tmp_path)))
    assert left == {True, False} and 6 < before < 36  # several saves, the later ones of which delete
    assert_same_run(run_to_the_end(forks, tmp_path, **settings, environment=dict(AT=0)), reference)
    assert saved_steps(tmp_path / "logs") == [39, 40]


# ---------------------------------------------------------------------------------------------------------
# Signals and losses of several processes


def assert_stopped_after_one_step(log, said, folder, train):
    """One line in all, with a checkpoint of the step that the log ends with, from which the run goes on."""
    (sentence,) = [line for line in said.splitlines() if line.startswith("train_gpt.py: ")]
    path = Path(re.search(r"--resume (\S+)", sentence)[1])
    last = int(re.findall(r"^step:(\d+)/", log, re.MULTILINE)[-1])
    assert path == checkpoint(folder / "logs", last) and is_whole(path) and f"step {last} " in sentence
    assert re.search(rf"^step:{last}/\S+ val_loss", train(folder / "logs", resume=path, eval_only=True, num_iterations=100000), re.MULTILINE)
    assert 'File "' + str(SCRIPT) not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_that_is_asked_to_end(number, forks, train, tmp_path):
    """One alone, whose exit code tells."""
    run = forks(tmp_path, **ENDLESS).until_step(4).send(number)
    assert run.end() == [128 + number]
    assert_stopped_after_one_step(run.log, run.errors, tmp_path, train)
    assert number.name in run.errors


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_two_processes_of_which_some_are_asked_to_end(ranks, forks, train, tmp_path):
    run = forks(tmp_path, processes=2, **ENDLESS, timeout=30).until_step(4).send(signal.SIGTERM, *ranks)
    assert run.end() == [143, 143]
    assert_stopped_after_one_step(run.log, run.errors, tmp_path, train)


def test_second_request_ends_processes_that_hang_at_once(forks, tmp_path):
    run = forks(tmp_path, processes=2, script=OBSERVED, environment=dict(ACCIDENT="hang"), **ENDLESS)
    run.until_step(3).send(signal.SIGTERM)
    time.sleep(1.2)
    assert not run.has_ended()  # a step that hangs is not over
    begin = time.monotonic()
    assert run.send(signal.SIGTERM).end() == [143, 143] and time.monotonic() - begin < 60
    assert len([line for line in run.errors.splitlines() if line.startswith("train_gpt.py: ")]) == 1 and "SIGTERM" in run.errors


def test_two_processes_with_a_loss_that_is_not_finite(forks, tmp_path):
    run = forks(tmp_path, processes=2, save_every=1, embed_lr=1e38, timeout=30)
    assert run.end() == [2, 2]
    assert_one_sentence(run.errors)
    (step,) = re.findall(r"the loss of step (\d+)", run.errors)
    assert f"step:{step}/12 " in steps(tmp_path / "logs")[-1]


def test_two_processes_that_validate_a_checkpoint(forks, whole, tmp_path):
    """Of one process: the same loss, once."""
    before = content(whole)
    run = forks(tmp_path, processes=2, resume=checkpoint(whole, 8), eval_only=True)
    assert run.end() == [0, 0] and not run.errors
    (found,) = re.findall(r"^step:8/12 val_loss:([\d.]+)", "".join(out.read_text() for out, _ in run.files), re.MULTILINE)
    (expected,) = [re.search(r"val_loss:([\d.]+)", line)[1] for line in steps(whole) if line.startswith("step:8/12 val_loss")]
    assert float(found) == pytest.approx(float(expected), abs=1.5e-4) and not run.log and content(whole) == before


@pytest.mark.parametrize("settings, word", [(dict(muon_lr=0.04), "--muon_lr"), (dict(resume="missing.pt"), "missing")])
def test_two_processes_that_cannot_go_on_say_so_once(settings, word, forks, whole, tmp_path):
    run = forks(tmp_path, processes=2, **dict(resume=checkpoint(whole, 8)) | settings)
    assert run.end() == [2, 2]
    assert_one_sentence(run.errors)
    assert word in run.errors and not run.log


@pytest.fixture(scope="module")
def launched(shards, tmp_path_factory):
    """Runs of two processes by torchrun, one asked to end as batch systems do it, one from the keyboard, by a signal to all."""
    runs = []
    for name in ("batch", "keyboard"):
        folder = tmp_path_factory.mktemp(name)
        flags = as_flags(**SMALL | ENDLESS | shards | dict(log_dir=folder / "logs", run_id="run"))
        runs.append(Started(folder, [torchrun(*flags)]))
    yield runs
    for run in runs:
        run.clear()


@pytest.mark.parametrize("index, stop", [(0, os.kill), (1, os.killpg)], ids=["batch", "keyboard"])
def test_torchrun_that_is_asked_to_end(index, stop, launched, train):
    """Which it passes on, also where it has come to all already: all processes stop after the same step."""
    run = launched[index].until("\nstep:4/")
    stop(run.launchers[0].pid, (signal.SIGTERM, signal.SIGINT)[index])
    run.end()
    assert all(run.codes) and not run.survivors
    assert_stopped_after_one_step(run.log, run.errors[0], run.folder, train)


# ---------------------------------------------------------------------------------------------------------
# Full disks


@contextlib.contextmanager
def room(size, process=0):
    """The largest size of a file that a process can write; more room is not on the disk."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


def test_disk_that_is_full_for_a_while(forks, train, tmp_path):
    """The training goes on; when there is room again, the lines that are missing come, and the next checkpoint."""
    os.mkfifo(tmp_path / "out")
    out = os.fdopen(os.open(tmp_path / "out", os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0)  # no file, so that it has no limit
    printed = bytearray()

    def has_printed(step):
        with contextlib.suppress(BlockingIOError):
            printed.extend(out.read() or b"")
        return f"\nstep:{step}/".encode() in printed
    run = forks(tmp_path, out=tmp_path / "out", **ENDLESS)
    run.until(lambda: has_printed(7) and newest(tmp_path))
    with room(len(run.log) + 100, run.ids[0]):
        reached = int(re.findall(rb"\nstep:(\d+)/", bytes(printed))[-1])
        run.until(lambda: has_printed(reached + 20))
        saved, length = newest(tmp_path), len(run.log)
        run.until(lambda: has_printed(reached + 30))
        assert newest(tmp_path) == saved and len(run.log) == length  # nothing more has been written
        assert sorted(complaints(run.errors)) == ["checkpoint", "log"]
    run.until(lambda: (has_printed(0), newest(tmp_path) > saved)[1])
    reached = newest(tmp_path) + 7
    run.until(lambda: has_printed(reached))
    run.send(signal.SIGTERM)
    polled(lambda: (has_printed(0), run.has_ended())[1], "the run does not end")
    assert run.end() == [143]
    end = run.errors.index("train_gpt.py: stopped")
    assert sorted(complaints(run.errors[:end])) == ["checkpoint", "log"]
    assert_stopped_after_one_step(run.log, run.errors[end:], tmp_path, train)
    line = r"^step:(\d+)/\d+ train_time:\d+ms step_avg:[\d.]+ms train_loss:\d\.\d{4}$"
    trained = [int(step) for step in re.findall(line, run.log, re.MULTILINE)]
    assert trained == list(range(1, len(trained) + 1)) and len(trained) >= reached
    assert len(saved_steps(tmp_path / "logs")) == 2


def test_disk_that_stays_full(shards, whole, tmp_path, capfd, monkeypatch):
    """From the beginning to the end: said once of each, and the training ends well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capfd.readouterr()
    with room(50000):
        code = train_gpt.main(as_flags(**SMALL | shards | dict(log_dir=tmp_path, run_id="run", save_every=2)))
    printed = capfd.readouterr()
    assert code == 0 and sorted(complaints(printed.err)) == ["checkpoint", "log"]
    assert [TIMES.sub("", line) for line in printed.out.splitlines() if line.startswith("step:")] == steps(whole)
    assert not list((tmp_path / "run").glob("*")) and (tmp_path / "run.txt").stat().st_size <= 50000


def test_stop_while_the_disk_is_full_says_what_is_saved(shards, tmp_path, capfd, monkeypatch):
    """Namely nothing, and not for want of the flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before_step(monkeypatch, 3, lambda: send(signal.SIGTERM))
    capfd.readouterr()
    with room(50000):
        code = train_gpt.main(as_flags(**SMALL | shards | dict(log_dir=tmp_path, run_id="run", save_every=100)))
    sentence = capfd.readouterr().err.splitlines()[-1]
    assert code == 143 and "--resume" not in sentence and "for want of --save_every" not in sentence


@pytest.mark.parametrize("processes", [1, 2])
def test_stdout_on_a_full_device_does_not_end_the_training(processes, forks, whole, tmp_path):
    run = forks(tmp_path, out="/dev/full", processes=processes, save_every=6)
    assert run.end() == [0] * processes, run.errors
    assert len(run.errors.splitlines()) <= 1 and "Traceback" not in run.errors
    assert len(steps(tmp_path / "logs")) == len(steps(whole)) and "\npeak memory" in run.log
    assert saved_steps(tmp_path / "logs") == [6, 12]
