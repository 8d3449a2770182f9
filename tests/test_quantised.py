"""What quantising costs whole and pruned models."""

import numpy as np
import pandas as pd
import pytest

from pruning_utils import evidence
from pruning_utils.studies import quantised

TITLES = {"xsum": "XSum", "quac": "QuAC"}
PRECISIONS = ("bfloat16", "int8", "nf4")
# What a precision adds to the loss, and what megabytes it leaves, by the layers that are removed.
ADDED = {"": (0.0, 0.1, 0.4), "2 3": (1.0, 1.1, 1.9)}
DISK = {"": (80, 50, 30), "2 3": (60, 40, 25)}
N = 40


@pytest.fixture(scope="module")
def losses() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for text in TITLES:
        level = 3 + rng.normal(size=N)
        for layers, added in ADDED.items():
            for precision, more in zip(PRECISIONS, added, strict=True):
                nll = level + more + 0.01 * rng.normal(size=N)
                part = {"layers": layers, "precision": precision, "item": range(N), "nll": nll}
                parts.append(pd.DataFrame(part).assign(dataset=text))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def sizes() -> pd.DataFrame:
    rows = [
        {"layers": layers, "precision": precision, "disk": 1_000_000 * megabytes}
        for layers, of_layers in DISK.items()
        for precision, megabytes in zip(PRECISIONS, of_layers, strict=True)
    ]
    return pd.DataFrame(rows)


def test_losses_stand_beside_sizes(losses, sizes):
    others = losses.assign(dataset="piqa", nll=np.nan)
    found = quantised.stored_losses(pd.concat([losses, others]), sizes, TITLES)
    assert len(found) == 12 and found["n_dropped"].tolist() == 2 * (3 * [0] + 3 * [2])
    row = found.set_index(["panel", "layers", "precision"]).loc["QuAC", "2 3", "nf4"]
    own = losses.query("dataset == 'quac' and layers == '2 3' and precision == 'nf4'")["nll"]
    assert tuple(row[["value", "low", "high"]]) == pytest.approx(evidence.mean_interval(own))
    assert row["size"] == 25 and row["n"] == N
    with pytest.raises(KeyError):
        quantised.stored_losses(losses, sizes.iloc[:-1], TITLES)


def test_what_a_precision_adds_and_whether_it_adds_more_to_pruned_models(losses):
    found = quantised.added_losses(losses, TITLES).set_index("pair")
    assert len(found) == 2 * 2 * 3, "texts, precisions, and both models with their difference"
    expected = {
        "XSum, int8: added with 0 layers removed": 0.1,
        "XSum, int8: added with 2 layers removed": 0.1,
        "XSum, int8: 2 layers, more than unpruned": 0.0,
        "QuAC, nf4: added with 0 layers removed": 0.4,
        "QuAC, nf4: added with 2 layers removed": 0.9,
        "QuAC, nf4: 2 layers, more than unpruned": 0.5,
    }
    assert found.loc[[*expected], "difference"].to_dict() == pytest.approx(expected, abs=0.01)
    assert found.loc["XSum, int8: 2 layers, more than unpruned", "verdict"] == "equal"
    assert found.loc["QuAC, nf4: 2 layers, more than unpruned", "verdict"] == "differs"
    margins = found["margin"].groupby([name.split(":")[0] for name in found.index]).unique()
    assert margins["QuAC, nf4"] == pytest.approx([0.1], abs=0.002)


def test_a_whole_model_in_few_bits_against_fewer_layers(losses, sizes):
    levels = quantised.stored_losses(losses, sizes, TITLES)
    found = quantised.quantised_or_pruned(losses, levels, TITLES, than="int8")
    assert found["text"].tolist() == ["XSum", "QuAC"] and found["layers removed"].tolist() == [2, 2]
    assert found["difference"].to_numpy() == pytest.approx([-0.7, -0.7], abs=0.01)
    assert (found["low"] < found["difference"]).all() and (found["high"] < 0).all()
    assert found.iloc[0, -2:].tolist() == [30, 40]


def test_models_that_met_other_documents_are_refused(losses, sizes):
    levels = quantised.stored_losses(losses, sizes, TITLES)
    with pytest.raises(ValueError, match="models must be measured on the same documents of xsum"):
        quantised.quantised_or_pruned(losses.iloc[1:], levels, TITLES, than="int8")
