"""What do PRISM's choices matter, on the text model: k, lambda, the kind of head, the window and schedule of remasking?

Training choices: short fine-tunes of `--steps` steps from the same pretrained model and seed, each differing from the
recipe (examples/text/prism.args) in one choice; none is as long as the shipped run, so they are compared with each
other and with the first of them without remasking, not with the shipped model. Sampling choices: the shipped model, one
setting changed. All write `--num-samples` texts of 256 bytes at temperature 1, PRISM at the shipped eta; measures as in
benchmarks/text.py. For the fine-tunes also: AUROC of the head and its mean error (Brier) on 16 tokens planted in
held-out text, and the held-out loss of the backbone.

A run that is there is resumed or not repeated, a finished cell is not measured again. `--sampling-only` leaves the
part about fine-tunes in the table as it is.
The last line of stdout is one JSON object.
Usage: python -m benchmarks.ablations --base runs/text-mdm [--data runs/text-data] [--max-steps 100] [--sampling-only]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.shared import ROOT, files_fingerprint, give, origin
from benchmarks.text import JUDGE_ORDER, LENGTH, VALIDATION, batch_size, data_hash, load, works
from prism_pipelines import bundled
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import (
    evaluate_calibration,
    ngram_judge,
    pipeline_fingerprint,
    run_comparison,
    text_plan,
    text_task,
)
from prism_pipelines.models.precision import bfloat16_is_emulated

TABLE = ROOT / "docs" / "figures" / "ablations.json"
# name: flags that differ from the recipe
TRAINING = {
    "recipe (k 16, lambda 1, block)": [],
    "k 1": ["--num-revealed", "1"],
    "k 4": ["--num-revealed", "4"],
    "lambda 0": ["--lambda-mdm", "0"],
    "lambda 5": ["--lambda-mdm", "5"],
    "linear head": ["--head", "linear"],
    "mlp head": ["--head", "mlp"],
    "head alone": ["--full", "false", "--freeze-backbone", "true", "--optimizer", "adamw"],
}
CALIBRATED_ON = 256  # stretches of held-out text
# name: fields that differ from the shipped arm; of a window both ends, whatever the shipped one is
SAMPLING = {
    "shipped": {},
    "whole run": {"remask_start": 0.0, "remask_end": 1.0},
    "first half": {"remask_start": 0.0, "remask_end": 0.5},
    "second half": {"remask_start": 0.5, "remask_end": 1.0},
    "inverse eta, T_ref 32": {"eta_schedule": "inverse", "eta_reference_steps": 32},
    "loop of 4": {"loop_steps": 4, "loop_num_remask": LENGTH // 8},
    "loop of 8": {"loop_steps": 8, "loop_num_remask": LENGTH // 8},
    "loop of 8, half": {"loop_steps": 8, "loop_num_remask": LENGTH // 2},
}


def run_folder(runs: Path, name: str, flags: list[str], base: Path, data: Path, steps: int) -> Path:
    """Folder of a fine-tune; another one for other flags, steps, data or weights to start from."""
    made_from = files_fingerprint(base, {"flags": flags, "data": data_hash(data)})
    return runs / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}_{steps}_{made_from}"


def fine_tune(base: Path, data: Path, folder: Path, flags: list[str], steps: int) -> None:
    """One short run of the recipe with other flags; goes on where it stopped."""
    if (folder / "README.md").exists():  # the card: a run writes it last
        return
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["--num_cpu_threads_per_process", str(torch.get_num_threads()), "-m", "prism_pipelines.training"]
    words += ["--args-file", str(ROOT / "examples/text/prism.args"), "--resume-from-checkpoint", "latest"]
    words += ["--dataset", str(data / "train.jsonl"), "--eval-dataset", str(data / "heldout.jsonl")]
    words += ["--base-model", str(base), "--output-dir", str(folder), "--max-steps", str(steps)]
    words += ["--eval-strategy", "steps", "--eval-steps", str(steps), *flags]
    words += ["--bf16", "false"] if not torch.cuda.is_available() and bfloat16_is_emulated() else []
    print(" ".join(flags), file=sys.stderr)
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr[-2000:]}\n{' '.join(words)}: exit status {done.returncode}")


def head_and_backbone(pipe, folder: Path, sequences) -> dict:
    """AUROC and Brier score of the head, and the backbone's last held-out loss."""
    found = evaluate_calibration(pipe, sequences, num_revealed=16)["pooled"]["head"]
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    losses = [row["eval_loss_mdm"] for row in log if "eval_loss_mdm" in row]
    kept = {name: found[name] for name in ("auroc", "auroc_interval", "brier", "brier_interval")}
    return kept | {"eval_loss_mdm": losses[-1]}


def compare(pipe, task, arms, args, forwards, mark, models=None) -> dict:
    """`run_comparison` with what is the same for both tables."""
    found = run_comparison(
        pipe,
        task,
        arms,
        forwards,
        list(range(args.seeds)),
        out_dir=args.cells,
        task_name=mark,
        quality="ngram_js",
        higher_is_better=False,
        models=models,
    )
    return {name: found[name] for name in ("arms", "seeds", "rows", "pairs")}


def main(argv=None) -> int:
    """Train and measure what is missing, then write the table. Returns exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="run folder of the pretrained model; needed for the fine-tunes")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "text-data", help="folder of prepare.py")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations", help="where the fine-tunes go")
    parser.add_argument("--cells", type=Path, default=ROOT / "runs" / "ablation_cells", help="finished cells")
    parser.add_argument("--max-steps", type=int, default=100, help="of each fine-tune (default: %(default)s)")
    parser.add_argument("--forwards", type=int, nargs="+", default=[16, 32, 64], help="of the sampling choices")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the models, to measure")
    parser.add_argument("--device", default="cpu", help="where the models write; fine-tunes take a GPU if there is one")
    parser.add_argument("--batch-size", type=int, default=16, help="texts a step of a fine-tune (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--sampling-only", action="store_true", help="leave the fine-tunes out")
    args = parser.parse_args(argv)
    if args.base is None and not args.sampling_only:
        parser.error("the fine-tunes need --base, the pretrained model; or pass --sampling-only")

    model = Path(bundled("text"))
    pipe = load(model, args.dtype, args.device)
    test = [text for title, text in works(args.data / "heldout.jsonl").items() if title != VALIDATION]
    judge = ngram_judge(list(works(args.data / "train.jsonl").values()), pipe.tokenizer, n=JUDGE_ORDER)
    vocabulary = set((model / "words.txt").read_text().split())
    more = {"vocabulary": vocabulary, "judge": judge, "batch_size": batch_size(args.device)}
    task = text_task(test, num_samples=args.num_samples, gen_length=LENGTH, **more)
    shipped = next(arm for arm in text_plan(model)["arms"] if arm["name"] == "PRISM")
    settings = {"num_samples": args.num_samples, "length": LENGTH, "dtype": args.dtype, "eta": shipped["eta"]}
    settings["data"] = data_hash(args.data, model / "words.txt")
    result = {"settings": settings, **origin(args.device)}
    if not args.sampling_only:
        ids = pipe.tokenizer("".join(test), add_special_tokens=False).input_ids
        sequences = torch.tensor(ids[: CALIBRATED_ON * LENGTH]).view(-1, LENGTH)
        models, heads, arms = {}, {}, []
        for name in args.variants:
            flags = [*TRAINING[name], "--per-device-train-batch-size", str(args.batch_size)]
            folder = run_folder(args.runs, name, flags, args.base, args.data, args.max_steps)
            fine_tune(args.base, args.data, folder, flags, args.max_steps)
            tuned = load(folder, args.dtype, args.device)
            mark = f"{name} {pipeline_fingerprint(tuned)}"
            models[mark] = tuned
            heads[name] = head_and_backbone(tuned, folder, sequences)
            arms.append({**shipped, "name": name, "model": mark})
            print(json.dumps({name: heads[name]}), file=sys.stderr)
        plain = {"scheduler": "MDLMScheduler", "order": "random"}
        arms.append({**plain, "name": f"{args.variants[0]}, no remasking", "model": arms[0]["model"]})
        result["training"] = compare(pipe, task, arms, args, [32], f"training {settings}", models)
        made = {"heads": heads, "steps": args.max_steps, "batch": args.batch_size, "base": args.base.name}
        result["training"] |= made
        result["training"]["commit"] = result["commit"]
    elif "training" in (known := json.loads(TABLE.read_text()) if TABLE.exists() else {}):
        result["training"] = {"commit": known["commit"], **known["training"]}
    arms = [{**shipped, **fields, "name": name} for name, fields in SAMPLING.items()]
    mark = f"sampling {files_fingerprint(model, settings)}"
    result["sampling"] = compare(pipe, task, arms, args, args.forwards, mark)
    return give(result, TABLE)


if __name__ == "__main__":
    sys.exit(main())
