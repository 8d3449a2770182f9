"""How Sphinx makes the site: README, notebooks as committed, and a page for each module.

``make book`` builds it. The source directory is the repository itself, so that a link between files
means on the site what it means here. Nothing is executed, and no page asks the network.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pruning_utils

if TYPE_CHECKING:  # tests read this file where Sphinx is not installed
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]

project = "pruning_utils"
version = release = pruning_utils.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
root_doc = "README"
include_patterns = ["*.md", "notebooks/*", "reference/README.md", "benchmarks/RESULTS.md"]
include_patterns += ["scripts/book/**.rst"]
exclude_patterns = [".*", "build", "site", "results", "quickstart", "reproduced", "regressed"]
exclude_patterns += ["checkpoints", "scripts/book/templates"]
templates_path = ["scripts/book/templates"]

# Notebooks are shown as they were committed.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # with tables, and links to other files
nb_ipywidgets_js: dict[str, dict] = {}  # they would come from the network
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The last output of a notebook holds its numbers for the tests too, beside the table for people.
suppress_warnings = ["mystnb.unknown_mime_type"]

# Docstrings and signatures do without them, and importing them takes seconds. scipy and seaborn ask
# whether torch is there, and stumble over what stands in for it.
autodoc_mock_imports = ["bitsandbytes", "torch", "transformers", "scipy", "seaborn"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_use_ivar = True

# One file with all of MathJax. It draws formulas as SVG, so that it needs no fonts either.
mathjax_path = "tex-svg-full.js"

html_theme = "furo"
html_title = project
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_copyright = False
# Summaries of what was found would be fetched, which browsers refuse to pages that lie on a disk.
html_show_search_summary = False

# What the site appends to the README, which has no table of contents.
CONTENTS = """

```{toctree}
:hidden:
:caption: Notebooks
notebooks/README
NOTEBOOKS
```

```{toctree}
:hidden:
:caption: Package
scripts/book/api
```

```{toctree}
:hidden:
:caption: Project
reference/README
benchmarks/RESULTS
CONTRIBUTING
CHANGELOG
DATA_LICENSES
```
"""


def entry(notebook: Path) -> str:
    """A notebook in the table of contents: its number, its title and its page."""
    first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]
    title = "".join(first["source"]).splitlines()[0].removeprefix("# ")
    return f"{notebook.stem[:2]} {title} <notebooks/{notebook.stem}>"


def append_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Give the front page the table of contents."""
    if name == root_doc:
        entries = map(entry, sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")))
        source[0] += CONTENTS.replace("NOTEBOOKS", "\n".join(entries))


def skip_field(
    app: Sphinx, kind: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave out a field of a named tuple, which the docstring of its class describes."""
    return True if (member.__doc__ or "").startswith("Alias for field number") else None


def mark_prose(
    app: Sphinx, kind: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Mark what stands under "Returns" as prose: napoleon takes words before a colon for a type."""
    for number, line in enumerate(lines[:-1]):
        if line in ("Returns:", "Yields:"):
            lines[number + 1] = re.sub(r"^ +", r"\g<0>: ", lines[number + 1])


def copy_front_page(app: Sphinx, error: Exception | None) -> None:
    """Let the front page be found by the name that people and servers look for."""
    if error is None:
        shutil.copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """Tell Sphinx where MathJax lies, and when to call what stands above."""
    installed = metadata.files("sphinx-mathjax-offline") or []
    app.config.html_static_path += [str(p.locate()) for p in installed if p.name == mathjax_path]
    app.connect("source-read", append_contents)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("autodoc-process-docstring", mark_prose, priority=400)  # napoleon's is 500
    app.connect("build-finished", copy_front_page)
