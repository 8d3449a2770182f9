"""A pruned model as others get it: a folder that plain transformers loads, a card, a GGUF file."""

from __future__ import annotations

import html
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pruning_utils import __version__, models, runtime, surgery
from pruning_utils.engine import checks, memory, model_files, passes, saved_models, wrappers
from pruning_utils.engine.later import nn, torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CARD = "README.md"
CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp
# What Markdown may take for more than text, within a line without HTML: escapes, fences, links.
MARKUP = re.compile(r"\\|`{2,}|~{2,}|[\[\]]")
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
logger = logging.getLogger(__name__)


def save_release(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    *,
    card: str,
    overwrite: bool = False,
) -> Path:
    """Save a model with its card, as :func:`surgery.save` does, after seeing that plain
    transformers loads the same.

    Args:
        model: The pruned and trained model, adapters merged.
        tokenizer: Its tokenizer.
        folder: Where to.
        card: Of :func:`model_card`.
        overwrite: Replace a folder whatever it holds.

    Returns:
        The folder. Where there is no memory for a second model, logits are not compared, and a
        warning says so.

    Raises:
        ValueError: As for :func:`surgery.save`, if the model has no head or the card is no text,
            or if what is loaded computes other logits: what was in the folder stays then.
    """
    if not isinstance(card, str):
        raise ValueError(f"card must be a text, of model_card, got {card!r}")
    wrappers.refuse_wrapped(model, with_head=True)
    surgery.directory_to_write(folder, overwrite=overwrite)
    n_tokens = min(32, wrappers.vocabulary_size(model), models.context_length(model.config))
    tokens = torch.arange(n_tokens, device=model.device)[None]

    def finish(new: Path) -> None:
        """See that it computes the same, and add the card."""
        try:
            with passes.evaluation_mode(model):
                difference = logit_difference(model, new, tokens)
        except memory.ERRORS as error:
            if not memory.is_lack_of_memory(error):
                raise
            # Names and shapes of all weights, and some values of each, have been compared.
            logger.warning("there is no memory for a second model, so no logits were compared")
            difference = 0
        if difference != 0:  # or no number
            raise ValueError(
                f"what transformers loads differs from the model by {difference:g} in its logits"
            )
        (new / CARD).write_text(card, encoding="utf-8")

    return surgery.save(model, tokenizer, folder, overwrite=overwrite, finish=finish)


def model_card(
    *,
    base: str,
    layers: Sequence[int],
    n_layers: int,
    parameters: int,
    recipe: str,
    text: str,
    scores: pd.DataFrame,
    record: dict,
) -> str:
    """A card that says what a model is, how it was made and how well it does: Markdown with the
    header of model hubs.

    What is given is shown as text. It becomes no HTML, link, fence, line or cell of its own; only
    code between single backticks stays code.

    Args:
        base: Name of the model that it was made from; of a directory, the last part of its path.
        layers: 0-based numbers of its layers that are gone.
        n_layers: Number of its layers, L.
        parameters: That are stored.
        recipe: How it was trained.
        text: What it was trained on.
        scores: A row a measure, a column a model: numbers are printed as they are.
        record: Of the run: any plain values, such as parameters, versions and commit.

    Raises:
        ValueError: If there are no scores, as a card without measurements says nothing; if a layer
            is none of the base model's; or if ``record`` holds what JSON does not.
    """
    if not isinstance(scores, pd.DataFrame) or scores.empty:
        raise ValueError(
            "scores must be a table with a row at least, as a card without measurements says "
            f"nothing, got {scores!r}"
        )
    for layer in layers:
        checks.whole_number("each of layers", layer, 0, n_layers - 1)
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must be different ones, got {list(layers)}")
    checks.whole_number("parameters", parameters, 0)
    from huggingface_hub import ModelCardData

    # Where it lies on this machine is of no use to others.
    base = Path(base).resolve().name if os.path.isdir(base) else base
    header = ModelCardData(
        base_model=_one_line(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["layer-pruning", "depth-pruning"],
    )
    left = n_layers - len(layers)
    stay = f"{left} {'is' if left == 1 else 'are'}"
    return f"""---
{header.to_yaml()}
---

# {_shown(base)} without {len(layers)} of its {n_layers} layers

* Removed: layers {_shown(", ".join(map(str, layers)))}, counted from 0; {stay} left, \
{parameters:,} parameters in all.
* Trained: {_shown(recipe)}.
* On: {_shown(text)}.

It is for research on pruning. What the base model may be used for holds for this one, and so do \
its faults; removing layers adds more.

## Scores

{_shown_table(scores).to_markdown(disable_numparse=True)}

## How it was made

With pruning_utils {__version__}:

```json
{_shown_json(record)}
```
"""


def _one_line(text: object) -> str:
    """A text with single blanks where it has blanks, line ends or control characters."""
    printed = "".join(one if one.isprintable() else " " for one in str(text))
    return " ".join(printed.split())


def _shown(text: object) -> str:
    """A text as Markdown that shows it within a line."""
    line = html.escape(_one_line(text), quote=False)
    return MARKUP.sub(lambda found: re.sub(r"(.)", r"\\\1", found[0]), line)


def _shown_cell(value: object) -> str:
    """A cell of a table: a number as Python prints it, the parts of a tuple as one text."""
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    return _shown(value).replace("|", "\\|")


def _shown_table(scores: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts and names are cells of Markdown, and nothing else."""
    shown = scores.map(_shown_cell)
    heading = "" if scores.index.name is None else _shown_cell(scores.index.name)
    shown.index = pd.Index(map(_shown_cell, scores.index), name=heading)
    shown.columns = pd.Index(map(_shown_cell, scores.columns))
    return shown


def _shown_json(record: dict) -> str:
    """JSON that is the same when it is read, and shows no HTML or backticks when it is not."""
    try:
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"record must hold plain values: {error}") from error
    return re.sub("[<>&`]", lambda found: f"\\u{ord(found[0]):04x}", text)


def logit_difference(
    model: nn.Module, folder: str | os.PathLike, input_ids: torch.Tensor, **loading: Any
) -> float:
    """Largest absolute difference of the logits of a model and of what plain transformers loads
    from a folder, given token ids of shape ``(N, T)``; ``loading`` are keywords of its
    ``from_pretrained``, such as ``gguf_file``."""
    kind = model_files.auto_class(model.config)
    device = passes.input_device(model)
    loading = {"attn_implementation": _attention_of(model.config), **loading}
    loaded = kind.from_pretrained(folder, dtype=model.dtype, **loading).to(device).eval()
    input_ids = input_ids.to(device)
    with torch.no_grad():
        return float((model(input_ids).logits - loaded(input_ids).logits).abs().max())


def _attention_of(config: PreTrainedConfig) -> dict[str, str | None]:
    """The implementation of attention of each part of a model: another one adds in another order.

    Parts are named by their configurations, and the model itself by an empty text.
    """
    found = {"": getattr(config, "_attn_implementation", None)}
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            found[name] = getattr(part, "_attn_implementation", None)
    return found


def export_gguf(folder: str | os.PathLike, *, kind: str = "bf16") -> Path | None:
    """A saved model as one GGUF file beside its weights, by llama.cpp's converter; None where that
    is not on the path.

    Args:
        folder: Of a saved model and its tokenizer.
        kind: Of the weights, one of ``GGUF_TYPES``.

    Raises:
        ValueError: If the kind is unknown, the folder holds no model or one that GGUF cannot tell,
            or the converter refuses it; what it says is in the message, and nothing half-written
            stays.
    """
    folder = checks.file_path("folder", folder).resolve()
    if kind not in GGUF_TYPES:
        raise ValueError(f"kind must be one of {', '.join(GGUF_TYPES)}, got {kind!r}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no saved model")
    converter = shutil.which(CONVERTER)
    if converter is None:
        return None
    model_files.refuse_what_gguf_cannot_tell(folder)
    target = folder / f"{folder.name}.{kind}.gguf"
    # A link would hide the gguf package that lies beside it.
    script = str(Path(converter).resolve())
    with runtime.atomic_path(target) as temporary:
        done = subprocess.run(
            [sys.executable, script, str(folder), "--outfile", str(temporary), "--outtype", kind],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not temporary.is_file() or not temporary.stat().st_size:
            raise ValueError(f"{CONVERTER} failed on {folder.name}: {done.stderr.strip()[-500:]}")
    if (folder / saved_models.MARKER).is_file():
        saved_models.mark(folder, target.name)
    return target


def vllm_text(folder: str | os.PathLike, prompt: str, *, new_tokens: int = 16) -> str | None:
    """What vLLM generates greedily from a saved model; None where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm import LLM, SamplingParams

    (found,) = LLM(str(folder)).generate(
        [prompt], SamplingParams(temperature=0, max_tokens=new_tokens)
    )
    return found.outputs[0].text
