#!/usr/bin/env bash
# A tiny BERT that fills masks, and a quality head for it: about two minutes on two cores.
#     bash examples/quickstart_head/train_head.sh [folder] [further flags for both trainings]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs/quickstart}
shift || true
python examples/quickstart_head/prepare.py "$folder/data"

# 1. A masked diffusion model, from nothing.
accelerate launch -m prism_pipelines.training --args_file examples/quickstart_head/pretrain.args \
    --dataset "$folder/data/text.txt" --tokenizer "$folder/data/tokenizer" --output_dir "$folder/mdm" "$@"

# 2. A quality head on it, with a LoRA adapter.
accelerate launch -m prism_pipelines.training --args_file examples/quickstart_head/prism.args \
    --dataset "$folder/data/text.txt" --base_model "$folder/mdm" --output_dir "$folder/head" "$@"
