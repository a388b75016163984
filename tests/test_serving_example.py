"""examples/serving: an algorithm of SGLang, driven as its base class drives one, gives what the pipeline gives."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_twins import MASK, aligned, checkpoint, load

from prism_pipelines import MDLMScheduler, SelfConfidenceScheduler

PATH = Path(__file__).resolve().parent.parent / "examples" / "serving" / "sglang_algorithm.py"


class StandIn:
    """What the algorithm needs of sglang 0.5.23's `DllmAlgorithm`, and its synchronous loop; the engine needs a GPU."""

    def __init__(self, config):
        self.block_size, self.mask_id = config.block_size, config.mask_id

    def _prompt_mask(self, forward_batch):
        if forward_batch.dllm_prompt_mask is not None:
            return forward_batch.dllm_prompt_mask
        return forward_batch.input_ids.view(forward_batch.batch_size, self.block_size) != self.mask_id

    def run(self, forward, forward_batch):
        states, passes = self.init_step_state(forward_batch), 1
        logits = forward(forward_batch.input_ids)
        for _ in range(self.max_steps(self.block_size)):
            if all(self.step(forward_batch, logits, states)):
                return passes
            logits, passes = forward(forward_batch.input_ids), passes + 1
        raise AssertionError("it was never done")


def algorithm(block_size=4, **given):
    spec = importlib.util.spec_from_file_location("sglang_algorithm", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = SimpleNamespace(block_size=block_size, mask_id=MASK, algorithm_config=given)
    return module.prism_rule(StandIn)(config)


@pytest.mark.parametrize(
    "scheduler",
    [
        SelfConfidenceScheduler(num_remask=1, order="confidence", temperature=0.0),
        MDLMScheduler(order="confidence", temperature=0.0),
    ],
)
def test_blocks_are_those_of_the_pipeline(scheduler):
    pipe = load(checkpoint("sdar"), scheduler=scheduler)
    prompt = torch.randint(8, MASK, (3, 6), generator=torch.Generator().manual_seed(0))
    expected = pipe(input_ids=prompt, gen_length=6, num_inference_steps=8).sequences  # blocks of 4: 4 steps each
    fields = {name: value for name, value in scheduler.config.items() if name in ("num_remask", "order", "temperature")}
    rule = algorithm(scheduler=type(scheduler).__name__, steps=4, config=fields)
    text = prompt
    for start in (4, 8):  # a block that holds the end of the prompt, and one of masks
        block = torch.full((3, 4), MASK)
        block[:, : text.shape[1] - start] = text[:, start:]
        before = text[:, :start]
        batch = SimpleNamespace(input_ids=block.flatten(), batch_size=3, dllm_prompt_mask=None)

        def forward(ids, before=before):
            whole = torch.cat([before, ids.view(3, 4)], dim=1)
            return aligned(pipe, whole)[:, -4:].flatten(0, 1)

        assert rule.run(forward, batch) == 5  # four steps, and one pass that writes the block into the cache
        text = torch.cat([before, batch.input_ids.view(3, 4)], dim=1)
    assert torch.equal(text, expected)


def test_rows_may_be_at_different_steps_and_given_tokens_stay():
    rule = algorithm(steps=4)
    batch = SimpleNamespace(
        input_ids=torch.tensor([9, MASK, MASK, MASK, MASK, 10, 11, MASK]), batch_size=2, dllm_prompt_mask=None
    )
    states = rule.init_step_state(batch)
    states[1]["step"] = 4
    before = batch.input_ids.clone()
    done = rule.step(batch, torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), states)
    assert done == [False, True] and [state["step"] for state in states] == [1, 4]
    assert torch.equal(batch.input_ids[4:], before[4:]) and batch.input_ids[0] == 9
    assert int((batch.input_ids[:4] == MASK).sum()) == 2


def test_a_rule_that_needs_hidden_states_is_refused():
    for name in ("PrismScheduler", "TokenCriticScheduler", "PromptConfidenceScheduler", "JudgeAndRepairScheduler"):
        with pytest.raises(ValueError, match=f"{name} reads hidden states or what a run knows"):
            algorithm(scheduler=name)
