"""The site: what it takes in, whether links lead somewhere, and how a browser shows it.

Nothing is built here. The browser looks at what ``make book`` left in ``site/``; where that, the
driver that comes with it or a browser is missing, these tests are skipped.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import pruning_utils

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "scripts" / "book"
SITE = ROOT / "site"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")


def configuration():
    """The module scripts/book/conf.py."""
    found = importlib.util.spec_from_file_location("book_conf", BOOK / "conf.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


# --- what the site takes in -----------------------------------------------------------------------


def test_contents_hold_every_notebook_and_page():
    conf, source = configuration(), ["# Title"]
    conf.append_contents(None, "README", source)
    lines = source[0].splitlines()
    entries = [line for line in lines if re.match(r"\d\d ", line)]
    titles = [re.fullmatch(r"(\d\d) .+\? <notebooks/(\1_\w+)>", line) for line in entries]
    assert [title[2] for title in titles] == [path.stem for path in NOTEBOOKS]
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES}
    assert pages - {"README"} <= set(lines), "a page that the contents leave out"


def test_pages_that_a_page_links_to_are_on_the_site():
    patterns = [pattern for pattern in configuration().include_patterns if "**" not in pattern]
    on_site = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert {*PAGES, *NOTEBOOKS} <= on_site
    linked = {
        (path.parent / urlsplit(link).path).resolve()
        for path in [*PAGES, *NOTEBOOKS]
        for link in LINK.findall("\n".join(texts_of(path)))
        if not urlsplit(link).scheme and urlsplit(link).path.endswith((".md", ".ipynb"))
    }
    assert linked and linked <= on_site


def test_only_the_front_page_gets_contents():
    source = ["# Title"]
    configuration().append_contents(None, "CHANGELOG", source)
    assert source == ["# Title"]


def test_every_module_has_a_page_the_core_in_its_order():
    listed = re.findall(r"^   (pruning_utils[\w.]*)$", (BOOK / "api.rst").read_text(), re.M)
    package = ROOT / "pruning_utils"
    files = {path.relative_to(ROOT).with_suffix("") for path in package.rglob("[!_]*.py")}
    folders = {path.parent.relative_to(ROOT) for path in package.rglob("__init__.py")}
    modules = {".".join(path.parts) for path in files | folders if "tasks" not in path.parts}
    assert sorted(listed) == sorted(modules)
    core = [name.removeprefix("pruning_utils.") for name in listed if name.count(".") == 1]
    assert [name for name in core if (package / f"{name}.py").is_file()] == list(
        pruning_utils.MODULES
    )


def test_nothing_is_executed_or_fetched():
    conf = configuration()
    assert conf.nb_execution_mode == "off"
    assert not conf.nb_ipywidgets_js, "myst-nb takes them from the network"
    assert not re.search(r"https?://", "".join(path.read_text() for path in BOOK.glob("*.*")))


def test_prose_under_returns_is_no_type():
    lines = ["Sum.", "", "Returns:", "    A row a run: its sum.", "", "Raises:", "    E: If so."]
    configuration().mark_prose(None, "function", "f", None, None, lines)
    assert lines[3] == "    : A row a run: its sum." and lines[6] == "    E: If so."


# --- links ----------------------------------------------------------------------------------------


def texts_of(path: Path) -> list[str]:
    """Markdown of a page, or of the cells and outputs of a notebook."""
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    return [cell.source for cell in cells if cell.cell_type == "markdown"] + shown


def anchors(path: Path) -> set[str]:
    """Names of the headings of a page or notebook, as links name them."""
    found = re.findall(r"^#+ (.+)$", "\n".join(texts_of(path)), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in found}


def broken_links(path: Path) -> list[str]:
    """Relative links of a page or notebook to files or headings that are not there."""
    broken = []
    for link in LINK.findall("\n".join(texts_of(path))):
        parts = urlsplit(link)
        target = path.parent / unquote(parts.path) if parts.path else path
        if parts.scheme:
            continue
        if not target.is_file() or parts.fragment and parts.fragment not in anchors(target):
            broken.append(link)
    return broken


def test_broken_links_are_found(tmp_path):
    page, book = tmp_path / "a.md", tmp_path / "b.ipynb"
    cell = nbformat.v4.new_code_cell("1", outputs=[])
    cell.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": "[a](a.md#gone)"})]
    cells = [nbformat.v4.new_markdown_cell("# What, then?\n\n![p](gone.png) [a](a.md)"), cell]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), book)
    page.write_text("# A\n\n[1](b.ipynb#what-then) [2](gone.md) [3](#a) [4](#b) [5](https://c/d)")
    assert broken_links(page) == ["gone.md", "#b"]
    assert broken_links(book) == ["gone.png", "a.md#gone"]


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    assert broken_links(path) == []


# --- in a browser ---------------------------------------------------------------------------------

# What a page shows, asked in the page itself.
LOOK = """() => {
    const all = selector => [...document.querySelectorAll(selector)];
    const code = all('.cell_input pre');
    return {
        links: all('a[href]').map(a => a.href),
        names: all('[id]').map(e => e.id),
        n_code: code.length,
        faults: {
            'blank pictures': all('img').filter(i => !i.naturalWidth).map(i => i.src),
            'formulas as text': all('.math').filter(m => !m.querySelector('svg')).length,
            'code without colour': code.filter(e => !e.querySelector('span[class]')).length,
            'code too wide': code.filter(e => e.scrollWidth > e.clientWidth + 1).length,
            'page too wide': Math.max(0, document.documentElement.scrollWidth - innerWidth),
        },
    };
}"""
WIDTHS = (1400, 800)  # of the window, in pixels


@pytest.fixture(scope="module")
def window():
    """A page of a browser that is installed, driven by what `make book` brings, and what the page
    asked of the network or complained of."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no browser is installed")
    front = SITE / "index.html"
    sources = [*PAGES, *NOTEBOOKS, *(ROOT / "pruning_utils").rglob("*.py")]
    if not front.is_file() or front.stat().st_mtime < max(map(os.path.getmtime, sources)):
        pytest.skip("no site is built of these pages: make book")
    driver = pytest.importorskip("playwright.sync_api", reason="make book installs it")
    # Its sandbox refuses to work for root, as whom some containers run.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    said = []
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        yield page, said
        browser.close()


def complaints(said: list[str]) -> list[str]:
    """What a page said, without the files that it asked for."""
    return [text for text in said if not text.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def seen(window):
    """By address of each page of the site, and width: what it shows and says."""
    page, said = window
    found = {}
    for path in sorted(SITE.rglob("*.html")):
        said.clear()
        page.goto(path.as_uri())
        if page.query_selector(".math"):
            page.wait_for_selector(".math svg")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 1000})
            found[path.as_uri(), width] = page.evaluate(LOOK) | {"said": complaints(said)}
    return found


def test_pages_open_without_network_or_complaint(seen):
    assert {place: look["said"] for place, look in seen.items() if look["said"]} == {}


def test_pages_show_pictures_formulas_and_code(seen):
    faults = {
        (*place, fault): what
        for place, look in seen.items()
        for fault, what in look["faults"].items()
    }
    assert {place: what for place, what in faults.items() if what} == {}


def test_notebooks_are_shown_whole(seen):
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        shown = seen[(SITE / "notebooks" / f"{path.stem}.html").as_uri(), WIDTHS[0]]
        assert shown["n_code"] == sum(cell.cell_type == "code" for cell in cells), path.name


def test_links_of_pages_lead_somewhere(seen):
    names = {address: set(look["names"]) for (address, _), look in seen.items()}
    links = {link for look in seen.values() for link in look["links"]}
    lost = []
    for link in sorted(links):
        address, _, name = link.partition("#")
        parts = urlsplit(address)
        if parts.scheme == "file":
            is_there = Path(unquote(parts.path)).is_file()
            if not is_there or name and unquote(name) not in names[address]:
                lost.append(link)
    assert not lost
    downloads = {Path(link).name for link in links if "/_downloads/" in link}
    assert {"claims.csv", "CITATION.cff"} <= downloads


def test_search_finds_a_notebook_and_a_function(window):
    page, said = window
    said.clear()
    for words, found in (
        ("angular distance of every block", "01_layer_similarity.html"),
        ("measure_similarity", "pruning_utils.similarity.html#"),
    ):
        page.goto((SITE / "index.html").as_uri())
        page.fill("input[name=q]", words)
        page.press("input[name=q]", "Enter")
        page.wait_for_selector(f"#search-results li a[href*='{found}']")
    assert complaints(said) == []
