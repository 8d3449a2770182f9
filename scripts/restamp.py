"""Stamp tables as computed by today's code, where one definition changed and returns what it did.

Run ``.venv/bin/python scripts/restamp.py data._embedded_documents``. It asks the definition all of
its inputs, as it was when each stale table was computed and as it is now. A table is stamped anew
where every answer is the same, and nothing that the table depends on has changed beside it. No
table is computed. Where a definition has more inputs than can be asked, recompute two points
instead (``PRUNING_UTILS_PROVE=1``; see CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from pruning_utils.engine import definitions, records

ROOT = Path(__file__).resolve().parents[1]
# Of each definition that can be asked all of its inputs, the mapping of its module that has them
# as keys.
INPUTS = {"data._embedded_documents": "EMBEDDED_SPLITS"}
CHILD = """
import hashlib, importlib, json, sys
folder, module, name, inputs = sys.argv[1:]
sys.path.insert(0, folder)
module = importlib.import_module(f"pruning_utils.{module}")
function = getattr(module, name)
asked = sorted(getattr(module, inputs))
answers = {str(given): repr(function(*given)).encode() for given in asked}
print(json.dumps({given: hashlib.sha256(said).hexdigest() for given, said in answers.items()}))
"""


class Refused(Exception):
    """Why a table cannot be stamped."""


def answers(folder: Path, asked: str) -> dict[str, str]:
    """Digests of what a definition of the package in a folder returns, by input."""
    module, _, name = asked.rpartition(".")
    command = [sys.executable, "-c", CHILD, str(folder), module, name, INPUTS[asked]]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if ran.returncode:
        raise Refused(f"{asked} failed in {folder}: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout)


def package_at(commit: str | None, folder: Path) -> Path:
    """A folder with the package as it was at a commit."""
    place = folder / str(commit)
    if not place.exists():
        ran = subprocess.run(
            ["git", "-C", str(ROOT), "archive", f"{commit}", "pruning_utils"], capture_output=True
        )
        if ran.returncode:
            raise Refused(f"its commit {commit} is not in this repository")
        with tarfile.open(fileobj=io.BytesIO(ran.stdout)) as archive:
            # Python 3.11.3 and older know no filters, and need none for what git has packed.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(place)
    return place


def proof(record: dict, asked: str, answers_at: Callable[[str | None], tuple]) -> dict:
    """What a record keeps of a proof that its table is today's but for a definition.

    Args:
        record: Of a stale table.
        asked: The definition, such as ``data._embedded_documents``.
        answers_at: Gives the package and :func:`answers` at a commit, or of today for None.

    Raises:
        Refused: Where it cannot be proved.
    """
    stamp = record["code"]
    commit = record.get("restamped", record)["commit"]
    if commit is None:
        raise Refused("no commit was recorded with it")
    before, said = answers_at(commit)
    module, _, name = asked.rpartition(".")
    roots = before.roots_again(stamp["root"])
    if roots is None or before.stamp_of(roots)["digest"] != stamp["digest"]:
        raise Refused(f"its stamp is not that of commit {commit[:7]}")
    now, says = answers_at(None)
    leaves = [(module, name)]
    roots_today = now.roots_again(stamp["root"])
    if roots_today is None:
        raise Refused(f"{stamp['root']} is gone")
    then = before.stamp_of(roots, leaves)
    today = now.stamp_of(roots_today, leaves)
    if then["digest"] != today["digest"]:
        beside = ", ".join(definitions.differing_places(then, today)) or "the order of calls"
        raise Refused(f"changed beside {asked}: {beside}")
    other = sorted({*said, *says} - {given for given in said if said[given] == says.get(given)})
    if other:
        raise Refused(f"{asked} returns something else for {', '.join(other)}")
    return {"proof": f"{asked} returned the same for all inputs", "inputs": sorted(says)}


def restamp(results: Path, asked: str) -> dict[Path, str]:
    """Stamp stale tables below a folder of results; why not, by table, "" where it is done."""
    said: dict[Path, str] = {}
    known: dict[str | None, tuple] = {}
    with tempfile.TemporaryDirectory() as folder:

        def answers_at(commit: str | None) -> tuple:
            if commit not in known:
                place = package_at(commit, Path(folder)) if commit else ROOT
                package = definitions.Package(place / "pruning_utils")
                known[commit] = package, answers(place, asked)
            return known[commit]

        for file in sorted(results.glob("*/*/run.json")):
            for name in json.loads(file.read_text(encoding="utf-8")):
                path = file.with_name(f"{name}.csv")
                record = records.recorded(path)
                if not definitions.INSTALLED.changes(record.get("code")):
                    continue
                try:
                    found = proof(record, asked, answers_at)
                except Refused as error:
                    said[path] = str(error)
                    continue
                roots = definitions.INSTALLED.roots_again(record["code"]["root"])
                found["commit"] = records.package_commit()
                code = definitions.INSTALLED.stamp_of(roots or [])
                records.replace_record(path, {**record, "code": code, "restamped": found})
                said[path] = ""
    return said


def main() -> int:
    """Stamp what can be; 1 where a stale table is left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("definition", choices=sorted(INPUTS))
    said = restamp(ROOT / "results", parser.parse_args().definition)
    for path, fault in said.items():
        print(f"{path.relative_to(ROOT / 'results')}: {fault or 'stamped'}")
    return int(any(said.values()))


if __name__ == "__main__":
    sys.exit(main())
