"""Short functions of Python's standard library as a data set, and a BPE trained on them.

    python examples/code/prepare.py runs/code-data

writes train.jsonl, heldout.jsonl (every tenth module) and tokenizer/. Functions come from the modules of the
interpreter that runs this, written anew by `ast.unparse`: no comments, one style. The licence of that code is Python's
own (PSF); nothing of it is shipped. Another version of Python gives other functions.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import warnings
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
MOST_CHARACTERS, LEAST_CHARACTERS = 400, 60


def functions(source: str) -> list[str]:
    """The functions of a module that are neither long nor trivial, without docstrings; [] if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            code = ast.unparse(node)
            if LEAST_CHARACTERS <= len(code) <= MOST_CHARACTERS and code.isascii():
                found.append(code)
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as for the text model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<mask>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        mask_token="<mask>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Collect, split by module, train the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl, heldout.jsonl and tokenizer/ are written")
    folder = parser.parse_args().folder
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts and "lib2to3" not in p.parts)
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    seen = set()
    for number, path in enumerate(paths):
        for code in functions(path.read_text(encoding="utf-8", errors="replace")):
            if code not in seen:
                seen.add(code)
                parts["heldout" if number % 10 == 0 else "train"].append(code)
    folder.mkdir(parents=True, exist_ok=True)
    for part, found in parts.items():
        rows = [json.dumps({"prompt": "", "completion": code}) for code in found]
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{part}: {len(found)} functions, {sum(map(len, found)):,} characters")
    make_tokenizer(parts["train"]).save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
