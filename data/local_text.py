"""Make token shards from any text.

    python data/local_text.py                          the .py files, up to 12 KiB, of this Python
    python data/local_text.py book.txt notes/ '*.md'   files, folders with all below them, globs
    python data/local_text.py corpus.jsonl.gz          JSON lines, each with a document in "text"
    zcat dump.gz | python data/local_text.py -         standard input (with --jsonl: JSON lines)

The shards train_000001.bin, ... and val_000000.bin, ... replace those of the previous call in
--out, by default data/local_text beside this script, where the tiny preset of train_gpt.py reads
them. A token is a byte of the text, and 256 begins a document; with --tokenizer gpt2, 50256 does.

A file is one document; JSON lines (.jsonl, .ndjson, .json) and a .json list have one in the "text"
of each object. Files that end in .gz are unpacked. Files that are not UTF-8 text are left out; so
are hidden folders, __pycache__ and site-packages below a folder. The first --val_fraction of the
documents, in the order that --seed gives, is for validation; where that is less than one document,
the tail of each. The tokens wait in memory: 2 bytes each, 4 while they are written.
"""

import argparse
import glob
import gzip
import json
import os
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Bytes. The longest files of Python's library are tables and tests, each of which would fill dozens
# of training steps.
LIBRARY_FILE = 12 << 10
# Folders, beside hidden ones.
SKIPPED = {"__pycache__", "dist-packages", "site-packages"}
NOT_A_RECORD = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class UserError(Exception):
    """An error that the user can fix, described in one sentence."""


def find_files(paths: list[str], out: Path) -> Iterator[str]:
    """Yield each file that the paths name once; without paths, those of Python's library.

    Files in `out` are skipped. Raises UserError for a path that does not exist.
    """
    seen = set()
    for path in paths or [sysconfig.get_paths()["stdlib"]]:
        if path == "-" or os.path.exists(path):
            matches = [path]
        elif not (matches := sorted(glob.glob(path, recursive=True))):
            raise UserError(f"{path} does not exist; name files, folders, globs, or - for stdin.")
        for match in matches:
            for file in files_below(match) if os.path.isdir(match) else [match]:
                real = Path(os.path.realpath(file))
                if real not in seen and out not in real.parents:
                    seen.add(real)
                    if paths or (file.endswith(".py") and real.stat().st_size <= LIBRARY_FILE):
                        yield file


def files_below(root: str) -> Iterator[str]:
    """Yield the files below a folder, sorted, but none in hidden and SKIPPED folders."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in set(subfolders) - SKIPPED if name[0] != ".")
        yield from filter(os.path.isfile, (os.path.join(folder, name) for name in sorted(names)))


def read_documents(files: Iterable[str], jsonl: bool, left_out: list[str]) -> Iterator[bytes]:
    """Yield the documents of all files, and append the names of those that are not text."""
    for file in files:
        kind = file.lower().removesuffix(".gz")
        opener = open if kind == file.lower() else gzip.open
        try:
            with opener(0 if file == "-" else file, "rb") as stream:
                if jsonl or kind.endswith((".jsonl", ".ndjson")):
                    records = filter(bytes.strip, stream)
                else:
                    text = stream.read().decode("utf-8-sig")
                    records = json_records(text) if kind.endswith(".json") else []
                    if not records:
                        yield clean(text)
                for number, record in enumerate(records, 1):
                    try:
                        record = json.loads(record) if isinstance(record, bytes) else record
                        yield clean(record["text"])
                    except NOT_A_RECORD:
                        left_out.append(f"record {number} of {file}")
        except (OSError, ValueError, EOFError, zlib.error):  # the last two by a corrupt .gz
            left_out.append(file)


def json_records(text: str) -> list:
    """Return the list or the lines of a .json file, parsed, if the first one has a "text"."""
    for array in text, "[" + text.strip().replace("\n", ",") + "]":
        try:
            records = json.loads(array)
            clean(records[0]["text"])
            return records
        except NOT_A_RECORD:
            continue
    return []


def clean(text: str) -> bytes:
    """Encode a text without its byte order mark, with Unix line ends. Raises ValueError at NUL."""
    if "\0" in text:
        raise ValueError
    return text.removeprefix("\ufeff").replace("\r\n", "\n").encode()


def encoder(tokenizer: str) -> tuple:
    """Return a function from UTF-8 to tokens (N,), and the vocabulary's size.

    Raises UserError if GPT-2's tokens cannot be had.
    """
    if tokenizer == "bytes":
        return lambda text: np.frombuffer(text, np.uint8), 257
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # of any kind, from its import, its HTTP client or its cache
        raise UserError(
            f"--tokenizer gpt2 is not available ({type(error).__name__}: {error}); run `pip "
            "install tiktoken` and connect to the internet once, or set TIKTOKEN_CACHE_DIR."
        ) from None
    return lambda text: gpt2.encode_to_numpy(text.decode(), disallowed_special=()), 50257


def split(documents: list[np.ndarray], val_fraction: float) -> tuple[list, list]:
    """Divide documents, each (N,) with its boundary token, into those for training and validation.

    Both lists have tokens unless no document has two.
    """
    num_val = len(documents) * val_fraction
    if num_val >= 1:
        num_val = min(len(documents) - 1, round(num_val))
        return documents[num_val:], documents[:num_val]
    train = []
    val = []
    for document in documents:
        cut = len(document) - max(1, int(len(document) * val_fraction))
        if cut > 1:
            train.append(document[:cut])
        val.append(np.append(document[:1], document[cut:]))
    return train, val


def write_shards(
    folder: str, kind: str, first: int, documents: list, vocab_size: int, shard_tokens: int
) -> int:
    """Write documents (N,) uint16 as shards for train_gpt.py. Returns the number of tokens."""
    tokens = np.concatenate(documents, dtype="<u2")
    for number, start in enumerate(range(0, len(tokens), shard_tokens), first):
        shard = tokens[start : start + shard_tokens]
        header = np.zeros(256, "<i4")
        header[:4] = 20240520, 1, len(shard), vocab_size
        path = Path(folder, f"{kind}_{number:06d}.bin")
        path.write_bytes(header.tobytes() + shard.tobytes())
    return len(tokens)


def make_shards(args: argparse.Namespace) -> str:
    """Replace the shards in `out`. Returns a line about them. Raises UserError and OSError."""
    if not (0 < args.val_fraction < 1 and 0 < args.shard_tokens < 1 << 31 and args.seed >= 0):
        raise UserError(
            "--val_fraction must be between 0 and 1, --shard_tokens from 1 to 2147483647 and "
            "--seed not negative."
        )
    out = args.out.expanduser().resolve()
    manifest = out / ".local_text"  # the names of the shards of the previous call
    previous = manifest.read_text().split() if manifest.exists() else []
    for path in out.glob("[!.]*"):
        if path.name not in previous:
            raise UserError(
                f"{path} is not a shard that this script wrote; move it, or choose another --out."
            )
    encode, vocab_size = encoder(args.tokenizer)
    left_out = []
    texts = read_documents(find_files(args.paths, out), args.jsonl, left_out)
    documents = [
        np.append(np.uint16(vocab_size - 1), encode(text).astype(np.uint16))
        for text in tqdm(texts, disable=None)
        if text
    ]
    skipped = f"{len(left_out)} files left out as not UTF-8 text"
    if left_out:
        skipped += f": {', '.join(left_out[:3])}"
    order = np.random.default_rng(args.seed).permutation(len(documents))
    train, val = split([documents[number] for number in order], args.val_fraction)
    if not train:
        raise UserError(f"there is too little text ({skipped})")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as incomplete:
        num_train = write_shards(incomplete, "train", 1, train, vocab_size, args.shard_tokens)
        num_val = write_shards(incomplete, "val", 0, val, vocab_size, args.shard_tokens)
        for name in previous:
            (out / name).unlink(missing_ok=True)
        names = os.listdir(incomplete)
        manifest.write_text("\n".join(names))
        for name in names:
            Path(incomplete, name).rename(out / name)
    return (
        f"{len(documents):,} documents: {num_train:,} training and {num_val:,} validation tokens "
        f"in {len(names)} shards in {out} ({skipped})"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", metavar="PATH")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "local_text")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val_fraction", type=float, default=0.05)
    parser.add_argument("--shard_tokens", type=int, default=10_000_000)
    parser.add_argument("--jsonl", action="store_true")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # names of files
    try:
        print(make_shards(args))
    except (UserError, OSError) as error:
        parser.exit(2, f"local_text.py: {error}\n")


if __name__ == "__main__":
    main()
