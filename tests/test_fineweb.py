"""data/cached_fineweb10B.py against a small hub on this machine. Nothing else is reached."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import cached_fineweb10B as fineweb
import huggingface_hub.file_download
import local_text
import numpy as np
import pytest
from conftest import ROOT
from hub import Hub, with_changed_byte
from huggingface_hub import constants

import train_gpt

SCRIPT = ROOT / "data" / "cached_fineweb10B.py"
VAL = "fineweb_val_000000.bin"
TRAIN_1, TRAIN_2, TRAIN_3 = (f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3))


def shard_bytes(seed: int, num_tokens: int) -> bytes:
    """A shard as the public ones are: the vocabulary in the header is 0, and means GPT-2's."""
    tokens = np.random.default_rng(seed).integers(0, train_gpt.GPT2_VOCAB, num_tokens)
    return local_text.shard_header(num_tokens, 0) + tokens.astype("<u2").tobytes()


def clean_environment() -> dict[str, str]:
    """The environment without the variables of the client and of proxies."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }


@pytest.fixture
def folder(tmp_path):
    """Where the shards go."""
    return tmp_path / "shards"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of three training shards and one for validation, to which the client is pointed.

    Nobody waits before trying again.
    """
    hub = Hub()
    hub.files[VAL] = shard_bytes(0, 10_001)
    for number, name in enumerate((TRAIN_1, TRAIN_2, TRAIN_3), 1):
        hub.files[name] = shard_bytes(number, 40_000 + number)
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    # main sets this one, and the test's end has to restore it.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE)
    monkeypatch.setattr(fineweb, "CHUNK", 16384)
    monkeypatch.setattr(fineweb, "WAITS", (0.001,) * 3)
    without_waiting = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.file_download, "time", without_waiting)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", without_waiting)
    huggingface_hub.utils._http.close_session()
    yield hub
    hub.close()
    huggingface_hub.utils._http.close_session()


@pytest.fixture
def run(hub, folder, monkeypatch, capsys):
    """Call the script with arguments: its exit code, what it printed, and what it complained of."""

    def call(*arguments):
        command = [str(SCRIPT), "--out", str(folder), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        code = fineweb.main()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def fetch(run):
    """Call the script, which has to succeed without a complaint: what it printed."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture
def refused(run, folder):
    """Call the script, which has to end with one sentence that contains the words.

    The shards that it leaves are those of `left`.
    """

    def call(arguments, *words, left):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.startswith("cached_fineweb10B.py: ") and err.count("\n") == 1
        for word in words:
            assert word in err
        shards = have(folder).items()
        assert {name: body for name, body in shards if name.endswith(".bin")} == left
        return err

    return call


def have(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def process(hub: Hub, folder: Path, *arguments, **environment) -> subprocess.Popen:
    """The script as a process of its own, pointed at the hub by the environment alone."""
    here = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "HF_HOME": f"{folder.parent}/home"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--out", str(folder), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment() | here | environment,
    )


# -----------------------------------------------------------------------------
# What is asked for arrives, once


def test_a_run_fetches_what_was_asked_for_and_the_next_one_nothing(hub, fetch, folder):
    out = fetch(2)
    assert "3 shards" in out.splitlines()[1] and "\r" not in out  # no terminal, no bar
    assert have(folder) == hub.first(2)
    tokens, vocab_size = train_gpt.open_shard(str(folder / TRAIN_2))
    assert len(tokens) == 40_002 and vocab_size == train_gpt.GPT2_VOCAB
    asked = len(hub.requests)
    assert "already" in fetch(2)
    assert len(hub.requests) == asked  # not even for the listing: the hub may be out of reach
    fetch()
    assert have(folder) == hub.files
    assert "already" in fetch()
    assert hub.sent == hub.sizes()


@pytest.mark.parametrize("count, page", [(0, 1000), (3, 2), (3, 1)])
def test_any_number_from_a_listing_in_pages(hub, fetch, folder, count, page):
    hub.page = page
    fetch(count)
    assert have(folder) == hub.first(count)


def test_another_dataset_has_another_folder_and_other_names(hub, run, tmp_path, monkeypatch):
    hub.dataset = "kjj0/finewebedu10B-gpt2"
    hub.files = {name.replace("fineweb", "finewebedu"): body for name, body in hub.files.items()}
    monkeypatch.setattr(fineweb, "__file__", str(tmp_path / "data" / SCRIPT.name))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "1", "--dataset", hub.dataset])
    assert fineweb.main() == 0
    assert have(tmp_path / "data" / "finewebedu10B") == hub.first(1)


def test_the_token_goes_to_the_hub_and_no_further(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    fetch(1)
    assert set(hub.requests) == {("hub", "Bearer hf_of_nobody"), ("store", None)}


def test_two_runs_at_once_share_the_work(hub, folder):
    hub.faults[TRAIN_1] = ["pause"]
    processes = [process(hub, folder, 3, HF_HUB_DOWNLOAD_TIMEOUT="100")]
    assert hub.hung.wait(30)
    processes.append(process(hub, folder, 3))
    said = [processes[1].stdout.readline() for _ in range(2)]
    assert "another run" in said[1], said
    hub.release.set()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert have(folder) == hub.files
    assert hub.sent == hub.sizes()  # no byte came twice


# -----------------------------------------------------------------------------
# Interruptions


def test_a_killed_run_continues_where_it_stopped(hub, fetch, folder, monkeypatch):
    chunk = 1 << 20  # the size that the script has in the process
    monkeypatch.setattr(fineweb, "CHUNK", chunk)
    hub.files[TRAIN_1] = shard_bytes(1, 2_000_000)
    hub.faults[TRAIN_1] = ["hang"]
    killed = process(hub, folder, 1, HF_TOKEN="hf_of_nobody")
    assert hub.hung.wait(30)
    (part,) = wait_for(lambda: list(folder.glob(f"{TRAIN_1}.*.part")))
    wait_for(lambda: part.stat().st_size >= chunk)
    killed.kill()
    killed.communicate(timeout=30)
    assert TRAIN_1 not in have(folder)
    assert ("hub", "Bearer hf_of_nobody") in hub.requests
    hub.release.set()
    hub.sent.clear()
    fetch(1)
    assert have(folder) == hub.first(1)
    assert hub.sent[TRAIN_1] == len(hub.files[TRAIN_1]) - chunk


def wait_for(condition, seconds: float = 30):
    """Poll until the condition holds, and return what it gives."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if found := condition():
            return found
        waiting.wait(0.02)
    raise AssertionError("it never came")


def test_control_c_ends_with_one_line(hub, folder):
    hub.faults[TRAIN_1] = ["hang"]
    stopped = process(hub, folder, 1, HF_HUB_DOWNLOAD_TIMEOUT="100")
    assert hub.hung.wait(30)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=30)  # and not only when the network has been given up
    assert stopped.returncode == 130
    assert err.strip().startswith("cached_fineweb10B.py: stopped") and "\n" not in err.strip()
    assert TRAIN_1 not in have(folder)


FAULTS_THAT_GO_AWAY = [
    (TRAIN_2, "cut"),
    (TRAIN_2, *["cut"] * 9),
    (TRAIN_2, "short"),
    (TRAIN_2, "cut", "no range"),
    (TRAIN_2, "damage"),
    (TRAIN_2, "cut", "damage"),
    (TRAIN_2, "503"),
    (TRAIN_2, "429", "500"),
    ("tree", "503", "429"),
]


@pytest.mark.parametrize("case", FAULTS_THAT_GO_AWAY, ids=", ".join)
def test_faults_that_go_away_are_mended(hub, fetch, folder, case):
    name, *faults = case
    hub.faults[name] = list(faults)
    fetch(3)
    assert have(folder) == hub.files
    assert hub.faults[name] == []
    if set(faults) == {"cut"}:  # what arrived is not asked for again, beyond the client's own chunk
        assert hub.sent[name] <= len(hub.files[name]) + len(faults) * fineweb.CHUNK


def test_the_bar_goes_back_where_bytes_are_forgotten(tmp_path):
    moves = []
    with open(tmp_path / "part", "ab") as file:
        metered = fineweb.MeteredFile(file, moves.append, threading.Event())
        metered.write(b"x" * 100)
        file.flush()
        metered.seek(30)
        metered.truncate()
        metered.write(b"y" * 5)
    assert sum(moves) == len((tmp_path / "part").read_bytes()) == 35


@pytest.mark.parametrize("fault, times", [("damage!", 2), ("short!", None)])
def test_a_shard_that_stays_broken_is_fetched_twice_and_named(hub, refused, fault, times):
    hub.faults[TRAIN_2] = [fault]
    left = {name: body for name, body in hub.files.items() if name != TRAIN_2}
    assert TRAIN_1 not in refused([3], TRAIN_2, left=left)
    assert times is None or hub.sent[TRAIN_2] == times * len(hub.files[TRAIN_2])


@pytest.mark.parametrize("listed", [{"oid": "a" * 64}, {"size": 81_000}, {"size": 82_000}], ids=str)
def test_a_shard_that_is_not_what_the_hub_lists_is_named(hub, refused, listed):
    hub.listed[TRAIN_1] = listed
    refused([1], TRAIN_1, left=hub.first(0))


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_shard_that_is_no_shard_is_named(hub, refused, with_checksum):
    good = hub.files[TRAIN_1]
    hub.files[TRAIN_1] = with_changed_byte(good, 0)  # the magic number
    hub.files[TRAIN_2] = with_changed_byte(good, 8)  # the number of tokens
    hub.files[TRAIN_3] = good[:-2] + train_gpt.GPT2_VOCAB.to_bytes(2, "little")  # a token
    if not with_checksum:
        hub.listed = {name: {"oid": None} for name in hub.files}
    refused([3], TRAIN_1, TRAIN_2, TRAIN_3, left=hub.first(0))


@pytest.mark.parametrize("name", [TRAIN_1, f"{TRAIN_1}.01234567.part"])
def test_a_broken_shard_and_a_part_of_an_older_version_are_replaced(hub, fetch, folder, name):
    folder.mkdir()
    (folder / name).write_bytes(shard_bytes(99, 20_000)[:5000])
    fetch(1)
    assert have(folder) == hub.first(1)
    assert hub.sent[TRAIN_1] == len(hub.files[TRAIN_1])


# -----------------------------------------------------------------------------
# What cannot work is said in one sentence, and leaves nothing behind


REFUSALS = [
    ([2], {"tree": "404 RepoNotFound!"}, "no dataset"),
    ([2], {"tree": "401 RepoNotFound!"}, "no dataset"),
    ([2], {"tree": "401!"}, "HF_TOKEN"),
    ([2], {"tree": "403!"}, "HF_TOKEN"),
    ([2], {"tree": "403 GatedRepo!"}, "terms"),
    ([2], {"tree": "503!"}, "503"),
    ([2], {"tree": "html!"}, "no hub's"),
    ([0], {VAL: "503!"}, "503"),
    ([9], {}, "has 3 training shards"),
    ([1, "--dataset", "no such/name at all"], {}, "is no name"),
    ([1, "--dataset", "kjj0/elsewhere"], {}, "no dataset kjj0/elsewhere"),
    (["--verify"], {}, "has no shards"),
]


@pytest.mark.parametrize("arguments, faults, words", REFUSALS)
def test_what_a_hub_refuses_or_does_not_have(hub, refused, folder, arguments, faults, words):
    hub.faults = {name: [fault] for name, fault in faults.items()}
    refused(arguments, words, left={})
    assert VAL in faults or not folder.exists()


def test_no_server_at_all(hub, refused, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        refused([2], "cannot reach http://127.0.0.1", left={})


def test_a_server_that_dies_in_the_middle(hub, refused, folder):
    hub.faults[TRAIN_1] = ["cut!"]
    hub.files[TRAIN_1] = hub.files[TRAIN_1][: 3 * fineweb.CHUNK]
    refused([1], "cannot reach", left=hub.first(0))
    assert list(folder.glob(f"{TRAIN_1}.*.part"))  # what arrived stays, to be continued


def test_offline_is_said(hub, refused, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused([2], "HF_HUB_OFFLINE", left={})
    assert not hub.requests


@pytest.mark.parametrize("count", ["-1", "nine"])
def test_a_number_that_is_none(run, count):
    with pytest.raises(SystemExit) as ended:
        run(count)
    assert ended.value.code == 2


def test_a_dataset_without_shards(hub, refused):
    hub.files = {"README.md": b"hello"}
    refused([1], "has no training and validation shards", left={})


def test_the_disk_is_looked_at_first_and_only_for_what_is_missing(hub, fetch, refused, monkeypatch):
    need = sum(map(len, hub.first(2).values()))
    usage = types.SimpleNamespace(free=need - 1)
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: usage)
    refused([2], "free", left={})
    assert not hub.sent
    usage.free = need
    fetch(2)
    usage.free = len(hub.files[TRAIN_3])
    fetch(3)


def test_a_disk_that_fills_on_the_way(refused, monkeypatch):
    def full(file, data):
        raise OSError(fineweb.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fineweb.MeteredFile, "write", full)
    refused([2], "No space left", left={})


def test_a_folder_that_cannot_be_made(refused, folder):
    folder.write_text("a file is in the way")
    refused([2], str(folder), left={})


# -----------------------------------------------------------------------------
# --verify


def test_verify_finds_a_changed_byte_and_fetches_nothing(hub, fetch, refused, folder):
    fetch(2)
    hub.sent.clear()
    fetch("--verify")
    damaged = with_changed_byte(hub.files[TRAIN_2], 3000)
    (folder / TRAIN_2).write_bytes(damaged)
    refused(["--verify"], TRAIN_2, "1 of 3", left=hub.first(2) | {TRAIN_2: damaged})
    (folder / TRAIN_2).unlink()
    fetch("--verify")  # what is there is whole
    refused([2, "--verify"], f"{TRAIN_2} is missing", left=hub.first(1))
    assert not hub.sent


def test_verify_without_the_hub_checks_what_it_can(hub, fetch, run, folder):
    fetch(1)
    hub.faults["tree"] = ["404 RepoNotFound!"]
    code, out, err = run("--verify")
    assert code == 0 and "without the hub" in out and "not compared" in err
    (folder / TRAIN_1).write_bytes(hub.files[TRAIN_1][:-2] + b"\xff\xff")
    assert run("--verify")[0] == 2


# -----------------------------------------------------------------------------
# run.sh on a machine with GPUs; all programs are stand-ins that write down how they were called


@pytest.fixture
def run_sh(tmp_path):
    """A function that calls run.sh, and returns the commands that it gave and what it said."""
    python = 'case "$*" in *device_count*) cat gpus ;; *) echo "python $*" >> calls ;; esac'
    programs = {
        "bin/nvidia-smi": "echo 'GPU 0: one'; echo 'GPU 1: two'",
        ".venv/bin/python": python,
        ".venv/bin/torchrun": 'echo "torchrun $*" >> calls',
    }
    for name, line in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "installed.txt")

    def call(*arguments, gib=79):
        (tmp_path / "gpus").write_text(f"2 {gib}\n")
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(tmp_path / "run.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines(), done.stdout

    return call


@pytest.mark.parametrize(
    "arguments, data",
    [
        ("--seed 1", "python data/cached_fineweb10B.py {shards}"),
        ("--train_files mine/*.bin", None),
        ("--train_files=mine", None),
        ("--help", None),
        ("--preset tiny", "python data/local_text.py"),
    ],
)
def test_run_sh_fetches_what_is_needed_and_trains_on_all_gpus(run_sh, arguments, data):
    settings = train_gpt.Hyperparameters()
    tokens = settings.num_iterations * settings.seqs_per_step * settings.train_seq_len + 1
    (*made, trained), out = run_sh(*arguments.split())
    assert made == ([data.format(shards=-(-tokens // 100_000_000))] if data else [])
    assert trained.startswith("torchrun ") and "=2 " in trained
    assert trained.endswith(f"train_gpt.py {arguments}")
    assert ("1.6 GB" in out) == (arguments == "--seed 1")


@pytest.mark.parametrize("gib", [39, 23, 15, 11])
def test_run_sh_keeps_the_tokens_of_a_step_on_smaller_cards(run_sh, gib):
    before = train_gpt.Hyperparameters()
    flags = run_sh("--seed", "1", gib=gib)[0][-1].partition("train_gpt.py ")[2]
    hp, _ = train_gpt.parse_arguments(flags.split())
    assert hp.seed == 1
    assert hp.train_seq_len * hp.seqs_per_step == before.train_seq_len * before.seqs_per_step
    assert hp.train_seq_len <= before.train_seq_len * gib / 36 or gib >= 36


def test_run_sh_leaves_sequences_alone_that_are_asked_for(run_sh):
    calls, out = run_sh("--train_seq_len", "4096", "--seqs_per_step", "96", gib=11)
    assert calls[-1].endswith("train_gpt.py --train_seq_len 4096 --seqs_per_step 96")
