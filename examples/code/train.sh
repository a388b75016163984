#!/usr/bin/env bash
# An experiment: a masked diffusion model of short Python functions, with PRISM, measured by what parses.
# Run again after an interruption and it goes on where it stopped.
# Environment: BIN, folder of the environment's commands (.venv/bin); RUNS, folder of the runs (runs).
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin} RUNS=${RUNS:-runs}
cuda() { "$BIN/python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; }
more=() mdm=() prism=() measure=()
[ -f "$RUNS/code-data/tokenizer/tokenizer.json" ] || "$BIN/python" examples/code/prepare.py "$RUNS/code-data"
if cuda; then  # more and larger steps
  more=(--per_device_train_batch_size 256 --save_steps 500)
  mdm=(--max_steps 2000 --lr_scheduler_kwargs '{"num_decay_steps": 600}' --eval_steps 1000)
  prism=(--max_steps 800 --eval_steps 500)
  measure=(--device cuda --batch-size 200 --seeds 3)
elif ! "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  more=(--bf16 false)  # not every CPU is fast in bfloat16
fi
run() {
  "$BIN/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(nproc)" -m prism_pipelines.training --resume_from_checkpoint latest \
    --dataset "$RUNS/code-data/train.jsonl" --eval_dataset "$RUNS/code-data/heldout.jsonl" "$@" "${more[@]}"
}
run --args_file examples/code/pretrain.args --tokenizer "$RUNS/code-data/tokenizer" --output_dir "$RUNS/code-mdm" "${mdm[@]}"
run --args_file examples/code/prism.args --base_model "$RUNS/code-mdm" --output_dir "$RUNS/code-prism" "${prism[@]}"
"$BIN/python" -m benchmarks.code_parse "$RUNS/code-prism" --base "$RUNS/code-mdm" --data "$RUNS/code-data" "${measure[@]}"
