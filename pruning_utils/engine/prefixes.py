"""Beginnings of texts that several requests share are computed once.

Answers to one question share its prompt, and questions share their shots. Here every distinct
beginning of a token sequence passes through the model once: what many prompts share goes into a
key-value cache, and each row of a batch holds a tree of tokens (a prompt with its answers), in
which a token sees those on its path from the root and no others.
"""

from __future__ import annotations

import collections
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pruning_utils import models
from pruning_utils.engine import memory, model_files, passes, wrappers
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# In a row, of one prompt.
ANSWER_TOKENS = 512
# Of a batch of the stock backend, which holds the logits of all its tokens twice: 4 GiB in float32.
STOCK_LOGITS = 2**29


def language_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> HFLM:
    """lm-eval's Hugging Face backend for a model in memory, with shared beginnings run only once.

    Log-likelihoods are those of the stock backend up to rounding. The stock backend itself takes
    what cannot be shared: prompts beyond the context length, or beyond a window that cannot be
    drawn into a mask, and models whose layers keep a state or cannot be told positions.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer; a copy of it is used. Where a text begins with its answer, it
            stands after the token of :func:`first_token`.
        batch_size: As for :func:`loglikelihoods`.

    Raises:
        ValueError: If weights are missing, or the tokenizer is none; and, by a method, before a
            task is scored, if it gives ids outside the model's vocabulary, or a task generates text
            and no token ends one.
    """
    from lm_eval.models.huggingface import HFLM

    passes.refuse_missing_weights(model)
    passes.refuse_wrong_numbers(model)
    own, begins = _own_tokenizer(tokenizer, model)
    ends = _n_appended(own)

    class SharingLM(HFLM):
        """The backend, with its two methods for log-likelihoods replaced."""

        def tok_encode(self, string: str, *given: Any, **named: Any) -> list[int]:
            """As the stock backend does, without tokens that would end the text after a prompt."""
            ids = super().tok_encode(string, *given, **named)
            added = ends and len(ids) > len(own.encode(string, add_special_tokens=False))
            return ids[:-ends] if added else ids

        def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
            """As the stock backend does, without its bar for what takes a moment."""
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            _refuse_what_does_not_fit(self.model, requests, self.max_length)
            lengths = [len(prompt) + len(answer) for _, prompt, answer in requests]
            longest = longest_shared(self.model)
            if max(lengths, default=0) > longest + 1 and takes_masks_by_kind(self.model):
                longest = math.inf
            longest = min(longest, longest_alike(self.model), self.max_length)
            fits = [length <= longest + 1 for length in lengths]
            pairs = [request[1:] for request, fit in zip(requests, fits, strict=True) if fit]
            others = [request for request, fit in zip(requests, fits, strict=True) if not fit]
            stock = []
            if others:
                run = super()._loglikelihood_tokens
                vocabulary = wrappers.vocabulary_size(self.model)
                rows = STOCK_LOGITS // (min(max(lengths), self.max_length) * vocabulary)
                with passes.replaced(
                    self, "batch_size_per_gpu", max(1, min(rows, self.batch_size))
                ):
                    stock = _on_fewer(self, run, others, disable_tqdm, override_bs)
            shared = loglikelihoods(self.model, pairs, batch_size=self.batch_size)
            from_stock, from_shared = iter(stock), iter(shared)
            return [next(from_shared if fit else from_stock) for fit in fits]

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """As the stock backend does, without tokens that would end the prompts."""
            if not ends:
                return super().tok_batch_encode(
                    strings, padding_side, left_truncate_len, truncation
                )
            kept = slice(-left_truncate_len if left_truncate_len else None, None)
            rows = [self.tok_encode(text)[kept] for text in strings]
            padded = own.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return padded["input_ids"], padded["attention_mask"]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            """As the stock backend does, on fewer texts at once where memory does not suffice."""
            _warn_of_cut_prompts(self, requests)
            return _on_fewer(self, super().generate_until, requests, disable_tqdm)

    # HFLM ties weights again, which would undo an untied head, and sets a mode that is set already.
    with (
        passes.replaced(model, "tie_weights", lambda: None),
        passes.replaced(model, "eval", lambda: model),
    ):
        scorer = SharingLM(
            pretrained=model,
            tokenizer=own,
            batch_size=batch_size,
            softmax_dtype="float32",
            prefix_token_id=begins,
        )
    # Of offloaded weights the model may name another.
    scorer._device = passes.input_device(model)
    return scorer


def _own_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module
) -> tuple[PreTrainedTokenizerBase, int]:
    """A copy of a tokenizer that has a token for padding, and its :func:`first_token`."""
    if not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"tokenizer must be that of the model, got {tokenizer!r}")
    # HFLM may give it a padding token, and what it encodes resets padding and truncation of the
    # backend: a shallow copy shares both with the caller's tokenizer.
    own = model_files.refuse_no_vocabulary(copy.deepcopy(tokenizer))
    begins = first_token(own, model)
    # HFLM would take one of these. Else it would add a token that the model does not have.
    if own.pad_token_id is None and own.unk_token_id is None and own.eos_token_id is None:
        own.pad_token_id = begins
    return own, begins


def _n_appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens a tokenizer puts after each text.

    With them, an answer after a prompt would lose its first tokens: it is what a text has beyond
    the tokens of its prompt.
    """
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for n_before in range(len(whole) - len(bare) + 1):
        if whole[n_before : n_before + len(bare)] == bare:
            return len(whole) - len(bare) - n_before
    return 0


def _refuse_what_does_not_fit(model: nn.Module, requests: list, context: int) -> None:
    """ValueError for requests (texts, prompt, answer) that the model cannot score.

    Its embedding lacks an id, its context has no room for an answer, or a prompt or an answer has
    no token.
    """
    for texts, *parts in requests:
        if not all(parts):
            raise ValueError(
                "a prompt and its answer must have one token each at least, but this tokenizer "
                f"makes {len(parts[0])} and {len(parts[1])} of {texts[0][-40:]!r} and {texts[1]!r}"
            )
    longest = max((len(answer) for *_, answer in requests), default=0)
    if longest > context:
        raise ValueError(
            f"answers must fit into the model's context of {context} tokens, but one has {longest}"
        )
    vocabulary = wrappers.vocabulary_size(model)
    largest = max((max(prompt + answer) for _, prompt, answer in requests), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer must be that of the model, but its token id {largest} is outside the "
            f"vocabulary [0, {vocabulary})"
        )


def _warn_of_cut_prompts(scorer: Any, requests: list) -> None:
    """Say of each task how many of its prompts leave no room for what is generated after them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    cut: collections.Counter[str] = collections.Counter()
    for request in requests:
        prompt, given = request.args
        longest = normalize_gen_kwargs(dict(given), scorer.max_gen_toks)["max_gen_toks"]
        if len(scorer.tok_encode(prompt)) > scorer.max_length - longest:
            cut[request.task_name] += 1
    for name, n_cut in cut.items():
        logger.warning(
            "prompts of %s are cut in front, %d of them: the context is %d tokens, answers "
            "included",
            name,
            n_cut,
            scorer.max_length,
        )


def _on_fewer(scorer: Any, run: Callable, *given: Any) -> Any:
    """What a method of the stock backend returns; the batch is smaller where memory is short."""
    batches = memory.BatchSize(scorer.batch_size, noun="questions")
    while True:
        try:
            return run(*given)
        except memory.ERRORS as error:
            batches.halve(batches.size, error)
        scorer.batch_size_per_gpu = batches.size


def first_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """The token that a text without a prompt is put after, so that its first token is predicted.

    It is the first that exists, and is one of the model's, of: the token that begins a text, that
    which ends one, either of them by the model's configuration, the token for padding, the one for
    what is unknown, and a line break.

    Raises:
        ValueError: If none does.
    """
    config = models.text_config(model)
    known = [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        getattr(config, "bos_token_id", None),
        getattr(config, "eos_token_id", None),
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *tokenizer.encode("\n", add_special_tokens=False)[-1:],
    ]
    vocabulary = wrappers.vocabulary_size(model)
    for token in known:
        if isinstance(token, int) and 0 <= token < vocabulary:
            return token
    raise ValueError(
        "the tokenizer must have a token that begins or ends a text, pads one or stands for what "
        f"is unknown, within the model's vocabulary [0, {vocabulary}), got {known}"
    )


def longest_shared(model: nn.Module) -> float:
    """Tokens up to which a model takes one mask, and positions, of our making.

    Layers that look through a window take it while all tokens fit into the window.

    Returns:
        The number of tokens: 0 where the model takes none, ``inf`` where it sets no bound.
    """
    causal, config = passes.causal_model(model), models.text_config(model)
    needed = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    prompt_learning = getattr(
        getattr(model, "active_peft_config", None), "is_prompt_learning", False
    )
    reasons_against = (
        not needed <= set(inspect.signature(causal.forward).parameters),
        not kinds <= {"full_attention", "sliding_attention"},
        getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"),
        # Its bias is made from a mask of another shape (Falcon).
        getattr(config, "alibi", False),
        # It looks back by places in a row, which holds several texts (GPT-Neo).
        "local" in getattr(config, "attention_layers", ()),
        # Its last layers are not run on all tokens (Gemma 3n, some of Gemma 4).
        getattr(config, "num_kv_shared_layers", 0),
        _counts_from_padding(causal),
        # It groups bytes into patches by their places in a row (BLT).
        getattr(config, "patching_mode", None),
        # Layers that look at pictures take a mask of another size.
        getattr(config, "cross_attention_layers", None),
        prompt_learning,
        getattr(causal, "_is_stateful", False),
    )
    if any(reasons_against):
        return 0
    if not getattr(config, "use_sliding_window", True):
        return math.inf
    return getattr(config, "sliding_window", None) or math.inf


def _counts_from_padding(causal: nn.Module) -> bool:
    """Whether a model makes positions that begin behind its token for padding, unlike ours.

    Those of RoBERTa and its relatives, Kosmos-2.5 among them, all make them by one name.
    """
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in causal.modules())


def longest_alike(model: nn.Module) -> float:
    """Tokens up to which a text is rotated alike, whatever other texts are in its batch.

    Frequencies of longrope follow the longest text of a batch, from the original context on.
    """
    config = models.text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return math.inf
    original = getattr(config, "original_max_position_embeddings", None)
    return rope.get("original_max_position_embeddings") or original or math.inf


def takes_masks_by_kind(model: nn.Module) -> bool:
    """Whether a model takes a mask for each kind of its layers, those with a window and others.

    It is tried on two tokens, since its signature does not tell.
    """
    kinds = getattr(models.text_config(model), "layer_types", None)
    if not kinds or not longest_shared(model):
        return False
    device = passes.input_device(model)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    seen = torch.zeros(1, 1, 2, 2, dtype=model.dtype, device=device)
    try:
        with torch.no_grad():
            passes.run_backbone(model, tokens, attention_mask=dict.fromkeys(kinds, seen))
    # As the code of architectures refuses a dict.
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if memory.is_lack_of_memory(error):
            raise
        return False
    return True


def loglikelihoods(
    model: nn.Module, requests: Sequence[tuple[list[int], list[int]]], *, batch_size: int
) -> list[tuple[float, bool]]:
    """Log-likelihoods of answers after prompts.

    Args:
        model: A causal language model in evaluation mode.
        requests: Token ids of prompt and answer, at least one each, together at most
            :func:`longest_shared` plus one, since an answer's last token is never an input; of any
            length where :func:`takes_masks_by_kind`.
        batch_size: Rows in a forward pass; a row holds a prompt with its answers, or prompts that
            share half. There are fewer where memory does not suffice.

    Returns:
        For each request, in the order given, ``(sum of the log-probabilities in nats, whether
        greedy decoding would give the answer)``.
    """
    answers: dict[tuple, list[int]] = {}
    for number, (prompt, _) in enumerate(requests):
        answers.setdefault(tuple(prompt), []).append(number)
    found = Found(np.zeros(len(requests)), np.ones(len(requests), dtype=bool))
    batches = memory.BatchSize(batch_size, noun="questions")
    with (
        torch.no_grad(),
        tqdm(total=len(requests), desc="log-likelihoods", leave=False) as progress,
    ):
        while answers:
            try:
                for numbers in _batches(model, requests, answers, batches.size, found):
                    progress.update(len(numbers))
            except memory.ERRORS as error:
                batches.halve(batches.size, error)
    return list(zip(found.sums.tolist(), found.greedy.tolist(), strict=True))


def _batches(
    model: nn.Module,
    requests: Sequence[tuple[list[int], list[int]]],
    answers: dict[tuple, list[int]],
    batch_size: int,
    found: Found,
) -> Iterator[set[int]]:
    """Run the prompts of ``answers``, each with its requests, and take those that are done away.

    Yields:
        The numbers of the requests of each batch.
    """
    for beginning, prompts_of_rows in _groups(sorted(answers), batch_size):
        rows = []
        for prompts in prompts_of_rows:
            for numbers in _parts([answers[prompt] for prompt in prompts], requests):
                asked = [(number, *requests[number]) for number in numbers]
                rows.append(tree_of(asked, len(beginning)))
        rows.sort(key=lambda row: -len(row.tokens))
        cached = cached_beginning(model, beginning)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            add_batch(model, batch, len(beginning), cached, found)
            done = {number for row in batch for number, *_ in row.predicted}
            for prompt in {tuple(requests[number][0]) for number in done}:
                left = [number for number in answers[prompt] if number not in done]
                if left:
                    answers[prompt] = left
                else:
                    del answers[prompt]
            yield done


def _parts(
    by_prompt: list[list[int]], requests: Sequence[tuple[list[int], list[int]]]
) -> Iterator[list[int]]:
    """Numbers of the requests of each row, of the prompts that could share one.

    A prompt whose answers are too many tokens for a row, as where questions are left out, has
    several: the time and memory of attention grow with the square of a row.
    """
    together: list[int] = []
    for numbers in by_prompt:
        lengths = [len(requests[number][1]) for number in numbers]
        if sum(lengths) <= ANSWER_TOKENS:
            together += numbers
            continue
        row_of = np.cumsum(lengths) // ANSWER_TOKENS
        for row in np.unique(row_of):
            yield [numbers[place] for place in np.flatnonzero(row_of == row)]
    if together:
        yield together


class Found(NamedTuple):
    """What is known of each request: the sum of its log-probabilities, and whether it is greedy."""

    sums: np.ndarray
    greedy: np.ndarray


def _groups(prompts: list[tuple], batch_size: int) -> list[tuple[tuple, list[list[tuple]]]]:
    """Sorted prompts as (beginning to be cached, prompts by row).

    A cache pays where it fills more than one batch. All other prompts are one group without one.
    """
    alone: list[list[tuple]] = []
    groups: list[tuple[tuple, list[list[tuple]]]] = []
    for run in _runs(prompts, 0, len(prompts)):
        if len(run) <= batch_size:
            alone.append(run)
            continue
        # A prompt's last token is never cached: the first of the answer is predicted from it.
        n_cached = min(_n_shared(run[0], run[-1]), min(map(len, run)) - 1)
        groups.append((run[0][:n_cached], _runs(run, n_cached, batch_size)))
    if alone:
        groups.append(((), alone))
    return groups


def _runs(prompts: list[tuple], start: int, most: int) -> list[list[tuple]]:
    """Sorted prompts in runs of neighbours, at most ``most`` in a run.

    Neighbours share at least half of what each of them has after ``start``.
    """
    runs: list[list[tuple]] = []
    for prompt in prompts:
        if runs and len(runs[-1]) < most and _is_near(prompt, runs[-1], start):
            runs[-1].append(prompt)
        else:
            runs.append([prompt])
    return runs


def _is_near(prompt: tuple, run: list[tuple], start: int) -> bool:
    longest = max(len(prompt), max(map(len, run)))
    return 2 * (_n_shared(run[0], prompt) - start) >= longest - start


def _n_shared(first: tuple, second: tuple) -> int:
    """Tokens that two sequences have in common from their first one on."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


class _Tree(NamedTuple):
    """The tokens of a row of a batch.

    Attributes:
        tokens: Token ids, T of them.
        places: Place of each token in its text, 0-based.
        sees: bool ``(T, T)``; [i, j] is whether token i sees token j.
        predicted: What is predicted where: (number of the request, index of the token after which,
            token id).
    """

    tokens: list[int]
    places: list[int]
    sees: np.ndarray
    predicted: list[tuple[int, int, int]]


def tree_of(requests: list[tuple[int, list[int], list[int]]], start: int) -> _Tree:
    """The tree of requests (number, prompt, answer), without their first ``start`` tokens."""
    # By the index of the token before (-1: none) and the token's id.
    index: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    places: list[int] = []
    parents: list[int] = []
    predicted: list[tuple[int, int, int]] = []
    for number, prompt, answer in requests:
        sequence = [*prompt, *answer]
        node = -1
        for place in range(start, len(sequence) - 1):
            parent = node
            node = index.setdefault((parent, sequence[place]), len(tokens))
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


def cached_beginning(model: nn.Module, beginning: tuple) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer for the beginning that prompts share; [] for no beginning."""
    if not beginning:
        return []
    from transformers import DynamicCache

    device = passes.input_device(model)
    # Not one of the model's making, whose layers with a window let the first tokens go.
    _, output = passes.run_backbone(
        model,
        torch.tensor([beginning], device=device),
        use_cache=True,
        past_key_values=DynamicCache(),
    )
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def add_batch(model: nn.Module, rows: list[_Tree], start: int, cached: list, found: Found) -> None:
    """Run one batch of rows, the longest first, and add what it tells to the requests, all of it.

    The first ``start`` tokens of each text are in ``cached``.
    """
    device = passes.input_device(model)
    longest = len(rows[0].tokens)
    tokens, inputs = _inputs(model, rows, start, cached)
    backbone, output = passes.run_backbone(model, tokens.to(device), **inputs)
    numbers, nodes, targets = _predictions(rows, longest)
    # Several tokens may be predicted from one state, which goes through the head once.
    wanted, which = np.unique(nodes, return_inverse=True)
    states = output.last_hidden_state.flatten(0, 1)[torch.from_numpy(wanted).to(device)]
    first, told = 0, []
    for logits in passes.head_logits(model, backbone, output, states):
        here = (which >= first) & (which < first + len(logits))
        places = torch.from_numpy((which - first)[here]).to(device)
        expected = torch.from_numpy(targets[here]).to(device)
        # As lm-eval does: logsumexp differs by 1e-5 nats a token.
        logs = logits.log_softmax(-1)[places, expected]
        is_greedy = logits.argmax(-1)[places] == expected
        told.append((numbers[here], logs.double().cpu().numpy(), is_greedy.cpu().numpy()))
        first += len(logits)
    for which_requests, logs_of_tokens, greedy in told:
        np.add.at(found.sums, which_requests, logs_of_tokens)
        np.logical_and.at(found.greedy, which_requests, greedy)


def _inputs(
    model: nn.Module, rows: list[_Tree], start: int, cached: list
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Token ids of a batch on the CPU, padded to its first row, and the arguments beside them."""
    from transformers import DynamicCache

    device = passes.input_device(model)
    longest = len(rows[0].tokens)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    places = np.zeros((len(rows), longest), dtype=np.int64)
    sees = np.zeros((len(rows), 1, longest, start + longest), dtype=bool)
    sees[..., :start] = True
    # Padding sees itself, lest it be NaN.
    sees[..., start:] = np.eye(longest, dtype=bool)
    for number, row in enumerate(rows):
        size = len(row.tokens)
        tokens[number, :size] = row.tokens
        places[number, :size] = row.places
        sees[number, 0, :size, start : start + size] = row.sees
    inputs: dict[str, Any] = {
        "attention_mask": _masks(model, sees, places, start, device),
        "position_ids": torch.from_numpy(places).to(device),
    }
    if cached:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(cached):
            shape = (len(rows), -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), layer)
        inputs |= {"past_key_values": cache, "use_cache": True}
    return torch.from_numpy(tokens), inputs


def _masks(
    model: nn.Module, sees: np.ndarray, places: np.ndarray, start: int, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What is added to the attention of tokens ``(B, 1, T, start + T)``: 0 where one sees another.

    Where a token lies beyond the window of a layer, a mask for each kind of layers.
    """

    def added(seen: np.ndarray) -> torch.Tensor:
        """0 where one is seen, the lowest number of the model's precision where it is not."""
        mask = torch.zeros(seen.shape, dtype=model.dtype)
        return mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(model.dtype).min).to(device)

    if places.max() < longest_shared(model):
        return added(sees)
    before = np.broadcast_to(np.arange(start), (len(places), start))
    keys = np.concatenate([before, places], axis=1)
    distances = places[:, None, :, None] - keys[:, None, None, :]
    window = models.text_config(model).sliding_window
    near = added(sees & (distances < window))
    return {"full_attention": added(sees), "sliding_attention": near}


def _predictions(rows: list[_Tree], longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each predicted token its request, the token's index in the flat batch, and its id."""
    flat = []
    for place, row in enumerate(rows):
        flat += [(number, place * longest + node, token) for number, node, token in row.predicted]
    numbers, nodes, targets = np.array(flat).T
    return numbers, nodes, targets
