"""Start processes as torchrun would, with one import of torch for all of them: `python tests/forked.py JSON`, where JSON is a list
with the script, its flags and its environment for each process. Prints their exit codes as the last line.

It takes the place of the launchers of several machines, too: a process belongs to the one that its GROUP_RANK names."""

import json
import os
import runpy
import socket
import sys

import numpy  # noqa: F401  what train_gpt.py imports
import torch.distributed as dist
import torch.nn.attention.flex_attention  # noqa: F401
import tqdm  # noqa: F401


def main() -> None:
    processes = json.loads(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank, process in enumerate(processes):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=len(processes), GROUP_RANK=0, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
        if not (child := os.fork()):
            os.environ.update({name: str(value) for name, value in (place | process.get("environment", {})).items()})
            sys.argv = [process["script"], *process["flags"]]
            runpy.run_path(process["script"], run_name="__main__")
            sys.exit(0)
        children.append(child)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # the launcher's, through which all meet
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    del store
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
