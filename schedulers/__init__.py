"""Schedulers of masked diffusion in the style of diffusers. They import torch and diffusers only.

Import as `prism_pipelines.schedulers`; a bare `import schedulers` would make a second copy of every class.
"""

from .scheduling_draw_confidence import DrawConfidenceScheduler
from .scheduling_judge_repair import JudgeAndRepairScheduler
from .scheduling_mdlm import MDLMScheduler
from .scheduling_p2 import P2Scheduler
from .scheduling_prism import PrismScheduler
from .scheduling_prompt_confidence import PromptConfidenceScheduler
from .scheduling_remdm import ReMDMScheduler
from .scheduling_self_confidence import SelfConfidenceScheduler
from .scheduling_strided_sweep import StridedSweepScheduler
from .scheduling_token_critic import TokenCriticScheduler
from .scheduling_token_to_mask import TokenToMaskScheduler
from .step import PrismSchedulerOutput

__all__ = [
    "DrawConfidenceScheduler",
    "JudgeAndRepairScheduler",
    "MDLMScheduler",
    "P2Scheduler",
    "PrismScheduler",
    "PrismSchedulerOutput",
    "PromptConfidenceScheduler",
    "ReMDMScheduler",
    "SelfConfidenceScheduler",
    "StridedSweepScheduler",
    "TokenCriticScheduler",
    "TokenToMaskScheduler",
]
