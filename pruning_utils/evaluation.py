"""What a model is worth: perplexity on windows of text, and benchmark questions scored through
lm-eval in process."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from pruning_utils import data, models
from pruning_utils.engine import hub, passes, prefixes

TASK_FILES = Path(__file__).with_name("tasks")
TASKS = (*data.BENCHMARKS, "mmlu_letter")
# On these a model of 135 million parameters beats a guess.
POOLED = (
    "piqa",
    "openbookqa",
    "commonsenseqa",
    "siqa",
)
OFFICIAL = (
    "lm-eval:"  # prefix of a task that lm-eval brings itself and that reads its data from a hub
)
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
    """Perplexity, exp(mean loss) over all N * (T - 1) predicted tokens; 1 or more, ``inf`` beyond
    709 nats a token.

    Arguments and errors as for :func:`token_losses`.
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
        batch_size: Windows in one forward pass, at least 1; no context is carried from window to
            window.

    Returns:
        float32 tensor of shape ``(N, T - 1)`` on the CPU; column t is the loss of token t + 1.

    Raises:
        ValueError: If an argument is out of range, or a loss is NaN.
    """
    models.check_input_ids(model, input_ids, shortest=2)
    if input_ids.dtype == torch.bool:
        raise ValueError("input_ids must hold integers, got torch.bool")
    _check_count("batch_size", batch_size)
    input_ids = input_ids.to(model.get_input_embeddings().weight.device, torch.long)
    with _evaluating(model):
        losses = torch.cat(
            [_batch_losses(model, batch).cpu() for batch in input_ids.split(batch_size)]
        )
    if losses.isnan().any():
        raise ValueError(
            f"the losses must be numbers, but {int(losses.isnan().sum())} of {losses.numel()} are "
            f"NaN, first in window {int(losses.isnan().any(1).nonzero()[0])}"
        )
    return losses


def _check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module has its own mode back afterwards."""
    with contextlib.ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            # In evaluation mode 4-bit layers on a CPU pack their weights: slower here, and no
            # training afterwards.
            module.training = bool(getattr(module, "support_avx512bf16_for_cpu", False))
        yield


def _batch_losses(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Losses (B, T - 1): the decoder layers run once, then the model's own head on chunks of their
    output."""
    backbone, output = passes.run_backbone(model, batch)
    if backbone is None:
        return torch.stack(
            [_losses(model(row[None], use_cache=False).logits[0, :-1], row[1:]) for row in batch]
        )
    states = output.last_hidden_state[:, :-1].flatten(0, 1)
    targets = batch[:, 1:].flatten()
    losses = []
    for logits in passes.head_logits(model, backbone, output, states):
        losses.append(_losses(logits, targets[: len(logits)]))
        targets = targets[len(logits) :]
    return torch.cat(losses).view(len(batch), -1)


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
    tokenizer,
    tasks: Sequence[str],
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    shot_order: int = 0,
) -> Evaluation:
    """Score multiple-choice questions with lm-eval, in this process, on the model as it is in
    memory.

    With l_c the log-likelihood of choice c after the prompt (nats, summed over its tokens), k_c its
    length in characters, r the right choice and m its length in tokens, a question gives

    - ``correct``: 1 if l_r is the largest l_c; ``correct_norm``: 1 if l_r / k_r is the largest l_c
      / k_c; else 0;
    - ``p_right``: ``exp(s_r) / sum_c exp(s_c)`` with s_c = l_c / k_c, the continuous side of
      ``correct_norm``; a guess gives 1 / choices. Under plain sums a short choice wins by its
      length, and most questions are near 0 or 1;
    - ``nll``: ``-l_r / m``, nats per token. It moves long before any rank, with the wording of the
      answer as well as with its truth, so that it may fall while layers go.

    Their means are ``acc``, ``acc_norm``, ``p_right`` and ``nll``, with standard errors s / sqrt(n)
    (s the sample deviation; NaN for one question). Where all questions have the same labels
    (``boolq``: no, yes; ``mmlu_letter``: A to D), s_c is l_c, and ``balanced_acc``, the mean of the
    labels' recalls, replaces ``acc_norm``, its error the root of their summed squared errors over
    their number; a guess gives 1 / labels, ``boolq``'s majority 0.622 in ``acc``.

    Questions stand in one fixed shuffled order. ``limit`` takes the first so many: 300 contain the
    150, and every model gets the same. With shots, the last 16 in that order are not scored, and
    the first of them start every prompt.

    Args:
        model: A causal language model, as for :func:`token_losses`.
        tokenizer: Its tokenizer; a copy of it is used.
        tasks: Names among :data:`TASKS`, which need no network (``mmlu`` scores the texts of the
            answers, ``mmlu_letter`` their letters), or of tasks that lm-eval brings, with data from
            a hub; ``lm-eval:piqa`` is its own where a name is taken. Its tasks carry the prefix in
            the tables, with all their metrics, and keep the order of their rows, whose number is
            the ``question_id``.
        num_fewshot: Solved questions before each one, 0 to 16.
        limit: Questions of each task, at least 1; None takes all.
        batch_size: Questions in one forward pass, at least 1.
        shot_order: 0 takes the shots in their fixed order; any other number is the seed of another
            order of the same shots (with lm-eval's tasks, the seed of their choice).

    Raises:
        ValueError: If an argument is out of range, a task unknown or its data out of reach, all
            before any scoring; or if a log-likelihood is not finite.
    """
    _check_count("batch_size", batch_size)
    loaded = load_tasks(tasks, num_fewshot=num_fewshot, limit=limit, shot_order=shot_order)
    with _quiet_libraries(), _evaluating(model):
        scorer = prefixes.language_model(model, tokenizer, batch_size)
        parts = [_score(scorer, name, found, num_fewshot, limit) for name, found in loaded.items()]
    columns = ["task", "question_id", "correct", "correct_norm", "p_right", "nll"]
    return Evaluation(
        pd.DataFrame([row for rows, _ in parts for row in rows]),
        pd.DataFrame([row for _, rows in parts for row in rows], columns=columns),
    )


def load_tasks(
    tasks: Sequence[str], *, num_fewshot: int = 0, limit: int | None = None, shot_order: int = 0
) -> dict[str, dict]:
    """lm-eval's task objects by name: the check that :func:`evaluate_tasks`, whose arguments these
    are, begins with.

    Raises:
        ValueError: If an argument is out of range, a task unknown or its data out of reach.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(
            f"tasks must be a list with one or more of {', '.join(TASKS)}, got {tasks!r}"
        )
    for name, value in (("num_fewshot", num_fewshot), ("shot_order", shot_order)):
        _check_count(name, value, 0)
    _check_count("limit", 1 if limit is None else limit)
    with _quiet_libraries():
        return {name: _load_task(name, num_fewshot, shot_order) for name in dict.fromkeys(tasks)}


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Only errors from the libraries underneath; their levels, and the random state that they draw
    from, come back."""
    from lm_eval.api import task

    with contextlib.ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        for name in ("lm_eval", "datasets", "huggingface_hub", "transformers"):
            library = logging.getLogger(name)
            undo.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        # Flashing bars.
        undo.enter_context(passes.replaced(task, "tqdm", lambda items, **_: items))
        undo.enter_context(warnings.catch_warnings(action="ignore"))
        yield


@functools.cache
def _task_manager(embedded: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=TASK_FILES if embedded else None, include_defaults=not embedded)


def _load_task(name: str, num_fewshot: int, shot_order: int) -> dict:
    """lm-eval's task objects behind a name, with their questions."""
    manager, own_name = _task_manager(name in TASKS), str(name).removeprefix(OFFICIAL)
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
        if name in TASKS and num_fewshot > (most := len(task.fewshot_docs())):
            raise ValueError(f"num_fewshot must be in [0, {most}], got {num_fewshot}")
        if task.get_config("num_fewshot") != 0:  # 0 in a task file is meant to stay
            task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(shot_order)
        if name in TASKS and shot_order:
            order = np.roll(np.random.default_rng(shot_order).permutation(num_fewshot), shot_order)
            task.sampler.replace_df([list(task.fewshot_docs())[index] for index in order])
    return loaded


def _score(
    scorer, name: str, loaded: dict, num_fewshot: int, limit: int | None
) -> tuple[list, list]:
    """Rows of the summary and of the questions for one name: one of our tasks, or a task or a group
    of lm-eval's."""
    import lm_eval

    prefix, summary, scores = "" if name in TASKS else OFFICIAL, [], {}
    if name in TASKS and num_fewshot:
        n_scored = len(loaded["tasks"][name].eval_docs) - len(loaded["tasks"][name].fewshot_docs())
        limit = min(limit or n_scored, n_scored)
    results = lm_eval.evaluate(lm=scorer, task_dict=loaded, limit=limit, bootstrap_iters=1000)
    for label, task in loaded["tasks"].items():
        found = (_question_scores(scorer, task, sample) for sample in results["samples"][label])
        scores[label] = [{"task": prefix + label} | row for row in found if row]
        if n_cut := sum(row["is_cut"] for row in scores[label]):
            logger.warning(
                "%d prompts of %s are cut in front: the context is %d tokens",
                n_cut,
                label,
                scorer.max_length,
            )
    for label, found in results["results"].items():
        means = _means(
            found,
            pd.DataFrame(scores.get(label, [])),
            name in TASKS and "acc_norm,none" not in found,
        )
        summary += [
            {
                "task": prefix + label,
                "metric": metric,
                "value": value,
                "stderr": error if isinstance(error, float) else np.nan,
                "n": found["sample_len"],
            }
            for metric, (value, error) in means.items()
        ]
    return summary, [row for rows in scores.values() for row in rows]


def _question_scores(scorer, task, sample: dict) -> dict | None:
    """Scores of one question; None where one of lm-eval's tasks has no choices with one right
    answer."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.multiple_target:
        return None
    choices, answer = task.doc_to_choice(sample["doc"]), sample["target"]
    answer = choices.index(answer) if isinstance(answer, str) else answer
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
    n_prompt, n_right = map(
        len, scorer._encode_pair(prompt, right) if prompt else ([0], scorer.tok_encode(right))
    )
    return {
        "question_id": question_id,
        "correct": int(loglikelihoods.argmax() == answer),
        "correct_norm": int(by_character.argmax() == answer),
        "p_right": weights[answer] / weights.sum(),
        "nll": -loglikelihoods[answer] / n_right,
        "answer": answer,
        "is_cut": n_prompt + n_right > scorer.max_length + 1,
    }


def _means(found: dict, table: pd.DataFrame, has_labels: bool) -> dict[str, tuple]:
    """(mean, standard error) of what lm-eval found for a task, and of our own scores."""
    means = {
        key.removesuffix(",none"): (value, found.get(key.replace(",", "_stderr,", 1)))
        for key, value in found.items()
        if "," in key and "_stderr," not in key
    }
    if len(table):
        means |= {score: (table[score].mean(), table[score].sem()) for score in ("p_right", "nll")}
    if has_labels:
        recalls = table.groupby("answer").correct.agg(["mean", "sem"])
        means["balanced_acc"] = (
            recalls["mean"].mean(),
            np.linalg.norm(recalls["sem"]) / len(recalls),
        )
    return means
