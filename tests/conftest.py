"""What all tests share: one thread, quick collection of garbage, and slow tests left out unless they are asked for."""

import gc

import torch

# Runs are compared bit by bit, some of them in forked processes, which have one thread.
torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported stays until the end. Each training collects garbage, and need not look through all of it."""
    gc.collect()
    gc.freeze()


def are_left_out(config):
    """Whether slow tests are: without -m, and unless a test is named as file.py::test."""
    return not config.option.markexpr and not any("::" in word for word in config.args)


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and are_left_out(config):
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def pytest_terminal_summary(terminalreporter, config):
    if are_left_out(config):
        terminalreporter.write_line("Slow tests were left out. To run them: make test-slow, or pytest -m slow.")
