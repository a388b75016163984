"""A small text and its tokenizer, without a download: how to count, in sentences that can be checked.

    python examples/quickstart_head/prepare.py runs/quickstart/data

writes text.txt (a sentence a line) and tokenizer/ (a word a token). Train on it by train_head.sh.
"""

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SPECIAL = ["<pad>", "<mask>", "<eos>"]
NUM_LINES = 4000


def sentences(count: int) -> list[str]:
    """Sums of two numbers, and which of two is larger; the same ones each time."""
    rng, lines = random.Random(0), []
    for _ in range(count):
        a, b = rng.randrange(7), rng.randrange(7)
        larger = f"{NUMBERS[max(a, b)]} is larger" if a != b else "they are equal"
        lines.append(f"{NUMBERS[a]} and {NUMBERS[b]} make {NUMBERS[a + b]} and {larger} .")
    return lines


def main() -> None:
    """Write the text, and a tokenizer of its words."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where text.txt and tokenizer/ are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = sentences(NUM_LINES)
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    words = [*SPECIAL, "<unk>", *sorted({word for line in lines for word in line.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "tokenizer")
    print(f"{len(lines)} sentences and {len(fast)} tokens in {folder}")


if __name__ == "__main__":
    main()
