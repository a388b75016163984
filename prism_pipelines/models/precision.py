"""Warns where bfloat16 is slow."""

from __future__ import annotations

import functools
import logging
import platform

import torch

logger = logging.getLogger(__name__)


@functools.cache
def bfloat16_is_emulated() -> bool:
    """Does this CPU have no fast matrix products in bfloat16? An x86 with AVX2 and no AVX-512 has none.

    Such a product then takes tens of times as long as in float32. False if it is not known.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # no public name asks oneDNN this
    return supported is not None and not supported()


@functools.cache
def warn_of_slow_bfloat16(advice: str) -> None:
    """Warn once if this CPU has no fast bfloat16; `advice` says what to pass instead."""
    if bfloat16_is_emulated():
        logger.warning("This CPU has no fast bfloat16: it takes tens of times as long as float32. %s", advice)
