"""Run folders written by hand, as a run leaves them, and what is seen of a report's page."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import statistics
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import binomtest
from test_issue_blackbox import write

METHODS = ("zero-shot", "fastmem", "fastmem+cd", "dola")
N = 40
# Right samples of each method: 16 gained and 3 lost by fastmem, 3 gained and 5 lost by fastmem+cd.
RIGHT = {
    "zero-shot": range(17),
    "fastmem": range(3, 33),
    "fastmem+cd": range(5, 20),
    "dola": range(17),
    "fastmem+dola": range(2, 31),
}


def _no_json(name: str) -> None:
    raise ValueError(f"{name}: no browser reads this")


class Page(HTMLParser):
    """A page's elements, what is seen of it, its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.headings: list[str] = []
        self._seen: list[str] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("script", "style", "h1", "h2", "h3", "h4", "figcaption", "title"):
            self._open = tag
            kept = {"script": self.scripts, "style": self.styles}.get(tag, self.headings)
            kept.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            {"script": self.scripts, "style": self.styles}.get(self._open, self.headings)[-1] += data
        if self._open not in ("script", "style"):
            self._seen.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self._seen))

    @property
    def everything(self) -> str:
        """What is seen, and what the sample browser holds."""
        held = [json.dumps(found, ensure_ascii=False) for found in self.data]
        return self.text + " ".join(held)

    @property
    def data(self) -> list[Any]:
        kinds = [attrs.get("type", "") for tag, attrs in self.elements if tag == "script"]
        found = [text for text, kind in zip(self.scripts, kinds, strict=True) if "json" in kind]
        return [json.loads(text, parse_constant=_no_json) for text in found]


def spread(values: list[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": statistics.mean(values), "standard_error": error, "n": len(values)}


def mcnemar(gained: int, lost: int) -> float:
    return binomtest(gained, gained + lost).pvalue if gained + lost else 1.0


def summarize(records: list[dict]) -> dict[str, Any]:
    """Groups of `metrics.json`, from the records alone."""
    methods: dict[str, list[dict]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)
    base = {r["index"]: r for r in methods.get("zero-shot", [])}
    found: dict[str, Any] = {}
    for method, own in methods.items():
        metrics = {name: spread([r["scores"][name] for r in own]) for name in own[0]["scores"]}
        metrics["output_words"] = spread([float(r["output_words"]) for r in own])
        for part in ("memorize", "decode"):
            seconds = statistics.mean(r["seconds"][part] for r in own)
            metrics[f"seconds_{part}"] = {"value": seconds, "standard_error": None, "n": len(own)}
        seconds = statistics.mean(sum(r["seconds"].values()) for r in own)
        metrics["seconds"] = {"value": seconds, "standard_error": None, "n": len(own)}
        metrics["failed"] = spread([float(r["status"] != "ok") for r in own])
        metrics["truncated"] = spread([float(r["n_truncated_tokens"] > 0) for r in own])
        against = {}
        for name in ("accuracy", "contained", "exact_match", "format_failure", "original"):
            if base and method != "zero-shot" and name in own[0]["scores"]:
                pairs = [(base[r["index"]]["scores"][name], r["scores"][name]) for r in own]
                gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
                p = mcnemar(gained, lost)
                against[name] = {"gained": gained, "lost": lost, "p_value": p, "test": "exact McNemar"}
        found[method] = {"n": len(own), "metrics": metrics, "against_zero_shot": against}
    return {"all": found}


def question_record(
    index: int, method: str, task: str, text: dict[str, str], rights: dict[str, range]
) -> dict[str, Any]:
    right, broken = index in rights[method], index % 4 == 0
    reference, original = text.get("reference", f"New{index}"), text.get("original", f"Old{index}")
    wrong = f"{original} perhaps" if broken else f"The answer is: {original}"
    scores = {
        "accuracy": float(right),
        "contained": float(right),
        "exact_match": float(right and index % 2),
        "f1": 1.0 if right else 0.5 * broken,
        "format_failure": float(broken and not right),
        "original": float(not right),
    }
    if task != "nqswap":
        del scores["original"]
    return {
        "question": text.get("question", f"what is thing {index}?"),
        "prediction": text.get("prediction", f"The answer is: {reference}" if right else wrong),
        "references": [reference],
        "originals": [original] if task == "nqswap" else [],
        "scores": scores,
    }


def summary_record(index: int, method: str) -> dict[str, Any]:
    shift = {"zero-shot": 0.0, "fastmem": 0.08}.get(method, 0.0)
    values = {
        name: 0.2
        + 0.1 * random.Random(f"{name}{index}").random()
        # dola differs from zero-shot by chance alone, and the same on both sides
        + (shift or (0.02 * (-1) ** (index // 2) if method == "dola" else 0.0))
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    }
    return {
        "question": "",
        "prediction": f"summary of {index} by {method}",
        "references": [f"It rained {index} days."],
        "originals": [],
        "scores": values,
    }


def records_of(
    task: str, methods: tuple[str, ...], n: int, texts: dict[int, dict[str, str]], rights: dict[str, range]
) -> list[dict]:
    records = []
    for index in range(n):
        for method in methods:
            memory = method.startswith("fastmem")
            first = 2.0 + index / 20
            curve = {
                "cross_entropy": [first, first - 0.5, first - 0.9],
                "kl": [0.0, 0.1, 0.2 + index / 100],
                "grad_norm": [1.5, 1.2, 1.1],
            }
            text = texts.get(index, {})
            made = question_record(index, method, task, text, rights)
            if task in ("summary", "xsum"):
                made = summary_record(index, method)
            record = {
                "index": index,
                "id": text.get("id", f"id{index}"),
                "task": task,
                "method": method,
                "question": made["question"],
                "prediction": made["prediction"],
                "token_ids": [1, 2, 3],
                "references": made["references"],
                "originals": made["originals"],
                "scores": made["scores"],
                "output_words": 3 + index % 3,
                "n_context_tokens": 50 + 40 * index,
                "n_truncated_tokens": 7 if index == 39 else 0,
                "n_prompt_tokens": 150 + 40 * index,
                "seconds": {"memorize": 0.4 if memory else 0.0, "decode": 0.25},
                "curve": curve if memory else None,
                "status": "ok",
            }
            if "dola" in method:
                record["dola_layers"] = {"0": 3, "2": 5 + index}
            records.append(record)
    return records


class Maker:
    """Writes run folders as a run leaves them, from the manifest and settings of a real one."""

    def __init__(self, root: Path, real: Path) -> None:
        self.root, self.real = root, real

    def data(self, name: str, task: str, n: int, texts: dict[int, dict[str, str]]) -> Path:
        rows = []
        for index in range(n):
            text = texts.get(index, {})
            new, old = text.get("reference", f"New{index}"), text.get("original", f"Old{index}")
            told = text.get("context", f"Told in {name} number {index}: the thing is {new}.")
            asked = text.get("question", f"what is thing {index}")
            if task == "nqswap":
                row = {"input": asked, "context": told, "answer": old, "sub_context": told, "sub_answer": new}
            elif task == "qa":
                row = {"id": text.get("id", f"id{index}"), "context": told, "question": asked, "answers": new}
            else:
                row = {"id": f"id{index}", "article": told, "summary": f"It rained {index} days."}
            rows.append(row)
        self.root.mkdir(exist_ok=True)
        return write(self.root / f"{name}.jsonl", rows)

    def __call__(
        self,
        name: str = "run",
        task: str = "nqswap",
        methods: tuple[str, ...] = METHODS,
        settings: dict[str, object] | None = None,
        texts: dict[int, dict[str, str]] | None = None,
        data: Path | None = None,
        n: int = N,
        right: dict[str, range] | None = None,
    ) -> Path:
        """A finished run; `right` says which samples a method answers rightly."""
        folder = self.root / name
        folder.mkdir(parents=True)
        path = data or self.data("data-" + re.sub(r"\W", "", name), task, n, texts or {})
        manifest = json.loads((self.real / "run.json").read_text())
        identity = manifest["identity"]
        config = yaml.safe_load((self.real / "config.yaml").read_text())
        wanted = {
            "model.methods": list(methods),
            "data.task": task,
            "data.path": str(path),
            "data.file_hash": sha256(path.read_bytes()).hexdigest()[:16],
            **(settings or {}),
        }
        for dotted, value in wanted.items():
            section, key = dotted.split(".")
            if key != "file_hash":
                config[section][key] = value
            if key in identity[section] or key == "file_hash":
                identity[section][key] = value
        manifest["id"] = sha256(name.encode()).hexdigest()[:16]
        config["run_dir"] = str(folder)
        records = records_of(task, methods, n, texts or {}, RIGHT | (right or {}))
        metrics = json.loads((self.real / "metrics.json").read_text())
        metrics |= {"groups": summarize(records), "settings": copy.deepcopy(identity), "num_samples": n}
        metrics["model"]["backbone"] = identity["model"]["backbone"]
        metrics["model"]["precision"] = identity["trainer"]["precision"]
        (folder / "run.json").write_text(json.dumps(manifest, indent=2) + "\n")
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        write(folder / "predictions.jsonl", records)
        return folder
