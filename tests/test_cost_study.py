"""What training costs, told by the recipe."""

import pytest
from test_depth_study import HEALING, save_tiny_model

from pruning_utils import cost_study, efficiency, healing, models, shape_study, surgery

SETTINGS = {
    "revision": None,
    "dtype": "float32",
    "seq_len": 16,
    "steps": 1,
    "healing_settings": {**HEALING, "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.mark.parametrize(
    "recipe, settings",
    [
        ("lora", {"method": "lora"}),
        ("last_layers", {"method": "last_layers"}),
        (
            "last_layers last_k=1 untie=false",
            {"method": "last_layers", "last_k": 1, "untie": False},
        ),
    ],
)
def test_parameters_are_those_of_the_trained_model(recipe, settings, tiny):
    found = cost_study.measure_cost(
        {"layers": "1 2", "recipe": recipe}, model=tiny, **SETTINGS | {"steps": 4}
    )
    model, tokenizer = models.load_model(tiny, dtype="float32")
    train = models.torch.zeros(4, 16, dtype=models.torch.long)
    healed = healing.heal(
        surgery.drop_layers(model, [1, 2]),
        tokenizer,
        train,
        merge=True,
        **{**HEALING, **settings, "warmup_steps": 0, "steps": 1},
    )
    assert found["trainable"] == healed.trainable_parameters
    assert found["stored"] == efficiency.stored_parameters(healed.model)["total"]
    # A step is the difference of two trainings, which a busy machine may even turn round where
    # steps take no time.
    assert (
        found["tokens_per_second"] == pytest.approx(2 * 16 / found["step_seconds"])
        and found["peak_bytes"] > 0
    )


def test_the_settings_reach_the_measurement_and_the_table_is_kept(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    monkeypatch.setattr(
        shape_study,
        "measure_training",
        lambda point, **given: seen.append((point, given)) or {"trainable": len(seen)},
    )
    asked = dict(
        profile="smoke",
        notebook="10_how_to_heal",
        model=tiny,
        own_process=False,
        **SETTINGS | {"steps": 3},
    )
    first, path = cost_study.cost_table(
        [{"layers": "1", "recipe": "last_layers last_k=2"}], **asked
    )
    (_, warming), (point, given) = seen
    assert (warming["steps"], given["steps"], first["trainable"].item()) == (1, 3, 2), (
        "the first is not measured"
    )
    assert (point["method"], point["layers"], given["healing_settings"]["last_k"]) == (
        "last_layers",
        "1",
        2,
    )
    again, _ = cost_study.cost_table([{"layers": "1", "recipe": "last_layers last_k=2"}], **asked)
    assert len(seen) == 2 and first.equals(again) and path.is_relative_to(tmp_path)
