"""Fetch FineWeb as GPT-2 tokens, ready to train on: 100M tokens and 200 MB a shard.

    python data/cached_fineweb10B.py 9            the first 9 training shards, and the validation shard
    python data/cached_fineweb10B.py              all that there are: 103 training shards, 21 GB
    python data/cached_fineweb10B.py --verify     read and check what is there; fetch nothing
    python data/cached_fineweb10B.py 9 --dataset kjj0/finewebedu10B-gpt2       (or kjj0/fineweb100B-gpt2)

puts them into data/fineweb10B, or the folder that is called as the dataset. What is there and whole is skipped; an
interrupted run continues where it stopped. A shard gets its name when it is whole: its header, its size, its tokens
and the hub's checksum are right. Until then it is a .part file beside the others.

The hub's own client does the talking, so HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT,
HF_HUB_DISABLE_PROGRESS_BARS and its other variables work as everywhere. Xet's do not: shards come by plain HTTP, the
only way that continues in the middle of a file.
"""

import argparse
import concurrent.futures
import errno
import hashlib
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.errors import HTTPError  # of the HTTP library beneath: what a broken network raises
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import are_progress_bars_disabled, build_hf_headers, logging
from tqdm import tqdm

# train_gpt, and PyTorch with it, takes seconds to import: that happens where the first shard is checked, after first words.
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

DATASET = "kjj0/fineweb10B-gpt2"
AT_ONCE = 8  # shards: one connection rarely fills a fast line
WAITS = 1, 2, 4, 8, 16, 32  # seconds before a failed fetch is tried again; any byte that arrives starts them over
CHUNK = 1 << 20  # bytes that the client holds before it hands them on; a cut line loses no more than these


class Refused(Exception):
    """What stops the whole run, as one sentence for the user."""


class Stopped(Exception):
    """Raised in the threads when the run ends early."""


@dataclass(frozen=True)
class Shard:
    """A shard as the hub lists it: its name, its size in bytes, and its SHA-256 where the hub has one."""

    name: str
    size: int
    sha256: str | None

    def part(self, out: Path) -> Path:
        """Where it waits until it is whole. Bytes of another version of the shard have another name."""
        return out / f"{self.name}.{self.sha256[:8] if self.sha256 else self.size}.part"

    def here(self, out: Path) -> int:
        """The bytes of it that an earlier run fetched."""
        return min(self.part(out).stat().st_size, self.size) if self.part(out).exists() else 0


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# -----------------------------------------------------------------------------
# Checks

def header_fault(path: Path, size: int | None = None) -> str:
    """Why a file is no whole shard, by its header and its size in bytes alone; empty where it is one."""
    from train_gpt import UserError, open_shard
    try:
        open_shard(str(path))
    except (UserError, OSError) as error:
        return str(error)
    if size not in (None, path.stat().st_size):
        return f"{path} has {path.stat().st_size} bytes, and the hub's has {size}."
    return ""


def fault(path: Path, shard: Shard | None) -> str:
    """Why a file is no whole shard, by all that can be known; empty where it is one. `shard` is what the hub has, if known."""
    if found := header_fault(path, shard and shard.size):
        return found
    from train_gpt import open_shard
    tokens, vocab_size = open_shard(str(path))
    if (largest := int(tokens.max())) >= vocab_size:
        return f"{path} has a token {largest}, beyond its vocabulary of {vocab_size}."
    if shard and shard.sha256:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return f"{path} has not the hub's SHA-256."
    return ""


# -----------------------------------------------------------------------------
# The hub

def refusal(error: Exception, dataset: str) -> Refused:
    """An error of the hub's client, of the network or of the disk as a sentence that says what to do."""
    hub, status = constants.ENDPOINT, error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return Refused("HF_HUB_OFFLINE is set, and shards are missing here; unset it.")
    if isinstance(error, HFValidationError):
        return Refused(f"{dataset} is no name of a dataset; --dataset takes one like {DATASET}.")
    if isinstance(error, GatedRepoError):
        return Refused(f"{hub} keeps {dataset} for those who accepted its terms; do so on its page, and set HF_TOKEN.")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return Refused(f"{hub} has no dataset {dataset} that is open to you; look at --dataset, or set HF_TOKEN where it is private.")
    if status in (401, 403):
        return Refused(f"{hub} refused the access to {dataset} ({status}); see whether HF_TOKEN is a valid token, or unset it.")
    if status:
        return Refused(f"{hub} answers with error {status}; run the same command later, and it continues where it stopped.")
    if isinstance(error, HTTPError):
        reason = str(error) or type(error).__name__
        return Refused(f"cannot reach {hub} ({reason}); look at the network, HF_ENDPOINT and the proxy, and run the same command again.")
    if isinstance(error, OSError) and error.errno:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that the folder can be written"
        return Refused(f"{error.strerror}: {error.filename or 'the shards'}; {advice}, and run the same command again.")
    return Refused(f"{hub} gives an answer that is no hub's ({type(error).__name__}); look at HF_ENDPOINT and the proxy.")


def ends_early(error: Exception) -> bool:
    """Whether the server's file ends before the listing says: a body that is short, or nothing there to continue with."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 416
    return type(error) is OSError and error.errno is None  # so the client says that a body has not the expected size


def passing(error: Exception) -> bool:
    """Whether trying again may help."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTPError) or ends_early(error)


def list_shards(dataset: str) -> tuple[list[Shard], list[Shard]]:
    """The training shards in their order, and the validation shards. Raises Refused where the hub has none, or does not say."""
    found: dict[str, list[Shard]] = {"train": [], "val": []}
    try:
        for entry in HfApi().list_repo_tree(dataset, repo_type="dataset"):
            if match := re.fullmatch(r"\w+_(train|val)_\d{6}\.bin", entry.path):
                lfs = entry.lfs
                found[match[1]].append(Shard(entry.path, lfs.size if lfs else entry.size, lfs.sha256 if lfs else None))
    except Exception as error:
        raise refusal(error, dataset) from error
    if not found["train"] or not found["val"]:
        raise Refused(f"the dataset {dataset} has no training and validation shards (*_train_000001.bin, *_val_000000.bin); "
                      f"--dataset takes one like {DATASET}.")
    return sorted(found["train"], key=lambda shard: shard.name), sorted(found["val"], key=lambda shard: shard.name)


def wanted(dataset: str, count: int | None) -> list[Shard]:
    """The validation shard and the first `count` training shards, all for None. Raises Refused where there are fewer."""
    train, val = list_shards(dataset)
    if count is not None and count > len(train):
        raise Refused(f"{dataset} has {len(train)} training shards, and not {count}; ask for fewer.")
    return val[:1] + train[:count]


# -----------------------------------------------------------------------------
# Fetching

class Metered:
    """A file that is being fetched: each byte moves the bar, and a stopped run ends at the next."""

    def __init__(self, file: BinaryIO, move: Callable[[int], None], stop: threading.Event):
        self.file, self.move, self.stop = file, move, stop
        self.tell, self.seek = file.tell, file.seek

    def write(self, data: bytes) -> None:
        if self.stop.is_set():
            raise Stopped
        self.file.write(data)
        self.move(len(data))

    def truncate(self) -> None:
        """Forget what follows the position: the client does this where a server cannot continue in the middle."""
        end, here = os.fstat(self.file.fileno()).st_size, self.file.tell()
        self.file.truncate()
        self.move(here - end)


def fetch_bytes(shard: Shard, dataset: str, out: Path, move: Callable[[int], None], stop: threading.Event) -> None:
    """Complete the .part file of a shard, after what is there of it. Raises what the client does, when waiting did not help."""
    url = hf_hub_url(dataset, shard.name, repo_type="dataset")
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # compressed, it could not be continued
    failures = 0
    with open(shard.part(out), "ab") as file:
        while (here := file.seek(0, os.SEEK_END)) < shard.size:
            try:
                http_get(url, Metered(file, move, stop), resume_size=here, headers=headers, expected_size=shard.size,
                         displayed_filename=shard.name, tqdm_class=partial(tqdm, disable=True))
            except Exception as error:
                stuck = file.seek(0, os.SEEK_END) == here
                if stuck and ends_early(error):
                    break  # the check will name it
                failures = failures + 1 if stuck else 0
                if failures > len(WAITS) or not passing(error):
                    raise
                if stop.wait(WAITS[max(failures, 1) - 1]):
                    raise Stopped from None
        file.flush()
        os.fsync(file.fileno())


def fetch(shard: Shard, dataset: str, out: Path, move: Callable[[int], None], stop: threading.Event) -> str:
    """Bring a shard whole to its name. Returns what is wrong with it, where it arrived broken twice; empty otherwise."""
    part = shard.part(out)
    for _ in range(2):
        fetch_bytes(shard, dataset, out, move, stop)
        found = fault(part, shard)
        if not found:
            os.replace(part, out / shard.name)
            for stale in out.glob(f"{shard.name}.*.part"):  # of another version
                stale.unlink()
            return ""
        move(-shard.here(out))
        part.unlink()
    return found.replace(str(part), shard.name)


def fetch_all(shards: list[Shard], dataset: str, out: Path) -> list[str]:
    """Fetch shards, several at a time, under one bar. Returns a sentence for each that arrived broken twice.

    Raises Refused at what waiting does not mend.
    """
    todo, done, stop, lock = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event(), threading.Lock()
    for shard in shards:
        todo.put(shard)
    total, here = sum(shard.size for shard in shards), sum(shard.here(out) for shard in shards)
    bar = tqdm(desc=f"0 of {len(shards)} shards", total=total, initial=here, unit="B", unit_scale=True, smoothing=0.05,
               dynamic_ncols=True, disable=are_progress_bars_disabled() or None)

    def move(count: int) -> None:
        with lock:
            bar.update(count)

    def work() -> None:
        while not stop.is_set():
            try:
                shard = todo.get_nowait()
                done.put((shard, fetch(shard, dataset, out, move, stop)))
            except queue.Empty:
                return
            except BaseException as error:
                done.put((None, error))

    # Daemons, because a thread that waits for the network cannot be told to end, and nothing is lost when it is cut off.
    for _ in range(min(AT_ONCE, len(shards))):
        threading.Thread(target=work, daemon=True).start()
    broken, finished = [], 0
    try:
        while finished < len(shards):
            try:
                shard, result = done.get(timeout=0.5)
            except queue.Empty:
                with lock:
                    bar.refresh()  # the clock goes on where the bytes do not
                continue
            if isinstance(result, BaseException):
                raise refusal(result, dataset) from result
            finished += 1
            with lock:
                bar.set_description(f"{finished} of {len(shards)} shards")
            if result:
                broken.append(result)
            if bar.disable:
                print(f"{shard.name} {'is broken' if result else 'is whole'} ({finished} of {len(shards)})", flush=True)
    finally:
        stop.set()
        with lock:
            bar.close()
    return broken


def download(dataset: str, count: int | None, out: Path) -> str:
    """Have the shards in `out`, whole. Returns a line that says what was done. Raises Refused where that cannot be."""
    def whole(shard: Shard) -> bool:
        return (out / shard.name).exists() and not header_fault(out / shard.name, shard.size)

    prefix = re.match(r"[a-z]*", dataset.rpartition("/")[2])[0]
    names = [out / f"{prefix}_val_000000.bin"] + [out / f"{prefix}_train_{number:06d}.bin" for number in range(1, (count or 0) + 1)]
    if count is not None and all(path.exists() and not header_fault(path) for path in names):
        return f"all {len(names)} shards are in {out} already"  # and no word with the hub: it may be out of reach

    shards = wanted(dataset, count)
    out.mkdir(parents=True, exist_ok=True)
    from local_text import folder_lock
    with folder_lock(out, lambda: print(f"another run is fetching into {out}; waiting for it", flush=True)):
        missing = [shard for shard in shards if not whole(shard)]
        if not missing:
            return f"all {len(shards)} shards are in {out} already"
        need = sum(shard.size - shard.here(out) for shard in missing)
        free = shutil.disk_usage(out).free
        print(f"{len(shards)} shards, {gigabytes(sum(shard.size for shard in shards))}: {len(shards) - len(missing)} are there, "
              f"{gigabytes(need)} to fetch", flush=True)
        if need > free:
            raise Refused(f"{out.resolve()} has {gigabytes(free)} free, and {gigabytes(need)} are to come; free some space, choose "
                          "another --out, or ask for fewer shards.")
        since = time.perf_counter()
        broken = fetch_all(missing, dataset, out)
        seconds = time.perf_counter() - since
    if broken:
        raise Refused(f"{len(broken)} shard(s) arrived broken twice, the others are whole; run the same command again, or ask who "
                      f"publishes {dataset}: {' '.join(broken)}")
    return f"all {len(shards)} shards are whole in {out}: {gigabytes(need)} in {seconds:.0f} s, {need / 1e6 / max(seconds, 1e-3):.0f} MB/s"


def verify(dataset: str, count: int | None, out: Path) -> str:
    """Read all that is there, of the first `count` training shards and the validation shard if given, and change nothing.

    Returns a line that says what was checked. Raises Refused where a shard is broken or missing.
    """
    names = sorted(path.name for path in out.glob("*.bin")) if out.is_dir() else []
    try:
        known = {shard.name: shard for shards in list_shards(dataset) for shard in shards}
        names = [shard.name for shard in wanted(dataset, count)] if count is not None else names
    except Refused as error:
        known = {}
        print(f"{error} Checksums are not compared.", file=sys.stderr)
    if not names:
        raise Refused(f"{out} has no shards; fetch some with `python data/cached_fineweb10B.py 9`.")

    def look(name: str) -> str:
        return fault(out / name, known.get(name)) if (out / name).exists() else f"{name} is missing."

    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
    try:
        bar = tqdm(pool.map(look, names), total=len(names), unit="shard", dynamic_ncols=True, disable=are_progress_bars_disabled() or None)
        broken = [found for found in bar if found]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all of them
    if broken:
        raise Refused(f"{len(broken)} of {len(names)} shards are not whole; remove what is broken and fetch again: {' '.join(broken)}")
    return f"{len(names)} shards in {out} are whole{'' if known else ' as far as can be told without the hub'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, metavar="N", help="training shards to fetch, the first N; all when not given")
    parser.add_argument("--dataset", default=DATASET, metavar="OWNER/NAME", help=f"of the hub (default {DATASET})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default data/NAME, beside this script)")
    parser.add_argument("--verify", action="store_true", help="check what is there, and fetch nothing")
    args = parser.parse_args()
    if args.count is not None and args.count < 0:
        parser.error(f"N is {args.count}, and has to be 0 or more")
    out = args.out or Path(__file__).resolve().parent / args.dataset.rpartition("/")[2].removesuffix("-gpt2")
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    if "HF_HUB_VERBOSITY" not in os.environ and not constants.HF_DEBUG:
        logging.set_verbosity_error()  # its warnings about each retry would cut through the bar
    asked = f"{'all' if args.count is None else args.count} training shards and the validation shard into"
    print(f"{args.dataset}: {'checking' if args.verify else asked} {out}", flush=True)
    try:
        print((verify if args.verify else download)(args.dataset, args.count, out))
    except (Refused, OSError) as error:
        print(f"cached_fineweb10B.py: {error if isinstance(error, Refused) else refusal(error, args.dataset)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncached_fineweb10B.py: stopped; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
