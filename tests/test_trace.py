"""The page that steps through a run."""

import json
import re

import pytest
import torch

from prism_pipelines.sampling.trace import TraceStep, token_states, trace_to_html
from prism_pipelines.sudoku import MASK_ID, sudoku_tokenizer

M = MASK_ID


def step(sample, quality, unmasked, remasked):
    flags = [torch.tensor([[i in chosen for i in range(len(sample))]]) for chosen in (unmasked, remasked)]
    return TraceStep(torch.tensor([sample]), quality and torch.tensor([quality]), *flags)


TRACE = [
    step([1, 2, M, M], [1.0, 0.1, 0.1, 0.1], {1}, set()),
    step([1, M, 3, M], [1.0, 0.2, 0.1, 0.1], {2}, {1}),
    step([1, 4, 3, 5], [1.0, 0.1, 0.3, 0.1], {1, 3}, set()),
]


def test_every_token_has_the_state_the_step_gave_it():
    assert token_states(TRACE, 0, M) == [
        ["given", "written", "mask", "mask"],
        ["given", "remasked", "written", "mask"],
        ["given", "written", "doubtful", "written"],
    ]
    assert token_states(TRACE, 0, M, low_quality=0.2)[2] == ["given", "written", "kept", "written"]


def test_the_page_holds_every_frame_and_nothing_from_outside():
    page = trace_to_html(TRACE, sudoku_tokenizer(), columns=9)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [frame["words"] for frame in data["frames"]] == [
        ["1", "2", "", ""],
        ["1", "", "3", ""],
        ["1", "4", "3", "5"],
    ]
    assert [frame["kinds"] for frame in data["frames"]] == token_states(TRACE, 0, M)
    assert data["columns"] == 9
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)


def test_markup_in_titles_and_tokens_stays_text():
    class Hostile:
        mask_token_id = M

        def decode(self, ids):
            return "</script><script>alert(1)</script>"

    page = trace_to_html(TRACE, Hostile(), title="<b>&")
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    assert "alert(1)</script>" not in page and "alert(1)" in page
    Hostile.decode = lambda self, ids: "<!--<script>@TITLE@"
    page = trace_to_html(TRACE, Hostile(), title="@DATA@")
    assert "<!--" not in page and "script>@TITLE@" in page and "<title>@DATA@</title>" in page


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="return_trace=True"):
        trace_to_html([], sudoku_tokenizer())
    with pytest.raises(ValueError, match="`row` must be in"):
        trace_to_html(TRACE, sudoku_tokenizer(), row=1)
