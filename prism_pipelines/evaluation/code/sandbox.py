"""Run an untrusted Python program against tests, isolated, with a verdict that the program cannot forge.

Two fresh interpreters (`python -I`), each in a sandbox of its own. The *program* side holds the untrusted program. The
*judge* side holds the tests and a secret made for this run; it calls the program over a socket by a data-only encoding
and writes the verdict, with the secret, to a pipe that the program never had. Exit statuses and what the program prints
decide nothing. Objects that are no plain data stay with the program, and equal nothing: an object whose `__eq__` always
says True fails the test that an in-process harness would let it pass.

A sandbox is Linux namespaces (user, mount, network, IPC, host name, process): no network, a read-only file system that
shows the interpreter and its libraries alone, a small tmpfs for work, an unprivileged user without capabilities, and
limits on CPU, memory, processes and files. The kernel ends every process of it with its init. Not a virtual machine: a
flaw of the kernel would be a way out.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ...schedulers.validation import is_int, is_number, require

CHILD = Path(__file__).with_name("sandbox_child.py")
CHANNEL = 3  # as in sandbox_child.py
SILENT = "the judge gave no verdict"
UNCOMPILED = "the program's process ended during its syntax"  # what sandbox_child.py says before the program compiles


class SandboxUnavailable(RuntimeError):
    """This machine does not allow the isolation asked for; the message says which step failed."""


@dataclass(frozen=True)
class Limits:
    """What one run may use; each side of a run has its own allowance.

    Args:
        seconds: wall time of the whole run, set-up included; then all its processes are killed.
        cpu_seconds: CPU time of each process, whole seconds.
        memory_mb: address space of each process, MiB.
        processes: processes and threads at a time. Not applied without isolation.
        disk_mb: size of the work directory, and of any one file, MiB.
        files: open descriptors of each process; each may be a file in memory of `disk_mb`. So all together may hold
            `processes * (memory_mb + files * disk_mb)` MiB.
    Raises:
        ValueError: a limit that is not positive, or a count that is no whole number.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    processes: int = 8
    disk_mb: int = 16
    files: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "seconds":
                require(is_number(value, 0) and value > 0, name, value, "a positive number")
            else:
                require(is_int(value, 1), name, value, "a positive whole number")


@dataclass(frozen=True)
class Verdict:
    """The result of running one program.

    Args:
        outcome: "passed"; "wrong" (a test's assertion failed); "error" (an exception, see `error`); "syntax" (it does
            not compile); "timeout"; "died" (its process ended before the tests did, killed or by its own doing).
        error: name of the exception, or "".
        detail: text of the exception, at most 2,000 characters. The program may have written it: show it, do not use
            it for decisions.
        seconds: wall time.
    """

    outcome: str
    error: str
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Did it pass?"""
        return self.outcome == "passed"


def run_tests(
    program: str,
    tests: str,
    *,
    names: tuple[str, ...],
    context: str = "",
    limits: Limits | None = None,
    isolated: bool = True,
) -> Verdict:
    """Execute `program` and judge it by `tests`.

    Args:
        program: Python source, untrusted.
        tests: Python source, trusted, run by the judge. It passes if it ends without an exception. It may use `names`;
            what it passes to the program must be plain data (None, bool, numbers, str, bytes, range, list, tuple, set,
            dict) or objects it got from the program. Lists, dicts and sets that a call changes are changed for the
            tests too.
        names: functions or classes of the program that the tests may use.
        context: Python source, trusted, which the judge runs before it takes `names` from the program: helpers of the
            tests, which then are not the program's.
        limits: default `Limits()`.
        isolated: False runs both sides with limits and own interpreters, but without namespaces: that contains
            accidents, not malice. The program can then read and write what you can, use the network, and leave
            processes behind.
    Raises:
        SandboxUnavailable: `isolated` and the machine does not allow it.
        ValueError: `names` is empty, or `context` or `tests` does not compile.
    """
    limits = limits or Limits()
    if not names or isinstance(names, str):
        raise ValueError(f"`names` must name what the tests use of the program, as a tuple; got {names!r}.")
    for argument, source in (("context", context), ("tests", tests)):
        try:
            compile(source, f"<{argument}>", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"`{argument}` does not compile: {error}.") from error
    if isolated and (problem := isolation_problem()):
        raise SandboxUnavailable(problem)
    return _run(program, tests, tuple(names), context, limits, isolated)


@functools.cache
def isolation_problem() -> str | None:
    """Why programs cannot be isolated on this machine, or None if they can. It is tried once per process.

    Raises:
        OSError: isolation was set up, but a trivial program did not pass. The next call tries again.
    """
    if not sys.platform.startswith("linux"):
        return f"Isolation needs Linux namespaces; this is {sys.platform}."
    try:
        verdict = _run("def f():\n    return 1", "assert f() == 1", ("f",), "", Limits(seconds=30.0), True)
    except SandboxUnavailable as error:
        return str(error)
    if not verdict.passed:
        raise OSError(
            f"Whether programs can be isolated here is not known: a trivial one did not pass ({verdict.outcome}, "
            f"{verdict.detail!r}). Is the machine very busy? Try again."
        )
    return None


def _run(program: str, tests: str, names: tuple[str, ...], context: str, limits: Limits, isolated: bool) -> Verdict:
    secret = secrets.token_hex(16)
    job = json.dumps({"secret": secret, "tests": tests, "names": names, "context": context}).encode()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prism-sandbox-", ignore_cleanup_errors=True) as root:
        sides = []
        near, far = socket.socketpair()
        complaints, complain = os.pipe()
        try:
            for role, channel in (("program", near), ("judge", far)):
                place = os.path.join(root, role)
                os.mkdir(place)
                sides.append(_start(role, place, channel, complain, limits, isolated))
            near.close()
            far.close()
            worker, judge = sides
            feed = threading.Thread(target=worker.communicate, args=(program.encode("utf-8", "surrogatepass"),))
            feed.start()
            try:
                output = judge.communicate(job, timeout=limits.seconds)[0]
            except subprocess.TimeoutExpired:
                output = None
        finally:
            near.close()
            far.close()
            for side in sides:
                _kill(side)
            os.close(complain)
            complaint = _complaint(complaints)
        feed.join()
    seconds = time.monotonic() - began
    if output is None:
        verdict = Verdict("timeout", "", f"not done after {limits.seconds:g} s", seconds)
    else:
        verdict = _read(output, secret, seconds)
    # Once the judge has heard that the program compiles, both sides were set up, whatever is written there.
    unheard = verdict.outcome == "died" and verdict.detail in (SILENT, UNCOMPILED)
    if (unheard or verdict.outcome == "timeout") and complaint.startswith("setup: "):
        raise SandboxUnavailable(
            f"Programs cannot be isolated here ({complaint[7:].strip()}). Isolation needs Linux 5.14 or later with "
            "user namespaces allowed; containers often forbid them."
        )
    return verdict


def _complaint(pipe: int) -> str:
    """The first line that a side wrote to stderr, at most 4 kB of it; closes the pipe."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 4096).decode(errors="replace").partition("\n")[0]
    except BlockingIOError:
        return ""
    finally:
        os.close(pipe)


def _start(
    role: str, place: str, channel: socket.socket, complain: int, limits: Limits, isolated: bool
) -> subprocess.Popen:
    """One side, in a process group of its own, with the channel as descriptor 3 and a pipe for complaints as stderr."""
    settings = {
        "isolated": isolated,
        "code": CHILD.read_text(),
        "shown": _shown(),
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_mb << 20,
        "disk_bytes": limits.disk_mb << 20,
        "processes": limits.processes,
        "files": limits.files,
    }
    command = [
        _interpreter(),
        "-I",
        "-S",
        str(CHILD),
        "start",
        role,
        place,
        str(channel.fileno()),
        json.dumps(settings),
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if role == "judge" else subprocess.DEVNULL,
        stderr=complain,
        pass_fds=(channel.fileno(),),
        start_new_session=True,
        env={},
    )


def _interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it: its packages are not for the program."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _shown() -> list[str]:
    """Paths that exist inside: the interpreter, the system's libraries, /dev/null."""
    prefixes = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    system = ["/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/dev/null"]
    own = [path for path in sorted(prefixes) if not path.startswith("/usr/") and path != "/usr"]
    return [path for path in system + own if os.path.lexists(path)]


def _kill(side: subprocess.Popen) -> None:
    """End a side: its process group, and with its init the kernel ends the rest of the namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(side.pid, signal.SIGKILL)
    side.wait()


def _read(output: bytes, secret: str, seconds: float) -> Verdict:
    """The judge's verdict. The secret makes it sure that it is the judge's."""
    try:
        said = json.loads(output)
        genuine = hmac.compare_digest(said["secret"], secret)
    except (ValueError, KeyError, TypeError):
        return Verdict("died", "", SILENT, seconds)
    if not genuine:
        return Verdict("died", "", "a verdict without the secret", seconds)
    return Verdict(said["outcome"], said["error"], said["detail"], seconds)
