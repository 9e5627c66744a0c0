"""train_gpt.py under observation: each process writes down what it did with all digits, and one may
meet with an accident.

RECORD: the folder for the record of process N, N.json. The network then starts from projections
that are drawn at random: while they are zero, some gradients are rounding errors, which Adam turns
into full steps, so that two runs that differ in rounding alone differ visibly.

ACCIDENT: what happens to process 1 in its fourth step, in the middle of a collective: `kill`,
`stop`, `hang` (the process lives, its work does not go on), or `fail` (an error of its own).
"""

import hashlib
import importlib
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
train_gpt = importlib.import_module("train_gpt")

RANK = int(os.environ.get("RANK", 0))
RECORD = os.environ.get("RECORD")
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


def draw_projections(network) -> None:
    """The same for every number of processes."""
    generator = torch.Generator().manual_seed(1)
    for name, p in network.named_parameters():
        if "c_proj" in name or "lm_head" in name:
            std = 0.5 * p.size(-1) ** -0.5
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)


def built(network, *_):
    draw_projections(network)
    networks.append(network)
    seen["initial weights"] = weights(network)


def taken(batch, *_):
    content = b"".join(t.numpy().tobytes() for t in batch)
    seen["sequences"].append(zlib.crc32(content))


def stepped(_, log, step, loss_and_stops):
    seen["losses"].append(loss_and_stops[0].item())


def validated(loss, *_):
    seen["validations"].append(loss)


def suffer(what: str):
    armed = []

    def arm(window, optimizers, step, *_):
        if step == 3:
            armed.append(step)

    def accident(*_):
        if not armed:
            return
        if what == "hang":
            time.sleep(3600)
        elif what == "fail":
            raise ValueError("an accident")
        else:
            os.kill(os.getpid(), dict(kill=signal.SIGKILL, stop=signal.SIGSTOP)[what])

    around(train_gpt, "set_schedule", arm)
    around(dist, "all_reduce", accident)


if __name__ == "__main__":
    if RECORD:
        around(train_gpt, "build_model", built)
        around(train_gpt.DistributedDataLoader, "next_batch", taken)
        around(train_gpt.Log, "step", stepped)
        around(train_gpt, "validate", validated)
    if RANK == 1 and os.environ.get("ACCIDENT"):
        suffer(os.environ["ACCIDENT"])
    code = train_gpt.main()
    if RECORD:
        seen["final weights"] = weights(networks[0])
        seen["group is left"] = dist.is_initialized()
        Path(RECORD, f"{RANK}.json").write_text(json.dumps(seen))
    sys.exit(code)
