"""Schedulers of masked diffusion in the style of diffusers. They import torch and diffusers only.

Import as `prism_pipelines.schedulers`; a bare `import schedulers` would make a second copy of every class.
"""

from .scheduling_mdlm import MDLMScheduler
from .scheduling_prism import PrismScheduler, PrismSchedulerOutput
from .scheduling_self_confidence import SelfConfidenceScheduler

__all__ = ["MDLMScheduler", "PrismScheduler", "PrismSchedulerOutput", "SelfConfidenceScheduler"]
