"""The page of a trace in a real browser: what is seen, heard by a keyboard, and does not move."""

import json

import pytest
import torch
from browser import Browser

import prism_pipelines
from prism_pipelines import JudgeAndRepairScheduler, PrismPipeline, PrismScheduler, PrismSchedulerOutput
from prism_pipelines.sampling.trace import Trace, TraceStep

pytestmark = pytest.mark.slow

WORDS = ["<m>", " the", " king", "ing", "\n", " اهلا", "日本語", "😀", " supercalifragilistic", "\u202eevil", "\u0301"]
ATTACK = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
HARD = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"
EVERY_FRAME = "frames.map((_, n) => {{ show(n); return {} }})"
PLACES = "cells.map(c => (r => [r.left + scrollX, r.top + scrollY, r.width, r.height])(c.getBoundingClientRect()))"
# The contrast of every piece of text against the colour behind it, as WCAG 2 counts it; the least first.
CONTRAST = """(() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const part = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = c => .2126 * part(c[0]) + .7152 * part(c[1]) + .0722 * part(c[2]);
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || /SCRIPT|OPTION/.test(e.tagName)) continue;
    let back = e, colour = [0, 0, 0, 0];
    for (; back; back = back.parentElement) {
      colour = rgb(getComputedStyle(back).backgroundColor);
      if (colour.length === 3 || colour[3]) break;
    }
    const a = light(rgb(getComputedStyle(e).color)), b = light(colour);
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.slice(0, 30), e.className]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


class Tokens:
    """A tokenizer of awkward words."""

    mask_token_id = 0
    words = [*WORDS, ATTACK]  # noqa: RUF012

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def made_up(length=60, steps=12, rows=1, seed=0) -> Trace:
    """A run of random tokens and qualities, in which tokens are taken back."""
    g = torch.Generator().manual_seed(seed)
    sample = torch.zeros(rows, length, dtype=torch.long)
    sample[:, :3] = 1
    generated = sample == 0
    trace = Trace(sample, generated, 0, Tokens(), prompted=True, scheduler="PrismScheduler")
    for n in range(steps):
        quality, last = torch.rand(rows, length, generator=g) ** 0.3, n == steps - 1
        masked, chance = generated & (sample == 0), torch.rand(rows, length, generator=g)
        unmasked = masked & (chance < (1 if last else 3 / (steps - n)))
        remasked = generated & ~masked & (quality < 0.7) & (not last)
        ids = torch.randint(1, len(Tokens.words), (rows, length), generator=g)
        after = torch.where(unmasked, ids, sample).masked_fill(remasked, 0)
        step = PrismSchedulerOutput(after, unmasked, remasked, after[unmasked], torch.rand(int(unmasked.sum())))
        trace.append(TraceStep.of(step, quality, sample, generated, [n + 1] * rows, 0))
        sample = after
    return trace.finish(sample, None, None, None, [steps] * rows)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of real runs of the bundled models, and of made-up ones."""
    folder = tmp_path_factory.mktemp("pages")
    made_up(rows=2).to_html(folder / "odd.html", title=f"Odd {ATTACK}")
    pipe = PrismPipeline.from_pretrained(prism_pipelines.bundled("sudoku"))
    pipe.scheduler = PrismScheduler(num_remask=2)
    run = {"infill": PUZZLE, "return_trace": True, "generator": torch.Generator().manual_seed(0)}
    out = pipe(**run, num_inference_steps=20, return_quality=True)
    out.trace.to_html(folder / "sudoku.html", columns=9)
    # Few clues and in random order, so that there is something to repair.
    pipe.scheduler = JudgeAndRepairScheduler(temperature=1.0, order="random")
    judged = pipe(**run | {"infill": HARD}, num_inference_steps=60)
    judged.trace.to_html(folder / "judged.html", columns=9)
    return {"folder": folder, "grid": out.texts[0], "judged": judged}


@pytest.fixture(scope="module")
def browser(pages):
    with Browser() as tab:
        yield tab
        assert tab.errors == []
        assert all(address.startswith("file:") for address in tab.requests)


def test_it_opens_on_the_result_with_every_token_and_its_quality_in_numbers(browser, pages):
    browser.open(pages["folder"] / "sudoku.html")
    assert browser.js("document.querySelector('#at').textContent") == "result"
    assert browser.js("cells.map(c => c.firstChild.textContent).join('')") == pages["grid"]
    numbers = browser.js("cells.map(c => c.lastChild.textContent)")
    assert [bool(number) for number in numbers] == [clue == "." for clue in PUZZLE]
    assert all(0 <= int(number) <= 100 for number in numbers if number)
    assert browser.js("document.querySelectorAll('.lane').length") == 5


def test_play_runs_from_the_first_step_to_the_last(browser, pages):
    browser.open(pages["folder"] / "sudoku.html")
    browser.js("document.querySelector('#speed').value = '32'")
    browser.click("#play")
    assert browser.js("[at, document.querySelector('#play').textContent, timer !== null]") == [0, "❚❚ Pause", True]
    shown = browser.js(
        "new Promise(done => { const seen = []; (function look() { if (seen.at(-1) !== at) seen.push(at);"
        " if (timer) requestAnimationFrame(look); else done(seen) })() })"
    )
    assert shown == sorted(shown) and shown[-1] == browser.js("frames.length - 1")
    assert browser.js("document.querySelector('#play').textContent") == "▶ Play"


@pytest.mark.parametrize("name", ["odd", "sudoku", "judged"])
@pytest.mark.parametrize("phone", [False, True])
def test_nothing_moves_from_step_to_step_and_nothing_is_wider_than_the_screen(name, phone, pages):
    with Browser(**({"width": 390, "height": 844, "mobile": True} if phone else {})) as tab:
        tab.open(pages["folder"] / f"{name}.html")
        around = (
            "[...document.querySelectorAll('html, #buttons > *, #facts > *, #life, .lane')]"
            ".map(e => (r => [r.left, r.top + scrollY, r.height])(e.getBoundingClientRect()))"
        )
        places = tab.js(EVERY_FRAME.format(f"JSON.stringify([{PLACES}, {around}])"))
        assert len(places) > 10 and len(set(places)) == 1
        assert tab.js("document.documentElement.scrollWidth") <= tab.size[0]
        assert tab.errors == []


@pytest.mark.parametrize("name", ["odd", "judged"])
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_by_at_least_4_5_to_1_in_every_step(name, dark, pages):
    with Browser(dark=dark) as tab:
        tab.open(pages["folder"] / f"{name}.html")
        tab.js("choose(cells.length - 1)")
        background = tab.js("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        least = min(tab.js(EVERY_FRAME.format(CONTRAST)))
        assert least[0] >= 4.5, least


def test_states_are_told_apart_without_colour(browser, pages):
    browser.open(pages["folder"] / "odd.html")
    marks = browser.js(
        "Object.fromEntries(frames.flatMap((f, n) => { show(n); return cells.map((c, i) =>"
        " [f.kinds[i], [c.lastChild.textContent, getComputedStyle(c.firstChild).textDecorationLine]]) }))"
    )
    assert marks["written"] == ["+", "none"] and marks["remasked"] == ["×", "line-through"]
    assert marks["mask"] == ["", "none"] and marks["kept"][0] in "0123456789"


def test_the_life_of_a_token_says_what_when_how_sure_and_why(browser, pages):
    browser.open(pages["folder"] / "sudoku.html")
    i = browser.js("frames.map(f => f.kinds.indexOf('remasked')).find(i => i >= 0)")
    browser.move(f"#tokens .t:nth-child({i + 1})")
    text = browser.js("document.querySelector('#life').innerText")
    assert f"Position {i + 1}: " in text and "at result" in text
    assert text.count("written ") >= 2 and "drawn with probability" in text  # taken back once, so written twice
    step = browser.js(f"frames.findIndex(f => f.kinds[{i}] === 'remasked')")
    seen = browser.js(f"frames[{step}].seen[{i}] / 254")
    assert f"step {step} of 20: " in text and f"remasked by PrismScheduler: quality {seen:.2f}, " in text
    assert "lowest of" in text


def test_everything_is_reached_by_keyboard_alone(browser, pages):
    browser.open(pages["folder"] / "odd.html")
    active = "document.activeElement.id || document.activeElement.closest('#tokens')?.id"
    reached = []
    for _ in range(11):
        browser.key("Tab")
        reached.append(browser.js(active))
    assert reached[:8] == ["play", "first", "back", "on", "last", "speed", "row", "slider"]
    assert reached[9:] == ["tokens", "life"]  # between them the prompt, which opens and closes
    last = browser.js("frames.length - 1")
    browser.js("document.activeElement.blur()")
    for key, expected in [("Home", 0), ("ArrowRight", 1), (".", 2), ("ArrowLeft", 1), (",", 0), ("End", last)]:
        browser.key(key)
        assert browser.js("at") == expected, key
    browser.key("+")
    assert browser.js("document.querySelector('#speed').value") == "8"
    browser.key(" ")
    assert browser.js("timer !== null")
    browser.key(" ")
    assert browser.js("timer === null")


def test_arrows_move_among_tokens_and_the_panel_follows(browser, pages):
    browser.open(pages["folder"] / "sudoku.html")
    browser.js("cells[0].focus()")
    for key, expected in [("ArrowRight", 1), ("ArrowDown", 10), ("ArrowLeft", 9), ("ArrowUp", 0), ("ArrowUp", 0)]:
        browser.key(key)
        assert browser.js("+document.activeElement.dataset.i") == expected, key
        assert browser.js("document.querySelector('#life').innerText").startswith(f"Position {expected + 1}:")
        assert browser.js("document.activeElement.getAttribute('aria-label')").startswith(f"Position {expected + 1}:")
    assert browser.js("at === frames.length - 1")  # the step is the same


def test_the_slider_scrubs_and_a_click_on_a_lane_goes_there(browser, pages):
    browser.open(pages["folder"] / "sudoku.html")
    browser.js("document.querySelector('#slider').focus()")
    browser.key("ArrowLeft")
    assert browser.js("[at, +document.querySelector('#slider').value]") == [browser.js("frames.length - 2")] * 2
    browser.click(".lane svg")
    assert browser.js("at") == pytest.approx(browser.js("(frames.length - 1) / 2"), abs=1)


def test_judgements_are_shown_with_their_verdict(browser, pages):
    browser.open(pages["folder"] / "judged.html")
    trace = pages["judged"].trace
    said = [step.verdicts[0] for step in trace]
    assert "repair" in said
    shown = browser.js(EVERY_FRAME.format("document.querySelector('#facts div:last-child dd').textContent"))
    assert [text if text != "–" else None for text in shown[1 : len(said) + 1]] == [
        f"repair {int(step.remasked.sum())}" if word == "repair" else word
        for word, step in zip(said, trace, strict=True)
    ]
    assert "judged" in browser.js("document.querySelector('#lanes').textContent")
    end = "accepted" if pages["judged"].accepted[0] else "given up"
    assert end in browser.js("document.querySelector('#summary').textContent")
    assert browser.js("frames.at(-1).forwards") == pages["judged"].nfe


def test_rows_are_chosen_and_the_prompt_stands_apart(browser, pages):
    browser.open(pages["folder"] / "odd.html")
    assert browser.js("document.querySelector('#prompt pre').textContent") == " the the the"
    first = browser.js("cells.map(c => c.firstChild.textContent).join('')")
    browser.js("(s => { s.value = '1'; s.onchange() })(document.querySelector('#row'))")
    assert browser.js("cells.map(c => c.firstChild.textContent).join('')") != first
    assert browser.js("cells.length") == 57


def test_generated_text_can_do_no_harm(browser, pages):
    browser.open(pages["folder"] / "odd.html")
    assert ATTACK in browser.js("data.words.join('')") and browser.js("document.title") == f"Odd {ATTACK}"
    browser.js(EVERY_FRAME.format("cells.forEach((_, i) => choose(i))"))
    assert browser.js("document.images.length + document.scripts.length") == 2  # the data and the script of the page
    assert browser.js("window.harmed") is None
    with Browser() as tab:  # even were a script to get in, the page's policy would not run it
        tab.open(pages["folder"] / "odd.html")
        tab.js("document.body.append(Object.assign(document.createElement('script'), {text: 'window.harmed = 1'}))")
        assert tab.js("window.harmed") is None and any("Content Security Policy" in text for text in tab.errors)


def test_a_thousand_tokens_are_shown_and_searched_by_lines(browser, tmp_path):
    made_up(length=1027, steps=64).to_html(tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    assert browser.js("cells.length") == 1024
    browser.js("choose(500, true)")
    browser.key("ArrowDown")
    below = browser.js("[+document.activeElement.dataset.i, cells[500].offsetTop, document.activeElement.offsetTop]")
    assert below[0] > 500 and below[2] > below[1]
    assert json.loads(browser.js("JSON.stringify(frames.map(f => f.visible))"))[-1] == 1024
