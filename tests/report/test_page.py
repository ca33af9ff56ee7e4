"""The page as text: what data says stays data, nothing is loaded, and empty parts are left out."""

import base64
import hashlib
import re
from itertools import pairwise

import pytest
from report_runs import Document, assert_loads_nothing

from fastmem_pl.report.page import Chart, render_page
from fastmem_pl.report.table import Cell, PageTable

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&\u2028\u2029]]><!--"
SVG = '<svg viewBox="0 0 9 9"><rect width="9" height="9" style="fill: var(--c1)"/></svg>'


def sample(**further):
    answer = {"v": 0, "text": "Ada", "scores": {"accuracy": 1.0}, "status": "ok", "cut": 0, "words": 1}
    made = {"id": "7", "dataset": 0, "question": "who?", "context": [["By ", ""], ["Ada", "answer"]]}
    made |= {"prompt": "By Ada. who?", "references": ["Ada"], "originals": ["Bob"]}
    made |= {"measures": ["3 context tokens"], "extra": 2.5, "answers": [answer | {"seconds": 0.5}]}
    return made | further


def browser(*samples):
    return {
        "variants": [{"label": "zero-shot", "baselines": [None], "memory": False}],
        "scores": {"accuracy": {"label": "accuracy", "percent": True, "binary": True, "lower": False}},
        "primary": {"qa": "accuracy"},
        "datasets": ["qa"],
        "samples": list(samples),
    }


def page(**further):
    parts = {"title": "A run", "subtitle": "", "facts": [], "notices": [], "tables": [], "charts": []}
    return Document(render_page(**{**parts, "browser": {}, "footer": "end", **further}))


@pytest.fixture(scope="module")
def full():
    table = PageTable("Accuracy", ["method", "accuracy"], [[Cell("fastmem"), Cell("83%", "+3 −1", True)]])
    chart = Chart("loss", "Loss", "Falls.", SVG, table)
    return page(tables=[table], charts=[chart], browser=browser(sample()))


def test_untrusted_text_adds_no_element_anywhere():
    def page_of(text, one):
        table = PageTable(text, [text, text], [[Cell(text), Cell(text, text, True)]], text)
        told = {"title": text, "subtitle": text, "facts": [(text, text)], "notices": [text], "footer": text}
        return page(**told, tables=[table], charts=[Chart("a", text, text, SVG, table)], browser=browser(one))

    evil_sample = sample(id=EVIL, question=EVIL, context=[[EVIL, "answer"]], prompt=EVIL)
    evil_sample |= {"references": [EVIL], "originals": [EVIL]}
    expected, found = page_of("t", sample()), page_of(EVIL, evil_sample)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in expected.elements]
    assert found.data["samples"][0] == evil_sample
    (data,) = found.content("script", "application/json")
    assert not re.search("[<>&\u2028\u2029]", data)


def test_text_that_is_no_unicode_can_be_written():
    found = page(title="half \ud83d", browser=browser(sample(question="half \ud83d\udc00 \udc00")))
    assert found.data["samples"][0]["question"].startswith("half ")
    assert found.text.encode("utf-8")


def test_policy_allows_exactly_the_style_and_the_script_of_the_page(full):
    (policy,) = (m["content"] for m in full.tags("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = {name: values for name, *values in (rule.split() for rule in policy.split(";"))}

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == ["'none'"]
    assert rules["script-src"] == [digest(text) for text in full.content("script", "module")]
    assert rules["style-src-elem"] == [digest(text) for text in full.content("style")]


def test_nothing_is_loaded_and_nothing_is_inline(full):
    assert_loads_nothing(full)


def test_the_script_and_the_style_cannot_end_their_elements(full):
    for text in full.content("style") + full.content("script", "module"):
        assert not re.search(r"</(script|style)|<!--", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("parts", "present"),
    [
        ({}, set()),
        ({"browser": browser()}, set()),
        ({"browser": browser(sample())}, {"samples"}),
        ({"tables": [PageTable("Nothing", [], [])]}, {"results"}),
        ({"charts": [Chart("c", "Loss", "", SVG)]}, {"charts"}),
    ],
)
def test_only_parts_with_content_are_shown(parts, present):
    document = page(**parts)
    sections = {a["id"] for a in document.tags("section") if "id" in a}
    assert sections == present
    links = {a["href"] for a in document.tags("a")} - {"#top", "#content"}
    assert links == {f"#{name}" for name in present}
    assert document.tags("main")
    assert document.tags("h1")


def test_headings_have_no_gaps(full):
    levels = [int(tag[1]) for tag, _ in full.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_ids_of_charts_do_not_meet():
    svg = (
        '<svg xmlns:xlink="x"><metadata><a/></metadata><defs><style type="text/css">*{fill:red}</style>'
        '<clipPath id="p"/></defs><g id="axes_1" clip-path="url(#p)"><use xlink:href="#p"/></g></svg>'
    )
    document = page(charts=[Chart("one", "A", "", f"<?xml?>{svg}"), Chart("two", "B", "", svg)])
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"one-p", "two-p", "one-axes_1"} <= set(ids)
    assert [a["xlink:href"] for a in document.tags("use")] == ["#one-p", "#two-p"]
    assert [a["clip-path"] for a in document.tags("g")] == ["url(#one-p)", "url(#two-p)"]
    assert "fill:red" not in document.text + "".join(document.content("style"))
    assert not document.tags("metadata")
    assert "<?xml" not in document.text


def test_best_cells_notes_and_row_headings(full):
    assert {"scope": "row"} in full.tags("th")
    assert {"class": "best"} in full.tags("b")
    assert {"scope": "col", "class": "number"} in full.tags("th")
    assert "+3 −1" in full.text


def test_columns_of_numbers():
    table = PageTable("", ["", "n", "why"], [["a", "71.7% ± 5.9", "gold"]])
    assert [table.numeric(column) for column in range(3)] == [False, True, False]
