"""A hub that does not answer is asked once."""

import socket
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants, is_offline_mode

from pruning_utils import evaluation, models
from pruning_utils.engine import benchmarks, hub


@pytest.fixture
def silent(monkeypatch) -> str:
    """An address at which nobody listens, taken for the hub's; connections to it are counted."""
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address


def test_a_silent_hub_is_found_out_and_forgotten(silent):
    assert not hub.answers(silent)
    with hub.asked_or_cached():
        assert is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    assert not is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_listens_is_left_to_the_libraries(silent, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub.asked_or_cached():
            assert not is_offline_mode()


@pytest.mark.parametrize("name", hub.PROXIES)
def test_behind_a_proxy_nothing_is_tried(name, silent, monkeypatch):
    monkeypatch.setenv(name, "http://proxy.invalid:3128")
    assert hub.answers(silent)


@pytest.mark.parametrize(("address", "port"), [("https://hub.invalid", 443), ("http://h:8", 8)])
def test_a_hub_is_asked_at_its_port_for_a_few_seconds(address, port, silent, monkeypatch):
    asked = []

    def refused(place, timeout):
        asked.append((place[1], timeout))
        raise OSError

    monkeypatch.setattr(socket, "create_connection", refused)
    assert not hub.answers(address)
    assert asked == [(port, hub.SECONDS)]


def test_models_tasks_and_texts_are_refused_without_retries(silent, monkeypatch):
    from lm_eval.tasks import TaskManager, manager

    # One folder of lm-eval's stands for all, whose 14,000 files take half a minute to index.
    folder = Path(manager.__file__).parent / "arc"
    brought = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(benchmarks, "task_manager", lambda embedded: brought)
    asked = []
    connect = socket.create_connection
    monkeypatch.setattr(
        socket,
        "create_connection",
        lambda *given, **named: asked.append(given) or connect(*given, **named),
    )
    with pytest.raises(
        ValueError,
        match="'owner/name' cannot be loaded: there is no such directory in .* on the hub",
    ):
        models.load_model("owner/name")
    assert len(asked) == 1, "one connection, where the libraries would retry each file five times"
    with pytest.raises(
        ValueError, match="lm-eval's task 'arc_easy' could not be read from the hub"
    ):
        evaluation.load_tasks(["lm-eval:arc_easy"])
    assert len(asked) == 2
