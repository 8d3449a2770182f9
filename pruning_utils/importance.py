"""How much each layer matters, one score a layer: its weights, weights times gradients, or the loss
without it.

The three criteria of arXiv:2402.02834 (Shortened LLaMA), Sec. 3; layers with low scores are dropped
first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from pruning_utils import evaluation, models
from pruning_utils.engine import passes
from pruning_utils.engine.bars import tqdm

# Where batch_size is None; on a CPU more leave its caches.
TOKENS_AT_ONCE = {
    "cpu": 2**12,
    "cuda": 2**15,
}
logger = logging.getLogger(__name__)


def magnitude(model: nn.Module, *, norm: int = 1) -> np.ndarray:
    """Sum over a layer's weights, norms and biases included, of their magnitudes.

    Args:
        model: A causal language model in 16 or 32 bits.
        norm: 1 sums ``|w|``, 2 sums ``w**2`` (no root is taken).

    Returns:
        float64 scores ``(L,)``, summed in float32 or better.

    Raises:
        ValueError: If the weights are quantised, the norm is another one, or a score is not finite.
    """
    _refuse_quantized(model)
    if norm not in (1, 2) or isinstance(norm, bool):
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")
    return _finite(
        np.array(
            [
                sum(
                    float(weight.detach().float().abs().pow(norm).sum(dtype=torch.float64))
                    for weight in layer.parameters()
                )
                for layer in models.decoder_layers(model)
            ]
        )
    )


def taylor(
    model: nn.Module, input_ids: torch.Tensor, *, batch_size: int | None = None
) -> np.ndarray:
    """First-order change of the loss if a weight were zero, ``|w * dLoss/dw|``, summed over a
    layer's weights.

    The loss is one mean over all predicted tokens of all samples; gradients of the samples are
    added with their sign before the absolute value of each element is taken, so the score does not
    depend on the batch size. Layers run forward and backward a micro-batch at a time, each layer
    for all samples before the next one, and a gradient is reduced as soon as it is whole: those of
    one layer are alive at a time, beside the inputs of all layers.

    Args:
        model: A causal language model in 16 or 32 bits; it is left as it was.
        input_ids: Token ids without padding, of shape ``(N, T)``, T from 2 to the model's context
            length.
        batch_size: Samples in a micro-batch; None takes as many as make 4,096 tokens, on a GPU
            32,768. It is halved, with a notice, where memory does not suffice.

    Returns:
        float64 scores ``(L,)``: gradients of micro-batches are added in the weights' own precision,
        products taken in float32 and sums in float64.

    Raises:
        ValueError: If the weights are quantised, an argument is out of range, or a score is not
            finite.
    """
    _refuse_quantized(model)
    models.check_input_ids(model, input_ids, shortest=2)
    input_ids = input_ids.to(model.get_input_embeddings().weight.device, torch.long)
    n_samples = len(input_ids)
    size = min(n_samples, _checked_size(batch_size, input_ids, 1))
    alone = None
    while True:
        try:
            return _finite(_taylor(model, input_ids, size, alone))
        except _Unclear:
            alone = _arguments_alone(model, input_ids)
        except RuntimeError as error:
            size = _halved(size, error)


def _taylor(
    model: nn.Module, input_ids: torch.Tensor, batch_size: int, alone: list | None
) -> np.ndarray:
    layers = models.decoder_layers(model)
    scores = np.zeros(len(layers))
    owner = {weight: number for number, layer in enumerate(layers) for weight in layer.parameters()}

    def reduce(weight: torch.Tensor) -> None:
        """Called once for each weight, when the gradients of all micro-batches have been added."""
        scores[owner[weight]] += float(
            (weight.detach().float() * weight.grad.float()).abs().sum(dtype=torch.float64)
        )
        weight.grad = None

    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            module.training = False
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(weight in owner)
        for weight in owner:
            undo.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
            undo.callback(weight.register_post_accumulate_grad_hook(reduce).remove)
        for number, layer in enumerate(layers):
            undo.enter_context(
                passes.replaced(
                    layer,
                    "forward",
                    _in_parts(layer.forward, len(input_ids), batch_size, alone and alone[number]),
                )
            )
        _mean_loss(model, input_ids).backward()
    return scores


def _in_parts(own: Callable, n_rows: int, batch_size: int, alone: list | None) -> Callable:
    """A layer's forward, a few rows at a time, that keeps nothing but its input for the backward
    pass."""

    def forward(states, *given, **named):
        """The layer on each part, and its outputs joined."""
        outputs = []
        for start, part in zip(range(0, n_rows, batch_size), states.split(batch_size), strict=True):
            more, by_name = _rows((given, named), slice(start, start + len(part)), n_rows, alone)
            outputs.append(checkpoint(own, part, *more, use_reentrant=False, **by_name))
        whole = isinstance(outputs[0], tuple)
        states = torch.cat([output[0] if whole else output for output in outputs])
        return (states, *outputs[0][1:]) if whole else states

    return forward


def _arguments_alone(model: nn.Module, input_ids: torch.Tensor) -> list[list[object]]:
    """For each layer the arguments beside the states, flat, that it gets for one sequence."""
    found: list[list[object]] = []
    with contextlib.ExitStack() as undo:
        for layer in models.decoder_layers(model):
            undo.callback(
                layer.register_forward_pre_hook(
                    lambda _, given, named: found.append(tree_leaves((given[1:], named))),
                    with_kwargs=True,
                ).remove
            )
        evaluation.token_losses(model, input_ids[:1])
    return found


def _rows(arguments: tuple, rows: slice, n_rows: int, alone: list | None) -> tuple:
    """Arguments of a layer for some of ``n_rows`` sequences: of tensors that hold something for
    each, the part."""
    leaves, structure = tree_flatten(arguments)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.ndim and n_rows > 1 and len(leaf) % n_rows == 0:
            if alone is None:
                raise _Unclear
            if len(leaf) == n_rows * (
                each := len(alone[place])
            ):  # perhaps a row for each head of each sequence
                leaves[place] = leaf[rows.start * each : rows.stop * each]
    return tree_unflatten(leaves, structure)


class _Unclear(Exception):
    """A layer's argument may hold something for each sequence, or have as many rows for another
    reason."""


def _mean_loss(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean loss (nats) over all predicted tokens, its head on few tokens at a time, again in the
    backward pass."""
    backbone, output = passes.run_backbone(model, input_ids)
    targets = input_ids[:, 1:].flatten()
    if backbone is None:
        return nn.functional.cross_entropy(
            model(input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float(), targets
        )

    def summed(states: torch.Tensor, follow: torch.Tensor) -> torch.Tensor:
        """Summed loss of the tokens that follow these final states."""
        (logits,) = passes.head_logits(model, backbone, output, states)
        return nn.functional.cross_entropy(logits, follow, reduction="sum")

    # The backward pass holds the logits of a part four times over: an eighth of what a forward pass
    # may hold.
    n_tokens = max(1, passes.LOGITS_AT_ONCE // (8 * model.get_input_embeddings().num_embeddings))
    parts = zip(
        output.last_hidden_state[:, :-1].flatten(0, 1).split(n_tokens),
        targets.split(n_tokens),
        strict=True,
    )
    return sum(checkpoint(summed, *part, use_reentrant=False) for part in parts) / len(targets)


def perplexity_without_layer(
    model: nn.Module, input_ids: torch.Tensor, *, batch_size: int | None = None
) -> np.ndarray:
    """Perplexity of the model without each layer in turn; the layer with the lowest goes first.

    Arguments and errors as for :func:`perplexity_without_block`.

    Returns:
        float64 scores ``(L,)``.
    """
    return perplexity_without_block(model, input_ids, block_size=1, batch_size=batch_size)


def perplexity_without_block(
    model: nn.Module, input_ids: torch.Tensor, *, block_size: int, batch_size: int | None = None
) -> np.ndarray:
    """Perplexity of the model without each run of ``block_size`` layers in turn, all in one sweep
    through the layers.

    The stream of the whole model and those of all models with a block skipped go through a layer in
    one batch; a stream begins where its block ends, from the states that entered it. So each layer
    runs once for each batch of samples, on L (L + 1) / 2 rows per sample in all for a block of one
    layer, and (L - n + 1)(L - n) / 2 + L for n.

    Args:
        model: A causal language model, quantised or with adapters if need be; it is left as it was.
        input_ids: Token ids without padding, of shape ``(N, T)``, T from 2 to the model's context
            length.
        block_size: Layers in a block, from 1 to L - 1.
        batch_size: Samples in one pass; None takes as many as make 4,096 tokens of all streams, on
            a GPU 32,768. It is halved, with a notice, where memory does not suffice; what is done
            stays.

    Returns:
        float64 perplexities ``(L - block_size + 1,)``, exp of the mean loss over all predicted
        tokens (``inf`` beyond 709 nats); entry l is of the model without layers l to l + block_size
        - 1.

    Raises:
        ValueError: If an argument is out of range, or a loss is NaN.
    """
    models.check_input_ids(model, input_ids, shortest=2)
    n_layers = len(models.decoder_layers(model))
    if (
        isinstance(block_size, bool)
        or not isinstance(block_size, int | np.integer)
        or not 1 <= block_size < n_layers
    ):
        raise ValueError(
            f"block_size must be a whole number from 1 to {n_layers - 1}, got {block_size!r}"
        )
    input_ids = input_ids.to(model.get_input_embeddings().weight.device, torch.long)
    n_streams = n_layers - block_size + 2
    size = _checked_size(batch_size, input_ids, n_streams)
    sums, done, alone = np.zeros(n_streams), 0, None
    with tqdm(total=len(input_ids), desc="without each layer", leave=False) as progress:
        while done < len(input_ids):
            batch = input_ids[done : done + size]
            try:
                with _streams(model, len(batch), block_size, alone):
                    rows = batch.repeat(n_streams, 1)
                    losses = evaluation.token_losses(model, rows, batch_size=len(rows))
            except _Unclear:
                alone = _arguments_alone(model, input_ids)
                continue
            except RuntimeError as error:
                size = _halved(len(batch), error)
                continue
            sums += losses.double().view(n_streams, -1).sum(1).numpy()
            done += len(batch)
            progress.update(len(batch))
    with np.errstate(over="ignore"):
        return np.exp(sums[1:] / (input_ids.shape[0] * (input_ids.shape[1] - 1)))


@contextlib.contextmanager
def _streams(
    model: nn.Module, n_samples: int, block_size: int, alone: list | None
) -> Iterator[None]:
    """Let the layers run on the stream of the whole model and one for each skipped block,
    ``n_samples`` rows each.

    The model is called with the rows of all streams, so that it makes masks and positions for them;
    the first layer takes the first stream, and each stream joins after the last layer of its block.
    """
    layers, entered = models.decoder_layers(model), {}
    n_rows = (len(layers) - block_size + 2) * n_samples

    def forward_of(number: int, own: Callable) -> Callable:
        """What stands for the forward of one layer."""

        def forward(states, *given, **named):
            """The layer on all streams that have reached it."""
            if number == 0:
                if len(states) != n_rows:
                    raise ValueError(
                        f"{type(model).__name__} cannot be run on several sequences at once"
                    )
                states = states[:n_samples]
            entered[number] = states[:n_samples]  # of the whole model
            more, by_name = _rows(
                (given, named), slice(0, len(states)), n_rows, alone and alone[number]
            )
            output = own(states, *more, **by_name)
            whole = isinstance(output, tuple)
            states, first = output[0] if whole else output, number - block_size + 1
            if first >= 0:
                states = torch.cat([states, entered.pop(first)])
            return (states, *output[1:]) if whole else states

        return forward

    with contextlib.ExitStack() as undo:
        for number, layer in enumerate(layers):
            undo.enter_context(passes.replaced(layer, "forward", forward_of(number, layer.forward)))
        yield


def _refuse_quantized(model: nn.Module) -> None:
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "scores of weights need the weights themselves, but this model's are quantised: load "
            "it with quantize=None (bfloat16 or float32)"
        )


def _checked_size(batch_size: int | None, input_ids: torch.Tensor, n_streams: int) -> int:
    if batch_size is None:
        most = TOKENS_AT_ONCE["cuda" if input_ids.is_cuda else "cpu"]
        return max(1, most // (n_streams * input_ids.shape[1]))
    if (
        isinstance(batch_size, bool)
        or not isinstance(batch_size, int | np.integer)
        or batch_size < 1
    ):
        raise ValueError(
            f"batch_size must be a whole number of at least 1, or None, got {batch_size!r}"
        )
    return int(batch_size)


def _halved(size: int, error: RuntimeError) -> int:
    """Half the batch size after an error that says there is too little memory; any other error is
    raised again."""
    if (
        size == 1
        or not isinstance(error, torch.OutOfMemoryError)
        and "allocate memory" not in str(error)
    ):
        raise error
    logger.warning(
        "a batch of %d samples does not fit into memory; going on with %d", size, size // 2
    )
    return size // 2


def _finite(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        worst = int((~np.isfinite(scores)).argmax())
        raise ValueError(
            f"the score of layer {worst} is {scores[worst]}: its weights or gradients are not "
            "finite"
        )
    return scores
