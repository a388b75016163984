"""The central claim of PRISM, proved by enumeration on worlds small enough to list.

A world is a known distribution p(x) over sequences of length L <= 4 over V <= 3 tokens. The fine-tuning loss is an
expectation over a finite set: the clean x, which tokens are masked (z), which k masks are revealed, and the tokens x^
the model draws there (y). `outcomes` lists that set. The quality head sees y alone, so the best it can do at (y, i) is

    probability that x^_i was right, given that y came out and i was among the revealed.

What is proved:
  * k = 1: this is p(x_i = y_i | y without y_i), the exact quality, whatever model drew the tokens;
  * k > 1: it is a mixture over the sets that may have been revealed, and not the exact quality;
  * the real `PRISMObjective` has these minimisers: a head trained through it arrives there;
  * with a trunk shared by head and model, lambda_mdm > 0 keeps the unmasking posterior, lambda_mdm = 0 loses it.
"""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch import nn

from prism_pipelines.models.families import MDMSpec
from prism_pipelines.models.quality_head import QualityHead
from prism_pipelines.schedulers import functional, token_sampling
from prism_pipelines.training import loss_terms
from prism_pipelines.training.losses import MDMObjective, PRISMObjective
from prism_pipelines.training.rollout_losses import RolloutObjective, every, log_posterior
from prism_pipelines.training.rollouts import RolloutPool, RolloutSettings

# A mask is written as None in Python and as id V in tensors.
COUNTS = dict(zip(itertools.product([0, 1], repeat=3), [5, 1, 1, 2, 1, 3, 2, 1], strict=True))
BITS = {x: count / 16 for x, count in COUNTS.items()}  # V = 2, L = 3


def random_world(vocab, length, seed):
    """Probabilities of all sequences, some close to zero."""
    weights = torch.rand(vocab**length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    sequences = itertools.product(range(vocab), repeat=length)
    return dict(zip(sequences, (weights / weights.sum()).tolist(), strict=True))


WORLDS = {"V=2,L=3": BITS, "V=3,L=3": random_world(3, 3, 0), "V=2,L=4": random_world(2, 4, 1)}


# --- the world itself, by counting ------------------------------------------------------------------------------------


def probability(world, state):
    """p(visible tokens of `state`)."""
    return sum(p for x, p in world.items() if all(s is None or s == v for s, v in zip(state, x, strict=True)))


def replaced(state, position, value):
    return (*state[:position], value, *state[position + 1 :])


def posterior(world, state, position, value):
    """p(x_i = value | visible tokens of `state`) for a masked position i: what an ideal model predicts."""
    return probability(world, replaced(state, position, value)) / probability(world, state)


def exact_quality(world, y, i):
    """g*(y)_i = p(x_i = y_i | y without y_i)."""
    return posterior(world, replaced(y, i, None), i, y[i])


def clueless(world, state, position, value):
    """A model that predicts every token with equal probability."""
    return 1 / (1 + max(map(max, world)))


# --- the loss, as a list of everything that can happen ----------------------------------------------------------------


def outcomes(world, k, rate, model=posterior):
    """Steps 1 to 4 of the fine-tuning loss: yields (probability, y, i, whether x^_i = x_i) for each revealed i."""
    length = len(next(iter(world)))
    for x, p in world.items():
        for pattern in itertools.product([False, True], repeat=length):  # 1. mask
            masked = [i for i in range(length) if pattern[i]]
            z = tuple(None if pattern[i] else x[i] for i in range(length))
            p_z = p * rate ** len(masked) * (1 - rate) ** (length - len(masked))
            chosen = list(itertools.combinations(masked, min(k, len(masked))))  # 3. which masks to reveal
            for revealed in chosen:
                for values in itertools.product(range(1 + max(x_j for s in world for x_j in s)), repeat=len(revealed)):
                    p_y, y = p_z / len(chosen), z
                    for i, value in zip(revealed, values, strict=True):  # 2. draw x^, each position on its own
                        p_y, y = p_y * model(world, z, i, value), replaced(y, i, value)
                    for i in revealed:
                        yield p_y, y, i, x[i] == y[i]


def best_head(world, k, rate, model=posterior):
    """{(y, i): minimiser of the enumerated binary cross-entropy}: the probability of being right."""
    mass, right_mass = defaultdict(float), defaultdict(float)
    for p, y, i, right in outcomes(world, k, rate, model):
        mass[y, i] += p
        right_mass[y, i] += p * right
    return {cell: right_mass[cell] / mass[cell] for cell in mass if mass[cell] > 0}


def mixture(world, y, i, k, rate, model=posterior):
    """docs/method.md for k > 1: sum over R with i of w(R) p(x_i = y_i | y without R), divided by sum of w(R)."""
    length, visible = len(y), [j for j in range(len(y)) if y[j] is not None]
    total = right = 0.0
    for size in range(1, k + 1):
        for revealed in itertools.combinations(visible, size):
            hidden = [j for j in range(length) if y[j] is None or j in revealed]
            if i not in revealed or size != min(k, len(hidden)):  # fewer than k only if nothing else was masked
                continue
            z = tuple(None if j in hidden else y[j] for j in range(length))
            weight = rate ** len(hidden) * (1 - rate) ** (length - len(hidden)) / math.comb(len(hidden), size)
            weight *= probability(world, z) * math.prod(model(world, z, j, y[j]) for j in revealed)
            total += weight
            right += weight * posterior(world, z, i, y[i])
    return right / total


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("model", [posterior, clueless])
@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_with_one_revealed_token_the_minimiser_is_the_exact_quality(world, model, rate):
    """x^_i and x_i are independent given z = y without y_i, so even a clueless model's guesses teach the exact g*."""
    best = best_head(world, 1, rate, model)
    length = len(next(iter(world)))
    vocab = round(len(world) ** (1 / length))
    assert len(best) == length * vocab * (vocab + 1) ** (length - 1)  # every visible token of every state
    for (y, i), quality in best.items():
        assert quality == pytest.approx(exact_quality(world, y, i), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_the_listed_minimiser_is_where_the_gradient_of_the_listed_loss_is_zero(k):
    best = best_head(BITS, k, 0.5)
    cells = {cell: n for n, cell in enumerate(best)}
    listed = list(outcomes(BITS, k, 0.5))
    weight = torch.tensor([p for p, *_ in listed], dtype=torch.float64)
    index = torch.tensor([cells[y, i] for _, y, i, _ in listed])
    right = torch.tensor([float(right) for *_, right in listed], dtype=torch.float64)
    logits = torch.tensor(list(best.values()), dtype=torch.float64).logit().requires_grad_()
    nn.functional.binary_cross_entropy_with_logits(logits[index], right, weight, reduction="sum").backward()
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("model", [posterior, clueless])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_with_more_revealed_tokens_the_minimiser_is_the_mixture(world, model, k):
    for (y, i), quality in best_head(world, k, 0.4, model).items():
        assert quality == pytest.approx(mixture(world, y, i, k, 0.4, model), abs=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_the_mixture_is_not_the_exact_quality(k, record_property):
    """The price of k > 1, in the open: a blend of conditionals on fewer tokens than the head sees."""
    best = best_head(BITS, k, 0.5)
    bias = {cell: abs(quality - exact_quality(BITS, *cell)) for cell, quality in best.items()}
    (y, i), worst = max(bias.items(), key=lambda item: item[1])
    mean = sum(bias.values()) / len(bias)
    record_property("largest_bias", worst)
    record_property("mean_bias", mean)
    print(
        f"\nk = {k}: the best head is off the exact quality by {mean:.3f} on average and {worst:.3f} at most "
        f"(y = {y}, i = {i}: learned {best[y, i]:.3f}, exact {exact_quality(BITS, y, i):.3f}, "
        f"with everything masked {posterior(BITS, (None,) * 3, i, y[i]):.3f})"
    )
    assert worst > 0.1


# --- the real objective ----------------------------------------------------------------------------------------------


def all_states(vocab, length):
    return list(itertools.product([*range(vocab), None], repeat=length))


class ExactDenoiser(nn.Module):
    """An ideal model of a world, by table; its "hidden state" is the number of the state it reads."""

    def __init__(self, world):
        super().__init__()
        self.length = len(next(iter(world)))
        self.vocab = self.vocab_size = 1 + max(map(max, world))
        self.spec = MDMSpec(mask_token_id=self.vocab)
        rows = [
            [[posterior(world, s, i, v) if s[i] is None else 1.0 for v in range(self.vocab)] for i in range(len(s))]
            for s in all_states(self.vocab, self.length)
        ]
        self.register_buffer("log_posterior", torch.tensor(rows).log())  # (states, L, V)

    def hidden(self, input_ids, attention_mask=None):
        number = (input_ids * (self.vocab + 1) ** torch.arange(self.length - 1, -1, -1)).sum(-1)
        return number[:, None, None].expand(-1, self.length, 1)

    def logits(self, hidden, positions):
        row, column = positions.nonzero(as_tuple=True)
        return self.logits_at(hidden, row, column)

    def logits_at(self, hidden, row, column):
        return self.log_posterior[hidden[row, column, 0], column]


class TabularHead(nn.Module):
    """One free logit for every position of every state y: the largest function class that sees y alone."""

    def __init__(self, denoiser):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(denoiser.log_posterior.shape[:2]))  # (states, L)
        self.states = {state: n for n, state in enumerate(all_states(denoiser.vocab, denoiser.length))}

    def forward(self, hidden, attention_mask=None):
        return self.logit[hidden[:, 0, 0]]

    def quality(self, y, i):
        return self.logit[self.states[y], i].sigmoid().item()


# Every sequence as often as it is probable: 16 rows whose frequencies are p(x) exactly.
SIXTEEN = torch.tensor([x for x, count in COUNTS.items() for _ in range(count)])


def share_draws(monkeypatch):
    """Give all 16 sequences of a group the same random numbers.

    Each row alone still follows the objective's law, but within a group all x that agree on z get the same x^ and the
    same y. So the labels of (z, y, i) come in exactly their proportions, and only the choice of states is left to
    chance: a head can be trained to 1e-3 in seconds.
    """

    def shared(shape, generator=None, device=None):
        copies = 16 if shape[0] % 16 == 0 else 1
        drawn = torch.rand((shape[0] // copies, *shape[1:]), generator=generator)
        return drawn.repeat(copies, *[1] * (len(shape) - 1))

    for module in (loss_terms, functional, token_sampling):
        monkeypatch.setattr(module, "uniform", shared)


def test_the_elbo_of_an_ideal_model_is_the_entropy_per_token():
    """Why 1 / t: masked tokens then count as in a chain rule of random order, which adds up to -log p(x)."""
    objective = MDMObjective(ExactDenoiser(BITS))
    loss = objective(SIXTEEN.repeat(4000, 1), generator=torch.Generator().manual_seed(0)).loss
    entropy = -sum(p * math.log(p) for p in BITS.values())
    assert loss.item() == pytest.approx(entropy / 3, abs=0.02)


def bits_objective(k, **settings):
    """The real objective, head only, on the ideal model of BITS; tokens are masked with probability 1/2."""
    denoiser = ExactDenoiser(BITS)
    head = TabularHead(denoiser)
    return PRISMObjective(
        denoiser, head, num_revealed=k, freeze_backbone=True, mask_rate_min=0.5, mask_rate_max=0.5, **settings
    )


def train(objective, batch, steps, lr, generator):
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(batch, generator=generator).loss.backward()
        optimizer.step()
        schedule.step()


def test_a_head_trained_with_one_revealed_token_learns_the_exact_quality(monkeypatch):
    share_draws(monkeypatch)
    objective = bits_objective(1)
    train(objective, SIXTEEN.repeat_interleave(128, 0), 250, 0.1, torch.Generator().manual_seed(0))
    for y, i in best_head(BITS, 1, 0.5):
        assert objective.quality_head.quality(y, i) == pytest.approx(exact_quality(BITS, y, i), abs=1e-3)


def test_a_head_trained_with_two_revealed_tokens_learns_the_mixture_instead(record_property):
    """Which set was revealed stays a matter of chance, so sharing draws would not help; hence the wider bound."""
    objective = bits_objective(2, draws_per_state=4)
    train(objective, SIXTEEN.repeat(128, 1), 500, 0.03, torch.Generator().manual_seed(0))
    off_mixture, off_exact = [], []
    for y, i in best_head(BITS, 2, 0.5):
        learned = objective.quality_head.quality(y, i)
        off_mixture.append(abs(learned - mixture(BITS, y, i, 2, 0.5)))
        off_exact.append(abs(learned - exact_quality(BITS, y, i)))
    record_property("largest_distance_to_mixture", max(off_mixture))
    record_property("largest_distance_to_exact", max(off_exact))
    print(f"\ntrained, k = 2: at most {max(off_mixture):.4f} off the mixture, {max(off_exact):.3f} off the exact one")
    assert max(off_mixture) < 0.02
    assert max(off_exact) > 0.2


@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_large_batch_has_the_gradient_of_the_listed_loss(k):
    """No shared draws here: at quality 1/2 the gradient of a cell is E[1/2 - right], up to sampling noise."""
    objective = bits_objective(k)
    rows = 64_000
    out = objective(SIXTEEN.repeat(rows // 16, 1), generator=torch.Generator().manual_seed(k))
    out.loss.backward()
    expected, mass = defaultdict(float), defaultdict(float)
    for p, y, i, right in outcomes(BITS, k, 0.5):
        expected[y, i] += p * (0.5 - right)
        mass[y, i] += p
    per_row = objective.quality_head.logit.grad * out.num_revealed / rows
    for (y, i), gradient in expected.items():
        got = per_row[objective.quality_head.states[y], i].item()
        assert got == pytest.approx(gradient, abs=5 * 0.5 * (mass[y, i] / rows) ** 0.5)  # 5 standard deviations
    assert out.num_revealed.item() / rows == pytest.approx(sum(mass.values()), abs=0.02)


# --- why the masked diffusion loss stays in: a trunk shared by model and head -----------------------------------------


class SmallDenoiser(nn.Module):
    """A learned model of BITS: one hidden layer over the whole sequence, one output layer."""

    def __init__(self):
        super().__init__()
        self.spec = MDMSpec(mask_token_id=2)
        self.body = nn.Sequential(nn.Linear(9, 64), nn.GELU(), nn.Linear(64, 3 * 8), nn.GELU())
        self.output = nn.Linear(8, 2)

    def hidden(self, input_ids, attention_mask=None):
        return self.body(nn.functional.one_hot(input_ids, 3).flatten(1).float()).view(-1, 3, 8)

    def logits(self, hidden, positions):
        return self.output(hidden[positions])


def posterior_error(denoiser):
    """Largest |f(v | z)_i - p(x_i = v | z)| over all partly masked z."""
    states = torch.tensor([[2 if s is None else s for s in state] for state in all_states(2, 3)])
    with torch.no_grad():
        predicted = denoiser.logits(denoiser.hidden(states), states == 2).softmax(-1)
    exact = ExactDenoiser(BITS).log_posterior.exp()[states == 2]
    return (predicted - exact).abs().max().item()


def quality_error(objective):
    """Mean |quality - exact quality| over all visible tokens of all states."""
    cells = list(best_head(BITS, 1, 0.5))
    states = torch.tensor([[2 if s is None else s for s in y] for y, _ in cells])
    with torch.no_grad():
        quality = objective.quality_head(objective.denoiser.hidden(states)).sigmoid()
    errors = [abs(quality[n, i].item() - exact_quality(BITS, y, i)) for n, (y, i) in enumerate(cells)]
    return sum(errors) / len(errors)


def test_the_unmasking_posterior_holds_with_the_mdm_loss_and_drifts_without(record_property):
    batch = SIXTEEN.repeat(32, 1)
    torch.manual_seed(0)
    denoiser = SmallDenoiser()
    generator = torch.Generator().manual_seed(0)
    train(MDMObjective(denoiser, weighting="uniform"), batch, 500, 0.01, generator)
    before = posterior_error(denoiser)
    pretrained = {name: value.clone() for name, value in denoiser.state_dict().items()}
    after, quality = {}, {}
    for lambda_mdm in (5.0, 0.0):
        denoiser.load_state_dict(pretrained)
        objective = PRISMObjective(denoiser, QualityHead(8), lambda_mdm=lambda_mdm, weighting="uniform")
        train(objective, batch, 500, 0.02, generator)
        after[lambda_mdm], quality[lambda_mdm] = posterior_error(denoiser), quality_error(objective)
        record_property(f"posterior_error_lambda_{lambda_mdm:g}", after[lambda_mdm])
    print(
        f"\nlargest error of the unmasking posterior: {before:.3f} before fine-tuning, "
        f"{after[5.0]:.3f} after it with lambda = 5, {after[0.0]:.3f} with lambda = 0; "
        f"mean error of the quality: {quality[5.0]:.3f} and {quality[0.0]:.3f}"
    )
    assert max(before, after[5.0]) < 0.08  # holds
    assert after[0.0] > 0.2  # the negative control
    assert max(quality.values()) < 0.06  # both heads learned; only one model is still a model


# --- rollouts and distillation ----------------------------------------------------------------------------------------


def runs(world, given):
    """All runs of the sampler, one token a step in random order: yields (probability, x, y) for each canvas on the way.

    Args:
        given: positions of x that stand on the first canvas.
    """
    length, vocab = len(next(iter(world))), 1 + max(map(max, world))
    for x, p in world.items():
        first = tuple(x[i] if i in given else None for i in range(length))
        masks = [i for i in range(length) if i not in given]
        for order in itertools.permutations(masks):
            for values in itertools.product(range(vocab), repeat=len(masks)):
                p_y, y = p / math.factorial(len(masks)), first
                for n, (i, value) in enumerate(zip(order, values, strict=True)):
                    p_y, y = p_y * posterior(world, y, i, value), replaced(y, i, value)
                    yield p_y / vocab ** (len(masks) - n - 1), x, y  # runs that differ later only share this canvas


def best_on_rollouts(world, givens):
    """{(y, given, i): minimiser of the enumerated loss of rollouts, for a head that knows what is given}."""
    mass, right = defaultdict(float), defaultdict(float)
    for given in givens:
        for p, x, y in runs(world, given):
            for i in range(len(y)):
                if y[i] is not None and i not in given:
                    mass[y, given, i] += p
                    right[y, given, i] += p * (x[i] == y[i])
    return {cell: right[cell] / mass[cell] for cell in mass if mass[cell] > 0}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_on_rollouts_of_an_ideal_model_the_minimiser_is_the_posterior_given_the_first_canvas_alone(world):
    """What the model wrote says nothing of x beyond what was given; so log p(y_i | first canvas) is the best input."""
    best = best_on_rollouts(world, [(0,), (1,), (0, 1)])
    for (y, given, i), quality in best.items():
        first = tuple(y[j] if j in given else None for j in range(len(y)))
        assert quality == pytest.approx(posterior(world, first, i, y[i]), abs=1e-12)
    off = [abs(quality - exact_quality(world, y, i)) for (y, _, i), quality in best.items()]
    assert max(off) > 0.1  # so PRISM's g* is another number on the canvases that the sampler makes


def test_the_pool_makes_the_canvases_of_the_enumerated_runs():
    """Share of right tokens on a given canvas, over runs of the real pool, against the list; three standard errors."""
    torch.manual_seed(0)
    expected, given = best_on_rollouts(BITS, [(0,)]), (0,)
    settings = RolloutSettings(2, 2, orders=(("random", 1.0),), etas=(0.0,), repairs=0)
    pool = RolloutPool(ExactDenoiser(BITS), (), settings, 1)
    listed, weights = list(BITS), torch.tensor(list(BITS.values()))
    clean = torch.tensor(listed)[torch.multinomial(weights, 20_000, replacement=True)]
    pool.refill(clean, torch.tensor([[False, True, True]]).expand(len(clean), -1))
    counts = defaultdict(list)
    run = pool.runs[0]
    while not run.done:
        for y, x in zip(run.sample.tolist(), clean.tolist(), strict=True):
            y = tuple(None if v == 2 else v for v in y)
            for i in (1, 2):
                if y[i] is not None:
                    counts[y, given, i].append(x[i] == y[i])
        pool.advance(run, pool.denoiser.hidden(run.sample), torch.ones(run.sample.shape))
    assert counts.keys() == expected.keys()
    for cell, right in counts.items():
        p = expected[cell]
        assert abs(sum(right) / len(right) - p) < 3.5 * math.sqrt(p * (1 - p) / len(right)) + 1e-9


def test_to_know_what_was_written_in_the_last_step_removes_the_bias_of_k_above_1():
    """The minimiser for a head that sees R as well is p(x_i = y_i | y without R): no mixture is left."""
    k, rate, mass, right = 2, 0.5, defaultdict(float), defaultdict(float)
    for x, p in BITS.items():
        for pattern in itertools.product([False, True], repeat=3):
            masked = [i for i in range(3) if pattern[i]]
            z = tuple(None if pattern[i] else x[i] for i in range(3))
            for revealed in itertools.combinations(masked, min(k, len(masked))):
                for values in itertools.product([0, 1], repeat=len(revealed)):
                    p_y, y = p * rate ** len(masked) * (1 - rate) ** (3 - len(masked)), z
                    for i, value in zip(revealed, values, strict=True):
                        p_y, y = p_y * posterior(BITS, z, i, value), replaced(y, i, value)
                    for i in revealed:
                        mass[y, revealed, i] += p_y
                        right[y, revealed, i] += p_y * (x[i] == y[i])
    for (y, revealed, i), total in mass.items():
        without = tuple(None if j in revealed else y[j] for j in range(3))
        assert right[y, revealed, i] / total == pytest.approx(posterior(BITS, without, i, y[i]), abs=1e-12)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_label_of_distillation_is_the_leave_one_out_posterior_and_wider_strides_leave_more_out(world):
    denoiser = ExactDenoiser(world)
    length, vocab = denoiser.length, denoiser.vocab
    off = 0.0
    for y in itertools.product(range(vocab), repeat=length):
        sample = torch.tensor([y])
        for i in range(length):
            one = torch.arange(length)[None] == i
            assert log_posterior(denoiser, sample, one).exp().item() == pytest.approx(
                exact_quality(world, y, i), abs=1e-5
            )
        pair = every(2, torch.tensor([0]), length)
        hidden = tuple(None if pair[0, j] else y[j] for j in range(length))
        for i, found in zip(
            pair[0].nonzero().flatten().tolist(), log_posterior(denoiser, sample, pair).exp(), strict=True
        ):
            assert found.item() == pytest.approx(posterior(world, hidden, i, y[i]), abs=1e-5)
            off = max(off, abs(found.item() - exact_quality(world, y, i)))
    assert off > 0.05  # the price of a stride of 2 on so short a text


def test_the_squared_error_of_log_probabilities_is_least_at_the_posterior():
    objective = RolloutObjective(
        ExactDenoiser(BITS), QualityHead(4), settings=RolloutSettings(), label="posterior", freeze_backbone=True
    )
    labels = torch.tensor([0.5, 0.01, 1e-4]).log()
    logits = labels.exp().logit().requires_grad_()
    objective.head_loss(logits, labels).sum().backward()
    assert objective.head_loss(logits, labels).max() < 1e-8 and logits.grad.abs().max() < 1e-4
    below = objective.head_loss(torch.tensor([-12.0]), torch.tensor([-40.0]))
    assert below.item() < 1e-6  # below the floor all counts as the floor
