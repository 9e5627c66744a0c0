"""Make token shards out of any text.

    python data/local_text.py                          the .py files, up to 12 KiB, of this Python
    python data/local_text.py book.txt notes/ '*.md'   files, folders with all below them, globs
    python data/local_text.py corpus.jsonl.gz          JSON lines with a document in their "text"
    zcat dump.gz | python data/local_text.py -         standard input (with --jsonl: JSON lines)

This writes train_000001.bin, ... and val_000000.bin, ... into --out (default data/local_text),
where the tiny preset of train_gpt.py looks for them. Files that end in .gz are unpacked. The
tokens are the bytes of the text, 0 to 255, and 256 begins a document; with --tokenizer gpt2 they
are those of GPT-2, and 50256 begins a document. The order of the documents is drawn with --seed;
the same text and settings give the same bytes. The share --val_fraction of the documents is for
validation; where the documents are too few for that, the last part of each. What is not UTF-8 text
is left out, and counted in the closing line.

Memory does not grow with the corpus: the text waits in a temporary file in --out, as large as the
text, and the documents are read from there in their drawn order.
"""

import argparse
import codecs
import contextlib
import fcntl
import glob
import gzip
import json
import os
import random
import re
import struct
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import GPT2_VOCAB, HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, UserError

BYTES_VOCAB = 257
SHARD_TOKENS = 10_000_000
VAL_FRACTION = 0.05
# Bytes of a file of the library. Its longest files are tables and tests, each of which would fill
# dozens of training steps.
LIBRARY_FILE = 12 << 10
# Bytes of text in memory at a time. Larger pieces scatter the heap, which then grows.
PIECE = 1 << 16
# Bytes of a line of JSON, which has to be in memory as a whole. A longer one counts as broken.
LONGEST_LINE = 1 << 25
# A space or line end after a character that is certainly neither.
GAP = re.compile(rb"(?<=[!-~])\s")


# -----------------------------------------------------------------------------
# Shards, in the form that train_gpt.open_shard reads


def shard_header(num_tokens: int, vocab_size: int) -> bytes:
    """The first 1024 bytes of a shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = SHARD_MAGIC, SHARD_VERSION, num_tokens, vocab_size
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write tokens (N,), each below vocab_size, as a shard."""
    Path(path).write_bytes(shard_header(len(tokens), vocab_size) + tokens.astype("<u2").tobytes())


class ShardWriter:
    """Cuts a stream of tokens into shards of shard_tokens, of which the last may be shorter.

    They are .part files until `publish` gives them their names.
    """

    def __init__(self, out: Path, split: str, first: int, vocab_size: int, shard_tokens: int):
        self.out = out
        self.split = split
        self.first = first
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens
        self.total = 0
        self.shards = 0
        self.room = 0  # tokens that the shard in `file` can still take
        self.file: BinaryIO | None = None

    def name(self, shard: int) -> Path:
        return self.out / f"{self.split}_{self.first + shard:06d}.bin"

    def part(self, shard: int) -> Path:
        return self.name(shard).with_suffix(".part")

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens (N,), any N."""
        while len(tokens):
            if self.file is None:
                self.begin()
            piece = tokens[: self.room]
            tokens = tokens[self.room :]
            self.file.write(piece.astype("<u2").tobytes())
            self.room -= len(piece)
            self.total += len(piece)
            if not self.room:
                self.finish()

    def begin(self) -> None:
        """Open the next shard, with a header that makes it invalid until `finish`."""
        self.file = self.part(self.shards).open("wb", buffering=PIECE)
        self.file.write(shard_header(0, self.vocab_size))
        self.room = self.shard_tokens
        self.shards += 1

    def finish(self) -> None:
        """Complete the shard that is being written, and bring it to the disk."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.shard_tokens - self.room, self.vocab_size))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def publish(self) -> None:
        """Replace the shards of an earlier call by the new ones."""
        names = [self.name(shard) for shard in range(self.shards)]
        for stale in set(numbered_files(self.out, self.split, "bin")) - set(names):
            stale.unlink()
        for shard, name in enumerate(names):
            os.replace(self.part(shard), name)


def numbered_files(out: Path, split: str, suffix: str) -> list[Path]:
    """The files of a split in a folder."""
    name = re.compile(rf"{split}_\d{{6,}}\.{suffix}")
    return [path for path in out.iterdir() if name.fullmatch(path.name)]


@contextlib.contextmanager
def folder_lock(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Reserve a folder for this process, until the block or the process ends, however it ends.

    Where another process has reserved it, `busy` is called: it raises, or returns to wait.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems have no locks, and have to do without
        yield
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------
# Input: everything becomes documents of UTF-8 text in one temporary file


class NotText(Exception):
    """What is being read is no text, or cannot be read."""


class Spool:
    """Documents one after the other in a file, and the offset and length of each in another."""

    RECORD = struct.Struct("<QQ")

    def __init__(self, text: BinaryIO, index: BinaryIO):
        self.text = text
        self.index = index
        self.count = 0  # documents
        self.start = 0  # where the document that is being written starts, in bytes
        self.end = 0

    def write(self, text: bytes) -> None:
        """Append to the document that is being written."""
        self.text.write(text)
        self.end += len(text)

    def commit(self) -> None:
        """End the document; one without text does not count."""
        if self.end > self.start:
            self.index.write(self.RECORD.pack(self.start, self.end - self.start))
            self.count += 1
        self.start = self.end

    def roll_back(self) -> None:
        """Drop the document that is being written."""
        self.end = self.text.seek(self.start)
        self.text.truncate()

    def flush(self) -> None:
        """Make readable what was written: `document` and `pieces` read past the files' buffers."""
        self.text.flush()
        self.index.flush()

    def document(self, number: int) -> tuple[int, int]:
        """Where a document starts and ends, in bytes."""
        size = self.RECORD.size
        record = os.pread(self.index.fileno(), size, number * size)
        start, length = self.RECORD.unpack(record)
        return start, start + length

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The text from start to end in pieces of about PIECE bytes.

        A piece ends before a space or line end that follows a word, where there is one. No token of
        GPT-2 reaches over such a place, so the tokens of the pieces are those of the whole text.
        """
        while end - start > PIECE:
            piece = os.pread(self.text.fileno(), PIECE, start)
            gaps = list(GAP.finditer(piece, PIECE - 1000))
            length = gaps[-1].start() if gaps else whole_characters(piece)
            yield piece[:length]
            start += length
        yield os.pread(self.text.fileno(), end - start, start)


@contextlib.contextmanager
def spool_in(folder: Path) -> Iterator[Spool]:
    """A spool in two files without names, which vanish at the end."""
    with tempfile.TemporaryFile(dir=folder) as text, tempfile.TemporaryFile(dir=folder) as index:
        yield Spool(text, index)


def is_continuation(byte: int) -> bool:
    """Whether a byte of UTF-8 text continues a character that began before it."""
    return byte & 0xC0 == 0x80


def whole_characters(text: bytes) -> int:
    """The length of a piece of UTF-8 text without its last character, which may be cut."""
    length = len(text) - 1
    while length > 0 and is_continuation(text[length]):
        length -= 1
    return length


def find_files(paths: list[str], out: Path) -> Iterator[str]:
    """The files that the paths name, in a fixed order; without paths those of Python's library.

    The shards in `out` are left out. Raises UserError at a path that does not exist, and at a glob
    that matches nothing.
    """
    if not paths:
        library = sysconfig.get_paths()["stdlib"]
        for file in files_below(library, out, ("site-packages", "dist-packages")):
            if file.endswith(".py") and os.path.getsize(file) <= LIBRARY_FILE:
                yield file
    for path in paths:
        for match in matching_paths(path):
            if match != "-" and os.path.isdir(match):
                yield from files_below(match, out)
            else:
                yield match


def matching_paths(path: str) -> list[str]:
    """The paths that a path or glob stands for. Raises UserError where there are none."""
    if path == "-" or os.path.lexists(path):
        return [path]
    is_glob = glob.has_magic(path)
    matches = sorted(glob.glob(path, recursive=True)) if is_glob else []
    if not matches:
        raise UserError(
            f"{path} {'matches no file' if is_glob else 'does not exist'}; "
            "name text files, folders, globs, or - for standard input."
        )
    return matches


def files_below(root: str, out: Path, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """All regular files below a folder, without those in `out` and in folders of certain names."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in left_out and Path(folder, name).resolve() != out.resolve()
        )
        for name in sorted(names):
            file = os.path.join(folder, name)
            if os.path.isfile(file):
                yield file


class Reader:
    """Reads a file, and unpacks it where it is packed by gzip.

    The bar advances by the bytes of the file as it is on the disk. Raises NotText where the file
    cannot be read.
    """

    def __init__(self, raw: BinaryIO, packed: bool, bar: tqdm):
        self.raw = raw
        self.packed = packed
        self.stream = gzip.GzipFile(fileobj=raw) if packed else raw
        self.bar = bar
        self.position = 0  # in the file on the disk

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer before the end, none at the end."""
        return self.advance(self.stream.read, size)

    def read_line(self, size: int) -> bytes:
        """The next line, or its first `size` bytes; nothing at the end."""
        return self.advance(self.stream.readline, size)

    def advance(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            data = read(size)
            position = self.raw.tell() if self.packed else self.position + len(data)
        except (OSError, EOFError, zlib.error) as error:  # the last two from a damaged .gz
            raise NotText from error
        self.bar.update(position - self.position)
        self.position = position
        return data


@contextlib.contextmanager
def opened(file: str, bar: tqdm) -> Iterator[Reader]:
    """A reader of a file, or of standard input for "-". Raises NotText if it cannot be opened."""
    if file == "-":
        yield Reader(sys.stdin.buffer, False, bar)
        return
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(file, "rb"))
        except OSError as error:
            raise NotText from error
        yield Reader(raw, file.endswith(".gz"), bar)


def spool_text(reader: Reader, spool: Spool) -> None:
    """Append a whole file to the document. Raises NotText where it is binary or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held = b""  # a carriage return at a piece's end, whose line feed may follow in the next one
    while data := reader.read(PIECE):
        data = held + data
        held = b"\r" if data.endswith(b"\r") else b""
        add_text(data.removesuffix(held), spool, decoder.decode)
    add_text(held, spool, decoder.decode)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # the file ends inside a character
        raise NotText from error


def add_text(text: bytes, spool: Spool, decode: Callable[[bytes], str]) -> None:
    """Append text, with the line ends of Unix. Raises NotText where `decode` does not accept it."""
    try:
        decode(text)
    except UnicodeDecodeError as error:
        raise NotText from error
    if b"\0" in text:
        raise NotText
    spool.write(text.replace(b"\r\n", b"\n"))


def spool_lines(reader: Reader, spool: Spool) -> int:
    """Append a document for each line of JSON. Returns the number of lines without a text."""
    broken = 0
    while True:
        try:
            line = reader.read_line(LONGEST_LINE)
        except NotText:  # a damaged .gz ends here, and the documents before are whole
            return broken + 1
        if not line:
            return broken
        try:
            if len(line) == LONGEST_LINE:
                skip_rest_of_line(reader, line)
                raise ValueError("a line too long to hold")
            if line.strip():
                text = json.loads(line)["text"].encode("utf-8")
                add_text(text, spool, bytes.decode)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, NotText):
            broken += 1
        spool.commit()


def skip_rest_of_line(reader: Reader, line: bytes) -> None:
    """Read on to the end of the line that begins with `line`."""
    while line and not line.endswith(b"\n"):
        line = reader.read_line(LONGEST_LINE)


def spool_all(files: Iterable[str], spool: Spool, jsonl: bool, bar: tqdm) -> tuple[int, int, int]:
    """Read all files. Returns how many there are, how many are no text, and the broken lines."""
    count = 0
    skipped = 0
    broken = 0
    for file in files:
        count += 1
        try:
            with opened(file, bar) as reader:
                if jsonl or file.removesuffix(".gz").endswith(".jsonl"):
                    broken += spool_lines(reader, spool)
                else:
                    spool_text(reader, spool)
                    spool.commit()
        except NotText:
            spool.roll_back()
            skipped += 1
    spool.flush()
    return count, skipped, broken


# -----------------------------------------------------------------------------
# Output: documents in their drawn order, as tokens


def shuffled(count: int, seed: int) -> Iterator[int]:
    """The numbers below count, each once, in an order drawn with the seed.

    A Feistel network over the smallest even number of bits that can hold them permutes all numbers
    of so many bits, and is applied again where the result is not below count. So no list of the
    order has to be kept.
    """
    draw = random.Random(seed)
    keys = [draw.getrandbits(64) for _ in range(6)]
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    for number in range(count):
        number = permuted(number, keys, half)
        while number >= count:
            number = permuted(number, keys, half)
        yield number


def permuted(number: int, keys: list[int], half: int) -> int:
    """One pass of a number of 2 * half bits through the Feistel network."""
    mask = (1 << half) - 1
    left = number >> half
    right = number & mask
    for key in keys:
        # The multiplier, 2^64 divided by the golden ratio, spreads every bit.
        mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        left, right = right, left ^ (mixed ^ key) >> 31 & mask
    return left << half | right


def byte_tokens(text: bytes) -> np.ndarray:
    """The bytes (N,) of a text."""
    return np.frombuffer(text, dtype=np.uint8)


def gpt2_tokens() -> Callable[[bytes], np.ndarray]:
    """A function from text to GPT-2's tokens (N,).

    Raises UserError where tiktoken or its vocabulary is missing.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            "--tokenizer gpt2 needs the package tiktoken, which is not installed; "
            "`pip install tiktoken`, or use --tokenizer bytes."
        ) from None
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # of any kind: from its HTTP client, its cache or its checksum
        raise UserError(
            f"tiktoken cannot get GPT-2's vocabulary ({type(error).__name__}); connect to the "
            "internet once, or set TIKTOKEN_CACHE_DIR to a folder that has it."
        ) from None

    def tokens_of(text: bytes) -> np.ndarray:
        return np.array(encoding.encode_ordinary(text.decode("utf-8")), dtype=np.uint16)

    return tokens_of


def validation_start(spool: Spool, start: int, end: int, val_fraction: float) -> int:
    """Where the last part of a document, for validation, begins.

    That part is never empty, and does not begin inside a character.
    """
    position = end - max(1, int((end - start) * val_fraction))
    while position > start and is_continuation(os.pread(spool.text.fileno(), 1, position)[0]):
        position -= 1
    return position


def write_documents(
    spool: Spool,
    train: ShardWriter,
    val: ShardWriter,
    tokens_of: Callable[[bytes], np.ndarray],
    seed: int,
    val_fraction: float,
    bar: tqdm,
) -> None:
    """Write all documents in the order of the seed, each after its boundary token.

    The first ones in this order are for validation, or, where that would be less than one document,
    the last part of each.
    """
    whole_documents = spool.count * val_fraction >= 1
    num_val = min(spool.count - 1, round(spool.count * val_fraction))
    for position, number in enumerate(shuffled(spool.count, seed)):
        start, end = spool.document(number)
        if not whole_documents:
            middle = validation_start(spool, start, end, val_fraction)
        elif position < num_val:
            middle = start
        else:
            middle = end
        for writer, first, last in ((train, start, middle), (val, middle, end)):
            if first < last:
                writer.add(np.array([writer.vocab_size - 1]))
                for text in spool.pieces(first, last):
                    writer.add(tokens_of(text))
                    bar.update(len(text))


# -----------------------------------------------------------------------------
# The whole: settings, reading, writing, and one line about it


def progress(title: str, total: int | None) -> tqdm:
    """A bar of bytes on a terminal, nothing elsewhere."""
    return tqdm(
        desc=title, total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=None
    )


def check_settings(paths: list[str], val_fraction: float, shard_tokens: int) -> None:
    """Raise UserError where a setting cannot work."""
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction is {val_fraction}, and has to be between 0 and 1.")
    if not 1 <= shard_tokens < 1 << 31:  # the header holds the number in 32 bits with a sign
        raise UserError(
            f"--shard_tokens is {shard_tokens:,}, and has to be between 1 and 2,147,483,647."
        )
    if paths.count("-") > 1:
        raise UserError("standard input (-) can be read once only.")


def make_shards(
    paths: list[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    seed: int = 0,
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    jsonl: bool = False,
) -> str:
    """Make shards of shard_tokens tokens each. Returns a line that says what was made.

    Raises UserError where there is no text, where a setting cannot work, and where another run
    writes into `out`.
    """
    check_settings(paths, val_fraction, shard_tokens)
    tokens_of = gpt2_tokens() if tokenizer == "gpt2" else byte_tokens
    vocab_size = GPT2_VOCAB if tokenizer == "gpt2" else BYTES_VOCAB
    out = Path(out)
    size = sum(os.path.getsize(file) for file in find_files(paths, out) if os.path.exists(file))
    out.mkdir(parents=True, exist_ok=True)

    def refuse() -> None:
        raise UserError(
            f"another run is writing into {out}; wait for it, or give this one another --out."
        )

    with folder_lock(out, refuse), spool_in(out) as spool:
        try:
            with progress("reading", None if "-" in paths else size) as bar:
                files, skipped, broken = spool_all(find_files(paths, out), spool, jsonl, bar)
            left_out = f"{skipped} file(s) left out that are not UTF-8 text"
            if broken:
                left_out += f", {broken} line(s) that are not JSON with a text"
            train = ShardWriter(out, "train", 1, vocab_size, shard_tokens)
            val = ShardWriter(out, "val", 0, vocab_size, shard_tokens)
            with progress("writing", spool.end) as bar:
                write_documents(spool, train, val, tokens_of, seed, val_fraction, bar)
            train.finish()
            val.finish()
            if not train.total:
                raise UserError(
                    f"too little UTF-8 text in {files} file(s) of {' '.join(paths)} ({left_out}); "
                    "name text files or folders."
                )
            train.publish()
            val.publish()
        finally:
            # Shards without a name may be left by this run's failure, or by an earlier run that
            # was killed.
            for path in numbered_files(out, "(train|val)", "part"):
                path.unlink()
    return (
        f"{spool.count:,} document{'' if spool.count == 1 else 's'}: {train.total:,} training and "
        f"{val.total:,} validation tokens in {train.shards} and {val.shards} shard(s) in {out}; "
        f"{left_out}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="text files, folders, globs, or - for standard input; none: this Python's own library",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "local_text",
        metavar="DIR",
        help="folder of the shards (default data/local_text, beside this script)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("bytes", "gpt2"),
        default="bytes",
        help="gpt2 needs the package tiktoken (default bytes)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the documents' order (default 0)")
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=VAL_FRACTION,
        metavar="F",
        help=f"share of the documents for validation (default {VAL_FRACTION})",
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"tokens of a shard (default {SHARD_TOKENS:,})",
    )
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help="all input is JSON lines, not only files that end in .jsonl or .jsonl.gz",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    try:
        print(make_shards(**vars(args)))
    except UserError as error:
        print(f"local_text.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"local_text.py: {error}; see that {args.out} can be written and its disk has room.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            f"\nlocal_text.py: stopped; the shards in {args.out} are as they were",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
