"""What the libraries below print while a command runs: bars of loading never, all else unless `prism --quiet`."""

from __future__ import annotations

import os
import warnings

# Read by the libraries as they are imported, here and in the processes that a command launches.
SILENT = {
    "PRISM_QUIET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


def is_quiet() -> bool:
    """Was `prism --quiet` said, in this process or the one that launched it?"""
    return os.environ.get("PRISM_QUIET") == "1"


def silence() -> None:
    """No bars and no warnings from here on, in this process and those it launches; errors and results stay."""
    os.environ.update(SILENT)
    warnings.simplefilter("ignore")


def hide_loading_bars() -> None:
    """No bar for the weights of each model that is loaded; downloads, which take long, keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # it turns those of downloads off too
    diffusers_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
