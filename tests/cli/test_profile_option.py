"""--profile: what it stands for, what it refuses, and the table at the end."""

import re

import pytest
import yaml
from towers import write_towers

from fastmem_pl.cli import main
from fastmem_pl.data.reader import PACKAGED, read_samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["--profile", "--data.limit", "2"], ["phases"]),
        (["--profile=memory,trace"], ["phases", "trace", "memory"]),
        (["--profile", "trace, memory"], ["phases", "trace", "memory"]),
        (["--profile", "--trainer.profile", "[trace]"], ["trace"]),
        (["--trainer.profile", "trace"], "trace"),
        (["--config", "profile"], ["phases"]),
        (["--config", "profile", "--profile=trace"], ["phases", "trace"]),
    ],
)
def test_the_option(capsys, given, expected):
    assert main(["fit-predict", *given, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["profile"] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit-predict", "--profile=trase"], "--profile: 'trase' is unknown.*did you mean 'trace'"),
        (["fit-predict", "--profile="], "--profile: '' is unknown; allowed: memory, phases, trace"),
        (["fit", "--trainer.profile", "[phasse]"], "trainer.profile.*'phasse'.*did you mean 'phases'"),
        (["fit", "--trainer.profile", "trace,phasse"], "trainer.profile: 'phasse' is .* mean 'phases'"),
        (["search", "--profile"], "--profile: not with search; allowed with fit-predict, fit, predict"),
        (["ask", "x.fastmem", "--profile=trace"], "--profile: not with ask"),
        (["fit-predcit", "--profile"], "'fit-predcit' is no command"),
        (["search", "--config", "smollm2,search,profile"], "trainer.profile: not in a search"),
    ],
)
def test_what_is_refused(refused, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    assert re.search(said, line), line


def test_the_table_at_the_end(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmem_pl.run.predict.Backbone.load", lambda *args, **kwargs: tiny)
    arguments = ["--data.task", "qa", "--data.path", str(write_towers(tmp_path, 2)), "--profile"]
    arguments += ["--model.memorize.steps", "1", "--model.decode.max_new_tokens", "3"]
    arguments += ["--run_dir", str(tmp_path / "run"), "--trainer.enable_progress_bar", "false"]

    def said(command):
        assert main([command, *arguments]) == 0
        return capsys.readouterr().out

    for command in ("fit", "predict"):
        table = said(command)
        assert f"profile of {command}: 2 samples, demo in 32-true on " in table
        assert ("decode: fastmem+cd" in table) == (command == "predict")
        assert f"profile: {tmp_path / 'run' / 'profile'}" in table.replace("\n", "")
    # Complete already.
    assert "profile: nothing was measured" in said("predict")
    monkeypatch.setattr("fastmem_pl.run.session.score_records", lambda *args: ["factkb"])
    assert f"only scores were added; {tmp_path / 'run' / 'profile'} stays as it was" in said("predict")


def test_the_paper_profile_is_one_context_and_several_questions(capsys):
    assert main(["fit-predict", "--config", "paper-profile", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["model"]["memorize"]["max_context_tokens"], config["data"]["batch_size"]) == (2500, 1)
    assert config["trainer"]["profile"] == ["phases"]
    samples = read_samples(PACKAGED[config["data"]["path"]], config["data"]["task"])
    assert len({sample.context for sample in samples}) == 1
    # The first warms up, and a median of others needs two.
    assert len({sample.question for sample in samples}) == len(samples) >= 3
    # The answers stand in what is left after the cut, by words: a token is one at most, on average.
    shown = " ".join(samples[0].context.split()[:1800])
    assert all(any(answer in shown for answer in sample.references) for sample in samples)


@pytest.mark.demo
def test_the_packaged_context_fills_the_papers_limit(demo):
    sample = read_samples(PACKAGED["long"], "qa")[0]
    assert demo.chat.count_tokens([sample.context])[0] > 2900
