"""Make token shards out of any text: its UTF-8 bytes are the tokens, 0 to 255, and 256 begins a document.

    python data/local_text.py                          the .py files of the Python that runs this: text on every machine
    python data/local_text.py book.txt notes/          any files and folders (a folder: all the files below it)

writes train_000001.bin, ... and val_000000.bin, ... into --out (default data/local_text), where the tiny preset of
train_gpt.py looks for them. The same text gives the same bytes. One document in twenty validates; with fewer than
twenty, the last twentieth of each. Files that are not UTF-8 text are left out, and counted.
"""

import argparse
import os
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, UserError

BYTES_VOCAB, BOUNDARY = 257, 256
SHARD_TOKENS = 10_000_000
VAL_EVERY = 20  # one document in so many validates


class ShardWriter:
    """Appends documents to shards of about SHARD_TOKENS tokens, which take their names when `publish` is called."""

    def __init__(self, out: Path, split: str, first: int):
        self.out, self.split, self.first = out, split, first
        self.waiting: list[np.ndarray] = []
        self.written: list[tuple[Path, Path]] = []
        self.total = 0

    def add(self, text: bytes) -> None:
        """Append one document: its boundary token, then its bytes."""
        self.waiting.append(np.concatenate([[BOUNDARY], np.frombuffer(text, dtype=np.uint8)]).astype("<u2"))
        self.total += len(text) + 1
        if sum(map(len, self.waiting)) >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard, still under a temporary name."""
        if not self.waiting:
            return
        tokens, self.waiting = np.concatenate(self.waiting), []
        name = self.out / f"{self.split}_{self.first + len(self.written):06d}.bin"
        write_shard(temporary := name.with_suffix(".part"), tokens, BYTES_VOCAB)
        self.written.append((temporary, name))

    def publish(self) -> None:
        """Replace the shards of an earlier call by these."""
        self.flush()
        for stale in set(self.out.glob(f"{self.split}_*.bin")) - {name for _, name in self.written}:
            stale.unlink()
        for temporary, name in self.written:
            os.replace(temporary, name)


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write tokens (N,) uint16 as a shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = SHARD_MAGIC, SHARD_VERSION, len(tokens), vocab_size
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


def find_files(paths: list[str]) -> list[Path]:
    """The files that the paths name, sorted; those of this Python's library where no path is given."""
    if not paths:
        library = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts)
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist; name text files or folders.")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return files


def read_text(path: Path) -> bytes | None:
    """A file's bytes, with the line ends of Unix; None where they are no UTF-8 text or the file cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text.replace("\r\n", "\n").encode("utf-8")


def cut(text: bytes) -> int:
    """Where the last twentieth of a document begins, not inside a character."""
    at = len(text) - len(text) // VAL_EVERY
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def make_shards(paths: list[str], out: Path) -> str:
    """Make the shards. Returns a line that says what was made; raises UserError where there is no text."""
    files = find_files(paths)
    random.Random(0).shuffle(files)  # neighbours in a folder are alike: a split in order would be one by subject
    out.mkdir(parents=True, exist_ok=True)
    train, val = ShardWriter(out, "train", first=1), ShardWriter(out, "val", first=0)
    documents = skipped = 0
    for path in files:
        text = read_text(path)
        if not text:  # an empty file holds no text, and neither does an unreadable one
            skipped += text is None
            continue
        if len(files) < VAL_EVERY:
            train.add(text[:cut(text)])
            val.add(text[cut(text):])
        else:
            (val if documents % VAL_EVERY == 0 else train).add(text)
        documents += 1
    if not documents:
        raise UserError(f"no UTF-8 text in {len(files)} file(s) of {' '.join(paths)}; name text files or folders.")
    train.publish()
    val.publish()
    return (f"{documents} documents: {train.total:,} training and {val.total:,} validation tokens in {out}; "
            f"{skipped} file(s) left out that are not UTF-8 text")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="text files or folders; none: this Python's own library")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "local_text", metavar="DIR",
                        help="folder of the shards (default data/local_text, beside this script)")
    args = parser.parse_args()
    try:
        print(make_shards(args.paths, args.out))
    except (UserError, OSError) as error:
        print(f"local_text.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
