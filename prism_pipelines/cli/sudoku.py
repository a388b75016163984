"""`prism sudoku`: solve one puzzle with a live view, or a file of many."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from .. import sudoku
from .arguments import COUNT, WHOLE, Commands, add_command, add_live_flags, add_scheduler_flags
from .loading import change_scheduler, load_model
from .quiet import is_quiet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..pipeline_output import PrismPipelineOutput
    from ..pipeline_prism import PrismPipeline
    from ..sampling.trace import Trace

OnStep: TypeAlias = "Callable[[PrismPipeline, int, Any, dict[str, Any]], dict[str, Any]]"
BATCH_SIZE = 32
MAX_VISITS = 500_000  # partial grids of the exact search: about five seconds


def add_parser(commands: Commands) -> None:
    """Add the subcommand `sudoku` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "sudoku",
        run_sudoku,
        "[PUZZLE|FILE] [FLAGS]",
        help="solve Sudoku with the bundled model and watch it correct itself",
        examples="""
            prism sudoku
            prism sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
            prism sudoku puzzles.txt --json
            prism sudoku --scheduler self-confidence --num-inference-steps 81 --html run.html""",
        status="0 solved, 1 not solved or no solution, 2 bad input.",
    )
    parser.add_argument(
        "puzzle",
        nargs="?",
        metavar="PUZZLE|FILE",
        help="81 characters row by row ('.', '0' or '_' for a blank), or a file with one such puzzle a line and '#' "
        "comments; default: a built-in puzzle",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num-inference-steps", metavar="N", type=COUNT, default=52, help="forward passes, at most (default: 52)"
    )
    add_scheduler_flags(group, config=False)
    group.add_argument("--num-remask", metavar="N", type=WHOLE, help="cells remasked a step")
    add_live_flags(parser, group, delay=0.08)


def read_puzzles(text: str | None) -> tuple[np.ndarray, bool]:
    """The puzzles that the argument PUZZLE|FILE names, (N, 81) int64, and whether it named a file.

    Raises:
        ValueError: neither a puzzle nor a file; or a line of the file is no puzzle (its number is named).
    """
    if text is None:
        return sudoku.parse_puzzle(sudoku.DEMO_PUZZLE)[None], False
    try:
        is_file = bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        is_file = False
    if not is_file:
        try:
            return sudoku.parse_puzzle(text)[None], False
        except ValueError as error:
            raise ValueError(f"{error}, and no file has that name") from None
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{text} is not a text file in UTF-8") from None
    puzzles = []
    for number, line in enumerate(lines, start=1):
        if line := line.split("#")[0].strip():
            try:
                puzzles.append(sudoku.parse_puzzle(line))
            except ValueError as error:
                raise ValueError(f"{text}, line {number}: {error}") from None
    if not puzzles:
        raise ValueError(f"{text} holds no puzzle; write one of 81 characters on each line")
    return np.stack(puzzles), True


@dataclass(frozen=True)
class Outcome:
    """One puzzle's run: grids int64 (81,), `solutions` 0, 1, 2 (several) or None (search cut off), cells remasked and
    forwards made, and of rules that judge whether the grid was accepted and P(all cells are right), else None."""

    puzzle: np.ndarray
    grid: np.ndarray
    solutions: int | None
    remasked: int = 0
    forwards: int = 0
    accepted: bool | None = None
    confidence: float | None = None

    @property
    def solved(self) -> bool:
        """Valid grid with every clue kept, by the exact checker."""
        return bool(sudoku.is_solved(self.grid, self.puzzle))

    def record(self) -> dict:
        """The fields of the plain and JSON output."""
        return {
            "puzzle": sudoku.format_grid(self.puzzle),
            "grid": sudoku.format_grid(self.grid),
            "verdict": "no solution" if self.solutions == 0 else "solved" if self.solved else "not solved",
            "solutions": {0: "none", 1: "one", 2: "several", None: "unknown"}[self.solutions],
            "forwards": self.forwards,
            "remasked": self.remasked,
            "accepted": self.accepted,
            "confidence": self.confidence,
        }

    def verdict(self) -> str:
        """How sure the quality head is of the grid, in a sentence; "" where no rule judged it."""
        if self.accepted is None:
            return ""
        found = "accepted the grid" if self.accepted else "did not accept the grid: this is the best one found"
        sure = "" if self.confidence is None else f" It is {100 * self.confidence:.1f} % sure that every cell is right."
        return f"The quality head {found}.{sure}"

    def sentence(self) -> str:
        """What was found, for people."""
        clashes = len(sudoku.conflicts(self.grid))
        wrong = f"{clashes} pair{'s' * (clashes != 1)} of cells conflict"
        if self.solutions == 0:
            return "This puzzle has no solution (proved by exact search), so the model was not run."
        if self.solutions is None and not self.solved:
            return f"Not solved: {wrong}. Whether there is a solution is not known: the exact search was cut off."
        if (self.solutions or 1) > 1:
            found = "one of them" if self.solved else f"none of them: {wrong}"
            return f"This puzzle has several solutions; the grid found is {found}. All clues are kept."
        if self.solved:
            return "Solved: every row, column and box holds 1-9 once, and all clues are kept."
        return f"Not solved: {wrong}. All clues are kept. Try another --seed or more --num-inference-steps."


def load_pipeline(args: argparse.Namespace) -> PrismPipeline:
    """The pipeline that the flags describe, on its device, without its own progress bar.

    Raises:
        ValueError: the device is not there, the model is no Sudoku model, or a flag does not fit the scheduler.
    """
    from .. import bundled

    # The head that judges whole grids, unless a flag asks for another rule, which goes with the model's own head.
    judged = args.model is None and args.scheduler is None and args.num_remask is None
    head = bundled("sudoku-head") if judged else None
    pipe = load_model(args.model or bundled("sudoku"), args.device, head)
    if pipe.mask_token_id != sudoku.MASK_ID or pipe.model.config.vocab_size != sudoku.VOCAB_SIZE:
        raise ValueError(
            f"{args.model} is not a Sudoku model: its mask id or vocabulary is not that of sudoku_tokenizer()"
        )
    return pipe


def solve(
    pipe: PrismPipeline,
    puzzles: np.ndarray,
    args: argparse.Namespace,
    on_step: OnStep | None = None,
    trace: bool = False,
) -> tuple[list[Outcome], list[Trace]]:
    """Run the pipeline on every puzzle that has a blank and a solution, in batches.

    Args:
        on_step: callback of the pipeline, or None.
        trace: whether to record the runs.
    Returns:
        outcomes, one a puzzle in their order; traces with `trace`, one a batch.
    """
    import torch

    from ..evaluation import row_generators

    outcomes = [Outcome(puzzle, puzzle, sudoku.count_solutions(puzzle, max_visits=MAX_VISITS)) for puzzle in puzzles]
    todo = [i for i, outcome in enumerate(outcomes) if outcome.solutions != 0 and not outcome.solved]
    traces: list[Trace] = []
    for start in range(0, len(todo), BATCH_SIZE):
        rows = todo[start : start + BATCH_SIZE]
        remasked = np.zeros(len(rows), dtype=np.int64)

        def count(
            pipe: PrismPipeline, i: int, t: Any, state: dict[str, Any], remasked: np.ndarray = remasked
        ) -> dict[str, Any]:
            remasked += state["remasked"].sum(-1).cpu().numpy()
            return on_step(pipe, i, t, state) if on_step else {}

        found = pipe(
            infill=torch.from_numpy(sudoku.to_ids(puzzles[rows])),
            num_inference_steps=args.num_inference_steps,
            generator=row_generators(puzzles[rows], args.seed),
            output_type="seq",
            callback_on_step_end=count,
            return_trace=trace,
        )
        out = cast("PrismPipelineOutput", found)  # it is no tuple with return_dict=True, the default
        traces += [out.trace] if out.trace is not None else []
        forwards = out.nfe_per_row or [out.nfe] * len(rows)
        for i, (row, grid) in enumerate(zip(rows, out.sequences.cpu().numpy(), strict=True)):
            outcomes[row] = Outcome(
                puzzles[row],
                grid,
                outcomes[row].solutions,
                int(remasked[i]),
                forwards[i],
                None if out.accepted is None else bool(out.accepted[i]),
                None if out.confidence is None else float(out.confidence[i]),
            )
    return outcomes, traces


def run_sudoku(args: argparse.Namespace) -> int:
    """Run `prism sudoku`; see `add_parser` for the flags. Returns the exit status."""
    from rich.console import Console

    puzzles, from_file = read_puzzles(args.puzzle)
    if args.html and len(puzzles) != 1:
        raise ValueError("--html shows the run of one puzzle; it does not go with a file of several")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(f"--html {args.html}: that folder does not exist")
    pipe, console = load_pipeline(args), Console(highlight=False)
    change_scheduler(pipe, args, "temperature", "num_remask")
    if from_file and len(puzzles) > 1:
        return _run_file(pipe, puzzles, args)
    return _run_one(pipe, puzzles, args, console)


def _run_one(pipe: PrismPipeline, puzzles: np.ndarray, args: argparse.Namespace, console: Console) -> int:
    from .live_view import LiveView, board, legend, printable

    live = console.is_terminal and not (args.json or args.no_live)
    if live:
        with LiveView(console, board, "cells", args.delay) as view:
            (outcome,), traces = solve(pipe, puzzles, args, view.step, trace=bool(args.html))
    else:
        (outcome,), traces = solve(pipe, puzzles, args, trace=bool(args.html))
    record = outcome.record() | {"seed": args.seed, "scheduler": type(pipe.scheduler).__name__}
    if args.html and traces:
        traces[0].tokenizer = sudoku.sudoku_tokenizer()
        traces[0].to_html(args.html, title=outcome.sentence(), columns=9)
    elif args.html:
        print(f"prism: the model was not run, so {args.html} is not written", file=sys.stderr)
    if args.json:
        print(json.dumps(record))
    elif not console.is_terminal:
        print("\n".join(f"{name}\t{value}" for name, value in record.items()))
    else:
        clashing = {i for pair in sudoku.conflicts(outcome.grid) for i in pair}
        states = [
            "given" if clue else "conflict" if i in clashing else "kept" if digit else "mask"
            for i, (clue, digit) in enumerate(zip(outcome.puzzle, outcome.grid, strict=True))
        ]
        console.print(printable(console, board(outcome.grid.tolist(), states)), end="")
        console.print(printable(console, legend(states)))
        console.print(outcome.sentence(), style="bold green" if outcome.solved else "bold red")
        counts = f"{outcome.forwards} forwards, {outcome.remasked} cells remasked, seed {args.seed}."
        console.print(f"{counts} {outcome.verdict()}".rstrip())
    return 0 if outcome.solved else 1


def _progress() -> Progress:
    """A progress bar on stderr, silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    errors = Console(stderr=True)
    return Progress(console=errors, disable=is_quiet() or not errors.is_terminal, transient=True)


def _run_file(pipe: PrismPipeline, puzzles: np.ndarray, args: argparse.Namespace) -> int:
    with _progress() as progress:
        task = progress.add_task(f"{len(puzzles)} puzzles")

        def advance(pipe: PrismPipeline, i: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
            steps = len(pipe.scheduler.timesteps)
            progress.update(task, total=math.ceil(len(puzzles) / BATCH_SIZE) * steps, advance=1)
            return {}

        outcomes, _ = solve(pipe, puzzles, args, advance)
    records = [outcome.record() for outcome in outcomes]
    solved = sum(outcome.solved for outcome in outcomes)
    if args.json:
        settings = {"seed": args.seed, "scheduler": type(pipe.scheduler).__name__}
        print(json.dumps({"solved": solved, "n": len(records), **settings, "puzzles": records}))
    else:
        sys.stdout.write("\t".join(records[0]) + "\n")
        for record in records:
            sys.stdout.write("\t".join(str(value) for value in record.values()) + "\n")
        sys.stdout.flush()
        print(f"{solved} of {len(records)} solved", file=sys.stderr)
    return 0 if solved == len(records) else 1
