"""Make each layer narrower: fewer feed-forward channels and heads, the baseline that dropping
layers is held against.

Width pruning as in arXiv:2402.02834 (Shortened LLaMA), Sec. 2: all layers stay, and each becomes
thinner. Each keeps equally many channels and heads, so that a configuration can describe the
result; the residual stream and the dimension of a head stay. What belongs together is read off the
dependency graph of Torch-Pruning (arXiv:2301.12900).

A cut consists of ``rows`` and of the number of units that each layer keeps. A unit is what stays or
goes as a whole: a channel, or a key-value head with its query heads. ``rows`` maps the path of a
linear module within a layer, and a dimension of its weight (0: it gives the channels, 1: it reads
them), to the rows or columns, from 0, of each unit: an array ``(n_units, rows of a unit)``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pruning_utils import importance, models, surgery

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

CRITERIA = ("magnitude", "taylor")


def prune_width(
    model: PreTrainedModel,
    *,
    intermediate_size: int,
    n_kv_heads: int | None = None,
    criterion: str = "magnitude",
    input_ids: torch.Tensor | None = None,
    batch_size: int | None = None,
) -> PreTrainedModel:
    """Keep, in place, the feed-forward channels and key-value heads that score highest in each
    layer.

    The score is over all weights that go if the unit goes: for a channel its rows of the gate and
    up projections and its column of the down projection; for a key-value head its rows of the key
    and value projections, the rows of its query heads, and their columns of the output projection;
    each time with the biases of the rows. Of equal scores the first stays. What stays keeps its
    order. Any error comes before the first change.

    Args:
        model: A causal language model in 16 or 32 bits whose layers are alike, such as Llama,
            Mistral, Qwen2 or Qwen3.
        intermediate_size: Channels that each layer keeps, from 1 to all.
        n_kv_heads: Key-value heads, each with its query heads, that each layer keeps, from 1 to
            all; None: all.
        criterion: ``"magnitude"``, the L2 norm ``sqrt(sum(w**2))``, or ``"taylor"``, the sum of
            ``|w * dLoss/dw|`` over single weights (arXiv:2402.02834, Sec. 3), the loss as for
            :func:`importance.taylor`.
        input_ids: Token ids without padding, ``(N, T)``, T from 2 to the model's context length;
            for Taylor only.
        batch_size: Samples in a micro-batch of Taylor's; None takes as many as make 4,096 tokens,
            on a GPU 32,768.

    Returns:
        The same ``model``. Scores are products in float32, summed in float64.

    Raises:
        ValueError: If an argument is out of range; if the model is quantised, carries adapters, or
            its layers share weights; if a score is not finite; if its architecture cannot be cut
            so, or a configuration of the result could not be loaded (the message says why: Llama's
            number of heads must divide the hidden size).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if (input_ids is None) != (criterion == "magnitude"):
        raise ValueError(
            f"criterion {criterion!r} {'takes no' if criterion == 'magnitude' else 'needs'} "
            "input_ids"
        )
    if input_ids is not None:
        models.check_input_ids(model, input_ids, shortest=2)
    fields, cuts, attributes, _ = _plan(model, intermediate_size, n_kv_heads)
    if not cuts:
        return model
    for (rows, n_kept), scores in zip(
        cuts, _scores(model, cuts, input_ids, batch_size), strict=True
    ):
        _remove(model, rows, np.argsort(-scores, axis=1, kind="stable")[:, n_kept:])
    for path, name, value in attributes:
        setattr(model.get_submodule(path), name, value)
    text = models.text_config(model)
    # Modules may hold copies of the configuration.
    for config in (
        text,
        *(
            own
            for part in model.modules()
            for own in vars(part).values()
            if type(own) is type(text)
        ),
    ):
        for field, value in fields.items():
            setattr(config, field, value)
    return model


def width_of_equal_size(
    model: PreTrainedModel, n_parameters: int, *, n_kv_heads: int | None = None
) -> int:
    """Feed-forward channels per layer with which a model has the number of parameters nearest to
    ``n_parameters``.

    Args:
        model: As for :func:`prune_width`, with two channels or more; it is left as it was.
        n_parameters: Parameters that the whole model is to have, tied ones counted once.
        n_kv_heads: Key-value heads that each layer is to keep; None: all.

    Returns:
        ``intermediate_size`` for :func:`prune_width`.

    Raises:
        ValueError: As for :func:`prune_width`, or if no size from 1 to the present one leads there.
    """
    one, two = (
        _n_parameters(models.decoder_layers(_plan(model, size, n_kv_heads)[-1])) for size in (1, 2)
    )
    least = _n_parameters(model) - _n_parameters(models.decoder_layers(model)) + one
    most = least + (two - one) * (models.text_config(model).intermediate_size - 1)
    if type(n_parameters) is not int or not least <= n_parameters <= most:
        raise ValueError(
            f"n_parameters must be a whole number from {least} to {most}, got {n_parameters!r}"
        )
    return 1 + round((n_parameters - least) / (two - one))


def _n_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _plan(
    model: PreTrainedModel, intermediate_size: int, n_kv_heads: int | None
) -> tuple[dict, list, list, nn.Module]:
    """Configuration fields, cuts, module attributes that change (path, name, value), and the result
    without weights."""
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised: load it with quantize=None (bfloat16 or float32)")
    text, asked, fields, cuts, attributes = models.text_config(model), {}, {}, [], []
    for name, field, size in (
        ("intermediate_size", "intermediate_size", intermediate_size),
        ("n_kv_heads", "num_key_value_heads", n_kv_heads),
    )[: 1 if n_kv_heads is None else 2]:
        if type(present := getattr(text, field, None)) is not int:
            raise ValueError(
                f"{type(model).__name__} cannot be cut to a width: its {field} is {present}"
            )
        if type(size) is not int or not 1 <= size <= present:
            raise ValueError(f"{name} must be a whole number from 1 to {present}, got {size!r}")
        if size < present:
            asked[field] = size
    layers = models.decoder_layers(model)
    try:
        surgery._refuse_unfit(model, layers, list(range(len(layers))))
        config, before = model.config, surgery._skeleton(model, model.config).eval()
        if surgery._shapes(model) != surgery._shapes(before):
            raise ValueError("its weights are not those that its configuration describes")
        if any(surgery._shapes(layer) != surgery._shapes(layers[0]) for layer in layers):
            raise ValueError("its layers are not alike")
        for field, size in asked.items():
            fields[field] = size
            if field == "num_key_value_heads":
                fields["num_attention_heads"] = (
                    text.num_attention_heads // text.num_key_value_heads * size
                )
                # Where it is not written down, fewer heads would be taken for larger ones.
                fields["head_dim"] = (
                    getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
                )
            config = copy.deepcopy(config)
            for name, value in fields.items():
                setattr(config.get_text_config(decoder=True), name, value)
            after = surgery._skeleton(
                model, type(config).from_dict(config.to_diff_dict())
            ).eval()  # as it is loaded
            cuts.append((_coupled_rows(before, after, getattr(text, field)), size))
            # The rehearsal: what is left of the weightless model must have the shapes of one made
            # with this size.
            _remove(before, cuts[-1][0], [range(size, getattr(text, field))] * len(layers))
            attributes += _changed_attributes(before, after)
            before = after
    except Exception as error:  # the code of the architectures refuses in many ways
        raise ValueError(f"{type(model).__name__} cannot be cut to {asked}: {error}") from error
    return fields, cuts, attributes, before


def _coupled_rows(
    before: PreTrainedModel, after: PreTrainedModel, n_units: int
) -> dict[tuple[str, int], np.ndarray]:
    """``rows`` of the cut that turns one weightless model into the other, by tracing the first
    layer."""
    import torch_pruning

    short, calls = copy.deepcopy(before), []
    (layer, *_) = layers = models.decoder_layers(short)
    del layers[1:]
    paths = {
        module: path for path, module in layer.named_modules() if isinstance(module, nn.Linear)
    }
    readers = [
        module
        for module, path in paths.items()
        if module.in_features != models.decoder_layers(after)[0].get_submodule(path).in_features
    ]
    if len(readers) != 1:
        raise ValueError(
            f"{len(readers)} linear modules of a layer, instead of one, would read fewer channels"
        )
    layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.enable_grad():
        # Of one token, the heads that are joined again would look like a flattened image to the
        # graph. A mask of four dimensions is taken as it is; any other would be looked into, and
        # there is nothing to see.
        short(
            torch.zeros(1, 2, dtype=torch.long, device="meta"),
            use_cache=False,
            attention_mask=torch.zeros(1, 1, 2, 2, device="meta"),
        )
        graph = torch_pruning.DependencyGraph().build_dependency(
            layer, calls[0], lambda layer, call: layer(*call[0], **call[1]), verbose=False
        )
    for node in graph.module2node.values():
        # Rotary embeddings concatenate the halves of each head. Where two query heads share a
        # key-value head, the graph would take that for a concatenation of channels, and follow it
        # in circles.
        node.enable_index_mapping = node.type != torch_pruning.ops.OPTYPE.CONCAT
        for dependency in node.dependencies:
            dependency.index_mapping[1] = None
    reader, width, found = readers[0], readers[0].in_features // n_units, {}
    # One question for each unit; for channels one in all, since the graph then says which row comes
    # from which column. Where key-value heads are repeated it does not.
    for unit, columns in enumerate(
        np.arange(reader.in_features).reshape(-1, width if width > 1 else n_units).tolist()
    ):
        for item in graph.get_pruning_group(
            reader, torch_pruning.prune_linear_in_channels, columns
        ):
            if path := paths.get(module := item.dep.target.module):
                dim = int(item.dep.handler == torch_pruning.prune_linear_in_channels)
                rows = found.setdefault((path, dim), np.full(module.weight.shape[dim], -1))
                rows[item.idxs] = unit if width > 1 else item.root_idxs
    if any(
        sorted(units) != sorted([*range(n_units)] * (len(units) // n_units))
        for units in found.values()
    ):
        raise ValueError(
            f"the rows of {', '.join(path for path, _ in found)} do not fall into {n_units} equal "
            "parts"
        )
    return {
        key: np.argsort(units, kind="stable").reshape(n_units, -1) for key, units in found.items()
    }


def _remove(model: nn.Module, rows: dict[tuple[str, int], np.ndarray], dropped: Iterable) -> None:
    """Remove the units with these numbers, one sequence for each layer; numbers in configurations
    stay as they are."""
    import torch_pruning

    for layer, units in zip(models.decoder_layers(model), dropped, strict=True):
        for (path, dim), index in rows.items():
            module = layer.get_submodule(path)
            flags = [weight.requires_grad for weight in module.parameters()]
            remove = (
                torch_pruning.prune_linear_in_channels
                if dim
                else torch_pruning.prune_linear_out_channels
            )
            remove(module, index[units].flatten().tolist())
            for weight, flag in zip(
                module.parameters(), flags, strict=True
            ):  # new ones, which all require gradients
                weight.requires_grad_(flag)


def _changed_attributes(before: nn.Module, after: nn.Module) -> list[tuple[str, str, int]]:
    """Numbers that modules keep and that differ; ValueError for any other difference."""
    old, new = (
        {
            **surgery._facts(model),
            **{(name, "shape"): tuple(tensor.shape) for name, tensor in (model.named_buffers())},
        }
        for model in (before, after)
    )
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    for path, name in changed:
        if type(new.get((path, name))) is not int:
            raise ValueError(
                f"{path}.{name} would be {new.get((path, name))}, but {old.get((path, name))} is "
                "left"
            )
    return [(*key, new[key]) for key in changed]


def _scores(
    model: nn.Module, cuts: list, input_ids: torch.Tensor | None, batch_size: int | None
) -> list[np.ndarray]:
    """For each cut float64 scores ``(L, n_units)``: Taylor's where there are token ids, else
    magnitudes."""
    layers = models.decoder_layers(model)
    owner = {
        weight: (place, number, dim, index)
        for place, (rows, _) in enumerate(cuts)
        for (path, dim), index in rows.items()
        for number, layer in enumerate(layers)
        for name, weight in layer.get_submodule(path).named_parameters()
        if name == "weight" or dim == 0
    }
    parts = {}

    def collect(weight: nn.Parameter) -> None:
        """Sums over what a weight has of each unit; of squares, or of products with the gradient
        where there is one."""
        _, _, dim, index = owner[weight]
        values = weight.detach().float()
        values = (
            (values * (values if input_ids is None else weight.grad.float())).abs().movedim(dim, 0)
        )
        parts[weight] = (
            values.reshape(len(values), -1)
            .sum(1, dtype=torch.float64)
            .cpu()
            .numpy()[index]
            .sum(axis=1)
        )

    with contextlib.ExitStack() as undo:
        for weight in owner:
            if input_ids is None:
                collect(weight)
            else:  # called before the hooks of the score of layers, which let each gradient go
                undo.callback(weight.requires_grad_, weight.requires_grad)
                undo.callback(
                    weight.requires_grad_(True).register_post_accumulate_grad_hook(collect).remove
                )
        if input_ids is not None:
            importance.taylor(model, input_ids, batch_size=batch_size)
    scores = [np.zeros((len(layers), len(next(iter(rows.values()))))) for rows, _ in cuts]
    for weight, (place, number, _, _) in owner.items():
        scores[place][number] += parts[weight]
    if not all(np.isfinite(own).all() for own in scores):
        raise ValueError("a score is not finite, so a weight or its gradient is not")
    return scores if input_ids is not None else [np.sqrt(own) for own in scores]
