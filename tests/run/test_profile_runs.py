"""Profiles of real runs, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import answers

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]


def found_in(value: Any, name: str) -> list[Any]:
    if isinstance(value, dict):
        own = [value[name]] if name in value else []
        return own + [one for inner in value.values() for one in found_in(inner, name)]
    return [one for inner in value for one in found_in(inner, name)] if isinstance(value, list) else []


def test_profile(run, real: Path, pages) -> None:
    said = run("--profile")
    assert [path.name for path in Path("run/profile").iterdir()] == ["profile.json"]
    profile = json.loads(Path("run/profile/profile.json").read_text())
    for phase in ("trunk", "memorize", "prefill", "decode", "scoring"):
        assert phase in said.out.lower(), "the table at the end lacks a phase"
        assert phase in json.dumps(profile)
    assert re.search(r"tok(en)?s?\s*/\s*s", said.out)
    assert re.search("peak|GiB", said.out)
    shares = [share for share in found_in(profile, "share") if isinstance(share, float)]
    assert not shares or sum(shares) == pytest.approx(1, abs=0.02)
    assert answers(Path("run")) == answers(real)
    page, _ = pages("run")
    assert re.search("(?i)profile|where the time|time split", page.text)
    assert "prefill" in page.text


def test_profile_with_trace_and_memory(run, real: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = run("--profile=trace,memory")
    traces = list(Path("run/profile").glob("trace-*.json"))
    assert traces
    assert json.loads(traces[0].read_text())["traceEvents"]
    assert Path("run/profile/profile.json").is_file()
    assert not list(Path("run/profile").glob("memory-*")), "a snapshot of CUDA memory without CUDA"
    assert re.search("memory[^\n]*CUDA|CUDA[^\n]*memory", said.err + said.out + caplog.text)
    assert answers(Path("run")) == answers(real)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--profile=foo"], ["foo", "trace", "memory"]),
        (["--profile=tracee"], ["tracee", "trace"]),
        (["--trainer.profile", "[phasse]"], ["phasse", "phases"]),
        (["--trainer.logger", "csvv"], ["csvv", "csv"]),
        (["--trainer.logger", "[csv, wanbd]"], ["wanbd", "wandb"]),
    ],
)
def test_misspelled_profiles_and_loggers(refused_run, given: list[str], words: list[str]) -> None:
    line = refused_run(*given)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("command", ["search", "fit", "predict"])
def test_profile_of_other_commands(options, tmp_path, monkeypatch, say, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ["--search.grid", "{steps: [1, 2]}"] if command == "search" else []
    said = say(command, *options, *grid, "--run_dir", "run", "--profile", expect=None)
    if said.status == 0 and command != "search":
        assert Path("run/profile/profile.json").is_file()
    else:
        assert said.status == 2
        assert said.err.count("\n") == 1, said.err
        assert "profile" in said.err


def test_profile_configs(say, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*more: str) -> dict:
        return yaml.safe_load(say("fit-predict", *more, "--print_config").out)

    base = ["--data.path", "x.json", "--config"]
    assert settings(*base, "smollm2,qa,profile")["trainer"]["profile"] == ["phases"]
    assert settings(*base, "smollm2,qa", "--profile")["trainer"]["profile"] == ["phases"]
    both = settings(*base, "smollm2,qa", "--profile=trace,memory")["trainer"]["profile"]
    assert both == ["phases", "trace", "memory"]
    paper = settings("--config", "paper-profile")
    assert paper["trainer"]["profile"]
    assert paper["data"]["path"]
