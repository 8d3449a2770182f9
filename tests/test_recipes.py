"""Recipes with settings of their own, and healing on questions and answers."""

import json

import pandas as pd
import pytest
import torch
from tiny_model import HEALING, N_LAYERS, make_study

from pruning_utils import data, evaluation, healing, instructions, models, runtime, surgery
from pruning_utils.studies import study
from pruning_utils.studies.recipes import (
    Cut,
    Point,
    Recipe,
    Stage,
    lasting_steps,
    layer_numbers,
    layer_text,
    method_of,
    recipe_at,
    with_steps,
)


def point(recipe, layers="1") -> dict:
    return {"layers": layers, "recipe": recipe, "seed": 0}


@pytest.mark.parametrize(
    "values",
    [
        {"layers": "4 7 11", "recipe": "", "seed": 0},
        {"layers": "", "recipe": "lora 0.003 32", "seed": 1, "precision": "nf4"},
        {"layers": "1", "width": "", "recipe": "full 3e-05 16 + lora 0.01 16", "seed": 0},
        {"layers": "", "width": "1297 2", "recipe": "", "seed": 0},
        {
            "layers": "28 29",
            "recipe": 'last_layers 0.0003 32 last_k=2 untie=false targets=["q_proj"]',
            "seed": 2,
        },
        {"rule": "none", "n_dropped": 0, "healed": False, "seed": 0},
        {"rule": "similarity", "n_dropped": 8, "healed": True, "seed": 100, "rank": 2},
        {
            "rule": "deepest",
            "n_dropped": 8,
            "healed": True,
            "seed": 0,
            "num_fewshot": 5,
            "shot_order": 1,
        },
        {"rule": "taylor", "n_dropped": 16, "per_round": 4, "recipe": "lora 0.01 32", "seed": 0},
    ],
)
def test_points_and_their_plain_values_are_each_others_inverse(values):
    point = Point.parse(values)
    assert point.text() == values and Point.parse(point.text()) == point
    assert list(point.text()) == list(values), "columns of a table keep their order"


def test_every_committed_point_of_a_study_can_be_read():
    kinds = 0
    for path in runtime.project_root().glob("results/*/*/run.json"):
        for record in json.loads(path.read_text()).values():
            for entry in record.get("points", []):
                values = entry["point"]
                if {"recipe", "seed"} <= {*values} or "healed" in values:
                    kinds += 1
                    assert Point.parse(values).text() == values
    assert kinds > 500


def test_parts_of_a_recipe():
    recipe = Recipe.parse("full 0.0001 16 + last_layers 0.01 16 last_k=0")
    assert [stage.settings["method"] for stage in recipe.stages] == ["full", "last_layers"]
    assert recipe.stages[1] == Stage(
        {"method": "last_layers", "learning_rate": 0.01, "steps": 16, "last_k": 0}
    )
    assert method_of(recipe.text()) == "full" and method_of("") == ""
    assert recipe_at("last_layers last_k=2", 3e-4, 8) == "last_layers 0.0003 8 last_k=2"
    assert with_steps("lora 0.01 32 rank=2", 5) == "lora 0.01 5 rank=2"
    exact = Stage({"method": "lora", "learning_rate": 0.00123456789, "steps": 8})
    assert exact.text() == "lora 0.00123456789 8" and Stage.parse(exact.text()) == exact
    lists = Stage({"method": "lora", "targets": ["q_proj", "v_proj"], "of": "a + b c"})
    assert Stage.parse(lists.text()) == lists
    assert Recipe.parse(f"{lists.text()} + lora").stages == (lists, Stage({"method": "lora"}))
    assert layer_numbers(layer_text((4, 7))) == (4, 7) and layer_numbers("") == ()
    assert Cut.parse({"layers": "4 7"}) == Cut(layers=(4, 7))


@pytest.mark.parametrize(
    "words, settings",
    [
        ("last_k=1 untie=false", {"last_k": 1, "untie": False}),
        ("last_k=0", {"last_k": 0}),
        ("", {}),
    ],
)
def test_a_recipe_says_how_the_last_layers_are_trained(words, settings, tiny, tmp_path):
    asked = point(f"last_layers 0.01 4 {words}".strip())
    rows = pd.DataFrame(make_study(tiny, tmp_path, [asked])(asked))
    model, tokenizer = models.load_model(tiny)
    healed = healing.heal(
        surgery.drop_layers(model, [1]),
        tokenizer,
        data.healing_windows(tokenizer, 8, 16),
        merge=True,
        **{**HEALING, "method": "last_layers", "learning_rate": 0.01, "steps": 4, **settings},
    ).model
    losses = (
        evaluation.token_losses(healed, data.document_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses


def test_plain_recipes_share_their_models_with_the_other_study(tiny, tmp_path, monkeypatch):
    asked = point("lora 0.01 4")
    first = make_study(tiny, tmp_path, [asked])(asked)
    monkeypatch.setattr(
        healing, "trainable_copy", lambda *_: pytest.fail("trained again"), raising=True
    )
    folders = {path.parent for path in tmp_path.glob("*/*")}
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        other = point("lora 0.01 4 rank=3")
        make_study(tiny, tmp_path, [other])(other)
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    again = make_study(tiny, tmp_path, [asked])(asked)
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(again))
    assert {path.parent for path in tmp_path.glob("*/*")} == folders


def test_healing_on_questions_and_answers(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        instructions,
        "instruction_windows",
        lambda tokenizer, n_samples, seq_len, **given: (
            seen.append((n_samples, seq_len, given))
            or data.healing_windows(tokenizer, n_samples, seq_len, source="boolq")
        ),
    )
    asked = point("lora 0.01 4")
    rows = make_study(tiny, tmp_path, [asked], healing_source="fiqa")(asked)
    asked_for = (HEALING["steps"] * HEALING["batch_size"], 16, {"source": "fiqa", "seed": 0})
    assert seen and all(given == asked_for for given in seen)
    plain = make_study(tiny, tmp_path, [asked])(asked)
    losses = [[row["nll"] for row in table if row["dataset"] == "xsum"] for table in (rows, plain)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            "last_layers 0.01 4 last_k=5",
            f"last_k must be at most {N_LAYERS - 1}, the layers that are left, got 5",
        ),
        ("last_layers 0.01 4 untie=1", "untie must be True or False, got 1"),
        ("last_layers 0.01 4 last_k", "a stage must be such as"),
        ("last_layers 0.01 4 untie=no", "a stage must be such as"),
        ("lora 0.01 4 seed=5", "a stage may name a setting once, and not"),
        ("lora 0.01 4 batch_size=2", "a stage may name a setting once, and not"),
        ("lora 0.01 4 rank=2 rank=3", "a stage may name a setting once, and not"),
        ("lora 0.01 4 ranks=2", "healing has no settings"),
        ("lora 0.01 4 rank=0", "rank must be a whole number from 1"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(bad, message, tiny, tmp_path):
    asked = make_study(tiny, tmp_path, [point(""), point(bad)])
    with pytest.raises(ValueError, match=message):
        asked(point(""))


def test_the_table_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    settings = dict(
        seq_len=16, tasks={}, limit=None, texts={"xsum": 3}, healing_settings=HEALING, seed=0
    )
    asked = dict(
        profile="smoke",
        notebook="10_how_to_heal",
        model=tiny,
        revision=None,
        table="sets",
        **settings,
    )
    first, path = study.study_table([point("")], **asked)
    monkeypatch.setattr(study.Study, "__call__", lambda *_: pytest.fail("computed again"))
    assert first.equals(study.study_table([point("")], **asked)[0]) and path.is_relative_to(
        tmp_path
    )


def test_a_file_of_ones_own_is_known_by_its_content(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    rows = [
        json.dumps({"instruction": f"Say {number}.", "input": "", "output": "Yes."})
        for number in range(60)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(rows))
    monkeypatch.setattr(
        instructions, "instruction_texts", lambda tokenizer, source: path.read_text().split("\n")
    )
    settings = dict(
        seq_len=16, tasks={}, limit=None, texts={"xsum": 3}, healing_settings=HEALING, seed=0
    )
    asked = dict(
        profile="smoke",
        notebook="11",
        model=tiny,
        revision=None,
        table="own",
        healing_source=str(path),
    )
    first, table = study.study_table([point("full 0.01 4")], **asked, **settings)
    recorded = (table.parent / "run.json").read_text()
    assert "own.jsonl sha256:" in recorded and str(path) not in recorded
    path.write_text("\n".join(rows[::-1]))
    with pytest.raises(ValueError, match="was made with other parameters .*healing_source"):
        study.study_table([point("full 0.01 4")], **asked, **settings)
    other, _ = study.study_table([point("full 0.01 4")], **asked, **settings, recompute=True)
    assert not first["nll"].equals(other["nll"]), "trained on the new text"


def test_steps_that_do_not_last_as_long_give_way_to_the_measured_ones():
    asked = [(14, 28), (20, 30), (24, 20), (26, 10)]
    measured = {14: 26.0, 20: 20.4, 24: 22.1, 26: 0.4}
    found = lasting_steps(asked, measured, least=8, most=32)
    assert found == {14: 28, 20: 20, 24: 22, 26: 8}
    assert lasting_steps([(24, 20)], {24: 21.9}, least=1, most=32) == {24: 20}
    # On a GPU all weights may take less time than adapters; there is text for so many steps.
    assert lasting_steps([(24, 20)], {24: 57.0}, least=1, most=32) == {24: 32}
