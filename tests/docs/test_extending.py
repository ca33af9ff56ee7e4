"""The snippets of docs/extending.md run as they stand: the script as a program, the others here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from runs import metrics_of, read

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def blocks(language, title=None):
    """Code blocks of a language, those of a title or those without one."""
    mark = f' title="{title}"' if title else ""
    return re.findall(rf"^```{language}{mark}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_script_runs_its_own_task_method_and_score(tmp_path, tiny_folder):
    """As a program, in a folder with the page's files."""
    (tmp_path / "my_fastmem.py").write_text("\n\n".join(blocks("python", "my_fastmem.py")))
    (tmp_path / "my_tasks.yaml").write_text(*blocks("yaml", "my_tasks.yaml"))
    (tmp_path / "letters.jsonl").write_text(*blocks("json", "letters.jsonl"))
    (command,) = blocks("console")
    python, *arguments = shlex.split(command.removeprefix("$ "))
    assert python == "python"
    options = {"model.backbone": tiny_folder, "model.decode.max_new_tokens": 4, "trainer.accelerator": "cpu"}
    arguments += [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, *arguments, "--run_dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = read(tmp_path / "run")
    assert {record["method"] for record in records} == {"zero-shot", "fastmem", "fastmem+pcd"}
    assert {record["references"][0] for record in records} == {"Velm", "blue"}
    scores = {"accuracy", "contained", "format_failure", "brief"}
    assert all(record["scores"].keys() == scores for record in records)
    assert "brief" in metrics_of(tmp_path / "run", "fastmem+pcd")


def test_every_block_is_run():
    titled = re.findall(r"^```\w+ title=\"([^\"]+)\"$", PAGE, re.MULTILINE)
    assert set(titled) == {"my_fastmem.py", "my_tasks.yaml", "letters.jsonl"}
    assert len(re.findall(r"^```\w+", PAGE, re.MULTILINE)) == len(titled) + 1
