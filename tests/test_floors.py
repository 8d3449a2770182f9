"""Accuracy above its floor: what counts as right, what a floor is, and the mean over tasks."""

import pandas as pd
import pytest

from pruning_utils import evaluation
from pruning_utils.studies import depth


def test_right_is_what_the_published_score_of_a_task_counts():
    table = pd.DataFrame(
        {
            "dataset": ["piqa", "piqa", "winogrande", "boolq"],
            "correct": [1, 0, 1, 0],
            "correct_norm": [0, 1, 0, 1],
        }
    )
    assert depth.right_answers(table).tolist() == [0, 1, 1, 0]


def test_names_of_tasks_agree():
    assert set(evaluation.BY_CHARACTER) < set(evaluation.TASKS)
    assert set(evaluation.GUESSES) < set(evaluation.TASKS)


def test_scores_by_character_are_lm_evals_and_a_guess_is_one_over_the_number_of_choices():
    loaded = evaluation.load_tasks(list(evaluation.GUESSES), limit=57)
    by_character = {
        name
        for name, found in loaded.items()
        if all("acc_norm" in task.aggregation() for task in found["tasks"].values())
    }
    assert by_character == set(evaluation.BY_CHARACTER) & set(evaluation.GUESSES)
    for name, guess in evaluation.GUESSES.items():
        choices = [
            len(task.doc_to_choice(question))
            for task in loaded[name]["tasks"].values()
            for question in task.eval_docs
        ]
        assert pd.Series(choices).mode().tolist() == [round(1 / guess)], name


def test_a_floor_is_what_answers_alone_score_but_no_less_than_a_guess():
    alone = pd.DataFrame(
        {
            "dataset": ["piqa"] * 4 + ["openbookqa"] * 5,
            "correct": [0] * 9,
            "correct_norm": [1, 1, 1, 0] + [1, 0, 0, 0, 0],
        }
    )
    floors = depth.task_floors(alone, ["piqa", "openbookqa", "winogrande"])
    assert floors == {"piqa": 0.75, "openbookqa": 0.25, "winogrande": 0.5}


def test_pooled_curves_weigh_tasks_alike():
    def rows(rule, dataset, right):
        return [
            {"rule": rule, "dataset": dataset, "item": item, "right": value}
            for item, value in enumerate(right)
        ]

    table = pd.DataFrame(
        rows("a", "piqa", [1, 1, 1, 0])
        + rows("a", "winogrande", [1, 0])
        + rows("b", "piqa", [0, 0, 0, 1])
        + rows("b", "winogrande", [1, 1])
    )
    found = depth.pooled_curves(table, {"piqa": 0.5, "winogrande": 0.25}, ["rule"])
    assert found["rule"].tolist() == ["a", "b"] and found["n"].tolist() == [6, 6]
    # a: (3/4 - 1/2 + 1/2 - 1/4) / 2; b: (1/4 - 1/2 + 1 - 1/4) / 2.
    assert found["value"].tolist() == pytest.approx([0.25, 0.25])
    assert (found["low"] < found["value"]).all() and (found["value"] < found["high"]).all()


def questions_of(models: dict[tuple[str, int], dict[str, list[int]]]) -> pd.DataFrame:
    """Whether questions are answered rightly, by model and task, in an order that is no one's."""
    rows = [
        {"rule": rule, "n_dropped": n, "dataset": task, "item": item, "right": right}
        for (rule, n), tasks in models.items()
        for task, answers in tasks.items()
        for item, right in enumerate(answers)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_checks_of_pooled_accuracy_give_each_task_one_weight():
    """Task a has four questions, b has two; a quarter of each fall is the margin."""
    asked = questions_of(
        {
            ("none", 0): {"a": [1, 1, 1, 0], "b": [1, 1]},
            ("deepest", 2): {"a": [1, 0, 0, 0], "b": [0, 1]},
            ("similarity", 2): {"a": [1, 1, 0, 0], "b": [1, 1]},
        }
    )
    floors = {"a": 0.25, "b": 0.5}
    levels = depth.pooled_levels(asked, floors)
    assert {model: found.value for model, found in levels.items()} == {
        ("none", 0): 0.5,
        ("deepest", 2): 0.0,
        ("similarity", 2): 0.375,
    }
    compared = {
        "deepest": (("deepest", 2), ("none", 0)),
        "rules": (("similarity", 2), ("deepest", 2)),
    }
    checks = depth.pooled_checks(asked, floors, compared, effect=0.5).set_index("pair")
    assert checks["difference"].to_dict() == {"deepest": -0.5, "rules": 0.375}
    assert checks["first"].to_dict() == {"deepest": 0.0, "rules": 0.375}
    assert checks["second"].to_dict() == {"deepest": 0.5, "rules": 0.0}
    assert (checks["margin"] == 0.125).all() and (checks["n"] == 6).all()
    none = depth.pooled_checks(asked, floors, compared, effect=0.0)
    assert (none["margin"] == 2.5e-5).all()
    assert (none["verdict"] != "equal").all(), "nothing counts as equal where nothing falls"
