"""SIGKILL in the middle of a save, at every stage of it; full disks; and what a resumed run writes."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from test_training import arguments, run

from prism_pipelines.training import callbacks as training_callbacks
from prism_pipelines.training import checkpointing, trainer
from prism_pipelines.training.checkpointing import is_whole, latest_checkpoint
from prism_pipelines.training.run import main

FLAGS = ("--objective=mdm", "--max-steps=4", "--save-steps=1", "--logging-steps=3", "--save-total-limit=2")
FLAGS += ("--eval-strategy=steps", "--eval-steps=2", "--resume-from-checkpoint=latest")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def after(count, function, then=die):
    """`function`, and the death of the process once it has been called `count` times; count 0: before the first."""
    calls = []

    def wrapped(*args, **kwargs):
        if len(calls) == count:
            then()
        calls.append(1)
        return function(*args, **kwargs)

    return wrapped


def torn(tensors, path):
    """A save that is cut off half-way."""
    trainer.real_save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


# Each arranges the death of the process during the save at step 3, in the order in which a save goes.
MOMENTS = {
    "before the weights": lambda: setattr(trainer, "save_file", after(2, trainer.save_file)),
    "half-way through the weights": lambda: setattr(
        trainer, "save_file", after(1, trainer.save_file, lambda: setattr(trainer, "save_file", torn))
    ),
    "before the optimizer": lambda: setattr(torch, "save", after_step(3, torch.save)),
    "before the manifest": lambda: setattr(trainer, "seal_checkpoint", after(2, trainer.seal_checkpoint)),
    "before the rename": lambda: setattr(checkpointing.os, "rename", after(2, os.rename)),
    "after the rename": lambda: setattr(trainer, "rotate_checkpoints", after(2, trainer.rotate_checkpoints)),
    "while logging": lambda: setattr(training_callbacks, "write_log", half_a_line),
}


def after_step(step, function):
    def wrapped(value, path, *args, **kwargs):
        if f"checkpoint-{step}" in str(path):
            die()
        return function(value, path, *args, **kwargs)

    return wrapped


def half_a_line(output_dir, entry):
    with (Path(output_dir) / "training_log.jsonl").open("a") as file:
        line = json.dumps(entry)
        if entry["step"] == 3:
            file.write(line[: len(line) // 2])
            file.flush()
            die()
        file.write(line + "\n")


def die_while_saving(folder, moment):
    trainer.real_save_file = trainer.save_file
    MOMENTS[moment]()
    run(folder, *FLAGS)


def log(folder):
    """The log without what the clock says."""
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    clocks = ("runtime", "per_second", "train_loss")  # train_loss is the mean over the steps of the last process
    return [{k: v for k, v in entry.items() if not any(word in k for word in clocks)} for entry in entries]


def final(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *FLAGS)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_in_a_save_ends_as_one_that_was_not(tmp_path, whole, moment):
    """Same weights bit for bit, same curve, wherever the save was when the process died."""
    status, printed = Forked(die_while_saving, tmp_path, moment).wait()
    assert status == -signal.SIGKILL, printed
    assert latest_checkpoint(tmp_path).endswith("checkpoint-3" if moment == "after the rename" else "checkpoint-2")
    run(tmp_path, *FLAGS)
    one, other = final(whole), final(tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert log(tmp_path) == log(whole)
    assert not (tmp_path / "partial").exists()


def test_a_full_disk_while_saving_is_an_error_that_keeps_the_checkpoint_before(tmp_path, capfd):
    """A limit on the size of files is a disk that is full for anything larger."""
    run(tmp_path, "--objective=mdm", "--max-steps=1", "--save-steps=1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 150_000):  # the weights do not fit; the weights fit and the optimizer does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            flags = ("--objective=mdm", "--max-steps=3", "--save-steps=1", "--resume-from-checkpoint=latest")
            assert main(arguments(tmp_path, *flags)) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capfd.readouterr().err
        assert "checkpoint-2 could not be written" in error and "checkpoint-1, is whole" in error
        assert is_whole(tmp_path / "checkpoint-1") and not (tmp_path / "checkpoint-2").exists()
        assert not (tmp_path / "partial").exists()
    assert main(arguments(tmp_path, *flags)) == 0


def test_a_damaged_checkpoint_named_by_hand_is_refused(tmp_path):
    run(tmp_path, "--objective=mdm", "--max-steps=2", "--save-steps=1")
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        run(tmp_path, "--objective=mdm", "--max-steps=2", f"--resume-from-checkpoint={tmp_path / 'checkpoint-1'}")


def test_going_back_to_an_earlier_checkpoint_replaces_the_later_ones(tmp_path, whole):
    flags = ("--objective=mdm", "--max-steps=4", "--save-steps=1", "--logging-steps=3", "--eval-strategy=steps")
    run(tmp_path, *flags, "--eval-steps=2")
    again = f"--resume-from-checkpoint={tmp_path / 'checkpoint-2'}"
    run(tmp_path, *flags, "--eval-steps=2", again)
    assert log(tmp_path) == log(whole)
    assert all(is_whole(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4))
