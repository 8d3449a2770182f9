"""Models of one size and two shapes, fewer layers or narrower ones: what 07 computes, and the costs
in 08."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from pruning_utils import (
    data,
    depth_study,
    efficiency,
    healing,
    importance_study,
    models,
    results,
    runtime,
    surgery,
    width,
)

# Of the criterion that chooses channels and heads, as for layers.
CALIBRATION = {
    "n_samples": 10,
    "seq_len": 128,
}


class ShapeStudy(importance_study.SetStudy):
    """A :class:`importance_study.SetStudy` whose points may be narrowed instead of shortened.

    A point has a ``width`` too: feed-forward channels and key-value heads that every layer keeps,
    as a text such as ``"1297 2"``, chosen by Taylor scores on calibration text; empty for a model
    whose layers stay as they are.
    """

    def pruned(self, network: torch.nn.Module, point: dict) -> torch.nn.Module:
        """As there."""
        if not point["width"]:
            return super().pruned(network, point)
        tokenizer = self.loaded[1]
        windows = data.calibration_windows(
            tokenizer, **CALIBRATION, source=self.calibration_source, seed=self.seed
        )
        return narrowed(copy.deepcopy(network), point["width"], windows)

    def _trained(self, current: torch.nn.Module, tokenizer, point: dict) -> tuple:
        # A shortened model goes by its layers alone, so that it is trained once for this study and
        # the other.
        self.parts = ("layers", "width") if point["width"] else ("layers",)
        return super()._trained(current, tokenizer, point)

    def _check(self, point: dict, network: torch.nn.Module) -> None:
        numbers = point["width"].split()
        if numbers and (
            point["layers"] or len(numbers) != 2 or not all(map(str.isdecimal, numbers))
        ):
            raise ValueError(
                "width must be channels and key-value heads such as '1297 2', and only where no "
                f"layers go, got {point['width']!r} with layers {point['layers']!r}"
            )
        super()._check(point, network)

    def _block(self, distances, point: dict) -> tuple[int, ...]:
        # All layers of a narrowed model are its own: it shares what comes in front of the first,
        # which is nothing.
        return (0,) if point["width"] else super()._block(distances, point)


def narrowed(
    model: torch.nn.Module, size: str, windows: torch.Tensor | None = None
) -> torch.nn.Module:
    """The model with the feed-forward channels and key-value heads that a text such as ``"1297 2"``
    says, in place: those of the largest Taylor scores on the windows or, without any, of the
    largest weights."""
    channels, heads = map(int, size.split())
    chosen = (
        {"criterion": "magnitude"}
        if windows is None
        else {"criterion": "taylor", "input_ids": windows}
    )
    return width.prune_width(model, intermediate_size=channels, n_kv_heads=heads, **chosen)


def fresh_processes() -> Executor:
    """One process for each point of a sweep, one after the other, so that each peak of memory is
    its own."""
    return ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )


def _shaped(network: torch.nn.Module, layers: str, size: str) -> torch.nn.Module:
    """The model without these layers or of this width, in place; channels are chosen by magnitude,
    for which they are makes no difference to any cost."""
    if size:
        return narrowed(network, size)
    return (
        surgery.drop_layers(network, [int(layer) for layer in layers.split()])
        if layers
        else network
    )


def equal_shape(
    point: dict, *, model: str, revision: str | None, dtype: str, n_tokens: int
) -> dict:
    """The size of a model without the ``layers`` of a point or, where it has ``n_kv_heads`` (0:
    not), of one that keeps so many key-value heads in every layer and the number of channels that
    makes it as large.

    Returns:
        ``width`` (as a :class:`ShapeStudy` takes it), ``parameters``, ``weights`` (bytes in
        ``dtype``), and ``flops`` of a text of ``n_tokens`` tokens and of one token
        (``flops_token``).
    """
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    layers, size = models.decoder_layers(network), ""
    if point["n_kv_heads"]:
        gone = sum(
            weight.numel()
            for layer in point["layers"].split()
            for weight in layers[int(layer)].parameters()
        )
        total = efficiency.stored_parameters(network)["total"] - gone
        channels = width.width_of_equal_size(network, total, n_kv_heads=point["n_kv_heads"])
        size = f"{channels} {point['n_kv_heads']}"
    network = _shaped(network, point["layers"], size)
    found = efficiency.stored_parameters(network)
    flops = {
        name: efficiency.forward_flops(network, batch_size=1, n_tokens=count)
        for name, count in (("flops", n_tokens), ("flops_token", 1))
    }
    return {"width": size, "parameters": found["total"], "weights": found["bytes"], **flops}


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
    """Rows of :func:`efficiency.generation_speed` for a point: ``layers``, ``width``,
    ``batch_size`` and ``prompt_tokens``."""
    network, _ = models.load_model(model, revision=revision, dtype=dtype)
    network = _shaped(network, point["layers"], point["width"])
    found = efficiency.generation_speed(
        network,
        batch_size=point["batch_size"],
        prompt_tokens=point["prompt_tokens"],
        new_tokens=new_tokens,
        warmups=warmups,
        repeats=repeats,
    )
    return [{"run": run, **row} for run, row in enumerate(found.to_dict("records"))]


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
    """What training costs at a point (``layers`` dropped, ``method``): ``step_seconds``, the mean
    over ``steps`` after the first, ``tokens_per_second``, ``trainable`` parameters and
    ``peak_bytes`` of the process."""
    network, tokenizer = models.load_model(model, revision=revision, dtype=dtype)
    network = _shaped(network, point["layers"], "")
    settings, moments = {**healing_settings, "method": point["method"], "warmup_steps": 0}, []
    windows = data.healing_windows(tokenizer, (1 + steps) * settings["batch_size"], seq_len)
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


def measure_storage(point: dict, *, model: str, revision: str | None) -> dict:
    """Bytes of a model without its ``layers`` in a ``precision`` (``bfloat16``, ``int8``, ``nf4``):
    ``disk`` (of its safetensors) and ``memory`` (of its weights as loaded)."""
    network, tokenizer = models.load_model(model, revision=revision)
    network = _shaped(
        network, point["layers"], ""
    ).bfloat16()  # as the weights of the papers' models are kept
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as smaller:
        surgery.save(network, tokenizer, folder)
        if point["precision"] != importance_study.PRECISIONS[0]:
            with warnings.catch_warnings(
                action="ignore", category=runtime.EmulatedPrecision
            ):  # nothing is multiplied
                network, _ = models.load_model(
                    folder, quantize=point["precision"], dtype="bfloat16"
                )
            network.save_pretrained(smaller)
            folder = smaller
        return {
            "disk": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
            "memory": efficiency.weight_bytes(network),
        }


def shape_table(
    points: Sequence[dict],
    *,
    profile: str,
    notebook: str,
    model: str,
    revision: str | None,
    table: str,
    recompute: bool = False,
    **settings,
) -> tuple[pd.DataFrame, Path]:
    """What a :class:`ShapeStudy` finds at these points, read if it is there, and the file that
    holds it.

    Arguments as for :func:`depth_study.depth_table`.
    """
    study = ShapeStudy(
        points,
        model=model,
        revision=revision,
        **settings,
        checkpoints=results.checkpoint_path(profile, depth_study.HEALED_BY),
    )
    path = results.table_path(profile, notebook, f"{results.slug(model)}-{table}")
    return results.sweep(
        points,
        study,
        path=path,
        recompute=recompute,
        parameters={"model": models.identity(model, revision), "data": data.identity(), **settings},
    ), path
