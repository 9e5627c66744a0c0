"""One run on several processes: the same curve on 1, 2, 4 and 8 of them, gradients that travel during the backward pass, several
machines, and an end within bounds, with one line, whatever happens to one of them. The processes are real: started by torchrun,
or by forked.py, which does the same with one import of torch for all."""

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import train_gpt
from conftest import ROOT
from test_run import as_flags, body

SCRIPT, FORKED, OBSERVED = ROOT / "train_gpt.py", ROOT / "tests/forked.py", ROOT / "tests/observed.py"
LIMIT = 150  # seconds, after which a test ends what it started, and fails

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by Linux's /proc")

# As small as the network can be: 60 steps of 8 sequences in a few seconds.
SMALL = dict(train_seq_len=128, val_seq_len=256, seqs_per_step=8, num_layers=6, num_heads=1, head_dim=16, model_dim=16,
             attention_free_layers=(1, 2, 3, 4), num_iterations=60, val_tokens=900, val_loss_every=20, max_window=256,
             dtype="float32", sample=0, repeat=True)
ENDLESS = SMALL | dict(num_iterations=100000, seqs_per_step=4)


def write_shard(path, length, seed):
    """Documents of repeated words, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    words = [generator.integers(0, 60, size) for size in generator.integers(2, 9, 12)]
    tokens = np.concatenate([words[i] for i in generator.integers(0, 12, length)])[:length]
    tokens[::300] = 256
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240520, 1, length, 257
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def machine_with_shards(folder, lengths=(9000, 7001)):
    """Flags that find a machine's own copy of the shards."""
    for number, length in enumerate(lengths):
        write_shard(folder / f"train_{number}.bin", length, number)
    write_shard(folder / "val_0.bin", 1500, 99)
    return dict(train_files=folder / "train_*.bin", val_files=folder / "val_*.bin")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return machine_with_shards(tmp_path_factory.mktemp("shards"))


# ---------------------------------------------------------------------------------------------------------
# Starting processes, and looking for them afterwards


class Started:
    """One run: its launchers (one for each machine), each of a session of its own as at a terminal, and their log."""

    def __init__(self, folder, commands, **environment):
        environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | environment
        self.folder, self.launchers, self.codes = folder, [], []
        for number, command in enumerate(commands):
            with open(folder / f"out{number}", "w") as out, open(folder / f"err{number}", "w") as err:
                self.launchers.append(subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                                       cwd=folder, env=environment, start_new_session=True))

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in (self.folder / "logs").glob("*.txt"))

    @property
    def errors(self) -> list[str]:
        return [(self.folder / f"err{number}").read_text() for number in range(len(self.launchers))]

    @property
    def sentences(self) -> list[list[str]]:
        """What the script said, for each machine."""
        return [[line for line in error.splitlines() if line.startswith("train_gpt.py: ")] for error in self.errors]

    def processes(self) -> dict[int, dict[str, str]]:
        """The environments of this run's processes, launchers included, by their ids."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end meanwhile
                if str(self.folder).encode() in (path / "cmdline").read_bytes():
                    found[int(path.name)] = dict(pair.split("=", 1) for pair in (path / "environ").read_text().split("\0") if "=" in pair)
        return found

    def until(self, text: str) -> "Started":
        """Wait until the log has this."""
        begin = time.monotonic()
        while text not in self.log:
            assert time.monotonic() - begin < LIMIT and any(l.poll() is None for l in self.launchers), self.errors
            time.sleep(0.05)
        return self

    def end(self) -> "Started":
        """Wait until the launchers have ended."""
        begin = time.monotonic()
        try:
            self.codes = [launcher.wait(max(1, LIMIT - (time.monotonic() - begin))) for launcher in self.launchers]
        finally:
            self.survivors = sorted(self.processes())
            self.clear()
        return self

    def clear(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def torchrun(*flags, processes=2, script=SCRIPT, options=("--standalone",)):
    return [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}", script, *flags]


def forked(*processes):
    return [sys.executable, FORKED, json.dumps([dict(script=str(p["script"]), flags=[str(f) for f in p["flags"]],
                                                     environment=p.get("environment", {})) for p in processes])]


def flags(folder, shards, settings=SMALL, **more):
    return as_flags(**settings | shards | dict(log_dir=folder / "logs", run_id="run") | more)


@pytest.fixture
def start(tmp_path, shards):
    """A function that starts a run in the test's folder; whatever of it is left at the test's end is ended."""
    runs = []

    def started(commands, **environment):
        runs.append(Started(tmp_path, commands, **environment))
        return runs[-1]
    yield started
    for run in runs:
        run.clear()


LINE = re.compile(r"step:\d+/\d+ (val_loss:\d+\.\d{4} )?train_time:\d+ms step_avg:\d+\.\d\dms( train_loss:\d+\.\d{4})?")


def assert_log_is_whole(run, steps):
    """To its last line, which is in the form of the lines before, and no step is missing."""
    assert run.log.endswith("\n")
    lines = body(run.log)
    assert lines[0].startswith("log: ") and all(LINE.fullmatch(line) for line in lines[1:])
    trained = [int(re.match(r"step:(\d+)", line)[1]) for line in lines[1:] if "train_loss" in line]
    assert trained == list(range(1, len(trained) + 1)) and len(trained) >= steps


def assert_ended_with(run, *words, steps=3):
    """Not with success, with one line on each machine that has these words, with no traceback of the script's, with nothing
    left running, and with a whole log."""
    assert all(run.codes), run.errors
    for said, error in zip(run.sentences, run.errors):
        assert len(said) == 1, error
        for word in words:
            assert word in said[0]
        assert 'File "' + str(SCRIPT) not in error
    assert not run.survivors
    if steps:
        assert_log_is_whole(run, steps)
    else:
        assert not run.log


# ---------------------------------------------------------------------------------------------------------
# The same curve


HERE = f"machine 0 ({platform.node()})"


@pytest.fixture(scope="module")
def stopped(shards, tmp_path_factory):
    """A run of which process 1 is stopped in the middle of a collective: started first, since torchrun takes half a minute to
    end a process that is stopped, and other tests can run meanwhile."""
    folder = tmp_path_factory.mktemp("stopped")
    command = torchrun(*flags(folder, shards, ENDLESS, timeout=10), script=OBSERVED)
    run = Started(folder, [command], ACCIDENT="stop")
    yield run
    run.clear()


@pytest.fixture(scope="module")
def curves(shards, tmp_path_factory, stopped):
    """The same 60 steps on 1, 2, 4 and 8 processes: the run, and the records of its processes."""
    runs = {}
    for processes in (1, 2, 4, 8):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        arguments = flags(folder, shards)
        by_torchrun = processes in (2, 4)
        command = (torchrun(*arguments, processes=processes, script=OBSERVED) if by_torchrun else
                   forked(*[dict(script=OBSERVED, flags=arguments)] * processes))
        run = Started(folder, [command], RECORD=str(folder)).end()
        assert run.codes == [0], run.errors
        runs[processes] = run, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return runs


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_weights_begin_alike_and_stay_alike_on_all_processes(curves, processes):
    """Bit for bit: processes that drift apart by a rounding train different networks in the end."""
    records = curves[processes][1]
    assert {record["initial weights"] for record in records} == {curves[1][1][0]["initial weights"]}
    assert len({record["final weights"] for record in records}) == 1
    assert records[0]["initial weights"] != records[0]["final weights"]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_sequences_of_one(curves, processes):
    """Inputs and targets, each exactly once and at the same step."""
    alone, records = curves[1][1][0], curves[processes][1]
    assert len(alone["sequences"]) == 60 * 8
    taken_in_turn = [sequence for turn in zip(*(record["sequences"] for record in records), strict=True) for sequence in turn]
    assert taken_in_turn == alone["sequences"]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_losses_are_those_of_one_process(curves, processes):
    """Each step's loss and each validation's, by the numbers of which the log shows four digits."""
    alone, records = curves[1][1][0], curves[processes][1]
    for kind, count in (("losses", 60), ("validations", 4)):
        assert len(alone[kind]) == count and alone[kind][-1] < alone[kind][0] - 0.5
        for record in records:
            assert record[kind] == records[0][kind]  # all processes read the same sum
        assert records[0][kind] == pytest.approx(alone[kind], abs=1e-4, rel=0)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_clean_end(curves, processes):
    """Exit code 0, nothing on stderr, the process group left, nobody there any more, one log."""
    run, records = curves[processes]
    assert run.errors == [""] and not run.survivors
    assert not any(record["group is left"] for record in records)
    assert [path.name for path in (run.folder / "logs").iterdir()] == ["run.txt"]
    assert body(run.log)[-1].startswith("peak memory")
    if processes in (1, 8):
        codes = json.loads((run.folder / "out0").read_text().splitlines()[-1])
        assert codes == [0] * processes
