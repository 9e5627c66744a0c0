"""data/cached_fineweb10B.py with the hub's real client and a small hub on the loopback."""

import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import write_shard

SCRIPT = Path(__file__).parents[1] / "data" / "cached_fineweb10B.py"
VAL, TRAIN_1, TRAIN_2 = (
    f"fineweb_{name}.bin" for name in ("val_000000", "train_000001", "train_000002")
)


class Hub(http.server.BaseHTTPRequestHandler):
    """Lists and serves `server.files`. A shard's next download has the fault in `server.faults`."""

    def reply(self, status, body, headers):
        self.send_response(status)
        for header in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.server.dataset not in path:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.send_shard(path.rpartition("/")[2])
        else:
            files = [self.entry(*item) for item in self.server.files.items()]
            info = {"id": self.server.dataset, "sha": "a" * 40, "siblings": files}
            self.reply(200, json.dumps(files if "/tree/" in path else info).encode(), {})

    do_HEAD = do_GET

    def entry(self, name, body):
        sha256 = hashlib.sha256(body).hexdigest()
        file = {"type": "file", "path": name, "rfilename": name, "oid": sha256, "size": len(body)}
        return file | {"lfs": {"sha256": sha256, "pointerSize": 134} | file}

    def send_shard(self, name):
        body = self.server.files[name]
        headers = {"X-Repo-Commit": "a" * 40, "ETag": name, "Content-Length": str(len(body))}
        fault = self.server.faults.get(name)
        if fault == "gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if self.command == "HEAD":
            return self.reply(200, b"", headers)
        self.server.downloads.append(name)
        if self.server.faults.pop(name, None):
            body = body[: len(body) // 2]
        self.reply(200, body, {"Content-Length": str(len(body))} if fault == "short" else headers)
        if fault == "wait":
            self.server.waiting.set()
            time.sleep(60)


@pytest.fixture
def hub(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.dataset = "kjj0/fineweb10B-gpt2"
        server.files = {
            name: write_shard(tmp_path / name, range(50_000), 50257).read_bytes()
            for name in (VAL, TRAIN_1, TRAIN_2)
        }
        server.faults = {}
        server.downloads = []
        server.waiting = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    """The folder of the shards, beside a copy of the script."""
    (tmp_path / "data").mkdir()
    shutil.copy(SCRIPT, tmp_path / "data")
    return tmp_path / "data" / "fineweb10B"


def start(hub, folder, *arguments, before=(sys.executable,), **environment):
    """Start the script with a client that knows this hub only."""
    url = f"http://127.0.0.1:{hub.server_port}"
    ours = {"PATH": os.environ["PATH"], "HF_ENDPOINT": url, "HF_HOME": str(folder.parent)}
    command = [*before, folder.parent / SCRIPT.name, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ours | environment, **pipes)


def run(*arguments, code=0, **options):
    """Run the script to its end. Returns its last line."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return (err if code else out).splitlines()[-1]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_shards_are_downloaded_once_despite_a_broken_connection(hub, folder):
    hub.faults[TRAIN_1] = "break"
    run(hub, folder, 1)
    assert shards(folder) == {name: hub.files[name] for name in (VAL, TRAIN_1)}
    run(hub, folder)
    assert shards(folder) == hub.files
    assert sorted(hub.downloads) == sorted([*hub.files, TRAIN_1])


@pytest.mark.parametrize(
    "fault, arguments, words",
    [
        ("short", [1], TRAIN_1),
        ("gated", [1], "accept its terms"),
        ("", [9], "*_train_000003.bin"),
        ("", ["--dataset", "a/b"], "no dataset a/b"),
    ],
)
def test_impossible_download_is_one_sentence(hub, folder, fault, arguments, words):
    hub.faults[TRAIN_1] = fault
    assert words in run(hub, folder, *arguments, code=2)
    assert TRAIN_1 not in shards(folder)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_download_continues(hub, folder, number, code):
    hub.faults[TRAIN_1] = "wait"
    process = start(hub, folder)
    assert hub.waiting.wait(60)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert TRAIN_1 not in shards(folder)
    assert number == signal.SIGKILL or not list(folder.rglob("*.incomplete"))
    run(hub, folder)
    assert shards(folder) == hub.files


def test_unreachable_hub_matters_for_missing_shards_only(hub, folder):
    no_network = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    offline = {"HF_HUB_OFFLINE": "1"}
    assert "cannot download from http" in run(hub, folder, 1, code=2, **no_network)
    run(hub, folder, 1)
    assert "header and size only" in run(hub, folder, 1, "--verify", **no_network)
    assert "2 shards" in run(hub, folder, **offline)
    assert "HF_HUB_OFFLINE is set" in run(hub, folder, 2, code=2, **offline)


def test_corrupt_shards_are_named_with_the_command_that_replaces_them(hub, folder):
    hub.dataset = "kjj0/finewebedu10B-gpt2"
    arguments = ["--dataset", hub.dataset]
    run(hub, folder, *arguments)
    other = folder.with_name("finewebedu10B")
    for name, position in ((TRAIN_1, 3000), (TRAIN_2, 8)):  # a token; the number of tokens
        content = bytearray(hub.files[name])
        content[position] ^= 1
        (other / name).write_bytes(content)
        os.utime(other / name, (0, 0))  # the client takes it for unchanged
    line = run(hub, folder, *arguments, code=2)
    assert TRAIN_1 not in line and TRAIN_2 in line
    arguments.append("--verify")
    line = run(hub, folder, *arguments, code=2)
    assert VAL not in line and TRAIN_1 in line and TRAIN_2 in line
    remove, again = line.partition("with: ")[2].split(" && ")
    subprocess.run(remove, shell=True, check=True)
    assert "has no *_train" in run(hub, folder, *arguments, code=2)
    run(hub, folder, *again.split()[2:])
    assert shards(other) == hub.files


def test_full_disk_is_one_sentence(hub, folder):
    folder.mkdir()
    mount = f'mount -t tmpfs -o size=256k none {folder} && exec "$@"'
    before = ["unshare", "-Urm", "sh", "-c", mount, "sh"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("a small file system needs user namespaces")
    assert "disk is full" in run(hub, folder, before=[*before, sys.executable], code=2)
