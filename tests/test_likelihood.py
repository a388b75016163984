"""Likelihoods: against exact enumeration of tiny worlds, against brute force on twins, and by laws."""

import itertools
import math

import pytest
import torch
from family_twins import CHECKPOINTS, MASK, checkpoint, load, reference
from test_generate_many import pipeline

from prism_pipelines import MDMSpec
from prism_pipelines.sampling.canvas import Canvas
from prism_pipelines.sampling.likelihood import estimate, is_greedy

WORDS, LENGTH, HIDDEN = 3, 4, 3  # a world of 81 texts; the mask is a fourth token
FEW = ("llada", "Dream", "sdar", "esm_diff", "bert")  # plain, shifted, block-causal, capped, an encoder


class World:
    """A model whose conditionals are exactly those of a distribution over texts."""

    vocab_size = WORDS + 1

    def __init__(self, block_length=None):
        generator = torch.Generator().manual_seed(0)
        self.p = torch.rand((WORDS,) * LENGTH, generator=generator, dtype=torch.float64).pow(3)
        self.p /= self.p.sum()
        kind = {"attention": "block_causal", "block_length": block_length, "mask_format": "additive"}
        self.spec = MDMSpec(HIDDEN, **(kind if block_length else {}))

    def hidden(self, ids, attention_mask=None):
        return ids

    def logits_at(self, hidden, row, column):
        return torch.stack([self.given(hidden[r].tolist(), int(c)) for r, c in zip(row, column, strict=True)])

    def given(self, text, place):
        """log p(token at `place` | the visible tokens that it may see), float64 (V,)."""
        block = self.spec.block_length
        seen = LENGTH if block is None else (place // block + 1) * block
        fits = [[i for i in range(WORDS) if text[c] == HIDDEN or c >= seen or text[c] == i] for c in range(LENGTH)]
        mass = [0.0] * WORDS
        for whole in itertools.product(*fits):
            mass[whole[place]] += float(self.p[whole])
        return torch.tensor([math.log(m / sum(mass)) if m else -math.inf for m in mass] + [-math.inf])


def canvas_of(*texts):
    ids = torch.tensor(texts)
    return Canvas(ids, torch.ones_like(ids, dtype=torch.bool), None, whole=True)


@pytest.mark.parametrize("block_length", [None, 2])
def test_the_bound_of_exact_conditionals_is_the_likelihood(block_length):
    world = World(block_length)
    texts = [(0, 1, 2, 0), (2, 2, 1, 0), (1, 0, 0, 2)]
    canvas = canvas_of(*texts)
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    found = estimate(world, canvas, canvas.generated, num_samples=400, batch_size=37, generator=generators)
    for row, text in enumerate(texts):
        exact = math.log(float(world.p[text]))
        assert abs(found.log_likelihood[row] - exact) < 4 * found.standard_error[row]
        assert 0 < found.standard_error[row] < 0.3


def test_the_bound_is_the_mean_over_all_sets_of_hidden_tokens():
    """A model that is no distribution: each set of each size by hand, and the estimate near their weighted mean."""
    pipe, total = load(checkpoint("llada")), 4
    ids = torch.tensor([[20, 9, 30, 11, 25, 13]])
    given = torch.tensor([[True, False, False, False, False, True]])
    expected = 0.0
    for size in range(1, total + 1):
        sets = list(itertools.combinations(range(1, 5), size))
        for hidden in sets:
            noisy = ids.clone()
            noisy[0, list(hidden)] = MASK
            logits = reference("llada", checkpoint("llada"), noisy)[0, :, :MASK].double()
            log_p = sum(float(logits[i].log_softmax(-1)[ids[0, i]]) for i in hidden)
            expected += log_p * total / size / len(sets) / total
    generator = torch.Generator().manual_seed(0)
    out = pipe.log_likelihood(input_ids=ids, given=given, num_samples=600, batch_size=64, generator=generator)
    assert abs(float(out.log_likelihood) - expected) < 4 * float(out.standard_error) < 0.5
    assert out.num_tokens.tolist() == [4] and out.nfe_per_row == [600] and out.nfe == 10
    assert float(out.perplexity) == pytest.approx(math.exp(-float(out.log_likelihood) / 4))


@pytest.mark.parametrize("family", FEW)
def test_the_pseudo_likelihood_hides_one_token_at_a_time(family):
    pipe, ids = load(checkpoint(family)), torch.randint(8, MASK, (2, 7), generator=torch.Generator().manual_seed(2))
    given = torch.zeros(2, 7, dtype=torch.bool)
    given[:, 0], given[1, 3:] = True, True
    out = pipe.log_likelihood(input_ids=ids, given=given, method="pseudo", batch_size=4)
    for row, column in (~given).nonzero().tolist():
        noisy = ids[row : row + 1].clone()
        noisy[0, column] = MASK
        logits = reference(family, checkpoint(family), noisy)[0, column, :MASK].double()
        # What the pipeline never predicts has no share.
        forbidden = pipe.denoiser.suppressed[:MASK]
        log_p = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)[ids[row, column]]
        assert float(out.token_log_probs[row, column]) == pytest.approx(float(log_p), abs=1e-4)
    assert out.token_log_probs.isnan().equal(given)
    torch.testing.assert_close(out.log_likelihood, out.token_log_probs.double().nansum(-1))
    assert out.nfe_per_row == [6, 2] and out.nfe == 2 and not out.standard_error.any()


@pytest.mark.parametrize("family", FEW)
def test_rows_do_not_depend_on_each_other_and_padding_counts_nothing(family):
    pipe = load(checkpoint(family))
    ids = torch.randint(8, MASK, (3, 11), generator=torch.Generator().manual_seed(3))
    mask, given = torch.ones_like(ids), torch.zeros(3, 11, dtype=torch.bool)
    mask[1, 6:], given[:, 0] = 0, True
    call = {"num_samples": 12, "batch_size": 5}
    seeds = [torch.Generator().manual_seed(row) for row in range(3)]
    together = pipe.log_likelihood(input_ids=ids, attention_mask=mask, given=given, generator=seeds, **call)
    for row, n in enumerate((11, 6, 11)):
        seed = [torch.Generator().manual_seed(row)]
        alone = pipe.log_likelihood(
            input_ids=ids[row : row + 1, :n], given=given[row : row + 1, :n], generator=seed, **call
        )
        assert float(together.log_likelihood[row]) == pytest.approx(float(alone.log_likelihood), abs=1e-3)
        assert together.num_tokens[row] == n - 1


def test_a_block_causal_model_has_a_term_for_each_block_given_those_before():
    """Its likelihood is that of its blocks, each scored with the others given, and no token reads a later block."""
    pipe = load(checkpoint("sdar"))
    ids = torch.randint(8, MASK, (1, 12), generator=torch.Generator().manual_seed(4))
    whole = pipe.log_likelihood(
        input_ids=ids, num_samples=300, batch_size=100, generator=torch.Generator().manual_seed(0)
    )
    assert whole.nfe_per_row == [900]
    parts, variance = 0.0, 0.0
    for start in (0, 4, 8):
        given = torch.ones(1, start + 4, dtype=torch.bool)
        given[0, start:] = False
        out = pipe.log_likelihood(
            input_ids=ids[:, : start + 4], given=given, num_samples=300, generator=torch.Generator().manual_seed(start)
        )
        parts, variance = parts + float(out.log_likelihood), variance + float(out.standard_error) ** 2
    assert abs(float(whole.log_likelihood) - parts) < 5 * math.sqrt(2 * variance)


def test_one_token_takes_one_forward_pass_and_has_no_error():
    pipe, ids = load(checkpoint("llada")), torch.tensor([[20, 9, 30]])
    given = torch.tensor([[True, True, False]])
    out = pipe.log_likelihood(input_ids=ids, given=given)
    pseudo = pipe.log_likelihood(input_ids=ids, given=given, method="pseudo")
    assert out.nfe == 1 and out.nfe_per_row == [1] and float(out.standard_error) == 0
    torch.testing.assert_close(out.log_likelihood, pseudo.log_likelihood)


def test_texts_and_answers_are_read_as_they_are_continued():
    pipe = pipeline()
    seeds = {"num_samples": 20}
    whole = pipe.log_likelihood(["w1 w2 w3", "w4 w5"], generator=torch.Generator().manual_seed(0), **seeds)
    assert whole.num_tokens.tolist() == [3, 2]
    answer = pipe.log_likelihood(
        ["w3", " w5 w6"],
        prompt=["w1 w2 ", "w4"],
        generator=[torch.Generator().manual_seed(1) for _ in range(2)],
        **seeds,
    )
    assert answer.num_tokens.tolist() == [1, 2]
    by_given = pipe.log_likelihood(["w1 w2 w3"], given=["w1 w2"], method="pseudo")
    assert float(by_given.log_likelihood) == pytest.approx(float(answer.log_likelihood[0]), abs=1e-5)
    one = pipe.log_likelihood(["w3", "w7"], prompt="w1 w2", method="pseudo")
    assert one.num_tokens.tolist() == [1, 1]


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_greedy_answers_are_those_that_the_model_writes_itself(family):
    pipe, prompt = load(checkpoint(family)), torch.randint(8, MASK, (1, 5), generator=torch.Generator().manual_seed(6))
    ids, block = torch.cat([prompt, torch.full((1, 4), MASK)], dim=1), CHECKPOINTS[family][1] or 99
    while (ids == MASK).any():
        masked = (ids[0] == MASK).nonzero().flatten().tolist()
        masked = [i for i in masked if i // block == masked[0] // block]
        p = reference(family, checkpoint(family), ids)[0, :, :MASK].double().softmax(-1)
        best = max(masked, key=lambda i: float(p[i].max()))
        ids[0, best] = int(p[best].argmax())
    scored = torch.arange(9)[None] >= 5
    wrong = ids.clone()
    wrong[0, 7] = 8 if int(wrong[0, 7]) != 8 else 9
    rows = Canvas(torch.cat([ids, wrong]), scored.repeat(2, 1), None, whole=True)
    assert is_greedy(pipe.denoiser, rows, scored.repeat(2, 1)) == [True, False]


def test_refusals():
    pipe = pipeline()
    for call, says in (
        ({}, "either `texts` or `input_ids`"),
        ({"texts": "w1", "input_ids": [[5]]}, "either `texts` or `input_ids`"),
        ({"texts": "w1", "method": "exact"}, "`method` must be one of"),
        ({"texts": "w1", "num_samples": 0}, "`num_samples` must be an integer of at least 1, got 0"),
        ({"texts": "w1", "batch_size": True}, "`batch_size` must be an integer"),
        ({"texts": ["w1", "w2"], "prompt": ["w3", "w4", "w5"]}, "one text for each of 2 texts, got 3"),
        ({"input_ids": [[5, 6]], "prompt": "w1"}, "`prompt` needs `texts`"),
        ({"texts": "w1", "given": "w1"}, "nothing to score in row 0"),
        ({"texts": "", "prompt": "w1"}, "nothing to score in row 0"),
        ({"input_ids": [[5, 6, pipe.mask_token_id]]}, "holds a mask token"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe.log_likelihood(**call)
    with pytest.raises(TypeError, match="`prompt` must be a text or texts"):
        pipe.log_likelihood("w1", prompt=[[5]])
