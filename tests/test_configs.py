"""Every shipped config parses, instantiates and says what it is."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from fastmem_pl import FastMemDataModule, FastMemModule
from fastmem_pl.cli import packaged_configs

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_all_configs_are_packaged_by_name():
    assert {path.stem for path in CONFIGS} == set(packaged_configs())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    config = yaml.safe_load(path.read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FastMemModule, "model")
    parser.add_class_arguments(FastMemDataModule, "data")
    made = parser.instantiate_classes(parser.parse_object(config))
    assert [m.name for m in made.model.methods] == config["model"]["methods"]
    assert made.data.task == config["data"]["task"]
    header = path.read_text().splitlines()[:3]
    assert header[1].startswith("# needs: ")
    assert header[2].startswith(f"# run:   fastmem fit-predict --config {path.stem}")


def test_help_names_every_config_and_does_not_wait_for_torch():
    script = (
        "import sys; from fastmem_pl.cli import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(path.stem in done.stdout for path in CONFIGS)
