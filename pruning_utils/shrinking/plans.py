"""A plan for a smaller model: how many layers go, which, and what is left."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pruning_utils import (
    efficiency,
    evaluation,
    evidence,
    importance,
    models,
    selection,
    similarity,
)
from pruning_utils.engine import passes
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import number, whole_number
from pruning_utils.engine.later import nn, torch
from pruning_utils.shrinking.orders import CHEAP_RULES, LOWEST_LOSS, RULES, Goal
from pruning_utils.studies.study import without_layers

# Tokens of the probe for the time of a generated token.
PROBED = {"batch_size": 1, "prompt_tokens": 16, "new_tokens": 12}
REPEATS = 3  # runs of the probe where no limit asks for more
PER_TOKEN = "per_token_seconds"


def check_goal(goal: Goal) -> None:
    """ValueError if nothing is asked for, or a number is out of range."""
    if all(value is None for value in vars(goal).values()):
        raise ValueError(f"a goal must be given, one or more of {', '.join(vars(goal))}")
    if goal.keep is not None:
        number("keep", goal.keep, "in (0, 1)", lambda share: 0 < share < 1)
    for name in ("max_parameters", "max_bytes"):
        if getattr(goal, name) is not None:
            whole_number(name, getattr(goal, name), 1, 10**18)
    if goal.max_ms_per_token is not None:
        number(
            "max_ms_per_token",
            goal.max_ms_per_token,
            "a finite number above 0",
            lambda time: 0 < time < math.inf,
        )


class Candidate(NamedTuple):
    """Layers that could go.

    Attributes:
        rule: What chose them.
        layers: 0-based numbers, ascending.
        losses: Of each window without them, unhealed, in nats per token.
    """

    rule: str
    layers: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return float(np.mean(self.losses))


class Choice(NamedTuple):
    """What :func:`choose` finds.

    Attributes:
        chosen: The set of the rule.
        runner_up: Of all other sets that with the lowest loss; None where there is no other.
        whole: The whole model, of which nothing goes.
    """

    chosen: Candidate
    runner_up: Candidate | None
    whole: Candidate


class TokenTimes(NamedTuple):
    """Milliseconds of a generated token, as a line over the number of layers.

    Attributes:
        fixed: What does not depend on the layers.
        per_layer: What each layer adds.
    """

    fixed: float
    per_layer: float

    def at(self, n_layers: int) -> float:
        """Milliseconds with so many layers."""
        return self.fixed + self.per_layer * n_layers


class TokenRuns(NamedTuple):
    """Seconds of a generated token, measured with all layers and with about half of them.

    Attributes:
        n_layers: All layers.
        n_left: The layers of the shorter model.
        whole: Of the whole model, a number a run.
        shorter: Of the shorter one.
    """

    n_layers: int
    n_left: int
    whole: np.ndarray
    shorter: np.ndarray

    def line(self, *, at_most: bool = False) -> TokenTimes:
        """The line through both.

        Args:
            at_most: Whether the upper end of the 95 % interval of the mean counts, which is what a
                limit of time is judged by; else the fastest run counts.
        """
        whole, shorter = (
            1000 * float(evidence.mean_interval(seconds).high if at_most else seconds.min())
            for seconds in (self.whole, self.shorter)
        )
        # It may have been slower with half of its layers: then one costs nothing that can be seen.
        per_layer = max(0.0, (whole - shorter) / (self.n_layers - self.n_left))
        return TokenTimes(whole - per_layer * self.n_layers, per_layer)


def token_runs(model: nn.Module, *, repeats: int = REPEATS) -> TokenRuns:
    """Times of a generated token here, from the model with all its layers and with half of them.

    Args:
        model: A causal language model in evaluation mode, with at least two layers.
        repeats: Measured runs of each.
    """
    n_layers = len(models.decoder_layers(model))
    if n_layers < 2:
        raise ValueError(f"the model must have at least 2 layers, it has {n_layers}")
    left, shorter = _about_half(model, n_layers)
    whole, part = (
        efficiency.generation_speed(shown, **PROBED, repeats=repeats)[PER_TOKEN].to_numpy()
        for shown in (model, shorter)
    )
    return TokenRuns(n_layers, left, whole, part)


def _about_half(model: nn.Module, n_layers: int) -> tuple[int, nn.Module]:
    """The number of layers next to half of them that the last ones can leave, and what is left.

    Some architectures allow few numbers: layers that share keys and values go together.

    Raises:
        ValueError: If no number of last layers can go.
    """
    refused = None
    for left in sorted(range(1, n_layers), key=lambda left: abs(left - n_layers // 2)):
        try:
            return left, without_layers(model, range(left, n_layers))
        except ValueError as error:
            refused = refused or error
    raise ValueError(f"no number of last layers can go: {refused}") from refused


def layers_to_go(model: nn.Module, goal: Goal, times: TokenTimes | None = None) -> int:
    """Fewest layers that must go for a goal, whichever they are.

    Args:
        model: A causal language model.
        goal: What the rest must meet.
        times: A line of :func:`token_runs`; needed where the goal has a time.

    Returns:
        From 1 to all layers but one.

    Raises:
        ValueError: If the model meets the goal as it is, or no number of layers does: the message
            names the nearest that can be had; or if the goal has a time and ``times`` is None.
    """
    check_goal(goal)
    if goal.max_ms_per_token is not None and times is None:
        raise ValueError(
            "times, of token_runs, must be given where the goal has a time, max_ms_per_token "
            f"{goal.max_ms_per_token:g}"
        )
    n_layers = len(models.decoder_layers(model))
    needed = {name: 0 for name, value in vars(goal).items() if value is not None}
    if goal.keep is not None:
        if goal.keep < 0.5 / n_layers:
            raise ValueError(f"keep must leave one of {n_layers} layers, got {goal.keep:g}")
        needed["keep"] = selection.count_for_fraction(n_layers, 1 - goal.keep)
    for name, sizes in _sizes_left(model, times).items():
        limit = getattr(goal, name)
        if limit is not None:
            needed[name] = _fewest(name, limit, sizes)
    n_dropped = max(needed.values())
    if not n_dropped:
        raise ValueError(f"no layer has to go: {_said(goal)} is met by the model as it is")
    return n_dropped


def _sizes_left(model: nn.Module, times: TokenTimes | None) -> dict[str, list[float]]:
    """By name of a limit, what is left without 0, 1, ... layers, at most."""
    layers = models.decoder_layers(model)
    whole = efficiency.stored_parameters(model)
    of_layers = {
        "max_parameters": [models.n_parameters(layer) for layer in layers],
        "max_bytes": [efficiency.weight_bytes(layer) for layer in layers],
    }
    found: dict[str, list[float]] = {}
    for name, total in (("max_parameters", whole["total"]), ("max_bytes", whole["bytes"])):
        # The smallest ones first: then it is met whichever layers go.
        gone = np.cumsum([0, *sorted(of_layers[name])])[:-1]
        found[name] = [total - int(size) for size in gone]
    if times is not None:
        found["max_ms_per_token"] = [
            times.at(len(layers) - n_dropped) for n_dropped in range(len(layers))
        ]
    return found


def _fewest(name: str, limit: float, sizes: Sequence[float]) -> int:
    """How many layers must go until a size is at most its limit."""
    for n_dropped, size in enumerate(sizes):
        if size <= limit:
            return n_dropped
    raise ValueError(
        f"{name} must be at least {rounded_up(sizes[-1])}, which one layer of {len(sizes)} "
        f"leaves, got {limit:,}"
    )


def rounded_up(size: float) -> str:
    """A size as a limit that it meets: whole numbers as they are, times to a thousandth above."""
    if isinstance(size, int):
        return f"{size:,}"
    return f"{math.ceil(1000 * size) / 1000:,.3f}".rstrip("0").rstrip(".")


def _said(goal: Goal) -> str:
    given = {name: value for name, value in vars(goal).items() if value is not None}
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:g}"
        for name, value in given.items()
    )


def candidates(
    model: nn.Module, windows: torch.Tensor, n_dropped: int, *, rules: Sequence[str] = CHEAP_RULES
) -> list[Candidate]:
    """Sets of layers by several rules, with the losses of the model without each.

    Args:
        model: A causal language model in evaluation mode.
        windows: Token ids ``(N, T)`` that the sets are chosen and measured on.
        n_dropped: Layers in a set.
        rules: Among :data:`orders.RULES`, without the first.

    Returns:
        First the whole model, of the rule ``none``; then one for each set, by loss. Where two rules
        choose one set, it bears the first one's name. Sets that this architecture cannot lose are
        left out, with a line on stderr.

    Raises:
        ValueError: If a rule is another one, or the model can lose none of the sets.
    """
    known = [rule for rule in RULES if rule != LOWEST_LOSS]
    unknown = [rule for rule in rules if rule not in known]
    if unknown or not rules:
        raise ValueError(f"rules must be among {', '.join(known)}, got {list(rules)!r}")
    chosen: dict[tuple[int, ...], str] = {(): "none"}
    shorter: dict[tuple[int, ...], nn.Module] = {(): model}
    refused: list[str] = []
    for rule, layers in _sets(model, windows, n_dropped, rules).items():
        if layers in chosen:
            continue
        try:
            shorter[layers] = without_layers(model, layers)
            chosen[layers] = rule
        except ValueError as error:
            refused.append(f"the layers of {rule!r} cannot go: {error!s:.200}")
            tqdm.write(refused[-1], file=sys.stderr)
    if not any(chosen):
        raise ValueError(refused[0])
    # The layers in front of a cut run once for all sets.
    n_layers = len(models.decoder_layers(model))
    starts = {layers: min(layers, default=n_layers) for layers in chosen}
    shared = passes.SharedLayers([start for start in starts.values() if start < n_layers])
    found = []
    for layers, rule in chosen.items():
        left = shorter[layers]
        with shared.used_by(left, starts[layers]):
            losses = evaluation.token_losses(left, windows).mean(1).tolist()
        found.append(Candidate(rule, layers, tuple(losses)))
    return [found[0], *sorted(found[1:], key=lambda candidate: candidate.loss)]


def _sets(
    model: nn.Module, windows: torch.Tensor, n_dropped: int, rules: Sequence[str]
) -> Mapping[str, tuple[int, ...]]:
    """By rule, the layers that it removes."""
    n_layers = len(models.decoder_layers(model))
    found = similarity.measure_similarity(model, windows)
    sets = {
        "closest block": selection.best_block(found.angular_distance, n_dropped).layers,
        "deepest but last": selection.deepest(n_layers, n_dropped),
        "reverse order": selection.deepest(n_layers, n_dropped, keep_last=0),
        "block influence": selection.least_important(found.block_influence, n_dropped),
    }
    if "perplexity" in rules:
        scores = importance.perplexity_without_layer(model, windows)
        sets["perplexity"] = selection.least_important(scores, n_dropped)
    return {rule: sets[rule] for rule in rules}


def choose(model: nn.Module, windows: torch.Tensor, n_dropped: int, rule: str) -> Choice:
    """The layers that go, beside those of the runner-up and the whole model.

    Args:
        model: As for :func:`candidates`, with ``windows`` and ``n_dropped``.
        windows: See above.
        n_dropped: See above.
        rule: Among :data:`orders.RULES`.

    Raises:
        ValueError: For another rule, or one whose layers cannot go.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    rules = [*CHEAP_RULES, rule] if rule == "perplexity" else list(CHEAP_RULES)
    # The asked rule's name comes first, so that its set bears it.
    rules.sort(key=lambda name: name != rule)
    whole, *ranked = candidates(model, windows, n_dropped, rules=rules)
    fitting = [one for one in ranked if rule in (LOWEST_LOSS, one.rule)]
    if not fitting:
        possible = ", ".join(one.rule for one in ranked)
        raise ValueError(f"rule must be one whose layers can go ({possible}), got {rule!r}")
    wanted = fitting[0]
    others = [one for one in ranked if one is not wanted]
    return Choice(wanted, others[0] if others else None, whole)
