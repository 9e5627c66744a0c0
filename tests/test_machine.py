"""What the script makes of GPUs that are not here: which card is taken or refused, and what is
advised where memory runs out."""

import os
import re
import types

import pytest
import torch
from conftest import refusal

import train_gpt


def gpu(name="NVIDIA H200"):
    return train_gpt.Machine(torch.device("cuda"), name, torch.bfloat16)


@pytest.fixture
def pretend(monkeypatch):
    """A function that makes torch believe in `count` GPUs of a compute capability.

    The process is number local_rank on its machine.
    """

    def set_up(capability, count=1, local_rank=0):
        answers = dict(
            is_available=True,
            device_count=count,
            set_device=None,
            get_device_name="Card 9000",
            get_device_capability=capability,
        )
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)

    return set_up


@pytest.mark.parametrize(
    "capability, fp8",
    [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)],
)
def test_cards_train_in_bfloat16_and_in_fp8_where_they_can(pretend, capability, fp8):
    pretend(capability)
    machine = train_gpt.Machine.detect()
    assert machine.device == torch.device("cuda", 0)
    assert machine.dtype == torch.bfloat16 and machine.is_gpu
    assert train_gpt.fp8_supported(machine.device) == fp8
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_card_without_bfloat16_is_refused(pretend):
    pretend((7, 5))
    with refusal("Card 9000 has no bfloat16"):
        train_gpt.Machine.detect()


def test_more_processes_than_cards_are_refused(pretend):
    pretend((9, 0), count=2, local_rank=2)
    with refusal("--nproc_per_node=2"):
        train_gpt.Machine.detect()


@pytest.mark.parametrize("train_seq_len, val_seq_len", [(48 * 1024, 4 * 64 * 1024), (384, 128)])
def test_flags_for_a_card_that_is_too_small_keep_the_tokens_of_a_step(
    train_seq_len, val_seq_len, monkeypatch
):
    card = types.SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    hp = train_gpt.Hyperparameters(train_seq_len=train_seq_len, val_seq_len=val_seq_len)
    sentence = train_gpt.out_of_memory(hp, gpu("Card 9000"))
    assert "Card 9000 (24 GiB" in sentence
    flags = re.search(r"--train_seq_len (\d+) --seqs_per_step (\d+) --val_seq_len (\d+)", sentence)
    length, sequences, validated = map(int, flags.groups())
    assert length * sequences == hp.train_seq_len * hp.seqs_per_step
    assert length < train_seq_len and validated <= val_seq_len
    assert length % 128 == validated % 128 == 0


def test_running_out_of_memory_in_the_warm_up_is_one_sentence(
    make_shard, monkeypatch, capsys, tmp_path
):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(train_gpt, "warm_up", full)
    card = types.SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    shard = make_shard("train_0.bin", range(200))
    files = f"--train_files {shard} --val_files {shard} --log_dir {tmp_path}/logs"
    sizes = "--val_tokens 100 --num_iterations 1 --train_seq_len 1024 --val_seq_len 128"
    flags = f"--preset tiny {files} {sizes} --seqs_per_step 2"
    assert train_gpt.main(flags.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said
    assert "--train_seq_len 512 --seqs_per_step 4" in said
