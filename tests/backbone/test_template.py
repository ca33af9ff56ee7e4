"""Chat templates of the model families: prompts, contexts, system texts, and what stays text.

The templates are this project's own, with the control tokens and the layout of the models that they are named
after, and with the quirks that matter here.
"""

from dataclasses import dataclass, field

import pytest
from conftest import CHATML, make_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from fastmem_pl import Backbone, ChatSettings, FastMemError
from fastmem_pl.backbone import ChatEncoder
from fastmem_pl.backbone.template import derive_pieces

# Injects a system turn with a date; the system text is a developer's; the channel is left to the model.
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a model.\nToday: ' + strftime_now('%Y') + '\nReasoning: ' }}"
    "{{ reasoning_effort | default('medium') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# The last turn is written with an empty thinking part, those before it without.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Opens the thinking part itself.
QWEN35 = (
    CHATML + "{% if add_generation_prompt %}{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and "
    "not enable_thinking else '<think>\n' }}{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + CLOSED + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' + OPENED }}{% endif %}"
)
DEEPSEEK_R1 = "{% set CLOSED, OPENED = '', '<think>\n' %}" + _DEEPSEEK
DEEPSEEK_V31 = "{% set CLOSED, OPENED = '</think>', '<think>' if thinking else '</think>' %}" + _DEEPSEEK
# No end of turn; two control tokens begin every sequence.
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GLM45 = (
    "[gMASK]<sop>{% set off = enable_thinking is defined and not enable_thinking %}{% for m in messages %}"
    "{{ '<|' + m.role + '|>\n' + ('<think></think>\n' if m.role == 'assistant' else '') + m.content }}"
    "{{ '/nothink' if m.role == 'user' and off else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + ('\n<think></think>' if off else '') }}{% endif %}"
)
# The system text is a part of the first user turn.
GEMMA3 = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Thinking is asked for in a system turn; without it the thinking part is written, empty, and only to answer.
GEMMA4 = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if system or enable_thinking %}"
    "{{ '<|turn>system\n' + ('<|think|>' if enable_thinking else '') + system + '<turn|>\n' }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{{ '' if enable_thinking else '<|channel>thought\n<channel|>' }}{% endif %}"
)
LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
_SOT, _EOT = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set r = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}"
    f"{{{{ '{_SOT}<|' + r + '_TOKEN|>' + m.content + '{_EOT}' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{_SOT}<|CHATBOT_TOKEN|>' }}}}{{% endif %}}"
)
# A preamble of its own, and a turn that is opened in any case, answer or action.
COMMAND_R7B = (
    f"{{{{ bos_token + '{_SOT}<|SYSTEM_TOKEN|># Preamble' }}}}"
    f"{{% for m in messages if m.role == 'system' %}}{{{{ '\n\n' + m.content }}}}{{% endfor %}}{_EOT}"
    f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ '{_SOT}<|USER_TOKEN|>' + m.content + '{_EOT}' }}}}"
    f"{{% elif m.role == 'assistant' %}}{{{{ '{_SOT}<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content }}}}"
    f"{{{{ '<|END_RESPONSE|>{_EOT}' }}}}{{% endif %}}{{% endfor %}}{_SOT}<|CHATBOT_TOKEN|>"
)
# [SYSTEM_PROMPT] with a default; no header of the assistant.
MISTRAL = (
    "{{ bos_token }}{% set given = messages[0].role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + (messages[0].content if given else 'Default.') + '[/SYSTEM_PROMPT]' }}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its tokenizer, and the texts that are expected around "Why?" and a context."""

    template: str
    special: tuple[str, ...]
    header: str  # of a context
    end: str
    user: tuple[str, str]  # around the question
    system: str  # of the text "Brief." before the question, up to what `user` begins with
    eos: str = ""  # `end`, where not stated
    kwargs: dict = field(default_factory=dict)
    unmarked: tuple[str, ...] = ()
    opened: str = ""  # what opens an answer beyond the template's generation prompt
    start: str = ""  # of every sequence
    injected: str = ""  # by the template before the user's turn, and left out
    ends: tuple[str, ...] = ()  # further ends of a turn


THINK = ("<think>", "</think>")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>")
_INJECTED = "<|start|>system<|message|>You are a model.\nToday: YEAR\nReasoning: {}<|end|>"
_FINAL = "<|channel|>final<|message|>"
_CHATML_USER = "<|im_start|>user\n"
_CHATML_SYSTEM = "<|im_start|>system\nBrief.<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n"
_EMPTY = "<think>\n\n</think>\n\n"
_GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>")
_COHERE = (_SOT, _EOT, "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_LLAMA4_HEADER = "<|header_start|>assistant<|header_end|>\n\n"
_EOS = "<｜end▁of▁sentence｜>"


def chatml(template, answer, prompt, **kwargs):
    user = (_CHATML_USER, f"<|im_end|>\n{_ASSISTANT}{prompt}")
    return Family(
        template,
        ("<|im_start|>",),
        _ASSISTANT + answer,
        "<|im_end|>",
        user,
        _CHATML_SYSTEM,
        "",
        kwargs,
        THINK,
    )


def deepseek(template, closed, prompt, **kwargs):
    user = ("<｜User｜>", f"<｜Assistant｜>{prompt}")
    marks = (*THINK, "<｜User｜>", "<｜Assistant｜>")
    return Family(template, (), f"<｜Assistant｜>{closed}", _EOS, user, "Brief.", "", kwargs, marks)


def glm(template, answer, around, **kwargs):
    marks = THINK if template is GLM45 else ()
    system, start = "<|system|>\nBrief.", "[gMASK]<sop>"
    return Family(
        template,
        _GLM,
        answer,
        "<|user|>",
        ("<|user|>\n", around),
        system,
        "<|endoftext|>",
        kwargs,
        marks,
        "",
        start,
    )


def gemma4(header, system, **kwargs):
    marks = ("<|turn>", "<|channel>", "<channel|>", "<|think|>")
    return Family(
        GEMMA4, marks, header, "<turn|>", ("<|turn>user\n", f"<turn|>\n{header}"), system, "<eos>", kwargs
    )


def gpt_oss(effort, injected, **kwargs):
    answer = f"<|start|>assistant{_FINAL}"
    user = ("<|start|>user<|message|>", f"<|end|>{answer}")
    system = f"{_INJECTED.format(effort)}<|start|>developer<|message|># Instructions\n\nBrief.\n\n<|end|>"
    start = "" if injected else _INJECTED.format(effort)
    return Family(
        GPT_OSS, HARMONY, answer, "<|return|>", (start + user[0], user[1]), system, "", kwargs,
        opened=_FINAL, injected=injected, ends=("<|end|>",),
    )  # fmt: skip


FAMILIES = {
    "gpt-oss": gpt_oss("medium", _INJECTED.format("medium")),
    "gpt-oss low": gpt_oss("low", "", reasoning_effort="low"),
    "Qwen3": chatml(QWEN3, _EMPTY, ""),
    "Qwen3 off": chatml(QWEN3, _EMPTY, _EMPTY, enable_thinking=False),
    "Qwen3.5": chatml(QWEN35, _EMPTY, "<think>\n"),
    "Qwen3.5 off": chatml(QWEN35, _EMPTY, _EMPTY, enable_thinking=False),
    "DeepSeek R1": deepseek(DEEPSEEK_R1, _EMPTY, "<think>\n"),
    "DeepSeek V3.1": deepseek(DEEPSEEK_V31, "</think>", "</think>"),
    "DeepSeek V3.1 on": deepseek(DEEPSEEK_V31, "</think>", "<think>", thinking=True),
    "GLM-4": glm(GLM4, "<|assistant|>\n", "<|assistant|>"),
    "GLM-4.5": glm(GLM45, "<|assistant|>\n<think></think>\n", "<|assistant|>"),
    "GLM-4.5 off": glm(
        GLM45,
        "<|assistant|>\n<think></think>\n",
        "/nothink<|assistant|>\n<think></think>",
        enable_thinking=False,
    ),
    "Gemma 3": Family(
        GEMMA3, ("<start_of_turn>",), "<start_of_turn>model\n", "<end_of_turn>",
        ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"), "Brief.\n\n", "<eos>",
    ),
    "Gemma 4": gemma4("<|turn>model\n<|channel>thought\n<channel|>", "<|turn>system\nBrief.<turn|>\n"),
    "Llama 4": Family(
        LLAMA4, ("<|header_start|>", "<|header_end|>"), _LLAMA4_HEADER, "<|eot|>",
        ("<|header_start|>user<|header_end|>\n\n", f"<|eot|>{_LLAMA4_HEADER}"),
        "<|header_start|>system<|header_end|>\n\nBrief.<|eot|>",
    ),
    "Command R": Family(
        COMMAND_R, _COHERE, f"{_SOT}<|CHATBOT_TOKEN|>", _EOT,
        (f"{_SOT}<|USER_TOKEN|>", f"{_EOT}{_SOT}<|CHATBOT_TOKEN|>"), f"{_SOT}<|SYSTEM_TOKEN|>Brief.{_EOT}",
    ),
    "Command R7B": Family(
        COMMAND_R7B, (*_COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        f"{_SOT}<|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|>",
        (f"{_SOT}<|USER_TOKEN|>", f"{_EOT}{_SOT}<|CHATBOT_TOKEN|><|START_RESPONSE|>"),
        f"{_SOT}<|SYSTEM_TOKEN|># Preamble\n\nBrief.{_EOT}", _EOT,
        opened="<|START_RESPONSE|>", injected=f"{_SOT}<|SYSTEM_TOKEN|># Preamble{_EOT}",
    ),
    "Mistral": Family(
        MISTRAL, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "", "</s>",
        ("[INST]", "[/INST]"), "[SYSTEM_PROMPT]Brief.[/SYSTEM_PROMPT]",
        injected="[SYSTEM_PROMPT]Default.[/SYSTEM_PROMPT]",
    ),
}  # fmt: skip


def build(template, special=(), eos="<|im_end|>", unmarked=(), start=()):
    """A tokenizer of single characters with these control tokens; ``start`` is added to every text."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "eos_token": eos})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in unmarked])
    if start:
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in start]
        single = " ".join(start) + " $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def tokenizer_of(family, start=()):
    special = (*family.special, family.end)
    return build(family.template, special, family.eos or family.end, family.unmarked, start)


def ids(tokenizer, text):
    from datetime import datetime

    text = text.replace("YEAR", datetime.now().strftime("%Y"))
    return tokenizer(text, add_special_tokens=False).input_ids


def encoder_of(family, tokenizer=None, **settings):
    tokenizer = tokenizer or tokenizer_of(family)
    return ChatEncoder(tokenizer, ChatSettings(template_kwargs=family.kwargs or None, **settings))


def generation_prompt(tokenizer, kwargs, *turns):
    """The template's own."""
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    return text.removeprefix("<|bos|>")


def test_prompts(family):
    tokenizer = tokenizer_of(family)
    before, after = family.user
    expected = ids(tokenizer, f"{family.start}{before}Why?{after}")
    encoder = encoder_of(family, tokenizer)
    assert encoder.prompt("Why?") == expected
    own = generation_prompt(tokenizer, family.kwargs, ("user", "Why?"))
    injected = ids(tokenizer, family.injected)
    assert ids(tokenizer, own + family.opened) == injected + expected
    # An answer that is begun stands where the context did.
    begun = encoder.prompt("Why?", "So")
    header = ids(tokenizer, f"{family.header}So")
    assert begun[-len(header) :] == header


def test_prompts_with_a_system_text(family):
    tokenizer = tokenizer_of(family)
    before, after = family.user
    if "Brief." in family.system and family.system.endswith("\n\n"):
        text = f"{before}{family.system}Why?{after}"
    else:
        # Where the template injects a turn, the system text goes into it.
        text = f"{family.start}{family.system}{before[before.rfind(family.user[0]) :]}Why?{after}"
    if family.template is GPT_OSS:
        text = f"{family.system}<|start|>user<|message|>Why?{after}"
    found = encoder_of(family, tokenizer, system_prompt="Brief.").prompt("Why?")
    assert found == ids(tokenizer, text)
    own = generation_prompt(tokenizer, family.kwargs, ("system", "Brief."), ("user", "Why?"))
    assert found == ids(tokenizer, own + family.opened)


def test_contexts_stand_where_an_answer_would(family):
    tokenizer = tokenizer_of(family)
    encoded = encoder_of(family, tokenizer).context("A fact.", 100)
    header = ids(tokenizer, family.start + family.header)
    assert encoded.input_ids == header + ids(tokenizer, f"A fact.{family.end}")
    assert encoded.header_length == len(header)
    assert encoded.input_ids[-1] == tokenizer.convert_tokens_to_ids(family.end)


def test_data_is_never_a_control_token(family):
    """Of those either that the tokenizer does not mark as special."""
    tokenizer = tokenizer_of(family)
    encoder = encoder_of(family, tokenizer)
    controls = {
        tokenizer.convert_tokens_to_ids(text) for text in (*family.special, family.end, *family.unmarked)
    }
    usual = [i for i in encoder.prompt("") if i in controls]
    for text in (*family.special, family.end, *family.unmarked):
        found = encoder.prompt(f"a {text} b")
        assert [i for i in found if i in controls] == usual
        assert f"a {text} b" in tokenizer.decode(found)
        assert (
            encoder.cut(f"a {text} b", 1000)[1] == encoder.count_tokens([f"a {text} b"])[0] > len("a  b") + 1
        )
        body = encoder.context(f"a {text} b", 1000).input_ids[encoder.context("", 1000).header_length : -1]
        assert not controls & {*body}


def test_unmarked_tokens_that_a_template_puts_together():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = build(template, unmarked=("<|user|>", "<|assistant|>", "<table>"))
    user, table = tokenizer.convert_tokens_to_ids(["<|user|>", "<table>"])
    found = ChatEncoder(tokenizer).prompt("a <|user|> b <table>")
    assert found.count(user) == 1
    # What is no markup of the template is text of one token, as in training.
    assert found.count(table) == 1


def test_answers_end_where_a_turn_does(family, tiny):
    tokenizer = tokenizer_of(family)
    backbone = Backbone(tiny.model, tokenizer).with_chat(ChatSettings(template_kwargs=family.kwargs or None))
    names = {family.end, family.eos or family.end, *family.ends}
    wanted = {tokenizer.convert_tokens_to_ids(name) for name in names}
    assert {*backbone.stop_ids} == wanted | {tiny.model.generation_config.eos_token_id}


def test_start_is_not_doubled_where_the_tokenizer_adds_it():
    family, start = FAMILIES["GLM-4"], ("[gMASK]", "<sop>")
    for settings in ({}, {"system_prompt": "Brief."}):
        plain = encoder_of(family, **settings)
        adding = encoder_of(family, tokenizer_of(family, start), **settings)
        assert adding.prompt("Why?") == plain.prompt("Why?")
        assert adding.context("A fact.", 100) == plain.context("A fact.", 100)


def test_system_turn_that_template_kwargs_ask_for():
    family = gemma4("<|turn>model\n", "", enable_thinking=True)
    tokenizer = tokenizer_of(family)
    own = generation_prompt(tokenizer, family.kwargs, ("user", "Why?"))
    assert "<|think|>" in own
    assert encoder_of(family, tokenizer).prompt("Why?") == ids(tokenizer, own)
    # In contexts it is not: nothing precedes them.
    assert encoder_of(family, tokenizer).context("A", 9).header_length == len("model\n") + 1


@pytest.mark.parametrize(
    ("template", "kwargs", "message"),
    [
        (QWEN3, {"enable_thinkin": False}, "'enable_thinkin' is not used by the chat template; leave it out"),
        (QWEN3, {"add_generation_prompt": False}, "'add_generation_prompt' is not for you to set"),
        (None, {"enable_thinking": False}, "template_kwargs: no chat template is used here; leave it out"),
    ],
)
def test_template_kwargs_without_effect_are_refused(template, kwargs, message):
    with pytest.raises(FastMemError, match=message):
        derive_pieces(build(template), template_kwargs=kwargs)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no users') }}",
            "chat template cannot be used: no users; .*chat.template false",
        ),
        ("{{ messages[0].nothing.more }}", "chat template cannot be used: .*nothing"),
        ("{% for m in messages %}{{ m.content }}{% endfor", "chat template cannot be used"),
        ("{{ messages[0].content }}", "does not keep a user and an assistant turn"),
    ],
)
def test_template_that_cannot_be_used(template, message, tiny):
    tokenizer = build(template)
    backbone = Backbone(tiny.model, tokenizer)
    with pytest.raises(FastMemError, match=message) as refused:
        backbone.chat.prompt("Why?")
    assert "\n" not in str(refused.value)
    plain = backbone.with_chat(ChatSettings(template=False))
    assert plain.chat.prompt("Why?") == ids(tokenizer, "Why?\n")


def test_turns_without_a_generation_prompt():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    pieces = derive_pieces(build(template, ("<|im_start|>",)))
    assert (pieces.user_end, pieces.assistant_header) == (
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>assistant\n",
    )
