#!/usr/bin/env bash
# The bundled Sudoku model from nothing: pretrain an MDM on grids, go on with puzzles, repeat its middle layers and go on
# with hard puzzles, fine-tune with PRISM, measure, write the card.
# Run again after an interruption and it goes on where it stopped (measuring begins anew). `--quick` cuts each stage short.
# Environment: BIN, folder of the environment's commands (.venv/bin); RUNS, folder of the runs (runs).
# On a GPU the steps are of 512 examples instead of 128.
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin} RUNS=${RUNS:-runs}
cuda() { "$BIN/python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; }
more=() name=sudoku mdm=() puzzles=() deep=() prism=() finish=(--dtype bfloat16)
if [ "${1:-}" = --quick ]; then
  name=sudoku-quick
  mdm=(--max-steps 380 --warmup-steps 50 --lr-scheduler-kwargs '{"num_decay_steps": 100}' --eval-strategy no)
  puzzles=(--max-steps 60 --warmup-steps 10 --eval-strategy no --sample-puzzles 0)
  deep=(--max-steps 30 --warmup-steps 10 --eval-strategy no --sample-puzzles 0)
  prism=(--max-steps 30 --warmup-steps 10 --eval-strategy no --sample-puzzles 0)
  finish+=(--num-puzzles 50 --num-to-choose 20)
elif [ $# -gt 0 ]; then
  echo "usage: train.sh [--quick]" >&2
  exit 2
elif cuda; then
  more=(--per-device-train-batch-size 512 --gradient-accumulation-steps 1 --dataloader-num-workers 2 --bf16 true)
  more+=(--num-train-examples 10000000 --save-steps 500 --sample-puzzles 0)
  mdm+=(--max-steps 1200 --lr-scheduler-kwargs '{"num_decay_steps": 400}' --eval-steps 500)
  puzzles+=(--max-steps 800 --eval-steps 500)
  deep+=(--max-steps 2200 --eval-steps 500 --num-base-grids 40000)
  prism+=(--max-steps 600 --eval-steps 300)
  finish+=(--num-puzzles 1000 --num-to-choose 400)
fi
if ! cuda && ! "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  more+=(--bf16 false)  # not every CPU is fast in bfloat16
  finish+=(--dtype float32)
fi
run() {
  "$BIN/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(nproc)" -m prism_pipelines.training --resume-from-checkpoint latest "$@" "${more[@]}"
}
run --args-file examples/sudoku/pretrain.args --output-dir "$RUNS/$name-mdm" "${mdm[@]}"
run --args-file examples/sudoku/puzzles.args --base-model "$RUNS/$name-mdm" --output-dir "$RUNS/$name-puzzles" "${puzzles[@]}"
"$BIN/python" examples/sudoku/grow.py "$RUNS/$name-puzzles" "$RUNS/$name-grown"
run --args-file examples/sudoku/deep.args --base-model "$RUNS/$name-grown" --output-dir "$RUNS/$name-deep" "${deep[@]}"
run --args-file examples/sudoku/prism.args --base-model "$RUNS/$name-deep" --output-dir "$RUNS/$name-prism" "${prism[@]}"
"$BIN/python" examples/sudoku/finish.py "$RUNS/$name-mdm" "$RUNS/$name-puzzles" "$RUNS/$name-deep" "$RUNS/$name-prism" \
  "${finish[@]}"
