"""Run folders written by hand, as the report reads files only, and what is seen of a report's page."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

_CONTEXT = "The tower of town {0} was built by Ada{0} in {1}."
DATA = [{"context": _CONTEXT.format(i, 1800 + i), "question": f"who built tower {i}"} for i in range(12)]
HOSTILE = [
    "</script><script>window.bad = 1; alert(1)</script>",
    "<img src=x onerror=\"window.bad=1;alert('x')\"><svg onload=alert(1)>",
    "[bold]loud[/bold] [/red] [link=http://evil.example/]x[/link] | a | b |\n# heading\n\n```\n---",
    "<!-- <script> --> ]]> {{ 7 * 7 }} {% raw %} ${x} `tick` &lt;b&gt; \\u003c",
    "‮right-to-left‬ שלום مرحبا 🦀👩‍👩‍👧 é \u2028\u2029 ﷽",
    "bell\x07 escape\x1b[31m null\x00 del\x7f \ufffe \x85",
    "-->'\"><a href=javascript:alert(1)>x</a><iframe src=http://evil.example></iframe>",
    "</textarea></title></style></svg><base href='http://evil.example/'><meta http-equiv=refresh>",
]

RunMaker = Callable[..., Path]


class Document(HTMLParser):
    """A page's elements, the content of its scripts and styles, and what is seen of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self._text: list[str] = []
        self._open: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))
            self._open = tag

    def handle_endtag(self, tag):
        if tag == self._open:
            self._open = None

    def handle_data(self, data):
        if self._open:
            tag, attributes, text = self.raw[-1]
            self.raw[-1] = (tag, attributes, text + data)
        else:
            self._text.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self._text))

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def content(self, tag: str, kind: str | None = None) -> list[str]:
        return [text for name, a, text in self.raw if name == tag and kind in (None, a.get("type"))]

    @property
    def data(self) -> Any:
        """What the browser of samples holds; JSON as browsers read it."""

        def refuse(name: str) -> None:
            raise ValueError(f"{name}: no browser reads this")

        (text,) = self.content("script", "application/json")
        return json.loads(text, parse_constant=refuse)


def assert_loads_nothing(page: Document) -> None:
    loading = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping"}
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        assert not loading & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#")
    code = "".join(page.content("style") + page.content("script", "module"))
    assert not re.search(r"https?:|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", code)


def cells_of(markdown: str) -> list[list[str]]:
    """Cells of all table rows; fails where a row is not as wide as the rows around it."""
    rows, previous = [], 0
    for line in markdown.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip())[1:-1] if line.startswith("|") else []
        assert not cells or previous in (0, len(cells)), f"a row of another width: {line!r}"
        previous = len(cells)
        rows += [[cell.strip() for cell in cells]] if cells else []
    return rows


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Makes a record as a run writes it."""
    return _record


def _record(index: int, method: str, scores: Mapping[str, float], **further: Any) -> dict[str, Any]:
    curve = {"cross_entropy": [3.0, 2.0], "kl": [0.0, 0.1], "grad_norm": [1.0, 0.5]}
    made = {
        "index": index,
        "id": str(index),
        "task": "qa",
        "method": method,
        "question": DATA[index % len(DATA)]["question"],
        "prediction": f"The answer is: Ada{index}",
        "token_ids": [1, 2, 3],
        "references": [f"Ada{index}"],
        "originals": [],
        "scores": dict(scores),
        "output_words": 2,
        "n_context_tokens": 20 + index,
        "n_truncated_tokens": 0,
        "n_prompt_tokens": 50,
        "seconds": {"memorize": 0.5 if "fastmem" in method else 0.0, "decode": 0.25},
        "curve": curve if "fastmem" in method else None,
        "status": "ok",
    }
    return made | further


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Writes a data file and a run folder over it; ``settings`` are of the model."""

    def make(
        name: str,
        records: Sequence[Mapping[str, Any]],
        methods: Sequence[str] = ("zero-shot", "fastmem"),
        data: str = "data.jsonl",
        task: str = "qa",
        complete: bool = True,
        fingerprint: str = "f" * 16,
        rows: Sequence[Mapping[str, Any]] = DATA,
        of_data: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        file = tmp_path / data
        if not file.exists():
            file.write_text("".join(json.dumps({**row, "answers": [data]}) + "\n" for row in rows))
        run = tmp_path / name
        run.mkdir(parents=True)
        loading = {
            "source": settings.pop("backbone", "tiny"),
            "quantization": settings.pop("quantization", None),
        }
        model = {"backbone": loading, "methods": list(methods), "fingerprint": fingerprint, **settings}
        found = {"task": task, "limit": None, "answer_prefix": "", "fields": None}
        found["file_hash"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        identity = {"model": model, "data": found | (of_data or {}), "trainer": {"precision": "32-true"}}
        (run / "run.json").write_text(json.dumps({"schema_version": 1, "id": "0" * 16, "identity": identity}))
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(file)}}))
        (run / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if complete:
            count = len({r["index"] for r in records})
            peaks = {"memorize": 2.0, "decode": 1.5}
            metrics = {"groups": {}, "num_samples": count, "peak_memory_gib": peaks}
            (run / "metrics.json").write_text(json.dumps(metrics))
        return run

    return make


@pytest.fixture
def two_methods() -> list[dict[str, Any]]:
    """Twelve samples: zero-shot has the even ones, fastmem all but the first."""
    return [
        made
        for index in range(12)
        for made in (
            _record(index, "zero-shot", {"accuracy": float(index % 2 == 0), "f1": 0.25 * (index % 3)}),
            _record(index, "fastmem", {"accuracy": float(index > 0), "f1": 0.5}),
        )
    ]


@pytest.fixture
def only(two_methods: list[dict[str, Any]], make_run: RunMaker) -> Callable[..., Path]:
    """Writes a run of one of the two methods, named after it."""

    def make(method: str, name: str | None = None, count: int = 12, **settings: Any) -> Path:
        records = [record for record in two_methods if record["method"] == method][:count]
        return make_run(name or method, records, methods=[method], **settings)

    return make


@pytest.fixture
def hostile(make_run: RunMaker) -> Path:
    """A run whose texts, names and settings are hostile to pages, Markdown and the terminal."""
    fields = ("id", "question", "context", "reference", "original", "prediction")
    rows, records = [], []
    for index in range(2 * len(HOSTILE)):
        text = {name: HOSTILE[(index + place) % len(HOSTILE)] for place, name in enumerate(fields)}
        rows.append({"context": text["context"], "question": text["question"]})
        told = {"references": [text["reference"]], "originals": [text["original"]]}
        shown = {name: text[name] for name in ("id", "question", "prediction")}
        for method in ("zero-shot", "fastmem"):
            records.append(_record(index, method, {"accuracy": 1.0}, **told, **shown))
    name = "a|b [bold] [_red] <i>x&y"
    return make_run(name, records, data="hostile.jsonl", rows=rows, backbone="[red]|<b>")
