#!/usr/bin/env bash
# From a fresh clone to a trained model: `bash run.sh [FLAGS OF train_gpt.py]`.
# With CUDA GPUs: the speedrun on all of them. Without: the tiny preset, on the text of Python's own library.
set -euo pipefail
cd "$(dirname "$0")"

# The environment, once, and again when requirements.txt has changed.
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "run.sh: installing requirements.txt into .venv (once)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ]; then
    # A step's 8 sequences have to divide evenly; another --seqs_per_step goes with another NPROC.
    nproc=${NPROC:-$gpus}
    while [ -z "${NPROC:-}" ] && [ $((8 % nproc)) -ne 0 ]; do nproc=$((nproc - 1)); done
    echo "run.sh: training on $nproc of $gpus GPU(s)"
    exec .venv/bin/torchrun --standalone --nproc_per_node="$nproc" train_gpt.py "$@"
fi

echo "run.sh: no CUDA GPU found; training the tiny preset on the CPU"
ls data/local_text/train_*.bin data/local_text/val_*.bin >/dev/null 2>&1 || .venv/bin/python data/local_text.py
exec .venv/bin/python train_gpt.py --preset tiny "$@"
