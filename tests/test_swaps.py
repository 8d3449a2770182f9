"""Scores of samples of calibration text, and sets that differ in one layer."""

import pandas as pd
import pytest
from tiny_model import N_LAYERS

from pruning_utils import data, importance, models, similarity
from pruning_utils.studies import scores, sets, swaps

DRAW = {"source": "xsum", "n_samples": 2, "seed": 1}
SETTINGS = {"revision": None, "dtype": "float32", "seq_len": 16}


def test_scores_are_those_of_each_metric(tiny):
    found = pd.DataFrame(scores.score_sample(DRAW, model=tiny, **SETTINGS))
    model, tokenizer = models.load_model(tiny, dtype="float32")
    windows = data.calibration_windows(tokenizer, 2, 16, seed=1)
    expected = {
        "taylor": importance.taylor(model, windows),
        "block influence": similarity.measure_similarity(model, windows).block_influence,
    }
    assert list(found["criterion"].unique()) == list(expected)
    for criterion, values in expected.items():
        rows = found[found["criterion"] == criterion]
        assert rows["layer"].tolist() == list(range(N_LAYERS))
        assert rows["score"].to_numpy() == pytest.approx(values, rel=1e-5)


def test_the_table_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    asked = dict(profile="smoke", notebook="11_one_shot_or_iterative", model=tiny, **SETTINGS)
    first, path = scores.sample_table([["xsum", 2, 1]], **asked)
    monkeypatch.setattr(importance, "taylor", lambda *_, **__: pytest.fail("computed again"))
    again, _ = scores.sample_table([["xsum", 2, 1]], **asked)
    assert first.equals(again) and path.is_relative_to(tmp_path)


def test_sets_are_compared_with_those_of_other_draws_of_the_most_text():
    draws = {(1, 0): [0, 1, 2, 3], (1, 1): [3, 2, 1, 0], (9, 0): [0, 1, 2, 3], (9, 1): [0, 2, 1, 3]}
    table = pd.DataFrame(
        [
            {
                "criterion": "taylor",
                "n_samples": count,
                "seed": seed,
                "layer": layer,
                "score": score,
            }
            for (count, seed), found in draws.items()
            for layer, score in enumerate(found)
        ]
    )
    found = sets.sample_sets(table.iloc[::-1].sort_values(["n_samples", "seed"], kind="stable"), 2)
    assert found["layers"].tolist() == ["0 1", "2 3", "0 1", "0 2"]
    assert found["changed"].tolist() == [1, 2, 1, 1], (
        "one window, draw 1: against draw 0 of nine, and so on"
    )
    with pytest.raises(ValueError, match="must have two seeds at least, got 1 of 9 windows"):
        sets.sample_sets(table[(table["n_samples"] == 1) | (table["seed"] == 0)], 2)


def test_all_swaps_of_a_set():
    found = swaps.single_swaps([4, 1], 5)
    assert found.to_dict("list") == {
        "spared": [1, 1, 1, 4, 4, 4],
        "dropped": [0, 2, 3, 0, 2, 3],
        "layers": ["0 4", "2 4", "3 4", "0 1", "1 2", "1 3"],
    }
    assert swaps.single_swaps([4, 1], 5, spared=[4])["layers"].tolist() == [
        "0 1",
        "1 2",
        "1 3",
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(layers=[1, 1]), r"different numbers from 0 to 4, got \[1, 1\]"),
        (dict(layers=[1, 5]), r"different numbers from 0 to 4, got \[1, 5\]"),
        (
            dict(layers=[1, 2], spared=[3]),
            r"spared must be different ones of the layers that go, \[1, 2\], got \[3\]",
        ),
        (dict(layers=[1, 2], spared=[1, 1]), r"spared must be different ones .* got \[1, 1\]"),
        (dict(layers=[1, 2], spared=[]), r"spared must be different ones .* got \[\]"),
    ],
)
def test_bad_swaps_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        swaps.single_swaps(n_layers=5, **given)
