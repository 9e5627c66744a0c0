"""Make token shards out of any text.

    python data/local_text.py                          the .py files, up to 12 KiB, of the Python that runs this
    python data/local_text.py book.txt notes/ '*.md'   files, folders (all the files below), globs; .gz is unpacked
    python data/local_text.py corpus.jsonl.gz          JSON lines: the field "text" of each line is a document
    zcat dump.gz | python data/local_text.py -         standard input, one document (with --jsonl: JSON lines)

writes train_000001.bin, ... and val_000000.bin, ... into --out (default data/local_text), where the tiny preset of
train_gpt.py looks for them. The tokens are the bytes of the text, 0 to 255, and 256 begins a document; with
--tokenizer gpt2 they are those of GPT-2, and 50256 begins a document. Documents come in an order drawn with --seed;
the same text and settings give the same bytes. --val_fraction of the documents validates, or the last part of each
where they are too few for that. What is not UTF-8 text is left out, and counted in the closing line.

Memory does not grow with the corpus: the text waits in a file without a name in --out, as large as the text, and
documents are read from there in their drawn order.
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
LIBRARY_FILE = 12 << 10  # bytes; the library's longest files are tables and tests, each of which would fill dozens of steps
PIECE = 1 << 16  # bytes of text in memory at a time; decoding larger ones scatters the heap, which then grows
LONGEST_LINE = 1 << 25  # bytes; a longer line of JSON is no document but a mistake, and has to be held whole to be read
GAP = re.compile(rb"(?<=[!-~])\s")  # a space or line end after a character that is certainly none


# -----------------------------------------------------------------------------
# Shards: what train_gpt.open_shard reads

def shard_header(num_tokens: int, vocab_size: int) -> bytes:
    """The first 1024 bytes of a shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = SHARD_MAGIC, SHARD_VERSION, num_tokens, vocab_size
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write tokens (N,), each below vocab_size, as a shard."""
    Path(path).write_bytes(shard_header(len(tokens), vocab_size) + tokens.astype("<u2").tobytes())


class ShardWriter:
    """Cuts a stream of tokens into shards of shard_tokens, the last one shorter; they take their names in `publish`."""

    def __init__(self, out: Path, split: str, first: int, vocab_size: int, shard_tokens: int):
        self.out, self.split, self.first, self.vocab_size, self.shard_tokens = out, split, first, vocab_size, shard_tokens
        self.total = 0
        self.shards = 0
        self.file: BinaryIO | None = None

    def name(self, shard: int) -> Path:
        return self.out / f"{self.split}_{self.first + shard:06d}.bin"

    def part(self, shard: int) -> Path:
        return self.name(shard).with_suffix(".part")

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens (N,), any N."""
        while len(tokens):
            if self.file is None:
                self.file, self.room = open(self.part(self.shards), "wb", buffering=PIECE), self.shard_tokens
                self.file.write(shard_header(0, self.vocab_size))  # no valid shard until `finish` counts its tokens
                self.shards += 1
            piece, tokens = tokens[:self.room], tokens[self.room:]
            self.file.write(piece.astype("<u2").tobytes())
            self.room -= len(piece)
            self.total += len(piece)
            if not self.room:
                self.finish()

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
        """Replace the shards of an earlier call by these."""
        names = [self.name(shard) for shard in range(self.shards)]
        for stale in set(numbered(self.out, self.split, "bin")) - set(names):
            stale.unlink()
        for shard, name in enumerate(names):
            os.replace(self.part(shard), name)


def numbered(out: Path, split: str, suffix: str) -> list[Path]:
    """The files of a split in a folder."""
    return [path for path in out.iterdir() if re.fullmatch(rf"{split}_\d{{6,}}\.{suffix}", path.name)]


@contextlib.contextmanager
def folder_lock(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold a folder for this process alone, until the block or the process ends, however it ends.

    Where another process holds it, `busy` is called: it raises, or returns to wait.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a network file system without locks: better without one than not at all
        yield
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------
# Input: everything becomes documents of UTF-8 text in one spool file

class NotText(Exception):
    """What is being read is no text, or cannot be read."""


class Spool:
    """Documents in a file without a name, and the offset and length of each in another, both in a folder."""

    RECORD = struct.Struct("<QQ")

    def __init__(self, folder: Path):
        self.text, self.index = tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=folder)
        self.start = self.end = self.count = 0  # bytes, bytes, documents

    def write(self, text: bytes) -> None:
        """Append to the document that has been begun."""
        self.text.write(text)
        self.end += len(text)

    def commit(self) -> None:
        """End the document; one without text is none."""
        if self.end > self.start:
            self.index.write(self.RECORD.pack(self.start, self.end - self.start))
            self.count += 1
        self.start = self.end

    def roll_back(self) -> None:
        """Forget what was written since the last document ended."""
        self.end = self.text.seek(self.start)
        self.text.truncate()

    def document(self, number: int) -> tuple[int, int]:
        """Where a document begins and ends, in bytes."""
        start, length = self.RECORD.unpack(os.pread(self.index.fileno(), self.RECORD.size, number * self.RECORD.size))
        return start, start + length

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The text from start to end in pieces of about PIECE bytes.

        A piece ends before a space or line end that follows a word, where there is one: GPT-2's tokens end there too, so
        that the tokens of the pieces are those of the whole.
        """
        while end - start > PIECE:
            piece = os.pread(self.text.fileno(), PIECE, start)
            gap = None
            for gap in GAP.finditer(piece, PIECE - 1000):
                pass
            at = gap.start() if gap else whole_characters(piece)
            yield piece[:at]
            start += at
        yield os.pread(self.text.fileno(), end - start, start)

    def close(self) -> None:
        """Give the disk back."""
        self.text.close()
        self.index.close()


def whole_characters(text: bytes) -> int:
    """The length of the longest beginning of UTF-8 text that ends no later than before its last character."""
    at = len(text) - 1
    while at > 0 and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def find_files(paths: list[str], out: Path) -> Iterator[str]:
    """The files that the paths name, in a fixed order; those of this Python's library where no path is given.

    Shards in `out` are no input. Raises UserError at a path that does not exist, and at a glob that matches nothing.
    """
    library = sysconfig.get_paths()["stdlib"]
    for path in paths or [library]:
        matches = [path]
        if path != "-" and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
            if not matches:
                raise UserError(f"{path} {'matches no file' if glob.has_magic(path) else 'does not exist'}; "
                                "name text files, folders, globs, or - for standard input.")
        for match in matches:
            if match == "-" or not os.path.isdir(match):
                yield match
                continue
            for folder, below, names in os.walk(match):
                below[:] = sorted(name for name in below if Path(folder, name).resolve() != out.resolve() and (
                    paths or name not in ("site-packages", "dist-packages")))
                for name in sorted(names):
                    file = os.path.join(folder, name)
                    if os.path.isfile(file) and (paths or name.endswith(".py") and os.path.getsize(file) <= LIBRARY_FILE):
                        yield file


@contextlib.contextmanager
def opened(file: str, bar: tqdm) -> Iterator[Callable[[int, bool], bytes]]:
    """A file, unpacked where its name ends in .gz, as read(size, line): a line or a piece of at most `size` bytes, empty
    at the end. The bar advances by the bytes of the file itself. What cannot be opened or read raises NotText."""
    try:
        raw = sys.stdin.buffer if file == "-" else open(file, "rb")
    except OSError as error:
        raise NotText from error
    with contextlib.ExitStack() as stack:
        packed = file.endswith(".gz")
        if file != "-":
            stack.enter_context(raw)
        stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if packed else raw
        seen = 0

        def read(size: int, line: bool = False) -> bytes:
            nonlocal seen
            try:
                data = stream.readline(size) if line else stream.read(size)
                here = raw.tell() if packed else seen + len(data)
            except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
                raise NotText from error
            bar.update(here - seen)
            seen = here
            return data

        yield read


def spool_text(read: Callable[..., bytes], spool: Spool) -> None:
    """One document, with the line ends of Unix. Raises NotText where it is binary or not UTF-8."""
    decoder, held = codecs.getincrementaldecoder("utf-8")(), b""
    while data := read(PIECE):
        data = held + data
        held = b"\r" if data.endswith(b"\r") else b""  # perhaps half of a line end
        add_text(data[:len(data) - len(held)], spool, decoder.decode)
    add_text(held, spool, lambda text: decoder.decode(text, final=True))


def add_text(text: bytes, spool: Spool, decode: Callable[[bytes], str]) -> None:
    """Append text that `decode` accepts. Raises NotText otherwise."""
    try:
        decode(text)
    except UnicodeDecodeError as error:
        raise NotText from error
    if b"\0" in text:
        raise NotText
    spool.write(text.replace(b"\r\n", b"\n"))


def spool_lines(read: Callable[..., bytes], spool: Spool) -> int:
    """A document for each line of JSON. Returns the number of lines that are no JSON with a text."""
    broken = 0
    while True:
        try:
            if not (line := read(LONGEST_LINE, line=True)):
                return broken
        except NotText:
            return broken + 1  # a damaged .gz ends here; the documents before it are whole
        try:
            if len(line) == LONGEST_LINE:
                while not line.endswith(b"\n") and (line := read(LONGEST_LINE, line=True)):
                    pass
                raise ValueError("a line too long to hold")
            if line.strip():
                text = json.loads(line)["text"].encode("utf-8")
                add_text(text, spool, bytes.decode)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, NotText):
            broken += 1
        spool.commit()


# -----------------------------------------------------------------------------
# Output: documents in their drawn order, as tokens

def shuffled(count: int, seed: int) -> Iterator[int]:
    """The numbers below count, each once, in an order drawn with the seed.

    A Feistel network over the smallest even number of bits that can hold them permutes all the numbers of so many bits,
    and is applied again where the result is not below count: no list of the order has to be kept.
    """
    draw = random.Random(seed)
    keys = [draw.getrandbits(64) for _ in range(6)]
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    for number in range(count):
        while True:
            left, right = number >> half, number & mask
            for key in keys:
                mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF  # 2^64 / golden ratio: spreads every bit
                left, right = right, left ^ (mixed ^ key) >> 31 & mask
            number = left << half | right
            if number < count:
                break
        yield number


def byte_tokens(text: bytes) -> np.ndarray:
    """The bytes (N,) of a text."""
    return np.frombuffer(text, dtype=np.uint8)


def gpt2_tokens() -> Callable[[bytes], np.ndarray]:
    """A function from text to GPT-2's tokens (N,). Raises UserError without tiktoken or its vocabulary."""
    try:
        import tiktoken
    except ImportError:
        raise UserError("--tokenizer gpt2 needs the package tiktoken, which is not installed; `pip install tiktoken`, "
                        "or use --tokenizer bytes.") from None
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP client, its cache or its checksum raises
        raise UserError(f"tiktoken cannot get GPT-2's vocabulary ({type(error).__name__}); connect to the internet once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it.") from None
    return lambda text: np.array(encoding.encode_ordinary(text.decode("utf-8")), dtype=np.uint16)


def cut(spool: Spool, start: int, end: int, val_fraction: float) -> int:
    """Where the validating last part of a document begins: never empty, and not inside a character."""
    at = end - max(1, int((end - start) * val_fraction))
    while at > start and os.pread(spool.text.fileno(), 1, at)[0] & 0xC0 == 0x80:
        at -= 1
    return at


def write_documents(spool: Spool, train: ShardWriter, val: ShardWriter, tokens_of: Callable[[bytes], np.ndarray],
                    seed: int, val_fraction: float, bar: tqdm) -> None:
    """Write all documents in the order of the seed, each after its boundary token."""
    validating = min(spool.count - 1, round(spool.count * val_fraction)) if spool.count * val_fraction >= 1 else 0
    for position, number in enumerate(shuffled(spool.count, seed)):
        start, end = spool.document(number)
        middle = (start if position < validating else end) if validating else cut(spool, start, end, val_fraction)
        for writer, first, last in ((train, start, middle), (val, middle, end)):
            if first < last:
                writer.add(np.array([writer.vocab_size - 1]))
                for text in spool.pieces(first, last):
                    writer.add(tokens_of(text))
                    bar.update(len(text))


def progress(title: str, total: int | None) -> tqdm:
    """A bar of bytes on a terminal, nothing elsewhere."""
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)


def make_shards(paths: list[str], out: Path, *, tokenizer: str = "bytes", seed: int = 0, val_fraction: float = VAL_FRACTION,
                shard_tokens: int = SHARD_TOKENS, jsonl: bool = False) -> str:
    """Make the shards, of shard_tokens tokens each. Returns a line that says what was made.

    Raises UserError where there is no text, where a setting cannot work, and where another run writes into `out`.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction is {val_fraction}, and has to be between 0 and 1.")
    if not 1 <= shard_tokens < 1 << 31:  # what the header can say
        raise UserError(f"--shard_tokens is {shard_tokens:,}, and has to be between 1 and 2,147,483,647.")
    if paths.count("-") > 1:
        raise UserError("standard input (-) can be read once only.")
    tokens_of, vocab_size = (gpt2_tokens(), GPT2_VOCAB) if tokenizer == "gpt2" else (byte_tokens, BYTES_VOCAB)
    out = Path(out)
    size = sum(os.path.getsize(file) for file in find_files(paths, out) if os.path.exists(file))
    out.mkdir(parents=True, exist_ok=True)

    def busy():
        raise UserError(f"another run is writing into {out}; wait for it, or give this one another --out.")

    with folder_lock(out, busy), contextlib.closing(Spool(out)) as spool:
        try:
            with progress("reading", None if "-" in paths else size) as bar:
                files, skipped, broken = spool_all(find_files(paths, out), spool, jsonl, bar)
            train, val = ShardWriter(out, "train", 1, vocab_size, shard_tokens), ShardWriter(out, "val", 0, vocab_size, shard_tokens)
            with progress("writing", spool.end) as bar:
                write_documents(spool, train, val, tokens_of, seed, val_fraction, bar)
            train.finish()
            val.finish()
            left_out = f"{skipped} file(s) left out that are not UTF-8 text"
            left_out += f", {broken} line(s) that are not JSON with a text" if broken else ""
            if not train.total:
                raise UserError(f"too little UTF-8 text in {files} file(s) of {' '.join(paths)} ({left_out}); name text files or folders.")
            train.publish()
            val.publish()
        finally:
            clear_parts(out)  # and those of an earlier run that was killed
    return (f"{spool.count:,} document{'s' * (spool.count != 1)}: {train.total:,} training and {val.total:,} validation tokens in "
            f"{train.shards} and {val.shards} shard(s) in {out}; {left_out}")


def spool_all(files: Iterable[str], spool: Spool, jsonl: bool, bar: tqdm) -> tuple[int, int, int]:
    """Read all files. Returns their number, that of files which are no text, and that of lines which are no documents."""
    number = skipped = broken = 0
    for number, file in enumerate(files, start=1):
        try:
            with opened(file, bar) as read:
                if jsonl or file.removesuffix(".gz").endswith(".jsonl"):
                    broken += spool_lines(read, spool)
                else:
                    spool_text(read, spool)
                    spool.commit()
        except NotText:
            spool.roll_back()
            skipped += 1
    spool.text.flush()  # what follows reads beside these files' buffers
    spool.index.flush()
    return number, skipped, broken


def clear_parts(out: Path) -> None:
    """Remove shards that never took their names."""
    for path in numbered(out, "(train|val)", "part"):
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="text files, folders, globs, or - for standard input; none: this Python's own library")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "local_text", metavar="DIR",
                        help="folder of the shards (default data/local_text, beside this script)")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes", help="gpt2 needs the package tiktoken (default bytes)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' order (default 0)")
    parser.add_argument("--val_fraction", type=float, default=VAL_FRACTION, metavar="F",
                        help=f"share of the documents that validates (default {VAL_FRACTION})")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
                        help=f"tokens of a shard (default {SHARD_TOKENS:,})")
    parser.add_argument("--jsonl", action="store_true", help="all input is JSON lines, not only files that end in .jsonl or .jsonl.gz")
    args = parser.parse_args()
    try:
        print(make_shards(**vars(args)))
    except UserError as error:
        print(f"local_text.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"local_text.py: {error}; see that {args.out} can be written and its disk has room.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlocal_text.py: stopped; the shards in {args.out} are as they were", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
