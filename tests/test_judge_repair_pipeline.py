"""Judge and repair in the pipeline: rows leave when they are done, and what the output says of them."""

import pytest
import torch
from test_pipeline import twin  # a tiny random model

from prism_pipelines import (
    DrawConfidenceScheduler,
    JudgeAndRepairScheduler,
    MDLMScheduler,
    PrismPipeline,
    PrismScheduler,
    PromptConfidenceScheduler,
    QualityHead,
)
from prism_pipelines.sudoku import HARD_PUZZLE, MASK_ID, sudoku_tokenizer

FEW = {"doubt_threshold": 0.5, "tokens_per_step": 8}


def pipeline(temperature=1.0, scheduler=None):
    torch.manual_seed(1)
    head = QualityHead(32, "mlp")
    with torch.no_grad():
        head.out.weight.mul_(8)  # qualities that differ
    if temperature is not None:
        head.register_to_config(temperature=temperature)
    pipe = PrismPipeline(twin(), sudoku_tokenizer(), quality_head=head, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(n):
    return [torch.Generator().manual_seed(b) for b in range(n)]


@pytest.mark.parametrize("block_length", [None, 30])
def test_a_row_pays_for_its_own_forwards_only_and_no_mask_is_left(block_length):
    pipe = pipeline(scheduler=JudgeAndRepairScheduler(**FEW))
    puzzles = [HARD_PUZZLE, "." * 81, "12345678" + "." * 73]
    made = []
    hook = pipe.model.base_model.register_forward_hook(lambda *_: made.append(1))
    call = {"num_inference_steps": 90, "block_length": block_length, "output_type": "seq"}
    out = pipe(infill=puzzles, generator=generators(3), **call)
    hook.remove()
    assert out.nfe == len(made) <= 90 and max(out.nfe_per_row) <= out.nfe
    assert not (out.sequences == MASK_ID).any()
    assert out.accepted.shape == (3,) and out.confidence.shape == (3,)
    given = torch.tensor([[MASK_ID if c == "." else int(c) for c in p] for p in puzzles])
    assert torch.equal(out.sequences[given != MASK_ID], given[given != MASK_ID])
    for b, puzzle in enumerate(puzzles):
        alone = pipe(infill=puzzle, generator=generators(3)[b : b + 1], **call)
        if block_length is None:
            assert torch.equal(alone.sequences[0], out.sequences[b])
            assert alone.nfe_per_row == [out.nfe_per_row[b]] and alone.nfe == out.nfe_per_row[b]


def test_confidence_is_the_product_of_the_qualities_and_the_head_judges_the_canvas_that_is_returned():
    pipe = pipeline(scheduler=JudgeAndRepairScheduler(**FEW))
    out = pipe(infill=["." * 81] * 3, num_inference_steps=40, generator=generators(3), output_type="seq")
    quality = pipe.score(input_ids=out.sequences)[0]
    torch.testing.assert_close(out.confidence, quality.clamp(min=1e-6).log().sum(-1).exp(), rtol=1e-3, atol=1e-12)


def test_select_returns_the_surest_sample_of_each_row():
    pipe = pipeline(scheduler=MDLMScheduler())
    call = {"infill": [HARD_PUZZLE, "." * 81], "num_samples": 3, "num_inference_steps": 5}
    every = pipe(**call, generator=generators(6), return_quality=True)
    one = pipe(**call, generator=generators(6), select="confidence")
    best = every.quality.log().sum(-1).view(2, 3).argmax(-1) + torch.tensor([0, 3])
    assert torch.equal(one.sequences, every.sequences[best])
    assert one.texts == [every.texts[i] for i in best.tolist()]
    assert one.nfe == 6 and one.nfe_per_row == [18, 18] and one.quality is None
    torch.testing.assert_close(one.confidence, every.confidence[best])
    assert one.accepted is None


def test_without_calibration_nothing_is_said_of_confidence_and_select_is_refused_by_name():
    pipe = pipeline(temperature=None, scheduler=PrismScheduler())
    out = pipe(infill=HARD_PUZZLE, num_inference_steps=3, return_quality=True)
    assert out.confidence is None and out.quality is not None
    with pytest.raises(ValueError, match='`select="confidence"` needs a calibrated quality head'):
        pipe(infill=HARD_PUZZLE, num_samples=2, select="confidence")
    with pytest.raises(ValueError, match="`select` must be None"):
        pipe(infill=HARD_PUZZLE, num_samples=2, select="best")
    with pytest.raises(ValueError, match="`num_samples` of at least 2"):
        pipeline()(infill=HARD_PUZZLE, select="confidence")


def test_a_budget_below_a_fill_and_a_look_in_each_block_is_refused_by_name():
    pipe = pipeline(scheduler=JudgeAndRepairScheduler())
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 2"):
        pipe(infill=HARD_PUZZLE, num_inference_steps=3, block_length=20)


def test_a_callback_that_masks_tokens_leaves_no_mask_at_the_end():
    pipe = pipeline(scheduler=JudgeAndRepairScheduler(**FEW))

    def punch(pipe, step, timestep, tensors):
        tensors["sample"][:, :5] = MASK_ID if step % 7 == 3 else tensors["sample"][:, :5]
        return {"sample": tensors["sample"]}

    out = pipe(infill="." * 81, num_inference_steps=33, callback_on_step_end=punch, output_type="seq")
    assert out.nfe <= 33 and not (out.sequences[:, 5:] == MASK_ID).any()


@pytest.mark.parametrize("kind", [PromptConfidenceScheduler, DrawConfidenceScheduler])
@pytest.mark.parametrize("block_length", [None, 30])
def test_the_pipeline_gives_rules_that_read_a_context_theirs_at_no_forward(kind, block_length):
    pipe, made = pipeline(scheduler=kind(num_remask=2)), []
    hook = pipe.model.base_model.register_forward_hook(lambda *_: made.append(1))
    out = pipe(infill=HARD_PUZZLE, num_inference_steps=12, block_length=block_length, return_trace=True)
    hook.remove()
    assert out.nfe == len(made) == 12 and "." not in out.texts[0]
    assert sum(int(step.remasked.sum()) for step in out.trace) > 5


@pytest.mark.parametrize("block_length", [None, 27])
def test_a_row_is_accepted_where_the_scheduler_accepted_each_of_its_blocks(block_length, monkeypatch):
    pipe = pipeline(scheduler=JudgeAndRepairScheduler(doubt_threshold=0.15, tokens_per_step=8))
    said, step = [], JudgeAndRepairScheduler.step

    def watched(self, *args, **kwargs):
        said.append(step(self, *args, **kwargs))
        return said[-1]

    monkeypatch.setattr(JudgeAndRepairScheduler, "step", watched)
    call = {"num_inference_steps": 60, "block_length": block_length, "output_type": "seq"}
    out = pipe(infill=["." * 81, HARD_PUZZLE] * 4, generator=generators(8), **call)
    given_up = [b for b in range(8) if any(bool(s.finished[b]) and not bool(s.accepted[b]) for s in said)]
    assert out.accepted.tolist() == [b not in given_up for b in range(8)]
    assert 0 < len(given_up) < 8
