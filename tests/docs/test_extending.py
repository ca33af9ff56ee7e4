"""The snippets of docs/extending.md run as they stand: the script as a program, the others here."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastmem_pl.backbone import families

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def blocks(language, title=None):
    """Code blocks of a language, those of a title or those without one."""
    mark = f' title="{title}"' if title else ""
    return re.findall(rf"^```{language}{mark}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def script(tmp_path_factory, tiny_folder):
    """Runs the page's script in a folder with its files, on a tiny model."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "my_fastmem.py").write_text("\n\n".join(blocks("python", "my_fastmem.py")))
    (folder / "my_tasks.yaml").write_text(*blocks("yaml", "my_tasks.yaml"))
    (folder / "letters.jsonl").write_text(*blocks("json", "letters.jsonl"))

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        return done, folder

    return run


def test_the_script_runs_its_own_task_method_and_score(script, tiny_folder):
    (command,) = blocks("console")
    python, *arguments = shlex.split(command.removeprefix("$ "))
    assert python == "python"
    done, folder = script(
        *arguments, "--model.backbone", str(tiny_folder), "--model.decode.max_new_tokens", "4", "--run_dir", "run",
        "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
    assert {record["method"] for record in records} == {"zero-shot", "fastmem", "fastmem+pcd"}
    assert {record["references"][0] for record in records} == {"Velm", "blue"}
    assert all(
        set(record["scores"]) == {"accuracy", "contained", "format_failure", "brief"} for record in records
    )
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert "brief" in metrics["groups"]["all"]["fastmem+pcd"]["metrics"]


def test_a_family_is_a_row(demo, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    (snippet,) = blocks("python")
    found = {}
    exec(compile(snippet, "extending.md", "exec"), found)
    assert found["backbone"].anatomy.family.name == "plain"


def test_every_block_is_run():
    titled = re.findall(r"^```\w+ title=\"([^\"]+)\"$", PAGE, re.MULTILINE)
    assert set(titled) == {"my_fastmem.py", "my_tasks.yaml", "letters.jsonl"}
    assert len(re.findall(r"^```\w+", PAGE, re.MULTILINE)) == len(titled) + 2
