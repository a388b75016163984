"""The command line: what people see, what programs read, exit statuses, and every kind of bad input."""

import argparse
import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead, sudoku
from prism_pipelines.cli import live_view
from prism_pipelines.cli import sudoku as cli_sudoku
from prism_pipelines.cli.loading import change_scheduler
from prism_pipelines.cli.main import main
from prism_pipelines.sampling import token_states

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
NO_SOLUTION = PUZZLE[:2] + "1" + PUZZLE[3:]  # row 1 column 3 must be 4; a 1 there clashes with no clue


def tiny_pipeline():
    """A random model of one layer behind the whole pipeline: solves nothing, but runs every path."""
    torch.manual_seed(0)
    config = RobertaPreLayerNormConfig(
        vocab_size=sudoku.VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=sudoku.CELLS + 2,
        pad_token_id=sudoku.PAD_ID,
    )
    model = RobertaPreLayerNormForMaskedLM(config).eval()
    scheduler = PrismScheduler(num_remask=3)
    return PrismPipeline(
        model=model, tokenizer=sudoku.sudoku_tokenizer(), quality_head=QualityHead(16), scheduler=scheduler
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny pipeline, as `--model` takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def knowing(monkeypatch):
    """Makes the commands run on a pipeline whose output head knows SOLUTION."""
    pipe = tiny_pipeline()
    answer = torch.tensor([int(digit) for digit in SOLUTION])

    head = pipe.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(100 * torch.eye(sudoku.VOCAB_SIZE, 16))

    def forward(input_ids, **inputs):
        return head(torch.nn.functional.one_hot(answer, 16).float().expand(len(input_ids), -1, -1))

    monkeypatch.setattr(pipe.model, "forward", forward)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(cli_sudoku, "load_pipeline", lambda args: pipe)
    return pipe


def run(capsys, *argv):
    """(exit status, stdout, stderr) of `prism sudoku`; argparse leaves through SystemExit."""
    capsys.readouterr()  # what making the model printed
    try:
        status = main(["sudoku", *map(str, argv)])
    except SystemExit as left:
        status = left.code
    out, err = capsys.readouterr()
    return status, out, err


# --- what is asked of `prism` itself ----------------------------------------------------------------------------------


def test_help_answers_without_loading_torch():
    code = "import sys; from prism_pipelines.cli.main import main\ntry: main(['sudoku', '--help'])\nfinally: "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False False"
    assert "Exit status" in done.stdout and not done.stderr


def test_prism_alone_prints_help_and_version_prints_the_version(capsys):
    assert main([]) == 0
    assert "prism sudoku" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("prism-pipelines ")


@pytest.mark.slow
def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "prism_pipelines", "sudoku", "5"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([PUZZLE[:80]], "80 cells"),
        ([PUZZLE + "."], "82 cells"),
        ([PUZZLE[:40] + "x" + PUZZLE[41:]], "'x' at character 41"),
        (["55" + PUZZLE[2:]], "two 5s"),
        ([""], "0 cells"),
        (["nowhere/puzzles.txt"], "no file has that name"),
        (["a\nb"], "no file"),
        (["\0"], "character 1"),
        ([PUZZLE, "--num-inference-steps", "0"], "--num-inference-steps"),
        ([PUZZLE, "--num-inference-steps", "many"], "--num-inference-steps"),
        ([PUZZLE, "--seed", "-1"], "--seed"),
        ([PUZZLE, "--temperature", "nan"], "--temperature"),
        ([PUZZLE, "--temperature", "-1"], "--temperature"),
        ([PUZZLE, "--num-remask", "-1"], "--num-remask"),
        ([PUZZLE, "--delay", "inf"], "--delay"),
        ([PUZZLE, "--scheduler", "ddim"], "--scheduler"),
        ([PUZZLE, "--unknown"], "--unknown"),
        ([PUZZLE, "--html", "no/such/folder/page.html"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, names):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and names in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--scheduler", "mdlm", "--num-remask", "3"], "--num-remask"),
    ],
)
def test_flags_that_do_not_fit_are_one_line_and_status_2(capsys, model, argv, names):
    status, out, err = run(capsys, "--model", model, *argv)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and names in err


def test_a_folder_that_is_no_saved_pipeline_is_refused_in_one_line(capsys, tmp_path):
    status, out, err = run(capsys, PUZZLE, "--model", tmp_path)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1


def test_a_damaged_saved_pipeline_is_refused_in_one_line(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    status, out, err = run(capsys, PUZZLE, "--model", tmp_path)
    assert (status, out) == (2, "") and "not a saved PrismPipeline" in err and len(err.splitlines()) == 1


def test_a_model_of_another_language_is_refused(capsys, tmp_path):
    pipe = tiny_pipeline()
    pipe.model.resize_token_embeddings(20)
    pipe.save_pretrained(tmp_path)
    status, _, err = run(capsys, PUZZLE, "--model", tmp_path)
    assert status == 2 and "not a Sudoku model" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (f"{PUZZLE}\n{PUZZLE[:70]}\n".encode(), "line 2: puzzle has 70 cells"),
        (f"# only a comment\n\n  \n{PUZZLE}x".encode(), "line 4"),
        (b"# nothing\n", "holds no puzzle"),
        (b"", "holds no puzzle"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_bad_file_names_its_line_and_nothing_is_run(capsys, tmp_path, content, names):
    path = tmp_path / "puzzles.txt"
    path.write_bytes(content)
    status, out, err = run(capsys, path)
    assert (status, out) == (2, "") and names in err and len(err.splitlines()) == 1


def test_a_folder_is_no_file_of_puzzles(capsys, tmp_path):
    status, out, err = run(capsys, tmp_path)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1


def test_files_may_have_comments_blank_lines_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "puzzles.txt"
    path.write_bytes(f"\ufeff{PUZZLE}  # the first\r\n\r\n# between\r\n{PUZZLE.replace('.', '0')}\r\n".encode())
    puzzles, from_file = cli_sudoku.read_puzzles(str(path))
    assert from_file and [sudoku.format_grid(puzzle) for puzzle in puzzles] == [PUZZLE, PUZZLE]


# --- one puzzle -------------------------------------------------------------------------------------------------------


def test_a_solved_puzzle_is_plain_and_parseable_with_status_0(capsys, knowing):
    status, out, err = run(capsys, PUZZLE, "--num-inference-steps", "7", "--seed", "3")
    assert (status, err) == (0, "")
    record = dict(line.split("\t") for line in out.splitlines())
    assert record["puzzle"] == PUZZLE and record["grid"] == SOLUTION
    assert (record["verdict"], record["solutions"], record["forwards"]) == ("solved", "one", "7")
    assert int(record["remasked"]) > 0 and "\x1b" not in out


def test_an_unsolved_puzzle_keeps_its_clues_and_has_status_1(capsys, model):
    status, out, _ = run(capsys, PUZZLE, "--model", model, "--num-inference-steps", "6", "--json")
    record = json.loads(out)
    assert status == 1 and record["verdict"] == "not solved" and record["forwards"] == 6
    assert all(clue in (".", digit) for clue, digit in zip(PUZZLE, record["grid"], strict=True))
    assert "." not in record["grid"]


def test_the_same_seed_gives_the_same_grid_and_another_seed_another(capsys, model):
    grids = [json.loads(run(capsys, PUZZLE, "--model", model, "--json", "--seed", s)[1])["grid"] for s in (1, 1, 2)]
    assert grids[0] == grids[1] != grids[2]


@pytest.mark.parametrize("rule", ["prism", "mdlm", "self-confidence"])
def test_every_rule_runs_at_the_forwards_asked_for(capsys, model, rule):
    _, out, err = run(capsys, PUZZLE, "--model", model, "--scheduler", rule, "--num-inference-steps", "5", "--json")
    record = json.loads(out)
    assert not err
    assert record["forwards"] == 5 and (record["remasked"] > 0) == (rule != "mdlm")


def test_flags_change_the_shipped_settings_and_leave_the_rest():
    pipe = tiny_pipeline()
    pipe.scheduler = PrismScheduler(eta=0.3, order="confidence", remask_end=0.8)
    parser = argparse.ArgumentParser()
    cli_sudoku.add_parser(parser.add_subparsers())
    args = parser.parse_args(["sudoku", "--num-remask", "2", "--temperature", "0.5"])
    change_scheduler(pipe, args, "temperature", "num_remask")
    config = pipe.scheduler.config
    assert (config.num_remask, config.eta, config.temperature) == (2, None, 0.5)
    assert (config.order, config.remask_end) == ("confidence", 0.8)
    change_scheduler(pipe, parser.parse_args(["sudoku", "--scheduler", "mdlm"]), "temperature", "num_remask")
    assert isinstance(pipe.scheduler, MDLMScheduler) and pipe.scheduler.config.order == "confidence"


def test_a_puzzle_without_a_solution_is_said_to_have_none(capsys, model):
    assert sudoku.count_solutions(sudoku.parse_puzzle(NO_SOLUTION)) == 0
    status, out, err = run(capsys, NO_SOLUTION, "--model", model, "--json")
    record = json.loads(out)
    assert (status, err) == (1, "")
    assert (record["verdict"], record["solutions"], record["forwards"]) == ("no solution", "none", 0)
    assert record["grid"] == NO_SOLUTION


def test_a_search_that_takes_too_long_is_cut_off_and_the_model_runs(capsys, model, monkeypatch):
    monkeypatch.setattr(cli_sudoku, "MAX_VISITS", 3)
    status, out, err = run(capsys, PUZZLE, "--model", model, "--num-inference-steps", "5", "--json")
    record = json.loads(out)
    assert (status, err, record["solutions"], record["forwards"]) == (1, "", "unknown", 5)
    _, out, _ = run(capsys, PUZZLE, "--model", model, "--num-inference-steps", "5")
    assert "unknown" in out
    hopeless = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    assert sudoku.count_solutions(sudoku.parse_puzzle(hopeless), max_visits=2000) is None


def test_several_solutions_are_said_and_a_grid_that_is_one_of_them_counts(capsys, knowing):
    puzzle = "." * 9 + SOLUTION[9:54] + "." * 27
    status, out, _ = run(capsys, puzzle, "--json")
    record = json.loads(out)
    assert (status, record["solutions"], record["verdict"], record["grid"]) == (0, "several", "solved", SOLUTION)


def test_several_solutions_and_a_grid_that_is_none_of_them(capsys, model):
    status, out, _ = run(capsys, "." * 81, "--model", model, "--json", "--num-inference-steps", "5")
    assert status == 1 and json.loads(out)["solutions"] == "several" and json.loads(out)["verdict"] == "not solved"


def test_a_complete_grid_needs_no_forward(capsys, model):
    status, out, _ = run(capsys, SOLUTION, "--model", model, "--json")
    assert status == 0 and json.loads(out)["forwards"] == 0


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (cli_sudoku.Outcome(sudoku.parse_puzzle(PUZZLE), sudoku.solve(sudoku.parse_puzzle(PUZZLE)), 1), "Solved"),
        (cli_sudoku.Outcome(sudoku.parse_puzzle(PUZZLE), sudoku.solve(sudoku.parse_puzzle(PUZZLE)), 2), "one of them"),
        (cli_sudoku.Outcome(sudoku.parse_puzzle("." * 81), [1] * 81, 2), "none of them: 810 pairs"),
        (cli_sudoku.Outcome(sudoku.parse_puzzle("." * 81), [1] * 81, 1), "Not solved: 810 pairs"),
        (cli_sudoku.Outcome(sudoku.parse_puzzle(NO_SOLUTION), sudoku.parse_puzzle(NO_SOLUTION), 0), "no solution"),
    ],
)
def test_people_are_told_what_was_found(outcome, words):
    assert words in outcome.sentence()


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_one_row_a_puzzle_in_order(capsys, knowing, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text(f"{PUZZLE}\n{NO_SOLUTION}\n{SOLUTION[:40]}{'.' * 41}\n{SOLUTION}\n")
    status, out, err = run(capsys, path, "--num-inference-steps", "4")
    header, *rows = [line.split("\t") for line in out.splitlines()]
    records = [dict(zip(header, row, strict=True)) for row in rows]
    assert status == 1 and "3 of 4 solved" in err  # one puzzle has no solution
    assert [record["verdict"] for record in records] == ["solved", "no solution", "solved", "solved"]
    assert [record["forwards"] for record in records] == ["4", "0", "4", "0"]
    status, out, _ = run(capsys, path, "--num-inference-steps", "4", "--json")
    told = json.loads(out)
    assert (told["solved"], told["n"], len(told["puzzles"])) == (3, 4, 4)
    assert [str(record["grid"]) for record in told["puzzles"]] == [record["grid"] for record in records]


def test_a_puzzle_runs_the_same_in_a_file_as_alone(capsys, model, tmp_path):
    puzzles = [sudoku.format_grid(puzzle) for puzzle in sudoku.make_puzzles(3, clues=40, seed=1)[0]]
    path = tmp_path / "many.txt"
    path.write_text("\n".join(puzzles))
    many = json.loads(run(capsys, path, "--model", model, "--json", "--num-inference-steps", "9")[1])["puzzles"]
    alone = json.loads(run(capsys, puzzles[1], "--model", model, "--json", "--num-inference-steps", "9")[1])
    assert (many[1]["grid"], many[1]["remasked"]) == (alone["grid"], alone["remasked"])


# --- the page and the view --------------------------------------------------------------------------------------------


def test_the_page_is_written_and_needs_nothing_else(capsys, knowing, tmp_path):
    page = tmp_path / "run.html"
    status, out, _ = run(capsys, PUZZLE, "--num-inference-steps", "5", "--html", page, "--json")
    text = page.read_text(encoding="utf-8")
    assert status == 0 and json.loads(out)["verdict"] == "solved"
    assert "<html" in text and "http://" not in text and "https://" not in text and "src=" not in text


def test_kinds_of_cells_follow_from_the_two_states():
    generated = [i >= 2 for i in range(81)]
    before = [5, 6, sudoku.MASK_ID, 1, 2, 3, sudoku.MASK_ID] + [4] * 74
    after = [5, 6, 7, 1, 2, sudoku.MASK_ID, sudoku.MASK_ID] + [4] * 74
    quality = [0.0, 0.0, 0.0, 0.9, 0.1, 0.05, 0.0] + [1.0] * 74  # low values at clues and masks mean nothing
    remasked = [i == 5 for i in range(81)]
    kinds = token_states.token_states(before, after, generated, sudoku.MASK_ID, quality, remasked)
    assert kinds[:8] == ["given", "given", "written", "kept", "doubtful", "remasked", "mask", "kept"]


def test_every_kind_has_its_own_mark_and_colour_and_stands_in_the_legend():
    marks, words, styles = (
        {getattr(s, name) for s in token_states.STATES.values()} for name in ("mark", "words", "style")
    )
    assert len(marks) == len(words) == len(styles) == len(token_states.STATES)
    assert all(word in live_view.legend(token_states.STATES).plain for word in words)


def test_board_shows_each_digit_once_at_its_place():
    kinds = ["given" if mark != "." else "mask" for mark in PUZZLE]
    text = live_view.board(sudoku.parse_puzzle(PUZZLE), kinds).plain
    assert len(text.splitlines()) == 11
    cells = [mark for line in text.splitlines() if "─" not in line for mark in line.replace("│", "").split()]
    assert "".join(cells).replace("_", ".") == PUZZLE


def test_the_live_view_ends_with_the_verdict_and_survives_a_terminal_without_colours(knowing, monkeypatch):
    for encoding, color in (("utf-8", "truecolor"), ("ascii", None)):
        raw = io.BytesIO()
        screen = io.TextIOWrapper(raw, encoding=encoding)
        console = Console(file=screen, force_terminal=True, color_system=color, width=100, highlight=False)
        args = _args(PUZZLE, "--num-inference-steps", "6", "--delay", "0")
        assert cli_sudoku._run_one(knowing, sudoku.parse_puzzle(PUZZLE)[None], args, console) == 0
        screen.flush()
        shown = raw.getvalue().decode(encoding)
        assert "step 6/6" in shown and "51/51 cells" in shown and "legend" in shown and "Solved" in shown
        assert ("×" in shown) == (encoding == "utf-8")
        assert ("\x1b[1;32m" in shown) == (color is not None)


def _args(*argv):
    parser = argparse.ArgumentParser()
    cli_sudoku.add_parser(parser.add_subparsers())
    return parser.parse_args(["sudoku", *argv])


# --- the model that ships: these run once it is in the package --------------------------------------------------------


def test_the_demo_solves_its_puzzle_and_corrects_itself_on_the_way(capsys):
    status, out, _ = run(capsys, "--json")
    record = json.loads(out)
    assert status == 0 and record["verdict"] == "solved" and record["remasked"] > 0


def test_train_prints_and_runs_the_command(monkeypatch, capsys):
    from prism_pipelines.cli import train

    ran = []
    monkeypatch.setattr(
        train.subprocess, "run", lambda words, check: ran.append(words) or subprocess.CompletedProcess([], 3)
    )
    assert main(["train", "--num_processes", "2", "--", "--dataset", "sudoku", "--head", "mlp"]) == 3
    line = "accelerate launch --quiet --num_processes 2 -m prism_pipelines.training --dataset sudoku --head mlp"
    assert capsys.readouterr().err.strip() == line
    here = [sys.executable, "-m", "prism_pipelines.cli.launch", "--quiet"]  # not another environment's on PATH
    assert ran == [here + line.split()[3:]]
    main(["train", "--dataset", "sudoku", "--output-dir", "my run"])
    assert ran[1] == [*here, "-m", "prism_pipelines.training", "--dataset", "sudoku", "--output-dir", "my run"]
    assert "--output-dir 'my run'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_refused_training_is_told_in_one_line():
    words = [
        "train",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    words += ["--", "--objective", "prism", "--dataset", "sudoku"]
    done = subprocess.run(
        [sys.executable, "-m", "prism_pipelines", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_train_reaches_the_training_command():
    done = subprocess.run(
        [sys.executable, "-m", "prism_pipelines", "train", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--objective" in done.stdout
