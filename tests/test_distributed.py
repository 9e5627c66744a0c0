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


def two_machines():
    """torchrun's options for each of two launchers that are to find each other on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"


def forked(*runs):
    """Of each run the processes, as dictionaries of what forked.py wants to know."""
    whole = [[dict(script=str(p["script"]), flags=[str(f) for f in p["flags"]], environment=p.get("environment", {}),
                   errors=p.get("errors") and str(p["errors"])) for p in processes] for processes in runs]
    return [sys.executable, FORKED, json.dumps(whole)]


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
def stopped_and_hung(shards, tmp_path_factory):
    """Two runs, of which process 1 is stopped, or hangs, in the middle of a collective. They start first and are looked at last:
    torchrun takes half a minute to end a process that is stopped, and other tests can run meanwhile."""
    runs = []
    for accident in ("stop", "hang"):
        folder = tmp_path_factory.mktemp(accident)
        runs.append(Started(folder, [torchrun(*flags(folder, shards, ENDLESS, timeout=15), script=OBSERVED)], ACCIDENT=accident))
    yield runs
    for run in runs:
        run.clear()


@pytest.fixture(scope="module")
def curve(shards, tmp_path_factory, stopped_and_hung):
    """A function that does the same 60 steps on some processes, at its first call for so many: the run, and the records of its
    processes. Of 4 processes, two machines have two each, in so far as two launchers meet on the loopback."""
    @functools.cache
    def of(processes):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        arguments = flags(folder, shards)
        commands = [forked([dict(script=OBSERVED, flags=arguments)] * processes)]
        if processes == 2:
            commands = [torchrun(*arguments, script=OBSERVED)]
        elif processes == 4:
            commands = [torchrun(*arguments, script=OBSERVED, options=options) for options in [two_machines()] * 2]
        run = Started(folder, commands, RECORD=str(folder)).end()
        assert run.codes == [0] * len(commands), run.errors
        return run, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return of


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_weights_begin_alike_and_stay_alike_on_all_processes(curve, processes):
    """Bit for bit: processes that drift apart by a rounding train different networks in the end."""
    records = curve(processes)[1]
    assert {record["initial weights"] for record in records} == {curve(1)[1][0]["initial weights"]}
    assert len({record["final weights"] for record in records}) == 1
    assert records[0]["initial weights"] != records[0]["final weights"]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_sequences_of_one(curve, processes):
    """Inputs and targets, each exactly once and at the same step."""
    alone, records = curve(1)[1][0], curve(processes)[1]
    assert len(alone["sequences"]) == 60 * 8
    taken_in_turn = [sequence for turn in zip(*(record["sequences"] for record in records), strict=True) for sequence in turn]
    assert taken_in_turn == alone["sequences"]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_losses_are_those_of_one_process(curve, processes):
    """Each step's loss and each validation's, by the numbers of which the log shows four digits."""
    alone, records = curve(1)[1][0], curve(processes)[1]
    for kind, count in (("losses", 60), ("validations", 4)):
        assert len(alone[kind]) == count and alone[kind][-1] < alone[kind][0] - 0.5
        for record in records:
            assert record[kind] == records[0][kind]  # all processes read the same sum
        assert records[0][kind] == pytest.approx(alone[kind], abs=1e-4, rel=0)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_clean_end(curve, processes):
    """Exit code 0, nothing on stderr, the process group left, nobody there any more, one log."""
    run, records = curve(processes)
    assert not any(run.errors) and not run.survivors
    assert not any(record["group is left"] for record in records)
    assert [path.name for path in (run.folder / "logs").iterdir()] == ["run.txt"]
    assert body(run.log)[-1].startswith("peak memory")
    if processes in (1, 8):
        codes = json.loads((run.folder / "out0").read_text().splitlines()[-1])
        assert codes == [[0] * processes]


# ---------------------------------------------------------------------------------------------------------
# Gradients: reduced once a step, while the backward pass goes on


MIB = 1 << 20
# (name, elements, dtype, whether Muon has it): around the limit of a bucket, which is 1 MiB, and well below
SIZES = [("limit", MIB // 4, torch.float32, False), ("below", MIB // 4 - 1, torch.float32, False), ("above", MIB // 4 + 1, torch.float32, False),
         ("limit16", MIB // 2, torch.bfloat16, False), ("below16", MIB // 2 - 1, torch.bfloat16, False), ("one", 1, torch.float32, False),
         ("one16", 1, torch.bfloat16, False), ("matrix", MIB // 4, torch.float32, True), ("matrix2", MIB // 4, torch.float32, True),
         ("matrix3", MIB // 4, torch.float32, True), ("small_matrix", 64, torch.float32, True), ("unused", 7, torch.float32, False),
         ("unused_matrix", 49, torch.float32, True)]


class Ladder(torch.nn.Module):
    """Parameters of chosen sizes, whose gradients are small whole numbers, so that every sum of them is exact in bfloat16 too, in
    whatever order. Its backward pass reaches them one after the other, the first one last."""

    def __init__(self):
        super().__init__()
        for name, count, dtype, matrix in SIZES:
            shape = (64, count // 64) if matrix and count >= 64 else (7, 7) if matrix else (count,)
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, inputs, targets, window):
        x = torch.zeros(())
        for index, (name, p) in enumerate(self.named_parameters()):
            if "unused" not in name:
                whole = (torch.arange(p.numel()) % 3 + int(inputs) + index % 2).to(p.dtype).view_as(p)
                x = x + (p * whole).sum().float()
        return x + targets


def ladder(machine, **watchdog):
    model = Ladder()
    muon = train_gpt.Muon([p for name, p in model.named_parameters() if p.ndim > 1], rank=machine.rank, world_size=machine.world_size)
    return model, muon, train_gpt.GradientReducer(model, [muon], machine, SimpleNamespace(place=0, asked=0))


def pretend(rank=0, world_size=2):
    return train_gpt.Machine(torch.device("cpu"), "a test", torch.float32, rank, rank, world_size)


def watch(events, patch):
    """Add ("sum up", bytes, where to) to `events` at each collective; `patch` sets an attribute of torch.distributed."""
    for name in ("all_reduce", "reduce"):
        def call(t, *where, function=getattr(dist, name), async_op=False, **kwargs):
            events.append(("sum up", t.nbytes, *where))
            return function(t, *where, async_op=async_op, **kwargs)
        patch(dist, name, call)


def reduce_in_a_process(rank, world_size, folder):
    """A step of three micro-steps by the reducer, and by its obvious twin: each gradient after the backward pass."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    model, muon, reducer = ladder(pretend(rank, world_size))
    events, after_each = [], []
    watch(events, setattr)
    for number in range(3):
        reducer.last = number == 2
        model(3 * rank + number, torch.zeros(()), None).backward()
        after_each.append(len(events))
    total = torch.tensor(float(rank))
    reducer.finish(total)
    twin = Ladder()
    for number in range(3):
        twin(3 * rank + number, torch.zeros(()), None).backward()
    wrong = []
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if q.grad is None:
            wrong += [name] * (p.grad is not None)
            continue
        dist.all_reduce(q.grad)
        if muon.owner.get(p, rank) == rank and not torch.equal(p.grad, q.grad):
            wrong.append(name)
    torch.save((wrong, after_each, total.item(), events), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_are_those_of_a_reduction_of_everything_afterwards(world_size, tmp_path):
    """In float32 and bfloat16, alone and in buckets, for parameters without a gradient, and after several micro-steps, of which
    the earlier ones send nothing."""
    torch.multiprocessing.start_processes(reduce_in_a_process, (world_size, str(tmp_path)), nprocs=world_size, start_method="fork")
    for rank in range(world_size):
        wrong, after_each, total, events = torch.load(tmp_path / f"{rank}.pt")
        assert not wrong
        assert after_each[:2] == [0, 0] and after_each[2] > 3
        assert total == sum(range(world_size))


class Arrived:
    def wait(self):
        pass


@pytest.fixture
def sums(monkeypatch):
    """What is summed up, of processes in name only."""
    events = []
    for name in ("all_reduce", "reduce"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: Arrived())
    watch(events, monkeypatch.setattr)
    return events


def test_large_gradients_travel_alone_to_where_they_are_needed_and_small_ones_together(sums):
    model, muon, reducer = ladder(pretend())
    reducer.last = True
    model(0, torch.zeros(()), None).backward()
    reducer.finish(torch.zeros(()))
    sizes = [event[1] for event in sums]
    sent = sum(p.nbytes for name, p in model.named_parameters() if "unused" not in name)
    assert sum(sizes) == sent + 4  # each once, and the loss
    # Muon's three large matrices go to their owners alone: by shares of equal size, two to process 0 and one to process 1.
    assert sorted(event[1:] for event in sums if len(event) == 3) == [(MIB, 0), (MIB, 0), (MIB, 1)]
    large = [p for name, p in model.named_parameters() if p.nbytes >= MIB]
    small = [p for name, p in model.named_parameters() if p.nbytes < MIB and "unused" not in name]
    assert len(large) == 6 and len(sums) <= len(large) + 5  # a bucket that fills up and one that does not, of each dtype; the loss
    assert len(small) > 4 and not {event[1] for event in sums} & {p.nbytes for p in small if p.numel() > 1}  # none by itself


def test_a_step_sums_up_once_whatever_its_micro_steps(sums, monkeypatch):
    """And moves the same bytes, in the same order."""
    def gather(gathered, mine, async_op=False):
        sums.append(("gather", mine.nbytes))
        return Arrived()
    monkeypatch.setattr(train_gpt, "all_gather", gather)
    found = []
    for micro_steps in (1, 4):
        model, muon, reducer = ladder(pretend())
        sums.clear()
        batches = [(number, torch.zeros(())) for number in range(micro_steps)]
        train_gpt.training_step(model, [muon], batches, torch.zeros(()), micro_steps, reducer)
        found.append(list(sums))
    assert found[0] == found[1] and found[0]


def small_network(model_dim=256):
    """One whose MLPs have matrices of 1 MiB, and what trains it."""
    hp = train_gpt.Hyperparameters(**SMALL | dict(model_dim=model_dim, max_window=128))
    machine = pretend()
    model = train_gpt.build_model(hp, 257, machine)
    with torch.no_grad():  # what begins at zero lets no gradient through
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.02)
    return hp, machine, model, train_gpt.build_optimizers(model, hp, machine)


def order_of_backward(model, network, hp, machine, optimizers, sums):
    """One backward pass of the reducer's: what was computed, which gradient was ready, what was summed up, in that order. And the
    loss and the gradients."""
    sums.clear()
    names = {p: name for name, p in network.named_parameters()}
    for p, name in names.items():
        p.register_post_accumulate_grad_hook(lambda p, name=name: sums.append(("ready", name)))
    reducer = train_gpt.GradientReducer(network, optimizers, machine, SimpleNamespace(place=0, asked=0))
    ids = torch.arange(128, dtype=torch.int32) % 250
    loss = model(ids, ids.long().roll(-1), torch.tensor(1, dtype=torch.int32))
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            if "AccumulateGrad" not in node.name():
                node.register_prehook(lambda *_: sums.append(("compute",)))
            nodes += [following for following, _ in node.next_functions if following]
    reducer.last = True
    loss.backward()
    return list(sums), loss.detach(), {name: p.grad.clone() for p, name in names.items() if p.grad is not None}


def computed_after_each(events, kind):
    """How many of the backward pass's nodes are still to be computed at each event of a kind."""
    return [sum(later[0] == "compute" for later in events[index:]) for index, event in enumerate(events) if event[0] == kind]


def test_sums_start_while_the_backward_pass_goes_on(sums):
    """The last layer's gradients are on their way before the first one's are computed."""
    hp, machine, model, optimizers = small_network()
    events, _, grads = order_of_backward(model, model, hp, machine, optimizers, sums)
    remaining = computed_after_each(events, "sum up")
    assert len(remaining) >= 12  # the two matrices of each layer's MLP
    total = sum(event[0] == "compute" for event in events)
    assert remaining[0] > 0.7 * total and remaining[len(remaining) // 2] > 0.2 * total
    first = events.index(("sum up", MIB, 1))
    assert events.index(("ready", "blocks.5.mlp.c_proj.weight")) < first < events.index(("ready", "blocks.4.mlp.c_proj.weight"))


@pytest.fixture
def traceable(monkeypatch):
    """torch.compile without code generation, and an attention that can be traced on a CPU, since FlexAttention's backward cannot."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(train_gpt, "attention", lambda q, k, v, block_mask, scale: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale))
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=limit), torch._inductor.config.patch(coordinate_descent_tuning=False):
        yield  # pytest's own monkeypatch would take these settings away when it undoes what it did
    torch._dynamo.reset()


def test_network_of_several_gpus_is_compiled_in_parts_whose_gradients_leave_early(sums, traceable):
    """And computes what the plain one does: the same loss and gradients."""
    hp, machine, plain, optimizers = small_network()
    _, loss, grads = order_of_backward(plain, plain, hp, machine, optimizers, sums)
    hp, machine, network, optimizers = small_network()
    network.load_state_dict(plain.state_dict())
    model = train_gpt.compiled(network, hp, SimpleNamespace(is_gpu=True, world_size=2))
    events, loss_in_parts, grads_in_parts = order_of_backward(model, network, hp, machine, optimizers, sums)
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-6, atol=1e-6)
    assert grads_in_parts.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_in_parts[name], grad, rtol=1e-5, atol=1e-6, msg=name)
    remaining = computed_after_each(events, "sum up")
    # Seven parts, the loss and six blocks, and a few operations between: after each part its gradients leave.
    assert len([count for count in set(remaining) if count]) >= 5


# ---------------------------------------------------------------------------------------------------------
# Several machines


def test_two_machines_write_one_log_and_print_each_line_once(curve):
    """Of the four processes, two are the second launcher's; the curve is looked at above."""
    run, _ = curve(4)
    assert len(run.launchers) == 2
    printed = [(run.folder / f"out{number}").read_text() for number in range(2)]
    assert sorted(text.count("step:60/60 train_time") for text in printed) == [0, 1]


@pytest.fixture
def two_hosts():
    """Two network namespaces with an address each, and a cable between them: as commands to be put before others."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    tag = f"{os.getpid() % 10000}"
    names, made = [f"host{i}-{tag}" for i in range(2)], []
    commands = [f"ip netns add {names[0]}", f"ip netns add {names[1]}",
                f"ip link add cable0-{tag} netns {names[0]} type veth peer name cable1-{tag} netns {names[1]}"]
    for i, name in enumerate(names):
        commands += [f"ip -n {name} address add 10.173.29.{i + 1}/24 dev cable{i}-{tag}", f"ip -n {name} link set cable{i}-{tag} up",
                     f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            result = subprocess.run(command.split(), capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"network namespaces cannot be made here: `{command}` says {result.stderr.strip()}")
        yield [["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=cable{i}-{tag}"] for i, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_two_hosts(two_hosts, *arguments):
    """What is to be started on each: process 0 on the first, at whose address they meet."""
    return [[*inside, *torchrun(*arguments, processes=1, script=OBSERVED, options=(
        "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=10.173.29.1:29400", "--rdzv_id=test", f"--local_addr=10.173.29.{i + 1}",
        f"--rdzv_conf=is_host={1 - i}"))] for i, inside in enumerate(two_hosts)]


def test_two_hosts_with_their_own_addresses(two_hosts, curve, start, shards, tmp_path):
    """And their own network, which is all that they share: the first step's loss is that of one process."""
    run = start(on_two_hosts(two_hosts, *flags(tmp_path, shards, num_iterations=4)), RECORD=str(tmp_path)).end()
    assert run.codes == [0, 0] and not run.survivors, run.errors
    unexpected = [line for error in run.errors for line in error.splitlines() if "hostname of the client socket" not in line]
    assert not unexpected  # torch notes that these hosts have no names
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0]["final weights"] == records[1]["final weights"]
    assert records[0]["losses"] == records[1]["losses"] and len(records[0]["losses"]) == 4
    # The first step of any run is the same, whatever the number of steps; later ones have other learning rates.
    assert records[0]["losses"][0] == pytest.approx(curve(1)[1][0]["losses"][0], abs=1e-4)


def test_host_that_is_cut_off(two_hosts, start, shards, tmp_path):
    """Neither can tell the other, so each ends by what it does not hear. On the second host the launcher itself goes on waiting
    for the first one's, as long as its kernel lets it, and is not ours."""
    run = start(on_two_hosts(two_hosts, *flags(tmp_path, shards, ENDLESS, timeout=8))).until("step:4/")
    subprocess.run(["ip", "-n", two_hosts[0][3], "link", "set", two_hosts[0][-1].split("=")[1], "down"], check=True)
    begin = time.monotonic()
    while any("RANK" in environment for environment in run.processes().values()):
        assert time.monotonic() - begin < 60, run.errors
        time.sleep(0.1)
    assert [len(said) for said in run.sentences] == [1, 1], run.errors
    assert "process 1 on machine 1" in run.sentences[0][0] and "cut off" in run.sentences[0][0]
    assert "launcher of process 0" in run.sentences[1][0]
    assert_log_is_whole(run, 3)


# ---------------------------------------------------------------------------------------------------------
# Failures before the first step: processes that do not start from the same


OTHER = f"process 1 on machine 1 ({platform.node()})"
REFUSED = dict(setting=("--head_lr 0.005", "0.004"), script=("script",), size=("train_1.bin", "7000", "7001"), missing=("train_1.bin",))


@pytest.fixture(scope="module")
def refused(shards, tmp_path_factory):
    """Four runs on two machines with one process each, of which the second differs in something: exit codes and stderr."""
    folder = tmp_path_factory.mktemp("refused")
    copy = folder / "train_gpt.py"
    copy.write_text(SCRIPT.read_text() + "# one line more\n")
    first = dict(script=SCRIPT, flags=flags(folder, shards))
    second = dict(
        setting=dict(script=SCRIPT, flags=flags(folder, shards, head_lr=0.005)), script=dict(script=copy, flags=flags(folder, shards)),
        size=dict(script=SCRIPT, flags=flags(folder, machine_with_shards(folder / "size", (9000, 7000)))),
        missing=dict(script=SCRIPT, flags=flags(folder, machine_with_shards(folder / "missing", (9000,)))))
    pairs = [[p | dict(environment=dict(GROUP_RANK=i, LOCAL_RANK=0), errors=folder / f"{name}{i}") for i, p in enumerate((first, second[name]))]
             for name in REFUSED]
    run = Started(folder, [forked(*pairs)]).end()
    assert run.codes == [0] and not run.survivors and not run.log, run.errors
    codes = json.loads((folder / "out0").read_text().splitlines()[-1])
    return {name: (pair, [(folder / f"{name}{i}").read_text() for i in range(2)]) for name, pair in zip(REFUSED, codes)}


@pytest.mark.parametrize("difference", REFUSED)
def test_another_start_on_one_machine_is_refused_by_all(refused, difference):
    """Another setting, script, size of a shard; and a shard that is missing, though the run could do without: tokens repeat. All
    end before anything is trained, with the same line on both machines."""
    codes, (here, there) = refused[difference]
    assert codes == [2, 2] and here == there and here.startswith("train_gpt.py: ") and here.count("\n") == 1
    for words in (OTHER, *REFUSED[difference]):
        assert words in here


def test_a_machine_without_shards_by_torchrun(start, shards, tmp_path):
    """Its own launcher and the other's both end, each with the line that names it."""
    none = shards | dict(train_files=tmp_path / "nothing_*.bin")
    options = two_machines()
    run = start([torchrun(*flags(tmp_path, files), processes=1, options=options) for files in (shards, none)]).end()
    assert_ended_with(run, "process ", "nothing_*.bin", steps=0)
    assert run.sentences[0] == run.sentences[1]


# ---------------------------------------------------------------------------------------------------------
# Failures in the run


def test_process_that_is_killed(start, shards, tmp_path):
    run = start([torchrun(*flags(tmp_path, shards, ENDLESS), script=OBSERVED)], ACCIDENT="kill").end()
    assert_ended_with(run, f"process 1 on {HERE}", "killed", "step 4")


def test_interrupt_of_the_launcher(start, shards, tmp_path):
    run = start([torchrun(*flags(tmp_path, shards, ENDLESS))]).until("step:4/")
    os.kill(run.launchers[0].pid, signal.SIGINT)
    assert_ended_with(run.end(), "SIGINT", "after step")


def test_interrupt_from_the_keyboard(start, shards, tmp_path):
    """Which the terminal sends to all processes."""
    run = start([torchrun(*flags(tmp_path, shards, ENDLESS))]).until("step:4/")
    os.killpg(run.launchers[0].pid, signal.SIGINT)
    assert_ended_with(run.end(), "SIGINT", "after step")


def test_request_to_end(start, shards, tmp_path):
    """As batch systems send it."""
    run = start([torchrun(*flags(tmp_path, shards, ENDLESS))]).until("step:4/")
    os.kill(run.launchers[0].pid, signal.SIGTERM)
    assert_ended_with(run.end(), "SIGTERM", "after step")


def test_process_that_hangs(stopped_and_hung):
    """It still answers, but its work does not go on."""
    assert_ended_with(stopped_and_hung[1].end(), f"process 1 on {HERE}", "no progress", "15 s", "step 4")


def test_process_that_is_stopped(stopped_and_hung):
    """In the middle of a collective."""
    assert_ended_with(stopped_and_hung[0].end(), f"process 1 on {HERE}", "stopped", "step 4")
