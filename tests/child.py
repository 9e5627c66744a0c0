"""What a process becomes that a test starts by multiprocessing. It imports nothing else of ours."""

import os
import runpy
import sys


def become(script: str, flags: list[str], environment: dict, errors: str, out: str) -> None:
    """Run the script in this process, to its end, with its output and errors in these files."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    for path, stream in ((out, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
