"""A run of one process: its log, its clock, its sample, and its end where something is wrong."""

import math
import os
import re
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SMALL, STEP_LINE, losses, refused, train, write_shard, write_shards

import train_gpt

SCRIPT = ROOT / "train_gpt.py"


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def read_log(folder):
    return (folder / "logs" / "run.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def started_by_hand(tmp_path_factory):
    """The output and the log of a run as a person starts it, where stdout takes only ASCII."""
    folder = tmp_path_factory.mktemp("by_hand")
    write_shards(folder)
    result = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, "--sample=40"],
        cwd=folder,
        env=os.environ | dict(CUDA_VISIBLE_DEVICES="", PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout, read_log(folder)


def test_log_begins_with_source_versions_and_settings(started_by_hand):
    source = SCRIPT.read_text(encoding="utf-8")
    log = started_by_hand[1]
    assert log.startswith(source)
    head, _ = log.removeprefix(source).split("\nstep:0/")
    hp = train_gpt.parse_arguments([*SMALL, "--sample=40"], train_gpt)
    values = vars(hp) | dict(torch=torch.__version__, world_size=1)
    for name, value in values.items():
        assert f"\n{name}: {value}\n" in head
    assert re.search(r"\ntrain_shards: 2 shards, 12000 tokens, fingerprint \w+\n", head)


def test_log_has_a_line_for_each_step_and_validation(started_by_hand):
    log = started_by_hand[1]
    validated = [step for step, _, val_loss in losses(log) if val_loss]
    assert validated == ["0", "3", "6"]
    assert [step for step, train_loss, _ in losses(log) if train_loss] == list("123456")
    assert log.count("\nstep:") == 9
    times = [int(match["ms"]) for match in STEP_LINE.finditer(log)]
    assert times == sorted(times)


def test_log_ends_with_peak_memory_sample_and_path(started_by_hand):
    end = r"\npeak memory allocated: \d+ MiB reserved: \d+ MiB\nsample: .*\nlog: logs/run.txt\n"
    assert re.search(end + "$", started_by_hand[1], re.DOTALL)


class Counter(torch.nn.Module):
    """A network to which the next token is one more than the last, in place of GPT."""

    vocab_size = 257

    def hidden(self, ids, schedule):
        return ids

    def logits(self, hidden):
        return 1000.0 * (torch.arange(384) == (hidden + 1) % 257)


@pytest.mark.parametrize("num_tokens, expected", [(3, 3), (127, 127), (400, 127)])
def test_sample_continues_the_start_of_a_document(num_tokens, expected):
    """It is shorter than a training sequence."""
    hp = train_gpt.Hyperparameters(train_seq_len=128, sample=num_tokens)
    machine = train_gpt.Machine(torch.device("cpu"), torch.float32)
    assert train_gpt.sample(Counter(), None, hp, machine).encode() == bytes(range(expected))


def test_ascii_terminal_shows_all_but_the_characters_it_lacks(started_by_hand):
    output, log = started_by_hand
    assert "\N{REPLACEMENT CHARACTER}" in log
    assert log.encode("ascii", "replace").decode().endswith(output)


def test_logged_losses_equal_steps_by_hand(folder, monkeypatch):
    """The warm-up leaves no trace, and each step has its own batch and schedule."""
    assert train(folder, "--val_loss_every=0") == 0
    monkeypatch.chdir(folder)
    hp = train_gpt.parse_arguments(SMALL, train_gpt)
    machine = train_gpt.Machine(torch.device("cpu"), torch.float32)
    loader, _ = train_gpt.open_loaders(hp, machine, hp.num_iterations * hp.seqs_per_step)
    model = train_gpt.build_model(hp, loader.vocab_size, machine)
    optimizers = train_gpt.build_optimizers(model, hp, machine)
    expected = []
    for step in range(hp.num_iterations):
        schedule = train_gpt.set_schedule(optimizers, step, hp, machine)
        batches = [loader.next_batch() for _ in range(hp.seqs_per_step)]
        loss, _ = train_gpt.training_step(
            model, optimizers, batches, schedule, step, False, hp, machine
        )
        expected.append(f"{loss:.4f}")
    assert [train_loss for _, train_loss, _ in losses(read_log(folder))[:-1]] == expected


def test_batch_grows_and_warm_up_has_the_micro_steps_of_the_largest(folder):
    """From its second micro-step on, a step needs memory for the gradients of the first as well."""
    sizes = []

    def training_step(network, optimizers, batches, *rest):
        sizes.append(len(batches))
        return train_gpt.training_step(network, optimizers, batches, *rest)

    changes = dict(sequences_of_step=lambda step, hp: 1 + step // 3, training_step=training_step)
    assert train(folder, **changes) == 0
    assert sizes == [2, 2, 1, 1, 1, 2, 2, 2]


def test_clock_excludes_validation_and_saving(folder, monkeypatch):
    """Each takes an hour, and a step a second, by a clock that nothing else moves."""
    now = 0.0

    def slow(function, seconds):
        def wrapped(*args):
            nonlocal now
            now += seconds
            return function(*args)

        return wrapped

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch, "save", slow(torch.save, 3600))
    changes = dict(
        validate=slow(train_gpt.validate, 3600), training_step=slow(train_gpt.training_step, 1)
    )
    assert train(folder, "--save_every=2", **changes) == 0
    assert train(folder, "--resume=logs/run/step_00000004.pt", **changes) == 0
    for match in STEP_LINE.finditer(read_log(folder)):
        assert float(match["ms"]) == 1000 * int(match["step"])
    assert now > 6 * 3600


TIKTOKEN = SimpleNamespace(get_encoding=lambda name: SimpleNamespace(decode=lambda _: f"by {name}"))


@pytest.mark.parametrize(
    "vocab_size, module, pattern",
    [(50257, TIKTOKEN, "by gpt2"), (50257, None, r"\[\d+, .*\]"), (300, TIKTOKEN, r"\[\d+, .*\]")],
)
def test_sample_is_text_or_numbers(vocab_size, module, pattern, tmp_path, monkeypatch):
    """Numbers where the tokenizer is not known, or not installed."""
    write_shards(tmp_path, vocab_size=vocab_size)
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    flags = "--model_dim=16 --head_dim=16 --val_tokens=1 --num_iterations=1 --seqs_per_step=1"
    assert train(tmp_path, *flags.split(), "--sample=8") == 0
    assert re.search(f"\nsample: {pattern}\nlog: ", read_log(tmp_path))


# --------------------------------------------------------------------------------------------------
# What is wrong


def test_used_run_id_is_refused(folder, capsys):
    assert train(folder, "--save_every=3") == 0
    log = folder / "logs" / "run.txt"
    log.rename(folder / "result.txt")
    assert "holds checkpoints of an earlier run" in refused(capsys, folder, "--save_every=3")
    (folder / "result.txt").rename(log)
    (folder / "logs" / "run").rename(folder / "checkpoints")
    assert "run.txt exists" in refused(capsys, folder)


def test_validation_shard_among_training_shards_is_refused(folder, capsys):
    assert "val_0.bin" in refused(capsys, folder, "--train_files=*.bin")


def test_log_folder_that_cannot_be_made_is_refused(folder, capsys):
    assert "--log_dir" in refused(capsys, folder, "--log_dir=train_0.bin/logs")


def test_log_folder_is_found_in_the_home_folder(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    assert train(folder, "--log_dir=~/mine", "--save_every=6") == 0
    assert (folder / "mine" / "run.txt").exists()
    assert train(folder, "--log_dir=~/mine", "--resume=auto") == 0
    assert "resumed from step 6" in capsys.readouterr().out


@pytest.fixture
def limit():
    """A function that limits a resource of this process during a test."""
    before = {}

    def set_limit(name, soft):
        before[name] = resource.getrlimit(name)
        resource.setrlimit(name, (soft, before[name][1]))

    yield set_limit
    for name, limits in before.items():
        resource.setrlimit(name, limits)


def test_more_shards_than_open_files_are_read(folder, limit):
    for number in range(100):
        write_shard(folder / f"train_{number}.bin", range(200))
    limit(resource.RLIMIT_NOFILE, 64)
    assert train(folder) == 0


def test_full_disk_is_reported_and_training_continues(folder, limit, capsys):
    """Once for the log and once for checkpoints. The exit code is 1."""

    def training_step(*args):
        if args[4] == 3:  # the fourth step
            limit(resource.RLIMIT_FSIZE, (folder / "logs" / "run.txt").stat().st_size + 10)
        return train_gpt.training_step(*args)

    assert train(folder, "--save_every=1", training_step=training_step) == 1
    output, error = capsys.readouterr()
    assert re.fullmatch(
        "a line of the log is lost .*; training continues.\n"
        "logs/run/step_00000004.pt is not written .*; training continues.\n",
        error,
    )
    assert "\nstep:6/6 val_loss" in output
    assert [path.name for path in sorted(folder.glob("logs/run/*"))] == [
        "step_00000002.pt",
        "step_00000003.pt",
    ]


def nan_in_fourth_step(*args):
    return train_gpt.training_step(*args) * (math.nan if args[4] == 3 else 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(training_step=nan_in_fourth_step), ["step 4 is nan", "run/step_00000003.pt"]),
        (dict(validate=lambda *_: math.inf), ["step 0 is inf", "the last checkpoint: none"]),
    ],
)
def test_loss_that_is_not_finite_ends_the_run(changes, words, folder, capsys):
    assert train(folder, "--save_every=1", **changes) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("train_gpt.py: the loss after ") and sentence.count("\n") == 1
    assert all(word in sentence for word in words)
    assert not (folder / "logs" / "run" / "step_00000004.pt").exists()
