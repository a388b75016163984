#!/usr/bin/env bash
# LoRA, frozen backbone and full fine-tune of one pretrained Sudoku MDM, side by side. Resumable: run it again.
#     examples/sudoku/heads.sh runs/sudoku-puzzles [further flags for the three trainings]
# The folder is the saved pipeline of the stage "puzzles" (examples/sudoku/train.sh). Trains by prism.args, which the
# three share but for what is trained; then benchmarks/sudoku_heads.py solves puzzles with each and writes the table.
# Environment: BIN, folder of the environment's commands (.venv/bin); RUNS, folder of the runs (runs); MEASURE, flags of
# the measurement.
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin} RUNS=${RUNS:-runs}
base=${1:?usage: heads.sh FOLDER_OF_THE_PRETRAINED_MDM [flags]}
shift

device=()  # not every CPU is fast in bfloat16
if "$BIN/python" -c "import torch; raise SystemExit(torch.cuda.is_available())"; then
  "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())" || device=(--bf16 false)
fi
# prism.args says --full and muon, which are for all weights; the flags here win. LoRA and head take AdamW.
train() {
  way=$1
  shift
  "$BIN/python" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    -m prism_pipelines.training --resume-from-checkpoint latest --args-file examples/sudoku/prism.args \
    --base-model "$base" --output-dir "$RUNS/sudoku-heads-$way" --sample-puzzles 0 "${device[@]}" "$@"
}
train full --muon-learning-rate 0.01 "$@"
train lora --full false --optimizer adamw --rank 32 --learning-rate 6e-3 "$@"
train frozen --full false --optimizer adamw --freeze-backbone --learning-rate 2e-3 "$@"
# shellcheck disable=SC2086
"$BIN/python" -m benchmarks.sudoku_heads "$base" --runs "$RUNS" ${MEASURE:-}
