"""What a trace records, and what it gives its page to draw."""

import base64
import json
import re
from xml.etree import ElementTree

import pytest
import torch

from prism_pipelines.cli import live_view
from prism_pipelines.sampling import token_states
from prism_pipelines.sampling.trace import Trace, TraceStep
from prism_pipelines.sampling.trace_page import display_width, visible_text
from prism_pipelines.schedulers import PrismSchedulerOutput
from prism_pipelines.sudoku import MASK_ID, sudoku_tokenizer

M = MASK_ID
START = [1, M, M, M]
STEPS = [  # sample, quality, unmasked, remasked
    ([1, 2, M, M], [1.0, 0.1, 0.1, 0.1], {1}, set()),
    ([1, M, 3, M], [1.0, 0.2, 0.1, 0.1], {2}, {1}),
    ([1, 4, 3, 5], [1.0, 0.1, 0.3, 0.1], {1, 3}, set()),
]


def steps_of(canvases, start):
    before = torch.tensor([start])
    for n, (sample, quality, unmasked, remasked) in enumerate(canvases):
        flags = [torch.tensor([[i in chosen for i in range(len(sample))]]) for chosen in (unmasked, remasked)]
        drawn = torch.tensor([0.5] * len(unmasked))
        step = PrismSchedulerOutput(torch.tensor([sample]), *flags, torch.tensor([sample])[flags[0]], drawn)
        quality = None if quality is None else torch.tensor([quality])
        yield TraceStep.of(step, quality, before, torch.ones_like(flags[0]), [n + 1], M)
        before = step.prev_sample


def trace(canvases=STEPS, start=START, tokenizer=None, result=None, quality=None, **options) -> Trace:
    made = Trace(torch.tensor([start]), torch.tensor([start]) == M, M, tokenizer or sudoku_tokenizer(), **options)
    made.extend(steps_of(canvases, start))
    made.finish(torch.tensor([result or canvases[-1][0]]), quality, None, None, [len(canvases)])
    return made


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def codes(text: str) -> list[int]:
    return list(base64.b64decode(text))


def replayed(data: dict, row: int = 0) -> list[list[str]]:
    """Every canvas that the page will show, from the changes that it is given."""
    record = data["rows"][row]
    canvas, canvases = list(record["start"]), []
    for step in record["steps"]:
        for i, word in step["written"] + step.get("set", []):
            canvas[i] = word
        for i in step["remasked"]:
            canvas[i] = -1
        canvases.append(["" if word < 0 else data["words"][word] for word in canvas])
    return canvases


def test_the_page_replays_every_canvas_and_says_how_sure():
    data = data_of(trace(scheduler="PrismScheduler").to_html(columns=9))
    assert replayed(data) == [["1", "2", "", ""], ["1", "", "3", ""], ["1", "4", "3", "5"]]
    row = data["rows"][0]
    assert row["given"] == [1, 0, 0, 0] and row["result"] is None and row["prompt"] is None
    assert [step["forwards"] for step in row["steps"]] == [1, 2, 3]
    assert [codes(step["drawn"]) for step in row["steps"]] == [[127], [127], [127, 127]]
    assert codes(row["steps"][1]["quality"]) == [255, 51, 25, 25]  # 255: not known, it is given
    assert (data["columns"], data["measure"], data["scheduler"]) == (9, "quality", "PrismScheduler")


def test_without_a_head_the_page_goes_by_the_probability_of_drawing():
    data = data_of(trace([(s, None, u, r) for s, _, u, r in STEPS]).to_html())
    assert data["measure"] == "probability" and "quality" not in data["rows"][0]["steps"][0]


def test_a_canvas_that_was_restored_or_edited_is_told_from_one_that_was_written():
    canvases = [*STEPS, ([1, 4, 7, M], [1.0, 0.9, 0.9, 0.9], set(), set())]
    row = data_of(trace(canvases, result=[1, 4, 7, 6]).to_html())["rows"][0]
    words = data_of(trace(canvases, result=[1, 4, 7, 6]).to_html())["words"]
    assert [(i, words[w] if w >= 0 else "") for i, w in row["steps"][3]["set"]] == [(2, "7"), (3, "")]
    assert [(i, words[w]) for i, w in row["result"]["set"]] == [(3, "6")]


def test_the_quality_of_the_result_is_a_frame_of_its_own():
    row = data_of(trace(quality=torch.tensor([[1.0, 1.0, 0.5, 0.0]])).to_html())["rows"][0]
    assert codes(row["result"]["quality"]) == [255, 254, 127, 0] and row["result"]["forwards"] == 3


def test_a_prompt_stands_apart_and_padding_nowhere():
    made = trace(
        [([9, 1, 2, 3], None, {2, 3}, set())], [9, 1, M, M], attention_mask=torch.tensor([[0, 1, 1, 1]]), prompted=True
    )
    row = data_of(made.to_html())["rows"][0]
    assert row["prompt"] == "1" and len(row["start"]) == 2 and row["given"] == [0, 0]
    made.prompted = False  # infilling: what is given stays among what is filled
    row = data_of(made.to_html())["rows"][0]
    assert row["prompt"] is None and row["given"] == [1, 0, 0]


def test_verdicts_tell_rows_that_were_judged_from_rows_that_were_being_filled():
    before = torch.tensor([[1, 2], [1, M], [1, 2], [1, 2], [1, 2]])
    none, work = torch.zeros(5, 2, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool)
    work[4] = False  # a row that was finished before
    step = PrismSchedulerOutput(
        before, none, none, before[none], torch.zeros(0),
        finished=torch.tensor([True, False, False, True, False]),
        accepted=torch.tensor([True, False, False, False, False]),
    )  # fmt: skip
    assert TraceStep.of(step, None, before, work, [1] * 5, M).verdicts == ["accepted", None, "repair", "given up", None]


def test_markup_in_titles_and_tokens_stays_text_and_no_address_is_in_the_page():
    class Hostile:
        mask_token_id = M

        def decode(self, ids):
            return "</script><script>alert(1)</script>"

    page = trace(tokenizer=Hostile()).to_html(title="<b>&")
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    assert "alert(1)</script>" not in page and "alert(1)" in page
    Hostile.decode = lambda self, ids: "<!--<script>@TITLE@\u2028"
    page = trace(tokenizer=Hostile()).to_html(title="@DATA@")
    assert "<!--" not in page and "script>@TITLE@" in page and "<title>@DATA@</title>" in page
    assert not re.search(r"""(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg")|@import|url\(|\u2028""", page)


def test_every_character_is_seen_and_has_a_place():
    shown = {
        "\n": "↵",
        " ": "␣",
        "  ": "␣␣",
        "\x00": "␀",
        "\x7f": "␡",
        " a": " a",
        "\u202ea": "◌a",
        "\u0301": "◌\u0301",
    }
    assert {text: visible_text(text) for text in shown} == shown
    assert [display_width(text) for text in ("", "abc", "日本", "e\u0301")] == [0, 3, 4, 1]


def test_the_page_grows_with_what_changes_and_not_with_the_whole_canvas():
    length, steps = 400, 100
    start, canvas, canvases = [1] + [M] * (length - 1), [1] + [M] * (length - 1), []
    for n in range(steps):
        canvas = list(canvas)
        canvas[n + 1] = 2
        canvases.append((canvas, None, {n + 1}, set()))
    assert len(json.dumps(data_of(trace(canvases, start).to_html()))) < 20_000  # 40,000 tokens in 100 canvases


def test_rows_are_chosen_and_a_file_is_written(tmp_path):
    made = trace()
    assert made.to_html(tmp_path / "a.html", rows=[0]) == (tmp_path / "a.html").read_text(encoding="utf-8")
    assert data_of(made.to_html())["rows"][0]["number"] == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no steps"):
        Trace(torch.tensor([START]), torch.tensor([START]) == M, M).to_html()
    for rows in ([1], [-1], []):
        with pytest.raises(ValueError, match="`rows` must be rows of the batch, from 0 to 0"):
            trace().to_html(rows=rows)
    for columns in (0, True, 2.5):
        with pytest.raises(ValueError, match="`columns` must be"):
            trace().to_html(columns=columns)


def test_terminal_page_and_picture_show_a_state_as_one_table_says(monkeypatch):
    monkeypatch.setitem(token_states.STATES, "remasked", token_states.TokenState("R", "gone", "red", "#123456"))
    run = trace()
    assert data_of(run.to_html())["states"]["remasked"] == {"mark": "R", "words": "gone"}
    assert "#123456" in run.to_svg() and all(colour in run.to_html() for colour in token_states.SCALE)
    assert live_view.legend(["remasked"]).plain.split() == ["legend:", "R", "gone"]
    assert live_view.page(["a"], ["remasked"]).plain == "R"


# --- the picture that moves -------------------------------------------------------------------------------------------


def shown_at(picture: str, frame: int, frames: int) -> dict:
    """{(x, y): text} of what is seen in a frame, from the animations of opacity; 6 frames' time holds the result."""
    when, seen = frame / (frames - 1 + 6), {}
    for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"):
        opacity, animation = text.get("opacity"), text.find("{http://www.w3.org/2000/svg}animate")
        if animation is not None:
            times = [float(t) for t in animation.get("keyTimes").split(";")]
            opacity = [v for v, t in zip(animation.get("values").split(";"), times, strict=True) if t <= when + 1e-3][
                -1
            ]
        if opacity == "1":
            assert (text.get("x"), text.get("y")) not in seen
            seen[text.get("x"), text.get("y")] = text.text
    return seen


def test_the_picture_plays_every_canvas():
    picture = trace().to_svg(columns=4)
    assert "script" not in picture
    canvases = [["1", "", "", ""], ["1", "2", "", ""], ["1", "", "3", ""], *[["1", "4", "3", "5"]] * 2]
    for n, words in enumerate(canvases):
        seen = shown_at(picture, n, len(canvases))
        assert [text for (_, y), text in seen.items() if y != "20"] == [word for word in words if word]
    assert "pass 2: 1 of 3, 1 remasked" in shown_at(picture, 2, 5).values()


def test_markup_in_tokens_stays_text_in_the_picture():
    class Hostile:
        mask_token_id = M

        def decode(self, ids):
            return "</text><script>alert(1)</script>&\x00"

    picture = trace(tokenizer=Hostile()).to_svg()
    assert "<script" not in picture
    assert "</text><script>alert(1)</script>&␀" in [text.text for text in ElementTree.fromstring(picture).iter()]


@pytest.mark.parametrize("wrong", [{"row": 1}, {"columns": 0}, {"seconds": 0}, {"seconds": True}])
def test_wrong_arguments_of_the_picture_are_named(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        trace().to_svg(**wrong)
