"""What runs inside the sandbox: set-up, then either side of a test run. Standard library only, run by path with -I.

`sandbox.py` starts this file twice. The *program* side executes the untrusted program and answers calls; the *judge*
side executes the tests, in another interpreter of another sandbox, and alone knows the secret that a verdict carries.
Values cross by a data-only encoding, never pickle, so the program can send the judge wrong answers but no code.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import itertools
import json
import os
import resource
import signal
import socket
import struct
import sys

TYPE_CHECKING = False  # as typing has it, which takes time to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

CHANNEL = 3  # descriptor of the socket between the two sides
MAX_MESSAGE = 64 << 20
NOBODY = 65534
CAPABILITY_VERSION = 0x20080522

# --- set-up: Linux namespaces, mounts and limits --------------------------------------------------------------------

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = 2, -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
KEYCTL, JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219, "riscv64": 219}, 1  # keyctl's number by machine


class SetupError(Exception):
    """A step of the isolation that the system refused."""


def system(what: str, name: str, *arguments: Any) -> None:
    """Call a libc function; a failure is a `SetupError` that names the step."""
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*converted) == -1:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")


def write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise SetupError(f"writing {path}: {error.strerror}") from None


def enter_namespaces() -> None:
    """Enter new user, mount, network, IPC, host-name and process namespaces; uid 0 inside is the caller outside."""
    flags = NEWUSER | NEWNS | NEWNET | NEWIPC | NEWUTS | NEWPID
    if os.geteuid() != 0:
        uid, gid = os.getuid(), os.getgid()
        system("making namespaces", "unshare", flags)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
        return
    # Limits on the number of processes do not bind root, so root maps a second user for the program. A map of two
    # users must be written from outside the new namespace: by a child that stays behind.
    ready, go = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        try:
            os.close(go)
            os.read(ready, 1)
            for kind in ("uid", "gid"):
                write(f"/proc/{parent}/{kind}_map", f"0 0 1\n1 {NOBODY} 1")
            os._exit(0)
        except BaseException:
            os._exit(1)
    system("making namespaces", "unshare", flags)
    os.close(go)
    if os.waitpid(child, 0)[1]:
        raise SetupError("mapping users: refused")


def freeze(path: str, attributes: int) -> None:
    """Set mount attributes on a whole tree (Linux 5.12 and later)."""
    packed = struct.pack("QQQQ", attributes, 0, 0, 0)
    what = f"protecting {path}"
    system(what, "syscall", MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, ctypes.c_char_p(packed), len(packed))


def build_root(root: str, shown: list[str], disk_bytes: int) -> None:
    """A new read-only root: the interpreter and its libraries, /dev/null, and a small tmpfs at /work."""
    write("/proc/sys/user/max_user_namespaces", "0")  # namespaces made inside could regain rights
    # System V memory, messages and semaphores are bounded by no limit of a process. Older kernels let only the
    # machine's root set these; they end with the namespace all the same.
    for name, value in (("shmmni", "0"), ("msgmni", "0"), ("sem", "0 0 0 0")):
        with contextlib.suppress(PermissionError), open(f"/proc/sys/kernel/{name}", "w") as file:
            file.write(value)
    system("private mounts", "mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    system("mounting the root", "mount", "tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,nr_inodes=1k,mode=755")
    for path in shown:
        target = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        system(f"showing {path}", "mount", path, target, None, MS_BIND | MS_REC, None)
        freeze(target, MS_RDONLY | MS_NOSUID | (0 if path.startswith("/dev/") else MS_NODEV))
    os.makedirs(root + "/work")
    os.symlink("/work", root + "/tmp")
    options = f"size={disk_bytes},nr_inodes=1k,mode=1777"
    system("mounting /work", "mount", "tmpfs", root + "/work", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    system("changing the root", "pivot_root", ".", ".")
    system("leaving the old root", "umount2", ".", MNT_DETACH)
    system(
        "a read-only root", "mount", "none", "/", None, 0x20 | MS_BIND | MS_RDONLY | MS_NOSUID, None
    )  # 0x20: remount
    os.chdir("/work")


def leave_keyring() -> None:
    """Join an empty session keyring, since the caller's holds keys and would keep what the program adds."""
    number = KEYCTL.get(os.uname().machine)
    if number is None:
        return
    try:
        system("a session keyring", "syscall", number, JOIN_SESSION_KEYRING, None)
    except SetupError:
        # No such call, or none that this process may make: then the program may not either.
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
            raise


def drop_rights(was_root: bool) -> None:
    """Drop all capabilities, also across exec, and become an ordinary user outside, even if the caller is root."""
    for capability in range(64):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # numbers past the last one fail
    if was_root:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    header = ctypes.c_char_p(struct.pack("II", CAPABILITY_VERSION, 0))
    system("dropping capabilities", "capset", header, ctypes.c_char_p(bytes(24)))
    system("no new privileges", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def set_limits(limits: dict) -> None:
    # Without namespaces the count of processes is the user's, over the whole machine: it is left as it is.
    processes = [(resource.RLIMIT_NPROC, limits["processes"])] if limits["isolated"] else []
    bounds = [
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        *processes,
    ]
    for kind, value in bounds:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def start(role: str, root: str, channel: int, settings: dict) -> None:
    """Isolate, then replace this process (or a child that is alone with its init) by a fresh `python -I`."""
    end_with_parent()
    if channel != CHANNEL:
        os.dup2(channel, CHANNEL)
        os.close(channel)
    else:
        os.set_inheritable(CHANNEL, True)
    if settings["isolated"]:
        was_root = os.geteuid() == 0
        enter_namespaces()
        end_with_parent()  # again: a change of credentials clears it
        # The first process of the namespace is its init: when it ends, the kernel ends all others, whatever they did.
        init = os.fork()
        if init:
            os.waitpid(init, 0)
            os._exit(0)
        end_with_parent()
        build_root(root, settings["shown"], settings["disk_bytes"])
        leave_keyring()
        drop_rights(was_root)
        end_with_parent()
        set_limits(settings)
        # The program may run as the user of its init. It must not trace it, nor start while it holds descriptors.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        closed, held = os.pipe()
        child = os.fork()
        if child:
            for descriptor in (0, 1, 2, CHANNEL, closed, held):
                os.close(descriptor)
            while os.wait()[0] != child:
                pass
            os._exit(0)
        os.close(held)
        os.read(closed, 1)
    else:
        os.chdir(root)
        set_limits(settings)
    command = [sys.executable, "-I", "-B", "-c", settings["code"], role]
    work = "/work" if settings["isolated"] else root
    environment = {"HOME": work, "TMPDIR": work}
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    os.execve(command[0], command, environment)


# --- the channel: frames of JSON, data only --------------------------------------------------------------------------


class Died(BaseException):
    """The other side is gone. Not an `Exception`, so that no test catches it."""


class Garbled(BaseException):
    """The other side sent something that is no message."""


class Channel:
    def __init__(self) -> None:
        self.socket = socket.socket(fileno=os.dup(CHANNEL))
        os.close(CHANNEL)

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(data)} bytes, more than {MAX_MESSAGE}")
        try:
            self.socket.sendall(struct.pack("<Q", len(data)) + data)
        except OSError:
            raise Died from None

    def receive(self) -> Any:
        size = struct.unpack("<Q", self.read(8))[0]
        if size > MAX_MESSAGE:
            raise Garbled(f"a message of {size} bytes")
        try:
            return json.loads(self.read(size))
        except (ValueError, RecursionError):
            raise Garbled("no JSON") from None

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self.socket.recv(min(size, 1 << 20))
            except OSError:
                raise Died from None
            if not part:
                raise Died
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, refer: Callable) -> Any:
    """Plain data as JSON; a subclass loses its methods and keeps its data. Anything else becomes `refer(value)`."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return {"str": str.__str__(value).encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, int):
        return {"int": hex(int.__index__(value))}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, complex):
        return {"complex": [float.__repr__(value.real), float.__repr__(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__mro__[-2].__name__: bytes(value).hex()}
    if isinstance(value, range):
        return {"range": [hex(value.start), hex(value.stop), hex(value.step)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, refer) for item in kind.__iter__(value)]}
    return refer(value)


def decode(message: Any, find: Callable) -> Any:
    """The inverse of `encode`; `find` turns references back."""
    if message is None or isinstance(message, bool):
        return message
    ((kind, data),) = message.items()
    if kind == "str":
        return bytes.fromhex(data).decode("utf-8", "surrogatepass")
    if kind == "int":
        return int(data, 16)
    if kind == "float":
        return float(data)
    if kind == "complex":
        return complex(float(data[0]), float(data[1]))
    if kind in ("bytes", "bytearray"):
        return bytes.fromhex(data) if kind == "bytes" else bytearray.fromhex(data)
    if kind == "range":
        return range(*(int(part, 16) for part in data))
    if kind == "dict":
        return {decode(k, find): decode(v, find) for k, v in data}
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(item, find) for item in data)
    if kind == "ref":
        return find(data)
    raise ValueError(kind)


# --- the program's side ----------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "iter": lambda target: list(itertools.islice(target, 1_000_000)),
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
}


def by_place(args: list, kwargs: dict) -> dict:
    """Arguments of a call by their index or name."""
    return {**dict(enumerate(args)), **kwargs}


def mutated(before: Any, after: Any) -> list:
    """Which list, dict or set arguments a call changed: [index or name, new content]."""
    return [[place, now] for place, now in after.items() if isinstance(now, (list, dict, set)) and before[place] != now]


def describe(error: BaseException) -> dict:
    try:
        text = str(error)[:2000]
    except BaseException:
        text = ""
    return {"error": type(error).__name__, "text": text.encode("utf-8", "replace").decode()}


def program() -> None:
    """Execute the program on standard input, then answer the judge until it hangs up."""
    channel = Channel()
    source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    objects = []

    def refer(value: Any) -> Any:
        objects.append(value)
        return {"ref": len(objects) - 1}

    try:
        code = compile(source, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        channel.send({"stage": "syntax", **describe(error)})
        return
    channel.send({"stage": "compiled"})
    namespace = {"__name__": "program", "__builtins__": builtins}
    try:
        exec(code, namespace)
    except Exception as error:
        channel.send({"stage": "definition", **describe(error)})
        return
    channel.send({"stage": "defined"})
    while True:
        request = channel.receive()
        reply: dict
        try:
            if request["operation"] == "name":
                reply = {"value": refer(namespace[request["name"]]) if request["name"] in namespace else None}
            else:
                target, *values = (decode(value, objects.__getitem__) for value in request["values"])
                before = [decode(value, objects.__getitem__) for value in request["values"][1:]]
                result = OPERATIONS[request["operation"]](target, *values)
                reply = {"value": encode(result, refer)}
                if request["operation"] == "call":
                    reply["mutated"] = encode(mutated(by_place(*before), by_place(*values)), refer)
        except Exception as error:
            reply = describe(error)
        try:
            channel.send(reply)
        except (ValueError, MemoryError) as error:
            channel.send(describe(error))


# --- the judge's side ------------------------------------------------------------------------------------------------


class ProgramError(Exception):
    """The program raised an exception that is not built in."""


class Remote:
    """An object of the program that is no plain data. It equals only itself: its own `__eq__` is never asked."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable, number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", self, key, value)

    def __iter__(self) -> Any:
        return iter(self._ask("iter", self))

    def __next__(self) -> Any:
        return self._ask("next", self)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return self._ask("bool", self)

    def __str__(self) -> str:
        return self._ask("str", self)


class Judge:
    """Asks the program's side; remembers the last error that came from there."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.raised: tuple[str, str, Exception] | None = None

    def refer(self, value: Any) -> Any:
        if not isinstance(value, Remote):
            raise TypeError(f"a test passes a {type(value).__name__} to the program; only plain data can cross")
        return {"ref": value._number}

    def find(self, number: int) -> Any:
        if type(number) is not int:
            raise Garbled("a reference that is no number")
        return Remote(self.ask, number)

    def receive(self) -> Any:
        reply = self.channel.receive()
        if not isinstance(reply, dict):
            raise Garbled("a reply that is no object")
        return reply

    def value(self, message: Any) -> Any:
        try:
            return decode(message, self.find)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError):
            raise Garbled("a value that is none") from None

    def ask(self, operation: str, *values: Any) -> Any:
        self.channel.send({"operation": operation, "values": [encode(value, self.refer) for value in values]})
        reply = self.receive()
        if "error" in reply:
            name, text = str(reply["error"])[:100], str(reply.get("text"))[:2000]
            kind = getattr(builtins, name, None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = ProgramError
            # `map` and `filter` of a test would take it for their own end.
            if issubclass(kind, (StopIteration, StopAsyncIteration)) and operation != "next":
                kind = ProgramError
            try:
                error = kind(text)
            except TypeError:  # UnicodeDecodeError wants more than a text
                error = ProgramError(text)
            self.raised = (name, text, error)
            raise error
        changed = self.value(reply.get("mutated"))
        if operation == "call" and changed:
            try:
                arguments = by_place(*values[1:])
                for place, content in changed:
                    put_back(arguments[place], content)
            except (TypeError, ValueError, KeyError):
                raise Garbled("a changed argument that is none") from None
        return self.value(reply.get("value"))

    def lookup(self, name: str) -> Any:
        self.channel.send({"operation": "name", "name": name})
        return self.value(self.receive().get("value"))


def put_back(argument: Any, content: Any) -> None:
    """Give an argument of the judge the content that the program left in it."""
    if type(argument) is not type(content):
        raise Garbled("a changed argument of another type")
    argument.clear()
    (argument.extend if isinstance(argument, list) else argument.update)(content)


def judge() -> None:
    """Execute the tests on standard input against the program; write one verdict that carries the secret."""
    channel = Channel()
    job = json.loads(sys.stdin.buffer.read())
    verdict = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    side, stage = Judge(channel), "syntax"

    def end(outcome: str, error: str = "", detail: str = "") -> NoReturn:
        json.dump({"secret": job["secret"], "outcome": outcome, "error": error, "detail": detail}, verdict)
        verdict.flush()
        os._exit(0)

    try:
        reply = side.receive()
        if "error" in reply:
            end("syntax", str(reply["error"])[:100], str(reply.get("text"))[:2000])
        stage = "definition"
        reply = side.receive()
        if "error" in reply:
            end("error", str(reply["error"])[:100], str(reply.get("text"))[:2000])
        stage = "tests"
        namespace = {"__name__": "tests"}
        exec(compile(job["context"], "<context>", "exec"), namespace)
        for name in job["names"]:
            namespace.pop(name, None)
            found = side.lookup(name)
            if found is not None:
                namespace[name] = found
        exec(compile(job["tests"], "<tests>", "exec"), namespace)
    except Died:
        end("died", "", f"the program's process ended during its {stage}")
    except Garbled as error:
        end("died", "", f"the program's process sent {error}")
    except AssertionError as error:
        if side.raised is not None and error is side.raised[2]:
            end("error", *side.raised[:2])
        end("wrong", "AssertionError", describe(error)["text"])
    except Exception as error:
        if side.raised is not None and error is side.raised[2]:
            end("error", *side.raised[:2])
        end("error", type(error).__name__, describe(error)["text"])
    end("passed")


if __name__ == "__main__":
    if sys.argv[1] == "start":
        try:
            start(sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
        except (SetupError, OSError) as error:
            sys.stderr.write(f"setup: {error}\n")
            sys.stderr.flush()
            os._exit(1)
    else:
        {"program": program, "judge": judge}[sys.argv[1]]()
