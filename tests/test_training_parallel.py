"""A step is the same however its batch is split: over accumulation steps, over processes, over shards of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from content_noise import Rates
from forked import launched
from safetensors.torch import load_file, save_file
from sharded_step import build, sharded_step
from test_training import arguments, run

from prism_pipelines.training.loss_terms import share_of_all
from prism_pipelines.training.run import main
from prism_pipelines.training.trainer import trainable

TESTS = Path(__file__).parent
STEP = ("--max-steps=3", "--optim=sgd", "--learning-rate=0.5", "--weighting=uniform", "--num-revealed=6")
STEP += ("--draw-temperature=0", "--reveal-order=confidence", "--lambda-mdm=2", "--save-steps=2", "--head=mlp")
WAYS = {"full": ("--full",), "lora": ("--rank=2", "--lora-targets=query,value"), "frozen": ("--freeze-backbone",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A new tiny MDM, whose weights are large enough that no gradient is lost in rounding."""
    folder = tmp_path_factory.mktemp("mdm")
    sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
    sizes += ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"  # its noise would be another in each process
    pipe = run(folder, "--objective=mdm", "--max-steps=1", f"--config-overrides={sizes}")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    pipe.save_pretrained(folder)
    return folder


def flags(base, way, batch, accumulate):
    return (
        "--objective=prism",
        f"--base-model={base}",
        *WAYS[way],
        *STEP,
        f"--per-device-train-batch-size={batch}",
        f"--gradient-accumulation-steps={accumulate}",
    )


def train_on_content(words):
    """The training command with noise by content."""
    with Rates():
        return main(words)


def assert_all_end_well(children):
    for child in children:
        status, printed = child.wait(240)
        assert status == 0, printed[-3000:]


def outcome(folder):
    """(losses and gradient norms of the log, weights at the end)"""
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    losses = [[entry["loss"], entry["grad_norm"]] for entry in log if "loss" in entry]
    assert len(losses) == 3
    return torch.tensor(losses), load_file(folder / "checkpoint-3" / "trainable.safetensors")


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.allclose(value, other[1][name], rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path, base, way):
    with Rates():
        run(tmp_path / "whole", *flags(base, way, 8, 1))
        run(tmp_path / "parts", *flags(base, way, 2, 4))
        run(tmp_path / "other", *flags(base, way, 4, 1))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "other"))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_step_of_one(tmp_path, base, way):
    with Rates():
        run(tmp_path / "one", *flags(base, way, 8, 1))
    words = [*arguments(tmp_path / "two", *flags(base, way, 2, 2)), "--ddp-backend=gloo"]
    assert_all_end_well(launched(train_on_content, words))
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))


def divide_by_the_mean_count():
    torch.distributed.init_process_group("gloo")
    count = torch.tensor((3, 5)[torch.distributed.get_rank()])
    assert share_of_all(count) == 4 and share_of_all(count, torch.tensor(2.0)) == 2
    with torch.no_grad():
        assert share_of_all(count) == count  # an evaluation averages nothing


def test_processes_divide_by_the_mean_of_their_counts():
    """Then the mean of their gradients is that of all tokens, also for a loop without our trainer."""
    assert_all_end_well(launched(divide_by_the_mean_count))


@pytest.mark.slow
def test_torchrun_starts_what_gives_the_step_of_one(tmp_path, base):
    with Rates():
        run(tmp_path / "one", *flags(base, "lora", 8, 1))
    words = [*arguments(tmp_path / "two", *flags(base, "lora", 2, 2)), "--ddp-backend=gloo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(TESTS / "content_noise.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_objective_gives_the_gradients_of_a_whole_one(tmp_path, way):
    """FSDP2 by torch itself: accelerate shards on GPUs only. See tests/sharded_step.py."""
    save_file(trainable(build(way)), tmp_path / "trainable.safetensors")
    assert_all_end_well(launched(sharded_step, way, str(tmp_path)))


def test_the_accelerate_file_names_what_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(TESTS.parent / "examples" / "accelerate" / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
