"""What each stage of the work takes: bytes by part at its peak, and floating-point operations.

A stage is one of the package's functions, rehearsed on the shapes that it will have. Memory is that
of one process: what torch allocates, without its libraries and the pools of its allocators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from pruning_utils import evaluation, healing, importance, models, selection, similarity
from pruning_utils.engine import head_losses, memory, passes, prefixes, trainer
from pruning_utils.engine.checks import whole_number
from pruning_utils.planning.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    Tally,
    furnished,
    outline,
    rehearsing,
)
from pruning_utils.studies.study import without_layers

WEIGHTS, COPY, TRAINED, ADAPTERS = "weights", "weights of the copy", "trained weights", "adapters"
OPTIMISER, CACHE, MERGED, SHARED = "optimiser", "KV cache", "merged weights", "shared layers"
WHOLE = "weights of the loaded model"
PARTS = (
    WHOLE,
    WEIGHTS,
    COPY,
    MERGED,
    TRAINED,
    ADAPTERS,
    GRADIENTS,
    OPTIMISER,
    ACTIVATIONS,
    LOGITS,
    CACHE,
    SHARED,
)


@dataclass(frozen=True)
class Need:
    """What a stage takes.

    Attributes:
        parts: Bytes at the peak, by what they hold, of :data:`PARTS`.
        flops: Floating-point operations of what was rehearsed; a multiplication with its addition
            is two.
    """

    parts: Mapping[str, int]
    flops: int

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def beside(self, part: str, size: int) -> Need:
        """The same with ``size`` more bytes of a part."""
        return replace(self, parts={**self.parts, part: self.parts.get(part, 0) + size})


def with_layers(few: Need, more: Need, n_more: int) -> Need:
    """What a stage takes with ``n_more`` layers more than the first of two rehearsals has.

    All layers take alike, so that every part grows with their number as between the two.

    Args:
        few: Of a model.
        more: Of the same with one layer more.
        n_more: How many layers more than in the first one.
    """
    parts = {
        part: few.parts.get(part, 0) + n_more * (more.parts.get(part, 0) - few.parts.get(part, 0))
        for part in PARTS
    }
    flops = few.flops + n_more * (more.flops - few.flops)
    return Need({part: size for part, size in parts.items() if size > 0}, flops)


def n_parameters(config: PreTrainedConfig, *, n_dropped: int = 0) -> int:
    """Number of a model's parameters without some of the layers, tied ones once."""
    return models.n_parameters(_cut(outline(config, torch.float32), n_dropped))


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype, *, n_dropped: int = 0) -> int:
    """Bytes of all weights in a type, without some of the layers."""
    return n_parameters(config, n_dropped=n_dropped) * dtype.itemsize


def scan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    seq_len: int,
    batch_size: int = 8,
    n_dropped: int = 0,
    quantize: str | None = None,
) -> Need:
    """Of one micro-batch of :func:`similarity.measure_similarity`.

    Args:
        config: Of the model.
        dtype: Of its weights.
        seq_len: Tokens in a window.
        batch_size: Windows.
        n_dropped: Layers that the model lacks; the whole one stays in memory.
        quantize: ``"nf4"`` or None.
    """
    with _ready(config, dtype, n_dropped=n_dropped, quantize=quantize) as (tally, model):
        sums = similarity.RunningSums(len(models.decoder_layers(model)))
        lengths = torch.full((batch_size,), seq_len)
        with similarity.LayerStates(model) as states, torch.no_grad():
            found = states.of(_ids(batch_size, seq_len))
            # All chunks of tokens are alike, and one row's end is as good as those of all.
            few = min(seq_len, similarity.CHUNK_TOKENS)
            before = tally.flops
            sums.add([state[:1, :few] for state in found], lengths[:1], first_sample=0)
            products = (tally.flops - before) * batch_size * seq_len // few
            return Need(_found(tally).parts, before + products)


def taylor(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    n_samples: int,
    seq_len: int,
    n_dropped: int = 0,
    on: str = "cpu",
) -> Need:
    """Of :func:`importance.taylor` on all its samples.

    Args:
        config: Of the model.
        dtype: Of its weights.
        n_samples: Windows.
        seq_len: Tokens in each.
        n_dropped: Layers that the model lacks; the whole one stays in memory.
        on: Type of the device, which decides the size of a micro-batch.
    """
    size = max(1, memory.TOKENS_AT_ONCE[on] // seq_len)
    with _ready(config, dtype, n_dropped=n_dropped) as (tally, model):
        importance.taylor(model, _ids(n_samples, seq_len), batch_size=size)
        return _found(tally)


def perplexity_without_layer(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    seq_len: int,
    n_dropped: int = 0,
    on: str = "cpu",
) -> Need:
    """Of one batch of :func:`importance.perplexity_without_layer`; arguments as for
    :func:`taylor`."""
    n_streams = config.get_text_config(decoder=True).num_hidden_layers + 1 - n_dropped
    size = max(1, memory.TOKENS_AT_ONCE[on] // (n_streams * seq_len))
    with _ready(config, dtype, n_dropped=n_dropped) as (tally, model):
        importance.perplexity_without_layer(model, _ids(size, seq_len), batch_size=size)
        return _found(tally)


def losses(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    seq_len: int,
    batch_size: int = 8,
    n_dropped: int = 0,
) -> Need:
    """Of one batch of :func:`evaluation.token_losses`, with the whole model's weights in memory.

    Args:
        config: Of the model.
        dtype: Of its weights.
        seq_len: Tokens in a window.
        batch_size: Windows.
        n_dropped: Layers that the model lacks.
    """
    with _ready(config, dtype, n_dropped=n_dropped) as (tally, model):
        evaluation.token_losses(model, _ids(batch_size, seq_len), batch_size=batch_size)
        return _found(tally)


def questions(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    n_tokens: int,
    n_shared: int = 0,
    answer_tokens: int = 4,
    batch_size: int = 8,
    n_dropped: int = 0,
) -> Need:
    """Of one batch of questions, as :func:`evaluation.evaluate_tasks` runs them.

    Args:
        config: Of the model.
        dtype: Of its weights.
        n_tokens: Tokens of a question and its answers, without those that all share.
        n_shared: Tokens of the shots in front of them, whose keys and values are kept.
        answer_tokens: How many of the tokens are answers.
        batch_size: Questions.
        n_dropped: Layers that the model lacks.
    """
    prompt = max(1, n_tokens - answer_tokens)
    # Their first tokens differ, lest the questions themselves count as shared.
    asked = [
        ([0] * n_shared + [1 + number] * prompt, [0] * answer_tokens)
        for number in range(batch_size)
    ]
    with _ready(config, dtype, n_dropped=n_dropped) as (tally, model):
        rows = [prefixes.tree_of([(number, *one)], n_shared) for number, one in enumerate(asked)]
        found = prefixes.Found(np.zeros(batch_size), np.ones(batch_size, dtype=bool))
        with passes.evaluation_mode(model), torch.no_grad():
            with tally.making(CACHE):
                cached = prefixes.cached_beginning(model, (0,) * n_shared)
            tally.begin()
            prefixes.add_batch(model, rows, n_shared, cached, found)
        of_beginning = sum(keys.nbytes + values.nbytes for keys, values in cached)
        # The beginning itself, and a copy for each row, with the row's own tokens behind it.
        n_held = n_shared + batch_size * (n_shared + n_tokens - 1) if n_shared else 0
        return _with_cache(_found(tally), of_beginning * n_held // max(1, n_shared))


def generation(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    n_dropped: int = 0,
) -> tuple[Need, Need]:
    """Of the prompts, and of the last new token, in :func:`efficiency.generation_speed`.

    Args:
        config: Of the model.
        dtype: Of its weights.
        batch_size: Texts at once.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens that are generated after it.
        n_dropped: Layers that the model lacks.
    """
    found = []
    for before, tokens in ((0, prompt_tokens), (prompt_tokens + new_tokens - 2, 1)):
        with _ready(config, dtype, n_dropped=n_dropped, whole=False) as (tally, model):
            cache = _cache(tally, model, batch_size, before)
            with torch.no_grad():
                model(
                    _ids(batch_size, tokens),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            found.append(_with_cache(_found(tally), held))
    return found[0], found[1]


def heal(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    seq_len: int,
    n_dropped: int = 0,
    merge: bool = True,
    checkpointing: bool | None = None,
    **settings: Any,
) -> tuple[Need, Need, Need]:
    """Of :func:`healing.heal`: passes and optimiser of one of its later steps, and its end.

    Args:
        config: Of the whole model, which stays in memory.
        dtype: Of its weights.
        seq_len: Tokens in a window.
        n_dropped: Layers that the model to heal lacks.
        merge: As of :func:`healing.heal`.
        checkpointing: Whether activations are computed again instead of kept; None: as there on a
            processor, by the number of parameters.
        settings: Further keywords of :func:`healing.heal`.

    Returns:
        The first has the operations of the whole step, the others none.

    Raises:
        ValueError: As of :func:`healing.check_settings`.
    """
    loaded = outline(config, dtype)
    pruned = _cut(loaded, n_dropped)
    complete = healing.check_settings(pruned, settings)
    trained = healing.trainable_copy(pruned, complete)
    has_adapters = complete["method"] in healing.ADAPTERS
    with rehearsing(config) as tally:
        furnished(loaded, tally, {}, part=WEIGHTS)
        furnished(trained, tally, {}, part=COPY, trained=ADAPTERS if has_adapters else TRAINED)
        if checkpointing is None:
            checkpointing = sum(map(torch.numel, trained.parameters())) > trainer.LARGE
        if checkpointing and trained.supports_gradient_checkpointing:
            trained.activation_checkpointing_enable()
        passing, stepping = _step(
            trained, tally, complete["batch_size"], seq_len, dtype == torch.bfloat16
        )
        # Gradients and the optimiser may outlive their Trainer, which refers to itself.
        ending = Need({part: size for part, size in tally.now.items() if size}, 0)
    if merge and complete["method"] == "qlora":
        ending = ending.beside(MERGED, sum(weight.nbytes for weight in pruned.parameters()))
    return passing, stepping, ending


def _step(
    model: nn.Module, tally: Tally, batch_size: int, seq_len: int, in_bfloat16: bool
) -> tuple[Need, Need]:
    """Passes and optimiser of a step of :mod:`engine.trainer`, with the optimiser's states there.

    Micro-batches after the first one find the gradients of those before.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    size = trainer.micro_batch_size(batch_size, seq_len)
    model.train()
    optimiser = torch.optim.AdamW(trained, fused=True)
    for weight in trained:
        with tally.making(GRADIENTS):
            weight.grad = torch.zeros_like(weight)
        weight.register_post_accumulate_grad_hook(
            lambda weight: tally.becomes(weight.grad, GRADIENTS)
        )
    with tally.making(OPTIMISER):
        optimiser.step()
    if size == batch_size:
        optimiser.zero_grad()
    tally.begin()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        loss = head_losses.mean_loss(model, _ids(size, seq_len))
    loss.backward()
    passing = _found(tally)
    del loss
    tally.begin()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    stepping = _found(tally)
    optimiser.zero_grad()
    flops = passing.flops * (batch_size // size)
    return replace(passing, flops=flops), replace(stepping, flops=0)


# --- rehearsals -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _ready(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    n_dropped: int = 0,
    quantize: str | None = None,
    whole: bool = True,
) -> Iterator[tuple[Tally, nn.Module]]:
    """A model without some layers, in evaluation mode, beside the whole one if asked for."""
    loaded = outline(config, dtype)
    pruned = _cut(loaded, n_dropped)
    if quantize == "nf4":
        pruned = loaded = models.quantized_copy(pruned)
    with rehearsing(config) as tally:
        made: dict = {}
        if whole:
            furnished(loaded, tally, made, part=WEIGHTS)
        furnished(pruned, tally, made, part=WEIGHTS)
        tally.begin()
        yield tally, pruned


def _cut(model: nn.Module, n_dropped: int) -> nn.Module:
    """A model on ``meta`` without that many layers, the deepest but the last one."""
    n_layers = len(models.decoder_layers(model))
    whole_number("n_dropped", n_dropped, 0, n_layers - 1)
    if not n_dropped:
        return model
    return without_layers(model, selection.deepest(n_layers, n_dropped, keep_last=0))


def _found(tally: Tally) -> Need:
    return Need({part: tally.at_peak[part] for part in PARTS if part in tally.at_peak}, tally.flops)


def _with_cache(need: Need, size: int) -> Need:
    """The same, with what of the activations is a key-value cache of ``size`` bytes named so."""
    activations, before = (need.parts.get(part, 0) for part in (ACTIVATIONS, CACHE))
    moved = max(0, min(activations, size - before))
    parts = {**need.parts, ACTIVATIONS: activations - moved, CACHE: before + moved}
    return replace(need, parts={part: parts[part] for part in PARTS if parts.get(part)})


def _ids(n_rows: int, n_tokens: int) -> torch.Tensor:
    return torch.zeros(n_rows, n_tokens, dtype=torch.long)


def _cache(tally: Tally, model: nn.Module, batch_size: int, n_tokens: int) -> DynamicCache:
    """A cache that holds keys and values of that many tokens."""
    cache = DynamicCache()
    if n_tokens:
        with tally.making(CACHE), torch.no_grad():
            model(
                _ids(batch_size, n_tokens), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
    tally.begin()
    return cache
