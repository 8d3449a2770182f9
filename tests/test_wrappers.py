"""What is no model, or hides one, is refused with a word on what to pass."""

import pytest
import torch
from architectures import tiny
from torch import nn

from pruning_utils import (
    efficiency,
    evaluation,
    importance,
    models,
    similarity,
    surgery,
    width,
)

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
WRAPPED = {
    "compiled": (
        lambda: torch.compile(tiny("LlamaConfig")),
        "inside torch.compile: pass .*_orig_mod",
    ),
    "spread": (
        lambda: nn.DataParallel(tiny("LlamaConfig")),
        r"inside DataParallel: pass the model in it \(model.module\)",
    ),
    "nothing": (lambda: None, "of transformers, as load_model returns it, got NoneType"),
    "a module": (lambda: nn.Linear(2, 2), "of transformers, .*got Linear"),
    "a class": (lambda: nn.Linear, "of transformers, .*got the class Linear"),
    "a name": (lambda: "embedded", "of transformers, .*got str"),
}
TAKES = {
    "drop_layers": lambda model, folder: surgery.drop_layers(model, [1]),
    "drop nothing": lambda model, folder: surgery.drop_layers(model, []),
    "save": lambda model, folder: surgery.save(model, None, folder / "model"),
    "decoder_layers": lambda model, folder: models.decoder_layers(model),
    "similarity": lambda model, folder: similarity.measure_similarity(model, IDS),
    "magnitude": lambda model, folder: importance.magnitude(model),
    "taylor": lambda model, folder: importance.taylor(model, IDS),
    "perplexity": lambda model, folder: importance.perplexity_without_layer(model, IDS),
    "tasks": lambda model, folder: evaluation.evaluate_tasks(model, None, ["piqa"], limit=2),
    "width": lambda model, folder: width.prune_width(model, intermediate_size=2),
    "parameters": lambda model, folder: efficiency.stored_parameters(model),
    "flops": lambda model, folder: efficiency.forward_flops(model, batch_size=1, n_tokens=2),
}


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Models are compiled, which the other tests do without."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("function", TAKES)
def test_what_is_no_model_itself_is_refused(kind, function, tmp_path):
    make, message = WRAPPED[kind]
    with pytest.raises(ValueError, match=message):
        TAKES[function](make(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_compiled_in_place_is_itself():
    model = tiny("LlamaConfig")
    model.compile(backend="eager")
    assert len(surgery.drop_layers(model, [1]).model.layers) == 7


@pytest.mark.parametrize(
    "change",
    [lambda model: surgery.drop_layers(model, [1]), lambda model: surgery.save(model, None, "x")],
)
def test_a_part_that_is_compiled_is_named(change):
    model = tiny("LlamaConfig")
    model.model.layers[2] = torch.compile(model.model.layers[2])
    with pytest.raises(ValueError, match="model.layers.2 is inside torch.compile"):
        change(model)
