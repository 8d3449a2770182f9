"""Load a model that is larger than the memory at hand, to measure it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from typing import TYPE_CHECKING

from pruning_utils import models, runtime
from pruning_utils.embedded import quiet_loading
from pruning_utils.engine import hub, model_files, passes
from pruning_utils.engine.checks import whole_number
from pruning_utils.engine.later import torch

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str | os.PathLike,
    memory: int,
    *,
    revision: str | None = None,
    dtype: str = runtime.AUTO,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that is larger than the memory at hand, to measure it.

    Layers that do not fit stay in the model's own files. Each forward pass reads them from there,
    one after the other, by accelerate's hooks. So micro-batches should be as large as they can be.
    Similarity, losses, answers and ``importance.perplexity_without_layer`` take such a model. It
    can be cut and saved; what needs the weights themselves, as healing does, refuses it.

    Weights that transformers builds from several of a file, such as stacked experts, are written
    to the folder for temporary files, which needs room for them. They go with the model.

    Args:
        name: A local directory, a hub id, or the name of an embedded model.
        memory: Bytes of weights that stay on the device, at least 1. The largest layer, or the
            embedding, comes on top while it runs.
        revision: Branch, tag or commit of a hub id.
        dtype: ``auto`` (bfloat16 where the device multiplies it natively, float32 elsewhere),
            ``bfloat16``, ``float16`` or ``float32``. Another one than that of the files is
            converted whenever a layer is read.
        device: A torch device; None takes the first CUDA GPU, or the CPU.

    Returns:
        ``(model, tokenizer)``, as :func:`models.load_model`.

    Raises:
        ValueError: As :func:`models.load_model`, and if ``memory`` is no such number.
    """
    from transformers import AutoTokenizer

    most = whole_number("memory", memory, 1)
    place = runtime.choose_device(device)
    precision = runtime.resolve_dtype(dtype, place)
    source = models.resolve(name, revision)
    options = {"revision": revision, "trust_remote_code": False}
    on_disk = contextlib.nullcontext() if os.path.isdir(source) else hub.asked_or_cached()
    folder = tempfile.mkdtemp(prefix="pruning_utils_")
    try:
        with quiet_loading(), model_files.named_errors(source, revision), on_disk:
            model_files.refuse_adapter(source, options)
            config = model_files.configuration(source, options)
            tokenizer = model_files.refuse_no_vocabulary(
                AutoTokenizer.from_pretrained(source, **options)
            )
            model_files.refuse_other_files(source, config, options)
            places: dict[str | int, int] = {"cpu": most}
            if place.type != "cpu":
                places = {place.index or 0: most, "cpu": 0}
            model, report = model_files.auto_class(config).from_pretrained(
                source,
                use_safetensors=True,
                dtype=precision,
                device_map="auto",
                max_memory=places,
                offload_folder=folder,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
            model_files.refuse_other_weights(report, config)
            model_files.refuse_picture_needed(model, passes.input_device(model))
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    model_files.fit_tokenizer(tokenizer, model, models.context_length(config))
    return model.eval(), tokenizer
