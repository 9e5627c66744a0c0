"""Cut the end of a training shard off, to validate on text that no published figure was judged by.

    python records/ideas/cut.py SHARD TOKENS FOLDER

writes FOLDER/train_cut.bin, the shard without its last TOKENS tokens, and FOLDER/val_cut.bin, those
behind the token that begins a document. The format is that of train_gpt.py.
"""

import sys
from pathlib import Path

import numpy as np

HEADER = 256  # int32


def write_shard(path: Path, header: np.ndarray, tokens: np.ndarray) -> None:
    header[2] = len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    print(f"{path}: {len(tokens)} tokens")


def main() -> None:
    shard, count, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    header = np.fromfile(shard, dtype="<i4", count=HEADER)
    tokens = np.fromfile(shard, dtype="<u2", offset=4 * HEADER)
    boundary = np.array([header[3] - 1], dtype="<u2")
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "train_cut.bin", header, tokens[:-count])
    write_shard(folder / "val_cut.bin", header, np.concatenate([boundary, tokens[-count:]]))


if __name__ == "__main__":
    main()
