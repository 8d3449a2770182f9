"""Perplexity against the models' own losses, benchmark scores against values by hand."""

import copy
import logging
import math
import random
import shutil
import socket
import string
from pathlib import Path

import datasets
import lm_eval.utils
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES
from tiny_model import StandIn
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pruning_utils import data, evaluation, models
from pruning_utils.engine import benchmarks, passes, prefixes

V = 96
SHARED = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
# Models that do more to their logits, or to the states before them, than apply one matrix; and one
# that does not.
PECULIAR = {
    "llama": {},
    "cohere2": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 2.0},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "minicpm3": {
        "dim_model_base": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "num_key_value_heads": 4,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},
}


def tiny_model(name: str = "llama", **settings) -> nn.Module:
    """A random float32 model, its weights large enough that logits span several nats."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHARED, **PECULIAR[name], **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def windows(n: int = 3, length: int = 9, vocabulary: int = V) -> torch.Tensor:
    return torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))


def own_losses(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Losses by token from the logits of the model's own forward."""
    with torch.no_grad():
        logits = model(input_ids).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].mT, input_ids[:, 1:], reduction="none")


# --- losses by token and perplexity ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, *(f"peculiar {name}" for name in PECULIAR)])
def test_losses_equal_the_models_own(name, monkeypatch):
    model = (
        ARCHITECTURES[name]()
        if name in ARCHITECTURES
        else tiny_model(name.removeprefix("peculiar "))
    )
    input_ids = windows()
    expected = own_losses(model, input_ids)
    with torch.no_grad():
        # Mixtures of experts add a loss for the use of their experts, unless told not to.
        quiet = (
            {"output_router_logits": False}
            if getattr(model.config, "output_router_logits", False)
            else {}
        )
        reported = model(input_ids, labels=input_ids, **quiet).loss
    assert torch.allclose(expected.mean(), reported, atol=1e-5)
    assert expected.std() > 0.05, "the logits are too flat to tell scalings apart"

    runs, widths = [], []
    models.decoder_layers(model)[0].register_forward_hook(lambda *_: runs.append(1))
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, call: widths.append(call[0][..., 0].numel())
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    # Chunks of five tokens cross the ends of windows.
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 5 * vocabulary)
    losses = evaluation.token_losses(model, input_ids, batch_size=3)
    assert losses.dtype == torch.float32 and losses.shape == (3, 8)
    assert torch.allclose(losses, expected, atol=5e-5)
    assert len(runs) == 1, "the decoder layers run once a batch"
    assert max(widths) == 5, "the head sees one chunk at a time"


def test_scaling_and_capping_are_not_lost():
    """Without its own treatment of logits each of these would give other losses."""
    for name, field, neutral in (
        ("gemma2", "final_logit_softcapping", None),
        ("cohere2", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
    ):
        with_it, without = tiny_model(name), tiny_model(name, **{field: neutral})
        without.load_state_dict(with_it.state_dict())
        difference = evaluation.token_losses(with_it, windows()) - evaluation.token_losses(
            without, windows()
        )
        assert difference.abs().max() > 0.1, name


class OwnHead(LlamaForCausalLM):
    """An architecture whose head cannot be asked for single tokens."""

    def forward(self, input_ids, use_cache=None):
        output = super().forward(input_ids, use_cache=use_cache)
        output.logits = 0.5 * output.logits
        return output


def test_unknown_head_falls_back_on_its_forward():
    torch.manual_seed(0)
    model = OwnHead(LlamaConfig(**SHARED)).eval()
    assert torch.allclose(
        evaluation.token_losses(model, windows()), own_losses(model, windows()), atol=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens_at_once", [1, 3, 1000])
def test_batches_and_chunks_change_nothing(batch_size, tokens_at_once, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", tokens_at_once * V)
    assert torch.allclose(
        evaluation.token_losses(model, windows(), batch_size=batch_size),
        own_losses(model, windows()),
        atol=2e-5,
    )


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = tiny_model()
    nn.init.zeros_(model.lm_head.weight)
    assert torch.allclose(evaluation.token_losses(model, windows()), torch.tensor(math.log(V)))
    assert evaluation.perplexity(model, windows()) == pytest.approx(V, rel=1e-6)


def test_perplexity_is_over_tokens_not_windows(monkeypatch):
    # Mean loss (ln 2 + ln 2 + ln 8 + ln 4) / 4 = (7 / 4) ln 2; a mean of exponentials would give 4.
    losses = torch.tensor([[2.0, 2.0], [8.0, 4.0]]).log()
    monkeypatch.setattr(evaluation, "token_losses", lambda *_, **__: losses)
    assert evaluation.perplexity(None, None) == pytest.approx(2**1.75)
    monkeypatch.setattr(evaluation, "token_losses", lambda *_, **__: 1000 * losses)
    assert evaluation.perplexity(None, None) == math.inf


def test_first_token_is_context_only():
    model, input_ids = tiny_model(), windows(1, 2)
    with torch.no_grad():
        expected = -model(input_ids[:, :1]).logits[0, 0].log_softmax(-1)[input_ids[0, 1]]
    assert evaluation.token_losses(model, input_ids).item() == pytest.approx(
        expected.item(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (windows().float(), "integer"),
        (windows()[0], "shape"),
        (windows() > 5, "integer tensor .*got bool"),
        (windows()[:0], "shape"),
        (windows()[:, :1], "2 tokens"),
        (windows() + V, rf"input_ids must lie in the vocabulary \[0, {V}\)"),
        (windows() - 99, r"must lie in .* got -\d+"),
        (windows(1, 65), "64 tokens, got 65"),
        ([[1, 2]], "list"),
    ],
)
def test_bad_windows_are_refused(input_ids, message):
    with pytest.raises(ValueError, match=message):
        evaluation.perplexity(tiny_model(), input_ids)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, None])
def test_bad_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        evaluation.token_losses(tiny_model(), windows(), batch_size=batch_size)


def test_nan_losses_are_refused():
    model = tiny_model()
    unused = next(token for token in range(3, V) if token not in windows()[:2])
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = math.nan
    input_ids = windows()
    # Masked attention multiplies it by zero, which leaves NaN in the whole window.
    input_ids[2, 6] = unused
    with pytest.raises(ValueError, match="8 of 24 are NaN, first in window 2"):
        evaluation.perplexity(model, input_ids)


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_model_comes_back_as_it_was():
    model = tiny_model().train()
    model.model.layers[1].eval()
    before, attributes = modes(model), [set(vars(module)) for module in model.modules()]
    evaluation.token_losses(model, windows())
    assert modes(model) == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    # An error on the way leaves nothing behind either.
    with pytest.raises(ValueError, match="positions"):
        model.lm_head.register_forward_hook(lambda *call: call[2].repeat(1, 2, 1))
        evaluation.token_losses(model, windows())
    assert modes(model) == before
    assert "forward" not in vars(model.model)
    assert torch.is_grad_enabled()


def test_dropout_is_off():
    model = tiny_model(attention_dropout=0.5).train()
    assert torch.equal(
        evaluation.token_losses(model, windows()), evaluation.token_losses(model, windows())
    )


def test_adapters_count():
    peft = pytest.importorskip("peft")
    base = tiny_model()
    plain = evaluation.token_losses(base, windows())
    model = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted = evaluation.token_losses(model, windows())
    assert torch.allclose(adapted, own_losses(model.eval(), windows()), atol=2e-5)
    assert (adapted - plain).abs().max() > 0.01
    prompted = peft.get_peft_model(
        tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(ValueError, match="12 positions where 8 tokens follow"):
        evaluation.token_losses(prompted, windows())


def test_four_bit_model_can_be_trained_after_evaluation():
    peft = pytest.importorskip("peft")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = models.quantized_copy(
        tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).bfloat16()
    )
    losses = evaluation.token_losses(quantized, windows())
    assert torch.allclose(losses, own_losses(quantized.train(), windows()), atol=0.02)
    model = peft.get_peft_model(quantized, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    evaluation.token_losses(model, windows())
    packed = [
        module
        for module in model.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
        and getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    ]
    assert not packed
    model.train()(windows(), labels=windows()).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 4 and all(gradient.abs().sum() > 0 for gradient in gradients)


# --- benchmark questions --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    """The embedded model and its tokenizer; in float32 batches change the last digits only."""
    return models.load_model(dtype="float32")


@pytest.fixture(scope="module")
def small(embedded):
    """A random model with the embedded one's vocabulary, for what need not be right."""
    return tiny_model(vocab_size=len(embedded[1]), max_position_embeddings=8192), embedded[1]


@pytest.fixture
def toy(monkeypatch):
    """A model of lm-eval whose log-likelihoods are a function of (prompt, continuation).

    Its tokens are characters. All requests are kept in ``requests``. Continuations in ``greedy``
    are the most likely ones.
    """
    from lm_eval.api.model import TemplateLM

    class ToyLM(TemplateLM):
        eot_token_id, max_length = 0, 10**6
        requests, greedy = [], ()

        def loglikelihood_of(self, prompt, continuation):
            return -random.Random(prompt + continuation).random() * len(continuation)

        def tok_encode(self, string, add_special_tokens=None, **_):
            return [ord(character) for character in string]

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [pair for pair, *_ in requests]
            self.requests.extend(pairs)
            return [(self.loglikelihood_of(*pair), pair[1] in self.greedy) for pair in pairs]

        def loglikelihood_rolling(self, requests, **_):
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    scorer = ToyLM()
    scorer.requests = []
    monkeypatch.setattr(prefixes, "language_model", lambda *_: scorer)
    return scorer


def with_rows(monkeypatch, split: str, *rows: dict):
    """Let the scored split of every data set consist of these rows."""
    made = [{**row, "question_id": number} for number, row in enumerate(rows)]
    monkeypatch.setattr(benchmarks, "_rows", lambda path, name: (made, split, []))


def goal(text: str, first: str, second: str, label: int) -> dict:
    """A row of PIQA."""
    return {"goal": text, "sol1": first, "sol2": second, "label": label}


def value(summary: pd.DataFrame, metric: str, column: str = "value") -> float:
    return summary.set_index("metric").loc[metric, column]


def test_scores_worked_by_hand(toy, monkeypatch):
    table = {
        " ab": -2.0,
        " cdefgh": -3.0,
        " x": -4.0,
        " éé": -4.5,
        " yes, it is": -1.0,
        " no": -1.0 - math.log(3),
    }
    toy.loglikelihood_of = lambda _, continuation: table[continuation]
    with_rows(
        monkeypatch,
        "validation",
        goal("q0", "ab", "cdefgh", 0),
        goal("q1", "x", "éé", 1),
        goal("q2", "no", "yes, it is", 1),
    )
    result = evaluation.evaluate_tasks(StandIn(), None, ["piqa"])
    rows = result.questions.set_index("question_id").sort_index()
    # q0: -2 beats -3; by character -2/2 = -1 loses to -3/6. q1: -4 beats -4.5; by character -4/1
    # loses to -4.5/2. q2: -1 beats -1 - ln 3, and by character -1/10 beats it all the more.
    assert rows.correct.tolist() == [1, 0, 1]
    assert rows.correct_norm.tolist() == [0, 1, 1]
    # Differences of the log-likelihoods by character: -1/2, 4 - 4.5/2 and (1 + ln 3)/2 - 1/10.
    right = [1 / (1 + math.exp(-difference)) for difference in (-0.5, 1.75, 0.4 + math.log(3) / 2)]
    assert rows.p_right.tolist() == pytest.approx(right)
    # Tokens are the characters of " ab", " éé" and " yes, it is".
    losses = [2 / 3, 4.5 / 3, 1 / 11]
    assert rows.nll.tolist() == pytest.approx(losses)

    summary = result.summary
    assert summary.columns.tolist() == ["task", "metric", "value", "stderr", "n"]
    assert summary.metric.tolist() == ["acc", "acc_norm", "p_right", "nll"]
    assert set(summary.task) == {"piqa"} and set(summary.n) == {3}
    assert summary.value.tolist() == pytest.approx([2 / 3, 2 / 3, np.mean(right), np.mean(losses)])
    # Two hits in three: sample variance 1/3, so the error is sqrt(1/3 / 3) = 1/3.
    assert summary.stderr.tolist() == pytest.approx(
        [1 / 3, 1 / 3, np.std(right, ddof=1) / 3**0.5, np.std(losses, ddof=1) / 3**0.5]
    )


def test_balanced_accuracy_worked_by_hand(toy, monkeypatch):
    # Right answers yes yes yes no no, of which "yes" to the first two and to the last: recalls 2/3
    # and 1/2.
    says_yes = {"q0": True, "q1": True, "q2": False, "q3": False, "q4": True}
    toy.loglikelihood_of = lambda prompt, answer: (
        -1.0 - (says_yes[prompt[-11:-9]] != (answer == " yes"))
    )
    rows = [
        {"passage": "", "question": f"q{number}", "label": int(number < 3)} for number in range(5)
    ]
    with_rows(monkeypatch, "validation", *rows)
    summary, questions = evaluation.evaluate_tasks(StandIn(), None, ["boolq"])
    assert summary.metric.tolist() == ["acc", "p_right", "nll", "balanced_acc"]
    # Labels are compared as they are, whatever their lengths: -1 against -2, or the other way
    # round.
    assert questions.set_index("question_id").p_right.sort_index().tolist() == pytest.approx(
        [1 / (1 + math.exp(sign)) for sign in (-1, -1, 1, -1, 1)]
    )
    assert value(summary, "acc") == pytest.approx(3 / 5)
    assert value(summary, "balanced_acc") == pytest.approx((2 / 3 + 1 / 2) / 2)
    # Errors of the recalls: sqrt(1/3 / 3) = 1/3 and sqrt(1/2 / 2) = 1/2.
    assert value(summary, "balanced_acc", "stderr") == pytest.approx(math.sqrt(1 / 9 + 1 / 4) / 2)


def test_one_question_has_no_standard_error(toy, monkeypatch):
    row = goal("q0", "ab", "cd", 0) | {"passage": "p", "question": "q"}
    with_rows(monkeypatch, "validation", row)
    summary = evaluation.evaluate_tasks(StandIn(), None, ["piqa", "boolq"]).summary
    assert summary.stderr.isna().all() and summary.value.notna().all()


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_log_likelihoods_must_be_finite(toy, broken):
    toy.loglikelihood_of = lambda *_: broken
    with pytest.raises(ValueError, match="must be finite, got .* for piqa"):
        evaluation.evaluate_tasks(StandIn(), None, ["piqa"], limit=2)


def test_smaller_limits_are_contained(toy):
    tables = {
        limit: evaluation.evaluate_tasks(
            StandIn(), None, ["openbookqa", "social_iqa"], limit=limit
        ).questions
        for limit in (20, 40, None)
    }
    for task, total in (("openbookqa", 500), ("social_iqa", 1954)):
        few, more, every = (
            table[table.task == task].reset_index(drop=True) for table in tables.values()
        )
        assert (len(few), len(more), len(every)) == (20, 40, total)
        pd.testing.assert_frame_equal(few, more[:20])
        pd.testing.assert_frame_equal(more, every[:40])
        assert every.question_id.is_unique
        assert few.question_id.max() > total / 2, "the first questions are no sample of the file"
        assert sorted(every.question_id) == list(range(total))


def test_limit_beyond_the_benchmark_takes_all(toy):
    assert (
        len(evaluation.evaluate_tasks(StandIn(), None, ["openbookqa"], limit=10**6).questions)
        == 500
    )


def test_another_order_has_the_same_shots_and_questions(toy):
    solved, asked = [], []
    for shot_order in (0, 1, 2, 1):
        toy.requests.clear()
        questions = evaluation.evaluate_tasks(
            StandIn(), None, ["social_iqa"], num_fewshot=4, limit=5, shot_order=shot_order
        ).questions
        (shots,) = {tuple(prompt.split("\n\n")[:-1]) for prompt, _ in toy.requests}
        solved.append(shots)
        asked.append(questions.question_id.tolist())
    assert len(set(solved)) == 3 and solved[1] == solved[3], "an order is fixed by its number"
    assert len({frozenset(shots) for shots in solved}) == 1 and asked.count(asked[0]) == 4


@pytest.mark.parametrize("limit", [None, 30, 1260])
def test_shots_are_never_scored(toy, limit):
    """Where the package has no other split, they are the last 16 of the scored one."""
    rows, _, _ = benchmarks._rows("allenai/winogrande", "winogrande_xl")
    questions = evaluation.evaluate_tasks(
        StandIn(), None, ["winogrande"], num_fewshot=3, limit=limit
    ).questions
    assert len(questions) == (30 if limit == 30 else 1267 - 16)
    (solved,) = {tuple(prompt.split("\n\n")[:-1]) for prompt, _ in toy.requests}
    assert len(solved) == 3, "every prompt starts with the same shots"
    by_sentence = {
        row["sentence"].replace("_", row[f"option{row['answer']}"]): row["question_id"]
        for row in rows
    }
    shot_ids = {by_sentence[text] for text in solved}
    assert len(shot_ids) == 3 and not shot_ids & set(questions.question_id)
    without = evaluation.evaluate_tasks(StandIn(), None, ["winogrande"]).questions
    assert len(without) == 1267 and shot_ids < set(without.question_id)
    assert questions.question_id.tolist() == without.question_id[: len(questions)].tolist()


def test_shots_of_another_split_leave_all_questions_to_score(toy):
    rows, _, shots = benchmarks._rows("allenai/openbookqa", "main")
    questions = evaluation.evaluate_tasks(StandIn(), None, ["openbookqa"], num_fewshot=16).questions
    assert sorted(questions.question_id) == list(range(500))
    (solved,) = {tuple(prompt.split("\n\n")[:-1]) for prompt, _ in toy.requests}
    assert solved == tuple(
        f"{shot['question_stem']} {shot['choices']['text']['ABCD'.index(shot['answerKey'])]}"
        for shot in shots
    )
    assert not {row["question_stem"] for row in rows} & {shot["question_stem"] for shot in shots}


ALGEBRA = "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q."
# The prompt of the first row of each data set's file, and its right answer.
PROMPTS = {
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        " starts pulling up roofing on a roof.",
    ),
    "winogrande": (
        "Sarah was a much better surgeon than Maria so Maria",
        " always got the easier cases.",
    ),
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most food "
        "webs?\nAnswer:",
        " Sunlight is the source of energy for nearly all ecosystems.",
    ),
    "arc_challenge": (
        "Question: An astronomer observes that a planet rotates faster after a meteorite impact. "
        "Which is the most likely effect of this increase in rotation?\nAnswer:",
        " Planetary days will become shorter.",
    ),
    "piqa": (
        "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:",
        " Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper "
        "strips, you will also need to supply it with a water bottle and a food dish.",
    ),
    "openbookqa": (
        "A person wants to start saving money so that they can afford a nice vacation at the end "
        "of the year. After looking over their budget and expenses, they decide the best way to "
        "save money is to",
        " quit eating lunch out",
    ),
    "mmlu": (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        f"{ALGEBRA}\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:",
        " B",
    ),
    "mmlu_continuation": (
        "The following are questions (with answers) about abstract algebra.\n\n"
        f"Question: {ALGEBRA}\nAnswer:",
        " 4",
    ),
    "social_iqa": (
        "Q: Tracy didn't go home that evening and resisted Riley's attacks. What does Tracy need "
        "to do before this?\nA:",
        " Find somewhere to go",
    ),
    "lambada_openai": (
        "In my palm is a clear stone, and inside it is a small ivory statuette. A guardian angel. "
        "\"Figured if you're going to be out at night getting hit by cars, you might as well have "
        'some backup." I look at him, feeling stunned. Like this is some sort of sign. But as I '
        "stare at Harlin, his mouth curved in a confident grin, I don't care about",
        " signs",
    ),
    "basic_skills": (
        "47 + 12 = 59\n\n16 + 8 / 4 = 18\n\n24 / 6 = 4\n\n8 + 12 = 20\n\n7 - 4 + 10 = 13\n\n"
        "4 * 8 =",
        " 32",
    ),
}


def only_first_rows(monkeypatch):
    """Let the scored split of every data set be the first row of its file."""
    whole = benchmarks._rows

    def first(path, name):
        rows, split, shots = whole(path, name)
        return rows[:1], split, shots

    monkeypatch.setattr(benchmarks, "_rows", first)


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts_to_the_letter(task, toy, monkeypatch):
    """The one that gets the higher log-likelihood is the one that counts as right."""
    only_first_rows(monkeypatch)
    toy.loglikelihood_of = lambda *pair: -1.0 - (pair != PROMPTS[task])
    result = evaluation.evaluate_tasks(StandIn(), None, [task], limit=1)
    n_choices = {"winogrande": 2, "piqa": 2, "social_iqa": 3, "lambada_openai": 1}
    assert len(set(toy.requests)) == n_choices.get(task, 10 if task == "basic_skills" else 4)
    assert PROMPTS[task] in toy.requests
    assert result.questions.nll.tolist() == [1 / len(PROMPTS[task][1])]
    assert task == "lambada_openai" or result.questions.correct.tolist() == [1]


def test_boolq_prompt(toy, monkeypatch):
    only_first_rows(monkeypatch)
    evaluation.evaluate_tasks(StandIn(), None, ["boolq"])
    (prompt, no), (again, yes) = toy.requests
    assert prompt == again and (no, yes) == (" no", " yes")
    assert prompt.startswith(
        "Ethanol fuel -- All biomass goes through at least some of these steps: it needs"
    )
    assert prompt.endswith(
        " concluded that producing ethanol from corn uses much less petroleum than producing "
        "gasoline.\nQuestion: does ethanol take more energy make that produces?\nAnswer:"
    )


def test_gsm8k_prompt(toy, monkeypatch):
    """Eight solved problems stand before each one."""
    only_first_rows(monkeypatch)
    evaluation.evaluate_tasks(StandIn(), None, ["gsm8k_chain"])
    ((prompt, chain),) = toy.requests
    *solved, asked = prompt.split("\n\n")
    assert len(solved) == 8
    assert all(
        text.startswith("Question: ") and "\nAnswer: " in text and "So the answer is " in text
        for text in solved
    )
    assert asked.startswith("Question: Janet’s ducks lay 16 eggs per day.")
    assert asked.endswith("every day at the farmers' market?\nAnswer:")
    assert chain == (
        " Janet sells 16 - 3 - 4 = 9 duck eggs a day. She makes 9 * 2 = $18 every day at the "
        "farmer’s market. So the answer is 18."
    )


def test_embedded_tasks_use_no_network(small, monkeypatch, tmp_path, capsys, caplog):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    benchmarks.task_manager.cache_clear()
    with caplog.at_level(logging.WARNING):
        result = evaluation.evaluate_tasks(*small, evaluation.TASKS, limit=2)
    assert result.questions.groupby("task").size().to_dict() == dict.fromkeys(evaluation.TASKS, 2)
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert not printed.out
    noise = [
        line
        for line in printed.err.replace("\r", "\n").splitlines()
        if line.strip() and not line.startswith("log-likelihoods: ")
    ]
    assert not noise
    assert not caplog.records


def test_nothing_else_is_changed(small):
    model, tokenizer = copy.deepcopy(small[0]).train(), copy.deepcopy(small[1])
    models.untie_head(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    # A model whose configuration lags behind must not be tied again either.
    model.config.tie_word_embeddings = True
    model.model.layers[0].eval()
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    levels = {
        name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")
    }

    def state():
        return (
            random.getstate(),
            str(np.random.get_state()),
            torch.get_rng_state().tolist(),
            modes(model),
            [set(vars(module)) for module in model.modules()],
            tokenizer.padding_side,
            tokenizer.pad_token,
            tokenizer.truncation_side,
            len(tokenizer),
            tokenizer.backend_tokenizer.padding,
            tokenizer.backend_tokenizer.truncation,
            torch.is_grad_enabled(),
            model.lm_head.weight is model.model.embed_tokens.weight,
            {name: logging.getLogger(name).level for name in levels},
            datasets.are_progress_bars_disabled(),
            datasets.load_dataset,
            dict(vars(lm_eval.utils.env)),
        )

    before, weights = state(), copy.deepcopy(model.state_dict())
    evaluation.evaluate_tasks(model, tokenizer, ["hellaswag", "lambada_openai"], limit=3)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_adapters_and_quantised_models_are_scored(small):
    peft = pytest.importorskip("peft")
    model, tokenizer = copy.deepcopy(small[0]), small[1]
    plain = evaluation.evaluate_tasks(model, tokenizer, ["piqa"], limit=4).questions
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    changed = evaluation.evaluate_tasks(adapted, tokenizer, ["piqa"], limit=4).questions
    assert (changed.nll - plain.nll).abs().max() > 0.01
    wide = tiny_model(
        vocab_size=len(tokenizer),
        hidden_size=64,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=8192,
    ).bfloat16()
    quantized = models.quantized_copy(wide)
    near = evaluation.evaluate_tasks(quantized, tokenizer, ["piqa"], limit=4).questions
    own = evaluation.evaluate_tasks(wide, tokenizer, ["piqa"], limit=4).questions
    stands_for = plain_weights(wide, quantized)
    rounded = evaluation.evaluate_tasks(stands_for, tokenizer, ["piqa"], limit=4)
    assert near.nll.tolist() == pytest.approx(rounded.questions.nll.tolist(), abs=0.05)
    assert (near.nll - own.nll).abs().max() > 0.05, "the weights in four bits are used"
    assert not any(
        getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
        for module in quantized.modules()
        if hasattr(module, "weight")
    )


def plain_weights(model, quantized):
    """The model with the weights that the four bits of its copy stand for."""
    from bitsandbytes.functional import dequantize_4bit

    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                values = dequantize_4bit(module.weight.data, state)
                rounded.get_submodule(name).weight.copy_(values)
    return rounded


def test_cut_prompts_are_reported(small, caplog):
    model = tiny_model(vocab_size=len(small[1]), max_position_embeddings=16)
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        evaluation.evaluate_tasks(model, small[1], ["boolq"], limit=4)
    assert "4 prompts of boolq" in caplog.text and "16 tokens" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "one or more of hellaswag, winogrande, arc_easy"),
        ({"tasks": "piqa"}, "must be a list"),
        ({"limit": 0}, "limit must be a whole number .*, got 0"),
        ({"limit": -3}, "-3"),
        ({"limit": 0.5}, "0.5"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0, got -1"),
        ({"num_fewshot": 17}, r"num_fewshot must be in \[0, 16\], got 17 for piqa"),
        (
            {"tasks": ["piqa", "lambada_openai"], "num_fewshot": 1},
            r"num_fewshot must be in \[0, 0\], got 1 for lambada_openai",
        ),
        (
            {"tasks": ["basic_skills"], "num_fewshot": 1, "limit": 1},
            r"num_fewshot must be in \[0, 0\], got 1 for basic_skills",
        ),
        (
            {"tasks": ["mmlu"], "num_fewshot": 6, "limit": 1},
            r"num_fewshot must be in \[0, 5\], got 6 for mmlu_abstract_algebra",
        ),
        (
            {"tasks": ["piqa", "winogrande"], "answers_only": True},
            "answers_only must be False for 'winogrande'.*got True",
        ),
        ({"shot_order": -1}, "shot_order must be a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"tasks": ["none"], "answers_only": "no"}, "answers_only must be True or False, got 'no'"),
    ],
)
def test_bad_requests_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(prefixes, "language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_tasks(StandIn(), None, **{"tasks": ["piqa"], **arguments})


# --- tasks that lm-eval brings --------------------------------------------------------------------

OFFICIAL_TASK = string.Template("""
task: $name
$source
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
OFFICIAL_ROWS = """
import random

import numpy as np
from datasets import Dataset

def load(**_):
    choices = ["one", "two", "three"]
    rows = [{"question": f"{n} plus one is", "choices": choices, "answer": n} for n in range(3)]
    return {"test": Dataset.from_list(rows)}

def judge(doc, results):
    return {"acc": 0.25}

def shuffled(**_):
    rows = load()["test"].to_list()
    for row in rows:
        row |= {"answer": 0, "drawn": f"{random.random()} {np.random.rand()}"}
    return {"test": Dataset.from_list(rows)}

def odd(**_):
    rows = load()["test"].to_list()
    for row, answer in zip(rows, ["one", "four", "three"]):
        row |= {"answer": answer, "question_id": "the same"}
    return {"test": Dataset.from_list(rows)}
"""
OFFICIAL_OTHERS = """
task: $name
custom_dataset: !function rows.load
test_split: test
doc_to_text: "{{question}}"
metric_list:
  - metric: acc
"""
OFFICIAL_TEXT = """
task: text
custom_dataset: !function rows.load
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
OFFICIAL_GROUP = """
group: sums
task: [piqa, other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def official(monkeypatch, tmp_path):
    """A stand-in for lm-eval's tasks: two of a kind, their group, another kind, one far away."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.py").write_text(OFFICIAL_ROWS)
    for name in ("piqa", "other"):
        (tmp_path / f"{name}.yaml").write_text(
            OFFICIAL_TASK.substitute(name=name, source="custom_dataset: !function rows.load")
        )
    (tmp_path / "far.yaml").write_text(
        OFFICIAL_TASK.substitute(name="far", source="dataset_path: nobody/nothing")
    )
    (tmp_path / "sums.yaml").write_text(OFFICIAL_GROUP)
    (tmp_path / "text.yaml").write_text(OFFICIAL_TEXT)
    kinds = {
        "judged": "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "output_type: multiple_choice\nprocess_results: !function rows.judge\n",
        "free": "doc_to_target: answer\noutput_type: generate_until\n",
        "code": "doc_to_target: answer\noutput_type: generate_until\nunsafe_code: true\n",
        "seen": "doc_to_target: answer\noutput_type: generate_until\ndoc_to_image: [question]\n",
    }
    of_choices = "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\noutput_type: "
    kinds["odd"] = of_choices + "multiple_choice\n"
    kinds["shuffled"] = of_choices + "multiple_choice\nfewshot_split: test\nnum_fewshot: 2\n"
    for name, lines in kinds.items():
        text = string.Template(OFFICIAL_OTHERS).substitute(name=name)
        if name in ("odd", "shuffled"):
            text = text.replace("rows.load", f"rows.{name}")
        (tmp_path / f"{name}.yaml").write_text(text + lines)
    brought = TaskManager(include_path=tmp_path, include_defaults=False)
    ours = benchmarks.task_manager(True)
    monkeypatch.setattr(benchmarks, "task_manager", lambda embedded: ours if embedded else brought)


def test_official_tasks_keep_their_prefix(toy, official):
    toy.loglikelihood_of = lambda prompt, answer: {" one": -1.0, " two": -2.0, " three": -3.0}.get(
        answer, -9.0
    )
    result = evaluation.evaluate_tasks(StandIn(), None, ["lm-eval:piqa", "piqa", "other"], limit=2)
    assert result.questions.task.tolist() == 2 * ["lm-eval:piqa"] + 2 * ["piqa"] + 2 * [
        "lm-eval:other"
    ]
    theirs = result.questions[result.questions.task == "lm-eval:other"]
    assert theirs.question_id.tolist() == [0, 1] and theirs.correct.tolist() == [1, 0]
    total = math.exp(-1) + math.exp(-2) + math.exp(-3)
    assert theirs.p_right.tolist() == pytest.approx([math.exp(-1) / total, math.exp(-2) / total])
    assert theirs.nll.tolist() == pytest.approx([1 / 4, 2 / 4])
    summary = result.summary[result.summary.task == "lm-eval:piqa"]
    assert summary.metric.tolist() == ["acc", "p_right", "nll"]
    assert value(summary, "acc") == 0.5 and value(summary, "acc", "stderr") == pytest.approx(0.5)
    assert result.questions.dtypes.astype(str).tolist()[1:] == 3 * ["int64"] + 2 * ["float64"]


def test_official_tasks_without_choices_have_no_questions(toy, official):
    toy.loglikelihood_rolling = lambda requests: [
        -3.0 * len(request.args[0]) for request in requests
    ]
    result = evaluation.evaluate_tasks(StandIn(), None, ["piqa", "text"], limit=2)
    assert set(result.questions.task) == {"piqa"} and result.questions.correct.dtype == np.int64
    # Three nats a character, which is a byte here.
    theirs = result.summary[result.summary.task == "lm-eval:text"]
    assert theirs.metric.tolist() == ["bits_per_byte"]
    assert value(theirs, "bits_per_byte") == pytest.approx(3 / math.log(2))
    only = evaluation.evaluate_tasks(StandIn(), None, ["text"]).questions
    assert not len(only) and only.columns.tolist() == result.questions.columns.tolist()


def test_official_groups_are_listed_whole(toy, official):
    toy.loglikelihood_of = lambda prompt, answer: -float(len(answer))
    summary = evaluation.evaluate_tasks(StandIn(), None, ["lm-eval:sums"]).summary
    assert summary[summary.metric == "acc"].set_index("task").n.to_dict() == {
        "lm-eval:piqa": 3,
        "lm-eval:other": 3,
        "lm-eval:sums": 6,
    }


def test_questions_without_a_right_answer_are_left_out_and_told(toy, official, caplog):
    toy.loglikelihood_of = lambda prompt, answer: -float(len(answer))
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        found, summary = (
            evaluation.evaluate_tasks(StandIn(), None, ["odd"])._asdict()[name]
            for name in ("questions", "summary")
        )
    assert summary.set_index("metric")["n"].to_dict() == {"acc": 3, "p_right": 2, "nll": 2}
    # Numbers are those of rows, whatever a row of a hub calls its question.
    assert found.question_id.tolist() == [0, 2] and found.correct.tolist() == [1, 0]
    assert "no choice of a question of odd is said to be right: 1 of them" in caplog.text


def test_tasks_that_draw_as_they_are_read_draw_alike_and_leave_the_callers_draws(official):
    np.random.seed(3)
    random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    drawn = [
        [row["drawn"] for row in loaded["shuffled"]["tasks"]["shuffled"].eval_docs]
        for loaded in (evaluation.load_tasks(["shuffled"]) for _ in range(2))
    ]
    assert drawn[0] == drawn[1] and len({*drawn[0]}) == 3
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    first = random.Random(0).random(), np.random.RandomState(1234).rand()
    assert drawn[0][0] == " ".join(map(str, first)), "as lm-eval's own command"


def test_fewer_shots_than_a_task_of_a_hub_says_are_told(official, caplog):
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        loaded = evaluation.load_tasks(["shuffled"])
        evaluation.load_tasks(["shuffled"], num_fewshot=2)
    (record,) = [record for record in caplog.records if record.name == benchmarks.__name__]
    assert record.message == (
        "num_fewshot is 0, but the own file of shuffled says 2: asked with 0 shots"
    )
    assert loaded["shuffled"]["tasks"]["shuffled"].config.num_fewshot == 0


def test_shots_of_a_hub_are_drawn_alike_in_each_run(official):
    def prompts(shot_order: int, seed: int | None = None) -> tuple[str, ...]:
        loaded = evaluation.load_tasks(["shuffled"], num_fewshot=2, shot_order=shot_order)
        task = loaded["shuffled"]["tasks"]["shuffled"]
        if seed is not None:
            task.set_fewshot_seed(seed)
        task.build_all_requests()
        return tuple(instance.args[0] for instance in task.instances)

    by_order = [prompts(order) for order in range(6)]
    assert by_order == [prompts(order) for order in range(6)] and len({*by_order}) > 1
    assert by_order[0] == prompts(0, seed=1234), "as lm-eval's own command"
    assert by_order[1] == prompts(0, seed=1)


def test_a_task_that_judges_itself_has_no_questions_of_ours(toy, official):
    """Several of its answers may be right, so there is no one of them."""
    toy.loglikelihood_of = lambda prompt, answer: -float(len(answer))
    result = evaluation.evaluate_tasks(StandIn(), None, ["judged"])
    assert not len(result.questions)
    assert result.summary.metric.tolist() == ["acc"] and value(result.summary, "acc") == 0.25


def test_shots_that_a_task_of_a_hub_does_not_take_are_told(official, caplog):
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        loaded = evaluation.load_tasks(["lm-eval:sums", "judged"], num_fewshot=2)
    assert [task.config.num_fewshot for task in loaded["lm-eval:sums"]["tasks"].values()] == [0, 0]
    assert loaded["judged"]["tasks"]["judged"].config.num_fewshot == 2
    (record,) = [record for record in caplog.records if record.name == benchmarks.__name__]
    assert record.message == (
        "num_fewshot is 2, but the own file of piqa, other says 0: asked with 0 shots"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pruning_utils"):
        evaluation.load_tasks(["other"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("code", {}, "code runs code that the model writes, which is not done here"),
        ("seen", {}, "seen shows images or sounds, but the model is asked in text alone"),
        ("free", {"answers_only": True}, "answers_only must be False for 'free', whose answers"),
        ("text", {"answers_only": True}, "answers_only must be False for 'text', whose answers"),
    ],
)
def test_tasks_of_another_kind_are_refused_before_any_is_scored(
    name, arguments, message, toy, official
):
    toy.loglikelihood_of = lambda *_: pytest.fail("scoring began")
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_tasks(StandIn(), None, ["piqa", name], **arguments)


def test_unreachable_hub_is_one_clear_error(official, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr(prefixes, "language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(
        ValueError, match="task 'far' could not be read from the hub: Couldn't reach"
    ):
        evaluation.evaluate_tasks(StandIn(), None, ["piqa", "far"])


@pytest.mark.parametrize("name", ["nope", "lm-eval:nope", "lm-eval:basic_skills", "../piqa"])
def test_unknown_task_is_refused_before_any_work(official, monkeypatch, name):
    monkeypatch.setattr(prefixes, "language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(
        ValueError, match="unknown task .*hellaswag, winogrande, arc_easy, .*, basic_skills"
    ):
        evaluation.evaluate_tasks(StandIn(), None, ["piqa", name])


@pytest.mark.parametrize("name", [None, 3])
def test_what_is_no_name_of_a_task_is_refused_before_any_work(monkeypatch, name):
    monkeypatch.setattr(prefixes, "language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match="tasks must be a list .*piqa, openbookqa.*, got "):
        evaluation.evaluate_tasks(StandIn(), None, ["piqa", name])


def test_lm_eval_brings_its_own_tasks(monkeypatch, tmp_path):
    """A few of its folders stand for all, whose 14,000 files take half a minute to index."""
    from lm_eval.tasks import manager

    installed = Path(manager.__file__).parent
    for folder in ("piqa", "arc", "hellaswag", "mmlu/default"):
        shutil.copytree(installed / folder, tmp_path / folder)
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    brought = benchmarks.task_manager.__wrapped__(False).all_tasks
    assert {"piqa", "arc_challenge", "hellaswag", "mmlu"} < set(brought)
    assert "basic_skills" not in brought


# --- the embedded model ---------------------------------------------------------------------------


def test_embedded_model_beats_chance_and_matches_plain_forward(embedded, monkeypatch):
    model, tokenizer = embedded
    # Long questions take most of the time, and tell nothing more.
    rows, split, _ = benchmarks._rows("baber/piqa", None)
    short = [row for row in rows if len(row["goal"] + row["sol1"] + row["sol2"]) <= 160]
    monkeypatch.setattr(benchmarks, "_rows", lambda *_: (short, split, []))
    result = evaluation.evaluate_tasks(model, tokenizer, ["piqa"], limit=30)
    # Chance is 0.5 with an error of 0.091; the whole set gives 0.67.
    assert value(result.summary, "acc_norm") > 0.6
    by_id = {row["question_id"]: row for row in short}
    for row in result.questions[:3].itertuples():
        question = by_id[row.question_id]
        prompt = f"Question: {question['goal']}\nAnswer:"
        choices = question["sol1"], question["sol2"]
        n_prompt, totals, lengths = len(tokenizer(prompt).input_ids), [], []
        for choice in choices:
            input_ids = torch.tensor(tokenizer(f"{prompt} {choice}").input_ids)
            with torch.no_grad():
                logs = model(input_ids[None]).logits[0].log_softmax(-1)
            totals.append(
                logs[n_prompt - 1 : -1].gather(1, input_ids[n_prompt:, None]).sum().item()
            )
            lengths.append(len(input_ids) - n_prompt)
        right, wrong = question["label"], 1 - question["label"]
        by_character = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
        assert row.correct == (totals[right] > totals[wrong])
        assert row.correct_norm == (by_character[right] > by_character[wrong])
        assert row.p_right == pytest.approx(
            1 / (1 + math.exp(by_character[wrong] - by_character[right])), rel=1e-5
        )
        assert row.nll == pytest.approx(-totals[right] / lengths[right], rel=1e-5)


def test_embedded_perplexity_equals_its_own_loss(embedded):
    model, tokenizer = embedded
    input_ids = data.evaluation_windows(tokenizer, 2, 64)
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss.item()
    assert evaluation.perplexity(model, input_ids) == pytest.approx(math.exp(loss), rel=1e-4)
    assert 10 < math.exp(loss) < 200
