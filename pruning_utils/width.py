"""Make each layer narrower, in channels and heads: the baseline that dropping layers has to beat.

Width pruning as in arXiv:2402.02834 (Shortened LLaMA), Sec. 2: all layers stay, and each becomes
thinner. Each keeps equally many channels and heads, so that a configuration can describe the
result; the residual stream and the dimension of a head stay. What belongs together is read off the
dependency graph of Torch-Pruning (arXiv:2301.12900).

A unit is what stays or goes as a whole: a channel, or a key-value head with its query heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pruning_utils import importance, models, surgery
from pruning_utils.engine import held_configurations, passes, wrappers
from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:  # importing it takes seconds
    import torch_pruning
    from transformers import PreTrainedConfig, PreTrainedModel

CRITERIA = ("magnitude", "taylor")
GIVES = 0  # the dimension of a linear weight that gives the channels
READS = 1  # the one that reads them

# From the path of a linear module within a layer, and a dimension of its weight, to the rows or
# columns, from 0, of each unit: an array (n_units, rows of a unit).
Rows = dict[tuple[str, int], np.ndarray]


class _Cut(NamedTuple):
    """One kind of units of which each layer keeps ``n_kept``."""

    rows: Rows
    n_kept: int

    @property
    def n_units(self) -> int:
        """Units that each layer has."""
        return len(next(iter(self.rows.values())))


class _Plan(NamedTuple):
    """What a call changes.

    ``fields`` are those of the configuration, ``attributes`` those of modules (path, name, value),
    and ``result`` is the model as it will be, without weights.
    """

    fields: dict[str, int]
    cuts: list[_Cut]
    attributes: list[tuple[str, str, int]]
    result: PreTrainedModel


class _Share(NamedTuple):
    """Which scores a weight has a share in: of which cut and layer, along which dimension."""

    cut: int
    layer: int
    dim: int
    units: np.ndarray


def prune_width(
    model: PreTrainedModel,
    *,
    intermediate_size: int,
    n_kv_heads: int | None = None,
    criterion: str = "magnitude",
    input_ids: torch.Tensor | None = None,
    batch_size: int | None = None,
) -> PreTrainedModel:
    """Keep, in place, the channels and key-value heads that score highest in each layer.

    The channels are those of the feed-forward network. The score is over all weights that go if the
    unit goes. For a channel these are its rows of the gate and up projections and its column of the
    down projection. For a key-value head these are its rows of the key and value projections, the
    rows of its query heads, and their columns of the output projection. The biases of the rows
    count each time. Of equal scores the first stays. What stays keeps its order. Any error comes
    before the first change.

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
        ValueError: If an argument is out of range; if the model is quantised, carries adapters, is
            not in memory, or its layers share weights; if a score is not finite; if its
            architecture cannot be cut so, or a configuration of the result could not be loaded (the
            message says why: Llama's number of heads must divide the hidden size).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if (input_ids is None) != (criterion == "magnitude"):
        raise ValueError(
            f"criterion {criterion!r} {'takes no' if criterion == 'magnitude' else 'needs'} "
            "input_ids"
        )
    if input_ids is not None:
        input_ids = models.check_input_ids(model, input_ids, shortest=2)
    if batch_size is not None:
        batch_size = whole_number("batch_size", batch_size, 1)
    plan = _plan(model, intermediate_size, n_kv_heads)
    if not plan.cuts:
        return model
    passes.refuse_missing_weights(model, offloaded=False)
    all_scores = _scores(model, plan.cuts, input_ids, batch_size)
    for cut, scores in zip(plan.cuts, all_scores, strict=True):
        best_first = np.argsort(-scores, axis=1, kind="stable")
        _remove(model, cut.rows, best_first[:, cut.n_kept :])
    for path, name, value in plan.attributes:
        setattr(model.get_submodule(path), name, value)
    held_configurations.make_own(model)
    for config in surgery.configurations(model):
        _set_fields(config, plan.fields)
    return model


def width_of_equal_size(
    model: PreTrainedModel, n_parameters: int, *, n_kv_heads: int | None = None
) -> int:
    """Channels per layer with which the number of parameters is nearest to ``n_parameters``.

    The channels are those of the feed-forward network.

    Args:
        model: A causal language model in 16 or 32 bits whose layers are alike, with two channels or
            more; it is left as it was.
        n_parameters: Parameters that the whole model is to have, tied ones counted once.
        n_kv_heads: Key-value heads that each layer is to keep; None: all.

    Returns:
        ``intermediate_size`` for :func:`prune_width`.

    Raises:
        ValueError: If a number is out of range, the model is quantised, carries adapters or cannot
            be cut so, or no size from 1 to the present one leads there.
    """
    layers = models.decoder_layers(model)
    one, two = (
        models.n_parameters(models.decoder_layers(_plan(model, size, n_kv_heads).result))
        for size in (1, 2)
    )
    least = models.n_parameters(model) - models.n_parameters(layers) + one
    most = least + (two - one) * (models.text_config(model).intermediate_size - 1)
    n_parameters = whole_number("n_parameters", n_parameters, least, most)
    return 1 + round((n_parameters - least) / (two - one))


def _set_fields(config: PreTrainedConfig, fields: dict[str, int]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)


# --- the plan -------------------------------------------------------------------------------------


def _plan(model: PreTrainedModel, intermediate_size: int, n_kv_heads: int | None) -> _Plan:
    """What a call changes, found out without changing the model."""
    wrappers.refuse_wrapped(model)
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised: load it with quantize=None (bfloat16 or float32)")
    asked = {"intermediate_size": checked_size(model, "intermediate_size", intermediate_size)}
    if n_kv_heads is not None:
        asked["num_key_value_heads"] = checked_size(model, "n_kv_heads", n_kv_heads)
    sizes = {field: size for field, size in asked.items() if size < _present_size(model, field)}
    try:
        return _rehearsed(model, sizes)
    except Exception as error:  # the code of the architectures refuses in many ways
        raise ValueError(f"{type(model).__name__} cannot be cut to {sizes}: {error}") from error


def checked_size(model: PreTrainedModel, name: str, size: int) -> int:
    """A size that an argument of :func:`prune_width` asks for.

    Args:
        model: A causal language model.
        name: The argument, ``intermediate_size`` or ``n_kv_heads``.
        size: What it was given.

    Raises:
        ValueError: If it is out of range; the argument is named.
    """
    field = "num_key_value_heads" if name == "n_kv_heads" else name
    return whole_number(name, size, 1, _present_size(model, field))


def _present_size(model: PreTrainedModel, field: str) -> int:
    present = getattr(models.text_config(model), field, None)
    if type(present) is not int:
        raise ValueError(
            f"{type(model).__name__} cannot be cut to a width: its {field} is {present}"
        )
    return present


def _rehearsed(model: PreTrainedModel, sizes: dict[str, int]) -> _Plan:
    """The plan for sizes by their fields, each carried out on a model without weights."""
    layers = models.decoder_layers(model)
    surgery.refuse_unfit(model, layers, list(range(len(layers))))
    before = surgery.skeleton(model, model.config).eval()
    if surgery.shapes(model) != surgery.shapes(before):
        raise ValueError("its weights are not those that its configuration describes")
    if any(surgery.shapes(layer) != surgery.shapes(layers[0]) for layer in layers):
        raise ValueError("its layers are not alike")
    text = models.text_config(model)
    config = copy.deepcopy(model.config)
    fields: dict[str, int] = {}
    cuts: list[_Cut] = []
    attributes: list[tuple[str, str, int]] = []
    for field, size in sizes.items():
        n_units = _present_size(model, field)
        fields |= _changed_fields(text, field, size)
        _set_fields(config.get_text_config(decoder=True), fields)
        # As it is loaded.
        after = surgery.skeleton(model, type(config).from_dict(config.to_diff_dict())).eval()
        rows = _coupled_rows(before, after, n_units)
        # What is left of the weightless model must be like one that was made with this size.
        _remove(before, rows, [range(size, n_units)] * len(layers))
        attributes += _changed_attributes(before, after)
        cuts.append(_Cut(rows, size))
        before = after
    return _Plan(fields, cuts, attributes, before)


def _changed_fields(text: PreTrainedConfig, field: str, size: int) -> dict[str, int]:
    """Fields of a configuration that follow from a new value of one of them."""
    if field != "num_key_value_heads":
        return {field: size}
    queries = text.num_attention_heads // text.num_key_value_heads
    # Where it is not written down, fewer heads would be taken for larger ones.
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {field: size, "num_attention_heads": queries * size, "head_dim": head_dim}


def _coupled_rows(before: PreTrainedModel, after: PreTrainedModel, n_units: int) -> Rows:
    """The rows of the cut that turns one weightless model into the other.

    They are read off the dependency graph of the first layer, of which each unit is asked for.
    """
    import torch_pruning

    short = copy.deepcopy(before)
    layers = models.decoder_layers(short)
    del layers[1:]
    layer = layers[0]
    linear = {module: path for path, module in layer.named_modules() if _is_linear(module)}
    reader = _reader(linear, models.decoder_layers(after)[0])
    graph = _dependency_graph(short, layer)
    width = reader.in_features // n_units
    # One question for each unit; for channels one in all, since the graph then says which row comes
    # from which column. Where key-value heads are repeated it does not.
    questions = np.arange(reader.in_features).reshape(-1, width if width > 1 else n_units)
    found: Rows = {}
    for unit, columns in enumerate(questions.tolist()):
        group = graph.get_pruning_group(reader, torch_pruning.prune_linear_in_channels, columns)
        for item in group:
            module = item.dep.target.module
            if module not in linear:
                continue
            dim = READS if item.dep.handler == torch_pruning.prune_linear_in_channels else GIVES
            unit_of_row = np.full(module.weight.shape[dim], -1)
            unit_of_row = found.setdefault((linear[module], dim), unit_of_row)
            unit_of_row[item.idxs] = unit if width > 1 else item.root_idxs
    _refuse_unequal_parts(found, n_units)
    return {
        key: np.argsort(unit_of_row, kind="stable").reshape(n_units, -1)
        for key, unit_of_row in found.items()
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _reader(linear: dict[nn.Module, str], narrow: nn.Module) -> nn.Linear:
    """The one linear module of a layer that reads fewer channels in the narrow layer."""
    readers = [
        module
        for module, path in linear.items()
        if module.in_features != narrow.get_submodule(path).in_features
    ]
    if len(readers) != 1:
        raise ValueError(
            f"{len(readers)} linear modules of a layer, instead of one, would read fewer channels"
        )
    return readers[0]


def _dependency_graph(short: PreTrainedModel, layer: nn.Module) -> torch_pruning.DependencyGraph:
    """The dependency graph of a layer, from a weightless model that has no other."""
    import torch_pruning

    calls: list[tuple] = []
    layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    # Of one token, the heads that are joined again would look like a flattened image to the graph.
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # A mask of four dimensions is taken as it is; any other would be looked into, and there is
    # nothing to see.
    mask = torch.zeros(1, 1, 2, 2, device="meta")
    with torch.enable_grad():
        short(ids, use_cache=False, attention_mask=mask)
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
    return graph


def _refuse_unequal_parts(unit_of_row: Rows, n_units: int) -> None:
    """ValueError unless each unit has equally many rows, and every row belongs to one."""
    for units in unit_of_row.values():
        if sorted(units) != sorted([*range(n_units)] * (len(units) // n_units)):
            raise ValueError(
                f"the rows of {', '.join(path for path, _ in unit_of_row)} do not fall into "
                f"{n_units} equal parts"
            )


def _remove(model: nn.Module, rows: Rows, dropped: Iterable[Sequence[int]]) -> None:
    """Remove the units with these numbers, one sequence for each layer.

    Numbers in configurations stay as they are.
    """
    import torch_pruning

    for layer, units in zip(models.decoder_layers(model), dropped, strict=True):
        for (path, dim), index in rows.items():
            module = layer.get_submodule(path)
            flags = [weight.requires_grad for weight in module.parameters()]
            numbers = index[units].flatten().tolist()
            if dim == READS:
                torch_pruning.prune_linear_in_channels(module, numbers)
            else:
                torch_pruning.prune_linear_out_channels(module, numbers)
            # The weights are new ones, which all require gradients.
            for weight, flag in zip(module.parameters(), flags, strict=True):
                weight.requires_grad_(flag)


def _changed_attributes(before: nn.Module, after: nn.Module) -> list[tuple[str, str, int]]:
    """Numbers that modules keep and that differ; ValueError for any other difference."""
    old, new = _facts_and_buffers(before), _facts_and_buffers(after)
    changed = []
    for path, name in old | new:
        was, becomes = old.get((path, name)), new.get((path, name))
        if was == becomes:
            continue
        if type(becomes) is not int:
            raise ValueError(f"{path}.{name} would be {becomes}, but {was} is left")
        changed.append((path, name, becomes))
    return changed


def _facts_and_buffers(model: nn.Module) -> dict[tuple[str, str], object]:
    """As :func:`surgery.facts`, with the shapes of buffers that are not saved."""
    buffers = {(name, "shape"): tuple(buffer.shape) for name, buffer in model.named_buffers()}
    return surgery.facts(model) | buffers


# --- the scores -----------------------------------------------------------------------------------


def _scores(
    model: nn.Module, cuts: list[_Cut], input_ids: torch.Tensor | None, batch_size: int | None
) -> list[np.ndarray]:
    """For each cut float64 scores ``(L, n_units)``.

    They are Taylor's where there are token ids, else magnitudes.
    """
    shares = _shares(model, cuts)
    if input_ids is None:
        sums = {weight: _sums_of_squares(weight, share) for weight, share in shares.items()}
    else:
        sums = _sums_of_products(model, shares, input_ids, batch_size)
    n_layers = len(models.decoder_layers(model))
    scores = [np.zeros((n_layers, cut.n_units)) for cut in cuts]
    for weight, share in shares.items():
        scores[share.cut][share.layer] += sums[weight]
    if not all(np.isfinite(of_cut).all() for of_cut in scores):
        raise ValueError("a score is not finite, so a weight or its gradient is not")
    return [np.sqrt(of_cut) for of_cut in scores] if input_ids is None else scores


def _shares(model: nn.Module, cuts: list[_Cut]) -> dict[nn.Parameter, _Share]:
    """All weights that go if units go, each with the scores that it has a share in."""
    shares: dict[nn.Parameter, _Share] = {}
    for number, cut in enumerate(cuts):
        for (path, dim), units in cut.rows.items():
            for place, layer in enumerate(models.decoder_layers(model)):
                module = layer.get_submodule(path)
                shares[module.weight] = _Share(number, place, dim, units)
                # A bias has an entry for each channel that is given, none for those that are read.
                if dim == GIVES and module.bias is not None:
                    shares[module.bias] = _Share(number, place, dim, units)
    return shares


def _sums_of_squares(weight: nn.Parameter, share: _Share) -> np.ndarray:
    """Sum of squares of what a weight has of each unit, ``(n_units,)``."""
    values = weight.detach().float()
    return _sums(values * values, share)


def _sums_of_products(
    model: nn.Module,
    shares: dict[nn.Parameter, _Share],
    input_ids: torch.Tensor,
    batch_size: int | None,
) -> dict[nn.Parameter, np.ndarray]:
    """Sums over units of the sizes of products of weights with their gradients."""
    sums: dict[nn.Parameter, np.ndarray] = {}

    def collect(weight: nn.Parameter) -> None:
        """Called with each weight that has got its gradient."""
        sums[weight] = _sums(weight.detach().float() * weight.grad.float(), shares[weight])

    flags = {weight: weight.requires_grad for weight in shares}
    hooks = []
    try:
        for weight in shares:
            weight.requires_grad_(True)
            # It is called before the hooks of the score of layers, which let each gradient go.
            hooks.append(weight.register_post_accumulate_grad_hook(collect))
        importance.taylor(model, input_ids, batch_size=batch_size)
    finally:
        for hook in hooks:
            hook.remove()
        for weight, flag in flags.items():
            weight.requires_grad_(flag)
    return sums


def _sums(values: torch.Tensor, share: _Share) -> np.ndarray:
    """Sums of absolute values over the rows of each unit, in float64, ``(n_units,)``."""
    rows = values.abs().movedim(share.dim, 0)
    of_rows = rows.reshape(len(rows), -1).sum(1, dtype=torch.float64).cpu().numpy()
    return of_rows[share.units].sum(axis=1)
