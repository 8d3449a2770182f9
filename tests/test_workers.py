"""Sweeps on several processes: as many as the environment asks for, and the same table."""

import os
import time

import pytest

from pruning_utils import results
from pruning_utils.engine import workers

POINTS = [{"x": x} for x in range(6)]
SEED = {"seed": 0}


class Counted:
    """Computes a point, and counts how often it was read from its pickled form."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ = state
        (self.folder / f"{os.getpid()} {time.time_ns()}").touch()

    def __call__(self, point):
        return {"square": point["x"] ** 2}


def leave_once(point):
    """Ends its process at the first call of all; the mark of that is in the point's folder."""
    mark = f"{point['folder']}/left"
    if not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(1)
    return {"x": 1}


@pytest.fixture(autouse=True)
def fresh():
    yield
    for found in [workers._kept(2)] if workers._kept.cache_info().currsize else []:
        found._pool.shutdown()
    workers._kept.cache_clear()


def test_a_sweep_on_two_processes_has_the_same_table(tmp_path, monkeypatch):
    compute = Counted(tmp_path / "reads")
    compute.folder.mkdir()
    alone = results.sweep(POINTS, compute, path=tmp_path / "a.csv", parameters=SEED)
    monkeypatch.setenv(workers.VARIABLE, "2")
    spread = results.sweep(POINTS, compute, path=tmp_path / "b.csv", parameters=SEED)
    assert spread.equals(alone) and list(spread["square"]) == [0, 1, 4, 9, 16, 25]
    results.sweep(POINTS, compute, path=tmp_path / "c.csv", parameters=SEED)
    reads = [name.split()[0] for name in os.listdir(compute.folder)]
    assert 1 <= len(reads) == len({*reads}) <= 2, "each process reads once, in both sweeps"
    assert str(os.getpid()) not in reads


def test_a_process_that_is_lost_costs_its_points_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, "2")
    point = [{"folder": str(tmp_path)}]
    with pytest.raises(RuntimeError, match="failed with BrokenProcessPool"):
        results.sweep(point, leave_once, path=tmp_path / "a.csv", parameters=SEED)
    found = results.sweep(point, leave_once, path=tmp_path / "a.csv", parameters=SEED)
    assert list(found["x"]) == [1]


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "65", "1.5"])
def test_another_number_is_refused_before_any_work(text, tmp_path, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, text)
    with pytest.raises(ValueError, match="PRUNING_UTILS_WORKERS must be a number of processes"):
        results.sweep(POINTS, dict, path=tmp_path / "a.csv", parameters=SEED)
    assert not [*tmp_path.iterdir()]


def test_one_worker_is_this_process(monkeypatch):
    monkeypatch.delenv(workers.VARIABLE, raising=False)
    assert workers.asked_for() is None
    monkeypatch.setenv(workers.VARIABLE, "1")
    assert workers.asked_for() is None
