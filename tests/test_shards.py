"""Property tests: shards of every size, written by data/local_text.py, read by the loader."""

import numpy as np
import pytest
import torch
import twins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_text import ShardWriter, write_shard

import train_gpt

SEQ_LEN = 128
# Sizes of shards around a token and one or two sequences, each with the one token more that its
# last target needs, and any other.
edges = st.sampled_from([1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 2 * SEQ_LEN, 2 * SEQ_LEN + 1])
sizes = st.one_of(edges, st.integers(1, 700))
examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(st.lists(sizes, min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 2**32 - 1))
@examples
def test_any_shards_are_read_in_order(tmp_path, lengths, world_size, seed):
    """However tokens are cut into shards and shared out, they are read as one long array."""
    for stale in tmp_path.iterdir():
        stale.unlink()
    rng = np.random.default_rng(seed)
    for i, length in enumerate(lengths):
        write_shard(tmp_path / f"train_{i:06d}.bin", rng.integers(0, 257, length), 257)
    pattern = str(tmp_path / "train_*.bin")
    if sum(lengths) < 2:
        with pytest.raises(train_gpt.UserError):
            train_gpt.DistributedDataLoader(pattern, SEQ_LEN)
        return
    tokens = twins.all_tokens(pattern)
    assert len(tokens) == sum(lengths)
    loaders = [
        train_gpt.DistributedDataLoader(pattern, SEQ_LEN, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for index in range(loaders[0].num_sequences):
        inputs, targets = loaders[index % world_size].next_batch()
        expected = twins.sequence(tokens, index, SEQ_LEN, len(tokens) - 1)
        counted = targets >= 0
        assert torch.equal(targets, torch.from_numpy(expected[1]))
        assert torch.equal(inputs.long()[counted], torch.from_numpy(expected[0])[counted])


@given(st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=20), st.integers(1, 50))
@examples
def test_what_is_written_is_read(tmp_path, documents, shard_tokens):
    """Documents, empty ones among them, cut into many tiny shards, come back as they were."""
    for stale in tmp_path.iterdir():
        stale.unlink()
    writer = ShardWriter(tmp_path, "train", 1, 257, shard_tokens)
    written = []
    for document in documents:
        writer.add(np.array([256, *document]))
        written += [256, *document]
    writer.finish()
    writer.publish()
    shards = [train_gpt.open_shard(str(path)) for path in sorted(tmp_path.glob("train_*.bin"))]
    assert [token for tokens, _ in shards for token in tokens] == written
    assert all(len(tokens) == shard_tokens for tokens, _ in shards[:-1])
    assert all(vocab_size == 257 for _, vocab_size in shards)
