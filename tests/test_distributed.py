"""One run of several processes: the curve of one process, one stop, one end, and equal starts."""

import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
import torch.distributed.run
from helpers import ROOT, SMALL, Processes, free_port, losses, refused, run, write_shards

import train_gpt

SCRIPT = ROOT / "train_gpt.py"
FLAGS = [*SMALL, "--seqs_per_step=4", "--num_iterations=10"]
ENDLESS = [*SMALL, "--num_iterations=10000", "--save_every=10000"]


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def curve(log):
    return [float(train_loss or val_loss) for _, train_loss, val_loss in losses(log)]


def write_recipe(folder, *parts):
    """A script whose recipe is that of train_gpt with some parts changed."""
    head = """
import sys
import torch
import train_gpt
from train_gpt import *

SOURCE = Path(__file__).read_text(encoding="utf-8")
"""
    path = folder / "recipe.py"
    path.write_text("\n".join([head, *parts, "sys.exit(main(recipe=sys.modules[__name__]))"]))
    return path


# At zero, rounding errors are all that the gradients of the scalars have, and Adam enlarges them.
NO_ZEROS = """
def build_model(*args):
    model = train_gpt.build_model(*args)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curve of one process, which is expected of others, too."""
    folder = tmp_path_factory.mktemp("alone")
    write_shards(folder)
    processes = run(folder, *FLAGS, script=write_recipe(folder, NO_ZEROS))
    return pytest.approx(curve(processes.log), abs=1.5e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_loss_curve_does_not_depend_on_the_number_of_processes(count, alone, folder):
    processes = run(folder, *FLAGS, count=count, script=write_recipe(folder, NO_ZEROS))
    assert curve(processes.log) == alone


# More state: numbers, and float32 for parameters in bfloat16.
AVERAGING_MUON = """
class AveragingMuon(train_gpt.Muon):
    def orthogonal_updates(self, group, own):
        updates = super().orthogonal_updates(group, own)
        for p, update in zip(own, updates):
            state = self.state[p]
            state["steps"] = state.get("steps", 0) + 1
            average = state.setdefault("average", torch.zeros_like(p, dtype=torch.float32))
            update.copy_(average.lerp_(update, 1 / state["steps"]))
        return updates

train_gpt.Muon = AveragingMuon

def build_model(*args):
    model = train_gpt.build_model(*args)
    for p in model.blocks.parameters():
        p.data = p.data.bfloat16() if p.ndim > 1 else p.data
    return model
"""


def test_optimizer_state_of_any_name_survives(folder):
    """Bit for bit on as many processes, within rounding on 1 instead of 2 and 2 instead of 1."""
    recipe = write_recipe(folder, AVERAGING_MUON)

    def end_of(run_id, count, *resume):
        flags = *FLAGS, f"--run_id={run_id}", "--save_every=3", "--keep=9", *resume
        run(folder, *flags, count=count, script=recipe)
        state = train_gpt.load_checkpoint(folder / "logs" / run_id / "step_00000010.pt")
        return curve((folder / "logs" / f"{run_id}.txt").read_text()), state

    expected, state = end_of("two", 2)
    _, same_state = end_of("again", 2, "--resume=logs/two/step_00000003.pt")
    for name in ("model", "optimizers"):
        torch.testing.assert_close(same_state[name], state[name], rtol=0, atol=0)
    one, _ = end_of("one", 1, "--resume=logs/two/step_00000003.pt")
    two, _ = end_of("two_at_last", 2, "--resume=logs/one/step_00000006.pt")
    for found in (one, two):
        assert found == pytest.approx(expected[-len(found) :], abs=1.5e-4)


# --------------------------------------------------------------------------------------------------
# The end


def assert_stopped_once(processes):
    """With one sentence, and a checkpoint of the last step in the log."""
    *_, (step, _, _) = losses(processes.log)
    path = f"logs/run/step_{int(step):08d}.pt"
    sentence = f"stopped by SIGTERM after step {step}; to continue, add --resume {path}\n"
    assert processes.output.count("stopped by") == processes.output.count(sentence) == 1
    assert train_gpt.load_checkpoint(processes.folder / path)["step"] == int(step)


def test_signal_on_one_process_stops_all(folder):
    processes = Processes(folder, *ENDLESS, count=2)
    processes.wait_for("step:2/")
    processes.send(signal.SIGTERM, rank=1)
    assert processes.wait() == [143, 143]
    assert_stopped_once(processes)


def test_sigterm_to_torchrun_stops_and_saves(folder):
    launcher = torch.distributed.run.__file__
    flags = "--standalone", "--nproc_per_node=2", str(SCRIPT), *ENDLESS
    processes = Processes(folder, *flags, script=launcher)
    processes.wait_for("step:2/")
    processes.send(signal.SIGTERM)
    processes.wait()
    assert_stopped_once(processes)


# As NCCL does, `destroy_process_group` waits here for processes that do not come.
ACCIDENT = """
def wait():
    time.sleep(1000)

dist.destroy_process_group = wait

def training_step(*args):
    if args[4] == 2 and os.environ["RANK"] == "1":
        raise ValueError("an accident")
    return train_gpt.training_step(*args)
"""


def test_failing_process_shows_its_error_and_ends_at_once(folder):
    processes = Processes(folder, *FLAGS, count=2, script=write_recipe(folder, ACCIDENT))
    assert processes.wait()[1] == 1
    assert "ValueError: an accident" in processes.outputs[1].read_text()


def test_process_that_refuses_alone_ends_at_once(folder):
    (folder / "logs").mkdir()
    (folder / "logs" / "run.txt").write_text("of another run")
    processes = Processes(folder, *FLAGS, count=2)
    assert processes.wait()[0] == 2
    assert re.fullmatch(r"train_gpt.py: the log .* exists; .*\n", processes.outputs[0].read_text())


# --------------------------------------------------------------------------------------------------
# The start


@pytest.mark.parametrize("difference", ["muon_lr", "train_shards", "script"])
def test_processes_that_differ_are_refused(difference, tmp_path):
    """On two machines, each with its folder. All name the difference."""
    port = free_port()
    processes = []
    for rank, name in enumerate(["here", "there"]):
        other = difference if rank else None
        folder = tmp_path / name
        folder.mkdir()
        write_shards(folder, seed=other == "train_shards")
        script = folder / "train_gpt.py"
        script.write_text(SCRIPT.read_text() + "# edited\n" * (other == "script"))
        flags = [*FLAGS, "--muon_lr=0.1"] if other == "muon_lr" else FLAGS
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2)
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes.append(Processes(folder, *flags, script=script, **ranks, **address))
    assert [process.wait() for process in processes] == [[2], [2]]
    here, there = (process.output for process in processes)
    assert re.fullmatch(f"train_gpt.py: {difference} is [^\n]* in process 1; [^\n]*\n", here)
    assert here == there
    assert not processes[0].log


@pytest.mark.parametrize(
    "ranks", [("0", "", ""), ("0", "0", "0"), ("2", "0", "2"), ("0", "0", "two"), ("0", "0", "3")]
)
def test_ranks_that_contradict_are_refused(ranks, folder, monkeypatch, capsys):
    """Also 3 processes, which cannot share 4 sequences."""
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), ranks, strict=True):
        monkeypatch.setenv(name, value)
    assert "processes" in refused(capsys, folder, "--seqs_per_step=4")


# --------------------------------------------------------------------------------------------------
# Two hosts


@pytest.fixture
def hosts():
    """The names of two network namespaces, joined by a cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    names = [f"{end}-{os.getpid()}" for end in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append("ip -n {} link add cable type veth peer name cable netns {}".format(*names))
    for number, name in enumerate(names, 1):
        commands.append(f"ip -n {name} address add 10.173.29.{number}/24 dev cable")
        commands.append(f"ip -n {name} link set cable up")
        commands.append(f"ip -n {name} link set lo up")
    try:
        for command in commands:
            if subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"no network namespaces here: `{command}` fails")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


ENTER_HOST = """
import ctypes
assert ctypes.CDLL(None).setns(os.open(f"/run/netns/{os.environ['HOST']}", os.O_RDONLY), 0) == 0
"""


def test_two_hosts_train_like_one_process(hosts, alone, tmp_path):
    """They share nothing but a network, and their paths differ. Process 1 writes no file."""
    processes = []
    for rank, host in enumerate(hosts):
        folder = tmp_path / host
        folder.mkdir()
        write_shards(folder)
        recipe = write_recipe(folder, NO_ZEROS, ENTER_HOST)
        network = dict(GLOO_SOCKET_IFNAME="cable", MASTER_ADDR="10.173.29.1", MASTER_PORT=29500)
        ranks = dict(RANK=rank, LOCAL_RANK=0, WORLD_SIZE=2, HOST=host)
        paths = f"--log_dir={folder}/logs", f"--train_files={folder}/train_*.bin"
        processes.append(Processes(folder, *FLAGS, *paths, script=recipe, **network, **ranks))
    assert [process.wait() for process in processes] == [[0], [0]]
    assert curve(processes[0].log) == alone
    assert not processes[1].log
