"""Heads with LoRA adapters in a pipeline: loading, switching, unloading, and saving by reference."""

import json
import warnings

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from peft import LoraConfig, get_peft_model
from test_pipeline import seeded, twin

from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead, disable_prism, enable_prism
from prism_pipelines.hub import adapters
from prism_pipelines.sudoku import sudoku_tokenizer


def save_base(folder):
    model = twin()
    model.save_pretrained(folder)
    sudoku_tokenizer().save_pretrained(folder)
    return str(folder)


def save_head(folder, base, seed, **scheduler):
    """A head repository as the design lays it out: PEFT adapter at the root, quality_head/, scheduler/."""
    torch.manual_seed(seed)
    model = get_peft_model(twin(), LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    QualityHead(32, "mlp", base_model=base).save_pretrained(folder / "quality_head")
    PrismScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return str(folder)


@pytest.fixture
def repos(tmp_path):
    base = save_base(tmp_path / "base")
    return base, save_head(tmp_path / "a", base, 1, num_remask=3), save_head(tmp_path / "b", base, 2, num_remask=1)


def tokens(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(gen_length=12, num_inference_steps=6, generator=seeded(), output_type="seq").sequences


def test_a_head_repository_alone_and_base_with_head_are_the_same_pipeline(repos):
    base, head, _ = repos
    alone, both = PrismPipeline.from_pretrained(head), PrismPipeline.from_pretrained(base, quality_head=head)
    assert alone.scheduler.config.num_remask == both.scheduler.config.num_remask == 3
    assert torch.equal(tokens(alone), tokens(both))
    plain = PrismPipeline.from_pretrained(base)
    ids = torch.full((1, 6), 2)
    with torch.no_grad():
        assert not torch.allclose(plain.model(ids).logits, alone.model(ids).logits, atol=1e-3)


def test_heads_switch_by_name_with_their_adapters(repos):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    alone = tokens(pipe)
    pipe.load_lora_weights(second, adapter_name="other")
    other = pipe.score(input_ids=alone)[0]
    assert torch.equal(other, PrismPipeline.from_pretrained(second).score(input_ids=alone)[0])
    pipe.set_quality_head("prism")
    assert torch.equal(tokens(pipe), alone)
    pipe.unload_quality_head("other")
    assert torch.equal(tokens(pipe), alone)
    with pytest.warns(UserWarning, match="MDLMScheduler"):
        pipe.unload_quality_head()
    assert isinstance(pipe.scheduler, MDLMScheduler)
    with torch.no_grad():
        assert torch.equal(pipe.model(alone).logits, PrismPipeline.from_pretrained(base).model(alone).logits)


@pytest.mark.parametrize("base_is_a_pipeline", [False, True])
def test_a_pipeline_with_an_adapter_is_saved_by_reference_and_comes_back(repos, tmp_path, base_is_a_pipeline):
    base, head, _ = repos
    if base_is_a_pipeline:
        PrismPipeline.from_pretrained(base).save_pretrained(tmp_path / "pipeline_base")
        base = str(tmp_path / "pipeline_base")
        config = tmp_path / "a" / "quality_head" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model": base}))
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    pipe.scheduler = PrismScheduler(num_remask=2)
    pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model" / "model.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back = PrismPipeline.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(tokens(back), tokens(pipe))
    back.save_pretrained(tmp_path / "again")
    assert torch.equal(tokens(PrismPipeline.from_pretrained(str(tmp_path / "again"))), tokens(pipe))


def test_a_missing_base_is_named(repos, tmp_path):
    base, head, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"base.* is neither a folder"):
        PrismPipeline.from_pretrained(str(tmp_path / "saved"))
    moved = PrismPipeline.from_pretrained(str(tmp_path / "moved"), quality_head=head)
    assert torch.equal(tokens(moved), tokens(pipe))


def test_a_pickled_adapter_is_refused(repos, tmp_path):
    base, head, _ = repos
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        PrismPipeline.from_pretrained(base, quality_head=head)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_head_that_replaces_another_keeps_the_scheduler(repos, tmp_path):
    base, first, second = repos
    plain = tmp_path / "plain"
    QualityHead(32, base_model=base).save_pretrained(plain / "quality_head")
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    scheduler = pipe.scheduler = PrismScheduler(num_remask=7)
    pipe.load_quality_head(second)
    assert pipe.scheduler is scheduler and adapters(pipe.model) == ["prism"]
    ids = torch.full((1, 6), 2)
    assert torch.equal(pipe.score(input_ids=ids)[0], PrismPipeline.from_pretrained(second).score(input_ids=ids)[0])
    pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved", quality_head=str(plain))
    assert back.scheduler.config.num_remask == 7 and adapters(back.model) == []


def test_a_head_whose_adapter_is_broken_leaves_no_head_to_judge_without_its_adapter(repos, tmp_path):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        pipe.load_quality_head(second)
    with pytest.raises(ValueError, match="no quality head"):
        tokens(pipe)


def test_an_adapter_of_another_pipeline_that_shares_the_model_is_not_touched(repos, tmp_path):
    base, first, second = repos
    plain = tmp_path / "plain"
    QualityHead(32, base_model=base).save_pretrained(plain / "quality_head")
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    before = tokens(pipe)
    theirs = LLaDA2Pipeline(pipe.model, BlockRefinementScheduler(), pipe.tokenizer)
    for head in (second, str(plain)):
        with pytest.raises(ValueError, match="has an adapter called 'prism' already"):
            PrismPipeline.from_pipe(pipe, quality_head=head)
        with pytest.raises(ValueError, match="has an adapter called 'prism' already"):
            enable_prism(theirs, head)
    assert torch.equal(tokens(pipe), before) and isinstance(theirs.scheduler, BlockRefinementScheduler)
    with pytest.warns(UserWarning, match="MDLMScheduler"):
        pipe.unload_quality_head()
    enable_prism(theirs, first)
    enable_prism(theirs, second)  # its own adapter is replaced
    with pytest.raises(ValueError, match=r"disable_prism\(pipe\)"):
        PrismPipeline.from_pipe(theirs, quality_head=first)
    disable_prism(theirs)
    again = PrismPipeline.from_pipe(theirs, quality_head=first)
    assert torch.equal(tokens(again), before)


@pytest.mark.parametrize("wrong", [3, torch.nn.Linear(32, 1), {}])
def test_what_is_no_head_is_refused_by_name(repos, wrong):
    pipe = PrismPipeline.from_pretrained(repos[0])
    theirs = LLaDA2Pipeline(pipe.model, BlockRefinementScheduler(), pipe.tokenizer)
    for use in (
        pipe.load_quality_head,
        lambda head: enable_prism(theirs, head),
        lambda head: PrismPipeline(pipe.model, pipe.tokenizer, head),
        lambda head: PrismPipeline.from_pretrained(repos[0], quality_head=head),
    ):
        with pytest.raises(TypeError, match="`quality_head` must be a QualityHead"):
            use(wrong)
