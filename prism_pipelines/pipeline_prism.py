"""PrismPipeline: prompt or infill -> canvas of masks -> the sampling loop -> decoded output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .hub import adapters, backbones, heads
from .hub.source import resolve_source
from .models import checks
from .models.denoiser import MaskedDenoiser
from .models.families import MDMSpec, resolve_spec
from .models.quality_head import QualityHead
from .pipeline_checks import (
    callback_inputs,
    check_canvas,
    check_count,
    check_optional_counts,
    check_scheduler_and_head,
    check_settings,
)
from .pipeline_heads import QualityHeadMixin
from .pipeline_output import LikelihoodOutput, PrismPipelineOutput, output_of
from .sampling.canvas import Canvas, canvas_of, canvas_of_infill, changed_sample, given_positions
from .sampling.encoding import Frame, chat_prompt, text_frame
from .sampling.kv_cache import check_cache
from .sampling.likelihood import METHODS, estimate, scored_canvas
from .sampling.loop import (
    SamplingContext,
    blocks_of,
    fill_canvas,
    judged_quality,
    look_again,
    memory_errors,
    nan_errors,
    no_nan,
    scheduler_of,
    warn_of_idle_steps,
)
from .sampling.recorder import context_of_text, own_log_probs
from .sampling.stopping import (
    default_suppress_tokens,
    end_tokens,
    endings_of,
    no_content,
    refuse_allowed,
    token_ids,
)
from .sampling.trace import Trace
from .schedulers import MDLMScheduler, PrismScheduler
from .schedulers.protocol import Scheduler
from .schedulers.validation import loop_steps

SCORES = ("head", "own", "leave_one_out")  # what `score` judges by


class PrismPipeline(QualityHeadMixin, DiffusionPipeline):
    """Sampling from a masked diffusion model that may revise its own tokens.

    Args:
        model: transformers masked language model with an output head. A `PeftModel` is unwrapped, and keeps its LoRA.
        tokenizer: the model's tokenizer; without one, ids go in and ids come out.
        quality_head: `QualityHead` for remasking by PRISM, or None.
        scheduler: decoding rule; default `PrismScheduler()` with a head, `MDLMScheduler()` without.
        mdm_spec: `MDMSpec` or its dict; the default is found by `resolve_spec`.
    Raises:
        ValueError: no mask token is known, the head does not fit the model, or the model is causal.
        TypeError: `quality_head` is no `QualityHead`, or `scheduler` is none of this package.
    """

    _optional_components = ["tokenizer", "quality_head", "scheduler"]  # noqa: RUF012  diffusers reads the list
    _callback_tensor_inputs = ["sample", "quality", "remasked", "unmasked", "generation_mask"]  # noqa: RUF012

    def __init__(
        self,
        model: Any,  # not a protocol: diffusers compares what it loads with these hints by `isinstance`
        tokenizer: Any = None,
        quality_head: QualityHead | None = None,
        scheduler: Any = None,
        mdm_spec: MDMSpec | dict | None = None,
    ) -> None:
        super().__init__()
        model = adapters.model_of(model)
        spec = resolve_spec(model.config, tokenizer, mdm_spec=mdm_spec)
        if scheduler is None:
            scheduler = MDLMScheduler() if quality_head is None else PrismScheduler()
        heads.check_scheduler(scheduler)
        heads.check_head(quality_head, model)
        self.register_modules(model=model, tokenizer=tokenizer, quality_head=quality_head, scheduler=scheduler)
        self.register_to_config(mdm_spec=spec.to_dict())
        model.eval()
        if spec.mask_format == "padding" and checks.is_causal_class(model):
            checks.check_attention(self.denoiser, type(model).__name__)

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self.config.mdm_spec["mask_token_id"]

    @property
    def denoiser(self) -> MaskedDenoiser:
        """The model as a `MaskedDenoiser`. Each access makes a new one, so that it is on the model's present device."""
        ends = end_tokens(None, self.tokenizer, self.model, self.spec)
        return self._denoiser_without(default_suppress_tokens(self.tokenizer, ends))

    def _denoiser_without(self, suppressed: tuple[int, ...]) -> MaskedDenoiser:
        """The denoiser, which never predicts some ids."""
        num_tokens = None if self.tokenizer is None else len(self.tokenizer)
        return MaskedDenoiser(self.model, self.spec, num_tokens=num_tokens, suppress_tokens=suppressed)

    @property
    def spec(self) -> MDMSpec:
        """Facts about the model."""
        return resolve_spec(self.model.config, self.tokenizer, mdm_spec=self.config.mdm_spec)

    @property
    def text_frame(self) -> Frame:
        """Special tokens around every text of an encoder, `Frame(opening, closing)`; empty for language models."""
        return text_frame(self.tokenizer, self.spec)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError: the output head is read after the model has run, and would be on the CPU by then."""
        raise ValueError(
            "Model CPU offload would move the output head away before it is read. Load with "
            'PrismPipeline.from_pretrained(..., device_map="auto") in its place.'
        )

    # --- generation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        messages: list | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        infill: str | list[str] | Tensor | None = None,
        num_samples: int = 1,
        use_chat_template: bool = True,
        chat_template_kwargs: dict | None = None,
        continue_final_message: bool = False,
        gen_length: int | None = None,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        cfg_scale: float | None = None,
        eos_token_id: int | list[int] | None = None,
        eos_early_stop: bool = False,
        suppress_tokens: int | list[int] | None = None,
        allow_tokens: int | list[int] | None = None,
        logits_processor: Callable | None = None,
        stop: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        return_quality: bool = False,
        return_probs: bool = False,
        return_trace: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        threshold: float | None = None,
        cache: str = "none",
        cache_refresh_interval: int | None = None,
        select: str | None = None,
    ) -> PrismPipelineOutput | tuple:
        """Generate: continue a prompt, fill in masks, or sample from nothing.

        Args:
            prompt: text or texts to continue by `gen_length` tokens.
                A tokenizer with a chat template puts it into one, as the user's message.
            messages: a chat, or a list of chats, put through the tokenizer's chat template and continued.
            input_ids: prompt ids, int64 (B, P), in place of `prompt`; a mask token in it is kept as it is.
            attention_mask: 1 for tokens and 0 for padding, (B, P), with `input_ids`.
            infill: text, texts or ids (B, L) holding mask tokens. They are filled, everything else is kept exactly.
            num_samples: samples of each row, next to each other; without a prompt, the number of rows.
            use_chat_template: False continues `prompt` as plain text.
            chat_template_kwargs: further arguments of the template, such as {"enable_thinking": False} of Qwen3.
            continue_final_message: the last of `messages` is the assistant's, and is the beginning of the answer
                (prefill). `texts` hold what follows it.
            gen_length: number of tokens to generate; required except for `infill`. The special tokens around an
                encoder's texts ([CLS], [SEP]) are given and do not count. None are put around `input_ids`.
            block_length: generate blocks of this many tokens from left to right. None for one block, or for the block
                length of a block-causal model. With such a model blocks begin at multiples of `block_length`, which
                must be a multiple or a divisor of the model's.
            num_inference_steps: steps of the whole run, spread evenly over the blocks; the first blocks get the
                remainder. Default: one per generated token of the longest row, at most 64, and at least one per block.
            temperature, top_p, top_k: of sampling; None for the scheduler's.
            cfg_scale: classifier-free guidance, see `GuidedLogits`. Each step makes a second forward pass, counted in
                `nfe`, in which everything that is not generated is masked. None or 0 for no guidance.
            eos_token_id: ids that end a text; None for those of the tokenizer and the generation config.
            eos_early_stop: after each block, finish rows that have an end token and no mask before it: the rest of the
                row is filled with the first end token, and the row makes no further forward pass. False generates
                all tokens. In both cases `texts` end before the first end token, except for `infill`.
            suppress_tokens: ids that are never written. Name the end tokens here for texts of full length.
            allow_tokens: ids that may be written although sampling suppresses them by default: special and reserved
                tokens, and those that the family names (X of ESM). End tokens of language models may always be written,
                those of an encoder if they are in `eos_token_id`.
            logits_processor: called as `logits_processor(positions, logits)` with the logits (N, V) that a step reads
                and their `Positions(row, column, sample)`; returns the logits to use. It cannot allow suppressed
                tokens. For grammars and alphabets, see docs/pipeline.md.
            stop: strings that finish a row, as end tokens do with `eos_early_stop`; `texts` end before the first one.
                Special tokens in them may be written.
            generator: one, or a list of one per row. With a list and `num_inference_steps`, a row's result does not
                depend on the other rows. (The default number of steps depends on the row with most masks.)
            output_type: "text", or "seq" for ids only.
            return_dict: False for a plain tuple.
            return_quality: also return the quality of the result; one more forward pass, counted in `nfe`.
            return_probs: also return the probability with which each token was drawn; no further forward pass.
            return_trace: also return a `Trace` of every step; `out.trace.to_html(path)` writes a page that plays it.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; may return
                {"sample": ids} to change the canvas. A block is final after its last timestep, and may have no masks
                before. Where a step computes no quality, `quality` is 0 or comes from an earlier step.
            callback_on_step_end_tensor_inputs: which of "sample", "quality", "remasked", "unmasked", "generation_mask"
                (the block's positions) the callback gets; None for all.
            threshold: in (0, 1]; each step also writes every token of a higher confidence, and at least one token. A
                row whose block is full makes no further forward pass, so `nfe` falls below `num_inference_steps`. Sets
                the scheduler's `use_threshold` for this call. None for the scheduler's config.
            cache: "none", "prefix" (keep keys and values of finished blocks) or "block" (of all but the current block),
                see `sampling/kv_cache.py`. For block-causal models both are the same and exact; for others they are an
                approximation.
            cache_refresh_interval: with a cache, steps of a block from one full forward pass to the next; 1 is exact.
                None for one at the start of each block.
            select: "confidence" returns only the sample of the highest confidence among the `num_samples` of each row;
                needs a calibrated head. Costs the pass of `return_quality`, unless the scheduler judges. `nfe` and
                the trace are those of all samples, `nfe_per_row` is the sum over them. None returns all samples.
        Returns:
            `PrismPipelineOutput`, or all its fields as a tuple, in their order.
        Raises:
            ValueError, TypeError: an argument is wrong; the error names it.
            torch.OutOfMemoryError: the error says which arguments to lower.
        """
        check_count("num_samples", num_samples)
        check_optional_counts(num_inference_steps=num_inference_steps, gen_length=gen_length, block_length=block_length)
        check_settings(self.model.config, gen_length, output_type, cfg_scale, logits_processor)
        check_scheduler_and_head(self, return_quality, select, num_samples)
        wanted = callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        endings = endings_of(eos_token_id, eos_early_stop, stop, self.tokenizer, self.model, self.spec)
        denoiser = self._denoiser_that_writes(endings.written, suppress_tokens, allow_tokens)
        check_cache(cache, cache_refresh_interval, denoiser, self.quality_head)
        scheduler = scheduler_of(self.scheduler, threshold)
        prompt = chat_prompt(
            prompt, messages, self.tokenizer, use_chat_template, chat_template_kwargs, continue_final_message
        )
        given = {"prompt": prompt, "input_ids": input_ids, "infill": infill}
        canvas = canvas_of(
            given, self.tokenizer, self.mask_token_id, attention_mask, num_samples, gen_length, self.text_frame
        ).to(self._execution_device)
        check_canvas(self.model.config, canvas, generator)

        trace = None
        if return_trace:
            shown = (canvas.sample, canvas.generated, self.mask_token_id, self.tokenizer, canvas.attention_mask)
            trace = Trace(*shown, prompted=infill is None, scheduler=type(scheduler).__name__)
        run = SamplingContext(
            denoiser,
            self.quality_head,
            scheduler,
            canvas,
            self.mask_token_id,
            {"temperature": temperature, "top_p": top_p, "top_k": top_k, "generator": generator},
            cfg_scale,
            cache,
            cache_refresh_interval,
            endings,
            self.tokenizer,
            logits_processor,
            records_draws=return_probs,
            trace=trace,
        )
        blocks = blocks_of(denoiser.spec, canvas, block_length, num_inference_steps)
        warn_of_idle_steps(run, blocks)
        with (
            memory_errors(*canvas.sample.shape),
            nan_errors(denoiser, canvas, self.quality_head),
            self.progress_bar(total=sum(steps + loop_steps(scheduler) for _, steps in blocks)) as bar,
        ):
            after_step = self._after_step(scheduler, callback_on_step_end, wanted, bar)
            state = fill_canvas(run, blocks, after_step)
            quality = judged_quality(run, state)
            looks_again = return_quality or (select is not None and quality is None)
            if looks_again:
                quality = look_again(run, state)
        self.maybe_free_model_hooks()
        best_of = None if select is None else num_samples
        output = output_of(run, state, quality, looks_again, return_quality, best_of, output_type)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    def _denoiser_that_writes(
        self,
        written: tuple[int, ...],
        suppress_tokens: int | list[int] | None,
        allow_tokens: int | list[int] | None,
    ) -> MaskedDenoiser:
        """The denoiser of one call, which may write the special tokens in `written` and `allow_tokens`."""
        vocab_size = self.model.config.vocab_size
        suppressed = token_ids("suppress_tokens", suppress_tokens, vocab_size)
        allowed = token_ids("allow_tokens", allow_tokens, vocab_size)
        refuse_allowed(allowed, suppressed, self.mask_token_id)
        return self._denoiser_without((*suppressed, *no_content(self.tokenizer, self.spec, (*written, *allowed))))

    def _after_step(self, scheduler: Scheduler, callback: Callable | None, wanted: list[str], bar: Any) -> Callable:
        """A function that the loop calls after each step: it calls the user's callback, and moves the progress bar."""
        shown_pipe = copy.copy(self)  # with the scheduler of this run; other runs may share the pipeline
        shown_pipe.__dict__["scheduler"] = scheduler
        numbers = count()

        def after_step(t: int | Tensor, tensors: dict) -> Tensor:
            sample, number = tensors["sample"], next(numbers)
            if callback is not None:
                shown = sample.clone()  # so that a change in place is noticed, and a cache is dropped
                given = {name: shown if name == "sample" else tensors[name] for name in wanted}
                changed = callback(shown_pipe, number, t, given)
                sample = changed_sample(changed, shown, sample, self.model.config.vocab_size)
            bar.update()
            return sample

        return after_step

    @torch.no_grad()
    def score(
        self,
        texts: str | list[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        given: str | list[str] | Tensor | None = None,
        by: str = "head",
    ) -> tuple[Tensor, Tensor, list[list[str]] | None]:
        """P(token is right) of every token of some text, without generation.

        For a head that reads a run context (`head.reads_context`), most of the context is unknown here: when each token
        was drawn, and with which probability. `given` adds what it can.

        Args:
            texts: a text or a list of texts.
            input_ids: int64 (B, L) in place of `texts`.
            attention_mask: 1 for tokens and 0 for padding, (B, L), with `input_ids`.
            given: the part of each text that was not generated: its beginning, as a string or a list of strings; or
                bool (B, L). A token that is only partly in the beginning does not count. Only heads with context read
                it. One that reads "prompt" or "first_hidden" then needs a second forward pass, in which all but the
                given part is masked. None if nothing is known.
            by: "head": the quality head. "own": the model's own probability of each token where it sees the token; one
                forward pass and no head, but good only if the model's training corrupts visible tokens (BERT, ESM).
                "leave_one_out": the probability of each token given all others; one forward pass for each token.
        Returns:
            quality, float32 (B, L) in [0, 1], 0 at masks and padding; the ids (B, L); the tokens as strings, or None
            without a tokenizer.
        Raises:
            ValueError: no quality head, none or both of `texts` and `input_ids`, or `given` does not fit.
            TypeError: `given` is neither strings nor bool.
        """
        if by not in SCORES:
            raise ValueError(f"`by` must be one of {', '.join(map(repr, SCORES))}, got {by!r}.")
        if self.quality_head is None and by == "head":
            raise ValueError(
                "`score` needs a quality head. Load one with pipe.load_quality_head(folder_or_repo), or pass "
                'by="own" or by="leave_one_out".'
            )
        if given is not None and by != "head":
            raise ValueError(f'`given` is read by heads with context; by="{by}" has no use for it.')
        self._check_adapter()
        if (texts is None) == (input_ids is None):
            raise ValueError("Pass either `texts` or `input_ids` to `score`.")
        source = texts if input_ids is None else input_ids
        canvas = canvas_of_infill(source, self.tokenizer, self.mask_token_id, attention_mask, needs_mask=False)
        canvas = canvas.to(self._execution_device)
        check_canvas(self.model.config, canvas, None)
        sample, mask = canvas.sample, canvas.attention_mask
        hidden_from = sample == self.mask_token_id
        if mask is not None:
            hidden_from = hidden_from | (mask == 0)
        with nan_errors(self.denoiser, canvas, self.quality_head):
            if by == "head":
                quality = no_nan(self._by_head(canvas, given, texts).masked_fill(hidden_from, 0.0))
            elif by == "own":
                quality = own_log_probs(self.denoiser, sample, mask, self.denoiser.hidden(sample, mask)).exp()
            else:
                found = estimate(self.denoiser, canvas, ~hidden_from, "pseudo").token_log_probs
                assert found is not None  # the pseudo-log-likelihood is made of them
                quality = found.exp().to(sample.device)
        quality = quality.masked_fill(hidden_from, 0.0)
        tokens = None
        if self.tokenizer is not None:
            tokens = [self.tokenizer.convert_ids_to_tokens(row) for row in sample.tolist()]
        return quality, sample, tokens

    def _by_head(self, canvas: Canvas, given: Any, texts: Any) -> Tensor:
        """What the quality head says of a canvas of `texts`, (B, L); `given` as `score` takes it."""
        sample, mask = canvas.sample, canvas.attention_mask
        hidden = self.denoiser.hidden(sample, mask)
        if not self.quality_head.reads_context:
            return self.quality_head.quality(hidden, mask)
        given = None if given is None else given_positions(given, texts, canvas, self.tokenizer)
        context = context_of_text(self.denoiser, self.quality_head, sample, mask, hidden, given)
        return self.quality_head.quality(hidden, mask, **self.quality_head.inputs(context, sample, self.mask_token_id))

    def log_likelihood(
        self,
        texts: str | list[str] | None = None,
        *,
        prompt: str | list[str] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        given: str | list[str] | Tensor | None = None,
        method: str = "bound",
        num_samples: int = 128,
        batch_size: int = 16,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> LikelihoodOutput:
        """The log-likelihood of some texts, see `sampling/likelihood.py` for the estimators and their cost.

        The likelihood is the model's own. Head, scheduler, temperature and `suppress_tokens` play no part, but tokens
        that are never predicted (the mask, padding) have probability 0. Special tokens around a text are given.

        Args:
            texts: a text or a list of texts.
            prompt: a text, or one for each of `texts`. Then the result is the likelihood of each text as the
                continuation of its prompt. No chat template is applied.
            input_ids: int64 (B, L) in place of `texts`.
            attention_mask: 1 for tokens and 0 for padding, (B, L), with `input_ids`.
            given: tokens that are not scored: the beginning of each text, or bool (B, L), as in `score`.
            method: "bound": a Monte Carlo estimate of a lower bound. "pseudo": the pseudo-log-likelihood, usual for
                encoders that never saw many masks at once (BERT, ESM-2).
            num_samples: for "bound", forward passes of each row (or of each block of a block-causal model).
            batch_size: rows of one forward pass.
            generator: as in a call of the pipeline.
        Returns:
            `LikelihoodOutput`.
        Raises:
            ValueError, TypeError: an argument is wrong; the error names it.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
        check_count("num_samples", num_samples)
        check_count("batch_size", batch_size)
        canvas, scored = scored_canvas(
            texts, prompt, input_ids, attention_mask, given, self.tokenizer, self.mask_token_id, self.text_frame
        )
        canvas, scored = canvas.to(self._execution_device), scored.to(self._execution_device)
        check_canvas(self.model.config, canvas, generator)
        with memory_errors(batch_size, canvas.sample.shape[1]):
            found = estimate(self.denoiser, canvas, scored, method, num_samples, batch_size, generator)
        num_tokens = scored.sum(-1).cpu()
        return LikelihoodOutput(
            log_likelihood=found.log_likelihood,
            standard_error=found.standard_error,
            num_tokens=num_tokens,
            perplexity=(-found.log_likelihood / num_tokens).exp(),
            nfe=found.nfe,
            nfe_per_row=found.nfe_per_row.tolist(),
            token_log_probs=found.token_log_probs,
        )

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]  # keywords by name, where diffusers takes any
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        quality_head: QualityHead | str | None = None,
        scheduler: Scheduler | None = None,
        tokenizer: Any = None,
        mdm_spec: MDMSpec | dict | None = None,
        mask_token_id: int | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> PrismPipeline:
        """A pipeline from a saved pipeline, a transformers model, or the repository of a head.

        The repository of a head names its base model, which is loaded too. It may hold recommended scheduler settings.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            quality_head: `QualityHead`, or a folder or Hub id that has one in `quality_head/`, with its LoRA adapter.
            scheduler, tokenizer: objects to use in place of the saved ones.
            mdm_spec, mask_token_id: override what is detected, see `resolve_spec`.
            torch_dtype, dtype: dtype of the model; two names for one argument. Default float32. The head stays float32.
            device_map, quantization_config, attn_implementation, max_memory, offload_folder: as transformers'
                `from_pretrained`, for the model. Models with an additive mask (LLaDA, Dream) run with
                attn_implementation "sdpa", the default, or "eager".
            revision: branch, tag or commit of `pretrained_model_name_or_path`.
            cache_dir, token, local_files_only: as in huggingface_hub.
            subfolder: folder of the model inside a plain model repository.
            trust_remote_code: run model code from the repository if transformers has no class for the model; default
                False.
        Raises:
            ValueError: the model is causal or has no known mask token, or the head was made for another model.
            OSError: not found, or no safetensors weights.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"`torch_dtype` and `dtype` name the same thing, got {torch_dtype} and {dtype}.")
        dtype = dtype or torch_dtype or torch.float32
        hub_kwargs = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        source = resolve_source(str(pretrained_model_name_or_path), subfolder, hub_kwargs, quality_head, mdm_spec)
        loaded = backbones.load_plain(
            source.path,
            source.subfolder,
            dtype,
            trust_remote_code,
            source.hub_kwargs,
            mdm_spec=source.mdm_spec,
            mask_token_id=mask_token_id,
            tokenizer=tokenizer,
            device_map=device_map,
            quantization_config=quantization_config,
            options={
                "attn_implementation": attn_implementation,
                "max_memory": max_memory,
                "offload_folder": offload_folder,
            },
        )
        parts = {"scheduler": scheduler, "tokenizer": tokenizer}
        parts = {name: part for name, part in parts.items() if part is not None}
        if source.index is None:
            pipe = cls(**(loaded | parts))
        else:
            parts |= {"model": loaded["model"], "mdm_spec": loaded["mdm_spec"]}
            if source.has_saved_head:
                parts["quality_head"] = heads.load_head(source.path, source.hub_kwargs)
            pipe = super().from_pretrained(source.path, use_safetensors=True, **source.hub_kwargs, **parts)
        checks.check_attention(pipe.denoiser, source.path)
        pipe._revision = source.hub_kwargs["revision"]
        if pipe.quality_head is not None:
            pipe._place(pipe.quality_head)
        if source.quality_head is not None:
            pipe._take_head(source.quality_head, "prism", source.head_kwargs)
            pipe.scheduler = scheduler or heads.scheduler_for(source.quality_head, pipe.scheduler, source.head_kwargs)
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        quality_head: QualityHead | str | None = None,
        scheduler: Scheduler | None = None,
        **kwargs: Any,
    ) -> PrismPipeline:
        """A pipeline from the parts of another, such as diffusers' `LLaDA2Pipeline`. They are shared, not copied.

        Args:
            pipeline: a pipeline with `model` and, if it has one, `tokenizer`.
            quality_head: as `from_pretrained`; None keeps the heads of a `PrismPipeline`.
            scheduler: decoding rule. With a new head, None takes the scheduler recommended with it, else keeps one that
                reads quality, else makes a `PrismScheduler`. Without a new head, None keeps the scheduler of a
                `PrismPipeline`, or takes the constructor's default.
            mdm_spec: `MDMSpec` or dict. None keeps that of a `PrismPipeline`, or detects it.
        Raises:
            ValueError: `pipeline` has no `model`, or as the constructor and `load_quality_head`. If a head's adapter is
                in the shared model already, unload that head first.
        """
        if unknown := sorted(set(kwargs) - {"mdm_spec"}):
            raise TypeError(f"`from_pipe` takes quality_head, scheduler and mdm_spec, got {unknown}.")
        model = getattr(pipeline, "model", None)
        if model is None:
            raise ValueError(f"`pipeline` must have a `model`; {type(pipeline).__name__} has none.")
        ours = isinstance(pipeline, cls)
        spec = kwargs.get("mdm_spec") or (pipeline.config.mdm_spec if ours else None)
        head = pipeline.quality_head if ours and quality_head is None else None
        chosen = scheduler or (pipeline.scheduler if ours else None)
        pipe = cls(model, getattr(pipeline, "tokenizer", None), head, chosen, spec)
        pipe.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        checks.check_attention(pipe.denoiser, type(model).__name__)
        if ours and quality_head is None:  # under their names, which are those of their adapters
            pipe.__dict__["_named_heads"], pipe.__dict__["_tuned"] = dict(pipeline._heads), set(pipeline._with_adapter)
        if quality_head is not None:
            pipe._take_head(quality_head, "prism", {})
            pipe.scheduler = scheduler or heads.scheduler_for(quality_head, pipe.scheduler, {})
        return pipe
