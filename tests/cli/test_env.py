"""What `fastmem env` says, in plain lines and as JSON, also of installations that are broken."""

import builtins
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastmem_pl import kernels
from fastmem_pl.base.hub import cache_dir, converted_folder, demo_file
from fastmem_pl.cli import env


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))


def test_lines_and_json_say_the_same(capsys):
    assert env.run([]) == 0
    text = capsys.readouterr().out
    assert env.run(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    lines = [line.split() for line in text.splitlines()]
    for section, content in facts.items():
        assert section.split() in lines
        for name in content:
            assert any(line[: len(name.split())] == name.split() for line in lines)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["system"]["python"].startswith(sys.version.split()[0])
    assert facts["optional packages"].keys() >= {"optuna", "peft", "tensorboard", "wandb", "mlflow"}
    # Values of a section stand under each other.
    starts = {
        len(line) - len(line[2:].split("  ", 1)[1].lstrip())
        for line in text.split("system\n")[1].splitlines()[:5]
    }
    assert len(starts) == 1


def test_the_cache_is_looked_at_and_not_made(tmp_path):
    said = env.describe()["cache"]
    assert said["folder"].endswith("cache (not there yet)")
    assert said["free disk"].endswith("GiB")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(demo_file() is None, reason="the demo model is not installed")
def test_the_converted_demo_model_is_found():
    assert env.describe()["cache"]["converted demo model"].startswith("not there yet")
    folder = converted_folder(demo_file())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert env.describe()["cache"]["converted demo model"].endswith(folder.name)
    assert folder.parent == cache_dir()


def test_secrets_and_other_variables_stay_out(monkeypatch):
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_SECRET")
    for name in (*secrets, "FASTMEM_API_TOKEN", "FASTMEM_PASSWORD", "EDITOR"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@host/x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("FASTMEM_NEW", "1")
    found = env.describe()["environment variables"]
    assert "hush" not in json.dumps(found)
    assert found["MLFLOW_TRACKING_URI"] == "https://***@host/x"
    assert (found["CUDA_VISIBLE_DEVICES"], found["FASTMEM_NEW"]) == ("0,1", "1")
    assert "EDITOR" not in found


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/home/ann/x", "~/x"), ("/home/ann", "~"), ("/home/anna/x", "/home/anna/x"), ("/tmp", "/tmp")],
)
def test_home_folders_lose_their_users_name(monkeypatch, path, shown):
    monkeypatch.setenv("HOME", "/home/ann")
    assert env._shown(path) == shown


def test_a_broken_torch_is_said(monkeypatch, capsys):
    plain = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open\nshared object file")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert env.run([]) == 0
    text = capsys.readouterr().out
    assert "unknown (OSError: libcudart.so.12: cannot open shared object file)" in text
    assert torch.__version__ in text


def test_it_runs_where_torch_cannot_be_imported_at_all(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    done = subprocess.run(
        [sys.executable, "-m", "fastmem_pl", "env", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    facts = json.loads(done.stdout)
    assert facts["torch"] == {"problem": "unknown (ImportError: broken)"}
    assert facts["packages"]["torch"] == torch.__version__


def test_devices_and_what_keeps_kernels_off_them(monkeypatch):
    cuda = torch.cuda
    capability = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(cuda, "device_count", lambda: 3)
    monkeypatch.setattr(cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(
        cuda, "get_device_capability", lambda device: capability[getattr(device, "index", device) or 0]
    )
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (2**30, 3 * 2**30))
    found = env.describe()["devices"]
    assert found["cuda:0"] == {
        **{"name": "GPU 0", "capability": "9.0", "GiB": 3.0, "GiB free": 1.0},
        "kernels": "yes" if kernels.obstacle(torch.device("cuda", 0)) is None else "Triton is not installed",
    }
    assert found["cuda:1"]["kernels"] in (
        "compute capability 7.5 is below 8.0",
        "Triton is not installed",
    )
    # One that does not answer costs the others nothing.
    assert found["cuda:2"].startswith("unknown (KeyError")


def test_why_kernels_are_not_used(monkeypatch):
    assert kernels.obstacle(torch.device("cpu")) == "no CUDA device"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels.obstacle(torch.device("cuda")) == "Triton is not installed"


def test_programs_that_hang_or_fail_are_left_out(monkeypatch):
    def hangs(*args, **kwargs):
        raise subprocess.TimeoutExpired(args[0], 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "unknown (TimeoutExpired" in str(env._attempt(lambda: env._output("git")))
    assert isinstance(env.describe()["fastmem"]["version"], str)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=9, stdout="no"))
    assert env._output("nvidia-smi") == ""


def test_a_home_that_is_not_there_is_no_failure(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("fastmem_pl.base.hub.cache_dir", homeless)
    assert env.describe()["cache"] == {
        "problem": "unknown (RuntimeError: Could not determine home directory.)"
    }
