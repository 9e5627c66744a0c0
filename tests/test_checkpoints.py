"""Checkpoints, and ends before the last step.

A run that is resumed is the run that was not interrupted, bit for bit, wherever it was killed. What
is damaged, or of another run, is refused with one sentence. Signals, losses that are not finite and
full disks end a run as they should, or do not end it. Processes that are killed are real ones.
"""

import contextlib
import io
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import unittest.mock
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, content, in_step, room
from test_distributed import SMALL as SMALLEST
from test_distributed import Started, machine_with_shards, torchrun
from test_run import as_flags
from torch.utils._pytree import tree_leaves, tree_map

import train_gpt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits files as Linux does it")

SCRIPT = ROOT / "train_gpt.py"
SMALL = SMALLEST | dict(seqs_per_step=2, num_iterations=12, val_loss_every=4)
ENDLESS = dict(num_iterations=100000, save_every=5, timeout=30)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return machine_with_shards(tmp_path_factory.mktemp("shards"))


# --------------------------------------------------------------------------------------------------
# Runs in this process, and what they leave


@pytest.fixture(scope="module")
def train(shards):
    """A function that runs main in this process, with the small settings and some others.

    It returns what was printed, or where it fails the one sentence that it says.
    """

    def run(folder, code=0, **settings):
        out, err = io.StringIO(), io.StringIO()
        flags = as_flags(**SMALL | shards | dict(log_dir=folder, run_id="run") | settings)
        no_gpu = unittest.mock.patch.object(torch.cuda, "is_available", lambda: False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_gpu:
            assert train_gpt.main(flags) == code, err.getvalue()
        if code == 0:
            assert not err.getvalue()
            return out.getvalue()
        complaints_before_the_end(err.getvalue())
        return err.getvalue()

    return run


def complaints_before_the_end(said):
    """What could not be written, each said once, before the one sentence of the end."""
    *before, last = said.splitlines()
    assert last.startswith("train_gpt.py: ") and last.isprintable() and said.endswith("\n"), said
    pattern = r"train_gpt\.py: (a checkpoint|the log) cannot be written \(.+\); training goes on\."
    found = sorted(re.fullmatch(pattern, line)[1] for line in before)
    assert len(found) == len(set(found)), said
    return found


def checkpoint(folder, step, name="run"):
    return folder / name / f"step_{step:08d}.pt"


def saved_steps(folder):
    """The steps that are saved, each wholly; there is nothing else in the run's folder."""
    steps = []
    for path in sorted((folder / "run").iterdir()):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        steps.append(torch.load(path, weights_only=True)["step"])
        assert path == checkpoint(folder, steps[-1])
    return steps


def bits(leaf):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.dtype, leaf.shape, leaf.flatten().view(torch.uint8).numpy().tobytes()


def assert_same_checkpoint(path, other):
    """Weights, what the optimizers remember, random state, position; but not how long it took."""
    ours, theirs = (tree_map(bits, torch.load(name, weights_only=True)) for name in (path, other))
    assert sum(leaf == torch.float32 for leaf in tree_leaves(ours)) > 50
    for state in (ours, theirs):
        del state["ms"], state["best"], state["run_id"]
    assert ours == theirs


TIMES = re.compile(r" train_time:(\d+)ms step_avg:[\d.]+ms")


def without_times(lines):
    return [TIMES.sub("", line) for line in lines if line.startswith("step:")]


def timed_steps(folder, name="run"):
    """The lines of steps and validations in a log; of two of the same step, the later one."""
    lines = {}
    for line in (folder / f"{name}.txt").read_text().splitlines():
        if line.startswith("step:"):
            key = line.split("/")[0], "val_loss" in line
            lines.pop(key, None)
            lines[key] = line
    return list(lines.values())


def steps(folder, after=-1, until=math.inf, name="run"):
    """The same without times, of some of the steps."""
    lines = without_times(timed_steps(folder, name))
    return [line for line in lines if after < int(line[5:].split("/")[0]) <= until]


def assert_same_run(folder, other):
    """To its end: the log, what its last lines say of the whole run, and the last checkpoint."""
    assert steps(folder) == steps(other)
    pattern = r"passes over the training tokens: [\d.]+, lowest validation loss [\d.]+"
    logs = [(place / "run.txt").read_text() for place in (folder, other)]
    ours, theirs = (re.findall(pattern, log)[-1:] for log in logs)
    assert ours == theirs != []
    times = [int(TIMES.search(line)[1]) for line in timed_steps(folder)]
    assert times == sorted(times)
    last = max((other / "run").glob("*.pt"))
    assert_same_checkpoint(folder / "run" / last.name, last)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The log folder of a run that was not interrupted, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, save_every=1, keep=100, sample=30)
    assert saved_steps(folder) == list(range(1, 13))
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A function that copies that run's log for a test, and the checkpoints of some steps."""

    def copy(*kept):
        folder = tmp_path / "logs"
        (folder / "run").mkdir(parents=True)
        shutil.copy(whole / "run.txt", folder)
        for age, step in enumerate(reversed(kept)):  # the last one is the newest
            shutil.copy(checkpoint(whole, step), checkpoint(folder, step))
            os.utime(checkpoint(folder, step), (10**9 - age, 10**9 - age))
        return folder

    return copy


# --------------------------------------------------------------------------------------------------
# Written, and resumed: the same run


def test_clock_stands_still_while_saving(train, tmp_path, monkeypatch):
    """A save takes an hour, by a clock that nothing else moves but a step: by one second."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        monkeypatch.setattr(train_gpt, function.__name__, slow)

    takes(1800, train_gpt.snapshot)
    takes(1800, train_gpt.write_checkpoint)
    takes(1, train_gpt.training_step)
    train(tmp_path, save_every=1)
    assert now[0] > 12 * 3600
    found = re.findall(r"step:(\d+)/12 .*train_time:(\d+)ms", "\n".join(timed_steps(tmp_path)))
    assert len(found) == 16 and all(int(ms) == 1000 * int(step) for step, ms in found)
    now[0] = 10**6
    train(tmp_path, resume=checkpoint(tmp_path, 11))
    assert " train_time:12000ms step_avg:1000.00ms train_loss" in timed_steps(tmp_path)[-2]


@pytest.mark.parametrize("step", [1, 4, 7, 11, 12])
def test_resumed_run_is_the_one_that_was_not_interrupted(step, train, whole, copied):
    """Log, checkpoints and sample, from any step on. Without --run_id it is the checkpoint's.

    It validates where it begins, if that is due there, for the run before may not have done so.
    """
    folder = copied(step)
    before = (folder / "run.txt").read_text()
    path = checkpoint(folder, step)
    run_id = "run" if step == 4 else ""
    out = train(folder, resume=path, run_id=run_id, save_every=1, keep=100, sample=30)
    assert_same_run(folder, whole)
    assert saved_steps(folder) == list(range(step, 13))
    for later in range(step, 13):
        assert_same_checkpoint(checkpoint(folder, later), checkpoint(whole, later))
    due = [line for line in steps(whole) if line.startswith(f"step:{step}/12 val_loss")]
    assert without_times(out.splitlines()) == due + steps(whole, after=step)
    log = (folder / "run.txt").read_text()
    added = log.removeprefix(before)
    assert added.startswith(SCRIPT.read_text()) and log.startswith(before)
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run.txt"]
    assert added.count(f"\nresumed from step {step} of {path}\n") == 1
    assert added.split("\nsample: ")[2] == before.split("\nsample: ")[2]


def test_settings_that_do_not_shape_the_curve_may_differ(train, whole, copied, tmp_path):
    """All of them at once, and shards that lie elsewhere."""
    new = tmp_path / "new"
    others = machine_with_shards(tmp_path / "elsewhere")
    others |= dict(val_tokens=500, val_seq_len=128, val_loss_every=3, sample=4, timeout=77)
    others |= dict(save_every=7, keep=1, coordinate_descent_tuning=True)
    train(new, resume=checkpoint(copied(5), 5), **others)
    assert saved_steps(new) == [12]
    assert_same_checkpoint(checkpoint(new, 12), checkpoint(whole, 12))
    trained = [line for line in steps(new) if "train_loss" in line]
    assert trained == [line for line in steps(whole, after=5) if "train_loss" in line]


def test_another_run_id_leaves_the_first_run_alone(train, whole, copied):
    """Its log begins with its own header; and once it is there, no other run writes into it."""
    folder = copied(6)
    before = content(folder)
    branch = dict(resume=checkpoint(folder, 6), run_id="branch")
    train(folder, **branch, save_every=6)
    after = content(folder)
    assert {path: found for path, found in after.items() if "branch" not in str(path)} == before
    assert (folder / "branch.txt").read_text().startswith(SCRIPT.read_text())
    assert steps(folder, name="branch") == steps(whole, after=6)
    assert_same_checkpoint(checkpoint(folder, 12, "branch"), checkpoint(whole, 12))
    assert "branch.txt" in train(folder, 2, **branch)
    assert "run.txt" in train(folder, 2)
    assert content(folder) == after


@pytest.mark.parametrize("run_id, other", [("run", 2 * 10**9), ("", 10**8)])
def test_auto_takes_what_was_written_last(run_id, other, train, whole, copied):
    """Of a run, or of all under the folder of the logs, whose log then goes on."""
    folder = copied(2, 7, 10)
    train(folder, run_id="other", num_iterations=1, save_every=1)
    os.utime(checkpoint(folder, 1, "other"), (other, other))
    out = train(folder, resume="auto", run_id=run_id, save_every=1)
    assert f"resumed from step 10 of {checkpoint(folder, 10)}\n" in out
    assert_same_run(folder, whole)
    assert saved_steps(folder) == [11, 12]  # by --keep, of the earlier ones too


def test_auto_passes_over_what_is_not_whole(train, whole, copied):
    """As a run or a disk leaves it that dies; but it never begins again over such files."""
    folder = copied(5, 7, 9, 10, 11, 12)
    for step, spoil in zip((12, 11, 10, 9), SPOILED.values(), strict=False):
        path = checkpoint(folder, step)
        path.write_bytes(spoil(torch.load(path, weights_only=True)))
    (folder / "run" / "unfinished").write_bytes(bytes(999))
    out = train(folder, resume="auto", save_every=1)
    assert f"resumed from step 7 of {checkpoint(folder, 7)}\n" in out
    assert_same_run(folder, whole)
    assert saved_steps(folder) == [11, 12]
    for step in (11, 12):
        os.truncate(checkpoint(folder, step), 1000)
    before = content(folder)
    assert "step_000000" in train(folder, 2, resume="auto", save_every=1)
    assert content(folder) == before


def test_auto_after_a_step_back(train, whole, copied, monkeypatch):
    """A run that was resumed from an earlier checkpoint than its newest, and was stopped again."""
    folder = copied(4, 8, 12)
    in_step(monkeypatch, 2, signal.SIGTERM)
    train(folder, 143, resume=checkpoint(folder, 4), save_every=4)
    assert saved_steps(folder) == [4, 6]
    monkeypatch.undo()
    train(folder, resume="auto", save_every=4)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("step", [4, 8, 12])
@pytest.mark.parametrize("flags", [dict(run_id=""), dict(log_dir="new"), dict(resume="auto")])
def test_eval_only_validates_a_checkpoint(step, flags, train, whole, copied, monkeypatch):
    """With the line of the log, after the last step with its sample; and it writes no file."""
    folder = copied(step)
    monkeypatch.chdir(folder)
    before = content(folder)
    flags = dict(resume=checkpoint(folder, step), save_every=1) | flags
    out = train(folder, eval_only=True, sample=30 * (step == 12), **flags)
    expected = [line for line in steps(whole, step - 1, step) if "val_loss" in line]
    assert without_times(out.splitlines()) == expected and len(expected) == 1
    assert "tokens per second" not in out
    sample = (folder / "run.txt").read_text().split("\nsample: ")[2:]
    assert out.split("\nsample: ")[1:] == (sample if step == 12 else [])
    assert content(folder) == before


# --------------------------------------------------------------------------------------------------
# What is damaged, or of another run; and ends before the last step

# Another value of each setting that shapes the curve.
SHAPING = """train_seq_len 256, seqs_per_step 4, repeat False, shuffle False, num_layers 8,
num_heads 2, seed 1, head_dim 32, model_dim 32, attention_free_layers 1, num_iterations 13,
cooldown_frac 0.5, max_window 128, embed_lr 0.16, head_lr 0.005, scalar_lr 0.03, muon_lr 0.04,
fp8 none"""
SHAPING = dict(pair.split() for pair in SHAPING.split(","))
REFUSED = {
    "--eval_only true": ["--resume"],
    "--eval_only true --resume auto --run_id other": ["no checkpoint"],
    "--resume missing": ["missing is not"],
    "--resume .": [". is not"],
    "--resume auto --dtype bfloat16": ["activations torch.bfloat16", "torch.float32"],
}
for field in train_gpt.Hyperparameters.__dataclass_fields__.values():
    if field.metadata["group"] in ("network", "training"):
        name, value = f"--{field.name}", SHAPING[field.name]
        ours = getattr(train_gpt.parse_arguments(as_flags(**SMALL))[0], field.name)
        REFUSED[f"--resume auto {name} {value}"] = [f"{name} ", value, str(ours)]


@pytest.mark.parametrize("flags", REFUSED)
def test_resuming_that_cannot_be_meant_is_refused(flags, train, copied):
    """Of a setting that differs both values are named; and nothing has been written."""
    folder = copied(5)
    before = content(folder)
    words = flags.replace("--", "").split()
    said = train(folder, 2, **dict(zip(words[::2], words[1::2], strict=True)))
    assert all(word in said for word in REFUSED[flags]), said
    assert content(folder) == before


@pytest.mark.parametrize(
    "lengths, words",
    [
        ((9000, 7002), ["train_1.bin", "7001", "7002"]),
        ((9000, 7001, 500), ["train_2.bin", "500"]),
        ((9000, 7001), ["vocabulary", "257", "258"]),
    ],
)
def test_other_data_are_refused(lengths, words, train, copied, tmp_path):
    folder = copied(5)
    files = machine_with_shards(tmp_path / "other", lengths)
    for path in (tmp_path / "other").iterdir():
        shard = path.read_bytes()
        if "vocabulary" in words:
            path.write_bytes(shard[:12] + (258).to_bytes(4, "little") + shard[16:])
    train(tmp_path / "fresh", **files, num_iterations=1)  # nothing is wrong with them
    for mode in (dict(), dict(eval_only=True)):
        said = train(folder, 2, resume=checkpoint(folder, 5), **files, **mode)
        assert all(word in said for word in words)


def written(state, **how):
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


def first_rows(leaf):
    return leaf[:1] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf


class Runs:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


SPOILED = dict(
    empty=lambda state: b"",
    truncated=lambda state: written(state)[:-1],
    newer_format=lambda state: written(state | dict(format=3)),
    list=lambda state: written([1, 2, 3]),
    tensor=lambda state: written(torch.zeros(3)),
    weights=lambda state: written(state["network"]),
    smaller=lambda state: written(tree_map(first_rows, state)),
    no_step=lambda state: written(state | dict(step="five")),
    code=lambda state: written(Runs()),
    code_inside=lambda state: written(state | dict(more=Runs())),
    code_legacy=lambda state: written(Runs(), _use_new_zipfile_serialization=False),
    code_pickle=lambda state: pickle.dumps(Runs()),
)
ENTRIES = "format step run_id ms best position curve network adam muon random"


@pytest.mark.parametrize("what", [*SPOILED, *ENTRIES.split()])
def test_no_whole_checkpoint(what, train, copied, tmp_path, monkeypatch, recwarn):
    """What is damaged or lacks an entry is refused, and nothing that is in it is run."""
    folder = copied(5)
    path, mark = checkpoint(folder, 5), tmp_path / "mark"
    monkeypatch.setenv("MARK", str(mark))
    state = torch.load(path, weights_only=True)
    without = {name: value for name, value in state.items() if name != what}
    path.write_bytes(SPOILED[what](state) if what in SPOILED else written(without))
    before = (folder / "run.txt").read_text()
    for mode in (dict(), dict(eval_only=True)):
        said = train(folder, 2, resume=path, **mode)
        assert str(path) in said and ("format 3" in said) == (what == "newer_format")
    assert (folder / "run.txt").read_text().startswith(before)
    assert not recwarn.list  # they would be further lines on stderr
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs()))
    assert mark.exists()  # as it would have been


def change(draw, good, other):
    """A byte altered, the end cut off, or a part replaced by that of another file."""
    at = draw.randrange(len(good))
    kind = draw.choice(["altered", "altered", "cut", "replaced"])
    if kind == "cut":
        return good[:at]
    part = bytes([good[at] ^ draw.randrange(1, 256)])
    if kind == "replaced":
        part = other[at : at + draw.randint(1, len(good) // 3)]
    return good[:at] + part + good[at + len(part) :]


def test_no_change_of_a_checkpoint_is_read_wrongly(train, copied):
    """Each is refused, or concerns a part that says nothing, as the space between members."""
    folder, draw = copied(10, 5), random.Random(1)
    path, spare = checkpoint(folder, 5), checkpoint(folder, 10)
    good, other = path.read_bytes(), spare.read_bytes()
    expected = tree_map(bits, torch.load(path, weights_only=True))
    refused = 0
    for number in range(200):
        path.write_bytes(change(draw, good, other))
        try:
            found = tree_map(bits, train_gpt.read_checkpoint(path))
        except train_gpt.UserError:
            refused += 1
            if number % 8 == 0:
                assert str(path) in train(folder, 2, resume=path, eval_only=True)
                assert f"of {spare}\n" in train(folder, resume="auto", eval_only=True)
        else:
            assert {name: found[name] for name in expected} == expected
    assert 150 < refused < 200
    path.write_bytes(good)
    assert f"of {path}\n" in train(folder, resume="auto", eval_only=True)


def test_no_change_of_a_shards_header_or_length_is_trained_on(train, copied, tmp_path):
    """None of 200 changes can give another good shard, since all of the header is checked."""
    folder, draw = copied(5), random.Random(2)
    files = machine_with_shards(tmp_path / "other")
    paths = sorted((tmp_path / "other").iterdir())
    resumed = dict(resume=checkpoint(folder, 5), eval_only=True)
    for number in range(200):
        path = draw.choice(paths)
        good = path.read_bytes()
        header = np.frombuffer(good[:1024], dtype="<i4").copy()
        # The fourth number is the vocabulary of 257; zero stands for that of GPT-2.
        place = draw.choice([0, 1, 2, 3, draw.randrange(4, 256)])
        header[place] += draw.choice([-257, -1, 1, 256, 1 << 24])
        shorter, longer = good[: draw.randrange(len(good))], good + draw.randbytes(300)
        path.write_bytes(draw.choice([header.tobytes() + good[1024:], shorter, longer]))
        for mode in (resumed, dict(num_iterations=1, run_id=f"fresh{number}")):
            said = train(folder, 2, **files, **mode)
            assert path.name in said or "vocabular" in said
        path.write_bytes(good)
    train(folder, **files, **resumed)
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run.txt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_signal_ends_the_run_after_the_step(number, step, train, whole, tmp_path, monkeypatch):
    """With a checkpoint and the flag that goes on from there, and before it validates.

    In the last step it is too late.
    """
    in_step(monkeypatch, step, number)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    said = train(tmp_path, 128 + number if step < 12 else 0, save_every=100)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    left_out = "step:4/12 val_loss" if step == 4 else "none"
    expected = [line for line in steps(whole, until=step) if not line.startswith(left_out)]
    assert steps(tmp_path) == expected
    assert saved_steps(tmp_path) == [step]
    monkeypatch.undo()
    if step < 12:
        assert f"stopped by {number.name} after step {step} of 12" in said
        train(tmp_path, resume=re.search(r"--resume (\S+)\.$", said)[1], save_every=100)
    assert_same_run(tmp_path, whole)


def test_signal_without_save_every_saves_nothing_and_says_so(train, tmp_path, monkeypatch):
    in_step(monkeypatch, 3, signal.SIGTERM)
    assert train(tmp_path, 143).endswith("nothing is saved, for want of --save_every.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]
    assert "step:3/12" in steps(tmp_path)[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run(value, train, whole, tmp_path, monkeypatch):
    """In training, and in a validation before its checkpoint is written. The last one is named."""
    in_step(monkeypatch, 6, factor=value)
    said = train(tmp_path, 2, save_every=3)
    assert f"step 6 is {value}" in said and str(checkpoint(tmp_path, 3)) in said
    assert saved_steps(tmp_path) == [3]
    assert steps(tmp_path)[:-1] == steps(whole, until=5)
    assert steps(tmp_path)[-1] == f"step:6/12 train_loss:{value}"
    monkeypatch.undo()
    with monkeypatch.context() as spoiled:
        spoiled.setattr(train_gpt, "validate", lambda *_: value)
        assert f"step 4 is {value}" in train(tmp_path, 2, resume="auto", save_every=1)
    assert saved_steps(tmp_path) == [3]
    train(tmp_path, resume="auto", save_every=3)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("step, found", [(2, "0"), (3, "012"), (4, "2"), (5, "20")])
def test_tokens_across_shards_are_in_all_of_these(step, found, train, tmp_path, monkeypatch):
    """However short one is; and after the last token, the 1,250th, the first comes again."""
    files = machine_with_shards(tmp_path / "short", (700, 50, 500))
    in_step(monkeypatch, step, factor=math.nan)
    said = train(tmp_path, 2, **files, shuffle=False, val_loss_every=0)
    tokens = f"begin at tokens [{(step - 1) * 256}, {(step - 1) * 256 + 128}]"
    for words in (f"step {step} ", tokens, "the last checkpoint: none"):
        assert words in said
    assert re.findall(r"train_(\d).bin", said) == list(found)


@pytest.mark.parametrize("rate", ["embed_lr", "head_lr", "scalar_lr", "muon_lr"])
def test_no_checkpoint_has_numbers_that_are_not_finite(rate, train, tmp_path):
    """With a rate that no network survives. The step that spoils it has a good loss itself."""
    assert "the loss of step" in train(tmp_path, 2, save_every=1, keep=100, **{rate: 1e38})
    for path in tmp_path.glob("run/*.pt"):
        for leaf in tree_leaves(torch.load(path, weights_only=True)):
            assert not isinstance(leaf, torch.Tensor) or leaf.isfinite().all(), path


# --------------------------------------------------------------------------------------------------
# Real processes, and full disks


@pytest.fixture(scope="module")
def forks(shards):
    """A function that starts a small run in a folder; what is left of it at the end is ended."""
    started = []

    def start(folder, processes=1, script=SCRIPT, out=None, environment=None, **settings):
        places = dict(log_dir=folder / "logs", run_id="run")
        flags = as_flags(**SMALL | shards | places | settings)
        started.append(Forked(folder, flags, processes, script, out, environment or {}))
        return started[-1]

    yield start
    for run in started:
        run.send(signal.SIGKILL)


def newest(folder):
    """The step of the newest checkpoint."""
    paths = (folder / "logs" / "run").glob("step_*.pt")
    return max((int(path.stem[5:]) for path in paths), default=0)


def run_to_the_end(forks, folder, **settings):
    run = forks(folder, **settings)
    assert set(run.end()) == {0} and not run.errors, run.errors
    return folder / "logs"


@pytest.mark.parametrize(
    "kills, processes, threads, length", [(20, 1, 1, 80), (3, 1, 2, 30), (5, 2, 1, 36)]
)
def test_run_that_is_killed_often(kills, processes, threads, length, forks, tmp_path):
    """Bit for bit. It is killed some time after its start, or some steps further on."""
    settings = dict(num_iterations=length, save_every=2, processes=processes, timeout=30)
    settings |= dict(environment=dict(OMP_NUM_THREADS=threads))
    reference = run_to_the_end(forks, tmp_path / "reference", **settings)
    draw = random.Random(kills)
    for number in range(kills):
        run = forks(tmp_path, resume="auto", **settings)
        if number % 4:
            step = newest(tmp_path) + draw.randint(1, 3)
            run.until(lambda run=run, step=step: f"\nstep:{step}/" in run.printed)
        time.sleep(draw.uniform(0, 0.02 if number % 4 else 0.4))
        assert set(run.send(signal.SIGKILL).end()) == {-signal.SIGKILL} and not run.errors
    assert 0 < newest(tmp_path) < length - 2
    assert_same_run(run_to_the_end(forks, tmp_path, resume="auto", **settings), reference)
    assert saved_steps(tmp_path / "logs") == [length - 2, length]


def losses(lines):
    return [float(line.rsplit(":", 1)[1]) for line in lines]


@pytest.mark.parametrize("processes", [2, 4])
def test_run_that_goes_on_with_another_number_of_processes(processes, forks, tmp_path):
    """From one to several, which are killed, and to one again: the curve of one, within rounding.

    None hangs where process 0 collects the momentum of all for a checkpoint. Where several only
    validate one, they write no file, and print its loss once.
    """
    settings = dict(num_iterations=40, seqs_per_step=4, save_every=5, keep=9, timeout=30)
    alone = run_to_the_end(forks, tmp_path / "alone", **settings)
    folder, resume = tmp_path / "several", checkpoint(alone, 5)
    several = forks(folder, processes=processes, resume=resume, **settings)
    several.until(lambda: newest(folder) >= 20).send(signal.SIGKILL).end()
    resume = checkpoint(folder / "logs", newest(folder))
    again = run_to_the_end(forks, tmp_path / "again", resume=resume, **settings)
    found = losses(
        steps(folder / "logs", until=newest(folder)) + steps(again, after=newest(folder))
    )
    expected = losses(steps(alone, after=5))
    assert found == pytest.approx(expected, abs=1.5e-4, rel=0)
    assert len(expected) == 35 + 9 and expected[-1] < expected[0] - 0.5
    resume = checkpoint(alone, 20)
    run = forks(tmp_path, processes=processes, resume=resume, eval_only=True, **settings)
    assert set(run.end()) == {0} and not run.errors and not run.log
    printed = "".join(out.read_text() for out in run.outs)
    (found,) = losses(without_times(printed.splitlines()))
    assert found == pytest.approx(losses(steps(alone, 19, 20))[1], abs=1.5e-4, rel=0)


DIES = """
import os, signal, sys
import train_gpt
changes = 0
def die(event, arguments):
    "Before the process changes something in the run's folder for the AT-th time."
    global changes
    writes = event in ("os.rename", "os.remove", "os.mkdir")
    writes |= event == "open" and bool(set("wxa+") & set(arguments[1] or ""))
    if writes and "/logs/run/" in f"{arguments[0]}/":
        changes += 1
        if changes == int(os.environ.get("AT", 0)):
            if event == "os.rename":  # as if it died while it writes
                os.truncate(arguments[0], 1000)
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
sys.exit(train_gpt.main())
"""


def test_run_that_dies_before_each_change_of_its_folder(forks, tmp_path):
    """The next start finds a whole checkpoint, never an older one than there was, or begins again
    below the log of a run that had none. In bfloat16, with one pass over the tokens at most."""
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    settings = dict(script=script, resume="auto", save_every=1, num_iterations=40)
    settings |= dict(dtype="bfloat16", seqs_per_step=3, repeat=False)
    reference = run_to_the_end(forks, tmp_path / "reference", **settings)
    before, left = 0, set()
    for at in range(1, 14):
        run = forks(tmp_path, **settings, environment=dict(AT=at))
        assert run.end() == [-signal.SIGKILL] and not run.errors
        assert newest(tmp_path) >= before
        before = newest(tmp_path)
        if before:
            train_gpt.read_checkpoint(checkpoint(tmp_path / "logs", before))
        left.add((tmp_path / "logs" / "run" / "unfinished").exists())
    assert left == {True, False} and 6 < before < 36  # several saves, and later ones that delete
    assert_same_run(run_to_the_end(forks, tmp_path, **settings), reference)
    assert saved_steps(tmp_path / "logs") == [39, 40]
    starts = run.log.split(SCRIPT.read_text())
    assert starts[0] == "" and len(starts) == 1 + 14


SIGNALLED = """
import os, sys, time
import train_gpt
now = 0.0
def hang(*_, **__):
    "Send SIGNAL to oneself at each of these seconds of a clock, and wait for the end."
    global now
    time.monotonic = lambda: now
    for second in os.environ["SECONDS"].split():
        now = float(second)
        print("sent at", second, flush=True)
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        time.sleep(0.3)
    time.sleep(3600)
setattr(train_gpt, os.environ["WHERE"], hang)
sys.exit(train_gpt.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "where, seconds, settings",
    [
        ("warm_up", "0", {}),
        ("read_checkpoint", "0", dict(resume="nothing")),
        ("validate", "0", dict(eval_only=True)),
        ("validate", "0 0.9 2", {}),
        ("validate", "0 0.9 2", dict(processes=2)),
    ],
)
def test_process_that_ends_at_once(where, number, seconds, settings, forks, whole, tmp_path):
    """Where there is no step to finish, or by a signal a second later. torchrun's are silent."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    environment = dict(WHERE=where, SIGNAL=int(number), SECONDS=seconds)
    if "eval_only" in settings:
        settings = settings | dict(resume=checkpoint(whole, 8))
    run = forks(tmp_path, script=script, environment=environment, save_every=1, **settings)
    assert set(run.end()) == {128 + number}
    silent = "processes" in settings
    assert run.errors == ("" if silent else f"train_gpt.py: stopped by {number.name}.\n")
    assert re.findall("sent at (.*)", run.printed) == seconds.split()
    assert not list(tmp_path.rglob("step_*.pt"))


def assert_stopped_after_one_step(log, said, folder, train):
    """One line in all, with a checkpoint of the log's last step, from which the run goes on."""
    (sentence,) = [line for line in said.splitlines() if line.startswith("train_gpt.py: stopped")]
    last = int(re.findall(r"^step:(\d+)/", log, re.MULTILINE)[-1])
    path = checkpoint(folder / "logs", last)
    assert f"after step {last} of " in sentence and sentence.endswith(f" --resume {path}.")
    out = train(folder / "logs", resume=path, eval_only=True, num_iterations=100000)
    assert f"\nstep:{last}/100000 val_loss" in f"\n{out}"
    assert 'File "' + str(SCRIPT) not in said


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_two_processes_of_which_some_are_asked_to_end(ranks, forks, train, tmp_path):
    run = forks(tmp_path, processes=2, **ENDLESS).until(lambda: newest(tmp_path))
    codes = run.send(signal.SIGTERM, *ranks).end()
    assert 143 in codes and set(codes) <= {143, -signal.SIGTERM}
    assert_stopped_after_one_step(run.log, run.errors, tmp_path, train)
    assert run.errors.count("train_gpt.py: ") == 1


@pytest.mark.parametrize("stop, number", [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)])
def test_torchrun_that_is_asked_to_end(stop, number, shards, train, tmp_path):
    """It passes this on, also where all have been asked already: all stop after the same step."""
    places = dict(log_dir=tmp_path / "logs", run_id="run")
    run = Started(tmp_path, [torchrun(*as_flags(**SMALL | ENDLESS | shards | places))])
    try:
        run.until("\nstep:4/")
        stop(run.launchers[0].pid, number)
        run.end()
    finally:
        run.clear()
    assert all(run.codes) and not run.survivors
    assert_stopped_after_one_step(run.log, run.errors[0], tmp_path, train)
    assert run.errors[0].count("train_gpt.py: ") == 1


def test_two_processes_whose_loss_is_not_finite_say_so_once(forks, tmp_path):
    run = forks(tmp_path, processes=2, save_every=1, embed_lr=1e38, timeout=30)
    assert run.end()[0] == 2 and all(run.codes)
    complaints_before_the_end(run.errors)
    assert run.errors.count("the loss of step") == 1 and run.log


def test_disk_that_is_full_for_a_while(forks, train, tmp_path):
    """The training goes on; when there is room again, the missing lines and a checkpoint come."""
    run = forks(tmp_path, out="/dev/null", **ENDLESS).until(lambda: newest(tmp_path))
    with room(len(run.log) + 100, run.processes[0].pid):
        run.until(lambda: run.errors.count("cannot be written") == 2)
        saved, length = newest(tmp_path), len(run.log)
        time.sleep(0.5)  # some steps
        assert newest(tmp_path) == saved and len(run.log) == length
    run.until(lambda: newest(tmp_path) > saved)
    assert run.send(signal.SIGTERM).end() == [143]
    assert complaints_before_the_end(run.errors) == ["a checkpoint", "the log"]
    assert_stopped_after_one_step(run.log, run.errors, tmp_path, train)
    line = r"^step:(\d+)/\d+ train_time:\d+ms step_avg:[\d.]+ms train_loss:\d\.\d{4}$"
    trained = [int(step) for step in re.findall(line, run.log, re.MULTILINE)]
    assert trained == list(range(1, len(trained) + 1)) and len(trained) > saved + 5
    assert len(saved_steps(tmp_path / "logs")) == 2


@pytest.mark.parametrize("stop", [False, True])
def test_disk_that_stays_full(stop, shards, whole, tmp_path, capfd, monkeypatch):
    """Said once of each. A stop says that nothing is saved, and not for want of the flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if stop:
        in_step(monkeypatch, 3, signal.SIGTERM)
    capfd.readouterr()
    flags = as_flags(**SMALL | shards | dict(log_dir=tmp_path, run_id="run", save_every=2))
    with room(50000):
        assert train_gpt.main(flags) == (143 if stop else 0)
    printed = capfd.readouterr()
    said = printed.err if stop else printed.err + "train_gpt.py: nothing is saved.\n"
    assert complaints_before_the_end(said) == ["a checkpoint", "the log"]
    assert said.endswith("nothing is saved.\n")
    assert without_times(printed.out.splitlines()) == steps(whole, until=3 if stop else 12)
    assert not list((tmp_path / "run").glob("*"))
    assert (tmp_path / "run.txt").stat().st_size <= 50000


@pytest.mark.parametrize("processes", [1, 2])
def test_stdout_on_a_full_device_does_not_end_the_training(processes, forks, whole, tmp_path):
    run = forks(tmp_path, out="/dev/full", processes=processes, save_every=6)
    assert run.end() == [0] * processes, run.errors
    assert re.fullmatch(r"train_gpt\.py: standard output cannot be written \(.*\n", run.errors)
    assert len(steps(tmp_path / "logs")) == len(steps(whole)) and "\npeak memory" in run.log
    assert saved_steps(tmp_path / "logs") == [6, 12]
