"""Memory of a model that is only used: written first, then read by a process that does nothing
else."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from pruning_utils import efficiency, models, results, runtime, shape_study, surgery


def measure_memory(
    point: dict,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    new_tokens: int,
    own_process: bool = True,
) -> dict:
    """What :func:`generation_memory` finds for the shape of a point: ``layers``, ``width``,
    ``batch_size`` and ``prompt_tokens``. The shape is made in one process and used in another, for
    making it takes more memory; without ``own_process`` both are done here, which shows that it
    works and measures nothing."""
    alone = shape_study.fresh_processes() if own_process else ThreadPoolExecutor(1)
    with tempfile.TemporaryDirectory() as folder, alone:
        alone.submit(
            _write, folder, model, revision, dtype, point["layers"], point["width"]
        ).result()
        return alone.submit(
            generation_memory,
            folder,
            dtype=dtype,
            batch_size=point["batch_size"],
            prompt_tokens=point["prompt_tokens"],
            new_tokens=new_tokens,
        ).result()


def _write(
    folder: str, model: str, revision: str | None, dtype: str, layers: str, size: str
) -> None:
    network, tokenizer = models.load_model(model, revision=revision, dtype=dtype)
    network = (
        shape_study.narrowed(network, size)
        if size
        else surgery.drop_layers(network, map(int, layers.split()))
    )
    surgery.save(network, tokenizer, folder)


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
    loaded = runtime.peak_memory_bytes()
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
        "loaded": loaded,
        "generated": int(found["peak_bytes"].max()),
        "weights": efficiency.weight_bytes(network),
    }


def memory_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    recompute: bool = False,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What :func:`measure_memory` finds at these points, read if it is there, and the file that
    holds it."""
    path = results.table_path(profile, notebook, f"{results.slug(model)}-memory")
    compute = functools.partial(measure_memory, model=model, revision=revision, **settings)
    return results.sweep(
        points,
        compute,
        path=path,
        recompute=recompute,
        parameters={"model": models.identity(model, revision), **settings},
    ), path
