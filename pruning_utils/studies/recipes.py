"""What a point of a study is made of: what is cut out of a model, and how it is trained afterwards.

Points are stored as plain values, so that tables and their records can hold them. Each class here
has ``text()``, which gives that form, and ``parse()``, which reads it back: the two are each
other's inverse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

ALWAYS = ("method", "learning_rate", "steps")  # what a stage says by position
SAID_ELSEWHERE = (*ALWAYS, "seed", "batch_size")  # so that no setting may repeat it
EXAMPLE = "'lora 0.003 72 rank=4'"
SHOTS = ("num_fewshot", "shot_order")
CUTS = ("layers", "width", "rule", "n_dropped", "per_round")
PARTS = (*CUTS, "recipe", "healed", "seed", "precision", *SHOTS)


@dataclass(frozen=True)
class Stage:
    """One training of :func:`healing.heal`.

    Attributes:
        settings: What this training says itself, by the names of :func:`healing.heal`; a study says
            the rest for all of its points.
    """

    settings: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Stage:
        """The stage of a text such as ``"last_layers 0.001 32 last_k=2 untie=false"``.

        Method, peak learning rate and steps stand first, then settings with values as in JSON. Rate
        and steps may both be left out, where they are chosen later.

        Raises:
            ValueError: If the text has another form, or names a setting twice or one that is said
                elsewhere.
        """
        method, *words = text.split() or [""]
        numbers = [word for word in words if "=" not in word]
        if not method or len(numbers) not in (0, 2) or words[: len(numbers)] != numbers:
            raise ValueError(f"a stage must be such as {EXAMPLE}, got {text!r}")
        settings: dict[str, object] = {"method": method}
        try:
            if numbers:
                settings |= {"learning_rate": float(numbers[0]), "steps": int(numbers[1])}
            further = [word.split("=", 1) for word in words[len(numbers) :]]
            own = [(name, json.loads(value)) for name, value in further]
        except ValueError as error:
            raise ValueError(f"a stage must be such as {EXAMPLE}, got {text!r}") from error
        for name, value in own:
            if name in settings or name in SAID_ELSEWHERE:
                raise ValueError(
                    f"a stage may name a setting once, and not {', '.join(SAID_ELSEWHERE)}, "
                    f"got {text!r}"
                )
            settings[name] = value
        return cls(settings)

    def text(self) -> str:
        """The stage as a text that :meth:`parse` reads."""
        words = [str(self.settings["method"])]
        if "steps" in self.settings:
            words += [_rate_text(self.settings["learning_rate"]), str(self.settings["steps"])]
        words += [
            f"{name}={_without_spaces(value)}"
            for name, value in self.settings.items()
            if name not in ALWAYS
        ]
        return " ".join(words)


def _without_spaces(value: object) -> str:
    """A value as JSON in one word, as a space ends a setting."""
    return json.dumps(value, separators=(",", ":")).replace(" ", "\\u0020")


def _rate_text(rate: Any) -> str:
    """A rate as short as it can be written without another rate being read back."""
    short = f"{rate:g}"
    return short if float(short) == rate else repr(float(rate))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained after the cut.

    Attributes:
        stages: Trainings that follow each other on fresh text; none for a model that stays as cut.
    """

    stages: tuple[Stage, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe of a text: stages joined by ``" + "``, ``""`` for no training.

        Raises:
            ValueError: As :meth:`Stage.parse` does.
        """
        return cls(tuple(Stage.parse(stage) for stage in text.split(" + ")) if text else ())

    def text(self) -> str:
        """The recipe as a text that :meth:`parse` reads."""
        return " + ".join(stage.text() for stage in self.stages)


def recipe_at(recipe: str, learning_rate: float, steps: int) -> str:
    """A recipe of one stage at a peak learning rate for a number of steps.

    Args:
        recipe: Its text without rate and steps, such as ``"last_layers last_k=2 untie=false"``, or
            with others, which are replaced.
        learning_rate: Peak rate.
        steps: Optimiser steps.

    Returns:
        Its text, such as ``"last_layers 0.001 32 last_k=2 untie=false"``.
    """
    stage = Stage.parse(recipe)
    return Stage({**stage.settings, "learning_rate": learning_rate, "steps": steps}).text()


def method_of(recipe: str) -> str:
    """The method of a recipe's first stage; "" where nothing is trained."""
    stages = Recipe.parse(recipe).stages
    return str(stages[0].settings["method"]) if stages else ""


def with_steps(recipe: str, steps: int) -> str:
    """A recipe of one stage for another number of steps, at its own rate."""
    stage = Stage.parse(recipe)
    return Stage({**stage.settings, "steps": steps}).text()


def lasting_steps(
    asked: Iterable[tuple[int, int]], measured: Mapping[int, float], *, least: int, most: int
) -> dict[int, int]:
    """Steps of one way of training that last as long as all steps of another.

    Args:
        asked: Layers removed, and the steps that are asked for there.
        measured: By layers removed, how many steps last as long.
        least: The fewest steps.
        most: The most steps, for which there is text.

    Returns:
        By layers removed, the steps that are asked for, or the measured ones, rounded, where the
        two are more than a tenth apart.
    """
    steps = {}
    for n_removed, count in asked:
        agrees = abs(measured[n_removed] / count - 1) < 0.1
        steps[n_removed] = count if agrees else min(most, max(least, round(measured[n_removed])))
    return steps


@dataclass(frozen=True)
class Cut:
    """What is taken out of a model.

    Attributes:
        layers: 0-based numbers of the layers that go, where they are given.
        width: Feed-forward channels and key-value heads that every layer keeps; () where layers
            stay as wide as they are, None in studies that narrow none.
        rule: What chooses the layers instead, of which ``n_dropped`` go.
        n_dropped: Number of layers that the rule takes.
        per_round: Layers that the rule takes at a time, with training in between; 0: all at once.
    """

    layers: tuple[int, ...] = ()
    width: tuple[int, ...] | None = None
    rule: str = ""
    n_dropped: int = 0
    per_round: int = 0

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Cut:
        """The cut of a point's plain values.

        They are ``layers`` such as ``"4 7 11"``, perhaps with a ``width`` such as ``"1297 2"``; or
        a ``rule`` with ``n_dropped``, and ``per_round`` where it chooses in rounds.

        Raises:
            ValueError: If a text holds anything but numbers, or layers go from a model that is
                narrowed too.
        """
        if "rule" in values:
            if "layers" in values:
                raise ValueError(
                    f"layers must not be given where a rule chooses them, got {values['layers']!r}"
                )
            if values.get("per_round", 1) < 1:
                raise ValueError(
                    f"per_round must divide n_dropped, got {values['per_round']} "
                    f"of {values['n_dropped']}"
                )
            return cls(
                rule=values["rule"],
                n_dropped=values["n_dropped"],
                per_round=values.get("per_round", 0),
            )
        layers, width = values["layers"], values.get("width", "")
        if not all(map(str.isdecimal, layers.split())):
            raise ValueError(f"layers must be numbers such as '4 7 11', got {layers!r}")
        numbers = width.split()
        if numbers and (layers or len(numbers) != 2 or not all(map(str.isdecimal, numbers))):
            raise ValueError(
                "width must be channels and key-value heads such as '1297 2', and only where no "
                f"layers go, got {width!r} with layers {layers!r}"
            )
        return cls(
            layers=tuple(map(int, layers.split())),
            width=tuple(map(int, numbers)) if "width" in values else None,
        )

    def text(self) -> dict[str, Any]:
        """The cut as plain values that :meth:`parse` reads."""
        if self.rule:
            rounds = {"per_round": self.per_round} if self.per_round else {}
            return {"rule": self.rule, "n_dropped": self.n_dropped, **rounds}
        given = {"layers": layer_text(self.layers)}
        return given if self.width is None else {**given, "width": layer_text(self.width)}


def layer_text(numbers: Iterable[int]) -> str:
    """Numbers as one text that a table can hold, such as ``"4 7 11"``."""
    return " ".join(map(str, numbers))


def unties_head(settings: Mapping[str, Any]) -> bool:
    """Whether a training gives a tied head weights of its own.

    Args:
        settings: Arguments of :func:`healing.heal`, ``method`` among them.
    """
    return settings["method"] == "last_layers" and settings.get("untie", True)


def layer_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a text such as ``"4 7 11"``."""
    return tuple(map(int, text.split()))


@dataclass(frozen=True)
class Point:
    """What a study measures at once: a model that is cut, trained, and perhaps stored in few bits.

    Attributes:
        cut: What is taken out of the model.
        recipe: How it is trained then.
        seed: Seed of the text to train on, of the adapters, and of the order of windows.
        precision: In which the weights that are measured were stored; "" for as they are.
        shots: ``num_fewshot`` and ``shot_order`` of questions, where they are not the study's.
    """

    cut: Cut
    recipe: Recipe
    seed: int
    precision: str = ""
    shots: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_only_cut(self) -> bool:
        """Whether the model keeps the loaded weights, neither trained nor rounded."""
        return not self.recipe.stages and not self.precision

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Point:
        """The point of plain values.

        They are those of a :class:`Cut`, ``seed``, and how the model is trained: a ``recipe`` as a
        text, or ``healed``, whether it is trained as the study says for all of its points, together
        with settings in which it is trained otherwise. ``precision`` and shots may follow.

        Raises:
            ValueError: If a value has another form, or a name is none of a point.
        """
        own = {name: value for name, value in values.items() if name not in PARTS}
        if own and not values.get("healed"):
            raise ValueError(f"a point has no {', '.join(own)}; it has {', '.join(PARTS)}")
        if "recipe" in values:
            recipe = Recipe.parse(values["recipe"])
        else:
            recipe = Recipe((Stage(own),) if values["healed"] else ())
        return cls(
            Cut.parse(values),
            recipe,
            values["seed"],
            values.get("precision", ""),
            {name: values[name] for name in SHOTS if name in values},
        )

    def text(self) -> dict[str, Any]:
        """The point as plain values that :meth:`parse` reads."""
        stored = {"precision": self.precision} if self.precision else {}
        if not self.cut.rule or self.cut.per_round:
            how: dict[str, Any] = {"recipe": self.recipe.text(), "seed": self.seed}
        else:
            how = {"healed": bool(self.recipe.stages), "seed": self.seed}
            for stage in self.recipe.stages:
                how |= stage.settings
        return {**self.cut.text(), **how, **stored, **self.shots}
