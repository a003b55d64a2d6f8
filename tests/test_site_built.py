"""The built site: links lead somewhere, nothing comes from outside, and a browser shows it as a reader would see it."""

import fcntl
import html.parser
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT / "tutorials").with_suffix(".html")) for path in (ROOT / "tutorials").rglob("*.md"))
SECONDS_PER_BUILD = 60
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 800}

by_page = pytest.mark.parametrize("page", PAGES)


def build(project: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a project. Without --quiet, under which --strict lets warnings pass."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=project, env=os.environ | {"NO_MKDOCS_2_WARNING": "true"}, capture_output=True, text=True)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once for all processes of the run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".built").exists():
            start = time.perf_counter()
            done = build(ROOT, folder)
            assert done.returncode == 0, done.stderr
            assert time.perf_counter() - start < SECONDS_PER_BUILD
            folder.with_suffix(".built").touch()
    return folder


def test_the_strict_build_stops_at_faults(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "tutorials").mkdir()
    fault = '[a](nowhere.md) [b](#nowhere)\n\n```python exec="true"\nassert 1 == 2\n```\n'
    (tmp_path / "tutorials/index.md").write_text(fault)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for message in ("link 'nowhere.md'", "link '#nowhere'", "assert 1 == 2"):
        assert re.search(rf"WARNING -[^-]*{message}", done.stderr), message


class Links(html.parser.HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value is None:
                continue
            if key in {"id", "name"}:
                self.anchors.add(value)
            elif tag == "a" and key == "href":
                self.links.append(value)
            elif key in {"src", "href", "data", "poster"}:
                self.loads.append(value)
            elif key == "srcset":
                self.loads += [part.split()[0] for part in value.split(",")]
            elif key == "style":
                self.loads += css_loads(value)


def css_loads(text: str) -> list[str]:
    """What a style sheet loads."""
    return [a or b for a, b in re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", text)]


def is_outside(address: str) -> bool:
    return address.startswith("//") or urllib.parse.urlsplit(address).scheme not in {"", "data"}


def test_nothing_is_loaded_from_outside(site: Path) -> None:
    loads = {(path, item) for path in site.rglob("*.html") for item in Links(path.read_text()).loads}
    loads |= {(path, item) for path in site.rglob("*.css") for item in css_loads(path.read_text())}
    outside = [f"{path.relative_to(site)}: {item}" for path, item in sorted(loads) if is_outside(item)]
    assert loads
    assert not outside, "\n".join(outside)


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = (base / urllib.parse.unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            if not target.is_file() or (target in pages and urllib.parse.unquote(parts.fragment) not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)


def test_something_from_outside_would_be_found() -> None:
    page = Links('<script src="https://a.test/x.js"></script><p style="background: url(//b.test/y.png)"><a href="https://c.test">text</a>')
    assert [item for item in page.loads if is_outside(item)] == ["https://a.test/x.js", "//b.test/y.png"]
    assert css_loads("@import 'https://a.test/z.css'; b{src:url(fonts/a.woff2)}") == ["https://a.test/z.css", "fonts/a.woff2"]


def test_zensical_builds_it_too(site: Path, tmp_path: Path) -> None:
    """The successor of mkdocs-material, from the same files: same pages, same formulas."""
    pytest.importorskip("zensical", reason="Zensical is not installed: pip install loracle[test]")
    for name in ("reference", "toy_tasks", "oracle_tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tutorials", tmp_path / "tutorials")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / page).is_file()
        formulas = [(folder / page).read_text().count('class="arithmatex"') for folder in (site, tmp_path / "site")]
        assert formulas[0] == formulas[1], page


# In a browser


def find_chromium() -> str | None:
    """Chromium or Chrome of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that finds no other host."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install loracle[test]")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
        started = playwright.chromium.launch(executable_path=program, args=flags)
        yield started
        started.close()


class Watched:
    """A browser page, what it complained about, and what it asked for that is not in the site's folder."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "request", lambda request: self.outside.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
        )

    def open(self, address: str) -> Any:
        self.page.goto(address, wait_until="load")
        return self.page


@pytest.fixture
def open_page(browser: Any, site: Path) -> Iterator[Any]:
    """A function that opens a page of the site from its folder: by its path and options of the browser's context."""
    opened: list[Watched] = []

    def open_it(path: str, query: str = "", **options: Any) -> Watched:
        opened.append(Watched(browser, **options))
        opened[-1].open((site / path).as_uri() + query)
        return opened[-1]

    yield open_it
    for one in opened:
        one.context.close()


RAW_TEX = r"\\(?:[a-zA-Z]{2,}|[()\[\]])|\$\$?[^$\n]+\$|\^\{|_\{"
# Text outside of code and formulas, where no TeX may be left
TEXT = """() => {
  const copy = document.querySelector("article").cloneNode(true)
  copy.querySelectorAll("pre, code, .katex, script, style").forEach(element => element.remove())
  return copy.textContent
}"""
# Elements that stick out of the screen and are not inside a box that scrolls by itself
TOO_WIDE = """() => {
  const scrolls = element => element && (/(auto|scroll|hidden)/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement))
  return [document.documentElement.scrollWidth - innerWidth,
    [...document.querySelectorAll("article *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
      .map(e => e.tagName + "." + e.className + ": " + e.textContent.slice(0, 60)).slice(0, 5)]
}"""
# Text and its background, wherever text stands in the article, as [colour, background, large, text]
COLOURS = r"""() => {
  // Layers from the element down to the first that is opaque, then mixed from below
  const painted = element => {
    const layers = []
    for (; element; element = element.parentElement) {
      const [r, g, b, a = 1] = getComputedStyle(element).backgroundColor.match(/[\d.]+/g).map(Number)
      layers.push([r, g, b, a])
      if (a === 1) break
    }
    const mixed = layers.reverse().reduce((under, over) => under.map((u, i) => over[3] * over[i] + (1 - over[3]) * u), [255, 255, 255])
    return `rgb(${mixed.join(", ")})`
  }
  const found = new Map(), SKIPPED = ".katex-mathml, .headerlink, .md-clipboard, title, svg, script, style"
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, style = getComputedStyle(parent), text = walker.currentNode.textContent.trim()
    if (!text || style.visibility === "hidden" || parent.closest(SKIPPED)) continue
    const size = parseFloat(style.fontSize)
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700)
    found.set([style.color, painted(parent), large].join(), [style.color, painted(parent), large, text.slice(0, 40)])
  }
  return [...found.values()]
}"""


@by_page
def test_a_page_in_a_browser(open_page: Any, page: str) -> None:
    """Mathematics is set, nothing complains or comes from outside, a phone shows the page in its width, and text can be read."""
    shown = open_page(page, viewport=PHONE, color_scheme="light")
    formulas = shown.page.locator(".arithmatex").count()
    assert shown.page.locator(".arithmatex > .katex, .arithmatex > .katex-display").count() == formulas
    assert shown.page.locator(".katex-error").count() == 0
    left = re.findall(RAW_TEX, shown.page.evaluate(TEXT))
    assert not left, f"not set as mathematics: {left}"
    too_much, elements = shown.page.evaluate(TOO_WIDE)
    assert too_much <= 0, f"the page scrolls sideways: {elements}"
    assert not elements
    _check_structure(shown.page)
    shown.page.set_viewport_size(DESKTOP)
    faint = _faint_text(shown.page, "default") + _faint_text(shown.page, "slate")
    assert not faint, "\n".join(faint)
    assert not shown.complaints
    assert not shown.outside


def _check_structure(page: Any) -> None:
    """One heading of first order, none left out below it, and every figure says what it shows."""
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('article :is(h1,h2,h3,h4,h5,h6)')].map(e => e.tagName)")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    assert page.evaluate("[...document.images].every(image => image.alt.length > 40)"), "an image does not say what it shows"


def _faint_text(page: Any, scheme: str) -> list[str]:
    """Text below the contrast of WCAG 2 AA: 4.5, or 3 for large text."""
    page.evaluate("scheme => document.body.setAttribute('data-md-color-scheme', scheme)", scheme)
    page.add_style_tag(content="* { transition: none !important }")
    return [
        f"{scheme}: {contrast(text, back):.2f} {sample!r} {text} on {back}"
        for text, back, large, sample in page.evaluate(COLOURS)
        if contrast(text, back) < (3 if large else 4.5)
    ]


def contrast(text: str, back: str) -> float:
    """The contrast of two CSS colours after WCAG 2; a transparent text colour is laid on the background."""
    (*under, _), (*over, alpha) = _colour(back), _colour(text)
    mixed = [alpha * o + (1 - alpha) * u for o, u in zip(over, under, strict=True)]
    light, dark = sorted((_luminance(mixed), _luminance(under)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _colour(text: str) -> tuple[float, float, float, float]:
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", text))
    return red, green, blue, alpha[0] if alpha else 1.0


def _luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for value in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("preference", "scheme"), [("light", "default"), ("dark", "slate")])
def test_the_reader_chooses_light_or_dark(open_page: Any, preference: str, scheme: str) -> None:
    shown = open_page("index.html", viewport=DESKTOP, color_scheme=preference).page
    assert shown.locator("body").get_attribute("data-md-color-scheme") == scheme


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("gauge", "papers/lora.html#many-factors-one-product"),
        ("first_order_update", "api/lora_ga.html"),
        ("num_trainable", "api/lora.html"),
        ("Low-Rank Adaptation with Gradient Approximation", "papers/"),
        ("eckart", "papers/lora.html"),
    ],
)
def test_the_search_answers_from_a_folder(open_page: Any, query: str, expected: str) -> None:
    shown = open_page("index.html", "?q=" + urllib.parse.quote(query), viewport=DESKTOP)
    shown.page.wait_for_selector(".md-search-result__link")
    found = shown.page.evaluate("[...document.querySelectorAll('.md-search-result__link')].map(e => e.getAttribute('href'))")
    assert any(expected in address for address in found), found
    assert not shown.outside
    assert not shown.complaints


def test_the_keyboard_reaches_everything(open_page: Any) -> None:
    """The first Tab gives the link past the navigation; then come search, navigation and the text; `s` opens the search."""
    shown = open_page("papers/lora.html", viewport=DESKTOP).page
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.classList.contains('md-skip')")
    assert shown.locator(".md-skip").bounding_box()["y"] >= 0
    reached = []
    for _ in range(60):
        shown.keyboard.press("Tab")
        reached.append(
            shown.evaluate(
                "['search', 'nav', 'content'].find(name => document.activeElement.closest('.md-' + name) "
                "|| (name === 'nav' && document.activeElement.closest('.md-sidebar--primary'))) || ''"
            )
        )
    assert {"search", "nav", "content"} <= set(reached), reached
    outline = shown.evaluate("(e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).boxShadow])(document.activeElement)")
    assert outline != ["none", "none"], "one cannot see where one is"
    shown.keyboard.press("Escape")
    shown.evaluate("document.activeElement.blur()")
    shown.keyboard.press("s")
    shown.wait_for_function("document.activeElement.classList.contains('md-search__input')")
    shown.keyboard.type("gauge")
    shown.wait_for_selector(".md-search-result__link")


def test_a_fault_would_be_found(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<script src="https://a.test/x.js"></script><article><p style="width: 2000px; color: #999; background: #fff">'
        "$x^{2}$ and \\alpha</p></article><script>console.error(1)</script>"
    )
    shown = Watched(browser, viewport=PHONE)
    shown.open(page.as_uri())
    assert shown.outside == ["https://a.test/x.js"]
    assert len(shown.complaints) >= 2
    assert re.findall(RAW_TEX, shown.page.evaluate(TEXT)) == ["$x^{2}$", r"\alpha"]
    assert shown.page.evaluate(TOO_WIDE)[0] > 0
    ((text, back, _, _),) = shown.page.evaluate(COLOURS)
    assert round(contrast(text, back), 2) == 2.85
    shown.context.close()
