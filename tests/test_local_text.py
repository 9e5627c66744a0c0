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

import local_text
import numpy as np
import pytest
from conftest import ROOT
from local_text import make_shards, shuffled

import train_gpt

LETTERS = "ab \n\t\r.é€𝄞\ufeff\u2028\x01"


def tokens_of(out: Path, split: str) -> np.ndarray:
    """The tokens of a split, all its shards in a row; their sizes are checked on the way."""
    shards = [train_gpt.open_shard(str(path))[0] for path in sorted(out.glob(f"{split}_*.bin"))]
    assert len({len(shard) for shard in shards[:-1]}) <= 1 and (
        len(shards) < 2 or len(shards[-1]) <= len(shards[0])
    )
    return np.concatenate(shards) if shards else np.zeros(0, dtype="<u2")


def documents_of(out: Path, split: str, boundary: int = 256) -> list[bytes]:
    """The documents of a split of byte tokens."""
    tokens = tokens_of(out, split)
    assert not len(tokens) or tokens[0] == boundary
    pieces = np.split(tokens, np.flatnonzero(tokens == boundary))[1:]
    return [piece[1:].astype(np.uint8).tobytes() for piece in pieces]


def all_documents(out: Path) -> list[bytes]:
    return sorted(documents_of(out, "train") + documents_of(out, "val"))


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def write_files(folder: Path, documents: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number:04d}.txt").write_text(document, encoding="utf-8", newline="")


def draw_documents(draw: random.Random, count: int, longest: int) -> list[str]:
    return [
        "".join(draw.choices(LETTERS, k=draw.choice([0, 1, 2, draw.randrange(longest)])))
        for _ in range(count)
    ]


# -----------------------------------------------------------------------------
# Nothing is lost, and nothing comes twice


@pytest.mark.parametrize("case", range(12))
def test_the_shards_hold_the_documents_in_the_drawn_order(tmp_path, monkeypatch, case):
    draw = random.Random(case)
    documents = draw_documents(draw, draw.choice([20, 21, 50, 333]), 200)
    write_files(tmp_path / "in", documents)
    monkeypatch.setattr(local_text, "PIECE", draw.choice([8, 64, 1 << 16]))
    fraction, size = draw.choice([0.05, 0.3]), draw.choice([1000, 1001, 37, 1 << 20])
    make_shards(
        [str(tmp_path / "in")],
        tmp_path / "out",
        seed=case,
        val_fraction=fraction,
        shard_tokens=size,
    )

    kept = [document.replace("\r\n", "\n").encode() for document in documents if document]
    order = [kept[number] for number in shuffled(len(kept), case)]
    if len(kept) * fraction >= 1:
        validating = round(len(kept) * fraction)
        assert documents_of(tmp_path / "out", "val") == order[:validating]
        assert documents_of(tmp_path / "out", "train") == order[validating:]
    for split in ("train", "val"):
        sizes = [
            len(train_gpt.open_shard(str(path))[0])
            for path in sorted((tmp_path / "out").glob(f"{split}_*.bin"))
        ]
        assert all(length == size for length in sizes[:-1]) and 1 <= sizes[-1] <= size


@pytest.mark.parametrize("count", [1, 3, 19])
def test_the_last_part_of_each_of_few_documents_validates(tmp_path, monkeypatch, count):
    monkeypatch.setattr(local_text, "PIECE", 64)
    documents = [
        "".join(random.Random(number).choices("aé€𝄞 ", k=2000 + number)) for number in range(count)
    ]
    write_files(tmp_path / "in", documents)
    make_shards([str(tmp_path / "in")], tmp_path / "out")
    heads, tails = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == [
        documents[number].encode() for number in shuffled(count, 0)
    ]
    for head, tail in zip(heads, tails, strict=True):
        assert (
            head.decode() and tail.decode() and 0 <= len(tail) - (len(head) + len(tail)) // 20 <= 4
        )  # no character is cut


def test_a_fraction_leaves_something_to_train_on(tmp_path):
    write_files(tmp_path / "in", ["one", "two", "three"])
    make_shards([str(tmp_path / "in")], tmp_path / "out", val_fraction=0.99)
    assert (
        len(documents_of(tmp_path / "out", "train")) == 1
        and len(documents_of(tmp_path / "out", "val")) == 2
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 64, 1000, 4097])
def test_an_order_has_each_number_once(count):
    orders = [list(shuffled(count, seed)) for seed in range(4)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] == list(shuffled(count, 0))
    if count >= 16:
        assert len({tuple(order) for order in orders}) == 4
        assert all(
            abs(np.corrcoef(order, range(count))[0, 1]) < 4 / count**0.5 for order in orders
        )  # four standard deviations


def test_no_numbers_have_no_order():
    assert list(shuffled(0, 0)) == []


def test_the_same_text_gives_the_same_bytes_and_the_seed_another_order(tmp_path):
    write_files(tmp_path / "in", draw_documents(random.Random(1), 60, 300))
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_shards([str(tmp_path / "in")], tmp_path / name, seed=seed, shard_tokens=500)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") != shards_of(tmp_path / "c")
    assert all_documents(tmp_path / "a") == all_documents(tmp_path / "c")


@pytest.mark.parametrize("length", [1, 2, 1023, 1024, 1025])
def test_a_written_shard_is_what_the_trainer_reads(tmp_path, length):
    tokens = np.random.default_rng(length).integers(0, 50257, length)
    local_text.write_shard(tmp_path / "one.bin", tokens, 50257)
    read, vocab_size = train_gpt.open_shard(str(tmp_path / "one.bin"))
    assert vocab_size == 50257 and read.tolist() == tokens.tolist()
    writer = local_text.ShardWriter(tmp_path, "train", 1, 50257, length)
    for at in range(0, length, 100):
        writer.add(tokens[at : at + 100])
    writer.finish()
    writer.publish()
    assert (tmp_path / "train_000001.bin").read_bytes() == (
        tmp_path / "one.bin"
    ).read_bytes() and writer.total == length


# -----------------------------------------------------------------------------
# Where the text comes from


def test_every_way_in_gives_the_same_documents(tmp_path, monkeypatch):
    documents = [document for document in draw_documents(random.Random(3), 40, 100) if document]
    lines = "".join(
        json.dumps({"id": 1, "text": document}) + "\n" for document in documents
    ).encode()
    write_files(tmp_path / "folder" / "below", documents)
    (tmp_path / "packed").mkdir()
    for path in (tmp_path / "folder" / "below").iterdir():
        (tmp_path / "packed" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "lines.jsonl").write_bytes(lines)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "lines.txt").write_bytes(
        b"\n" + lines[:-1]
    )  # an empty line, and none that ends the last
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(lines)))
    paths = ["folder", "packed", "folder/**/*.txt", "fol*", "lines.jsonl", "lines.jsonl.gz"]
    ways = [(str(tmp_path / path), False) for path in paths]
    ways += [(str(tmp_path / "lines.txt"), True), ("-", True)]
    made = []
    for number, (path, jsonl) in enumerate(ways):
        make_shards([path], tmp_path / f"out{number}", jsonl=jsonl)
        made.append(shards_of(tmp_path / f"out{number}"))
    assert all(shards == made[0] for shards in made)
    assert len(all_documents(tmp_path / "out0")) == len(documents)


def test_standard_input_is_one_document(tmp_path):
    text = "".join(random.Random(0).choices(LETTERS.replace("\r", ""), k=100_000)).encode()
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / "local_text.py"), "-", "--out", str(tmp_path / "out")],
        input=text,
        capture_output=True,
    )
    assert done.returncode == 0 and not done.stderr  # no terminal, no bar
    assert (
        documents_of(tmp_path / "out", "train")[0] + documents_of(tmp_path / "out", "val")[0]
        == text
    )


def test_several_paths_come_together(tmp_path):
    write_files(tmp_path / "in", ["one " * 9, "two " * 9])
    line = make_shards([str(tmp_path / "in" / "0000.txt"), str(tmp_path / "in")], tmp_path / "out")
    assert line.startswith("3 documents")


def test_line_ends_become_those_of_unix_wherever_a_piece_ends(tmp_path, monkeypatch):
    text = b"a\r\nbc\rd\r\r\n\n\r" * 20
    (tmp_path / "one.txt").write_bytes(text)
    for piece in range(8, 22):
        monkeypatch.setattr(local_text, "PIECE", piece)
        make_shards([str(tmp_path / "one.txt")], tmp_path / "out")
        assert documents_of(tmp_path / "out", "train")[0] + documents_of(tmp_path / "out", "val")[
            0
        ] == text.replace(b"\r\n", b"\n")


def test_no_path_is_this_pythons_library(tmp_path, monkeypatch):
    write_files(tmp_path / "lib" / "site-packages", ["not this"])
    (tmp_path / "lib" / "yes.py").write_text("print('yes')\n" * 9)
    (tmp_path / "lib" / "no.txt").write_text("not this either")
    monkeypatch.setattr(
        local_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")}
    )
    assert make_shards([], tmp_path / "out").startswith("1 document:")


def test_its_own_shards_are_no_input(tmp_path):
    write_files(tmp_path, ["some words"])
    for _ in range(2):
        line = make_shards([str(tmp_path)], tmp_path / "out")
        assert line.endswith("0 file(s) left out that are not UTF-8 text")


# -----------------------------------------------------------------------------
# What is no text


def test_what_is_not_text_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(local_text, "PIECE", 16)
    folder = tmp_path / "in"
    write_files(folder, good := [f"good document {number}" for number in range(30)])
    (folder / "0000a.bin").write_bytes(b"so far it is text, and then\0there is a zero")
    (folder / "0001a.txt").write_bytes(
        "this one is latin-1, which shows at the very end: é".encode("latin-1")
    )
    (folder / "0002a.txt").write_bytes("it ends inside a character: €".encode()[:-1])
    (folder / "0003a.txt.gz").write_bytes(gzip.compress(os.urandom(1 << 12))[:-100])
    (folder / "0004a.txt.gz").write_bytes(b"this was never packed")
    (folder / "0005a.txt").write_bytes(b"")  # empty: no text, but nothing wrong with it either
    line = make_shards([str(folder)], tmp_path / "out")
    assert line.startswith("30 documents") and "5 file(s) left out that are not UTF-8 text" in line
    assert all_documents(tmp_path / "out") == sorted(map(str.encode, good))


def test_a_damaged_gz_of_lines_keeps_the_lines_before(tmp_path):
    packed = gzip.compress(
        "".join(
            json.dumps({"text": f"{number} {random.Random(number).random()}"}) + "\n"
            for number in range(5000)
        ).encode()
    )
    (tmp_path / "lines.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    line = make_shards([str(tmp_path / "lines.jsonl.gz")], tmp_path / "out")
    documents = all_documents(tmp_path / "out")
    assert "1 line(s) that are not JSON" in line and 1000 < len(documents) < 5000
    assert all(
        document.decode() == f"{number} {random.Random(number).random()}"
        for document in documents
        for number in [int(document.split()[0])]
    )


def test_broken_lines_of_json_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(local_text, "LONGEST_LINE", 100)
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"texts": "another field"}',
        b'["text"]',
        b'{"text": 5}',
        b'{"text": null}',
        b"7",
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
    (tmp_path / "lines.jsonl").write_bytes(b"\r\n".join(lines))
    line = make_shards([str(tmp_path / "lines.jsonl")], tmp_path / "out", val_fraction=0.5)
    assert "12 line(s) that are not JSON with a text" in line
    assert all_documents(tmp_path / "out") == [b"good", b"good too"]


# -----------------------------------------------------------------------------
# Memory, and what stays behind


def peak(out: Path, path: Path, **options) -> int:
    """Bytes of Python's memory, numpy's included, at the most while shards are made."""
    tracemalloc.start()
    try:
        make_shards([str(path)], out, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["one.txt", "many.jsonl"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, name):
    text = "All that is gold does not glitter, é.\n" * 25_000  # 1 MB
    line = json.dumps({"text": text[:390]}) + "\n"
    peaks = []
    for megabytes in (1, 8):
        with open(tmp_path / name, "w") as file:
            for _ in range(megabytes):
                file.write(text if name == "one.txt" else line * 2500)
        peaks.append(peak(tmp_path / "out", tmp_path / name))
    assert peaks[1] < peaks[0] + (1 << 19) and peaks[0] < 4 << 20


def test_a_run_that_fails_leaves_the_earlier_shards_and_nothing_else(tmp_path, monkeypatch):
    write_files(tmp_path / "in", draw_documents(random.Random(5), 50, 200))
    make_shards([str(tmp_path / "in")], tmp_path / "out", shard_tokens=700)
    before = shards_of(tmp_path / "out")

    def stop(text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local_text, "byte_tokens", stop)
        with pytest.raises(KeyboardInterrupt):
            make_shards([str(tmp_path / "in")], tmp_path / "out", shard_tokens=300)
    assert shards_of(tmp_path / "out") == before


def test_shards_take_their_names_when_all_are_complete(tmp_path, monkeypatch):
    write_files(tmp_path / "in", draw_documents(random.Random(5), 50, 200))
    seen = []
    monkeypatch.setattr(
        local_text.os,
        "fsync",
        lambda descriptor: seen.extend(path.suffix for path in (tmp_path / "out").iterdir()),
    )
    make_shards([str(tmp_path / "in")], tmp_path / "out", shard_tokens=300)
    assert ".part" in seen and ".bin" not in seen


def test_shards_of_an_earlier_run_go_and_other_files_stay(tmp_path):
    out = tmp_path / "out"
    write_files(tmp_path / "in", ["some words, " * 50])
    make_shards([str(tmp_path / "in")], out, shard_tokens=50)
    (out / "train_000007.part").write_bytes(b"of a run that was killed")
    (out / "train_mine.bin").write_bytes(b"somebody else's")
    make_shards([str(tmp_path / "in")], out)
    assert sorted(shards_of(out)) == ["train_000001.bin", "train_mine.bin", "val_000000.bin"]


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    write_files(tmp_path / "in", ["some words"])
    (tmp_path / "out").mkdir()
    lock = local_text.folder_lock(tmp_path / "out", busy=lambda: None)
    with lock, pytest.raises(train_gpt.UserError, match="another run"):
        make_shards([str(tmp_path / "in")], tmp_path / "out")
    make_shards([str(tmp_path / "in")], tmp_path / "out")


# -----------------------------------------------------------------------------
# --tokenizer gpt2, with a stand-in where the vocabulary would have to be fetched


@pytest.fixture
def tiktoken(monkeypatch):
    """A module of that name, whose tokens are the characters' numbers."""
    module = types.ModuleType("tiktoken")
    module.get_encoding = lambda name: types.SimpleNamespace(
        encode_ordinary=lambda text: list(map(ord, text))
    )
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    return module


def test_gpt2_tokens_come_with_their_boundary_and_vocabulary(tmp_path, tiktoken):
    write_files(tmp_path / "in", ["wörter"])
    make_shards([str(tmp_path / "in")], tmp_path / "out", tokenizer="gpt2", val_fraction=0.3)
    tokens, vocab_size = train_gpt.open_shard(str(tmp_path / "out" / "train_000001.bin"))
    assert vocab_size == train_gpt.GPT2_VOCAB and tokens.tolist() == [50256, *map(ord, "wört")]
    assert tokens_of(tmp_path / "out", "val").tolist() == [50256, *map(ord, "er")]


def test_gpt2_without_its_package_or_vocabulary_is_one_sentence(tmp_path, tiktoken, monkeypatch):
    def fail(name):
        raise ConnectionError("no route")

    tiktoken.get_encoding = fail
    with pytest.raises(train_gpt.UserError, match="cannot get GPT-2's vocabulary"):
        make_shards([], tmp_path / "out", tokenizer="gpt2")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(train_gpt.UserError, match="pip install tiktoken"):
        make_shards([], tmp_path / "out", tokenizer="gpt2")
    assert not (tmp_path / "out").exists()


def test_pieces_without_a_gap_end_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(local_text, "PIECE", 50)
    with local_text.spool_in(tmp_path) as spool:
        spool.write(text := "a€𝄞é".encode() * 100)
        spool.text.flush()
        pieces = [piece.decode() for piece in spool.pieces(0, len(text))]
    assert len(pieces) > 10 and "".join(pieces).encode() == text


def test_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    import tiktoken_ext.openai_public as public

    pattern = getattr(public, "r50k_pat_str", None)
    if pattern is None:
        pytest.skip("this tiktoken keeps GPT-2's pattern elsewhere")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in (b"\n\n", b"  ", b"or", b" w", b" wor", b"\n ", b"'s"):
        ranks[pair] = len(ranks)
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    text = "".join(
        random.Random(0).choices(
            ["wor", "ds", " ", "  ", "\n", "\n\n", "it's", "7", "é", "..", "\t"], k=20_000
        )
    ).encode()
    monkeypatch.setattr(local_text, "PIECE", 1500)
    with local_text.spool_in(tmp_path) as spool:
        spool.write(text)
        spool.flush()
        pieces = list(spool.pieces(0, len(text)))
    assert len(pieces) > 10 and b"".join(pieces) == text
    assert sum(
        (encoding.encode_ordinary(piece.decode()) for piece in pieces), []
    ) == encoding.encode_ordinary(text.decode())


# -----------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.txt"], "nowhere.txt does not exist"),
        (["no*thing"], "matches no file"),
        (["empty.txt"], "too little UTF-8 text"),
        (["text.txt", "--val_fraction", "1"], "--val_fraction"),
        (["text.txt", "--val_fraction", "0"], "--val_fraction"),
        (["text.txt", "--shard_tokens", "0"], "--shard_tokens"),
        (["-", "-"], "once only"),
        (["text.txt", "--out", "text.txt"], "text.txt"),
    ],
)
def test_what_cannot_work_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.setattr(sys, "argv", ["local_text.py", "--out", "out", *arguments])
    assert local_text.main() == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("local_text.py: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.part"))


def test_missing_path_as_a_person_meets_it(tmp_path):
    command = [sys.executable, ROOT / "data" / "local_text.py", tmp_path / "nowhere.txt"]
    result = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and "nowhere.txt" in result.stderr


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x00"])
def test_no_text_at_all_leaves_earlier_shards_alone(tmp_path, content):
    write_files(tmp_path / "in", ["some words"])
    make_shards([str(tmp_path / "in")], tmp_path / "out")
    before = shards_of(tmp_path / "out")
    (tmp_path / "none").write_bytes(content)
    with pytest.raises(train_gpt.UserError, match="too little UTF-8 text"):
        make_shards([str(tmp_path / "none")], tmp_path / "out")
    assert shards_of(tmp_path / "out") == before


def test_documents_count_for_the_split_and_not_files(tmp_path):
    """One document among many files that are no text gives its last part to validation."""
    write_files(tmp_path / "in", ["The only text here. " * 100])
    for number in range(30):
        (tmp_path / "in" / f"{number}.bin").write_bytes(b"\xff\xfe\x00" * 50)
    make_shards([str(tmp_path / "in")], tmp_path / "out")
    head, tail = (documents_of(tmp_path / "out", split)[0] for split in ("train", "val"))
    assert head + tail == b"The only text here. " * 100


def test_a_full_disk_and_control_c_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.setattr(
        sys, "argv", ["local_text.py", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    )
    for error, code in ((OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)):

        def fail(spool, text, error=error):
            raise error

        monkeypatch.setattr(local_text.Spool, "write", fail)
        assert local_text.main() == code
        assert capsys.readouterr().err.strip().count("\n") == 0
    assert not shards_of(tmp_path / "out")
