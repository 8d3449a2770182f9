"""Where a batch does not fit into memory: half of it is taken, and the results are the same."""

import functools
import logging
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES
from test_healing import bits, heal, llama, same, windows

from pruning_utils import evaluation, healing, importance, models, similarity
from pruning_utils.engine import memory, passes, prefixes, trainer

ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
KINDS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    ON_CPU,
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    MemoryError(),
]


@pytest.fixture
def notices(caplog):
    """The notices of batches that were halved."""
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        yield lambda: [record.getMessage() for record in caplog.records]


def limit_rows(model, most: int, error: Exception = ON_CPU, layer: int = -1) -> list[int]:
    """Let a layer fail on more than ``most`` rows; the list fills with the rows of each call."""
    calls: list[int] = []
    module = models.decoder_layers(model)[layer]

    def refuse(module, given, named):
        states = given[0] if given else named["hidden_states"]
        calls.append(len(states))
        if len(states) > most:
            raise error

    module.register_forward_pre_hook(refuse, with_kwargs=True)
    return calls


# --- the mechanism --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", KINDS, ids=str)
def test_batches_are_halved_for_every_allocators_error(error, notices):
    seen = []

    def work(rows: slice) -> int:
        seen.append((rows.start, rows.stop))
        if rows.stop - rows.start > 2:
            raise error
        return rows.stop

    batches = memory.BatchSize(9)
    assert batches.run(work, 7) == [1, 2, 3, 4, 5, 6, 7]
    assert seen == [(0, 7), (0, 3), *((place, place + 1) for place in range(7))]
    assert notices() == [
        "a batch of 7 samples does not fit into memory; going on with 3",
        "a batch of 3 samples does not fit into memory; going on with 1",
    ]
    assert batches.size == 1


def test_batches_that_must_divide_a_whole_evenly_do(notices):
    batches = memory.BatchSize(15, noun="windows", whole=15)
    sizes = []
    while batches.size > 1:
        batches.halve(batches.size, ON_CPU)
        sizes.append(batches.size)
    assert sizes == [5, 1]
    assert notices()[-1] == "a batch of 5 windows does not fit into memory; going on with 1"


def test_other_errors_pass_and_one_that_does_not_fit_is_named(notices):
    def fail(error: Exception, rows: slice) -> None:
        raise error

    for error in (RuntimeError("a fault"), ValueError("allocate memory")):
        with pytest.raises(type(error)) as found:
            memory.BatchSize(4).run(functools.partial(fail, error), 4)
        assert found.value is error
    assert notices() == []
    with pytest.raises(
        MemoryError, match="one of the windows fits into memory .*tried to"
    ) as found:
        memory.BatchSize(2, noun="windows").run(functools.partial(fail, ON_CPU), 4)
    assert found.value.__cause__ is ON_CPU and len(notices()) == 1


# --- scanning and evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, -1])
def test_losses_are_the_same_on_halved_batches(layer, notices):
    model, ids = ARCHITECTURES["llama"](), windows(7)
    expected = evaluation.token_losses(model, ids, batch_size=1)
    calls = limit_rows(model, 2, layer=layer)
    found = evaluation.token_losses(model, ids, batch_size=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert calls == [5, 2, 2, 2, 1]
    assert notices() == ["a batch of 5 windows does not fit into memory; going on with 2"]


@pytest.mark.parametrize("place", ["a layer", "the arithmetic", "its end"])
def test_a_scan_on_halved_batches_is_the_same_and_counts_nothing_twice(place, notices, monkeypatch):
    model, ids = ARCHITECTURES["llama"](), windows(6)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[4, 9:] = 0
    expected = similarity.measure_similarity(model, ids, mask, batch_size=2)
    if place == "a layer":
        limit_rows(model, 3, layer=3)
    else:
        monkeypatch.setattr(similarity, "CHUNK_TOKENS", 8)
        angles, calls = similarity._angles, []

        def scarce(states):
            """Without room after some chunks of the first batch, or for its last tokens."""
            calls.append(len(states))
            if len(calls) == 4 if place == "the arithmetic" else len(calls) == 9:
                raise ON_CPU
            return angles(states)

        monkeypatch.setattr(similarity, "_angles", scarce)
    found = similarity.measure_similarity(model, ids, mask, batch_size=4)
    assert notices() == ["a batch of 4 samples does not fit into memory; going on with 2"]
    assert (found.n_samples, found.n_tokens) == (6, int(mask.sum()))
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6), name


def test_taylor_is_the_same_on_halved_batches(notices, monkeypatch):
    model, ids = ARCHITECTURES["llama"](), windows(6)
    expected = importance.taylor(model, ids, batch_size=2)
    calls, own = [], passes.arguments_of_rows

    def scarce(arguments, rows, n_rows, alone):
        calls.append(rows.stop - rows.start)
        if calls[-1] > 2:
            raise ON_CPU
        return own(arguments, rows, n_rows, alone)

    monkeypatch.setattr(passes, "arguments_of_rows", scarce)
    assert importance.taylor(model, ids, batch_size=5) == pytest.approx(expected, rel=1e-6)
    assert notices() == ["a batch of 5 samples does not fit into memory; going on with 2"]
    assert all(weight.grad is None for weight in model.parameters())


def test_perplexities_without_a_layer_end_in_one_clear_error_where_one_sample_is_too_much(notices):
    model, ids = ARCHITECTURES["llama"](), windows(4)
    limit_rows(model, 2)
    with pytest.raises(MemoryError, match="not even a batch of one of the samples fits"):
        importance.perplexity_without_layer(model, ids, batch_size=4)
    assert [notice.rpartition(" ")[2] for notice in notices()] == ["2", "1"]


def test_answers_score_the_same_on_halved_batches(notices):
    model = ARCHITECTURES["llama"]()
    requests = [
        ([3 + prompt, 5, 7, 9], [11 + answer, 13]) for prompt in range(5) for answer in range(3)
    ]
    expected = prefixes.loglikelihoods(model, requests, batch_size=2)
    calls = limit_rows(model, 2)
    found = prefixes.loglikelihoods(model, requests, batch_size=4)
    assert calls[:2] == [4, 2] and max(calls[1:]) == 2
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert notices() == ["a batch of 4 questions does not fit into memory; going on with 2"]


def test_an_answer_is_counted_once_where_the_head_fails_between_its_tokens(notices, monkeypatch):
    model = ARCHITECTURES["llama"]()
    # Two prompts that share half, so that they are one row, and two that do not.
    requests = [([prompt, 5, prompt], [11, 13, 17, 19]) for prompt in (3, 4)]
    requests += [([7, 8, 9, last], [11, 13]) for last in (20, 21)]
    expected = prefixes.loglikelihoods(model, requests, batch_size=4)
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 128)
    own, calls = passes.head_logits, []

    def scarce(*given):
        for logits in own(*given):
            calls.append(len(logits))
            if len(calls) == 3:
                raise ON_CPU
            yield logits

    monkeypatch.setattr(passes, "head_logits", scarce)
    found = prefixes.loglikelihoods(model, requests, batch_size=4)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len(notices()) == 1


def test_a_row_of_many_prompts_is_taken_apart(notices, monkeypatch):
    model = ARCHITECTURES["llama"]()
    requests = [([3, 5, 7, 9, last], [11]) for last in range(20, 24)]
    expected = prefixes.loglikelihoods(model, requests, batch_size=4)
    own, tokens = prefixes._inputs, []

    def scarce(model, rows, start, cached):
        tokens.append(sum(len(row.tokens) for row in rows))
        if tokens[-1] > 5:
            raise ON_CPU
        return own(model, rows, start, cached)

    monkeypatch.setattr(prefixes, "_inputs", scarce)
    found = prefixes.loglikelihoods(model, requests, batch_size=4)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])
    assert tokens == [8, 2, 2], "what two prompts share is in the cache"
    assert notices() == ["a batch of 4 questions does not fit into memory; going on with 2"]


# --- healing --------------------------------------------------------------------------------------


def scarce_loss(monkeypatch, most: int, *, training: bool = True) -> list[tuple[int, bool]]:
    """Let the loss fail on more than ``most`` windows; the list fills with those of each call."""
    calls, own = [], healing.mean_loss

    def loss(model, ids):
        calls.append((len(ids), torch.is_grad_enabled()))
        if len(ids) > most and torch.is_grad_enabled() == training:
            raise ON_CPU
        return own(model, ids)

    monkeypatch.setattr(healing, "mean_loss", loss)
    return calls


@pytest.mark.parametrize("method", ["lora", "last_layers"])
def test_a_step_on_fewer_windows_at_once_is_the_step_of_micro_batches(method, monkeypatch, notices):
    settings = {"method": method, "steps": 3, "batch_size": 6, "dropout": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "MICRO_BATCH_TOKENS", 3 * windows().shape[1])
        expected = heal(llama(), **settings)
    calls = scarce_loss(monkeypatch, 3)
    found = heal(llama(), **settings)
    assert [size for size, _ in calls] == [6, *[3] * 6]
    assert same(bits(found.model), bits(expected.model))
    assert found.history.equals(expected.history)
    assert notices() == ["a batch of 6 windows does not fit into memory; going on with 3"]


@pytest.mark.parametrize("method", ["lora", "qlora", "last_layers", "full"])
def test_where_one_window_does_not_fit_activations_are_computed_again(method, monkeypatch, notices):
    settings = {"method": method, "steps": 2, "batch_size": 4, "dropout": 0.1}
    expected = heal(llama(), **settings)
    calls, own = [], healing.mean_loss

    def loss(model, ids):
        calls.append((len(ids), model.is_activation_checkpointing))
        if not model.is_activation_checkpointing or len(ids) > 4:
            raise ON_CPU
        return own(model, ids)

    monkeypatch.setattr(healing, "mean_loss", loss)
    found = heal(llama(), **settings)
    assert calls == [(4, False), (2, False), (1, False), (4, True), (4, True)]
    assert same(bits(found.model), bits(expected.model))
    assert found.history.equals(expected.history)
    assert not found.model.is_activation_checkpointing
    assert "activations of one window do not fit" in notices()[-1] and len(notices()) == 3


@pytest.mark.parametrize("device, again", [("cpu", True), ("cuda", False)])
def test_large_models_compute_activations_again_at_once_on_a_processor_alone(
    device, again, monkeypatch
):
    monkeypatch.setattr(trainer, "LARGE", 0)
    model = llama()
    run = trainer.Run(None, healing.check_settings(model, {}), model, None, windows(), None)
    asked: list[dict] = []
    monkeypatch.setattr(
        trainer, "TrainingArguments", lambda **given: asked.append(given) or Mock(n_gpu=1)
    )
    monkeypatch.setattr(type(model), "device", torch.device(device))
    trainer._training_arguments(model, run)
    assert asked[0]["activation_checkpointing"] is again


def test_a_step_that_fails_in_the_middle_begins_again_with_nothing_left_of_it(monkeypatch, notices):
    settings = {"method": "full", "steps": 2, "batch_size": 6}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "MICRO_BATCH_TOKENS", windows().shape[1])
        expected = heal(llama(), **settings)
    monkeypatch.setattr(trainer, "MICRO_BATCH_TOKENS", 2 * windows().shape[1])
    calls, handles, own = [], [], healing.mean_loss

    def loss(model, ids):
        """The second micro-batch of the first step has gone half of its way back."""
        calls.append(len(ids))
        if len(calls) == 2:
            weight = model.model.layers[2].mlp.up_proj.weight
            handles.append(weight.register_hook(fail))
        return own(model, ids)

    def fail(gradient):
        handles.pop().remove()
        raise ON_CPU

    monkeypatch.setattr(healing, "mean_loss", loss)
    found = heal(llama(), **settings)
    assert calls == [2, 2, *[1] * 12]
    assert same(bits(found.model), bits(expected.model))
    pd.testing.assert_frame_equal(found.history, expected.history, check_exact=True)
    assert notices() == ["a batch of 2 windows does not fit into memory; going on with 1"]


def test_evaluations_on_the_way_take_fewer_windows_and_say_the_same(monkeypatch, notices):
    settings = {"steps": 2, "eval_ids": windows(5)}
    expected = heal(llama(), **settings)
    calls = scarce_loss(monkeypatch, 2, training=False)
    found = heal(llama(), **settings)
    assert same(bits(found.model), bits(expected.model))
    assert found.history["loss"].tolist() == pytest.approx(expected.history["loss"].tolist())
    assert [size for size, trains in calls if not trains] == [5, 2, 2, 1, *[2, 2, 1] * 2]
    assert len(notices()) == 1


def test_an_interrupted_run_ends_like_any_other_where_memory_is_scarce(monkeypatch, tmp_path):
    settings = {"steps": 4, "batch_size": 4, "dropout": 0.2, "eval_ids": windows(3)}
    scarce_loss(monkeypatch, 1)
    expected = heal(llama(), **settings)
    with monkeypatch.context() as patch:
        evaluate = trainer.HealingTrainer.evaluate
        patch.setattr(
            trainer.HealingTrainer,
            "evaluate",
            lambda self, *given, **named: (
                evaluate(self, *given, **named)
                if self.state.global_step < 3
                else pytest.fail("stopped")
            ),
        )
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            heal(llama(), output_dir=tmp_path / "run", **settings)
    calls = scarce_loss(monkeypatch, 1)
    found = heal(llama(), output_dir=tmp_path / "run", **settings)
    assert len([size for size, trains in calls if trains]) == 2 + 2 * 4, "steps 3 and 4 alone"
    assert same(bits(found.model), bits(expected.model)) and found.history.equals(expected.history)


def test_one_window_that_does_not_fit_ends_the_run_and_keeps_what_was_saved(monkeypatch, tmp_path):
    settings = {"steps": 4, "output_dir": tmp_path / "run"}
    calls, own = [], healing.mean_loss

    def loss(model, ids):
        calls.append(len(ids))
        if len(calls) > 2:
            raise ON_CPU
        return own(model, ids)

    with monkeypatch.context() as patch:
        patch.setattr(healing, "mean_loss", loss)
        with pytest.raises(MemoryError, match="not even a batch of one of the windows fits"):
            heal(llama(), **settings)
    assert trainer.is_whole(tmp_path / "run/checkpoint-2")
    assert heal(llama(), **settings).history.equals(heal(llama(), steps=4).history)
