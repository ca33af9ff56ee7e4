"""Messages that docs/troubleshooting.md quotes are those of the program."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^```text\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)


def strings():
    """The package's string literals; what is filled in becomes an ellipsis."""
    found = []
    for path in (ROOT / "fastmem_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
    return "\n".join(found)


@pytest.fixture(scope="module")
def program():
    return strings()


@pytest.mark.parametrize("message", QUOTED, ids=lambda message: message[:40])
def test_quoted_messages_exist(program, message):
    for fragment in message.split("…"):
        # Values at the ends of a fragment belong to what is filled in.
        fragment = fragment.strip(" '\":;,()[]")
        if len(fragment) > 3:
            assert fragment in program


def test_there_are_messages():
    assert len(QUOTED) > 20
