"""Chat templates render as transformers renders them, and fail as clear refusals."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from services.gateway.text.chat_template import ChatTemplate, choose_source
from stoker.errors import CheckpointInvalid, InvalidRequest

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
LOOPS = """{%- set ns = namespace(found=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}{%- continue -%}{%- endif -%}
    {%- set ns.found = ns.found + 1 -%}
    {{- message | tojson(indent=2) -}}
    {%- if ns.found == 2 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{- thinking | default('off') -}}{%- if tools -%}tools{%- endif -%}"""

CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be <b>brief</b> & 'kind'"}, {"role": "user", "content": "né 😀"}],
    [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n"},
    ],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source: str, *, max_characters: int = 10_000) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, max_characters=max_characters)


@pytest.mark.parametrize("source", [SMOLLM2, LLAMA2, LOOPS], ids=["smollm2", "llama2", "loops"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "three"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_it_renders_what_transformers_renders(
    source: str, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> None:
    theirs = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **SPECIAL
    )
    theirs = theirs[0][0] if isinstance(theirs, tuple) else theirs[0]

    ours = template(source).render(messages, add_generation_prompt=add_generation_prompt)
    assert ours == theirs


def test_a_templates_own_refusal_reaches_the_client() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]

    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template(LLAMA2).render(twice)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[5].content.strip() }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{{ range(10**9) }}"],
)
def test_a_template_that_fails_is_a_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest):
        template(source).render(CONVERSATIONS[0])


def test_a_template_cannot_write_without_end() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"

    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        template(source, max_characters=1000).render(CONVERSATIONS[0])


def test_broken_source_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointInvalid, match="chat template"):
        template("{% for %}")


def test_variables_reach_the_template_but_cannot_replace_the_messages() -> None:
    source = "{{ thinking }}{{ messages[0].content }}"

    shown = template(source).render(CONVERSATIONS[0], variables={"thinking": "on", "messages": []})
    assert shown == "onhi"


def test_strftime_now_gives_a_date() -> None:
    assert template("{{ strftime_now('%Y') }}").render([]).isdigit()


@pytest.mark.parametrize(
    ("declared", "file_source", "chosen"),
    [
        (None, None, None),
        ("a", None, "a"),
        ("a", "b", "b"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "rag", "template": "r"}], None, "r"),
        ([], None, None),
    ],
)
def test_the_file_wins_then_the_default_of_several(
    declared: object, file_source: str | None, chosen: str | None
) -> None:
    assert choose_source(declared, file_source) == chosen
