"""Beginnings of texts that several requests share are computed once.

Answers to one question share its prompt, and questions share their shots. Here every distinct
beginning of a token sequence passes through the model once: what many prompts share goes into a
key-value cache, and each row of a batch holds a tree of tokens (a prompt with its answers), in
which a token sees those on its path from the root and no others.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pruning_utils import models
from pruning_utils.engine import passes
from pruning_utils.engine.bars import tqdm


def language_model(model: nn.Module, tokenizer, batch_size: int):
    """lm-eval's Hugging Face backend for a model in memory, which encodes what requests share only
    once.

    Log-likelihoods are those of the stock backend up to rounding, which also takes what this
    cannot: models whose layers keep a state or look through a window or cannot be told positions,
    and prompts beyond the context length.
    """
    from lm_eval.models.huggingface import HFLM

    class SharingLM(HFLM):
        def loglikelihood(self, requests, disable_tqdm=True):
            # No bar for what takes a moment.
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            most = min(longest_shared(self.model), self.max_length)
            fits = [len(prompt) + len(answer) <= most + 1 for _, prompt, answer in requests]
            left = [request for request, fit in zip(requests, fits, strict=True) if not fit]
            known = iter(
                super()._loglikelihood_tokens(left, disable_tqdm, override_bs) if left else []
            )
            found = iter(
                loglikelihoods(
                    self.model,
                    [request[1:] for request, fit in zip(requests, fits, strict=True) if fit],
                    batch_size=self.batch_size,
                )
            )
            return [next(found if fit else known) for fit in fits]

    # HFLM ties weights again, which would undo an untied head, and sets a mode that is set already.
    with (
        passes.replaced(model, "tie_weights", lambda: None),
        passes.replaced(model, "eval", lambda: model),
    ):
        return SharingLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
        )


def longest_shared(model: nn.Module) -> float:
    """Tokens up to which a model takes masks and positions of our making: 0 for none, ``inf`` for
    no bound of its own.

    Layers that look through a window take them while all tokens fit into it.
    """
    causal, config = passes.causal_model(model), models.text_config(model)
    takes = set(inspect.signature(causal.forward).parameters)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (
        not {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} <= takes
        or not kinds <= {"full_attention", "sliding_attention"}
        or getattr(causal, "_is_stateful", False)
        or getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager")
    ):
        return 0
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    if "local" in getattr(config, "attention_layers", ()):  # as GPT-Neo names it
        window = config.window_size
    return window or math.inf


def loglikelihoods(
    model: nn.Module, requests: Sequence[tuple[list[int], list[int]]], *, batch_size: int
) -> list[tuple[float, bool]]:
    """Log-likelihoods of answers after prompts.

    Args:
        model: A causal language model in evaluation mode.
        requests: Token ids of prompt and answer, at least one each, together at most
            :func:`longest_shared` plus one: an answer's last token is never an input.
        batch_size: Rows in a forward pass; a row holds a prompt with its answers, or prompts that
            share half.

    Returns:
        For each request, in the order given, ``(sum of the log-probabilities in nats, whether
        greedy decoding would give the answer)``.
    """
    answers: dict[tuple, list[int]] = {}
    for number, (prompt, _) in enumerate(requests):
        answers.setdefault(tuple(prompt), []).append(number)
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    groups = _groups(sorted(answers), batch_size)
    with (
        torch.no_grad(),
        tqdm(total=len(requests), desc="log-likelihoods", leave=False) as progress,
    ):
        for beginning, prompts_of_rows in groups:
            rows = [
                _tree(
                    [
                        (number, *requests[number])
                        for prompt in prompts
                        for number in answers[prompt]
                    ],
                    len(beginning),
                )
                for prompts in prompts_of_rows
            ]
            rows.sort(key=lambda row: -len(row.tokens))
            cached = _cached(model, beginning)
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                _add_batch(model, batch, len(beginning), cached, sums, greedy)
                progress.update(len({number for row in batch for number, *_ in row.predicted}))
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _groups(prompts: list[tuple], batch_size: int) -> list[tuple[tuple, list[list[tuple]]]]:
    """Sorted prompts as (beginning to be cached, prompts by row): a cache pays where it fills more
    than one batch."""
    alone, groups = [], []
    for run in _runs(prompts, 0, len(prompts)):
        beginning = run[0][: min(_n_shared(run[0], run[-1]), min(map(len, run)) - 1)]
        if len(run) > batch_size:
            groups.append((beginning, _runs(run, len(beginning), batch_size)))
        else:
            alone.append(run)
    return groups + [((), alone)] * bool(alone)


def _runs(prompts: list[tuple], start: int, most: int) -> list[list[tuple]]:
    """Neighbours in the sorted list that share at least half of what each has after ``start``,
    ``most`` in a run."""
    runs: list[list[tuple]] = []
    for prompt in prompts:
        if runs and len(runs[-1]) < most:
            lengths = len(prompt), max(map(len, runs[-1]))
            if 2 * (_n_shared(runs[-1][0], prompt) - start) >= max(lengths) - start:
                runs[-1].append(prompt)
                continue
        runs.append([prompt])
    return runs


def _n_shared(first: tuple, second: tuple) -> int:
    return next(
        (
            place
            for place, (one, other) in enumerate(zip(first, second, strict=False))
            if one != other
        ),
        min(len(first), len(second)),
    )


class _Tree(NamedTuple):
    """Tokens of a row, the place of each in its text, which tokens it sees (T, T), and what is
    predicted where: (number of the request, index of the token after which, token)."""

    tokens: list[int]
    places: list[int]
    sees: np.ndarray
    predicted: list[tuple[int, int, int]]


def _tree(requests: list[tuple[int, list[int], list[int]]], start: int) -> _Tree:
    """The tree of a row's requests (number, prompt, answer) without their first ``start``
    tokens."""
    index: dict[tuple[int, int], int] = {}
    tokens, places, parents, predicted = [], [], [], []
    for number, prompt, answer in requests:
        sequence, node = [*prompt, *answer], -1
        for place in range(start, len(sequence) - 1):
            parent, node = node, index.setdefault((node, sequence[place]), len(tokens))
            if node == len(tokens):
                tokens.append(sequence[place])
                places.append(place)
                parents.append(parent)
            if place >= len(prompt) - 1:
                predicted.append((number, node, sequence[place + 1]))
    sees = np.eye(len(tokens), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return _Tree(tokens, places, sees, predicted)


def _cached(model: nn.Module, beginning: tuple) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer for the beginning that prompts share; empty where they share
    nothing."""
    if not beginning:
        return []
    device = model.get_input_embeddings().weight.device
    _, output = passes.run_backbone(model, torch.tensor([beginning], device=device), use_cache=True)
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def _add_batch(
    model: nn.Module,
    rows: list[_Tree],
    start: int,
    cached: list,
    sums: np.ndarray,
    greedy: np.ndarray,
) -> None:
    """Run one batch of rows, and add what it tells to the requests' sums and whether they are
    greedy."""
    from transformers import DynamicCache

    longest, device = len(rows[0].tokens), model.get_input_embeddings().weight.device
    tokens, places = (np.zeros((len(rows), longest), dtype=np.int64) for _ in range(2))
    sees = np.zeros((len(rows), 1, longest, start + longest), dtype=bool)
    # Padding sees itself, lest it be NaN.
    sees[..., :start] = True
    sees[..., start:] = np.eye(longest, dtype=bool)
    for number, row in enumerate(rows):
        size = len(row.tokens)
        tokens[number, :size], places[number, :size] = row.tokens, row.places
        sees[number, 0, :size, start : start + size] = row.sees
    hidden = torch.zeros(sees.shape, dtype=model.dtype).masked_fill_(
        torch.from_numpy(~sees), torch.finfo(model.dtype).min
    )
    inputs = {
        "attention_mask": hidden.to(device),
        "position_ids": torch.from_numpy(places).to(device),
    }
    if cached:
        inputs |= {"past_key_values": DynamicCache(), "use_cache": True}
        for layer, pair in enumerate(cached):
            inputs["past_key_values"].update(
                *(part.expand(len(rows), -1, -1, -1) for part in pair), layer
            )
    backbone, output = passes.run_backbone(model, torch.from_numpy(tokens).to(device), **inputs)
    flat = np.array(
        [
            (number, place * longest + node, token)
            for place, row in enumerate(rows)
            for number, node, token in row.predicted
        ]
    )
    wanted, which = np.unique(flat[:, 1], return_inverse=True)
    states, first = output.last_hidden_state.flatten(0, 1)[torch.from_numpy(wanted).to(device)], 0
    for logits in passes.head_logits(model, backbone, output, states):
        here = (which >= first) & (which < first + len(logits))
        positions, targets = (
            torch.from_numpy(part[here]).to(device) for part in (which - first, flat[:, 2])
        )
        # As lm-eval does: logsumexp differs by 1e-5 nats a token.
        found = logits.log_softmax(-1)[positions, targets]
        np.add.at(sums, flat[here, 0], found.double().cpu().numpy())
        np.logical_and.at(
            greedy, flat[here, 0], (logits.argmax(-1)[positions] == targets).cpu().numpy()
        )
        first += len(logits)
