"""Every packaged config parses, instantiates and says what it is; configs of all kinds have one door."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from runs import PREFIX, answers, ids_of, read

from fastmem_pl import (
    ChatSettings,
    DecodingSettings,
    FastMemDataModule,
    FastMemModule,
    MemorizationSettings,
)
from fastmem_pl.base.configs import packaged_configs
from fastmem_pl.cli import main
from fastmem_pl.cli.configs import read_configs
from fastmem_pl.run.identity import settings_of
from fastmem_pl.search import SearchSettings

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(ROOT.rglob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "model").iterdir())
TASK_NAMES = sorted(path.stem for path in (ROOT / "task").iterdir() if "+" not in path.stem)
METHOD_NAMES = sorted(path.stem for path in (ROOT / "method").iterdir())
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parser():
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(FastMemModule, "model")
    made.add_class_arguments(FastMemDataModule, "data")
    made.add_class_arguments(SearchSettings, "search")
    return made


@pytest.fixture(scope="module")
def instantiate(parser):
    """Module and data module of configs, later ones on top of earlier ones, as the command makes them."""

    def make(*names):
        settings = read_configs(names).settings if names else {}
        settings.pop("trainer", None)
        made = parser.instantiate_classes(parser.parse_object(settings))
        return made.model, made.data

    return make


def resolved(capsys, *arguments):
    assert main(["fit-predict", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(instantiate, path):
    assert packaged_configs()[path.stem].samefile(path)
    config = read_configs([path.stem]).settings
    model, data = instantiate(path.stem)
    found = settings_of(model)
    for name, value in config.get("model", {}).items():
        wanted = {**found[name], **value} if isinstance(value, dict) else value
        assert found[name] == wanted
    for name, value in config.get("data", {}).items():
        assert data.hparams[name] == value
    header = path.read_text().splitlines()[:3]
    assert header[1].startswith("# needs: ")
    command = "search" if "search" in config else "fit-predict"
    assert header[2].startswith(f"# run:   fastmem {command} --config ")
    named = header[2].split()[5].split(",")
    assert path.stem in named
    assert set(named) <= set(packaged_configs())


def test_packaged_search_is_the_default(instantiate):
    config = yaml.safe_load(packaged_configs()["search"].read_text())["search"]
    default = SearchSettings()
    assert config == {name: getattr(default, name) for name in config}
    assert len(default.points(instantiate()[0])) == 60


@pytest.mark.parametrize("model_name", MODELS)
def test_every_row_of_the_paper_fits_a_model(instantiate, tiny, model_name):
    methods = itertools.cycle(METHOD_NAMES)
    for task, method in zip(TASK_NAMES, methods, strict=False):
        model, data = instantiate("base", model_name, task, method)
        model.load_backbone("32-true", tiny.device, tiny)
        if method != "all-methods":
            assert [m.name for m in model.methods] == [method]
        assert data.task == task
        assert (model.loading.source == "demo") == (model_name == "smollm2")


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (("nqswap",), (1e-5, 0.1, 10, 100)),
        (("hotpotqa", "fastmem+cd"), (1e-5, 0.1, 10, 100)),
        (("cnndm",), (3e-6, 1.0, 10, 400)),
        (("cnndm", "fastmem+cd"), (3e-6, 0.01, 10, 400)),
        (("xsum",), (1e-5, 1.0, 10, 400)),
        (("xsum", "fastmem+cd"), (1e-5, 0.3, 10, 400)),
        (("wikihow", "fastmem+cd"), (1e-5, 0.03, 20, 400)),
    ],
)
def test_hyperparameters_are_the_published_ones(instantiate, configs, expected):
    """Those that the published scripts state for Llama-3-8B-Instruct."""
    model, _ = instantiate("base", "llama3-8b", *configs)
    found = model.memorization
    assert (found.learning_rate, found.kl_coeff, found.steps, model.decoding.max_new_tokens) == expected


def test_settings_have_one_default():
    model = FastMemModule()
    assert model.memorization == MemorizationSettings()
    assert model.decoding == DecodingSettings()
    assert model.chat == ChatSettings()


@pytest.mark.parametrize("name", MODELS)
def test_the_command_takes_every_model(capsys, name):
    config = resolved(capsys, "--config", f"configs/base.yaml,model/{name},nqswap,fastmem")
    assert config["data"]["task"] == "nqswap"
    expected = ("32-true", "auto") if name == "smollm2" else ("bf16-true", "gpu")
    assert (config["trainer"]["precision"], config["trainer"]["accelerator"]) == expected
    assert config["run_dir"] == f"runs/base-{name}-nqswap-fastmem"


# values of --config and options, and settings that come out
COMPOSED = """
base llama3-8b xsum fastmem: {learning_rate: 1.0e-5, kl_coeff: 1, max_new_tokens: 400, methods: [fastmem]}
base,llama3-8b xsum,xsum+cd fastmem+cd: {learning_rate: 1.0e-5, kl_coeff: 0.3, methods: [fastmem+cd]}
base,qwen1.5-4b memotrap dola: {source: Qwen/Qwen1.5-4B-Chat, task: memotrap, methods: [dola]}
xsum,base: {task: xsum, kl_coeff: 0.1, max_new_tokens: 100}
xsum+cd xsum: {kl_coeff: 1}
dola cad: {methods: [cad]}
cad,dola: {methods: [dola]}
base mine.yaml,xsum: {alpha: 0.25, kl_coeff: 1, steps: 7}
mine.yaml base: {alpha: null, steps: 10, system_prompt: Hi}
base,llama3-8b,xsum,fastmem+cd,kl.yaml: {kl_coeff: 0.05}
--model.memorize.kl_coeff=0.07 base,llama3-8b,xsum,fastmem+cd,kl.yaml: {kl_coeff: 0.07}
base,./xsum.yaml,fastmem+cd: {task: xsum, kl_coeff: 0.1}
llama3-70b --model.backbone=x/y: {source: x/y, device_map: auto}
llama3-70b --model.backbone.source=x/y: {source: x/y, device_map: auto}
llama3-70b short.yaml: {source: x/y, device_map: auto}
llama3-70b long.yaml: {source: x/y, device_map: auto}
demo: {run_dir: runs/demo, path: demo, limit: null}
thinking.yaml: {template_kwargs: {enable_thinking: false, reasoning_effort: low}, revision: v1}
'thinking.yaml --model.chat.template_kwargs={"a":true}': {template_kwargs: {a: true}}
"""
# Each list is nine of the one before.
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
OWN_FILES = {
    "mine": "model: {decode: {alpha: 0.25}, memorize: {steps: 7, kl_coeff: 5.0}, chat: {system_prompt: Hi}}\n",
    "kl": "model: {memorize: {kl_coeff: 5e-2}}\ndata:\n",
    "xsum": "data: {task: xsum}",
    "short": "model: {backbone: x/y}",
    "thinking": "model: {chat: {template_kwargs: {enable_thinking: false, reasoning_effort: low}}, "
    "backbone: {source: x/y, revision: v1}}",
    "long": "model: {backbone: {source: x/y}}",
}


@pytest.mark.parametrize(("configs", "expected"), yaml.safe_load(COMPOSED).items())
def test_configs_compose_and_later_ones_and_options_win(configs, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in OWN_FILES.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    given = [word if word.startswith("-") else f"--config={word}" for word in configs.split()]
    settings = resolved(capsys, *given)
    found = settings | settings["model"] | settings["data"]
    for group in ("backbone", "memorize", "decode", "chat"):
        found |= settings["model"][group]
    assert {name: found[name] for name in expected} == expected


def test_composed_configs_run_and_name_the_folder(run_methods, tiny_folder, tmp_path):
    usual = run_methods("nqswap", ["cad"])
    options = {"data.path": tmp_path / "nqswap.jsonl", "data.answer_prefix": "", "trainer.accelerator": "cpu"}
    options |= {"model.backbone": tiny_folder, "model.decode.max_new_tokens": 3}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert main(["fit-predict", "--config", "base,smollm2", "--config", "nqswap,cad", *given]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"smollm2", "nqswap", "cad"} <= set(re.split("[-,_]", folder.name))
    assert ids_of(read(folder)) == ids_of(usual)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {steps: 3}", "did you mean --model.memorize.steps?"),
        ("model: {tp_plan: auto}", "did you mean --model.backbone.tp_plan?"),
        ("model: {memorize: {steps: abc}}", "model.memorize.steps: 'abc' does not fit; allowed: int"),
        ("model: {memorize: {stepps: 1}}", "did you mean --model.memorize.steps?"),
        ("model:\n  learning_rat: 1.0e-4", "did you mean --model.memorize.learning_rate?"),
        ("{", "cannot read"),
        ("model: []", "model: [] does not fit"),
        ("model: {memorize: 3}", "model.memorize: 3 does not fit"),
        ("seed_everything: -5", "seed_everything: -5 is out of range; allowed: 0 to 4294967295"),
        (f"seed_everything: {1 << 32}", "seed_everything: 4294967296 is out of range"),
        (bytes(range(256)), "it is not UTF-8 text (byte 128)"),
        (b"model: # caf\xe9", "it is not UTF-8 text"),
        ("model:\n".encode("utf-16"), "it is not UTF-8 text (byte 0)"),
        ("model: " + "[" * 3000 + "]" * 3000, "nested over 50 levels"),
        ("model: " + "[" * 60 + "]" * 60, "over 50 levels"),
        (BOMB, "over 20000 values, aliases counted"),
        ("model: &a\n  x: *a\n", "over 20000 values"),
        ("model: {memorize: {steps: !!binary aGk=}}", "a value of type bytes"),
        ("model: {memorize: {steps: " + "9" * 5000 + "}}", "cannot read"),
        ("model: {memorize: {steps: " + "9" * 30 + "}}", "a number of over 20 digits"),
        ('model: {chat: {system_prompt: "\\ud800"}}', "half of a character"),
        ('model: {"\\e]0;title\\a": 1}', "model.\ufffd]0;title\ufffd"),
        ("3", "expected a mapping, found int"),
    ],
)
def test_a_bad_config_is_refused_by_its_name(refused_small, tmp_path, content, message):
    (tmp_path / "mine.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    line = refused_small("--config", "mine.yaml")
    assert "mine.yaml" in line
    assert message in line


@pytest.mark.parametrize(
    "section", ["model:", "model:\n  memorize:", "model: {}", "data:", "# all", "", "---"]
)
def test_an_empty_section_counts_as_absent(tmp_path, capsys, section):
    (tmp_path / "rate.yaml").write_text("model: {memorize: {learning_rate: 3e-4}}")
    (tmp_path / "empty.yaml").write_text(section)
    found = resolved(capsys, f"--config={tmp_path / 'rate.yaml'},{tmp_path / 'empty.yaml'}")
    assert found["model"]["memorize"]["learning_rate"] == 3e-4


def test_a_home_in_run_dir_is_expanded(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine.yaml").write_text("run_dir: ~/run")
    assert main(["fit-predict", *small, "--data.limit", "1", "--config", "mine.yaml"]) == 0
    assert (tmp_path / "home" / "run" / "metrics.json").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit-predict"], "fit-predict: say what to work on: --config NAME_OR_FILE, such as --config demo"),
        (["search"], "search: say what to work on"),
        (
            ["fit-predict", "--config", "smollm2,", "qa"],
            "--config: an empty name; names stand with commas and no spaces between: smollm2,qa",
        ),
        (["fit", "--config"], "--config: give the name of a packaged config or a file"),
    ],
)
def test_a_beginners_mistakes(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


def test_config_of_a_run_folder_reruns_and_goes_on(small_run, base, tmp_path):
    saved = base / "config.yaml"
    assert main(["fit-predict", "--config", str(saved), "--run_dir", "again"]) == 0
    assert answers(tmp_path / "again") == answers(base)
    before = (tmp_path / "again" / "predictions.jsonl").read_bytes()
    assert main(["fit-predict", "--config", "again/config.yaml"]) == 0
    assert (tmp_path / "again" / "predictions.jsonl").read_bytes() == before


def test_print_config_round_trips(small, tmp_path, capsys):
    given = [*small, "--model.memorize.kl_coeff", "0.25", "--run_dir", str(tmp_path / "run")]
    first = resolved(capsys, *given)
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(first))
    assert resolved(capsys, "--config", str(tmp_path / "saved.yaml")) == first
    assert first["model"]["memorize"]["kl_coeff"] == 0.25
    assert first["data"]["answer_prefix"] == PREFIX
    assert not (tmp_path / "run").exists()
