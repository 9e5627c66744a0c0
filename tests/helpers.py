"""What the tests share."""

from pathlib import Path

import numpy as np


def write_shard(path, tokens, vocab_size=257) -> Path:
    """Write tokens (N,) as a shard. Returns the path."""
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, len(tokens), vocab_size
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return Path(path)
