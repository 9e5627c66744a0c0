"""The commands in README.md exist, with their flags."""

import functools
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"\S+\.(py|sh)\b")
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if SCRIPT.search(line)]


@functools.cache
def flags_of(script):
    command = sys.executable, ROOT / script, "--help"
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"--\w+", result.stdout))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_readme_exists_with_its_flags(command):
    script = SCRIPT.search(command)
    assert (ROOT / script[0]).is_file()
    words = shlex.split(command[script.end() :], comments=True)  # flags of torchrun come before
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    assert not flags or flags <= flags_of(script[0])
