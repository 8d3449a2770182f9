"""Peak memory of a model in use: of its own shape and of its own process alone."""

import concurrent.futures
import functools
import pickle

import pytest
import torch

from pruning_utils import efficiency, models, results, runtime, surgery
from pruning_utils.engine import memory
from pruning_utils.studies import costs, study

RUN = {"revision": None, "dtype": "float32", "new_tokens": 2}


def point(layers: str = "", width: str = "", **given) -> dict:
    return {"layers": layers, "width": width, "batch_size": 1, "prompt_tokens": 4, **given}


@pytest.mark.parametrize(
    "layers, width, own_process", [("", "", False), ("1 3", "", True), ("", "15 1", False)]
)
def test_what_is_used_is_the_shape_asked(layers, width, own_process, tiny, monkeypatch):
    started = []

    class Alike(concurrent.futures.ThreadPoolExecutor):
        """Takes only what a process of its own can be given; such processes have tests below."""

        def __init__(self):
            started.append(True)
            super().__init__(1)

        def submit(self, *given, **named):
            work, *values = pickle.loads(pickle.dumps(given))
            return super().submit(work, *values, **pickle.loads(pickle.dumps(named)))

    monkeypatch.setattr(costs, "FreshProcesses", Alike)
    found = costs.measure_memory(point(layers, width), model=tiny, own_process=own_process, **RUN)
    assert started == [True] * own_process
    network, _ = models.load_model(tiny, dtype="float32")
    network = (
        study.narrowed(network, map(int, width.split()))
        if width
        else surgery.drop_layers(network, map(int, layers.split()))
    )
    assert found["weights"] == efficiency.weight_bytes(network)


def test_memory_is_that_of_the_device_that_is_asked(monkeypatch):
    """Beside a GPU, a model on the processor takes none of the GPU's memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: device)
    second = torch.device("cuda:1")
    assert runtime.peak_memory_bytes() is None and runtime.peak_memory_bytes(second) is second
    assert runtime.peak_memory_bytes(torch.device("cpu")) > 10**7


@pytest.mark.parametrize(
    ("text", "is_lack"),
    [
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", True),
        ("DefaultCPUAllocator: can't allocate memory", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_lack_of_memory_is_told_by_each_system_in_its_own_words(text, is_lack):
    assert memory.is_lack_of_memory(RuntimeError(text)) == is_lack


def test_more_texts_take_more_memory(tiny):
    measure = functools.partial(
        costs.generation_memory, tiny, dtype="float32", prompt_tokens=4, new_tokens=2
    )
    with study.FreshProcesses() as alone:
        # The smaller batch first: the peak of a process never falls.
        small, large = alone.submit(_of_batches, measure, (1, 512)).result()
    vocabulary = models.load_model(tiny)[0].config.vocab_size
    # Each text has a number for every token.
    assert large["generated"] - small["generated"] > 4 * 511 * vocabulary


def _of_batches(measure, sizes: tuple[int, ...]) -> list[dict]:
    return [measure(batch_size=size) for size in sizes]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the memory of the GPU counts")
def test_the_memory_of_the_asking_process_does_not_count():
    before = runtime.peak_memory_bytes()
    held = torch.ones(2**29, dtype=torch.uint8)
    assert runtime.peak_memory_bytes() >= len(held)
    with study.FreshProcesses() as alone:
        inside = alone.submit(runtime.peak_memory_bytes).result()
    assert 0 < inside < len(held) + before / 2


def test_the_table_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    asked = dict(
        profile="smoke", notebook="07_depth_against_width", model=tiny, own_process=False, **RUN
    )
    first, path = costs.memory_table([point("1")], **asked)
    monkeypatch.setattr(
        efficiency, "generation_speed", lambda *_, **__: pytest.fail("measured again")
    )
    again, _ = costs.memory_table([point("1")], **asked)
    assert first.equals(again) and path.parent.is_relative_to(tmp_path)
    assert results.read_record(path)["parameters"]["new_tokens"] == RUN["new_tokens"]
