"""How a text begins and ends for a tokenizer, and for its chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedTokenizerBase

# Templates that write the date get always this one: windows must not change from day to day.
OF_DATE = "strftime_now"
DATE = f"{{% macro {OF_DATE}(format) %}}26 Jul 2024{{% endmacro %}}"


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, joins: bool = True) -> None:
    """Refuse what cannot make windows.

    Args:
        tokenizer: What a function was given as its tokenizer.
        joins: Whether a window may hold several documents, with an ``eos_token`` between them.

    Raises:
        ValueError: If the tokenizer is none of transformers, or lacks the ``eos_token`` it needs.
    """
    if not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(
            f"tokenizer must be one of transformers, as load_model returns it, got {tokenizer!r}"
        )
    if joins and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to put between documents")


def batches(texts: Iterable[str], most: int) -> Iterator[list[str]]:
    """What a function was given as documents, some at a time: 1, 2, 4 and so on.

    Args:
        texts: Documents; no more of them are read than are asked for.
        most: The most at a time.

    Raises:
        ValueError: If they are one text or nothing that can be iterated; or if a document is no
            text, when its turn comes.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise ValueError(f"texts must be documents, each a text, got {texts!r:.80}")
    unread, count = iter(texts), 1
    while some := list(itertools.islice(unread, count)):
        for text in some:
            if not isinstance(text, str):
                raise ValueError(
                    f"texts must be documents, each a text, got {text!r:.80} among them"
                )
        yield some
        count = min(2 * count, most)


def of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text on its own, as ids."""
    for text in _short_texts(tokenizer):
        (bare,) = tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"]
        if bare:
            (whole,) = tokenizer([text], verbose=False)["input_ids"]
            return _before(list(whole), list(bare), tokenizer)
    return []


def _short_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of which one has a token: not every vocabulary has an "a"."""
    yield "a"
    special = tokenizer.all_special_tokens
    yield from (word for word in tokenizer.get_vocab() if word not in special)


def _before(whole: list[int], bare: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens before a text, whose own tokens may be others behind them."""
    if whole == bare:
        return []
    special = set(tokenizer.all_special_ids)
    starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
    if not starts:
        return list(itertools.takewhile(special.__contains__, whole))
    prefix = whole[: starts[0]]
    return prefix if special.issuperset(prefix) else []


def chats(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Questions and their answers as chats, without what windows put around every text.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        pairs: What the user says and what the assistant says.

    Returns:
        The texts, without the tokenizer's beginning of a text and without a last ``eos_token``.

    Raises:
        ValueError: If the template fails; the message says how.
    """
    # Token by token: decoded together, they would be joined with blanks by some tokenizers.
    beginning = "".join(tokenizer.convert_ids_to_tokens(of_text(tokenizer)))
    texts = []
    for question, answer in pairs:
        text = _chat(tokenizer, question, answer)
        if beginning and text.lstrip().startswith(beginning):
            text = text.lstrip().removeprefix(beginning)
        texts.append(text.removesuffix(tokenizer.eos_token or ""))
    return texts


def _chat(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        template = tokenizer.get_chat_template()
        if OF_DATE in template:
            template = DATE + template
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a template is a program, and fails in as many ways
        raise ValueError(
            f"the tokenizer's chat template fails on a question and its answer: {error}"
        ) from error
