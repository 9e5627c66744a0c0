"""data/cached_fineweb10B.py against a small hub on this machine. Nothing else is reached."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest import mock

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
FOLDER = Path("shards")
TRAIN_1, TRAIN_2, TRAIN_3 = (f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3))


def shard_bytes(seed: int, num_tokens: int) -> bytes:
    """A shard as the public ones are: the vocabulary in the header is 0, and means GPT-2's."""
    tokens = np.random.default_rng(seed).integers(0, train_gpt.GPT2_VOCAB, num_tokens)
    return local_text.shard_header(num_tokens, 0) + tokens.astype("<u2").tobytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of three training shards and one for validation, to which the client is pointed.

    The shards go into a folder of the test. Nobody waits before trying again.
    """
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    hub.files[VAL] = shard_bytes(0, 10_001)
    for number, name in enumerate((TRAIN_1, TRAIN_2, TRAIN_3), 1):
        hub.files[name] = shard_bytes(number, 40_000 + number)
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no token")
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


def run(*arguments):
    """Call the script: its exit code, what it printed, and what it complained of."""
    command = [str(SCRIPT), "--out", str(FOLDER), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", command)
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = fineweb.main()
    return code, out.getvalue(), err.getvalue()


def fetch(*arguments):
    """Call the script, which has to succeed without a complaint: what it printed."""
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    return out


def refused(arguments, *words, left):
    """Call the script, which has to say the words in one sentence, and to leave these shards."""
    code, _, err = run(*arguments)
    assert code == 2 and err.startswith("cached_fineweb10B.py: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert {name: body for name, body in have().items() if name.endswith(".bin")} == left
    return err


def have(folder: Path = FOLDER) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def process(hub: Hub, count: int, **environment) -> subprocess.Popen:
    """The script as a process of its own, pointed at the hub by the environment alone."""
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": os.path.abspath("home")}
    command = [sys.executable, str(SCRIPT), "--out", str(FOLDER), str(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | here | environment, **pipes)


def hanging(hub: Hub, count: int, fault: str = "hang", **environment) -> subprocess.Popen:
    """Such a process that waits patiently for more of the first shard."""
    hub.faults[TRAIN_1] = [fault]
    started = process(hub, count, HF_HUB_DOWNLOAD_TIMEOUT="100", **environment)
    assert hub.hung.wait(30)
    return started


# -----------------------------------------------------------------------------
# What is asked for arrives, once, and is checked


@pytest.mark.parametrize("page", [1000, 2, 1])
def test_a_run_fetches_what_was_asked_for_and_the_next_one_nothing(hub, monkeypatch, page):
    hub.page = page
    fetch(0)
    assert have() == hub.first(0)
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    out = fetch(2)
    assert set(hub.requests) == {("hub", "Bearer hf_of_nobody"), ("store", None)}
    assert "3 shards" in out.splitlines()[1] and "\r" not in out  # no terminal, no bar
    assert have() == hub.first(2)
    tokens, vocab_size = train_gpt.open_shard(str(FOLDER / TRAIN_2))
    assert len(tokens) == 40_002 and vocab_size == train_gpt.GPT2_VOCAB
    asked = len(hub.requests)
    assert "already" in fetch(2)
    assert len(hub.requests) == asked  # not even for the listing: the hub may be out of reach
    fetch()
    assert have() == hub.files
    assert "already" in fetch()
    assert hub.sent == {name: len(body) for name, body in hub.files.items()}


def test_another_dataset_has_another_folder_and_other_names(hub, monkeypatch):
    hub.dataset = "kjj0/finewebedu10B-gpt2"
    hub.files = {name.replace("fineweb", "finewebedu"): body for name, body in hub.files.items()}
    monkeypatch.setattr(fineweb, "__file__", os.path.abspath(f"data/{SCRIPT.name}"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "1", "--dataset", hub.dataset])
    assert fineweb.main() == 0
    assert have(Path("data/finewebedu10B")) == hub.first(1)


def test_two_runs_at_once_share_the_work(hub):
    first = hanging(hub, 3, fault="pause")
    second = process(hub, 3)
    said = [second.stdout.readline() for _ in range(2)]
    assert "another run" in said[1], said
    hub.release.set()
    results = [each.communicate(timeout=60) for each in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), results
    assert have() == hub.files
    assert hub.sent == {name: len(body) for name, body in hub.files.items()}  # no byte came twice


def test_verify_finds_a_changed_byte_and_fetches_nothing(hub):
    fetch(2)
    hub.sent.clear()
    fetch("--verify")
    damaged = with_changed_byte(hub.files[TRAIN_2], 3000)
    (FOLDER / TRAIN_2).write_bytes(damaged)
    refused(["--verify"], TRAIN_2, "1 of 3", left=hub.first(2) | {TRAIN_2: damaged})
    (FOLDER / TRAIN_2).unlink()
    fetch("--verify")  # what is there is whole
    refused([2, "--verify"], f"{TRAIN_2} is missing", left=hub.first(1))
    assert not hub.sent


def test_verify_without_the_hub_checks_what_it_can(hub):
    fetch(1)
    hub.faults["tree"] = ["404 RepoNotFound!"]
    code, out, err = run("--verify")
    assert code == 0 and "without the hub" in out and "not compared" in err
    (FOLDER / TRAIN_1).write_bytes(hub.files[TRAIN_1][:-2] + b"\xff\xff")
    assert run("--verify")[0] == 2


# -----------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues_where_it_stopped(hub, monkeypatch, number):
    chunk = 1 << 20  # the size that the script has in the process
    monkeypatch.setattr(fineweb, "CHUNK", chunk)
    hub.files[TRAIN_1] = shard_bytes(1, 2_000_000)
    stopped = hanging(hub, 1, HF_TOKEN="hf_of_nobody")
    (part,) = FOLDER.glob(f"{TRAIN_1}.*.part")
    deadline = time.monotonic() + 30
    while part.stat().st_size < chunk:
        assert time.monotonic() < deadline, "what was sent is not written"
        time.sleep(0.02)
    stopped.send_signal(number)
    _, err = stopped.communicate(timeout=30)  # and not only when the network has been given up
    if number == signal.SIGINT:
        assert stopped.returncode == 130
        assert err.strip().startswith("cached_fineweb10B.py: stopped") and "\n" not in err.strip()
    assert TRAIN_1 not in have()
    assert ("hub", "Bearer hf_of_nobody") in hub.requests
    hub.release.set()
    hub.sent.clear()
    fetch(1)
    assert have() == hub.first(1)
    assert hub.sent[TRAIN_1] == len(hub.files[TRAIN_1]) - chunk


FAULTS_THAT_GO_AWAY = [
    (TRAIN_2, *["cut"] * 9),
    (TRAIN_2, "short"),
    (TRAIN_2, "cut", "no range"),
    (TRAIN_2, "damage"),
    (TRAIN_2, "503"),
    (TRAIN_2, "429", "500"),
    ("tree", "503", "429"),
]


@pytest.mark.parametrize("case", FAULTS_THAT_GO_AWAY, ids=", ".join)
def test_faults_that_go_away_are_mended(hub, case):
    name, *faults = case
    hub.faults[name] = list(faults)
    fetch(3)
    assert have() == hub.files
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
def test_a_shard_that_stays_broken_is_fetched_twice_and_named(hub, fault, times):
    hub.faults[TRAIN_2] = [fault]
    left = {name: body for name, body in hub.files.items() if name != TRAIN_2}
    assert TRAIN_1 not in refused([3], TRAIN_2, left=left)
    assert times is None or hub.sent[TRAIN_2] == times * len(hub.files[TRAIN_2])


@pytest.mark.parametrize("listed", [{"oid": "a" * 64}, {"size": 81_000}, {"size": 82_000}], ids=str)
def test_a_shard_that_is_not_what_the_hub_lists_is_named(hub, listed):
    hub.listed[TRAIN_1] = listed
    refused([1], TRAIN_1, left=hub.first(0))


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_shard_that_is_no_shard_is_named(hub, with_checksum):
    good = hub.files[TRAIN_1]
    hub.files[TRAIN_1] = with_changed_byte(good, 0)  # the magic number
    hub.files[TRAIN_2] = with_changed_byte(good, 8)  # the number of tokens
    hub.files[TRAIN_3] = good[:-2] + train_gpt.GPT2_VOCAB.to_bytes(2, "little")  # a token
    if not with_checksum:
        hub.listed = {name: {"oid": None} for name in hub.files}
    refused([3], TRAIN_1, TRAIN_2, TRAIN_3, left=hub.first(0))


@pytest.mark.parametrize("name", [TRAIN_1, f"{TRAIN_1}.01234567.part"])
def test_a_broken_shard_and_a_part_of_an_older_version_are_replaced(hub, name):
    FOLDER.mkdir()
    (FOLDER / name).write_bytes(shard_bytes(99, 20_000)[:5000])
    fetch(1)
    assert have() == hub.first(1)
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
    ([2, "--out", SCRIPT], {}, str(SCRIPT)),  # a file is in the way
    (["--verify"], {}, "has no shards"),
]


@pytest.mark.parametrize("arguments, faults, words", REFUSALS)
def test_what_a_hub_refuses_or_does_not_have(hub, arguments, faults, words):
    hub.faults = {name: [fault] for name, fault in faults.items()}
    refused(arguments, words, left={})
    assert VAL in faults or not FOLDER.exists()


def test_a_dataset_without_shards(hub):
    hub.files = {"README.md": b"hello"}
    refused([1], "has no training and validation shards", left={})


@pytest.mark.parametrize(
    "owner, name, value, words",
    [
        (constants, "HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
        (constants, "ENDPOINT", "http://127.0.0.1:1", "cannot reach http://127.0.0.1"),
        (fineweb.MeteredFile, "write", mock.Mock(side_effect=OSError(28, "No space")), "No space"),
    ],
)
def test_what_network_and_disk_refuse(hub, monkeypatch, owner, name, value, words):
    monkeypatch.setattr(owner, name, value)
    refused([2], words, left={})
    assert not hub.requests or name == "write"


def test_a_server_that_dies_in_the_middle(hub):
    hub.faults[TRAIN_1] = ["cut!"]
    hub.files[TRAIN_1] = hub.files[TRAIN_1][: 3 * fineweb.CHUNK]
    refused([1], "cannot reach", left=hub.first(0))
    assert list(FOLDER.glob(f"{TRAIN_1}.*.part"))  # what arrived stays, to be continued


@pytest.mark.parametrize("count", ["-1", "nine"])
def test_a_number_that_is_none(hub, count):
    with pytest.raises(SystemExit) as ended:
        run(count)
    assert ended.value.code == 2


def test_the_disk_is_looked_at_first_and_only_for_what_is_missing(hub, monkeypatch):
    need = sum(map(len, hub.first(2).values()))
    usage = types.SimpleNamespace(free=need - 1)
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: usage)
    refused([2], "free", left={})
    assert not hub.sent
    usage.free = need
    fetch(2)
    usage.free = len(hub.files[TRAIN_3])
    fetch(3)


# -----------------------------------------------------------------------------
# run.sh on a machine with GPUs; all programs are stand-ins that write down how they were called


def run_sh(folder: Path, *arguments: str, gib: int = 79) -> tuple[list[str], str]:
    """Call run.sh in a folder: the commands that it gave, and what it said."""
    python = 'case "$*" in *device_count*) cat gpus ;; *) echo "python $*" >> calls ;; esac'
    programs = {
        "bin/nvidia-smi": "echo 'GPU 0: one'; echo 'GPU 1: two'",
        ".venv/bin/python": python,
        ".venv/bin/torchrun": 'echo "torchrun $*" >> calls',
    }
    for name, line in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv" / "installed.txt")
    (folder / "gpus").write_text(f"2 {gib}\n")
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(folder / "run.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return (folder / "calls").read_text().splitlines(), done.stdout


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
def test_run_sh_fetches_what_is_needed_and_trains_on_all_gpus(tmp_path, arguments, data):
    settings = train_gpt.Hyperparameters()
    tokens = settings.num_iterations * settings.seqs_per_step * settings.train_seq_len + 1
    (*made, trained), out = run_sh(tmp_path, *arguments.split())
    assert made == ([data.format(shards=-(-tokens // 100_000_000))] if data else [])
    assert trained.startswith("torchrun ") and "=2 " in trained
    assert trained.endswith(f"train_gpt.py {arguments}")
    assert ("1.6 GB" in out) == (arguments == "--seed 1")


@pytest.mark.parametrize("gib", [39, 23, 15, 11])
def test_run_sh_keeps_the_tokens_of_a_step_on_smaller_cards_and_flags_that_are_given(tmp_path, gib):
    before = train_gpt.Hyperparameters()
    flags = run_sh(tmp_path, "--seed", "1", gib=gib)[0][-1].partition("train_gpt.py ")[2]
    hp, _ = train_gpt.parse_arguments(flags.split())
    assert hp.seed == 1
    assert hp.train_seq_len * hp.seqs_per_step == before.train_seq_len * before.seqs_per_step
    assert hp.train_seq_len <= before.train_seq_len * gib / 36 or gib >= 36
    given = "--train_seq_len 4096 --seqs_per_step 96"
    assert run_sh(tmp_path, *given.split(), gib=gib)[0][-1].endswith(f"train_gpt.py {given}")
