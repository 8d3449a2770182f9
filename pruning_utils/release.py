"""A pruned model as others get it: a folder that plain transformers loads, with a model card and a
GGUF file."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch import nn

from pruning_utils import (
    __version__,
    efficiency,
    evaluation,
    models,
    recipe_study,
    results,
    runtime,
    shape_study,
    surgery,
)

CARD, CONVERTER = "README.md", "convert_hf_to_gguf.py"  # the converter is llama.cpp's
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def measure_release(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    n_windows: int,
    seq_len: int,
    batch_size: int,
) -> dict:
    """What a released model costs to keep and to run: Table 9 of arXiv:2411.15558.

    Args:
        point: ``layers`` that are gone (0-based numbers as a text) and ``recipe`` of a
            :class:`recipe_study.RecipeStudy`, which says whether the head is untied: no cost
            depends on the weights, so nothing is trained. What else it holds names it.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        n_windows: Windows of random tokens that are timed, after a batch that is not.
        seq_len: Tokens in each.
        batch_size: Windows in a forward pass.

    Returns:
        ``parameters``, ``macs`` (multiplications with an addition, of one text of 64 tokens),
        ``bytes`` of the weights in ``dtype``, and ``seconds`` for all windows.
    """
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    if point["layers"]:
        network = surgery.drop_layers(network, [int(layer) for layer in point["layers"].split()])
    for stage in filter(None, point["recipe"].split(" + ")):
        method, _, _, *words = stage.split()
        if method == "last_layers" and recipe_study.further_settings(words).get("untie", True):
            models.untie_head(network)
    found = efficiency.stored_parameters(network)
    vocabulary = network.get_input_embeddings().num_embeddings
    windows = torch.from_numpy(
        np.random.default_rng(0).integers(vocabulary, size=(n_windows, seq_len))
    )
    evaluation.token_losses(network, windows[:batch_size], batch_size=batch_size)
    started = time.perf_counter()
    evaluation.token_losses(network, windows, batch_size=batch_size)
    return {
        "parameters": found["total"],
        "macs": efficiency.forward_flops(network, batch_size=1, n_tokens=64) // 2,
        "bytes": found["bytes"],
        "seconds": time.perf_counter() - started,
    }


def release_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    recompute: bool = False,
    own_process: bool = True,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What :func:`measure_release` finds at these points, read if it is there, and the file that
    holds it."""
    path = results.table_path(profile, notebook, f"{results.slug(model)}-release")
    compute = functools.partial(measure_release, model=model, revision=revision, **settings)
    return results.sweep(
        points,
        compute,
        path=path,
        recompute=recompute,
        executor=shape_study.fresh_processes() if own_process else None,
        parameters={"model": models.identity(model, revision), **settings},
    ), path


def trained_model(
    point: dict, *, profile: str, model: str, revision: str | None, **settings
) -> tuple:
    """The model of a point of a :class:`recipe_study.RecipeStudy`, and its tokenizer: trained, or
    as it was kept when a table of this profile trained it. Other arguments, and errors, as
    there."""
    kept = recipe_study.checkpoints(profile, settings.get("healing_source"))
    study = recipe_study.RecipeStudy(
        [point], model=model, revision=revision, checkpoints=kept, **settings
    )
    network, tokenizer, *_ = study.loaded
    current = study.pruned(network, point)
    return (study._trained(current, tokenizer, point)[0] if point["recipe"] else current), tokenizer


def save_release(
    model: nn.Module, tokenizer, folder: str | os.PathLike, *, card: str, overwrite: bool = False
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
        The folder.

    Raises:
        ValueError: As for :func:`surgery.save`, or if what is loaded computes other logits: what
            was in the folder stays then.
    """
    tokens = torch.arange(32, device=model.device)[None]
    with tempfile.TemporaryDirectory() as trial:
        difference = logit_difference(model, surgery.save(model, tokenizer, trial), tokens)
    if difference != 0:  # or no number
        raise ValueError(
            f"what transformers loads differs from the model by {difference:g} in its logits"
        )
    folder = surgery.save(model, tokenizer, folder, overwrite=overwrite)
    with runtime.atomic_path(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return folder


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

    Args:
        base: Name of the model that it was made from.
        layers: 0-based numbers of its layers that are gone.
        n_layers: Number of its layers, L.
        parameters: That are stored.
        recipe: How it was trained.
        text: What it was trained on.
        scores: A row a measure, a column a model: printed as they are.
        record: Of the run: any plain values, such as parameters, versions and commit.

    Raises:
        ValueError: If there are no scores: a card without measurements says nothing.
    """
    if scores.empty:
        raise ValueError(
            "scores must have a row at least: a card without measurements says nothing"
        )
    header = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-pruning", "depth-pruning"],
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            "",
            f"# {base} without {len(layers)} of its {n_layers} layers",
            "",
            f"* Removed: layers {', '.join(map(str, layers))}, counted from 0; "
            f"{n_layers - len(layers)} are left, {parameters:,} parameters in all.",
            f"* Trained: {recipe}.",
            f"* On: {text}.",
            "",
            "It is for research on pruning. What the base model may be used for holds for this "
            "one, and so do its faults; removing layers adds more.",
            "",
            "## Scores",
            "",
            scores.to_markdown(),
            "",
            "## How it was made",
            "",
            f"With pruning_utils {__version__}:",
            "",
            "```json",
            json.dumps(record, indent=1, sort_keys=True),
            "```",
            "",
        ]
    )


def logit_difference(
    model: nn.Module, folder: str | os.PathLike, input_ids: torch.Tensor, **loading
) -> float:
    """Largest absolute difference of the logits of a model and of what plain transformers loads
    from a folder, given token ids of shape ``(N, T)``; ``loading`` are keywords of its
    ``from_pretrained``, such as ``gguf_file``."""
    from transformers import AutoModelForCausalLM

    loaded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, **loading)
        .to(model.device)
        .eval()
    )
    with torch.no_grad():
        return float((model(input_ids).logits - loaded(input_ids).logits).abs().max())


def export_gguf(folder: str | os.PathLike, *, kind: str = "bf16") -> Path | None:
    """A saved model as one GGUF file beside its weights, by llama.cpp's converter; None where that
    is not on the path.

    Args:
        folder: Of a saved model and its tokenizer.
        kind: Of the weights, one of ``GGUF_TYPES``.

    Raises:
        ValueError: If the kind is unknown, the folder holds no model, or the converter refuses it;
            what it says is in the message, and nothing half-written stays.
    """
    folder = Path(folder).resolve()
    if kind not in GGUF_TYPES:
        raise ValueError(f"kind must be one of {', '.join(GGUF_TYPES)}, got {kind!r}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no saved model")
    converter = shutil.which(CONVERTER)
    if converter is None:
        return None
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
