"""Kills sweeps at random moments and before each change of the disk; two processes, one folder."""

import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pruning_utils import results
from pruning_utils.engine import records

records.package_commit = lambda: None  # spares three processes a run


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
    child = os.fork()
    if child == 0:
        if step is not None:
            kill_before(step)
        run(folder, n)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def kill_before(step):
    left = [step]

    def counting(change):
        def changed(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*given, **named)

        return changed

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
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

children = []
for name in "ab":
    children.append(os.fork())
    if children[-1] == 0:
        import pandas as pd

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
