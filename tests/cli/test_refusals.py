"""Options that the command line refuses in one line, with nothing written; tasks and composed configs."""

import re

import pytest
import yaml
from method_runs import NQ, RECORDS, ids_of, read, run_methods, shown, write

from fastmem_pl.cli import main

run = run_methods  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")

# option, value, and what the line says beside the option; ranges of settings stand with the settings' tests
BAD = """
model.decode.temperature | .nan | nan | 0 or above
model.decode.temperature | warm | 'warm' | float
model.decode.top_k | 2.5 | 2.5 | int
model.decode.dola_layers | hihg | 'hihg' | auto | low | did you mean 'high'
model.decode.dola_layers | [1,3] | 3 is no layer | 0 to 2
model.decode.dola_layers | [-1] | -1 | 0 to 2
model.decode.dola_layers | [] | empty | auto
model.decode.stop | [''] | '' | none empty
model.decode.stop | word | 'word' | list
model.methods | [fastmem+dloa] | 'fastmem+dloa' | zero-shot | did you mean 'fastmem+dola'
model.methods | [oneshot] | 'oneshot' | fastmem+cad | did you mean 'one-shot'
model.published_quirks | [round-weight] | 'round-weight' | dola-unlimited | did you mean 'round-weights'
model.memorize.kl_target | 0 | 0.0 | above 0
model.memorize.num_layers | 4 | 4 | 3
data.task | xsumm | 'xsumm' | wikihow | did you mean 'xsum'
config | nqswp | nqswp | all-methods | did you mean 'nqswap'
config | base,lama3-8b,xsum | lama3-8b | did you mean 'llama3-8b'
config | fastmem+CD | fastmem+CD | did you mean 'fastmem+cd'
"""


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must be refused in one line, with nothing written; gives the line."""
    monkeypatch.chdir(tmp_path)

    def call(*options):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        status = main([*map(str, options)])
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), f"exit status {status}: {err}"
        assert re.fullmatch(r"fastmem: error: .*\n", err), f"not one line: {err!r}"
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        return err

    return call


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_a_bad_option_is_refused_in_one_line(refused, tiny_folder, tmp_path, case):
    option, value, *parts = case.split(" | ")
    given = {
        "model.backbone": tiny_folder,
        "data.task": "nqswap",
        "model.methods": "[dola]",
        "run_dir": "run",
    }
    given |= {"data.path": write(tmp_path / "nq.jsonl", NQ), "trainer.accelerator": "cpu", option: value}
    line = refused("fit-predict", *(part for name, v in given.items() for part in (f"--{name}", v)))
    assert [part for part in (option, *parts) if part not in line] == []


def test_tasks_lists_all_and_refuses_unknown_names(refused, capsys):
    line = refused("tasks", "xsm")
    assert [part for part in ("'xsm'", "wikihow", "did you mean 'xsum'") if part not in line] == []
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    for task in RECORDS:
        assert re.search(rf"^{task}: ", listed, re.MULTILINE)
        assert {"prompt", "one-shot", "without context (cad)"} <= set(shown(task))
        assert "{context}" not in shown(task)["without context (cad)"]


# values of --config, and settings that come out; published rows of the paper stand in test_configs.py
COMPOSED = """
base llama3-8b xsum fastmem: {learning_rate: 1.0e-5, kl_coeff: 1, max_new_tokens: 400, methods: [fastmem]}
base,llama3-8b xsum,xsum+cd fastmem+cd: {learning_rate: 1.0e-5, kl_coeff: 0.3, methods: [fastmem+cd]}
base,qwen1.5-4b memotrap dola: {backbone: Qwen/Qwen1.5-4B-Chat, task: memotrap, methods: [dola]}
xsum,base: {task: xsum, kl_coeff: 0.1, max_new_tokens: 100}
xsum+cd xsum: {kl_coeff: 1}
dola cad: {methods: [cad]}
cad,dola: {methods: [dola]}
base mine.yaml,xsum: {alpha: 0.25, kl_coeff: 1, steps: 7}
mine.yaml base: {alpha: 0.5, steps: 10, system_prompt: Hi}
"""


@pytest.mark.parametrize(("configs", "expected"), yaml.safe_load(COMPOSED).items())
def test_configs_compose_and_later_ones_win(configs, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {alpha: 0.25, steps: 7, kl_coeff: 5.0, system_prompt: Hi}\n")
    given = [part for config in configs.split() for part in ("--config", config)]
    assert main(["fit-predict", *given, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    found = settings["model"] | settings["data"]
    assert {name: found[name] for name in expected} == expected


def test_composed_configs_run_and_name_the_folder(run, tiny_folder, tmp_path):
    usual = run("nqswap", ["cad"])
    options = {"data.path": tmp_path / "nqswap.jsonl", "data.answer_prefix": "", "trainer.accelerator": "cpu"}
    options |= {"model.backbone": tiny_folder, "model.decode.max_new_tokens": 3}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert main(["fit-predict", "--config", "base,smollm2", "--config", "nqswap,cad", *given]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"smollm2", "nqswap", "cad"} <= set(re.split("[-,_]", folder.name))
    assert ids_of(read(folder)) == ids_of(usual)
