#!/usr/bin/env bash
# Ten minutes on a GPU, in two calls: `bash tests/gpu.sh 1`, then `bash tests/gpu.sh 2`.
#   1 (5.5 minutes): the GPU tests beside the compilation of a micro-step; then its times, profile and memory, with the head in
#      FP8 and in bfloat16, and those of the public record's network where its log is at .public/record.txt
#   2 (4.5 minutes): 57 steps of the speedrun on the shards in .docs (22.4M tokens of GPT-2's vocabulary) with both heads; then,
#      at the same time, tiny with two seeds, a killed run that is resumed, out of memory, a micro-step of the modern recipe
# All results go to $OUT (logs/gpu). Needs torch 2.11 or 2.13, numpy, tqdm and pytest in $PYTHON (python3), and no network.
# With --rehearse as a second argument everything runs on the CPU at a small size, which proves the scripts.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-}
python=${PYTHON:-python3}
out=${OUT:-logs/gpu}
mkdir -p "$out"
micro=() modern=() docs=() tiny=() kill_at=300 patience=1
if [ "${2:-}" = --rehearse ]; then
    export CUDA_VISIBLE_DEVICES=
    micro=(--preset tiny --num_layers 12 --attention_free_layer 7 --num_heads 1 --head_dim 128 --model_dim 128 --dtype float32
        --train_seq_len 256 --val_seq_len 256 --seqs_per_step 1)
    modern=(--preset tiny)
    docs=(--preset tiny --model_dim 32 --num_heads 1 --head_dim 32 --train_seq_len 256 --val_seq_len 256 --seqs_per_step 1
        --val_tokens 512 --num_iterations 6 --val_loss_every 3 --sample 0)
    tiny=(--model_dim 32 --num_heads 1 --head_dim 32 --num_iterations 20 --val_loss_every 10 --save_every 5)
    kill_at=8 patience=10
elif [ "$call" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no GPU for $python; set PYTHON, or add --rehearse" >&2
    exit 2
fi

stage() { # NAME SECONDS COMMAND ...: run it with its output in $out/NAME.txt, and print the last lines
    local name=$1 limit=$2 code
    shift 2
    timeout --kill-after 10 $((limit * patience)) "$@" > "$out/$name.txt" 2>&1
    code=$?
    printf '== %s: exit code %d after %d s in all\n' "$name" "$code" "$SECONDS"
    grep -v train_loss "$out/$name.txt" | tail -n 12 | cut -c 1-150
    return "$code"
}

kill_and_resume() { # seed 0 again, whose curve it continues after kill -9
    "${run[@]}" --run_id killed > "$out/killed.txt" 2>&1 &
    until grep -q "^step:$kill_at/" "$out/logs/killed.txt" 2> /dev/null || ! kill -0 $! 2> /dev/null; do sleep 0.02; done
    kill -9 $!
    stage resumed 90 "${run[@]}" --run_id killed --resume auto
}

failed=0
if [ "$call" = 1 ]; then
    nvidia-smi > "$out/machine.txt" 2>&1
    rm -f "$out/tests_done"
    stage first_gpu 330 "$python" tests/first_gpu.py --record .public/record.txt --wait "$out/tests_done" "${micro[@]}" &
    stage tests 270 "$python" -m pytest -p no:cacheprovider -m gpu tests/test_gpu.py -k "not out_of_memory" --durations 15 || failed=1
    touch "$out/tests_done"
    wait $! || failed=1
    cat "$out/first_gpu.txt"
elif [ "$call" = 2 ]; then
    rm -rf "$out/logs"
    for head in head none; do
        stage "docs_$head" 150 "$python" train_gpt.py --train_files ".docs/docs_train_*.bin" --val_files ".docs/docs_val_*.bin" \
            --val_tokens 1048576 --num_iterations 57 --val_loss_every 19 --fp8 "$head" --log_dir "$out/logs" \
            --run_id "docs_$head" "${docs[@]}" || failed=1
        awk -F ': ' '/^tokens per second/ {printf "MFU: %.1f%% (121.2M weights in matmuls, 989 TFLOP/s)\n", 100 * $2 * 6 * 121.2e6 / 989e12}' \
            "$out/docs_$head.txt"
    done
    [ -e data/local_text ] || stage local_text 60 "$python" data/local_text.py || failed=1
    # The rest together: their losses count, and their times only roughly.
    run=("$python" train_gpt.py --preset tiny --sample 0 --save_every 50 --log_dir "$out/logs" "${tiny[@]}")
    stage tiny_0 90 "${run[@]}" --seed 0 --run_id tiny_0 & jobs=($!)
    stage tiny_1 90 "${run[@]}" --seed 1 --run_id tiny_1 & jobs+=($!)
    kill_and_resume & jobs+=($!)
    stage out_of_memory 90 "$python" -m pytest -p no:cacheprovider -m gpu tests/test_gpu.py -k out_of_memory & jobs+=($!)
    stage modern 90 "$python" tests/bench.py --script records/modern/train_modern.py --micro_step "${modern[@]}" & jobs+=($!)
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    find "$out/logs" -name "*.pt" -delete
else
    sed -n '2,9s/^# //p' "$0" >&2
    exit 2
fi
exit "$failed"
