"""Run the notebooks, and store their outputs without what changes from run to run.

    python notebooks/execute.py              run all; the first error ends it, with its traceback
    python notebooks/execute.py --write      run all and store the outputs
    python notebooks/execute.py 1_*.ipynb    some of them

They run with this interpreter on one thread, offline, each in an empty temporary folder. Needs nbclient and
ipykernel, and what the notebooks import: pandas, peft.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_CELL_TIMEOUT = 300
_COLORS = 64


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the interpreter that runs this, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How a kernel is started."""
        # It warns of TCP without encryption, which does not leave this machine.
        command = make_ipkernel_cmd(executable=sys.executable, extra_arguments=["--log-level=ERROR"])
        return KernelSpec(argv=command, display_name=_KERNEL["display_name"], language=_KERNEL["language"])


def notebooks() -> list[Path]:
    """All notebooks of this folder."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> NotebookNode:
    """Run a notebook; returns it with its outputs, cleaned. The file is left as it is.

    Raises:
        CellExecutionError: with the traceback, when a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            # An empty profile: no start-up files, no history.
            "IPYTHONDIR": profile,
        }
        client = NotebookClient(
            notebook,
            timeout=_CELL_TIMEOUT,
            kernel_name=_KERNEL["name"],
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without times, versions and the like; cells keep their ids."""
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    seen: set[str] = set()
    for number, cell in enumerate(notebook.cells, 1):
        if cell.get("id") in {None, *seen}:
            cell["id"] = f"cell-{number:02d}"
        seen.add(cell["id"])
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    nbformat.validate(notebook)
    return notebook


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs without metadata, figures made small; what was printed in pieces, by chance, is one piece."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if "metadata" in output:
            output.metadata = NotebookNode()
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _smaller(output.data["image/png"])
        last: Any = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    return joined


def _smaller(png: str) -> str:
    """The same figure in a few colours, about a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode != "P":
        image = image.convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Run the notebooks.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILES", help="all by default")
    parser.add_argument("--write", action="store_true", help="store the outputs in the files")
    given = parser.parse_args(arguments)
    for path in given.files or notebooks():
        try:
            executed = execute(path)
        except CellExecutionError as error:
            print(f"{path.name}: a cell failed\n{error}", file=sys.stderr)
            return 1
        if given.write:
            nbformat.write(executed, path)
        print(f"{path.name}: ok{', written' if given.write else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
