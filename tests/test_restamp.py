"""Tables stamped anew without being computed, where a definition returns what it did."""

import json
import subprocess

import pytest
import restamp

from pruning_utils.engine import definitions

GIT = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
ASKED = "data._embedded_documents"
DATA = """
EMBEDDED_SPLITS = {("a", "x"): 1, ("b", "x"): 2}
def _embedded_documents(source, split):
    return (source * EMBEDDED_SPLITS[source, split], split)
"""
WORK = """
from pruning_utils import data
FACTOR = 2
def compute(point):
    return FACTOR * len(data._embedded_documents("a", "x"))
def other(point):
    return FACTOR
"""
OTHER_CODE = DATA.replace("return (", "return tuple([").replace("split)\n", "split])\n")


class Project:
    """A repository with a package of two modules, and tables that its code has computed."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.tables = folder / "results" / "cpu" / "00_a"
        self.tables.mkdir(parents=True)
        (folder / "pruning_utils").mkdir()
        (folder / "pruning_utils" / "__init__.py").write_text("")
        (folder / ".gitignore").write_text("__pycache__/\n")
        monkeypatch.setattr(restamp, "ROOT", folder)
        monkeypatch.setattr(definitions, "PACKAGE", folder / "pruning_utils")
        self.git("init", "-q")

    def git(self, *words):
        ran = subprocess.run(
            ["git", "-C", str(self.folder), *GIT, *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return ran.stdout.strip()

    def write(self, data=DATA, work=WORK):
        """Commit such a package; returns the commit."""
        (self.folder / "pruning_utils" / "data.py").write_text(data)
        (self.folder / "pruning_utils" / "work.py").write_text(work)
        installed = definitions.Package(self.folder / "pruning_utils")
        self.monkeypatch.setattr(definitions, "INSTALLED", installed)
        self.git("add", ".")
        self.git("commit", "-qm", "a", "--allow-empty")
        return self.git("rev-parse", "HEAD")

    def record(self, commit, **tables):
        """Keep records of tables whose root is this function of ``work``."""
        stamps = {
            name: definitions.INSTALLED.stamp_of([("work", root)]) for name, root in tables.items()
        }
        kept = {name: {"commit": commit, "code": stamp} for name, stamp in stamps.items()}
        (self.tables / "run.json").write_text(json.dumps(kept))

    def records(self):
        return json.loads((self.tables / "run.json").read_text())

    def restamp(self):
        said = restamp.restamp(self.folder / "results", ASKED)
        return {path.stem: fault for path, fault in said.items()}


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path, monkeypatch)


def test_a_table_is_stamped_where_all_answers_are_the_same(project):
    first = project.write()
    project.record(first, read="compute", unread="other")
    before = project.records()
    second = project.write(OTHER_CODE)
    assert definitions.INSTALLED.changes(before["read"]["code"]) == [ASKED]
    assert project.restamp() == {"read": ""}, "the other table is fresh"
    after = project.records()
    assert after["unread"] == before["unread"]
    assert definitions.INSTALLED.changes(after["read"]["code"]) == []
    assert after["read"]["commit"] == first
    assert after["read"]["restamped"] == {
        "proof": f"{ASKED} returned the same for all inputs",
        "inputs": ["('a', 'x')", "('b', 'x')"],
        "commit": second,
    }
    project.write(DATA.replace("return (", "return (1 * "))
    assert project.restamp() == {"read": ""}, "from the commit of the stamp"


@pytest.mark.parametrize(
    ("data", "work", "why"),
    [
        (DATA.replace("split)\n", "split[::-1] + split)\n"), WORK, "something else for"),
        (OTHER_CODE, WORK.replace("= 2", "= 3"), f"changed beside {ASKED}: work.FACTOR"),
        (OTHER_CODE, WORK.replace("def compute", "def new"), "gone"),
        (DATA.replace('("b", "x"): 2', '("b", "x"): 3'), WORK, "something else for ('b', 'x')"),
        (DATA.replace(": 2}", ': 2, ("c", "x"): 1}'), WORK, "something else for ('c', 'x')"),
        (DATA.replace("return (", "raise (").replace(", split)", ")"), WORK, "failed in"),
    ],
)
def test_a_table_stays_as_it_is_where_anything_else_may_have_changed(project, data, work, why):
    project.record(project.write(), read="compute")
    before = project.records()
    project.write(data, work)
    (fault,) = project.restamp().values()
    assert why in fault and project.records() == before


def test_a_stamp_must_be_that_of_its_commit(project):
    first = project.write()
    project.write(work=WORK.replace("= 2", "= 3"))
    project.record(first, read="compute")
    project.write(OTHER_CODE, WORK.replace("= 2", "= 3"))
    assert project.restamp() == {"read": f"its stamp is not that of commit {first[:7]}"}
    for commit, why in (
        (None, "no commit was recorded with it"),
        ("f" * 40, f"its commit {'f' * 40} is not in this repository"),
    ):
        kept = project.records()
        kept["read"]["commit"] = commit
        (project.tables / "run.json").write_text(json.dumps(kept))
        assert project.restamp() == {"read": why}
