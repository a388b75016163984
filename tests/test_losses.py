import copy
import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from prism_pipelines.models.denoiser import MaskedDenoiser
from prism_pipelines.models.families import MDMSpec
from prism_pipelines.models.quality_head import QualityHead
from prism_pipelines.training.loss_terms import mask_rates, split_positions
from prism_pipelines.training.losses import MDMObjective, PRISMObjective

V, L, MASK = 12, 7, 11


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def denoiser():
    """A tiny random BERT with random biases, so that nothing hides in zeros; in eval mode."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = BertForMaskedLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return MaskedDenoiser(model, MDMSpec(mask_token_id=MASK))


@pytest.fixture
def batch():
    return torch.randint(0, MASK, (4, L), generator=seeded(1))


TRAINABLE = torch.tensor([[1] * L, [0, 0, 1, 1, 1, 1, 1], [1] * L, [0, 1, 1, 1, 1, 0, 0]])
ATTENTION = torch.tensor([[1] * L, [1] * L, [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]])


def dense_log_probs(denoiser, ids, attention_mask=None):
    """All logits by the model's own forward, mask token out, log-softmax: what the objective must never build."""
    logits = denoiser.model(input_ids=ids, attention_mask=attention_mask).logits.float()
    logits[..., MASK] = -torch.inf
    return logits.log_softmax(-1)


class TableDenoiser(nn.Module):
    """Predicts `probs[i]` at position i whatever it sees, and remembers what it saw."""

    def __init__(self, probs):
        super().__init__()
        self.log_probs = nn.Parameter(torch.tensor(probs).log())
        self.spec = MDMSpec(mask_token_id=len(probs[0]))
        self.seen = []

    def hidden(self, input_ids, attention_mask=None):
        self.seen.append(input_ids)
        return self.log_probs.expand(len(input_ids), -1, -1)

    def logits(self, hidden, positions):
        return hidden[positions]


class ConstantHead(nn.Module):
    """Gives position i the quality logit `logits[i]`."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, hidden, attention_mask=None):
        return self.logits.expand(len(hidden), -1)


def always(num_revealed, denoiser, head, **settings):
    """PRISM with every trainable token masked and the most likely token drawn: no chance left but the positions."""
    return PRISMObjective(
        denoiser, head, num_revealed=num_revealed, mask_rate_min=1.0, **{"temperature": 0.0, **settings}
    )


# --- the masked diffusion loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
@pytest.mark.parametrize("padded", [False, True])
def test_mdm_loss_is_its_formula(denoiser, batch, weighting, padded):
    attention = ATTENTION if padded else None
    objective = MDMObjective(denoiser, weighting=weighting)
    z, masked, rate = objective.corrupt(batch, TRAINABLE, attention, seeded())
    out = objective(batch, TRAINABLE, attention, seeded())
    log_probs = dense_log_probs(denoiser, z, attention)
    total, count, hits = 0.0, 0, 0
    for b in range(4):
        for i in range(L):
            if masked[b, i]:
                cross_entropy = -log_probs[b, i, batch[b, i]].item()
                total += cross_entropy / rate[b].item() if weighting == "elbo" else cross_entropy
                hits += log_probs[b, i].argmax() == batch[b, i]
                count += 1
    normaliser = count if weighting == "uniform" else int(ATTENTION.sum()) if padded else 4 * L
    assert out.loss.item() == pytest.approx(total / normaliser, rel=1e-5)
    assert out.num_masked == count
    assert out.accuracy.item() == pytest.approx(hits / count)


def test_only_trainable_tokens_that_are_not_padding_are_masked(denoiser, batch):
    objective = MDMObjective(denoiser, mask_rate_min=1.0)
    z, masked, _ = objective.corrupt(batch, TRAINABLE, ATTENTION)
    assert torch.equal(masked, (TRAINABLE & ATTENTION).bool())
    assert torch.equal(z, torch.where(masked, MASK, batch))


@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
def test_more_padding_changes_no_loss(denoiser, batch, weighting):
    head = QualityHead(16, "block")
    wider = torch.cat([batch, torch.zeros(4, 3, dtype=torch.long)], 1)
    attention = torch.cat([torch.ones(4, L), torch.zeros(4, 3)], 1).long()
    mdm = MDMObjective(denoiser, mask_rate_min=1.0, weighting=weighting)
    torch.testing.assert_close(mdm(wider, None, attention).loss, mdm(batch).loss)
    prism = always(L, denoiser, head, weighting=weighting, draws_per_state=2)
    torch.testing.assert_close(prism(wider, None, attention).loss, prism(batch).loss)


def test_mask_rates_hold_one_t_in_each_part_of_the_range():
    for seed in range(20):
        parts = (mask_rates(8, 0.2, 1.0, seeded(seed)) - 0.2) / 0.8 * 8
        assert parts.ceil().sort().values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # t in (low, high]


def test_each_rows_own_mask_rate_is_uniform():
    generator = seeded()
    rates = torch.stack([mask_rates(3, 0.0, 1.0, generator) for _ in range(4000)])
    for row in rates.T:
        spread = (row.sort().values - torch.arange(4000) / 4000).abs().max()
        assert spread < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_a_token_is_masked_with_probability_t(denoiser):
    objective = MDMObjective(denoiser, mask_rate_min=0.3, mask_rate_max=0.3)
    _, masked, rate = objective.corrupt(torch.zeros(2000, 10, dtype=torch.long), generator=seeded())
    assert rate.unique().item() == pytest.approx(0.3)
    assert masked.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 20_000) ** 0.5)


# --- memory and work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_split_positions_is_a_partition_in_order(size):
    positions = torch.rand(4, L, generator=seeded()) < 0.5
    parts = split_positions(positions, size)
    assert torch.equal(torch.cat([p.flatten().nonzero() for p in parts]), positions.flatten().nonzero())
    assert [int(p.sum()) for p in parts[:-1]] == [size] * (len(parts) - 1)
    assert 0 < parts[-1].sum() <= size
    (empty,) = split_positions(torch.zeros(2, 3, dtype=torch.bool), size)
    assert not empty.any()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_change_neither_loss_nor_gradient(denoiser, batch, chunk_size):
    results = []
    for size in (1000, chunk_size):
        model = copy.deepcopy(denoiser)
        head = copy.deepcopy(results[0][1].quality_head) if results else QualityHead(16, "mlp")
        objective = PRISMObjective(model, head, num_revealed=2, temperature=0.0, lambda_mdm=2.0, chunk_size=size)
        out = objective(batch, TRAINABLE, ATTENTION, seeded())
        out.loss.backward()
        results.append((out, objective))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][0].loss_mdm, results[1][0].loss_mdm)
    gradients = [{n: p.grad for n, p in o.named_parameters() if p.grad is not None} for _, o in results]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def head_rows(denoiser):
    """Rows that each call of the model's own output head computes."""
    rows = []
    denoiser.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output.numel() // V)
    )
    return rows


def test_the_output_head_runs_at_masked_and_revealed_positions_only_and_never_on_y(denoiser, batch):
    rows = head_rows(denoiser)
    objective = PRISMObjective(denoiser, QualityHead(16), num_revealed=2, draws_per_state=3)
    out = objective(batch, generator=seeded())
    assert sum(rows) == out.num_masked + out.num_revealed
    assert rows.count(0) == 2  # the bodies of z and y
    rows.clear()
    objective.freeze_backbone = True
    out = objective(batch, generator=seeded())
    assert sum(rows) == out.num_revealed


def test_no_call_of_the_output_head_exceeds_the_chunk_size(denoiser, batch):
    rows = head_rows(denoiser)
    for order in ("random", "confidence"):
        objective = PRISMObjective(denoiser, QualityHead(16), num_revealed=4, reveal_order=order, chunk_size=3)
        objective(batch, generator=seeded()).loss.backward()
    assert max(rows) == 3


def test_neither_chunks_nor_draws_keep_logits_for_the_backward_pass(denoiser, batch):
    """Logits of a chunk are computed again instead, and drawn tokens need none: no (rows, V) tensor is left behind."""

    def rows_of_logits_kept(objective):
        shapes = []

        def remember(tensor):
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            objective(batch)
        return {shape[0] for shape in shapes if len(shape) == 2 and shape[1] == V} - {16}  # 16: the head's weight

    assert rows_of_logits_kept(MDMObjective(denoiser, chunk_size=4 * L, mask_rate_min=1.0)) == {4 * L}
    assert rows_of_logits_kept(MDMObjective(denoiser, chunk_size=3, mask_rate_min=1.0)) == set()
    for order in ("random", "confidence"):
        assert rows_of_logits_kept(always(2, denoiser, QualityHead(16), reveal_order=order, chunk_size=3)) == set()


def test_a_frozen_backbone_has_no_gradient_and_no_graph(denoiser, batch):
    denoiser.model.config.hidden_dropout_prob = 0.5
    head = QualityHead(16, "mlp")
    objective = PRISMObjective(denoiser, head, freeze_backbone=True).train()
    seen = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = objective(batch, generator=seeded())
    out.loss.backward()
    assert not seen[0].requires_grad
    assert not denoiser.model.training
    assert head.training
    assert all(p.grad is None and not p.requires_grad for p in denoiser.parameters())
    assert all(p.grad is not None for p in head.parameters())
    assert out.loss_mdm is None
    assert torch.equal(out.loss.detach(), out.loss_prism)


def test_tokens_are_drawn_without_gradient_and_both_forwards_train_the_trunk(denoiser, batch):
    objective = always(3, denoiser, QualityHead(16), lambda_mdm=0.0)
    objective(batch, generator=seeded()).loss.backward()
    body = denoiser.model.bert.encoder.layer[0].intermediate.dense.weight
    assert body.grad.abs().max() > 0
    assert denoiser.model.cls.predictions.bias.grad.abs().max() == 0  # nothing flows through the drawn tokens


# --- the PRISM loss --------------------------------------------------------------------------------------------------


def test_binary_cross_entropy_by_hand():
    """Two tokens, both masked, both revealed; the likelier token is drawn. x = (0, 1): right, then wrong."""
    objective = always(2, TableDenoiser([[0.9, 0.1], [0.6, 0.4]]), ConstantHead([1.0, 2.0]), lambda_mdm=0.25)
    out = objective(torch.tensor([[0, 1]]))
    prism = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(2.0))) / 2
    mdm = -(math.log(0.9) + math.log(0.4)) / 2  # t = 1, B * L = 2
    assert out.loss_prism.item() == pytest.approx(prism, rel=1e-6)
    assert out.loss_mdm.item() == pytest.approx(mdm, rel=1e-6)
    assert out.loss.item() == pytest.approx(prism + 0.25 * mdm, rel=1e-6)
    assert out.accuracy.item() == 0.5
    assert out.quality_right.item() == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert out.quality_wrong.item() == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert (out.num_masked, out.num_revealed) == (2, 2)
    assert all(not value.requires_grad for name, value in out.items() if name != "loss")


@pytest.mark.parametrize("reveal_order", ["random", "confidence"])
def test_prism_loss_is_its_formula(denoiser, batch, monkeypatch, reveal_order):
    """On a real model: watch z and y go by, and judge the revealed tokens of y one at a time."""
    objective = PRISMObjective(
        denoiser, QualityHead(16, "block"), num_revealed=2, draws_per_state=2, reveal_order=reveal_order, lambda_mdm=3.0
    )
    body, seen = denoiser.hidden, []
    monkeypatch.setattr(denoiser, "hidden", lambda ids, mask: seen.append(ids) or body(ids, mask))
    out = objective(batch, TRAINABLE, ATTENTION, seeded())
    z, states = seen[0].repeat(2, 1), seen[1]
    total, count, hits = 0.0, 0, 0
    for b, y in enumerate(states):
        length = int(ATTENTION[b % 4].sum())
        quality = objective.quality_head(body(y[None, :length]))[0].sigmoid().tolist()
        for i in range(length):
            if z[b, i] == MASK and y[i] != MASK:
                right = bool(y[i] == batch[b % 4, i])
                total -= math.log(quality[i] if right else 1 - quality[i])
                hits += right
                count += 1
    assert count == out.num_revealed > 8
    assert out.loss_prism.item() == pytest.approx(total / count, rel=1e-4)
    assert out.accuracy.item() == pytest.approx(hits / count)
    assert out.loss.item() == pytest.approx(out.loss_prism.item() + 3 * out.loss_mdm.item(), rel=1e-6)
    assert out.loss_mdm.item() == pytest.approx(
        MDMObjective(denoiser)(batch, TRAINABLE, ATTENTION, seeded()).loss.item(), rel=1e-6
    )


def test_rows_reveal_k_masks_or_all_they_have(batch):
    denoiser = TableDenoiser([[1 / MASK] * MASK] * L)
    objective = PRISMObjective(denoiser, ConstantHead([0.0] * L), num_revealed=3, draws_per_state=2)
    generator = seeded()
    for _ in range(20):
        denoiser.seen.clear()
        out = objective(batch, TRAINABLE, ATTENTION, generator)
        z, y = denoiser.seen
        masks = (z == MASK).sum(-1)
        assert torch.equal((y == MASK).sum(-1), (masks - 3).clamp(min=0).repeat(2))
        assert out.num_revealed == 2 * masks.clamp(max=3).sum()
        kept = z.repeat(2, 1) != MASK
        assert torch.equal(y[kept], batch.repeat(2, 1)[kept])


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_a_batch_with_nothing_to_mask_gives_zero_and_every_gradient(denoiser, batch, freeze_backbone):
    objective = PRISMObjective(denoiser, QualityHead(16), num_revealed=2, freeze_backbone=freeze_backbone)
    out = objective(batch, torch.zeros(4, L))
    assert (out.loss, out.accuracy, out.quality_right, out.quality_wrong) == (0, 0, 0, 0)
    out.loss.backward()
    assert all(p.grad is not None for p in objective.quality_head.parameters())  # DDP waits for each of them
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in objective.parameters())


def test_confidence_order_reveals_the_likeliest_tokens():
    probs = [[0.6, 0.4], [0.1, 0.9], [0.7, 0.3], [0.2, 0.8], [0.95, 0.05]]
    denoiser = TableDenoiser(probs)
    x = torch.zeros(1, 5, dtype=torch.long)
    always(2, denoiser, ConstantHead([0.0] * 5), reveal_order="confidence")(x)
    assert denoiser.seen[1].tolist() == [[2, 1, 2, 2, 0]]
    always(2, denoiser, ConstantHead([0.0] * 5), reveal_order="confidence", reveal_window=3)(x)
    assert denoiser.seen[3].tolist() == [[2, 1, 0, 2, 2]]
    # The window counts masks, not positions: the first token is no mask here.
    always(2, denoiser, ConstantHead([0.0] * 5), reveal_order="confidence", reveal_window=3)(x, torch.arange(5)[None])
    assert denoiser.seen[5].tolist() == [[0, 1, 2, 1, 2]]


def test_random_order_reveals_each_mask_of_the_window_equally_often():
    denoiser = TableDenoiser([[1.0, 0.0]] * 5)
    x = torch.zeros(3000, 5, dtype=torch.long)
    always(2, denoiser, ConstantHead([0.0] * 5), reveal_window=4)(x, generator=seeded())
    shares = (denoiser.seen[1] != 2).float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.5] * 4 + [0.0]), rtol=0, atol=4 * (0.25 / 3000) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.2]),
        ({"temperature": 1.0, "top_p": 0.6}, [0.625, 0.375, 0.0]),  # the smallest set that holds 0.6
        ({"temperature": 0.5}, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_at_temperature_from_the_nucleus(settings, expected):
    denoiser = TableDenoiser([[0.5, 0.3, 0.2]])
    always(1, denoiser, ConstantHead([0.0]), draws_per_state=4, **settings)(
        torch.zeros(5000, 1, dtype=torch.long), generator=seeded()
    )
    shares = torch.bincount(denoiser.seen[1].flatten(), minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=4 * (0.25 / 20_000) ** 0.5)


def test_a_masked_prompt_is_left_alone_and_a_masked_answer_refused(batch):
    denoiser = TableDenoiser([[1 / MASK] * MASK] * L)
    batch[1, 0] = MASK  # not trainable
    objective = always(L, denoiser, ConstantHead([0.0] * L))
    objective(batch, TRAINABLE)
    assert denoiser.seen[1][1, 0] == MASK
    with pytest.raises(ValueError, match=r"`input_ids` holds the mask token \(11\) at a trainable position"):
        objective(batch)


def test_the_same_generator_gives_the_same_loss_and_torchs_own_state_is_left_alone(denoiser, batch):
    objective = PRISMObjective(denoiser, QualityHead(16), num_revealed=3, draws_per_state=2)
    state = torch.get_rng_state()
    losses = [objective(batch, generator=seeded(seed)).loss.item() for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_losses_are_float32_under_autocast(denoiser, batch):
    objective = PRISMObjective(denoiser, QualityHead(16, "block"), num_revealed=L, mask_rate_min=1.0, temperature=0.0)
    exact = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(batch)
        out_mdm = MDMObjective(denoiser)(batch)
    for value in (out.loss, out.loss_prism, out.loss_mdm, out_mdm.loss):
        assert value.dtype == torch.float32
    assert out.loss_mdm.item() == pytest.approx(exact.loss_mdm.item(), rel=0.05)


def test_cross_entropy_of_a_bfloat16_model_is_computed_in_float32(denoiser, batch):
    denoiser.model.bfloat16()
    out = MDMObjective(denoiser, mask_rate_min=1.0, weighting="uniform")(batch)
    log_probs = dense_log_probs(denoiser, torch.full_like(batch, MASK))
    expected = -log_probs.gather(-1, batch[..., None]).mean()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected)


# --- with the Trainer ------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_reaches_the_backbone_and_changes_no_gradient(denoiser, batch):
    objective = MDMObjective(denoiser).train()
    denoiser.model.config.hidden_dropout_prob = 0.0
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    names = [name for name in ("gradient", "activation") if hasattr(denoiser.model, f"{name}_checkpointing_enable")]
    for name in (None, *names):  # the second is of transformers 5.23
        if name is not None:
            getattr(objective, f"{name}_checkpointing_enable")({"use_reentrant": False})
            assert denoiser.model.is_gradient_checkpointing
        objective.zero_grad()
        objective(batch, generator=seeded()).loss.backward()
        gradients.append(denoiser.model.bert.encoder.layer[0].intermediate.dense.weight.grad.clone())
        objective.gradient_checkpointing_disable()
        assert not denoiser.model.is_gradient_checkpointing
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradients[0], gradient)


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_trainer_trains_the_objective_as_its_model(denoiser, batch, tmp_path, freeze_backbone):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    objective = PRISMObjective(denoiser, QualityHead(16), num_revealed=2, freeze_backbone=freeze_backbone)
    before = {name: value.clone() for name, value in objective.named_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(objective, arguments, train_dataset=[{"input_ids": row} for row in batch])
    assert math.isfinite(trainer.train().training_loss)
    changed = {name.split(".")[0] for name, p in objective.named_parameters() if not torch.equal(p, before[name])}
    assert changed == ({"quality_head"} if freeze_backbone else {"quality_head", "denoiser"})


def test_wrong_settings_are_named(denoiser, batch):
    head = QualityHead(16)
    with pytest.raises(ValueError, match=r"`weighting` must be one of .*got 'mean'"):
        MDMObjective(denoiser, weighting="mean")
    with pytest.raises(ValueError, match=r"mask_rate_min=0.0 and mask_rate_max=1.0"):
        MDMObjective(denoiser, mask_rate_min=0.0)
    with pytest.raises(ValueError, match=r"`chunk_size` must be at least 1, got 0"):
        MDMObjective(denoiser, chunk_size=0)
    with pytest.raises(ValueError, match=r"`input_ids` must have shape \(B, L\), got \(7,\)"):
        MDMObjective(denoiser)(batch[0])
    with pytest.raises(ValueError, match=r"`num_revealed` must be at least 1, got 0"):
        PRISMObjective(denoiser, head, num_revealed=0)
    with pytest.raises(ValueError, match=r"`reveal_window` must be at least 1, got 0"):
        PRISMObjective(denoiser, head, reveal_window=0)
    with pytest.raises(ValueError, match=r"`reveal_order` must be one of .*got 'margin'"):
        PRISMObjective(denoiser, head, reveal_order="margin")
    wrong = {"lambda_mdm": (-1.0, math.nan, math.inf), "temperature": (-1.0, math.nan), "top_p": (0.0, 1.5, math.nan)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
                PRISMObjective(denoiser, head, **{name: value})
