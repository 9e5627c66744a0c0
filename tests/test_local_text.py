"""data/local_text.py: whatever text goes in comes out of the shards, once, in the drawn order."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path
from unittest import mock

import local_text
import numpy as np
import pytest
import tiktoken
from conftest import ROOT
from local_text import make_shards, shuffled
from tiktoken_ext.openai_public import r50k_pat_str

import train_gpt

LETTERS = "ab \n\t\r.é€𝄞\ufeff\u2028\x01"
OUT = Path("out")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Each test has a folder of its own, with its texts in "in" and its shards in "out"."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()


def tokens_of(split: str) -> list[list[int]]:
    """The tokens of each shard of a split."""
    paths = sorted(OUT.glob(f"{split}_*.bin"))
    return [train_gpt.open_shard(str(path))[0].tolist() for path in paths]


def documents_of(split: str) -> list[bytes]:
    """The documents of a split of byte tokens."""
    tokens = np.concatenate([[], *tokens_of(split)])
    nothing, *documents = np.split(tokens, np.flatnonzero(tokens == 256))
    assert not len(nothing)
    return [document[1:].astype(np.uint8).tobytes() for document in documents]


def all_documents() -> list[bytes]:
    return sorted(documents_of("train") + documents_of("val"))


def shards_of(out: Path = OUT) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def write_files(documents: list[str], folder: str = "in") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        Path(folder, f"{number:04d}.txt").write_text(document, encoding="utf-8", newline="")


def draw_documents(draw: random.Random, count: int, longest: int) -> list[str]:
    lengths = (draw.choice([0, 1, 2, draw.randrange(longest)]) for _ in range(count))
    return ["".join(draw.choices(LETTERS, k=length)) for length in lengths]


# -----------------------------------------------------------------------------
# Nothing is lost, and nothing comes twice


@pytest.mark.parametrize("case", range(12))
def test_the_shards_hold_the_documents_in_the_drawn_order(monkeypatch, case):
    """Their line ends become those of Unix, wherever a piece of a text ends."""
    draw = random.Random(case)
    documents = draw_documents(draw, draw.choice([20, 21, 50, 333]), 200)
    write_files(documents)
    monkeypatch.setattr(local_text, "PIECE", draw.choice([8, 64, 1 << 16]))
    fraction, size = draw.choice([0.05, 0.3]), draw.choice([1000, 1001, 37, 1 << 20])
    make_shards(["in"], OUT, seed=case, val_fraction=fraction, shard_tokens=size)
    kept = [document.replace("\r\n", "\n").encode() for document in documents if document]
    order = [kept[number] for number in shuffled(len(kept), case)]
    if len(kept) * fraction >= 1:
        validating = round(len(kept) * fraction)
        assert documents_of("val") == order[:validating]
        assert documents_of("train") == order[validating:]
    for split in ("train", "val"):
        *full, last = map(len, tokens_of(split))
        assert set(full) <= {size} and 1 <= last <= size


@pytest.mark.parametrize("count", [1, 3, 19])
def test_the_last_part_of_each_of_few_documents_validates(monkeypatch, count):
    """The documents count for that, and not the files, of which some are no text."""
    monkeypatch.setattr(local_text, "PIECE", 64)
    draws = [random.Random(number) for number in range(count)]
    documents = ["".join(draw.choices("aé€𝄞 ", k=2000 + n)) for n, draw in enumerate(draws)]
    write_files(documents)
    for number in range(30):
        Path("in", f"{number}.bin").write_bytes(b"\xff\xfe\x00" * 50)
    make_shards(["in"], OUT)
    parts = zip(shuffled(count, 0), documents_of("train"), documents_of("val"), strict=True)
    for number, head, tail in parts:
        document = documents[number].encode()
        assert head + tail == document
        assert head.decode() and tail.decode()  # no character is cut
        assert 0 <= len(tail) - len(document) // 20 <= 4


def test_a_fraction_leaves_something_to_train_on():
    write_files(["one", "two", "six"])
    assert make_shards(["in"], OUT, val_fraction=0.99) == (
        "3 documents: 4 training and 8 validation tokens in 1 and 1 shard(s) in out; "
        "0 file(s) left out that are not UTF-8 text"
    )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 16, 17, 64, 1000, 4097])
def test_an_order_has_each_number_once(count):
    orders = [list(shuffled(count, seed)) for seed in range(4)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] == list(shuffled(count, 0))
    if count >= 16:
        assert len({tuple(order) for order in orders}) == 4
        likeness = [np.corrcoef(order, range(count))[0, 1] for order in orders]
        assert max(map(abs, likeness)) < 4 / count**0.5  # four standard deviations


# -----------------------------------------------------------------------------
# Where the text comes from, and what is no text


def test_every_way_in_gives_the_same_documents(monkeypatch):
    documents = [document for document in draw_documents(random.Random(3), 40, 100) if document]
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()
    write_files(documents, "in/below")
    Path("packed").mkdir()
    for path in Path("in/below").iterdir():
        Path("packed", f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    Path("lines.jsonl").write_bytes(lines)
    Path("lines.jsonl.gz").write_bytes(gzip.compress(lines))
    Path("lines.txt").write_bytes(b"\n" + lines[:-1])  # an empty line, and an end without one
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(lines)))
    make_shards(["in"], OUT)
    assert len(all_documents()) == len(documents)
    ways = ["packed", "in/**/*.txt", "i*", "lines.jsonl", "lines.jsonl.gz", "lines.txt", "-"]
    ways = [[path] for path in ways] + [sorted(map(str, Path("in/below").iterdir()))]
    for number, paths in enumerate(ways):
        out = Path(f"out{number}")
        make_shards(paths, out, jsonl=paths[0] in ("lines.txt", "-"))
        assert shards_of(out) == shards_of()


def test_the_command():
    """Standard input is one document, and a path that is missing is one sentence."""
    text = "".join(random.Random(0).choices(LETTERS.replace("\r", ""), k=100_000)).encode()
    command = [sys.executable, ROOT / "data" / "local_text.py", "--out", "out"]
    done = subprocess.run([*command, "-"], input=text, capture_output=True)
    assert done.returncode == 0 and not done.stderr  # no terminal, no bar
    (head,), (tail,) = documents_of("train"), documents_of("val")
    assert head + tail == text
    done = subprocess.run([*command, "nowhere.txt"], capture_output=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count(b"\n") == 1 and b"nowhere.txt" in done.stderr


def test_no_path_is_this_pythons_library(monkeypatch):
    Path("in/site-packages").mkdir()
    for name in ("yes.py", "no.txt", "site-packages/no.py"):
        Path("in", name).write_text("print('yes')\n" * 9)
    monkeypatch.setattr(local_text.sysconfig, "get_paths", lambda: {"stdlib": "in"})
    assert make_shards([], OUT).startswith("1 document:")


def test_what_is_not_text_is_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(local_text, "PIECE", 16)
    write_files(good := [f"good document {number}" for number in range(30)])
    files = {
        "0000a.bin": b"so far it is text, and then\0there is a zero",
        "0001a.txt": b"this one is latin-1, which shows at the very end: \xe9",
        "0002a.txt": "it ends inside a character: €".encode()[:-1],
        "0003a.txt.gz": gzip.compress(os.urandom(1 << 12))[:-100],
        "0004a.txt.gz": b"this was never packed",
        "0005a.txt": b"",  # empty: no text, but nothing wrong with it either
    }
    for name, content in files.items():
        Path("in", name).write_bytes(content)
    line = make_shards(["in"], OUT)
    assert line.startswith("30 documents") and "5 file(s) left out that are not UTF-8 text" in line
    assert all_documents() == sorted(map(str.encode, good))


def test_a_damaged_gz_of_lines_keeps_the_lines_before():
    texts = [f"{number} {random.Random(number).random()}" for number in range(5000)]
    packed = gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode())
    Path("in/lines.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    line = make_shards(["in"], OUT)
    documents = all_documents()
    assert "1 line(s) that are not JSON" in line and 1000 < len(documents) < 5000
    assert documents == sorted(map(str.encode, texts[: len(documents)]))


def test_broken_lines_of_json_are_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(local_text, "LONGEST_LINE", 100)
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"texts": "another field"}',
        b'["text"]',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"text": "a zero \\u0000"}',
        b'{"text": "latin \xe9"}',
        b'{"text": ""}',
        b"",
        b"[" * 99 + b"]" * 9,
        b'{"text": "' + b"long " * 60 + b'"}',
        b'{"text": "good too"}',
        b"[" * 90,
    ]
    Path("in/lines.jsonl").write_bytes(b"\r\n".join(lines))
    line = make_shards(["in"], OUT, val_fraction=0.5)
    assert "10 line(s) that are not JSON with a text" in line
    assert all_documents() == [b"good", b"good too"]


# -----------------------------------------------------------------------------
# Memory, and what stays behind


@pytest.mark.parametrize("name", ["one.txt", "many.jsonl"])
def test_memory_does_not_grow_with_the_corpus(name):
    text = "All that is gold does not glitter, é.\n" * 25_000  # 1 MB
    if name == "many.jsonl":
        text = (json.dumps({"text": text[:390]}) + "\n") * 2500
    peaks = []  # bytes of Python's memory, numpy's included, at the most
    for megabytes in (1, 8):
        Path("in", name).write_text(text * megabytes)
        tracemalloc.start()
        make_shards(["in"], OUT)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 19) and peaks[0] < 4 << 20


@pytest.mark.parametrize(
    "arguments, failing, code, words",
    [
        (["in"], {"Spool.write": OSError(28, "No space left on device")}, 2, "No space left"),
        (["in"], {"Spool.write": KeyboardInterrupt()}, 130, "stopped"),
        (["in"], {"byte_tokens": KeyboardInterrupt()}, 130, "stopped"),
        (["nowhere.txt"], {}, 2, "nowhere.txt does not exist"),
        (["no*thing"], {}, 2, "matches no file"),
        (["empty.txt"], {}, 2, "too little UTF-8 text"),
        (["picture.png"], {}, 2, "too little UTF-8 text"),
        (["in", "--val_fraction", "1"], {}, 2, "--val_fraction"),
        (["in", "--val_fraction", "0"], {}, 2, "--val_fraction"),
        (["in", "--shard_tokens", "0"], {}, 2, "--shard_tokens"),
        (["-", "-"], {}, 2, "once only"),
        (["in", "--out", "empty.txt"], {}, 2, "empty.txt"),
    ],
)
def test_a_failure_changes_nothing(monkeypatch, capsys, arguments, failing, code, words):
    """And is said in one sentence."""
    write_files(draw_documents(random.Random(5), 50, 200))
    Path("empty.txt").write_text("")
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x00")
    make_shards(["in"], OUT, shard_tokens=700)
    before = shards_of()
    for place, error in failing.items():
        monkeypatch.setattr(f"local_text.{place}", mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["local_text.py", "--out", "out", *arguments])
    assert local_text.main() == code
    out, err = capsys.readouterr()
    err = err.removeprefix("\n" if code == 130 else "")  # behind the terminal's "^C"
    assert not out and err.startswith("local_text.py: ") and err.count("\n") == 1 and words in err
    assert shards_of() == before


def test_shards_take_their_names_when_all_are_complete(monkeypatch):
    write_files(draw_documents(random.Random(5), 50, 200))
    seen = []
    monkeypatch.setattr(local_text.os, "fsync", lambda _: seen.extend(shards_of()))
    make_shards(["in"], OUT, shard_tokens=300)
    assert {Path(name).suffix for name in seen} == {".part"}


def test_shards_of_an_earlier_run_go_and_other_files_stay_and_none_is_input():
    write_files(["some words, " * 50])
    make_shards(["."], OUT, shard_tokens=50)
    (OUT / "train_000007.part").write_bytes(b"of a run that was killed")
    (OUT / "train_mine.bin").write_bytes(b"somebody else's")
    assert " 0 file(s) left out that are not UTF-8 text" in make_shards(["."], OUT)
    assert shards_of().keys() == {"train_000001.bin", "train_mine.bin", "val_000000.bin"}


def test_two_runs_do_not_write_into_one_folder():
    write_files(["some words"])
    OUT.mkdir()
    lock = local_text.folder_lock(OUT, busy=lambda: None)
    with lock, pytest.raises(train_gpt.UserError, match="another run"):
        make_shards(["in"], OUT)
    make_shards(["in"], OUT)


# -----------------------------------------------------------------------------
# --tokenizer gpt2, with a stand-in where the vocabulary would have to be fetched


def stand_in(text: str) -> list[int]:
    """The characters' numbers, as far as they fit into a token."""
    return [ord(character) % 50_000 for character in text]


def test_gpt2_tokens_come_with_their_boundary_and_vocabulary(monkeypatch):
    """The pieces of a text without gaps end between characters, and so does the training part."""
    encodings = {"gpt2": types.SimpleNamespace(encode_ordinary=stand_in)}
    monkeypatch.setattr(tiktoken, "get_encoding", encodings.get)
    monkeypatch.setattr(local_text, "PIECE", 47)
    write_files(["a€𝄞é" * 100])
    make_shards(["in"], OUT, tokenizer="gpt2", val_fraction=0.305)
    assert tokens_of("train") == [[50256, *stand_in("a€𝄞é" * 69 + "a€")]]
    assert tokens_of("val") == [[50256, *stand_in("𝄞é" + "a€𝄞é" * 30)]]
    assert train_gpt.open_shard("out/train_000001.bin")[1] == train_gpt.GPT2_VOCAB


def test_gpt2_without_its_package_or_vocabulary_is_one_sentence(monkeypatch):
    unreachable = mock.Mock(side_effect=ConnectionError("no route"))
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(train_gpt.UserError, match="cannot get GPT-2's vocabulary"):
        make_shards([], OUT, tokenizer="gpt2")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(train_gpt.UserError, match="pip install tiktoken"):
        make_shards([], OUT, tokenizer="gpt2")
    assert not OUT.exists()


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in (b"\n\n", b"  ", b"or", b" w", b" wor", b"\n ", b"'s"):
        ranks[pair] = len(ranks)
    pattern = {"pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": {}}
    encoding = tiktoken.Encoding("small", **pattern)
    words = ["wor", "ds", " ", "  ", "\n", "\n\n", "it's", "7", "é", "..", "\t"]
    text = "".join(random.Random(0).choices(words, k=20_000))
    monkeypatch.setattr(local_text, "PIECE", 1500)
    with local_text.spool_in(Path()) as spool:
        spool.write(text.encode())
        spool.flush()
        pieces = [piece.decode() for piece in spool.pieces(0, spool.end)]
    assert len(pieces) > 10 and "".join(pieces) == text
    tokens = [token for piece in pieces for token in encoding.encode_ordinary(piece)]
    assert tokens == encoding.encode_ordinary(text)
