"""Training-free remasking: a token is judged by what the model thought before anything was written."""

from __future__ import annotations

from typing import Annotated

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .context import RunContext, token_logprob
from .functional import Generators
from .llada2 import resolve_threshold, runs_in_llada2_pipeline
from .mixin import MDMSchedulerMixin
from .scheduling_prism import check_remasking, remask_and_reveal, remasks
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Flag, Order, Temperature, TokenId, TopK, TopP, integer, number, one_of


@runs_in_llada2_pipeline
class PromptConfidenceScheduler(MDMSchedulerMixin):
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
    can_remask = property(remasks)

    @register_to_config
    def __init__(
        self,
        order: Order = "random",
        num_remask: Annotated[int | None, integer(0)] = None,
        eta: Annotated[float | None, number(0, 1)] = None,
        eta_schedule: Annotated[str, one_of("constant", "inverse")] = "constant",
        eta_reference_steps: Annotated[int | None, integer(1)] = None,
        remask_start: Annotated[float, number(0, 1)] = 0.0,
        remask_end: Annotated[float, number(0, 1)] = 1.0,
        loop_steps: Annotated[int, integer(0)] = 0,
        loop_num_remask: Annotated[int, integer(0)] = 0,
        loop_at: Annotated[float, number(0, 1, above=True)] = 1.0,
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
        use_threshold: Flag = False,
        threshold: Annotated[float, number(0)] = 0.9,
        block_length: Annotated[int, integer(1)] = 32,
        quality_threshold: Annotated[float | None, number(0, 1, above=True)] = None,
        max_share: Annotated[float, number(0, 1, above=True)] = 0.25,
    ) -> None:
        check_remasking(PromptConfidenceScheduler, self.config)

    def step(
        self,
        model_output: Logits,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        context: RunContext | None = None,
        threshold: float | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Remask the visible tokens of the lowest p(token | prompt), fill masks.

        As `PrismScheduler.step`, but `quality` is not read: the score is `context.prompt_logprob`. A token whose
        value is unknown (NaN) is remasked after all others, and never by `quality_threshold`.

        Raises:
            ValueError: also if tokens are to be remasked by their score and `context` is None.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )

        def score(visible: Tensor) -> Tensor:
            return token_logprob(context, "prompt_logprob", sample, "PromptConfidenceScheduler").exp()

        threshold = resolve_threshold(self.config, threshold)
        output = now.output(*remask_and_reveal(now, self.config, score, threshold))
        return output if return_dict else output.to_tuple()
