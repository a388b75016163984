"""Sample from LLaDA-8B, Dream-7B or MDLM-OWT, with training-free remasking, or with a head where there is one.

    python examples/language_models.py llada --prompt "Write a haiku about the sea."
    python examples/language_models.py dream --device cuda --dtype bfloat16
    python examples/language_models.py mdlm --num-samples 2
    python examples/language_models.py llada --quality-head you/llada-8b-prism

The settings are those that the authors of each model recommend, except that the share of steps given remasks tokens.
`--model` takes another checkpoint of the same family, or a local folder.
"""

from __future__ import annotations

import argparse

import torch

from prism_pipelines import PrismPipeline, SelfConfidenceScheduler

# What a user of each model would pass. Sources: the generation defaults of the authors' own scripts and cards.
MODELS = {
    "llada": {
        "model": "GSAI-ML/LLaDA-8B-Instruct",
        "call": {"gen_length": 128, "block_length": 32, "num_inference_steps": 128},
        "scheduler": {"order": "confidence", "temperature": 0.0},
        "ends": ["<|endoftext|>", "<|eot_id|>"],
    },
    "dream": {
        "model": "Dream-org/Dream-v0-Instruct-7B",
        "call": {"gen_length": 256, "num_inference_steps": 256},
        "scheduler": {"order": "entropy", "temperature": 0.2, "top_p": 0.95},
        "ends": ["<|endoftext|>", "<|im_end|>"],
    },
    "mdlm": {
        "model": "kuleshov-group/mdlm-owt",
        "call": {"gen_length": 1024, "num_inference_steps": 256},
        "scheduler": {"order": "random", "temperature": 1.0, "top_p": 0.9},
        "ends": [],  # no chat model: samples of web text, as long as they are asked to be
    },
}


def main(argv: list[str] | None = None) -> list[str]:
    """Load, generate, print and return the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(MODELS))
    parser.add_argument("--model", help="Hub id or folder, in place of the family's own")
    parser.add_argument("--quality-head", help="Hub id or folder of a head; default: training-free remasking")
    parser.add_argument("--prompt", default="Explain in two sentences why the sky is blue.")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--num-remask", type=int, default=1, help="tokens remasked a step (default: %(default)s)")
    parser.add_argument("--gen-length", type=int)
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    known = MODELS[args.family]
    scheduler = None  # a head brings its own
    if args.quality_head is None:
        scheduler = SelfConfidenceScheduler(**known["scheduler"], num_remask=args.num_remask)
    pipe = PrismPipeline.from_pretrained(
        args.model or known["model"],
        quality_head=args.quality_head,
        scheduler=scheduler,
        torch_dtype=getattr(torch, args.dtype),
    ).to(args.device)

    call = dict(known["call"])
    for name in ("gen_length", "num_inference_steps"):
        if getattr(args, name) is not None:
            call[name] = getattr(args, name)
    if known["ends"]:
        call["messages"] = [{"role": "user", "content": args.prompt}]
        # An answer ends with the token that closes a turn of the chat; the tokenizers name only the other one.
        vocabulary = pipe.tokenizer.get_vocab()
        call["eos_token_id"] = [vocabulary[token] for token in known["ends"] if token in vocabulary]
        call["eos_early_stop"] = True
    generator = torch.Generator().manual_seed(args.seed)
    out = pipe(**call, num_samples=args.num_samples, generator=generator, return_quality=pipe.quality_head is not None)
    for text in out.texts:
        print(text)
    print(f"[{out.nfe} forward passes]")
    return out.texts


if __name__ == "__main__":
    main()
