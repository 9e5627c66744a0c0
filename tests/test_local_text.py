"""data/local_text.py: what goes in comes out of the shards, once, and nothing else is touched."""

import gzip
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import local_text
import numpy as np
import pytest
import tiktoken

OUT = Path("out")
SCRIPT = Path(local_text.__file__).resolve()


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch):
    """Thirty documents, also as the files of the folder "in", where each test begins."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    documents = ["".join(draw.choices("ab é€𝄞\u2028", k=5 + n)) for n in range(30)]
    Path("in").mkdir()
    for number, document in enumerate(documents):
        Path("in", f"{number:02d}.txt").write_text(document, encoding="utf-8", newline="")
    return documents


def make(*arguments):
    local_text.main(["--out", str(OUT), *map(str, arguments)])


def refused(capsys, *arguments):
    """Call the script, which has to exit with one sentence. Returns it."""
    with pytest.raises(SystemExit) as ended:
        make(*arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    return error


def contents():
    return {path.name: path.read_bytes() for path in OUT.iterdir()}


def documents_of(split, boundary=256):
    """The documents of a split, as lists of tokens, from shards of one vocabulary."""
    shards = [np.fromfile(path, "<u2") for path in sorted(OUT.glob(f"{split}_*.bin"))]
    for shard in shards:
        assert shard[:8].view("<i4").tolist() == [20240520, 1, len(shard) - 512, boundary + 1]
    tokens = np.concatenate([shard[512:] for shard in shards])
    before, *documents = np.split(tokens, np.flatnonzero(tokens == boundary))
    assert not len(before)
    return [document[1:].tolist() for document in documents]


def text_of(split="*"):
    """The documents of a split, or of both, sorted."""
    return sorted(bytes(document).decode() for document in documents_of(split))


def test_each_document_is_in_one_split_in_an_order_of_the_seed(texts):
    make("in", "--val_fraction", 0.1, "--shard_tokens", 101)
    first = documents_of("train")
    *sizes, last = (path.stat().st_size for path in sorted(OUT.glob("train_*.bin")))
    assert set(sizes) == {1024 + 2 * 101} and last <= sizes[0]
    assert len(text_of("val")) == 3 and text_of() == sorted(texts)
    make("in", "--val_fraction", 0.1)
    assert documents_of("train") == first != sorted(first)
    make("in", "--val_fraction", 0.1, "--seed", 1)
    assert documents_of("train") != first


@pytest.mark.parametrize("count", [1, 19])
def test_tails_of_few_documents_are_for_validation(texts, count):
    make(*(f"in/{number:02d}.txt" for number in range(count)))
    pairs = zip(documents_of("train"), documents_of("val"), strict=True)
    joined = {bytes(head + tail).decode(): len(tail) for head, tail in pairs}
    assert sorted(joined) == sorted(texts[:count])
    assert all(0 < tail <= 1 + len(text.encode()) * 0.05 for text, tail in joined.items())


def test_something_is_left_to_train_on():
    make("in", "--val_fraction", 0.99)
    assert len(documents_of("train")) == 1


def test_every_kind_of_input_gives_the_same_shards(texts):
    records = [{"id": 1, "text": text} for text in texts]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    inputs = {
        "a.jsonl": lines,
        "b.NDJSON": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "c.JSONL.gz": gzip.compress(lines),
        "d.json": b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode(),
        "e.json.gz": gzip.compress(lines),
    }
    for name, content in inputs.items():
        Path(name).write_bytes(content)
    Path("f.txt").write_bytes(lines)
    make("in")
    expected = contents()
    for arguments in (*inputs, "in/**/*.txt", "i*", "f.txt --jsonl"):
        make(*arguments.split())
        assert contents() == expected, arguments
    command = [sys.executable, SCRIPT, "--out", OUT, "-", "--jsonl"]
    subprocess.run(command, input=lines, check=True)
    assert contents() == expected


def test_file_named_twice_is_read_once(texts):
    Path("link").symlink_to("in")
    make("in", "./in/", "in/*.txt", Path("in/00.txt").absolute(), "link", "link/01.txt")
    assert text_of() == sorted(texts)


def test_text_is_read_as_utf8_without_its_mark_and_with_unix_line_ends():
    Path("a.txt.gz").write_bytes(gzip.compress("\ufeffé\r\n\rb".encode()))
    make("a.txt.gz")
    (head,), (tail,) = documents_of("train"), documents_of("val")
    assert tail and bytes(head + tail) == "é\n\rb".encode()


def test_what_is_not_text_is_left_out_and_named(texts, capsys):
    Path("in/0.bin").write_bytes(b"zero\0")
    Path("in/1.txt").write_bytes(b"latin \xe9")
    Path("in/2.gz").write_bytes(gzip.compress(os.urandom(1 << 12))[:-100])
    Path("in/3.json").write_text('[{"text": "\\ufeffone"}, {"texts": "two"}, [3], {"text": 4}]')
    Path("in/4.jsonl").write_text('{"text": "five"}\n\n{"text": "cut\n{"text": "\\ud800"}\n')
    Path("in/5.json").write_text('{"text": ["is no list of records"]}')
    Path("in/6.txt").touch()
    for skipped in (".git/config", ".venv/x.py", "__pycache__/x.txt", "a/.b/c"):
        Path("in", skipped).parent.mkdir(parents=True)
        Path("in", skipped).write_text("skipped")
    make("in")
    assert text_of() == sorted([*texts, "one", "five", Path("in/5.json").read_text()])
    output = capsys.readouterr().out
    assert "8 files left out as not UTF-8 text: in/0.bin, in/1.txt, in/2.gz" in output


def test_default_is_the_small_files_of_the_library(monkeypatch):
    monkeypatch.setattr(local_text.sysconfig, "get_paths", lambda: {"stdlib": "in"})
    Path("in/site-packages").mkdir()
    for name, size in (("a.py", 12288), ("b.py", 12289), ("site-packages/c.py", 9)):
        Path("in", name).write_text(name[0] * size)
    make()
    assert "".join(sorted(text_of())) == "a" * 12288


def test_only_its_own_shards_are_replaced(texts, capsys):
    make("in", "--shard_tokens", 100)
    assert len(contents()) > 9
    make(".")
    assert text_of() == sorted(texts)
    assert sorted(contents()) == [".local_text", "train_000001.bin", "val_000000.bin"]
    (OUT / "train_000007.bin").write_bytes(b"mine")
    before = contents()
    assert "train_000007.bin is not a shard that this script wrote" in refused(capsys, "in")
    assert contents() == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.txt"], "nowhere.txt does not exist"),
        (["no*thing"], "no*thing does not exist"),
        (["empty.txt"], "too little text"),
        (["in", "--val_fraction", "1"], "--val_fraction"),
        (["in", "--shard_tokens", "0"], "--shard_tokens"),
        (["in", "--seed", "-1"], "--seed"),
        (["in", "--out", "empty.txt"], "empty.txt"),
    ],
)
def test_bad_argument_is_one_sentence(capsys, arguments, words):
    Path("empty.txt").touch()
    assert words in refused(capsys, *arguments)


def test_full_disk_leaves_the_shards_as_they_were(capsys):
    make("in")
    before = contents()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        assert "File too large" in refused(capsys, "in", "--seed", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents() == before


def test_gpt2_text_cannot_contain_the_boundary(monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"<|": 256}
    settings = {"pat_str": r"[\s\S]+", "special_tokens": {"<|endoftext|>": 50256}}
    encoding = tiktoken.Encoding("small", mergeable_ranks=ranks, **settings)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.get)
    Path("a.txt").write_text("<|endoftext|>")
    make("a.txt", "--tokenizer", "gpt2")
    (head,), (tail,) = (documents_of(split, boundary=50256) for split in ("train", "val"))
    assert head + tail == [256, *b"endoftext|>"]


def test_missing_tiktoken_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install tiktoken" in refused(capsys, "in", "--tokenizer", "gpt2")
    assert not OUT.exists()


def test_command_needs_no_torch_and_no_unicode_terminal():
    Path("in/é.txt").write_bytes(b"\xff")
    code = "import sys, local_text; local_text.main(); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, "in", "--out", OUT]
    subprocess.run(command, check=True, env=environment)
