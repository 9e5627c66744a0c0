"""One run on several processes: the same curve on 1, 2, 4 and 8 of them, what travels between them,
several machines, and an end within bounds, with one line, whatever happens to one of them.

The processes are real: started by torchrun, or by forked.py, which does the same with one import of
torch for all.
"""

import contextlib
import functools
import json
import os
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
from conftest import ROOT
from test_run import as_flags, body

import train_gpt

SCRIPT = ROOT / "train_gpt.py"
FORKED = ROOT / "tests" / "forked.py"
OBSERVED = ROOT / "tests" / "observed.py"
LIMIT = 150  # seconds, after which a test ends what it started, and fails

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes by Linux's /proc"
)

# As small as the network can be: 40 steps of 8 sequences in a few seconds.
SMALL = dict(
    train_seq_len=128,
    val_seq_len=256,
    seqs_per_step=8,
    num_layers=6,
    num_heads=1,
    head_dim=16,
    model_dim=16,
    attention_free_layers=(1, 2, 3, 4),
    num_iterations=40,
    val_tokens=900,
    val_loss_every=20,
    max_window=256,
    dtype="float32",
    sample=0,
    repeat=True,
)
ENDLESS = SMALL | dict(num_iterations=100000, seqs_per_step=4)

# How far losses of 40 steps on different numbers of processes may lie apart. Measured, from
# projections that are not zero: 5e-7 on 2 and 4 processes, 1e-6 on 8, at losses of 3.5 to 6.
SPREAD = 5e-6


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


# --------------------------------------------------------------------------------------------------
# Starting processes, and looking for them afterwards


class Started:
    """One run: its launchers (one for each machine), each of a session of its own as at a terminal,
    and their log."""

    def __init__(self, folder, commands, **environment):
        alone = dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        self.folder = folder
        self.launchers = []
        self.codes = []
        for number, command in enumerate(commands):
            with (
                open(folder / f"out{number}", "w") as out,
                open(folder / f"err{number}", "w") as err,
            ):
                launcher = subprocess.Popen(
                    [*map(str, command)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=folder,
                    env=os.environ | alone | environment,
                    start_new_session=True,
                )
            self.launchers.append(launcher)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in (self.folder / "logs").glob("*.txt"))

    @property
    def errors(self) -> list[str]:
        return [(self.folder / f"err{number}").read_text() for number in range(len(self.launchers))]

    @property
    def sentences(self) -> list[list[str]]:
        """What the script said, for each machine."""
        return [re.findall(r"^train_gpt\.py: .*$", error, re.MULTILINE) for error in self.errors]

    def processes(self) -> dict[int, str]:
        """The environments of this run's processes, launchers included, by their ids."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end meanwhile
                if str(self.folder).encode() in (path / "cmdline").read_bytes():
                    found[int(path.name)] = (path / "environ").read_text()
        return found

    def wait_until(self, condition) -> "Started":
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < LIMIT, self.errors
            time.sleep(0.05)
        return self

    def until(self, text: str) -> "Started":
        """Wait until the log has this."""

        def condition():
            assert any(launcher.poll() is None for launcher in self.launchers), self.errors
            return text in self.log

        return self.wait_until(condition)

    def end(self) -> "Started":
        """Wait until the launchers have ended."""
        try:
            self.wait_until(lambda: None not in [launcher.poll() for launcher in self.launchers])
            self.codes = [launcher.returncode for launcher in self.launchers]
        finally:
            self.survivors = sorted(self.processes())
            self.clear()
        return self

    def clear(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()


def torchrun(*flags, processes=2, script=SCRIPT, options=("--standalone",)):
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*launcher, f"--nproc_per_node={processes}", script, *flags]


def two_machines():
    """torchrun's options for each of two launchers that are to find each other on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    return "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=test"


def forked(*runs):
    """The command that starts runs, each a list of its processes in forked.py's terms."""
    whole = [[dict(environment={}, errors=None) | process for process in run] for run in runs]
    return [sys.executable, FORKED, json.dumps(whole, default=str)]


def flags(folder, shards, settings=SMALL, **more):
    return as_flags(**settings | shards | dict(log_dir=folder / "logs", run_id="run") | more)


@pytest.fixture
def start(tmp_path):
    """A function that starts a run in the test's folder; what is left of it is ended at last."""
    runs = []

    def started(commands, **environment):
        runs.append(Started(tmp_path, commands, **environment))
        return runs[-1]

    yield started
    for run in runs:
        run.clear()


LINE = re.compile(
    r"step:\d+/\d+ (val_loss:\d+\.\d{4} )?train_time:\d+ms step_avg:\d+\.\d\dms"
    r"( train_loss:\d+\.\d{4})?"
)


def assert_log_is_whole(run, steps):
    """To its last line, which is in the form of the lines before, and no step is missing."""
    assert run.log.endswith("\n")
    lines = body(run.log)
    for line in lines:
        assert LINE.fullmatch(line)
    trained = [int(re.match(r"step:(\d+)", line)[1]) for line in lines if "train_loss" in line]
    assert trained == list(range(1, len(trained) + 1))
    assert len(trained) >= steps


def assert_ended_with(run, *words, steps=3):
    """Not with success, with one line in all that has these words, with no traceback of the
    script's, with nothing left running, and with a whole log."""
    assert all(run.codes), run.errors
    (sentence,) = sum(run.sentences, [])
    for word in words:
        assert word in sentence
    assert f'File "{SCRIPT}"' not in "".join(run.errors)
    assert not run.survivors
    if steps:
        assert_log_is_whole(run, steps)
    else:
        assert not run.log


# --------------------------------------------------------------------------------------------------
# The same curve


@pytest.fixture(scope="module")
def stopped_and_hung(shards, tmp_path_factory):
    """Runs of which process 1 is stopped, or hangs, in the middle of a collective.

    They start first and are looked at last: torchrun takes half a minute to end a process that is
    stopped, and other tests can run meanwhile.
    """
    runs = {}
    for accident, processes in (("stop", 2), ("hang", 4)):
        folder = tmp_path_factory.mktemp(accident)
        arguments = flags(folder, shards, ENDLESS, timeout=15)
        command = torchrun(*arguments, processes=processes, script=OBSERVED)
        runs[accident] = Started(folder, [command], ACCIDENT=accident)
    yield runs
    for run in runs.values():
        run.clear()


@pytest.fixture(scope="module")
def curve(shards, tmp_path_factory, stopped_and_hung):
    """A function that does the same 40 steps on some processes, at its first call for so many: the
    run, and the records of its processes.

    Of 4 processes, two machines have two each, in so far as two launchers meet on the loopback.
    """

    @functools.cache
    def of(processes):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        arguments = flags(folder, shards)
        commands = [forked([dict(script=OBSERVED, flags=arguments)] * processes)]
        if processes == 2:
            commands = [torchrun(*arguments, script=OBSERVED)]
        elif processes == 4:
            commands = [torchrun(*arguments, script=OBSERVED, options=two_machines())] * 2
        run = Started(folder, commands, RECORD=str(folder)).end()
        assert run.codes == [0] * len(commands), run.errors
        ranks = range(processes)
        return run, [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]

    return of


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_weights_begin_alike_and_stay_alike_on_all_processes(curve, processes):
    """Bit for bit: processes that drift apart by a rounding train different networks in the end."""
    records = curve(processes)[1]
    alone = curve(1)[1][0]
    assert {record["initial weights"] for record in records} == {alone["initial weights"]}
    assert len({record["final weights"] for record in records}) == 1
    assert records[0]["initial weights"] != records[0]["final weights"]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_sequences_of_one(curve, processes):
    """Inputs and targets, each exactly once and at the same step."""
    alone = curve(1)[1][0]["sequences"]
    taken = [record["sequences"] for record in curve(processes)[1]]
    assert len(alone) == 40 * 8
    assert [sequence for turn in zip(*taken, strict=True) for sequence in turn] == alone


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_losses_are_those_of_one_process(curve, processes):
    """Each step's loss and each validation's, with all digits."""
    alone = curve(1)[1][0]
    records = curve(processes)[1]
    for kind, count in (("losses", 40), ("validations", 3)):
        assert len(alone[kind]) == count
        assert alone[kind][-1] < alone[kind][0] - 0.5
        for record in records:
            assert record[kind] == records[0][kind]  # all processes read the same sum
        assert records[0][kind] == pytest.approx(alone[kind], abs=SPREAD, rel=0)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_clean_end(curve, processes):
    """Exit code 0, nothing on stderr, the process group left, nobody there any more, one log; and
    each line printed once."""
    run, records = curve(processes)
    assert not any(run.sentences)
    if len(run.launchers) == 1:  # of two launchers one may note that the other's store has gone
        assert not any(run.errors)
    assert not run.survivors
    assert not any(record["group is left"] for record in records)
    assert [path.name for path in (run.folder / "logs").iterdir()] == ["run.txt"]
    assert "peak memory" in body(run.log)[-3]
    printed = [path.read_text().splitlines() for path in run.folder.glob("out*")]
    assert len(printed) == len(run.launchers) == (2 if processes == 4 else 1)
    assert sum(line.startswith("step:40/40 train") for lines in printed for line in lines) == 1
    if processes in (1, 8):
        assert json.loads(printed[0][-1]) == [[0] * processes]


# --------------------------------------------------------------------------------------------------
# Gradients travel once a step


def pretend(rank=0, world_size=2):
    return train_gpt.Machine(torch.device("cpu"), "a test", torch.float32, rank, rank, world_size)


@pytest.fixture
def sent(monkeypatch):
    """What would travel: the function, its bytes, its destination, and how much is waited for."""
    events = []

    def collective(name):
        def call(*args, async_op=False, **kwargs):
            events.append(
                (name, args[0].nbytes, *args[1:2]) if name == "reduce" else (name, args[0].nbytes)
            )
            return SimpleNamespace(wait=lambda: events.append(("wait", 0)))

        return call

    for name in ("all_reduce", "reduce", "all_gather_into_tensor", "all_gather_single"):
        monkeypatch.setattr(dist, name, collective(name), raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    return events


def small_network():
    """One of whose parameters all are used."""
    hp = train_gpt.Hyperparameters(**SMALL | dict(attention_free_layers=(3,)))
    model = train_gpt.build_model(hp, 257, pretend())
    return hp, model, train_gpt.build_optimizers(model, hp, pretend())


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_gradients_travel_once_a_step_each_to_where_it_is_needed(sent, micro_steps):
    """Muon's to their owners alone, the others to all, before the first is waited for."""
    hp, model, optimizers = small_network()
    ids = torch.arange(128, dtype=torch.int32)
    window = torch.tensor(1, dtype=torch.int32)
    batches = [(ids, ids.long())] * micro_steps
    owner = optimizers[1].owner
    expected = [
        ("reduce", p.nbytes, owner[p]) if p in owner else ("all_reduce", p.nbytes)
        for p in model.parameters()
    ]
    assert {owner[p] for p in owner} == {0, 1}
    train_gpt.training_step(model, optimizers, batches, window, 2 * micro_steps, pretend())
    assert sent[: len(expected)] == expected
    gathered = [event for event in sent[len(expected) :] if event[0] != "wait"]
    assert len(gathered) == len(optimizers[1].param_groups)
    assert all(event[0].startswith("all_gather") for event in gathered)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_network_on_any_number_of_gpus_is_compiled_as_one_graph(world_size, monkeypatch):
    calls = []

    def compile(network, **settings):
        calls.append((network, settings))
        return "compiled"

    monkeypatch.setattr(torch, "compile", compile)
    hp, model, _ = small_network()
    gpu = SimpleNamespace(is_gpu=True, world_size=world_size)
    with torch._inductor.config.patch(coordinate_descent_tuning=False):
        assert train_gpt.compiled(model, hp, gpu) == "compiled"
    assert calls == [(model, dict(dynamic=False, fullgraph=True))]


# --------------------------------------------------------------------------------------------------
# Several machines


@pytest.fixture
def two_hosts():
    """Two network namespaces with an address each, and a cable between them: as commands to be put
    before others."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    tag = f"{os.getpid() % 10000}"
    names = [f"host{i}-{tag}" for i in range(2)]
    cables = [f"cable{i}-{tag}" for i in range(2)]
    commands = [f"ip netns add {name}" for name in names]
    commands += [
        f"ip link add {cables[0]} netns {names[0]} type veth peer name {cables[1]} netns {names[1]}"
    ]
    for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
        commands += [
            f"ip -n {name} address add 10.173.29.{i + 1}/24 dev {cable}",
            f"ip -n {name} link set {cable} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            result = subprocess.run(command.split(), capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"no network namespaces here: `{command}`: {result.stderr.strip()}")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}"]
            for name, cable in zip(names, cables, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_two_hosts(two_hosts, *arguments):
    """What is to be started on each: process 0 on the first, at whose address they meet."""
    commands = []
    for i, inside in enumerate(two_hosts):
        options = [
            "--nnodes=2",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=10.173.29.1:29400",
            "--rdzv_id=test",
            f"--local_addr=10.173.29.{i + 1}",
            f"--rdzv_conf=is_host={1 - i}",
        ]
        launcher = torchrun(*arguments, processes=1, script=OBSERVED, options=options)
        commands.append([*inside, *launcher])
    return commands


def test_two_hosts_with_their_own_addresses(two_hosts, curve, start, shards, tmp_path):
    """And their own network, all that they share: the first step's loss is that of one process."""
    arguments = flags(tmp_path, shards, num_iterations=4)
    run = start(on_two_hosts(two_hosts, *arguments), RECORD=str(tmp_path)).end()
    assert run.codes == [0, 0], run.errors
    assert not run.survivors
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0]["final weights"] == records[1]["final weights"]
    assert records[0]["losses"] == records[1]["losses"]
    assert len(records[0]["losses"]) == 4
    # Later steps have other learning rates than those of a run of 40 steps.
    alone = curve(1)[1][0]["losses"][0]
    assert records[0]["losses"][0] == pytest.approx(alone, abs=SPREAD, rel=0)


def test_host_that_is_cut_off(two_hosts, start, shards, tmp_path):
    """Neither can tell the other, so each ends by what it does not hear. On the second host the
    launcher itself goes on waiting for the first one's, as long as its kernel lets it."""
    arguments = flags(tmp_path, shards, ENDLESS, timeout=8)
    run = start(on_two_hosts(two_hosts, *arguments)).until("step:4/")
    host, cable = two_hosts[0][3], two_hosts[0][-1].split("=")[1]
    subprocess.run(["ip", "-n", host, "link", "set", cable, "down"], check=True)
    run.wait_until(lambda: not any("\0RANK=" in text for text in run.processes().values()))
    assert [len(said) for said in run.sentences] == [1, 1], run.errors
    assert "process 1 gave no answer" in run.sentences[0][0]
    assert "launcher of process 0" in run.sentences[1][0]
    assert_log_is_whole(run, 3)


# --------------------------------------------------------------------------------------------------
# Failures before the first step: processes that do not start from the same

REFUSED = dict(
    setting=("process 1", "--head_lr 0.005", "0.004"),
    script=("process 1", "script"),
    size=("process 1", "train_1.bin", "7000", "7001"),
    missing=("process 1", "train_1.bin"),
)


@pytest.fixture(scope="module")
def refused(shards, tmp_path_factory):
    """Four runs on two machines with one process each, of which the second differs in something:
    exit codes and stderr."""
    folder = tmp_path_factory.mktemp("refused")
    copy = folder / "train_gpt.py"
    copy.write_text(SCRIPT.read_text() + "# one line more\n")
    first = dict(script=SCRIPT, flags=flags(folder, shards))
    second = dict(
        setting=dict(flags=flags(folder, shards, head_lr=0.005)),
        script=dict(script=copy),
        size=dict(flags=flags(folder, machine_with_shards(folder / "size", (9000, 7000)))),
        missing=dict(flags=flags(folder, machine_with_shards(folder / "missing", (9000,)))),
    )
    runs = []
    for name in REFUSED:
        run = [first, first | second[name]]
        for i in range(2):
            place = dict(GROUP_RANK=i, LOCAL_RANK=0)
            run[i] = run[i] | dict(environment=place, errors=folder / f"{name}{i}")
        runs.append(run)
    run = Started(folder, [forked(*runs)]).end()
    assert run.codes == [0], run.errors
    assert not run.survivors
    assert not run.log
    codes = json.loads((folder / "out0").read_text().splitlines()[-1])
    said = {name: [(folder / f"{name}{i}").read_text() for i in range(2)] for name in REFUSED}
    return dict(zip(REFUSED, codes, strict=True)), said


@pytest.mark.parametrize("difference", REFUSED)
def test_another_start_on_one_machine_is_refused_by_all(refused, difference):
    """Before anything is trained, with the same line on both machines. A shard that is missing is
    such a difference, too, though the run could do without: tokens repeat."""
    codes, said = refused
    here, there = said[difference]
    assert codes[difference] == [2, 2]
    assert here == there
    assert here.startswith("train_gpt.py: ")
    assert here.count("\n") == 1
    for words in REFUSED[difference]:
        assert words in here


def test_bad_input_that_all_processes_meet_is_said_once(start, shards, tmp_path):
    """By four of them, under torchrun."""
    run = start([torchrun(*flags(tmp_path, shards, seqs_per_step=6), processes=4)]).end()
    assert_ended_with(run, "4 processes", "6 sequences", steps=0)
    assert set(re.findall(r"exitcode\s*: (\d+)", run.errors[0])) == {"2"}


def test_a_machine_without_shards_by_torchrun(start, shards, tmp_path):
    """It says what it lacks; the other, that it does not come, unless torchrun ends it first."""
    none = shards | dict(train_files=tmp_path / "nothing_*.bin")
    options = two_machines()
    commands = [
        torchrun(*flags(tmp_path, files, timeout=5), processes=1, options=options)
        for files in (shards, none)
    ]
    run = start(commands).end()
    assert all(run.codes)
    assert not run.survivors
    assert not run.log
    here, (there,) = run.sentences
    assert "nothing_*.bin" in there
    for sentence in here:
        assert "gave no answer" in sentence or "launcher" in sentence
    assert f'File "{SCRIPT}"' not in "".join(run.errors)


# --------------------------------------------------------------------------------------------------
# Failures in the run


@pytest.mark.parametrize("processes", [2, 4])
def test_process_that_is_killed(start, shards, tmp_path, processes):
    """Of four in a ring, one is no neighbour of the lost one. They do not wait for the timeout of
    300 seconds, which is longer than this test may take."""
    arguments = flags(tmp_path, shards, ENDLESS)
    command = torchrun(*arguments, processes=processes, script=OBSERVED)
    assert_ended_with(start([command], ACCIDENT="kill").end(), "process 1 gave no answer", "killed")


def test_process_that_fails_by_its_own_error_shows_it(start, shards, tmp_path):
    arguments = flags(tmp_path, shards, ENDLESS)
    run = start([torchrun(*arguments, script=OBSERVED)], ACCIDENT="fail").end()
    assert all(run.codes)
    assert not run.survivors
    assert "ValueError: an accident" in run.errors[0]
    assert f'File "{SCRIPT}"' in run.errors[0]
    for sentence in run.sentences[0]:  # of the survivor, unless torchrun has ended it before
        assert "process 1 gave no answer" in sentence
    assert_log_is_whole(run, 3)


@pytest.mark.parametrize(
    "number, everyone",
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)],
    ids=["interrupt of the launcher", "interrupt from the keyboard", "as batch systems ask"],
)
def test_run_that_is_asked_to_end(start, shards, tmp_path, number, everyone):
    """The keyboard's interrupt goes to all processes, and torchrun passes it on again."""
    run = start([torchrun(*flags(tmp_path, shards, ENDLESS))]).until("step:4/")
    send = os.killpg if everyone else os.kill
    send(run.launchers[0].pid, number)
    assert_ended_with(run.end(), number.name, "after step")


def test_process_that_hangs(stopped_and_hung):
    """It lives, but its work does not go on."""
    assert_ended_with(stopped_and_hung["hang"].end(), "process 1 gave no answer")


def test_process_that_is_stopped(stopped_and_hung):
    """In the middle of a collective."""
    assert_ended_with(stopped_and_hung["stop"].end(), "process 1 gave no answer", "stopped")
