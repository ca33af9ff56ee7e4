"""Every decoder against its formula on whole models, for every family; draws, stops and streaming."""

import copy
import math

import pytest
import torch
from conftest import FAMILY_CONFIGS, assert_untouched, snapshot

from fastmem_pl import Memorizer, answer, stream_answer
from fastmem_pl.backbone.families import find_anatomy
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.decoding import DECODERS, Decoding, DecodingSettings, Prefill
from fastmem_pl.decoding.dola import candidate_layers, contrast_layers
from fastmem_pl.decoding.sampling import draw

PROMPTS = ["Who?", "A much longer question about what stands where, and why?", "x"]
BARE = ["Who", "Why and where?", "x y"]
STRONG = {"steps": 5, "learning_rate": 3e-3}
LAYERS = (0, 1, 2)


def decode(backbone, decoder, prompts, bare, memory=None, num_layers=1, keys=None, **settings):
    made = DecodingSettings(**{"max_new_tokens": 8, "dola_layers": LAYERS, **settings})
    early = DECODERS[decoder](made, backbone).early_layers
    prefill = Prefill(backbone, prompts, num_layers, early)
    other = Prefill(backbone, bare, num_layers)
    deltas = memory and memory.deltas
    return Decoding(prefill, decoder, made, deltas, other, keys).run()


def token_ids(answers):
    return [generated.token_ids for generated in answers]


def encode(backbone):
    return ([backbone.chat.prompt(text) for text in texts] for texts in (PROMPTS, BARE))


def merged(backbone, memory, row):
    """A copy of the model whose weights hold one memory."""
    model = copy.deepcopy(backbone.model)
    if memory is None:
        return model
    anatomy, first = find_anatomy(model), backbone.num_blocks - memory.num_layers
    for layer, deltas in enumerate(memory.deltas):
        for name, projection in anatomy.projections(first + layer).items():
            projection.weight.add_(deltas[name][row])
    return model


def expected_tokens(backbone, decoder, memory, row, prompt, bare, tokens):
    """One row, decoded with whole forward passes of whole models and the formulas as published."""
    tuned, base = merged(backbone, memory, row), backbone.model
    head = tuned.get_output_embeddings()
    softcap = backbone.anatomy.softcap
    ids: list[int] = []
    said = list(prompt)
    for _ in range(tokens):
        inputs = torch.tensor([prompt + ids])
        output = tuned(input_ids=inputs, output_hidden_states=True)
        scores = output.logits[0, -1]
        if decoder == "cd":
            scores = 1.5 * scores - 0.5 * base(input_ids=inputs).logits[0, -1]
        elif decoder == "cad":
            scores = 1.5 * scores - 0.5 * base(input_ids=torch.tensor([bare + ids])).logits[0, -1]
        elif decoder == "dola":
            early = torch.stack([head(output.hidden_states[layer][0, -1]) for layer in LAYERS])
            early = early if softcap is None else softcap * torch.tanh(early / softcap)
            scores = dola(scores, early)
            penalized = torch.where(scores < 0, scores * 1.2, scores / 1.2)
            scores[torch.tensor(said)] = penalized[torch.tensor(said)]
        ids.append(int(scores.argmax()))
        said.append(ids[-1])
        if ids[-1] in backbone.stop_ids:
            break
    return ids


def dola(mature, early):
    """The published loop over candidates (one row)."""
    p = mature.softmax(-1)
    divergences = []
    for layer in early:
        q = layer.softmax(-1)
        m = (p + q) / 2
        kl_p = (m * (m.log() - mature.log_softmax(-1))).mean()
        kl_q = (m * (m.log() - layer.log_softmax(-1))).mean()
        divergences.append(0.5 * (kl_p + kl_q))
    chosen = early[torch.stack(divergences).argmax()].log_softmax(-1)
    final = mature.log_softmax(-1)
    keep = final >= final.max() + math.log(0.1)
    return torch.where(keep, final - chosen, -torch.inf)


@pytest.mark.parametrize("decoder", ["greedy", "cd", "cad", "dola"])
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
@torch.no_grad()
def test_formula_on_whole_models(make_tiny, contexts, family, decoder):
    backbone = make_tiny(family)
    memory = Memorizer(backbone, **STRONG)(contexts[:3])
    prompts, bare = encode(backbone)
    before = snapshot(backbone)
    found = token_ids(decode(backbone, decoder, prompts, bare, memory))
    assert_untouched(backbone, before)
    for row, prompt in enumerate(prompts):
        assert found[row] == expected_tokens(backbone, decoder, memory, row, prompt, bare[row], 8)


@pytest.mark.parametrize("decoder", ["cad", "dola"])
@pytest.mark.parametrize("with_memory", [True, False])
@torch.no_grad()
def test_formula_with_two_trained_layers_and_without_memory(tiny, contexts, decoder, with_memory):
    memory = Memorizer(tiny, num_layers=2, **STRONG)(contexts[:3]) if with_memory else None
    prompts, bare = encode(tiny)
    found = token_ids(decode(tiny, decoder, prompts, bare, memory, num_layers=2))
    for row, prompt in enumerate(prompts):
        assert found[row] == expected_tokens(tiny, decoder, memory, row, prompt, bare[row], 8)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 3}])
@pytest.mark.parametrize("decoder", ["greedy", "cd", "cad", "dola"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_batch_is_one_by_one(tiny, contexts, decoder, settings, num_layers):
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts[:3])
    prompts, bare = encode(tiny)
    together = token_ids(decode(tiny, decoder, prompts, bare, memory, num_layers, **settings))
    for row in range(3):
        alone = decode(tiny, decoder, [prompts[row]], [bare[row]], memory.rows([row]), num_layers, **settings)
        assert token_ids(alone) == [together[row]]


@pytest.mark.parametrize("decoder", ["cd", "cad"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}])
def test_alpha_zero_is_no_contrast(tiny, contexts, decoder, settings):
    memory = Memorizer(tiny, **STRONG)(contexts[:3])
    prompts, bare = encode(tiny)
    plain = token_ids(decode(tiny, "greedy", prompts, bare, memory, **settings))
    assert token_ids(decode(tiny, decoder, prompts, bare, memory, alpha=0.0, **settings)) == plain
    assert token_ids(decode(tiny, decoder, prompts, bare, memory, alpha=2.0, **settings)) != plain


def test_draws_follow_the_distribution():
    scores = torch.tensor([2.0, 0.0, 1.0, -torch.inf]).expand(20_000, 4)
    tokens = draw(scores, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    shares = tokens.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, scores[0].softmax(0), atol=0.015, rtol=0)
    assert shares[3] == 0


def test_draws_depend_on_seed_and_key_alone(tiny):
    prompts, bare = encode(tiny)
    settings = {"temperature": 2.0, "max_new_tokens": 12}
    same = [token_ids(decode(tiny, "greedy", prompts, bare, **settings)) for _ in range(2)]
    assert same[0] == same[1]
    assert token_ids(decode(tiny, "greedy", prompts, bare, seed=1, **settings)) != same[0]
    twice = token_ids(decode(tiny, "greedy", [prompts[0]] * 2, [bare[0]] * 2, keys=[5, 6], **settings))
    assert twice[0] != twice[1]


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(tiny):
    prompts, bare = encode(tiny)
    greedy = token_ids(decode(tiny, "greedy", prompts, bare))
    assert token_ids(decode(tiny, "greedy", prompts, bare, temperature=3.0, top_k=1)) == greedy
    assert token_ids(decode(tiny, "greedy", prompts, bare, temperature=3.0, top_p=1e-6)) == greedy
    assert token_ids(decode(tiny, "greedy", prompts, bare, temperature=3.0)) != greedy


def test_repetition_penalty_is_that_of_transformers(tiny):
    prompts, bare = encode(tiny)
    found = token_ids(decode(tiny, "greedy", prompts, bare, repetition_penalty=1.7, max_new_tokens=12))
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = tiny.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.7,
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    assert found != token_ids(decode(tiny, "greedy", prompts, bare, max_new_tokens=12))


def test_dola_has_its_own_penalty_and_the_published_one_none(tiny):
    prompts, bare = encode(tiny)
    own = token_ids(decode(tiny, "dola", prompts, bare))
    assert own == token_ids(decode(tiny, "dola", prompts, bare, repetition_penalty=1.2))
    none = token_ids(decode(tiny, "dola", prompts, bare, repetition_penalty=1.0))
    published = token_ids(decode(tiny, "dola", prompts, bare, dola_unlimited=True))
    assert [row[:8] for row in published] == none
    assert 100 < max(map(len, published)) <= 399
    with pytest.raises(FastMemError, match="dola as published applies none"):
        decode(tiny, "dola", prompts, bare, dola_unlimited=True, repetition_penalty=1.2)


def test_dola_counts_the_layers_that_it_chose(tiny):
    prompts, bare = encode(tiny)
    for generated in decode(tiny, "dola", prompts, bare, max_new_tokens=12):
        counts = generated.details["dola_layers"]
        assert list(counts) == ["0", "1", "2"]
        assert sum(counts.values()) == len(generated.token_ids)


def test_most_different_layer_is_chosen_by_row():
    mature = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    early = torch.stack([mature, mature.roll(1, 0)])
    early[0, 1], early[1, 1] = early[1, 1].clone(), early[0, 1].clone()
    _, chosen = contrast_layers(mature, early, 0.1)
    assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("wanted", "blocks", "tied", "expected"),
    [
        ("high", 32, False, tuple(range(16, 32, 2))),
        ("high", 30, True, tuple(range(14, 30, 2))),
        ("low", 32, False, tuple(range(0, 16, 2))),
        ("low", 30, True, tuple(range(2, 14, 2))),
        ("auto", 80, False, tuple(range(60, 80, 2))),
        ("auto", 3, True, (0, 2)),
        ("low", 1, True, (0,)),
        ((0.25, 0.5, 7), 8, False, (2, 4, 7)),
    ],
)
def test_candidate_layers(wanted, blocks, tied, expected):
    assert candidate_layers(wanted, blocks, tied) == expected


@pytest.mark.parametrize("wanted", [(8,), (-1,), (2.5,), (), (float("nan"),), (float("inf"),)])
def test_layers_that_are_none(wanted):
    with pytest.raises(FastMemError, match=r"model\.dola_layers: .*allowed: "):
        candidate_layers(wanted, 8, False)


def test_stop_texts_end_an_answer_and_are_cut(tiny):
    prompts, bare = encode(tiny)
    free = decode(tiny, "greedy", prompts, bare, max_new_tokens=12)
    stop = free[1].text[3:5]
    assert len(stop) == 2
    stopped = decode(tiny, "greedy", prompts, bare, max_new_tokens=12, stop=(stop, "not there at all"))
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
    assert len(stopped[1].token_ids) < len(free[1].token_ids)


@pytest.fixture
def saying(tiny, monkeypatch):
    """Make the tiny model say given tokens to one prompt."""

    def make(text, **settings):
        chosen = iter([*tiny.tokenizer(text).input_ids, tiny.stop_ids[0]])
        monkeypatch.setattr("fastmem_pl.decoding.state.Views.logits", lambda self, *inputs: None)
        monkeypatch.setattr("fastmem_pl.decoding.Greedy.scores", lambda self, logits: logits)
        monkeypatch.setattr(
            "fastmem_pl.decoding.loop.TokenChooser.__call__", lambda *args: torch.tensor([next(chosen)])
        )
        return Decoding(Prefill(tiny, [[1]]), "greedy", DecodingSettings(**settings))

    return make


def test_a_stop_text_may_be_a_control_token(saying):
    (free,) = saying("so <|im_start|> on").run()
    assert free.text == "so  on"
    (stopped,) = saying("so <|im_start|> on", stop=("<|im_start|>", "zzz")).run()
    assert stopped.text == "so "
    assert len(stopped.token_ids) == 4


@pytest.mark.parametrize("stop", ["aé", "é", "é and", "d m"])
def test_a_stop_text_of_many_bytes_does_not_leak_its_start(saying, stop):
    text = "xyaé and more"
    assert "".join(saying(text, stop=(stop,)).texts()) == text.split(stop)[0]
    assert saying(text, stop=(stop,)).run()[0].text == text.split(stop)[0]


@pytest.mark.parametrize("settings", [{}, {"stop": ("e",)}, {"temperature": 1.0, "seed": 2}])
@pytest.mark.parametrize("decoder", ["greedy", "cd", "cad", "dola"])
def test_streamed_pieces_make_the_answer(demo_or_tiny, contexts, decoder, settings):
    backbone = demo_or_tiny
    memory = Memorizer(backbone, **STRONG)(contexts[0])
    settings = {"max_new_tokens": 12, "answer_prefix": "So ", **settings}
    pieces = list(stream_answer(backbone, "Why? é", contexts[0], memory, decoder, **settings))
    assert ["".join(pieces)] == answer(backbone, "Why? é", contexts[0], memory, decoder, **settings)
    if not settings.get("stop"):
        assert len(pieces) > 2


@pytest.fixture(params=["tiny", pytest.param("demo", marks=pytest.mark.demo)])
def demo_or_tiny(request):
    return request.getfixturevalue(request.param)


def test_what_a_decoder_lacks_is_said(tiny):
    with pytest.raises(FastMemError, match="'cad' contrasts with and without context; give one"):
        answer(tiny, "a", decoder="cad")
    with pytest.raises(FastMemError, match=r"answer: .*unexpected keyword argument 'temprature'"):
        answer(tiny, "a", temprature=1.0)
    prefill = Prefill(tiny, [[1, 2]])
    with pytest.raises(FastMemError, match="'cad' contrasts with the prompt without its context"):
        Decoding(prefill, "cad", DecodingSettings())
    with pytest.raises(FastMemError, match=r"'dola' looks at layers \[0, 2\]; give them to the prefill"):
        Decoding(prefill, "dola", DecodingSettings(dola_layers="high"))
    with pytest.raises(FastMemError, match="only a single answer can be streamed, not 2"):
        next(Decoding(Prefill(tiny, [[1], [2]]), "greedy", DecodingSettings()).texts())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"model\.temperature: -1.0 is out of range; allowed: 0 or above"),
        ({"top_p": 0.0}, r"model\.top_p: 0.0 is out of range; allowed: above 0, at most 1"),
        ({"top_k": -2}, r"model\.top_k: -2 is out of range"),
        ({"repetition_penalty": 0.0}, r"model\.repetition_penalty: 0.0 is out of range"),
        ({"relative_top": 2.0}, r"model\.relative_top: 2.0 is out of range"),
        ({"stop": ("",)}, r"model\.stop: \('',\) is out of range; allowed: texts, none empty"),
        ({"stop": "abc"}, r"model\.stop: 'abc' is out of range"),
        ({"dola_layers": "hihg"}, r"model\.dola_layers: 'hihg' is unknown; .* did you mean 'high'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(FastMemError, match=message):
        DecodingSettings(**settings)
