"""A real headless Chromium, driven over its debugging pipe with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def need_chromium() -> str:
    """Path of Chromium; skips the test where there is none."""
    path = os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set CHROMIUM to its path")
    return path


class Browser:
    """One tab. Use as a context; `errors` collects exceptions, console errors and refused requests of all its pages.

    Args:
        width, height: of the window, CSS pixels.
        dark: the reader prefers dark pages.
        mobile: a phone: touch, and the page's own idea of its width.
    """

    def __init__(self, width: int = 1100, height: int = 900, dark: bool = False, mobile: bool = False):
        self.executable = need_chromium()
        self.size, self.dark, self.mobile = (width, height), dark, mobile
        self.errors: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        command = [self.executable, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--disable-features=IsolateSandboxedIframes"]  # frames answer like the page itself
        command += ["--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars", "about:blank"]
        command += [f"--user-data-dir={self._folder.name}", "--disable-background-networking"]

        def at_3_and_4():  # where Chromium expects its pipe
            keep_read, keep_write = os.dup(read_end), os.dup(write_end)
            os.dup2(keep_read, 3)
            os.dup2(keep_write, 4)

        with open(os.devnull, "wb") as nowhere:
            self._process = subprocess.Popen(
                command, stdout=nowhere, stderr=nowhere, preexec_fn=at_3_and_4, close_fds=False
            )
        os.close(read_end)
        os.close(write_end)
        self._watch = threading.Timer(120, self._process.kill)  # a browser that hangs fails the test, and not the run
        self._watch.daemon = True
        self._watch.start()
        self._number, self._buffer, self._session, self._loaded = 0, b"", None, False
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = self.size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=self.mobile
        )
        scheme = "dark" if self.dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return self

    def __exit__(self, *error) -> None:
        self._watch.cancel()
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._folder.cleanup()

    def call(self, method: str, **params) -> dict:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("Chromium has gone.")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(text)
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True
        return event

    def open(self, address: str | Path) -> None:
        """Go to a page, and wait until it has loaded."""
        self._loaded = False
        self.call("Page.navigate", url=address.resolve().as_uri() if isinstance(address, Path) else address)
        while not self._loaded:
            self._receive()

    def js(self, expression: str):
        """The JSON value of an expression in the page; a promise is awaited."""
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in out:
            raise RuntimeError(out["exceptionDetails"]["exception"].get("description"))
        return out["result"].get("value")

    def in_frames(self, expression: str) -> list:
        """The JSON value of an expression in each frame of the page, but the page itself."""
        tree, found = self.call("Page.getFrameTree")["frameTree"], []
        for child in tree.get("childFrames", ()):
            world = self.call("Page.createIsolatedWorld", frameId=child["frame"]["id"])["executionContextId"]
            out = self.call("Runtime.evaluate", expression=expression, contextId=world, returnByValue=True)
            found.append(out["result"].get("value"))
        return found

    def key(self, key: str, shift: bool = False) -> None:
        """Press a key, as `KeyboardEvent.key` names it."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38}
        codes |= {"ArrowRight": 39, "ArrowDown": 40}
        known = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper())), "modifiers": 8 * shift}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def move(self, selector: str) -> None:
        """Move the mouse onto an element."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Click an element with the mouse."""
        x, y = self._middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _middle(self, selector: str) -> tuple[float, float]:
        found = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.left + r.width / 2, r.top + r.height / 2] }})(document.querySelector({json.dumps(selector)}))"
        )
        return found[0], found[1]

    def screenshot(self, path: str | Path, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as PNG."""
        out = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(out["data"]))
