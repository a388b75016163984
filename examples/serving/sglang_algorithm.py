"""Decoding rules of this package that need logits alone, as an algorithm of SGLang's diffusion engine.

    pip install ./examples/serving            # beside sglang and prism-pipelines; its entry point is a plugin of SGLang
    python3 -m sglang.launch_server --model-path JetLM/SDAR-8B-Chat-b4 --trust-remote-code \\
        --dllm-algorithm PrismRule --dllm-algorithm-config rule.yaml

with rule.yaml such as

    scheduler: SelfConfidenceScheduler   # or MDLMScheduler, TokenToMaskScheduler, ...
    steps: 8                             # forward passes of a block
    config: {num_remask: 1, order: confidence, temperature: 0.0}

Read against sglang 0.5.23 (srt/dllm/algorithm/base.py, low_confidence.py, srt/plugins). The engine needs a GPU and was
not run here; the class is tested with a stand-in of its base class that runs the same loop
(tests/test_serving_example.py).
"""

from __future__ import annotations

import torch

from prism_pipelines.schedulers import MDLMScheduler
from prism_pipelines.schedulers.by_name import change_scheduler


def prism_rule(base: type) -> type:
    """The algorithm on top of the engine's base class `DllmAlgorithm`."""

    class PrismRule(base):
        """One step of a scheduler for each forward pass of a block; rows of a batch may be at different steps."""

        def __init__(self, config):
            super().__init__(config)
            given = config.algorithm_config
            self.scheduler = change_scheduler(MDLMScheduler(), given.get("scheduler"), given.get("config"))
            if self.scheduler.needs_quality or getattr(self.scheduler, "reads_context", ()):
                raise ValueError(
                    f"{type(self.scheduler).__name__} reads hidden states or what a run knows of its tokens, and the "
                    "engine gives logits alone. Use SelfConfidenceScheduler, MDLMScheduler or TokenToMaskScheduler."
                )
            self.steps = given.get("steps", config.block_size)
            self.scheduler.set_timesteps(self.steps)

        def max_steps(self, block_size: int) -> int:
            return self.steps + 1  # the last forward pass only writes the finished block into the cache

        def init_step_state(self, forward_batch) -> list:
            return [{"step": 0, "given": mask} for mask in self._prompt_mask(forward_batch)]

        def step(self, forward_batch, full_logits: torch.Tensor, states: list) -> list[bool]:
            rows = forward_batch.batch_size
            sample = forward_batch.input_ids.view(rows, self.block_size)
            logits = full_logits.view(rows, self.block_size, -1)
            done = [state["step"] >= self.steps for state in states]
            new = sample.clone()
            for number in sorted({state["step"] for state in states} - {self.steps}):
                some = torch.tensor([i for i in range(rows) if states[i]["step"] == number], device=sample.device)
                given = torch.stack([states[i]["given"] for i in some.tolist()])
                out = self.scheduler.step(
                    logits[some], number, sample[some], generation_mask=~given, mask_token_id=self.mask_id
                )
                new[some] = out.prev_sample
                for i in some.tolist():
                    states[i]["step"] += 1
            forward_batch.input_ids.copy_(new.view(-1))  # in place: CUDA graphs hold the tensor
            return done

    return PrismRule


def register() -> None:
    """What SGLang's plugin loader calls in each of its processes: the algorithm enters its table."""
    from sglang.srt.dllm import algorithm
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    algorithm.algo_name_to_cls["PrismRule"] = prism_rule(DllmAlgorithm)
