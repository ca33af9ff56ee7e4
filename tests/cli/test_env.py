"""What `fastmem env` says, in plain lines and as JSON, also on installations that are broken."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fastmem_pl import kernels
from fastmem_pl.cli import env, main


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))


def test_lines_and_json_say_the_same(capsys, tmp_path):
    assert main(["env"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for section, content in facts.items():
        assert section.split() in lines
        for name in content:
            assert any(line[: len(name.split())] == name.split() for line in lines)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["system"]["python"].startswith(sys.version.split()[0])
    assert facts["optional packages"].keys() >= {"optuna", "peft", "tensorboard", "wandb", "mlflow"}
    assert facts["cache"]["folder"].endswith("cache (not there yet)")
    assert not (tmp_path / "cache").exists()


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
    assert env._said(path) == shown


def test_it_runs_where_torch_cannot_be_imported_at_all(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken\\nin two')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fastmem_pl", "env", "--json"]
    facts = json.loads(subprocess.check_output(command, env={**os.environ, "PYTHONPATH": path}))
    assert set(facts["torch"].values()) >= {"unknown (ImportError: broken in two)"}
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
    assert found["cuda:0"].startswith("GPU 0, capability 9.0, 3.0 GiB, 1.0 GiB free, Triton kernels: ")
    assert re.search(r"not used \(compute capability 7\.5 is below 8\.0|Triton is not", found["cuda:1"])
    # One that does not answer costs the others nothing.
    assert found["cuda:2"].startswith("unknown (KeyError")


def test_why_kernels_are_not_used(monkeypatch):
    assert kernels.obstacle(torch.device("cpu")) == "no CUDA device"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels.obstacle(torch.device("cuda")) == "Triton is not installed"


def test_what_hangs_or_is_missing_is_left_out(monkeypatch):
    def hangs(*args, **kwargs):
        raise subprocess.TimeoutExpired(args[0], 1)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(subprocess, "run", hangs)
    monkeypatch.setattr("fastmem_pl.base.hub.cache_dir", homeless)
    found = env.describe()
    assert "fastmem-pl" in found["fastmem"]
    assert found["cache"]["folder"] == "unknown (RuntimeError: Could not determine home directory.)"
