"""Iterative removal against its rounds one by one."""

import copy
import functools
import shutil

import pandas as pd
import pytest
import test_shape_study
import torch
from test_depth_study import HEALING, N_LAYERS, save_tiny_model

from pruning_utils import (
    data,
    evaluation,
    healing,
    importance,
    importance_study,
    iterative_study,
    models,
    selection,
    similarity,
    surgery,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


study = functools.partial(test_shape_study.study, kind=iterative_study.IterativeStudy)


def point(metric="taylor", per_round=1, **given) -> dict:
    return {
        "metric": metric,
        "n_dropped": 2,
        "per_round": per_round,
        "layers": "",
        "recipe": "lora 0.01 4",
        "seed": 0,
        **given,
    }


@pytest.mark.parametrize("metric", iterative_study.METRICS)
def test_rounds_equal_the_steps_one_by_one(metric, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point(metric)])
    asked.healing_settings = {**asked.healing_settings, "warmup_steps": 3}
    rows = pd.DataFrame(asked(point(metric)))
    model, tokenizer = models.load_model(tiny)
    train = data.healing_windows(tokenizer, 8, 16)
    calibration = data.calibration_windows(tokenizer, 10, 128)
    left, gone = list(range(N_LAYERS)), []
    for turn in range(2):
        layer = len(left) - 1
        exact = copy.deepcopy(model).float()
        if metric == "taylor":
            (layer,) = selection.least_important(importance.taylor(exact, calibration), 1)
        elif metric == "block influence":
            found = similarity.measure_similarity(exact, calibration)
            (layer,) = selection.least_important(found.block_influence, 1)
        gone.append((left.pop(layer), turn + 1))
        model = healing.heal(
            surgery.drop_layers(model, [layer]),
            tokenizer,
            train[4 * turn : 4 * turn + 4],
            merge=True,
            **{**HEALING, "steps": 2, "warmup_steps": 1},
        ).model
    losses = (
        evaluation.token_losses(model, data.evaluation_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses
    evaluated = rows[rows["dataset"] == "healing eval"]["item"]
    assert evaluated.min() >= 4 * 16, "in the last round alone"
    removed = rows[rows["dataset"] == iterative_study.REMOVED]
    assert list(zip(removed["item"], removed["nll"], strict=True)) == gone


def test_one_round_is_removal_at_once_and_trained_once(tiny, tmp_path, monkeypatch):
    once = pd.DataFrame(
        study(tiny, tmp_path, [point("reverse order", 2)])(point("reverse order", 2))
    )
    removed = once[once["dataset"] == iterative_study.REMOVED]
    assert list(zip(removed["item"], removed["nll"], strict=True)) == [
        (N_LAYERS - 2, 1),
        (N_LAYERS - 1, 1),
    ]
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    asked = {"layers": f"{N_LAYERS - 2} {N_LAYERS - 1}", "recipe": "lora 0.01 4", "seed": 0}
    plain = pd.DataFrame(study(tiny, tmp_path, [asked], kind=importance_study.SetStudy)(asked))
    nll = [
        table[table["dataset"] != iterative_study.REMOVED]["nll"].tolist()
        for table in (once, plain)
    ]
    assert nll[0] == nll[1]


def test_a_killed_point_goes_on_with_the_rounds_that_are_trained(tiny, tmp_path, monkeypatch):
    first = study(tiny, tmp_path, [point()])(point())
    _, last = sorted(tmp_path.glob("iterative-*"), key=lambda folder: folder.stat().st_mtime)
    shutil.rmtree(last)
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *given, **named: (steps.append(0), step(*given, **named))
    )
    pd.testing.assert_frame_equal(
        pd.DataFrame(first), pd.DataFrame(study(tiny, tmp_path, [point()])(point()))
    )
    assert len(steps) == 2, "the steps of one round of two"


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"metric": "l1"}, "metric of reverse order, taylor, block influence, no layers"),
        ({"layers": "1"}, "no layers and a recipe of one stage"),
        ({"recipe": ""}, "a recipe of one stage"),
        (
            {"n_dropped": N_LAYERS},
            f"n must be a whole number from 0 to {N_LAYERS - 1} .*, got {N_LAYERS}",
        ),
        ({"per_round": 0}, "per_round must divide n_dropped"),
        ({"per_round": 3}, "per_round must divide n_dropped, .* got per_round 3 of 2"),
        ({"recipe": "lora 0.01 3"}, "the rounds the 3 steps"),
    ],
)
def test_bad_points_are_refused_before_any_work(bad, message, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point(), point(**bad)])
    with pytest.raises(ValueError, match=message):
        asked(point())
