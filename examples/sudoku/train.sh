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
  mdm=(--max_steps 380 --warmup_steps 50 --lr_scheduler_kwargs '{"num_decay_steps": 100}' --eval_strategy no)
  puzzles=(--max_steps 60 --warmup_steps 10 --eval_strategy no --sample_puzzles 0)
  deep=(--max_steps 30 --warmup_steps 10 --eval_strategy no --sample_puzzles 0)
  prism=(--max_steps 30 --warmup_steps 10 --eval_strategy no --sample_puzzles 0)
  finish+=(--num_puzzles 50 --num_to_choose 20)
elif [ $# -gt 0 ]; then
  echo "usage: train.sh [--quick]" >&2
  exit 2
elif cuda; then
  more=(--per_device_train_batch_size 512 --gradient_accumulation_steps 1 --dataloader_num_workers 2 --bf16 true)
  more+=(--num_train_examples 10000000 --save_steps 500 --sample_puzzles 0)
  mdm+=(--max_steps 1200 --lr_scheduler_kwargs '{"num_decay_steps": 400}' --eval_steps 500)
  puzzles+=(--max_steps 800 --eval_steps 500)
  deep+=(--max_steps 2200 --eval_steps 500 --num_base_grids 40000)
  prism+=(--max_steps 600 --eval_steps 300)
  finish+=(--num_puzzles 1000 --num_to_choose 400)
fi
if ! cuda && ! "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  more+=(--bf16 false)  # not every CPU is fast in bfloat16
  finish+=(--dtype float32)
fi
run() {
  "$BIN/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(nproc)" -m prism_pipelines.training --resume_from_checkpoint latest "$@" "${more[@]}"
}
run --args_file examples/sudoku/pretrain.args --output_dir "$RUNS/$name-mdm" "${mdm[@]}"
run --args_file examples/sudoku/puzzles.args --base_model "$RUNS/$name-mdm" --output_dir "$RUNS/$name-puzzles" "${puzzles[@]}"
"$BIN/python" examples/sudoku/grow.py "$RUNS/$name-puzzles" "$RUNS/$name-grown"
run --args_file examples/sudoku/deep.args --base_model "$RUNS/$name-grown" --output_dir "$RUNS/$name-deep" "${deep[@]}"
run --args_file examples/sudoku/prism.args --base_model "$RUNS/$name-deep" --output_dir "$RUNS/$name-prism" "${prism[@]}"
"$BIN/python" examples/sudoku/finish.py "$RUNS/$name-mdm" "$RUNS/$name-puzzles" "$RUNS/$name-deep" "$RUNS/$name-prism" \
  "${finish[@]}"
