"""How much each layer matters: its weights, its weights times gradients, or the loss without it.

These are the three criteria of arXiv:2402.02834 (Shortened LLaMA), Sec. 3. Each gives one score a
layer; layers with low scores are dropped first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pruning_utils import evaluation, models
from pruning_utils.engine import head_losses, memory, passes, wrappers
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import finite_scores, refuse_nan, whole_number
from pruning_utils.engine.later import nn, torch


def magnitude(model: nn.Module, *, norm: int = 1) -> np.ndarray:
    """Sum over a layer's weights, norms and biases included, of their magnitudes.

    Args:
        model: A causal language model in 16 or 32 bits.
        norm: 1 sums ``|w|``, 2 sums ``w**2`` (no root is taken).

    Returns:
        float64 scores ``(L,)``, summed in float32 or better.

    Raises:
        ValueError: If the weights are quantised, have adapters or are not in memory, the norm is
            another one, or a score is not finite.
    """
    wrappers.refuse_other_than_weights(model)
    passes.refuse_missing_weights(model, offloaded=False)
    norm = whole_number("norm", norm, 1, 2)
    scores = [_layer_magnitude(layer, norm) for layer in models.decoder_layers(model)]
    return finite_scores(np.array(scores))


def _layer_magnitude(layer: nn.Module, norm: int) -> float:
    return sum(
        float(weight.detach().float().abs().pow(norm).sum(dtype=torch.float64))
        for weight in layer.parameters()
    )


def taylor(
    model: nn.Module, input_ids: torch.Tensor, *, batch_size: int | None = None
) -> np.ndarray:
    """Sum over a layer's weights of ``|w * dLoss/dw|``.

    A summand is the first-order change of the loss if that weight were zero.

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
        ValueError: If the weights are quantised, have adapters, are not in memory or were made in
            inference mode, an argument is out of range, or a score is not finite.
        MemoryError: If not even one sample fits into memory.
    """
    wrappers.refuse_other_than_weights(model, gradients=True)
    input_ids = models.check_input_ids(model, input_ids, shortest=2)
    passes.refuse_missing_weights(model, offloaded=False)
    input_ids = input_ids.to(passes.input_device(model))
    size = memory.samples_at_once(batch_size, input_ids, 1)
    batches = memory.BatchSize(min(len(input_ids), size))
    alone: list = [None] * len(models.decoder_layers(model))
    while True:
        try:
            return finite_scores(_taylor(model, input_ids, batches.size, alone))
        except passes.Unclear:
            alone = passes.arguments_alone(model, input_ids)
        except memory.ERRORS as error:
            batches.halve(batches.size, error)


def _taylor(
    model: nn.Module, input_ids: torch.Tensor, batch_size: int, alone: list[list | None]
) -> np.ndarray:
    """The scores with micro-batches of ``batch_size``.

    ``alone`` holds what :func:`passes.arguments_of_rows` needs to know for each layer.
    """
    layers = models.decoder_layers(model)
    scores = np.zeros(len(layers))
    # Of a mean over many tokens float16 rounds the gradients to 0, so they are those of the sum.
    is_narrow = any(weight.dtype == torch.float16 for weight in layers.parameters())
    scale = input_ids[:, 1:].numel() if is_narrow else 1
    in_layers = [set(layer.parameters()) for layer in layers]
    scored = set().union(*in_layers)

    def reduce(weight: torch.Tensor) -> None:
        """Called once for each weight, when the gradients of all micro-batches have been added."""
        scores[[weight in own for own in in_layers]] += float(
            (weight.detach().float() * weight.grad.float()).abs().sum(dtype=torch.float64)
        )
        weight.grad = None

    with contextlib.ExitStack() as undo:
        # The caller may be in either.
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(passes.evaluation_mode(model))
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(weight in scored)
        for weight in scored:
            undo.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
            undo.callback(weight.register_post_accumulate_grad_hook(reduce).remove)
        for layer, known in zip(layers, alone, strict=True):
            forward = passes.in_parts(model, layer.forward, len(input_ids), batch_size, known)
            undo.enter_context(passes.replaced(layer, "forward", forward))
        (scale * head_losses.mean_loss(model, input_ids)).backward()
    return scores / scale


def perplexity_without_layer(
    model: nn.Module, input_ids: torch.Tensor, *, batch_size: int | None = None
) -> np.ndarray:
    """Perplexity of the model without each layer in turn; the layer with the lowest goes first.

    Each layer runs once for each batch of samples, on L (L + 1) / 2 rows per sample in all: see
    :func:`perplexity_without_block`.

    Args:
        model: A causal language model, quantised or with adapters if need be; it is left as it was.
        input_ids: Token ids without padding, of shape ``(N, T)``, T from 2 to the model's context
            length.
        batch_size: Samples in one pass; None takes as many as make 4,096 tokens of all streams, on
            a GPU 32,768. Where memory does not suffice it is halved, with a notice.

    Returns:
        float64 perplexities ``(L,)``, ``inf`` beyond a mean loss of 709 nats; entry l is of the
        model without layer l.

    Raises:
        ValueError: If an argument is out of range, weights are missing, or a loss is NaN; or as
            :func:`perplexity_without_block` says.
        MemoryError: If not even one sample fits into memory.
    """
    return perplexity_without_block(model, input_ids, block_size=1, batch_size=batch_size)


def perplexity_without_block(
    model: nn.Module, input_ids: torch.Tensor, *, block_size: int, batch_size: int | None = None
) -> np.ndarray:
    """Perplexity of the model without each block of layers in turn, in one sweep through them.

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
            a GPU 32,768. Where memory does not suffice it is halved, with a notice, and the batches
            that are done count.

    Returns:
        float64 perplexities ``(L - block_size + 1,)``, exp of the mean loss over all predicted
        tokens (``inf`` beyond 709 nats); entry l is of the model without layers l to l + block_size
        - 1.

    Raises:
        ValueError: If an argument is out of range, weights are missing, or a loss is NaN; if layers
            hand on more than their states, or PEFT puts trained tokens before each text.
        MemoryError: If not even one sample fits into memory.
    """
    input_ids = models.check_input_ids(model, input_ids, shortest=2)
    wrappers.refuse_own_tokens(model)
    passes.refuse_missing_weights(model)
    n_layers = len(models.decoder_layers(model))
    block_size = whole_number(
        "block_size", block_size, 1, n_layers - 1, of=f"one of {n_layers} layers must stay"
    )
    input_ids = input_ids.to(passes.input_device(model))
    n_streams = n_layers - block_size + 2
    size = memory.samples_at_once(batch_size, input_ids, n_streams)
    alone: list = [None] * n_layers

    def losses_of(samples: slice) -> np.ndarray:
        """Summed losses of some samples in each stream."""
        rows = input_ids[samples].repeat(n_streams, 1)
        try:
            with _streams(model, len(rows) // n_streams, block_size, alone):
                losses = evaluation.batch_losses(model, rows)
        except passes.Unclear:
            alone[:] = passes.arguments_alone(model, input_ids)
            return losses_of(samples)
        # A row of losses is a sample in one stream; the rows of a stream follow each other.
        return refuse_nan(losses).double().view(n_streams, -1).sum(1).numpy()

    with (
        passes.evaluation_mode(model),
        torch.no_grad(),
        tqdm(total=len(input_ids), desc="without each layer", leave=False) as progress,
    ):
        parts = memory.BatchSize(size).run(losses_of, len(input_ids), progress)
    sums = sum(parts, np.zeros(n_streams))
    with np.errstate(over="ignore"):
        return np.exp(sums[1:] / (input_ids.shape[0] * (input_ids.shape[1] - 1)))


@contextlib.contextmanager
def _streams(
    model: nn.Module, n_samples: int, block_size: int, alone: list[list | None]
) -> Iterator[None]:
    """Let the layers run on the whole model's stream and one stream for each skipped block.

    A stream has ``n_samples`` rows. The model is called with the rows of all streams, so that it
    makes masks and positions for them. The first layer takes the rows of the first stream alone;
    each other stream joins after the last layer of its block, with the states that entered it.
    """
    layers = models.decoder_layers(model)
    n_rows = (len(layers) - block_size + 2) * n_samples
    # States of the whole model before each layer that a block in progress began with.
    entered: dict[int, torch.Tensor] = {}
    # What the last layer that ran has returned.
    before: list[object] = [None]

    def forward_of(number: int, own: Callable) -> Callable:
        """What stands for the forward of one layer."""

        def forward(*given: Any, **named: object) -> object:
            """The layer on all streams that have reached it."""
            passes.refuse_named_states(given, model)
            states, *others = given
            if number == 0:
                if len(states) != n_rows:
                    raise ValueError(
                        f"{type(model).__name__} cannot be run on several sequences at once"
                    )
                states = states[:n_samples]
            entered[number] = states[:n_samples]
            passes.refuse_handed_on((others, named), before[0], model)
            reached = slice(0, len(states))
            more, by_name = passes.arguments_of_rows(
                (others, named), reached, n_rows, alone[number]
            )
            output = before[0] = own(states, *more, **by_name)
            first = number - block_size + 1
            if first < 0:
                return output
            joined = torch.cat([passes.states_in(output), entered.pop(first)])
            return passes.with_states(output, joined)

        return forward

    with contextlib.ExitStack() as undo:
        for number, layer in enumerate(layers):
            undo.enter_context(passes.replaced(layer, "forward", forward_of(number, layer.forward)))
        yield
