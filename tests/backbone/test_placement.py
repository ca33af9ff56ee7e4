"""One model over several devices: what goes where, and what crosses. On a GPU: tests/test_cuda.py."""

from collections import Counter

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import recursively_apply
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer
from decodes import PROMPTS, token_ids

from fastmem_pl import Backbone, FastMemError, Memorizer
from fastmem_pl.backbone import find_anatomy, placement
from fastmem_pl.backbone.cache import FixedCache
from fastmem_pl.backbone.placement import Placement, device_plan, parts_of
from fastmem_pl.backbone.quantization import stored_size
from fastmem_pl.decoding import DECODERS
from fastmem_pl.memory import MemorizationSettings, footprint_of

FLOAT = (torch.float32, torch.float32)
CPU, LAST = torch.device("cpu"), torch.device("cuda", 1)
FIRST = torch.device("cuda", 0)


def empty(family="llama", **overrides):
    with torch.device("meta"):
        return make_model(family, **overrides)


def places(found, name):
    """Devices of the blocks, in order."""
    blocks = [(int(key.rsplit(".", 1)[1]), device) for key, device in found.items() if name in key]
    return [device for _, device in sorted(blocks)]


@pytest.fixture
def cards(monkeypatch):
    """Pretend that there are GPUs with so much memory free, and batches that take ``room["tail"]``."""

    def pretend(*free):
        devices = [torch.device("cuda", i) for i in range(len(free))]
        monkeypatch.setattr(placement, "_devices", lambda device: devices)
        monkeypatch.setattr(placement, "space_for_weights", lambda device: free[device.index])
        monkeypatch.setattr(placement.Reserve, "of", lambda *_: placement.Reserve(room["tail"], 0, 0))

    room = {"tail": 0}
    pretend.room = room
    return pretend


class TestPlan:
    @pytest.fixture
    def model(self):
        return empty(num_hidden_layers=8)

    @pytest.fixture
    def sizes(self, model):
        """Bytes of a block, of the head (and so of the embeddings), and of all."""
        parts = parts_of(model, find_anatomy(model), 1)
        by_name = {part.name: part.size for part in parts}
        return by_name["model.layers.0"], by_name["lm_head"], sum(by_name.values())

    def test_a_model_that_fits_one_device_stays_together(self, model, sizes, cards):
        cards(2 * sizes[2], 2 * sizes[2])
        assert set(device_plan("auto", model, 1, FLOAT, LAST).values()) == {LAST}

    def test_the_tail_is_together_on_the_last_device(self, model, sizes, cards):
        cards(0.75 * sizes[2], 0.75 * sizes[2])
        found = device_plan("auto", model, 2, FLOAT, LAST)
        blocks = places(found, "layers.")
        assert blocks == sorted(blocks, key=lambda device: device.index)
        assert {found["model.norm"], found["lm_head"], *blocks[-2:]} == {LAST}
        assert found["model.embed_tokens"] == found["model.rotary_emb"] == blocks[0] == FIRST
        assert Counter(blocks) == {FIRST: 4, LAST: 4}

    def test_room_for_the_batch_moves_blocks_down(self, model, sizes, cards):
        cards.room["tail"] = 2 * sizes[0]
        cards(0.75 * sizes[2], 0.75 * sizes[2])
        assert Counter(places(device_plan("auto", model, 1, FLOAT, LAST), "layers.")) == {FIRST: 5, LAST: 3}

    def test_policies(self, model, sizes, cards):
        cards(*[0.75 * sizes[2]] * 3)
        third = torch.device("cuda", 2)
        sequential = Counter(places(device_plan("sequential", model, 1, FLOAT, third), "layers."))
        assert sequential[FIRST] > 4
        assert torch.device("cuda", 1) not in sequential
        assert Counter(places(device_plan("balanced", model, 1, FLOAT, third), "layers."))[LAST] in (2, 3)

    def test_no_room_is_said_with_the_sizes(self, model, sizes, cards):
        cards(0.4 * sizes[2], 0.4 * sizes[2])
        with pytest.raises(FastMemError, match=r"no room for the model, 0\.0 GiB .* cuda:1 \(") as error:
            device_plan("auto", model, 1, FLOAT, LAST)
        assert "\n" not in str(error.value)

    def test_quantized_blocks_are_counted_as_they_are_stored(self, model, sizes, cards):
        cards(0.3 * sizes[2], 0.3 * sizes[2])
        found = device_plan("auto", model, 1, FLOAT, LAST, stored=stored_size("bnb-4bit", None))
        assert set(found.values()) == {FIRST, LAST}

    def test_tied_embeddings_are_with_the_head(self, sizes, cards):
        model = empty(num_hidden_layers=8, tie_word_embeddings=True)
        cards(0.75 * sizes[2], 0.75 * sizes[2])
        found = device_plan("auto", model, 1, FLOAT, LAST)
        assert found["model.embed_tokens"] == found["lm_head"] == LAST
        assert found["model.layers.0"] == FIRST

    @pytest.mark.parametrize("tied", [False, True])
    def test_position_embeddings_are_with_the_others(self, cards, tied):
        model = empty("gpt2", tie_word_embeddings=tied)
        cards(10**9, 10**9)
        found = device_plan("balanced", model, 1, FLOAT, LAST)
        assert found["transformer.wpe"] == found["transformer.wte"] == (LAST if tied else FIRST)
        assert found["transformer.ln_f"] == found["lm_head"] == LAST

    @pytest.mark.parametrize("family", FAMILY_CONFIGS)
    def test_every_parameter_has_a_device(self, family, cards):
        model = empty(family)
        cards(10**9, 10**9)
        found = device_plan("balanced", model, 1, FLOAT, LAST)
        for name, _ in model.named_parameters():
            assert sum(name == part or name.startswith(f"{part}.") for part in found) == 1, name

    def test_room_is_that_of_a_batch(self, model):
        room = placement.Reserve.of(model, find_anatomy(model), 1, FLOAT, CPU, 8, 1024)
        footprint = footprint_of(Backbone(make_model(), make_tokenizer()), MemorizationSettings())
        assert room.tail == pytest.approx(footprint.cost(8, 1024), rel=0.05)
        mixed, pure = (
            placement.Reserve.of(model, find_anatomy(model), 1, (weights, torch.bfloat16), CPU, 8, 1024)
            for weights in (torch.float32, torch.bfloat16)
        )
        # Copies of the trained FFN and the head in the type of the products.
        assert mixed.tail - pure.tail == 2 * (3 * 32 * 64 + 259 * 32)


class TestMapping:
    @pytest.fixture(autouse=True)
    def two_cards(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def test_longest_name_counts(self):
        mapping = {"": "cuda:0", "model.layers.0": "cpu", "model.layers.1": 1}
        found = device_plan(mapping, empty(), 1, FLOAT, FIRST)
        assert places(found, "layers.") == [CPU, LAST, FIRST]
        assert found["lm_head"] == found["model.embed_tokens"] == FIRST

    def test_what_is_beside_the_embeddings_goes_with_them(self):
        mapping = {"": 1, "model.embed_tokens": 0, "model.layers.0": "cpu"}
        found = device_plan(mapping, empty(), 1, FLOAT, FIRST)
        assert found["model.embed_tokens"] == found["model.rotary_emb"] == FIRST
        assert found["model.norm"] == LAST

    @pytest.mark.parametrize(("tied", "place"), [(False, FIRST), (True, LAST)])
    def test_tied_embeddings_go_with_the_head_whatever_it_says(self, tied, place):
        mapping = {"": 0, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
        found = device_plan(mapping, empty(tie_word_embeddings=tied), 1, FLOAT, FIRST)
        assert found["model.embed_tokens"] == place

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ({"": 0, "model.layers.1": "disk"}, "'disk' is unknown; allowed: cpu, cuda:0, cuda:1"),
            ({"": 0, "model.layers.1": "meta"}, "'meta' is unknown"),
            ({"": "cuda:2"}, "'cuda:2' is unknown; .* did you mean 'cuda:[01]'"),
            ({"": 0, "model.layer.1": 1}, r"'model\.layer\.1' is no module .* mean 'model\.layers\.1'"),
            ({"": 0, "model.layers.1.mlp": 1}, "a part of a block"),
            ({"model": 0}, "'lm_head' has no device"),
            ("atuo", r"'atuo' is unknown.* did you mean 'auto'"),
        ],
    )
    def test_others_are_refused_in_one_line(self, mapping, message):
        with pytest.raises(FastMemError, match=message) as error:
            device_plan(mapping, empty(), 1, FLOAT, FIRST)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "cpu"}])
def test_one_device_is_the_model_as_ever(tiny_folder, device_map):
    backbone = Backbone.load(str(tiny_folder), device="cpu", device_map=device_map)
    assert not backbone.placement.spread
    assert backbone.fingerprint() == Backbone.load(str(tiny_folder)).fingerprint()


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_hooks_of_accelerate_make_way(crossings, contexts):
    model = make_model(num_hidden_layers=4)
    names = [part.name for part in parts_of(model, find_anatomy(model), 1)]
    dispatch_model(model, dict.fromkeys(names, CPU), force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    backbone = Backbone(model, make_tokenizer())
    left = {"_hf_hook", "_old_forward", "forward"}
    assert not any(left & module.__dict__.keys() for module in model.modules())
    assert "to" not in model.__dict__
    plain = Backbone(make_model(num_hidden_layers=4), make_tokenizer())
    curves = [Memorizer(b, steps=2, learning_rate=1e-3)(contexts[:1]).curves[0] for b in (backbone, plain)]
    assert curves[0].cross_entropy == curves[1].cross_entropy


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("model.layers.1", r"block 1 is on no device \(offloaded\)"),
        ("lm_head", r"final norm with the LM head is on cpu and no device \(offloaded\)"),
    ],
)
def test_offloaded_weights_are_refused(part, message):
    model = make_model()
    model.get_submodule(part).to("meta")
    with pytest.raises(FastMemError, match=message):
        Backbone(model, make_tokenizer())


def test_trained_blocks_are_with_the_head(make_tiny, crossings):
    backbone = make_tiny(num_hidden_layers=4)
    with pytest.raises(FastMemError, match=r"num_layers: 3 needs all of its blocks where the LM head is"):
        backbone.tail(3)


@pytest.fixture
def crossings(monkeypatch):
    """Take the blocks of models that are made now for spread over three devices; counts what crosses.

    What is sent to another device is copied, as if it were.
    """
    seen = Counter()

    def of(model, anatomy):
        count = len(anatomy.blocks)
        return Placement(FIRST, (FIRST, *[LAST] * (count - 1 - tail_blocks), *[CPU] * tail_blocks), CPU)

    def send(value, device, skip_keys=None):
        seen[device] += 1
        return recursively_apply(torch.clone, value)

    tail_blocks = 2
    monkeypatch.setattr(Placement, "of", of)
    monkeypatch.setattr(placement, "send_to_device", send)
    return seen


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "olmo2"])
def test_a_spread_model_computes_the_same(make_tiny, crossings, contexts, family):
    backbone = make_tiny(family, num_hidden_layers=4)
    assert backbone.placement.spread
    assert not backbone.recordable
    results = []
    for spread in (True, False):
        if not spread:
            for block in (*backbone.anatomy.blocks, backbone.anatomy.body, backbone.model):
                block._forward_pre_hooks.clear()
                block._forward_hooks.clear()
            backbone._trunks.clear()
        found = []
        for num_layers in (1, 2):
            memory = Memorizer(backbone, num_layers=num_layers, steps=3, learning_rate=1e-3)(contexts[:2])
            found.append([curve.cross_entropy for curve in memory.curves])
            for decoder in DECODERS:
                found.append(token_ids(backbone, decoder, memory, PROMPTS[:2], max_new_tokens=6))
        results.append(found)
        if spread:
            assert crossings[FIRST]
            assert crossings[LAST]
            crossings.clear()
    assert results[0] == results[1]
    assert not crossings


def test_copies_of_a_position_follow():
    position = torch.tensor([3])
    cache = FixedCache.continuing(Backbone(make_model(), make_tokenizer()).new_cache(), 8, position, 3)
    elsewhere = torch.zeros(1, dtype=torch.long)
    cache._elsewhere[LAST] = elsewhere
    position += 1
    cache.move()
    assert elsewhere.item() == 4
    assert cache._position_on(LAST) is elsewhere
    assert cache._position_on(CPU) is position


def test_other_devices_bound_the_batch(tiny, monkeypatch):
    footprint = footprint_of(tiny, MemorizationSettings())
    assert footprint.elsewhere == ()
    monkeypatch.setattr(tiny, "placement", Placement(FIRST, (FIRST, LAST, CPU), CPU))
    spread = footprint_of(tiny, MemorizationSettings())
    assert spread.per_token < footprint.per_token
    (device, first), (_, last) = spread.elsewhere
    assert (device, first) == (FIRST, last)
    monkeypatch.setattr("fastmem_pl.backbone.footprint.usable_bytes", lambda device: 7 * 100 * first)
    assert spread.samples_in(1 << 50, 100) == 7
    assert spread.samples_in(spread.cost(3, 100), 100) == 3
