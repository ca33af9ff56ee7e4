"""Every shipped config parses, instantiates and says what it is."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from fastmem_pl import DecodingSettings, FastMemDataModule, FastMemModule, MemorizationSettings
from fastmem_pl.backbone import ChatSettings
from fastmem_pl.cli import main, packaged_configs
from fastmem_pl.search import SearchSettings

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(ROOT.rglob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "model").iterdir())
TASK_NAMES = sorted(path.stem for path in (ROOT / "task").iterdir() if "+" not in path.stem)
METHOD_NAMES = sorted(path.stem for path in (ROOT / "method").iterdir())


def instantiate(*configs):
    """Module and data module of configs, later ones on top of earlier ones, as the command makes them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FastMemModule, "model")
    parser.add_class_arguments(FastMemDataModule, "data")
    parser.add_class_arguments(SearchSettings, "search")
    found = parser.get_defaults()
    for name in configs:
        config = yaml.safe_load(packaged_configs()[name].read_text())
        config.pop("trainer", None)
        found = parser.parse_object(config, cfg_base=found)
    made = parser.instantiate_classes(found)
    return made.model, made.data


def test_all_configs_are_packaged_by_name():
    assert {path.stem for path in CONFIGS} == set(packaged_configs())
    assert len(CONFIGS) == len(packaged_configs())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    config = yaml.safe_load(path.read_text())
    model, data = instantiate(path.stem)
    for name, value in config.get("model", {}).items():
        assert model.hparams[name] == value
    for name, value in config.get("data", {}).items():
        assert data.hparams[name] == value
    header = path.read_text().splitlines()[:3]
    assert header[1].startswith("# needs: ")
    command = "search" if "search" in config else "fit-predict"
    assert header[2].startswith(f"# run:   fastmem {command} --config ")
    named = header[2].split()[5].split(",")
    assert path.stem in named
    assert set(named) <= set(packaged_configs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit-predict"], "fit-predict: say what to work on: --config NAME_OR_FILE, such as --config demo"),
        (["search"], "search: say what to work on"),
        (
            ["fit-predict", "--config", "smollm2,", "qa"],
            "--config: an empty name; names stand with commas and no spaces between: smollm2,qa",
        ),
    ],
)
def test_a_beginners_mistakes(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_help_is_a_command_too(capsys):
    assert main(["help"]) == 0
    asked = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == asked


def test_packaged_search_is_the_default():
    config = yaml.safe_load(packaged_configs()["search"].read_text())["search"]
    default = SearchSettings()
    assert config == {name: getattr(default, name) for name in config}
    assert len(default.points(instantiate()[0])) == 60


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_row_of_the_paper_fits_a_model(tiny, model_name, task):
    for method in METHOD_NAMES:
        model, data = instantiate("base", model_name, task, method)
        model.load_backbone("32-true", tiny.device, tiny)
        if method != "all-methods":
            assert [m.name for m in model.methods] == [method]
        assert data.task == task
        assert (model.hparams.backbone == "demo") == (model_name == "smollm2")


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (("nqswap",), (1e-5, 0.1, 10, 100)),
        (("hotpotqa", "fastmem+cd"), (1e-5, 0.1, 10, 100)),
        (("cnndm",), (3e-6, 1.0, 10, 400)),
        (("cnndm", "cnndm+cd", "fastmem+cd"), (3e-6, 0.01, 10, 400)),
        (("xsum",), (1e-5, 1.0, 10, 400)),
        (("xsum", "xsum+cd", "fastmem+cd"), (1e-5, 0.3, 10, 400)),
        (("wikihow", "fastmem+cd"), (1e-5, 0.03, 20, 400)),
    ],
)
def test_hyperparameters_are_the_published_ones(configs, expected):
    """Those that the published scripts state for Llama-3-8B-Instruct."""
    model, _ = instantiate("base", "llama3-8b", *configs)
    found = model.settings
    assert (found.learning_rate, found.kl_coeff, found.steps, model.decoding.max_new_tokens) == expected


def resolved(capsys, *arguments):
    assert main(["fit-predict", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_takes_every_model(capsys, name):
    config = resolved(capsys, "--config", f"base,{name},nqswap,fastmem")
    assert config["data"]["task"] == "nqswap"
    expected = ("32-true", "auto") if name == "smollm2" else ("bf16-true", "gpu")
    assert (config["trainer"]["precision"], config["trainer"]["accelerator"]) == expected


def test_later_configs_and_options_win(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {kl_coeff: 0.05}")
    row = "base,llama3-8b,xsum,fastmem+cd"
    assert resolved(capsys, "--config", row)["model"]["kl_coeff"] == 0.3
    assert resolved(capsys, "--config", f"{row},{mine}")["model"]["kl_coeff"] == 0.05
    found = resolved(capsys, "--model.memorize.kl_coeff", "0.07", "--config", row)
    assert found["model"]["kl_coeff"] == 0.07
    own = tmp_path / "xsum.yaml"
    own.write_text("data: {task: xsum}")
    assert resolved(capsys, "--config", f"base,{own},fastmem+cd")["model"]["kl_coeff"] == 0.1


def test_settings_have_one_default():
    model = FastMemModule()
    assert model.settings == MemorizationSettings()
    assert model.decoding == DecodingSettings()
    assert model.chat == ChatSettings()


def test_help_names_every_config_and_does_not_wait_for_torch():
    script = (
        "import sys; from fastmem_pl.cli import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(path.stem in done.stdout for path in CONFIGS)
