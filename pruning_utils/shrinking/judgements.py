"""What a smaller model lost: measured beside the whole one, and judged by limits named before."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pruning_utils import data, efficiency, evaluation, evidence, models
from pruning_utils.engine import memory, passes
from pruning_utils.engine.bars import tqdm
from pruning_utils.engine.checks import number, whole_number
from pruning_utils.engine.later import nn, stats, torch
from pruning_utils.shrinking.orders import Limits, Measured
from pruning_utils.studies import depth, whole_path
from pruning_utils.studies.study import check_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIT, NOT_FIT, UNTOLD = "fit", "not fit", evidence.UNTOLD
LOSS, RIGHT, REPEATED, TIME = "loss", "right", "repetition", "ms per token"
N_GRAM = 4  # tokens
CONTINUED = 32  # tokens of a document's beginning, or half of it where that is less
N_CONTINUED = 48  # tokens that follow
AT_ONCE = 16  # documents that are continued in one batch
PROMPT = "Which animals live in the sea?"
N_GENERATED = 32  # tokens after it
TIMED = {"prompt_tokens": 32, "new_tokens": 16, "repeats": 5}  # of a text alone; or what fits
logger = logging.getLogger(__name__)


def check_limits(limits: Limits) -> None:
    """ValueError for a limit that is out of range."""
    number("the limit of the loss", limits.loss, "above 0", lambda nats: 0 < nats < 1e6)
    for name, share in (("accuracy", limits.accuracy), ("repetition", limits.repetition)):
        number(f"the limit of the {name}", share, "in (0, 1)", lambda given: 0 < given < 1)
    if limits.ms_per_token is not None:
        number(
            "the limit of the time of a token",
            limits.ms_per_token,
            "a finite number of milliseconds above 0",
            lambda time: 0 < time < math.inf,
        )


def check_measured(measured: Measured) -> None:
    """ValueError for a number that is out of range, or a task that is unknown or has no choices."""
    whole_number("documents", measured.documents, 2)
    whole_number("seq_len", measured.seq_len, 3)
    whole_number("questions", measured.questions, 2)
    whole_number("the number of tasks", len(measured.tasks), 1)
    if len(set(measured.tasks)) < len(measured.tasks):
        raise ValueError(f"each task must be named once, got {' '.join(measured.tasks)}")
    for task in measured.tasks:
        check_task(task, limit=measured.questions)


def foretell(
    tokenizer: PreTrainedTokenizerBase,
    measured: Measured,
    *,
    seq_len: int,
    token_seconds: float,
    step_seconds: float,
) -> float:
    """Seconds that :func:`measure` takes once the model is loaded.

    Args:
        tokenizer: Of the model.
        measured: What it is measured on.
        seq_len: Tokens of a document.
        token_seconds: Of a token that is read among many.
        step_seconds: Of a token that is generated alone.
    """
    questions = sum(
        whole_path.question_tokens(tokenizer, task, measured.questions) for task in measured.tasks
    )
    beginnings = measured.documents * min(CONTINUED, seq_len // 2)
    read = token_seconds * (measured.documents * seq_len + questions + beginnings)
    # A step of a full batch takes as long as one token alone, or as its tokens read.
    rows = min(AT_ONCE, measured.documents)
    batches = -(-measured.documents // AT_ONCE)
    continuing = batches * N_CONTINUED * max(step_seconds, rows * token_seconds)
    alone = N_GENERATED + TIMED["new_tokens"] * (1 + TIMED["repeats"])
    return read + continuing + alone * step_seconds


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
        document, :data:`RIGHT` of each question, :data:`REPEATED` of each continued document,
        :data:`TIME` of each run), ``parameters``, ``bytes`` and ``sample``, what it says to
        :data:`PROMPT`.
    """
    model, tokenizer = models.load_model(name, revision=revision, dtype=dtype, device=device)
    # Of the model's context, or less where its tokenizer says so.
    context = tokenizer.model_max_length
    seq_len = min(measured.seq_len, context)
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
    beginnings = windows[:, : min(CONTINUED, seq_len // 2)]
    n_tokens = min(N_CONTINUED, context - beginnings.shape[1])
    for item, share in enumerate(repetitions(model, beginnings, n_tokens=n_tokens)):
        rows.append(_row(REPEATED, measured.text, item, share))
    speed = efficiency.generation_speed(
        model,
        batch_size=1,
        prompt_tokens=min(TIMED["prompt_tokens"], context // 2),
        new_tokens=min(TIMED["new_tokens"], context // 2),
        repeats=TIMED["repeats"],
    )
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


def repetitions(
    model: nn.Module, prompts: torch.Tensor, *, n_tokens: int = N_CONTINUED
) -> list[float]:
    """How far a model repeats itself where it continues texts, greedily, by a forced length.

    A broken model falls into loops, and a low loss on texts of others does not show it.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids ``(N, T)``, without padding.
        n_tokens: That follow each prompt, at least 4.

    Returns:
        For each prompt, the share of the 4-grams of what follows that stood there before, in [0, 1]
        (``seq-rep-4`` of Welleck et al., arXiv:1908.04319, Sec. 5).
    """
    whole_number("n_tokens", n_tokens, N_GRAM)
    prompts = prompts.to(passes.input_device(model))

    def continued(rows: slice) -> torch.Tensor:
        """What follows some of the prompts."""
        given = prompts[rows]
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            pad_token_id=0,  # no row ends before another
        )
        return output[:, given.shape[1] :].cpu()

    with (
        torch.no_grad(),
        passes.greedily(model),
        tqdm(total=len(prompts), desc="continuing", leave=False) as progress,
    ):
        parts = memory.BatchSize(AT_ONCE).run(continued, len(prompts), progress)
    return [repeated_share(row) for row in torch.cat(parts).tolist()]


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of a text that stood in it before, in [0, 1).

    Args:
        tokens: Ids, at least 4.
    """
    grams = [tuple(tokens[start : start + N_GRAM]) for start in range(len(tokens) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    n_tokens: int = N_GENERATED,
) -> str:
    """What a model says to a prompt, greedily, on one line; as a chat where it can.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: A text.
        n_tokens: Most tokens of the answer; fewer where the context ends.

    Returns:
        The answer, "" where the prompt fills the context.
    """
    ids = asked_ids(tokenizer, prompt, model.get_input_embeddings().num_embeddings)
    ids = ids.to(passes.input_device(model))
    n_tokens = min(n_tokens, tokenizer.model_max_length - ids.shape[1])
    if n_tokens < 1:
        return ""
    with torch.no_grad(), passes.greedily(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    new_tokens = output[0, ids.shape[1] :]
    return " ".join(tokenizer.decode(new_tokens, skip_special_tokens=True).split())


def asked_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, n_embeddings: int) -> torch.Tensor:
    """Token ids ``(1, T)`` of a question, as a chat where the template takes one.

    A template may want a message of the system first, or contents in parts, or give tokens that the
    model has no embedding of. Then it is the plain text.

    Args:
        tokenizer: Of the model.
        prompt: A text.
        n_embeddings: Tokens that the model knows.
    """
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": prompt}]
        try:
            ids = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # a template is a program, and fails in as many ways
            logger.info("the chat template fails, so the question is a plain text: %s", error)
        else:
            if ids.numel() and int(ids.max()) < n_embeddings:
                return ids
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def judged(whole: dict, smaller: dict, limits: Limits) -> pd.DataFrame:
    """The smaller model beside the whole one, each measure with its interval and judgement.

    A measure is fit if its whole 95 % interval is within the limit, not fit if all of it is beyond,
    and else it cannot be told. Where no answer and no continued document changes, at 95 % fewer
    than three in n would (Hanley and Lippman-Hand 1983), each by 1 at most. A limit of the time is
    one for the smaller model's own, so the interval is of that. Without a limit it is of the
    difference, as both are measured (Welch 1947).

    Args:
        whole: Of :func:`measure`, the unpruned model.
        smaller: The same of the smaller one, on the same documents and questions.
        limits: Named beforehand.

    Returns:
        Columns ``measure``, ``unpruned``, ``smaller``, ``change``, its ``low`` and ``high``, the
        ``limit`` of the change (below 0 for an accuracy, which may fall) and ``judgement``; of a
        measure without a limit it is "".
    """
    before, after = (
        dict(list(pd.DataFrame(found["rows"]).groupby("measure"))) for found in (whole, smaller)
    )
    keys = ["dataset", "item"]
    rows: list[dict[str, object]] = []
    for name, label, limit, sign in (
        (LOSS, "loss (nats per token)", limits.loss, 1),
        (RIGHT, "accuracy (mean of the tasks)", limits.accuracy, -1),
        (REPEATED, "repetition (share of 4-grams)", limits.repetition, 1),
    ):
        changed = evidence.paired(after[name], before[name], on=keys, value="value")
        found = evidence.two_factor_interval(changed, strata=after[name]["dataset"])
        if name != LOSS and not np.any(changed):
            reach = min(1.0, 3 / len(changed))
            found = found._replace(low=-reach, high=reach)
        levels = [_mean_of_datasets(table[name]) for table in (before, after)]
        low, high = sorted((sign * found.low, sign * found.high))
        rows.append(
            {"measure": label, "unpruned": levels[0], "smaller": levels[1]}
            | {"change": found.value, "low": found.low, "high": found.high}
            | {"limit": sign * limit, "judgement": _word(low, high, limit)}
        )
    slow, fast = (table[TIME]["value"] for table in (before, after))
    time, change = evidence.mean_interval(fast), fast.mean() - slow.mean()
    if limits.ms_per_token is None:
        limit, word = np.nan, ""
        low, high = stats.ttest_ind(fast, slow, equal_var=False).confidence_interval(0.95)
    else:
        word = _word(time.low, time.high, limits.ms_per_token)
        limit, low, high = (end - slow.mean() for end in (limits.ms_per_token, time.low, time.high))
    rows.append(
        {"measure": TIME, "unpruned": slow.mean(), "smaller": time.value, "change": change}
        | {"low": low, "high": high, "limit": limit, "judgement": word}
    )
    return pd.DataFrame(rows)


def shares(judgement: pd.DataFrame) -> pd.DataFrame:
    """What is lost of each measure that has a limit, as a share of the limit.

    Of a time it is the time itself, as a share of the longest that is fit.

    Args:
        judgement: Of :func:`judged`.

    Returns:
        Columns ``measure``, ``judgement``, ``value``, ``low`` and ``high``: 1 is the limit.
    """
    shown = judgement[judgement["judgement"] != ""].reset_index(drop=True)
    added = shown["unpruned"].where(shown["measure"] == TIME, 0)
    ends = shown[["change", "low", "high"]].add(added, axis=0).div(shown["limit"] + added, axis=0)
    # Of a limit below 0 the ends change places.
    sorted_ends = np.sort(ends[["low", "high"]].to_numpy(), axis=1)
    return shown[["measure", "judgement"]].assign(
        value=ends["change"], low=sorted_ends[:, 0], high=sorted_ends[:, 1]
    )


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
        "repetition": "repetition at most {:g} higher",
        "ms_per_token": "at most {:g} ms per token",
    }
    return ", ".join(said[name].format(value) for name, value in given.items())
