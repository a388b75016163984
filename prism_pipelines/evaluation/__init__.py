"""Evaluation of Sudoku, text, calibration, and comparisons of schedulers. Takes pipelines or plain callables."""

from .arms import make_scheduler, read_comparison
from .calibration import (
    calibration_table,
    evaluate_calibration,
    fit_temperature,
    risk_coverage,
    write_calibration,
)
from .cells import pipeline_fingerprint
from .compare import comparison_table, run_comparison, sudoku_task, write_comparison
from .detection import JudgedRow, detection_measures, detection_table
from .ngram_judge import ngram_judge
from .statistics import (
    bootstrap_interval,
    calibration_measures,
    paired_failure_ratio,
    pareto_front,
    t_interval,
    wilson_interval,
)
from .sudoku import (
    SudokuScore,
    evaluate_sudoku,
    head_calibration,
    pipeline_solver,
    row_generators,
)
from .text import (
    check_texts,
    distinct_n,
    diversity,
    known_word_share,
    ngram_distance,
    pipeline_texts,
    read_texts,
    self_bleu,
    text_measures,
    text_task,
    unigram_entropy,
)
from .text_compare import folder_contents, task_of_folder, text_plan
from .text_models import evaluate_text, generative_perplexity, load_featurizer, load_judge, mauve_score
from .tuning import tune_arms

__all__ = [
    "JudgedRow",
    "SudokuScore",
    "bootstrap_interval",
    "calibration_measures",
    "calibration_table",
    "check_texts",
    "comparison_table",
    "detection_measures",
    "detection_table",
    "distinct_n",
    "diversity",
    "evaluate_calibration",
    "evaluate_sudoku",
    "evaluate_text",
    "fit_temperature",
    "folder_contents",
    "generative_perplexity",
    "head_calibration",
    "known_word_share",
    "load_featurizer",
    "load_judge",
    "make_scheduler",
    "mauve_score",
    "ngram_distance",
    "ngram_judge",
    "paired_failure_ratio",
    "pareto_front",
    "pipeline_fingerprint",
    "pipeline_solver",
    "pipeline_texts",
    "read_comparison",
    "read_texts",
    "risk_coverage",
    "row_generators",
    "run_comparison",
    "self_bleu",
    "sudoku_task",
    "t_interval",
    "task_of_folder",
    "text_measures",
    "text_plan",
    "text_task",
    "tune_arms",
    "unigram_entropy",
    "wilson_interval",
    "write_calibration",
    "write_comparison",
]
