"""Shards, the loader against slices of one array, and the mean of a validation."""

import numpy as np
import pytest
import reference
import torch
from helpers import write_shard, write_shards

import train_gpt

Loader = train_gpt.DistributedDataLoader


@pytest.fixture
def shards(tmp_path):
    """The pattern of three shards of 2,000 tokens, one of them with a single token.

    They are not written in the order of their names.
    """
    pieces = np.split(np.random.default_rng(0).integers(0, 257, 2000), [700, 701])
    for name, piece in zip(("2.bin", "0.bin", "1.bin"), pieces, strict=True):
        write_shard(tmp_path / name, piece)
    return str(tmp_path / "*.bin")


# --------------------------------------------------------------------------------------------------
# Sequences


def check_sequence(batch, pattern, index, num_tokens):
    inputs, targets = batch
    expected = reference.sequence(reference.all_tokens(pattern), index, len(inputs), num_tokens)
    assert (inputs.tolist(), targets.tolist()) == tuple(array.tolist() for array in expected)
    assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize("seq_len, count", [(1, 8), (128, 48), (130, 8), (5000, 4)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_sequences_in_order(shards, seq_len, count, world_size):
    """Across shards, and again from the start. The last targets are not the run's."""
    options = dict(num_tokens=count * seq_len - seq_len // 3, repeat=True, world_size=world_size)
    loaders = [Loader(shards, seq_len, rank=rank, **options) for rank in range(world_size)]
    assert loaders[0].num_sequences == count
    for index in range(count):
        batch = loaders[index % world_size].next_batch()
        check_sequence(batch, shards, index, options["num_tokens"])


@pytest.mark.parametrize("seq_len", [7, 128, 1999])
def test_shuffled_epoch_has_each_sequence_once(shards, seq_len):
    """Each epoch in another order, which is the same for all processes."""
    count = 1999 // seq_len
    options = dict(num_tokens=3 * count * seq_len - 1, repeat=True, shuffle=True)
    loader = Loader(shards, seq_len, **options)
    tokens = reference.all_tokens(shards)
    in_order = [tokens[i * seq_len :][: seq_len + 1].tolist() for i in range(count)]
    batches = [loader.next_batch() for _ in range(3 * count)]
    shuffled = [[*inputs.tolist(), targets[-1].item()] for inputs, targets in batches]
    first, second = shuffled[:count], shuffled[count : 2 * count]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert count < 10 or in_order != first != second
    assert shuffled[-1][-1] == -100
    other = Loader(shards, seq_len, rank=1, world_size=2, **options)
    assert other.next_batch()[0].tolist() == shuffled[1][:-1]


class Costs(torch.nn.Module):
    """A network whose loss is known: the mean of a cost for each target."""

    costs = torch.rand(257, dtype=torch.float64)

    def forward(self, inputs, targets, window):
        assert not self.training and not torch.is_grad_enabled()
        return self.costs[targets[targets >= 0]].mean()


@pytest.mark.parametrize("num_tokens", [100, 128, 1000, 1999])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_validation_is_the_mean_over_its_tokens(shards, num_tokens, world_size, monkeypatch):
    """Also where some processes have fewer sequences than others, or none."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: None)
    network, total = Costs(), 0
    for rank in range(world_size):
        machine = train_gpt.Machine(torch.device("cpu"), torch.float32, rank, world_size)
        loader = Loader(shards, 128, num_tokens=num_tokens, rank=rank, world_size=world_size)
        total += train_gpt.validate(network, loader, None, machine)
        assert network.training
    targets = reference.all_tokens(shards)[1 : num_tokens + 1]
    assert total == pytest.approx(network.costs[targets].mean().item(), rel=1e-12)


# --------------------------------------------------------------------------------------------------
# Files


def rejection(function, *arguments, **options):
    """The sentence with which arguments are rejected."""
    with pytest.raises(train_gpt.UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def test_missing_tokens_are_counted(shards):
    """The run needs one more than it predicts."""
    assert Loader(shards, 128).num_tokens == Loader(shards, 128, num_tokens=1999).num_tokens
    assert "3001 fewer" in rejection(Loader, shards, 128, num_tokens=5000)
    assert "1 fewer" in rejection(Loader, shards, 128, num_tokens=2000)


@pytest.mark.parametrize(
    "field, value",
    [("magic", 20240521), ("version", 2), ("length", 11), ("length", -5), ("vocab_size", 65537)],
)
def test_corrupt_header_is_rejected(field, value, tmp_path):
    path = write_shard(tmp_path / "corrupt.bin", range(10), **{field: value})
    sentence = rejection(train_gpt.read_header, path)
    assert str(path) in sentence and str(value) in sentence


@pytest.mark.parametrize("seed", range(20))
def test_altered_shard_is_rejected_or_harmless(seed, tmp_path):
    """A bit of its header, or its length. Harmless: the same tokens are read."""
    generator = np.random.default_rng(seed)
    path = write_shard(tmp_path / "altered.bin", range(256))
    pattern, content = str(path), bytearray(path.read_bytes())
    if seed % 2:
        content[generator.integers(generator.choice([16, 1024]))] ^= 1 << generator.integers(8)
    else:
        content = (content + content)[: generator.integers(2 * len(content))]
    path.write_bytes(content)
    try:
        inputs, targets = Loader(pattern, 255).next_batch()
    except train_gpt.UserError as error:
        assert pattern in str(error)
    else:
        assert [*inputs.tolist(), targets[-1].item()] == list(range(256))


def test_folder_and_missing_file_are_rejected(tmp_path):
    (tmp_path / "0.bin").mkdir()
    (tmp_path / "1.bin").symlink_to("nowhere")
    for name in ("0.bin", "1.bin"):
        assert name in rejection(Loader, str(tmp_path / f"{name}*"), 1)


def test_token_beyond_the_vocabulary_is_rejected(tmp_path):
    path = write_shard(tmp_path / "0.bin", [256, *range(99), 257])
    loader = Loader(str(path), 50)
    loader.sequence(0)
    sentence = rejection(loader.sequence, 1)
    assert str(path) in sentence and "257" in sentence


def test_vocabulary_of_public_shards_is_that_of_gpt2(tmp_path):
    path = write_shard(tmp_path / "0.bin", [50256, 1], vocab_size=0)
    assert train_gpt.read_header(path) == (2, 50257)


def open_loaders(folder, pattern):
    files = dict(train_files=f"{folder}/{pattern}", val_files=f"{folder}/val_0.bin")
    hp = train_gpt.Hyperparameters(**files, train_seq_len=128, val_seq_len=128, val_tokens=0)
    machine = train_gpt.Machine(torch.device("cpu"), torch.float32)
    return train_gpt.open_loaders(hp, machine, 1)


def test_shards_of_two_vocabularies_are_rejected(tmp_path):
    write_shards(tmp_path)
    write_shard(tmp_path / "train_2.bin", [1] * 200, vocab_size=50257)
    for pattern in ("train_*.bin", "train_2.bin"):
        assert "[257, 50257]" in rejection(open_loaders, tmp_path, pattern)


def test_validation_shard_among_training_shards_is_rejected(tmp_path):
    """By its name or by a link."""
    write_shards(tmp_path)
    (tmp_path / "train_2.bin").symlink_to(tmp_path / "val_0.bin")
    for pattern in ("*.bin", "train_*.bin"):
        assert "val_0.bin" in rejection(open_loaders, tmp_path, pattern)
    open_loaders(tmp_path, "train_[01].bin")


def test_shards_are_found_by_the_names_people_write(tmp_path):
    """Brackets in names, and folders that are not shards."""
    folder = tmp_path / "[1] a"
    folder.mkdir()
    write_shards(folder)
    brackets = str(write_shard(folder / "train_[3].bin", [1, 2]))
    shards = sorted(str(path) for path in folder.glob("train_*"))
    assert train_gpt.find_shards(f"{folder}/train_*.bin") == shards
    assert train_gpt.find_shards(brackets) == [brackets]
    assert f"{folder}/none_*.bin" in rejection(train_gpt.find_shards, f"{folder}/none_*.bin")


def test_fingerprint_changes_with_the_content_alone(tmp_path):
    tokens = np.zeros(3 << 20, int)
    contents = [tokens, tokens[:-1]]
    for position in (0, -1):
        contents.append(tokens.copy())
        contents[-1][position] = 1
    prints = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        paths = [write_shard(folder / f"{i}.bin", tokens) for i, tokens in enumerate(contents)]
        prints.append([train_gpt.fingerprint([path]) for path in paths])
    assert prints[0] == prints[1] and len(set(prints[0])) == 4
