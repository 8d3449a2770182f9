"""Models of one size and two shapes: fewer layers, or narrower ones (notebook 07)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from pruning_utils import efficiency, models, surgery, width
from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import nn
from pruning_utils.studies.recipes import layer_numbers, layer_text
from pruning_utils.studies.study import narrowed


def shaped(network: nn.Module, layers: str, size: str) -> nn.Module:
    """The model without these layers or of this width, in place.

    Channels are chosen by magnitude: which they are makes no difference to any cost.

    Args:
        network: A causal language model.
        layers: 0-based numbers as a text, such as ``"4 7 11"``; "" for none.
        size: Channels and key-value heads that every layer keeps, such as ``"1297 2"``; "" for all.
    """
    if size:
        return narrowed(network, layer_numbers(size))
    return surgery.drop_layers(network, layer_numbers(layers)) if layers else network


def equal_shape(
    point: dict, *, model: str, revision: str | None, dtype: str, n_tokens: int
) -> dict:
    """The size of a model that lacks layers, or of a narrower one that is as large.

    Args:
        point: ``layers`` that go and, where it has ``n_kv_heads`` above 0, key-value heads that
            every layer keeps instead; the number of channels is then chosen to make it as large.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        n_tokens: Tokens of the text whose FLOPs are counted.

    Returns:
        ``width`` (as a :class:`recipes.Cut` takes it), ``parameters``, ``weights`` (bytes in
        ``dtype``), and ``flops`` of the text and of one token (``flops_token``).
    """
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    size = ""
    if point["n_kv_heads"]:
        layers = models.decoder_layers(network)
        gone = 0
        for number in layer_numbers(point["layers"]):
            gone += models.n_parameters(layers[number])
        total = efficiency.stored_parameters(network)["total"] - gone
        channels = width.width_of_equal_size(network, total, n_kv_heads=point["n_kv_heads"])
        size = layer_text((channels, point["n_kv_heads"]))
    network = shaped(network, point["layers"], size)
    found = efficiency.stored_parameters(network)
    return {
        "width": size,
        "parameters": found["total"],
        "weights": found["bytes"],
        "flops": efficiency.forward_flops(network, batch_size=1, n_tokens=n_tokens),
        "flops_token": efficiency.forward_flops(network, batch_size=1, n_tokens=1),
    }


# --- points of tables -----------------------------------------------------------------------------


def sized_points(removed: Mapping[int, str], shapes: Mapping[str, int]) -> list[dict]:
    """Points of :func:`equal_shape`: the unpruned model, and every shape of each size.

    Args:
        removed: The layers that go (a text of 0-based numbers), by their number, which is the size.
        shapes: Key-value heads that every layer keeps, by the name of a shape; 0: layers go.
    """
    unpruned = {"n_dropped": 0, "shape": "unpruned", "layers": "", "n_kv_heads": 0}
    return [unpruned] + [
        {"n_dropped": n, "shape": shape, "layers": layers, "n_kv_heads": heads}
        for (n, layers), (shape, heads) in itertools.product(removed.items(), shapes.items())
    ]


def shapes_of_heads(shapes: Mapping[str, int], first: int, its: int) -> dict[str, int]:
    """The shapes that a model can take which has another number of heads, with their heads.

    A shape keeps the same share of them. One that would keep a part of a head is left out.

    Args:
        shapes: As for :func:`sized_points`, of a model with ``first`` key-value heads.
        first: Key-value heads of that model, from 1.
        its: Those of the other model, from 1.

    Raises:
        ValueError: For fewer heads: a shape that keeps none would lose layers instead.
    """
    for name, heads in (("first", first), ("its", its)):
        whole_number(name, heads, 1)
    return {
        shape: heads * its // first for shape, heads in shapes.items() if heads * its % first == 0
    }


def timed_points(
    sizes: pd.DataFrame, *, batch_sizes: Sequence[int], prompts: Sequence[int], rounds: int = 0
) -> list[dict]:
    """Points of :func:`costs.measure_speed`: each model of a table, at each setting.

    Args:
        sizes: Rows of :func:`equal_shape` with their points.
        batch_sizes: Texts at once.
        prompts: Tokens of each.
        rounds: How often all of it is asked for, with the ``round`` in each point; 0: once,
            without.
    """
    once = [
        {
            "n_dropped": row.n_dropped,
            "shape": row.shape,
            "layers": "" if row.width else row.layers,
            "width": row.width,
            "batch_size": batch,
            "prompt_tokens": prompt,
        }
        for prompt, batch, row in itertools.product(prompts, batch_sizes, sizes.itertuples())
    ]
    if not rounds:
        return once
    return [{**point, "round": number} for number in range(rounds) for point in once]
