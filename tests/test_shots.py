"""Numbers and orders of shots, on made answers."""

import numpy as np
import pandas as pd
import pytest

from pruning_utils.studies import shots

COUNTS = [(0, 0), (1, 0), (5, 0), (5, 1)]


def made_answers(effects: dict, *, n: int = 400) -> pd.DataFrame:
    """Two tasks whose answers gain with some numbers and orders of shots."""
    rng = np.random.default_rng(0)
    rows = []
    for task in ("first", "second"):
        known = rng.random(n)
        for count, order in COUNTS:
            right = known < 0.4 + effects.get((count, order), 0.0)
            rows += [
                {"dataset": task, "item": item, "num_fewshot": count, "shot_order": order}
                | {"above_floor": float(answer) - 0.25}
                for item, answer in enumerate(right)
            ]
    return pd.DataFrame(rows)


def test_questions_that_one_way_of_asking_lacks_are_left_out():
    asked = made_answers({})
    found = shots.answers_by_shots(asked.drop(asked.index[3]))
    assert found.shape == (799, len(COUNTS)) and ("first", 3) not in found.index


def test_levels_and_pairs_are_those_of_the_answers():
    answers = shots.answers_by_shots(made_answers({(5, 0): 0.1, (5, 1): 0.1}))
    found = shots.compared_shots(answers, COUNTS, series="unpruned", name="a model")
    panels = pd.DataFrame(found.levels).groupby("panel")["choice"].apply(list)
    assert panels.to_dict() == {"number of shots": [0, 1, 5], "order of 5 shots": [0, 1]}
    assert found.levels[0]["value"] == pytest.approx(answers[0, 0].mean())
    assert [*found.numbers] == ["a model: 1 - 0 shots", "a model: 5 - 0 shots"]
    assert [*found.orders] == ["a model: 5 shots, order 1 - 0"]
    change = found.numbers["a model: 5 - 0 shots"]
    assert change.tolist() == (answers[5, 0] - answers[0, 0]).tolist() and change.mean() > 0.05
    assert not found.orders["a model: 5 shots, order 1 - 0"].any()


def test_the_order_in_which_counts_are_listed_does_not_matter():
    answers = shots.answers_by_shots(made_answers({(5, 1): 0.1}))
    found = shots.compared_shots(answers, COUNTS[::-1], series="unpruned", name="a model")
    assert {*found.numbers} == {"a model: 1 - 0 shots", "a model: 5 - 0 shots"}
    assert [*found.orders] == ["a model: 5 shots, order 1 - 0"]


def test_what_is_drawn_has_a_floor_in_each_panel_and_names_without_signs():
    answers = shots.answers_by_shots(made_answers({}))
    found = shots.compared_shots(answers, COUNTS, series="unpruned", name="a model")
    of_tasks = answers.index.get_level_values(0)
    decided = shots.decided_shots(found.numbers, found.orders, margin=0.02, of_tasks=of_tasks)
    drawn = shots.drawn_shots(found.levels, decided)
    assert drawn["levels"]["value"].tolist() == [row["value"] for row in found.levels]
    panels = ["number of shots", "order of 5 shots"]
    assert drawn["baselines"]["panel"].tolist() == panels and not drawn["baselines"]["value"].any()
    assert "a model: 5 shots, order 1 minus 0" in drawn["differences"]["pair"].tolist()


def test_one_way_of_asking_cannot_be_compared():
    with pytest.raises(ValueError, match="two numbers or two orders"):
        shots.decided_shots({}, {}, margin=0.02, of_tasks=[])


def test_an_order_that_matters_is_told_from_one_that_does_not():
    for effect, expected in ((0.0, "equal"), (0.1, "differs")):
        answers = shots.answers_by_shots(made_answers({(5, 1): effect}))
        found = shots.compared_shots(answers, COUNTS, series="unpruned", name="a model")
        decided = shots.decided_shots(
            found.numbers, found.orders, margin=0.02, of_tasks=answers.index.get_level_values(0)
        )
        assert decided["pair"].tolist() == [*found.numbers, *found.orders]
        assert decided["verdict"].iloc[-1] == expected, decided
