"""Converts pickled checkpoints to a folder that this package loads: safetensors, config.json and a tokenizer.

Reading a pickle can run code. Here it is read with `weights_only=True`, which builds tensors and nothing else.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..models.families import family_of, recipe_of
from ..models.probes import wrong_size
from .backbones import TOKENIZER_FILES
from .files import fetch_file, inside, reachable, read_json
from .loaders import native_config
from .sizes import check_sizes, model_config, parts_of

# Entries under which training code keeps the weights, in a checkpoint that holds more than weights.
INNER = ("state_dict", "model_state_dict", "model", "module")
# Prefixes that wrappers of training code put before every name.
WRAPPERS = ("", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.")
# Names of special tokens in vocabularies.
ROLES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<cls>", "<s>"),
    "sep_token": ("[SEP]", "<eos>", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


@dataclass
class Conversion:
    """What `convert_checkpoint` did.

    Attributes:
        weights: how many tensors were written.
        renamed: name in the source -> name that was written, where the two differ.
        left_out: names in the source that the model's class does not have.
        tokenizer: a description of what the tokenizer was made from.
    """

    weights: int
    renamed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    tokenizer: str = "none"


def convert_checkpoint(
    source: str,
    folder: str | Path,
    *,
    subfolder: str = "",
    weights: str | None = None,
    vocab: str | Path | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Write a checkpoint of pickled weights as a folder that `PrismPipeline.from_pretrained` loads.

    Names of weights are matched with those of the family's native class. Prefixes of training wrappers are dropped,
    `gamma` and `beta` of old layer norms become `weight` and `bias`, and weights that the class does not have are left
    out. A family that is loaded by renaming (LLaDA) keeps the names of its authors.

    Args:
        source: folder or Hub id with a config.json and pickled weights. Safetensors are preferred if there are any.
        folder: where to write; must be empty or absent.
        subfolder: inside `source`.
        weights: file name inside `source`; None for model.safetensors or pytorch_model.bin, whole or in parts.
        vocab: file with one token a line, from which a tokenizer of one token a character is built. None for the
            tokenizer of `source`, or its vocab.txt.
        tokenizer: folder or Hub id of a tokenizer, instead of `vocab`.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.
    Returns:
        `Conversion`.
    Raises:
        OSError: no config.json or no weights there.
        ValueError: `folder` is not empty; the pickle holds more than tensors; weights are missing, or do not have the
            sizes in config.json; or the number of the tokenizer's ids is not that of the rows of the embeddings.
    """
    hub_kwargs = {
        "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only,
    }  # fmt: skip
    hub_kwargs, out = reachable(source, hub_kwargs), Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(folder)!r} is not empty. Convert into a new folder.")
    config = read_json(source, inside(subfolder, "config.json"), hub_kwargs)
    if config is None:
        raise OSError(
            f"{source!r} has no {inside(subfolder, 'config.json')}, which says what model the weights belong to."
        )
    if vocab is not None and tokenizer is not None:
        raise ValueError("`vocab` and `tokenizer` both give a tokenizer; pass only one of them.")
    made, origin = find_tokenizer(source, subfolder, config, vocab, tokenizer, hub_kwargs)
    check_size(made, config, origin)
    files = weight_files(source, subfolder, weights, hub_kwargs)
    found = {name: value for file in files for name, value in read_weights(file).items()}
    written, report = match_names(found, config, source)
    report.tokenizer = origin
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_torch_state_dict(written, partial)
        config.pop("_name_or_path", None)  # a folder of the machine it was trained on
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if made is not None:
            made.save_pretrained(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


# --- weights ----------------------------------------------------------------------------------------------------------


def weight_files(source: str, subfolder: str, weights: str | None, hub_kwargs: dict[str, Any]) -> list[str]:
    """Local paths of the files that hold the weights.

    Raises:
        OSError: there are none.
    """
    for name in [weights] if weights else ["model.safetensors", "pytorch_model.bin"]:
        index = read_json(source, inside(subfolder, f"{name}.index.json"), hub_kwargs)
        parts = [name] if index is None else parts_of(index, f"{name}.index.json of {source!r}")
        found = {part: fetch_file(source, inside(subfolder, part), hub_kwargs) for part in parts}
        files = [file for file in found.values() if file is not None]
        if len(files) == len(parts):
            return files
        if files:
            lost = next(part for part, file in found.items() if file is None)
            raise OSError(f"{source!r} lacks {lost}, a part of its weights. Download it again.")
    wanted = weights or "model.safetensors and no pytorch_model.bin; name the file of its weights (--weights FILE)"
    raise OSError(f"{source!r} has no {inside(subfolder, wanted)}.")


def read_weights(file: str) -> dict[str, Tensor]:
    """Tensors of one file by name: safetensors, or a pickle of which only tensors are built.

    Raises:
        ValueError: the pickle holds other objects, or no tensors; or the file is damaged.
    """
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    try:
        content = load_tensors(file)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported (?:global|class|operand)[^.\n]*[^\n]*?(?= was not| that|\n|$)", str(error))
        raise ValueError(
            f"{file} holds more than tensors, and reading the rest could run code, so nothing was read. "
            f"{reason[0] + '. ' if reason else ''}Ask its authors for the state dict alone, "
            "torch.save(model.state_dict(), ...), or for safetensors."
        ) from error
    except (RuntimeError, EOFError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"{file} cannot be read as weights: {str(error).splitlines()[0]}. Download it again."
        ) from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((key for key in INNER if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise ValueError(f"{file} holds no tensors: its entries are {sorted(map(str, content))[:5]}.")
        content = content[inner]
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state dict (name -> tensor).")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def load_tensors(file: str) -> Any:
    """`torch.load` with weights_only=True. Large files stay on the disk until they are used, if the format allows."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):  # files from before torch 1.6 are no zip archives
            raise
        return torch.load(file, map_location="cpu", weights_only=True)


def match_names(found: dict[str, Tensor], config: dict[str, Any], source: str) -> tuple[dict[str, Tensor], Conversion]:
    """The weights under names that the loader finds, and a report.

    Raises:
        ValueError: weights of the native class are missing, or have another size than in config.json.
    """
    names = {re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name)): name for name in found}
    row = family_of(SimpleNamespace(**config), source)
    recipe = recipe_of(row)
    native = getattr(transformers, recipe.native_class or "", None)
    if native is None or recipe.key_mapping or recipe.fold_time or recipe.split_weights or recipe.config_mapping:
        prefix = best_prefix(names, None)
        kept = {name.removeprefix(prefix): found[old] for name, old in names.items() if name.startswith(prefix)}
        return kept, report_of(kept, names, prefix)
    shapes = {name: tuple(found[old].shape) for name, old in names.items()}
    made = model_config(lambda: native_config(native, config, recipe), native, config, shapes, source)
    check_sizes(native, made, config, shapes, source)
    with torch.device("meta"):
        model = native(made)
    expected = dict(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    prefix = best_prefix(names, set(expected))
    stripped = {name.removeprefix(prefix): found[old] for name, old in names.items() if name.startswith(prefix)}
    kept = {name: value for name, value in stripped.items() if name in expected}
    check_tied(kept, model, source)
    missing = sorted(set(expected) - set(kept) - tied)
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {recipe.native_class} are not in {source!r}, such as {missing[:3]}. It has "
            f"{sorted(set(stripped) - set(kept))[:5]}, which that class does not have."
        )
    wrong = [name for name, value in kept.items() if value.shape != expected[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights of {source!r} are not of the size that config.json gives: {name} is "
            f"{tuple(kept[name].shape)}, and {recipe.native_class} has {tuple(expected[name].shape)}."
        )
    return kept, report_of(kept, names, prefix)


def best_prefix(names: Iterable[str], expected: set[str] | None) -> str:
    """The prefix of a training wrapper that all names share; of several, the one after which most names match."""
    if expected is None:
        shared = [p for p in WRAPPERS if p in ("module.", "_orig_mod.", "module._orig_mod.")]
        return next((p for p in reversed(shared) if all(name.startswith(p) for name in names)), "")
    return max(WRAPPERS, key=lambda p: len({name.removeprefix(p) for name in names if name.startswith(p)} & expected))


def check_tied(kept: dict[str, Tensor], model: Any, source: str) -> None:
    """Raise a ValueError if the model's class ties two weights that differ here, since one of them would be lost."""
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in kept and other in kept and not torch.equal(kept[name], kept[other]):
            raise ValueError(
                f"{name} and {other} of {source!r} differ, and {type(model).__name__} ties them. Write "
                '"tie_word_embeddings": false into its config.json, and convert again.'
            )


def report_of(kept: dict[str, Tensor], names: dict[str, str], prefix: str) -> Conversion:
    """The report about the names of a checkpoint."""
    renamed = {old: name.removeprefix(prefix) for name, old in names.items() if old != name.removeprefix(prefix)}
    left_out = sorted(old for name, old in names.items() if name.removeprefix(prefix) not in kept)
    return Conversion(len(kept), {old: new for old, new in renamed.items() if new in kept}, left_out)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def find_tokenizer(
    source: str,
    subfolder: str,
    config: dict[str, Any],
    vocab: str | Path | None,
    tokenizer: str | None,
    hub_kwargs: dict[str, Any],
) -> tuple[Any, str]:
    """A tokenizer, or None, and a description of its source.

    Raises:
        ValueError: the vocabulary is not a list of tokens, or `vocab` has tokens of several characters.
    """
    if tokenizer is not None:
        return AutoTokenizer.from_pretrained(tokenizer, **hub_kwargs | {"revision": None}), f"the one of {tokenizer}"
    if vocab is not None:
        return character_tokenizer(read_vocab(vocab), config), f"one token a character, {vocab}"
    own = [name for name in TOKENIZER_FILES if fetch_file(source, inside(subfolder, name), hub_kwargs)]
    if not own:
        return None, "none; pass --vocab or --tokenizer"
    if own == ["vocab.txt"]:
        lines = read_vocab(fetch_file(source, inside(subfolder, "vocab.txt"), hub_kwargs) or "")
        if is_of_characters(lines):  # transformers would read a sequence as one unknown word
            return character_tokenizer(lines, config), "one token a character, vocab.txt"
    return AutoTokenizer.from_pretrained(source, subfolder=subfolder, **hub_kwargs), f"its own, {', '.join(own)}"


def read_vocab(file: str | Path) -> list[str]:
    """Tokens of a file with one token a line; the number of the line is the id.

    Raises:
        OSError: no such file.
        ValueError: a token appears twice, or a line is empty.
    """
    lines = Path(file).read_text().splitlines()
    for number, token in enumerate(lines):
        if not token:
            raise ValueError(f"{file}: line {number + 1} is empty; each line is a token.")
        if token in lines[:number]:
            raise ValueError(f"{file}: line {number + 1} repeats the token {token!r}.")
    return lines


def is_of_characters(tokens: list[str]) -> bool:
    """Is every token that is not special a single character?"""
    special = {name for names in ROLES.values() for name in names}
    ordinary = [token for token in tokens if token not in special]
    return bool(ordinary) and all(len(token) == 1 for token in ordinary)


def character_tokenizer(tokens: list[str], config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer of one token for each character (residues of proteins, digits of a puzzle), with [CLS] text [SEP].

    White space between characters is ignored, so that "E V Q" and "EVQ" are the same. Case is kept.

    Raises:
        ValueError: a token has more than one character and is not special, or there is no unknown token.
    """
    special = {role: name for role, names in ROLES.items() for name in names[::-1] if name in tokens}
    longer = [token for token in tokens if len(token) > 1 and token not in special.values()]
    if longer:
        raise ValueError(
            f"The vocabulary has tokens of several characters, such as {longer[:3]}, so a token is not a character. "
            "Pass the folder of its tokenizer (--tokenizer)."
        )
    if "unk_token" not in special:
        raise ValueError(f"The vocabulary has no unknown token ({' or '.join(ROLES['unk_token'])}).")
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=special["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), behavior="isolated")]
    )
    inner.decoder = decoders.Fuse()
    if "cls_token" in special and "sep_token" in special:
        first, last = special["cls_token"], special["sep_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(first, tokens.index(first)), (last, tokens.index(last))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        **special,
    )
    if config.get("max_position_embeddings"):
        fast.model_max_length = config["max_position_embeddings"]
    return fast


def check_size(tokenizer: Any, config: dict[str, Any], origin: str) -> None:
    """Raise a ValueError if a tokenizer has too many or too few ids for a model."""
    wrong = None if tokenizer is None else wrong_size(len(tokenizer), config.get("vocab_size"))
    if wrong:
        raise ValueError(f"The tokenizer ({origin}) {wrong}. Pass another with --vocab or --tokenizer.")
