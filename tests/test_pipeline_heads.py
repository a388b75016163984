"""Heads with LoRA adapters in a pipeline: loading, switching, unloading, and saving by reference."""

import json
import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_pipeline import seeded, twin

from prism_pipelines import (
    MDLMScheduler,
    PrismPipeline,
    PrismScheduler,
    QualityHead,
    SelfConfidenceScheduler,
    disable_prism,
    enable_prism,
)
from prism_pipelines.hub.adapters import adapter_names
from prism_pipelines.hub.publish import save_head_repo
from prism_pipelines.sudoku import sudoku_tokenizer


def save_base(folder):
    model = twin()
    model.save_pretrained(folder)
    sudoku_tokenizer().save_pretrained(folder)
    return str(folder)


def save_head(folder, base, seed, **scheduler):
    """A head repository as the design lays it out: PEFT adapter at the root, quality_head/, scheduler/."""
    model = twin()
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
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
    assert pipe.scheduler is scheduler and adapter_names(pipe.model) == ["prism"]
    ids = torch.full((1, 6), 2)
    assert torch.equal(pipe.score(input_ids=ids)[0], PrismPipeline.from_pretrained(second).score(input_ids=ids)[0])
    pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved", quality_head=str(plain))
    assert back.scheduler.config.num_remask == 7 and adapter_names(back.model) == []


def test_a_head_whose_adapter_is_broken_leaves_no_head_to_judge_without_its_adapter(repos, tmp_path):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        pipe.load_quality_head(second)
    with pytest.raises(ValueError, match="no quality head"):
        tokens(pipe)


def plain_head(folder, base):
    """A head without an adapter, in a folder."""
    torch.manual_seed(9)
    QualityHead(32, base_model=base).save_pretrained(folder / "quality_head")
    PrismScheduler(num_remask=4).save_pretrained(folder / "scheduler")
    return str(folder)


def test_a_model_is_saved_whole_once_its_last_adapter_is_gone(repos, tmp_path):
    base, first, second = repos
    weights = PrismPipeline.from_pretrained(base).model.state_dict()
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.load_quality_head(second, name="other")
    with pytest.warns(UserWarning, match="MDLMScheduler"):
        pipe.unload_quality_head()
    pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved").model.state_dict()
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    pipe.load_quality_head(first)  # and it takes an adapter again, as if it had never had one
    ids = torch.full((1, 6), 2)
    fresh = PrismPipeline.from_pretrained(base, quality_head=first)
    torch.testing.assert_close(pipe.score(input_ids=ids)[0], fresh.score(input_ids=ids)[0])
    pipe.save_pretrained(tmp_path / "with_adapter")
    again = PrismPipeline.from_pretrained(tmp_path / "with_adapter")
    torch.testing.assert_close(again.score(input_ids=ids)[0], fresh.score(input_ids=ids)[0])


def test_disable_prism_leaves_a_model_that_can_be_saved(repos, tmp_path):
    base, head, _ = repos
    model = PrismPipeline.from_pretrained(base).model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=sudoku_tokenizer())
    enable_prism(pipe, head)
    disable_prism(pipe)
    model.save_pretrained(tmp_path / "saved")
    back = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_head_without_an_adapter_is_not_saved_with_that_of_another(repos, tmp_path):
    base, first, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.load_quality_head(plain_head(tmp_path / "plain", base), name="plain")
    ids = torch.full((1, 6), 2)
    score = pipe.score(input_ids=ids)[0]
    save_head_repo(pipe, tmp_path / "repo", base_model=base)
    assert not (tmp_path / "repo" / "adapter_model.safetensors").exists()
    assert torch.equal(PrismPipeline.from_pretrained(tmp_path / "repo").score(input_ids=ids)[0], score)
    pipe.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("adapter*"))
    torch.testing.assert_close(PrismPipeline.from_pretrained(tmp_path / "saved").score(input_ids=ids)[0], score)


def test_the_head_of_a_saved_pipeline_comes_with_the_adapter_that_lies_in_its_model(repos, tmp_path):
    base, head, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    pipe.save_pretrained(tmp_path / "saved")
    ids = torch.full((1, 6), 2)
    found = PrismPipeline.from_pretrained(base, quality_head=str(tmp_path / "saved"))
    assert torch.equal(found.score(input_ids=ids)[0], pipe.score(input_ids=ids)[0])
    other = LLaDA2Pipeline(model=twin(), scheduler=BlockRefinementScheduler(), tokenizer=sudoku_tokenizer())
    enable_prism(other, str(tmp_path / "saved"))
    assert adapter_names(other.model) == ["prism"]


def test_the_first_head_brings_a_scheduler_that_reads_it_and_others_change_none(repos, tmp_path):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base)
    pipe.load_quality_head(first)
    assert isinstance(pipe.scheduler, PrismScheduler) and pipe.scheduler.config.num_remask == 3
    pipe.load_quality_head(second, name="other")
    assert pipe.scheduler.config.num_remask == 3
    chosen = PrismPipeline.from_pretrained(base, scheduler=SelfConfidenceScheduler())
    chosen.load_quality_head(first)
    assert isinstance(chosen.scheduler, SelfConfidenceScheduler)
    given = PrismPipeline.from_pretrained(base, quality_head=first, scheduler=MDLMScheduler())
    assert isinstance(given.scheduler, MDLMScheduler)
    with pytest.warns(UserWarning, match="MDLMScheduler does not read the quality head"):
        save_head_repo(given, tmp_path / "repo", base_model=base)


def test_one_of_two_heads_is_unloaded_and_the_other_goes_on_as_before(repos, tmp_path):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    before = tokens(pipe)
    pipe.load_quality_head(second, name="other")
    pipe.unload_quality_head("other")
    with torch.no_grad():  # PEFT would go on with the adapter that is left
        assert torch.equal(pipe.model(before).logits, PrismPipeline.from_pretrained(base).model(before).logits)
    with pytest.raises(ValueError, match="no quality head"):
        tokens(pipe)
    pipe.set_quality_head("prism")
    assert torch.equal(tokens(pipe), before)


def test_from_pipe_keeps_the_names_of_the_heads(repos):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.load_quality_head(second, name="other")
    ids = torch.full((1, 6), 2)
    score = pipe.score(input_ids=ids)[0]
    shared = PrismPipeline.from_pipe(pipe)
    shared.set_quality_head("prism")
    shared.set_quality_head("other")
    assert torch.equal(shared.score(input_ids=ids)[0], score)


def test_a_head_set_as_an_attribute_is_unloaded_with_the_rest(repos):
    base, first, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.quality_head = QualityHead(32)
    with pytest.warns(UserWarning, match="MDLMScheduler"):
        pipe.unload_quality_head()
    assert pipe.quality_head is None and adapter_names(pipe.model) == []


def test_heads_out_of_use_follow_the_model_to_its_device(repos, tmp_path):
    base, first, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.load_quality_head(plain_head(tmp_path / "plain", base), name="plain")
    idle = pipe._heads["prism"]
    moved = []
    idle.to = lambda device: moved.append(device) or idle
    pipe.set_quality_head("prism")
    assert moved == [pipe.device]


def test_an_adapter_that_does_not_fit_changes_nothing(repos, tmp_path):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base)
    pipe.model.requires_grad_(True)
    ids = torch.full((1, 6), 2)
    file = tmp_path / "b" / "adapter_model.safetensors"
    weights = load_file(file)
    renamed = {key.replace("layer.1.", "layer.7."): value for key, value in weights.items()}
    cut = {key: value[:2] if "lora_A" in key else value for key, value in weights.items()}
    with torch.no_grad():
        before = pipe.model(ids).logits
    for broken, words in ((renamed, "does not fit"), (cut, "says rank")):
        save_file({key: value.contiguous() for key, value in broken.items()}, file)
        with pytest.raises(ValueError, match=words):
            pipe.load_quality_head(second)
        with torch.no_grad():
            assert torch.equal(pipe.model(ids).logits, before)
        assert adapter_names(pipe.model) == [] and pipe.quality_head is None
    pipe.load_quality_head(first)
    with pytest.warns(UserWarning, match="MDLMScheduler"):
        pipe.unload_quality_head()
    assert all(value.requires_grad for value in pipe.model.parameters())


@pytest.mark.parametrize("more", [{"bias": "all"}, {"modules_to_save": ["dense"]}, {"trainable_token_indices": [3]}])
def test_an_adapter_that_is_more_than_lora_is_refused_by_name(repos, tmp_path, more):
    base, first, _ = repos
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    with pytest.raises(ValueError, match=rf"{next(iter(more))}=.*Merge it"):
        PrismPipeline.from_pretrained(base, quality_head=first)


def test_a_save_over_one_of_another_kind_is_refused(repos, tmp_path):
    base, first, _ = repos
    plain, tuned = PrismPipeline.from_pretrained(base), PrismPipeline.from_pretrained(base, quality_head=first)
    plain.save_pretrained(tmp_path / "plain")
    tuned.save_pretrained(tmp_path / "tuned")
    for pipe, folder, words in ((tuned, "plain", "a whole model saved"), (plain, "tuned", "an adapter saved")):
        with pytest.raises(ValueError, match=rf"{words} before.*another folder"):
            pipe.save_pretrained(tmp_path / folder)
    plain.save_pretrained(tmp_path / "plain")
    tuned.save_pretrained(save_directory=tmp_path / "tuned")


def test_a_users_own_adapter_stays_as_it_was(repos):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base)
    pipe.model.load_adapter(second, adapter_name="mine")
    ids = torch.full((1, 6), 2)
    with torch.no_grad():
        before = pipe.model(ids).logits
        pipe.load_quality_head(QualityHead(32))
        assert torch.equal(pipe.model(ids).logits, before)
        pipe.load_quality_head(first)
        assert not torch.equal(pipe.model(ids).logits, before)
        with pytest.warns(UserWarning, match="MDLMScheduler"):
            pipe.unload_quality_head()
        assert torch.equal(pipe.model(ids).logits, before) and adapter_names(pipe.model) == ["mine"]


def test_a_head_whose_adapter_another_pipeline_took_away_is_not_used(repos):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.load_quality_head(second, name="other")
    shared = PrismPipeline.from_pipe(pipe)
    shared.unload_quality_head("prism")
    with pytest.raises(ValueError, match=r"adapter of the quality head 'prism' is no longer"):
        pipe.set_quality_head("prism")
    shared.unload_quality_head("other")
    with pytest.raises(ValueError, match=r"adapter of the quality head 'other' is no longer"):
        pipe.score(input_ids=torch.full((1, 6), 2))


def test_enable_prism_uses_its_adapter_also_where_others_are_switched_off(repos, tmp_path):
    base, first, second = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=second)
    pipe.load_quality_head(second, name="other")
    pipe.unload_quality_head("prism")
    pipe.load_quality_head(plain_head(tmp_path / "plain", base), name="plain")
    other = LLaDA2Pipeline(model=pipe.model, scheduler=BlockRefinementScheduler(), tokenizer=sudoku_tokenizer())
    ids = torch.full((1, 6), 2)
    with torch.no_grad():
        before = pipe.model(ids).logits
        enable_prism(other, first)
        assert torch.equal(pipe.model(ids).logits, PrismPipeline.from_pretrained(first).model(ids).logits)
        disable_prism(other)
        assert torch.equal(pipe.model(ids).logits, before)


def test_an_offloaded_model_gives_the_same_tokens(repos):
    base, first, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    before = tokens(pipe)
    cpu_offload(pipe.model, torch.device("cpu"))  # weights are on "meta" but while their layer runs
    assert pipe.model.get_output_embeddings().weight.is_meta
    after = pipe(gen_length=12, num_inference_steps=6, generator=seeded(), output_type="seq").sequences
    assert torch.equal(after, before)
    with pytest.raises(ValueError, match="offload"):
        pipe.enable_model_cpu_offload()


def test_what_is_no_scheduler_of_ours_is_refused_by_name(repos):
    base, first, _ = repos
    scheduler = BlockRefinementScheduler()
    with pytest.raises(TypeError, match=r"`scheduler` must be one of .*PrismScheduler.*; got"):
        PrismPipeline.from_pretrained(base, scheduler=scheduler)
    pipe = PrismPipeline.from_pretrained(base, quality_head=first)
    pipe.scheduler = scheduler
    with pytest.raises(TypeError, match=r"`scheduler` must be one of"):
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
