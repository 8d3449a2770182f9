"""What a smaller model lost: measured beside the whole one, and judged by limits named before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pruning_utils import data, efficiency, evaluation, evidence, models
from pruning_utils.engine.checks import number, whole_number
from pruning_utils.engine.later import nn, torch
from pruning_utils.shrinking.orders import Limits, Measured
from pruning_utils.studies import depth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIT, NOT_FIT, UNTOLD = "fit", "not fit", evidence.UNTOLD
LOSS, RIGHT, TIME = "loss", "right", "ms per token"
PROMPT = "Which animals live in the sea?"
N_GENERATED = 32  # tokens after it
TIMED = {"batch_size": 1, "prompt_tokens": 32, "new_tokens": 16, "repeats": 5}


def check_limits(limits: Limits) -> None:
    """ValueError for a limit that is out of range."""
    number("the limit of the loss", limits.loss, "above 0", lambda nats: 0 < nats < 1e6)
    number("the limit of the accuracy", limits.accuracy, "in (0, 1)", lambda share: 0 < share < 1)


def check_measured(measured: Measured) -> None:
    """ValueError for a number that is out of range, or an unknown task."""
    whole_number("documents", measured.documents, 2)
    whole_number("seq_len", measured.seq_len, 3)
    whole_number("questions", measured.questions, 2)
    evaluation.load_tasks(list(measured.tasks), limit=measured.questions)


def measure(
    name: str | Path,
    *,
    revision: str | None,
    dtype: str,
    device: str | None,
    measured: Measured,
) -> dict:
    """Load a model and measure it.

    Args:
        name: For :func:`models.load_model`, with ``revision``, ``dtype`` and ``device``.
        revision: See above.
        dtype: See above.
        device: See above.
        measured: What it is measured on.

    Returns:
        ``rows`` (dicts with ``measure``, ``dataset``, ``item`` and ``value``: :data:`LOSS` of each
        document, :data:`RIGHT` of each question, :data:`TIME` of each run), ``parameters``,
        ``bytes`` and ``sample``, what it says to :data:`PROMPT`.
    """
    model, tokenizer = models.load_model(name, revision=revision, dtype=dtype, device=device)
    seq_len = min(measured.seq_len, models.context_length(model.config))
    windows = data.document_windows(tokenizer, measured.documents, seq_len, source=measured.text)
    losses = evaluation.token_losses(model, windows).mean(1).tolist()
    rows = [_row(LOSS, measured.text, item, value) for item, value in enumerate(losses)]
    found = evaluation.evaluate_tasks(
        model, tokenizer, measured.tasks, limit=measured.questions
    ).questions.rename(columns={"task": "dataset", "question_id": "item"})
    for question, right in zip(
        found.itertuples(), depth.right_answers(found).tolist(), strict=True
    ):
        rows.append(_row(RIGHT, question.dataset, question.item, right))
    speed = efficiency.generation_speed(model, **TIMED)
    for run, seconds in enumerate(speed["per_token_seconds"]):
        rows.append(_row(TIME, "", run, 1000 * seconds))
    stored = efficiency.stored_parameters(model)
    return {
        "rows": rows,
        "parameters": stored["total"],
        "bytes": stored["bytes"],
        "sample": answer(model, tokenizer, PROMPT),
    }


def _row(name: str, dataset: str, item: object, value: float) -> dict:
    return {"measure": name, "dataset": dataset, "item": int(str(item)), "value": float(value)}


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    n_tokens: int = N_GENERATED,
) -> str:
    """What a model says to a prompt, greedily, on one line; as a chat where it has a template.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: A text.
        n_tokens: Most tokens of the answer.
    """
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    given = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model.generate(
            **given,
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new_tokens = output[0, given["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(new_tokens, skip_special_tokens=True).split())


def judged(whole: dict, smaller: dict, limits: Limits) -> pd.DataFrame:
    """The smaller model beside the whole one, each measure with its interval and judgement.

    A measure is fit if its whole 95 % interval is within the limit, not fit if all of it is beyond,
    and else it cannot be told.

    Args:
        whole: Of :func:`measure`, the unpruned model.
        smaller: The same of the smaller one, on the same documents and questions.
        limits: Named beforehand.

    Returns:
        Columns ``measure``, ``unpruned``, ``smaller``, ``change``, ``low``, ``high``, ``limit`` and
        ``judgement``; of a measure without a limit it is "".
    """
    before, after = (
        dict(list(pd.DataFrame(found["rows"]).groupby("measure"))) for found in (whole, smaller)
    )
    keys = ["dataset", "item"]
    rows: list[dict[str, object]] = []
    for name, label, limit, sign in (
        (LOSS, "loss (nats per token)", limits.loss, 1),
        (RIGHT, "accuracy (mean of the tasks)", limits.accuracy, -1),
    ):
        changed = evidence.paired(after[name], before[name], on=keys, value="value")
        found = evidence.two_factor_interval(changed, strata=after[name]["dataset"])
        levels = [_mean_of_datasets(table[name]) for table in (before, after)]
        low, high = sorted((sign * found.low, sign * found.high))
        rows.append(
            {"measure": label, "unpruned": levels[0], "smaller": levels[1]}
            | {"change": found.value, "low": found.low, "high": found.high}
            | {"limit": sign * limit, "judgement": _word(low, high, limit)}
        )
    slow, fast = (table[TIME]["value"] for table in (before, after))
    time = evidence.mean_interval(fast)
    word = "" if limits.ms_per_token is None else _word(time.low, time.high, limits.ms_per_token)
    limit = np.nan if limits.ms_per_token is None else limits.ms_per_token
    rows.append(
        {"measure": TIME, "unpruned": slow.mean(), "smaller": time.value}
        | {"change": time.value - slow.mean(), "low": time.low - slow.mean()}
        | {"high": time.high - slow.mean(), "limit": limit, "judgement": word}
    )
    return pd.DataFrame(rows)


def _mean_of_datasets(rows: pd.DataFrame) -> float:
    return float(rows.groupby("dataset")["value"].mean().mean())


def _word(low: float, high: float, limit: float) -> str:
    """What the interval of something that should be small says of its limit."""
    if high <= limit:
        return FIT
    return NOT_FIT if low > limit else UNTOLD


def overall(words: Sequence[str]) -> str:
    """The judgement of all measures: the worst of theirs."""
    given = [word for word in words if word]
    return next(word for word in (NOT_FIT, UNTOLD, FIT) if word in given)


def limits_text(limits: Limits) -> str:
    """The limits as a person reads them."""
    given = {name: value for name, value in asdict(limits).items() if value is not None}
    said = {
        "loss": "loss at most {:g} nats per token higher",
        "accuracy": "accuracy at most {:g} lower",
        "ms_per_token": "at most {:g} ms per token",
    }
    return ", ".join(said[name].format(value) for name, value in given.items())
