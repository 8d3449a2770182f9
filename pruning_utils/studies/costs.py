"""What models cost: seconds, memory and bytes, of use, of training and of storage (07, 08, 10, 12).

Each function here takes a point and measures it; :func:`study.point_table` keeps what it finds.
"""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pruning_utils import data, efficiency, evaluation, healing, models, runtime, surgery
from pruning_utils.engine.later import nn, torch
from pruning_utils.studies.recipes import Recipe, Stage, unties_head
from pruning_utils.studies.shapes import shaped
from pruning_utils.studies.study import PRECISIONS, FreshProcesses, point_table


def measure_speed(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    new_tokens: int,
    warmups: int,
    repeats: int,
) -> list[dict]:
    """Rows of :func:`efficiency.generation_speed`, a ``run`` each.

    Args:
        point: ``layers`` and ``width`` as for :func:`shapes.shaped`, ``batch_size`` and
            ``prompt_tokens``.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        new_tokens: Tokens that are generated.
        warmups: Runs that are not measured.
        repeats: Runs that are.
    """
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    network = shaped(network, point["layers"], point["width"])
    found = efficiency.generation_speed(
        network,
        batch_size=point["batch_size"],
        prompt_tokens=point["prompt_tokens"],
        new_tokens=new_tokens,
        warmups=warmups,
        repeats=repeats,
    )
    return [{"run": run, **row} for run, row in enumerate(found.to_dict("records"))]


def measure_memory(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    new_tokens: int,
    own_process: bool = True,
) -> dict:
    """Peak memory of a model that is only used: what :func:`generation_memory` finds.

    The model is made in one process and used in another, for making it takes more memory.

    Args:
        point: As for :func:`measure_speed`.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        new_tokens: Tokens that are generated.
        own_process: False does both here, which shows that it works and measures nothing.
    """
    alone = FreshProcesses() if own_process else ThreadPoolExecutor(1)
    with tempfile.TemporaryDirectory() as folder, alone:
        shape = (point["layers"], point["width"])
        alone.submit(_write, folder, model, revision, dtype, *shape).result()
        return alone.submit(
            generation_memory,
            folder,
            dtype=dtype,
            batch_size=point["batch_size"],
            prompt_tokens=point["prompt_tokens"],
            new_tokens=new_tokens,
        ).result()


def memory_table(
    points: Sequence[dict], *, own_process: bool, **given: Any
) -> tuple[pd.DataFrame, Path]:
    """What :func:`measure_memory` finds at points, and the file that holds it.

    Other arguments as for :func:`study.point_table`.
    """
    return point_table(
        functools.partial(measure_memory, own_process=own_process),
        points,
        table="memory",
        recorded={"own_process": own_process},
        **given,
    )


def _write(
    folder: str, model: str, revision: str | None, dtype: str, layers: str, size: str
) -> None:
    network, tokenizer = models.load_model(model, revision=revision, dtype=dtype)
    surgery.save(shaped(network, layers, size), tokenizer, folder)


def generation_memory(
    folder: str, *, dtype: str, batch_size: int, prompt_tokens: int, new_tokens: int
) -> dict:
    """Peak memory of this process at three moments; ask it in a fresh one.

    Args:
        folder: Of a saved model.
        dtype: Of the weights, as for :func:`models.load_model`.
        batch_size: Texts generated at once.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens generated after it, with the key-value cache.

    Returns:
        Bytes as by :func:`runtime.peak_memory_bytes`: ``before`` (most of the libraries),
        ``loaded`` (the model opened; on a CPU its file is mapped and read when it is used) and
        ``generated`` (texts generated); ``weights``, the bytes of all parameters and buffers.
    """
    before = runtime.peak_memory_bytes()
    network, _ = models.load_model(folder, dtype=dtype)
    opened = runtime.peak_memory_bytes()
    found = efficiency.generation_speed(
        network,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        warmups=0,
        repeats=1,
    )
    return {
        "before": before,
        "loaded": opened,
        "generated": int(found["peak_bytes"].max()),
        "weights": efficiency.weight_bytes(network),
    }


def measure_training(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    steps: int,
    healing_settings: dict,
) -> dict:
    """What training costs at a point.

    Args:
        point: ``layers`` that go (a text of 0-based numbers) and ``method``.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        seq_len: Tokens in a window.
        steps: Steps that are measured, after one that is not.
        healing_settings: Keywords for :func:`healing.heal`; ``batch_size`` in windows.

    Returns:
        ``trainable`` parameters, ``step_seconds`` (mean), ``tokens_per_second`` and ``peak_bytes``
        of the process.
    """
    network, tokenizer = models.load_model(model, revision=revision, dtype=dtype)
    network = shaped(network, point["layers"], "")
    settings = {**healing_settings, "method": point["method"], "warmup_steps": 0}
    windows = data.healing_windows(tokenizer, (1 + steps) * settings["batch_size"], seq_len)
    moments = []
    for count in (1, 1 + steps):  # what happens once is in both
        started = time.perf_counter()
        healed = healing.heal(network, tokenizer, windows, **{**settings, "steps": count})
        moments.append(time.perf_counter() - started)
    seconds = (moments[1] - moments[0]) / steps
    return {
        "trainable": healed.trainable_parameters,
        "step_seconds": seconds,
        "tokens_per_second": settings["batch_size"] * seq_len / seconds,
        "peak_bytes": runtime.peak_memory_bytes(),
    }


def measure_cost(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    seq_len: int,
    steps: int,
    healing_settings: dict,
) -> dict:
    """What a recipe costs, and how large the model is that it leaves: Table 4 of arXiv:2411.15558.

    Arguments and errors as for :func:`measure_training`, but for the point.

    Args:
        point: ``layers`` that go, and a ``recipe`` of one stage without rate and steps, such as
            ``"last_layers last_k=2 untie=false"``.

    Returns:
        What it finds, and ``stored``, the parameters of the trained model as it is saved, adapters
        merged: an untied head is one more matrix.
    """
    said = dict(Stage.parse(point["recipe"]).settings)
    asked = {**point, "method": said.pop("method")}
    settings = {**healing_settings, **said}
    # Libraries are imported by the first training of a process, which is not measured.
    for count in (1, steps):
        found = measure_training(
            asked,
            model=model,
            revision=revision,
            dtype=dtype,
            seq_len=seq_len,
            steps=count,
            healing_settings=settings,
        )
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    network = as_stored(shaped(network, point["layers"], ""), point["recipe"])
    return {**found, "stored": efficiency.stored_parameters(network)["total"]}


def as_stored(network: nn.Module, recipe: str) -> nn.Module:
    """The model with the head that a recipe leaves, in place: its own where it is untied."""
    for stage in Recipe.parse(recipe).stages:
        settings = stage.settings
        if unties_head(settings):
            models.untie_head(network)
    return network


def measure_storage(point: dict, *, model: str, revision: str | None) -> dict:
    """Bytes of a model whose weights are stored in few bits.

    Args:
        point: ``layers`` that go, and a ``precision`` (``bfloat16``, ``int8``, ``nf4``).
        model: Name for :func:`models.load_model`, with ``revision``.

    Returns:
        ``disk`` (of its safetensors) and ``memory`` (of its weights as loaded).
    """
    network, tokenizer = models.load_model(model, revision=revision)
    # As the weights of the papers' models are kept.
    network = shaped(network, point["layers"], "").bfloat16()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as smaller:
        surgery.save(network, tokenizer, folder)
        if point["precision"] != PRECISIONS[0]:
            # Nothing is multiplied.
            with warnings.catch_warnings(action="ignore", category=runtime.EmulatedPrecision):
                network, _ = models.load_model(
                    folder, quantize=point["precision"], dtype="bfloat16"
                )
            network.save_pretrained(smaller)
            folder = smaller
        files = Path(folder).glob("*.safetensors")
        return {
            "disk": sum(path.stat().st_size for path in files),
            "memory": efficiency.weight_bytes(network),
        }


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
        point: ``layers`` that go (0-based numbers as a text) and a ``recipe``, which says whether
            the head is untied: no cost depends on the weights, so nothing is trained. What else it
            holds names it.
        model: Name for :func:`models.load_model`, with ``revision`` and ``dtype``.
        n_windows: Windows of random tokens that are timed, after a batch that is not.
        seq_len: Tokens in each.
        batch_size: Windows in a forward pass.

    Returns:
        ``parameters``, ``macs`` (multiplications with an addition, of one text of 64 tokens),
        ``bytes`` of the weights in ``dtype``, and ``seconds`` for all windows.
    """
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    network = as_stored(shaped(network, point["layers"], ""), point["recipe"])
    found = efficiency.stored_parameters(network)
    vocabulary = network.get_input_embeddings().num_embeddings
    tokens = np.random.default_rng(0).integers(vocabulary, size=(n_windows, seq_len))
    windows = torch.from_numpy(tokens)
    evaluation.token_losses(network, windows[:batch_size], batch_size=batch_size)
    started = time.perf_counter()
    evaluation.token_losses(network, windows, batch_size=batch_size)
    seconds = time.perf_counter() - started
    return {
        "parameters": found["total"],
        "macs": efficiency.forward_flops(network, batch_size=1, n_tokens=64) // 2,
        "bytes": found["bytes"],
        "seconds": seconds,
    }
