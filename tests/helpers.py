"""What the tests share: shards and documents made on the spot, small settings, and processes."""

import contextlib
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import socket
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds, after which a process that does not end fails its test

# Flags of a run of a second or two. Its shards are those of `write_shards`.
SMALL = shlex.split(
    "--preset tiny --model_dim 32 --num_heads 1 --head_dim 32 --max_window 128 --train_seq_len 128 "
    "--val_seq_len 256 --val_tokens 512 --num_iterations 6 --val_loss_every 3 --sample 0 "
    "--dtype float32 --run_id run --train_files train_*.bin --val_files val_*.bin"
)

STEP_LINE = re.compile(
    r"^step:(?P<step>\d+)/(?P<last>\d+)(?: val_loss:(?P<val_loss>\S+))? train_time:(?P<ms>\d+)ms "
    r"step_avg:(?P<avg>[\d.]+)ms(?: train_loss:(?P<train_loss>\S+))?$",
    re.MULTILINE,
)


def losses(log: str) -> list[tuple]:
    """(step, train loss or None, validation loss or None) of each line of steps, as text."""
    return [match.group("step", "train_loss", "val_loss") for match in STEP_LINE.finditer(log)]


def write_shard(path, tokens, vocab_size=257, magic=20240520, version=1, length=None) -> Path:
    """Write a shard in the public format. Each field of its header can be falsified."""
    header = np.zeros(256, "<i4")
    header[:4] = magic, version, len(tokens) if length is None else length, vocab_size
    path = Path(path)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


def write_shards(folder, count=6000, vocab_size=257, seed=0):
    """Two training shards and one for validation, of random documents: train_*.bin, val_0.bin."""
    generator = np.random.default_rng(seed)
    for name in ("train_0.bin", "train_1.bin", "val_0.bin"):
        tokens = generator.integers(0, vocab_size - 1, count)
        tokens[generator.integers(0, count, count // 100)] = vocab_size - 1
        write_shard(folder / name, tokens, vocab_size)


def documents(length, starts, vocab_size=257, seed=0) -> torch.Tensor:
    """Random ids (T,) int32, with the boundary token at the positions `starts` and nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size - 1, (length,), dtype=torch.int32, generator=generator)
    ids[torch.tensor(list(starts), dtype=torch.long)] = vocab_size - 1
    return ids


def load_script(path, operators="nanogpt"):
    """A training script as a module.

    operators: the namespace of its custom operators, since a process can have one of each name.
    """
    module = types.ModuleType(f"{Path(path).stem}_{operators}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    source = Path(path).read_text(encoding="utf-8").replace("nanogpt", operators)
    exec(compile(source, path, "exec"), vars(module))
    return module


def train(folder, *flags, **changes) -> int:
    """Train on the CPU, in this process and a folder, with other functions in the recipe."""
    import train_gpt  # not above: in processes of a run, it is imported or run by the script

    recipe = types.SimpleNamespace(**vars(train_gpt) | changes)
    with contextlib.chdir(folder), mock.patch.object(torch.cuda, "is_available", lambda: False):
        return train_gpt.main([*SMALL, *flags], recipe)


def contents(folder) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def refused(capsys, folder, *flags, **changes) -> str:
    """Train, which has to end with one sentence and without a change in the folder."""
    before = contents(folder)
    capsys.readouterr()
    assert train(folder, *flags, **changes) == 2
    sentence = capsys.readouterr().err
    assert re.fullmatch(r"train_gpt\.py: [^\n]+\n", sentence)
    assert contents(folder) == before
    return sentence


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(script, flags, folder, output, environment):
    """Run a script in this process, to its end."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    sys.argv = [str(script), *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(str(script), run_name="__main__")


# Forks processes from one that has imported torch, which takes seconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "torch._inductor.config", "tqdm", "numpy"])


class Processes:
    """A script in processes of its own that form one run, each with one thread, in a folder.

    As torchrun does, `wait` ends the others when one has failed.
    """

    def __init__(self, folder, *flags, count=1, script=ROOT / "train_gpt.py", **environment):
        self.folder = Path(folder)
        self.outputs = []
        self.processes = []
        environment = dict(OMP_NUM_THREADS=1, CUDA_VISIBLE_DEVICES="") | environment
        port = free_port()
        for rank in range(count):
            if count > 1:
                ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
                environment = ranks | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port) | environment
                environment |= ranks
            output = self.folder / f"output_{time.monotonic_ns()}_{rank}.txt"
            process = FORKSERVER.Process(
                target=become, args=(script, list(flags), self.folder, output, environment)
            )
            process.start()
            self.outputs.append(output)
            self.processes.append(process)

    @property
    def output(self) -> str:
        """What all processes have printed, process by process."""
        return "".join(path.read_text() for path in self.outputs if path.exists())

    @property
    def log(self) -> str:
        path = self.folder / "logs" / "run.txt"
        return path.read_text() if path.exists() else ""

    def send(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def wait_for(self, text):
        """Wait until a text is printed."""
        begin = time.monotonic()
        while text not in self.output:
            assert any(process.is_alive() for process in self.processes), self.output
            assert time.monotonic() - begin < LIMIT, self.output
            time.sleep(0.002)

    def wait(self) -> list[int]:
        """Wait for the end. Returns the exit codes; that of a signal is negative."""
        begin = time.monotonic()
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode in (1, 2) for process in self.processes)
            late = time.monotonic() - begin > LIMIT
            for process in self.processes:
                if (failed or late) and process.is_alive():
                    time.sleep(1)
                    process.kill()
            assert not late, self.output
            time.sleep(0.005)
        return [process.exitcode for process in self.processes]


def run(folder, *flags, **options) -> Processes:
    """Run a script to its end, which has to be a success."""
    processes = Processes(folder, *flags, **options)
    assert set(processes.wait()) == {0}, processes.output
    return processes


def stop(processes: Processes, number=signal.SIGKILL):
    """Send a signal to all processes."""
    for rank in range(len(processes.processes)):
        processes.send(number, rank)
