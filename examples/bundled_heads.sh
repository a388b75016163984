#!/usr/bin/env bash
# The heads that know the run, for both bundled models as they are: train, then copy into the package.
# Three quarters of an hour of one core. Run again after an interruption and it goes on where it stopped.
# Environment: BIN, folder of the environment's commands (.venv/bin); RUNS, folder of the runs (runs).
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin} RUNS=${RUNS:-runs} B=prism_pipelines/bundled
more=()
if ! "$BIN/python" -c "import torch; raise SystemExit(not torch.cuda.is_available())" &&
  ! "$BIN/python" -c "import prism_pipelines.models.precision as p; raise SystemExit(p.bfloat16_is_emulated())"; then
  more+=(--dtype float32)  # not every CPU is fast in bfloat16
fi
run() {
  "$BIN/python" -m prism_pipelines.training --resume-from-checkpoint latest --disable-tqdm true "$@" "${more[@]}"
}
run --args-file examples/sudoku/rollouts.args --base-model $B/sudoku --head-from $B/sudoku --output-dir "$RUNS/sudoku-head"
run --args-file examples/text/distill.args --base-model $B/text --head-from $B/text --output-dir "$RUNS/text-head"
"$BIN/python" examples/ship_head.py "$RUNS/sudoku-head" sudoku
"$BIN/python" examples/ship_head.py "$RUNS/text-head" text
