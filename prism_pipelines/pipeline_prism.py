"""PrismPipeline: prompt or infill -> canvas of masks -> the sampling loop -> decoded output."""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .hub import adapters, backbones, heads
from .hub.files import absence, inside, reachable, read_json
from .hub.saved_model import refuse_stale, save_model
from .models import checks
from .models.denoiser import MaskedDenoiser
from .models.families import MDMSpec, resolve_spec, supports_all_masked_input
from .models.quality_head import QualityHead
from .pipeline_output import LikelihoodOutput, PrismPipelineOutput, row_confidence
from .sampling.canvas import (
    Canvas,
    canvas_of,
    canvas_of_infill,
    changed_sample,
    given_positions,
    repeat_rows,
)
from .sampling.encoding import Frame, chat_texts, has_chat_template, text_frame
from .sampling.kv_cache import check_cache
from .sampling.likelihood import METHODS, estimate, scored_canvas
from .sampling.loop import (
    SamplingContext,
    blocks_of,
    fill_canvas,
    memory_errors,
    nan_errors,
    no_nan,
    scheduler_of,
    warn_of_idle_steps,
)
from .sampling.recorder import context_of_text, own_log_probs
from .sampling.stopping import (
    decode,
    default_suppress_tokens,
    end_tokens,
    no_content,
    refuse_allowed,
    special_stops,
    stop_strings,
    token_ids,
    written_ends,
)
from .sampling.trace import Trace
from .schedulers import MDLMScheduler, PrismScheduler
from .schedulers.validation import is_number, loop_steps

SCORES = ("head", "own", "leave_one_out")  # what `score` judges by


class PrismPipeline(DiffusionPipeline):
    """Sampling from a masked diffusion model that may revise its own tokens.

    Args:
        model: transformers masked language model with an output head; of a `PeftModel` the model in it, with its LoRA.
        tokenizer: its tokenizer; without one, ids go in and ids come out.
        quality_head: `QualityHead` for remasking by PRISM, or None.
        scheduler: decoding rule; default `PrismScheduler()` with a head, `MDLMScheduler()` without.
        mdm_spec: `MDMSpec` or its dict; default what `resolve_spec` finds.
    Raises:
        ValueError: no mask token is known, the head does not fit the model, or the model is causal.
        TypeError: `quality_head` is no `QualityHead`.
    """

    _optional_components = ["tokenizer", "quality_head", "scheduler"]  # noqa: RUF012  diffusers reads the list
    _callback_tensor_inputs = ["sample", "quality", "remasked", "unmasked", "generation_mask"]  # noqa: RUF012

    def __init__(self, model, tokenizer=None, quality_head=None, scheduler=None, mdm_spec=None):
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
        """The model behind the contract of `MaskedDenoiser`; made anew at each use, so never on a stale device."""
        return self._denoiser_without(default_suppress_tokens(self.tokenizer, self._end_tokens()))

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

    def _end_tokens(self, eos_token_id: int | list[int] | None = None) -> tuple[int, ...]:
        """Ids that end a text."""
        return end_tokens(eos_token_id, self.tokenizer, self.model, self.spec)

    def enable_model_cpu_offload(self, *args, **kwargs):
        """Refused: the output head is read after the model has run, and would be back on the CPU by then."""
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
        logits_processor=None,
        stop: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        return_quality: bool = False,
        return_probs: bool = False,
        return_trace: bool = False,
        callback_on_step_end=None,
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
            num_samples: samples of each row, next to each other; how many rows if nothing else is given.
            use_chat_template: False continues `prompt` as plain text.
            chat_template_kwargs: for the template, beside the chat, such as {"enable_thinking": False} of Qwen3.
            continue_final_message: the last of `messages` is the assistant's and begins the answer, which goes on after
                it (prefill); `texts` hold what follows.
            gen_length: tokens to generate; needed for all but `infill`. Special tokens that an encoder's texts begin
                and end with ([CLS], [SEP]) are given, and come on top; none are put around `input_ids`.
            block_length: generate blocks of this many tokens from left to right; None for all at once, or for the
                model's own block if it is block-causal: then blocks begin at multiples of it, and it must be a multiple
                or a divisor of the model's.
            num_inference_steps: steps of the whole run, spread over the blocks, the remainder first. Default: one per
                generated token of the longest row, at most 64 and at least one a block.
            temperature, top_p, top_k: of sampling; None for the scheduler's.
            cfg_scale: classifier-free guidance, see `GuidedLogits`: a second forward in each step, counted in `nfe`,
                with everything that is not generated masked. None or 0 for none.
            eos_token_id: ids that end a text; None for those of the tokenizer and the generation config.
            eos_early_stop: when a block is done, a row with an end token and no mask before it is finished: the rest
                of it is filled with the first of the end tokens and costs no more forwards. False: an end token is a
                token like others, and all is generated. `texts` end before it either way, but for `infill`.
            suppress_tokens: ids that are never written. With the end tokens here, every text has its whole length.
            allow_tokens: ids that may be written although they are no content: special and reserved tokens, and those
                that the family forbids (X of ESM). End tokens of language models may be written anyway, those of an
                encoder if they are in `eos_token_id`.
            logits_processor: called as `logits_processor(positions, logits)` with the logits (N, V) that a step reads,
                and where they stand, `Positions(row, column, sample)`; gives the logits to use. For grammars and
                alphabets, see docs/pipeline.md. What is never written stays so.
            stop: strings that finish a row likewise; `texts` end before the first one. Special tokens in them are
                looked for too, and may be written.
            generator: one, or a list of one per row: then a row's result does not depend on the other rows, if
                `num_inference_steps` is given; the default counts the masks of the row that has most.
            output_type: "text", or "seq" for ids only.
            return_dict: False for a plain tuple.
            return_quality: also give the quality of the result; one more forward, counted in `nfe`.
            return_probs: also give the probability with which each token was drawn; no further forward.
            return_trace: also give a `Trace`: every step, and `out.trace.to_html(path)`, a page that plays them.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; may return
                {"sample": ids} to change the canvas. A block is final after its last timestep; `sample` may be without
                masks before. `quality` is 0, or of an earlier step, where this one did not compute it.
            callback_on_step_end_tensor_inputs: which of sample, quality, remasked, unmasked, generation_mask (the
                block's positions) it gets; default all.
            threshold: in (0, 1]; in each step also write every token of a confidence above it, and at least one. A row
                leaves the batch when its block is full, so fewer forwards than `num_inference_steps` are made. Sets
                the scheduler's `use_threshold` for this call; None for what the scheduler says.
            cache: "none", "prefix" or "block", see `sampling/kv_cache.py`: keep keys and values of finished blocks,
                or of all but the block at work. Exact for block-causal models (the two are one there), an approximation
                for others.
            cache_refresh_interval: with a cache, steps of a block from one full forward to the next; 1 is exact.
                None: one at the start of each block.
            select: "confidence" returns, of the `num_samples` samples of each row, the one of the highest confidence
                alone; needs a calibrated head. Costs the forward of `return_quality`, unless the scheduler judges.
                `nfe` and the trace are those of all samples, `nfe_per_row` the sum over them. None returns all.
        Returns:
            `PrismPipelineOutput`, or all its fields as a tuple, in their order.
        Raises:
            ValueError, TypeError: an argument that no run can use, by name.
            torch.OutOfMemoryError: with what to lower.
        """
        self._check_call(num_samples, num_inference_steps, gen_length, block_length, output_type, return_quality)
        self._check_select(select, num_samples)
        suppressed = token_ids("suppress_tokens", suppress_tokens, self.model.config.vocab_size)
        ends = self._end_tokens(eos_token_id)
        allowed = token_ids("allow_tokens", allow_tokens, self.model.config.vocab_size)
        refuse_allowed(allowed, suppressed, self.mask_token_id)
        stops = stop_strings(stop)
        if stops and self.tokenizer is None:
            raise ValueError("`stop` needs a tokenizer, and this pipeline has none: pass `eos_token_id`.")
        closing, marks = special_stops(stops, self.tokenizer, self.mask_token_id)
        written = (*written_ends(eos_token_id, self.tokenizer, self.spec, ends), *allowed, *marks)
        denoiser = self._denoiser_without((*suppressed, *no_content(self.tokenizer, self.spec, written)))
        scheduler = scheduler_of(self.scheduler, threshold)
        check_cache(cache, cache_refresh_interval, denoiser, self.quality_head)
        if cfg_scale is not None and not is_number(cfg_scale, 0):
            raise ValueError(f"`cfg_scale` must be None or a number of at least 0, got {cfg_scale!r}.")
        if cfg_scale and not supports_all_masked_input(self.model.config):
            raise ValueError(
                f"`cfg_scale` is {cfg_scale}, and guidance compares with a row of masks alone, which this model (ESM, "
                "token_dropout) cannot read. Pass None."
            )
        if eos_early_stop and not ends:
            raise ValueError("`eos_early_stop` needs an end token, and none is known: pass `eos_token_id`.")
        if stops and not (ends or closing):
            raise ValueError("`stop` needs a tokenizer, and an end token to fill the rest with: pass `eos_token_id`.")
        if logits_processor is not None and not callable(logits_processor):
            raise TypeError(f"`logits_processor` must be callable or None, got {type(logits_processor).__name__}.")
        wanted = self._callback_inputs(callback_on_step_end_tensor_inputs)
        if messages is not None or (prompt is not None and use_chat_template and has_chat_template(self.tokenizer)):
            prompt = chat_texts(messages, prompt, self.tokenizer, chat_template_kwargs, continue_final_message)
        elif continue_final_message:
            raise ValueError("`continue_final_message` goes with `messages` whose last is the assistant's.")
        elif chat_template_kwargs:
            raise ValueError("`chat_template_kwargs` is given, and no chat template is used: pass `messages`.")
        given = {"prompt": prompt, "input_ids": input_ids, "infill": infill}
        canvas = canvas_of(
            given, self.tokenizer, self.mask_token_id, attention_mask, num_samples, gen_length, self.text_frame
        )
        if num_samples > 1 and not (prompt is input_ids is infill is None):
            canvas = repeat_rows(canvas, num_samples)
        canvas = canvas.to(self._execution_device)
        self._check_canvas(canvas, generator)

        trace = None
        if return_trace:
            kind, prompted = type(scheduler).__name__, infill is None
            places = (canvas.generated, self.mask_token_id, self.tokenizer, canvas.attention_mask)
            trace = Trace(canvas.sample, *places, prompted=prompted, scheduler=kind)
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
            fill=(*ends, *closing)[0] if eos_early_stop or stops else None,
            ends=(*ends, *closing) if eos_early_stop else closing,
            stops=stops,
            tokenizer=self.tokenizer,
            logits_processor=logits_processor,
            records_draws=return_probs,
            trace=trace,
        )
        blocks = blocks_of(denoiser.spec, canvas, block_length, num_inference_steps)
        warn_of_idle_steps(run, blocks)
        step_number, loop = 0, loop_steps(scheduler)
        shown_pipe = copy.copy(self)  # the callback finds the run's scheduler in it; others may run at the same time
        shown_pipe.__dict__["scheduler"] = scheduler
        with (
            memory_errors(*canvas.sample.shape),
            nan_errors(denoiser, canvas, self.quality_head),
            self.progress_bar(total=sum(num_steps + loop for _, num_steps in blocks)) as bar,
        ):

            def after_step(t, tensors) -> Tensor:
                nonlocal step_number
                sample = tensors["sample"]
                if callback_on_step_end is not None:
                    shown = sample.clone()  # or a change in place would go unseen, and a cache be out of date
                    given = {name: shown if name == "sample" else tensors[name] for name in wanted}
                    changed = callback_on_step_end(shown_pipe, step_number, t, given)
                    sample = changed_sample(changed, shown, sample, self.model.config.vocab_size)
                step_number += 1
                bar.update()
                return sample

            filled, quality = fill_canvas(run, blocks, after_step), None
            judged = not (filled.judged.isnan() & canvas.generated).any() and filled.accepted is not None
            if judged:
                quality = filled.judged.masked_fill(~canvas.generated, 1.0)
            looks_again = return_quality or (select is not None and not judged)
            if looks_again:
                hidden = denoiser.hidden(filled.sample, canvas.attention_mask)
                known = {}
                if filled.recorder is not None:
                    context = filled.recorder.observe(filled.sample, hidden)
                    known = self.quality_head.inputs(context, filled.sample, self.mask_token_id)
                quality = self.quality_head.quality(hidden, canvas.attention_mask, **known)
                quality = no_nan(quality.masked_fill(~canvas.generated, 1.0))
        self.maybe_free_model_hooks()
        confidence = None if quality is None else row_confidence(quality, canvas.generated)
        texts = None
        if output_type == "text" and self.tokenizer is not None:
            texts = decode(filled.sample, canvas, self.tokenizer, self.mask_token_id, (*ends, *closing), stops)
        nfe_per_row, accepted, keep = filled.nfe_per_row + looks_again, filled.accepted, slice(None)
        confidences = confidence.exp() if confidence is not None and self._is_calibrated else None
        if trace is not None:
            trace.finish(filled.sample, quality, confidences, accepted, nfe_per_row.tolist())
        if select is not None:
            best = confidence.view(-1, num_samples).argmax(-1)
            keep = best + torch.arange(len(best), device=best.device) * num_samples
            nfe_per_row = nfe_per_row.view(-1, num_samples).sum(-1)
            texts = None if texts is None else [texts[row] for row in keep.tolist()]
        output = PrismPipelineOutput(
            sequences=filled.sample[keep],
            texts=texts,
            quality=quality[keep] if return_quality else None,
            nfe=filled.nfe + looks_again,
            nfe_per_row=nfe_per_row.tolist(),
            trace=trace,
            confidence=None if confidences is None else confidences[keep],
            accepted=None if accepted is None else accepted[keep],
            probs=filled.recorder.draw_probabilities(filled.sample)[keep] if return_probs else None,
        )
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    @torch.no_grad()
    def score(
        self, texts=None, *, input_ids=None, attention_mask=None, given=None, by: str = "head"
    ) -> tuple[Tensor, Tensor, list[list[str]] | None]:
        """P(token is right) of every token of some text, without generation.

        A head that reads what the run knows (`head.reads_context`) takes a text as one that nobody watched being
        written: when and how surely its tokens were drawn is unknown. `given` tells it more.

        Args:
            texts: a text or a list of texts.
            input_ids: int64 (B, L) in place of `texts`.
            attention_mask: 1 for tokens and 0 for padding, (B, L), with `input_ids`.
            given: which part of each text was there from the start and is not in question: the beginning of each text,
                a string or a list of strings; or bool (B, L). A token that is only partly in the beginning is not
                given. It is read by heads with context alone. One that reads "prompt" or "first_hidden" then costs a
                second forward pass, on the given part with all else masked. None for nothing known.
            by: "head", the quality head. "own", the model's own probability of each token in the pass that sees it: one
                forward and no head, a good judge only for models whose training corrupts visible tokens (BERT, ESM).
                "leave_one_out", the probability of each token given all others: one forward for each token.
        Returns:
            quality, float32 (B, L) in [0, 1], 0 at masks and padding; the ids (B, L); the tokens as strings, or None
            without a tokenizer.
        Raises:
            ValueError: no quality head, not exactly one of `texts` and `input_ids`, or `given` does not fit.
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
        self._check_canvas(canvas, None)
        sample, mask = canvas.sample, canvas.attention_mask
        hidden_from = sample == self.mask_token_id
        if mask is not None:
            hidden_from = hidden_from | (mask == 0)
        with nan_errors(self.denoiser, canvas, self.quality_head):
            if by == "head":
                hidden, known = self.denoiser.hidden(sample, mask), {}
                if self.quality_head.reads_context:
                    given = None if given is None else given_positions(given, texts, canvas, self.tokenizer)
                    context = context_of_text(self.denoiser, self.quality_head, sample, mask, hidden, given)
                    known = self.quality_head.inputs(context, sample, self.mask_token_id)
                quality = no_nan(self.quality_head.quality(hidden, mask, **known).masked_fill(hidden_from, 0.0))
            elif by == "own":
                quality = own_log_probs(self.denoiser, sample, mask, self.denoiser.hidden(sample, mask)).exp()
            else:
                found = estimate(self.denoiser, canvas, ~hidden_from, "pseudo")
                quality = found.token_log_probs.exp().to(sample.device)
        quality = quality.masked_fill(hidden_from, 0.0)
        tokens = None
        if self.tokenizer is not None:
            tokens = [self.tokenizer.convert_ids_to_tokens(row) for row in sample.tolist()]
        return quality, sample, tokens

    def log_likelihood(
        self,
        texts=None,
        *,
        prompt=None,
        input_ids=None,
        attention_mask=None,
        given=None,
        method: str = "bound",
        num_samples: int = 128,
        batch_size: int = 16,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> LikelihoodOutput:
        """How likely the model finds some texts, see `sampling/likelihood.py` for the estimators and their cost.

        The likelihood is the model's own: no head, scheduler, temperature or suppressed token takes part, but tokens
        that are never predicted (the mask, padding) have none. Special tokens around a text are given.

        Args:
            texts: a text or texts.
            prompt: a text, or one for each of `texts`, which follow it and whose likelihood given it is asked for. It
                is taken as it is, without a chat template.
            input_ids: int64 (B, L) in place of `texts`.
            attention_mask: 1 for tokens and 0 for padding, (B, L), with `input_ids`.
            given: which tokens are not in question: the beginning of each text, or bool (B, L), as `score` takes it.
            method: "bound", a Monte Carlo estimate of a lower bound; or "pseudo", the pseudo-log-likelihood, by which
                encoders that never saw many masks at once are compared (BERT, ESM-2).
            num_samples: forward passes of a row for the bound (of each block of a block-causal model).
            batch_size: rows of one forward pass.
            generator: as in a call.
        Raises:
            ValueError, TypeError: an argument that cannot be used, by name.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        canvas, scored = scored_canvas(
            texts, prompt, input_ids, attention_mask, given, self.tokenizer, self.mask_token_id, self.text_frame
        )
        canvas, scored = canvas.to(self._execution_device), scored.to(self._execution_device)
        self._check_canvas(canvas, generator)
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

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _check_call(self, num_samples, num_inference_steps, gen_length, block_length, output_type, return_quality):
        counts = {
            "num_samples": num_samples,
            "num_inference_steps": num_inference_steps,
            "gen_length": gen_length,
            "block_length": block_length,
        }
        for name, value in counts.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        limit = checks.max_length(self.model.config)
        if gen_length is not None and limit is not None and gen_length > limit:
            raise ValueError(f"`gen_length` is {gen_length}, and the model takes {limit} tokens at most.")
        if output_type not in ("text", "seq"):
            raise ValueError(f'`output_type` must be "text" or "seq", got {output_type!r}.')
        heads.check_scheduler(self.scheduler)
        if self.quality_head is None and self.scheduler.needs_quality:
            raise ValueError(
                f"{type(self.scheduler).__name__} remasks by quality, and this pipeline has no quality head. Pass "
                "quality_head=... to from_pretrained or call pipe.load_quality_head(...); or, without a head, use "
                "scheduler=SelfConfidenceScheduler() (training-free) or MDLMScheduler() (no remasking)."
            )
        self._check_adapter()
        if self.quality_head is None and return_quality:
            raise ValueError("`return_quality` needs a quality head; this pipeline has none.")

    @property
    def _is_calibrated(self) -> bool:
        """Is the quality of the head a probability? Heads say so by the temperature that was fitted for them."""
        return self.quality_head is not None and self.quality_head.config.get("temperature") is not None

    def _check_select(self, select: str | None, num_samples: int) -> None:
        if select not in (None, "confidence"):
            raise ValueError(f'`select` must be None or "confidence", got {select!r}.')
        if select is not None and num_samples < 2:
            raise ValueError(f"`select` chooses among `num_samples` of at least 2, got {num_samples}.")
        if select is not None and not self._is_calibrated:
            head = "no quality head" if self.quality_head is None else "a quality head without a fitted temperature"
            raise ValueError(
                f'`select="confidence"` needs a calibrated quality head, and this pipeline has {head}. Calibrate one '
                "with prism_pipelines.evaluation.fit_temperature."
            )

    def _callback_inputs(self, names: list[str] | None) -> list[str]:
        names = self._callback_tensor_inputs if names is None else names
        if unknown := sorted(set(names) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {unknown}."
            )
        return names

    def _check_canvas(self, canvas: Canvas, generator) -> None:
        rows, length = canvas.sample.shape
        limit = checks.max_length(self.model.config)
        if limit is not None and length > limit:
            raise ValueError(f"The canvas has {length} tokens, and the model takes {limit} at most. Shorten the input.")
        vocab_size = self.model.config.vocab_size
        low, high = int(canvas.sample.min()), int(canvas.sample.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"The input holds id {wrong}; the model knows ids from 0 to {vocab_size - 1}.")
        each = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in each):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r:.80}.")
        if isinstance(generator, (list, tuple)) and len(generator) != rows:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but there are {rows} rows. Pass one for each."
            )

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        quality_head: QualityHead | str | None = None,
        scheduler=None,
        tokenizer=None,
        mdm_spec: MDMSpec | dict | None = None,
        mask_token_id: int | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device_map=None,
        quantization_config=None,
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
        """A pipeline from a saved pipeline, a transformers model, or the repository of a head alone.

        A head's repository names its base model, which is loaded with it, and may hold the scheduler settings that
        work best with it.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            quality_head: `QualityHead`, or a folder or Hub id that has one in `quality_head/`, with its LoRA adapter.
            scheduler, tokenizer: objects to use in place of the saved ones.
            mdm_spec, mask_token_id: override what is detected, see `resolve_spec`.
            torch_dtype, dtype: of the model, float32 by default; two names for one thing. The head stays float32.
            device_map, quantization_config, attn_implementation, max_memory, offload_folder: as transformers'
                `from_pretrained`, for the model. Models with an additive mask (LLaDA, Dream) run with
                attn_implementation "sdpa", the default, or "eager".
            revision: of `pretrained_model_name_or_path`; a branch, tag or commit.
            cache_dir, token, local_files_only: as in huggingface_hub.
            subfolder: of a plain model repository.
            trust_remote_code: run model code from the repository where no native class serves; off by default.
        Raises:
            ValueError: the model is causal, has no known mask token, or the head was made for another model.
            OSError: not found, or no safetensors weights.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"`torch_dtype` and `dtype` name the same thing, got {torch_dtype} and {dtype}.")
        path, dtype = str(pretrained_model_name_or_path), dtype or torch_dtype or torch.float32
        hub_kwargs = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        hub_kwargs = reachable(path, hub_kwargs)
        index = read_json(path, "model_index.json", hub_kwargs)
        lone_head = None
        if index is None and read_json(path, inside(subfolder, "config.json"), hub_kwargs) is None:
            lone_head = heads.head_config(path, hub_kwargs)
        if lone_head is not None:
            if not lone_head.get("base_model") or not isinstance(lone_head["base_model"], str):
                raise ValueError(f"The head of {path!r} does not name its base model; load that, with quality_head=.")
            if quality_head is not None:
                raise ValueError(f"{path!r} is itself a head; `quality_head` goes with a base model.")
            base_where = reachable(lone_head["base_model"], hub_kwargs | {"revision": lone_head.get("base_revision")})
            quality_head, head_where = path, hub_kwargs
            path, hub_kwargs = lone_head["base_model"], base_where
            index = read_json(path, "model_index.json", hub_kwargs)
            mdm_spec = mdm_spec or lone_head.get("mdm_spec")
        else:
            head_where = hub_kwargs | {"revision": None}
            if isinstance(quality_head, (str, Path)):
                head_where = reachable(str(quality_head), head_where)
        parts = {"scheduler": scheduler, "tokenizer": tokenizer}
        if index is not None:
            subfolder = "model"
            mdm_spec = mdm_spec or backbones.spec_of_index(index, path)
        loaded = backbones.load_plain(
            path,
            subfolder,
            dtype,
            trust_remote_code,
            hub_kwargs,
            mdm_spec=mdm_spec,
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
        given = {name: part for name, part in parts.items() if part is not None}
        if index is None:
            pipe = cls(**(loaded | given))
        else:
            given |= {"model": loaded["model"], "mdm_spec": loaded["mdm_spec"]}
            if all(index.get("quality_head") or [None]):
                given["quality_head"] = heads.load_head(path, hub_kwargs)
            pipe = super().from_pretrained(path, use_safetensors=True, **hub_kwargs, **given)
        checks.check_attention(pipe.denoiser, path)
        pipe._revision = hub_kwargs["revision"]
        if pipe.quality_head is not None:
            pipe._place(pipe.quality_head)
        if quality_head is not None:
            pipe._take_head(quality_head, "prism", head_where)
            pipe.scheduler = scheduler or heads.scheduler_for(quality_head, pipe.scheduler, head_where)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline, quality_head: QualityHead | str | None = None, scheduler=None, **kwargs):
        """A pipeline of the parts of another, such as diffusers' `LLaDA2Pipeline`; they are shared, not copied.

        Args:
            pipeline: a pipeline with `model` and `tokenizer`.
            quality_head: as `from_pretrained`; None keeps the one of a `PrismPipeline`.
            scheduler: None keeps that of a `PrismPipeline`, and else takes the default; with a new head, that which
                is recommended with it, or one that reads it.
            mdm_spec: `MDMSpec` or dict; None keeps or detects it.
        Raises:
            ValueError: `pipeline` has no `model`, or what the constructor and `load_quality_head` raise: so if a head's
                adapter is in the shared model already, unload that first.
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

    def load_quality_head(
        self,
        quality_head: QualityHead | str,
        *,
        name: str = "prism",
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a quality head, and the LoRA adapter it was trained with if there is one, and use it.

        With the first head a scheduler that never remasks gives way to that recommended with the head, or to
        `PrismScheduler`; any other stays.

        Args:
            quality_head: `QualityHead`, or a folder or Hub id that has one in `quality_head/`.
            name: what the head and its adapter are called here; a head of that name is replaced.
            revision, cache_dir, token, local_files_only: as in huggingface_hub.
        Raises:
            ValueError: the head was made for another hidden size or another model, or an adapter of that name in the
                model belongs to something else.
            TypeError: `quality_head` is neither a head nor a place.
            OSError: no head there.
        """
        hub_kwargs = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        heads.check_scheduler(self.scheduler)
        if isinstance(quality_head, (str, Path)):
            hub_kwargs = reachable(str(quality_head), hub_kwargs)
        is_first = not self._heads
        self._take_head(quality_head, name, hub_kwargs)
        if is_first and not self.scheduler.can_remask:
            self.scheduler = heads.scheduler_for(quality_head, self.scheduler, hub_kwargs)

    def _take_head(self, quality_head: QualityHead | str, name: str, hub_kwargs: dict) -> None:
        """`load_quality_head`, but for the scheduler."""
        source = heads.head_place(quality_head)
        head = quality_head if source is None else heads.load_head(source, hub_kwargs)
        heads.check_head(head, self.model, getattr(self, "_revision", None))
        if name in self._heads:
            adapters.drop_adapter(self.model, name)
            self._with_adapter.discard(name)
            if self._heads.pop(name) is self.quality_head:
                self.register_modules(quality_head=None)
        elif source is not None:
            adapters.refuse_taken(self.model, name)
        adapter = None if source is None else adapters.adapter_subfolder(source, hub_kwargs)
        if adapter is not None:
            adapters.load_adapter(self.model, source, name, hub_kwargs, adapter, self.spec)
            self._with_adapter.add(name)
        self._heads[name] = head
        self.set_quality_head(name)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path,
        adapter_name: str | None = None,
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a LoRA adapter, and use it beside those in use; the repository of a head as `load_quality_head`.

        Args:
            pretrained_model_name_or_path: folder or Hub id of a PEFT adapter, or of a head.
            adapter_name: what it is called here; None for "default", and for "prism" with a head.
            subfolder: of the adapter.
            revision, cache_dir, token, local_files_only: as in huggingface_hub.
        Raises:
            ValueError: an adapter of that name is there, it does not fit the model, or is more than LoRA.
            OSError: no adapter there, or its weights are no safetensors.
        """
        path = str(pretrained_model_name_or_path)
        hub_kwargs = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        hub_kwargs = reachable(path, hub_kwargs)
        if not subfolder and heads.head_config(path, hub_kwargs) is not None:
            return self.load_quality_head(path, name=adapter_name or "prism", **hub_kwargs)
        config = inside(subfolder, "adapter_config.json")
        if read_json(path, config, hub_kwargs) is None:
            raise OSError(f"No LoRA adapter: {absence(path, config, hub_kwargs)}.")
        name, before = adapter_name or "default", adapters.active_adapters(self.model)
        adapters.refuse_taken(self.model, name)
        adapters.load_adapter(self.model, path, name, hub_kwargs, subfolder, self.spec)
        adapters.use_adapters(self.model, [*before, name])

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Take an adapter out of the model, None for all but those of heads; fused weights stay fused, for good.

        Raises:
            ValueError: no adapter of that name, or that of a head, which goes with `unload_quality_head`.
        """
        held, fused = adapters.adapter_names(self.model), adapters.fused_adapters(self.model)
        own = [] if fused else [name for name in held if name not in self._heads]
        names = (fused or own) if adapter_name is None else [adapter_name]
        if fused and sorted(names) != sorted(fused):
            raise ValueError(f"The adapters {fused} are fused, and go together: unload_lora_weights() without a name.")
        if not fused and not set(names) <= set(own):
            raise ValueError(f"{adapter_name!r} is none of the adapters that are not a quality head's: {own}.")
        for name in names:
            adapters.drop_adapter(self.model, name)
            self._with_adapter.discard(name)

    def fuse_lora(
        self, adapter_names: list[str] | None = None, lora_scale: float = 1.0, safe_fusing: bool = False
    ) -> None:
        """Add the active adapters to the weights of the model, as in diffusers: a forward costs no more than without.

        Args:
            adapter_names: None for all that are active; a list must name all of them.
            lora_scale: factor of what the adapters add.
            safe_fusing: check for NaN and inf first.
        Raises:
            ValueError: no adapter is active, or others than the active ones are named; or as `safe_fusing` says.
        """
        adapters.fuse(self.model, adapter_names, lora_scale, safe_fusing)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, up to the rounding of the model's dtype.

        Raises:
            ValueError: nothing is fused.
        """
        adapters.unfuse(self.model)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        what: str = "head",
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the quality head with its adapter and settings, a few MB; or the whole pipeline.

        Args:
            repo_id: "owner/name" on the Hub; made if missing.
            what: "head" or "pipeline".
            base_model: Hub id of the backbone that the head belongs to; None for what its config says.
            private, token, revision, commit_message: as `head_repo.push_head_repo`.
        Returns:
            URL of the commit.
        Raises:
            ValueError: another `what`, no head, or a base model that is not on the Hub.
        """
        from .hub.publish import push_head_repo, push_pipeline

        if what not in ("head", "pipeline"):
            raise ValueError(f'`what` must be "head" or "pipeline", got {what!r}.')
        target = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
        if what == "head":
            return push_head_repo(self, repo_id, base_model=base_model, **target)
        return push_pipeline(self, repo_id, base_model=base_model, **target)

    @property
    def _heads(self) -> dict[str, QualityHead]:
        """Loaded heads by name; that of the constructor is called "prism"."""
        if "_named_heads" not in self.__dict__:
            self.__dict__["_named_heads"] = {} if self.quality_head is None else {"prism": self.quality_head}
        return self.__dict__["_named_heads"]

    @property
    def _with_adapter(self) -> set[str]:
        """Names of the heads that came with an adapter."""
        if "_tuned" not in self.__dict__:
            self.__dict__["_tuned"] = set(self._heads) & set(adapters.adapter_names(self.model))
        return self.__dict__["_tuned"]

    def _check_adapter(self, name: str | None = None) -> None:
        """Raise a ValueError if the adapter of a head, by default the one in use, is gone from the model."""
        name = name or next((name for name, head in self._heads.items() if head is self.quality_head), None)
        heads.check_adapter(name, self._with_adapter, self.model)

    def _use_adapter(self, name: str | None) -> None:
        """Make the adapter of a head the one in use of those of heads, or none; those of the user stay in use."""
        users = [other for other in adapters.active_adapters(self.model) if other not in self._heads]
        adapters.use_adapters(self.model, users if name is None else [*users, name])

    def _head_adapter(self) -> str | None:
        """Name of the adapter of the head in use, or None if it has none."""
        name = next((name for name, head in self._heads.items() if head is self.quality_head), None)
        return name if name in adapters.adapter_names(self.model) else None

    def _place(self, head: QualityHead) -> QualityHead:
        """The head, on the device of the canvas, where the hidden states come back to."""
        return head.to(self._execution_device)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in diffusers. Adapters of the user and of the head in use are saved with it, see `saved_model.py`.

        Raises:
            ValueError: the folder holds a pipeline saved before, parts of which would be loaded with this one.
        """
        folder, mine = Path(save_directory), self._head_adapter()
        if not adapters.adapter_names(self.model):
            refuse_stale(folder / "model", "adapter*", "an adapter", "whole model")
            with self.denoiser.lock:  # while another thread is in a forward, the config says what must not be saved
                return super().save_pretrained(save_directory, *args, **kwargs)
        names = {name: name for name in adapters.adapter_names(self.model) if name not in self._heads}
        if mine is not None and "prism" in names:
            raise ValueError(
                'An adapter of yours is called "prism", as that of a saved head will be. Load it under another name.'
            )
        names |= {} if mine is None else {mine: "prism"}
        whole = None

        def save(model_folder, **_):
            nonlocal whole
            whole = save_model(self.model, Path(model_folder), names)

        self.model.save_pretrained = save  # for diffusers; that of transformers writes one adapter, and no more
        try:
            with self.denoiser.lock:
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.model.save_pretrained
        if whole and self.quality_head is not None:
            from .hub.publish import rewrite

            rewrite(folder / "quality_head" / "config.json", heads.fingerprints(self.model))

    def set_quality_head(self, name: str) -> None:
        """Switch to a loaded head and its adapter.

        Raises:
            ValueError: no head of that name.
        """
        if name not in self._heads:
            raise ValueError(f"No quality head is called {name!r}; loaded: {sorted(self._heads) or 'none'}.")
        self._check_adapter(name)
        self._use_adapter(name)
        self.register_modules(quality_head=self._place(self._heads[name]))

    def unload_quality_head(self, name: str | None = None) -> None:
        """Drop a head and its adapter; None for all. A scheduler left without any becomes `MDLMScheduler`, and warns.

        If other heads are left, none of them is taken into use by itself: `set_quality_head`.

        Raises:
            ValueError: no head of that name.
        """
        heads.check_scheduler(self.scheduler)
        if name is not None and name not in self._heads:
            raise ValueError(f"No quality head is called {name!r}; loaded: {sorted(self._heads) or 'none'}.")
        for gone in list(self._heads) if name is None else [name]:
            in_use = self._heads.pop(gone) is self.quality_head
            adapters.drop_adapter(self.model, gone)
            self._with_adapter.discard(gone)
            if in_use:
                self.register_modules(quality_head=None)
        if name is None and self.quality_head is not None:  # one that was set as an attribute
            self.register_modules(quality_head=None)
        if not self._heads and self.quality_head is None and self.scheduler.needs_quality:
            warnings.warn("The scheduler needed the head; the pipeline goes on with MDLMScheduler.", stacklevel=2)
            self.scheduler = MDLMScheduler.from_config(self.scheduler.config)
