"""Start runs as torchrun would, with one import of torch for all of them: `python tests/forked.py JSON`, where JSON is a list of runs,
each a list with the script, its flags, its environment and a file for its stderr (or null) for each process. Prints their exit
codes as the last line, a list for each run.

It takes the place of the launchers of several machines, too: a process belongs to the one that its GROUP_RANK names.

Without JSON it serves one process at a time: each line of stdin is what `become` wants to know, and is answered with the id of the
process that was started for it, or is such an id, and is answered with that process's exit code (null while it runs)."""

import gc
import json
import os
import runpy
import socket
import sys

import numpy  # noqa: F401  what train_gpt.py imports
import torch._dynamo  # noqa: F401
import torch.distributed as dist
import torch.nn.attention.flex_attention  # noqa: F401
import tqdm  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(script: str, flags: list[str], environment: dict, errors: str | None, out: str | None = None) -> None:
    """Run the script in this process, to its end."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    for path, stream in ((out, 1), (errors, 2)):
        if path:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    sys.exit(0)


def serve() -> None:
    for line in sys.stdin:
        if isinstance(asked := json.loads(line), int):
            child, status = os.waitpid(asked, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if child else None
        elif not (answer := os.fork()):
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            become(**asked)
        print(json.dumps(answer), flush=True)


def main() -> None:
    children, ports = [], []
    for processes in json.loads(sys.argv[1]):
        ports.append(free_port())
        children.append([])
        for rank, process in enumerate(processes):
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=len(processes), GROUP_RANK=0, MASTER_ADDR="127.0.0.1",
                         MASTER_PORT=ports[-1], TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
            if not (child := os.fork()):
                become(**process | dict(environment=place | process["environment"]))
            children[-1].append(child)
    # Each launcher's, through which the processes of its run meet; they try until it is there.
    stores = [dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) for port in ports]
    codes = [[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in run] for run in children]
    del stores
    print(json.dumps(codes))


if __name__ == "__main__":
    gc.freeze()  # otherwise each process spends a second at its end on what all have in common
    main() if sys.argv[1:] else serve()
