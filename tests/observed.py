"""train_gpt.py under observation: each process writes down what it did with all digits, and one may meet with an accident.

RECORD: the folder for the record of process N, N.json. ACCIDENT: what happens to process 1 in its fourth step, in the middle
of a collective: `kill`, `stop`, `hang` (the process lives, its work does not go on) or `fail` (an error of its own)."""

import hashlib
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

import train_gpt

RANK, RECORD = int(os.environ.get("RANK", 0)), os.environ.get("RECORD")
seen = dict(sequences=[], losses=[], validations=[])
networks = []


def around(owner, name, see):
    """Let `see` have a look at each result of a function, and the arguments that led to it."""
    function = getattr(owner, name)

    def observed(*args, **kwargs):
        result = function(*args, **kwargs)
        see(result, *args)
        return result
    setattr(owner, name, observed)


def weights(network) -> str:
    digest = hashlib.sha256()
    for p in network.parameters():
        digest.update(p.detach().float().numpy().tobytes())
    return digest.hexdigest()


def built(network, *_):
    networks.append(network)
    seen["initial weights"] = weights(network)


def observe():
    around(train_gpt, "build_model", built)
    around(train_gpt, "warm_up", lambda *_: seen["losses"].clear())
    around(train_gpt.DistributedDataLoader, "next_batch", lambda batch, loader: seen["sequences"].append(
        zlib.crc32(batch[0].numpy().tobytes() + batch[1].numpy().tobytes())))
    around(train_gpt, "training_step", lambda result, *_: seen["losses"].append(result[0].item()))
    around(train_gpt, "validate", lambda loss, *_: seen["validations"].append(loss))


def suffer(what: str):
    armed = []
    around(train_gpt, "set_schedule", lambda window, optimizers, step, *_: armed.append(step) if step == 3 else None)

    def accident(*_):
        if armed and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif armed and what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif armed and what == "hang":
            time.sleep(3600)
        elif armed:
            raise ValueError("an accident")
    around(dist, "all_reduce", accident)


if __name__ == "__main__":
    if RECORD:
        observe()
    if RANK == 1 and os.environ.get("ACCIDENT"):
        suffer(os.environ["ACCIDENT"])
    code = train_gpt.main()
    if RECORD:
        seen["final weights"], seen["group is left"] = weights(networks[0]), dist.is_initialized()
        Path(RECORD, f"{RANK}.json").write_text(json.dumps(seen))
    sys.exit(code)
