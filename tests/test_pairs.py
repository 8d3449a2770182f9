"""Pairs of sets of layers: what 06, 09 and 11 compare, item by item."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pruning_utils import evidence, importance_plots
from pruning_utils.studies import depth, pairs, sets

N_ITEMS = 40
WHOLE, TAYLOR, PROTECTED, PERPLEXITY = "", "8 9", "6 7", "4 5"
# What the model without each set loses, unhealed, and after healing with each of two seeds.
ADDED = {WHOLE: 0.0, TAYLOR: 1.0, PROTECTED: 2.0, PERPLEXITY: 0.5}
HEALED = {PROTECTED: 0.9, PERPLEXITY: 0.4}


def rows_of(dataset: str, column: str, sign: float = 1.0) -> pd.DataFrame:
    """Rows of a study in which every item is of its own difficulty, alike in all models."""
    drawn = np.random.default_rng(len(dataset))
    difficulty = drawn.normal(3, 1, N_ITEMS)
    found = []
    for recipe, added, seeds in (("", ADDED, [0]), ("lora 0.01 8", HEALED, [0, 1])):
        for layers, value in added.items():
            for seed in seeds:
                noise = drawn.normal(0, 0.05, N_ITEMS)
                found.append(
                    pd.DataFrame(
                        {
                            "layers": layers,
                            "recipe": recipe,
                            "seed": seed,
                            "dataset": dataset,
                            "item": range(N_ITEMS),
                            column: difficulty + sign * value + noise,
                        }
                    )
                )
    return pd.concat(found, ignore_index=True)


@pytest.fixture
def measured() -> pairs.MeasuredSets:
    return pairs.MeasuredSets.of(
        {
            "accuracy": (rows_of("piqa", "above_floor", -1.0), ["piqa"], "above_floor"),
            "loss on XSum": (rows_of("xsum", "nll"), ["xsum"], "nll"),
        },
        {"unhealed": "", "healed": "lora 0.01 8"},
    )


@pytest.fixture
def compared(measured) -> pd.DataFrame:
    return pairs.compared_pairs(
        {"B1": (PROTECTED, PERPLEXITY), "B5 taylor at 2": (PROTECTED, TAYLOR)}, measured
    )


def test_items_stand_in_rows_whatever_their_order():
    rows = rows_of("xsum", "nll").query("recipe == ''")
    wide, strata = pairs.per_item(rows.sample(frac=1, random_state=0), "nll", ["xsum"], ["layers"])
    again, _ = pairs.per_item(rows, "nll", ["xsum"], ["layers"])
    assert wide.equals(again) and wide.shape == (N_ITEMS, len(ADDED))
    assert set(strata) == {"xsum"} and list(wide.columns) == sorted(ADDED)
    with pytest.raises(ValueError, match="duplicate"):
        pairs.per_item(pd.concat([rows, rows]), "nll", ["xsum"], ["layers"])


def test_levels_are_those_of_each_set_and_stage(measured):
    for stage, added in (("unhealed", ADDED), ("healed", HEALED)):
        rows = rows_of("xsum", "nll")
        rows = rows[(rows["recipe"] == "") == (stage == "unhealed")]
        for layers in added:
            level = measured.levels["loss on XSum", stage, layers]
            assert level.value == pytest.approx(rows[rows["layers"] == layers]["nll"].mean())
            assert level.n == N_ITEMS and level.runs == (2 if stage == "healed" else 1)
    assert set(measured.unpruned) == {"accuracy", "loss on XSum"}
    assert measured.sizes() == "40 questions (accuracy), 40 documents (loss on XSum)"


def test_pairs_of_the_claims_are_where_protection_changes_the_set():
    scores = pd.DataFrame(
        {
            "criterion": np.repeat(["magnitude", "taylor", "perplexity"], 12),
            "layer": [*range(12)] * 3,
            # Magnitude begins with layer 0; Taylor in the middle, with layer 0 the third to go.
            "score": [*range(12)]
            + [3, 5, 6, 7, 1, 2, 8, 9, 10, 11, 12, 13]
            + [9, 8, 7, 6, 1, 2, 3, 4, 5, 10, 11, 12],
        }
    )
    of_rule = sets.removed_sets(scores, [2, 3]).set_index(["rule", "n_dropped"])["layers"]
    assert pairs.importance_pairs(of_rule, [2, 3]) == {
        "B1": ("4 5", "4 5"),
        "B5 magnitude at 2": ("4 5", "0 1"),
        "B5 taylor at 3": ("4 5 6", "0 4 5"),
    }


def test_a_claim_is_a_family_and_takes_only_stages_with_both_sets(measured, compared):
    assert list(compared["pair"]) == [
        "B1 accuracy, unhealed",
        "B1 accuracy, healed",
        "B1 loss on XSum, unhealed",
        "B1 loss on XSum, healed",
        "B5 taylor at 2, accuracy, unhealed",
        "B5 taylor at 2, loss on XSum, unhealed",
    ]
    found = compared.set_index("pair")
    assert found.loc["B1 loss on XSum, unhealed", "difference"] == pytest.approx(1.5, abs=0.05)
    assert found.loc["B1 accuracy, unhealed", "difference"] == pytest.approx(-1.5, abs=0.05)
    assert found.loc["B1 loss on XSum, healed", "runs"] == 2
    # A quarter of what the set changes that changes less, without healing.
    assert found.loc["B1 loss on XSum, healed", "margin"] == pytest.approx(0.5 / 4, abs=0.02)
    assert found.loc["B5 taylor at 2, loss on XSum, unhealed", "margin"] == pytest.approx(
        1.0 / 4, abs=0.02
    )
    alone = pairs.compared_pairs({"B5 taylor at 2": (PROTECTED, TAYLOR)}, measured)
    of_claim = compared[compared["pair"].str.startswith("B5")]
    assert alone["p_holm"].tolist() == of_claim["p_holm"].tolist(), "B1 is another family"
    assert (compared["verdict"] == "differs").all()


def test_a_small_effect_does_not_make_a_margin_of_nothing(measured):
    found = pairs.compared_pairs({"B1": (WHOLE, TAYLOR)}, measured)
    assert (found["margin"] == depth.SMALLEST_EFFECT / 4).all()


def test_verdicts_name_the_claim_the_depth_and_who_was_trained(measured, compared):
    rows = pairs.judged_pairs(
        compared,
        measured,
        size=depth.Size(12, 10**6, 50_000, 4, 10**4),
        n_tasks=8,
        trained={
            "recipe": "LoRA on 8 tokens",
            "tokens_per_parameter": 1.0,
            "paper_tokens_per_parameter": 1.0,
        },
        model="some-model",
        notebook="06_block_importance",
        cell="On a second model",
    )
    told = {row["part"] + (", " + row["data"]): row for row in rows}
    assert len(told) == len(compared)
    higher = told["Taylor+ has a higher loss than perplexity, unhealed, XSum"]
    assert (higher["verdict"], higher["recipe"]) == ("holds", "unhealed")
    healed = told["Taylor+ has a higher loss than perplexity, healed, XSum"]
    assert healed["recipe"] == "LoRA on 8 tokens"
    ends = told["protected ends lower the loss, Taylor, unhealed, XSum"]
    assert (ends["claim"], ends["verdict"]) == ("B5", "does not hold")
    assert {row["depth"] for row in rows} == {"2 of 12 layers"}
    assert ends["floor"] == pytest.approx(np.log(50_000))
    answers = told["Taylor+ answers better than perplexity, unhealed, 8 tasks"]
    assert answers["floor"] == 0.0 and answers["verdict"] == "does not hold"


def test_what_is_drawn_has_a_panel_for_each_claim_and_criterion(measured, compared):
    drawn = pairs.drawn_pairs(
        compared, measured, {"perplexity": PERPLEXITY, "taylor+": PROTECTED}, label="", n_tasks=8
    )
    assert len(drawn["levels"]) == 2 * 2 * 2
    assert list(dict.fromkeys(drawn["differences"]["panel"])) == [
        "Taylor+ minus perplexity: accuracy (B1)",
        "Taylor+ minus perplexity: loss (B1)",
        "protected ends minus none, Taylor, 2 layers: accuracy (B5)",
        "protected ends minus none, Taylor, 2 layers: loss (B5)",
    ]
    assert set(drawn["baselines"]["name"]) == {"unpruned", "floor"}
    figure = importance_plots.levels_and_differences(**drawn)
    assert len(figure.axes) == 2 + 4
    losses = pairs.MeasuredSets.of(
        {"loss on XSum": (rows_of("xsum", "nll"), ["xsum"], "nll")}, {"unhealed": ""}
    )
    only = pairs.compared_pairs({"B1": (PROTECTED, PERPLEXITY)}, losses)
    shown = pairs.drawn_pairs(only, losses, {"taylor+": PROTECTED}, label="", n_tasks=8)
    assert set(shown["baselines"]["name"]) == {"unpruned"}
    assert isinstance(losses.unpruned["loss on XSum"], evidence.FactorInterval)


def draws_of(chosen: dict[int, list[str]], lost: dict[str, float]) -> tuple:
    """Sets by number of windows, one for each seed, and a study of them."""
    drawn = [
        {"criterion": "taylor", "n_samples": n, "seed": seed, "layers": layers, "changed": changed}
        for n, (found, changed) in chosen.items()
        for seed, layers in enumerate(found)
    ]
    drawn_from = np.random.default_rng(0)
    difficulty = drawn_from.normal(3, 1, N_ITEMS)
    studied = [
        pd.DataFrame(
            {
                "layers": layers,
                "dataset": "xsum",
                "item": range(N_ITEMS),
                "nll": difficulty + value + drawn_from.normal(0, 0.02, N_ITEMS),
            }
        )
        for layers, value in lost.items()
    ]
    return pd.DataFrame(drawn), pd.concat(studied, ignore_index=True)


def test_draws_are_compared_with_those_of_the_most_windows():
    chosen = {1: (["1 2", "1 3", "1 4"], 2.0), 5: (["6 7"] * 3, 0.0), 50: (["6 7"] * 3, 0.0)}
    lost = {"1 2": 2.0, "1 3": 2.1, "1 4": 2.2, "6 7": 0.5}
    drawn, unhealed = draws_of(chosen, lost)
    found, losses, moved = pairs.compared_draws(drawn, unhealed, margin=0.02)
    means = unhealed.groupby("layers")["nll"].mean()
    assert found["loss"].tolist() == pytest.approx(means[found["layers"]].tolist())
    of_pair = losses.set_index("pair")
    assert list(of_pair.index) == ["taylor, 1 windows", "taylor, 5 windows"]
    assert of_pair.loc["taylor, 1 windows", "difference"] == pytest.approx(1.6, abs=0.02)
    assert of_pair.loc["taylor, 1 windows", "runs"] == 3
    assert of_pair.loc["taylor, 5 windows", "difference"] == 0
    assert moved["difference"].tolist() == [2.0] and moved["n"].tolist() == [3]
    others = unhealed.assign(layers="8 9")
    with_more = pd.concat([unhealed, others])
    again, *_ = pairs.compared_draws(drawn, with_more, margin=0.02)
    assert again.equals(found), "a model that is no draw changes nothing"


def losses_of_sets(drawn: dict[str, list[float]]) -> pd.DataFrame:
    """Rows of a study, from the losses of some documents by set."""
    return pd.DataFrame(
        [
            {"layers": layers, "item": item, "nll": nll}
            for layers, losses in drawn.items()
            for item, nll in enumerate(losses)
        ]
    )


def test_sets_stand_beside_random_ones_and_reverse_order():
    sets = pd.DataFrame(
        {
            "rule": ["taylor", "reverse order", "alternate", "random 0", "random 1"],
            "layers": ["1 2", "4 5", "1 3", "0 2", "2 5"],
        }
    )
    drawn = {
        "": [2.0, 3.0, 4.0],
        "1 2": [3.0, 4.5, 5.0],
        "4 5": [5.0, 6.0, 7.5],
        "1 3": [9.0, 9.0, 9.0],
        "0 2": [6.0, 6.0, 8.0],
        "2 5": [7.0, 8.0, 8.0],
    }
    levels, compared = pairs.compared_sets(
        sets, losses_of_sets(drawn), rules=["taylor", "reverse order"]
    )
    means = {layers: np.mean(losses) for layers, losses in drawn.items()}
    at_random = (means["0 2"] + means["2 5"]) / 2
    assert dict(zip(levels["rule"], levels["value"], strict=True)) == pytest.approx(
        {"taylor": means["1 2"], "reverse order": means["4 5"], "random": at_random}
    )
    assert levels.set_index("rule")["runs"].to_dict() == {
        "taylor": 1,
        "reverse order": 1,
        "random": 2,
    }
    found = compared.set_index(["rule", "against"])
    assert found["difference"].to_dict() == pytest.approx(
        {
            ("taylor", "random"): means["1 2"] - at_random,
            ("reverse order", "random"): means["4 5"] - at_random,
            ("reverse order", "taylor"): means["4 5"] - means["1 2"],
        }
    )
    assert found["runs"].tolist() == [2, 2, 1]
    margin = (means["1 2"] - means[""]) / 4
    assert found["margin"].tolist() == pytest.approx([margin] * 3)
    last = found.loc["reverse order", "taylor"]
    student = stats.ttest_rel(drawn["4 5"], drawn["1 2"])
    assert (last["low"], last["high"]) == pytest.approx(tuple(student.confidence_interval()))
    # One family: the smallest of its p-values is multiplied by the number of its pairs.
    assert found["p_holm"].min() == pytest.approx(3 * found["p"].min())


def test_sets_of_two_numbers_of_layers_are_refused():
    sets = pd.DataFrame({"rule": ["taylor", "taylor"], "layers": ["1", "1 2"]})
    with pytest.raises(ValueError, match="one number of layers, but taylor has two"):
        pairs.compared_sets(sets, losses_of_sets({"": [2.0, 3.0]}), rules=["taylor"])
