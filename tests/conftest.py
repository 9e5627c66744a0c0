"""What all tests share: shards and documents made on the spot, a check of refusals, and a measure
of what a computation touches, which no other load on the machine can disturb.

The import path of the tests is set in pyproject.toml.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from child import become
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt

LIMIT = 120  # seconds, after which a test that waits fails
ROOT = Path(__file__).resolve().parent.parent
CPU = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)

# One thread for each process, here and in those that tests start: small tensors gain nothing from
# more.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


SERVER = multiprocessing.get_context("forkserver")  # one import of torch for all
SERVER.set_forkserver_preload(["torch._dynamo", "torch.nn.attention.flex_attention", "tqdm"])


class Forked:
    """A run of one or more processes of their own, which is watched over as torchrun does."""

    def __init__(self, folder, flags, processes, script, out, environment):
        self.folder = folder
        said = folder / "said" / str(time.monotonic_ns())
        said.mkdir(parents=True)
        self.outs = [out or said / f"out{rank}" for rank in range(processes)]
        self.errs = [said / f"err{rank}" for rank in range(processes)]
        environment = dict(CUDA_VISIBLE_DEVICES="") | environment
        if processes > 1:  # they meet at a launcher's store
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= dict(WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1")
            environment |= dict(MASTER_PORT=self.store.port, TORCHELASTIC_USE_AGENT_STORE=True)
            environment |= dict(TORCHELASTIC_RESTART_COUNT=0)
        self.asked_to_end = False
        self.processes = []
        for rank in range(processes):
            self.errs[rank].touch()
            if processes > 1:
                environment |= dict(RANK=rank, LOCAL_RANK=rank)
            streams = str(self.errs[rank]), str(self.outs[rank])
            process = SERVER.Process(
                target=become, args=(str(script), flags, environment, *streams)
            )
            process.start()
            self.processes.append(process)

    @property
    def log(self):
        path = self.folder / "logs" / "run.txt"
        return path.read_text() if path.exists() else ""

    @property
    def errors(self):
        return "".join(file.read_text() for file in self.errs)

    @property
    def printed(self):
        return self.outs[0].read_text() if self.outs[0].exists() else ""

    @property
    def codes(self):
        return [process.exitcode for process in self.processes]

    def has_ended(self):
        """Whether all have; when the first one has failed, the others are asked to end."""
        if any(self.codes) and not self.asked_to_end:
            self.asked_to_end = True
            self.send(signal.SIGTERM)
        return None not in self.codes

    def until(self, true):
        """Wait until something is the case, while the run goes on."""
        begin = time.monotonic()
        while not true():
            assert not self.has_ended(), (self.codes, self.errors)
            assert time.monotonic() - begin < LIMIT, "the run does not get there"
            time.sleep(0.001)
        return self

    def send(self, number, *ranks):
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid, number)
        return self

    def end(self):
        """Wait for the exit codes."""
        begin = time.monotonic()
        while not self.has_ended():
            assert time.monotonic() - begin < LIMIT, "the run does not end"
            time.sleep(0.001)
        return self.codes


def content(folder):
    """All files below a folder, with what is in them and when they were changed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@contextlib.contextmanager
def room(size, process=0):
    """The largest size of a file that a process can write; more room is not on the disk."""
    limits = size, resource.RLIM_INFINITY
    before = resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


def in_step(monkeypatch, step, number=None, factor=1.0):
    """In a step, of those of this process the first being 1, send a signal, or spoil the loss."""
    function, calls = train_gpt.training_step, [-2]  # there are two in the warm-up

    def observed(*args):
        calls[0] += 1
        if calls[0] != step:
            return function(*args)
        if number is not None:
            assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
            os.kill(os.getpid(), number)
        return function(*args) * factor

    monkeypatch.setattr(train_gpt, "training_step", observed)


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
