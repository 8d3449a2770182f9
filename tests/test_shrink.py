"""A smaller model of one's own: plan, judgement, what is kept on the way, and the command."""

import argparse
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES
from architectures import tiny as tiny_model_of
from safetensors import SafetensorError
from scipy import stats
from tiny_model import N_LAYERS
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pruning_utils import (
    cost_plots,
    data,
    efficiency,
    evaluation,
    evidence,
    healing,
    models,
    runtime,
    similarity,
    surgery,
)
from pruning_utils.engine import benchmarks
from pruning_utils.shrinking import command, judgements, orders, plans, reports, whole
from pruning_utils.shrinking.orders import LOWEST_LOSS, Goal, Limits, Measured, Order
from pruning_utils.shrinking.plans import TokenTimes
from pruning_utils.studies import whole_path
from pruning_utils.studies.study import without_layers

ROOT = Path(__file__).resolve().parents[1]
FEW = Measured(documents=4, seq_len=16, tasks=("openbookqa",), questions=4)


@pytest.fixture
def loaded(tiny):
    return models.load_model(tiny, dtype="float32")


@pytest.fixture(scope="module")
def untouched(tiny):
    """The same, for tests that change nothing of it."""
    return models.load_model(tiny, dtype="float32")


def order(model: str, **given) -> Order:
    """A small order for a model, with other values."""
    asked = {"goal": Goal(keep=0.6), "minutes": 0.02, "measured": FEW, "dtype": "float32"}
    return Order(model, **{**asked, **given})


# --- the plan -------------------------------------------------------------------------------------


def test_as_many_layers_go_as_a_goal_needs(untouched):
    model, _ = untouched
    stored = efficiency.stored_parameters(model)
    one = stored["layers"] // N_LAYERS
    assert plans.layers_to_go(model, Goal(keep=0.6)) == 2
    assert plans.layers_to_go(model, Goal(keep=0.8)) == 1
    for gone in (1, 2, 4):
        left = stored["total"] - gone * one
        assert plans.layers_to_go(model, Goal(max_parameters=left)) == gone
        assert plans.layers_to_go(model, Goal(max_parameters=left + one - 1)) == gone
        assert plans.layers_to_go(model, Goal(max_bytes=stored["bytes"] - 4 * gone * one)) == gone
    times = TokenTimes(fixed=2.0, per_layer=1.0)
    assert plans.layers_to_go(model, Goal(max_ms_per_token=5.0), times) == 2
    both = Goal(keep=0.8, max_parameters=stored["total"] - 3 * one)
    assert plans.layers_to_go(model, both) == 3, "all that is given must be met"


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal(), "a goal must be given, one or more of keep, max_parameters, max_bytes, max_ms"),
        (Goal(keep=1.0), r"keep must be in \(0, 1\), got 1.0"),
        (Goal(keep=0.05), "keep must leave one of 5 layers, got 0.05"),
        (Goal(keep=0.95), "no layer has to go: keep 0.95 is met by the model as it is"),
        (Goal(max_parameters=0), "max_parameters must be"),
        (
            Goal(max_parameters=9),
            "max_parameters must be at least 788,[0-9]{3}, which one layer",
        ),
        (
            Goal(max_bytes=10**12),
            "no layer has to go: max_bytes 1,000,000,000,000 is met by",
        ),
        (Goal(max_ms_per_token=0.0), "max_ms_per_token must be a finite number above 0, got 0.0"),
        (Goal(max_ms_per_token=math.inf), "must be a finite number above 0, got inf"),
        (Goal(max_ms_per_token=1.0), "max_ms_per_token must be at least 3, which one layer of 5"),
    ],
)
def test_goals_that_nothing_meets_are_refused_with_the_nearest(goal, message, untouched):
    with pytest.raises(ValueError, match=message):
        plans.layers_to_go(untouched[0], goal, TokenTimes(fixed=2.0, per_layer=1.0))


def test_the_set_with_the_lowest_loss_is_chosen(loaded, monkeypatch):
    model, tokenizer = loaded
    windows = data.calibration_windows(tokenizer, 3, 16)
    distances = similarity.measure_similarity(model, windows).angular_distance
    calls = []
    for number, layer in enumerate(models.decoder_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    intact, *ranked = plans.candidates(model, windows, 2)
    assert intact.layers == () and intact.losses == pytest.approx(
        evaluation.token_losses(model, windows).mean(1).tolist()
    )
    for one in ranked:
        naive = evaluation.token_losses(without_layers(model, one.layers), windows).mean(1)
        assert one.losses == pytest.approx(naive.tolist(), rel=1e-5)
    assert [one.loss for one in ranked] == sorted(one.loss for one in ranked)
    assert len({one.layers for one in ranked}) == len(ranked)
    choice = plans.choose(model, windows, 2, LOWEST_LOSS)
    assert (choice.chosen, choice.runner_up, choice.whole) == (*ranked[:2], intact)
    asked = plans.choose(model, windows, 2, "reverse order")
    assert asked.chosen.layers == (3, 4) and asked.chosen.rule == "reverse order"
    assert asked.runner_up == next(one for one in ranked if one.layers != (3, 4))
    closest = plans.choose(model, windows, 2, "closest block").chosen
    start = int(np.argmin([distances[n, n + 2] for n in range(4)]))
    assert closest.layers == (start, start + 1)
    with pytest.raises(ValueError, match="rule must be one of lowest loss, .* got 'best'"):
        plans.choose(model, windows, 2, "best")


def test_times_are_a_line_over_the_layers(loaded, monkeypatch):
    seen = []

    def speed(model, **given):
        seen.append(len(models.decoder_layers(model)))
        return pd.DataFrame({"per_token_seconds": [0.002 + 0.001 * seen[-1], 9.0]})

    monkeypatch.setattr(efficiency, "generation_speed", speed)
    times = plans.token_runs(loaded[0]).line()
    assert (
        seen == [5, 2]
        and times == pytest.approx((2.0, 1.0))
        and times.at(3) == (pytest.approx(5.0))
    )


def test_a_limit_of_time_is_planned_with_what_judges_it(tiny, monkeypatch):
    """The fastest run is not the upper end of the interval that is held against the limit."""
    model, tokenizer = models.load_model(tiny, dtype="float32")

    measured = []

    def speed(model, **given):
        measured.append(given["repeats"])
        seconds = 0.001 * len(models.decoder_layers(model))
        return pd.DataFrame({"per_token_seconds": seconds + 0.0001 * np.arange(given["repeats"])})

    monkeypatch.setattr(efficiency, "generation_speed", speed)
    runs = judgements.TIMED["repeats"]
    added = 1000 * evidence.mean_interval(0.0001 * np.arange(runs)).high
    found = plans.token_runs(model, repeats=runs)
    assert found.line(at_most=True).at(4) == pytest.approx(4 + added)
    asked = order(tiny, goal=Goal(max_ms_per_token=4.0), method="none")
    assert 0 < added < 1 and plans.layers_to_go(model, asked.goal, found.line()) == 1
    measured.clear()
    plan = whole.plan_of(asked, model, tokenizer)
    assert len(plan["layers"]) == 2 and plan["ms_per_token"] == pytest.approx([5.0, 3.0])
    assert measured == [runs, runs], "each model is timed once"


def test_the_libraries_that_a_first_training_imports_are_no_part_of_a_step(
    untouched, tiny, monkeypatch
):
    """They made a step look so short that healing took a multiple of its minutes."""
    now, taken = [0.0], []
    monkeypatch.setattr(whole.time, "perf_counter", lambda: now[0])

    def heal(model, tokenizer, windows, **settings):
        now[0] += 3.0 * settings["steps"] + 2.0 + (20.0 if not taken else 0.0)
        taken.append(settings["steps"])

    monkeypatch.setattr(healing, "heal", heal)
    watched = torch.zeros(2, 16, dtype=torch.long)
    steps, seconds = whole._steps(order(tiny, minutes=1.0), *untouched, watched)
    assert taken == [1, 1, whole.N_PROBED] and (steps, seconds) == (20, 60.0)


def test_sets_that_an_architecture_cannot_lose_are_left_out(monkeypatch, capsys):
    """Without its layers of attention a cache could not count tokens, and half of them is one."""
    model = tiny_model_of("Lfm2Config", layer_types=["conv"] * 5 + ["full_attention"] * 3)
    windows = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    sets = {"closest block": (5, 6, 7), "deepest but last": (4, 5, 6), "reverse order": (5, 6, 7)}
    monkeypatch.setattr(plans, "_sets", lambda *given: {**sets, "block influence": (0, 1, 6)})
    assert plans.token_runs(model, repeats=1).line().at(8) > 0
    _, *ranked = plans.candidates(model, windows, 3)
    assert {one.rule for one in ranked} == {"deepest but last", "block influence"}
    said = capsys.readouterr().err
    assert "the layers of 'closest block' cannot go: Lfm2ForCausalLM cannot be cut" in said
    with pytest.raises(ValueError, match="whose layers can go .*, got 'reverse order'"):
        plans.choose(model, windows, 3, "reverse order")
    monkeypatch.setattr(plans, "_sets", lambda *given: {"closest block": (5, 6, 7)})
    with pytest.raises(ValueError, match="the layers of 'closest block' cannot go: Lfm2"):
        plans.candidates(model, windows, 3)
    monkeypatch.setattr(plans, "_sets", lambda *given: pytest.fail("scanned"))
    for rules in (["taylor", "perplexity"], []):
        with pytest.raises(ValueError, match=r"rules must be among closest block, .*got \["):
            plans.candidates(model, windows, 3, rules=rules)


# --- the judgement --------------------------------------------------------------------------------


def found(losses, right, times=(9.5, 10.5), repeated=(0.0, 0.5, 0.25)) -> dict:
    """What a model was measured to have."""
    rows = [judgements._row("loss", "xsum", item, value) for item, value in enumerate(losses)]
    for task, answers in right.items():
        rows += [judgements._row("right", task, item, one) for item, one in enumerate(answers)]
    rows += [judgements._row("repetition", "xsum", item, one) for item, one in enumerate(repeated)]
    rows += [judgements._row("ms per token", "", run, value) for run, value in enumerate(times)]
    return {"rows": rows}


def test_a_smaller_model_is_judged_by_its_whole_interval():
    answers = {"a": [1, 1, 1, 1] * 20, "b": [1, 0]}
    repeated = [0.0, 0.5, 0.25] * 7
    before = found([3.0, 4.0, 5.0], answers, (9.0, 11.0), repeated=repeated)
    smaller = found([3.2, 4.3, 5.1], answers, (5.0, 6.0), repeated=repeated)
    table = judgements.judged(before, smaller, Limits(loss=0.5, accuracy=0.1)).set_index("measure")
    loss = table.loc["loss (nats per token)"]
    assert (loss["unpruned"], loss["smaller"]) == (4.0, pytest.approx(4.2))
    assert loss["change"] == pytest.approx(0.2) and loss["judgement"] == "fit"
    answers = table.loc["accuracy (mean of the tasks)"]
    assert answers["unpruned"] == answers["smaller"] == 0.75, "each task has one weight"
    assert answers["judgement"] == "fit" and answers["limit"] == -0.1
    time = table.loc["ms per token"]
    assert time["change"] == pytest.approx(-4.5)
    own = stats.ttest_ind([5, 6], [9, 11], equal_var=False).confidence_interval(0.95)
    assert (time["low"], time["high"]) == pytest.approx(own), "both models are measured"
    assert table.loc["ms per token", "judgement"] == ""
    repetition = table.loc["repetition (share of 4-grams)"]
    assert repetition["unpruned"] == 0.25 and repetition["judgement"] == "fit"
    strict = judgements.judged(before, smaller, Limits(loss=0.01, accuracy=0.1, ms_per_token=5.5))
    assert strict["judgement"].tolist() == ["cannot be told", "fit", "fit", "cannot be told"]
    assert strict["limit"].tolist() == pytest.approx([0.01, -0.1, 0.2, 5.5 - 10]), "of the change"
    before = found([3.0, 4.0, 5.0], {"a": [1, 1, 1, 1], "b": [1, 0]})
    answers = {"a": [0, 0, 0, 0], "b": [1, 0]}
    worse = found([9.0, 10.0, 11.1], answers, repeated=(0.9, 0.9, 0.9))
    judged = judgements.judged(before, worse, Limits(loss=0.5, accuracy=0.1, ms_per_token=1.0))
    assert judged["judgement"].tolist() == ["not fit"] * 2 + ["cannot be told", "not fit"]
    assert judged["low"][2] == pytest.approx(0.65 - 0.25 * 4.303 / 3**0.5, abs=1e-3)
    assert judgements.overall(["fit", "cannot be told", ""]) == "cannot be told"
    assert judgements.overall(["fit", "not fit", "cannot be told"]) == "not fit"
    assert judgements.overall(["fit", ""]) == "fit"


def test_shares_are_of_the_limit_whichever_side_it_is_on():
    before = found([3.0, 4.0], {"a": [1, 1, 1, 0]}, (4.0, 6.0))
    smaller = found([3.2, 4.3], {"a": [0, 1, 1, 0]}, (2.0, 3.0))
    limits = Limits(loss=0.5, accuracy=0.1, ms_per_token=5.0)
    table = judgements.judged(before, smaller, limits)
    shares = judgements.shares(table).set_index("measure")
    assert shares["value"].tolist() == pytest.approx([0.5, 2.5, 0.0, 0.5])
    assert (shares["low"] <= shares["value"]).all() and (shares["value"] <= shares["high"]).all()
    unlimited = judgements.shares(judgements.judged(before, smaller, Limits()))
    assert judgements.TIME not in unlimited["measure"].tolist()
    drawn = cost_plots.shares_of_limits(judgements.shares(table))
    (axis,) = drawn.axes
    assert [label.get_text() for label in axis.get_yticklabels()][0].startswith("loss (nats")
    assert axis.lines[0].get_xdata().tolist() == pytest.approx(shares["value"].tolist())


@pytest.mark.parametrize(("n_items", "word"), [(8, judgements.UNTOLD), (400, judgements.FIT)])
def test_no_change_of_few_items_is_no_proof(n_items, word):
    """Of 8 questions, 3/8 of all may change though none of these did."""
    answers = {"a": [1, 0] * (n_items // 4), "b": [1, 1] * (n_items // 4)}
    one = found([2.0, 3.0], answers, repeated=[0.5] * n_items)
    judgement = judgements.judged(one, one, Limits()).set_index("measure")
    for measure in ("accuracy (mean of the tasks)", "repetition (share of 4-grams)"):
        row = judgement.loc[measure]
        assert row["high"] == -row["low"] == pytest.approx(3 / n_items) and row["change"] == 0
        assert row["judgement"] == word


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(loss=0.0), "the limit of the loss must be above 0, got 0.0"),
        (Limits(accuracy=1.0), r"the limit of the accuracy must be in \(0, 1\), got 1.0"),
        (Limits(repetition=0.0), r"the limit of the repetition must be in \(0, 1\), got 0.0"),
        (Limits(loss=float("nan")), "the limit of the loss must be above 0, got nan"),
    ],
)
def test_limits_out_of_range_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        judgements.check_limits(limits)


def test_repetition_is_counted_in_what_follows(loaded):
    assert judgements.repeated_share([1, 2, 3, 4, 5]) == 0
    # 1 2 1 2 is there three times among five.
    assert judgements.repeated_share([1, 2] * 4) == pytest.approx(3 / 5)
    model, tokenizer = loaded
    prompts = data.document_windows(tokenizer, 3, 8)
    alone = []
    for prompt in prompts:
        tokens = prompt.tolist()
        for _ in range(6):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[model.generation_config.eos_token_id] = -torch.inf  # the length is forced
            tokens.append(int(logits.argmax()))
        alone.append(judgements.repeated_share(tokens[8:]))
    assert judgements.repetitions(model, prompts, n_tokens=6) == alone
    with pytest.raises(ValueError, match="n_tokens must be .* got 3"):
        judgements.repetitions(model, prompts, n_tokens=3)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 5.0},
        {"return_dict_in_generate": True},
    ],
)
def test_no_setting_of_a_model_hides_that_it_repeats_itself(own, loaded):
    model, tokenizer = loaded
    prompts = data.document_windows(tokenizer, 3, 8)
    expected = judgements.repetitions(model, prompts, n_tokens=12)
    said = judgements.answer(model, tokenizer, "Why?", n_tokens=6)
    before = model.generation_config
    model.generation_config = GenerationConfig.from_dict({**before.to_dict(), **own})
    kept = model.generation_config.to_dict()
    assert judgements.repetitions(model, prompts, n_tokens=12) == expected
    assert judgements.answer(model, tokenizer, "Why?", n_tokens=6) == said
    assert model.generation_config.to_dict() == kept


def test_what_measuring_takes_is_arithmetic(untouched, monkeypatch):
    _, tokenizer = untouched
    monkeypatch.setattr(whole_path, "question_tokens", lambda *given: 1000)
    given = {"seq_len": 100, "token_seconds": 0.001, "step_seconds": 0.002}
    asked = Measured(documents=20, tasks=("piqa", "boolq"), questions=5)
    read = 20 * 100 + 2 * 1000 + 20 * 32
    alone = 32 + 16 * 6
    # Two batches; sixteen tokens read take longer than one alone.
    expected = 0.001 * read + 2 * 48 * 16 * 0.001 + 0.002 * alone
    assert judgements.foretell(tokenizer, asked, **given) == pytest.approx(expected)
    slow = {**given, "step_seconds": 1.0}
    assert judgements.foretell(tokenizer, asked, **slow) == pytest.approx(
        0.001 * read + 2 * 48 + alone
    )


def test_an_answer_follows_the_chat_template(loaded):
    model, tokenizer = loaded
    asked = []
    generate = model.generate

    def heard(**given):
        asked.append(tokenizer.decode(given["input_ids"][0]))
        return generate(**given)

    model.generate = heard
    judgements.answer(model, tokenizer, "Why?", n_tokens=2)
    assert "<|im_start|>user\nWhy?" in asked[-1] and asked[-1].endswith("assistant\n")
    tokenizer.chat_template = None
    judgements.answer(model, tokenizer, "Why?", n_tokens=2)
    assert asked[-1] == "Why?"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system message first') }}",
        "{{ messages[0]['content'][0]['text'] }}",
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}",
    ],
)
def test_a_template_that_takes_no_question_is_left_out(template, loaded):
    _, tokenizer = loaded
    tokenizer.chat_template = template
    ids = judgements.asked_ids(tokenizer, "Why?", 10**6)
    assert tokenizer.decode(ids[0]) == "Why?"


def test_a_template_that_lacks_memory_is_no_template_that_fails(loaded, monkeypatch):
    _, tokenizer = loaded

    def scarce(*_, **__):
        raise MemoryError

    monkeypatch.setattr(tokenizer, "apply_chat_template", scarce)
    with pytest.raises(MemoryError):
        judgements.asked_ids(tokenizer, "Why?", 10**6)


def test_a_chat_of_tokens_that_a_model_does_not_know_is_left_out(loaded):
    _, tokenizer = loaded
    marked = judgements.asked_ids(tokenizer, "Why?", 10**6)
    plain = judgements.asked_ids(tokenizer, "Why?", int(marked.max()))
    assert marked.shape[1] > plain.shape[1] and tokenizer.decode(plain[0]) == "Why?"


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_healing_the_head_keeps_to_the_goal(tiny, tmp_path, here):
    """A tied head stays tied: with weights of its own the model would be larger than before."""
    model, _ = models.load_model(tiny)
    assert model.config.tie_word_embeddings
    stored = efficiency.stored_parameters(model)
    most = stored["total"] - stored["layers"] // N_LAYERS
    asked = order(tiny, goal=Goal(max_parameters=most), method="last_layers", steps=2)
    whole.shrink(asked, tmp_path / "small")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert saved.num_parameters() == most and saved.config.tie_word_embeddings


@pytest.mark.slow
def test_a_model_is_made_that_plain_transformers_loads(tiny, tmp_path, here, monkeypatch):
    monkeypatch.setattr(whole, "MOST_STEPS", 4)
    out = tmp_path / "small"
    made = whole.shrink(order(tiny, minutes=2.0), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    plan = made["plan"]
    assert len(plan["layers"]) == 2 and plan["n_layers"] == N_LAYERS and plan["steps"] == 4
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == 3
    assert plan["parameters"][1] == sum(weight.numel() for weight in model.parameters())
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert f"# tiny-llama without 2 of its {N_LAYERS} layers" in card and "nan" not in card
    assert "Trained: lora, 4 steps of " in card and "BoolQ and QuAC passages" in card
    assert tiny not in card + page, "no path of this machine"
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    record = json.loads((out / "shrink.json").read_text())
    assert record["plan"] == plan and set(record["results"]) == {"unpruned", "smaller"}
    assert tiny not in json.dumps(record["plan"])
    kept = pd.read_csv(out / "judgement.csv", keep_default_na=False)
    assert kept["judgement"].tolist() == made["judgement"]["judgement"].tolist()
    assert made["word"] in (judgements.FIT, judgements.NOT_FIT, judgements.UNTOLD)


@pytest.fixture
def here(monkeypatch):
    """Models are measured in this process, by few tokens, and what is done is noted."""
    monkeypatch.setattr(judgements, "N_CONTINUED", 8)
    monkeypatch.setattr(judgements, "TIMED", {**judgements.TIMED, "new_tokens": 2})
    monkeypatch.setattr(plans, "PROBED", {**plans.PROBED, "new_tokens": 4})
    done = []

    def measured(order, model, revision):
        done.append("measure")
        return judgements.measure(
            model, revision=revision, dtype=order.dtype, device=None, measured=order.measured
        )

    def noted(name, own):
        def run(*given, **named):
            done.append(name)
            return own(*given, **named)

        return run

    monkeypatch.setattr(whole, "_measured", measured)
    monkeypatch.setattr(whole, "plan_of", noted("plan", whole.plan_of))
    monkeypatch.setattr(whole, "_made", noted("make", whole._made))
    return done


def test_a_stopped_run_goes_on(tiny, tmp_path, here, monkeypatch):
    out = tmp_path / "small"
    asked = order(tiny, method="none")
    loads = []
    load = whole._loaded
    monkeypatch.setattr(whole, "_loaded", lambda order: loads.append(order) or load(order))

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(whole, "_publish", full)
        with pytest.raises(OSError, match="No space"):
            whole.shrink(asked, out)
    assert not out.exists() and here == ["plan", "make", "measure", "measure"]
    with pytest.raises(
        ValueError, match=r"small.work was begun with other values \(minutes: 0.02 there, 3 asked\)"
    ):
        whole.shrink(order(tiny, method="none", minutes=3), out)
    made = whole.shrink(asked, out)
    assert here == ["plan", "make", "measure", "measure"], "nothing is done twice"
    assert len(loads) == 1, "plan and cut share a model, and the second run needs none"
    assert (out / "config.json").exists() and made["plan"]["steps"] == 0
    assert "Trained: not at all." in (out / "README.md").read_text()


def test_tables_of_a_model_are_those_of_its_folder(tiny, tmp_path, here):
    asked = order(tiny, method="none", goal=Goal(keep=0.8))
    plan = whole.made_table("plan", asked, tmp_path)
    assert plan["model"].tolist() == ["unpruned", "smaller", "runner-up"]
    assert plan["parameters"].iloc[0] > plan["parameters"].iloc[1]
    assert len(plan["layers"].iloc[1].split()) == 1 and plan["layers"].iloc[0] == ""
    model, tokenizer = models.load_model(tiny, dtype="float32")
    watched = whole._validation_windows(tokenizer, FEW.seq_len)
    with torch.no_grad():
        loss = model(input_ids=watched, labels=watched).loss.item()
    assert plan["validation_loss"].iloc[0] == pytest.approx(loss, rel=1e-5)
    assert plan["validation_loss"].isna().tolist() == [False, True, True]
    assert len(whole.made_table("history", asked, tmp_path)) == 0
    measured = whole.made_table("measured", asked, tmp_path)
    assert measured.groupby(["model", "measure"]).size().eq(4).all()
    assert set(measured["measure"]) == {"loss", "right", "repetition"}
    times = whole.made_table("times", asked, tmp_path)
    assert times.groupby("model").size().tolist() == [5, 5]
    assert here == ["plan", "make", "measure", "measure"], "made once"
    whole.made_table("plan", order(tiny, method="none"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "another order has a folder of its own"
    with pytest.raises(ValueError, match="table must be one of plan, .* got 'x'"):
        whole.made_table("x", asked, tmp_path)


def test_a_model_that_loads_as_another_is_not_given_out(tiny, tmp_path, here, monkeypatch):
    measure = judgements.measure

    def another(*given, **named):
        rows = measure(*given, **named)
        for row in rows["rows"]:
            row["value"] += 1
        return rows

    monkeypatch.setattr(judgements, "measure", another)
    with pytest.raises(RuntimeError, match="the saved model is not the one in memory"):
        whole.shrink(order(tiny, method="none"), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_fewer_documents_than_were_compared_in_memory_are_enough():
    rows = [{"measure": judgements.LOSS, "value": value} for value in (3.0, 4.0)]
    rows += [{"measure": judgements.RIGHT, "value": 1.0}]
    folder = Path("small.work")
    whole._refuse_another({"losses": [3.0, 4.0, 5.0, 6.0]}, {"rows": rows}, folder)
    said = r"losses \[3.0, 4.0\], and \[3.0, 4.1\] before.* in small.work: remove it"
    with pytest.raises(RuntimeError, match=said):
        whole._refuse_another({"losses": [3.0, 4.1, 5.0, 6.0]}, {"rows": rows}, folder)


@pytest.mark.parametrize(
    ("device", "method", "message"),
    [
        ("cuda:1", "lora", "got 'cuda:1'.* let CUDA_VISIBLE_DEVICES name that one"),
        ("cpu", "qlora", "device must be cuda for qlora where there is a GPU, got 'cpu'"),
    ],
)
def test_a_device_that_healing_would_not_take_is_refused(device, method, message, monkeypatch):
    """The Trainer moves a model to the first GPU, and so does what quantises it."""
    monkeypatch.setattr(runtime, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        whole.check_order(order("model", method=method, device=device))
    whole.check_order(order("model", method="none", device=device))
    whole.check_order(order("model", method=method, device="cuda"))
    whole.check_order(order("model", method="lora", device="cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "best"}, "rule must be one of lowest loss, closest block"),
        ({"method": "sft"}, "method must be one of none, lora, qlora"),
        ({"minutes": 0}, "minutes must be above 0, got 0"),
        ({"steps": 0}, "steps must be .*got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, got -1.0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1"),
        ({"measured": Measured(documents=1)}, "documents must be"),
        ({"measured": Measured(tasks=())}, "the number of tasks must be .*got 0"),
        ({"goal": Goal(keep=2.0)}, "keep must be in"),
        ({"limits": Limits(accuracy=0.0)}, "the limit of the accuracy must be in"),
    ],
)
def test_bad_orders_are_refused_before_a_model_is_loaded(given, message, tiny, tmp_path, here):
    with pytest.raises(ValueError, match=message):
        whole.shrink(order(tiny, **given), tmp_path / "small")
    assert not here and not list(tmp_path.iterdir())


def test_an_unknown_task_is_refused_before_a_model_is_loaded(tiny, tmp_path, here, monkeypatch):
    # lm-eval's own index is of 14,000 files.
    known = SimpleNamespace(all_tasks=["piqa"])
    monkeypatch.setattr(benchmarks, "task_manager", lambda embedded: known)
    with pytest.raises(ValueError, match="unknown task 'quiz'"):
        whole.shrink(order(tiny, measured=Measured(tasks=("quiz",))), tmp_path / "small")
    assert not here and not list(tmp_path.iterdir())


@pytest.mark.parametrize("time", [0, -3.0, math.inf, "abc"])
def test_a_time_that_is_no_limit_is_refused_before_a_model_is_loaded(time, tiny, tmp_path, here):
    limits = Limits(ms_per_token=time)
    with pytest.raises(ValueError, match="limit of the time of a token must be a finite number of"):
        whole.shrink(order(tiny, limits=limits), tmp_path / "small")
    assert not here and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--keep", "abc", "must be a share, 75% or 0.75, got 'abc'"),
        (
            "--max-parameters",
            "100X",
            "must be a number, 12345, 20k, 100M, 1.5G or 2GiB, got '100X'",
        ),
        ("--max-bytes", "inf", "must be a number, 12345, 20k, 100M, 1.5G or 2GiB, got 'inf'"),
    ],
)
def test_numbers_that_are_none_are_told_what_one_is(option, value, message, capsys):
    with pytest.raises(SystemExit):
        command.main(["shrink", "MODEL", option, value])
    assert message in capsys.readouterr().err


def test_a_task_twice_is_refused():
    with pytest.raises(ValueError, match="each task must be named once, got piqa piqa"):
        judgements.check_measured(Measured(tasks=("piqa", "piqa")))


def test_the_nearest_limit_can_be_asked_for(untouched):
    model, _ = untouched
    for times in (TokenTimes(1.0, 0.12345), TokenTimes(2345.0, 1.0234567)):
        _nearest_can_be_asked_for(model, times)


def _nearest_can_be_asked_for(model, times):
    for name in ("max_parameters", "max_bytes", "max_ms_per_token"):
        with pytest.raises(ValueError, match=f"{name} must be at least") as refused:
            plans.layers_to_go(model, Goal(**{name: 1}), times)
        nearest = re.search("at least ([0-9,.]+),", str(refused.value)).group(1).replace(",", "")
        nearest = float(nearest) if "." in nearest else int(nearest)
        assert plans.layers_to_go(model, Goal(**{name: nearest}), times) == N_LAYERS - 1


def test_a_short_context_of_learned_positions_is_long_enough(tmp_path, loaded):
    short = ARCHITECTURES["gpt2"]()
    assert models.context_length(short.config) == 64
    _, tokenizer = loaded
    tokenizer.model_max_length = 64
    short.resize_token_embeddings(len(tokenizer))
    surgery.save(short, tokenizer, tmp_path / "short")
    measured = Measured(documents=2, tasks=("openbookqa",), questions=2)
    given = {"revision": None, "dtype": "float32", "device": None, "measured": measured}
    found = judgements.measure(tmp_path / "short", **given)
    assert {row["measure"] for row in found["rows"]} == {
        "loss",
        "right",
        "repetition",
        judgements.TIME,
    }


def test_the_layers_that_are_left_are_trained(tiny, tmp_path, here):
    asked = order(tiny, method="last_layers", steps=1, goal=Goal(keep=0.4))
    made = whole.shrink(asked, tmp_path / "small")
    assert N_LAYERS - len(made["plan"]["layers"]) == 2


def test_a_text_that_is_not_there_is_told_before_the_scan(tiny, monkeypatch):
    monkeypatch.setattr(plans, "choose", lambda *given: pytest.fail("scanned"))
    monkeypatch.setattr(whole, "BATCH_SIZE", 10_000)
    for asked in ({"healing_text": "typo"}, {"healing_text": "quac", "steps": 900}):
        with pytest.raises(ValueError, match="typo|windows of text; ask for fewer"):
            whole.planned(order(tiny, **asked))


def test_a_task_that_is_answered_freely_is_refused(monkeypatch):
    """Of its answers nobody knows whether they are right before they are judged."""
    free = SimpleNamespace(OUTPUT_TYPE="generate_until")
    monkeypatch.setattr(
        evaluation, "load_tasks", lambda names, **given: {names[0]: {"tasks": {names[0]: free}}}
    )
    with pytest.raises(ValueError, match="tasks must have choices .* story is of the kind gen"):
        judgements.check_measured(Measured(tasks=("story",)))


def test_models_are_called_as_others_know_them(tiny):
    names = ("embedded", "gemma-3-270m", "owner/name", tiny)
    assert [whole.name_of(name) for name in names] == [
        "SmolLM2-135M-Instruct",
        "gemma-3-270m",
        "owner/name",
        "tiny-llama",
    ]


def test_a_folder_that_holds_something_is_left_alone(tiny, tmp_path, here):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--out must be a new or empty folder, but .*small holds"):
        whole.shrink(order(tiny), tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_folder_that_cannot_be_replaced_is_refused(tiny, tmp_path, here, monkeypatch):
    monkeypatch.setattr(whole.os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(ValueError, match="disk is where a volume is mounted: name a new folder in"):
        whole.shrink(order(tiny), tmp_path / "disk")
    assert not here and [path.name for path in tmp_path.iterdir()] == ["disk"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one(is_there, tmp_path):
    if is_there:
        (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    assert whole._free_folder(tmp_path / "near") == tmp_path / "far"


@pytest.mark.parametrize("name", ["notes.txt", ".git"])
def test_a_folder_of_someone_else_beside_it_is_left_alone(name, tiny, tmp_path, here):
    (tmp_path / "small.work").mkdir()
    (tmp_path / "small.work" / name).write_text("mine")
    with pytest.raises(ValueError, match="small.work holds something else, and is where a run"):
        whole.shrink(order(tiny, goal=Goal(max_parameters=9)), tmp_path / "small")
    with pytest.raises(ValueError, match="small.work holds something else"):
        whole.check_folder(order(tiny), tmp_path / "small")
    assert [path.name for path in (tmp_path / "small.work").iterdir()] == [name] and not here


def test_a_run_that_was_stopped_at_its_very_end_gives_out_no_empty_model(
    tiny, tmp_path, here, monkeypatch
):
    """Where the model was given out, and what is beside it was not yet removed."""
    out = tmp_path / "small"
    asked = order(tiny, method="none")

    class Stopped:
        def rmtree(self, folder):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole, "shutil", Stopped())
        with pytest.raises(KeyboardInterrupt):
            whole.shrink(asked, out)
    shutil.rmtree(out)  # by someone who wants it once more
    whole.shrink(asked, out)
    assert here == ["plan", "make", "measure", "measure", "make", "measure"]
    AutoModelForCausalLM.from_pretrained(out)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_text_that_does_not_suffice_is_refused_with_the_plan(tiny, tmp_path, here, monkeypatch):
    asked = order(tiny, measured=Measured(documents=10_000, tasks=("piqa",)))
    with pytest.raises(ValueError, match="n_samples 10000 is beyond the text xsum/evaluation"):
        whole.shrink(asked, tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr(plans, "token_runs", lambda *_, **__: pytest.fail("the model was looked at"))
        patch.setattr(whole, "N_VALIDATION", 10_000)
        with pytest.raises(ValueError, match="n_samples 10000 is beyond the text xsum/validation"):
            whole.shrink(order(tiny), tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr(whole, "_healing_windows", _at_most_two_steps)
        patch.setattr(plans, "token_runs", lambda *_, **__: pytest.fail("the model was looked at"))
        with pytest.raises(ValueError, match="3 steps of healing need 12 windows .*give more text"):
            whole.shrink(order(tiny, steps=1), tmp_path / "small")
    monkeypatch.setattr(whole, "_steps", lambda *given: (10**5, 1.0))
    with pytest.raises(ValueError, match="100000 steps of healing need 400000 windows .*--steps"):
        whole.shrink(order(tiny, healing_text="quac"), tmp_path / "small")
    assert here == 4 * ["plan"] and not list(tmp_path.iterdir()), "all can be asked again"


def _at_most_two_steps(order, tokenizer, seq_len, steps):
    if steps > 2:
        raise ValueError("n_samples is beyond the text")


def test_another_text_of_the_same_name_is_another_order(tiny, tmp_path):
    text = tmp_path / "mine.jsonl"
    found = []
    for answer in ("Paris.", "Rome."):
        text.write_text(json.dumps({"question": "Which town?", "answer": answer}) + "\n")
        found.append(whole.settings_of(order(tiny, healing_text=str(text))))
    assert found[0] != found[1]
    differing = [key for key in found[0] if found[0][key] != found[1][key]]
    assert differing == ["healing_text"]


def test_what_cannot_be_met_leaves_nothing_behind(tiny, tmp_path, here):
    with pytest.raises(ValueError, match="max_parameters must be at least"):
        whole.shrink(order(tiny, goal=Goal(max_parameters=9)), tmp_path / "small")
    assert here == ["plan"] and not list(tmp_path.iterdir())


def test_two_processes_do_not_make_one_folder(tiny, tmp_path, here):
    (tmp_path / "small.work").mkdir()
    with filelock.FileLock(tmp_path / "small.work" / ".lock"):
        with pytest.raises(RuntimeError, match="another process is making .*small"):
            whole.shrink(order(tiny), tmp_path / "small")
    assert not here


def test_minutes_are_steps_and_looks_at_the_validation_text():
    # Nine looks of 2 s and 20 steps of 3 s; three looks and two steps, of 12 s in all.
    assert whole.steps_within(78, 3, 2) == 20 and whole.steps_within(77.9, 3, 2) == 19
    assert whole.steps_within(12, 3, 2) == 2 and whole.steps_within(6.9, 3, 2) == 0
    assert whole.steps_within(42, 3, 2) == 8


def test_too_few_minutes_are_refused_with_the_fewest(tiny, monkeypatch):
    assert [plans.rounded_up(value) for value in (1.25, 0.01234, 61.0)] == ["1.25", "0.013", "61"]
    with pytest.raises(ValueError, match="minutes must be at least .* for one step of healing"):
        whole.planned(order(tiny, minutes=1e-7))


# --- the command ----------------------------------------------------------------------------------


def test_numbers_of_the_command_line():
    assert [command.share(text) for text in ("75%", "0.75", "12.5%")] == [0.75, 0.75, 0.125]
    assert [command.count(text) for text in ("1.5B", "100M", "20k", "7", "2G")] == [
        1_500_000_000,
        100_000_000,
        20_000,
        7,
        2_000_000_000,
    ]
    assert [command.count(text) for text in ("1.5GB", "2GiB", "1KB", "1e5")] == [
        1_500_000_000,
        2**31,
        1000,
        100_000,
    ]
    for text in ("1e400", "inf", "nan", "M", "3X"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number, 12345, 20k, 100M"):
            command.count(text)


def test_a_plan_is_printed_and_nothing_is_made(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["shrink", tiny, "--keep", "60%", "--recipe", "none", "--plan", "--dtype", "float32"]
    words += ["--documents", "4", "--questions", "5", "--tasks", "openbookqa", "piqa"]
    assert command.main([*words, "--rule", "reverse order"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 5 layers go" in printed and "layers 3-4, by the rule 'reverse order'" in printed
    assert "fit means: loss at most 0.5 nats per token higher, accuracy at most 0.05" in printed
    assert "repetition at most 0.2 higher" in printed
    assert re.search(r"measuring both models: about [\d.]+ minutes here\n", printed)
    assert re.search(r"weights [\d,]+ MB -> [\d,]+ MB in float32, as they are saved", printed)
    assert "4 documents of xsum, and 5 questions each of openbookqa, piqa" in printed
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_judgement_or_how_to_go_on(tiny, tmp_path, capsys, monkeypatch):
    table = pd.DataFrame({"measure": ["loss"], "judgement": ["fit"]})
    monkeypatch.setattr(whole, "shrink", lambda *_: {"judgement": table})
    words = ["shrink", tiny, "--out", str(tmp_path / "small"), "--keep", "60%"]
    assert command.main(words) == 0
    assert capsys.readouterr().out.split() == ["measure", "judgement", "loss", "fit"]

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole, "shrink", stopped)
    for says in ("begins anew", "goes on from here"):
        assert command.main(words) == 130
        assert capsys.readouterr().err == f"pruning-utils: stopped; the same command {says}\n"
        (tmp_path / "small.work").mkdir(exist_ok=True)


def test_a_disk_that_is_full_is_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    """Python lists a tuple for each file of a folder that cannot be copied."""
    (tmp_path / "from").mkdir()
    for name in ("a", "b"):
        (tmp_path / "from" / name).touch()

    def full(*_):
        raise OSError(28, "No space left on device")

    def copied(*_):
        shutil.copytree(tmp_path / "from", tmp_path / "to", copy_function=full)

    monkeypatch.setattr(whole, "shrink", copied)
    assert command.main(["shrink", tiny, "--out", str(tmp_path / "small")]) == 1
    assert capsys.readouterr().err == "pruning-utils: [Errno 28] No space left on device\n"


def test_a_recipe_that_is_none_is_refused_by_the_name_of_its_option(tiny, tmp_path, capsys):
    words = ["shrink", tiny, "--out", str(tmp_path / "small"), "--keep", "60%", "--recipe", "full"]
    assert command.main(words) == 1
    said = capsys.readouterr().err
    assert "--recipe must be one of none, lora, qlora, dora, last_layers, got 'full'" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "4"),
        ("--healing-text", "xsum"),
        ("--minutes", "5"),
        ("--learning-rate", "1e-3"),
    ],
)
def test_what_healing_would_take_is_refused_where_nothing_is_trained(
    option, value, tiny, tmp_path, capsys
):
    words = ["shrink", tiny, "--out", str(tmp_path / "small"), "--keep", "60%"]
    assert command.main([*words, "--recipe", "none", option, value]) == 1
    said = capsys.readouterr().err
    assert f"{option} needs a --recipe that trains, got" in said and "with 'none'" in said
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_memory_healing_takes(tiny, capsys, monkeypatch):
    asked = order(tiny, minutes=2.0, steps=2)
    plan = whole.planned(asked)
    # Both models, and of what is trained gradients and activations, lie in memory at the peak.
    assert plan["healing_bytes"] > sum(plan["bytes"])
    assert whole.planned(order(tiny, method="none"))["healing_bytes"] is None
    monkeypatch.setattr(whole, "planned", lambda order: plan)
    assert command.main(["shrink", tiny, "--keep", "60%", "--plan", "--dtype", "float32"]) == 0
    said = f"healing takes {plan['healing_bytes'] / 1e9:.2f} GB of memory at most"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "60%"], "pruning-utils: --out must name a new folder, or --plan be given\n"),
        (["--plan"], "pruning-utils: a goal must be given, one or more of keep, "),
        (["--plan", "--keep", "60%", "--rule", "x"], "pruning-utils: rule must be one of "),
    ],
)
def test_what_is_wrong_is_one_line(words, message, tiny, capsys):
    assert command.main(["shrink", tiny, *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "pruning-utils: stopped; the same command begins anew\n"),
        (OSError(28, "could not write small: No space left"), 1, "No space left\n"),
        (SafetensorError("I/O error: No space left"), 1, "No space left\n"),
        (MemoryError("one window does not fit"), 1, "pruning-utils: one window does not fit\n"),
    ],
)
def test_a_run_that_ends_early_says_so_in_one_line(
    raised, code, message, tiny, tmp_path, capsys, monkeypatch
):
    def end(*given):
        raise raised

    monkeypatch.setattr(whole, "shrink", end)
    words = ["shrink", tiny, "--keep", "60%", "--out", str(tmp_path / "small")]
    assert command.main(words) == code
    said = capsys.readouterr().err
    assert said.endswith(message) and said.count("\n") == 1


def test_what_is_known_without_the_libraries_is_what_they_know():
    assert set(orders.METHODS) - {"none"} == set(healing.METHODS) - {"full"}
    assert Order("any", Goal()).dtype == runtime.AUTO


def test_help_needs_nothing_heavy():
    said = "import sys; from pruning_utils.shrinking import command; command.parser().format_help()"
    heavy = "print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", f"{said}; {heavy}"], capture_output=True, text=True)
    assert ran.stdout == "set()\n", ran.stderr


def test_the_command_is_installed():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = importlib.metadata.EntryPoint(
        "pruning-utils", given["project"]["scripts"]["pruning-utils"], "console_scripts"
    )
    assert found.load() is command.main


def test_every_option_reaches_the_order(tiny):
    words = ["shrink", tiny, "--out", "a", "--keep", "60%", "--max-parameters", "1M"]
    words += ["--max-bytes", "2M", "--max-ms-per-token", "3", "--rule", "perplexity"]
    words += [
        "--recipe",
        "qlora",
        "--steps",
        "8",
        "--learning-rate",
        "5e-4",
        "--seed",
        "6",
    ]
    words += ["--healing-text", "nq-open", "--loss-limit", "0.7", "--accuracy-limit", "0.08"]
    words += ["--repetition-limit", "0.3"]
    words += ["--documents", "9", "--questions", "10", "--tasks", "piqa", "boolq"]
    words += ["--revision", "main", "--dtype", "float16", "--device", "cpu"]
    assert command.order_of(command.parser().parse_args(words)) == Order(
        tiny,
        Goal(0.6, 10**6, 2 * 10**6, 3.0),
        rule="perplexity",
        method="qlora",
        steps=8,
        learning_rate=5e-4,
        healing_text="nq-open",
        limits=Limits(0.7, 0.08, 0.3, 3.0),
        measured=Measured(documents=9, questions=10, tasks=("piqa", "boolq")),
        revision="main",
        dtype="float16",
        device="cpu",
        seed=6,
    )
    plain = command.parser().parse_args(["shrink", tiny, "--out", "a", "--keep", "60%"])
    assert command.order_of(plain).measured == Measured()


def test_the_page_shows_text_as_text():
    judgement = judgements.judged(
        found([1.0, 2.0], {"a": [1, 0]}), found([1.0, 2.1], {"a": [1, 0]}), Limits()
    )
    page = reports.report(
        title="<b>",
        plan_lines=["a < b"],
        plan={"rule": "x", "layers": [1], "n_layers": 3, "runner_up": None},
        history=pd.DataFrame(columns=["tokens", "split", "loss"]),
        judgement=judgement,
        samples={"smaller": "<script>"},
        prompt="?",
    )
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 2
    json.dumps(page)


def test_a_time_cannot_be_met_without_times(tiny):
    model, _ = models.load_model(tiny)
    with pytest.raises(ValueError, match="times, of token_runs, must be given where the goal has"):
        plans.layers_to_go(model, Goal(max_ms_per_token=1e-6))


def test_minutes_and_steps_exclude_each_other_and_limits_are_shares(capsys):
    words = ["shrink", "MODEL", "--out", "a", "--keep", "60%"]
    given = command.parser().parse_args([*words, "--minutes", "4", "--accuracy-limit", "5%"])
    asked = command.order_of(given)
    assert (asked.minutes, asked.limits.accuracy) == (4.0, 0.05)
    with pytest.raises(SystemExit):
        command.parser().parse_args([*words, "--minutes", "4", "--steps", "8"])
    assert "--steps: not allowed with argument --minutes" in capsys.readouterr().err


def test_a_command_that_ended_says_the_same_again(tiny, tmp_path, here):
    asked, out = order(tiny, method="none"), tmp_path / "small"
    first = whole.shrink(asked, out)
    assert here == ["plan", "make", "measure", "measure"]
    work = tmp_path / "small.work"
    work.mkdir()
    (work / "order.json").touch()  # of a run that was killed at its very end
    again = whole.shrink(asked, out)
    assert here == ["plan", "make", "measure", "measure"] and again["word"] == first["word"]
    pd.testing.assert_frame_equal(again["judgement"], first["judgement"])
    assert not work.exists()
    work.mkdir()
    (work / "thesis.tex").touch()
    whole.shrink(asked, out)
    assert (work / "thesis.tex").exists(), "it is none of ours"
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        whole.shrink(order(tiny, method="none", seed=1), out)
    (out / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        whole.shrink(asked, out)


def test_a_goal_without_a_time_is_refused_before_anything_is_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(whole.plans, "token_runs", lambda model, **_: pytest.fail("timed"))
    with pytest.raises(ValueError, match="no layer has to go: keep 0.95 is met"):
        whole.shrink(order(tiny, goal=Goal(keep=0.95)), tmp_path / "small")


def test_a_plan_looks_at_the_folder_that_is_named(tiny, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    words = ["shrink", tiny, "--keep", "60%", "--plan", "--out", str(tmp_path)]
    assert command.main(words) == 1
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_sigterm_stops_as_ctrl_c_does(tiny, tmp_path, capsys, monkeypatch):
    def end(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(whole, "shrink", end)
    before = signal.getsignal(signal.SIGTERM)
    words = ["shrink", tiny, "--keep", "60%", "--out", str(tmp_path / "small")]
    assert command.main(words) == 130
    assert "stopped; the same command begins anew" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
