"""Download FineWeb as GPT-2 tokens: 100M tokens and 200 MB a shard.

    python data/cached_fineweb10B.py 9          the first 9 training shards and the validation shard
    python data/cached_fineweb10B.py            all 103 training shards, 21 GB
    python data/cached_fineweb10B.py --verify   compare the shards here with the hub's checksums
    python data/cached_fineweb10B.py 9 --dataset kjj0/finewebedu10B-gpt2

The shards are stored beside this script, in data/fineweb10B or a folder named after the other
dataset. The hub's client does the work, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_XET_* and the
proxy variables apply. It downloads to data/fineweb10B/.cache and names a file when it is complete;
after an interruption, the same command downloads the files that are missing.
"""

import argparse
import fnmatch
import hashlib
import os
import shlex
import signal
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, constants, errors, snapshot_download
from tqdm import tqdm


class UserError(ValueError):
    """An error that the user can fix, described in one sentence."""


# hf_xet raises RuntimeError; an answer that is not a hub's (a login page) raises ValueError.
DOWNLOAD_ERRORS = (errors.HTTPError, OSError, RuntimeError, ValueError)


def explain(error: Exception, dataset: str) -> str:
    """Describe one of DOWNLOAD_ERRORS and its remedy in a sentence."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and shards are missing here; unset it to download them."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} has no dataset {dataset} that is open to you; check --dataset, "
            "or, if it is gated or private, accept its terms on its page and set HF_TOKEN."
        )
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if "No space left" in text:
        return f"the disk is full ({text}); free some space and repeat the command."
    return (
        f"cannot download from {constants.ENDPOINT} ({text}); check the network and HF_ENDPOINT, "
        "and repeat the command."
    )


def is_valid(path: Path, sha256: str | None) -> bool:
    """Check a shard's header and size, and its SHA-256 where one is given."""
    header = np.fromfile(path, "<i4", 3).tolist()  # magic, version, number of tokens
    if header != [20240520, 1, (path.stat().st_size - 1024) / 2]:
        return False
    with path.open("rb") as file:
        return not sha256 or hashlib.file_digest(file, "sha256").hexdigest() == sha256


def download(dataset: str, count: int | None, verify: bool, out: Path) -> str:
    """Download the validation shard and `count` training shards (None: all), or verify those here.

    Returns a line about the shards in `out`. Raises DOWNLOAD_ERRORS.
    """
    numbers = ["??????"] if count is None else [f"{i:06d}" for i in range(1, count + 1)]
    checksums = {}
    unreachable = None
    try:
        info = HfApi().dataset_info(dataset, files_metadata=True, timeout=10)
        checksums = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    except DOWNLOAD_ERRORS as error:  # all shards may be here already
        unreachable = error
    here = verify or unreachable
    known = [path.name for path in out.glob("*.bin")] if here else checksums
    names = []
    for pattern in ["*_val_000000.bin", *(f"*_train_{number}.bin" for number in numbers)]:
        matches = sorted(fnmatch.filter(known, pattern))
        if not matches and here:
            raise unreachable or UserError(f"{out} has no {pattern}; run this without --verify.")
        if not matches:
            raise UserError(f"{dataset} has no {pattern}; ask for fewer shards.")
        names += matches
    if not here:
        snapshot_download(
            dataset,
            repo_type="dataset",
            revision=info.sha,
            allow_patterns=names,
            local_dir=out,
        )
    corrupt = [
        out / name
        for name in tqdm(names, disable=None)
        if not is_valid(out / name, checksums.get(name) if verify else None)
    ]
    if corrupt:
        raise UserError(
            f"{len(corrupt)} of {len(names)} shards are corrupt; download them again with: "
            f"rm {shlex.join(map(str, corrupt))} && python {shlex.quote(__file__)} "
            f"{int(names[-1][-10:-4])} --dataset {dataset}"
        )
    limits = f" (header and size only: {type(unreachable).__name__})" if unreachable else ""
    return f"{len(names)} shards in data/{out.name} are valid{limits}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", nargs="?", type=int)
    parser.add_argument("--dataset", default="kjj0/fineweb10B-gpt2")
    parser.add_argument("--verify", action="store_true")
    args = parser.parse_args()
    out = Path(__file__).resolve().parent / args.dataset.split("/")[-1].removesuffix("-gpt2")

    def stop(*_):
        for partial in out.rglob("*.incomplete"):
            partial.unlink(missing_ok=True)
        os._exit(130)  # the client would first complete the files in flight, up to 1.6 GB

    signal.signal(signal.SIGINT, stop)
    try:
        print(download(**vars(args), out=out))
    except DOWNLOAD_ERRORS as error:
        parser.exit(2, f"cached_fineweb10B.py: {explain(error, args.dataset)}\n")


if __name__ == "__main__":
    main()
