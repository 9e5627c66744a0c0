#!/usr/bin/env bash
# Everything that wants a GPU, in one command: `DATA=folder-of-shards OUT=folder-for-the-logs bash tests/gpu.sh`.
#   1. the GPU tests   2. the benchmark at the speedrun's shapes   3. a training run, 8 micro-steps a step as on 8 GPUs
# Needs torch (2.11 or 2.13), numpy, tqdm and pytest in PYTHON (default python3), and no network. DATA: token shards named
# *train*.bin and *val*.bin; without it, the text of Python's own library is made into some. STEPS: of the run (100).
# `bash tests/gpu.sh --cpu` rehearses all of it without a GPU, on the tiny preset.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-logs/gpu}
steps=${STEPS:-100}
mkdir -p "$out"
log=$out/gpu.log
: > "$log"

stage() { # name, command ...: run it, keep what it says, note how it ended and how long it took
    local name=$1 begin=$SECONDS rc
    shift
    printf '\n==== %s: %s\n' "$name" "$*" | tee -a "$log"
    PYTHONUNBUFFERED=1 "$@" 2>&1 | tee -a "$log"
    rc=${PIPESTATUS[0]}
    results+=("$(printf '%-12s %-8s %4d s' "$name" "$([ "$rc" -eq 0 ] && echo ok || echo "FAILED $rc")" $((SECONDS - begin)))")
    [ "$rc" -eq 0 ] || failed=1
}

failed=0
results=()
where=${1:---gpu}
preset=speedrun val_tokens=${VAL_TOKENS:-1048576}
if [ "$where" = --cpu ]; then
    preset=tiny val_tokens=${VAL_TOKENS:-65536} CUDA_VISIBLE_DEVICES=
    export CUDA_VISIBLE_DEVICES
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $python finds no torch, or torch no CUDA GPU; set PYTHON, or rehearse with bash tests/gpu.sh --cpu" >&2
    exit 2
fi
if [ -z "${DATA:-}" ]; then
    DATA=data/local_text
    ls "$DATA"/*train*.bin >/dev/null 2>&1 || stage shards "$python" data/local_text.py
fi

# As much as there is, where that is less.
available=$("$python" -c 'import sys, train_gpt; print(train_gpt.DistributedDataLoader(sys.argv[1], 128).num_tokens)' "$DATA/*val*.bin") || exit 2
[ "$val_tokens" -le "$available" ] || val_tokens=$available

stage tests "$python" -m pytest -m gpu tests/test_gpu.py
stage benchmark "$python" tests/bench.py "$where"
rm -f "$out/gpu_run.txt"
stage training "$python" train_gpt.py --preset "$preset" --train_files "$DATA/*train*.bin" --val_files "$DATA/*val*.bin" --repeat \
    --val_tokens "$val_tokens" --num_iterations "$steps" --val_loss_every 50 --sample 0 --log_dir "$out" --run_id gpu_run

{
    printf '\n==== %s\n' "$(grep -m 1 ', torch [0-9]' "$log")"
    printf '%s\n' "${results[@]}"
    grep -E '^(a step of|tokens/s|MFU|peak memory:|warm-up)' "$log"
    grep -E "^step:[0-9]+/$steps val_loss|^tokens per second|^peak memory allocated" "$out/gpu_run.txt" 2>/dev/null
} | tee -a "$log"
exit "$failed"
