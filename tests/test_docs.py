"""The docs: every block of Python runs, every public name is in the reference, the site builds without a warning."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_twins import H
from test_examples import llada_repository
from test_what_is_written import bert

import prism_pipelines
from examples.local_hub import LocalHub
from prism_pipelines import PrismPipeline, PrismScheduler, QualityHead, bundled, evaluation, schedulers, sudoku

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# A block with this line before it is not run; the reason stands there, for readers of the source.
MARK = re.compile(r"<!-- not run: (.+?) -->")
# What is run is what is written, but on a CPU, and on fewer puzzles and texts.
SMALLER = {r'"cuda"': '"cpu"', r"make_puzzles\(\d+": "make_puzzles(3", "num_samples=64": "num_samples=2"}
BLOCK = re.compile(r"((?:<!--[^\n]*-->\n)?)^( *)```python\n(.*?)^ *```", re.S | re.M)


def blocks(page: str) -> list[tuple[int, str | None, str]]:
    """(line, why it is not run or None, code) of each block of Python."""
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for block in BLOCK.finditer(text):
        mark = MARK.search(block[1])
        code = re.sub(f"^{block[2]}", "", block[3], flags=re.M)
        found.append((text.count("\n", 0, block.start(3)) + 1, mark and mark[1], code))
    return found


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine with tiny models under the names that the docs use."""
    with LocalHub() as server:
        server.connect(monkeypatch, tmp_path / "cache")
        config = llada_repository(tmp_path / "llada") / "config.json"
        config.write_text(config.read_text().replace('"max_sequence_length": 96', '"max_sequence_length": 4096'))
        server.commit("GSAI-ML/LLaDA-8B-Instruct", config.parent)
        QualityHead(H, base_model="GSAI-ML/LLaDA-8B-Instruct").save_pretrained(tmp_path / "head" / "quality_head")
        PrismScheduler(num_remask=2).save_pretrained(tmp_path / "head" / "scheduler")
        server.commit("you/llada-8b-prism", tmp_path / "head")
        encoder = bert()
        encoder.model.save_pretrained(tmp_path / "bert")
        encoder.tokenizer.save_pretrained(tmp_path / "bert")
        server.commit("answerdotai/ModernBERT-base", tmp_path / "bert")
        yield server


def test_no_page_has_a_block_that_the_tests_overlook():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(blocks(page)) == text.count("```python"), page
        assert len(MARK.findall(text)) == sum(why is not None for _, why, _ in blocks(page)), page


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(why is None for _, why, _ in blocks(page))])
def test_every_block_of_python_runs(page, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    long = page == "docs/generate.md"
    pipe = PrismPipeline.from_pretrained("GSAI-ML/LLaDA-8B-Instruct" if long else bundled("sudoku"))
    Path("prompts.jsonl").write_text('{"prompt": "why"}\n')
    if page == "docs/evaluation.md":
        shown = re.search(r"```json\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)[1]
        Path("arms.json").write_text(json.dumps(json.loads(shown) | {"forwards": [4], "seeds": [0]}))
    puzzles, answers = sudoku.make_puzzles(8, 24, seed=1)
    puzzles, answers = torch.as_tensor(sudoku.to_ids(puzzles)), torch.as_tensor(answers).long()
    names = {"torch": torch, "pipe": pipe}  # what a page may take as known, in the words of its text
    for line, why, code in blocks(page):
        # Padded with lines, so that an error names the line of the page.
        for pattern, smaller in SMALLER.items():
            code = re.sub(pattern, smaller, code)
        program = compile("\n" * (line - 1) + code, page, "exec")
        names |= {"puzzles": puzzles, "answers": answers, "blank": puzzles == sudoku.MASK_ID}
        if why is None:
            exec(program, names)


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)", pages, re.M))
    shown = {name.rpartition(".")[2] for name in listed} | set(re.findall(r"`(\w+)`", pages))
    wanted = set(prism_pipelines.__all__) - {"__version__"} | set(schedulers.__all__)
    assert not wanted - shown
    assert "prism_pipelines.evaluation" in listed  # whole modules show all that `__all__` names
    assert set(evaluation.__all__) <= set(dir(evaluation))


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    nav = set(re.findall(r"[\w/]+\.md", config[config.index("\nnav:") :]))
    assert nav == {page.removeprefix("docs/") for page in PAGES} - {"README.md"}


def test_every_picture_of_the_docs_is_there():
    for page in PAGES:
        for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / page).parent.joinpath(link).is_file(), (page, link)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason='needs the docs extra: pip install "prism-pipelines[docs]"')
    pytest.importorskip("material", reason='needs the docs extra: pip install "prism-pipelines[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "site" / "reference" / "evaluation.html").read_text()
    assert all(name in page for name in evaluation.__all__)
    found = (tmp_path / "site" / "search" / "search_index.json").read_text()
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(headings) > 20
    for heading in headings:  # the search finds each message
        words = re.findall(r"[A-Za-z_]{4,}", heading.replace("`", ""))
        assert all(word in found for word in words), heading
    shutil.rmtree(tmp_path / "site")
