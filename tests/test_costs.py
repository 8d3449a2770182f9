"""What training costs, told by the recipe."""

import pytest
from tiny_model import HEALING

from pruning_utils import efficiency, evaluation, healing, models, surgery
from pruning_utils.studies import costs, study

SETTINGS = {
    "revision": None,
    "dtype": "float32",
    "seq_len": 16,
    "steps": 1,
    "healing_settings": {**HEALING, "warmup_steps": 0},
}


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
    found = costs.measure_cost(
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
        costs,
        "measure_training",
        lambda point, **given: seen.append((point, given)) or {"trainable": len(seen)},
    )
    asked = dict(
        profile="smoke",
        notebook="10_how_to_heal",
        table="costs",
        model=tiny,
        own_process=False,
        **SETTINGS | {"steps": 3},
    )
    points = [{"layers": "1", "recipe": "last_layers last_k=2"}]
    first, path = study.point_table(costs.measure_cost, points, **asked)
    (_, warming), (point, given) = seen
    assert (warming["steps"], given["steps"], first["trainable"].item()) == (1, 3, 2), (
        "the first is not measured"
    )
    assert (point["method"], point["layers"], given["healing_settings"]["last_k"]) == (
        "last_layers",
        "1",
        2,
    )
    again, _ = study.point_table(costs.measure_cost, points, **asked)
    assert len(seen) == 2 and first.equals(again) and path.is_relative_to(tmp_path)


RELEASE = {"revision": None, "dtype": "float32", "n_windows": 4, "seq_len": 16, "batch_size": 2}


def test_costs_are_those_of_the_model_as_it_is_saved(tiny):
    model = surgery.drop_layers(models.load_model(tiny)[0], [1, 3])
    weights = {id(weight): weight for weight in model.parameters()}.values()
    head = model.get_input_embeddings().weight.numel()
    recipes = (
        "",
        "lora 0.001 4",
        "last_layers 0.001 4 last_k=1 untie=false",
        "last_layers 0.001 4 last_k=1 + lora 0.001 4",
    )
    found = {
        recipe: costs.measure_release({"layers": "1 3", "recipe": recipe}, model=tiny, **RELEASE)
        for recipe in recipes
    }
    count = sum(weight.numel() for weight in weights)
    assert [row["parameters"] for row in found.values()] == [count, count, count, count + head]
    assert all(
        row["bytes"] >= 4 * row["parameters"] and row["seconds"] > 0 for row in found.values()
    )
    macs = [row["macs"] for row in found.values()]
    # Each of three layers has 1,920 weights, and 16 channels of scores and values a pair of tokens.
    by_hand = 64 * (head + 3 * 1920) + 3 * 2 * 64**2 * 16
    assert macs == [by_hand] * 4, "a head is used whether or not it is stored twice"
    whole = costs.measure_release({"layers": "", "recipe": ""}, model=tiny, **RELEASE)
    assert whole["parameters"] - count == sum(
        weight.numel()
        for layer in models.decoder_layers(model)[:2]
        for weight in layer.parameters()
    )


def test_costs_are_measured_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", str(tmp_path))
    asked = dict(
        points=[{"run": 0, "layers": "1", "recipe": ""}],
        profile="smoke",
        notebook="x",
        table="release",
        model=tiny,
        own_process=False,
        **RELEASE,
    )
    first, path = study.point_table(costs.measure_release, **asked)
    monkeypatch.setattr(evaluation, "token_losses", lambda *_, **__: pytest.fail("measured again"))
    assert study.point_table(costs.measure_release, **asked)[0].equals(first) and path.is_file()
