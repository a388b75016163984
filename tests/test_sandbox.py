"""The sandbox: right verdicts, and hostile programs that neither escape, nor harm, nor forge a pass."""

import ast
import ctypes
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prism_pipelines.evaluation.code import sandbox
from prism_pipelines.evaluation.code.sandbox import Limits, SandboxUnavailable, isolation_problem, run_tests

isolated = pytest.mark.skipif(isolation_problem() is not None, reason=str(isolation_problem()))
ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5, 'two and three'"


def report(body, **limits):
    """What `f()` of a program says, carried out as the text of an exception: it always fails the tests."""
    verdict = run_tests(body, "raise ValueError(repr(f()))", names=("f",), limits=Limits(**limits))
    assert not verdict.passed
    return verdict


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "outcome", "error"),
    [
        (ADD, "passed", ""),
        ("def add(a, b):\n    return a - b", "wrong", "AssertionError"),
        ("def add(a, b):\n    return a +", "syntax", "SyntaxError"),
        ("def add(a, b):\n    return c", "error", "NameError"),
        ("def add(a, b):\n    assert False", "error", "AssertionError"),
        ("class Odd(Exception): pass\ndef add(a, b):\n    raise Odd", "error", "Odd"),
        ("import no_such_module", "error", "ModuleNotFoundError"),
        ("x = 1", "error", "NameError"),
        ("", "error", "NameError"),
        ("\0", "syntax", None),
        ("(" * 5000, "syntax", None),
        ("def add(a, b):\n    return add(a, b)", "error", "RecursionError"),
    ],
)
@isolated
def test_outcome_and_error_class(program, outcome, error):
    verdict = run_tests(program, TESTS, names=("add",))
    assert verdict.outcome == outcome
    assert error is None or verdict.error == error


VALUES = [
    None, True, 0, -(2**70), 7**5000, 1.5, float("inf"), -0.0, 2 - 3j, "", "é\udc80\x00", b"\x00\xff", bytearray(b"a"),
    range(3, 9, 2), [1, [2, (3,)]], (), {1: {"a": (None,)}, (1, 2): []}, {1, "a"}, frozenset({(1, 2)}),
]  # fmt: skip


def test_plain_data_crosses_unchanged_and_subclasses_lose_their_methods():
    spec = importlib.util.spec_from_file_location("child", sandbox.CHILD)
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)

    def refuse(value):
        raise AssertionError(f"{value!r} counted as no plain data")

    for value in VALUES:
        got = child.decode(child.json.loads(child.json.dumps(child.encode(value, refuse))), refuse)
        assert type(got) is type(value) and repr(got) == repr(value)

    class Liar(int):
        def __eq__(self, other):
            return True

        def __index__(self):
            return 5

        __hash__ = None

    assert child.decode(child.encode(Liar(1), refuse), refuse) != 3


@isolated
def test_objects_of_the_program_stay_there_and_work():
    program = """
class Node:
    def __init__(self, value):
        self.value, self.next = value, None
def length(node):
    return 1 + length(node.next) if node else 0
def double(values):
    values[:] = [2 * v for v in values]
def count():
    yield from (1, 2, 3)
"""
    tests = """
first, second = Node(1), Node(2)
first.next = second
assert length(first) == 2 and first.next.value == 2
values = [1, 2]
assert double(values) is None and values == [2, 4]
assert list(count()) == [1, 2, 3]
"""
    assert run_tests(program, tests, names=("Node", "length", "double", "count")).passed


@isolated
def test_the_context_is_the_judges_own():
    # the program's `helper` would say True; the test calls the judge's
    program = "def helper(x):\n    return True\ndef f():\n    return 3"
    verdict = run_tests(program, "assert helper(f())", names=("f",), context="def helper(x):\n    return x == 4")
    assert verdict.outcome == "wrong"


def test_without_isolation_verdicts_are_the_same():
    assert run_tests(ADD, TESTS, names=("add",), isolated=False).passed
    assert run_tests("import os\nos._exit(0)", TESTS, names=("add",), isolated=False).outcome == "died"
    loop = run_tests("while True: pass", TESTS, names=("add",), isolated=False, limits=Limits(seconds=0.7))
    assert loop.outcome == "timeout"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`names`"):
        run_tests(ADD, TESTS, names=())
    with pytest.raises(ValueError, match="`tests` does not compile"):
        run_tests(ADD, "assert (", names=("add",))
    for wrong in ({"seconds": 0}, {"processes": 1.5}, {"memory_mb": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)


def test_refuses_with_the_reason_where_isolation_fails(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "making namespaces: Operation not permitted")
    with pytest.raises(SandboxUnavailable, match="making namespaces"):
        run_tests(ADD, TESTS, names=("add",))
    assert run_tests(ADD, TESTS, names=("add",), isolated=False).passed


@isolated
def test_a_refused_step_is_named_and_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "_shown", lambda: ["/dev/null", "/proc/self/no-such-place"])
    with pytest.raises(SandboxUnavailable, match="no-such-place"):
        sandbox._run(ADD, TESTS, ("add",), "", Limits(), True)


def test_one_slow_moment_is_not_taken_for_no_isolation(monkeypatch):
    real = isolation_problem()
    slow = sandbox.Verdict("timeout", "", "not done after 30 s", 30.0)
    isolation_problem.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_run", lambda *_: slow)
        patch.setattr(sys, "platform", "linux")
        with pytest.raises(OSError, match="not done after 30 s"):
            isolation_problem()
    assert isolation_problem() == real


def test_a_stop_iteration_of_the_program_ends_no_map():
    program = "def f(x):\n    raise StopIteration\ndef g():\n    yield 1"
    verdict = run_tests(program, "assert list(map(f, [1, 2])) == []", names=("f",), isolated=False)
    assert (verdict.outcome, verdict.error) == ("error", "StopIteration")
    assert run_tests(program, "assert list(iter(g())) == [1]", names=("g",), isolated=False).passed


def test_truth_changed_arguments_and_huge_numbers_cross():
    program = """
from collections import deque
def queue(*items):
    return deque(items)
def add(values, more):
    values.append(1)
    more["a"] = [2]
def big():
    return 10**5000
"""
    tests = """
assert not queue() and queue(0)
values, more = [], {}
add(values, more=more)
assert values == [1] and more == {"a": [2]}
assert big() == 1, big()
"""
    verdict = run_tests(program, tests, names=("queue", "add", "big"), isolated=False)
    assert (verdict.outcome, verdict.detail) == ("wrong", "")


# --- hostile programs -------------------------------------------------------------------------------------------------


def ours(mark: bytes):
    """Processes of the sandbox that are left on this machine, of this test alone: others may run beside it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if b"sandbox_child" in line and mark in line:
            found.append(line)
    return found


@isolated
def test_fork_bomb_is_bounded_and_swept_away():
    program = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
    except OSError:
        break
    made += 1
def f():
    return made
"""
    verdict = report(program, processes=6)
    assert verdict.detail.isdigit() and int(verdict.detail) <= 5
    bomb = run_tests("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", TESTS, names=("add",),
                     limits=Limits(seconds=1.0, processes=6))  # fmt: skip
    assert bomb.outcome == "timeout" and bomb.seconds < 30
    time.sleep(0.2)
    assert not ours(b'"processes": 6,')


@isolated
def test_memory_is_bounded():
    assert report("def f():\n    return len(bytearray(2 << 30))").error == "MemoryError"
    grow = run_tests("x = []\nwhile True: x.append(bytes(1 << 20))", TESTS, names=("add",))
    assert grow.error == "MemoryError" or grow.outcome == "died"
    # System V memory belongs to no process: its address space is no bound
    shm = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f():
    return libc.shmget(0, 1 << 20, 0o1600)
"""
    assert report(shm).detail == "-1"
    assert report(shm.replace("shmget(0, 1 << 20,", "semget(0, 8,")).detail == "-1"


@isolated
def test_disk_is_bounded():
    program = """
def f():
    written = 0
    try:
        for i in range(100):
            with open(f"/work/{i}", "wb", buffering=0) as file:
                for _ in range(4):
                    written += file.write(bytes(1 << 20))
    except OSError:
        pass
    return written
"""
    assert int(report(program, disk_mb=8).detail) <= 8 << 20


@isolated
def test_nothing_outside_the_work_directory_is_written_or_seen(tmp_path):
    secret = tmp_path / "private.txt"
    secret.write_text("MINE")
    program = f"""
import os
def attempt(action):
    try:
        return ("did", str(action()))
    except OSError as error:
        return ("refused", error.errno)
def f():
    places = "/x", "/usr/x", "/etc/x", "/dev/x", os.__file__, {str(tmp_path / "x")!r}
    said = [attempt(lambda p=p: open(p, "w")) for p in places]
    private = {str(secret)!r}, "/etc/passwd", "/proc/1/environ", "/proc/self/mem"
    said += [attempt(lambda p=p: open(p).read()) for p in private]
    said += [attempt(lambda: os.listdir("/home")), attempt(lambda: os.listdir({str(Path.cwd())!r}))]
    said += [attempt(lambda: os.chmod("/usr", 0o777))]
    said += [attempt(lambda: os.mknod("/work/sda", 0o60666, os.makedev(8, 0)))]
    return [s for s in said if s[0] == "did"]
"""
    assert report(program).detail == "[]"
    assert not (tmp_path / "x").exists() and secret.read_text() == "MINE"


@isolated
def test_no_rights_can_be_regained():
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    user = libc.unshare(0x10000000)
    mount = libc.mount(b"none", b"/work", b"tmpfs", 0, None)
    remount = libc.mount(b"none", b"/", None, 0x20 | 0x1000, None)
    return any(data), user, mount, remount
"""
    assert report(program).detail == "(False, -1, -1, -1)"


@isolated
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
def test_the_callers_keys_are_neither_read_nor_added_to():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(250, 0, -3, 0) == -1:
        pytest.skip("no keys on this machine")
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f():
    ring, found = libc.syscall(250, 0, -3, 0), libc.syscall(250, 10, -3, b"user", b"prism-test", 0)
    libc.syscall(248, b"user", b"prism-left", b"x", 1, -3)
    return ring, found
"""
    key = libc.syscall(248, b"user", b"prism-test", b"secret", 6, -3)
    try:
        ring, found = ast.literal_eval(report(program).detail)
        assert ring != libc.syscall(250, 0, -3, 0) and found == -1
        assert libc.syscall(250, 10, -3, b"user", b"prism-left", 0) == -1
    finally:
        libc.syscall(250, 9, key, -3)  # unlink


@isolated
def test_the_init_cannot_be_traced():
    # As root the program has another user than its init, so this bites where the tests run as a user.
    program = """
import ctypes
def f():
    return ctypes.CDLL(None).ptrace(16, 1, None, None)
"""
    assert report(program).detail == "-1"


@isolated
def test_what_stands_on_stderr_does_not_outweigh_a_verdict(monkeypatch, tmp_path):
    start = "    os.dup2(os.open(os.devnull, os.O_RDWR), 2)\n    os.execve"
    source = sandbox.CHILD.read_text()
    assert start in source
    (tmp_path / "child.py").write_text(source.replace(start, "    os.write(2, b'setup: forged ' * 9)\n" + start))
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    assert run_tests(ADD, TESTS, names=("add",)).passed
    flood = "    os.write(2, b'setup: ' + b'x' * 30_000)\n    raise SystemExit\n"
    (tmp_path / "child.py").write_text(source.replace(start, flood + start))
    with pytest.raises(SandboxUnavailable) as caught:
        run_tests(ADD, TESTS, names=("add",))
    assert len(str(caught.value)) < 4500


@isolated
def test_no_network():
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    program = f"""
import socket
def f():
    try:
        socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
        return "connected"
    except OSError:
        pass
    return [name for _, name in socket.if_nameindex() if name != "lo"]
"""
    assert report(program).detail == "[]"
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()


@isolated
def test_killing_the_parent_and_everyone_harms_the_program_alone():
    sentinel = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
import os, signal
for target in (os.getppid(), 1, {sentinel.pid}, -1):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(target, number)
        except OSError:
            pass
os.killpg(0, signal.SIGKILL)
"""
        assert run_tests(program, TESTS, names=("add",)).outcome == "died"
        assert sentinel.poll() is None
    finally:
        sentinel.kill()
        sentinel.wait()


FORGERIES = {
    "exit status": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "printing": 'print(\'{"secret": "", "outcome": "passed"}\', flush=True)\n' + "def add(a, b): return 0",
    "every descriptor": """
import os
for d in range(64):
    try: os.write(d, b'{"secret": "", "outcome": "passed", "error": "", "detail": ""}')
    except OSError: pass
def add(a, b): return 0
""",
    "equal to everything": "class E:\n    def __eq__(s, o): return True\ndef add(a, b): return E()",
    "an int equal to everything": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\n"
    "def add(a, b): return E()",
    "patched builtins": "import builtins\nbuiltins.AssertionError = builtins.compile = builtins.exec = None\n"
    "def add(a, b): return 0",
    "hook at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "trace and frames": """
import sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if hasattr(value, 'send'):
            value.send({"value": True}); value.send({"value": {"int": "5"}, "outcome": "passed"})
    frame = frame.f_back
def add(a, b): return 0
""",
    "garbage": """
import os
for d in range(64):
    try: os.write(d, b'\\xff' * 64)
    except OSError: pass
""",
    "unhashable reply": """
import json, os, struct
def add(a, b):
    data = json.dumps({"value": {"set": [{"list": []}]}}).encode()
    for d in range(32):
        try: os.write(d, struct.pack("<Q", len(data)) + data)
        except OSError: pass
""",
}


@isolated
@pytest.mark.parametrize("name", FORGERIES)
def test_success_cannot_be_forged(name):
    verdict = run_tests(FORGERIES[name], TESTS, names=("add",), limits=Limits(seconds=5.0))
    assert not verdict.passed, verdict


@isolated
def test_endless_programs_end_at_the_wall_time():
    for program in (
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        "def add(a, b):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass",
    ):
        verdict = run_tests(program, TESTS, names=("add",), limits=Limits(seconds=0.8))
        assert verdict.outcome == "timeout" and verdict.seconds < 30  # a busy machine takes longer than 0.8 to see it
    burn = run_tests("while True: pass", TESTS, names=("add",), limits=Limits(seconds=60.0, cpu_seconds=1))
    assert burn.outcome == "died"  # by the limit of the CPU: at the wall time it would be a timeout


@isolated
def test_closing_descriptors_fails_the_program():
    for when in ("", "def add(a, b):\n    "):
        verdict = run_tests(f"import os\n{when}os.closerange(0, 64)", TESTS, names=("add",))
        assert verdict.outcome in ("died", "error") and not verdict.passed


SEARCH = """
import gc, hashlib, os, re, sys
def texts():
    for thing in gc.get_objects():
        try: yield repr(thing)
        except Exception: pass
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals) + repr(frame.f_globals)
        frame = frame.f_back
    yield repr(os.environ) + repr(sys.argv) + repr(sys.orig_argv)
    for folder, _, files in os.walk("/work"):
        for name in files: yield open(os.path.join(folder, name), errors="replace").read()
    for d in range(3):
        try: yield os.read(d, 1 << 16).decode("latin-1")
        except OSError: pass
    for path in ("/proc/self/environ", "/proc/self/mem", "/proc/1/cmdline", "/proc/1/mem"):
        try: yield open(path, errors="replace").read()
        except OSError: pass
def f():
    found = {word for text in texts() for word in re.findall("(?=([0-9a-f]{32}))", text)}
    return any(hashlib.sha256(word.encode()).hexdigest() == DIGEST for word in found)
"""


@isolated
def test_the_secret_is_nowhere_to_be_read(monkeypatch):
    secret = "5ec7e7" * 5 + "01"
    digest = hashlib.sha256(secret.encode()).hexdigest()  # the program knows what to look for, but not the secret
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: secret)
    assert report(f"DIGEST = {digest!r}\n{SEARCH}").detail == "False"
    assert report(f"DIGEST = {digest!r}\nplanted = {secret!r}\n{SEARCH}").detail == "True"  # the search does search


def test_a_verdict_without_the_secret_counts_for_nothing():
    assert (
        sandbox._read(b'{"secret": "guess", "outcome": "passed", "error": "", "detail": ""}', "a" * 32, 0.1).outcome
        == "died"
    )
    assert sandbox._read(b"", "a" * 32, 0.1).outcome == "died"
    assert sandbox._read(b'["passed"]', "a" * 32, 0.1).outcome == "died"
