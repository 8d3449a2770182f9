"""Sweeps on several processes: as many as the environment asks for, and the same table."""

import os
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import distributed
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


def test_futures_that_a_cluster_cancels_are_told(tmp_path):
    """As where the connection to its scheduler is lost."""

    class Lost(Executor):
        def submit(self, *_):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(RuntimeError, match="is the connection to the scheduler lost"):
        results.sweep(
            [{"n": 1}, {"n": 2}], dict, path=tmp_path / "t.csv", parameters={}, executor=Lost()
        )


def test_a_process_that_is_lost_costs_its_points_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, "2")
    point = [{"folder": str(tmp_path)}]
    with pytest.raises(RuntimeError, match="failed with BrokenProcessPool"):
        results.sweep(point, leave_once, path=tmp_path / "a.csv", parameters=SEED)
    found = results.sweep(point, leave_once, path=tmp_path / "a.csv", parameters=SEED)
    assert list(found["x"]) == [1]


# --- a cluster ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0"
    ) as running:
        yield running
        for found in [workers._joined(running.scheduler_address)]:
            found.close()
        workers._joined.cache_clear()


def square_or_leave(point):
    """A row; the point with the number 2 takes its process along, the first time of all."""
    with open(f"{point['folder']}/{point['x']}", "a+") as calls:
        calls.write(f"{os.getpid()} ")
        calls.seek(0)
        if point["x"] == 2 and len(calls.read().split()) == 1:
            calls.close()
            os._exit(1)
    return {"square": point["x"] ** 2, "process": os.getpid()}


def test_a_lost_worker_of_a_cluster_costs_its_point_alone(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, cluster.scheduler_address)
    points = [{"folder": str(tmp_path), "x": x} for x in range(6)]
    found = results.sweep(points, square_or_leave, path=tmp_path / "a.csv", parameters=SEED)
    assert list(found["square"]) == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in set(found["process"])
    calls = [(tmp_path / str(x)).read_text().split() for x in range(6)]
    lost = calls[2][0]
    assert len(calls[2]) == 2 and str(found["process"][2]) == calls[2][1] != lost
    for processes in calls:
        # What the lost one had computed is asked for again where Dask had not fetched it yet.
        assert len(processes) <= 1 + (processes[0] == lost) and processes.count(lost) <= 1


def test_a_connection_that_was_lost_is_made_anew(cluster, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, cluster.scheduler_address)
    first = workers.asked_for()
    assert first.is_joined() and workers.asked_for() is first
    first.close()
    again = workers.asked_for()
    assert again is not first and again.is_joined()


def test_a_cluster_computes_anew_what_it_computed_before(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, cluster.scheduler_address)
    compute = Counted(tmp_path / "reads")
    compute.folder.mkdir()
    for again in (False, True):
        table = results.sweep(
            POINTS, compute, path=tmp_path / "a.csv", parameters=SEED, recompute=again
        )
        assert list(table["square"]) == [0, 1, 4, 9, 16, 25]
    reads = [name.split()[0] for name in os.listdir(compute.folder)]
    assert 1 <= len(reads) == len({*reads}) <= 2, "each process reads once, in both sweeps"


def alone(_, point):
    """Its process computes one point at a time, or this fails."""
    others = os.environ.pop("POINTS AT WORK", "")
    os.environ["POINTS AT WORK"] = "one"
    time.sleep(0.05)
    del os.environ["POINTS AT WORK"]
    return others


def test_threads_of_a_worker_take_turns():
    asked = workers._sent(alone, dict, {})
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(workers._outcome, *asked) for _ in range(4)]
    assert [future.result() for future in found] == [""] * 4


def test_a_cluster_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    monkeypatch.setenv(workers.VARIABLE, "tcp://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="no scheduler answers at tcp://127.0.0.1:9"):
        results.sweep(POINTS, dict, path=tmp_path / "a.csv", parameters=SEED)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        monkeypatch.setattr(workers, "PATIENCE", 5.0)  # a busy scheduler answers within it
        monkeypatch.setenv(workers.VARIABLE, empty.scheduler_address)
        with pytest.raises(RuntimeError, match="no worker has joined the scheduler at tcp://"):
            results.sweep(POINTS, dict, path=tmp_path / "a.csv", parameters=SEED)
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setenv(workers.VARIABLE, "tcp://127.0.0.1:10")
    with pytest.raises(ModuleNotFoundError, match="needs Dask: pip install distributed"):
        results.sweep(POINTS, dict, path=tmp_path / "a.csv", parameters=SEED)
    assert not [*tmp_path.iterdir()]


def test_dask_is_read_only_where_a_cluster_is_asked_for():
    said = "import sys; from pruning_utils.engine import workers; workers.asked_for()"
    command = [sys.executable, "-c", f"{said}; print('distributed' in sys.modules)"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


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
