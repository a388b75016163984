"""Several calls at the same time on one model: each gives what it gives alone."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from family_twins import MASK, checkpoint, load

from prism_pipelines import (
    MDLMScheduler,
    PrismPipeline,
    PrismScheduler,
    QualityHead,
    ReMDMScheduler,
    SelfConfidenceScheduler,
    TokenToMaskScheduler,
)

THREADS = 4


@pytest.fixture(autouse=True)
def switching_often():
    """Threads of Python take turns every 10 microseconds in place of 5 milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def twin(family):
    pipe = load(checkpoint(family))
    torch.manual_seed(0)
    pipe.quality_head, pipe.scheduler = QualityHead(32, "mlp"), PrismScheduler(order="confidence", num_remask=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(pipe, number):
    """A call that differs from its neighbours in rows, lengths and steps."""
    prompt = torch.randint(8, MASK, (1 + number % 2, 3 + number % 5), generator=torch.Generator().manual_seed(number))
    return pipe(
        input_ids=prompt,
        gen_length=6 + number % 4,
        num_inference_steps=(3, 5, 4)[number % 3],
        generator=torch.Generator().manual_seed(number),
        threshold=0.9 if number % 7 == 0 else None,
        output_type="seq",
        return_quality=True,
    )


def same(one, other):
    return (
        torch.equal(one.sequences, other.sequences)
        and torch.equal(one.quality, other.quality)
        and one.nfe_per_row == other.nfe_per_row
    )


@pytest.mark.parametrize("requests", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["bert", "llada"])
def test_requests_of_four_threads_give_what_they_give_alone(family, requests):
    pipe = twin(family)
    alone = [request(pipe, number) for number in range(requests)]
    config = pipe.model.config.to_dict()
    local = threading.local()

    def with_its_own(number):
        if not hasattr(local, "pipe"):
            local.pipe = PrismPipeline.from_pipe(pipe)
        return request(local.pipe, number)

    with ThreadPoolExecutor(THREADS) as pool:
        shared = list(pool.map(lambda number: request(pipe, number), range(requests)))
    with ThreadPoolExecutor(THREADS) as pool:
        from_pipe = list(pool.map(with_its_own, range(requests)))
    assert [i for i in range(requests) if not same(shared[i], alone[i])] == []
    assert [i for i in range(requests) if not same(from_pipe[i], alone[i])] == []
    assert pipe.model.config.to_dict() == config and "is_causal" not in vars(pipe.model.config)


class Remembers(MDLMScheduler):
    """A user's own scheduler, which keeps a history that it began before the first run."""

    def step(self, model_output, timestep, sample, **kwargs):
        self.history.append(int(timestep))
        assert self.history == list(range(len(self.history))) and self.extra == "kept"
        return super().step(model_output, timestep, sample, **kwargs)


def remembering():
    scheduler = Remembers(order="confidence")
    scheduler.history, scheduler.extra = [], "kept"
    return scheduler


@pytest.mark.parametrize(
    "scheduler",
    [
        ReMDMScheduler(strategy="conf"),
        SelfConfidenceScheduler(num_remask=1, history=3),
        TokenToMaskScheduler(remask_threshold=0.9),
        remembering(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_what_a_scheduler_remembers_belongs_to_its_run(scheduler):
    pipe = twin("llada")
    pipe.quality_head, pipe.scheduler = None, scheduler

    def call(number):
        generator = torch.Generator().manual_seed(number)
        settings = {"gen_length": 12, "num_inference_steps": 5 + number % 3, "output_type": "seq"}
        return pipe(**settings, generator=generator).sequences

    alone = [call(number) for number in range(24)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(call, range(24)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert pipe.scheduler is scheduler and scheduler.timesteps is None  # a call changes nothing of the pipeline


def test_a_threshold_keeps_what_a_users_scheduler_holds_beside_its_config():
    pipe = twin("llada")
    pipe.quality_head, pipe.scheduler = None, remembering()
    out = pipe(gen_length=8, num_inference_steps=8, threshold=1e-6, output_type="seq")
    assert out.nfe == 1 and not pipe.scheduler.config.use_threshold


@pytest.mark.parametrize("family", ["bert", "llada"])
def test_a_call_inside_a_callback_changes_neither(family):
    pipe, inner = twin(family), []
    outer_alone, inner_alone = request(pipe, 4), request(pipe, 9)

    def nested(pipe, step, timestep, tensors):
        assert len(pipe.scheduler.timesteps) == 5  # of the outer run, in each of its steps
        inner.append(request(pipe, 9))
        return {}

    prompt = torch.randint(8, MASK, (1, 7), generator=torch.Generator().manual_seed(4))
    settings = {"gen_length": 6, "num_inference_steps": 5, "output_type": "seq", "return_quality": True}
    outer = pipe(input_ids=prompt, generator=torch.Generator().manual_seed(4), callback_on_step_end=nested, **settings)
    assert same(outer, outer_alone) and len(inner) == 5 and all(same(one, inner_alone) for one in inner)


def test_a_thread_that_calls_the_model_itself_gets_its_logits():
    pipe, ids = twin("bert"), torch.randint(8, MASK, (2, 9))
    with torch.no_grad():
        expected, stop, wrong = pipe.model(input_ids=ids).logits, threading.Event(), []

        def watch():
            with torch.no_grad():
                while not stop.is_set():
                    wrong.append(not torch.equal(pipe.model(input_ids=ids).logits, expected))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(20):
            request(pipe, number)
        stop.set(), watcher.join()
    assert wrong and not any(wrong)


def test_what_is_saved_during_a_call_is_not_marked_as_bidirectional(tmp_path):
    pipe = twin("llada")
    head = pipe.model.get_output_embeddings()
    from prism_pipelines.models.denoiser import OutputHeadHook, not_causal

    inside, saved = threading.Event(), threading.Event()

    def forward():
        with OutputHeadHook.of(head).catch(), not_causal(pipe.model.config):
            inside.set()
            saved.wait(0.5)

    thread = threading.Thread(target=forward)
    thread.start()
    inside.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(tmp_path)  # waits for the forward
    saved.set(), thread.join()
    assert "is_causal" not in (tmp_path / "model" / "config.json").read_text()
