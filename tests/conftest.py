"""What all tests share: shards and documents made on the spot, a check of refusals, and a measure
of what a computation touches, which no other load on the machine can disturb.

The import path of the tests is set in pyproject.toml.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
CPU = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)

# One thread for each process, here and in those that tests start: small tensors gain nothing from
# more.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that an operation returned, and whether the host read a value."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.read_on_host = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.read_on_host |= function is torch.ops.aten._local_scalar_dense.default
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@contextlib.contextmanager
def refusal(*words):
    """Expect a UserError of one line that contains all the words; its numbers have no commas."""
    with pytest.raises(train_gpt.UserError) as error:
        yield
    sentence = str(error.value)
    assert "\n" not in sentence
    for word in words:
        assert str(word) in sentence.replace(",", "")


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def make_shard(tmp_path):
    """A function that writes a shard into the test's folder, in the public format, and returns its
    path. Each field of the header can be falsified."""

    def make(name, tokens, vocab_size=257, magic=20240520, version=1, length=None):
        header = np.zeros(256, dtype="<i4")
        header[:4] = magic, version, len(tokens) if length is None else length, vocab_size
        path = tmp_path / name
        path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
        return path

    return make


@pytest.fixture
def documents():
    """A function that draws ids (T,) int32 below vocab_size, with the boundary token at the given
    positions and nowhere else."""

    def draw(length, starts, vocab_size=257, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size - 1, (length,), dtype=torch.int32, generator=generator)
        ids[torch.tensor(list(starts), dtype=torch.long)] = vocab_size - 1
        return ids

    return draw
