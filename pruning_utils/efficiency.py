"""What a model costs: stored parameters and bytes, arithmetic, and measured time and memory of
generation."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning_utils import models, runtime


def stored_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, each tensor counted once however many modules share it.

    Returns:
        ``layers`` (of all decoder layers), ``other`` (embedding, head where it is not tied, final
        norm), ``total``, and ``bytes`` (of parameters and buffers as they lie in memory; 4-bit
        weights hold two parameters a byte).

    Raises:
        ValueError: If the weights are quantised: their number is then not that of the tensors.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "parameters of quantised weights cannot be counted by their tensors: count before "
            "quantising"
        )
    tensors = list({id(weight): weight for weight in model.parameters()}.values())
    total = sum(weight.numel() for weight in tensors)
    layers = sum(
        weight.numel() for layer in models.decoder_layers(model) for weight in layer.parameters()
    )
    return {"layers": layers, "other": total - layers, "total": total, "bytes": weight_bytes(model)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, quantised ones with their statistics, each counted
    once."""
    found = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found[tensor.data_ptr(), tensor.shape] = tensor.nbytes
            state = getattr(tensor, "quant_state", None)
            nested = [
                getattr(part, "absmax", None) for part in (state, getattr(state, "state2", None))
            ]
            found |= {
                (part.data_ptr(), part.shape): part.nbytes for part in nested if part is not None
            }
    return sum(found.values())


def forward_flops(model: nn.Module, *, batch_size: int, n_tokens: int) -> int:
    """Floating-point operations of one forward pass over ``batch_size`` texts of ``n_tokens``, head
    on every token.

    Matrix products and attention as PyTorch's own counter counts them, two operations a
    multiplication and addition.
    """
    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch_size, n_tokens, dtype=torch.long, device=device), use_cache=False)
    return counter.get_total_flops()


def generation_speed(
    model: nn.Module,
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    warmups: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of greedy generation of a forced length with the key-value cache, measured step by step.

    Args:
        model: A causal language model in evaluation mode.
        batch_size: Texts generated at once, at least 1.
        prompt_tokens: Tokens of each prompt, drawn at random: speed does not depend on what they
            say.
        new_tokens: Tokens generated after it, at least 2; an end-of-text token does not end them.
        warmups: Runs that are not measured.
        repeats: Runs that are, at least 1.
        seed: Seed of the prompts.

    Returns:
        A row a run: ``first_token_seconds`` (from the prompt to the first new token),
        ``per_token_seconds`` (mean of the later ones), ``tokens_per_second`` (new tokens of all
        texts over the whole time) and ``peak_bytes`` (as :func:`runtime.peak_memory_bytes`).

    Raises:
        ValueError: If a number is out of range, or prompt and answer are longer than the model's
            context.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("warmups", warmups, 0),
        ("repeats", repeats, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if prompt_tokens + new_tokens > (longest := models.context_length(model.config)):
        raise ValueError(
            f"prompt_tokens + new_tokens must be at most the model's context of {longest}, got "
            f"{prompt_tokens + new_tokens}"
        )
    weight = model.get_input_embeddings().weight
    prompts = torch.randint(
        weight.shape[0], (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(seed)
    )
    rows = []
    for run in range(warmups + repeats):
        if weight.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        moments = _generation_moments(model, prompts.to(weight.device), new_tokens)
        if run >= warmups:
            rows.append(
                {
                    "first_token_seconds": moments[1] - moments[0],
                    "per_token_seconds": (moments[-1] - moments[1]) / (new_tokens - 1),
                    "tokens_per_second": batch_size * new_tokens / (moments[-1] - moments[0]),
                    "peak_bytes": runtime.peak_memory_bytes(),
                }
            )
    return pd.DataFrame(rows)


def _generation_moments(model: nn.Module, tokens: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds on the clock at the start and after each new token."""
    from transformers import DynamicCache

    def now() -> float:
        """Seconds, once what was asked of the device is done."""
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    cache, moments = DynamicCache(), [now()]
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            moments.append(now())
    return moments


def machine_limits(
    *, dtype: str = runtime.AUTO, size: int = 2048, repeats: int = 5
) -> dict[str, float | str]:
    """The two rates that bound any model here: the roof of arithmetic and the slope of memory in a
    roofline figure.

    Args:
        dtype: As for :func:`models.load_model`.
        size: Rows of the square matrices of the product; reading uses 16 times as many rows, beyond
            any cache.
        repeats: Measurements, of which the fastest counts, at least 1.

    Returns:
        ``dtype``, ``flops_per_second`` of a matrix product, and ``bytes_per_second`` of reading a
        matrix for one vector.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    kind, device = runtime.resolve_dtype(dtype), runtime.choose_device()
    square = torch.ones(size, size, dtype=kind, device=device)
    tall = torch.ones(16 * size, size, dtype=kind, device=device)
    vector = torch.ones(size, dtype=kind, device=device)
    product = min(_seconds(lambda: square @ square) for _ in range(repeats + 1))
    reading = min(_seconds(lambda: nn.functional.linear(vector, tall)) for _ in range(repeats + 1))
    return {
        "dtype": runtime.dtype_name(kind),
        "flops_per_second": 2 * size**3 / product,
        "bytes_per_second": tall.nbytes / reading,
    }


def _seconds(run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
