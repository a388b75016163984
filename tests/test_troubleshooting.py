"""docs/troubleshooting.md has an entry for each message about silent and misleading faults, found by its words."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HEADINGS = [line.removeprefix("### ") for line in PAGE.splitlines() if line.startswith("### ")]

# Words of a message -> the file that raises it or warns of it.
MESSAGES = {
    "unknown to the tokenizer: the model reads": "sampling/canvas.py",
    "holds NaN or inf": "models/checks.py",
    "its weights are finite: numbers overflow": "models/checks.py",
    "`quality_head` gives NaN": "sampling/loop.py",
    "A weight of `quality_head` holds NaN or inf": "hub/heads.py",
    "A weight of the adapter of": "hub/adapter_files.py",
    "which takes no additive mask": "hub/backbones.py",
    "`stop` needs": "sampling/stopping.py",
    "a pickle, which can run code when loaded": "hub/backbones.py",
    "holds more than tensors, and reading the rest could run code": "hub/convert.py",
    "ties them": "hub/convert.py",
    "and the model has rows for": "models/probes.py",
    "cannot be reached": "hub/files.py",
    "must be a JSON object": "hub/files.py",
    "has a wrong config.json": "hub/heads.py",
    "does not fit its config.json": "hub/heads.py",
    "says rank": "hub/adapter_files.py",
    "weights have no place": "hub/adapter_files.py",
    "init_lora_weights=": "hub/adapter_files.py",
    "has lora_alpha": "hub/adapter_files.py",
    "PEFT says": "hub/adapters.py",
    "and the model was saved from this package": "models/convert_mdlm.py",
    "are fused into the weights": "hub/adapters.py",
    "The model has an adapter called": "hub/adapters.py",
    "the model is saved whole": "hub/saved_model.py",
    "was saved with other weights of its base model": "hub/saved_model.py",
    "The quality head was made for other weights of": "hub/heads.py",
    "and the model in use has other weights": "hub/publish.py",
    "are in use and are not part of": "hub/publish.py",
    "describes a model of": "hub/sizes.py",
    "layers, and the files hold": "hub/sizes.py",
    "has values that make no model": "hub/sizes.py",
    "model.safetensors.index.json": "hub/sizes.py",
    "a part of its weights": "hub/sizes.py",
    "is damaged": "hub/files.py",
    "the chat template writes the prompt differently once the answer is there": "sampling/encoding.py",
    "the chat template writes earlier turns differently once more follow": "sampling/encoding.py",
    "the chat template refuses it": "sampling/encoding.py",
    "`continue_final_message` needs a last message of the assistant": "sampling/encoding.py",
    "is not JSON": "generation/input_files.py",
    "no chat template is used": "sampling/encoding.py",
    "There is no GPU for device=": "integrations/lm_eval.py",
    "has no trainable token": "sampling/rows.py",
    "and the model never writes that token": "sampling/rows.py",
    "`gen_length` is": "pipeline_checks.py",
    "The canvas has": "pipeline_checks.py",
    "--max-length is": "training",
    "what the model takes": "training",
}


def plain(text):
    """Without marks of code, in one line."""
    return " ".join(text.replace("`", "").split())


def strings_of(place):
    """All that the strings of a file, or of the files of a folder, say; parts that are computed are left out."""
    path = ROOT / "prism_pipelines" / place
    said = []
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return plain(" ".join(said))


@pytest.mark.parametrize("words", MESSAGES)
def test_a_message_is_said_by_the_code_and_has_an_entry_that_its_words_find(words):
    assert plain(words) in strings_of(MESSAGES[words]), "the code says it otherwise: change page and table"
    assert any(plain(words) in plain(heading) for heading in HEADINGS)


OBSERVED = ("A text has fewer", "Results of several threads")  # what users see happen, without a message


def test_every_entry_is_a_message_of_the_code_or_something_that_users_see():
    said = strings_of(".")
    lost = []
    for heading in HEADINGS:
        words = plain(heading).split()
        runs = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
        if not heading.startswith(OBSERVED) and not any(run in said for run in runs):
            lost.append(heading)
    assert not lost, "\n".join(lost)
