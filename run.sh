#!/usr/bin/env bash
# From a fresh clone to a trained model: `bash run.sh [modern] [FLAGS]`.
# With CUDA GPUs: the speedrun on all of them, after downloading its data. Without: the tiny preset on the text of Python's own
# library. `modern` selects records/modern/train_modern.py in place of train_gpt.py.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "run.sh: Python 3.11 or newer is needed, and $python is not; name another one: PYTHON=python3.11 bash run.sh" >&2
    exit 2
fi
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "run.sh: installing requirements.txt into .venv (once)"
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

script=train_gpt.py shards=7
if [ "${1:-}" = modern ]; then
    script=records/modern/train_modern.py shards=6
    shift
fi
flags=" $* "
case "$flags" in *" --help "* | *" -h "*) exec .venv/bin/python "$script" "$@" ;; esac

# The number of GPUs, the GiB of the smallest one, and the number of cores.
read -r gpus memory cores < <(.venv/bin/python -c 'import os, torch
gpus = range(torch.cuda.device_count())
memory = min((torch.cuda.get_device_properties(i).total_memory >> 30 for i in gpus), default=0)
print(len(gpus), memory, os.cpu_count())')

# Sequences of a step, which the processes have to share evenly.
sequences=8
preset=
if [ "$gpus" -eq 0 ]; then
    if command -v nvidia-smi >/dev/null; then
        echo "run.sh: nvidia-smi is here, but torch finds no GPU: hidden, or with a driver that is too old"
    fi
    echo "run.sh: no CUDA GPU found; training the tiny preset on the CPU"
    preset="--preset tiny" flags=" --preset tiny$flags"
    # glibc keeps freed memory: returning it costs a small network more time than its computing.
    export MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_TOP_PAD_=268435456 MALLOC_MMAP_THRESHOLD_=33554432
fi

# The data that the flags ask for.
case "$flags" in
    *" --train_files"*) ;;
    *" --preset tiny "* | *" --preset=tiny "*)
        ls data/local_text/train_*.bin data/local_text/val_*.bin >/dev/null 2>&1 || .venv/bin/python data/local_text.py ;;
    *)
        case "$script$flags" in train_gpt.py*" --preset medium "* | train_gpt.py*" --preset=medium "*) shards=40 ;; esac
        echo "run.sh: this run needs $shards training shards of FineWeb, 0.2 GB each, and the validation shard"
        .venv/bin/python data/cached_fineweb10B.py "$shards" ;;
esac

# On smaller GPUs the same tokens a step in smaller parts; each recipe's README.md has the table.
fit=
case "$script$flags" in
    *" --preset"* | *" --train_seq_len"* | *" --seqs_per_step"*) ;;
    records/modern*)
        if [ "$memory" -lt 14 ]; then
            fit="--train_seq_len 4096 --seqs_per_step 32 --val_seq_len 131072" sequences=32
        elif [ "$memory" -lt 20 ]; then
            fit="--train_seq_len 8192 --seqs_per_step 16" sequences=16
        fi ;;
    *)
        if [ "$memory" -lt 14 ]; then
            fit="--train_seq_len 8192 --seqs_per_step 48 --val_seq_len 131072" sequences=48
        elif [ "$memory" -lt 20 ]; then
            fit="--train_seq_len 16384 --seqs_per_step 24" sequences=24
        elif [ "$memory" -lt 36 ]; then
            fit="--train_seq_len 24576 --seqs_per_step 16" sequences=16
        fi ;;
esac
[ -z "$fit" ] || echo "run.sh: for a GPU of $memory GiB: $fit"

processes=${NPROC:-$gpus}
case "$flags" in *" --preset tiny "* | *" --preset=tiny "*) sequences=2 ;; esac
if [ "$gpus" -eq 0 ]; then
    processes=${NPROC:-$((cores < 2 ? 1 : 2))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
while [ -z "${NPROC:-}" ] && [ $((sequences % processes)) -ne 0 ]; do processes=$((processes - 1)); done

# shellcheck disable=SC2086 # preset and fit are several words, or none
set -- "$script" $preset $fit "$@"
[ "$processes" -gt 1 ] || exec .venv/bin/python "$@"
exec .venv/bin/torchrun --standalone --nproc_per_node="$processes" "$@"
