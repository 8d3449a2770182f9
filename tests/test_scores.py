"""Every metric's scores and sets against the steps one by one."""

import numpy as np
import pandas as pd
import pytest
from tiny_model import N_LAYERS

from pruning_utils import data, importance, models, runtime, selection, similarity
from pruning_utils.studies import scores as layer_scores
from pruning_utils.studies import sets

DRAW = {"source": "xsum", "n_samples": 2, "seed": 1}
SETTINGS = {"revision": None, "dtype": "float32", "seq_len": 16, "block_sizes": [2, 3]}


@pytest.fixture(scope="module")
def scores(tiny):
    return pd.DataFrame(layer_scores.score_metrics(DRAW, model=tiny, **SETTINGS))


def test_scores_are_those_of_each_metric(scores, tiny):
    model, tokenizer = models.load_model(tiny, dtype="float32")
    windows = data.calibration_windows(tokenizer, 2, 16, seed=1)
    found = similarity.measure_similarity(model, windows)
    expected = {
        "magnitude": importance.magnitude(model),
        "magnitude L2": importance.magnitude(model, norm=2),
        "taylor": importance.taylor(model, windows),
        "perplexity": importance.perplexity_without_layer(model, windows),
        "block influence": found.block_influence,
        "block influence, flattened": found.block_influence_flattened,
        "block of 2": selection.block_distances(found.angular_distance, 2),
        "block of 3": selection.block_distances(found.angular_distance, 3),
    }
    assert list(scores["criterion"].unique()) == list(expected)
    for criterion, values in expected.items():
        rows = scores[scores["criterion"] == criterion]
        assert rows["layer"].tolist() == list(range(len(values)))
        assert rows["score"].to_numpy() == pytest.approx(values, rel=1e-5)


def test_sets_are_those_of_each_metric():
    scores = {
        "block influence": [8, 7, 6, 5, 4, 3, 2, 1, 0],
        "block of 2": [3, 2, 1, 1, 2, 3, 4, 5],
    }
    table = pd.DataFrame(
        [
            {"criterion": criterion, "layer": layer, "score": score}
            for criterion, values in scores.items()
            for layer, score in enumerate(values)
        ]
    )
    found = sets.metric_sets(table, [2], n_random=2).set_index("rule")
    drawn = {
        f"random {seed}": " ".join(map(str, selection.random_layers(9, 2, seed=seed)))
        for seed in range(2)
    }
    assert found["layers"].to_dict() == {
        "block influence": "7 8",
        "closest block": "2 3",
        "reverse order": "7 8",
        "deepest but last": "6 7",
        "alternate": "5 7",
        **drawn,
    }
    assert (found["n_dropped"] == 2).all()


def test_a_size_without_distances_is_refused(scores):
    with pytest.raises(
        ValueError, match="the scores hold no distances of blocks of 4: name it among block_sizes"
    ):
        sets.metric_sets(
            pd.concat([scores, scores.assign(layer=scores["layer"] + N_LAYERS)]), [4], n_random=0
        )


def test_the_table_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    asked = dict(profile="smoke", model=tiny, **SETTINGS)
    first, path = layer_scores.metric_table([["xsum", 2, 1]], **asked)
    monkeypatch.setattr(importance, "taylor", lambda *_, **__: pytest.fail("computed again"))
    again, _ = layer_scores.metric_table([["xsum", 2, 1]], **asked)
    assert first.equals(again) and path.parent.is_relative_to(tmp_path)
    assert (first[["source", "n_samples", "seed"]] == ["xsum", 2, 1]).all(axis=None)


def test_the_plus_rule_is_shown_for_magnitude_and_taylor(scores):
    model_scores = pd.concat(
        [scores[scores["criterion"] == name] for name in ("taylor", "perplexity", "block of 2")]
    )
    # Long enough for six protected layers.
    longer = pd.concat(
        [
            model_scores,
            *(
                model_scores.assign(layer=model_scores["layer"] + N_LAYERS * part)
                for part in range(1, 3)
            ),
        ]
    )
    found = sets.metric_sets(longer, [2], n_random=0)
    assert {"taylor", "taylor+", "perplexity"} < set(found["rule"]) and "perplexity+" not in set(
        found["rule"]
    )
    (protected,) = found[found["rule"] == "taylor+"]["layers"]
    assert (
        4 <= min(map(int, protected.split()))
        and max(map(int, protected.split())) < 3 * N_LAYERS - 2
    )


def test_a_size_that_is_no_block_is_refused_before_the_pass(tiny, monkeypatch):
    monkeypatch.setattr(importance, "taylor", lambda *_, **__: pytest.fail("computed first"))
    with pytest.raises(
        ValueError, match=f"block_size must be a whole number from 1 to {N_LAYERS}, got 99"
    ):
        layer_scores.score_metrics(DRAW, model=tiny, **{**SETTINGS, "block_sizes": [99]})


def test_rank_agreement_is_spearmans():
    means = np.random.default_rng(0).normal(size=(5, 2, 7))
    expected = [
        pd.Series(first).corr(pd.Series(second), method="spearman") for first, second in means
    ]
    assert sets.rank_agreement(means) == pytest.approx(expected)
    assert sets.rank_agreement(np.array([[1, 2, 5], [0.1, 7, 9]])) == 1
    assert sets.rank_agreement(np.array([[1, 2, 5], [9, 7, 0.1]])) == -1


def test_what_the_notebooks_say_of_the_published_tables():
    table = pd.read_csv(runtime.project_root() / "reference" / "reassessing_tables.csv")
    average = table["quantity"].str.startswith("Avg")
    keys = ["table", "model", "method"]
    printed = table[average].set_index(keys)["value"]
    cells = table[~average].groupby(keys)["value"].mean()
    assert (table[~average].groupby(keys).size() == 8).all()
    apart = (printed - cells)[(printed - cells).abs() > 0.0051]  # Table 6 prints two digits
    assert apart.to_dict() == {
        ("Table 1", "Qwen1.5-7B", "BI + LoRA"): pytest.approx(0.00815, abs=1e-5)
    }
    first = cells["Table 1"].unstack("method")
    assert (first["Reverse-order + LoRA"] - first["PPL + LoRA"]).mean() == pytest.approx(
        0.0530, abs=5e-5
    )
    half = cells["Table A"].unstack("method")
    assert half.idxmax(axis=1).eq("Reverse-order + LoRA").to_dict() == {
        "Gemma2-2B-It": False,
        "Llama-3.1-8B-It": True,
        "Qwen1.5-7B": False,
        "Vicuna-7B-v1.5": False,
    }
    ours = table[~average & (table["model"] == "Llama-3.1-8B-It")]
    ours = ours.set_index(["table", "method", "quantity"])["value"].sort_index()
    few = ours["Table D / Table 6", "Taylor (n=10 calibration samples) + LoRA"]
    assert few.eq(ours["Table A", "Taylor + LoRA"]).all(), (
        "eight layers removed, but printed with sixteen"
    )
