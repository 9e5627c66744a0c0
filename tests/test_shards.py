"""Property tests: shards of every size, written by data/local_text.py's writer, read by the trainer's loader."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
import twins
from data.local_text import ShardWriter, write_shard

SEQ_LEN = 128
# One token, one batch less one, one batch exactly (its last target is one token further), one more, and anything.
sizes = st.one_of(st.sampled_from([1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 2 * SEQ_LEN, 2 * SEQ_LEN + 1]), st.integers(1, 700))


@given(st.lists(sizes, min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shards_are_read_in_order(tmp_path, lengths, world_size, seed):
    """However the tokens are cut into shards and shared out, the sequences are those of one long array."""
    for stale in tmp_path.glob("*.bin"):
        stale.unlink()
    rng = np.random.default_rng(seed)
    for i, length in enumerate(lengths):
        write_shard(tmp_path / f"train_{i:06d}.bin", rng.integers(0, 257, length), 257)
    pattern = str(tmp_path / "train_*.bin")
    if sum(lengths) < 2:
        with pytest.raises(train_gpt.UserError):
            train_gpt.DistributedDataLoader(pattern, SEQ_LEN)
        return
    everything = twins.all_tokens(pattern)
    assert len(everything) == sum(lengths)
    loaders = [train_gpt.DistributedDataLoader(pattern, SEQ_LEN, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(loaders[0].num_sequences):
        inputs, targets = loaders[index % world_size].next_batch()
        counted = min(SEQ_LEN, sum(lengths) - 1 - index * SEQ_LEN)
        start = index * SEQ_LEN
        assert torch.equal(inputs[:counted].long(), torch.from_numpy(everything[start:start + counted].astype(np.int64)))
        assert torch.equal(targets[:counted], torch.from_numpy(everything[start + 1:start + counted + 1].astype(np.int64)))
        assert (targets[counted:] == -100).all()


@given(st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=20), st.integers(1, 50))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, documents, shard_tokens):
    """Documents, empty ones among them, cut into many tiny shards, come back as they were."""
    for stale in tmp_path.iterdir():
        stale.unlink()
    writer, written = ShardWriter(tmp_path, "train", 1, 257, shard_tokens), []
    for document in documents:
        writer.add(np.array([256, *document]))
        written += [256, *document]
    writer.finish()
    writer.publish()
    shards = [train_gpt.open_shard(str(path)) for path in sorted(tmp_path.glob("train_*.bin"))]
    assert [len(tokens) for tokens, _ in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
    assert np.concatenate([np.zeros(0, dtype=np.uint16), *(tokens for tokens, _ in shards)]).tolist() == written
    assert all(vocab_size == 257 for _, vocab_size in shards)
