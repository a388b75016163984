"""The app of examples/space in a real browser: typed in, clicked, and what it shows."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import Browser, need_chromium

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "examples" / "space" / "app.py"
RUNNING = "[...document.querySelectorAll('button')].find(b => b.offsetParent && b.textContent.trim() === 'Run both')"


@pytest.fixture(scope="module")
def address():
    """The app, started as its README says."""
    pytest.importorskip("gradio", reason='needs the app extra: pip install "prism-pipelines[app]"')
    need_chromium()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(APP), "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(3000):  # minutes, on a machine that does much else
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        else:
            pytest.fail("the app did not answer in five minutes")
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_for(tab: Browser, expression: str, seconds: float = 300):
    """The value of an expression of the page, once it is true."""
    end = time.monotonic() + seconds
    while not (value := tab.js(expression)):
        assert time.monotonic() < end, tab.js("document.body.innerText")
        time.sleep(0.1)
    return value


def type_into(tab: Browser, label: str, text: str) -> None:
    """Put a text into the visible field of a label, as a user would."""
    tab.js(
        f"(() => {{ const of = l => l.offsetParent && l.textContent.trim().startsWith({label!r});"
        f"const field = [...document.querySelectorAll('label')].find(of).querySelector('textarea, input');"
        f"field.focus(); field.select(); }})()"
    )
    tab.call("Input.insertText", text=text)


def test_a_sudoku_is_solved_by_two_rules_side_by_side(address):
    with Browser(1300, 1000) as tab:
        tab.open(address)
        wait_for(tab, RUNNING + " !== undefined")
        type_into(tab, "Puzzle", "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79")
        tab.js(RUNNING + ".click()")
        wait_for(tab, "document.querySelectorAll('iframe').length === 2")
        said = tab.js("document.body.innerText")
        assert "no remasking, surest first: 53 forward passes" in said and "judge and repair: " in said
        assert "P(all right)" in said and "accepted" in said and "solved" in said
        assert "quality of the result: mean" in said
        assert tab.in_frames("document.querySelector('#at').textContent") == ["result", "result"]
        assert all(n == 81 for n in tab.in_frames("document.querySelectorAll('#tokens .t').length"))
        if folder := os.environ.get("SCREENSHOTS"):
            tab.screenshot(Path(folder) / "space.png")


def test_what_is_wrong_is_said_on_the_page(address):
    with Browser(1300, 1000) as tab:
        tab.open(address)
        wait_for(tab, RUNNING + " !== undefined")
        type_into(tab, "Puzzle", "55" + "." * 79)
        tab.js(RUNNING + ".click()")
        wait_for(tab, "document.body.innerText.includes('puzzle contradicts itself: two 5s see each other')")


def test_a_model_without_a_head_fills_a_text_and_says_which_rules_need_one(tmp_path):
    pytest.importorskip("gradio", reason='needs the app extra: pip install "prism-pipelines[app]"')
    spec = importlib.util.spec_from_file_location("space_app", APP)
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    import prism_pipelines
    from prism_pipelines import PrismPipeline

    pipe = PrismPipeline.from_pretrained(prism_pipelines.bundled("text"))
    pipe.unload_quality_head()
    pipe.scheduler = prism_pipelines.MDLMScheduler()
    pipe.save_pretrained(tmp_path / "model")
    both = app.side_by_side(lambda model, head, text: app.pipeline(model, head), app.infill_of)
    given = (str(tmp_path / "model"), "", "To be, or ______ to be", "self-confidence", "PRISM")
    *live, _, shown = both(*given, 4, 0.5, 1, 0)
    assert live and all("self-confidence**: step" in step[0] and step[1].count("<span") == 18 for step in live)
    assert "self-confidence" in shown[0] and "sandbox" in shown[1]
    assert "needs a quality head" in shown[2] and shown[3] == ""
    import gradio

    with pytest.raises(gradio.Error, match="There is nothing to fill"):
        next(both(str(tmp_path / "model"), "", "To be", "self-confidence", "PRISM", 4, 0.5, 1, 0))
