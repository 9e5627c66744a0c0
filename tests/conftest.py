"""What all tests share: the import path, one thread a process, shards and documents made on the spot,
and a measure of what a computation touches that no other load on the machine can disturb."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; small tensors gain nothing from more

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.set_num_threads(1)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave back, and whether a value was ever read on the host."""

    def __init__(self):
        super().__init__()
        self.elements, self.read_on_host = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.read_on_host |= function is torch.ops.aten._local_scalar_dense.default
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def make_shard(tmp_path):
    """A function that writes a shard into the test's folder, by the format of the public ones; any header field can be
    falsified. Returns the path."""
    def make(name, tokens, vocab_size=257, magic=20240520, version=1, length=None):
        header = np.zeros(256, dtype="<i4")
        header[:4] = magic, version, len(tokens) if length is None else length, vocab_size
        path = tmp_path / name
        path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
        return path
    return make


@pytest.fixture
def documents():
    """A function that draws ids (T,) int32 below vocab_size, with the boundary token at the given positions alone."""
    def draw(length, starts, vocab_size=257, seed=0):
        ids = torch.randint(vocab_size - 1, (length,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        ids[torch.tensor(list(starts), dtype=torch.long)] = vocab_size - 1
        return ids
    return draw
