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
  more=(--per-device-train-batch-size 256 --save-steps 500)
  mdm=(--max-steps 2000 --lr-scheduler-kwargs '{"num_decay_steps": 600}' --eval-steps 1000)
  prism=(--max-steps 800 --eval-steps 500)
  measure=(--device cuda --batch-size 200 --seeds 3)
elif ! "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  more=(--bf16 false)  # not every CPU is fast in bfloat16
fi
run() {
  "$BIN/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(nproc)" -m prism_pipelines.training --resume-from-checkpoint latest \
    --dataset "$RUNS/code-data/train.jsonl" --eval-dataset "$RUNS/code-data/heldout.jsonl" "$@" "${more[@]}"
}
run --args-file examples/code/pretrain.args --tokenizer "$RUNS/code-data/tokenizer" --output-dir "$RUNS/code-mdm" "${mdm[@]}"
run --args-file examples/code/prism.args --base-model "$RUNS/code-mdm" --output-dir "$RUNS/code-prism" "${prism[@]}"
"$BIN/python" -m benchmarks.code_parse "$RUNS/code-prism" --base "$RUNS/code-mdm" --data "$RUNS/code-data" "${measure[@]}"
