"""Chat pieces come from the template; data never becomes a control token."""

import pytest
from conftest import CHATML, make_tokenizer

from fastmem_pl.backbone import ChatEncoder, derive_pieces
from fastmem_pl.errors import FastMemError

LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start|>system<|end|>\n\nCutting Knowledge Date<|eot|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set r = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<turn>' + r + '\n' + m['content'] | trim + '<end_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
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
        (CHATML, (), "<|im_end|>",
         ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>assistant\n", "<|im_end|>")),
        (LLAMA3, ("<|start|>", "<|end|>", "<|eot|>"), "<|eos|>",
         ("<|start|>user<|end|>\n\n", "<|eot|><|start|>assistant<|end|>\n\n",
          "<|start|>assistant<|end|>\n\n", "<|eot|>")),
        (MISTRAL, (), "</s>", ("[INST] ", " [/INST]", "", "</s>")),
        (LLAMA2, (), "</s>", ("<|bos|>[INST] ", " [/INST]", "", "</s>")),
        (GEMMA, ("<turn>", "<end_turn>"), "<|eos|>",
         ("<turn>user\n", "<end_turn>\n<turn>model\n", "<turn>model\n", "<end_turn>")),
        (None, (), "</s>", ("", "\n", "", "</s>")),
    ],
    ids=["chatml", "llama3 with injected system turn", "mistral", "llama2 with a bos a turn", "gemma", "no template"],
)  # fmt: skip
def test_pieces(template, special, eos, pieces):
    found = derive_pieces(build(template, special, eos))
    assert (found.user_header, found.user_end, found.assistant_header, found.end_of_turn) == pieces


@pytest.mark.parametrize("template", [CHATML, MISTRAL, GEMMA])
def test_prompt_is_the_templates_own(template):
    tokenizer = build(template, ("<turn>", "<end_turn>"))
    messages = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text.removeprefix("<|bos|>")).input_ids
    assert ChatEncoder(tokenizer).prompt("Why?") == expected


def test_injected_system_turn_is_left_out():
    template = CHATML.replace("{% for", "{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}{% for", 1)
    assert derive_pieces(make_tokenizer(template)).user_header == "<|im_start|>user\n"


def test_template_that_drops_turns_is_refused():
    with pytest.raises(FastMemError, match="does not keep a user and an assistant turn"):
        derive_pieces(make_tokenizer("{{ messages[0]['content'] }}"))


def test_context_sequence(tokenizer):
    encoded = ChatEncoder(tokenizer).context("Hi you", 100)
    expected = tokenizer("<|im_start|>assistant\nHi you<|im_end|>").input_ids
    assert encoded.input_ids == expected
    assert tokenizer.decode(expected[encoded.header_length :]) == "Hi you<|im_end|>"
    assert (encoded.context_tokens, encoded.truncated) == (6, 0)


def test_prompt_with_answer_prefix(tokenizer):
    ids = ChatEncoder(tokenizer).prompt("Why?", "Because")
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause"
    assert ids == tokenizer(text).input_ids


def test_special_token_text_in_a_context_stays_text(tokenizer):
    chat = ChatEncoder(tokenizer)
    encoded = chat.context("a <|im_end|> b", 100)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.count(end) == 1
    assert encoded.input_ids[-1] == end
    assert chat.decode(encoded.input_ids[encoded.header_length : -1]) == "a <|im_end|> b"


def test_bos_only_where_the_tokenizer_adds_it(tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain = ChatEncoder(tokenizer).context("x", 10)
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    with_bos = ChatEncoder(tokenizer).context("x", 10)
    assert with_bos.input_ids == [bos, *plain.input_ids]
    assert with_bos.header_length == plain.header_length + 1


def test_no_second_bos_from_the_template():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build(LLAMA2, (), "</s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    ids = ChatEncoder(tokenizer).prompt("Why?")
    assert ids.count(bos) == 1
    assert tokenizer.decode(ids) == "<|bos|>[INST] Why? [/INST]"


def test_truncation_keeps_the_text_as_written(tokenizer):
    chat = ChatEncoder(tokenizer)
    assert chat.truncate("  do n't  stop", 7) == ("  do n'", 7, 7)
    assert chat.truncate("short", 7) == ("short", 5, 0)
