"""Count the tokens of each task's questions, which `run_notebooks.py --plan` multiplies.

Writes reference/question_tokens.csv, by the tokenizer of SmolLM2-135M-Instruct: a plan loads no
tokenizer of the models that it is for.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pruning_utils import evaluation, models, runtime

N_COUNTED = 400  # questions of a task, whose mean stands for all
N_SHOTS = 5  # that the length of a shot is measured on
FILE = "question_tokens.csv"


def counted(task: str, tokenizer: Any) -> dict[str, int | float | str]:
    """A row of the table, by the first 400 questions of a task, equally many of each subject.

    Returns:
        ``task``; ``questions``, all of them; ``tokens`` of a question, its prompt and answers, each
        once; ``answer_tokens`` among them; ``longest``, of one question with its answers;
        ``subjects``, each of which has shots of its own; ``shot_tokens``, of a shot where they are
        longest, 0 for tasks that take none.
    """
    prompts: list[str] = []
    answers: list[list[str]] = []
    subjects = evaluation.load_tasks([task])[task]["tasks"]
    for asked in subjects.values():
        most = -(-N_COUNTED // len(subjects))
        for question in itertools.islice(asked.eval_docs, most):
            has_choices = asked.OUTPUT_TYPE == "multiple_choice"
            given = (
                asked.doc_to_choice(question) if has_choices else [asked.doc_to_target(question)]
            )
            answers.append([f" {answer}" for answer in given])
            prompts.append(str(asked.doc_to_text(question)))
    of_prompts = lengths(tokenizer, prompts)
    flat = lengths(tokenizer, [answer for row in answers for answer in row])
    ends = np.cumsum([len(row) for row in answers])
    of_answers = np.add.reduceat(flat, np.r_[0, ends[:-1]])
    return {
        "task": task,
        "questions": sum(len(asked.eval_docs) for asked in subjects.values()),
        "tokens": round(float((of_prompts + of_answers).mean()), 1),
        "answer_tokens": round(float(of_answers.mean()), 1),
        "longest": int((of_prompts + of_answers).max()),
        "subjects": len(subjects),
        "shot_tokens": shot_tokens(task, tokenizer),
    }


def shot_tokens(task: str, tokenizer: Any) -> int:
    """Tokens of a shot, of the subject whose shots are longest; 0 where a task takes none."""
    try:
        subjects = evaluation.load_tasks([task], num_fewshot=N_SHOTS)[task]["tasks"]
    except ValueError:
        return 0
    shots = []
    for asked in subjects.values():
        drawn = asked.sampler.sample(N_SHOTS)
        shots.append("\n\n".join(solved(asked, one) for one in drawn))
    return int(lengths(tokenizer, shots).max() / N_SHOTS)


def solved(asked: Any, question: dict) -> str:
    """A question with an answer of it; of a sentence with a gap, the sentence with a choice."""
    prompt = asked.doc_to_text(question)
    answer = asked.doc_to_choice(question)[0] if asked.OUTPUT_TYPE == "multiple_choice" else ""
    return f"{prompt} {answer}" if isinstance(prompt, str) else answer


def lengths(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Tokens of each text, without special ones."""
    return np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    _, tokenizer = models.load_model()
    with evaluation.quiet_libraries():
        table = pd.DataFrame([counted(task, tokenizer) for task in evaluation.TASKS])
    table.to_csv(Path(runtime.project_root()) / "reference" / FILE, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
