"""What is published with the code says the same as the code."""

import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import fastmem_pl
from fastmem_pl.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_in_one_place(project, capsys):
    assert "version" not in project
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmem-pl {fastmem_pl.__version__}\n"
    assert version("fastmem-pl") == fastmem_pl.__version__, (
        "installed before the last change: pip install -e ."
    )
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fastmem_pl.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == fastmem_pl.__version__


def test_compromised_releases_of_lightning_are_excluded(project):
    (lightning,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "lightning")
    allowed = [v for v in ("2.5.0", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.7.0") if v in lightning.specifier]
    assert allowed == ["2.5.0", "2.6.1", "2.6.4", "2.7.0"]


def test_types_are_published():
    assert Path(fastmem_pl.__file__).with_name("py.typed").is_file()


def test_what_runs_needs_no_tools_of_development(project):
    needed = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}
    assert not needed & {"pytest", "ruff", "mkdocs", "ray", "optuna", "peft", "ipykernel", "playwright"}
    assert requires("fastmem-pl"), "not installed"


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/**/*.yml")), ids=lambda path: path.name)
def test_workflows_run_targets_that_exist(path):
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"run: make ([a-z-]+)", text)) <= targets
