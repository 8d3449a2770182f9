"""A model at many depths of pruning, unhealed and healed: the points of notebooks 02 to 05."""

from __future__ import annotations

from collections.abc import Sequence

from pruning_utils.studies.recipes import Cut, Point, Recipe, Stage

RULES = ("similarity", "deepest")  # that remove layers
NO_RULE = "none"  # of the whole model


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
