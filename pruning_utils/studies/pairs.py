"""Pairs of sets of layers, measured on the same questions and documents (06, 09 and 11)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pruning_utils import evidence
from pruning_utils.studies import depth
from pruning_utils.studies.recipes import layer_numbers

ACCURACY = "accuracy"
PROTECTED = ("magnitude", "taylor")  # criteria whose ends the "+" rule of arXiv:2402.02834 protects


def per_item(
    rows: pd.DataFrame, column: str, datasets: Sequence[str], by: Sequence[str]
) -> tuple[pd.DataFrame, pd.Index]:
    """Values of a measure, item by item.

    Args:
        rows: Columns ``dataset``, ``item``, ``column`` and those of ``by``.
        column: What is measured.
        datasets: The tasks or texts that count.
        by: What tells models apart.

    Returns:
        A row for each item and a column for each model, and the stratum of each row: its task or
        text.
    """
    wide = rows[rows["dataset"].isin(datasets)].pivot(
        index=["dataset", "item"], columns=list(by), values=column
    )
    return wide.sort_index(axis=1), wide.index.get_level_values("dataset")


@dataclass(frozen=True)
class MeasuredSets:
    """Models without sets of layers, before and after healing.

    Attributes:
        wide: By measure and stage the values, as :func:`per_item` gives them, a column for each set
            (as a text, "" for none) and seed.
        strata: By measure the stratum of each item.
        levels: By measure, stage and set the mean with its interval.
    """

    wide: Mapping[tuple[str, str], pd.DataFrame]
    strata: Mapping[str, pd.Index]
    levels: Mapping[tuple[str, str, str], evidence.FactorInterval]

    @classmethod
    def of(
        cls,
        measured: Mapping[str, tuple[pd.DataFrame, Sequence[str], str]],
        stages: Mapping[str, str],
    ) -> MeasuredSets:
        """From rows of studies.

        Args:
            measured: By measure its rows, with ``layers``, ``recipe`` and ``seed``, the tasks or
                texts that count, and the column.
            stages: The recipe of each stage; "" for none.
        """
        wide, strata, levels = {}, {}, {}
        for measure, (rows, datasets, column) in measured.items():
            for stage, recipe in stages.items():
                part = rows[rows["recipe"] == recipe]
                found, strata[measure] = per_item(part, column, datasets, ["layers", "seed"])
                wide[measure, stage] = found
                for layers in found.columns.unique("layers"):
                    levels[measure, stage, layers] = evidence.two_factor_interval(
                        found[layers], strata=strata[measure]
                    )
        return cls(wide, strata, levels)

    @property
    def unpruned(self) -> dict[str, evidence.FactorInterval]:
        """By measure the mean of the model that lacks no layer."""
        return {measure: self.levels[measure, "unhealed", ""] for measure in self.strata}

    def sizes(self) -> str:
        """How many questions and documents each measure has, in words."""
        return ", ".join(
            f"{level.n:,} {'questions' if measure == ACCURACY else 'documents'} ({measure})"
            for measure, level in self.unpruned.items()
        )


def importance_pairs(of_rule: pd.Series, depths: Sequence[int]) -> dict[str, tuple[str, str]]:
    """The pairs of sets that claims B1 and B5 compare, the first minus the second.

    Args:
        of_rule: The sets, by rule and number of layers, as :func:`sets.removed_sets` chooses them.
        depths: Numbers of layers; the first is that of B1. B5 takes the first at which protected
            ends change the set.
    """
    pairs = {"B1": (of_rule["taylor+", depths[0]], of_rule["perplexity", depths[0]])}
    for criterion in PROTECTED:
        for n in depths:
            plain, protected = of_rule[criterion, n], of_rule[f"{criterion}+", n]
            if plain != protected:
                pairs[f"B5 {criterion} at {n}"] = (protected, plain)
                break
    return pairs


def compared_pairs(pairs: Mapping[str, tuple[str, str]], sets: MeasuredSets) -> pd.DataFrame:
    """Whether the sets of each pair differ, in each measure and stage that has both.

    The pairs of one claim are one family. The effect that a margin is a quarter of is what the set
    that changes less changes without healing, and at least :data:`depth.SMALLEST_EFFECT`.

    Returns:
        The rows of :func:`evidence.paired_verdicts`, with ``measure``, ``stage``, ``left`` and
        ``right``.
    """
    found = []
    for claim in dict.fromkeys(name.split()[0] for name in pairs):
        differences, sides, effects, strata = {}, [], {}, {}
        for (measure, stage), wide in sets.wide.items():
            for name, (left, right) in pairs.items():
                if name.split()[0] == claim and {left, right} <= {*wide.columns.unique("layers")}:
                    pair = f"{name}{'' if name == claim else ','} {measure}, {stage}"
                    differences[pair] = (wide[left] - wide[right]).dropna(axis=1).to_numpy()
                    changed = [sets.levels[measure, "unhealed", layers] for layers in (left, right)]
                    values = np.subtract([one.value for one in changed], sets.unpruned[measure][0])
                    effects[pair] = max(np.abs(values).min(), depth.SMALLEST_EFFECT)
                    strata[pair] = sets.strata[measure]
                    sides.append({"measure": measure, "stage": stage, "left": left, "right": right})
        if differences:
            verdicts = evidence.paired_verdicts(differences, effect=effects, strata=strata)
            found.append(verdicts.join(pd.DataFrame(sides)))
    return pd.concat(found, ignore_index=True)


def drawn_pairs(
    verdicts: pd.DataFrame,
    sets: MeasuredSets,
    drawn: Mapping[str, str],
    *,
    label: str,
    n_tasks: int,
) -> dict[str, pd.DataFrame]:
    """What :func:`importance_plots.levels_and_differences` draws of pairs.

    Args:
        verdicts: Rows of :func:`compared_pairs`.
        sets: What was measured.
        drawn: The sets whose levels are drawn, by rule.
        label: Of the horizontal axis of levels.
        n_tasks: Number of tasks that the accuracy is pooled over.

    Returns:
        Its ``levels``, ``differences`` and ``baselines``.
    """
    levels = [
        {"panel": measure, "measure": measure.split()[0], "series": rule, "choice": stage}
        | {"label": label, "joined": False}
        | sets.levels[measure, stage, layers]._asdict()
        for measure, stage in sets.wide
        for rule, layers in drawn.items()
    ]
    lines: list[dict[str, Any]] = [
        {"panel": measure, "name": "unpruned", "value": level.value}
        for measure, level in sets.unpruned.items()
    ]
    if ACCURACY in sets.strata:
        lines.append({"panel": ACCURACY, "name": "floor", "value": 0})
    kind = verdicts["measure"].str.split().str[0]
    which = verdicts["pair"].str.extract(r"^B5 (\w+) at (\d+)")
    titles = "protected ends minus none, " + which[0].replace("taylor", "Taylor") + ", " + which[1]
    titles = titles + " layers: " + kind + " (B5)"
    titles = titles.fillna("Taylor+ minus perplexity: " + kind + " (B1)")
    on = verdicts["measure"].str.removeprefix("loss on ").replace(ACCURACY, f"{n_tasks} tasks")
    differences = verdicts.assign(measure=kind, panel=titles, pair=on + ", " + verdicts["stage"])
    return {
        "levels": pd.DataFrame(levels),
        "differences": differences,
        "baselines": pd.DataFrame(lines),
    }


def judged_pairs(
    verdicts: pd.DataFrame,
    sets: MeasuredSets,
    *,
    size: depth.Size,
    n_tasks: int,
    trained: Mapping[str, Any],
    **given: Any,
) -> list[dict]:
    """A row of ``verdicts.csv`` for each pair.

    Args:
        verdicts: Rows of :func:`compared_pairs`.
        sets: What was measured.
        size: Of the model.
        n_tasks: Number of tasks that the accuracy is pooled over.
        trained: Of healed models, for :func:`evidence.judge`: ``recipe``, ``tokens_per_parameter``
            and ``paper_tokens_per_parameter``.
        given: ``model``, ``notebook`` and ``cell``.
    """
    rows = []
    for row in verdicts.to_dict("records"):
        criterion = row["pair"].split()[1] if row["pair"].startswith("B5") else ""
        is_loss, is_healed = row["measure"] != ACCURACY, row["stage"] == "healed"
        part = f"Taylor+ {'has a higher loss' if is_loss else 'answers better'} than perplexity"
        if criterion:
            part = f"protected ends lower the loss, {criterion.replace('taylor', 'Taylor')}"
        both = [sets.levels[row["measure"], row["stage"], row[side]] for side in ("left", "right")]
        rows.append(
            evidence.judge(
                row["pair"][:2],
                f"{part}, {row['stage']}",
                row,
                claimed="below 0" if criterion else "above 0",
                measure="loss" if is_loss else "pooled accuracy",
                data=row["measure"].removeprefix("loss on ") if is_loss else f"{n_tasks} tasks",
                depth=f"{len(layer_numbers(row['left']))} of {size.n_layers} layers",
                unpruned=sets.unpruned[row["measure"]],
                levels=both,
                floor=float(np.log(size.vocabulary)) if is_loss else 0.0,
                higher_is_better=not is_loss,
                **(trained if is_healed else {"recipe": "unhealed"}),
                **given,
            )
        )
    return rows


def compared_draws(
    drawn: pd.DataFrame, unhealed: pd.DataFrame, *, margin: float
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Whether sets that few windows of text lead to differ from those of the most windows.

    Args:
        drawn: Of :func:`sets.sample_sets`.
        unhealed: Rows of a study of these sets on one text: ``layers``, ``item`` and ``nll``.
        margin: Of equal losses, in nats.

    Returns:
        The sets with their mean ``loss``; the verdicts on the losses of each number of windows
        minus those of the most; and those on the layers in which sets of the fewest windows differ
        from sets of the most, minus those in which the latter differ among themselves. In these
        the margin is half a layer. Draws of text are the runs.
    """
    rows, _ = per_item(
        drawn.merge(unhealed, on="layers", suffixes=("", "_")),
        "nll",
        unhealed["dataset"].unique(),
        ["criterion", "n_samples", "seed"],
    )
    criteria = drawn["criterion"].unique()
    *fewer, most = sorted(drawn["n_samples"].unique())
    losses = evidence.paired_verdicts(
        {
            f"{criterion}, {count} windows": (
                rows[criterion, count] - rows[criterion, most]
            ).to_numpy()
            for criterion, count in itertools.product(criteria, fewer)
        },
        margin=margin,
    )
    changed = drawn.pivot(index="seed", columns=["criterion", "n_samples"], values="changed")
    moved = evidence.paired_verdicts(
        {
            criterion: (changed[criterion, fewer[0]] - changed[criterion, most]).to_numpy()
            for criterion in criteria
        },
        margin=0.5,
    )
    by_draw = drawn[["criterion", "n_samples", "seed"]].apply(tuple, axis=1)
    return drawn.assign(loss=by_draw.map(rows.mean())), losses, moved


def compared_sets(
    sets: pd.DataFrame, unhealed: pd.DataFrame, *, rules: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Losses of the sets that rules lead to, beside random sets and beside reverse order.

    Args:
        sets: Of :func:`sets.metric_sets`, of one number of layers: ``rule`` and ``layers``.
        unhealed: Rows of a study of these sets and of the whole model (``layers`` is "") on one
            text: ``layers``, ``item`` and ``nll``.
        rules: Those that are compared, reverse order among them.

    Returns:
        Levels, a row for each rule and for ``random``, with the fields of
        :class:`evidence.FactorInterval`; and the verdicts, all in one family, with ``rule`` and
        what it is ``against``: each rule minus ``random``, and reverse order minus each other rule.
        The random sets are runs. The margin is a quarter of the smallest change that one of these
        rules, or the random sets, bring.

    Raises:
        ValueError: If a rule has several sets, as with several numbers of layers.
    """
    repeated = sets.loc[sets["rule"].duplicated(), "rule"]
    if len(repeated):
        raise ValueError(f"sets must be of one number of layers, but {repeated.iloc[0]} has two")
    losses = unhealed.pivot(index="item", columns="layers", values="nll")
    is_random = sets["rule"].str.startswith("random")
    at_random = losses[sets.loc[is_random, "layers"]]
    layers_of = sets[~is_random].set_index("rule")["layers"]
    measured = {rule: losses[[layers_of[rule]]] for rule in rules} | {"random": at_random}
    levels = pd.DataFrame([evidence.two_factor_interval(values) for values in measured.values()])
    change = (levels["value"] - losses[""].mean()).abs().min()
    last = "reverse order"
    compared = [(rule, "random") for rule in rules]
    compared += [(last, rule) for rule in rules if rule != last]
    found = evidence.paired_verdicts(
        {
            f"{rule} - {other}": measured[rule].to_numpy() - measured[other].to_numpy()
            for rule, other in compared
        },
        effect=max(float(change), depth.SMALLEST_EFFECT),
    )
    names = pd.DataFrame(compared, columns=["rule", "against"])
    return levels.assign(rule=list(measured)), pd.concat([names, found], axis=1)
