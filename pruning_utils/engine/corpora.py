"""Documents of corpora on a hub, put together again where a row holds only a part of one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from pruning_utils.engine import hub
from pruning_utils.engine.overlapping import overlaps

# At most this many texts are compared with what is evaluated at once.
TOGETHER = 256
# BookCorpus has a sentence a row, and no sign where a book begins. So many of them, some thousand
# tokens, are taken for a document.
SENTENCES = 64
# The title of an article of WikiText; headings of its sections have more signs: `` = = Early life =
# = ``.
TITLE = re.compile(r" = [^=].* = \n?")


def passages(rows: Iterator[str]) -> Iterator[str]:
    """Passages of sentences that follow each other, as many in each."""
    while some := list(itertools.islice(rows, SENTENCES)):
        yield " ".join(some)


def articles(rows: Iterator[str]) -> Iterator[str]:
    """Articles of WikiText, whose rows are titles, headings and paragraphs."""
    parts: list[str] = []
    for row in rows:
        if TITLE.fullmatch(row) and parts:
            yield "".join(parts)
            parts = []
        parts.append(row)
    if parts:
        yield "".join(parts)


# Of sources whose rows are no documents: what they become before the 13-word rule, and after it.
# Sentences are too short for a rule of 13 words. An article loses its paragraph alone.
JOINED: dict[str, Callable[[Iterator[str]], Iterator[str]]] = {"bookcorpus": passages}
JOINED_AFTERWARDS: dict[str, Callable[[Iterator[str]], Iterator[str]]] = {"wikitext2": articles}


def documents(
    source: str,
    corpus: tuple[str, str | None, str, dict[str, str]],
    split: str,
    *,
    others: Sequence[str] | None,
    limit: int,
) -> tuple[str, ...]:
    """The first documents of a corpus, streamed, so that C4 is not downloaded whole.

    Args:
        source: Its name among ``data.HUB_CORPORA``.
        corpus: What stands there: repository, configuration, column of the text, and splits.
        split: One of ours.
        others: Texts to compare with by the 13-word rule; None: all documents are taken.
        limit: Documents, at most.

    Raises:
        ValueError: If the corpus is out of reach.
    """
    import datasets

    repository, configuration, column, splits = corpus
    try:
        with hub.asked_or_cached():
            rows = datasets.load_dataset(
                repository, configuration, split=splits[split], streaming=True
            )
            texts: Iterator[str] = (row[column] for row in rows if row[column].strip())
            texts = JOINED.get(source, iter)(texts)
            if others is not None:
                texts = _without_overlaps(texts, others)
            texts = JOINED_AFTERWARDS.get(source, iter)(texts)
            return tuple(itertools.islice(texts, limit))
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"text {source!r} ({repository}) could not be read from the hub: {error}"
        ) from error


def _without_overlaps(texts: Iterator[str], others: Sequence[str]) -> Iterator[str]:
    """Those texts that share no run of words with any of the others, some at a time."""
    while some := list(itertools.islice(texts, TOGETHER)):
        yield from itertools.compress(some, ~overlaps(some, others))
