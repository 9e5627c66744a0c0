"""run.sh, with a program in place of Python and torchrun that prints how it is called."""

import os
import shutil
import subprocess

import pytest
from helpers import ROOT

STUB = """#!/usr/bin/env bash
case "$*" in
    *version_info*) exit "${OLD:-0}" ;;
    *get_device_properties*) echo "$MACHINE" ;;
    "-m venv --clear "*)
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        cp "$0" .venv/bin/torchrun ;;
    *"-m pip "*) echo installed ;;
    *) echo "$(basename "$0")" "$@" ;;
esac
"""
INSTALLED = ["run.sh: installing requirements.txt into .venv (once)", "installed"]


@pytest.fixture
def start(tmp_path):
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def start(*arguments, machine="0 0 2", **environment):
        environment |= dict(PATH=os.environ["PATH"], PYTHON=f"{tmp_path}/python", MACHINE=machine)
        command = ["bash", str(tmp_path / "run.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return start


TINY = [
    "run.sh: no CUDA GPU found; training the tiny preset on the CPU",
    "python data/local_text.py",
]


def fineweb(shards):
    sentence = f"run.sh: this run needs {shards} training shards of FineWeb, 0.2 GB each, "
    return [f"{sentence}and the validation shard", f"python data/cached_fineweb10B.py {shards}"]


@pytest.mark.parametrize(
    "arguments, machine, expected",
    [
        ("", "0 0 2", [*TINY, "torchrun 2 train_gpt.py --preset tiny"]),
        ("--seed 1", "0 0 1", [*TINY, "python train_gpt.py --preset tiny --seed 1"]),
        ("modern", "0 0 8", [*TINY, "torchrun 2 records/modern/train_modern.py --preset tiny"]),
        ("modern --help", "0 0 2", ["python records/modern/train_modern.py --help"]),
        (
            "--train_files x",
            "0 0 2",
            [TINY[0], "torchrun 2 train_gpt.py --preset tiny --train_files x"],
        ),
        ("", "8 79 64", [*fineweb(7), "torchrun 8 train_gpt.py"]),
        ("", "6 79 64", [*fineweb(7), "torchrun 4 train_gpt.py"]),
        ("--preset tiny", "8 79 64", [TINY[1], "torchrun 2 train_gpt.py --preset tiny"]),
        ("--preset medium", "8 79 64", [*fineweb(40), "torchrun 8 train_gpt.py --preset medium"]),
        ("modern", "1 23 64", [*fineweb(6), "python records/modern/train_modern.py"]),
        (
            "modern",
            "1 15 64",
            [
                *fineweb(6),
                "run.sh: for a GPU of 15 GiB: --train_seq_len 8192 --seqs_per_step 16",
                "python records/modern/train_modern.py --train_seq_len 8192 --seqs_per_step 16",
            ],
        ),
        (
            "",
            "2 23 64",
            [
                *fineweb(7),
                "run.sh: for a GPU of 23 GiB: --train_seq_len 24576 --seqs_per_step 16",
                "torchrun 2 train_gpt.py --train_seq_len 24576 --seqs_per_step 16",
            ],
        ),
    ],
)
def test_command_fits_the_machine(arguments, machine, expected, start):
    start()
    result = start(*arguments.split(), machine=machine)
    output = result.stdout.replace("--standalone --nproc_per_node=", "")
    assert (result.returncode, output.splitlines()) == (0, expected)


def test_old_python_is_named_and_leaves_nothing_behind(start, tmp_path):
    refused = start(OLD="1")
    assert refused.returncode == 2 and "Python 3.11 or newer is needed" in refused.stderr
    assert not (tmp_path / ".venv").exists()
    assert start().stdout.splitlines()[:2] == INSTALLED


def test_installation_is_repeated_only_after_a_change(start, tmp_path):
    start()
    assert "installed" not in start().stdout
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert "installed" in start().stdout


def test_windows_checkout_keeps_line_endings(tmp_path):
    """Bash cannot read a script whose lines end in a carriage return."""
    for name in (".gitattributes", "run.sh"):
        shutil.copy(ROOT / name, tmp_path)
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ("init -q", "add .", "commit -qm a", "clone -q . clone"):
        subprocess.run([*git, *command.split()], cwd=tmp_path, check=True)
    assert b"\r" not in (tmp_path / "clone" / "run.sh").read_bytes()
