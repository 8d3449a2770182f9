"""Rates that are tried, and the one that is chosen."""

import pandas as pd
import pytest

from pruning_utils.studies import rates

RECIPES = {"LoRA": "lora", "head + 3": "last_layers last_k=3 untie=true"}
LAYERS = {"deepest": "2 3", "whole": ""}
GRIDS = {
    "deepest": {"LoRA": [1e-3, 3e-3, 1e-2], "head + 3": [3e-4, 1e-3]},
    "whole": {"LoRA": [1e-4]},
}


def test_each_rate_becomes_a_recipe_in_the_order_of_the_grids():
    tried = rates.rate_grid(GRIDS, recipes=RECIPES, layers=LAYERS, steps=32)
    assert tried["recipe"].tolist() == [
        "lora 0.001 32",
        "lora 0.003 32",
        "lora 0.01 32",
        "last_layers 0.0003 32 last_k=3 untie=true",
        "last_layers 0.001 32 last_k=3 untie=true",
        "lora 0.0001 32",
    ]
    assert tried["layers"].tolist() == ["2 3"] * 5 + [""]
    assert tried.loc[5, ["rule", "method", "rate"]].tolist() == ["whole", "LoRA", 1e-4]


@pytest.mark.parametrize(
    "grids, message",
    [
        ({"deepest": {"LoRA": []}}, r"rates of LoRA for deepest must be .* at least one, got \[\]"),
        ({"deepest": {"LoRA": 1e-3}}, r"must be a list of different numbers above 0, .* got 0.001"),
        ({"deepest": {"LoRA": ["1e-3", 1e-2]}}, r"numbers above 0, .* got \['1e-3', 0.01\]"),
        ({"deepest": {"LoRA": "1e-3"}}, r"numbers above 0, .* got '1e-3'"),
        (
            {"deepest": {"LoRA": [1e-3, 1e-3]}},
            r"of different numbers above 0, .* got \[0.001, 0.001\]",
        ),
        ({"deepest": {"LoRA": [0.0, 1e-3]}}, r"above 0, .* got \[0.0, 0.001\]"),
        (
            {"deepest": {"adapters": [1e-3]}},
            "recipes of deepest must be of LoRA, head \\+ 3, got 'adapters'",
        ),
        ({"taylor": {"LoRA": [1e-3]}}, "grids must be for deepest, whole, got 'taylor'"),
        ({}, "one recipe at least, got none"),
        ({"deepest": {}}, "one recipe at least, got none"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_refused(grids, message):
    with pytest.raises(ValueError, match=message):
        rates.rate_grid(grids, recipes=RECIPES, layers=LAYERS, steps=32)


def test_the_last_loss_on_validation_text_counts():
    trials = pd.DataFrame(
        {
            "layers": "2 3",
            "recipe": ["a"] * 4 + ["b"] * 2,
            "item": [200, 100, 200, 100, 200, 100],
            "dataset": [
                "healing eval",
                "healing eval",
                "healing train",
                "healing train",
                "healing eval",
                "healing eval",
            ],
            "nll": [4.0, 9.0, 1.0, 2.0, 5.0, 3.0],
        }
    )
    assert rates.last_losses(trials).to_dict() == {("2 3", "a"): 4.0, ("2 3", "b"): 5.0}
    trials.loc[0, "nll"] = float("nan")
    assert rates.last_losses(trials).isna().tolist() == [True, False], "not the one before it"


def test_losses_are_told_apart_by_the_columns_asked_for():
    trials = pd.DataFrame(
        {
            "recipe": "a",
            "per_round": [8, 8, 4, 4],
            "item": [200, 100, 100, 200],
            "dataset": "healing eval",
            "nll": [4.0, 9.0, 5.0, 3.0],
        }
    )
    assert rates.last_losses(trials, by=["per_round", "recipe"]).to_dict() == {
        (8, "a"): 4.0,
        (4, "a"): 3.0,
    }


def tried(losses):
    return rates.rate_grid(GRIDS, recipes=RECIPES, layers=LAYERS, steps=32).assign(loss=losses)


def test_the_best_rate_is_that_of_the_lowest_loss():
    best = rates.best_rates(tried([5, 4, 6, 8, 7, 3]), ends=True)
    assert best.to_dict() == {
        ("deepest", "LoRA"): 3e-3,
        ("deepest", "head + 3"): 1e-3,
        ("whole", "LoRA"): 1e-4,
    }


def test_a_best_rate_at_the_end_of_its_grid_is_no_result():
    with pytest.raises(
        ValueError, match=r"needed for head \+ 3 on deepest \(best: 0.001\), LoRA on whole"
    ):
        rates.best_rates(tried([5, 4, 6, 8, 7, 3]))
    inner = tried([5, 4, 6, 8, 7, 3]).query("method == 'LoRA' and rule == 'deepest'")
    assert rates.best_rates(inner).to_dict() == {("deepest", "LoRA"): 3e-3}


def test_each_value_of_another_column_has_a_best_rate_of_its_own():
    grids = {"deepest": {"LoRA": [1e-3, 3e-3, 1e-2, 3e-2]}}
    grid = rates.rate_grid(grids, recipes=RECIPES, layers=LAYERS, steps=32)
    both = pd.concat(
        [grid.assign(per_round=8, loss=[5, 4, 6, 7]), grid.assign(per_round=1, loss=[9, 8, 7, 8])],
        ignore_index=True,
    )
    best = rates.best_rates(both, within=["per_round"])
    assert best.to_dict() == {(8, "deepest", "LoRA"): 3e-3, (1, "deepest", "LoRA"): 1e-2}
    assert best.index.names == ["per_round", "rule", "method"]
    both.loc[7, "loss"] = 6
    with pytest.raises(
        ValueError, match=r"are needed for LoRA on deepest with {'per_round': 1} \(best: 0.03\)$"
    ):
        rates.best_rates(both, within=["per_round"])


def test_a_rate_without_a_loss_is_an_error():
    with pytest.raises(ValueError, match="1 have none"):
        rates.best_rates(tried([5, 4, 6, 8, 7, float("nan")]), ends=True)
