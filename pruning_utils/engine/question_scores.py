"""Scores of one question, from the log-likelihoods that lm-eval has asked a model for."""

from __future__ import annotations

from typing import Any

import numpy as np


def scores(scorer: Any, task: Any, sample: dict) -> dict | None:
    """Scores of one question, as :func:`evaluation.evaluate_tasks` defines them.

    Args:
        scorer: From :func:`prefixes.language_model`.
        task: A task object of lm-eval.
        sample: What lm-eval keeps of a question of it.

    Returns:
        The scores by name. None for a task of another kind than multiple choice or one answer. None
        for one that judges by code of its own: several of its answers may be right. None for a
        question none of whose choices is said to be right.

    Raises:
        ValueError: If a log-likelihood is not finite.
    """
    if task.config.process_results is not None:
        return None
    if task.OUTPUT_TYPE == "loglikelihood":
        return _answer_scores(scorer, task, sample)
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_target:
        return None
    choices = task.doc_to_choice(sample["doc"])
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    answer = choices.index(target) if target in choices else target
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        return None
    loglikelihoods = _finite(task, sample)[: len(choices)]
    by_character = loglikelihoods / (
        1 if task.multiple_input else [len(choice) for choice in choices]
    )
    compared = by_character if "acc_norm" in task.aggregation() else loglikelihoods
    weights = np.exp(compared - compared.max())
    n_prompt, n_right = _lengths(scorer, *sample["arguments"][answer])
    return {
        "question_id": _question_id(sample),
        "correct": int(loglikelihoods.argmax() == answer),
        "correct_norm": int(by_character.argmax() == answer),
        "p_right": weights[answer] / weights.sum(),
        "nll": -loglikelihoods[answer] / n_right,
        "answer": answer,
        "is_cut": n_prompt + n_right > scorer.max_length + 1,
    }


def _answer_scores(scorer: Any, task: Any, sample: dict) -> dict:
    """Scores of a question with one answer."""
    total = _finite(task, sample)[0]
    is_greedy = int(sample["resps"][0][0][1])
    n_prompt, n_right = _lengths(scorer, *sample["arguments"][0])
    return {
        "question_id": _question_id(sample),
        "correct": is_greedy,
        "correct_norm": is_greedy,
        "p_right": np.nan,
        "nll": -total / n_right,
        "answer": 0,
        "is_cut": n_prompt + n_right > scorer.max_length + 1,
    }


def _question_id(sample: dict) -> int:
    return sample["doc"].get("question_id", sample["doc_id"])


def _finite(task: Any, sample: dict) -> np.ndarray:
    """Log-likelihoods of a question's requests, one each."""
    loglikelihoods = np.array([response[0][0] for response in sample["resps"]])
    if not np.isfinite(loglikelihoods).all():
        raise ValueError(
            f"log-likelihoods must be finite, got {loglikelihoods} for {task.task_name} "
            f"{_question_id(sample)}"
        )
    return loglikelihoods


def _lengths(scorer: Any, prompt: str, answer: str) -> tuple[int, int]:
    """Tokens of a prompt and of the answer after it."""
    if not prompt:
        # Before an answer without a prompt, lm-eval puts one token of its own.
        return 1, len(scorer.tok_encode(answer, add_special_tokens=False))
    prompt_ids, answer_ids = scorer._encode_pair(prompt, answer)
    return len(prompt_ids), len(answer_ids)
