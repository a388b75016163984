"""Training-free remasking: a token is judged by what the model thought before anything was written."""

from __future__ import annotations

from .scheduling_draw_confidence import DrawConfidenceScheduler


class PromptConfidenceScheduler(DrawConfidenceScheduler):
    """`PrismScheduler`'s rule with p(y_i | prompt) as the quality of a visible token y_i.

        q_i = p(y_i | the canvas in which everything that is generated is masked)

    q_i is the model's probability of the token in the first forward pass of the run, or of each block. Tokens that were
    written after a wrong token were drawn to fit it, and make it look right; the prompt does not. So where the prompt
    determines the answer, this score finds wrong tokens better than the model's present probability. Without a prompt,
    the score only says how common a token is. The rule needs no trained head and no further forward pass, because the
    pipeline keeps the hidden states of the first one.

    Example:
        >>> scheduler = PromptConfidenceScheduler(num_remask=1, mask_token_id=9)
        >>> scheduler.set_timesteps(2)
        >>> x, logprob = torch.tensor([[3, 5, 9, 9]]), torch.tensor([[-2.0, -3.0, torch.nan, torch.nan]])
        >>> context = RunContext.unwatched(x == x, prompt_logprob=logprob)
        >>> scheduler.step(torch.zeros(1, 4, 10), 0, x, context=context).remasked.tolist()
        [[False, True, False, False]]

    Args:
        all fields: as `PrismScheduler`, so `from_config` turns one into the other.
    Raises:
        ValueError: a field out of its range, or fields that exclude each other.
    Source: ours; see docs/judging.md.
    """

    reads_context = ("prompt",)
