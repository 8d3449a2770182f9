"""What the quickstart says beforehand."""

import pytest
import torch
from architectures import ARCHITECTURES

from pruning_utils import evaluation, models
from pruning_utils.studies import whole_path

TOKENS = {"evaluation_tokens": 40, "question_tokens": 20, "validation_tokens": 30}


@pytest.fixture
def steady(monkeypatch):
    """A clock by which a pass forwards takes 2 s, one forwards and backwards 6 s, and one token 1
    s."""
    times = iter([6.0, 2.0, 1.0] * 4)
    measure = whole_path._seconds
    monkeypatch.setattr(
        whole_path, "_seconds", lambda run, device: measure(run, device) * 0 + next(times)
    )


def foretold(model, **changed):
    given = {**TOKENS, "block_size": 1, "training_tokens": 48, **changed}
    return whole_path.foretell(model, torch.arange(24).view(3, 8), **given)


def test_stages_as_worked_by_hand(steady, capfd):
    """0.25 s a token forwards, 0.75 s in training, and three quarters of both once one of four
    layers is gone."""
    model = ARCHITECTURES["llama"]()
    left = 1 - 1 / len(models.decoder_layers(model))
    found = foretold(model)
    measure = 0.25 * 60 + 24 * 1
    assert found == pytest.approx(
        {
            "scan": 0.25 * 24,
            "measure": measure,
            "measure the pruned model": left * measure,
            "heal": left * (0.75 * 3 * 2 * 8 + 0.25 * 30 * 9),
            "measure the healed model": left * (measure + 0.25 * 4 * 8),
        }
    )
    said = capfd.readouterr().err
    assert (
        f"about {sum(found.values()) / 60:.1f} minutes here (float32, " in said
        and "scan 6 s, measure 39 s" in said
    )
    assert foretold(model, training_tokens=96)["heal"] > found["heal"]


def test_tokens_of_questions_are_those_of_prompts_and_answers():
    """One token a word; a likelihood task has one answer to score."""
    tokenizer = lambda texts: {"input_ids": [text.split() for text in texts]}  # noqa: E731
    for name, answers in (("openbookqa", "doc_to_choice"), ("gsm8k_chain", "doc_to_target")):
        task = evaluation.load_tasks([name], limit=2)[name]["tasks"][name]
        texts = []
        for question in task.eval_docs:
            given = getattr(task, answers)(question)
            texts += [task.doc_to_text(question), *([given] if isinstance(given, str) else given)]
        n_words = sum(len(text.split()) for text in texts)
        assert whole_path.question_tokens(tokenizer, name, 2) == n_words > 20
    assert whole_path.question_tokens(tokenizer, "lm-eval:piqa", 2) == 0
    former, name = (whole_path.question_tokens(tokenizer, of, 2) for of in ("siqa", "social_iqa"))
    assert former == name > 20


def test_foretelling_takes_six_passes_and_leaves_the_model_as_it_was():
    model, passes = ARCHITECTURES["llama"](), []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    models.decoder_layers(model)[0].register_forward_pre_hook(lambda *_: passes.append(1))
    foretold(model)
    assert len(passes) == 6, "each kind of pass twice, the first of which prepares kernels"
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_continuation_is_greedy_whatever_the_model_would_rather_do(monkeypatch):
    model, tokenizer = models.load_model(dtype="float32")
    heard = []
    plain = whole_path.continue_text(model, tokenizer, "The sea is", n_tokens=6)
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **given: heard.append(model.generation_config) or generate(**given),
    )
    model.generation_config.update(num_beams=3, repetition_penalty=3.0)
    assert whole_path.continue_text(model, tokenizer, "The sea is", n_tokens=6) == plain
    assert heard[0].num_beams in (None, 1) and model.generation_config.num_beams == 3
