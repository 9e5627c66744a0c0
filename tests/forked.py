"""Start runs as torchrun would, with one import of torch for all of them.

`python tests/forked.py JSON`, where JSON is a list of runs, each a list with the script, its flags,
its environment, and a file for its stderr (or null) for each process. Prints their exit codes as
the last line, a list for each run.

It takes the place of the launchers of several machines, too: a process belongs to the machine that
its GROUP_RANK names. As torchrun does, it ends the processes of a run on a machine when one of them
has failed: by SIGTERM, and 30 seconds later by SIGKILL.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time

import torch.distributed as dist

PATIENCE = 30  # seconds from SIGTERM to SIGKILL


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(script: str, flags: list[str], environment: dict, errors: str | None) -> None:
    """Run the script in this process, to its end."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    sys.exit(0)


class Run:
    """The processes of one run, on one or more machines."""

    def __init__(self, processes: list[dict]):
        self.port = free_port()
        self.codes = {}  # by the id of the process
        self.machines = {}  # the ids of the processes of each
        self.ids = []
        self.failed_at = {}  # when a process of a machine was first seen to have failed
        for rank, process in enumerate(processes):
            place = dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=len(processes),
                GROUP_RANK=0,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=self.port,
                TORCHELASTIC_USE_AGENT_STORE=True,
                TORCHELASTIC_RESTART_COUNT=0,
            )
            environment = place | process["environment"]
            child = os.fork()
            if not child:
                become(**process | dict(environment=environment))
            self.ids.append(child)
            self.machines.setdefault(environment["GROUP_RANK"], []).append(child)

    def serve(self) -> None:
        """The launcher's store, through which the processes meet; they try until it is there."""
        self.store = dist.TCPStore("127.0.0.1", self.port, is_master=True, wait_for_workers=False)

    def send(self, number: int, ids: list[int]) -> None:
        for child in ids:
            if child not in self.codes:
                os.kill(child, number)

    def has_ended(self) -> bool:
        """Whether all processes have; ends those beside one that has failed."""
        for child in self.ids:
            if child not in self.codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.codes[child] = os.waitstatus_to_exitcode(status)
        for machine, ids in self.machines.items():
            if machine in self.failed_at:
                if time.monotonic() > self.failed_at[machine] + PATIENCE:
                    self.send(signal.SIGKILL, ids)
            elif any(self.codes.get(child) for child in ids):
                self.failed_at[machine] = time.monotonic()
                self.send(signal.SIGTERM, ids)
        return len(self.codes) == len(self.ids)


def main() -> None:
    runs = [Run(processes) for processes in json.loads(sys.argv[1])]
    for run in runs:
        run.serve()
    while not all([run.has_ended() for run in runs]):
        time.sleep(0.05)
    print(json.dumps([[run.codes[child] for child in run.ids] for run in runs]))


if __name__ == "__main__":
    for name in ("numpy", "torch._dynamo", "torch.nn.attention.flex_attention", "tqdm"):
        importlib.import_module(name)  # what train_gpt.py imports
    gc.freeze()  # otherwise each process spends a second at its end on what all have in common
    main()
