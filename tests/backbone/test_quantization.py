"""Quantized trunks: what is packed and what stays plain, for every way that runs on a CPU."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer
from memories import plain_fit, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastmem_pl import Backbone, FastMemError, Memorizer, answer
from fastmem_pl.backbone import quantization
from fastmem_pl.backbone.anatomy import is_quantized
from fastmem_pl.export import to_checkpoint, to_lora

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["bnb-4bit", "bnb-8bit", "torchao-int8"]
PACKAGES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}
# Of the weights: 4 bits in blocks of 64, 8 bits a row.
ERRORS = {"bnb-4bit": 0.15, "bnb-8bit": 0.02, "torchao-int8": 0.02}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Save a tiny model of any family as a user's own folder."""

    @cache
    def make(family: str = "llama", **overrides):
        # bnb-4bit has blocks of 64 weights.
        overrides = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2} | overrides
        return save(make_model(family, **overrides), tmp_path_factory.mktemp(f"{family}-model"))

    return make


def load(folder: str, kind: str | None = None, precision: str = "32-true", **options) -> Backbone:
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
    return Backbone.load(folder, precision, quantization=kind, **options)


def stored(backbone: Backbone) -> list[torch.Tensor]:
    return [t.clone() for p in backbone.model.state_dict().values() for t in quantization.stored_tensors(p)]


def packed_names(backbone: Backbone) -> set[str]:
    modules = backbone.model.named_modules()
    return {name for name, m in modules if hasattr(m, "weight") and is_quantized(m.weight)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_memorizing_lowers_the_loss(folder, contexts, family, kind, precision):
    if (family, kind) == ("gpt2", "torchao-int8"):
        pytest.skip("GPT-2 has no linear layers for torchao")
    backbone = load(folder(family), kind, precision)
    before = stored(backbone)
    fingerprint = backbone.fingerprint()
    curves = Memorizer(backbone, steps=4, learning_rate=1e-3)(contexts).curves
    assert all(c.cross_entropy[-1] < c.cross_entropy[0] for c in curves)
    assert all(torch.equal(one, other) for one, other in zip(before, stored(backbone), strict=True))
    del backbone._fingerprint
    assert backbone.fingerprint() == fingerprint


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_losses_are_those_of_edited_weights(folder, contexts, family, kind, num_layers):
    backbone = load(folder(family), kind, num_layers=num_layers)
    memorizer = Memorizer(backbone, steps=4, learning_rate=1e-3, num_layers=num_layers)
    found = memorizer([contexts[1]]).curves[0].cross_entropy
    settings = (4, 1e-3, memorizer.settings.kl_coeff, num_layers)
    curve = plain_fit(backbone, [[memorizer.encode(contexts[1])]], *settings)[0]
    # LLM.int8() rounds activations: a last bit of difference may be a whole step there.
    assert found == pytest.approx(curve[:, 0].tolist(), rel=5e-3 if kind == "bnb-8bit" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_a_batch_and_attached(folder, contexts, kind):
    backbone = load(folder(), kind)
    memory = Memorizer(backbone, steps=4, learning_rate=1e-3)([contexts[0]])
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    tail, inputs = backbone.tail(), backbone.run_trunk(1, ids)
    with backbone.numerics():
        expected = tail.raw_logits(tail.hidden(inputs, tail.base(inputs), memory.deltas))
    with torch.no_grad(), memory.attached(backbone):
        found = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 3, 10])
def test_only_the_last_ffns_and_the_head_stay_plain(folder, kind, num_layers):
    # Numbers of one and two digits: layers.1 is no prefix of layers.11.
    backbone = load(folder(num_hidden_layers=12), kind, num_layers=num_layers)
    linear = {name for name, m in backbone.model.named_modules() if isinstance(m, nn.Linear)}
    plain = {name for name in linear if name == "lm_head"}
    for layer in range(12 - num_layers, 12):
        plain |= {f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert packed_names(backbone) == linear - plain
    with pytest.raises(FastMemError, match=r"is quantized .*; load the model with .* num_layers"):
        backbone.tail(num_layers + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_near_the_model_and_plain_ones_are_its_own(folder, kind):
    whole, backbone = load(folder()), load(folder(), kind)
    for layer in range(2):
        for (_, one), (_, other) in zip(
            whole.anatomy.ffn_modules(layer), backbone.anatomy.ffn_modules(layer), strict=True
        ):
            found = quantization._dequantized(other).float()
            error = ((found - one.weight).norm() / one.weight.norm()).item()
            assert 0 < error < ERRORS[kind]
    for name, projection in whole.anatomy.projections(2).items():
        assert torch.equal(backbone.anatomy.projections(2)[name].weight, projection.weight)
    assert torch.equal(whole.anatomy.head.weight, backbone.anatomy.head.weight)


def test_what_tells_quantizations_apart(folder):
    before = torch.get_float32_matmul_precision()
    first, second = ({kind: load(folder(), kind) for kind in (None, *KINDS)} for _ in range(2))
    found = {kind: backbone.fingerprint() for kind, backbone in first.items()}
    assert len(set(found.values())) == 4
    assert found == {kind: backbone.fingerprint() for kind, backbone in second.items()}
    # Steps that wait for the device are not recorded.
    assert [k for k, b in first.items() if quantization.waits_for_device(b.model)] == ["bnb-8bit"]
    assert torch.get_float32_matmul_precision() == before


def test_a_memory_of_another_quantization_is_refused(folder, contexts):
    memory = Memorizer(load(folder()), steps=1)([contexts[0]])
    other = load(folder(), "bnb-4bit")
    with pytest.raises(FastMemError, match=r"another model: .* in the quantization it had"):
        with memory.attached(other):
            pass


@pytest.mark.parametrize(
    ("kind", "precision", "message"),
    [
        (
            "bnb-4bits",
            "32-true",
            r"model\.backbone\.quantization: 'bnb-4bits' is unknown; .* did you mean 'bnb-4bit'",
        ),
        ("torchao-int4", "bf16-true", "needs a CUDA GPU and precision bf16-true, not cpu and bf16-true"),
        ("bnb-4bit", "bf16-mixed", r"trainer\.precision: bf16-mixed .* allowed: 32-true, bf16-true"),
        ("torchao-int8", "bf16-mixed", r"trainer\.precision: bf16-mixed"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(monkeypatch, kind, precision, message):
    monkeypatch.setattr("fastmem_pl.backbone.loading._resolve", lambda *_, **__: pytest.fail("loaded"))
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
    with pytest.raises(FastMemError, match=message) as caught:
        Backbone.load("/no/such/folder", precision, quantization=kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "extra"), [("bnb-8bit", "bnb"), ("torchao-int8", "torchao")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, kind, extra):
    monkeypatch.setitem(sys.modules, quantization.KINDS[kind].package, None)
    with pytest.raises(FastMemError, match=rf"pip install 'fastmem-pl\[{extra}\]'"):
        Backbone.load("demo", quantization=kind)


def test_a_broken_package_is_one_line(monkeypatch):
    def fail(name):
        raise OSError("libcudart.so:\nno such file")

    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(quantization.importlib, "import_module", fail)
    with pytest.raises(FastMemError, match=r"needs bitsandbytes: libcudart\.so: no such file; run"):
        Backbone.load("demo", quantization="bnb-4bit")


def test_a_model_without_linear_layers_is_refused(folder):
    with pytest.raises(FastMemError, match=r"GPT2LMHeadModel has no linear layers .* bnb-4bit, bnb-8bit"):
        load(folder("gpt2"), "torchao-int8")


@pytest.fixture(params=KINDS)
def quantized_folder(request, folder, tmp_path):
    """A checkpoint that is quantized throughout, its last network and head as well."""
    kind = quantization.KINDS[request.param]
    pytest.importorskip(kind.package)
    model = AutoModelForCausalLM.from_pretrained(
        folder(),
        dtype=torch.float32,
        quantization_config=kind.config(torch.float32, ["none"]),
        device_map="cpu",
    )
    assert is_quantized(model.lm_head.weight)
    path = save(model, tmp_path)
    quantization.hold_still(model, torch.float32)
    return request.param, path, model


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_quantized_checkpoints_get_plain_last_weights(quantized_folder, contexts, precision, num_layers):
    kind, path, model = quantized_folder
    backbone = load(path, None, precision, num_layers=num_layers)
    assert backbone.fingerprint() == load(path, None, precision, num_layers=num_layers).fingerprint()
    assert len(packed_names(backbone)) == 3 * 7 + 1 - 3 * num_layers - 1
    ids = torch.arange(20)[None]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        found = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    # LLM.int8() rounds the activations of the layers that are plain here.
    exact = precision == "32-true" and kind != "bnb-8bit"
    assert ((found - expected).norm() / expected.norm()).item() < (1e-4 if exact else 0.1)
    curves = Memorizer(backbone, steps=4, learning_rate=1e-3, num_layers=num_layers)(contexts).curves
    assert all(c.cross_entropy[-1] < c.cross_entropy[0] for c in curves)


def test_what_a_quantized_checkpoint_cannot_be_is_refused(quantized_folder):
    _, path, model = quantized_folder
    with pytest.raises(FastMemError, match=r"is quantized already, with .*; leave it out"):
        load(path, "bnb-4bit")
    with pytest.raises(FastMemError, match=r"trainer\.precision: bf16-mixed"):
        load(path, None, "bf16-mixed")
    with pytest.raises(FastMemError, match=r"is quantized .*; load the model with Backbone\.load"):
        Backbone(model, make_tokenizer())


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_other_quantized_checkpoints_are_refused(folder, tmp_path, method):
    config = json.loads(Path(folder(), "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(FastMemError, match=rf"is quantized with {method}, so .* allowed: checkpoints of"):
        load(str(tmp_path))


def test_no_checkpoint_is_written_of_packed_weights(folder, contexts, tmp_path):
    backbone = load(folder(), "bnb-4bit")
    memory = Memorizer(backbone, steps=2, learning_rate=1e-3)([contexts[0]])
    with pytest.raises(FastMemError, match=r"are quantized .*; use --to lora"):
        to_checkpoint(memory, backbone, tmp_path / "merged", context=contexts[0])
    assert not (tmp_path / "merged").exists()
    pytest.importorskip("peft")
    to_lora(memory, backbone, tmp_path / "adapter", rank=2, context=contexts[0])


def test_rows_that_four_bits_would_be_read_wrongly_of_stay_plain(folder, tmp_path):
    narrow = folder(hidden_size=32, intermediate_size=128)
    found = packed_names(load(narrow, "bnb-4bit"))
    assert found == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    config = quantization.KINDS["bnb-4bit"].config(torch.float32, ["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.float32, quantization_config=config)
    with pytest.raises(FastMemError, match=r"has rows of 32 weights, .* blocks of 64 on a CPU; allowed"):
        load(save(model, tmp_path))


def test_blocks_that_gradients_run_through_are_plain_where_products_have_none(folder):
    pytest.importorskip("torchao")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder(hidden_size=128)))
    options = quantization.loading_options("torchao-int4", model, torch.bfloat16, 2)
    plain = options["quantization_config"].modules_to_not_convert
    attention = {f"model.layers.2.self_attn.{part}_proj" for part in "qkvo"}
    assert attention < set(plain)
    assert not any(name.startswith("model.layers.1.self_attn") for name in plain)


def test_a_checkpoint_whose_kernels_are_missing_is_one_line(quantized_folder, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no kernel\nfor this device")

    _, path, _ = quantized_folder
    monkeypatch.setattr(quantization, "_dequantized", fail)
    with pytest.raises(FastMemError, match=r"does not run here: no kernel for this device"):
        load(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "torchao-int4"])
def test_on_a_gpu(folder, contexts, kind, num_layers):
    path = folder(hidden_size=256, intermediate_size=512)
    options = {"precision": "bf16-true", "num_layers": num_layers}
    backbone = load(path, kind, device="cuda", **options)
    assert {parameter.device.type for parameter in backbone.model.parameters()} == {"cuda"}
    assert backbone.fingerprint() == load(path, kind, device="cuda", **options).fingerprint()
    assert backbone.recordable == (kind != "bnb-8bit")
    memorizer = Memorizer(backbone, steps=4, learning_rate=1e-3, num_layers=num_layers)
    memory = memorizer(contexts)
    assert all(c.cross_entropy[-1] < c.cross_entropy[0] for c in memory.curves)
    questions = ["Where is it?"] * len(contexts)
    first, second = (answer(backbone, questions, contexts, memory, max_new_tokens=12) for _ in range(2))
    assert first == second
    if kind in KINDS:
        on_cpu = load(path, kind, **options)
        same = all(torch.equal(a.cpu(), b) for a, b in zip(stored(backbone), stored(on_cpu), strict=True))
        # Rounding may differ in last bits; where it does not, memories fit both.
        assert not same or backbone.fingerprint() == on_cpu.fingerprint()


@pytest.mark.demo
def test_demo_in_four_bits(demo, contexts):
    pytest.importorskip("bitsandbytes")
    backbone = Backbone.load("demo", quantization="bnb-4bit")
    assert backbone.fingerprint() != demo.fingerprint()
    found, exact = (
        Memorizer(b, steps=4, learning_rate=1e-5)([contexts[3]]).curves[0] for b in (backbone, demo)
    )
    assert found.cross_entropy[0] == pytest.approx(exact.cross_entropy[0], rel=0.15)
    fall = exact.cross_entropy[0] - exact.cross_entropy[-1]
    assert found.cross_entropy[0] - found.cross_entropy[-1] == pytest.approx(fall, rel=0.3)
