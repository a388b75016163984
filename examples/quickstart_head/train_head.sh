#!/usr/bin/env bash
# A tiny BERT that fills masks, a quality head for it, and both on a Hub: about two minutes on two cores.
#     bash examples/quickstart_head/train_head.sh [folder] [further flags for both trainings]
# The Hub is a small server on this machine. With HF_ENDPOINT set (https://huggingface.co, after `hf auth login`) it is
# that one, and ME your name there. Run again after an interruption and it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs/quickstart}
shift || true
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python} || python=${PYTHON:-python}
me=${ME:-me}
if [ -z "${HF_ENDPOINT:-}" ]; then
  port=${PORT:-8750}
  rm -rf "$folder/hf_home"  # that Hub begins anew each time, and what was loaded from the last one is not its
  "$python" examples/local_hub.py "$port" &
  trap "kill $!" EXIT
  export HF_ENDPOINT=http://127.0.0.1:$port HF_HOME=$folder/hf_home HF_TOKEN=hf_of_this_machine HF_HUB_DISABLE_XET=1
fi
"$python" examples/quickstart_head/prepare.py "$folder/data"

train() {
  "$python" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    -m prism_pipelines.training --dataset "$folder/data/text.txt" --resume-from-checkpoint latest --push-to-hub "$@"
}
# 1. A masked diffusion model, from nothing.
train --args-file examples/quickstart_head/pretrain.args --tokenizer "$folder/data/tokenizer" \
  --output-dir "$folder/mdm" --hub-model-id "$me/counting-mdm" "$@"

# 2. A quality head on it, with a LoRA adapter.
train --args-file examples/quickstart_head/prism.args --base-model "$me/counting-mdm" \
  --output-dir "$folder/head" --hub-model-id "$me/counting-mdm-prism" "$@"

# 3. Anybody generates with it, by its name.
"$python" examples/quickstart_head/generate.py "$me/counting-mdm-prism"
