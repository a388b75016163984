"""Training objectives. Each is one nn.Module whose forward() gives the whole loss. DDP and FSDP see nothing else.

PRISM's loss needs two forward passes. In one call, both graphs are in memory together. A trainer instead calls
`predict` and then `judge`, each followed by its own backward, and needs no more memory than a plain step.

A denoiser here is anything with `spec.mask_token_id`, `hidden(ids, attention_mask) -> (B, L, H)` and
`logits(hidden, positions) -> (N, V)`, see `denoiser.MaskedDenoiser`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..schedulers.functional import choose, highest, mask_tokens
from ..schedulers.token_sampling import sample_tokens
from .loss_terms import mask_rates, mean_where, share_of_all, split_positions, trainable_positions

WEIGHTINGS = ("elbo", "uniform")
REVEAL_ORDERS = ("random", "confidence")
ALL_MASKS = 2**31  # more than any row has
Corrupted = tuple[Tensor, Tensor, Tensor]  # z (B, L); which tokens were masked, bool (B, L); t of each row (B,)
Draw = tuple[Tensor, Tensor]  # y (B, L); which tokens were revealed in it, bool (B, L)


@dataclass
class MDMOutput(ModelOutput):
    """What `MDMObjective` returns. All are scalars; all but `loss` are detached.

    Args:
        loss: float32, to be minimised.
        accuracy: share of masked tokens whose most likely token is the right one; 0 if nothing was masked.
        num_masked: masked tokens in the batch.
    """

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    num_masked: Tensor | None = None


@dataclass
class PRISMOutput(ModelOutput):
    """What `PRISMObjective` returns. All are scalars; all but `loss` are detached.

    Args:
        loss: float32, to be minimised: loss_prism + lambda_mdm * loss_mdm.
        loss_prism: binary cross-entropy of the qualities of revealed tokens.
        loss_mdm: as `MDMOutput.loss`; None if the backbone is frozen.
        accuracy: share of revealed (drawn) tokens that are right.
        quality_right: mean predicted quality of revealed tokens that are right; 0 if there are none.
        quality_wrong: mean predicted quality of revealed tokens that are wrong; 0 if there are none.
        num_masked: masked tokens in z, over the batch.
        num_revealed: revealed tokens, over the batch and all draws.
        drawn: from `predict` only. Call `judge` once with each element to complete the step.
    """

    loss: Tensor | None = None
    loss_prism: Tensor | None = None
    loss_mdm: Tensor | None = None
    accuracy: Tensor | None = None
    quality_right: Tensor | None = None
    quality_wrong: Tensor | None = None
    num_masked: Tensor | None = None
    num_revealed: Tensor | None = None
    drawn: list | None = None


@dataclass
class Measured(ModelOutput):
    """What `PRISMObjective.measure` returns: values of each token, so that batches can be joined.

    Args:
        quality: logits of the head at the N judged tokens, float32 (N,).
        right: their labels, bool (N,).
        loss_mdm: as `MDMOutput.loss`.
        log_probs: of the unmasking posterior at the first M masked tokens of the batch, float32 (M, V).
    """

    quality: Tensor | None = None
    right: Tensor | None = None
    loss_mdm: Tensor | None = None
    log_probs: Tensor | None = None


def _of_backbone(name: str) -> Any:
    return property(lambda objective: getattr(objective.denoiser.model, name), doc=f"`{name}` of the backbone.")


class MDMObjective(nn.Module):
    """The masked diffusion loss: predict masked tokens from the visible ones.

    "elbo":    sum over masked tokens of CE / t, divided by B * L
    "uniform": mean of CE over masked tokens

    with t the row's masking rate. L counts the prompt and every other token but not padding, so padding a batch
    further changes nothing. Output logits exist at masked positions only, `chunk_size` rows at a time.

    Args:
        denoiser: `MaskedDenoiser`, or anything with the same three members.
        weighting: "elbo" (with the default rates, a bound on -log p(x) per token) or "uniform".
        mask_rate_min, mask_rate_max: t is drawn from (mask_rate_min, mask_rate_max], stratified over the batch; if
            they are equal, t is that constant.
        chunk_size: most rows of logits that are kept at once; each further chunk is computed again in the backward
            pass. A chunk takes about `3 * 4 * chunk_size * V` bytes.
    Raises:
        ValueError: unknown weighting; rates that are not 0 < min <= max <= 1; chunk_size below 1.
    Source: LLaDA (arXiv 2502.09992, eq. 3) and MDLM (arXiv 2406.07524) for "elbo".
    """

    denoiser: Any

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        weighting: str = "elbo",
        mask_rate_min: float = 1e-3,
        mask_rate_max: float = 1.0,
        chunk_size: int = 4096,
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"`weighting` must be one of {WEIGHTINGS}, got {weighting!r}.")
        if not 0 < mask_rate_min <= mask_rate_max <= 1:
            raise ValueError(
                "Masking rates must satisfy 0 < mask_rate_min <= mask_rate_max <= 1, "
                f"got mask_rate_min={mask_rate_min} and mask_rate_max={mask_rate_max}."
            )
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
        self.denoiser, self.weighting, self.chunk_size = denoiser, weighting, chunk_size
        self.mask_rate_min, self.mask_rate_max = mask_rate_min, mask_rate_max

    def forward(
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        corrupted: Corrupted | None = None,
        totals: dict[str, Tensor] | None = None,
    ) -> MDMOutput:
        """The loss of a batch of clean sequences.

        Args:
            input_ids: clean tokens, int64 of shape (B, L).
            trainable_mask: true where a token may be masked, (B, L); None for all tokens. Others (a prompt) stay
                visible. Padding never trains.
            attention_mask: 1 for tokens and 0 for padding, (B, L); None for no padding.
            generator: of all random draws; None for torch's default one.
            corrupted: what `corrupt` gave for this batch; None to draw it here.
            totals: `counts`, summed over all batches of the optimizer step (all processes and accumulation steps) and
                divided by their number. Then the mean of the batches' losses is the loss of all as one batch. None if
                the batch is a step by itself.
        Returns:
            `MDMOutput`; its `loss` is 0 if nothing was masked.
        Raises:
            ValueError: `input_ids` is not (B, L), or already holds the mask token where it is trainable.
        """
        corrupted = corrupted or self.corrupt(input_ids, trainable_mask, attention_mask, generator)
        z, masked, rate = corrupted
        hidden = self.denoiser.hidden(z, attention_mask)
        loss, right = self.mdm_loss(hidden, input_ids, masked, rate, attention_mask, totals)
        return MDMOutput(loss, right.sum() / masked.sum().clamp(min=1), masked.sum())

    def counts(
        self,
        corrupted: Any,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The numbers by which the sums in the loss of a batch are divided, float32 scalars: "tokens" and "masked".

        Args: as `forward`.
        """
        tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()
        return {"tokens": tokens.sum().float(), "masked": corrupted[1].sum().float()}

    def corrupt(
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Corrupted:
        """Mask each trainable token with probability t.

        Args and Raises: as `forward`.
        Returns:
            z, int64 (B, L); which tokens were masked, bool (B, L); and t of each row, float32 (B,).
        """
        if input_ids.ndim != 2:
            raise ValueError(f"`input_ids` must have shape (B, L), got {tuple(input_ids.shape)}.")
        trainable = trainable_positions(input_ids, trainable_mask, attention_mask)
        mask_token_id = self.denoiser.spec.mask_token_id
        if (trainable & (input_ids == mask_token_id)).any():
            raise ValueError(
                f"`input_ids` holds the mask token ({mask_token_id}) at a trainable position: no answer is known. "
                "Pass clean tokens, or a `trainable_mask` that leaves these positions out."
            )
        rate = mask_rates(len(input_ids), self.mask_rate_min, self.mask_rate_max, generator, input_ids.device)
        return *mask_tokens(input_ids, rate, mask_token_id, trainable, generator), rate

    def mdm_loss(
        self,
        hidden: Tensor,
        clean: Tensor,
        masked: Tensor,
        rate: Tensor,
        attention_mask: Tensor | None = None,
        totals: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss from the hidden states of z, float32; and whether each masked token is predicted right, bool (N,).

        Args:
            hidden: (B, L, H), of z.
            clean: right tokens, int64 (B, L).
            masked: bool (B, L), N of them true.
            rate: t of each row, (B,).
            attention_mask: (B, L) or None.
            totals: as `forward`.
        """
        totals = totals or {}

        def chunk_loss(hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.denoiser.logits(hidden, positions).float()
            targets = clean[positions]
            return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

        chunks = split_positions(masked, self.chunk_size)
        if len(chunks) == 1:
            parts = [chunk_loss(hidden, masked)]
        else:
            parts = [checkpoint(chunk_loss, hidden, chunk, use_reentrant=False) for chunk in chunks]
        losses, right = (torch.cat(part) for part in zip(*parts, strict=True))  # (N,) each
        if self.weighting == "uniform":
            return losses.sum() / share_of_all(masked.sum(), totals.get("masked")), right
        tokens = torch.ones_like(clean) if attention_mask is None else attention_mask.bool()
        weighted = (losses / rate[:, None].expand_as(masked)[masked]).sum()
        return weighted / share_of_all(tokens.sum(), totals.get("tokens")), right

    # Trainer asks its model, which is this objective, to save memory; transformers 5.23 calls it by a new name.
    gradient_checkpointing_enable = _of_backbone("gradient_checkpointing_enable")
    gradient_checkpointing_disable = _of_backbone("gradient_checkpointing_disable")
    activation_checkpointing_enable = _of_backbone("activation_checkpointing_enable")
    activation_checkpointing_disable = _of_backbone("activation_checkpointing_disable")


class PRISMObjective(MDMObjective):
    """The PRISM fine-tuning loss: let the model fill some masks, and have the head judge which it filled rightly.

    1. mask clean x with rate t -> z                      4. forward y -> qualities;
    2. forward z, draw x^ at masked positions                BCE(quality_i, 1[x^_i = x_i]) at revealed positions
    3. reveal x^ at k masked positions -> y               5. add lambda_mdm * the masked diffusion loss of step 2

    With k = 1 the minimiser of step 4 is exactly p(x_i = y_i | y without y_i), because x^_i and x_i are independent
    given z. With k > 1 the minimiser is a mixture over the sets of positions that may have been revealed: biased, but
    with k labels for the same two forward passes. Both are proved by enumeration in tests/test_prism_theory.py.

    The average of step 4 is over all revealed positions of the batch, of all processes together. A row with fewer than
    k masks reveals all of them. A row without masks adds nothing.

    Args:
        denoiser: `MaskedDenoiser`, or anything with the same three members.
        quality_head: `QualityHead`, or any module from hidden states (B, L, H) and attention mask to logits (B, L).
        num_revealed: k, tokens revealed per row.
        draws_per_state: number of y drawn for each z; they go through the second forward pass as one batch.
        reveal_order: "random" (positions uniform among the masks) or "confidence" (the k tokens that were drawn with
            the highest probability, as confidence decoding would write them).
        reveal_window: reveal only among the leftmost `reveal_window` masks (semi-autoregressive decoding); None for
            all.
        lambda_mdm: weight of the masked diffusion loss, which is normalised as `weighting` says.
        temperature: of x^; 0 for the most likely token.
        top_p: nucleus of x^, in (0, 1]; None for all tokens.
        freeze_backbone: train the head alone. The denoiser's parameters get requires_grad=False, the denoiser stays in
            eval mode, and step 5 is left out.
        weighting, mask_rate_min, mask_rate_max, chunk_size: as `MDMObjective`.
    Raises:
        ValueError: a count below 1, an unknown order, a weight, temperature or nucleus out of range, or what
            `MDMObjective` raises.
    Source: PRISM (arXiv 2510.01384, fine-tuning algorithm).
    """

    judge_all = False  # the head is asked about revealed tokens only
    quality_head: Any

    def __init__(
        self,
        denoiser: nn.Module,
        quality_head: nn.Module,
        *,
        num_revealed: int = 1,
        draws_per_state: int = 1,
        reveal_order: str = "random",
        reveal_window: int | None = None,
        lambda_mdm: float = 0.5,
        temperature: float = 1.0,
        top_p: float | None = None,
        freeze_backbone: bool = False,
        weighting: str = "elbo",
        mask_rate_min: float = 1e-3,
        mask_rate_max: float = 1.0,
        chunk_size: int = 4096,
    ) -> None:
        super().__init__(
            denoiser,
            weighting=weighting,
            mask_rate_min=mask_rate_min,
            mask_rate_max=mask_rate_max,
            chunk_size=chunk_size,
        )
        counts = {"num_revealed": num_revealed, "draws_per_state": draws_per_state, "reveal_window": reveal_window}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if reveal_order not in REVEAL_ORDERS:
            raise ValueError(f"`reveal_order` must be one of {REVEAL_ORDERS}, got {reveal_order!r}.")
        for name, value in (("lambda_mdm", lambda_mdm), ("temperature", temperature)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a number of at least 0, got {value}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
        self.quality_head = quality_head
        self.num_revealed, self.draws_per_state = num_revealed, draws_per_state
        self.reveal_order, self.reveal_window = reveal_order, reveal_window
        self.lambda_mdm, self.temperature, self.top_p = lambda_mdm, temperature, top_p
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            denoiser.requires_grad_(False)

    def train(self, mode: bool = True) -> PRISMObjective:
        """As `nn.Module.train`, but a frozen backbone stays in eval mode: its dropout would add noise for the head."""
        super().train(mode)
        if self.freeze_backbone:
            self.denoiser.eval()
        return self

    def forward(  # type: ignore[override]  # another objective returns other parts of its loss
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        part: str | None = None,
        corrupted: Corrupted | None = None,
        totals: dict[str, Tensor] | None = None,
        drawn: list[Draw] | None = None,
        num_log_probs: int = 0,
    ) -> PRISMOutput | Measured:
        """The loss of a batch of clean sequences: `predict`, then `judge` on everything that was drawn.

        DDP, FSDP and autocast act on calls of forward only, so a trainer calls the other methods by `part`.

        Args and Raises: as `MDMObjective.forward`, and
            part: None for both; or "predict", "judge" or "measure", for that method alone.
            drawn, num_log_probs: of `judge` and of `measure`.
        """
        corrupted = corrupted or self.corrupt(input_ids, trainable_mask, attention_mask, generator)
        batch = (input_ids, trainable_mask, attention_mask)
        if part == "measure":
            return self.measure(*batch, generator, corrupted=corrupted, num_log_probs=num_log_probs)
        if part == "judge":
            return self.judge(*batch, corrupted=corrupted, totals=totals, drawn=drawn or [])
        predicted = self.predict(*batch, generator, corrupted=corrupted, totals=totals)
        if part == "predict":
            return predicted
        everything = [draw for draws in predicted.drawn or [] for draw in draws]
        out = self.judge(*batch, corrupted=corrupted, totals=totals, drawn=everything)
        if predicted.loss is not None and out.loss is not None:
            out["loss"], out["loss_mdm"] = out.loss + predicted.loss, predicted.loss_mdm
        return out

    def predict(
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        corrupted: Corrupted | None = None,
        totals: dict[str, Tensor] | None = None,
    ) -> PRISMOutput:
        """Steps 1, 2, 3 and 5: the masked diffusion loss, and what the model fills into the masks.

        Args and Raises: as `MDMObjective.forward`.
        Returns:
            `PRISMOutput` with `drawn`: call `judge` once with each of its elements. The losses of these calls and of
            `predict` add up to the loss of `forward`. `loss` is None if the backbone is frozen.
        """
        corrupted = corrupted or self.corrupt(input_ids, trainable_mask, attention_mask, generator)
        z, masked, rate = corrupted
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            hidden = self.denoiser.hidden(z, attention_mask)
        drawn = [[self.reveal(z, hidden, masked, generator)] for _ in range(self.draws_per_state)]
        if self.freeze_backbone:
            return PRISMOutput(num_masked=masked.sum(), drawn=drawn)
        loss, _ = self.mdm_loss(hidden, input_ids, masked, rate, attention_mask, totals)
        shown = loss.detach()
        if totals is not None:  # logged as the mean over this batch
            name = "masked" if self.weighting == "uniform" else "tokens"
            count = self.counts(corrupted, input_ids, None, attention_mask)[name]
            shown = shown * (totals[name] / count.clamp(min=1))
        return PRISMOutput(self.lambda_mdm * loss, loss_mdm=shown, num_masked=masked.sum(), drawn=drawn)

    def judge(
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        corrupted: Corrupted,
        drawn: list[Draw],
        totals: dict[str, Tensor] | None = None,
    ) -> PRISMOutput:
        """Step 4: the head's loss at the revealed tokens.

        Args and Raises: as `MDMObjective.forward`, and
            corrupted: what `predict` was given.
            drawn: (y, revealed), int64 and bool (B, L), of one or more draws: an element of `drawn` from `predict`.
        """
        masked = corrupted[1]
        quality, right = self.quality_and_label(drawn, masked, input_ids, trainable_mask, attention_mask)
        bce = binary_cross_entropy_with_logits(quality, right.float(), reduction="sum")
        count = right.new_tensor(right.numel(), dtype=torch.float)
        loss = bce / share_of_all(count, (totals or {}).get("judged")) + self.untouched()
        return PRISMOutput(
            loss,
            loss_prism=bce.detach() / count.clamp(min=1),
            accuracy=mean_where(right.float(), torch.ones_like(right)),
            quality_right=mean_where(quality.sigmoid(), right),
            quality_wrong=mean_where(quality.sigmoid(), ~right),
            num_masked=masked.sum(),
            num_revealed=count.long(),
        )

    def measure(
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        corrupted: Corrupted | None = None,
        num_log_probs: int = 0,
    ) -> Measured:
        """The head and the backbone on a batch token by token, for evaluation.

        Args and Raises: as `MDMObjective.forward`, and
            num_log_probs: masked tokens whose posterior is returned.
        """
        z, masked, rate = corrupted or self.corrupt(input_ids, trainable_mask, attention_mask, generator)
        hidden = self.denoiser.hidden(z, attention_mask)
        drawn = [self.reveal(z, hidden, masked, generator) for _ in range(self.draws_per_state)]
        loss_mdm, _ = self.mdm_loss(hidden, input_ids, masked, rate, attention_mask)
        few = masked & (masked.flatten().cumsum(0).view_as(masked) <= num_log_probs)
        log_probs = self.denoiser.logits(hidden, few).float().log_softmax(-1)
        judged = self.quality_and_label(drawn, masked, input_ids, trainable_mask, attention_mask)
        return Measured(*judged, loss_mdm, log_probs)

    def counts(
        self,
        corrupted: Any,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `MDMObjective.counts`, and "judged": the number of tokens with a label for the head, over all draws."""
        counts = super().counts(corrupted, input_ids, trainable_mask, attention_mask)
        if self.judge_all:
            judged = trainable_positions(input_ids, trainable_mask, attention_mask).sum()
        else:
            judged = self.window(corrupted[1]).sum(-1).clamp(max=self.num_revealed).sum()
        return counts | {"judged": self.draws_per_state * judged.float()}

    def quality_and_label(
        self,
        drawn: list[Draw],
        masked: Tensor,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Step 4 up to the loss: logits of the head at the N judged tokens, float32 (N,), and their labels, bool (N,).

        Args: as `forward`; and `masked`, bool (B, L), of z.
        """
        y, revealed = (torch.cat(part) for part in zip(*drawn, strict=True))  # (draws * B, L) each
        repeated = None if attention_mask is None else attention_mask.repeat(len(drawn), 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            hidden = self.denoiser.hidden(y, repeated)  # the body alone: no output head runs on y
        if self.judge_all:
            shown = trainable_positions(input_ids, trainable_mask, attention_mask)
            revealed, label = shown.repeat(len(drawn), 1), ~masked.repeat(len(drawn), 1)
        else:
            label = y == input_ids.repeat(len(drawn), 1)
        return self.quality_head(hidden, repeated)[revealed].float(), label[revealed]

    def untouched(self) -> Tensor | float:
        """A 0 that depends on the parameters that the second pass does not use, since DDP waits for all of them."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()):
            return 0.0
        left_out = [p for p in self.denoiser.output_parameters() if p.requires_grad]
        return sum(((p * 0).sum() for p in left_out), 0.0)

    def window(self, masked: Tensor) -> Tensor:
        """The masks that may be revealed: all, or the leftmost `reveal_window` of each row."""
        return masked if self.reveal_window is None else masked & (masked.cumsum(-1) <= self.reveal_window)

    @torch.no_grad()
    def reveal(self, z: Tensor, hidden: Tensor, masked: Tensor, generator: torch.Generator | None = None) -> Draw:
        """Steps 2 and 3: y (B, L), and which tokens were revealed in it, bool (B, L).

        The output head runs here only at positions that may be revealed: k a row in random order.
        """
        window = self.window(masked)
        k = window.sum(-1).clamp(max=self.num_revealed)  # (B,)
        if self.reveal_order == "random":
            revealed = choose(window, k, generator)
            tokens, _ = self.draw(hidden, revealed, generator)
        else:
            drawn, probs = self.draw(hidden, window, generator)
            confidence = torch.zeros(z.shape, device=z.device).masked_scatter(window, probs.float())
            revealed = highest(confidence, window, k)
            tokens = drawn[revealed[window]]
        return z.masked_scatter(revealed, tokens), revealed

    def draw(
        self, hidden: Tensor, positions: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens x^ at `positions` (B, L) and their probabilities, (N,) each, in row-major order.

        Raises:
            FloatingPointError: the logits contain NaN or inf.
        """
        parts = []
        for part in split_positions(positions, self.chunk_size):
            logits = self.denoiser.logits(hidden, part)
            if not logits.amax(-1).isfinite().all():  # sample_tokens would end the process, on a GPU without a word
                raise FloatingPointError(
                    "The model's logits contain NaN or inf. Lower --learning-rate, or check the data; the last "
                    "checkpoint was written before this."
                )
            parts.append(sample_tokens(logits, self.temperature, self.top_p, generator=generator))
        tokens, probs = (torch.cat(part) for part in zip(*parts, strict=True))
        return tokens, probs


class CriticObjective(PRISMObjective):
    """The loss of Token-Critic: the head tells tokens of the data from tokens that the model wrote.

    1. and 2. as `PRISMObjective`; 3. all drawn tokens are written -> y, without masks;
    4. forward y; BCE(quality_i, 1[i was not masked]) at every trainable position; 5. as `PRISMObjective`

    Unlike PRISM's, the label does not say whether the token is right: a masked token that was drawn right counts as
    written by the model. Use with `TokenCriticScheduler`.

    Args:
        denoiser, quality_head, and the others: as `PRISMObjective`; there is no k, order or window.
    Source: Token-Critic (arXiv 2209.04439, training algorithm); there the critic is a model of its own.
    """

    judge_all = True

    def __init__(self, denoiser: nn.Module, quality_head: nn.Module, **settings: Any) -> None:
        if unknown := sorted({"num_revealed", "reveal_order", "reveal_window"} & settings.keys()):
            raise TypeError(f"`CriticObjective` writes every drawn token; it takes no {', '.join(unknown)}.")
        super().__init__(denoiser, quality_head, num_revealed=ALL_MASKS, **settings)
