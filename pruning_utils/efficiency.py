"""What a model costs: parameters, bytes, arithmetic, and measured time and memory of generation."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from pruning_utils import models, runtime
from pruning_utils.engine import passes, wrappers
from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import flop_counter, nn, torch

# Names under which a model gives and takes what it keeps from one token to the next.
CACHES = ("past_key_values", "cache_params", "state")
# Runs between two looks at the clock, where a run takes as long as it takes to start it.
LAUNCHES = 20


def stored_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, each tensor counted once however many modules share it.

    Returns:
        ``layers`` (of all decoder layers), ``other`` (embedding, head where it is not tied, final
        norm), ``total``, and ``bytes`` (of parameters and buffers as they lie in memory; 4-bit
        weights hold two parameters a byte).

    Raises:
        ValueError: If the weights are quantised: their number is then not that of the tensors; or
            if weights are missing, or it is no model of transformers.
    """
    wrappers.refuse_wrapped(model)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "parameters of quantised weights cannot be counted by their tensors: count before "
            "quantising"
        )
    total = models.n_parameters(model)
    of_layers = {
        id(weight): weight.numel()
        for layer in models.decoder_layers(model)
        for weight in layer.parameters()
    }
    layers = sum(of_layers.values())
    return {"layers": layers, "other": total - layers, "total": total, "bytes": weight_bytes(model)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once.

    The scales of weights in NF4 count too. Those of LLM.int8, four bytes a row, do not.

    Args:
        model: A model, or a layer of one, whose weights are in memory.

    Raises:
        ValueError: If a weight is not there (device ``meta``), or it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module of PyTorch, got {model!r}")
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"the weights must be in memory, but {name} is on the device meta")
        state = getattr(tensor, "quant_state", None)
        scales = getattr(state, "absmax", None)
        scales_of_scales = getattr(getattr(state, "state2", None), "absmax", None)
        for part in (tensor, scales, scales_of_scales):
            if part is not None:
                found[part.data_ptr(), part.shape] = part.nbytes
    return sum(found.values())


def forward_flops(model: nn.Module, *, batch_size: int, n_tokens: int) -> int:
    """Floating-point operations of one forward pass with the head on every token.

    PyTorch's own counter counts matrix products and attention, the latter as matrix products too:
    it knows the fused kernels of some devices only. A multiplication with its addition is two
    operations.

    Args:
        model: A causal language model.
        batch_size: Texts in the pass, at least 1.
        n_tokens: Tokens of each text, at most the model's context length.

    Raises:
        ValueError: If a number is out of range, or the model is none of transformers, quantised, or
            without a head.
    """
    wrappers.refuse_wrapped(model, with_head=True)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "operations are counted for 16- or 32-bit weights, but this model's are quantised: "
            "load it with quantize=None"
        )
    whole_number("batch_size", batch_size, 1)
    whole_number("n_tokens", n_tokens, 1, models.context_length(model.config))
    device = passes.input_device(model)
    counter = flop_counter.FlopCounterMode(
        display=False,
        # It does not know the product of each token with the weights of its experts.
        custom_mapping={torch.ops.aten._grouped_mm: _grouped_operations},
    )
    with (
        torch.no_grad(),
        passes.evaluation_mode(model),
        passes.frozen_weights(model),  # the counter stumbles over views of those that are not
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        counter,
    ):
        model(torch.zeros(batch_size, n_tokens, dtype=torch.long, device=device), use_cache=False)
    return counter.get_total_flops()


def _grouped_operations(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    """Of rows ``(n, D)`` in groups, each multiplied by the matrix of its group, ``(E, D, F)``."""
    return 2 * left[0] * left[1] * right[-1]


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
        model: A causal language model; it runs in evaluation mode.
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
        ValueError: If a number is out of range, weights or the head are missing, or prompt and
            answer are longer than the model's context.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("warmups", warmups, 0),
        ("repeats", repeats, 1),
        ("seed", seed, 0),
    ):
        whole_number(name, value, least)
    passes.refuse_missing_weights(model, with_head=True)
    passes.refuse_wrong_numbers(model)
    longest = models.context_length(model.config)
    if prompt_tokens + new_tokens > longest:
        raise ValueError(
            f"prompt_tokens + new_tokens must be at most the model's context of {longest}, got "
            f"{prompt_tokens + new_tokens}"
        )
    device = passes.input_device(model)
    prompts = torch.randint(
        wrappers.vocabulary_size(model),
        (batch_size, prompt_tokens),
        generator=torch.Generator().manual_seed(seed),
    )
    rows = []
    for run in range(warmups + repeats):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with passes.evaluation_mode(model):
            moments = _generation_moments(model, prompts.to(device), new_tokens)
        if run >= warmups:
            rows.append(
                {
                    "first_token_seconds": moments[1] - moments[0],
                    "per_token_seconds": (moments[-1] - moments[1]) / (new_tokens - 1),
                    "tokens_per_second": batch_size * new_tokens / (moments[-1] - moments[0]),
                    "peak_bytes": runtime.peak_memory_bytes(device),
                }
            )
    return pd.DataFrame(rows)


def _generation_moments(model: nn.Module, tokens: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds on the clock at the start and after each new token."""
    kept: dict[str, object] = {}
    moments = [runtime.clock(tokens.device)]
    with torch.no_grad(), passes.named_outputs(model):
        for _ in range(new_tokens):
            output = model(tokens, **kept, use_cache=True, logits_to_keep=1)
            # Each architecture makes the cache that it needs, of states of another kind too.
            kept = {name: output[name] for name in CACHES if output.get(name) is not None}
            tokens = output.logits[:, -1:].argmax(-1)
            moments.append(runtime.clock(tokens.device))
    return moments


def machine_limits(
    *, dtype: str = runtime.AUTO, size: int = 2048, repeats: int = 5
) -> dict[str, float | str]:
    """The two rates that bound any model on this machine: of arithmetic and of reading memory.

    In a roofline figure they are the flat roof and the slope.

    Args:
        dtype: ``auto`` (bfloat16 where the device multiplies it natively, float32 elsewhere),
            ``bfloat16``, ``float16`` or ``float32``.
        size: Rows of the square matrices of the product, at least 1. The matrix that is read has
            16 times as many rows, so that no cache holds it.
        repeats: Measurements, of which the fastest counts, at least 1.

    Returns:
        ``dtype``, ``flops_per_second`` of a matrix product, and ``bytes_per_second`` of reading a
        matrix for one vector.

    Raises:
        ValueError: If a number is below 1, or the dtype is unknown.
    """
    whole_number("size", size, 1)
    whole_number("repeats", repeats, 1)
    kind, device = runtime.resolve_dtype(dtype), runtime.choose_device()
    square = torch.ones(size, size, dtype=kind, device=device)
    tall = torch.ones(16 * size, size, dtype=kind, device=device)
    vector = torch.ones(size, dtype=kind, device=device)

    def seconds(run: Callable[[], object]) -> float:
        """Of the fastest of some measurements, a run."""
        together = 1 if device.type == "cpu" else LAUNCHES
        taken = []
        for _ in range(repeats + 1):
            started = runtime.clock(device)
            for _ in range(together):
                run()
            taken.append((runtime.clock(device) - started) / together)
        return min(taken)

    product = seconds(lambda: square @ square)
    reading = seconds(lambda: nn.functional.linear(vector, tall))
    return {
        "dtype": runtime.dtype_name(kind),
        "flops_per_second": 2 * size**3 / product,
        "bytes_per_second": tall.nbytes / reading,
    }
