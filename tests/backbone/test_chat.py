"""Chat pieces come from the template; data never becomes a control token."""

import pytest
from conftest import CHATML, make_tokenizer
from tokenizers.processors import TemplateProcessing

from fastmem_pl.backbone import ChatEncoder, ChatSettings
from fastmem_pl.backbone.template import derive_pieces
from fastmem_pl.base.errors import FastMemError

# Templates of this project's own with the control tokens and the layout of the models that they are named
# after; the quirks that matter here (injected turns, refused roles, doubled bos) are theirs as well.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: 2023\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set r = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + r + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
_LLAMA3_PIECES = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)
_CHATML_PIECES = (
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>assistant\n",
    "<|im_end|>",
)


def add_bos(tokenizer):
    """Make the tokenizer add a bos by itself, as Llama's does."""
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )


def build(template, special=(), eos="<|im_end|>"):
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "eos_token": eos})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "special", "eos", "pieces"),
    [
        (CHATML, (), "<|im_end|>", _CHATML_PIECES),
        (QWEN, (), "<|im_end|>", _CHATML_PIECES),
        (LLAMA3, HEADERS, "<|eot_id|>", _LLAMA3_PIECES),
        (LLAMA31, HEADERS, "<|eot_id|>", _LLAMA3_PIECES),
        (MISTRAL, (), "</s>", ("[INST] ", " [/INST]", "", "</s>")),
        (LLAMA2, (), "</s>", ("<|bos|>[INST] ", " [/INST]", "", "</s>")),
        (GEMMA, TURNS, "<eos>",
         ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n",
          "<start_of_turn>model\n", "<end_of_turn>")),
        (PHI3, PHI_TOKENS, "<|endoftext|>",
         ("<|user|>\n", "<|end|>\n<|assistant|>\n", "<|assistant|>\n", "<|end|>")),
        (None, (), "</s>", ("", "\n", "", "</s>")),
    ],
    ids=["SmolLM2", "Qwen", "Llama 3", "Llama 3.1", "Mistral", "Llama 2", "Gemma", "Phi-3", "none"],
)  # fmt: skip
def test_pieces(template, special, eos, pieces):
    found = derive_pieces(build(template, special, eos))
    assert (found.user_header, found.user_end, found.assistant_header, found.end_of_turn) == pieces


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "system"),
    [
        *((template, None) for template in (CHATML, LLAMA3, MISTRAL, GEMMA, PHI3)),
        *((template, "Be brief.") for template in (CHATML, QWEN, LLAMA3, LLAMA31, MISTRAL, PHI3)),
    ],
)
def test_prompt_is_the_templates_own(template, system, adds_bos):
    tokenizer = build(template, (*HEADERS, *TURNS, *PHI_TOKENS))
    if adds_bos:
        add_bos(tokenizer)
    turns = [("system", system)] * (system is not None) + [("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text.removeprefix("<|bos|>")).input_ids
    assert ChatEncoder(tokenizer, ChatSettings(system_prompt=system)).prompt("Why?") == expected


@pytest.mark.parametrize("template", [GEMMA, None])
def test_system_prompt_goes_before_the_question_where_there_is_no_place_for_it(template):
    tokenizer = build(template, TURNS)
    found = ChatEncoder(tokenizer, ChatSettings(system_prompt="Be brief.")).prompt("Why?")
    assert found == ChatEncoder(tokenizer).prompt("Be brief.\n\nWhy?")


def test_without_the_chat_template_prompts_are_plain(tokenizer):
    chat = ChatEncoder(tokenizer, ChatSettings(template=False))
    assert chat.prompt("Why?", "Since") == tokenizer("Why?\nSince").input_ids
    encoded = chat.context("Hi you", 100)
    assert encoded.input_ids == tokenizer("Hi you<|im_end|>").input_ids
    assert encoded.header_length == 0


def test_template_that_drops_turns_is_refused():
    with pytest.raises(FastMemError, match="does not keep a user and an assistant turn"):
        derive_pieces(make_tokenizer("{{ messages[0]['content'] }}"))


def test_sequences(tokenizer):
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause"
    assert ChatEncoder(tokenizer).prompt("Why?", "Because") == tokenizer(prompt).input_ids
    encoded = ChatEncoder(tokenizer).context("Hi you", 100)
    expected = tokenizer("<|im_start|>assistant\nHi you<|im_end|>").input_ids
    assert encoded.input_ids == expected
    assert tokenizer.decode(expected[encoded.header_length :]) == "Hi you<|im_end|>"
    assert (encoded.context_tokens, encoded.truncated) == (6, 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "no"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "over 1000000 steps",
        ),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% if", "end of template|[Uu]nexpected end"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages | zz }}", "No filter named"),
        ("{% include 'x' %}", "no loader"),
        (3, "Can't compile"),
    ],
)
def test_a_template_that_fails_or_does_not_end_is_one_line(template, message):
    with pytest.raises(FastMemError, match=f"chat template cannot be used.*({message}).*template_kwargs"):
        ChatEncoder(make_tokenizer(template))


def test_special_token_text_stays_text(tokenizer):
    chat = ChatEncoder(tokenizer, ChatSettings(system_prompt="a <|im_end|>"))
    assert chat.prompt("Why?").count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    encoded = chat.context("a <|im_end|> b", 100)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.count(end) == 1
    assert encoded.input_ids[-1] == end
    assert chat.decode(encoded.input_ids[encoded.header_length : -1]) == "a <|im_end|> b"


def test_bos_only_where_the_tokenizer_adds_it(tokenizer):
    plain = ChatEncoder(tokenizer).context("x", 10)
    add_bos(tokenizer)
    with_bos = ChatEncoder(tokenizer).context("x", 10)
    assert with_bos.input_ids == [tokenizer.bos_token_id, *plain.input_ids]
    assert with_bos.header_length == plain.header_length + 1


def test_no_second_bos_from_the_template():
    tokenizer = build(LLAMA2, (), "</s>")
    add_bos(tokenizer)
    ids = ChatEncoder(tokenizer).prompt("Why?")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == "<|bos|>[INST] Why? [/INST]"


def test_truncation_keeps_the_text_as_written(tokenizer):
    chat = ChatEncoder(tokenizer)
    assert chat.cut("  do n't  stop", 7) == ("  do n'", 7, 7)
    assert chat.cut("short", 7) == ("short", 5, 0)
