"""``python -m fastmem_pl`` runs the ``fastmem`` command."""

import sys

from fastmem_pl.cli import main

sys.exit(main())
