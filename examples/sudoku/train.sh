#!/usr/bin/env bash
# The bundled Sudoku model from nothing: pretrain an MDM on grids, go on with puzzles, repeat its middle layers and go on
# with hard puzzles, fine-tune with PRISM, measure, write the card.
# Run again after an interruption and it goes on where it stopped (measuring begins anew). `--quick` cuts each stage short.
# Environment: BIN, folder of the environment's commands (.venv/bin); RUNS, folder of the runs (runs).
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin} RUNS=${RUNS:-runs}
name=sudoku mdm=() puzzles=() deep=() prism=() finish=(--dtype bfloat16)
if [ "${1:-}" = --quick ]; then
  name=sudoku-quick
  mdm=(--max_steps 380 --warmup_steps 50 --lr_scheduler_kwargs '{"num_decay_steps": 100}' --eval_strategy no)
  puzzles=(--max_steps 60 --warmup_steps 10 --eval_strategy no --sample_puzzles 0)
  deep=(--max_steps 30 --warmup_steps 10 --eval_strategy no --sample_puzzles 0)
  prism=(--max_steps 30 --warmup_steps 10 --eval_strategy no --sample_puzzles 0)
  finish+=(--num_puzzles 50 --num_to_choose 20)
elif [ $# -gt 0 ]; then
  echo "usage: train.sh [--quick]" >&2
  exit 2
fi

device=()  # bfloat16 on a CPU must be asked for, and not every CPU is fast in it
"$BIN/python" -c "import torch; raise SystemExit(torch.cuda.is_available())" && device=(--use_cpu true)
if ! "$BIN/python" -c "import prism_pipelines.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  [ ${#device[@]} = 0 ] || device+=(--bf16 false)
  finish+=(--dtype float32)
fi
run() {
  "$BIN/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(nproc)" -m prism_pipelines.training --resume_from_checkpoint latest "${device[@]}" "$@"
}
run --args_file examples/sudoku/pretrain.args --output_dir "$RUNS/$name-mdm" "${mdm[@]}"
run --args_file examples/sudoku/puzzles.args --base_model "$RUNS/$name-mdm" --output_dir "$RUNS/$name-puzzles" "${puzzles[@]}"
"$BIN/python" examples/sudoku/grow.py "$RUNS/$name-puzzles" "$RUNS/$name-grown"
run --args_file examples/sudoku/deep.args --base_model "$RUNS/$name-grown" --output_dir "$RUNS/$name-deep" "${deep[@]}"
run --args_file examples/sudoku/prism.args --base_model "$RUNS/$name-deep" --output_dir "$RUNS/$name-prism" "${prism[@]}"
"$BIN/python" examples/sudoku/finish.py "$RUNS/$name-mdm" "$RUNS/$name-puzzles" "$RUNS/$name-deep" "$RUNS/$name-prism" \
  "${finish[@]}"
