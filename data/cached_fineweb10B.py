"""Fetch FineWeb as GPT-2 tokens, ready to train on: 100M tokens and 200 MB a shard.

    python data/cached_fineweb10B.py 9          the first 9 training shards and the validation shard
    python data/cached_fineweb10B.py            all that there are: 103 training shards, 21 GB
    python data/cached_fineweb10B.py --verify   read and check what is there, and fetch nothing
    python data/cached_fineweb10B.py 9 --dataset kjj0/finewebedu10B-gpt2
                                                another dataset of such shards

The shards go into data/fineweb10B, or into a folder called as the other dataset is. A shard that is
there and whole is skipped, and an interrupted run continues where it stopped. A shard gets its name
when its header, its size, its tokens and the hub's checksum have been found right. Until then it is
a .part file beside the others.

The requests are made by the hub's own client, so HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_DISABLE_PROGRESS_BARS and its other variables work as everywhere.
Those of Xet have no effect: shards come by plain HTTP, the only way to continue in the middle of a
file.
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
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the class of the HTTP library beneath the client, raised by a broken network
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import are_progress_bars_disabled, build_hf_headers, logging
from tqdm import tqdm

# train_gpt and local_text import PyTorch, which takes seconds. They are therefore imported in the
# functions that need them, after this script has printed its first line.
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

DATASET = "kjj0/fineweb10B-gpt2"
# Shards that are fetched at the same time: one connection rarely fills a fast line.
AT_ONCE = 8
# Seconds to wait before a failed request is repeated. After any byte has arrived, it starts again
# with the first.
WAITS = (1, 2, 4, 8, 16, 32)
# Bytes that the client collects before it writes them: at most so many are lost with a connection.
CHUNK = 1 << 20


class Refused(Exception):
    """An error that ends the whole run, as one sentence for the user."""


class Stopped(Exception):
    """Raised in the threads when the run ends early."""


@dataclass(frozen=True)
class Shard:
    """A shard as the hub lists it: name, size in bytes, and SHA-256 where the hub gives one."""

    name: str
    size: int
    sha256: str | None

    def part(self, out: Path) -> Path:
        """The file that holds the shard until it is whole; each version has a file of its own."""
        version = self.sha256[:8] if self.sha256 else self.size
        return out / f"{self.name}.{version}.part"

    def fetched(self, out: Path) -> int:
        """The number of bytes that earlier runs have fetched."""
        part = self.part(out)
        return min(part.stat().st_size, self.size) if part.exists() else 0


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# -----------------------------------------------------------------------------
# Checks


def header_fault(path: Path, size: int | None = None) -> str:
    """Say what is wrong with a file's header or its size in bytes; empty if nothing is."""
    from train_gpt import UserError, open_shard

    try:
        open_shard(str(path))
    except (UserError, OSError) as error:
        return str(error)
    if size not in (None, path.stat().st_size):
        return f"{path} has {path.stat().st_size} bytes, and the hub's has {size}."
    return ""


def fault(path: Path, shard: Shard | None) -> str:
    """Say what is wrong with a file, after reading all of it; empty if nothing is.

    `shard` is what the hub lists under this name, or None where that is not known.
    """
    wrong_header = header_fault(path, shard and shard.size)
    if wrong_header:
        return wrong_header
    from train_gpt import open_shard

    tokens, vocab_size = open_shard(str(path))
    largest = int(tokens.max())
    if largest >= vocab_size:
        return f"{path} has a token {largest}, beyond its vocabulary of {vocab_size}."
    if shard and shard.sha256:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            return f"{path} has not the hub's SHA-256."
    return ""


# -----------------------------------------------------------------------------
# The hub


def http_status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def refusal(error: Exception, dataset: str) -> Refused:
    """Turn an error of the client, the network or the disk into a sentence with advice."""
    hub = constants.ENDPOINT
    status = http_status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return Refused("HF_HUB_OFFLINE is set, and shards are missing here; unset it.")
    if isinstance(error, HFValidationError):
        return Refused(f"{dataset} is no name of a dataset; --dataset takes one like {DATASET}.")
    if isinstance(error, GatedRepoError):
        return Refused(
            f"{hub} keeps {dataset} for those who accepted its terms; do so on its page, and set "
            "HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return Refused(
            f"{hub} has no dataset {dataset} that is open to you; look at --dataset, or set "
            "HF_TOKEN where it is private."
        )
    if status in (401, 403):
        return Refused(
            f"{hub} refused the access to {dataset} ({status}); see whether HF_TOKEN is a valid "
            "token, or unset it."
        )
    if status:
        return Refused(
            f"{hub} answers with error {status}; run the same command later, and it continues "
            "where it stopped."
        )
    if isinstance(error, HTTPError):
        return Refused(
            f"cannot reach {hub} ({str(error) or type(error).__name__}); look at the network, "
            "HF_ENDPOINT and the proxy, and run the same command again."
        )
    if isinstance(error, OSError) and error.errno:
        return disk_refusal(error)
    return Refused(
        f"{hub} gives an answer that is no hub's ({type(error).__name__}); look at HF_ENDPOINT and "
        "the proxy."
    )


def disk_refusal(error: OSError) -> Refused:
    """Turn an error of the disk into a sentence with advice."""
    advice = "see that the folder can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space"
    name = error.filename or "the shards"
    return Refused(f"{error.strerror}: {name}; {advice}, and run the same command again.")


def ends_early(error: Exception) -> bool:
    """Whether the server's file is shorter than the listing says.

    Either the body was too short, which the client reports as an OSError without a number, or
    there was nothing at the place to continue from, which the server reports as status 416.
    """
    if isinstance(error, HfHubHTTPError):
        return http_status(error) == 416
    return type(error) is OSError and error.errno is None


def is_temporary(error: Exception) -> bool:
    """Whether trying again may help."""
    status = http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, HTTPError) or ends_early(error)


def list_shards(dataset: str) -> tuple[list[Shard], list[Shard]]:
    """List the training shards and the validation shards, each sorted by name.

    Raises Refused where the hub has none, or does not answer.
    """
    found: dict[str, list[Shard]] = {"train": [], "val": []}
    try:
        for entry in HfApi().list_repo_tree(dataset, repo_type="dataset"):
            match = re.fullmatch(r"\w+_(train|val)_\d{6}\.bin", entry.path)
            if match:
                size = entry.lfs.size if entry.lfs else entry.size
                sha256 = entry.lfs.sha256 if entry.lfs else None
                found[match[1]].append(Shard(entry.path, size, sha256))
    except Exception as error:
        raise refusal(error, dataset) from error
    if not found["train"] or not found["val"]:
        raise Refused(
            f"the dataset {dataset} has no training and validation shards (*_train_000001.bin, "
            f"*_val_000000.bin); --dataset takes one like {DATASET}."
        )
    for shards in found.values():
        shards.sort(key=lambda shard: shard.name)
    return found["train"], found["val"]


def wanted_shards(dataset: str, count: int | None) -> list[Shard]:
    """The validation shard and the first `count` training shards, or all of them for None.

    Raises Refused where there are fewer.
    """
    train, val = list_shards(dataset)
    if count is not None and count > len(train):
        raise Refused(
            f"{dataset} has {len(train)} training shards, and not {count}; ask for fewer."
        )
    return val[:1] + train[:count]


# -----------------------------------------------------------------------------
# Fetching


class MeteredFile:
    """A file that reports each byte to the progress bar, and raises Stopped in a run that ends.

    It has the methods that the client's `http_get` calls.
    """

    def __init__(self, file: BinaryIO, move: Callable[[int], None], stop: threading.Event):
        self.file = file
        self.move = move
        self.stop = stop
        self.tell = file.tell
        self.seek = file.seek

    def write(self, data: bytes) -> None:
        if self.stop.is_set():
            raise Stopped
        self.file.write(data)
        self.move(len(data))

    def truncate(self) -> None:
        """Drop what follows the position; the client asks for it where a server starts over."""
        end = os.fstat(self.file.fileno()).st_size
        self.file.truncate()
        self.move(self.file.tell() - end)


class Fetch:
    """Fetches shards of a dataset into a folder, several at a time, under one progress bar."""

    def __init__(self, shards: list[Shard], dataset: str, out: Path):
        self.shards = shards
        self.dataset = dataset
        self.out = out
        self.todo: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        # Pairs of a shard and what is wrong with it, or of None and the error that ends the run.
        self.done: queue.SimpleQueue = queue.SimpleQueue()
        self.stop = threading.Event()
        self.lock = threading.Lock()  # of the bar, which several threads move
        self.bar = tqdm(
            desc=f"0 of {len(shards)} shards",
            total=sum(shard.size for shard in shards),
            initial=sum(shard.fetched(out) for shard in shards),
            unit="B",
            unit_scale=True,
            smoothing=0.05,
            dynamic_ncols=True,
            disable=are_progress_bars_disabled() or None,
        )

    def run(self) -> list[str]:
        """Fetch all shards. Returns a sentence for each that arrived broken twice.

        Raises Refused at an error that does not go away by waiting.
        """
        for shard in self.shards:
            self.todo.put(shard)
        # The threads are daemons because one that waits for the network cannot be told to end.
        # Nothing is lost when it is cut off.
        for _ in range(min(AT_ONCE, len(self.shards))):
            threading.Thread(target=self.work, daemon=True).start()
        try:
            return self.collect_results()
        finally:
            self.stop.set()
            with self.lock:
                self.bar.close()

    def work(self) -> None:
        """Fetch one shard after the other until none is left: what each thread does."""
        while not self.stop.is_set():
            try:
                shard = self.todo.get_nowait()
                self.done.put((shard, self.fetch_shard(shard)))
            except queue.Empty:
                return
            except BaseException as error:
                self.done.put((None, error))

    def collect_results(self) -> list[str]:
        """Wait for the threads' results, and show the progress meanwhile."""
        broken = []
        for number in range(1, len(self.shards) + 1):
            shard, result = self.next_result()
            if isinstance(result, BaseException):
                raise refusal(result, self.dataset) from result
            if result:
                broken.append(result)
            progress = f"{number} of {len(self.shards)}"
            with self.lock:
                self.bar.set_description(f"{progress} shards")
            if self.bar.disable:
                state = "broken" if result else "whole"
                print(f"{shard.name} is {state} ({progress})", flush=True)
        return broken

    def next_result(self) -> tuple:
        """Wait for a result; the bar's clock goes on even where no bytes arrive."""
        while True:
            try:
                return self.done.get(timeout=0.5)
            except queue.Empty:
                with self.lock:
                    self.bar.refresh()

    def move_bar(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)

    def fetch_shard(self, shard: Shard) -> str:
        """Fetch, check and name a shard.

        Returns what is wrong with it where it arrived broken twice, and an empty string otherwise.
        """
        part = shard.part(self.out)
        for _ in range(2):
            self.fetch_bytes(shard)
            wrong = fault(part, shard)
            if not wrong:
                os.replace(part, self.out / shard.name)
                for other_version in self.out.glob(f"{shard.name}.*.part"):
                    other_version.unlink()
                return ""
            self.move_bar(-shard.fetched(self.out))
            part.unlink()
        return wrong.replace(str(part), shard.name)

    def fetch_bytes(self, shard: Shard) -> None:
        """Fetch what is missing of a shard's .part file, and try again after errors that pass.

        Raises the client's error where it stays.
        """
        failures = 0
        with open(shard.part(self.out), "ab") as file:
            while (start := file.seek(0, os.SEEK_END)) < shard.size:
                try:
                    self.request(shard, file, start)
                except Exception as error:
                    stuck = file.seek(0, os.SEEK_END) == start
                    if stuck and ends_early(error):
                        break  # the check that follows names the shard
                    failures = failures + 1 if stuck else 0
                    if failures > len(WAITS) or not is_temporary(error):
                        raise
                    if self.stop.wait(WAITS[max(failures, 1) - 1]):
                        raise Stopped from None
            file.flush()
            os.fsync(file.fileno())

    def request(self, shard: Shard, file: BinaryIO, start: int) -> None:
        """Ask the hub for a shard's bytes from `start` on, and write them to the file."""
        http_get(
            hf_hub_url(self.dataset, shard.name, repo_type="dataset"),
            MeteredFile(file, self.move_bar, self.stop),
            resume_size=start,
            # A compressed answer could not be continued in the middle.
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=shard.size,
            displayed_filename=shard.name,
            tqdm_class=partial(tqdm, disable=True),
        )


def all_there(dataset: str, count: int, out: Path) -> bool:
    """Whether the shards are in `out`, as far as can be told without asking the hub."""
    prefix = re.match(r"[a-z]*", dataset.rpartition("/")[2])[0]
    names = [f"{prefix}_val_000000.bin"]
    names += [f"{prefix}_train_{number:06d}.bin" for number in range(1, count + 1)]
    return all((out / name).exists() and not header_fault(out / name) for name in names)


def download(dataset: str, count: int | None, out: Path) -> str:
    """Fetch the shards that are missing in `out`. Returns a line that says what was done.

    Raises Refused where that cannot be done.
    """
    if count is not None and all_there(dataset, count, out):
        # The hub is not asked: it may be out of reach.
        return f"all {count + 1} shards are in {out} already"
    from local_text import folder_lock

    def announce_wait() -> None:
        print(f"another run is fetching into {out}; waiting for it", flush=True)

    shards = wanted_shards(dataset, count)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out, announce_wait):
        missing = [
            shard
            for shard in shards
            if not (out / shard.name).exists() or header_fault(out / shard.name, shard.size)
        ]
        if not missing:
            return f"all {len(shards)} shards are in {out} already"
        size = check_room(shards, missing, out)
        since = time.perf_counter()
        broken = Fetch(missing, dataset, out).run()
        seconds = time.perf_counter() - since
    if broken:
        raise Refused(
            f"{len(broken)} shard(s) arrived broken twice, the others are whole; run the same "
            f"command again, or ask who publishes {dataset}: {' '.join(broken)}"
        )
    return (
        f"all {len(shards)} shards are whole in {out}: {gigabytes(size)} in {seconds:.0f} s, "
        f"{size / 1e6 / max(seconds, 1e-3):.0f} MB/s"
    )


def check_room(shards: list[Shard], missing: list[Shard], out: Path) -> int:
    """Say what is to be fetched, and return the number of bytes. Raises Refused on a full disk."""
    size = sum(shard.size - shard.fetched(out) for shard in missing)
    free = shutil.disk_usage(out).free
    print(
        f"{len(shards)} shards, {gigabytes(sum(shard.size for shard in shards))}: "
        f"{len(shards) - len(missing)} are there, {gigabytes(size)} to fetch",
        flush=True,
    )
    if size > free:
        raise Refused(
            f"{out.resolve()} has {gigabytes(free)} free, and {gigabytes(size)} are to come; free "
            "some space, choose another --out, or ask for fewer shards."
        )
    return size


def verify(dataset: str, count: int | None, out: Path) -> str:
    """Read and check the shards that are there, and change nothing.

    With `count`, these are the validation shard and the first `count` training shards. Returns a
    line that says what was checked. Raises Refused where a shard is broken or missing.
    """
    names = sorted(path.name for path in out.glob("*.bin")) if out.is_dir() else []
    try:
        known = {shard.name: shard for shards in list_shards(dataset) for shard in shards}
        if count is not None:
            names = [shard.name for shard in wanted_shards(dataset, count)]
    except Refused as error:
        known = {}
        print(f"{error} Checksums are not compared.", file=sys.stderr)
    if not names:
        raise Refused(f"{out} has no shards; fetch some with `python data/cached_fineweb10B.py 9`.")

    def check(name: str) -> str:
        if not (out / name).exists():
            return f"{name} is missing."
        return fault(out / name, known.get(name))

    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
    try:
        faults = tqdm(
            pool.map(check, names),
            total=len(names),
            unit="shard",
            dynamic_ncols=True,
            disable=are_progress_bars_disabled() or None,
        )
        broken = [found for found in faults if found]
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all of them
    if broken:
        raise Refused(
            f"{len(broken)} of {len(names)} shards are not whole; remove what is broken and fetch "
            f"again: {' '.join(broken)}"
        )
    limits = "" if known else " as far as can be told without the hub"
    return f"{len(names)} shards in {out} are whole{limits}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "count",
        nargs="?",
        type=int,
        metavar="N",
        help="training shards to fetch, the first N; all when not given",
    )
    parser.add_argument(
        "--dataset", default=DATASET, metavar="OWNER/NAME", help=f"of the hub (default {DATASET})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the shards (default data/NAME, beside this script)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check what is there, and fetch nothing"
    )
    args = parser.parse_args()
    if args.count is not None and args.count < 0:
        parser.error(f"N is {args.count}, and has to be 0 or more")
    if args.out is None:
        name = args.dataset.rpartition("/")[2].removesuffix("-gpt2")
        args.out = Path(__file__).resolve().parent / name
    return args


def main() -> int:
    args = parse_arguments()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    if "HF_HUB_VERBOSITY" not in os.environ and not constants.HF_DEBUG:
        logging.set_verbosity_error()  # warnings about each retry would break up the bar
    amount = "all" if args.count is None else args.count
    task = f"{amount} training shards and the validation shard into"
    print(f"{args.dataset}: {'checking' if args.verify else task} {args.out}", flush=True)
    action = verify if args.verify else download
    try:
        print(action(args.dataset, args.count, args.out))
    except (Refused, OSError) as error:
        sentence = error if isinstance(error, Refused) else refusal(error, args.dataset)
        print(f"cached_fineweb10B.py: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ncached_fineweb10B.py: stopped; the same command continues where this one stopped",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
