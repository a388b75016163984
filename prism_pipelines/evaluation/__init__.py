"""Evaluation: success rates with intervals, paired comparisons and calibration. Takes pipelines or plain callables."""

from .sudoku import (
    SudokuScore,
    calibration,
    evaluate_sudoku,
    head_calibration,
    paired_failure_ratio,
    pipeline_solver,
    row_generators,
    wilson_interval,
)

__all__ = [
    "SudokuScore",
    "calibration",
    "evaluate_sudoku",
    "head_calibration",
    "paired_failure_ratio",
    "pipeline_solver",
    "row_generators",
    "wilson_interval",
]
