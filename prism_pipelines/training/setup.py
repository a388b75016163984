"""The parts of a training run from its flags: base model, adapter, objective, pipeline, examples."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainingArguments,
)

from .. import PrismPipeline, sudoku  # by its public name, which registers our classes with diffusers
from ..hub import backbones
from ..hub.files import fetch_file, inside, is_hub_id, read_json
from ..hub.fingerprints import module_digest
from ..models import checks
from ..models.denoiser import MaskedDenoiser
from ..models.families import MDMSpec, resolve_spec, supports_all_masked_input
from ..models.protocols import Tokenizer
from ..models.quality_head import QualityHead
from ..sampling.encoding import Frame, prompt_ids, text_frame
from ..sampling.rows import RowEncoder, examples_line, pad_batch
from ..sampling.stopping import default_suppress_tokens, end_tokens
from ..schedulers import MDLMScheduler, PrismScheduler, TokenCriticScheduler
from ..schedulers.context import INPUTS
from .arguments import RunArguments
from .checkpointing import MANIFEST
from .data import HELD_OUT_SEED, BlankCanvases, SudokuGrids, read_rows, split_examples
from .head_start import begin_from, begin_neutral
from .losses import CriticObjective, MDMObjective, PRISMObjective
from .rollout_losses import RolloutObjective
from .rollouts import RolloutSettings

logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # default of --max-length, if the model takes that many tokens
CHUNK_NUMBERS = 2**27  # logits kept at once: 0.5 GB in float32, and about three times that in the backward pass
RUN_CONFIG = "training_run.json"  # in the folder of a run: what it began from
# Default of --context. If the answer is determined, the probability given the prompt is the best input; in free text,
# the model's probability of the token since it was drawn.
CONTEXTS = {
    "truth": ("given", "prompt", "first_hidden", "draw", "age", "remasks", "fill"),
    "posterior": ("given", "token", "draw", "draw_odds", "age", "remasks", "fill", "own", "own_odds"),
}
DISTILLED_BAR = 0.02  # quality below which a head from --objective distill remasks, see docs/judging.md
ADAPTER = "prism"  # name of the LoRA adapter, also where a pipeline loads one


def load_base(run: RunArguments) -> tuple[PreTrainedModel, Tokenizer, MDMSpec]:
    """(model, tokenizer, spec) to start from: those of `--base-model`, or a new model of `--model-type`.

    Raises:
        OSError, ValueError: as `backbones.load_plain`; or a new model without a tokenizer.
    """
    if run.base_model is None:
        return new_model(run)
    hub_kwargs = {"revision": run.revision, "cache_dir": None, "token": None, "local_files_only": False}
    index = read_json(run.base_model, "model_index.json", hub_kwargs)
    subfolder = "" if index is None else "model"
    if read_json(run.base_model, inside(subfolder, "adapter_config.json"), hub_kwargs) is not None:
        raise ValueError(
            f"`--base-model` {run.base_model!r} is an adapter or a head with one. Train on the model that it is for, "
            "or merge it into that first."
        )
    loaded = backbones.load_plain(
        run.base_model,
        subfolder,
        getattr(torch, run.dtype),
        run.trust_remote_code,
        hub_kwargs,
        mdm_spec=None if index is None else backbones.spec_of_index(index, run.base_model),
        mask_token_id=run.mask_token_id,
        quantization_config=quantization(run),
    )
    tokenizer = loaded["tokenizer"]
    if index is not None and tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(run.base_model, subfolder="tokenizer", revision=run.revision)
    if tokenizer is None:
        raise ValueError(f"`--base-model` {run.base_model!r} has no tokenizer.")
    return loaded["model"], tokenizer, resolve_spec(loaded["model"].config, tokenizer, mdm_spec=loaded["mdm_spec"])


def resolve_revision(run: RunArguments) -> str | None:
    """The commit of `--base-model`, for the head's config; `--revision` if the commit is not known."""
    if run.base_model is None or not is_hub_id(run.base_model):
        return run.revision
    hub_kwargs = {"revision": run.revision}
    file = fetch_file(run.base_model, "model_index.json", hub_kwargs) or fetch_file(
        run.base_model, "config.json", hub_kwargs
    )
    parts = Path(file or "").parts  # .../snapshots/<commit>/config.json
    return parts[-2] if "snapshots" in parts[-3:-2] else run.revision


def quantization(run: RunArguments) -> Any:
    """The bitsandbytes config of `--load-in-4bit` or `--load-in-8bit`, or None.

    Raises:
        ValueError: both flags are given, or bitsandbytes is not installed.
    """
    if not (run.load_in_4bit or run.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if run.load_in_4bit and run.load_in_8bit:
        raise ValueError("Pass one of `--load-in-4bit` and `--load-in-8bit`.")
    if not is_bitsandbytes_available():
        raise ValueError("`--load-in-4bit` and `--load-in-8bit` need a GPU and: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=run.load_in_4bit,
        load_in_8bit=run.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def new_model(run: RunArguments) -> tuple[PreTrainedModel, Tokenizer, MDMSpec]:
    """(model, tokenizer, spec) of a new model with random weights, as long as the data needs."""
    tokenizer: Any
    if run.dataset == "sudoku":
        tokenizer, length = sudoku.sudoku_tokenizer(), sudoku.CELLS
    elif run.tokenizer is None:
        raise ValueError("A new model needs `--tokenizer` (folder or Hub id), or pass `--base-model`.")
    else:
        tokenizer, length = AutoTokenizer.from_pretrained(run.tokenizer), run.max_length or MAX_LENGTH
    if tokenizer.mask_token_id is None:
        raise ValueError(f"The tokenizer of `--tokenizer` {run.tokenizer!r} has no mask token.")
    pad = tokenizer.pad_token_id or 0
    config = AutoConfig.for_model(
        run.model_type,
        vocab_size=len(tokenizer),
        pad_token_id=pad,
        max_position_embeddings=length + 1 + pad,
        type_vocab_size=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,  # some families have a default that is outside this vocabulary
    )
    if run.config_overrides:
        config.update_from_string(run.config_overrides)
    return AutoModelForMaskedLM.from_config(config), tokenizer, resolve_spec(config, tokenizer)


def add_lora(run: RunArguments, model: PreTrainedModel, spec: MDMSpec) -> None:
    """Puts a float32 LoRA adapter into the model and freezes everything else.

    Raises:
        ValueError: no targets are known, or the model has no module of such a name.
    """
    from peft import LoraConfig

    targets = [name.strip() for name in run.lora_targets.split(",")] if run.lora_targets else list(spec.lora_targets)
    if not targets:
        raise ValueError("No LoRA targets are known for this model: pass `--lora-targets` (module names, commas).")
    matrices = [name for name, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    for target in targets if run.lora_targets else ():  # PEFT accepts a list if one of its names is found
        if not any(f".{name}".endswith(f".{target}") for name in matrices):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise ValueError(f"`--lora-targets` names {target!r}, and the model's modules with a matrix are {names}.")
    size: dict[str, Any] = {"r": run.rank, "lora_alpha": run.lora_alpha}  # `check_run` has filled them in
    model.add_adapter(
        LoraConfig(**size, lora_dropout=run.lora_dropout, target_modules=targets),
        adapter_name=ADAPTER,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def run_suppress_tokens(tokenizer: Tokenizer, model: PreTrainedModel, spec: MDMSpec) -> tuple[int, ...]:
    """Ids that are never predicted in training. Sampling suppresses more, such as <unk>, which texts may hold."""
    return default_suppress_tokens(tokenizer, end_tokens(None, tokenizer, model, spec))


def rolls_out(run: RunArguments) -> bool:
    """Is the head trained on rollouts, the states of the model's own runs?"""
    return run.objective == "distill" or run.states != "one_step"


def label_of(run: RunArguments) -> str:
    """The label of a head on rollouts: "truth" or "posterior", see `RolloutObjective`."""
    return "posterior" if run.objective == "distill" else "truth"


def context_of(run: RunArguments) -> tuple[str, ...]:
    """The inputs of `--context`.

    Raises:
        ValueError: one is not known.
    """
    if not rolls_out(run) or run.context == "none":
        return ()
    if run.context is None:
        return CONTEXTS[label_of(run)]
    names = tuple(name.strip() for name in run.context.split(","))
    if unknown := sorted(set(names) - set(INPUTS)):
        raise ValueError(f"`--context` may hold {', '.join(INPUTS)}, or be none; got {', '.join(unknown)}.")
    return names


def build_objective(run: RunArguments, model: PreTrainedModel, tokenizer: Tokenizer, spec: MDMSpec) -> MDMObjective:
    """The module that is trained: backbone, head and loss in one."""
    suppress_tokens = run_suppress_tokens(tokenizer, model, spec)
    denoiser = MaskedDenoiser(model, spec, num_tokens=len(tokenizer), suppress_tokens=suppress_tokens)
    shared: dict[str, Any] = {
        "chunk_size": max(64, min(4096, CHUNK_NUMBERS // denoiser.vocab_size)),
        "weighting": run.weighting,
        "mask_rate_min": run.mask_rate_min,
        "mask_rate_max": run.mask_rate_max,
    }
    if run.objective == "mdm":
        if run.adapter:
            add_lora(run, model, spec)
        return MDMObjective(denoiser, **shared)
    head = QualityHead(
        model.config.hidden_size,
        run.head,
        base_model=None if run.full else run.base_model,  # a tuned backbone is another model
        base_revision=None if run.full else run.revision,
        mdm_spec=spec.to_dict(),
        context=context_of(run),
    )
    begin_neutral(head)
    if run.head_from:
        begin_from(head, run.head_from)
    if run.adapter:
        add_lora(run, model, spec)
    shared |= {
        "draws_per_state": run.draws_per_state,
        "lambda_mdm": run.lambda_mdm,
        "temperature": run.draw_temperature,
        "top_p": run.top_p,
        "freeze_backbone": run.freeze_backbone,
    }
    if run.objective == "critic":
        return CriticObjective(denoiser, head, **shared)
    if rolls_out(run):
        if run.objective == "distill":
            shared.pop("draws_per_state"), shared.pop("temperature"), shared.pop("top_p")
        return RolloutObjective(denoiser, head, **rollout_flags(run), **shared)
    return PRISMObjective(
        denoiser,
        head,
        num_revealed=run.num_revealed,
        reveal_order=run.reveal_order,
        reveal_window=run.reveal_window,
        **shared,
    )


def rollout_flags(run: RunArguments) -> dict:
    """Arguments of `RolloutObjective` from the flags."""
    orders = (("random", run.rollout_temperature),) * 3 + (("confidence", 0.0),)
    settings = RolloutSettings(
        steps_min=run.rollout_steps_min,
        steps_max=run.rollout_steps_max,
        orders=orders,
        repairs=run.rollout_repairs,
        block_length=run.block_length,
        mask_rate_min=run.mask_rate_min,
        mask_rate_max=run.mask_rate_max,
    )
    flags: dict[str, Any] = {
        "settings": settings,
        "num_runs": run.rollout_runs,
        "num_pools": run.num_pools,
        "label": label_of(run),
    }
    flags |= {"states": "rollout" if run.objective == "distill" else run.states, "stride": run.label_stride}
    flags |= {"distill_loss": run.distill_loss, "label_floor": run.label_floor, "forget_share": run.forget_share}
    if flags["states"] == "mixed":
        flags |= {name: getattr(run, name) for name in ("num_revealed", "reveal_order", "reveal_window")}
    return flags


def build_pipeline(objective: MDMObjective, tokenizer: Tokenizer, run: RunArguments) -> PrismPipeline:
    """The pipeline of the modules that are trained: with a quality head it remasks, without one it does not.

    Temperature and top_p are those of the training draws, so that the head judges tokens like those it learned from.
    """
    head = getattr(objective, "quality_head", None)
    drawn = {"temperature": run.draw_temperature, "top_p": run.top_p}
    if head is None:
        scheduler = MDLMScheduler()
    elif isinstance(objective, CriticObjective):
        scheduler = TokenCriticScheduler(**drawn)
    elif run.objective == "distill":
        # Its low qualities are reliable: tokens below a threshold are remasked, at most a quarter of all in a step.
        scheduler = PrismScheduler(quality_threshold=DISTILLED_BAR, temperature=run.rollout_temperature)
    else:
        # The settings of method.md: a few cells of a Sudoku, the paper's share of a text.
        share = {"num_remask": 4} if run.dataset == "sudoku" else {"eta": 0.05}
        scheduler = PrismScheduler(order=run.reveal_order, **share, **drawn)
    spec = objective.denoiser.spec.to_dict()
    return PrismPipeline(objective.denoiser.model, tokenizer, quality_head=head, scheduler=scheduler, mdm_spec=spec)


def load_examples(
    run: RunArguments,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    spec: MDMSpec,
) -> tuple[Any, Any, Callable | None]:
    """(training examples, held-out examples, collator or None).

    Raises:
        ValueError: an argument or a row that cannot be used.
    """
    if run.dataset == "sudoku":
        if tokenizer.get_vocab() != sudoku.sudoku_tokenizer().get_vocab():
            raise ValueError(f"`--dataset sudoku` is for models of Sudokus, and {run.base_model!r} has other tokens.")
        clues = (run.puzzle_clues_min, run.puzzle_clues_max)
        grids = SudokuGrids(run.num_train_examples, args.seed, run.num_base_grids, run.puzzle_share, clues)
        count = run.num_eval_examples
        return grids, SudokuGrids(count, HELD_OUT_SEED, count, run.puzzle_share, clues), None
    length = run.max_length = checked_max_length(run, args, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collate = functools.partial(pad_batch, pad_token_id=pad)
    if run.dataset is None:
        return *blank_examples(run, args, tokenizer, spec, length), collate
    if run.streaming and args.max_steps <= 0:
        raise ValueError("`--streaming` data has no known length: pass `--max-steps`.")
    suppress_tokens = run_suppress_tokens(tokenizer, model, spec)
    encoder = RowEncoder(
        tokenizer,
        spec.mask_token_id,
        length,
        model.config.vocab_size,
        run.too_long,
        suppress_tokens,
        supports_all_masked_input=supports_all_masked_input(model.config),
        frame=text_frame(tokenizer, spec),
        packing=run.packing,
        use_chat_template=not run.no_chat_template,
        template_kwargs=template_kwargs(run.chat_template_kwargs),
        train_on=run.train_on,
        open_ended=run.objective == "distill",
    )
    rows = read_rows(
        run.dataset,
        split=run.dataset_split,
        name=run.dataset_name,
        revision=run.dataset_revision,
        streaming=run.streaming,
    )
    if run.streaming and run.shuffle_buffer:
        rows = rows.shuffle(seed=args.seed, buffer_size=run.shuffle_buffer)
    eval_rows = None
    if run.eval_dataset is not None:
        # Another configuration or commit would be another data set.
        same = run.eval_dataset == run.dataset
        eval_rows = read_rows(
            run.eval_dataset,
            split=run.eval_split,
            name=run.dataset_name if same else None,
            revision=run.dataset_revision if same else None,
            flag="--eval-dataset",
        )
    train, held_out = split_examples(rows, encoder, run.num_eval_examples, run.streaming, eval_rows)
    if args.process_index == 0:
        logger.warning("Training on %s.", examples_line(rows, encoder, train))
    return train, held_out, collate


def checked_max_length(run: RunArguments, args: TrainingArguments, model: PreTrainedModel) -> int:
    """`--max-length`, or its default.

    Raises:
        ValueError: it is more than the model takes.
    """
    limit = checks.max_length(model.config)
    if run.max_length is None:
        length = min(MAX_LENGTH, limit or MAX_LENGTH)
        if args.process_index == 0:
            why = f"the smaller of {MAX_LENGTH} and {limit}, what the model takes" if limit else "the default"
            logger.warning("--max-length is %d tokens, %s.", length, why)
        return length
    if limit is not None and run.max_length > limit:
        raise ValueError(f"`--max-length` is {run.max_length}, and the model takes {limit} tokens at most.")
    return run.max_length


def template_kwargs(words: str | None) -> dict | None:
    """The JSON object in `--chat-template-kwargs` as a dict; None without the flag.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        found = None if words is None else json.loads(words)
    except ValueError as error:
        raise ValueError(f"`--chat-template-kwargs` {words!r} is not JSON: {error}.") from None
    if found is not None and not isinstance(found, dict):
        raise ValueError(
            f'`--chat-template-kwargs` must be an object such as {{"enable_thinking": false}}, got {words}.'
        )
    return found


def blank_examples(
    run: RunArguments, args: TrainingArguments, tokenizer: Tokenizer, spec: MDMSpec, length: int
) -> tuple[BlankCanvases, BlankCanvases]:
    """Training and held-out examples for training without data: rows of masks of at most `length` tokens.

    An encoder was trained on one sequence per row, of any length, so its rows differ in length.
    """
    frame, shortest = text_frame(tokenizer, spec), length
    if frame.closing:
        shortest = max(len(frame.opening) + len(frame.closing) + 1, length // 4)
    else:
        frame = Frame(tuple(prompt_ids([""], tokenizer)[0]))
    train, held_out = (
        BlankCanvases(count, (shortest, length), seed, spec.mask_token_id, *frame)
        for count, seed in ((run.num_train_examples, args.seed), (run.num_eval_examples, HELD_OUT_SEED))
    )
    return train, held_out


def check_output_dir(folder: str | Path, resume: str | None) -> None:
    """Checks that a run may write into a folder: it is new or empty, or holds a run of ours that is to be resumed.

    Raises:
        ValueError: it holds something else, or a run that is not to be resumed.
    """
    path, folder = Path(folder), str(folder)
    if path.is_file():
        raise ValueError(f"`--output-dir` {folder!r} is a file.")
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    # Files of a run that was killed at its start, and the folder of trackers.
    entries = {name for name in entries if not name.endswith(".partial")} - {"runs"}
    entries -= {RUN_CONFIG} if read_origin_fingerprint(path) else set()
    if not entries:
        return
    ours = any(path.glob(f"checkpoint-*/{MANIFEST}"))  # checkpoints of another trainer would be deleted as old ones
    if "training_log.jsonl" not in entries and not ours:
        raise ValueError(
            f"`--output-dir` {folder!r} holds {sorted(entries)[:3]} and is not the folder of a training run. Name "
            "a new one."
        )
    if not resume:
        raise ValueError(
            f"`--output-dir` {folder!r} holds a run already. Pass --resume-from-checkpoint latest, or name a "
            "new folder."
        )


def origin_fingerprint(run: RunArguments, model: PreTrainedModel) -> dict[str, str]:
    """Fingerprint of a run's starting point: its objective, and the weights of `--base-model`.

    A run is resumed only if it matches.

    Returns:
        {"objective", "base_weights"}; the weights are a digest, or "new" without a base.
    """
    return {"objective": run.objective, "base_weights": module_digest(model) if run.base_model else "new"}


def read_origin_fingerprint(folder: str | Path) -> dict | None:
    """The `origin_fingerprint` that a run wrote to a folder; None without such a file, or if that is damaged."""
    try:
        found = json.loads((Path(folder) / RUN_CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and set(found) == {"objective", "base_weights"} else None


def check_origin(folder: str | Path, now: dict) -> None:
    """Checks that the run in a folder began from the weights that `--base-model` has now.

    Raises:
        ValueError: it began from others. Its checkpoints would be loaded into the wrong backbone.
    """
    before = read_origin_fingerprint(folder) or now
    if before["objective"] != now["objective"]:
        raise ValueError(
            f"{str(folder)!r} holds a run of --objective {before['objective']}, not {now['objective']}. Name a new "
            "`--output-dir`."
        )
    if before["base_weights"] != now["base_weights"]:
        raise ValueError(
            f"{str(folder)!r} holds a run that began from other weights than `--base-model` has now. Resume with "
            "those, or name a new `--output-dir`."
        )
