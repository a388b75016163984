#!/usr/bin/env bash
# The bundled text model from nothing: get the text, pretrain an MDM on it, fine-tune with PRISM, choose every decoding
# rule's own setting, measure, write the card. Run again after an interruption and it goes on where it stopped.
# `--quick` cuts each stage short. On a GPU the steps are more and larger.
# Environment: BIN, folder of the environment's commands (.venv/bin); RUNS, folder of the runs (runs).
set -euo pipefail
cd "$(dirname "$0")/../.."
BIN=${BIN:-.venv/bin} RUNS=${RUNS:-runs}
cuda() { "$BIN/python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; }
more=() name=text mdm=() prism=() finish=()
if [ "${1:-}" = --quick ]; then
  name=text-quick
  mdm=(--max-steps 300 --warmup-steps 50 --lr-scheduler-kwargs '{"num_decay_steps": 80}' --eval-strategy no)
  prism=(--max-steps 60 --warmup-steps 10 --eval-steps 60)
  finish=(--num-samples 16)
elif [ $# -gt 0 ]; then
  echo "usage: train.sh [--quick]" >&2
  exit 2
elif cuda; then
  more=(--per-device-train-batch-size 128 --save-steps 500)
  mdm+=(--max-steps 2000 --lr-scheduler-kwargs '{"num_decay_steps": 600}' --eval-steps 1000)
  prism+=(--max-steps 800 --eval-steps 500)
fi

[ -f "$RUNS/text-data/tokenizer/tokenizer.json" ] || "$BIN/python" examples/text/prepare.py "$RUNS/text-data"
if ! cuda && ! "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  more+=(--bf16 false)  # not every CPU is fast in bfloat16
fi
run() {
  "$BIN/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "$(nproc)" -m prism_pipelines.training --resume-from-checkpoint latest \
    --dataset "$RUNS/text-data/train.jsonl" --eval-dataset "$RUNS/text-data/heldout.jsonl" "$@" "${more[@]}"
}
run --args-file examples/text/pretrain.args --tokenizer "$RUNS/text-data/tokenizer" --output-dir "$RUNS/$name-mdm" "${mdm[@]}"
run --args-file examples/text/prism.args --base-model "$RUNS/$name-mdm" --output-dir "$RUNS/$name-prism" "${prism[@]}"
"$BIN/python" examples/text/finish.py "$RUNS/text-data" "$RUNS/$name-mdm" "$RUNS/$name-prism" "${finish[@]}"
