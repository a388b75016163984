"""`prism text`: the same text for the same seed, what a terminal shows, and bad input."""

import json
import types

import pytest
import torch
from rich.console import Console
from rich.text import Text

from prism_pipelines import PrismPipeline, bundled
from prism_pipelines.cli import live_view
from prism_pipelines.cli.main import main
from prism_pipelines.evaluation import pipeline_texts
from prism_pipelines.sampling import token_states

M = 9  # a mask id


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_json_holds_what_the_pipeline_writes_for_the_seed(capsys):
    assert main(["text", "--num-samples", "2", "--num-inference-steps", "4", "--seed", "3", "--json"]) == 0
    found = told(capsys)
    pipe = PrismPipeline.from_pretrained(bundled("text"))
    pipe.set_progress_bar_config(disable=True)
    assert found["texts"] == pipeline_texts(pipe, 2, 256, 4, seed=3)
    assert found["forwards"] == 4 and found["scheduler"] == "PrismScheduler" and len(found["remasked"]) == 2
    assert main(["text", "--num-samples", "1", "--num-inference-steps", "4", "--seed", "3", "--json"]) == 0
    assert told(capsys)["texts"] == found["texts"][:1]  # a text does not depend on its neighbours


def test_a_prompt_is_kept_and_a_rule_that_never_remasks_remasks_nothing(capsys):
    flags = ["--scheduler", "mdlm", "--num-inference-steps", "3", "--gen-length", "10"]
    assert main(["text", "KING HENRY.", *flags, "--json"]) == 0
    found = told(capsys)
    assert found["remasked"] == [0] and found["prompt"] == "KING HENRY."
    assert main(["text", "KING HENRY.", *flags]) == 0
    assert capsys.readouterr().out == "KING HENRY." + found["texts"][0] + "\n"


def test_the_page_shows_the_run(tmp_path, capsys):
    page = tmp_path / "run.html"
    flags = ["--num-inference-steps", "3", "--gen-length", "8", "--num-samples", "2"]
    assert main(["text", *flags, "--html", str(page)]) == 0
    assert page.read_text().count('"drawn"') == 2 * 3  # a record for each row and step


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([" "], "PROMPT"),
        (["--html", "/no/such/folder/x.html"], "/no/such/folder"),
        (["word " * 200], "256"),
        (["--device", "quantum"], "--device"),
    ],
)
def test_bad_input_is_one_line(flags, named, capsys):
    assert main(["text", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("prism: error:") and named in lines[0]


def test_kinds_of_tokens():
    before, after = [5, M, 7, 8, M, 3], [5, 6, M, 8, M, 3]
    kinds = token_states.token_states(
        before, after, [False, *[True] * 5], M, [1, 0, 0.1, 0.2, 0, 0.9], [False, False, True, False, False, False]
    )
    assert kinds == ["given", "written", "remasked", "doubtful", "mask", "kept"]


def test_the_live_view_counts_remasks_and_shows_every_token():
    console = Console(force_terminal=True, width=60, color_system=None)

    def draw(ids, kinds):
        return live_view.page(["abcdefghij"[token] for token in ids], kinds)

    pipe = types.SimpleNamespace(mask_token_id=M, scheduler=types.SimpleNamespace(timesteps=[0, 1]))
    view, seen = live_view.LiveView(console, draw, delay=0), []
    view.live = types.SimpleNamespace(update=lambda group, refresh: seen.append(group.renderables))
    state = {"generation_mask": torch.ones(1, 3, dtype=torch.bool), "quality": None}
    view.step(
        pipe, 0, 0, state | {"sample": torch.tensor([[1, 2, M]]), "remasked": torch.zeros(1, 3, dtype=torch.bool)}
    )
    view.step(
        pipe, 1, 1, state | {"sample": torch.tensor([[1, M, 3]]), "remasked": torch.tensor([[False, True, False]])}
    )
    assert [str(parts[1]) for parts in seen] == ["bc_", "b×d"]
    assert "3/3" not in str(seen[1][0]) and "2/3 tokens   1 remasked now, 1 so far" in str(seen[1][0])


def test_the_live_view_says_when_it_fills_judges_and_repairs():
    view, seen = live_view.LiveView(Console(), lambda ids, kinds: Text(), delay=0), []
    view.live = types.SimpleNamespace(update=lambda group, refresh: seen.append(str(group.renderables[0])))
    pipe = types.SimpleNamespace(mask_token_id=M, scheduler=types.SimpleNamespace(timesteps=range(4)))
    generated = torch.tensor([[False, True, True]])
    for step, (canvas, remasked) in enumerate([([1, 2, 3], []), ([1, M, 3], [1]), ([1, 4, 3], []), ([1, 4, 3], [])]):
        again = torch.tensor([[i in remasked for i in range(3)]])
        state = {"sample": torch.tensor([canvas]), "generation_mask": generated, "quality": None, "remasked": again}
        view.step(pipe, step, step, state)
    assert [line.split()[-1] for line in seen] == ["filling", "judging", "repairing", "judging"]
    assert "1/2 tokens" in seen[1] and "1 remasked now, 1 so far" in seen[1]
