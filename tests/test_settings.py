"""Importing the script, its names, flags and presets, schedules, and the choice of the device."""

import dataclasses
import inspect
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import reference
import torch
from helpers import ROOT, refused, train, write_shards

import train_gpt
from train_gpt import Hyperparameters, UserError

CPU = train_gpt.Machine(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --------------------------------------------------------------------------------------------------
# Names that stay

IMPORT = """
import logging, os, sys, torch, torch.nn.attention.flex_attention

def state():
    loggers = map(logging.getLogger, sorted(names))
    settings = torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads()
    return [(log.level, log.disabled, log.handlers) for log in loggers], settings, dict(os.environ)

names = list(logging.root.manager.loggerDict)
before = state()
import train_gpt
assert state() == before
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert "torch._dynamo" not in sys.modules
"""


def test_import_only_defines(tmp_path):
    """In a process of torchrun, where a process group made here would wait for others."""
    environment = dict(os.environ, RANK="1", WORLD_SIZE="4", PYTHONPATH=str(ROOT))
    result = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT, "--no_such_flag"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "function, names",
    [
        (train_gpt.GPT, "vocab_size num_layers num_heads head_dim model_dim max_seq_len"),
        (train_gpt.GPT.create_block_masks, "self input_seq sliding_window_num_blocks"),
        (train_gpt.GPT.forward, "self input_seq target_seq sliding_window_num_blocks"),
        (train_gpt.CastedLinear, "in_features out_features use_fp8 x_s w_s grad_s"),
        (train_gpt.Muon, "params lr momentum nesterov ns_steps rank world_size"),
        (train_gpt.zeropower_via_newtonschulz5, "G steps"),
    ],
)
def test_signature_stays(function, names):
    """What follows the names has a default."""
    signature = inspect.signature(function)
    names = names.split()
    assert list(signature.parameters)[: len(names)] == names
    signature.bind(*names)


# --------------------------------------------------------------------------------------------------
# Flags and presets


def parse_arguments(argv):
    return train_gpt.parse_arguments(argv, train_gpt)


def test_every_setting_is_a_flag(capsys):
    """Of the same name, which changes nothing else and is explained by --help."""
    with pytest.raises(SystemExit, match="0"):
        train_gpt.main(["--help"])
    help_text = capsys.readouterr().out
    assert "None (" not in help_text
    choices = dict(fp8="all", dtype="float32")
    for field in dataclasses.fields(Hyperparameters):
        numbers = {int: 2 * field.default or 128, float: 2 * field.default, bool: True}
        value = numbers.get(field.type) or choices.get(field.name, "x")
        hp = parse_arguments([f"--{field.name}", str(value)])
        assert vars(hp) == vars(Hyperparameters()) | {field.name: value}
        assert f"--{field.name} " in help_text


def test_boolean_flag_needs_no_value():
    assert parse_arguments(["--repeat"]).repeat
    assert not parse_arguments(["--preset", "tiny", "--repeat", "False"]).repeat


@pytest.mark.parametrize(
    "preset, parameters, tokens",
    [("speedrun", 275.6e6, 0.696e9), ("medium", 454.5e6, 3.93e9), ("tiny", 0.85e6, 1.64e6)],
)
def test_preset_has_its_size(preset, parameters, tokens):
    hp = parse_arguments(["--preset", preset])
    with torch.device("meta"):
        machine = train_gpt.Machine(torch.device("meta"), torch.bfloat16)
        network = train_gpt.build_model(hp, 257 if preset == "tiny" else 50257, machine)
    count = sum(p.numel() for p in network.parameters())
    assert count == pytest.approx(parameters, rel=0.005)
    trained = hp.num_iterations * hp.seqs_per_step * hp.train_seq_len
    assert trained == pytest.approx(tokens, rel=0.005)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--no_such_flag 3", "no_such_flag"),
        ("--num_iter 3", "num_iter"),  # an abbreviation, which a new flag would make ambiguous
        ("val_1.bin val_2.bin", "quotes"),
        ("--num_iterations", "num_iterations"),
        ("--num_iterations many", "many"),
        ("--num_iterations 0", "num_iterations is 0"),
        ("--repeat perhaps", "perhaps"),
        ("--train_seq_len 1000", "1000; it has to be a positive multiple of 128"),
        ("--max_window 0", "max_window"),
        ("--num_layers 5", "num_layers is 5; it has to be at least 6"),
        ("--seqs_per_step 0", "seqs_per_step"),
        ("--cooldown_frac 1.5", "cooldown_frac"),
        ("--embed_lr nan", "embed_lr"),
        ("--val_tokens -1", "val_tokens"),
        (f"--seed {10**30}", "seed"),
        ("--preset huge", "tiny"),
        ("--dtype float64", "bfloat16"),
        ("--log_dir /dev/null", "/dev/null"),
        ("--train_files nowhere_*.bin", "nowhere_*.bin"),
        ("--val_files nowhere_*.bin", "nowhere_*.bin"),
        ("--val_tokens 6000", "--val_tokens"),  # as many as there are: the last has no target
        ("--repeat false --num_iterations 100", "13601 fewer"),
    ],
)
def test_bad_flag_is_one_sentence(flags, word, tmp_path, capsys):
    write_shards(tmp_path)
    assert word in refused(capsys, tmp_path, *flags.split())


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    "steps, cooldown, max_window", [(1770, 0.4, 1792), (7, 1.0, 1792), (500, 0.6, 128)]
)
def test_schedules_match_reference(steps, cooldown, max_window):
    hp = Hyperparameters(num_iterations=steps, cooldown_frac=cooldown, max_window=max_window)
    for step in range(steps + 1):
        factor = reference.learning_rate_factor(step, steps, cooldown)
        assert train_gpt.learning_rate_factor(step, hp) == pytest.approx(factor)
        assert train_gpt.muon_momentum(step) == pytest.approx(reference.momentum(step))
        assert train_gpt.window_blocks(step, hp) == reference.window(step, steps, max_window)


@pytest.mark.parametrize(
    "step, factor, momentum, blocks",
    [(0, 1, 0.85, 1), (150, 1, 0.9, 2), (1062, 1, 0.95, 9), (1416, 0.55, 0.95, 11)],
)
def test_schedules_of_the_speedrun_by_hand(step, factor, momentum, blocks):
    hp = Hyperparameters()
    assert train_gpt.learning_rate_factor(step, hp) == pytest.approx(factor)
    assert train_gpt.muon_momentum(step) == pytest.approx(momentum)
    assert train_gpt.window_blocks(step, hp) == blocks


# --------------------------------------------------------------------------------------------------
# Device and processes


def set_ranks(monkeypatch, rank, local_rank, world_size):
    variables = dict(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=world_size)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_are_those_of_torchrun(monkeypatch):
    alone = train_gpt.detect_machine("float32")
    assert (alone.rank, alone.world_size) == (0, 1)
    set_ranks(monkeypatch, 3, 1, 4)
    machine = train_gpt.detect_machine("float32")
    assert (machine.rank, machine.world_size) == (3, 4)


@pytest.fixture
def pretend_gpus(monkeypatch):
    """A function that makes torch report two GPUs of a compute capability."""

    def pretend(capability):
        answers = dict(is_available=True, device_count=2, get_device_capability=capability)
        answers |= dict(set_device=None, get_device_name="Card 9000")
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    return pretend


@pytest.mark.parametrize("capability, fp8", [((8, 0), 0), ((8, 9), 1), ((9, 0), 1), ((12, 0), 1)])
def test_gpu_uses_bfloat16_and_fp8_where_supported(capability, fp8, pretend_gpus):
    pretend_gpus(capability)
    machine = train_gpt.detect_machine("auto")
    assert machine.device == torch.device("cuda", 0) and machine.dtype == torch.bfloat16
    assert machine.supports_fp8 == fp8


def test_old_and_missing_gpus_are_rejected(pretend_gpus, monkeypatch):
    pretend_gpus((7, 5))
    with pytest.raises(UserError, match="Card 9000 has no bfloat16"):
        train_gpt.detect_machine("auto")
    set_ranks(monkeypatch, 2, 2, 3)
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        train_gpt.detect_machine("auto")


@pytest.mark.parametrize(
    "flags, rejected",
    [
        ("--preset speedrun", True),
        ("--preset medium", True),
        ("--preset tiny --num_layers 48 --model_dim 8192", True),
        ("--preset tiny --num_layers 48", False),
        ("--preset speedrun --num_iterations 10", False),
    ],
)
def test_cpu_run_of_weeks_is_rejected(flags, rejected, monkeypatch):
    """By its work, not by its name. A GPU may take it."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    hp = parse_arguments(flags.split())
    sequences = [hp.seqs_per_step] * hp.num_iterations
    train_gpt.check_work(hp, sequences, dataclasses.replace(CPU, device=torch.device("cuda")))
    expectation = pytest.raises(UserError, match="days on the CPU") if rejected else nullcontext()
    with expectation:
        train_gpt.check_work(hp, sequences, CPU)


def test_out_of_memory_is_one_sentence_with_flags(tmp_path, capsys):
    def build_model(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    write_shards(tmp_path)
    assert train(tmp_path, "--train_seq_len=1024", "--repeat", build_model=build_model) == 2
    sentence = capsys.readouterr().err
    assert "half of --train_seq_len" in sentence and sentence.count("\n") == 1
