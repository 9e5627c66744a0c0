#!/usr/bin/env bash
# From a fresh clone to a trained model: `bash run.sh [FLAGS OF train_gpt.py]`.
# With CUDA GPUs: the speedrun on all of them, once its data are here. Without: the tiny preset, on the text of Python's
# own library.
set -euo pipefail
cd "$(dirname "$0")"

# The environment, once, and again when requirements.txt has changed.
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "run.sh: installing requirements.txt into .venv (once)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

# The shards that the flags ask for: none that --train_files names, 32 of the medium preset (6000 steps of 8 x 64 x 1024
# tokens), 7 of the speedrun (1770 of 8 x 48 x 1024), 100M tokens a shard.
fetch_data() {
    shards=7
    case " $* " in
        *" --train_files"*|*" --help "*|*" -h "*) return ;;
        *" --preset tiny "*|*" --preset=tiny "*) make_text; return ;;
        *" --preset medium "*|*" --preset=medium "*) shards=32 ;;
    esac
    tenths=$(((shards + 1) * 2))  # of a GB: 200 MB a shard
    echo "run.sh: the run needs $shards training shards of FineWeb and the one for validation, $((tenths / 10)).$((tenths % 10)) GB in all"
    .venv/bin/python data/cached_fineweb10B.py "$shards"
}

make_text() {
    ls data/local_text/train_*.bin data/local_text/val_*.bin >/dev/null 2>&1 || .venv/bin/python data/local_text.py
}

# How many GPUs CUDA_VISIBLE_DEVICES leaves, and the GiB of the smallest.
look='import torch
gpus = range(torch.cuda.device_count())
print(len(gpus), min((torch.cuda.get_device_properties(i).total_memory >> 30 for i in gpus), default=0))'

# The speedrun's sequences, where they would not fit: shorter ones, and as many more of them. README.md tells what fits.
fit() {
    case " $* " in *" --preset"*|*" --train_seq_len"*|*" --seqs_per_step"*|*" --help "*|*" -h "*) return ;; esac
    if [ "$1" -ge 36 ]; then return; fi
    if [ "$1" -ge 20 ]; then
        fitting=(--train_seq_len 24576 --seqs_per_step 16)
        sequences=16
    elif [ "$1" -ge 14 ]; then
        fitting=(--train_seq_len 16384 --seqs_per_step 24)
        sequences=24
    else
        fitting=(--train_seq_len 8192 --seqs_per_step 48 --val_seq_len 131072)
        sequences=48
    fi
    echo "run.sh: for a card of $1 GiB ${fitting[*]}: the same tokens a step in smaller parts"
}

gpus=0
if command -v nvidia-smi >/dev/null; then
    read -r gpus memory < <(.venv/bin/python -c "$look")
    [ "$gpus" -gt 0 ] || echo "run.sh: nvidia-smi is here, but torch finds no GPU: hidden, or with a driver that is too old"
fi
if [ "$gpus" -gt 0 ]; then
    # A step's sequences, 8 or the tiny preset's 2, have to divide evenly; another --seqs_per_step goes with another NPROC.
    sequences=8
    fitting=()
    case " $* " in *" --preset tiny "*|*" --preset=tiny "*) sequences=2 ;; esac
    fit "${memory:-0}" "$@"
    nproc=${NPROC:-$gpus}
    while [ -z "${NPROC:-}" ] && [ $((sequences % nproc)) -ne 0 ]; do nproc=$((nproc - 1)); done
    fetch_data "$@"
    echo "run.sh: training on $nproc of $gpus GPU(s)"
    set -- train_gpt.py ${fitting[@]+"${fitting[@]}"} "$@"
    [ "$nproc" -gt 1 ] || exec .venv/bin/python "$@"  # whose exit code torchrun would not pass on
    exec .venv/bin/torchrun --standalone --nproc_per_node="$nproc" "$@"
fi

echo "run.sh: no CUDA GPU found; training the tiny preset on the CPU"
make_text
exec .venv/bin/python train_gpt.py --preset tiny "$@"
