"""Kills sweeps at random moments and before each change of the disk; two processes, one folder.

Tables that are replaced are killed before each change too: what is read next is whole.
"""

import itertools
import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd

from pruning_utils import results, runtime
from pruning_utils.engine import records

records.package_commit = lambda: None  # spares three processes a run
# Stated, so that the runs that are forked need no torch, whose pages each would have to map.
records.peak_memory_bytes = lambda: 1
runtime.versions = lambda: {"python": "3"}
runtime.device_name = runtime.processor = lambda: "cpu"


def compute_point(point):
    time.sleep(0.003)
    with open(sys.argv[1] + "/computed", "a") as log:
        log.write(".")
    return [
        {"part": part, "value": (point["n"] + 1) / 7 / (part + 1), "seconds": time.time()}
        for part in (0, 1)
    ]


def run(folder, n):
    results.sweep(
        [{"n": n} for n in range(n)], compute_point, path=folder / "t.csv", parameters={"seed": 0}
    )


def killed(folder, n, delay=None, step=None):
    return was_killed(lambda: run(folder, n), delay, step)


def was_killed(work, delay=None, step=None, changes=()):
    child = os.fork()
    if child == 0:
        if step is not None:
            kill_before(step, changes)
        work()
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def kill_before(step, changes):
    left = [step]

    def counting(change):
        def changed(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*given, **named)

        return changed

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir", *changes):
        setattr(os, name, counting(getattr(os, name)))


def contents(folder):
    assert sorted(os.listdir(folder)) == ["run.json", "t.csv", "t.measured.csv"], os.listdir(folder)
    return (folder / "t.csv").read_bytes()


root, random = Path(sys.argv[1]), random.Random(0)
run_children = [killed(root / "whole", 30), killed(root / "short", 3)]
assert run_children == [False, False]
whole, short = contents(root / "whole"), contents(root / "short")

times = 0
while killed(root / "random", 30, delay=random.uniform(0.02, 0.06) * (1 + times / 5)):
    times += 1
assert times >= 3 and contents(root / "random") == whole, times

step, log = 0, root / "computed"
log.write_text("")
while killed(root / f"step{step}", 3, step=step):
    killed(root / f"step{step}", 3)
    assert contents(root / f"step{step}") == short, step
    assert len(log.read_text()) <= 4, "only the point that was cut is computed twice"
    log.write_text("")
    step += 1
assert step > 12, step


def table_of(value, measured):
    frame = pd.DataFrame({"a": [value, value]})
    return frame.assign(seconds=value / 2) if measured else frame


def kept(path, value, measured, recompute):
    results.load_or_compute(
        path, lambda: table_of(value, measured), parameters={"value": value}, recompute=recompute
    )


def not_computed():
    raise AssertionError("computed, though a table is there")


def whole_value(path, measured):
    """The one value of a table that is read as it is; None where there is none."""
    for value in (1, 2):
        try:
            found = results.load_or_compute(path, not_computed, parameters={"value": value})
        except ValueError as error:
            assert "made with other parameters (value: " in str(error), error
            continue
        except AssertionError:
            return None
        pd.testing.assert_frame_equal(found, table_of(value, measured[value]))
        return value
    raise AssertionError("neither the old table nor the new one is read")


def replaced_at_each_step(folder, first, measured):
    """Values that are read after a table was killed before each change of the disk."""
    values = []
    for step in itertools.count():
        path = folder / str(step) / "t.csv"
        if first:
            kept(path, 1, measured[1], recompute=False)
        replace = partial(kept, path, 2, measured[2], recompute=True)
        if not was_killed(replace, step=step, changes=("fsync", "chmod")):
            assert whole_value(path, measured) == 2
            return values
        values.append(whole_value(path, measured))
        assert values[-1] is not None or not first, step
        replace()
        assert whole_value(path, measured) == 2
        beside = ["t.measured.csv"] if measured[2] else []
        assert sorted(os.listdir(path.parent)) == ["run.json", "t.csv", *beside], step


for name, first, with_times in (
    ("none", False, (2,)),
    ("both", True, (1, 2)),
    ("old", True, (1,)),
    ("new", True, (2,)),
):
    measured = {value: value in with_times for value in (1, 2)}
    values = replaced_at_each_step(root / f"replaced-{name}", first, measured)
    before = 1 if first else None
    changed = values.index(2)
    assert set(values[:changed]) == {before} and set(values[changed:]) == {2}, values
    assert changed >= 4 and len(values) - changed >= 2, values

children = []
for name in "ab":
    children.append(os.fork())
    if children[-1] == 0:
        for number in range(20):
            results.load_or_compute(
                root / "two" / f"{name}{number}.csv",
                lambda: pd.DataFrame({"a": [number]}),
                parameters={"n": number},
            )
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
assert len(records.read_records(root / "two")) == 40, len(records.read_records(root / "two"))


def wait_for_ever(point):
    (root / "held" / "starting").write_text(str(os.getpid()))
    (root / "held" / "starting").rename(root / "held" / "started")
    time.sleep(60)


holder = os.fork()
if holder == 0:
    held = root / "held" / "t.csv"
    with ProcessPoolExecutor(1) as executor:
        results.sweep([{"n": 1}], wait_for_ever, path=held, parameters={}, executor=executor)
while not (root / "held" / "started").exists():
    time.sleep(0.01)
worker = int((root / "held" / "started").read_text())
try:
    for recompute in (False, True):
        try:
            results.sweep(
                [{"n": 1}],
                compute_point,
                path=root / "held" / "t.csv",
                parameters={},
                recompute=recompute,
            )
        except RuntimeError as error:
            assert "another process or thread is computing" in str(error)
        else:
            raise AssertionError("two processes compute one table")
    assert (root / "held" / "t.points" / "parameters.json").exists(), (
        "what another process holds is not discarded"
    )
finally:
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
try:
    # The worker has outlived its sweep, and does not hold its points.
    results.sweep([{"n": 1}], compute_point, path=root / "held" / "t.csv", parameters={})
finally:
    os.kill(worker, signal.SIGKILL)
print("killed", times, "times at random and at", step, "steps")
