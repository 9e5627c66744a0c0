"""Shards, the loader against NumPy, and the exact mean of a validation."""

import contextlib
import dataclasses
import os

import numpy as np
import pytest
import torch
import twins
from conftest import CPU, ROOT, refusal

import train_gpt

Loader = train_gpt.DistributedDataLoader


@pytest.fixture
def shards(make_shard, tmp_path):
    """The pattern of three shards of 2,000 tokens in all.

    They are not written in the order of their names, and one has room for no sequence.
    """
    tokens = np.random.default_rng(0).integers(0, 257, 2000)
    pieces = np.split(tokens, [700, 701])
    for name, piece in zip(("a_2.bin", "a_0.bin", "a_1.bin"), pieces, strict=True):
        make_shard(name, piece)
    return str(tmp_path / "a_*.bin")


# ---------------------------------------------------------------------------------------------
# The loader


def take(pattern, seq_len, steps, world_size, **options):
    """What all processes read in steps of one sequence each, in the order of the sequences."""
    loaders = [
        Loader(pattern, seq_len, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return [loader.next_batch() for _ in range(steps) for loader in loaders]


def check_sequence(batch, tokens, index, seq_len, num_tokens):
    """Hold inputs and targets to what NumPy cuts out of all tokens."""
    for ours, expected in zip(
        batch, twins.sequence(tokens, index, seq_len, num_tokens), strict=True
    ):
        assert ours.shape == (seq_len,) and ours.tolist() == expected.tolist()
    assert [t.dtype for t in batch] == [torch.int32, torch.int64]


@pytest.mark.parametrize("seq_len", [1, 128, 130])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_processes_together_read_what_numpy_slices(shards, seq_len, world_size):
    """However many processes share them, and across the ends of shards."""
    batches = take(shards, seq_len, 8 // world_size, world_size, num_tokens=8 * seq_len)
    assert len(batches) == 8
    for index, batch in enumerate(batches):
        check_sequence(batch, twins.all_tokens(shards), index, seq_len, 8 * seq_len)


def test_every_token_is_read_once_and_in_order(shards):
    """All 2,000 tokens: 1,999 inputs, and each token after the first as a target."""
    tokens = twins.all_tokens(shards)
    loader = Loader(shards, 128)
    assert (loader.num_tokens, loader.total, loader.num_sequences) == (1999, 2000, 16)
    batches = [loader.sequence(index) for index in range(loader.num_sequences)]
    targets = torch.cat([targets for _, targets in batches])
    assert targets[targets >= 0].tolist() == tokens[1:].tolist()
    assert torch.cat([inputs for inputs, _ in batches])[:2000].tolist() == tokens.tolist()


def test_targets_beyond_the_last_token_do_not_count(shards):
    loader = Loader(shards, 128, num_tokens=300)
    assert loader.num_sequences == 3
    check_sequence(loader.sequence(2), twins.all_tokens(shards), 2, 128, 300)
    assert (loader.sequence(2)[1] == -100).sum() == 3 * 128 - 300


@pytest.mark.parametrize("world_size", [1, 2])
def test_repeat_starts_over_without_a_gap(shards, world_size):
    needed = 60 * 128  # almost four times around
    batches = take(shards, 128, 60 // world_size, world_size, num_tokens=needed, repeat=True)
    for index, batch in enumerate(batches):
        check_sequence(batch, twins.all_tokens(shards), index, 128, needed)


def test_sequence_longer_than_all_shards_goes_around_more_than_once(shards):
    tokens = twins.all_tokens(shards)
    inputs, _ = Loader(shards, 5000, num_tokens=5000, repeat=True).next_batch()
    assert inputs.tolist() == [*tokens, *tokens, *tokens[:1000]]


@pytest.mark.parametrize("seq_len", [1, 7, 128, 999, 1999])
def test_shuffled_sequences_are_those_in_order_each_once_in_a_pass(shards, seq_len):
    """The next pass has them in another order; targets beyond the run's last do not count."""
    tokens = twins.all_tokens(shards)
    in_a_pass = 1999 // seq_len
    needed = 3 * in_a_pass * seq_len - 1
    loader = Loader(shards, seq_len, num_tokens=needed, repeat=True, shuffle=True)
    in_order = list(range(0, in_a_pass * seq_len, seq_len))
    first, second = (
        [loader.start_of(number * in_a_pass + index) for index in range(in_a_pass)]
        for number in range(2)
    )
    assert sorted(first) == sorted(second) == in_order
    if in_a_pass > 10:
        assert in_order != first != second != in_order
    for index in (0, in_a_pass // 2, in_a_pass - 1):
        inputs, targets = loader.sequence(index)
        assert inputs.tolist() == tokens[first[index] :][:seq_len].tolist()
        assert targets.tolist() == tokens[first[index] + 1 :][:seq_len].tolist()
    assert (loader.sequence(3 * in_a_pass - 1)[1] == -100).sum() == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_shuffled_sequences(shards, world_size):
    options = dict(num_tokens=8 * 128, shuffle=True)
    alone = take(shards, 128, 8, 1, **options)
    together = take(shards, 128, 8 // world_size, world_size, **options)
    assert [inputs.tolist() for inputs, _ in together] == [inputs.tolist() for inputs, _ in alone]


def test_enough_tokens_are_one_more_than_the_run_predicts(shards):
    assert Loader(shards, 128, num_tokens=1999).num_tokens == 1999


@pytest.mark.parametrize("num_tokens, missing", [(2000, 1), (2001, 2), (5000, 3001)])
def test_missing_tokens_are_counted_before_the_first_step(shards, num_tokens, missing):
    with refusal(missing, 2000, "--repeat"):
        Loader(shards, 128, num_tokens=num_tokens)
    assert Loader(shards, 128, num_tokens=num_tokens, repeat=True).num_tokens == num_tokens


def test_vocabulary_comes_from_the_header(make_shard):
    """The public shards leave it at zero, which stands for GPT-2's."""
    for in_header, vocab_size in ((300, 300), (0, 50257)):
        path = make_shard("a.bin", [1, 2, 3], vocab_size=in_header)
        assert Loader(str(path), 1).vocab_size == vocab_size


def test_shards_are_mapped_and_not_read(shards):
    assert all(isinstance(shard, np.memmap) for shard in Loader(shards, 128).shards)


# ---------------------------------------------------------------------------------------------
# Broken shards


@pytest.mark.parametrize(
    "field, value",
    [
        ("magic", 20240521),
        ("version", 2),
        ("length", 11),
        ("length", 9),
        ("length", 0),
        ("length", -5),
        ("vocab_size", 1),
        ("vocab_size", -2),
        ("vocab_size", 65537),
    ],
)
def test_broken_header_is_refused_by_name(field, value, make_shard):
    path = make_shard("broken.bin", list(range(10)), **{field: value})
    with refusal(path, value):
        Loader(str(path), 1)


@pytest.mark.parametrize("size", [0, 3, 1000, 1023, 1024, 1025, 1043])
def test_truncated_file_is_refused_by_name(size, make_shard):
    path = make_shard("broken.bin", list(range(10)))
    path.write_bytes(path.read_bytes()[:size])
    with refusal(path):
        Loader(str(path), 1)


def test_one_broken_shard_among_good_ones_is_found(make_shard, tmp_path):
    for name, magic in (("a.bin", 20240520), ("b.bin", 1), ("c.bin", 20240520)):
        make_shard(name, list(range(10)), magic=magic)
    with refusal("b.bin"):
        Loader(str(tmp_path / "*.bin"), 1)


@pytest.mark.parametrize("train_files, val_files", [("*", "a*"), ("a*", "*"), ("a*", "b*")])
def test_shards_of_two_vocabularies_are_refused(train_files, val_files, make_shard, tmp_path):
    """Within one set of shards, and between those to train and those to validate on."""
    make_shard("a.bin", [1] * 200, vocab_size=257)
    make_shard("b.bin", [1] * 200, vocab_size=50257)
    files = dict(train_files=str(tmp_path / train_files), val_files=str(tmp_path / val_files))
    lengths = dict(train_seq_len=128, val_seq_len=128, val_tokens=100)
    settings = train_gpt.Hyperparameters(**files, **lengths, seqs_per_step=1, num_iterations=1)
    with refusal("a.bin", "b.bin", 257, 50257):
        train_gpt.open_data(settings, CPU)


def test_token_beyond_the_vocabulary_is_found(make_shard, tmp_path):
    make_shard("a.bin", [1, 2, 256])
    path = make_shard("b.bin", [0, 1, 2, 257, 4])
    with refusal(path, 257, 3):
        train_gpt.check_tokens(Loader(str(tmp_path / "*.bin"), 1))
    path.unlink()
    train_gpt.check_tokens(Loader(str(tmp_path / "*.bin"), 1))


@pytest.mark.parametrize("shuffle", [False, True])
def test_tokens_that_the_run_does_not_read_are_not_checked(shuffle, make_shard):
    """Shuffled sequences may be of any of them."""
    loader = Loader(str(make_shard("a.bin", [1, 2, 3, 257])), 1, num_tokens=2, shuffle=shuffle)
    with refusal(257, 3) if shuffle else contextlib.nullcontext():
        train_gpt.check_tokens(loader)


def test_pattern_without_a_match_is_named(tmp_path):
    with refusal("nothing_*.bin"):
        Loader(str(tmp_path / "nothing_*.bin"), 1)


# ---------------------------------------------------------------------------------------------
# Validation


class KnownLoss:
    """In the place of a network: each target costs what `costs` says, and -100 nothing."""

    costs = np.random.default_rng(1).random(257)
    training = True

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def __call__(self, inputs, targets, window):
        assert not self.training and not torch.is_grad_enabled()
        counted = targets[targets >= 0].numpy()
        return torch.tensor(self.costs[counted].mean(), dtype=torch.float64)


@pytest.mark.parametrize("num_tokens", [100, 128, 129, 640, 1000, 1999])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_validation_is_the_mean_over_exactly_its_tokens(
    shards, num_tokens, world_size, monkeypatch
):
    """Also where some processes have fewer sequences than others, or none."""
    sums = []
    model = KnownLoss()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: sums.append(t.item()))
    for rank in range(world_size):
        loader = Loader(shards, 128, num_tokens=num_tokens, rank=rank, world_size=world_size)
        machine = dataclasses.replace(CPU, rank=rank, world_size=world_size)
        train_gpt.validate(model, loader, torch.tensor(1, dtype=torch.int32), machine)
        assert model.training  # as it was before
    expected = KnownLoss.costs[twins.all_tokens(shards)[1 : num_tokens + 1]].mean()
    assert sum(sums) / num_tokens == pytest.approx(expected, rel=1e-12)


def test_process_returns_the_loss_of_all_processes(shards, monkeypatch):
    """And not that of its own part."""
    loader = Loader(shards, 128, num_tokens=1000)
    window = torch.tensor(1, dtype=torch.int32)
    alone = train_gpt.validate(KnownLoss(), loader, window, CPU)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(3))
    assert train_gpt.validate(KnownLoss(), loader, window, CPU) == pytest.approx(3 * alone)


# ---------------------------------------------------------------------------------------------
# Shards of GPT-2's tokens

DOCS = ROOT.parent / "shared" / "data" / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="needs ../shared/data/docs, which does not ship")
def test_shards_of_gpt2_tokens_are_read():
    pattern = str(DOCS / "docs_train_*.bin")
    seq_len = 48 * 1024
    loader = Loader(pattern, seq_len)
    assert loader.vocab_size == 50257 and loader.total > 22_000_000 and len(loader.files) == 5
    inputs, targets = loader.next_batch()
    assert inputs[0] == 50256 and torch.equal(inputs[1:].long(), targets[:-1])
    tokens = twins.all_tokens(pattern)
    first_shard = (os.path.getsize(loader.files[0]) - 1024) // 2
    index = first_shard // seq_len  # the sequence that runs across the end of the first shard
    check_sequence(loader.sequence(index), tokens, index, seq_len, len(tokens) - 1)
