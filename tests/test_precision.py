"""A CPU without fast bfloat16 is told of, once; the probe asks what oneDNN says."""

import logging
import platform

import pytest
import torch

from prism_pipelines import PrismPipeline, bundled
from prism_pipelines.models import precision
from prism_pipelines.training.arguments import parse_arguments

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def fresh():
    """Nothing asked and nothing said so far; nothing left over."""
    for function in (precision.bfloat16_is_emulated, precision.warn_of_slow_bfloat16):
        function.cache_clear()
    yield
    for function in (precision.bfloat16_is_emulated, precision.warn_of_slow_bfloat16):
        function.cache_clear()


def a_cpu(monkeypatch, fast: bool, machine="x86_64"):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: machine)


@pytest.mark.parametrize(("fast", "machine", "emulated"), [(True, "x86_64", False), (False, "AMD64", True)])
def test_an_x86_is_as_onednn_says(monkeypatch, fast, machine, emulated):
    a_cpu(monkeypatch, fast, machine)
    assert precision.bfloat16_is_emulated() is emulated


def test_of_other_processors_nothing_is_claimed(monkeypatch):
    a_cpu(monkeypatch, False, "arm64")
    assert not precision.bfloat16_is_emulated()


def test_where_pytorch_runs_on_avx512_nothing_is_emulated():
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert not precision.bfloat16_is_emulated()


@pytest.mark.parametrize("fast", [True, False])
def test_sampling_in_bfloat16_warns_once(monkeypatch, caplog, fast):
    a_cpu(monkeypatch, fast)
    pipe = PrismPipeline.from_pretrained(bundled("text"), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING, logger="prism_pipelines"):
        for _ in range(2):
            pipe(gen_length=4, num_inference_steps=1)
        pipe.to(torch.float32)(gen_length=4, num_inference_steps=1)
    told = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    assert len(told) == (0 if fast else 1)
    assert all("torch_dtype=torch.float32" in message for message in told)


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        (["--bf16", "true"], True),
        (["--objective=prism", "--base-model=x/y", "--dtype", "bfloat16"], True),
        (["--bf16", "false"], False),
    ],
)
def test_training_in_bfloat16_warns(monkeypatch, caplog, flags, slow):
    a_cpu(monkeypatch, False)
    words = ["--objective=mdm", "--dataset=sudoku", "--output-dir=z", "--use-cpu=true", *flags]
    with caplog.at_level(logging.WARNING, logger="prism_pipelines"):
        parse_arguments(words)
    assert ("Pass --bf16 false" in caplog.text) == slow
