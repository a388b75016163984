"""The training command: what it saves, that an interrupted run goes on exactly, and what it refuses."""

import json
import re
import shlex
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from transformers import TrainerCallback

from prism_pipelines import PrismPipeline, TokenCriticScheduler
from prism_pipelines.sudoku import count_solutions, is_valid_grid, to_ids
from prism_pipelines.training.checkpointing import WEIGHTS, is_whole, latest_checkpoint
from prism_pipelines.training.data import SudokuGrids
from prism_pipelines.training.optimizer import MuonAdamW
from prism_pipelines.training.run import check_plugins, main, parse_arguments, prepare, run_facts, train
from prism_pipelines.training.setup import RUN_CONFIG, read_origin_fingerprint

TINY = [
    "--dataset=sudoku",
    "--config-overrides=hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64",
    "--num-base-grids=8",
    "--num-train-examples=64",
    "--num-eval-examples=8",
    "--per-device-train-batch-size=8",
    "--learning-rate=1e-3",
    "--logging-steps=1",
    "--disable-tqdm=true",
    "--use-cpu",
]


def arguments(folder, *flags):
    based = any(flag.startswith("--base-model") for flag in flags)  # and brings its own sizes
    return [*(word for word in TINY if not (based and "overrides" in word)), f"--output-dir={folder}", *flags]


def run(folder, *flags):
    run, args = parse_arguments(arguments(folder, *flags))
    return train(*prepare(run, args), run)


class Stop(Exception):
    pass


def interrupt_after(monkeypatch, step):
    """Makes the next run die at the first log after `step`, as a crash would: no final save, no cleaning up."""
    from prism_pipelines.training.callbacks import MetricsLog

    original = MetricsLog.on_log

    def on_log(self, args, state, control, logs=None, **_):
        original(self, args, state, control, logs)
        if state.global_step > step:
            raise Stop

    monkeypatch.setattr(MetricsLog, "on_log", on_log)


def run_and_die(folder, monkeypatch, step, *flags):
    """A run that dies after `step`; the next one will not."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(Stop):
            run(folder, *flags)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A saved pipeline of a tiny MDM, and its folder."""
    folder = tmp_path_factory.mktemp("mdm")
    run(folder, "--objective=mdm", "--max-steps=4", "--optimizer=muon", "--save-steps=2", "--weighting=uniform")
    return folder


def weights(folder):
    parts = [folder / name for name in ("model", "quality_head")]
    return {part.name: load_file(path) for part in parts for path in part.glob("*.safetensors")}


def log_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def assert_identical(a, b):
    assert a.keys() == b.keys() and a
    for part in a:
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part}/{name}"


def test_a_finished_run_is_left_as_it_is_when_started_again(tmp_path):
    flags = ("--objective=mdm", "--max-steps=2", "--save-steps=2", "--resume-from-checkpoint=latest")
    run(tmp_path, *flags)
    before = weights(tmp_path)
    run(tmp_path, *flags)
    assert_identical(before, weights(tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_run_goes_on_only_from_what_it_began_with(tmp_path, pretrained):
    """Or the result of one base would count as the result of another."""
    run(tmp_path / "other", "--objective=mdm", "--max-steps=1", "--seed=9")
    flags = ("--max-steps=1", "--save-steps=1", "--resume-from-checkpoint=latest")
    head = (*flags, "--objective=prism", "--full=true")
    run(tmp_path / "run", *head, f"--base-model={pretrained}")
    run(tmp_path / "run", *head, f"--base-model={pretrained}")
    before = weights(tmp_path / "run")
    with pytest.raises(ValueError, match="began from other weights than `--base-model` has now"):
        run(tmp_path / "run", *head, f"--base-model={tmp_path / 'other'}")
    with pytest.raises(ValueError, match="holds a run of --objective prism, not mdm"):
        run(tmp_path / "run", *flags, "--objective=mdm", f"--base-model={pretrained}")
    assert_identical(before, weights(tmp_path / "run"))


def test_a_run_from_nothing_is_no_run_on_a_base_and_a_checkpoint_elsewhere_is_checked_too(tmp_path, pretrained):
    flags = ("--objective=mdm", "--max-steps=1", "--save-steps=1")
    run(tmp_path / "new", *flags)
    based = (*flags, f"--base-model={pretrained}")
    with pytest.raises(ValueError, match="began from other weights"):
        run(tmp_path / "new", *based, "--resume-from-checkpoint=latest")
    with pytest.raises(ValueError, match="began from other weights"):
        run(tmp_path / "else", *based, f"--resume-from-checkpoint={tmp_path / 'new' / 'checkpoint-1'}")
    (tmp_path / "new" / RUN_CONFIG).unlink()  # of a version that wrote none
    run(tmp_path / "new", *flags, "--resume-from-checkpoint=latest")
    assert read_origin_fingerprint(tmp_path / "new") == {"objective": "mdm", "base_weights": "new"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / RUN_CONFIG).write_text('{"lr": 1}')
    with pytest.raises(ValueError, match="is not the folder of a training run"):
        run(tmp_path / "theirs", *flags)


@pytest.mark.parametrize("flags", [("--optimizer=muon",), ("--optimizer=adamw", "--lr-scheduler-type=cosine")])
def test_an_interrupted_pretraining_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, flags):
    flags = ("--objective=mdm", "--max-steps=6", "--save-steps=2", "--resume-from-checkpoint=latest", *flags)
    run(tmp_path / "whole", *flags)
    run_and_die(tmp_path / "cut", monkeypatch, 4, *flags)
    assert latest_checkpoint(tmp_path / "cut").endswith("checkpoint-4")
    assert not weights(tmp_path / "cut" / "none")
    run(tmp_path / "cut", *flags)
    assert_identical(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_an_interrupted_prism_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, pretrained):
    flags = (
        "--objective=prism",
        "--full",
        f"--base-model={pretrained}",
        "--num-revealed=4",
        "--max-steps=4",
        "--save-steps=2",
    )
    flags += ("--head=mlp", "--optimizer=muon", "--resume-from-checkpoint=latest")
    run(tmp_path / "whole", *flags)
    run_and_die(tmp_path / "cut", monkeypatch, 2, *flags)
    run(tmp_path / "cut", *flags)
    assert_identical(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert set(weights(tmp_path / "whole")) == {"model", "quality_head"}


def test_a_run_that_is_killed_goes_on_from_its_last_whole_checkpoint(tmp_path):
    """SIGKILL, at whatever it is doing; then the same command again."""
    flags = arguments(tmp_path / "run", "--objective=mdm", "--save-steps=1", "--resume-from-checkpoint=latest")
    child = Forked(main, [*flags, "--save-total-limit=2", "--max-steps=100000"])
    try:
        deadline = time.monotonic() + 120
        while latest_checkpoint(tmp_path / "run") is None:
            assert child.process.is_alive() and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
    finally:
        child.kill()
    step = int(latest_checkpoint(tmp_path / "run").rsplit("-", 1)[1])
    flags = ("--objective=mdm", "--save-steps=1", "--resume-from-checkpoint=latest", f"--max-steps={step + 1}")
    run(tmp_path / "run", *flags)
    assert latest_checkpoint(tmp_path / "run").endswith(f"checkpoint-{step + 1}")
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    run(tmp_path, "--objective=mdm", "--max-steps=4", "--save-steps=2")
    newest = tmp_path / "checkpoint-4" / WEIGHTS
    assert is_whole(tmp_path / "checkpoint-4")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert not is_whole(tmp_path / "checkpoint-4")
    assert latest_checkpoint(tmp_path).endswith("checkpoint-2")
    assert "checkpoint-4 is damaged" in caplog.text
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert latest_checkpoint(tmp_path) is None


def test_checkpoints_of_other_flags_are_refused(tmp_path, pretrained):
    flags = ("--objective=prism", "--full", f"--base-model={pretrained}", "--save-steps=2")
    run(tmp_path, *flags, "--max-steps=2", "--head=linear")
    with pytest.raises(ValueError, match="other trainable tensors"):
        run(tmp_path, *flags, "--max-steps=4", "--head=block", "--resume-from-checkpoint=latest")


def test_what_training_saves_is_a_pipeline_that_fills_grids(tmp_path, pretrained):
    run(tmp_path, "--objective=prism", "--full", f"--base-model={pretrained}", "--max-steps=1")
    pipe = PrismPipeline.from_pretrained(str(tmp_path))
    out = pipe(infill="1" + "." * 80, num_inference_steps=8, generator=torch.Generator().manual_seed(0))
    assert out.texts[0][0] == "1" and set(out.texts[0]) <= set("123456789") and len(out.texts[0]) == 81
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert {"loss", "loss_prism", "loss_mdm", "quality_right"} <= set(log[0])


def test_flags_of_files_give_way_to_the_command_line_and_win_over_a_preset(tmp_path):
    (tmp_path / "mine.args").write_text("--rank 8  # small\n--num_revealed 3\n--preset llada\n")
    words = ["--args-file", str(tmp_path / "mine.args"), "--num-revealed=5", "--base-model=a/b", "--dataset=c"]
    run_args, _ = parse_arguments([*words, f"--output-dir={tmp_path}", "--use-cpu"])
    assert (run_args.rank, run_args.num_revealed, run_args.preset) == (8, 5, "llada")
    assert run_args.reveal_window == 512  # of the preset that the file names


def test_the_folder_of_another_trainer_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "model.safetensors").write_text("theirs")
    flags = ("--objective=mdm", "--max-steps=1", "--resume-from-checkpoint=latest", "--save-total-limit=1")
    with pytest.raises(ValueError, match="is not the folder of a training run"):
        run(tmp_path, *flags)
    assert (tmp_path / "checkpoint-9" / "model.safetensors").read_text() == "theirs"


def test_a_run_is_not_resumed_with_another_rank(tmp_path, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--lora-targets=query", "--save-steps=1")
    run(tmp_path, *flags, "--rank=2", "--max-steps=1")
    with pytest.raises(ValueError, match="other trainable tensors"):
        run(tmp_path, *flags, "--rank=1", "--max-steps=2", "--resume-from-checkpoint=latest")


def test_a_head_that_was_tuned_with_its_backbone_is_pushed_with_it_alone(tmp_path, pretrained):
    pipe = run(tmp_path, "--objective=prism", "--full", f"--base-model={pretrained}", "--max-steps=1")
    with pytest.raises(ValueError, match='what="pipeline"'):
        pipe.push_to_hub("me/head")


def test_an_adapter_is_no_base_and_another_pipeline_is_named(tmp_path, pretrained):
    run(tmp_path / "lora", "--objective=prism", f"--base-model={pretrained}", "--max-steps=1", "--rank=2")
    with pytest.raises(ValueError, match="is an adapter or a head with one"):
        run(tmp_path / "x", "--objective=prism", f"--base-model={tmp_path / 'lora'}", "--max-steps=1", "--full")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "LLaDA2Pipeline"}')
    with pytest.raises(ValueError, match="holds a saved LLaDA2Pipeline"):
        run(tmp_path / "y", "--objective=mdm", f"--base-model={tmp_path / 'other'}", "--max-steps=1")
    with pytest.raises(ValueError, match="holds a saved LLaDA2Pipeline"):
        PrismPipeline.from_pretrained(tmp_path / "other")


def test_a_head_alone_is_saved_without_its_backbone(tmp_path, pretrained):
    """Its base is named, and untouched by training."""
    pipe = run(
        tmp_path, "--objective=prism", f"--base-model={pretrained}", "--max-steps=2", "--freeze-backbone", "--head=mlp"
    )
    before = weights(pretrained)["model"]
    assert all(torch.equal(value, before[name]) for name, value in pipe.model.state_dict().items() if name in before)
    assert not (tmp_path / "model").exists() and not (tmp_path / "adapter_config.json").exists()
    again = PrismPipeline.from_pretrained(str(tmp_path))
    ids = torch.randint(1, 10, (2, 81))
    assert torch.equal(again.score(input_ids=ids)[0], pipe.score(input_ids=ids)[0])


def test_texts_are_written_at_each_evaluation_and_training_does_not_notice(tmp_path, pretrained):
    rows = [{"prompt": "12", "completion": "345" + "6789"[i % 4]} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--objective=prism", f"--base-model={pretrained}", "--freeze-backbone", "--max-length=12"]
    flags += [f"--dataset={tmp_path / 'data.jsonl'}", "--max-steps=2", "--eval-strategy=steps", "--eval-steps=1"]
    one = run(tmp_path / "one", *flags, "--sample-texts=2")
    other = run(tmp_path / "other", *flags)
    log = [json.loads(line) for line in (tmp_path / "one" / "training_log.jsonl").read_text().splitlines()]
    written = {entry["step"]: entry["texts"] for entry in log if "texts" in entry}
    assert list(written) == [1, 2]
    assert all(len(texts) == 2 for texts in written.values())
    assert all(re.fullmatch("[1-9]{6}", text) for texts in written.values() for text in texts), written
    pages = sorted((tmp_path / "one" / "samples").iterdir())
    assert [page.name for page in pages] == [f"step-{step}-{i}.html" for step in (1, 2) for i in (0, 1)]
    assert all(re.search('"prompt":"1 ?2"', page.read_text()) for page in pages)  # it stands apart
    for name, value in other.quality_head.state_dict().items():
        assert torch.equal(one.quality_head.state_dict()[name], value), name


def test_lora_is_saved_as_an_adapter_with_a_head(tmp_path, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--max-steps=3", "--rank=4", "--save-steps=2")
    pipe = run(tmp_path, *flags, "--lora-targets=query,value", "--num-revealed=4", "--eval-strategy=steps")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and set(config["target_modules"]) == {"query", "value"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32} and all("lora_" in name for name in saved)
    assert any(value.abs().sum() > 0 for name, value in saved.items() if "lora_B" in name)
    ids = torch.randint(1, 10, (2, 81))
    again = PrismPipeline.from_pretrained(str(tmp_path))
    # Not bit by bit: where the same numbers lie in memory decides how some CPUs add them up.
    torch.testing.assert_close(again.score(input_ids=ids)[0], pipe.score(input_ids=ids)[0], rtol=0, atol=1e-6)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 100_000


def test_an_interrupted_lora_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--rank=2", "--lora-dropout=0.1", "--max-steps=4")
    flags += ("--save-steps=2", "--eval-strategy=steps", "--eval-steps=2", "--resume-from-checkpoint=latest")
    run(tmp_path / "whole", *flags)
    run_and_die(tmp_path / "cut", monkeypatch, 2, *flags)
    run(tmp_path / "cut", *flags)
    for name in ("adapter_model.safetensors", "quality_head/diffusion_pytorch_model.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_evaluation_writes_the_measures_of_the_head_and_the_drift_of_the_posterior(tmp_path, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--max-steps=4", "--eval-strategy=steps")
    flags += ("--num-revealed=16",)
    run(tmp_path / "lora", *flags, "--eval-steps=2", "--rank=4", "--learning-rate=1e-2")
    run(tmp_path / "frozen", *flags, "--eval-steps=2", "--freeze-backbone")
    drift = {}
    for name in ("lora", "frozen"):
        log = [json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        entries = [entry for entry in log if "eval_auroc" in entry]
        assert [entry["step"] for entry in entries] == [0, 2, 4]
        assert all(0 <= entry["eval_auroc"] <= 1 and 0 <= entry["eval_ece"] <= 1 for entry in entries)
        drift[name] = [entry["eval_posterior_drift"] for entry in entries]
    assert drift["frozen"] == [0.0, 0.0, 0.0]
    assert drift["lora"][0] == 0 and drift["lora"][2] > drift["lora"][1] > 0


def test_a_critic_is_trained_and_saved_with_its_scheduler(tmp_path, pretrained):
    flags = ("--objective=critic", f"--base-model={pretrained}", "--max-steps=2", "--freeze-backbone", "--top-p=0.9")
    run(tmp_path, *flags)
    scheduler = PrismPipeline.from_pretrained(str(tmp_path)).scheduler
    assert isinstance(scheduler, TokenCriticScheduler) and scheduler.config.top_p == 0.9
    assert "Token-Critic quality head" in (tmp_path / "README.md").read_text()


def test_the_recommended_settings_draw_tokens_as_training_did(tmp_path, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--max-steps=1", "--freeze-backbone")
    run(tmp_path, *flags, "--reveal-order=confidence", "--draw-temperature=0", "--top-p=0.9")
    config = PrismPipeline.from_pretrained(str(tmp_path)).scheduler.config
    assert (config.order, config.temperature, config.top_p, config.num_remask) == ("confidence", 0, 0.9, 4)


def test_going_back_deletes_the_checkpoints_of_the_way_that_is_left(tmp_path, monkeypatch, capsys):
    """Or `latest` would take them after an interruption, and their rotation delete the new ones."""
    flags = ("--objective=mdm", "--max-steps=4", "--save-steps=1")
    run(tmp_path, *flags)
    back = f"--resume-from-checkpoint={tmp_path / 'checkpoint-1'}"
    run_and_die(tmp_path, monkeypatch, 2, *flags, back, "--save-total-limit=1")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert capsys.readouterr().out.count("the run is resumed from step 1") == 3


def test_damaged_checkpoints_do_not_outlive_the_new_ones(tmp_path):
    flags = ("--objective=mdm", "--save-steps=1", "--resume-from-checkpoint=latest")
    run(tmp_path, *flags, "--max-steps=3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    run(tmp_path, *flags, "--max-steps=3", "--save-total-limit=1")
    assert is_whole(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"distributed_type": "DEEPSPEED"}, "DEEPSPEED would take a step at each of the two backwards"),
        ({"distributed_type": "MEGATRON_LM"}, "MEGATRON_LM"),
        ({"fsdp_version": 1}, "FSDP 1 flattens the weights"),
        ({"fsdp_version": 2, "mixed_precision_policy": "bf16"}, "--dtype bfloat16"),
        ({"fsdp_version": 2, "rolls_out": True}, "distill`.*leave out accelerate's FSDP file"),
        ({"fsdp_version": 2}, None),
        ({"rolls_out": True}, None),
        ({"distributed_type": "MULTI_GPU"}, None),
    ],
)
def test_ways_to_split_a_model_that_would_train_wrongly_are_refused(state, words):
    fsdp = {"mixed_precision_policy": None, **state} if "fsdp_version" in state else None
    found = SimpleNamespace(distributed_type=state.get("distributed_type", "FSDP"))
    found.fsdp_plugin = fsdp and SimpleNamespace(**fsdp)
    rolls_out = state.get("rolls_out", False)
    if words is None:
        return check_plugins(found, rolls_out)
    with pytest.raises(ValueError, match=words):
        check_plugins(found, rolls_out)


def test_evaluations_have_the_same_noise_and_take_none_from_training(tmp_path):
    flags = ("--objective=mdm", "--max-steps=3", "--save-strategy=no")
    run(tmp_path / "none", *flags)
    run(tmp_path / "some", *flags, "--eval-strategy=steps", "--eval-steps=1")
    assert_identical(weights(tmp_path / "none"), weights(tmp_path / "some"))
    run(tmp_path / "still", *flags, "--eval-strategy=steps", "--eval-steps=1", "--learning-rate=0")
    losses = [entry["eval_loss"] for entry in log_of(tmp_path / "still") if "eval_loss" in entry]
    assert len(losses) == 3 and len(set(losses)) == 1


def test_trackers_get_the_measures_of_the_head(tmp_path, pretrained):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.extend((state.global_step, name) for name in logs)

    flags = ("--objective=prism", f"--base-model={pretrained}", "--max-steps=1", "--freeze-backbone")
    flags += ("--eval-strategy=steps", "--eval-steps=1", "--num-revealed=8", "--sample-puzzles=1")
    run_args, args = parse_arguments(arguments(tmp_path, *flags))
    trainer, pipe = prepare(run_args, args)
    trainer.callback_handler.callbacks.insert(0, Tracker())  # where the Trainer has its own
    train(trainer, pipe, run_args)
    assert {(0, "eval_auroc"), (1, "eval_auroc"), (1, "eval_posterior_drift")} <= set(seen)
    assert (1, "solved_pipeline_30_clues") in seen


def test_all_held_out_examples_are_measured_and_the_drift_rests_on_the_first_batches(tmp_path, pretrained, monkeypatch):
    monkeypatch.setattr("prism_pipelines.training.callbacks.DRIFT_BATCHES", 2)
    flags = ("--objective=prism", f"--base-model={pretrained}", "--max-steps=1", "--freeze-backbone")
    flags += ("--eval-strategy=steps", "--eval-steps=1", "--num-eval-examples=20", "--per-device-eval-batch-size=1")
    run_args, args = parse_arguments(arguments(tmp_path, *flags, "--mask-rate-min=0.5"))
    trainer, pipe = prepare(run_args, args)
    train(trainer, pipe, run_args)
    progress = trainer.callback_handler.callbacks[-1]
    assert progress.score["n"] == 20
    assert len(progress.now) <= 2 * 81


def test_resuming_with_other_held_out_batches_leaves_the_drift_out(tmp_path, pretrained, caplog):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--freeze-backbone", "--eval-strategy=steps")
    flags += ("--eval-steps=1", "--save-steps=1", "--resume-from-checkpoint=latest", "--num-revealed=8")
    run(tmp_path, *flags, "--max-steps=1")
    run(tmp_path, *flags, "--max-steps=2")
    run(tmp_path, *flags, "--max-steps=3", "--per-device-eval-batch-size=3")
    assert "held-out batches are others now" in caplog.text
    entries = {entry["step"]: entry for entry in log_of(tmp_path) if "eval_auroc" in entry}
    assert ["eval_posterior_drift" in entries[step] for step in range(4)] == [True, True, True, False]


def test_every_name_of_lora_targets_is_a_module(tmp_path, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--max-steps=1", "--rank=2")
    run(tmp_path / "run", *flags, "--lora-targets=query, value")
    names = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any(".query." in name for name in names) and any(".value." in name for name in names)
    with pytest.raises(ValueError, match=r"`--lora-targets` names 'v_proj', and .* query, .*value"):
        run(tmp_path / "other", *flags, "--lora-targets=query,v_proj")


def test_muon_takes_the_flags_of_adam_and_does_not_decay_norms_and_biases(tmp_path):
    flags = ("--objective=mdm", "--max-steps=1", "--optimizer=muon", "--weight-decay=0.1")
    trainer, _ = prepare(*parse_arguments(arguments(tmp_path, *flags, "--adam-beta2=0.5", "--adam-epsilon=1e-3")))
    assert isinstance(trainer.optimizer, MuonAdamW)
    groups = trainer.optimizer.parts["adamw"].param_groups
    assert all(group["betas"] == (0.9, 0.5) and group["eps"] == 1e-3 for group in groups)
    for group in trainer.optimizer.param_groups:
        assert {p.ndim for p in group["params"]} == ({1} if group["weight_decay"] == 0 else {2})
    count = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert count == sum(p.requires_grad for p in trainer.model.parameters())


def test_predictions_that_are_no_numbers_are_one_line_too(tmp_path, pretrained, capsys):
    """The loss is NaN no sooner than the tokens that PRISM draws."""
    flags = ("--objective=prism", f"--base-model={pretrained}", "--full", "--max-steps=6", "--logging-steps=500")
    flags += ("--optim=sgd", "--learning-rate=1e30", "--max-grad-norm=0")
    assert main(arguments(tmp_path, *flags)) == 1
    assert "contain NaN or inf" in capsys.readouterr().err


def test_a_base_in_a_folder_is_found_from_other_folders(tmp_path, pretrained, monkeypatch):
    monkeypatch.chdir(pretrained.parent)
    flags = ("--objective=prism", f"--base-model={pretrained.name}", "--max-steps=1", "--freeze-backbone")
    run(tmp_path / "run", *flags)
    monkeypatch.chdir(tmp_path)
    assert PrismPipeline.from_pretrained(str(tmp_path / "run")).quality_head is not None
    assert str(pretrained.parent) not in (tmp_path / "run" / "README.md").read_text()


def test_a_streamed_run_goes_on_exactly_after_the_first_pass(tmp_path, pretrained, monkeypatch):
    """A pass of the 19 examples ends within a step."""
    rows = [{"prompt": "12", "completion": f"34{i % 9 + 1}{i % 7 + 1}"} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--objective=mdm", f"--base-model={pretrained}", "--max-length=12", f"--dataset={tmp_path / 'data.jsonl'}"]
    flags += [
        "--streaming",
        "--num-eval-examples=1",
        "--max-steps=8",
        "--save-steps=2",
        "--resume-from-checkpoint=latest",
    ]
    run(tmp_path / "whole", *flags)
    run_and_die(tmp_path / "cut", monkeypatch, 4, *flags)
    run(tmp_path / "cut", *flags)
    assert_identical(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_preset_gives_flags_that_the_command_line_overrides():
    run_args, args = parse_arguments(
        ["--preset=llada", "--base-model=some/model", "--dataset=some/data", "--output-dir=x", "--rank=8", "--use-cpu"]
    )
    assert (run_args.objective, run_args.head, run_args.num_revealed, run_args.rank) == ("prism", "mlp", 8, 8)
    assert run_args.lora_alpha == 256 and args.output_dir == "x"


def test_an_output_folder_that_is_not_ours_or_holds_a_run_is_refused(tmp_path, pretrained):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not the folder of a training run"):
        run(tmp_path, "--objective=mdm", "--max-steps=1")
    with pytest.raises(ValueError, match="holds a run already"):
        run(pretrained, "--objective=mdm", "--max-steps=1")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="The loss is"):
        run(tmp_path, "--objective=mdm", "--max-steps=20", "--learning-rate=1e30", "--max-grad-norm=0")


@pytest.mark.parametrize("flags", [("--save-strategy=no",), ("--save-strategy=epoch", "--num-train-epochs=1")])
def test_weights_that_are_no_numbers_are_never_saved_also_where_no_loss_was_logged(tmp_path, pretrained, flags, capsys):
    broken = ("--learning-rate=1e39", "--logging-steps=500", "--max-steps=3", "--freeze-backbone")
    flags = ("--objective=prism", f"--base-model={pretrained}", *broken, *flags)
    assert main(arguments(tmp_path / "run", *flags)) == 1
    assert "contain NaN or inf" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors")) and not list((tmp_path / "run").glob("checkpoint*"))


def test_more_epochs_go_on_from_a_finished_run(tmp_path, pretrained):
    flags = ("--objective=prism", f"--base-model={pretrained}", "--freeze-backbone")
    resumed = "--resume-from-checkpoint=latest"
    for epochs in (1, 2, 2):
        run(tmp_path / "run", *flags, f"--num-train-epochs={epochs}", resumed)
        assert latest_checkpoint(tmp_path / "run").endswith(f"-{8 * epochs}")


def test_sudokus_are_refused_by_a_model_of_other_tokens(tmp_path, pretrained):
    folder = shutil.copytree(pretrained, tmp_path / "other")
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    file.write_text(json.dumps(content))
    flags = ("--objective=prism", f"--base-model={folder}", "--max-steps=1")
    with pytest.raises(ValueError, match="other tokens"):
        run(tmp_path / "run", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--freeze-backbone", "--draw-temperature=0", "--seed=7"),
        ("--full", "--lambda-mdm=0", "--num-eval-examples=0"),
        ("--rank=4", "--adam-beta2=0.95"),
        ("--preset=llada", "--draw-temperature=1"),
    ],
)
def test_the_command_on_the_card_is_the_run(tmp_path, pretrained, monkeypatch, flags):
    monkeypatch.chdir(pretrained.parent)
    flags = ("--objective=prism", f"--base-model={pretrained.name}", "--max-steps=2", *flags)
    first, args = parse_arguments(arguments(tmp_path, *flags))
    words = shlex.split(run_facts(first, args)["command"])[4:]
    assert "--shuffle-buffer" not in words and "--preset" not in words
    again, more = parse_arguments([*words, "--use-cpu", f"--output-dir={tmp_path}"])
    first.preset = None
    assert again == first  # its flags one by one: some may be overridden
    assert (more.seed, more.adam_beta2, more.max_steps) == (args.seed, args.adam_beta2, args.max_steps)


def test_a_card_names_the_folder_that_a_run_was_started_in(tmp_path, pretrained, monkeypatch):
    monkeypatch.chdir(pretrained)
    facts = run_facts(*parse_arguments(arguments(tmp_path, "--objective=prism", "--base-model=.")))
    assert f"--base-model {pretrained.name} " in facts["command"] + " "


def test_the_loss_falls(tmp_path):
    flags = ("--max-steps=60", "--learning-rate=3e-3", "--weighting=uniform", "--num-base-grids=1")
    run(tmp_path, "--objective=mdm", *flags)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01


def test_an_example_depends_on_seed_and_index_alone():
    a, b, other = SudokuGrids(100, 0, 4), SudokuGrids(50, 0, 4), SudokuGrids(100, 1, 4)
    grids = torch.stack([a[i]["input_ids"] for i in range(20)])
    assert is_valid_grid(grids.numpy()).all()
    assert torch.equal(grids[7], b[7]["input_ids"]) and torch.equal(grids[7], a[7]["input_ids"])
    assert not torch.equal(grids[7], other[7]["input_ids"])
    assert len({tuple(grid) for grid in grids.tolist()}) == 20
    assert np.array_equal(to_ids(grids.numpy()), grids.numpy())


def test_a_batch_asked_for_at_once_holds_the_examples_that_come_one_by_one():
    examples = SudokuGrids(100, 3, 8, puzzle_share=0.5, puzzle_clues=(30, 40))
    batch = examples.__getitems__([70, 2, 33, 2])
    for index, example in zip([70, 2, 33, 2], batch, strict=True):
        assert all(torch.equal(example[name], examples[index][name]) for name in ("input_ids", "trainable_mask"))
    assert examples.__getitems__([]) == []
    for wrong in (-1, 100):
        with pytest.raises(IndexError, match=f"Example {wrong} of 100"):
            examples[wrong]


def test_the_clues_of_puzzle_examples_are_a_unique_prompt_and_never_masked():
    examples = SudokuGrids(40, 0, 8, puzzle_share=0.5, puzzle_clues=(30, 40))
    puzzles = 0
    for i in range(40):
        grid, trainable = (examples[i][name].numpy() for name in ("input_ids", "trainable_mask"))
        assert is_valid_grid(grid)
        if not trainable.all():
            puzzles += 1
            assert count_solutions(np.where(trainable, 0, grid)) == 1
            assert 30 <= (~trainable).sum() <= 40
    assert 10 <= puzzles <= 30


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective=critics"], "`--objective` must be one of mdm, prism, critic, distill, got 'critics'"),
        (["--objective=mdm", "--dataset=no/such.txt"], "pass `--base-model`"),
        (["--objective=prism"], "pass --base-model"),
        (["--objective=mdm", "--optimizer=sgd"], "`--optimizer` must be one of adamw, muon"),
        (["--objective=mdm", "--mask-rate-min=0.9", "--mask-rate-max=0.1"], "mask_rate_min=0.9"),
        (["--objective=mdm", "--no-such-flag=1"], "no-such-flag"),
        (["--objective=mdm", "--puzzle-clues-min=30", "--puzzle-clues-max=25"], "min <= max <= 80, got 30 and 25"),
        (["--objective=mdm", "--freeze-backbone"], "--freeze-backbone goes with --objective prism"),
        (["--objective=prism", "--base-model=x/y", "--full", "--rank=4"], "Pass one of --freeze-backbone, --full"),
        (["--objective=prism", "--base-model=x/y", "--rank=0"], "`--rank` must be at least 1"),
        (["--objective=prism", "--base-model=x/y", "--full", "--load-in-4bit"], "cannot be trained"),
        (["--objective=mdm", "--preset=imagenet"], "`--preset` must be one of sudoku, owt, llada"),
        (["--objective=mdm", "--num-base-grids=0"], "`--num-base-grids` must be at least 1, got 0"),
        (["--objective=mdm", "--num-eval-examples=-1"], "`--num-eval-examples` must be at least 0, got -1"),
        (["--objective=mdm", "--puzzle-share=2"], "`--puzzle-share` must be in [0, 1], got 2.0"),
        (
            ["--objective=mdm", "--lora-dropout=0.1"],
            "--lora-dropout only applies to an adapter, which needs a pretrained model",
        ),
        (["--objective=mdm", "--save-only-model"], "`--save-only-model` is not supported"),
        (["--objective=mdm", "--load-best-model-at-end", "--eval-strategy=steps"], "is not supported"),
        (["--objective=mdm", "--dataset=a.txt", "--streaming", "--dataloader-num-workers=2"], "is at most 1"),
        (
            ["--objective=mdm", "--num-revealed=4"],
            "`--num-revealed` goes with --objective prism and --states one_step or mixed; mdm has no use",
        ),
        (["--objective=mdm", "--head=mlp"], "`--head` goes with --objective prism, critic or distill; mdm has no use"),
        (["--objective=critic", "--base-model=x/y", "--reveal-order=confidence"], "critic has no use for it"),
        (["--objective=mdm", "--args-file=no/such.args"], "`--args-file` 'no/such.args' is not a file"),
        (["--objective=mdm", "--lr-scheduler-type=warmup_stable_decay"], "needs its length"),
        (["--objective=mdm", "--sample-puzzles=3"], "pass --eval-strategy"),
        (["--objective=prism", "--base-model=x/y", "--tokenizer=a/b"], "`--tokenizer` only applies to a new model"),
        (["--objective=mdm", "--push-to-hub"], "needs `--hub-model-id"),
        (
            ["--objective=prism", "--base-model=./mine", "--push-to-hub", "--hub-model-id=a/b"],
            "`--base-model` './mine' is not an id on the Hub",
        ),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(tmp_path, capsys, flags, words):
    assert main(arguments(tmp_path, *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0]
