#!/usr/bin/env bash
# Compile the GPU program for every card, without one: `bash tests/gpu_program.sh [ARGUMENTS OF gpu_program.py]`. Installs the
# CUDA build of torch (5 GB on the disk) into .venv-gpu-program, beside the tests' own environment.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted="torch===2.13.0 $(grep -E '^(numpy|tqdm)' requirements.txt | tr '\n' ' ')"
if [ "$wanted" != "$(cat .venv-gpu-program/installed.txt 2>/dev/null)" ]; then
    "${PYTHON:-python3}" -m venv .venv-gpu-program
    # shellcheck disable=SC2086 # several requirements
    .venv-gpu-program/bin/python -m pip install --quiet --disable-pip-version-check $wanted
    echo "$wanted" > .venv-gpu-program/installed.txt
fi
exec .venv-gpu-program/bin/python tests/gpu_program.py "$@"
