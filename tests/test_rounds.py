"""Iterative removal against its rounds one by one."""

import copy
import inspect
import re
import shutil
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from tiny_model import HEALING, N_LAYERS, SETTINGS
from tiny_model import make_study as study

from pruning_utils import (
    data,
    evaluation,
    healing,
    importance,
    models,
    selection,
    similarity,
    surgery,
)
from pruning_utils.engine import definitions
from pruning_utils.studies.study import (
    HEALED_BY,
    REMOVED,
    ROUND_RULES,
    Study,
    narrowed,
    removed_table,
    without_layers,
)


def point(rule="taylor", per_round=1, **given) -> dict:
    return {
        "rule": rule,
        "n_dropped": 2,
        "per_round": per_round,
        "recipe": "lora 0.01 4",
        "seed": 0,
        **given,
    }


def no_steps(*given, **named):
    pytest.fail("trained again")


@pytest.mark.parametrize("rule", ROUND_RULES)
def test_rounds_equal_the_steps_one_by_one(rule, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point(rule)])
    asked.healing_settings = {**asked.healing_settings, "warmup_steps": 3}
    rows = pd.DataFrame(asked(point(rule)))
    model, tokenizer = models.load_model(tiny)
    train = data.healing_windows(tokenizer, 8, 16)
    calibration = data.calibration_windows(tokenizer, 10, 128)
    left, gone = list(range(N_LAYERS)), []
    for turn in range(2):
        layer = len(left) - 1
        exact = copy.deepcopy(model).float()
        if rule == "taylor":
            (layer,) = selection.least_important(importance.taylor(exact, calibration), 1)
        elif rule == "block influence":
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
        evaluation.token_losses(model, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses
    evaluated = rows[rows["dataset"] == "healing eval"]["item"]
    assert evaluated.min() >= 4 * 16, "in the last round alone"
    assert asked.removed_at(point(rule)) == [
        {"layer": layer, "round": turn} for layer, turn in gone
    ]


def test_what_chooses_what_goes_decides_where_trained_models_are_kept():
    """Else a changed criterion would go on with models that lack something else."""
    kept_by = definitions.INSTALLED.stamp(*HEALED_BY)["definitions"]
    sources = map(inspect.getsource, (Study._chosen, Study._layers, narrowed, without_layers))
    modules = "importance|similarity|selection|data|width|surgery"
    called = set(re.findall(rf"\b(?:{modules})\.\w+(?=\()", "".join(sources)))
    expected = {"importance.taylor", "selection.least_important", "width.prune_width"}
    assert expected < called <= kept_by.keys()


def test_one_round_is_removal_at_once_and_trained_once(tiny, tmp_path, monkeypatch):
    asked = point("reverse order", 2)
    in_rounds = study(tiny, tmp_path, [asked])
    once = pd.DataFrame(in_rounds(asked))
    assert in_rounds.removed_at(asked) == [
        {"layer": N_LAYERS - 2, "round": 1},
        {"layer": N_LAYERS - 1, "round": 1},
    ]
    monkeypatch.setattr(torch.optim.AdamW, "step", no_steps)
    asked = {"layers": f"{N_LAYERS - 2} {N_LAYERS - 1}", "recipe": "lora 0.01 4", "seed": 0}
    plain = pd.DataFrame(study(tiny, tmp_path, [asked])(asked))
    assert once["nll"].tolist() == plain["nll"].tolist()


def test_removed_layers_have_a_table_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    given = dict(profile="smoke", notebook="11", model=tiny, table="removed")
    settings = {name: value for name, value in SETTINGS.items() if name != "n_calibration"}
    first, path = removed_table([point("reverse order", 2)], **given, **settings)
    assert first["layer"].tolist() == [N_LAYERS - 2, N_LAYERS - 1] and path.is_file()
    assert list(first)[:5] == ["rule", "n_dropped", "per_round", "recipe", "seed"]


def test_a_killed_point_goes_on_with_the_rounds_that_are_trained(tiny, tmp_path, monkeypatch):
    asked = point("block influence")
    first = study(tiny, tmp_path / "whole", [asked])(asked)
    killed = study(tiny, tmp_path / "killed", [asked])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "token_losses", Mock(side_effect=KeyboardInterrupt))
        killed(asked)
    (last,) = tmp_path.glob("killed/rounds-*/trained/round-2")
    shutil.rmtree(last)
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *given, **named: (steps.append(0), step(*given, **named))
    )
    again = study(tiny, tmp_path / "killed", [asked])(asked)
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(again))
    assert len(steps) == 2, "the steps of one round of two"


@pytest.mark.parametrize("recipe", ["lora 0.01 4", "last_layers 0.01 4 last_k=1"])
def test_models_of_rounds_go_once_they_are_measured(recipe, tiny, tmp_path, monkeypatch):
    asked = point("block influence", recipe=recipe)
    killed = tmp_path.joinpath("ended", "round-1")
    monkeypatch.setattr(Study, "_rounds_folder", lambda *_: tmp_path)
    killed.mkdir(parents=True)  # as a process leaves it that was killed while it deleted
    first = study(tiny, tmp_path, [asked])(asked)
    assert [path.name for path in tmp_path.iterdir()] == [REMOVED]
    monkeypatch.setattr(torch.optim.AdamW, "step", no_steps)
    rows = study(tiny, tmp_path, [asked]).removed_at(asked)
    assert [row["round"] for row in rows] == [1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(Study, "_rounds_folder", lambda *_: tmp_path / "again")
    apart = study(tiny, tmp_path, [asked])
    assert apart.removed_at(asked) == rows, "also where nothing was measured before"
    monkeypatch.setattr(torch.optim.AdamW, "step", no_steps)
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(apart(asked)))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"rule": "l1"}, "rule must be one of reverse order, taylor, block influence, got 'l1'"),
        ({"layers": "1"}, "layers must not be given where a rule chooses them, got '1'"),
        ({"recipe": ""}, "must have a recipe of one stage, got ''"),
        (
            {"n_dropped": N_LAYERS},
            f"n must be a whole number from 0 to {N_LAYERS - 1} .*, got {N_LAYERS}",
        ),
        ({"per_round": 0}, "per_round must divide n_dropped"),
        ({"per_round": 3}, "per_round must divide n_dropped, got 3 of 2"),
        ({"recipe": "lora 0.01 3"}, "the rounds must share 3 steps evenly"),
    ],
)
def test_bad_points_are_refused_before_any_work(bad, message, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point(), point(**bad)])
    with pytest.raises(ValueError, match=message):
        asked(point())
