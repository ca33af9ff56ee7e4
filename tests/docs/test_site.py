"""The documentation site: it builds strictly, loads nothing from elsewhere, and its links hold."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from report_runs import Document

from fastmem_pl.base.configs import packaged_configs

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mkdocs", "material", "latex2mathml") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the extra docs is not installed: {MISSING}")


class Page(Document):
    """Anchors, links and loaded resources of a page."""

    def __init__(self, path):
        super().__init__(path.read_text(encoding="utf-8"))
        named = {attributes.get(name) for _, attributes in self.elements for name in ("id", "name")}
        self.anchors = {"", "__top", *filter(None, named)}
        self.links = [a["href"] for tag in ("a", "area") for a in self.tags(tag) if a.get("href") is not None]
        inert = ("canonical", "prev", "next")
        self.loaded = [a.get("href", "") for a in self.tags("link") if a.get("rel") not in inert]
        for tag, attributes in self.elements:
            found = (attributes.get(name) for name in ("src", "srcset", "poster", "data") if tag != "a")
            self.loaded += filter(None, found)
        self.inline = "".join(text for _, attributes, text in self.raw if "src" not in attributes)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site."""
    # One build for all of the processes that the tests are spread over.
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "site"
    with FileLock(f"{folder}.lock"):
        done = folder.with_name("site.done")
        if not done.exists():
            build(folder)
            done.touch()
    return folder


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def html(site, name):
    return (site / name).read_text(encoding="utf-8")


def test_nothing_is_loaded_from_other_hosts(site, pages):
    for path, page in pages.items():
        assert [r for r in page.loaded if re.match(r"(https?:)?//", r)] == [], path
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", page.inline), path
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_links_hold(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                # They cannot be fetched here: only their form is checked.
                if parts.scheme == "mailto":
                    continue
                if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[^\s<>\"]*)?", link):
                    broken.append((path.name, link))
                continue
            # The page for lost readers is shown at any depth, so its links start at the top.
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.is_file() or (
                parts.fragment and known and unquote(parts.fragment) not in known.anchors
            ):
                broken.append((path.name, link))
    assert broken == []


def test_every_option_is_in_the_reference(site, capsys):
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    try:
        import reference_cli
    finally:
        sys.path.pop(0)
    text = html(site, "reference/cli.html")
    parsers = {**reference_cli.lightning_parsers(), **reference_cli.memory_parsers()}
    assert {"fit-predict", "fit", "predict", "search", "memorize", "ask", "export"} <= set(parsers)
    for command, parser in parsers.items():
        for action in reference_cli.shown(parser):
            option = max(action.option_strings, key=len).rstrip("+")
            assert re.search(rf"<code>{re.escape(option)}</code>", text), f"{command} {option}"
    # What stands there is the parsers' own.
    assert "which holds the model near itself" in text
    # A group is no option, nor is what a quirk sets.
    for name in ("backbone", "memorize", "decode", "decode.dola_unlimited", "chat.round_trip"):
        assert f'id="model.{name}"' not in text
    section = text.partition('id="model.memorize.steps"')[2].partition("<h5")[0]
    assert re.search(r"<code>int</code> · default <code>10</code>", section)


def test_every_config_is_in_the_reference(site):
    text = html(site, "reference/configs.html")
    for name, path in packaged_configs().items():
        assert f'id="config-{name.replace("+", "-")}"' in text
        # A comment of the file, as the highlighter leaves it.
        assert path.read_text().splitlines()[0].lstrip("# ")[:30] in text


def test_equations_are_mathml(site, pages):
    found = html(site, "method.html")
    source = (ROOT / "docs" / "method.md").read_text()
    source = re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE)
    blocks = len(re.findall(r"^\$\$.*?^\$\$$", source, flags=re.DOTALL | re.MULTILINE))
    assert found.count('display="block"') == blocks > 5
    inline = re.sub(r"^\$\$.*?^\$\$$", "", source, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"\$[^$]+\$", re.sub(r"`[^`]*`", "", inline))
    assert found.count('display="inline"') == len(inline) > 10
    for path, page in pages.items():
        text = path.read_text()
        assert "arithmatex" not in text, path
        # The theme would fetch what draws them.
        assert 'class="mermaid"' not in text, path
        assert not page.tags("merror")
        if path.name != "method.html":
            assert not page.tags("math"), f"{path}: a dollar sign was taken for an equation"
    # What the converter does not know it leaves as it is.
    assert not re.search(r"<m[iot][^>]*>\\\w+", found)


def test_docstrings_leave_no_markup(site):
    for name in ("reference/python.html", "reference/cli.html"):
        text = re.sub(r"<(script|pre)\b.*?</\1>", "", html(site, name), flags=re.DOTALL)
        shown = re.sub(r"<[^>]+>", "", text)
        assert not re.search(r":(class|func|meth|mod|attr|data):`|``", shown)
        assert "{ #" not in shown


def test_make_counts_broken_links():
    """With --quiet, mkdocs does not see the warnings that --strict is to end at."""
    (command,) = re.findall(r"^\t.*mkdocs build.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--strict" in command
    assert not {"-q", "--quiet"} & set(command.split())
    assert "make docs\n" in (ROOT / ".ci" / "run").read_text()


def test_search_knows_the_options(site):
    index = (site / "search" / "search_index.json").read_text()
    assert "reference/cli.html#model.memorize.kl_coeff" in index


def test_pages_work_from_the_disk_and_on_a_phone(site, pages):
    """In a browser: the search, no request elsewhere, no scrolling sideways, both colour schemes."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        requests, faults = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        for name in ("method", "performance", "troubleshooting", "reference/cli", "reference/python"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        background = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(background)
        page.emulate_media(color_scheme="light")
        page.goto((site / "index.html").as_uri())
        assert page.evaluate(background) != dark
        page.set_viewport_size({"width": 1300, "height": 800})
        page.keyboard.press("/")
        page.keyboard.type("kl_target")
        found = page.locator(".md-search-result__link").first
        found.wait_for(timeout=0)
        assert "reference/cli.html" in found.get_attribute("href")
        chromium.close()
    assert [url for url in requests if not url.startswith(("file:", "data:", "about:"))] == []
    assert faults == []


def test_generated_pages_are_not_committed():
    command = ["git", "ls-files", "docs/reference", "docs/contributing.md", "site"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).stdout == b""
