"""Which tests notice a mistake? Breaks chosen lines of the code, one at a time, and runs the tests near each.

    python tests/mutations.py            # all of them, about 10 minutes on one core
    python tests/mutations.py shift seed # those whose names hold one of these words

The working tree stays as it is: the mistakes are made in a copy in a temporary folder. Prints a table of Markdown. Exit
status 1: a mistake that no test noticed.
"""

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for the tests of one mistake


class Mutation(NamedTuple):
    """`old` stands once in `file` and becomes `new`. One of the `tests` ought to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


FUNCTIONAL, SAMPLING = "schedulers/functional.py", "schedulers/token_sampling.py"
DENOISER, LOSSES = "prism_pipelines/models/denoiser.py", "prism_pipelines/training/losses.py"
CALIBRATION, CACHE = "prism_pipelines/evaluation/calibration.py", "prism_pipelines/sampling/kv_cache.py"

MUTATIONS = [
    # schedules and the choice of positions
    Mutation(
        "the schedule rounds down",
        FUNCTIONAL,
        "(num_generated * (step + 1) + num_steps - 1) // num_steps",
        "num_generated * (step + 1) // num_steps",
        "test_functional.py",
    ),
    Mutation(
        "ReMDM's cap from the time before the step",
        FUNCTIONAL,
        "((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=eta)",
        "((1 - alpha_t) / alpha_t.clamp(min=1e-12)).clamp(max=eta)",
        "test_functional.py test_baselines.py",
    ),
    Mutation(
        "a sign in the chance to unmask",
        FUNCTIONAL,
        "return (alpha_s - (1 - sigma) * alpha_t)",
        "return (alpha_s - (1 + sigma) * alpha_t)",
        "test_functional.py test_baselines.py",
    ),
    Mutation(
        "one position too few is chosen",
        FUNCTIONAL,
        "candidate.cumsum(-1) <= n)",
        "candidate.cumsum(-1) < n)",
        "test_functional.py",
    ),
    Mutation(
        "PRISM remasks given tokens",
        "schedulers/scheduling_prism.py",
        "lowest(quality, now.visible, ",
        "lowest(quality, now.sample != now.mask_token_id, ",
        "test_schedulers.py",
    ),
    Mutation(
        "judge and repair: a rejected block counts as accepted",
        "prism_pipelines/sampling/loop.py",
        "before & ~(finished & ~step.accepted)",
        "before & ~(finished & step.accepted)",
        "test_judge_repair_pipeline.py",
    ),
    # drawing tokens
    Mutation(
        "the temperature is ignored",
        SAMPLING,
        "/ max(temperature, 1e-30)",
        "/ 1.0",
        "test_functional.py",
    ),
    Mutation(
        "top-p keeps the wrong end",
        SAMPLING,
        "surplus = before >= top_p * total[:, None]",
        "surplus = before < top_p * total[:, None]",
        "test_functional.py test_speed.py",
    ),
    Mutation(
        "a penalty rewards",
        SAMPLING,
        "-amount.float())",
        "amount.float())",
        "test_judge_repair.py",
    ),
    Mutation(
        "a row's seed is its neighbour's of the next seed",
        SAMPLING,
        "seed * 1_000_003 + row",
        "seed + row",
        "test_generate_many.py",
    ),
    # the model
    Mutation(
        "a shifted model is read without its shift",
        DENOISER,
        "(column - self.spec.logit_shift).clamp(min=0)",
        "column",
        "test_families.py",
    ),
    Mutation(
        "a block does not see itself",
        DENOISER,
        "seen = block[:, None, :reach] <= ",
        "seen = block[:, None, :reach] < ",
        "test_families.py",
    ),
    Mutation(
        "padding is seen",
        DENOISER,
        "seen = seen & attention_mask.bool()[:, None, :reach]",
        "seen = seen",
        "test_family_laws.py",
    ),
    Mutation(
        "guidance is one too weak",
        DENOISER,
        "free + (self.cfg_scale + 1) * (given - free)",
        "free + self.cfg_scale * (given - free)",
        "test_what_is_written.py test_pipeline.py",
    ),
    Mutation(
        "two matrices of LLaDA swap places",
        "prism_pipelines/models/checkpoint_names.py",
        r'ff_proj\.": r"model.layers.\1.mlp.gate_proj."',
        r'ff_proj\.": r"model.layers.\1.mlp.down_proj."',
        "test_families.py",
    ),
    Mutation(
        "a head's temperature multiplies",
        "prism_pipelines/models/quality_head.py",
        "logits / self.config.temperature",
        "logits * self.config.temperature",
        "test_quality_head.py test_judge_repair_pipeline.py",
    ),
    Mutation(
        "a fingerprint skips the biases",
        "prism_pipelines/hub/fingerprints.py",
        'if ".lora_" not in name:',
        'if ".lora_" not in name and "bias" not in name:',
        "test_adapters.py",
    ),
    # the canvas and the cache
    Mutation(
        "every token is a block",
        "prism_pipelines/sampling/canvas.py",
        "(generated & (cell > before))",
        "(generated & (cell >= before))",
        "test_pipeline.py",
    ),
    Mutation(
        "the cache is refreshed a step late",
        CACHE,
        "else self._block\n        self._age = 0 if self._age + 1 == self.refresh_interval",
        "else self._block\n        self._age = 0 if self._age == self.refresh_interval",
        "test_cache.py",
    ),
    Mutation(
        "the cached window of a shifted model lacks the column before it",
        CACHE,
        "(0, 1)) if spec.logit_shift else wanted",
        "(0, 1)) if False else wanted",
        "test_cache.py",
    ),
    Mutation(
        "a mask does not end what is decided",
        "prism_pipelines/sampling/stopping.py",
        "first = (closed | ended).nonzero()",
        "first = ended.nonzero()",
        "test_what_is_written.py test_pipeline.py",
    ),
    # training
    Mutation(
        "the ELBO is multiplied by the masking rate",
        LOSSES,
        "(losses / rate[:, None].expand_as(masked)[masked])",
        "(losses * rate[:, None].expand_as(masked)[masked])",
        "test_losses.py",
    ),
    Mutation(
        "the loss forgets that there are several processes",
        "prism_pipelines/training/trainer.py",
        "sums / (self.args.world_size * len(counts))",
        "sums / len(counts)",
        "test_training_parallel.py",
    ),
    Mutation(
        "an objective of its own in several processes divides by the tokens of all",
        "prism_pipelines/training/loss_terms.py",
        "count.clamp(min=1) / torch.distributed.get_world_size()",
        "count.clamp(min=1)",
        "test_losses.py test_training_parallel.py",
    ),
    Mutation(
        "the head learns which tokens are wrong",
        LOSSES,
        "label = y == input_ids.repeat(",
        "label = y != input_ids.repeat(",
        "test_losses.py",
    ),
    Mutation(
        "held-out examples are trained on",
        "prism_pipelines/training/data.py",
        "return examples[count:], examples[:count]",
        "return examples, examples[:count]",
        "test_training_data.py",
    ),
    # measures
    Mutation(
        "a fitted temperature is inverted",
        CALIBRATION,
        "np.exp(-(low + high) / 2)",
        "np.exp((low + high) / 2)",
        "test_calibration.py test_judge_repair.py",
    ),
    Mutation(
        "risk and coverage begin with the least sure",
        CALIBRATION,
        "np.argsort(-confidence, ",
        "np.argsort(confidence, ",
        "test_calibration.py test_judge_repair.py",
    ),
    Mutation(
        "pass@k from the samples that passed",
        "prism_pipelines/evaluation/code/tasks.py",
        "math.comb(num_samples - num_passed, k)",
        "math.comb(num_passed, k)",
        "test_evaluation_code.py",
    ),
]


class FirstFailure:
    """A plugin of pytest that writes the first failed test to a file."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed and not self.file.exists():
            self.file.write_text(f"{report.nodeid} (could not be imported)")


def copy_code(folder: Path) -> None:
    """What the tests need. The schedulers lie where an installed package has them."""
    for name in ("prism_pipelines", "tests", "benchmarks", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "schedulers", folder / "prism_pipelines" / "schedulers")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)


def place_of(folder: Path, file: str) -> Path:
    return folder / (file if file.startswith("prism_pipelines/") else f"prism_pipelines/{file}")


def first_failure(folder: Path, tests: str) -> str | None:
    """The first test of some files that fails, None if all pass; in a process that has imported the libraries."""
    found = folder / "first-failure"
    found.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        import pytest

        words = ["-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests.split())]
        os._exit(pytest.main(words, plugins=[FirstFailure(found)]))
    end = time.monotonic() + LIMIT
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"none within {LIMIT} s, which counts as noticed"
        time.sleep(0.05)
    if found.exists():
        return found.read_text().removeprefix("tests/")
    return None if os.waitstatus_to_exitcode(ended[1]) == 0 else "pytest itself failed"


def main(words: list[str]) -> int:
    """Print the table, a row as soon as it is known."""
    sys.dont_write_bytecode = True  # a file that is changed twice within a second would look unchanged
    chosen = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    for one in chosen:
        if (times := (ROOT / one.file).read_text().count(one.old)) != 1:
            raise SystemExit(f"{one.file} holds {one.old!r} {times} times, and must hold it once: {one.name}")
    for library in ("torch", "transformers", "diffusers", "peft", "accelerate", "datasets", "pytest", "hypothesis"):
        importlib.import_module(library)
    importlib.import_module("diffusers.pipelines.pipeline_utils")
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder, unnoticed = Path(name), 0
        copy_code(folder)
        failed = first_failure(folder, " ".join(sorted({name for one in chosen for name in one.tests.split()})))
        if failed is not None:
            raise SystemExit(f"Without any mistake {failed} fails too: mend that first.")
        print("| mistake | in | first test that fails |\n| --- | --- | --- |", flush=True)
        for one in chosen:
            file = place_of(folder, one.file)
            before = file.read_text()
            file.write_text(before.replace(one.old, one.new))
            failed = first_failure(folder, one.tests)
            file.write_text(before)
            unnoticed += failed is None
            print(f"| {one.name} | `{one.file}` | {'**none**' if failed is None else f'`{failed}`'} |", flush=True)
    print(f"\n{len(chosen) - unnoticed} of {len(chosen)} mistakes were noticed; without any, the same tests pass.")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
