"""The page in a real browser: filters, search, keys, address, phones, dark mode, untrusted text, and size."""

import shutil

import pytest
from report_runs import HOSTILE

from fastmem_pl.cli import main
from fastmem_pl.report.charts import draw_chart
from fastmem_pl.report.page import Chart, render_page
from fastmem_pl.report.table import Cell, PageTable

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
VARIANTS = [{"label": "zero-shot", "baselines": [None, None], "memory": False}] + [
    {"label": label, "baselines": [0, 0], "memory": "fastmem" in label}
    for label in ("cad", "fastmem", "fastmem+cd")
]
SCORES = {
    "accuracy": {"label": "accuracy", "percent": True, "binary": True, "lower": False},
    "contained": {"label": "contained", "percent": True, "binary": True, "lower": False},
    "format_failure": {"label": "format failure", "percent": True, "binary": True, "lower": True},
    "original": {"label": "original", "percent": True, "binary": True, "lower": True},
    "factkb": {"label": "FactKB", "percent": False, "binary": False, "lower": False},
}
EVIL = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=2</script>'


def answer(v, text, accuracy, contained=None, failure=0.0, original=0.0, **further):
    scores = {"accuracy": accuracy, "contained": accuracy if contained is None else contained}
    scores |= {"format_failure": failure, "original": original}
    made = {"v": v, "text": text, "scores": scores, "status": "ok", "cut": 0, "words": 2, "seconds": 0.25}
    return made | further


def sample(number, question, answers, **further):
    context = [["It was painted by ", ""], ["Rembrandt", "answer"]]
    context += [[", not by ", ""], ["Leonardo", "original"]]
    made = {
        **{"id": str(number), "dataset": 0, "question": question, "prompt": f"Read. {question}"},
        **{"context": context, "references": ["Rembrandt"], "originals": ["Leonardo"]},
        **{"measures": ["1,250 context tokens", "perplexity 21.3"], "answers": answers},
    }
    return made | further


def right(v):
    return answer(v, "The answer is: Rembrandt", 1.0)


def wrong(v):
    return answer(v, "The answer is: Leonardo", 0.0, original=1.0)


def summary(number, value, references):
    written = [answer(v, f"Summary {v}", 0.0, scores={"factkb": x}) for v, x in ((0, 0.5), (2, value))]
    return sample(number, "", written, dataset=1, references=references, originals=[])


SAMPLES = [
    sample("q0", "who painted the mona lisa?", [wrong(0), wrong(1), right(2), right(3)]),
    sample(
        "q1",
        "where does it hang?",
        [right(0), answer(2, "Leonardo!", 0.0, failure=1.0, original=1.0), right(3)],
        **{"context": None, "prompt": None},
    ),
    # Right by "contained" only; cut off.
    sample("q2", "", [answer(0, "Rembrandt?", 0.0), answer(2, "rembrandt.", 0.0, contained=1.0, cut=40)]),
    sample(
        "q3", "when?", [answer(0, "Paris", 0.0), answer(2, "Paris", 0.0, status="loss became NaN"), right(3)]
    ),
    summary("s0", 0.56, ["A summary."]),
    summary("s1", 0.55, []),
    sample("q0", EVIL, [answer(0, EVIL, 0.0), answer(2, EVIL, 0.0)], dataset=1, context=[[EVIL, "answer"]]),
]


def data(samples=SAMPLES):
    return {
        **{"variants": VARIANTS, "scores": SCORES, "primary": {"nqswap": "accuracy", "xsum": "factkb"}},
        **{"datasets": ["nqswap", "xsum"], "samples": samples},
    }


def svg():
    return draw_chart("loss", lambda axes: axes.plot([3, 2, 1], color="C1"), PageTable("Loss", [], [])).svg


def example(browser=None):
    header = ["method", *(f"a long heading {i}" for i in range(6))]
    rows = [
        [Cell(v["label"]), *(Cell(f"{i}.5% ± 2.0", "+3 −1, p = 0.62", i == 2) for i in range(6))]
        for v in VARIANTS
    ]
    table = PageTable("nqswap: 7 samples", header, rows, "Mean ± standard error.")
    return render_page(
        title="FastMem against zero-shot",
        subtitle="7 samples, 4 methods, 1 run",
        facts=[("model", "SmolLM2-135M-Instruct"), ("folder", "/a/very/long/path/without/any/space" * 4)],
        notices=["only 7 of 10 samples are answered so far"],
        tables=[table],
        charts=[Chart("loss", "Loss", "Falls.", svg(), table), Chart("kl", "KL", "Rises.", svg())],
        browser=data() if browser is None else browser,
        footer="Made by a test.",
    )


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("page") / "report.html"
    made.write_text(example(), encoding="utf-8")
    return made


@pytest.fixture
def visit(chromium, path):
    """Opens the page; at the end of the test nothing may have been complained about or asked of the network."""
    contexts, heard = [], []

    def visit(address="", file=path, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(0)  # a slow machine is no fault of the page; pytest ends what hangs
        tab.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        url = file.as_uri()
        tab.on("request", lambda request: request.url.split("#")[0] == url or heard.append(request.url))
        tab.goto(url + address)
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert heard == []


def rows(tab):
    return [text.split()[-1] for text in tab.locator("#rows .which").all_inner_texts()]


def show(tab, name):
    tab.get_by_role("radio", name=name).check()
    return rows(tab)


def chip(tab, name):
    return tab.get_by_role("radio", name=name).locator("xpath=..")


def choose(tab, name, option):
    tab.get_by_role("combobox", name=name, exact=True).select_option(label=option)


def chosen(tab):
    return tab.locator("[role=option][aria-selected=true] .which").inner_text()


def wait(tab, expression):
    """Waits until an expression is true; Playwright's own wait needs eval, which the page's policy forbids."""
    for _ in range(10_000):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(20)
    raise AssertionError(expression)


def address(tab, part):
    """Waits until the address holds ``part``; it is written a moment later."""
    wait(tab, f"decodeURIComponent(location.hash).includes('{part}')")
    return tab.url.partition("#")[2]


def test_the_page_loads_with_all_its_parts(visit):
    tab = visit()
    assert tab.get_by_role("heading", level=1).inner_text() == "FastMem against zero-shot"
    assert tab.locator("#count").inner_text() == "7 samples"
    assert len(rows(tab)) == 7
    picture = tab.get_by_role("img", name="Loss. Falls.")
    assert picture.locator("svg").bounding_box()["width"] > 300
    # The style attributes of the SVG hold under the policy.
    colour = "e => getComputedStyle(e).stroke"
    assert tab.locator("#chart-loss path[style*='--c1']").first.evaluate(colour) == "rgb(10, 110, 189)"
    assert tab.evaluate("window.hacked") is None


def test_states_of_the_first_fastmem_variant(visit):
    tab = visit()
    for state, expected in (
        # 0.06 of FactKB is a change, 0.05 is none.
        ("fixed by FastMem", ["q0", "s0"]),
        ("broken by FastMem", ["q1"]),
        # q2 differs in case and punctuation only; summaries by their number.
        ("methods differ", ["q0", "q1", "q3", "s0", "s1"]),
        ("format failure", ["q1"]),
        ("follows the memorized world", ["q1"]),
        ("not memorized", ["q3"]),
        ("context cut off", ["q2"]),
        ("all", ["q0", "q1", "q2", "q3", "s0", "s1", "q0"]),
    ):
        assert show(tab, state) == expected
        assert chip(tab, state).locator(".number").inner_text() == str(len(expected))
        assert tab.locator("#count").inner_text().startswith(f"{len(expected)} ")


def test_method_score_and_dataset(visit):
    tab = visit()
    choose(tab, "Method", "fastmem+cd")
    assert show(tab, "fixed by FastMem") == ["q0", "q3"]
    choose(tab, "Method", "cad")
    assert show(tab, "fixed by cad") == []
    assert tab.locator("#nothing").is_visible()
    assert not tab.locator("#detail").is_visible()
    assert show(tab, "follows the memorized world") == ["q0"]
    choose(tab, "Method", "zero-shot")
    assert show(tab, "broken by zero-shot") == []
    choose(tab, "Method", "fastmem")
    choose(tab, "Score", "contained")
    assert show(tab, "fixed by FastMem") == ["q0", "q2"]
    # Lower is better.
    choose(tab, "Score", "original")
    assert show(tab, "fixed by FastMem") == ["q0"]
    scores = tab.locator("#score").locator("option").all_inner_texts()
    assert scores == ["main score", "accuracy", "contained", "format failure", "original"]
    tab.get_by_role("button", name="Clear filters").click()
    choose(tab, "Dataset", "xsum")
    assert rows(tab) == ["s0", "s1", "q0"]
    assert chip(tab, "fixed by FastMem").inner_text() == "fixed by FastMem 1"


def test_search_looks_at_question_id_context_answers_and_references(visit):
    tab = visit()
    for query, expected in (
        ("MONA lisa", ["q0"]),
        ("lisa mona", ["q0"]),
        ('"lisa mona"', []),
        ("q3", ["q3"]),
        ("painted by rembrandt, not", ["q0", "q2", "q3", "s0", "s1"]),
        ("paris", ["q3"]),
        ("a summary.", ["s0"]),
        ("", ["q0", "q1", "q2", "q3", "s0", "s1", "q0"]),
    ):
        tab.get_by_role("searchbox").fill(query)
        assert rows(tab) == expected, query
    tab.get_by_role("searchbox").fill("mona")
    assert tab.locator("#count").inner_text() == "1 of 7 samples"
    assert tab.evaluate("CSS.highlights.get('search').size") == 2  # in the title and in the prompt


def test_a_sample_shows_context_prompt_and_answers(visit):
    tab = visit()
    assert tab.locator("#question").inner_text() == "who painted the mona lisa?"
    marks = tab.locator("#context mark").all()
    found = [(m.get_attribute("class"), m.inner_text()) for m in marks]
    assert found == [("answer", "Rembrandt"), ("original", "Leonardo")]
    lines = [m.evaluate("e => getComputedStyle(e).textDecorationStyle") for m in marks]
    assert lines == ["solid", "dashed"]
    letters = [m.evaluate("e => getComputedStyle(e, '::after').content") for m in marks]
    assert letters[0] != letters[1]
    legend = "answer of this context original answer, which it contradicts"
    assert tab.locator("#legend").inner_text().split() == legend.split()
    assert not tab.locator("#prompt-text").is_visible()
    tab.locator("#prompt summary").click()
    assert tab.locator("#prompt-text").inner_text() == "Read. who painted the mona lisa?"
    cards = tab.locator(".card")
    assert cards.locator("h5").all_inner_texts() == ["zero-shot", "cad", "fastmem", "fastmem+cd"]
    assert cards.nth(0).inner_text().split("\n\n")[0] == "zero-shot"
    scores = cards.nth(0).locator("li").all_inner_texts()
    assert scores == ["✗ accuracy", "✗ contained", "no format failure", "! original"]
    assert cards.nth(2).locator(".change").inner_text() == "fixed"
    assert cards.nth(2).locator(".effort").inner_text() == "2 words · 0.25 s"
    tab.locator(".row").nth(1).click()
    assert "--data" in tab.locator("#context").inner_text()
    assert not tab.locator("#prompt").is_visible()
    tab.locator(".row").nth(2).click()
    assert tab.locator("#question").inner_text() == "Sample q2"
    assert "context cut off by 40 tokens" in tab.locator("#tags").inner_text()
    tab.locator(".row").nth(3).click()
    assert tab.locator(".card .status:visible").all_inner_texts() == ["not memorized: loss became NaN"]


def test_markup_in_data_stays_text(visit):
    tab = visit("#sample=xsum/q0")
    assert tab.locator("#question").inner_text() == EVIL
    assert EVIL in tab.locator("#context").inner_text()
    assert EVIL in tab.locator(".card .text").first.inner_text()
    tab.wait_for_timeout(50)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img").count() == 0


def test_a_hostile_run_on_a_phone(visit, hostile):
    assert main(["report", str(hostile)]) == 0
    tab = visit(file=hostile / "report.html", viewport={"width": 360, "height": 740})
    for _ in range(len(HOSTILE) + 2):
        tab.keyboard.press("j")
    assert tab.evaluate("window.bad") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_keys(visit):
    tab = visit()
    press = tab.keyboard.press
    press("j")
    assert chosen(tab) == "nqswap q1"
    press("k")
    press("/")
    assert tab.evaluate("document.activeElement.id") == "query"
    tab.keyboard.type("jk/")
    assert tab.get_by_role("searchbox").input_value() == "jk/"
    tab.get_by_role("searchbox").fill("rembrandt")
    press("ArrowDown")
    assert chosen(tab) == "nqswap q1"
    press("Escape")
    assert tab.evaluate("document.activeElement.id") == "list"
    assert tab.get_by_role("searchbox").input_value() == "rembrandt"
    press("ArrowDown")
    press("ArrowDown")
    assert chosen(tab) == "nqswap q3"
    active = tab.locator("#list").get_attribute("aria-activedescendant")
    assert tab.locator(f"#{active}").get_attribute("aria-selected") == "true"
    press("Home")
    assert chosen(tab) == "nqswap q0"
    press("End")
    press("j")
    assert chosen(tab) == "xsum q0"
    assert tab.get_by_role("button", name="Next").is_disabled()


def test_everything_is_reached_by_tab_with_a_visible_focus(visit):
    tab = visit()
    reached = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        state = tab.evaluate(
            """() => {
              const e = document.activeElement;
              const seen = e.type === "radio" ? e.nextElementSibling : e;
              const { outlineStyle, outlineWidth } = getComputedStyle(seen);
              return [e.id || e.className || e.tagName + " " + e.innerText, outlineStyle !== "none" && outlineWidth];
            }"""
        )
        if state[0].startswith("BODY"):
            break
        reached.append(state)
    names = [name for name, _ in reached]
    assert names[0] == "skip"
    filters = {"query", "dataset", "method", "score"}
    assert {"A Results", "A Charts", "A Samples", "scroll", "list", "next", "context"} | filters <= set(names)
    assert any(name.startswith("SUMMARY") for name in names)
    assert all(outline == "2px" for _, outline in reached), reached


def test_the_address_keeps_filters_and_sample(visit):
    tab = visit()
    tab.get_by_role("searchbox").fill("leonardo rembrandt")
    choose(tab, "Method", "fastmem+cd")
    show(tab, "fixed by FastMem")
    tab.keyboard.press("j")
    tab.locator(".row").nth(1).click()
    kept = address(tab, "sample=nqswap/q3")
    again = visit(f"#{kept}")
    assert rows(again) == ["q0", "q3"]
    assert chosen(again) == "nqswap q3"
    assert again.get_by_role("searchbox").input_value() == "leonardo rembrandt"
    assert again.locator("#method").evaluate("e => e.selectedOptions[0].text") == "fastmem+cd"
    assert again.get_by_role("radio", name="fixed by FastMem").is_checked()
    wait(again, "document.getElementById('samples').getBoundingClientRect().top < innerHeight")
    # Links within the page change nothing; another state does.
    again.get_by_role("link", name="Results").click()
    assert rows(again) == ["q0", "q3"]
    again.evaluate("location.hash = '#state=cut&method=fastmem'")
    wait(again, "document.querySelectorAll('#rows .row').length === 1")
    assert rows(again) == ["q2"]
    again.get_by_role("button", name="Clear filters").click()
    assert "state" not in address(again, "sample=nqswap/q2")


def test_an_address_that_says_nothing_known_is_harmless(visit):
    tab = visit("#state=toString&method=__proto__&score=constructor&dataset=x&sample=%3Cimg%3E&q=%E0%A4%A")
    tab.get_by_role("searchbox").fill("")
    assert len(rows(tab)) == 7
    assert chosen(tab) == "nqswap q0"


@pytest.mark.parametrize("width", [390, 320, 768, 1920])
def test_the_page_never_scrolls_sideways(visit, width):
    tab = visit(viewport={"width": width, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = tab.locator("#results .scroll").first.evaluate("e => e.scrollWidth > e.clientWidth")
    assert wide == (width < 800)
    tops = [tab.evaluate(f"document.getElementById('{name}').offsetTop") for name in ("list", "detail")]
    assert (tops[1] > tops[0] + 99) == (width < 800)
    if width == 390:
        tab.locator(".row").nth(2).click()
        wait(tab, "Math.abs(document.getElementById('detail').getBoundingClientRect().top) < 80")
        tab.get_by_role("button", name="Back to the list").click()
        assert tab.evaluate("document.activeElement.id") == "list"


CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = (e) => {
    const own = e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)";
    return numbers(own)[3] === 0 ? ground(e.parentElement) : own;
  };
  document.querySelectorAll("details").forEach((e) => (e.open = true));
  const found = [];
  for (const e of document.querySelectorAll("body *:not(svg *)")) {
    const text = [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
    if (!text || !e.checkVisibility() || e.disabled) continue;
    found.push([contrast(getComputedStyle(e).color, ground(e)), `${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`]);
  }
  const probe = document.body.appendChild(document.createElement("i"));
  const series = [..."01234567"].map((n) => {
    probe.style.color = `var(--c${n})`;
    return contrast(getComputedStyle(probe).color, ground(document.documentElement));
  });
  return { found, series, paper: ground(document.documentElement) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_modes(visit, scheme):
    tab = visit("#sample=nqswap/q3&q=rembrandt", color_scheme=scheme)
    tab.locator(".row").nth(2).click()
    measured = tab.evaluate(CONTRASTS)
    assert measured["paper"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert len(measured["found"]) > 80
    assert [entry for entry in measured["found"] if entry[0] < 4.5] == []
    assert min(measured["series"]) >= 3


def test_paper_is_light_and_shows_the_sample(visit):
    tab = visit(color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("#filters").is_visible()
    assert not tab.locator("nav").is_visible()
    assert tab.locator("#question").is_visible()
    assert tab.locator("table").first.is_visible()


def test_without_script_tables_and_charts_are_there(visit):
    tab = visit(java_script_enabled=False)
    assert tab.locator("table").first.is_visible()
    assert tab.locator("#chart-loss svg").is_visible()
    assert tab.get_by_text("Browsing them takes JavaScript").is_visible()
    assert not tab.locator("#filters").is_visible()
    tab.locator("#chart-loss summary").click()
    assert tab.locator("#chart-loss table").is_visible()


def test_no_samples_no_browser_no_complaint(visit, tmp_path):
    file = tmp_path / "empty.html"
    file.write_text(example({}), encoding="utf-8")
    assert visit(file=file).get_by_role("heading", level=1).is_visible()


def test_of_ten_thousand_samples_few_are_drawn(visit, tmp_path):
    filler = "The old town lies on a river between two hills, and its market is known for glass. " * 10
    samples = []
    for i in range(10_000):
        found = [(v, i % (v + 2) > 0) for v in range(4)]
        answers = [answer(v, f"The answer is: {'Ada' if hit else 'Bob'}", float(hit)) for v, hit in found]
        context = [[f"{filler} The tower of town {i} was built by ", ""], [f"Ada {i}", "answer"]]
        samples.append(sample(i, f"who built the tower of town {i}?", answers, context=context))
    file = tmp_path / "large.html"
    file.write_text(example(data(samples)), encoding="utf-8")
    tab = visit(file=file)
    for query, found in (("", "10,000 samples"), ("town 999", "19 of 10,000 samples"), ("bob", None)):
        tab.get_by_role("searchbox").fill(query)
        assert found is None or tab.locator("#count").inner_text() == found
        assert 0 < tab.locator("#rows .row").count() < 60
    tab.get_by_role("searchbox").fill("")
    tab.locator("#list").focus()
    tab.keyboard.press("End")
    assert chosen(tab) == "nqswap 9999"
    assert tab.locator("#rows .row").count() < 60
