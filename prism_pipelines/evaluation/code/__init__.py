"""Evaluation of code: problems and their tests, and the sandbox that runs what a model wrote."""

from .tasks import evaluate_code, load_problems

__all__ = ["evaluate_code", "load_problems"]
