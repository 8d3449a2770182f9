"""What readers of figures, tables and sentences call what has another name in code."""

from __future__ import annotations

import re
from typing import Any

# Line styles of levels in figures that are no curve: one for all figures.
LEVEL_LINES = {
    "unpruned": "-",
    "chance": ":",
    "guess": ":",
    "floor": ":",
    "majority": "--",
    "uniform guess": "-.",
    "ln V": "-.",
    "same time": "-",
    "5 % faster": ":",
}
# Of all other levels.
OTHER_LINE = (0, (4, 1, 1, 1, 1, 1))
# In figures.
NAMES = {
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "piqa": "PIQA",
    "openbookqa": "OpenBookQA",
    "boolq": "BoolQ",
    "mmlu": "MMLU",
    "mmlu_continuation": "MMLU, by text",
    "social_iqa": "Social IQa",
    "commonsenseqa": "CommonsenseQA",
    "lambada_openai": "LAMBADA",
    "gsm8k_chain": "GSM8K",
    "basic_skills": "basic skills",
    "xsum": "XSum",
    "quac": "QuAC",
    "c4": "C4",
    "wikitext2": "WikiText-2",
    "lora": "LoRA",
    "full": "all weights",
    "smollm2-135m": "SmolLM2-135M-Instruct",
    "gemma-3-270m": "Gemma 3 270M",
}

# In tables, where words that stand for columns and rules appear too.
READER_NAMES = {
    **NAMES,
    "similarity": "closest block",
    "deepest": "deepest but last",
    "nf4": "NF4",
    "ptb": "PTB",
    "taylor": "Taylor",
    "taylor+": "Taylor+",
    "BI": "block influence",
    "PPL": "perplexity",
    "Magnitude-l1": "magnitude L1",
    "Magnitude-l2": "magnitude L2",
    "pruned": "unhealed",
    "n_dropped": "layers removed",
    "n_samples": "windows",
    "p_holm": "p after Holm",
    "p_equal_holm": "p of equality after Holm",
    "detectable": "detectable difference",
    "runs_sd": "sd of runs",
    "block_size": "layers in the block",
    "tokens_per_parameter": "tokens per parameter",
    "times_the_papers": "times the paper's",
    "dataset": "data",
    "verdict": "outcome",
}
PATH = re.compile(r"/\w")  # also the name of a model on a hub
# A word of a text, or a name of several words that begins as one of code does.
NAME = re.compile(r"deepest but last|[A-Za-z][\w+-]*")


def in_words(label: object) -> object:
    """A text with each name of code in it replaced; a path or anything else as it is."""
    if not isinstance(label, str) or label.startswith("~") or PATH.search(label):
        return label
    told = NAME.sub(lambda found: READER_NAMES.get(found[0], found[0]), label)
    return told.replace(" - ", " minus ")


def style_of(level: str) -> Any:
    """Line style of a level that is no curve, as matplotlib takes it."""
    return LEVEL_LINES.get(level, OTHER_LINE)
