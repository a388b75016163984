"""Training-free remasking: a token is judged by how likely it was when it was drawn."""

from __future__ import annotations

from typing import Annotated

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .context import RunContext, token_logprob
from .functional import Generators
from .llada2 import runs_in_llada2_pipeline
from .mixin import MDMSchedulerMixin
from .scheduling_prism import check_remasking, remask_and_reveal, remasks
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Flag, Order, Temperature, TokenId, TopK, TopP, integer, number, one_of


@runs_in_llada2_pipeline
class DrawConfidenceScheduler(MDMSchedulerMixin):
    """`PrismScheduler`'s rule with the probability at which a visible token was drawn as its quality.

        q_i = p(y_i | the canvas in which y_i was drawn)

    p is the model's own probability, at temperature 1 and before truncation, in the forward pass in which the token was
    written. ReMDM "conf" remasks at random with probabilities made from p. Here the tokens of lowest p are remasked, as
    many as `PrismScheduler` would remask. The rule needs no trained head and no further forward pass.

    Example:
        >>> scheduler = DrawConfidenceScheduler(num_remask=1, mask_token_id=9)
        >>> scheduler.set_timesteps(2)
        >>> x, logprob = torch.tensor([[3, 5, 9, 9]]), torch.tensor([[-2.0, -0.1, torch.nan, torch.nan]])
        >>> context = RunContext.unwatched(x == x, draw_logprob=logprob)
        >>> scheduler.step(torch.zeros(1, 4, 10), 0, x, context=context).remasked.tolist()
        [[True, False, False, False]]

    Args:
        all fields: as `PrismScheduler`, so `from_config` turns one into the other.
    Raises:
        ValueError: a field out of its range, or fields that exclude each other.
    Source: the confidence of ReMDM (arXiv 2503.00307), "conf", with the counts of PRISM (arXiv 2510.01384).
    """

    reads_context: tuple[str, ...] = ("draw",)
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
        check_remasking(DrawConfidenceScheduler, self.config)

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
        """Remask the visible tokens of the lowest noted probability, fill masks.

        As `PrismScheduler.step`, but `quality` is not read: the score is `context.draw_logprob`, or
        `context.prompt_logprob` in `PromptConfidenceScheduler`. A token whose value is unknown (NaN) is remasked after
        all others, and never by `quality_threshold`.

        Raises:
            ValueError: also if tokens are to be remasked by their score and `context` is None.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )

        def score(visible: Tensor) -> Tensor:
            return token_logprob(context, f"{self.reads_context[0]}_logprob", sample, type(self).__name__).exp()

        output = remask_and_reveal(now, self.config, score, threshold)
        return output if return_dict else output.to_tuple()
