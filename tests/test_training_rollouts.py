"""Heads on the states of the model's own runs: labels, exact resume, what is saved, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from family_twins import EVERY, LENGTH, MASK, V, Words, checkpoint, load
from forked import launched
from safetensors.torch import load_file
from test_training import log_of, run, run_and_die, weights
from test_training_parallel import assert_all_end_well
from torch.nn.functional import logsigmoid

from prism_pipelines import MDLMScheduler, MDMSpec, PrismPipeline, QualityHead
from prism_pipelines.sampling.canvas import Canvas
from prism_pipelines.schedulers.context import first_channels, num_features
from prism_pipelines.training.arguments import RunArguments, check_run
from prism_pipelines.training.head_start import begin_neutral, first_guess, fit_skip
from prism_pipelines.training.held_out import MEASURES, HeadReport
from prism_pipelines.training.rollout_losses import RolloutObjective, every
from prism_pipelines.training.rollouts import RolloutPool, RolloutSettings
from prism_pipelines.training.setup import build_objective

WAYS = {
    "rollout": ("--objective=prism", "--states=rollout", "--freeze-backbone", "--puzzle-share=1"),
    "mixed": ("--objective=prism", "--states=mixed", "--rank=2", "--lora-targets=query", "--puzzle-share=1"),
    "distill": ("--objective=distill", "--dataset=sudoku"),
}
SHORT = ("--rollout-steps-min=3", "--rollout-steps-max=9", "--rollout-runs=3", "--head=block")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mdm")
    run(folder, "--objective=mdm", "--max-steps=4", "--weighting=uniform")
    return folder


def objective(family, **flags):
    pipe = load(checkpoint(family))
    run = RunArguments(dataset="some/data", base_model="some/model", head="block", **flags)
    check_run(run)
    torch.manual_seed(0)
    return build_objective(run, pipe.model, Words(), MDMSpec.from_dict(dict(pipe.config.mdm_spec))).train()


def rows(count, length=LENGTH):
    ids = torch.randint(8, MASK, (count, length), generator=torch.Generator().manual_seed(1))
    trainable = torch.ones_like(ids, dtype=torch.bool)
    trainable[:, [0, -1]] = False
    return {"input_ids": ids, "trainable_mask": trainable}


# --- states and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "bert", "Dream", "sdar"])
def test_a_pool_writes_what_the_pipeline_writes(family):
    pipe = load(checkpoint(family))
    given = rows(3, 16)
    canvas = Canvas(given["input_ids"].masked_fill(given["trainable_mask"], MASK), given["trainable_mask"], None, True)
    scheduler, steps = MDLMScheduler(order="random", temperature=1.0), 7
    settings = RolloutSettings(block_length=8 if family == "sdar" else None)
    pool = RolloutPool(pipe.denoiser, (), settings, 1)
    run = pool.start(canvas, given["input_ids"], scheduler, steps)
    pool.runs = [run]
    torch.manual_seed(5)
    while not run.done:
        pool.advance(run, pipe.denoiser.hidden(*pool.batch()), torch.ones(run.sample.shape))
    pipe.scheduler = scheduler
    torch.manual_seed(5)
    total = sum(steps for _, steps in run.segments)
    out = pipe(infill=canvas.sample, num_inference_steps=total, block_length=settings.block_length, output_type="seq")
    assert torch.equal(out.sequences, run.sample)


def test_all_visible_generated_tokens_are_judged_by_the_truth_and_given_ones_never():
    made = objective("llada", objective="prism", states="rollout", freeze_backbone=True, rollout_steps_max=8)
    batch = rows(8)
    z, masked, rate, pool, judged = made.corrupt(**batch)
    assert z is None and masked is None and rate is None
    seen = 0
    for part, chosen in zip(pool.runs, judged, strict=True):
        expected = part.canvas.generated & (part.sample != MASK)
        assert torch.equal(chosen, expected) and not (chosen[:, [0, -1]]).any()
        seen += int(expected.sum())
    before = [run.sample.clone() for run in pool.runs]
    logits, features, labels = made.judge_runs(pool, judged)
    assert features.shape == (seen, num_features(made.quality_head.reads_context))
    right = [(y == run.clean)[chosen] for y, run, chosen in zip(before, pool.runs, judged, strict=True)]
    assert torch.equal(labels, torch.cat(right).float()) and len(logits) == seen > 0


def test_the_label_of_distillation_is_the_models_own_probability_without_the_token():
    """Against a full forward pass for every token, with everything of its stride masked."""
    made = objective("llada", objective="distill", label_stride=4, mask_rate_min=0.5, rollout_steps_max=8)
    made.stride_checked = 1.0
    pool = made.corrupt(**rows(4))[3]
    judged = made.judged(pool)
    samples = [run.sample.clone() for run in pool.runs]
    _, _, labels = made.judge_runs(pool, judged)
    expected = []
    for part, sample, chosen in zip(pool.runs, samples, judged, strict=True):
        for row, i in chosen.nonzero().tolist():
            together = (torch.arange(sample.shape[1]) - i) % 4 == 0
            together &= part.canvas.generated[row] & (sample[row] != MASK)
            hidden = made.denoiser.hidden(torch.where(together, MASK, sample[row])[None])
            one = torch.zeros(1, sample.shape[1], dtype=torch.bool)
            one[0, i] = True
            log_p = made.denoiser.logits(hidden, one).float().log_softmax(-1)
            expected.append(float(log_p[0, sample[row, i]]))
    assert len(expected) > 10
    torch.testing.assert_close(labels, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_both_objectives_teach_the_head_of_every_family_and_nothing_else(family):
    every_token = {"objective": "distill", "mask_rate_min": 0.5, "label_stride": 1}
    for flags in (every_token, {"objective": "prism", "states": "rollout"}):
        if flags["objective"] == "prism":
            flags["freeze_backbone"] = True
        made = objective(family, rollout_steps_min=2, rollout_steps_max=6, **flags)
        made.stride_checked = 1.0
        for _ in range(4):  # at some states no token is judged
            made(**rows(6)).loss.backward()
        found = {name: p.grad for name, p in made.named_parameters() if p.requires_grad}
        assert all(name.startswith("quality_head") for name in found)
        assert found["quality_head.context_in.weight"].abs().max() > 0
        assert all(p.grad is None for p in made.denoiser.parameters())


@pytest.mark.parametrize("architecture", ["linear", "block_mlp"])
def test_a_head_with_context_begins_at_the_linear_map_of_the_lowest_loss(architecture):
    made = objective("llada", objective="distill")
    torch.manual_seed(0)
    head = QualityHead(32, architecture, context=("draw", "own"))
    begin_neutral(head)
    hidden, features = torch.randn(300, 4, 32), torch.randn(300, 4, num_features(("draw", "own")))
    assert head(hidden, None, features).abs().max() < 0.2 and not head.context_skip.weight.any()
    torch.nn.init.zeros_(head.out.weight)
    true_weight = torch.tensor([0.5, -1.0, 0.25, 2.0, 0.0, -0.5])
    labels = logsigmoid(features @ true_weight - 0.75)
    with torch.no_grad():
        before = head(hidden, None, features)
        given = (before.flatten(), features.flatten(0, 1), labels.flatten(), made.head_loss)
        fit_skip(head, *given, torch.zeros(features.shape[-1]))
        after = head(hidden, None, features)
    torch.testing.assert_close(head.context_skip.weight[0], true_weight, rtol=0.02, atol=0.02)
    torch.testing.assert_close(head.out.bias, torch.tensor([-0.75]), rtol=0.05, atol=0)
    assert made.head_loss(after, labels).mean() < 0.01 * made.head_loss(before, labels).mean()
    if architecture == "block_mlp":
        assert torch.equal(head.block(hidden), hidden)
    with torch.no_grad():  # what the rest of the head says is not said twice
        head.out.weight.normal_()
        rest = head(hidden) - head.out.bias
        given = (rest.flatten(), 0 * features.flatten(0, 1), logsigmoid(rest).flatten(), made.head_loss)
        fit_skip(head, *given, torch.zeros(features.shape[-1]))
    assert head.out.bias.abs() < 1 and head.context_skip.weight.abs().max() < 1e-3


def test_training_begins_at_free_scores_and_nothing_judged_changes_nothing():
    made = objective("llada", objective="distill", label_stride=2)
    head = made.quality_head
    guess, nothing = first_guess(head.reads_context, "posterior"), torch.zeros(0, num_features(head.reads_context))
    fit_skip(head, torch.zeros(0), nothing, torch.zeros(0), made.head_loss, guess)
    assert not head.context_skip.weight.any() and not head.out.bias.any()
    made.stride_checked = 1.0
    made.corrupt(**rows(6))
    first, weight = first_channels(head.reads_context), head.context_skip.weight[0]
    p = torch.tensor([0.1, 0.5, 0.9])
    now = (
        p.log() / 10 * weight[first["own"] + 1 : first["own"] + 4].sum()
        + p.logit() / 10 * weight[first["own_odds"] + 1]
    )
    assert weight[first["own_odds"] + 1] > 0 and now[0] < now[1] < now[2]  # more probable now, better
    fitted = head.context_skip.weight.clone()
    made.corrupt(**rows(6))
    assert torch.equal(head.context_skip.weight, fitted)


def test_few_tokens_leave_the_first_guess_nearly_as_it_is_and_many_do_not():
    reads = ("draw", "own_odds")
    guess = first_guess(reads, "posterior")
    assert guess.tolist() == [0, 0, 0, 10] and not first_guess(reads, "truth").any()
    torch.manual_seed(0)
    features = torch.rand(20_000, 4) - 0.5
    labels = logsigmoid(features @ torch.tensor([0.0, 3.0, 0.0, 2.0]))
    loss = objective("llada", objective="distill", label_stride=2).head_loss
    found = {}
    for count in (4, 20_000):
        head = QualityHead(8, "linear", context=reads)
        fit_skip(head, torch.zeros(count), features[:count], labels[:count], loss, guess)
        found[count] = head.context_skip.weight[0]
    assert found[4][3] > 8 and found[4][1].abs() < 1
    torch.testing.assert_close(found[20_000], torch.tensor([0.0, 3.0, 0.0, 2.0]), rtol=0.05, atol=0.05)


def test_a_trained_map_of_the_context_is_not_fitted_again():
    made = objective("llada", objective="distill", label_stride=2)
    made.stride_checked = 1.0
    torch.nn.init.normal_(made.quality_head.context_skip.weight)
    before = {name: value.clone() for name, value in made.quality_head.state_dict().items()}
    made.corrupt(**rows(6))
    assert all(torch.equal(value, before[name]) for name, value in made.quality_head.state_dict().items())


def fit_where_one_process_has_no_label():
    torch.distributed.init_process_group("gloo")
    flags = {"objective": "prism", "states": "rollout", "freeze_backbone": True, "rollout_steps_max": 8}
    made, batch = objective("llada", **flags), rows(6)
    if torch.distributed.get_rank() == 1:
        batch["input_ids"] = torch.full_like(batch["input_ids"], MASK)  # no right token is known
    *_, judged = made.corrupt(**batch)
    assert any(chosen.any() for chosen in judged) == (torch.distributed.get_rank() == 0)
    start = torch.cat([made.quality_head.context_skip.weight[0], made.quality_head.out.bias]).detach()
    both = [torch.empty_like(start) for _ in range(2)]
    torch.distributed.all_gather(both, start)
    assert torch.equal(*both) and both[0][:-1].any()


def test_all_processes_begin_at_the_same_linear_map():
    assert_all_end_well(launched(fit_where_one_process_has_no_label))


def test_every_token_is_labelled_once_over_the_offsets_of_a_stride():
    for stride in (1, 3, 16):
        counts = sum(every(stride, torch.tensor([offset]), 20).int() for offset in range(stride))
        assert (counts == 1).all()


# --- runs of the trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, pretrained, way):
    flags = (*WAYS[way], *SHORT, f"--base-model={pretrained}", "--max-steps=5", "--save-steps=2")
    flags += ("--gradient-accumulation-steps=2", "--per-device-train-batch-size=4", "--resume-from-checkpoint=latest")
    run(tmp_path / "whole", *flags)
    run_and_die(tmp_path / "cut", monkeypatch, 4, *flags)
    run(tmp_path / "cut", *flags)
    file = "quality_head/diffusion_pytorch_model.safetensors"
    a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    losses = [[entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(set(losses[0])) > 3


def test_a_head_on_rollouts_is_saved_calibrated_and_loaded_by_the_pipeline(tmp_path, pretrained):
    flags = (*WAYS["rollout"], *SHORT, f"--base-model={pretrained}", "--max-steps=3", "--eval-strategy=steps")
    pipe = run(tmp_path / "one", *flags, "--eval-steps=2")
    before = weights(pretrained)["model"]
    assert all(torch.equal(value, before[name]) for name, value in pipe.model.state_dict().items() if name in before)
    again = PrismPipeline.from_pretrained(str(pretrained), quality_head=str(tmp_path / "one"))
    config = again.quality_head.config
    assert tuple(config.context) == ("given", "prompt", "first_hidden", "draw", "age", "remasks", "fill")
    assert config.temperature == pipe.quality_head.config.temperature and config.temperature > 0
    out = again(infill="1" + "." * 80, num_inference_steps=8, return_quality=True)
    assert out.texts[0][0] == "1" and out.confidence is not None
    card = (tmp_path / "one" / "README.md").read_text()
    assert "It reads of the run: given, prompt" in card and "| this head |" in card
    assert "P(the token is the right one)" in card
    entry = next(entry for entry in log_of(tmp_path / "one") if "eval_auroc_within" in entry)
    assert 0 <= entry["eval_auroc_within"] <= 1 and 0 <= entry["eval_ece"] <= 1
    other = run(tmp_path / "two", *flags[:-1])
    for name, value in other.quality_head.state_dict().items():  # evaluation takes no random number of training
        assert torch.equal(pipe.quality_head.state_dict()[name], value), name


def test_a_head_begins_from_another_where_layers_fit(tmp_path, pretrained):
    flags = (f"--base-model={pretrained}", "--freeze-backbone", "--max-steps=1")
    first = run(tmp_path / "first", "--objective=prism", "--head=mlp", *flags, "--num-revealed=8").quality_head
    more = (*WAYS["rollout"], f"--base-model={pretrained}", "--max-steps=1", "--head=block_mlp", "--learning-rate=1e-9")
    second = run(tmp_path / "second", *more, f"--head-from={tmp_path / 'first'}").quality_head
    torch.testing.assert_close(second.inner.weight, first.inner.weight, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"`--head-from` .* holds no quality head"):
        run(tmp_path / "third", *more, f"--head-from={tmp_path}")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_rollouts_from_nothing_are_refused_where_the_label_is_the_truth(tmp_path, pretrained):
    flags = (*WAYS["rollout"][:3], f"--base-model={pretrained}", "--max-steps=1", "--mask-rate-min=1")
    with pytest.raises(ValueError, match="needs rows with a given part"):
        run(tmp_path, *flags)


def test_a_stride_longer_than_the_text_is_refused_by_name(tmp_path, pretrained):
    with pytest.raises(ValueError, match="`--label-stride` is 99, and the rows have 81 tokens"):
        run(tmp_path, *WAYS["distill"], f"--base-model={pretrained}", "--max-steps=1", "--label-stride=99")


class Constant(torch.nn.Module):
    """A denoiser that writes the token 3 alone."""

    spec = SimpleNamespace(mask_token_id=MASK, attention="bidirectional", block_length=None)
    vocab_size = V

    def __init__(self):
        super().__init__()
        self.register_buffer("suppressed", torch.zeros(V, dtype=torch.bool))

    def hidden(self, ids, attention_mask=None):
        return torch.zeros(*ids.shape, 32)

    def aligned(self, hidden):
        return hidden

    def head(self, hidden):
        logits = torch.full((len(hidden), V), -30.0)
        logits[:, 3] = 0.0
        return logits

    def logits(self, hidden, positions):
        return self.head(hidden[positions])

    def logits_at(self, hidden, row, column):
        return self.head(hidden[row, column])


def test_a_model_that_writes_end_tokens_alone_is_refused():
    head = QualityHead(32)
    made = RolloutObjective(
        Constant(), head, settings=RolloutSettings(2, 4), label="posterior", freeze_backbone=True, stride=2
    )
    with pytest.raises(ValueError, match="wrote nothing but the token 3 in"):
        made(torch.full((4, 12), MASK))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"objective": "prism", "label_stride": 8}, "`--label-stride` goes with --objective distill"),
        ({"objective": "prism", "rollout_runs": 2}, "`--rollout-runs` goes with --objective distill, or prism with"),
        ({"objective": "critic", "states": "rollout"}, "`--states` goes with --objective prism"),
        ({"objective": "mdm", "states": "rollout"}, "`--states` goes with --objective prism"),
        ({"objective": "distill", "num_revealed": 4}, "`--num-revealed` goes with --objective prism and"),
        ({"objective": "distill", "full": True}, "--full does not go with --objective distill"),
        ({"objective": "distill", "rank": 4}, "--rank does not go with --objective distill"),
        ({"objective": "prism", "dataset": None}, "pass --dataset. Only distill needs none"),
        ({"objective": "distill", "distill_loss": "kl"}, "`--distill-loss` must be one of squared, bce"),
        ({"objective": "distill", "rollout_runs": 0}, "`--rollout-runs` must be at least 1, got 0"),
        ({"objective": "distill", "forget_share": 2.0}, r"`--forget-share` must be in \[0, 1\], got 2.0"),
    ],
)
def test_flags_that_mean_nothing_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        check_run(RunArguments(**({"dataset": "some/data", "base_model": "some/model"} | flags)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"context": "given,sun"}, "`--context` may hold given, prompt"),
        ({"rollout_steps_min": 9, "rollout_steps_max": 3}, "must hold 1 <= min <= max, got 9 and 3"),
        ({"label_floor": 1.0}, "`label_floor` must be a log-probability below 0"),
    ],
)
def test_values_that_no_run_can_use_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        objective("llada", objective="distill", **flags)


def test_prompts_alone_are_answered_by_the_model(tmp_path, pretrained):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": "12" + "3456789"[i % 7]}) for i in range(30)))
    flags = ("--objective=distill", f"--dataset={tmp_path / 'data.jsonl'}", f"--base-model={pretrained}", *SHORT)
    run(tmp_path / "out", *flags, "--max-steps=2", "--max-length=20")
    assert (tmp_path / "out" / "quality_head").is_dir()
    with pytest.raises(ValueError, match="has a prompt of 3 tokens, and --max-length is 3, which leaves no token"):
        run(tmp_path / "short", *flags, "--max-steps=2", "--max-length=3", "--label-stride=2")


def report(label, **found):
    made = object.__new__(HeadReport)
    made.label, made.measure, made.found = label, MEASURES[label], found
    return made


def test_a_verdict_says_what_a_head_is_good_for():
    free = {"within": 0.9, "pooled": 0.8, "row": 0.8, "ece": 0.1}
    good = report("truth", head={"within": 0.91, "pooled": 0.9, "row": 0.9, "ece": 0.0}, prompt=free)
    assert good.is_ahead and "is ahead of the best free score, its probability on the first canvas" in good.verdict()
    judge = report("truth", head={"within": 0.89, "pooled": 0.9, "row": 0.9, "ece": 0.0}, prompt=free)
    assert not judge.is_ahead and judge.verdict().startswith("**To judge, not to rank**")
    assert "Use PromptConfidenceScheduler to remask by rank." in judge.verdict()
    bad = report("truth", head={"within": 0.89, "pooled": 0.7, "row": 0.9, "ece": 0.0}, prompt=free)
    assert bad.verdict().startswith("**This head is not recommended**")
    tied = report(
        "posterior", head={"overlap": 4.0, "rank": 1.0, "ece": 0.0}, own={"overlap": 4.0, "rank": 0.5, "ece": 0.1}
    )
    assert not tied.is_ahead and "Use SelfConfidenceScheduler, or train for more steps." in tied.verdict()
    assert "Nothing can be said" in report("truth", head=dict.fromkeys(free)).verdict()
    assert report("truth").metrics() == {} and not report("truth").is_ahead
