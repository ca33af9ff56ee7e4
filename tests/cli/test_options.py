"""What the commands' help states without importing the library is what the library says."""

import subprocess
import sys

from fastmem_pl import DecodingSettings
from fastmem_pl.backbone.quantization import KINDS
from fastmem_pl.backbone.settings import WEIGHT_DTYPE
from fastmem_pl.cli import ask, export, memorize, options
from fastmem_pl.decoding import DECODERS
from fastmem_pl.memory import POLICIES
from fastmem_pl.memory.files import FORMS


def test_lists_and_defaults_are_the_librarys():
    assert tuple(WEIGHT_DTYPE) == options.PRECISIONS
    assert sorted(KINDS) == list(options.QUANTIZATIONS)
    assert export._FORMS == FORMS
    shown = ask._parser().format_help()
    defaults = DecodingSettings()
    for name, value in (("cd and cad", defaults.alpha), ("of an answer", defaults.max_new_tokens)):
        assert f"{name} (default: {value})" in " ".join(shown.split())
    assert all(f"{name} (" in shown or name in shown.split() for name in DECODERS)
    assert all(f"\n  {policy} " in memorize.DESCRIPTION for policy in POLICIES)


def test_help_waits_for_no_torch():
    code = "import sys; from fastmem_pl.cli import main; main([sys.argv[1], '--help']); sys.exit('torch' in sys.modules)"
    for command in ("memorize", "ask", "export"):
        assert subprocess.run([sys.executable, "-c", code, command], capture_output=True).returncode == 0
