"""Loading from folders and GGUF files; what cannot be loaded is named in one line."""

import contextlib
import json
import shutil
import struct

import pytest
import torch
from conftest import make_tokenizer, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from fastmem_pl import Backbone, BackboneSettings, FastMemError, Memorizer, answer
from fastmem_pl.backbone import loading
from fastmem_pl.base.hub import converted_folder


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16-true", torch.bfloat16)])
def test_folder(tiny_folder, tiny, precision, dtype):
    backbone = Backbone.load(str(tiny_folder), precision)
    assert backbone.fingerprint() == tiny.fingerprint()
    assert backbone.model.dtype is dtype
    assert backbone.model.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "'/no/such/folder' is neither a folder nor a Hub id"),
        ("./model.gguf", "no such GGUF file: ./model.gguf"),
        ("dem", "'dem' is unknown; allowed: .*a Hub id, .* did you mean 'demo'"),
    ],
)
def test_missing_models(source, message):
    with pytest.raises(FastMemError, match=message):
        Backbone.load(source)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FastMemError, match="cannot load") as refused:
        Backbone.load(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_damaged_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(FastMemError, match=r"cannot load .*m\.gguf"):
        Backbone.load(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").glob("[!.]*"))


@pytest.fixture
def altered(tiny_folder, tmp_path):
    """A copy of the tiny model with other settings in config.json, and what is left of its weights."""

    def copy(alter=dict, **settings):
        folder = shutil.copytree(tiny_folder, tmp_path / "altered")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        weights = alter(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return copy


UP = "model.layers.1.mlp.up_proj.weight"


def without(*names):
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
@pytest.mark.parametrize(
    ("alter", "settings", "message"),
    [
        (without(UP), {}, rf"weights are missing: {UP}; its files are incomplete or config\.json"),
        (without("lm_head.weight"), {}, r"weights are missing: lm_head\.weight;"),
        (dict, {"num_hidden_layers": 12}, r"weights are missing: model\.layers\.10\.input_\S+ and 80 more; "),
        (dict, {"num_hidden_layers": 2}, r"has not: model\.layers\.2\.input_layernorm\.weight and 8 more;"),
        (lambda w: {**w, UP: w[UP][:32]}, {}, rf"shapes .*: {UP} \(32, 32\) for \(64, 32\);"),
        (dict, {"vocab_size": 300}, r"shapes .*: lm_head\.weight \(259, 32\) for \(300, 32\) and 1 more;"),
        (lambda w: {**w, "model.extra": torch.ones(1)}, {}, r"has not: model\.extra;"),
    ],
)
def test_weights_that_do_not_fit_are_named(altered, alter, settings, message, device_map, caplog, capfd):
    source = altered(alter, **settings)
    with pytest.raises(FastMemError, match=message) as refused:
        loading.load_model(BackboneSettings(source, device_map=device_map))
    assert f"cannot load {source!r}" in str(refused.value)
    assert "LOAD REPORT" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("alter", "settings"),
    [
        (without("lm_head.weight"), {"tie_word_embeddings": True}),
        (dict, {"tie_word_embeddings": True}),
        (lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, {}),
        (lambda w: {**w, "model.layers.0.attn.masked_bias": torch.ones(1)}, {}),
    ],
)
def test_tied_weights_and_tables_are_no_fault(altered, alter, settings):
    assert Backbone.load(altered(alter, **settings)).num_blocks == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda _: None,
        lambda found: {**found, "hidden_size": "x"},
        lambda found: {**found, "hidden_size": -32},
        lambda found: {**found, "num_attention_heads": 0},
        lambda found: {**found, "vocab_size": 5},
        lambda found: {**found, "vocab_size": 300},
        lambda found: {**found, "layer_types": 3},
        lambda found: {**found, "quantization_config": 3},
        lambda found: {**found, "num_hidden_layers": 10**9},
    ],
)
def test_a_config_that_no_model_has_is_one_line(tiny_folder, tmp_path, change):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(FastMemError, match=r"^model\.backbone: .*m'"):
        Backbone.load(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", [b"null", b"[]", b"[" * 100_000, bytes(range(256))], ids=["null", "list", "deep", "binary"]
)
def test_files_beside_a_model_that_are_damaged_are_one_line(tiny_folder, tmp_path, name, content):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / name).write_bytes(content)
    # Some of them transformers does without.
    with contextlib.suppress(FastMemError):
        Backbone.load(str(folder))


GGUF = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    "content",
    [b"", GGUF, GGUF + struct.pack("<QQ", 0, 0), GGUF + struct.pack("<QQ", 1 << 40, 1 << 40),
     GGUF + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 50), b"GGUF" + struct.pack("<IQQ", 99, 0, 0)],
)  # fmt: skip
def test_damaged_metadata_of_gguf_is_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(FastMemError, match=r"cannot load .*m\.gguf"):
        Backbone.load(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_a_converted_copy_that_is_cut_short_is_made_again(tmp_path, monkeypatch, tiny_folder):
    made = []

    def convert(file, folder):
        made.append(folder)
        shutil.copytree(tiny_folder, folder)

    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastmem_pl.backbone.loading._convert", convert)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    # What a conversion that was killed leaves.
    left = converted_folder(path).with_name(f"{converted_folder(path).name}.partial")
    left.mkdir(parents=True)
    fingerprints = {Backbone.load(str(path)).fingerprint() for _ in range(2)}
    assert len(made) == 1
    assert not left.exists()
    weights = converted_folder(path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fingerprints.add(Backbone.load(str(path)).fingerprint())
    assert (len(made), len(fingerprints)) == (2, 1)


def test_a_gguf_file_that_lacks_weights_is_named_and_not_kept(tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("FASTMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"x")
    info = {"missing_keys": {UP}, "mismatched_keys": set(), "unexpected_keys": set()}
    read = {"from_pretrained": lambda **options: (tiny.model, info)}
    monkeypatch.setattr("fastmem_pl.backbone.loading.AutoModelForCausalLM", type("Auto", (), read))
    monkeypatch.setattr("transformers.AutoTokenizer", type("Auto", (), read))
    with pytest.raises(FastMemError, match=rf"m\.gguf': weights are missing: {UP};"):
        Backbone.load(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_remote_code_is_off_by_default(tiny_folder, monkeypatch):
    asked = []

    class Auto:
        @staticmethod
        def from_pretrained(*args, trust_remote_code, **kwargs):
            asked.append(trust_remote_code)
            raise OSError("stop here")

    monkeypatch.setattr("transformers.AutoTokenizer", Auto)
    for wanted in (False, True):
        with pytest.raises(FastMemError, match=r"cannot load .*: stop here"):
            loading.load_model(BackboneSettings(str(tiny_folder), trust_remote_code=wanted))
    assert asked == [False, True]


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """A Hub cache of one repository: a branch, a tag, and a model in a subfolder."""
    repository = tmp_path / "hub" / "models--me--tiny"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        seed = 1 if revision == "v1" else 0
        save_model(repository / "snapshots" / commit, seed)
        save_model(repository / "snapshots" / commit / "step-9", seed + 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


@pytest.mark.parametrize(
    ("place", "seed"),
    [
        ({}, 0),
        ({"revision": "v1"}, 1),
        ({"revision": "b" * 40}, 1),
        ({"subfolder": "step-9"}, 2),
        ({"subfolder": "step-9", "revision": "v1"}, 3),
    ],
)
def test_revision_and_subfolder_of_a_repository(hub, make_tiny, place, seed):
    loaded = Backbone.load("me/tiny", **place)
    assert loaded.fingerprint() == make_tiny(seed=seed).fingerprint()
    assert loaded.revision == place.get("revision")


def test_config_model_and_tokenizer_are_of_one_place(hub, monkeypatch):
    asked = []
    for name in ("AutoConfig", "AutoModelForCausalLM"):
        auto = getattr(loading, name)
        monkeypatch.setattr(loading, name, noting(auto, asked))
    monkeypatch.setattr("transformers.AutoTokenizer", noting(AutoTokenizer, asked))
    Backbone.load("me/tiny", revision="v1", subfolder="step-9")
    assert asked == [("AutoTokenizer", "v1", "step-9"), ("AutoConfig", "v1", "step-9"),
                     ("AutoModelForCausalLM", "v1", "step-9")]  # fmt: skip


def noting(auto, asked):
    class Noting:
        @staticmethod
        def from_pretrained(*args, **options):
            asked.append((auto.__name__, options.get("revision"), options.get("subfolder")))
            return auto.from_pretrained(*args, **options)

    return Noting


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            {"revision": "v2"},
            r"'me/tiny' \(revision 'v2'\) is not in the Hub cache, and HF_HUB_OFFLINE forbids",
        ),
        ({"subfolder": "step-8"}, "'me/tiny' is not in the Hub cache, and HF_HUB_OFFLINE forbids"),
    ],
)
def test_places_that_are_not_in_the_cache(hub, place, message):
    with pytest.raises(FastMemError, match=message):
        Backbone.load("me/tiny", **place)


def test_subfolder_of_a_local_folder(tmp_path, make_tiny):
    save_model(tmp_path / "step-9", 2)
    assert Backbone.load(str(tmp_path), subfolder="step-9").fingerprint() == make_tiny(seed=2).fingerprint()
    with pytest.raises(FastMemError, match=r"model\.backbone\.subfolder: there is no folder 'step-8' in '/"):
        Backbone.load(str(tmp_path), subfolder="step-8")


def test_what_is_no_repository_has_no_revision(tiny_folder):
    for source, place in (
        (str(tiny_folder), "revision"),
        ("./m.gguf", "revision"),
        ("./m.gguf", "subfolder"),
    ):
        with pytest.raises(
            FastMemError, match=rf"{place}: '{source}' is no repository of the Hub; leave it out"
        ):
            Backbone.load(source, **{place: "v1"})


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_implementation(tiny_folder, tiny, kind):
    backbone = Backbone.load(str(tiny_folder), attn_implementation=kind)
    assert backbone.model.config._attn_implementation == kind
    assert backbone.fingerprint() == tiny.fingerprint()


def test_attention_implementation_that_there_is_not(tiny_folder):
    with pytest.raises(FastMemError, match=r"cannot load .*: .*quick.*eager") as refused:
        Backbone.load(str(tiny_folder), attn_implementation="quick")
    assert "\n" not in str(refused.value)


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
LANGUAGE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
    },
    **{"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257},
}
TOWERS = {
    "gemma3": {
        "text_config": {**LANGUAGE, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text_config": {
            **LANGUAGE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": TOWER,
    },
    "llama4": {
        "text_config": {**LANGUAGE, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
        "vision_config": {
            **{**VISION, "image_size": 28, "patch_size": 14, "vision_output_dim": 16},
            **{"projector_input_dim": 16, "projector_output_dim": 16},
        },
    },
    "llava": {
        "text_config": {**LANGUAGE, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    },
}


@pytest.mark.parametrize("kind", TOWERS)
def test_vision_language_model_is_used_through_its_language_model(kind, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **TOWERS[kind])).eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    backbone = Backbone.load(str(tmp_path))
    assert backbone.num_blocks == 2
    memory = Memorizer(backbone, learning_rate=3e-3, steps=4)("The tower of Velm is red.")
    curve = memory.curves[0].cross_entropy
    assert curve[-1] < curve[0]
    prompt = backbone.chat.prompt("What is red?")
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    assert answer(backbone, "What is red?", max_new_tokens=6) == [backbone.chat.decode(expected.tolist())]


def test_towers_that_a_language_model_has_not_are_no_fault(altered):
    more = {
        "vision_model.layers.0.weight": torch.ones(1),
        "multi_modal_projector.linear_1.weight": torch.ones(1),
    }
    assert Backbone.load(altered(lambda w: w | more)).num_blocks == 3


@pytest.mark.demo
def test_demo_tokenizer_is_repaired(demo):
    # The GGUF's tokenizer lacks the digit splitter and most control tokens.
    assert demo.tokenizer("1,000").input_ids == [33, 28, 32, 32, 32]
    assert demo.tokenizer("<|endoftext|>").input_ids == [0]
    assert demo.context_length == 8192
    pieces = demo.chat.pieces
    assert pieces.user_header == "<|im_start|>user\n"
    assert pieces.assistant_header == "<|im_start|>assistant\n"


@pytest.mark.demo
def test_second_load_takes_the_converted_copy(demo, monkeypatch):
    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(loading, "_convert", fail)
    assert Backbone.load("demo").fingerprint() == demo.fingerprint()
