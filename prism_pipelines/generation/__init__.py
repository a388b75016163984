"""Many prompts from a file to a file, resumable, on one process or several."""

from .batch import generate_many

__all__ = ["generate_many"]
