"""Checkpoints: a resumed run equals the uninterrupted one, others are rejected; and signals."""

import os
import pickle
import random
import shutil
import signal
import time
import zipfile

import pytest
import torch
from helpers import SMALL, Processes, contents, losses, refused, stop, train, write_shards

import train_gpt

LAST = 45
SAVING = f"--num_iterations={LAST} --save_every=1 --keep=4".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run, with the checkpoints of its last four steps."""
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder)
    assert train(folder, *SAVING) == 0
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of it, as if the run had been killed two steps earlier."""
    folder = tmp_path / "stopped"
    shutil.copytree(finished, folder)
    for step in (LAST - 1, LAST):
        checkpoint(folder, step).unlink()
    return folder


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def checkpoint(folder, step, run="logs/run"):
    return folder / run / f"step_{step:08d}.pt"


def saved_steps(folder):
    return [int(path.stem[5:]) for path in sorted(folder.glob("logs/run/step_*.pt"))]


def assert_same_state(path, other):
    """Of two checkpoints, bit for bit."""
    state, expected = (train_gpt.load_checkpoint(file) for file in (path, other))
    for name in ("step", "model", "optimizers"):
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)


def assert_same_run(folder, finished):
    """The same losses, also of steps that were run twice, and the same end."""
    logs = [(place / "logs" / "run.txt").read_text() for place in (folder, finished)]
    found, expected = (set(losses(log)) for log in logs)
    assert found == expected
    assert_same_state(checkpoint(folder, LAST), checkpoint(finished, LAST))


def test_killed_run_resumes_bit_exactly(finished, folder):
    """After ten SIGKILLs, each at a random moment of start, step or save."""
    generator = random.Random(0)
    for _ in range(10):
        run = Processes(folder, *SMALL, *SAVING, "--resume=auto")
        newest = max(saved_steps(folder), default=0)
        moments = ["resumed from" if newest else "step:0/"]
        moments += [f"step:{newest + 1}/", f"step:{newest + 2}/"]
        run.wait_for(generator.choice(moments))
        time.sleep(generator.uniform(0, 0.02))
        stop(run)
        assert run.wait() == [-signal.SIGKILL]
    assert 0 < max(saved_steps(folder)) < LAST
    assert train(folder, *SAVING, "--resume=auto") == 0
    assert_same_run(folder, finished)


def test_interrupted_save_leaves_no_checkpoint(stopped, monkeypatch):
    """Not under its name, until all of it is on the disk."""

    def die(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, *SAVING, "--resume=auto")
    assert not checkpoint(stopped, LAST - 1).exists()


def test_auto_skips_corrupt_checkpoints(stopped, finished, capsys):
    os.truncate(checkpoint(stopped, LAST - 2), 100_000)
    assert train(stopped, *SAVING, "--resume=auto") == 0
    output, error = capsys.readouterr()
    assert f"resumed from step {LAST - 3} of logs/run/step_" in output
    assert f"step_{LAST - 2:08d}.pt is not a valid checkpoint" in error
    assert_same_run(stopped, finished)


def test_free_settings_may_change(stopped, finished):
    (stopped / "elsewhere").mkdir()
    write_shards(stopped / "elsewhere")
    free = "--val_tokens=300 --val_seq_len=128 --val_loss_every=1 --keep=1 --sample=3"
    moved = "--train_files=elsewhere/train_*.bin --val_files=elsewhere/val_*.bin"
    assert train(stopped, *SAVING, "--resume=auto", *free.split(), *moved.split()) == 0
    assert saved_steps(stopped) == [LAST]
    assert_same_state(checkpoint(stopped, LAST), checkpoint(finished, LAST))


@pytest.mark.parametrize("flag", ["--run_id=branch", "--log_dir=branch"])
def test_branch_leaves_first_run_alone(flag, stopped, finished, capsys):
    before = contents(stopped)
    flags = *SAVING, flag, f"--resume=logs/run/step_{LAST - 2:08d}.pt"
    assert train(stopped, *flags) == 0
    assert before.items() <= contents(stopped).items()
    (end,) = stopped.rglob(f"**/step_{LAST:08d}.pt")
    assert_same_state(end, checkpoint(finished, LAST))
    assert "holds checkpoints of an earlier run" in refused(capsys, stopped, *flags)


def test_second_job_of_one_run_is_refused(stopped, capsys):
    def training_step(*args):
        if args[4] == LAST - 1:
            assert "another run is writing" in refused(capsys, stopped, *SAVING, "--resume=auto")
        return train_gpt.training_step(*args)

    assert train(stopped, *SAVING, "--resume=auto", training_step=training_step) == 0


# --------------------------------------------------------------------------------------------------
# Rejected


def test_altered_checkpoint_is_rejected_or_equal(finished, tmp_path):
    """A byte changed, the end cut off, or a part replaced by that of another checkpoint."""
    path = tmp_path / "altered.pt"
    good = checkpoint(finished, LAST).read_bytes()
    other = checkpoint(finished, LAST - 1).read_bytes()
    generator = random.Random(0)
    rejected = 0
    for _ in range(20):
        start = generator.randrange(len(good))
        end = start + generator.randrange(1, 100_000)
        byte = bytes([good[start] ^ generator.randrange(1, 256)])
        changed = good[:start] + byte + good[start + 1 :]
        replaced = good[:start] + other[start:end] + good[end:]
        path.write_bytes(generator.choice([changed, replaced, good[:start]]))
        try:
            assert_same_state(path, checkpoint(finished, LAST))
        except train_gpt.UserError as error:
            assert f"{path} is not a valid checkpoint" in str(error)
            rejected += 1
    assert rejected >= 15


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "text")


WITH_CODE = dict(run_id="run", model=Code())
FOREIGN = dict(
    missing=lambda path: None,
    empty=lambda path: path.touch(),
    archive=write_zip,
    weights=lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    code=lambda path: torch.save(WITH_CODE, path),
    code_in_old_format=lambda path: torch.save(
        WITH_CODE, path, _use_new_zipfile_serialization=False
    ),
    code_in_pickle=lambda path: path.write_bytes(pickle.dumps(WITH_CODE)),
)


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_rejected_and_not_executed(write, folder, capsys):
    write(folder / "foreign.pt")
    sentence = refused(capsys, folder, "--resume=foreign.pt")
    assert "foreign.pt is not a valid checkpoint" in sentence


@pytest.mark.parametrize(
    "flag", ["--seed=1", "--muon_lr=1.0", "--num_iterations=70", "--max_window=256", "--fp8=all"]
)
def test_checkpoint_of_other_settings_is_rejected(flag, stopped, capsys):
    name, value = flag.removeprefix("--").split("=")
    sentence = refused(capsys, stopped, *SAVING, "--resume=auto", flag)
    assert f"{name} is {value} in this run" in sentence


def test_checkpoint_of_other_data_is_rejected(stopped, capsys):
    """Of the same length."""
    write_shards(stopped, seed=1)
    assert "train_shards is 2 shards" in refused(capsys, stopped, *SAVING, "--resume=auto")


def test_checkpoint_of_another_network_is_rejected(stopped, capsys):
    """One that differs in the script and not in the settings."""

    def build_model(*args):
        model = train_gpt.build_model(*args)
        model.extra = torch.nn.Linear(2, 2)
        return model

    assert train(stopped, *SAVING, "--resume=auto", build_model=build_model) == 2
    assert "is of another network" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Stops


def sending(number, times=1):
    """A training step that also sends signals to this process, in the third step."""

    def training_step(*args):
        if args[4] == 2:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return train_gpt.training_step(*args)

    return training_step


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_after_the_step_and_saves(number, folder, capsys):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    code = train(folder, "--save_every=100", training_step=sending(number))
    assert code == 128 + number
    assert handlers == [signal.getsignal(number) for number in SIGNALS]
    (step,) = saved_steps(folder)
    *_, step_line, end = capsys.readouterr().out.splitlines()
    assert step in (3, 4) and f"step:{step}/6" in step_line
    path = f"logs/run/step_{step:08d}.pt"
    assert end == f"stopped by {number.name} after step {step}; to continue, add --resume {path}"


def test_signal_without_saving_is_reported(folder, capsys):
    assert train(folder, training_step=sending(signal.SIGTERM)) == 143
    assert "nothing is saved" in capsys.readouterr().out
    assert saved_steps(folder) == []


def test_ignored_signal_stays_ignored(folder):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(folder, training_step=sending(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_interrupt_ends_the_run_at_once(folder):
    with pytest.raises(KeyboardInterrupt):
        train(folder, training_step=sending(signal.SIGINT, times=2))
