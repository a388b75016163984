"""What all tests share: one thread, quick collection of garbage, which tests are left out, and `--family NAME`."""

import gc

import pytest
import torch

# Runs are compared bit by bit, some of them in forked processes, which have one thread.
torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported stays until the end. Each training collects garbage, and need not look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--family", help="only the laws of this family of models, a key of CHECKPOINTS in family_twins.py")


def are_left_out(config):
    """Whether slow tests are: without -m and --family, and unless a test is named as file.py::test."""
    asked_for = config.option.markexpr or config.option.family
    return not asked_for and not any("::" in word for word in config.args)


def pytest_collection_modifyitems(config, items):
    if (family := config.option.family) is not None:
        laws = [item for item in items if family_of(item) == family]
        if not laws:
            known = sorted(filter(None, {family_of(item) for item in items}))
            raise pytest.UsageError(
                f"--family {family!r}: no test has that family. A new one needs a twin in CHECKPOINTS of "
                f"tests/family_twins.py (CONTRIBUTING.md, A model family); known: {', '.join(known)}."
            )
        config.hook.pytest_deselected(items=[item for item in items if item not in laws])
        items[:] = laws
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and are_left_out(config):
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def family_of(item):
    """The family that a test is about, None for a test that is about none."""
    return getattr(item, "callspec", None) and item.callspec.params.get("family")


def pytest_terminal_summary(terminalreporter, config):
    if are_left_out(config):
        terminalreporter.write_line("Slow tests were left out. To run them: make test-slow, or pytest -m slow.")
