"""The configs that ship with the package."""

from pathlib import Path


def packaged_configs() -> dict[str, Path]:
    """Paths of the packaged configs by name."""
    package = Path(__file__).parents[1]
    # In a checkout they lie beside the package; in a wheel inside it.
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))} if folder else {}
