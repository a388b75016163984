"""Many prompts or sequences from a file to a file, resumable, on one process or several."""

from .batch import generate_many
from .infill import infill_many, score_many
from .quality_page import quality_page

__all__ = ["generate_many", "infill_many", "quality_page", "score_many"]
