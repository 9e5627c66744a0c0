"""data/cached_fineweb10B.py against a small hub on this machine, which answers the hub's client and
misbehaves on demand. Nothing else is reached."""

import hashlib
import http.server
import json
import os
import re
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
from huggingface_hub import constants

import train_gpt

SCRIPT = ROOT / "data" / "cached_fineweb10B.py"
DATASET = "kjj0/fineweb10B-gpt2"


def shard_bytes(seed: int, num_tokens: int) -> bytes:
    """A shard as the public ones are: the vocabulary in the header is 0, and means GPT-2's."""
    tokens = np.random.default_rng(seed).integers(0, train_gpt.GPT2_VOCAB, num_tokens)
    return local_text.shard_header(num_tokens, 0) + tokens.astype("<u2").tobytes()


class Hub:
    """Two servers: the hub, which lists files and redirects, and a store, which has the bytes.

    `faults` gives, for the name of a file or "tree", what is wrong with each answer in turn. The
    last one stays when it ends in "!".

    cut          half of what was asked for, and then the connection breaks
    short        half, with headers that say it is all
    damage       a changed byte
    no range     all of it, wherever it was to begin
    hang, pause  one chunk and a half, nothing until `release`, and then the end or the rest
    503, 404 X   that HTTP status, and an error code X of the hub's
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.listed: dict[str, dict] = {}  # what the listing says of a file in place of the truth
        self.requests: list[tuple[str, str, dict]] = []  # "hub" or "store", path, headers
        self.sent: dict[str, int] = {}
        self.page = 1000
        self.hung, self.release = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.servers = {role: self.start(role) for role in ("hub", "store")}
        self.url = self.address("hub")

    def address(self, role: str) -> str:
        return f"http://127.0.0.1:{self.servers[role].server_port}"

    def start(self, role: str) -> http.server.ThreadingHTTPServer:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                with hub.lock:
                    hub.requests.append((role, self.path, dict(self.headers)))
                try:
                    (hub.answer_hub if role == "hub" else hub.answer_store)(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that is gone is what many tests are about
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        self.release.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def next_fault(self, name: str) -> str:
        with self.lock:
            left = self.faults.get(name, [])
            fault = (left[0] if left[0].endswith("!") else left.pop(0)) if left else ""
            return fault.rstrip("!")

    @staticmethod
    def reply(handler, status: int, body: bytes = b"", **headers) -> None:
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), str(value))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def refuse(self, handler, fault: str) -> bool:
        """Answer with the status that a fault is, if it is one."""
        if not fault[:3].isdigit():
            return False
        self.reply(
            handler,
            int(fault[:3]),
            b'{"error": "so it is"}',
            **({"X_Error_Code": fault[4:]} if fault[4:] else {}),
        )
        return True

    def answer_hub(self, handler) -> None:
        path, _, query = handler.path.partition("?")
        if path == f"/api/datasets/{DATASET}/tree/main":
            fault = self.next_fault("tree")
            if self.refuse(handler, fault):
                return
            if fault == "html":
                return self.reply(
                    handler,
                    200,
                    b"<html>Welcome to our wireless network</html>",
                    Content_Type="text/html",
                )
            names = sorted(self.files)
            first = int(re.search(r"cursor=(\d+)", query)[1]) if "cursor=" in query else 0
            more = {}
            if first + self.page < len(names):
                more["Link"] = f'<{self.url}{path}?cursor={first + self.page}>; rel="next"'
            entries = [{"type": "file", "path": ".gitattributes", "size": 3, "oid": "0" * 40}]
            for name in names[first : first + self.page]:
                body = self.files[name]
                large = {
                    "oid": hashlib.sha256(body).hexdigest(),
                    "size": len(body),
                    "pointerSize": 134,
                } | self.listed.get(name, {})
                entries.append(
                    {"type": "file", "path": name, "size": large["size"], "oid": "1" * 40}
                    | ({"lfs": large, "xetHash": "2" * 64} if large["oid"] else {})
                )
            return self.reply(
                handler, 200, json.dumps(entries).encode(), Content_Type="application/json", **more
            )
        name = path.rpartition("/")[2]
        if path != f"/datasets/{DATASET}/resolve/main/{name}" or name not in self.files:
            return self.refuse(handler, "404 RepoNotFound")
        self.reply(
            handler,
            302,
            Location=f"{self.address('store')}/{name}",
            X_Linked_Size=len(self.files[name]),
            X_Linked_Etag=f'"{hashlib.sha256(self.files[name]).hexdigest()}"',
            X_Repo_Commit="3" * 40,
        )

    def answer_store(self, handler) -> None:
        name = handler.path[1:]
        fault, body, headers = self.next_fault(name), self.files[name], {}
        if self.refuse(handler, fault):
            return
        if fault == "damage":
            body = body[:2000] + bytes([body[2000] ^ 1]) + body[2001:]
        start = 0
        if (asked := handler.headers.get("Range")) and fault != "no range":
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                return self.reply(handler, 416, Content_Range=f"bytes */{len(body)}")
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        sizes = dict.fromkeys(("cut", "short"), len(rest) // 2)
        sizes |= dict.fromkeys(("hang", "pause"), fineweb.CHUNK * 3 // 2)
        send = rest[: sizes.get(fault, len(rest))]
        if fault == "short" and asked:
            headers["Content-Range"] = f"bytes {start}-{start + len(send) - 1}/{start + len(send)}"
        handler.send_response(206 if headers else 200)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(send if fault == "short" else rest)))
        handler.end_headers()
        handler.wfile.write(send)
        handler.wfile.flush()
        with self.lock:
            self.sent[name] = self.sent.get(name, 0) + len(send)
        if fault in ("hang", "pause"):
            self.hung.set()
            self.release.wait(60)
        if fault == "pause":
            handler.wfile.write(rest[len(send) :])
            self.sent[name] += len(rest) - len(send)
            return
        if len(send) < len(rest) and fault != "short":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


def clean_environment() -> dict[str, str]:
    """The environment without the variables of the client and of proxies."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of three training shards and one for validation, to which the client is pointed.

    Nobody waits before trying again.
    """
    hub = Hub()
    for number in range(1, 4):
        hub.files[f"fineweb_train_{number:06d}.bin"] = shard_bytes(number, 40_000 + number)
    hub.files["fineweb_val_000000.bin"] = shard_bytes(0, 10_001)
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
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
def run(hub, tmp_path, monkeypatch, capsys):
    """Call the script with arguments: its exit code, its output, and its last line of complaint."""

    def call(*arguments):
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "shards"), *map(str, arguments)]
        )
        code = fineweb.main()
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("cached_fineweb10B.py: ") and err.count("\n") == 1, err
        return code, out, err

    return call


def have(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def first(hub: Hub, count: int) -> dict[str, bytes]:
    """The files that `count` asks for."""
    return {
        name: body
        for name, body in hub.files.items()
        if "val" in name or int(name[-10:-4]) <= count
    }


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


def test_a_run_fetches_what_was_asked_for_and_the_next_one_nothing(hub, run, tmp_path):
    code, out, err = run(2)
    assert code == 0 and not err
    assert have(tmp_path / "shards") == first(hub, 2)
    assert hub.sent == {name: len(body) for name, body in first(hub, 2).items()}
    assert "3 shards" in out.splitlines()[1] and "\r" not in out  # no terminal, no bar
    tokens, vocab_size = train_gpt.open_shard(str(tmp_path / "shards" / "fineweb_train_000002.bin"))
    assert len(tokens) == 40_002 and vocab_size == train_gpt.GPT2_VOCAB

    asked = len(hub.requests)
    code, out, err = run(2)
    assert code == 0 and "already" in out
    assert len(hub.requests) == asked  # not even for the listing: the hub may be out of reach

    code, out, err = run()
    assert code == 0 and have(tmp_path / "shards") == hub.files
    assert hub.sent == {name: len(body) for name, body in hub.files.items()}
    assert "already" in run()[1]


def test_a_listing_in_pages_is_read_to_its_end(hub, run, tmp_path):
    hub.page = 2
    assert run()[0] == 0
    assert have(tmp_path / "shards") == hub.files


def test_zero_shards_are_the_validation_shard(hub, run, tmp_path):
    assert run(0)[0] == 0
    assert have(tmp_path / "shards") == first(hub, 0)


def test_another_dataset_has_another_folder_and_other_names(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DATASET", "kjj0/finewebedu10B-gpt2")
    hub.files = {name.replace("fineweb", "finewebedu"): body for name, body in hub.files.items()}
    monkeypatch.setattr(fineweb, "__file__", str(tmp_path / "data" / SCRIPT.name))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "1", "--dataset", DATASET])
    assert fineweb.main() == 0
    assert have(tmp_path / "data" / "finewebedu10B") == first(hub, 1)


def test_the_token_goes_to_the_hub_and_no_further(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert run(1)[0] == 0
    tokens = {
        (role, headers.get("authorization", headers.get("Authorization")))
        for role, _, headers in hub.requests
    }
    assert tokens == {("hub", "Bearer hf_of_nobody"), ("store", None)}


def test_two_runs_at_once_share_the_work(hub, tmp_path):
    hub.faults["fineweb_train_000001.bin"] = ["pause"]
    processes = [process(hub, tmp_path / "shards", 3)]
    assert hub.hung.wait(30)
    processes.append(process(hub, tmp_path / "shards", 3))
    said = [processes[1].stdout.readline() for _ in range(2)]
    assert "another run" in said[1], said
    hub.release.set()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert have(tmp_path / "shards") == hub.files
    assert hub.sent == {name: len(body) for name, body in hub.files.items()}  # no byte came twice


# -----------------------------------------------------------------------------
# Interruptions


def test_a_killed_run_continues_where_it_stopped(hub, run, tmp_path, monkeypatch):
    chunk = 1 << 20  # the size that the script has in the process
    monkeypatch.setattr(fineweb, "CHUNK", chunk)
    name = "fineweb_train_000001.bin"
    hub.files[name] = shard_bytes(1, 2_000_000)
    hub.faults[name] = ["hang"]
    killed = process(hub, tmp_path / "shards", 1, HF_TOKEN="hf_of_nobody")
    assert hub.hung.wait(30)
    (part,) = wait_for(lambda: list((tmp_path / "shards").glob(f"{name}.*.part")))
    wait_for(lambda: part.stat().st_size >= chunk)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert name not in have(tmp_path / "shards")
    hub.release.set()
    assert ("hub", "Bearer hf_of_nobody") in {
        (where, headers.get("authorization")) for where, _, headers in hub.requests
    }

    hub.sent.clear()
    assert run(1)[0] == 0
    assert have(tmp_path / "shards") == first(hub, 1)
    assert hub.sent[name] == len(hub.files[name]) - chunk


def wait_for(condition, seconds: float = 30):
    """Poll until the condition holds, and return what it gives."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if found := condition():
            return found
        waiting.wait(0.02)
    raise AssertionError("it never came")


def test_control_c_ends_with_one_line(hub, tmp_path):
    hub.faults["fineweb_train_000001.bin"] = ["hang"]
    stopped = process(hub, tmp_path / "shards", 1, HF_HUB_DOWNLOAD_TIMEOUT="100")
    assert hub.hung.wait(30)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=30)  # and not only when the network has been given up
    assert stopped.returncode == 130
    assert err.strip().startswith("cached_fineweb10B.py: stopped") and "\n" not in err.strip()
    assert "fineweb_train_000001.bin" not in have(tmp_path / "shards")


@pytest.mark.parametrize(
    "faults",
    [
        ["cut"],
        ["cut"] * 9,
        ["short"],
        ["cut", "no range"],
        ["damage"],
        ["cut", "damage"],
        ["503"],
        ["429", "500"],
    ],
    ids=", ".join,
)
def test_faults_that_go_away_are_mended(hub, run, tmp_path, faults):
    name = "fineweb_train_000002.bin"
    hub.faults[name] = list(faults)
    code, out, err = run(3)
    assert code == 0, err
    assert have(tmp_path / "shards") == hub.files
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


@pytest.mark.parametrize("fault", ["damage!", "short!"])
def test_a_shard_that_stays_broken_is_fetched_twice_and_named(hub, run, tmp_path, fault):
    hub.faults["fineweb_train_000002.bin"] = [fault]
    code, out, err = run(3)
    assert code == 2 and "fineweb_train_000002.bin" in err and "fineweb_train_000001.bin" not in err
    assert have(tmp_path / "shards") == {
        name: body for name, body in hub.files.items() if "000002" not in name
    }
    if fault == "damage!":
        assert hub.sent["fineweb_train_000002.bin"] == 2 * len(
            hub.files["fineweb_train_000002.bin"]
        )


@pytest.mark.parametrize(
    "listed",
    [{"oid": "a" * 64}, {"size": 81_000}, {"size": 82_000}],
    ids=["checksum", "too small", "too large"],
)
def test_a_shard_that_is_not_what_the_hub_lists_is_named(hub, run, tmp_path, listed):
    hub.listed["fineweb_train_000001.bin"] = listed
    code, out, err = run(1)
    assert code == 2 and "fineweb_train_000001.bin" in err
    assert have(tmp_path / "shards") == first(hub, 0)


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_shard_that_is_no_shard_is_named(hub, run, tmp_path, with_checksum):
    good = hub.files["fineweb_train_000001.bin"]
    hub.files["fineweb_train_000001.bin"] = b"\1" + good[1:]  # the magic number
    hub.files["fineweb_train_000002.bin"] = good[:8] + b"\1" + good[9:]  # the number of tokens
    hub.files["fineweb_train_000003.bin"] = (
        good[:-2] + np.array([train_gpt.GPT2_VOCAB], dtype="<u2").tobytes()
    )  # a token
    if not with_checksum:
        hub.listed = {name: {"oid": None} for name in hub.files}
    code, out, err = run(3)
    assert code == 2 and all(f"fineweb_train_00000{number}.bin" in err for number in (1, 2, 3))
    assert have(tmp_path / "shards") == first(hub, 0)


def test_bytes_of_an_older_version_are_not_continued(hub, run, tmp_path):
    name = "fineweb_train_000001.bin"
    old = tmp_path / "shards" / f"{name}.01234567.part"
    old.parent.mkdir()
    old.write_bytes(shard_bytes(99, 20_000))
    assert run(1)[0] == 0
    assert have(tmp_path / "shards") == first(hub, 1) and hub.sent[name] == len(hub.files[name])


def test_a_broken_shard_under_its_name_is_replaced(hub, run, tmp_path):
    path = tmp_path / "shards" / "fineweb_train_000001.bin"
    path.parent.mkdir()
    path.write_bytes(hub.files[path.name][:5000])
    assert run(1)[0] == 0
    assert have(tmp_path / "shards") == first(hub, 1)


# -----------------------------------------------------------------------------
# What cannot work is said in one sentence, and leaves nothing behind


@pytest.mark.parametrize(
    "fault, words",
    [
        ("404 RepoNotFound", "no dataset"),
        ("401 RepoNotFound", "no dataset"),
        ("401", "HF_TOKEN"),
        ("403", "HF_TOKEN"),
        ("403 GatedRepo", "terms"),
        ("503", "503"),
        ("html", "no hub's"),
    ],
)
def test_a_hub_that_refuses(hub, run, tmp_path, fault, words):
    hub.faults["tree"] = [fault + "!"]
    code, out, err = run(2)
    assert code == 2 and words in err and have(tmp_path / "shards") == {}


def test_a_hub_that_recovers(hub, run, tmp_path):
    hub.faults["tree"] = ["503", "429"]
    assert run(2)[0] == 0 and have(tmp_path / "shards") == first(hub, 2)


def test_a_store_that_stays_away(hub, run, tmp_path):
    hub.faults["fineweb_val_000000.bin"] = ["503!"]
    code, out, err = run(0)
    assert code == 2 and "503" in err and "fineweb_val_000000.bin" not in have(tmp_path / "shards")


def test_no_server_at_all(hub, run, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        code, out, err = run(2)
    assert code == 2 and "cannot reach http://127.0.0.1" in err and have(tmp_path / "shards") == {}


def test_a_server_that_dies_in_the_middle(hub, run, tmp_path):
    hub.faults["fineweb_train_000001.bin"] = ["cut!"]
    hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][
        : 3 * fineweb.CHUNK
    ]
    code, out, err = run(1)
    assert code == 2 and "cannot reach" in err
    parts = {path.name for path in (tmp_path / "shards").glob("*.part")}
    assert have(tmp_path / "shards").keys() - first(hub, 0).keys() == parts


def test_offline_is_said(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run(2)
    assert code == 2 and "HF_HUB_OFFLINE" in err and not hub.requests


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((9,), "has 3 training shards"),
        ((1, "--dataset", "no such/name at all"), "is no name"),
        ((1, "--dataset", "kjj0/elsewhere"), "no dataset kjj0/elsewhere"),
    ],
)
def test_a_wrong_wish(run, tmp_path, arguments, words):
    code, out, err = run(*arguments)
    assert code == 2 and words in err and have(tmp_path / "shards") == {}


@pytest.mark.parametrize("count", ["-1", "nine"])
def test_a_number_that_is_none(run, capsys, count):
    with pytest.raises(SystemExit) as ended:
        run(count)
    assert ended.value.code == 2


def test_a_dataset_without_shards(hub, run):
    hub.files = {"README.md": b"hello"}
    code, out, err = run(1)
    assert code == 2 and "has no training and validation shards" in err


def test_the_disk_is_looked_at_first_and_only_for_what_is_missing(hub, run, tmp_path, monkeypatch):
    need = sum(map(len, first(hub, 2).values()))
    usage = types.SimpleNamespace(free=need - 1)
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: usage)
    code, out, err = run(2)
    assert code == 2 and "free" in err and not hub.sent and have(tmp_path / "shards") == {}
    usage.free = need
    assert run(2)[0] == 0
    usage.free = len(hub.files["fineweb_train_000003.bin"])
    assert run(3)[0] == 0


def test_a_disk_that_fills_on_the_way(hub, run, tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(fineweb.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fineweb.MeteredFile, "write", full)
    code, out, err = run(2)
    assert code == 2 and "No space left" in err
    assert not list((tmp_path / "shards").glob("*.bin"))


def test_a_folder_that_cannot_be_made(hub, run, tmp_path):
    (tmp_path / "shards").write_text("a file is in the way")
    code, out, err = run(2)
    assert code == 2 and str(tmp_path / "shards") in err


# -----------------------------------------------------------------------------
# --verify


def test_verify_finds_a_changed_byte_and_fetches_nothing(hub, run, tmp_path):
    assert run(2)[0] == 0
    before = have(tmp_path / "shards")
    hub.sent.clear()
    assert run("--verify")[0] == 0
    path = tmp_path / "shards" / "fineweb_train_000002.bin"
    path.write_bytes(
        before[path.name][:3000] + bytes([before[path.name][3000] ^ 1]) + before[path.name][3001:]
    )
    code, out, err = run("--verify")
    assert code == 2 and path.name in err and "1 of 3" in err
    path.unlink()
    assert run("--verify")[0] == 0  # what is there is whole
    code, out, err = run(2, "--verify")
    assert code == 2 and f"{path.name} is missing" in err
    assert not hub.sent and path.name not in have(tmp_path / "shards")


def test_verify_without_the_hub_checks_what_it_can(hub, run, tmp_path, monkeypatch):
    assert run(1)[0] == 0
    hub.faults["tree"] = ["404 RepoNotFound!"]
    assert "without the hub" in run("--verify")[1]
    path = tmp_path / "shards" / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "shards"), "--verify"])
    assert fineweb.main() == 2


def test_verify_of_nothing(run):
    code, out, err = run("--verify")
    assert code == 2 and "has no shards" in err


# -----------------------------------------------------------------------------
# run.sh on a machine with GPUs; all programs are stand-ins that write down how they were called


@pytest.fixture
def run_sh(tmp_path):
    def call(*arguments):
        root = tmp_path / "clone"
        programs = {
            "bin/nvidia-smi": "echo 'GPU 0: one'; echo 'GPU 1: two'",
            ".venv/bin/python": (
                'case "$*" in *device_count*) echo 2 ;; *) echo "python $*" >> calls ;; esac'
            ),
            ".venv/bin/torchrun": 'echo "torchrun $*" >> calls',
        }
        for name, line in programs.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"#!/bin/sh\n{line}\n")
            (root / name).chmod(0o755)
        for name in ("run.sh", "requirements.txt"):
            (root / name).write_text((ROOT / name).read_text())
        (root / ".venv" / "installed.txt").write_text((ROOT / "requirements.txt").read_text())
        (root / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(root / "run.sh"), *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}"},
        )
        assert done.returncode == 0, done.stderr
        return (root / "calls").read_text().splitlines(), done.stdout

    return call


def test_run_sh_fetches_what_the_speedrun_needs(run_sh):
    settings = train_gpt.Hyperparameters()
    shards = -(
        -(settings.num_iterations * settings.seqs_per_step * settings.train_seq_len + 1)
        // 100_000_000
    )
    calls, out = run_sh("--seed", "1")
    assert calls[0] == f"python data/cached_fineweb10B.py {shards}"
    assert calls[1].startswith("torchrun ") and calls[1].endswith("train_gpt.py --seed 1")
    assert "1.6 GB" in out


@pytest.mark.parametrize(
    "arguments",
    [("--train_files", "mine/*.bin"), ("--train_files=mine/*.bin",), ("--help",)],
    ids=" ".join,
)
def test_run_sh_leaves_other_data_alone(run_sh, arguments):
    calls, out = run_sh(*arguments)
    assert len(calls) == 1 and calls[0].startswith("torchrun ")


def test_run_sh_makes_text_for_the_tiny_preset(run_sh):
    assert run_sh("--preset", "tiny")[0][0] == "python data/local_text.py"
