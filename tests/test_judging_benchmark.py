"""The study of judge and repair: what its arms are told, and what is counted."""

import numpy as np
import torch

from benchmarks.judging import OURS, TOLD, Redraws, ToldScheduler, pairs, row_of
from prism_pipelines import sudoku

MASK = 3


def told(kind, sample, solutions, quality, mask):
    """The quality that judge and repair itself gets in the first step."""
    seen = []

    class Spy(ToldScheduler):
        pass

    scheduler = Spy().told(kind, solutions, torch.Generator().manual_seed(0))
    scheduler.set_timesteps(20)
    import prism_pipelines.schedulers.scheduling_judge_repair as module

    old = module._Rows.judge

    def judge(self, config, sample, quality, *rest):
        seen.append(quality)
        return old(self, config, sample, quality, *rest)

    module._Rows.judge = judge
    try:
        step = scheduler.step(
            torch.zeros(*sample.shape, 4), 0, sample, quality=quality, generation_mask=mask, mask_token_id=MASK
        )
    finally:
        module._Rows.judge = old
    return seen[0], step


def test_each_arm_is_told_what_its_name_says():
    g = torch.Generator().manual_seed(1)
    solutions, mask = torch.randint(0, 3, (4, 9), generator=g), torch.rand(4, 9, generator=g) < 0.8
    sample, quality = solutions.clone(), torch.rand(4, 9, generator=g)
    wrong = mask & (torch.rand(4, 9, generator=g) < 0.4)
    wrong[0] = False
    sample[wrong] = (sample[wrong] + 1) % 3
    assert set(TOLD) == {"random cells", "exact checker", "oracle ranking"}
    q, step = told("oracle ranking", sample, solutions, quality, mask)
    assert torch.equal(q < 0.5, wrong) and not (step.remasked & ~wrong).any()
    assert step.remasked.any(-1).tolist() == wrong.any(-1).tolist()
    assert step.accepted.tolist() == (~wrong.any(-1)).tolist()
    q, step = told("exact checker", sample, solutions, quality, mask)
    assert step.accepted.tolist() == (~wrong.any(-1)).tolist()
    changed = (q != quality) & mask
    assert (changed.sum(-1)[wrong.any(-1)] <= 1).all()
    q, _ = told("random cells", sample, solutions, quality, mask)
    assert torch.equal(q[~mask], quality[~mask])
    for row in range(4):
        assert sorted(q[row][mask[row]].tolist()) == sorted(quality[row][mask[row]].tolist())
    assert not torch.equal(q[mask], quality[mask])


def test_what_became_of_redrawn_cells_is_counted():
    solution = np.full((1, 81), 5)
    puzzle = np.zeros((1, 81), dtype=np.int64)
    redraws, everywhere = Redraws(puzzle, solution), torch.ones(1, 81, dtype=torch.bool)
    nothing = torch.zeros_like(everywhere)

    def at(*cells):
        mark = nothing.clone()
        mark[0, list(cells)] = True
        return mark

    grid = torch.full((1, 81), 5)
    grid[0, :2] = 4
    redraws.watch(None, 0, 0, {"unmasked": everywhere, "remasked": nothing, "sample": grid})
    assert redraws.counts.sum() == 0  # the first drawing is none again
    blank = grid.clone()
    blank[0, [0, 1, 2, 3]] = sudoku.MASK_ID
    redraws.watch(None, 1, 1, {"unmasked": nothing, "remasked": at(0, 1, 2, 3), "sample": blank})
    after = blank.clone()
    after[0, :4] = torch.tensor([5, 4, 4, 5])
    redraws.watch(None, 2, 2, {"unmasked": at(0, 1, 2, 3), "remasked": nothing, "sample": after})
    assert redraws.counts.tolist() == [1, 1, 1, 1]


def test_rows_count_what_was_solved_in_time_and_pairs_what_only_one_solved():
    ours = row_of(
        OURS, "30", 128, {"right": [True, True, False, True], "nfe": [5, 40, 128, 17], "accepted": [1, 1, 0, 0]}
    )
    assert [ours[f"within_{most}"][0] for most in (17, 34, 52, 128)] == [2, 2, 3, 3]
    assert (ours["accepted"], ours["accepted_right"]) == (2, 2) and "within_1000" not in ours
    other = row_of("prompt", "30", 17, {"right": [True, False, True, False], "nfe": [17] * 4})
    assert "within_34" not in other and other["within_17"][0] == 2
    (pair,) = pairs([ours, other])
    assert (pair["only_ours"], pair["only_other"]) == (2, 1)
