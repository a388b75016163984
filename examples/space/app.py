"""A page to try self-correction: two decoding rules side by side on a Sudoku, a text, or any model of the Hub.

    pip install -r examples/space/requirements.txt
    python examples/space/app.py            # then open http://127.0.0.1:7860; runs on a CPU

As a Hub Space: push this folder; README.md has the header that a Space needs.
"""

from __future__ import annotations

import argparse
import html
import queue
import threading

import gradio as gr
import torch

import prism_pipelines
from prism_pipelines import (
    DrawConfidenceScheduler,
    JudgeAndRepairScheduler,
    MDLMScheduler,
    PrismPipeline,
    PrismScheduler,
    PromptConfidenceScheduler,
    SelfConfidenceScheduler,
    StridedSweepScheduler,
    sudoku,
)

MOST_STEPS = 256
RULES = {  # name: (scheduler for a number of tokens taken back a step, does it need a head?)
    "no remasking": (lambda heat, n: MDLMScheduler(order="random", temperature=heat), False),
    "no remasking, surest first": (lambda heat, n: MDLMScheduler(order="confidence", temperature=heat), False),
    "PRISM": (lambda heat, n: PrismScheduler(order="random", temperature=heat, num_remask=n), True),
    "judge and repair": (lambda heat, n: JudgeAndRepairScheduler(temperature=heat), True),
    "self-confidence": (lambda heat, n: SelfConfidenceScheduler(order="random", temperature=heat, num_remask=n), False),
    "prompt confidence": (
        lambda heat, n: PromptConfidenceScheduler(order="random", temperature=heat, num_remask=n),
        False,
    ),
    "draw confidence": (lambda heat, n: DrawConfidenceScheduler(order="random", temperature=heat, num_remask=n), False),
    "strided sweep": (lambda heat, n: StridedSweepScheduler(temperature=heat), False),
}
ONE_AT_A_TIME = threading.Lock()  # two cores do not get faster by sharing them
_loaded: dict = {}


def bank() -> list[list[str]]:
    """Puzzles to choose from, made from seeds: 45, 36, 30 and 25 clues."""
    return [
        [sudoku.format_grid(sudoku.make_puzzles(1, clues=clues, seed=seed)[0][0]).replace("\n", "").replace(" ", "")]
        for seed, clues in enumerate((45, 36, 30, 25))
    ]


def pipeline(model: str, head: str = "") -> PrismPipeline:
    """A pipeline, kept for the next call; four at most, so that memory does not grow.

    Raises:
        gr.Error: with what `from_pretrained` says.
    """
    key = (model, head)
    if key not in _loaded:
        try:
            pipe = PrismPipeline.from_pretrained(model, quality_head=head or None)
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(str(error), duration=None) from error
        pipe.set_progress_bar_config(disable=True)
        while len(_loaded) > 3:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = pipe
    return _loaded[key]


def frame(page: str, label: str) -> str:
    """A page of a trace in a frame of its own, in which its script may run and reach nothing else."""
    return (
        f'<iframe title="{html.escape(label)}" sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
        'style="width:100%;height:900px;border:1px solid #8884;border-radius:8px"></iframe>'
    )


def canvas_now(pipe: PrismPipeline, tensors: dict, columns: int | None) -> str:
    """The first row of a canvas as it stands: grey is not yet written, orange was just taken back."""
    cells, mask = [], pipe.mask_token_id
    row = zip(tensors["sample"][0].tolist(), tensors["remasked"][0].tolist(), strict=True)
    for token, remasked in row:
        look, text = "", html.escape(pipe.tokenizer.decode([token]))
        if token == mask:
            look, text = "background:#e69f00" if remasked else "background:#8884", "&times;" if remasked else "&middot;"
        cells.append(f'<span style="min-width:1.6em;text-align:center;white-space:pre;{look}">{text}</span>')
    grid = f"display:grid;grid-template-columns:repeat({columns},1.9em)" if columns else "display:flex;flex-wrap:wrap"
    return f'<div class="now" style="{grid};gap:2px;font-family:monospace">{"".join(cells)}</div>'


def played(pipe: PrismPipeline, columns: int | None, **call):
    """Run a pipeline in a thread of its own. Yields the step and its canvas, the newest; gives back the output."""
    news: queue.Queue = queue.Queue()

    def work():
        try:
            news.put((None, pipe(**call, callback_on_step_end=lambda pipe, *step: news.put(step))))
        except Exception as error:  # shown by the thread that reads
            news.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        step, *rest = news.get()
        while step is not None and not news.empty():  # pictures that nobody would see
            step, *rest = news.get()
        if step is None:
            break
        yield step + 1, canvas_now(pipe, rest[1], columns)
    if isinstance(rest[0], Exception):
        raise rest[0]
    return rest[0]


def run(pipe: PrismPipeline, rule: str, given: dict, steps: int, heat: float, taken: int, seed: int, columns=None):
    """One run by one rule, as it goes: a sentence and a picture for each step; at the end the page that plays it.

    Raises:
        gr.Error: with what the pipeline says.
    """
    make, needs_head = RULES[rule]
    if needs_head and pipe.quality_head is None:
        text = f"**{rule}** needs a quality head, and none was given for this model. Name one, or choose another rule."
        yield text, ""
        return
    with ONE_AT_A_TIME:
        pipe.scheduler = make(float(heat), int(taken))
        live = played(
            pipe,
            columns,
            **given,
            num_inference_steps=int(steps),
            generator=torch.Generator().manual_seed(int(seed)),
            return_trace=True,
            return_quality=pipe.quality_head is not None and rule != "judge and repair",  # which judges anyway
        )
        try:
            while True:
                step, picture = next(live)
                yield f"**{rule}**: step {step}", picture
        except StopIteration as end:
            out = end.value
        except (ValueError, TypeError, torch.OutOfMemoryError) as error:
            raise gr.Error(str(error), duration=None) from error
    taken_back = sum(int(step.remasked.sum()) for step in out.trace)
    judged = " with one to judge the result" if out.quality is not None else ""
    said = [f"**{rule}**: {out.nfe} forward passes{judged}", f"{taken_back} taken back"]
    if out.trace.quality is not None:
        seen = out.trace.quality[out.trace.generated]
        said.append(f"quality of the result: mean {seen.mean():.2f}, lowest {seen.min():.2f}")
    if out.confidence is not None:
        said.append(f"P(all right) {out.confidence[0]:.2f}")
    if out.accepted is not None:
        said.append("accepted" if out.accepted[0] else "given up")
    if columns == 9:
        grid, puzzle = out.sequences.cpu().numpy(), sudoku.parse_puzzle(given["infill"])
        clashes = len(sudoku.conflicts(grid[0]))
        said.append("**solved**" if sudoku.is_solved(grid, puzzle[None])[0] else f"wrong, {clashes} clashes")
    page = out.trace.to_html(title=rule, columns=columns)
    yield ", ".join(said), frame(page, f"the run of {rule}")


def side_by_side(load, given_of, columns=None):
    """A callback for both rules, one after the other, shown step by step as they run."""

    def both(*values):
        *inputs, left, right, steps, heat, taken, seed = values
        pipe, given = load(*inputs), given_of(*inputs)
        settings = (int(steps), heat, taken, seed, columns)
        for first in run(pipe, left, given, *settings):
            yield *first, "", ""
        for second in run(pipe, right, given, *settings):
            yield *first, *second

    return both


def puzzle_of(text: str) -> dict:
    """What the pipeline is given for a Sudoku."""
    try:
        puzzle = sudoku.parse_puzzle(text)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    if sudoku.count_solutions(puzzle, max_visits=200_000) == 0:
        raise gr.Error("This puzzle has no solution: two clues clash, or leave some cell without a digit.")
    return {"infill": sudoku.format_grid(puzzle).replace("\n", "").replace(" ", "").replace("0", ".")}


def sudoku_pipeline(_: str) -> PrismPipeline:
    """The bundled model with the head that knows the run."""
    return pipeline(prism_pipelines.bundled("sudoku"), prism_pipelines.bundled("sudoku-head"))


def text_of(prompt: str, length: float) -> dict:
    """What the pipeline is given for a text."""
    given = {"gen_length": int(length)}
    return given | {"prompt": prompt} if prompt.strip() else given


def infill_of(model: str, head: str, text: str) -> dict:
    """What the pipeline is given for a text with blanks, written as ___ or as the model's own mask token."""
    mask = pipeline(model, head).tokenizer.mask_token
    if mask is None:
        raise gr.Error("The tokenizer of this model names no mask token, so a text cannot hold one.")
    filled = text.replace("___", mask)
    if mask not in filled:
        raise gr.Error(f"There is nothing to fill: write ___ or {mask} where tokens are missing, once for each token.")
    return {"infill": filled}


def controls(left: str, right: str, steps: int, heat: float, taken: int):
    """Rules and settings of a tab, and where its runs are shown."""
    with gr.Row():
        rules = [
            gr.Dropdown(list(RULES), value=value, label=label)
            for label, value in (("Left rule", left), ("Right rule", right))
        ]
        passes = gr.Slider(2, MOST_STEPS, value=steps, step=1, label="Forward passes at most")
    with gr.Accordion("More", open=False), gr.Row():
        more = [
            gr.Slider(0, 2, value=heat, step=0.05, label="Temperature"),
            gr.Slider(0, 16, value=taken, step=1, label="Taken back in each step"),
            gr.Number(0, precision=0, minimum=0, label="Seed"),
        ]
    button = gr.Button("Run both", variant="primary")
    with gr.Row():
        shown = []
        for _ in range(2):
            with gr.Column(min_width=320):
                shown += [gr.Markdown(), gr.HTML()]
    return [*rules, passes, *more], button, shown


def demo() -> gr.Blocks:
    """The app."""
    with gr.Blocks(title="prism-pipelines") as app:
        gr.Markdown(
            "# A model that doubts what it wrote\nTwo decoding rules, one model, the same number of forward passes at "
            "most. Watch both run: grey is not yet written, orange was just taken back. Then press Play, and point at "
            "a token to read its life: what it was, when, how sure, why it was taken back."
        )
        with gr.Tab("Sudoku"):
            puzzles = bank()
            puzzle = gr.Textbox(puzzles[2][0], label="Puzzle: 81 digits row by row, . or 0 for a blank", lines=2)
            gr.Examples(puzzles, puzzle, label="From the bank: 45, 36, 30 and 25 clues")
            settings, button, shown = controls("no remasking, surest first", "judge and repair", 52, 0.0, 4)
            load = side_by_side(sudoku_pipeline, puzzle_of, columns=9)
            button.click(load, [puzzle, *settings], shown, api_name="sudoku")
        with gr.Tab("Text"):
            prompt = gr.Textbox("ROMEO.\n", label="Text to continue; empty to write from nothing", lines=2)
            length = gr.Slider(8, 224, value=120, step=1, label="Characters")
            settings, button, shown = controls("no remasking", "PRISM", 64, 1.0, 2)
            load = side_by_side(lambda *_: pipeline(prism_pipelines.bundled("text")), text_of)
            button.click(load, [prompt, length, *settings], shown, api_name="text")
        with gr.Tab("Any model"):
            with gr.Row():
                model = gr.Textbox("answerdotai/ModernBERT-base", label="Hub id or folder of a masked model")
                head = gr.Textbox("", label="Hub id or folder of its quality head, if there is one")
            text = gr.Textbox("The capital of France is ___.", label="Text with ___ for each missing token", lines=3)
            settings, button, shown = controls("no remasking, surest first", "self-confidence", 16, 0.5, 1)
            button.click(side_by_side(lambda model, head, text: pipeline(model, head), infill_of),
                         [model, head, text, *settings], shown, api_name="infill")  # fmt: skip
            gr.Markdown("Proteins too: `facebook/esm2_t6_8M_UR50D`, residues in capitals, `___` for each missing one.")
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    demo().launch(server_name=args.host, server_port=args.port, show_error=True)
