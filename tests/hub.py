"""A hub of datasets on this machine for the tests of data/cached_fineweb10B.py, which answers the
hub's client, and misbehaves on demand.
"""

import hashlib
import http.server
import json
import re
import socket
import threading
from collections import Counter

import cached_fineweb10B as fineweb


def with_changed_byte(body: bytes, place: int) -> bytes:
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


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
    html         a page of another server
    """

    def __init__(self):
        self.dataset = "kjj0/fineweb10B-gpt2"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.listed: dict[str, dict] = {}  # what the listing says of a file in place of the truth
        self.requests: list[tuple[str, str | None]] = []  # "hub" or "store", authorization
        self.sent = Counter()  # bytes of each file
        self.page = 1000  # entries in one answer of the listing
        self.hung, self.release = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.servers = [self.start(role) for role in ("hub", "store")]
        self.url, self.store = (f"http://127.0.0.1:{each.server_port}" for each in self.servers)

    def start(self, role: str) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.hub, server.role = self, role
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that is gone is what many tests are about
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        self.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def next_fault(self, name: str) -> str:
        with self.lock:
            left = self.faults.get(name, [])
            fault = (left[0] if left[0].endswith("!") else left.pop(0)) if left else ""
            return fault.rstrip("!")

    def entry(self, name: str) -> dict:
        """What the listing says of a file."""
        body = self.files[name]
        large = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        large |= self.listed.get(name, {})
        entry = {"type": "file", "path": name, "size": large["size"], "oid": "1" * 40}
        return entry | {"lfs": large, "xetHash": "2" * 64} if large["oid"] else entry

    def first(self, count: int) -> dict[str, bytes]:
        """The files that `count` asks for: that many to train on, and the one for validation."""
        files = self.files.items()
        return {name: body for name, body in files if "val" in name or int(name[-10:-4]) <= count}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection to one of the hub's servers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, role = self.server.hub, self.server.role
        with hub.lock:
            hub.requests.append((role, self.headers.get("Authorization")))
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        if role == "store":
            fault, answer = hub.next_fault(name), self.send_shard
        elif path == f"/api/datasets/{hub.dataset}/tree/main":
            fault, answer = hub.next_fault("tree"), self.send_listing
        elif path == f"/datasets/{hub.dataset}/resolve/main/{name}" and name in hub.files:
            return self.reply(302, Location=f"{hub.store}/{name}")
        else:
            fault, answer = "404 RepoNotFound", None
        if fault[:3].isdigit():
            headers = {"X_Error_Code": fault[4:]} if fault[4:] else {}
            return self.reply(int(fault[:3]), b'{"error": "so it is"}', **headers)
        answer(name, query, fault)

    def begin(self, status: int, length: int, **headers) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, status: int, body: bytes = b"", **headers) -> None:
        self.begin(status, len(body), **headers)
        self.wfile.write(body)

    def send_listing(self, _, query: str, fault: str) -> None:
        """A page of the list of files, with a link to the next one where there is one."""
        hub = self.server.hub
        if fault == "html":
            return self.reply(200, b"<html>Welcome</html>", Content_Type="text/html")
        names = sorted(hub.files)
        start = int(re.search(r"cursor=(\d+)", query)[1]) if "cursor=" in query else 0
        end = start + hub.page
        entries = [{"type": "file", "path": ".gitattributes", "size": 3, "oid": "0" * 40}]
        entries += [hub.entry(name) for name in names[start:end]]
        headers = {"Content_Type": "application/json"}
        if end < len(names):
            here = f"{hub.url}{self.path.partition('?')[0]}"
            headers["Link"] = f'<{here}?cursor={end}>; rel="next"'
        self.reply(200, json.dumps(entries).encode(), **headers)

    def send_shard(self, name: str, _, fault: str) -> None:
        """The bytes of a file, from where the client wants them."""
        hub = self.server.hub
        body = hub.files[name]
        if fault == "damage":
            body = with_changed_byte(body, 2000)
        asked = None if fault == "no range" else self.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if start >= len(body):
            return self.reply(416, Content_Range=f"bytes */{len(body)}")
        rest = body[start:]
        lengths = dict.fromkeys(("cut", "short"), len(rest) // 2)
        lengths |= dict.fromkeys(("hang", "pause"), fineweb.CHUNK * 3 // 2)
        part = rest[: lengths.get(fault, len(rest))]
        promised = len(part if fault == "short" else rest)
        end = start + promised
        headers = {"Content_Range": f"bytes {start}-{end - 1}/{end}"} if asked else {}
        self.begin(206 if asked else 200, promised, **headers)
        self.write_shard(name, part)
        if fault in ("hang", "pause"):
            hub.hung.set()
            hub.release.wait(60)
        if fault == "pause":
            self.write_shard(name, rest[len(part) :])
        elif len(part) < promised:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def write_shard(self, name: str, data: bytes) -> None:
        self.wfile.write(data)
        with self.server.hub.lock:
            self.server.hub.sent[name] += len(data)
