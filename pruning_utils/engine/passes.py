"""Parts of a model's forward pass: layers and head apart, functions replaced for a while, and first
layers that several models share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from pruning_utils import models, runtime

LOGITS_AT_ONCE = 2**25  # float32 logits alive at a time: 128 MiB


@contextlib.contextmanager
def replaced(module: object, name: str, function: Callable) -> Iterator[None]:
    """Let an attribute of this one module, of torch or of Python, be another function for a
    while."""
    before = {key: value for key, value in vars(module).items() if key == name}
    vars(module)[name] = function
    try:
        yield
    finally:
        del vars(module)[name]
        vars(module).update(before)


def run_backbone(
    model: nn.Module, batch: torch.Tensor, **inputs
) -> tuple[nn.Module | None, object]:
    """The module that the head is applied to, and its output for token ids ``(B, T)``; (None, None)
    where the two cannot be parted."""
    causal = causal_model(model)
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        return None, None
    outputs = {}
    # Most models call their base model; OPT calls the decoder inside it, and Llama 4 has it under
    # another name.
    candidates = (causal.base_model, causal.get_decoder(), getattr(causal, "model", causal))
    with contextlib.ExitStack() as hooks:
        for module in set(candidates) - {causal}:
            hooks.enter_context(
                module.register_forward_hook(lambda *call: outputs.update({call[0]: call[2]}))
            )
        # The head is applied afterwards, to what is asked: for a last token of each row alone it
        # may cost five times what all layers do.
        hooks.enter_context(
            replaced(model.get_output_embeddings(), "forward", lambda states: states[..., :1])
        )
        model(batch, logits_to_keep=1, **{"use_cache": False, **inputs})
    backbone = next((module for module in candidates if module in outputs), None)
    states = getattr(outputs.get(backbone), "last_hidden_state", None)
    return (
        (backbone, outputs[backbone])
        if states is not None and states.shape[:2] == batch.shape
        else (None, None)
    )


def head_logits(
    model: nn.Module, backbone: nn.Module, output: object, states: torch.Tensor
) -> Iterator[torch.Tensor]:
    """float32 logits (n, V) of final states (m, D), a few at a time, by the architecture's own code
    around the head."""
    for part in states.split(max(1, LOGITS_AT_ONCE // model.get_input_embeddings().num_embeddings)):
        known = type(output)(**{**output, "last_hidden_state": part[None]})
        with replaced(backbone, "forward", lambda *_, known=known, **__: known):
            tokens = torch.zeros(1, len(part), dtype=torch.long, device=part.device)
            yield model(tokens, use_cache=False).logits[0].float()


def causal_model(model: nn.Module) -> nn.Module:
    """The causal language model itself, which adapters wrap."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class SharedLayers:
    """First layers that several models have in common, run once for each batch they all see.

    Outputs of the layers are kept in memory, up to a number of bytes; what does not fit is computed
    again.

    Args:
        depths: Numbers of first layers that later models share; outputs are kept there only.
        most_bytes: Bytes to keep, at most.
    """

    def __init__(self, depths: Sequence[int], *, most_bytes: int = 4 * 2**30):
        self.depths, self.room, self.kept = set(depths), most_bytes, {}

    @contextlib.contextmanager
    def used_by(self, model: nn.Module, n_shared: int) -> Iterator[None]:
        """Take the outputs of the model's first ``n_shared`` layers from what is kept, and keep
        them where missing."""
        layers = models.decoder_layers(model)
        with contextlib.ExitStack() as undo:
            undo.enter_context(
                models.backbone(causal_model(model)).register_forward_pre_hook(
                    lambda _, given, named: self._begin(given, named, n_shared), with_kwargs=True
                )
            )
            for depth, layer in enumerate(layers[:n_shared], start=1):
                undo.enter_context(replaced(layer, "forward", self._forward(layer.forward, depth)))
            yield

    def _begin(self, given: tuple, named: dict, n_shared: int) -> None:
        self.known, self.depth = None, 0
        if named.get("use_cache"):  # skipped layers would leave holes in a key-value cache
            return
        tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
        self.known = self.kept.setdefault(
            runtime.tensor_digest({str(n): part for n, part in enumerate(tensors)}), {}
        )
        self.depth = max((depth for depth in self.known if depth <= n_shared), default=0)

    def _forward(self, own: Callable, depth: int) -> Callable:
        def forward(*given, **named):
            if depth <= self.depth:
                return self.known[self.depth]  # skipped layers pass on what the last of them gave
            output = own(*given, **named)
            size = sum(
                part.nbytes
                for part in (output if isinstance(output, tuple) else (output,))
                if isinstance(part, torch.Tensor)
            )
            if self.known is not None and depth in self.depths and size <= self.room:
                self.known[depth] = output
                self.room -= size
            return output

        return forward
