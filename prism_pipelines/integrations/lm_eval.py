"""Model class `prism` of lm-eval (EleutherAI's lm-evaluation-harness): its tasks on a `PrismPipeline`.

`python -m prism_pipelines.integrations.lm_eval run --model prism --model_args pretrained=...,gen_length=... --tasks
gsm8k` is `lm_eval` with the class registered; in Python importing this module registers it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError('The model class of lm-eval needs it: pip install "prism-pipelines[eval]".') from error

from ..generation.batch import check_steps
from ..generation.running import plan_batches
from ..models.checks import max_length
from ..pipeline_checks import check_optional_counts
from ..pipeline_prism import PrismPipeline
from ..sampling.encoding import prompt_ids
from ..sampling.likelihood import METHODS, is_greedy, scored_canvas
from ..schedulers.by_name import change_scheduler
from ..schedulers.validation import is_int, require

# What a task may ask for besides `until`. Everything else is refused.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *LENGTHS}


@register_model("prism")
class PrismLM(LM):
    """A pipeline that answers the requests of lm-eval: `generate_until`, `loglikelihood`, `loglikelihood_rolling`.

    Args:
        pretrained: folder or Hub id of a pipeline, a model, or a head.
        quality_head: folder or Hub id of a head for it.
        gen_length: tokens to generate for every request; None for what the task asks for, else 256.
        block_length: as in the pipeline's call. The default is 32, or `gen_length` if that is less; for block-causal
            models it is None.
        num_inference_steps: forward passes of a request; None for one per generated token.
        temperature: None for the temperature of the task, which is 0 unless the task samples.
        eos_token_id: id of the end token, for a tokenizer that has none; most tasks need one.
        scheduler, scheduler_config: class name and fields as a dict or JSON, see
            `schedulers.by_name.change_scheduler`.
        batch_size: requests in a forward pass.
        device: None for the GPU if there is one, else the CPU. lm-eval's default, "cuda:0", means the same.
        max_batch_size: lm-eval passes it along with `batch_size`; not used.
        dtype: float32, bfloat16 or float16.
        seed: each request has its own generator, seeded by this, its prompt, and the number of earlier requests with
            that prompt.
        likelihood: "bound" or "pseudo", as `method` of `PrismPipeline.log_likelihood`.
        num_samples: forward passes of a request of a likelihood task with "bound".
        check_greedy: likelihood tasks also ask whether the model would write the answer itself (LAMBADA's accuracy).
            That costs up to one forward pass per token of the answer. False answers "no" without a forward pass.
        revision, trust_remote_code: as in `PrismPipeline.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: str,
        quality_head: str | None = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        eos_token_id: int | None = None,
        scheduler: str | None = None,
        scheduler_config: str | dict | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        likelihood: str = "bound",
        num_samples: int = 128,
        check_greedy: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        require(dtype in ("float32", "bfloat16", "float16"), "dtype", dtype, "float32, bfloat16 or float16")
        count = "an integer of at least 1"
        require(str(batch_size).isdecimal() and int(batch_size) >= 1, "batch_size", batch_size, count)
        check_optional_counts(gen_length=gen_length, num_inference_steps=num_inference_steps)
        require(likelihood in METHODS, "likelihood", likelihood, f"one of {METHODS}")
        require(is_int(num_samples, 1), "num_samples", num_samples, count)
        self.likelihood, self.num_samples, self.check_greedy = likelihood, num_samples, check_greedy
        self._device = usable_device(device)
        self.pipe = PrismPipeline.from_pretrained(
            pretrained,
            quality_head=quality_head,
            dtype=getattr(torch, dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
        ).to(self._device)
        self.pipe.set_progress_bar_config(disable=True)
        if self.pipe.tokenizer is None:
            raise ValueError(f"{pretrained!r} has no tokenizer, so it cannot read the prompts of lm-eval.")
        if scheduler is not None or scheduler_config is not None:
            self.pipe.scheduler = change_scheduler(self.pipe.scheduler, scheduler, scheduler_config)
        self.gen_length, self.block_length, self.num_inference_steps = gen_length, block_length, num_inference_steps
        self.temperature, self.batch_size, self.seed = temperature, int(batch_size), seed
        self.eos_token_id = eos_token_id

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request, cut at the first of its `until` strings.

        Prompts are continued unchanged, because lm-eval applies the chat template itself (--apply_chat_template).
        Requests with the same settings share batches, sorted by length.

        Raises:
            ValueError: a prompt that does not fit with the tokens to generate (nothing is cut off), or a setting of the
                task that cannot be honoured.
        """
        from tqdm import tqdm

        texts = [request.args[0] for request in requests]
        calls = [self._call(request.args[1]) for request in requests]
        lengths = [len(ids) for ids in prompt_ids(texts, self.pipe.tokenizer)]
        limit, closing = max_length(self.pipe.model.config), len(self.pipe.text_frame.closing)
        for length, call in zip(lengths, calls, strict=True):
            if not length:
                raise ValueError("A request of the task has an empty prompt, and there is nothing to continue.")
            if limit is not None and length + call["gen_length"] + closing > limit:
                raise ValueError(
                    f"A prompt has {length} tokens and {call['gen_length']} are to be generated; the model takes "
                    f"{limit}. Use fewer shots (--num_fewshot) or a smaller gen_length; prompts are not cut."
                )
            steps = call["num_inference_steps"]
            check_steps(self.pipe, ["a prompt"], [length], call["gen_length"], call["block_length"], steps)
        groups = [json.dumps(call, sort_keys=True) for call in calls]
        if self.pipe.spec.attention == "block_causal" or self.pipe.tokenizer.pad_token_id is None:
            groups = [f"{length} {group}" for length, group in zip(lengths, groups, strict=True)]
        # A task may ask for several answers to one prompt (`repeats`): each needs noise of its own.
        seen: Counter[str] = Counter()
        seeds = []
        for text in texts:
            seeds.append(self._seed(text, seen[text]))
            seen[text] += 1
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for batch in plan_batches(lengths, self.batch_size, groups):
                generators = [torch.Generator().manual_seed(seeds[i]) for i in batch]
                out: Any = self.pipe(
                    [texts[i] for i in batch], use_chat_template=False, generator=generators, **calls[batch[0]]
                )
                for i, text in zip(batch, out.texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return answers

    def _call(self, asked: dict) -> dict:
        """Arguments of the pipeline for the settings that a task asks for."""
        if asked.get("num_beams") == 1:  # asks for nothing
            asked = {name: value for name, value in asked.items() if name != "num_beams"}
        if unknown := sorted(set(asked) - KNOWN):
            raise ValueError(f"The task asks for {unknown[0]!r} in its generation_kwargs; known: {sorted(KNOWN)}.")
        wanted = next((asked[name] for name in LENGTHS if asked.get(name) is not None), 256)
        gen_length = self.gen_length or int(wanted)
        block_length = self.block_length
        if block_length is None and self.pipe.spec.attention != "block_causal":
            block_length = min(32, gen_length)
        temperature = self.temperature
        if temperature is None:
            temperature = float(asked.get("temperature") or 0.0) if asked.get("do_sample", True) else 0.0
        until = asked.get("until") or []
        call = {
            "gen_length": gen_length,
            "block_length": block_length,
            "num_inference_steps": self.num_inference_steps or gen_length,
            "temperature": temperature,
            "eos_token_id": self.eos_token_id,
            "stop": [until] if isinstance(until, str) else [text for text in until if text],
        }
        return call | {name: asked[name] for name in ("top_p", "top_k") if asked.get(name) is not None}

    def _seed(self, text: str, repeat: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed} {repeat} {text}".encode()).digest()[:4], "big")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): an estimate of log p(continuation | context), and whether it is greedy.

        With "bound", a request costs `num_samples` forward passes, but only one if the continuation is a single token
        (the letter of a multiple-choice answer).

        Raises:
            ValueError: a request that does not fit into the model (nothing is cut off), or an empty continuation.
        """
        from tqdm import tqdm

        pairs = [request.args for request in requests]
        lengths = [len(ids) for ids in prompt_ids([context + answer for context, answer in pairs], self.pipe.tokenizer)]
        answers, seeds = [(0.0, False)] * len(requests), []
        seen: Counter[tuple] = Counter()
        for pair in pairs:
            seeds.append(self._seed("\n".join(pair), seen[pair]))
            seen[pair] += 1
        order = sorted(range(len(pairs)), key=lambda i: lengths[i])
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                contexts, continuations = ([pairs[i][side] for i in batch] for side in (0, 1))
                found = self._log_likelihood(continuations, contexts, [seeds[i] for i in batch])
                greedy = self._is_greedy(continuations, contexts)
                for i, value, same in zip(batch, found, greedy, strict=True):
                    answers[i] = (value, same)
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, answers[i])
                bar.update(len(batch))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """An estimate of log p(text) for each text, at the cost of `loglikelihood`.

        A text that is longer than the model's maximum is cut into parts, which are scored independently.
        """
        from tqdm import tqdm

        limit, tokenizer = max_length(self.pipe.model.config), self.pipe.tokenizer
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            ids = tokenizer(text, add_special_tokens=False).input_ids
            size = len(ids) if limit is None else limit - len(tokenizer("").input_ids)
            parts = [ids[start : start + size] for start in range(0, len(ids), max(1, size))]
            texts = [text] if len(parts) == 1 else [tokenizer.decode(part) for part in parts]
            total = 0.0
            for number, part in enumerate(texts):
                total += self._log_likelihood([part], None, [self._seed(text, number)])[0]
            answers.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return answers

    def _log_likelihood(self, texts: list[str], prompts: list[str] | None, seeds: list[int]) -> list[float]:
        return self.pipe.log_likelihood(
            texts,
            prompt=prompts,
            method=self.likelihood,
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).log_likelihood.tolist()

    def _is_greedy(self, texts: list[str], prompts: list[str]) -> list[bool]:
        if not self.check_greedy:
            return [False] * len(texts)
        pipe = self.pipe
        canvas, scored = scored_canvas(
            texts, prompts, None, None, None, pipe.tokenizer, pipe.mask_token_id, pipe.text_frame
        )
        return is_greedy(pipe.denoiser, canvas.to(self._device), scored.to(self._device))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, by the tokenizer's template.

        Raises:
            ValueError: it has none.
        """
        if not self.pipe.tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template; run without --apply_chat_template.")
        return self.pipe.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for the record of lm-eval."""
        return self.pipe.tokenizer.chat_template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the request cache of lm-eval."""
        return self.pipe.tokenizer.name_or_path.replace("/", "__")


def usable_device(name: str | None) -> torch.device:
    """The device `name`. Without a GPU it is the CPU, with a warning, since lm-eval asks for cuda:0 by default."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        warnings.warn(f"There is no GPU for device={name!r}, lm-eval's default: the CPU is used.", stacklevel=3)
        return torch.device("cpu")
    return device


def main() -> None:
    """`lm_eval`, with `prism` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.modules["prism_pipelines.integrations.lm_eval"] = sys.modules[
        "__main__"
    ]  # or an import would register it twice
    main()
