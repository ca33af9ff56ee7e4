"""Two processes that share a model find what one process finds that has all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model
from memories import save
from tensor_parallel import SHARDS_ELSEWHERE, results

from fastmem_pl import Backbone, FastMemError
from fastmem_pl.backbone import sharding

# Of those in conftest.py, all that transformers has a plan for; and one with tied embeddings.
FAMILIES = [*(family for family in FAMILY_CONFIGS if family != "gpt2"), "tied"]
PROGRAM = Path(__file__).parents[1] / "tensor_parallel.py"


def run_two(folder, kind, environment):
    """What two processes found that share the models, and what one did that has all of them."""
    for name in FAMILY_CONFIGS:
        save(make_model(name), folder / name)
    save(make_model(tie_word_embeddings=True), folder / "tied")
    save(make_model(num_key_value_heads=1), folder / "one-head")
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(folder), kind, *FAMILIES],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        for rank in (0, 1)
    ]
    try:
        alone = {name: results(folder, name, None) for name in FAMILIES}
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if processes[0].returncode == SHARDS_ELSEWHERE:
        pytest.skip("transformers would shard on the accelerator")
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-2000:]
    return [json.loads(text.strip().splitlines()[-1]) for text, _ in outputs] + [alone]


@pytest.fixture(scope="module")
def found(tmp_path_factory, one_thread):
    return run_two(tmp_path_factory.mktemp("shared-models"), "cpu", {"CUDA_VISIBLE_DEVICES": ""})


def assert_same(found, family):
    first, second, alone = (results[family] for results in found)
    assert first == second
    for name, values in alone.items():
        if name.startswith("losses"):
            assert torch.allclose(torch.tensor(first[name]), torch.tensor(values), rtol=1e-5, atol=1e-5)
        elif name.startswith("norms"):
            assert torch.allclose(torch.tensor(first[name]), torch.tensor(values), rtol=1e-3)
        elif name == "kv bytes":
            assert first[name] <= values
        else:
            assert first[name] == values, name


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_are_one(found, family):
    assert_same(found, family)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_one_cpu(tmp_path, one_thread):
    found = run_two(tmp_path, "cuda", {})
    for family in FAMILIES:
        assert_same(found, family)


def test_heads_that_are_shared_take_less_memory(found):
    """Key and value heads of Llama are, those of Phi-3, whose projection is fused, are not."""
    first, _, alone = found
    # Two of three blocks' caches, of two heads of 8 float32 numbers, in two copies of keys and values.
    assert alone["llama"]["kv bytes"] - first["llama"]["kv bytes"] == 3 * 2 * 2 * 1 * 8 * 4
    assert alone["phi3"]["kv bytes"] == first["phi3"]["kv bytes"]


def test_what_cannot_be_shared_is_refused_in_one_line(found):
    refused = found[0]["refused"]
    assert "no plan to shard GPT2LMHeadModel; allowed: --model.backbone.device_map auto" in refused["gpt2"]
    assert "2 processes cannot share the 1 key and value heads" in refused["one-head"]
    # Loaded for one trained layer.
    assert "model.memorize.num_layers: 2" in refused["llama"]
    assert not any("\n" in message for message in refused.values())


def test_processes_have_to_be_there(tiny_folder):
    for options, message in (
        ({"tp_plan": "auto"}, "torchrun --nproc-per-node N"),
        ({"tp_plan": "colwise"}, r"model.backbone.tp_plan: 'colwise' is unknown; allowed: auto"),
        ({"tp_plan": "auto", "device_map": "auto"}, "does not go with device_map"),
    ):
        with pytest.raises(FastMemError, match=message):
            Backbone.load(str(tiny_folder), **options)


def test_a_trainer_on_another_kind_of_device_is_refused(monkeypatch):
    monkeypatch.setattr(sharding.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sharding.distributed, "get_world_size", lambda: 2)
    here = torch._C._get_accelerator().type
    other = torch.device("cuda" if here == "cpu" else "cpu")
    with pytest.raises(FastMemError, match=r"--trainer\.accelerator"):
        sharding.check_processes("auto", other)
