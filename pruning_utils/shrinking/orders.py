"""What is asked of a smaller model, as plain values; nothing heavy is imported for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LOWEST_LOSS = "lowest loss"
# What a set of layers may be chosen by. The first takes, of the sets of those in CHEAP_RULES, that
# without which the loss is lowest.
RULES = (
    LOWEST_LOSS,
    "closest block",
    "deepest but last",
    "reverse order",
    "block influence",
    "perplexity",
)
CHEAP_RULES = RULES[1:5]
NO_HEALING = "none"
METHODS = (NO_HEALING, "lora", "qlora", "dora", "last_layers")
MOST_STEPS = 1000  # of healing, each on text that was not seen before


@dataclass(frozen=True)
class Goal:
    """What a smaller model must meet, all that is given.

    Attributes:
        keep: Share of the layers that stays, in (0, 1).
        max_parameters: Most parameters that are stored, tied ones once.
        max_bytes: Most bytes of the weights, in the precision that they are loaded in.
        max_ms_per_token: Longest time of a generated token on this machine, one text at a time, in
            milliseconds.
    """

    keep: float | None = None
    max_parameters: int | None = None
    max_bytes: int | None = None
    max_ms_per_token: float | None = None


@dataclass(frozen=True)
class Limits:
    """What may be lost, named before anything is measured.

    Attributes:
        loss: Most nats per token that the loss may rise by, above 0.
        accuracy: Most that the mean accuracy of the tasks may fall by, in (0, 1).
        repetition: Most that the share of repeated n-grams in continued documents may rise by, in
            (0, 1).
        ms_per_token: Longest time of a generated token, in milliseconds; None: any.
    """

    loss: float = 0.5
    accuracy: float = 0.05
    repetition: float = 0.2
    ms_per_token: float | None = None


@dataclass(frozen=True)
class Measured:
    """What both models are measured on.

    Attributes:
        text: An evaluation text with documents, see :func:`data.document_windows`.
        documents: Number of its documents, at least 2; each is read, and its beginning continued.
        seq_len: Tokens of each, at least 3; less where the model's context is shorter.
        tasks: Names of :data:`evaluation.TASKS`, without shots.
        questions: Of each task, at least 2.
    """

    text: str = "xsum"
    documents: int = 48
    seq_len: int = 256
    tasks: tuple[str, ...] = ("arc_easy", "hellaswag", "openbookqa", "piqa")
    questions: int = 100


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        model: Name for :func:`models.load_model`, with ``revision``, ``dtype`` and ``device``.
        goal: What the smaller model must meet.
        rule: Among :data:`RULES`.
        method: Of healing, among :data:`METHODS`.
        minutes: That healing may take, above 0; the number of steps follows from a probe, and is at
            most :data:`MOST_STEPS`.
        steps: Of healing, whatever it takes, at most :data:`MOST_STEPS`; None: as many as the
            minutes allow.
        learning_rate: Peak rate of healing, above 0. 1e-3 suits models of some hundred million
            parameters; the papers take 3e-4 for 7 billion.
        healing_text: As ``source`` of :func:`data.healing_windows` or, for chats,
            :func:`instructions.instruction_windows`.
        limits: What may be lost.
        measured: What both models are measured on.
        revision: See ``model``.
        dtype: See ``model``.
        device: See ``model``.
        seed: Of all draws.
    """

    model: str
    goal: Goal
    rule: str = LOWEST_LOSS
    method: str = "lora"
    minutes: float = 10.0
    steps: int | None = None
    learning_rate: float = 1e-3
    healing_text: str | None = None
    limits: Limits = Limits()
    measured: Measured = Measured()
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0


def work_folder(out: str | os.PathLike) -> Path:
    """The folder beside a target in which the work towards it is kept until it is done."""
    target = Path(out).resolve()
    return target.with_name(f"{target.name}.work")
