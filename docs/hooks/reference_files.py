"""Reference pages of what lies in files: packaged configs, tasks, and the paper's results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from site_links import config_anchor


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def configs_page() -> str:
    """Every packaged config with its comments."""
    from fastmem_pl.base.configs import packaged_configs

    configs = packaged_configs()
    parts = [
        "# Packaged configs",
        "`--config` takes the names below and files of your own, several with commas between; later ones "
        "win. Name them in the order model, task, method. `--print_config` shows what they come to. A config "
        "of a task together with a method, such as `xsum+cd`, comes by itself where both are named.",
    ]
    rows = [[f"[`{name}`](#{config_anchor(name)})", *_facts(path)] for name, path in configs.items()]
    parts.append(table(["config", "what it is", "needs"], rows))
    kind = None
    for name, path in configs.items():
        folder = "complete" if path.parent.name == "configs" else path.parent.name
        if folder != kind:
            kind = folder
            parts.append(f"## {kind.capitalize()}")
        parts.append(f"### `{name}` {{ #{config_anchor(name)} }}")
        parts.append(f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _facts(path: Path) -> list[str]:
    """The first two lines of a config's header."""
    what, needs, *_ = path.read_text(encoding="utf-8").splitlines()
    return [what.lstrip("# "), needs.removeprefix("# needs: ").strip()]


def _effect(quirk: type) -> str:
    """What a quirk does: its docstring up to what it raises."""
    return " ".join((inspect.getdoc(quirk) or "").split("\n\nRaises:")[0].split())


def tasks_page() -> str:
    """Tasks with their prompts, methods and scores."""
    from fastmem_pl.data import TASKS
    from fastmem_pl.data.tasks import OWN_FIELDS
    from fastmem_pl.decoding import METHODS
    from fastmem_pl.metrics import METRIC_MODELS, SCORES
    from fastmem_pl.run.published import QUIRKS

    parts = [
        "# Tasks, methods, scores",
        "The same is printed by `fastmem tasks` and `fastmem tasks NAME`. How to add one: "
        "[Extending](../extending.md).",
        "## Methods",
        "A method is memory or not, a decoder, and a form of the task's prompt (`--model.methods`).",
        table(
            ["method", "memory", "decoder", "prompt", "what it does"],
            [
                [f"`{m.name}`", "yes" if m.memory else "no", m.decoder, m.prompt, m.description]
                for m in METHODS.values()
            ],
        ),
        "Faults of the published code that `--model.published_quirks` brings back:",
        table(["quirk", "effect"], [[f"`{name}`", _effect(quirk)] for name, quirk in QUIRKS.items()]),
        "## Scores",
        "One number an answer; tables show the mean over samples with its standard error. A sample "
        "without references has no scores.",
    ]
    rows = []
    for score in SCORES.values():
        doc = inspect.getdoc(score.function or METRIC_MODELS[score.name])
        what = " ".join((doc or "").split("\n\n")[0].split())
        rows.append([f"`{score.name}`", score.label, "percent" if score.percent else "number", what])
    parts += [table(["score", "heading", "shown as", "what it is"], rows), "## Tasks"]
    parts.append(
        table(
            ["task", "what it is", "scores"],
            [[f"[`{t.name}`](#task-{t.name})", t.description, ", ".join(t.scores)] for t in TASKS.values()],
        )
    )
    parts.append("`mixed` is a file whose records name their own task in the field `task`.")
    for task in TASKS.values():
        parts += [f"### `{task.name}` {{ #task-{task.name} }}", f"{task.description}."]
        if task.name in OWN_FIELDS:
            fields = ", ".join(f"`{field}`" for field in OWN_FIELDS[task.name])
            parts.append(
                f"Fields of a record ([`--data.fields`](cli.md#data.fields) renames them): {fields}."
            )
        forms = {"prompt": task.prompt, "one-shot": task.one_shot, "without context": task.without_context}
        if task.context != "{context}":
            forms = {"memorized text": task.context, **forms}
        for label, text in forms.items():
            parts.append(f'```text title="{label}"\n{text}\n```')
    return "\n\n".join(parts) + "\n"


def published_tables() -> str:
    """The paper's results, a table for every model."""
    import fastmem_pl.report

    file = Path(fastmem_pl.report.__file__).with_name("published.yaml")
    parts = []
    for model, tasks in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        found = [(task, score, values) for task, scores in tasks.items() for score, values in scores.items()]
        methods = list(dict.fromkeys(name for _, _, values in found for name in values))
        rows = [
            [f"`{task}`", score, *(f"{values[m]:.3f}" if m in values else "" for m in methods)]
            for task, score, values in found
        ]
        parts.append(f"**{model}**")
        parts.append(table(["task", "score", *(f"`{m}`" for m in methods)], rows))
    return "\n\n".join(parts)


def demo_table() -> str:
    """What the demo prints, as the README has it: the table and the tests below it."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"^<!-- demo table:.*?-->\n```text\n(.*?)\n(?:\n|```)", readme, re.DOTALL | re.MULTILINE
    )
    if not found:
        raise ValueError("README.md has no '<!-- demo table: ... -->' with a text block below it")
    return f"```text\n{found[1]}\n```"
