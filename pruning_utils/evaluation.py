"""What a model is worth: perplexity on windows of text, and benchmark questions with lm-eval."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from pruning_utils import data, models
from pruning_utils.engine import hub, memory, passes, prefixes
from pruning_utils.engine.checks import refuse_nan, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK_FILES = Path(__file__).with_name("tasks")
TASKS = (*data.BENCHMARKS, "mmlu_letter")
# On these a model of 135 million parameters beats a guess.
POOLED = ("piqa", "openbookqa", "commonsenseqa", "siqa")
# Prefix of a task that lm-eval brings itself; its data comes from a hub.
OFFICIAL = "lm-eval:"
logger = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Result of :func:`evaluate_tasks`, which defines the scores.

    Attributes:
        summary: ``task, metric, value, stderr, n``, a mean over n questions a row.
        questions: ``task, question_id, correct, correct_norm, p_right, nll``, a question a row.
    """

    summary: pd.DataFrame
    questions: pd.DataFrame


def perplexity(model: nn.Module, input_ids: torch.Tensor, *, batch_size: int = 8) -> float:
    """Perplexity, the exponential of the mean loss over all N * (T - 1) predicted tokens.

    It is 1 or more, and ``inf`` where the mean loss is beyond 709 nats a token. Arguments and
    errors as for :func:`token_losses`.
    """
    return float(token_losses(model, input_ids, batch_size=batch_size).double().mean().exp())


def token_losses(model: nn.Module, input_ids: torch.Tensor, *, batch_size: int = 8) -> torch.Tensor:
    """Loss ``-log p(x_t | x_0 .. x_{t-1})`` in nats of every token but the first of each window.

    The decoder layers run once. The log-sum-exp runs in float32 over chunks of tokens, so that the
    logits of a whole batch never exist at once; scaling or soft-capping of logits is done by the
    architecture's own code.

    Args:
        model: A causal language model, quantised or with adapters if need be. It is left as it was,
            and can be trained.
        input_ids: Token ids without padding, integer, of shape ``(N, T)``, T from 2 to the model's
            context length.
        batch_size: Windows in one forward pass, at least 1. It is halved, with a notice, where
            memory does not suffice. No context is carried from one window to the next.

    Returns:
        float32 tensor of shape ``(N, T - 1)`` on the CPU; column t is the loss of token t + 1.

    Raises:
        ValueError: If an argument is out of range, weights are missing, or a loss is NaN.
        MemoryError: If not even one window fits into memory.
    """
    input_ids = models.check_input_ids(model, input_ids, shortest=2)
    passes.refuse_missing_weights(model)
    batches = memory.BatchSize(whole_number("batch_size", batch_size, 1), noun="windows")
    input_ids = input_ids.to(passes.input_device(model))
    with passes.evaluation_mode(model), torch.no_grad():
        losses = batches.run(lambda rows: batch_losses(model, input_ids[rows]), len(input_ids))
    return refuse_nan(torch.cat(losses))


def batch_losses(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Losses of one batch: the layers run once, then the model's own head on chunks of tokens.

    Args:
        model: As for :func:`token_losses`, in evaluation mode.
        batch: Token ids of shape ``(B, T)``, int64, on the model's device.

    Returns:
        float32 tensor of shape ``(B, T - 1)`` on the CPU, NaN included.
    """
    backbone, output = passes.run_backbone(model, batch)
    if backbone is None:
        return torch.stack(
            [_losses(model(row[None], use_cache=False).logits[0, :-1], row[1:]) for row in batch]
        ).cpu()
    states = output.last_hidden_state[:, :-1].flatten(0, 1)
    targets = batch[:, 1:].flatten()
    losses = []
    for logits in passes.head_logits(model, backbone, output, states):
        losses.append(_losses(logits, targets[: len(logits)]))
        targets = targets[len(logits) :]
    return torch.cat(losses).view(len(batch), -1).cpu()


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 losses (n,) of targets (n,) under logits (n, V)."""
    if len(logits) != len(targets):
        raise ValueError(
            f"the model returns logits for {len(logits)} positions where {len(targets)} tokens "
            "follow"
        )
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None].to(logits.device))[:, 0]


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    shot_order: int = 0,
) -> Evaluation:
    """Score multiple-choice questions with lm-eval, in this process, on a model in memory.

    Let l_c be the log-likelihood of choice c after the prompt (nats, summed over its tokens), k_c
    its length in characters, r the right choice and m its length in tokens. A question gives

    - ``correct``: 1 if l_r is the largest l_c, else 0;
    - ``correct_norm``: 1 if l_r / k_r is the largest l_c / k_c, else 0;
    - ``p_right``: ``exp(s_r) / sum_c exp(s_c)`` with s_c = l_c / k_c, the continuous side of
      ``correct_norm``. A guess gives 1 / choices. Under plain sums a short choice would win by its
      length, and most questions would be near 0 or 1;
    - ``nll``: ``-l_r / m``, nats per token. It moves long before any rank. It depends on the
      wording of the answer as well as on its truth, so it may fall while layers go.

    Their means are ``acc``, ``acc_norm``, ``p_right`` and ``nll``. Standard errors are s / sqrt(n),
    with s the sample deviation; they are NaN for one question.

    All questions of ``boolq`` (no, yes) and of ``mmlu_letter`` (A to D) have the same labels. There
    s_c is l_c, and ``balanced_acc``, the mean of the labels' recalls, replaces ``acc_norm``. Its
    error is the root of their summed squared errors over their number. A guess gives 1 / labels;
    the majority of ``boolq`` gives 0.622 in ``acc``.

    Questions stand in one fixed shuffled order, of which ``limit`` takes the first. So 300 contain
    the 150, and every model gets the same. With shots, the last 16 in that order are not scored,
    and the first of them start every prompt.

    Args:
        model: A causal language model, as for :func:`token_losses`.
        tokenizer: Its tokenizer; a copy of it is used.
        tasks: Names among :data:`TASKS`, which need no network, or of tasks that lm-eval brings,
            with data from a hub. ``mmlu`` scores the texts of the answers, ``mmlu_letter`` their
            letters. Where both have a name, ``lm-eval:piqa`` is lm-eval's. Its tasks carry this
            prefix in the tables, with all their metrics, and keep the order of their rows, whose
            number is the ``question_id``.
        num_fewshot: Solved questions before each one, 0 to 16.
        limit: Questions of each task, at least 1; None takes all.
        batch_size: Questions in one forward pass, at least 1. It is halved, with a notice, where
            memory does not suffice.
        shot_order: 0 takes the shots in their fixed order; any other number is the seed of another
            order of the same shots (with lm-eval's tasks, the seed of their choice).

    Raises:
        ValueError: If an argument is out of range, a task unknown or its data out of reach, all
            before any scoring; or if a log-likelihood is not finite.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    loaded = load_tasks(tasks, num_fewshot=num_fewshot, limit=limit, shot_order=shot_order)
    with _quiet_libraries(), passes.evaluation_mode(model), torch.no_grad():
        scorer = prefixes.language_model(model, tokenizer, batch_size)
        parts = [_score(scorer, name, found, num_fewshot, limit) for name, found in loaded.items()]
    columns = ["task", "question_id", "correct", "correct_norm", "p_right", "nll"]
    return Evaluation(
        pd.DataFrame([row for summary, _ in parts for row in summary]),
        pd.DataFrame([row for _, questions in parts for row in questions], columns=columns),
    )


def load_tasks(
    tasks: Sequence[str], *, num_fewshot: int = 0, limit: int | None = None, shot_order: int = 0
) -> dict[str, dict]:
    """lm-eval's task objects by name: the check that :func:`evaluate_tasks` begins with.

    Arguments are those of :func:`evaluate_tasks`.

    Raises:
        ValueError: If an argument is out of range, a task unknown or its data out of reach.
    """
    names = [] if isinstance(tasks, str) or not isinstance(tasks, Iterable) else list(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"tasks must be a list with one or more of {', '.join(TASKS)}, got {tasks!r}"
        )
    whole_number("num_fewshot", num_fewshot, 0)
    shot_order = whole_number("shot_order", shot_order, 0)
    whole_number("limit", 1 if limit is None else limit, 1, sys.maxsize)
    with _quiet_libraries():
        return {name: _load_task(name, num_fewshot, shot_order) for name in dict.fromkeys(names)}


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Let the libraries underneath report errors only.

    Their levels come back afterwards, and the random state that they draw from.
    """
    from lm_eval.api import task

    with (
        contextlib.ExitStack() as undo,
        warnings.catch_warnings(action="ignore"),
        # Its bars last for a moment each, and would only flash.
        passes.replaced(task, "tqdm", lambda items, **_: items),
    ):
        undo.callback(random.setstate, random.getstate())
        for name in ("lm_eval", "datasets", "huggingface_hub", "transformers"):
            library = logging.getLogger(name)
            undo.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        yield


@functools.cache
def _task_manager(embedded: bool) -> Any:
    """lm-eval's index of our task files, or of its own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=TASK_FILES if embedded else None, include_defaults=not embedded)


def _load_task(name: str, num_fewshot: int, shot_order: int) -> dict:
    """lm-eval's task objects behind a name, with their questions."""
    manager = _task_manager(name in TASKS)
    own_name = name.removeprefix(OFFICIAL)
    if own_name not in manager.all_tasks:
        raise ValueError(
            f"unknown task {name!r}: it is neither embedded ({', '.join(TASKS)}) nor one of "
            "lm-eval's"
        )
    on_disk = contextlib.nullcontext() if name in TASKS else hub.asked_or_cached()
    try:
        with on_disk:
            loaded = manager.load([own_name])
    except OSError as error:
        raise ValueError(
            f"the data of lm-eval's task {own_name!r} could not be read from the hub: {error}"
        ) from error
    for task in loaded["tasks"].values():
        # A task file that says 0 means it.
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(shot_order)
        if name in TASKS:
            _order_shots(task, num_fewshot, shot_order)
    return loaded


def _order_shots(task: Any, num_fewshot: int, shot_order: int) -> None:
    """Put the first ``num_fewshot`` solved questions of a task of ours into the order asked for."""
    shots = list(task.fewshot_docs())
    if num_fewshot > len(shots):
        raise ValueError(f"num_fewshot must be in [0, {len(shots)}], got {num_fewshot}")
    if shot_order:
        # Two seeds may draw one permutation of a few shots; turned by the seed it differs.
        order = np.roll(np.random.default_rng(shot_order).permutation(num_fewshot), shot_order)
        task.sampler.replace_df([shots[index] for index in order])


def _score(
    scorer: Any, name: str, loaded: dict, num_fewshot: int, limit: int | None
) -> tuple[list[dict], list[dict]]:
    """Rows of the summary and of the questions for one name.

    The name is that of one of our tasks, or of a task or a group of lm-eval's.
    """
    import lm_eval

    prefix = "" if name in TASKS else OFFICIAL
    if name in TASKS and num_fewshot:
        n_scored = len(loaded["tasks"][name].eval_docs) - len(loaded["tasks"][name].fewshot_docs())
        limit = n_scored if limit is None else min(limit, n_scored)
    results = lm_eval.evaluate(lm=scorer, task_dict=loaded, limit=limit, bootstrap_iters=1000)
    questions: dict[str, list[dict]] = {}
    for label, task in loaded["tasks"].items():
        rows = [_question_scores(scorer, task, sample) for sample in results["samples"][label]]
        questions[label] = [{"task": prefix + label} | row for row in rows if row is not None]
        n_cut = sum(row["is_cut"] for row in questions[label])
        if n_cut:
            logger.warning(
                "%d prompts of %s are cut in front: the context is %d tokens",
                n_cut,
                label,
                scorer.max_length,
            )
    summary = []
    for label, found in results["results"].items():
        has_labels = name in TASKS and "acc_norm,none" not in found
        means = _means(found, pd.DataFrame(questions.get(label, [])), has_labels)
        for metric, (value, error) in means.items():
            summary.append(
                {
                    "task": prefix + label,
                    "metric": metric,
                    "value": value,
                    "stderr": error if isinstance(error, float) else np.nan,
                    "n": found["sample_len"],
                }
            )
    return summary, [row for rows in questions.values() for row in rows]


def _question_scores(scorer: Any, task: Any, sample: dict) -> dict | None:
    """Scores of one question; None for a task without choices of which one is right."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.multiple_target:
        return None
    choices = task.doc_to_choice(sample["doc"])
    target = sample["target"]
    answer = choices.index(target) if isinstance(target, str) else target
    question_id = sample["doc"].get("question_id", sample["doc_id"])
    loglikelihoods = np.array([response[0][0] for response in sample["resps"][: len(choices)]])
    if not np.isfinite(loglikelihoods).all():
        raise ValueError(
            f"log-likelihoods must be finite, got {loglikelihoods} for {task.task_name} "
            f"{question_id}"
        )
    by_character = loglikelihoods / [len(choice) for choice in choices]
    scores = by_character if "acc_norm" in task.aggregation() else loglikelihoods
    weights = np.exp(scores - scores.max())
    prompt, right = sample["arguments"][answer]
    # Before an answer without a prompt, lm-eval puts one token of its own.
    prompt_ids, right_ids = (
        scorer._encode_pair(prompt, right) if prompt else ([0], scorer.tok_encode(right))
    )
    return {
        "question_id": question_id,
        "correct": int(loglikelihoods.argmax() == answer),
        "correct_norm": int(by_character.argmax() == answer),
        "p_right": weights[answer] / weights.sum(),
        "nll": -loglikelihoods[answer] / len(right_ids),
        "answer": answer,
        "is_cut": len(prompt_ids) + len(right_ids) > scorer.max_length + 1,
    }


def _means(found: dict, questions: pd.DataFrame, has_labels: bool) -> dict[str, tuple]:
    """Mean and standard error by metric: what lm-eval found for a task or a group, and ours.

    lm-eval's keys are ``acc,none`` and ``acc_stderr,none``: behind the comma stands the name of a
    filter. An error that it cannot give is a text, or missing.
    """
    means = {
        key.removesuffix(",none"): (value, found.get(key.replace(",", "_stderr,", 1)))
        for key, value in found.items()
        if "," in key and "_stderr," not in key
    }
    if len(questions):
        for score in ("p_right", "nll"):
            means[score] = (questions[score].mean(), questions[score].sem())
    if has_labels:
        recalls = questions.groupby("answer").correct.agg(["mean", "sem"])
        error = np.linalg.norm(recalls["sem"]) / len(recalls)
        means["balanced_acc"] = (recalls["mean"].mean(), error)
    return means
