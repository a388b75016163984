#!/usr/bin/env bash
# From the wheel of AntiBERTy on PyPI to a table of decoding rules: convert, verify, sample, train a head, compare.
#   bash examples/antibody/run.sh [FOLDER]      (default: runs/antibody; a quarter of an hour on two idle cores)
# Needs: pip install -e ".[train]". Weights stay in FOLDER; they are MIT-licensed, and not part of this repository.
# After the first step nothing is downloaded. Give the same command again to go on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs/antibody}
python=${PYTHON:-python}
prism() { "$python" -m prism_pipelines "$@"; }
mkdir -p "$folder"

# 1. The wheel holds the weights (pickled) and a vocabulary of one token a residue. Nothing of it is imported or run.
if [ ! -d "$folder/model" ]; then
  "$python" -m pip download --quiet --no-deps --dest "$folder/wheel" antiberty==0.1.3
  "$python" -m zipfile -e "$folder"/wheel/antiberty-0.1.3-*.whl "$folder/unpacked"
  weights=$folder/unpacked/antiberty/trained_models
  prism convert "$weights/AntiBERTy_md_smooth" "$folder/model" --vocab "$weights/vocab.txt" \
    --text EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK
fi

# 2. Does the converted model know antibodies? Framework residues, 15 % masked, of published heavy chains.
[ -f "$folder/verified.json" ] || {
  "$python" -m benchmarks.antibodies verify "$folder/model" examples/antibody/therapeutic.fasta --dtype bfloat16 \
    | tail -n 1 > "$folder/verified.json.part"
  mv "$folder/verified.json.part" "$folder/verified.json"
}

# 3. Heavy chains sampled from the model itself, split so that train and test share no CDR-H3. To use your own data, write
#    $folder/data/train.fasta and test.fasta before this step.
[ -f "$folder/data/test.fasta" ] ||
  "$python" -m benchmarks.antibodies sample "$folder/model" "$folder/data" --dtype bfloat16 --batch-size 16 > /dev/null

# 4. A small quality head with context, in minutes: is a residue that a run has written that of the chain it began from?
#    More chains and more HEAD_STEPS make a better one.
[ -f "$folder/head/quality_head/config.json" ] || {
  grep -v '>' "$folder/data/train.fasta" > "$folder/data/train.txt"
  "$python" -m prism_pipelines.training --args-file examples/antibody/rollouts.args --base-model "$folder/model" \
    --dataset "$folder/data/train.txt" --output-dir "$folder/head" --max-steps "${HEAD_STEPS:-130}"
}

# 5. What people do with it: fill every loop, and colour the doubtful residues of known antibodies.
prism infill "$folder/model" examples/antibody/therapeutic.fasta --out "$folder/filled.fasta" --positions 50-55 \
  --dtype bfloat16
prism score "$folder/model" examples/antibody/therapeutic.fasta --out "$folder/scores.jsonl" --html "$folder/scores.html" \
  --dtype bfloat16

# 6. The table.
"$python" -m benchmarks.proteins "$folder/model" examples/antibody/therapeutic.fasta "$folder/data/test.fasta" --quick \
  --dtype bfloat16 --quality-head rollouts="$folder/head" --cells "$folder/cells.jsonl" --table "$folder/proteins.json" > /dev/null
cat "$folder/proteins.md"
