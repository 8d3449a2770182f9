"""Models of one size and two shapes: fewer layers, or narrower ones (notebook 07)."""

from __future__ import annotations

from pruning_utils import efficiency, models, surgery, width
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
            gone += sum(weight.numel() for weight in layers[number].parameters())
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
