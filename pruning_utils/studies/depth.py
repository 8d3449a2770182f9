"""A model at many depths of pruning, unhealed and healed: points, floors and pooled curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pruning_utils import efficiency, embedded, evaluation, evidence, models, selection
from pruning_utils.studies.recipes import Cut, Point, Recipe, Stage
from pruning_utils.studies.study import loaded

RULES = ("similarity", "deepest")  # that remove layers
THREE_RULES = (*RULES, "reverse order")
RULE_NAMES = {
    "similarity": "closest block",
    "deepest": "deepest but last",
    "reverse order": "reverse order",
}
NO_RULE = "none"  # of the whole model
# Of pooled accuracy: where nothing falls, nothing counts as equal.
SMALLEST_EFFECT = 1e-4
SAME_LAYERS = "both rules remove the same layers"


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        n_layers: Decoder layers.
        n_parameters: Numbers that are stored; a shared head counts once.
        vocabulary: Entries of the head.
        n_kv_heads: Key-value heads of each layer; 0 where the configuration does not name them.
        layer_parameters: Numbers that a decoder layer stores, in the mean over layers.
    """

    n_layers: int
    n_parameters: int
    vocabulary: int
    n_kv_heads: int
    layer_parameters: int


# Of the embedded models, so that tables are read where a model is not installed.
SIZES = {
    "smollm2-135m": Size(30, 134_515_008, 49_152, 3, 3_540_096),
    "gemma-3-270m": Size(18, 268_098_176, 262_144, 1, 5_573_632),
}


def size_of(model: str, revision: str | None, dtype: str) -> Size:
    """Size of a model; arguments as for :func:`models.load_model`."""
    name = "smollm2-135m" if model == embedded.EMBEDDED else model
    if name in SIZES:
        return SIZES[name]
    network, _ = loaded(model, revision, dtype)
    return Size(
        len(models.decoder_layers(network)),
        models.n_parameters(network),
        network.get_output_embeddings().out_features,
        getattr(models.text_config(network), "num_key_value_heads", None) or 0,
        efficiency.stored_parameters(network)["layers"] // len(models.decoder_layers(network)),
    )


def must_know(model: str, profile: str) -> bool:
    """Whether a check may ask that the unpruned model knows something.

    It may of the models that committed results are of, beyond the few questions of the smoke
    profile. Of any other model the verdicts say where nothing can be tested.
    """
    return model in SIZES and profile != "smoke"


def layers_in(share: float, n_layers: int) -> int:
    """The whole number of layers that is nearest to a share of them, at least 1.

    Args:
        share: In (0, 1). Halves are rounded up.
        n_layers: Of the model.

    Raises:
        ValueError: For another share, or one that would leave no layer.
    """
    if n_layers > 1 and 0 < share < 1 and round(share * n_layers, 9) < n_layers - 0.5:
        return max(1, selection.count_for_fraction(n_layers, share))
    raise ValueError(
        f"a share must lie in (0, 1) and leave one of {n_layers} layers, got {share!r}"
    )


def numbers_in(shares: Sequence[float], n_layers: int) -> list[int]:
    """The whole numbers of layers that are nearest to shares of them, each once, in their order.

    Of a model with few layers several shares are one number. Arguments as for :func:`layers_in`.
    """
    return list(dict.fromkeys(layers_in(share, n_layers) for share in shares))


def every(step: int, last: int) -> list[int]:
    """Numbers of layers along a curve: 0, ``step``, 2 ``step`` and so on, then ``last``."""
    return sorted({*range(0, last + 1, step), last})


def depth_points(
    depths: Sequence[int],
    healed_depths: Sequence[int],
    seed: int,
    *,
    rules: Sequence[str] = RULES,
    healing_seeds: Sequence[int] | None = None,
) -> list[dict]:
    """Points of a :class:`study.Study` at numbers of dropped layers.

    Args:
        depths: Numbers of layers that go, without healing.
        healed_depths: Those with healing, as the study's settings say.
        seed: Of the points without healing.
        rules: What chooses the layers: each of these at every depth above 0.
        healing_seeds: Seeds of healing, each at every healed depth; None: ``seed`` alone.

    Returns:
        Plain values of the points, unhealed ones first, by depth, rule and seed.
    """
    points = [Point(cut, Recipe(), seed) for n_dropped in depths for cut in _cuts(n_dropped, rules)]
    for n_dropped in healed_depths:
        for cut in _cuts(n_dropped, rules):
            for draw in [seed] if healing_seeds is None else healing_seeds:
                points.append(Point(cut, Recipe((Stage(),)), draw))
    return [point.text() for point in points]


def _cuts(n_dropped: int, rules: Sequence[str]) -> list[Cut]:
    """Of all rules, or the whole model where nothing goes."""
    return [Cut(rule=rule, n_dropped=n_dropped) for rule in (rules if n_dropped else [NO_RULE])]


def loss_curves(unhealed: pd.DataFrame, healed: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean losses along the depth of each rule, unhealed and healed, with 95 % intervals.

    Args:
        unhealed: Columns ``model``, ``rule``, ``n_dropped``, ``dataset``, ``item`` and ``value``, a
            document a row; the whole model has :data:`NO_RULE` and begins each curve.
        healed: The same with ``seed``, of healed models.
        value: Column of the losses.

    Returns:
        Columns ``model``, ``dataset``, ``series``, ``n_dropped``, ``value``, ``low`` and ``high``.
        A series is called as :data:`RULE_NAMES` says, with ``, healed`` behind it where it is.
        Intervals are over documents, and over seeds where there are several.
    """
    rows = []
    kinds = ["model", "dataset", "n_dropped"]
    whole = unhealed[unhealed["rule"] == NO_RULE].assign(seed=0)
    for table, ending in ((unhealed.assign(seed=0), ""), (healed, ", healed")):
        for rule in [name for name in RULE_NAMES if name in set(table["rule"])]:
            curve = pd.concat([whole, table[table["rule"] == rule]])
            curve = curve[curve["dataset"].isin(whole["dataset"])]
            for names, points in curve.groupby(kinds, sort=False):
                grid = points.pivot(index="item", columns="seed", values=value)
                found = evidence.two_factor_interval(grid)
                row = dict(zip(kinds, names, strict=True))
                row |= {"series": f"{RULE_NAMES[rule]}{ending}", "value": found.value}
                rows.append({**row, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def answer_curves(
    unhealed: pd.DataFrame,
    floors: pd.DataFrame,
    levels: Mapping[str, Mapping[tuple[str, str, int, bool], Sequence[float]]],
) -> pd.DataFrame:
    """Pooled accuracy above the floor along the depth of both rules, unhealed and healed.

    Args:
        unhealed: Columns ``model``, ``rule``, ``n_dropped``, ``dataset``, ``item`` and ``right``, a
            question a row; the whole model has :data:`NO_RULE` and begins each curve.
        floors: Of each task, a row, for each model, a column.
        levels: By model, what :func:`rule_levels` says of its healed models and of the whole one,
            as the measure ``pooled accuracy``. It may stand on more questions.

    Returns:
        Columns ``model``, ``series``, ``n_dropped``, ``value``, ``low`` and ``high``, 95 %, with
        series as in :func:`loss_curves`.
    """
    curves = []
    for model, rows in unhealed.groupby("model", sort=False):
        points = pooled_curves(rows, floors[model].to_dict(), ["rule", "n_dropped"])
        answered = [
            (rule, n_dropped, *level[:3])
            for (measure, rule, n_dropped, healed), level in levels[str(model)].items()
            if measure == "pooled accuracy" and (healed or rule == NO_RULE)
        ]
        mended = pd.DataFrame(answered, columns=["rule", "n_dropped", "value", "low", "high"])
        for rule in RULES:
            for found, ending in ((points, ""), (mended, ", healed")):
                of_rule = found[found["rule"].isin([NO_RULE, rule])]
                series = f"{RULE_NAMES[rule]}{ending}"
                curves.append(of_rule.assign(model=model, series=series))
    columns = ["model", "series", "n_dropped", "value", "low", "high"]
    return pd.concat(curves, ignore_index=True)[columns]


def slope_difference(means: np.ndarray, *, places: Sequence[float]) -> np.ndarray:
    """Largest slope between neighbours of one curve, minus that of another.

    Args:
        means: Curves along the last axis, the two of them along the one before.
        places: Of the means, ascending.
    """
    slopes = np.diff(means, axis=-1) / np.diff(np.asarray(places, dtype=float))
    largest = slopes.max(-1)
    return largest[..., 0] - largest[..., 1]


def share_recovered(means: np.ndarray) -> np.ndarray:
    """Share of what pruning costs that healing takes back; 1 is all of it.

    Args:
        means: Shape ``(..., 3)``: of the unpruned model, and of the pruned one before and after
            healing, in any one measure.

    Returns:
        Shape ``(...)``; NaN where pruning changes nothing.
    """
    whole, pruned, healed = np.moveaxis(np.asarray(means, dtype=float), -1, 0)
    cost = whole - pruned
    return np.divide(healed - pruned, cost, out=np.full(np.shape(cost), np.nan), where=cost != 0)


def answers_alone(
    point: dict, *, model: str, revision: str | None, dtype: str, limit: int | None
) -> list[dict]:
    """What a model answers without having been asked: the floor of a task.

    Args:
        point: ``task``, one of :data:`evaluation.TASKS` whose answers can stand alone.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        revision: See above.
        dtype: See above.
        limit: Questions, the same as those that are asked.

    Returns:
        Rows with ``dataset``, ``item``, ``correct`` and ``correct_norm``.
    """
    network, tokenizer = loaded(model, revision, dtype)
    found = evaluation.evaluate_tasks(
        network, tokenizer, [point["task"]], limit=limit, answers_only=True
    )
    named = found.questions.rename(columns={"task": "dataset", "question_id": "item"})
    return named[["dataset", "item", "correct", "correct_norm"]].to_dict("records")


def task_weights(tasks: pd.Index | pd.Series) -> np.ndarray:
    """Weights by which a mean over questions is the mean of the tasks' means.

    Args:
        tasks: The task of each question.

    Returns:
        One weight a question, 1 each where all tasks have equally many.
    """
    counts = pd.Series(tasks).groupby(tasks).transform("size").to_numpy()
    return len(counts) / (pd.Series(tasks).nunique() * counts)


def right_answers(table: pd.DataFrame) -> pd.Series:
    """Whether each question is answered rightly, as the published scores of its task count it.

    Args:
        table: Columns ``dataset``, ``correct`` and ``correct_norm``, a question a row.

    Returns:
        0 or 1: ``correct_norm`` where lm-eval's task has ``acc_norm``, else ``correct``.
    """
    by_character = table["dataset"].isin(evaluation.BY_CHARACTER)
    return table["correct_norm"].where(by_character, table["correct"])


def task_floors(alone: pd.DataFrame, asked: Sequence[str]) -> dict[str, float]:
    """Accuracy that asks for no knowledge of the question, by task.

    Args:
        alone: From :func:`answers_alone`, of all tasks whose answers can stand alone.
        asked: Names of the tasks.

    Returns:
        The larger one of a guess, one over the number of choices, and the accuracy of the answers
        alone, in [0, 1].

    Raises:
        ValueError: If the guess of a task is not in :data:`evaluation.GUESSES`.
    """
    unknown = [task for task in asked if task not in evaluation.GUESSES]
    if unknown:
        raise ValueError(
            f"tasks must have a known guess, as {', '.join(evaluation.GUESSES)} have, got "
            f"{unknown[0]!r}"
        )
    found = right_answers(alone).groupby(alone["dataset"]).mean()
    return {task: max(float(found.get(task, 0)), evaluation.GUESSES[task]) for task in asked}


def pooled_curves(
    questions: pd.DataFrame, floors: Mapping[str, float], by: Sequence[str]
) -> pd.DataFrame:
    """Pooled accuracy above the floor of groups of models.

    Args:
        questions: Columns ``by``, ``dataset``, ``item`` and ``right``, a question a row.
        floors: By task, from :func:`task_floors`.
        by: Columns that tell the models apart.

    Returns:
        A row a group: the columns ``by``, ``value``, ``low``, ``high`` (95 %, over questions) and
        ``n`` (questions).
    """
    rows = []
    for names, group in questions.groupby(list(by), sort=False):
        found = evidence.pooled_accuracy(group, floors, column="right")
        rows.append((*names, found.value, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


def pooled_levels(
    questions: pd.DataFrame, floors: Mapping[str, float]
) -> dict[tuple[str, int], evidence.FactorInterval]:
    """Pooled accuracy above the floor of each model of one sweep.

    Args:
        questions: Columns ``rule``, ``n_dropped``, ``dataset``, ``item`` and ``right``.
        floors: By task, from :func:`task_floors`.

    Returns:
        By rule and number of removed layers: 95 %, over questions.
    """
    return {
        (str(rule), int(n_dropped)): evidence.pooled_accuracy(rows, floors, column="right")
        for (rule, n_dropped), rows in questions.groupby(["rule", "n_dropped"])
    }


def pooled_checks(
    questions: pd.DataFrame,
    floors: Mapping[str, float],
    compared: Mapping[str, tuple[tuple[str, int], tuple[str, int]]],
    *,
    effect: float,
) -> pd.DataFrame:
    """Paired differences of pooled accuracy between models of one sweep.

    Args:
        questions: As for :func:`pooled_levels`.
        floors: By task.
        compared: By name of the pair, the rule and number of removed layers of both its sides.
        effect: What pruning itself changes, of which a quarter is the margin of equality. Less than
            :data:`SMALLEST_EFFECT` counts as that.

    Returns:
        As :func:`evidence.paired_verdicts`, with the levels ``first`` and ``second``. Each task has
        one weight, whatever its number of questions.
    """
    questions = questions.sort_values(["dataset", "item"])
    levels = pooled_levels(questions, floors)
    of_model = dict(list(questions.groupby(["rule", "n_dropped"])))
    pairs = {
        name: evidence.paired(
            of_model[first], of_model[second], on=["dataset", "item"], value="right"
        )
        for name, (first, second) in compared.items()
    }
    tasks = next(iter(of_model.values()))["dataset"].to_numpy()
    effect = max(abs(effect), SMALLEST_EFFECT)
    found = evidence.paired_verdicts(pairs, effect=effect, strata=dict.fromkeys(pairs, tasks))
    sides = [compared[name] for name in found["pair"]]
    found["first"] = [levels[first].value for first, _ in sides]
    found["second"] = [levels[second].value for _, second in sides]
    return found


def rule_levels(scores: pd.DataFrame) -> dict[tuple[str, str, int, bool], evidence.FactorInterval]:
    """Levels of the models of one sweep, in one measure or several.

    Args:
        scores: Columns ``measure``, ``rule``, ``n_dropped``, ``healed``, ``seed``, ``dataset``,
            ``item`` and ``value``, an item a row; each dataset of a measure has one weight.

    Returns:
        By measure, rule, number of removed layers and whether it is healed: 95 %, over items, and
        over seeds where there are several.
    """
    levels = {}
    kinds = ["measure", "rule", "n_dropped", "healed"]
    for (measure, rule, n_dropped, healed), rows in scores.groupby(kinds, sort=False):
        grid = rows.pivot(index=["dataset", "item"], columns="seed", values="value")
        level = evidence.two_factor_interval(grid, strata=grid.index.get_level_values("dataset"))
        levels[str(measure), str(rule), int(n_dropped), bool(healed)] = level
    return levels


def rule_checks(scores: pd.DataFrame, *, against: str = "similarity") -> pd.DataFrame:
    """Paired differences, deepest but last minus another rule, of the models of one sweep.

    Args:
        scores: As for :func:`rule_levels`, of one model, with ``start``, the first layer that goes.
            The whole model has :data:`NO_RULE`, 0 removed layers, and is not healed.
        against: The other rule.

    Returns:
        As :func:`evidence.paired_verdicts`, all pairs in one family, with ``measure``,
        ``n_dropped`` and ``healed``, the levels ``first`` (deepest but last), ``second`` and
        ``unpruned``, and ``alike``: whether both rules remove the same layers. A margin is a
        quarter of what removing the closest block changes at that number of layers, unhealed; less
        than :data:`SMALLEST_EFFECT` counts as that.
    """
    levels = rule_levels(scores)
    pairs, strata, effects, rows = {}, {}, {}, []
    kinds = ["measure", "n_dropped", "healed"]
    for (measure, n_dropped, healed), found in scores[scores["rule"] != NO_RULE].groupby(kinds):
        grid = found.pivot(index=["dataset", "item"], columns=["rule", "seed"], values="value")
        name = f"{measure}: {n_dropped} layers, {'healed' if healed else 'unhealed'}"
        pairs[name] = (grid["deepest"] - grid[against]).to_numpy()
        strata[name] = grid.index.get_level_values("dataset")
        unpruned = levels[measure, NO_RULE, 0, False].value
        change = levels[measure, "similarity", n_dropped, False].value - unpruned
        effects[name] = max(abs(change), SMALLEST_EFFECT)
        starts = found.groupby("rule")["start"].first()
        rows.append(
            {
                "measure": measure,
                "n_dropped": n_dropped,
                "healed": healed,
                "first": levels[measure, "deepest", n_dropped, healed].value,
                "second": levels[measure, against, n_dropped, healed].value,
                "unpruned": unpruned,
                "alike": starts["deepest"] == starts[against],
            }
        )
    tested = evidence.paired_verdicts(pairs, effect=effects, strata=strata)
    return pd.concat([pd.DataFrame(rows), tested], axis=1)


def healed_checks(scores: pd.DataFrame, *, effect: float) -> pd.DataFrame:
    """Paired differences of healed models of one depth: from the whole model, from themselves
    unhealed, and between both rules.

    Args:
        scores: As for :func:`rule_levels`, of one model, measure and number of removed layers, with
            both :data:`RULES`, unhealed and healed, and the whole model as :data:`NO_RULE`.
        effect: What pruning itself changes, of which a quarter is the margin of equality. Less than
            :data:`SMALLEST_EFFECT` counts as that.

    Returns:
        As :func:`evidence.paired_verdicts`, all pairs in one family, with the levels ``first`` and
        ``second``, in which every task counts alike too.
    """
    grid = scores.pivot(
        index=["dataset", "item"], columns=["rule", "healed", "seed"], values="value"
    ).sort_index(axis="columns")
    whole = grid[NO_RULE, False]
    sides = {}
    for rule in RULES:
        sides[f"{RULE_NAMES[rule]}, healed - unpruned"] = (grid[rule, True], whole)
        sides[f"{RULE_NAMES[rule]}, healed - unhealed"] = (grid[rule, True], grid[rule, False])
    sides["deepest but last - closest block, healed"] = (
        grid["deepest", True],
        grid["similarity", True],
    )
    # A model that was not healed has one column, and is subtracted from each of several seeds.
    pairs = {name: one.to_numpy() - other.to_numpy() for name, (one, other) in sides.items()}
    tasks = grid.index.get_level_values("dataset")
    effect = max(abs(effect), SMALLEST_EFFECT)
    found = evidence.paired_verdicts(pairs, effect=effect, strata=dict.fromkeys(pairs, tasks))
    for place, level in enumerate(("first", "second")):
        of_items = [sides[name][place].mean(axis="columns") for name in found["pair"]]
        found[level] = [float(items.groupby(tasks).mean().mean()) for items in of_items]
    return found


def unless_alike(row: Mapping, *, alike: bool) -> dict:
    """A row of :func:`evidence.judge`; not testable where both rules remove the same layers.

    Models without the same layers are one model, whose difference from itself says nothing.
    """
    if not alike:
        return dict(row)
    return {**row, "verdict": evidence.UNTESTABLE, "reason": SAME_LAYERS}
