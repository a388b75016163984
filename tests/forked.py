"""A process of its own without the seconds that imports take: a fork of this one, which has imported all of it.

For laws about several processes and about processes that die. What a process prints and imports at its start is tested
with a new interpreter.
"""

import multiprocessing
import os
import socket
import sys
import tempfile

import torch


class Forked:
    """`function(*args)` in a child, with `environment` besides this one's.

    The child's exit status is what `function` returns, as a command line's `main` does, and 1 if it raises.
    """

    def __init__(self, function, *args, environment=None):
        self.told = tempfile.NamedTemporaryFile("r", prefix="forked-")  # noqa: SIM115  it lives as long as this
        words = (self.told.name, function, args, environment or {})
        self.process = multiprocessing.get_context("fork").Process(target=child, args=words)
        self.process.start()

    def wait(self, timeout=120):
        """(exit status, what it printed); a status below 0 is the signal that ended the child."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"The child did not end within {timeout} s. It printed:\n{self.told.read()}")
        return self.process.exitcode, self.told.read()

    def kill(self):
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def child(told, function, args, environment):
    file = os.open(told, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)  # a child has none of its parent's threads, and would wait for them
    forget_the_launch()
    status = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status if isinstance(status, int) else 0)


def forget_the_launch():
    """accelerate asks for its place among the processes once, and this one may have asked."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launched(function, *args, processes=2):
    """One child for each of `processes`, with the environment that `torchrun` gives to each."""
    place = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port())}
    ranks = [str(rank) for rank in range(processes)]
    return [Forked(function, *args, environment=place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]
