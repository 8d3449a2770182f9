"""Recipes with settings of their own, and healing on questions and answers."""

import json

import pandas as pd
import pytest
import test_shape_study
import torch
from test_depth_study import HEALING, N_LAYERS, save_tiny_model

from pruning_utils import (
    data,
    evaluation,
    healing,
    importance_study,
    instructions,
    models,
    recipe_study,
    surgery,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def study(tiny, folder, points, kind=recipe_study.RecipeStudy, **more):
    given = {
        name: value for name, value in test_shape_study.SETTINGS.items() if name != "n_calibration"
    }
    return kind(points, model=tiny, checkpoints=folder, **{**given, "tasks": {}, **more})


def point(recipe, layers="1") -> dict:
    return {"layers": layers, "recipe": recipe, "seed": 0}


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
    rows = pd.DataFrame(study(tiny, tmp_path, [asked])(asked))
    model, tokenizer = models.load_model(tiny)
    healed = healing.heal(
        surgery.drop_layers(model, [1]),
        tokenizer,
        data.healing_windows(tokenizer, 8, 16),
        merge=True,
        **{**HEALING, "method": "last_layers", "learning_rate": 0.01, "steps": 4, **settings},
    ).model
    losses = (
        evaluation.token_losses(healed, data.evaluation_windows(tokenizer, 3, 16)).mean(1).tolist()
    )
    assert rows[rows["dataset"] == "xsum"]["nll"].tolist() == losses


def test_plain_recipes_share_their_models_with_the_other_study(tiny, tmp_path, monkeypatch):
    asked = point("lora 0.01 4")
    first = study(tiny, tmp_path, [asked], kind=importance_study.SetStudy)(asked)
    monkeypatch.setattr(
        healing, "_trainable_copy", lambda *_: pytest.fail("trained again"), raising=True
    )
    folders = {folder.name for folder in tmp_path.iterdir()}
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        other = point("lora 0.01 4 rank=3")
        study(tiny, tmp_path, [other])(other)
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    again = study(tiny, tmp_path, [asked])(asked)
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(again))
    assert {folder.name for folder in tmp_path.iterdir()} == folders


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
    rows = study(tiny, tmp_path, [asked], healing_source="fiqa")(asked)
    asked_for = (HEALING["steps"] * HEALING["batch_size"], 16, {"source": "fiqa", "seed": 0})
    assert seen and all(given == asked_for for given in seen)
    plain = study(tiny, tmp_path, [asked])(asked)
    losses = [[row["nll"] for row in table if row["dataset"] == "xsum"] for table in (rows, plain)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            "last_layers 0.01 4 last_k=5",
            f"last_k must be at most {N_LAYERS - 1}, the layers that are left, got 5",
        ),
        ("last_layers 0.01 4 untie=1", "untie and train_norm must be true or false"),
        ("last_layers 0.01 4 last_k", "recipe must be stages"),
        ("last_layers 0.01 4 untie=no", "recipe must be stages"),
        ("lora 0.01 4 seed=5", "recipe must be stages"),
        ("lora 0.01 4 batch_size=2", "recipe must be stages"),
        ("lora 0.01 4 rank=2 rank=3", "recipe must be stages"),
        ("lora 0.01 4 ranks=2", "healing has no settings"),
        ("lora 0.01 4 rank=0", "rank must be a whole number from 1"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(bad, message, tiny, tmp_path):
    asked = study(tiny, tmp_path, [point(""), point(bad)])
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
    first, path = recipe_study.recipe_table([point("")], **asked)
    monkeypatch.setattr(
        recipe_study.RecipeStudy, "__call__", lambda *_: pytest.fail("computed again")
    )
    assert first.equals(recipe_study.recipe_table([point("")], **asked)[0]) and path.is_relative_to(
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
    first, table = recipe_study.recipe_table([point("full 0.01 4")], **asked, **settings)
    recorded = (table.parent / "run.json").read_text()
    assert "own.jsonl sha256:" in recorded and str(path) not in recorded
    path.write_text("\n".join(rows[::-1]))
    with pytest.raises(ValueError, match="was made with other parameters .*healing_source"):
        recipe_study.recipe_table([point("full 0.01 4")], **asked, **settings)
    other, _ = recipe_study.recipe_table(
        [point("full 0.01 4")], **asked, **settings, recompute=True
    )
    assert not first["nll"].equals(other["nll"]), "trained on the new text"
