"""Stamp tables whose record names the modules they were computed with (the form before stamps), by
proof.

A table of that form holds digests of all modules that were imported when it was computed. At a
commit at which those that its compute function reaches are unchanged, the definitions that it
reaches are those that computed it, provided that all lie within the recorded modules or in those
that kept results and computed nothing. Both are checked for each table; one that fails keeps its
record and is named. Nothing is computed.

    python scripts/restamp.py COMMIT
"""

from __future__ import annotations

import argparse
import ast
import atexit
import functools
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pruning_utils import runtime
from pruning_utils.engine import definitions, records

# These were left out of the recorded modules; what is reached of them is compared with the commit
# of the table.
NOT_RECORDED = {"", "records", "runtime"}
# What computed a table, by the end of "<notebook>/<table>".
ROOTS = {
    r"00_\w+/embedded": "experiments.prune_and_heal",
    r"01_\w+/embedded": "experiments.scan_layers",
    r"0[245]_\w+/embedded.*": "depth_study.DepthStudy",
    r"06_\w+/embedded-scores": "importance_study.score_layers",
    r"07_\w+/embedded-(rates|quality)": "shape_study.ShapeStudy",
    r"07_\w+/embedded-sizes": "shape_study.equal_shape",
    r"07_\w+/embedded-speed": "shape_study.measure_speed",
    r"07_\w+/embedded-limits": "efficiency.machine_limits",
    r"07_\w+/embedded-memory": "memory_study.measure_memory",
    r"08_\w+/embedded-storage": "shape_study.measure_storage",
    r"(08|10)_\w+/embedded-costs": "cost_study.measure_cost",
    r"09_\w+/embedded-scores": "metric_study.score_metrics",
    (
        r"0[689]_\w+/embedded-"
        r"(answers|healed|quantised|rates|seeds|sets|trained|unhealed|variants)"
    ): "importance_study.SetStudy",
    r"11_\w+/embedded-(rounds|rates-rounds)": "iterative_study.IterativeStudy",
    r"11_\w+/embedded-samples": "choice_study.score_sample",
    r"12_\w+/embedded-release": "release.measure_release",
    r"1[012]_\w+/embedded-.*": "recipe_study.RecipeStudy",
}


def main() -> int:
    """Stamp what can be proved, and give the number of tables that cannot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="at which no recorded module that is reached had changed")
    commit = parser.parse_args().commit
    faults = [
        fault
        for path in sorted((runtime.project_root() / "results").glob("*/*/run.json"))
        for fault in restamp(path, commit)
    ]
    print("\n".join(faults) or "every table is stamped")
    return len(faults)


@functools.cache
def package_at(commit: str) -> definitions.Package:
    """The package as it was at a commit, unpacked into a folder that lasts as long as this
    process."""
    folder = tempfile.mkdtemp(prefix="pruning_utils_restamp_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    archive = subprocess.run(
        ["git", "-C", str(runtime.project_root()), "archive", commit, "pruning_utils"],
        capture_output=True,
        check=True,
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return definitions.Package(Path(folder) / "pruning_utils")


def restamp(path: Path, commit: str) -> list[str]:
    """Stamp the tables of one run.json; what is wrong with those that cannot be."""
    tables, faults = records.read_records(path.parent), []
    for name, record in tables.items():
        if "modules" not in record:
            continue
        table = f"{path.parent.name}/{name}"
        root = next(
            tuple(where.rsplit(".", 1))
            for pattern, where in ROOTS.items()
            if re.fullmatch(pattern, table)
        )
        package = package_at(commit)
        stamp = package.stamp_of([root])
        beyond = changed_reach(package, stamp, record)
        if beyond:
            faults.append(
                f"{table}: changed, or of modules that it does not record: {', '.join(beyond)}"
            )
            continue
        del record["modules"]
        record["code"] = stamp
        record["restamped"] = {
            "proof": "all that is reached was recorded, and unchanged",
            "commit": commit,
        }
    with runtime.atomic_path(path) as target:
        target.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return faults


def changed_reach(package: definitions.Package, stamp: dict, record: dict) -> list[str]:
    """Definitions of a stamp that the record cannot vouch for: of modules that it does not name or
    that have changed since; of those that it never names, definitions that were others at the
    commit that it was computed at."""
    beyond = []
    for where, digest in stamp["definitions"].items():
        module, _, name = where.rpartition(".")
        recorded = record["modules"].get(module.split(".")[0])
        if module in NOT_RECORDED:
            then = package_at(record["commit"])
            unchanged = (
                name in then._module(module).definitions
                and then.own_digest((module, name)) == digest
            )
        else:
            unchanged = recorded == module_digest(package, module.split(".")[0])
        beyond += [] if unchanged else [where]
    return beyond


@functools.cache
def module_digest(package: definitions.Package, name: str) -> str:
    """The digest of a module, or of the task files, in the form before stamps."""
    if name == "tasks":
        found = [
            path
            for path in (package.folder / name).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        ]
        files = {
            str(path.relative_to(package.folder)): records.digest(path.read_bytes())
            for path in found
        }
        return records.digest(records.canonical(files))
    tree = ast.parse(package.sources[name][1])
    for node in ast.walk(tree):
        if isinstance(node, definitions.DOCUMENTED) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(shape(tree).encode()).hexdigest()


def shape(node: object) -> str:
    """The text of a syntax tree without what only some versions of Python have."""
    if isinstance(node, list):
        return f"[{','.join(map(shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        (name, value) for name, value in ast.iter_fields(node) if value is not None and value != []
    ]
    return f"{type(node).__name__}({','.join(f'{name}={shape(value)}' for name, value in fields)})"


if __name__ == "__main__":
    sys.exit(main())
