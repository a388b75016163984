"""One grammar: the docs print what the commands take, a page of help fits a screen, one word means one thing."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from benchmarks.text import OWN_WEIGHTS
from prism_pipelines.cli import train
from prism_pipelines.cli.arguments import dashed
from prism_pipelines.cli.main import build_parser
from prism_pipelines.training.arguments import RunArguments

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md")) + sorted((ROOT / "prism_pipelines/bundled").rglob("*.md"))
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.S | re.M)
STARTS = ("prism ", "python -m", "accelerate launch", "torchrun", "OMP_NUM_THREADS")
INLINE = re.compile(r"`((?:prism|python -m|accelerate launch)\s[^`]+)`")


def commands(parser: argparse.ArgumentParser, name: str = "prism") -> dict[str, argparse.ArgumentParser]:
    """Every parser below this one, by its words."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                found |= {f"{name} {word}": below, **commands(below, f"{name} {word}")}
    return found


COMMANDS = commands(build_parser())
LEAVES = {name: parser for name, parser in COMMANDS.items() if name not in ("prism eval", "prism train")}
TRAINING = transformers.HfArgumentParser((RunArguments, transformers.TrainingArguments))


def needed(parser: argparse.ArgumentParser) -> list[str]:
    """Values for the flags that the command cannot do without."""
    return [f"{action.option_strings[0]}=x" for action in parser._actions if action.required and action.option_strings]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def written(text: str) -> list[list[str]]:
    """The commands of the fenced blocks of a page, each as its words, without comments and shell variables."""
    blocks = [body for _, language, body in FENCED.findall(text) if language in ("bash", "sh", "shell", "console", "")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(STARTS)]


def below(words: list[str]) -> tuple[str, list[str]]:
    """The command that these words name, of `prism`, a module or a file, and the words that follow."""
    if words[0] == "prism":
        words = [word for word in words if word not in ("-q", "--quiet")]
        name = " ".join(words[:3] if words[1:2] == ["eval"] else words[:2])
        return name, words[len(name.split()) :]
    if "prism_pipelines" in words:
        return below(["prism", *words[words.index("prism_pipelines") + 1 :]])
    if "prism_pipelines.training" in words:
        return "prism train", words[words.index("prism_pipelines.training") + 1 :]
    for i, word in enumerate(words):
        if word.startswith("benchmarks."):
            return f"{word.replace('.', '/')}.py", words[i + 1 :]
        if re.fullmatch(r"examples/\S+\.py", word):
            return word, words[i + 1 :]
    return "", []


def known(name: str) -> set[str] | None:
    """The flags that the command takes; None if it is none of ours."""
    if name == "prism train":
        return flags_of(TRAINING) | {"--args-file", "--help"}
    if name in COMMANDS:
        return flags_of(COMMANDS[name])
    if name.endswith(".py"):
        return set(re.findall(r'"(--[a-z0-9-]+)"', (ROOT / name).read_text())) | {f"--{run}" for run in OWN_WEIGHTS}
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_prints_is_one_that_parses(page):
    text = page.read_text(encoding="utf-8")
    for words in filter(None, written(text)):
        name, rest = below(words)
        if name in LEAVES and not {"--help", "-h"} & set(rest):
            LEAVES[name].parse_args(rest)
    inline = [
        shlex.split(line.replace("\n", " ").replace("'{", "{").replace("}'", "}")) for line in INLINE.findall(text)
    ]
    for words in filter(None, written(text) + inline):
        name, rest = below(words)
        taken = known(name)
        if name == "prism train" and "--" in rest:
            rest = rest[rest.index("--") + 1 :]
        for word in rest if taken is not None else []:
            flag = word.partition("=")[0]
            assert not flag.startswith("--") or flag == "--" or flag in taken, f"{name} takes no {word}"


@pytest.mark.parametrize("name", [*COMMANDS, "prism"])
def test_a_page_of_help_fits_a_screen_and_its_examples_parse(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    if name == "prism train":
        assert train.run(argparse.Namespace(flags=["--help"])) == 0
    else:
        with pytest.raises(SystemExit):
            build_parser().parse_args([*name.split()[1:], "--help"])
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert len(lines) <= 50, f"{name} --help has {len(lines)} lines, at most 50 fit: shorten its description or help"
    assert max(map(len, lines)) <= 102, max(lines, key=len)
    if name in ("prism", "prism eval"):
        return
    examples = page[page.index("\nexamples:\n") :].splitlines()[2:]
    examples = [shlex.split(line) for line in examples if line.startswith("  ")]
    assert examples
    for words in examples:
        found, rest = below(words)
        assert found == name
        if name in LEAVES:
            LEAVES[name].parse_args(rest)
        else:
            assert all(
                word in known(name) for word in rest[rest.count("--") and rest.index("--") + 1 :] if word[:2] == "--"
            )


def test_flags_have_dashes_and_one_name_means_one_thing_in_every_command():
    kinds = {}
    for name, parser in LEAVES.items():
        for action in parser._actions:
            for flag in action.option_strings:
                assert "_" not in flag, (name, flag)
                kinds.setdefault(flag, {})[name] = (type(action).__name__, action.metavar)
    several = {"--out", "--mask", "--data", "--positions", "--text"}  # a file here, a folder there
    for flag, found in kinds.items():
        told = f"{flag} must have the same action and metavar in every command: {found}"
        assert flag in several or len(set(found.values())) == 1, told
    assert not {"--steps", "--torch-dtype", "--length", "--output"} & set(kinds)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_have_the_words_of_the_commands(path):
    flags = set(re.findall(r'add_argument\(\s*"(--[^"]+)"', path.read_text()))
    assert not {flag for flag in flags if "_" in flag}
    assert not {"--steps", "--output", "--batch", "--puzzles", "--generated", "--torch-dtype"} & flags


@pytest.mark.parametrize("name", LEAVES)
def test_underscores_are_read_as_dashes(name):
    parser, every = (
        build_parser(),
        ["a", "b"][: len([action for action in LEAVES[name]._actions if not action.option_strings])],
    )
    for action in LEAVES[name]._actions:
        for flag in action.option_strings:
            if "-" in flag[2:] and flag.startswith("--"):
                value = [] if action.nargs == 0 else [action.choices[-1] if action.choices else "7"]
                value = ["{}"] if action.metavar == "JSON" else value
                words = [*name.split()[1:], *every, *needed(LEAVES[name])]
                read = [
                    parser.parse_known_args([*words, word, *value])[0]
                    for word in (flag, "--" + flag[2:].replace("-", "_"))
                ]
                assert read[0] == read[1] and getattr(read[1], action.dest) != action.default, flag


def test_the_docs_list_every_command():
    listed = re.findall(r"^\| `(prism [^`]+)`", (ROOT / "docs/command_line.md").read_text(), re.M)
    assert sorted(listed) == sorted(name for name in COMMANDS if name != "prism eval")


def test_values_keep_their_underscores():
    assert dashed(["--chat-template=a_b", "c_d", "--e-f", "g_h", "--", "--i-j"]) == [
        "--chat-template=a_b", "c_d", "--e-f", "g_h", "--", "--i-j",
    ]  # fmt: skip


def test_the_shell_is_told_what_may_come_next(tmp_path):
    pytest.importorskip("argcomplete", reason='needs the shell extra: pip install "prism-pipelines[shell]"')
    line = "prism eval compare --tune-f"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"), "COMP_LINE": line}
    shell |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-m", "prism_pipelines"], env=shell, cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "out").read_text().split() == ["--tune-forwards"]
