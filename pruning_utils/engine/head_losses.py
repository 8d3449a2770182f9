"""The loss that a model is trained with, without the logits of a whole batch.

A vocabulary may have 260,000 entries, so logits take more memory than all that the layers keep.
Here the layers run once, then head and loss on a few tokens at a time. Where gradients are asked
for, those of a part are computed while its logits are there, and only they are kept: no product of
the head is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pruning_utils.engine import passes, wrappers

# In one part, or fewer where the vocabulary has more than 2**18 entries. Its logits exist about
# three times over, 3 * 128 MiB at most in float32. Each part reads all weights of the head and,
# where they are trained, adds to all their gradients, so that many small parts take longer.
TOKENS_AT_ONCE = 128
# float32 copies of logits that exist anyway: 16 MiB.
COPIED_LOGITS = 2**22

# Summed loss of the tokens (n,) that follow final states (n, D).
PartLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mean_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats over every token but the first of each window.

    Args:
        model: A causal language model, quantised or with adapters if need be, in any mode. Where
            its head cannot run apart from its layers, all logits exist at once.
        ids: Token ids of shape ``(B, T)``, T at least 2, int64, on the model's device.

    Returns:
        A float32 number. Its gradients reach every weight that requires them, once: a second
        backward pass is refused.
    """
    return _summed_loss(model, ids) / ids[:, 1:].numel()


def _summed_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    backbone, output = passes.run_backbone(model, ids)
    if backbone is None:
        return loss_of_logits(model(input_ids=ids, use_cache=False).logits, ids)

    def part_loss(states: torch.Tensor, follow: torch.Tensor) -> torch.Tensor:
        """By the architecture's own code around the head."""
        (logits,) = passes.head_logits(model, backbone, output, states)
        return nn.functional.cross_entropy(logits, follow, reduction="sum")

    most = passes.LOGITS_AT_ONCE // wrappers.vocabulary_size(model)
    size = max(1, min(TOKENS_AT_ONCE, most))
    states = output.last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or weights):
        return _with_gradients(part_loss, states, targets, weights, size)
    return sum(map(part_loss, states.split(size), targets.split(size)))


def loss_of_logits(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats of every token but the first of each window, under logits that exist.

    Args:
        logits: ``(B, T, V)``, in any precision; float32 copies exist of a few tokens at a time.
        ids: Token ids, ``(B, T)``.
    """
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    size = max(1, COPIED_LOGITS // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(size), targets.split(size), strict=True)
    return sum(
        checkpoint(_loss_of_rows, *part, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    )


def _loss_of_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _with_gradients(
    part_loss: PartLoss,
    states: torch.Tensor,
    targets: torch.Tensor,
    weights: Sequence[torch.Tensor],
    size: int,
) -> torch.Tensor:
    """The summed loss of all parts, with its gradients.

    Args:
        part_loss: Summed loss of a part.
        states: Final states ``(n, D)``.
        targets: The tokens ``(n,)`` that follow.
        weights: Leaves that require gradients. The head may be made of any of them; that the states
            depend on them, too, is seen to by the backward pass.
        size: States in a part, at most.
    """
    total = torch.zeros((), device=states.device)
    gradients: dict[torch.Tensor, torch.Tensor] = {}
    for start in range(0, len(states), size):
        rows = slice(start, start + size)
        part = states[rows].detach().requires_grad_(states.requires_grad)
        loss = part_loss(part, targets[rows])
        total += loss.detach()
        sources: dict = {weight: (weight, ...) for weight in weights}
        if states.requires_grad:
            sources[part] = (states, rows)
        _add_gradients(loss, sources, gradients)
    return _Known.apply(total, [*gradients.values()], *gradients)


def _add_gradients(
    loss: torch.Tensor,
    sources: dict[torch.Tensor, tuple[torch.Tensor, Any]],
    gradients: dict[torch.Tensor, torch.Tensor],
) -> None:
    """Add the gradients of a part's loss, where there are any, to those of all parts.

    Args:
        loss: The loss, whose graph is used up.
        sources: What the loss may depend on, and which rows, or all (...), of which tensor that is.
        gradients: Gradients of these tensors, in place; those that the loss never depends on have
            none.
    """
    if not loss.requires_grad:
        return
    # Products of the backward pass have the types of those of the forward pass.
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, [*sources], allow_unused=True)
    for (tensor, rows), gradient in zip(sources.values(), found, strict=True):
        if gradient is None:
            continue
        if tensor not in gradients:
            # What is returned may share its memory with another gradient.
            gradients[tensor] = torch.zeros_like(tensor)
        gradients[tensor][rows].add_(gradient)


class _Known(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        """The value; each of the inputs has its gradient in the list."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple:
        """The gradients, scaled in place: that of a head takes as much memory as the head."""
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss have been used: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(incoming) for gradient in gradients)
