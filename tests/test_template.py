"""Chat templates: rendered as transformers renders them, and stopped when they are hostile."""

from __future__ import annotations

import copy
import sys
import threading
import tracemalloc
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import pytest

from edgekit.errors import ModelError, UserError
from edgekit.runtime import sandbox as module
from edgekit.runtime.template import ChatTemplate, Message

# The template of SmolLM2-Instruct, as it stands in its files.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The others are ours, each in the manner of a family: what it does to whitespace, tools, roles and thinking.
CHATML = """\
{% for message in messages %}
    {% generation %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content | trim) ~ '<|im_end|>\\n' -}}
    {% endgeneration %}
{% endfor %}
{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"""

LLAMA3 = """\
{{- bos_token }}
{#- The system message goes first, with the date. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + "}" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """\
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages | rejectattr("role", "equalto", "system") %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == users[-1] %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, value in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + value | tojson }}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and messages[0].role == "system" %}
            {{- "[INST] " + messages[0].content + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{%- macro schema(properties) -%}
    {%- for key, value in properties | dictsort -%}
        {{ key }}:{
        {%- if value.properties is defined %}{{ schema(value.properties) }}{% else %}{{ value.type|upper }}{% endif -%}
        }
        {%- if not loop.last %},{% endif -%}
    {%- endfor -%}
{%- endmacro -%}
{{ bos_token }}{% for tool in tools or [] %}<tool>{{ schema(tool.function.parameters.properties) }}</tool>
{% endfor %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
<start_of_turn>{{ {'assistant': 'model'}.get(message.role, message.role) }}
{% if message.content is string %}{{ message.content | trim }}{% else %}
{% for item in message.content or [] if item.type == 'text' %}{{ item['text'] | replace('\\n', ' ') }}{% endfor %}
{% endif %}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

TEMPLATES = {
    "smollm2": SMOLLM2,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

HELLO: list[Message] = [{"role": "user", "content": "Hi <&> 'é'"}]
LONGER: list[Message] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " 1+1?"},
    {"role": "assistant", "content": "<think>\none and one\n</think>\n\n2"},
    {"role": "user", "content": "Sure?\n"},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <b>now</b> – \u00e4",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "object", "properties": {"city": {"type": "string"}}},
                    "days": {"type": "integer"},
                },
            },
        },
    }
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"days": 1, "place": {"city": "Röm"}}}}],
    },
    {"role": "tool", "content": '{"t": 31}'},
    {"role": "assistant", "content": [{"type": "text", "text": "31\ndegrees"}]},
]
CONVERSATIONS: list[list[Mapping[str, object]]] = [[*HELLO], [*LONGER], [*CALLS]]

# Small programs on which two implementations may differ: whitespace, scopes, filters, JSON.
SNIPPETS = [
    "a\n  {% if true %}\n b\n  {% endif %}\nc\n",
    "{#- note -#}  x  {{- ' y ' -}}  z\n\n",
    "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [] %}x{% else %}empty{% endfor %}",
    "{% for i in 'abc' %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex }}{{ loop.cycle('o', 'e') }}{{ i }}"
    "{{ loop.previtem }}{{ loop.nextitem }}{{ loop.changed(i) }} {% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}",
    "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "{% macro f(a, b=[1], c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f('x') }}{{ f(b=2, a=1, c={'k': (1, 2)}) }}",
    "{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(n) f() %}{{ n + 1 }}{% endcall %}",
    "{% set block %}\n a {{ 1 }}\n{% endset %}[{{ block }}]{% filter upper %}abc{{ 1.5 }}{% endfilter %}",
    "{% set a, b = 1, (2, 3) %}{{ a ~ b ~ none ~ true ~ 1.0 ~ missing }}",
    "{{ missing }}|{{ missing is defined }}|{{ missing | default('d') }}|{{ '' | default('d', true) }}",
    "{{ messages[0].missing }}{{ messages[0]['missing'] is undefined }}{{ messages[0].content.missing is none }}",
    "{{ [1, 'a', none, true, 1.5, 'it\\'s', \"ä\"] }}{{ {'a': {'b': ()}} }}",
    "{{ {'b': 'ä<>&\\'\"', 'a': [1.0, none, true]} | tojson }}",
    "{{ {'b': 'ä', 'a': [1, {}]} | tojson(indent=2) }}",
    "{{ [1, 'ä'] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1}.items() | list }}",
    "{{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 'ab' * 3 }} {{ [1] * 2 + [3] }} {{ 10 ** -2 }}",
    "{{ 'a,b,,c'.split(',') }}{{ ' x '.strip() }}{{ 'a-b'.replace('-', '+') }}{{ 'x'.join(['1', '2']) }}",
    "{{ 'Ab'.upper() + 'Ab'.lower() + 'ab cd'.title() + 'ab'.capitalize() }}{{ 'abc'[-2:] }}",
    "{{ 'aXbX' | replace('X', '-', 1) }}{{ 'ab' | list }}{{ [3, 1, 2] | sort(reverse=true) }}",
    "{{ 'a\nb' | indent }}|{{ 'a\n\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent('> ', blank=true) }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ ['b', 'A'] | sort | join }}",
    "{{ messages | join('|', 'role') }}{{ 'abc'.startswith('a') }}{{ messages | map('length') | list }}",
    "{{ [1, 2, 3, 4] | select('odd') | list }}{{ [0, 1] | select | list }}{{ [1, 2] | reject('eq', 1) | list }}",
    "{{ [1, 2] | first }}{{ [1, 2] | last }}{{ 'abc' | reverse }}{{ [1, 2] | reverse | list }}{{ '12' | int + 1 }}",
    "{{ 'x' | int(7) }}{{ '1.5' | float }}{{ 2.567 | round(2) }}{{ 2.5 | round(0, 'floor') }}{{ -3 | abs }}",
    "{{ 'hello wORLD' | title }}{{ 'hELLO' | capitalize }}{{ ' a ' | trim }}{{ 'xax' | trim('x') }}{{ 5 | string }}",
    "{{ '<a>' | e }}{{ '<a>' | safe }}{{ ('<a>' | safe) + '<b>' }}{{ '<c>' ~ ('<d>' | safe) }}{{ ('a' | safe) * 2 }}",
    "{{ 'a' in 'abc' }}{{ 1 in [1] }}{{ 'k' in {'k': 1} }}{{ 1 is number }}{{ {} is mapping }}{{ 'a' is sequence }}",
    "{{ (messages | first).keys() | list }}{{ messages[0].get('x', 5) }}{{ messages[0].items() | list | length }}",
    "{{ dict(a=1) }}{{ dict({'a': 1}, b=2) }}{{ range(3) | list }}{{ range(5, 0, -2) | list }}{{ [2, 1] | max }}",
    "{{ strftime_now('%Y')[:2] }}{{ 2.0 ** 0.5 }}",
    "{{ 1 if false }}{{ 'a' if 0 else 'b' }}{{ not true }}{{ 1 < 2 < 3 }}{{ none }}{{ True and None }}{{ 'x' or 'y' }}",
    "{{ add_generation_prompt }}{{ tools }}{{ documents }}{{ bos_token }}{{ pad_token }}",
    "{% with a = 1 %}{{ a }}{% endwith %}{{ a }}{% raw %}{{ x }}{% endraw %}",
    "{{ [[1, 2], [3]][0][1] }}{{ {'a': [1]}['a'][-1] }}{{ messages[-1].role }}{{ messages[5] is undefined }}",
]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 10 ms each time that somebody looks at it: 200 looks are the limit."""
    now = 0.0

    def look() -> float:
        nonlocal now
        now += 0.01
        return now

    monkeypatch.setattr("time.thread_time", look)


@pytest.mark.parametrize(
    ("name", "messages", "tools", "expected"),
    [
        (
            "smollm2",
            HELLO,
            None,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi <&> 'é'<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "chatml",
            LONGER,
            None,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\none and one\n</think>\n\n2<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            CALLS[:3],
            TOOLS,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nRome?<|eot_id|>"
            '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": '
            '{"days": 1, "place": {"city": "Röm"}}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n{"t": 31}<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen3",
            CALLS[:3],
            TOOLS,
            '<|im_start|>system\n# Tools\n\n<tools>\n{"type": "function", "function": {"name": "weather", '
            '"description": "It\'s <b>now</b> – ä", "parameters": {"type": "object", "properties": {"place": '
            '{"type": "object", "properties": {"city": {"type": "string"}}}, "days": {"type": "integer"}}}}}\n'
            "</tools><|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n\n<tool_call>\n"
            '{"name": "weather", "arguments": {"days": 1, "place": {"city": "Röm"}}}\n</tool_call><|im_end|>\n'
            '<|im_start|>user\n<tool_response>\n{"t": 31}\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
        ),
        (
            "mistral",
            LONGER,
            None,
            "<s>[INST]  1+1?[/INST] <think>\none and one\n</think>\n\n2</s>[INST] Be brief. \n\nSure?\n[/INST]",
        ),
        (
            "gemma",
            LONGER,
            TOOLS,
            "<s><tool>days:{INTEGER},place:{city:{STRING}}</tool>\n<start_of_turn>user\n1+1?<end_of_turn>\n"
            "<start_of_turn>model\n<think>\none and one\n</think>\n\n2<end_of_turn>\n<start_of_turn>user\n"
            "Sure?<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_golden_prompts(
    name: str, messages: list[Mapping[str, object]], tools: list[dict[str, Any]] | None, expected: str
) -> None:
    template = ChatTemplate(TEMPLATES[name], special_tokens=TOKENS)
    assert template.render(messages, tools=tools) == expected


def test_variables_and_no_generation_prompt() -> None:
    qwen = ChatTemplate(QWEN3)
    quiet = qwen.render(HELLO, variables={"enable_thinking": False})
    assert quiet == qwen.render(HELLO) + "<think>\n\n</think>\n\n"
    assert qwen.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHi <&> 'é'<|im_end|>\n"


@pytest.mark.slow
@pytest.mark.parametrize("source", [*TEMPLATES.values(), *SNIPPETS])
def test_renders_as_transformers_does(source: str) -> None:
    reference = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    template = ChatTemplate(source, special_tokens=TOKENS)
    for messages, tools, prompt in product(CONVERSATIONS, (None, TOOLS), (True, False)):
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        try:
            rendered, _ = reference([messages], chat_template=source, **options, **TOKENS)
            expected = rendered[0]
        except Exception as error:  # where that one refuses or fails, ours must, in the same words
            expected = f"failed: {error}"
        try:
            ours = template.render(messages, **options)
        except (UserError, ModelError) as error:
            assert expected.startswith("failed: ")
            assert expected.removeprefix("failed: ") in str(error)  # noqa: PT017
        else:
            assert ours == expected


def test_the_template_refuses_with_its_own_words() -> None:
    with pytest.raises(UserError, match="refuses the conversation: After the optional system message, roles must"):
        ChatTemplate(MISTRAL, special_tokens=TOKENS).render(HELLO * 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "must compile: line 2: Expected an expression"),
        ("{{ 'a' | nonsense }}", "must compile: line 1: No filter named 'nonsense'"),
        ("{{ 'a' is nonsense }}", "must compile: line 1: No test named 'nonsense'"),
        ("\n\n{{ messages[0].nothing.at_all }}", "failed at line 3: UndefinedError: .* 'nothing'"),
        ("{% macro f() %}\n{{ 1 + 'a' }}{% endmacro %}\n\n{{ f() }}", "failed at line 2: TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ nothing | tojson }}", "Undefined is not JSON serializable"),
    ],
)
def test_a_broken_template_says_where(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("''.__class__", "__class__"),
        ("''['__class__']", "__class__"),
        ("messages.__class__.__mro__", "__class__"),
        ("[''] | map(attribute='__class__') | list", "__class__"),
        ("messages | join('', '__class__')", "__class__"),
        ("raise_exception.__globals__", "__globals__"),
        ("namespace.__init__.__globals__", "__init__"),
        ("namespace().__class__", "__class__"),
        ("namespace(__class__=1)", "__class__"),
        ("namespace(_x=1)", "_x"),
        ("(messages | map('string')).gi_frame", "gi_frame"),
        ("'{0.__class__}'.format('')", "format"),
        ("'{a}'.format_map({'a': 1})", "format_map"),
        ("'' | attr('__class__')", "attr"),
        ("messages.append(1)", "append"),
        ("messages[0].pop('role')", "pop"),
        ("messages[0].update({'role': 'x'})", "update"),
        ("messages[0].__setitem__('role', 'x')", "__setitem__"),
        ("'x'.encode()", "encode"),
        ("(1).to_bytes(9, 'big')", "to_bytes"),
        ("self", "self"),
        ("varargs", "varargs"),
        ("lipsum()", "lipsum"),
        ("cycler(1)", "cycler"),
    ],
)
def test_an_unsafe_name_is_refused_by_name(expression: str, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        ChatTemplate("{{ " + expression + " }}").render(HELLO)


@pytest.mark.parametrize(
    "statement",
    [
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{% block x %}{% endblock %}",
        "{% autoescape true %}{{ '<' }}{% endautoescape %}",
        "{% for i in [1] %}{{ loop._iterable }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f.__init__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace() %}{% set ns.x = ns %}",
        "{% set ns = namespace() %}{% set ns.x = [{'a': ns}] %}",
        "{{ dict([(1, 2)]) }}",
    ],
)
def test_an_unsafe_statement_is_refused(statement: str) -> None:
    with pytest.raises(ModelError):
        ChatTemplate(statement).render(HELLO)


def grown(start: str, step: str) -> str:
    """A namespace's x that a step makes larger, a hundred times."""
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(100) %}}{{% set ns.x = {step} %}}{{% endfor %}}"


LARGE = {
    "times": "{{ 'x' * 10**10 }}",
    "times, reversed": "{{ 10**10 * 'x' }}",
    "times, a list": "{{ ([1] * 10**9) | length }}",
    "times, a tuple": "{{ ((1, 2) * 10**9) | length }}",
    "times, marked as safe": "{{ ('x' | safe) * 10**9 }}",
    "times, of large values": "{{ ['x' * 3000000] * 1000 }}",
    "power": "{{ (10**1000) ** 1000 }}",
    "power, again": "{{ 9 ** (9 ** 9) }}",
    "square": grown("3", "ns.x * ns.x"),
    "doubled by +": grown("'abcdefgh'", "ns.x + ns.x"),
    "doubled by ~": grown("'abcdefgh'", "ns.x ~ ns.x"),
    "doubled by join": grown("'abcdefgh'", "[ns.x, ns.x] | join"),
    "doubled by replace": grown("'aaaaaaaa'", "ns.x | replace('a', 'aa')"),
    "doubled by a block": "{% set ns = namespace(x='abcdefgh') %}{% for i in range(100) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "one of many ~": "{% set x = 'x' * 3000000 %}{{ " + "~".join("x" * 300) + " }}",
    "deep": grown("1", "[ns.x]") + "{{ ns.x }}",
    "% width": "{{ '%1000000000d' % 1 }}",
    "% star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'x'.center(10**10) }}",
    "center filter": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "replace": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "replace, nothing": "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "replace, marked as safe": "{{ ('x' * 100000 | safe).replace('x', 'y' * 100000) }}",
    "replace filter": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "join": "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "join, text": "{{ ('x' * 100000).join('a' * 100000) }}",
    "join filter": "{{ range(100000) | join('x' * 100000) }}",
    "join filter, many": "{{ (['x' * 30000] * 100) | map('string') | join('x' * 1000000) }}",
    "range": "{{ range(10**9) | list | length }}",
    "range, huge": "{% for i in range(10**30) %}{% endfor %}",
    "list of text": "{{ ('é' * 3900000) | list | length }}",
    "sorted text": "{{ ('ab' * 1900000) | sort | length }}",
    "looped text": "{% for c in 'é' * 3900000 %}{{ loop.length }}{% endfor %}",
    "split": "{{ ('a ' * 1500000).split() | length }}",
    "upper": "{{ ('ß' * 3900000) | upper }}",
    "escape": "{{ ('<' * 3900000) | e }}",
    "title": "{{ ('a ' * 1900000) | title }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "indent, many": "{{ ('\n' * 3900000) | indent(64, blank=true) }}",
    "tojson": "{{ [1] | tojson(indent=10**9) }}",
    "tojson, escapes": "{{ ('\x01' * 3900000) | tojson }}",
    "round": "{{ 5 | round(-10**9) }}",
    "round, up": "{{ 5 | round(10**9, 'ceil') }}",
    "integer": "{{ ('f' * 1000000) | int(0, 16) // 7 }}",
    "integer, literal": "{% set x = 0x" + "f" * 100000 + " %}{{ x // 3 }}",
    "integer, text": "{{ " + "9" * 10000 + " }}",
    "date": "{{ strftime_now('%c' * 1000000) }}",
    "output": "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
    "output of a value": "{% set x = 'x' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
    "output of a list": "{% set x = ['x' * 1000000] %}{% for i in range(100) %}{% set y %}{{ x }}{% endset %}"
    "{% endfor %}",
    "output of a macro": "{% macro f() %}{% for i in range(100000) %}"
    + "x" * 1000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "output of safe text in a macro": "{% macro f() %}{% set x = ('x' * 3900000) | safe %}"
    "{% for i in range(1000) %}{{ x }}{% endfor %}{% endmacro %}{{ f() }}",
    "many values": "{% macro f(x) %}{{ f(x[1:]) }}{% endmacro %}{{ f('x' * 3000000) }}",
    "source": "x" * 1000000,
}
NUMEROUS = {
    "lists compared": "{% macro f(x, y, n) %}{{ f([x, x], [y, y], n - 1) if n else x == y }}{% endmacro %}"
    "{{ f(1, 1.0, 60) }}",
    "tuples compared": "{% macro f(x, y, n) %}{{ f((x, x), (y, y), n - 1) if n else x == y }}{% endmacro %}"
    "{{ f(1, 1.0, 60) }}",
    "dicts compared": "{% macro f(x, y, n) %}{{ f({1: x, 2: x}, {1: y, 2: y}, n - 1) if n else x == y }}{% endmacro %}"
    "{{ f(1, 1.0, 60) }}",
    "a list of itself": grown("[1]", "[ns.x, ns.x]") + "{{ ns.x }}",
    "a tuple of itself": grown("(1,)", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "a dict of itself": grown("1", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    "a view of itself": grown("{'a': 1}", "{'a': ns.x.items(), 'b': ns.x.items()}") + "{{ ns.x }}",
    "doubled by a list": grown("[1]", "ns.x + ns.x"),
    "many filtered values": "{% macro f(x) %}{{ f(x | upper) }}{% endmacro %}{{ f('x' * 300000) }}",
    "many splits": "{% for i in range(100000) %}{% set x = ('a ' * 10000).split() %}{% endfor %}",
}
LONG = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops with a loop variable": "{% for i in range(100000) %}{% for j in range(100000) %}{{ loop.index if false }}"
    "{% endfor %}{% endfor %}",
    "loops with a filter": "{% for i in range(100000) if range(100000) | list | length > i %}{% endfor %}",
    "loops with a filter that catches errors": "{% for i in range(100000) %}{% for j in range(100000) %}"
    "{{ 'x' | int }}{% endfor %}{% endfor %}",
    "generators that are dropped": "{% for i in range(100000) %}{% for j in range(100000) %}"
    "{% set x = [1, 2] | map('string') | first %}{% endfor %}{% endfor %}",
    "generators of generators": "{{ range(100000)" + " | map('string')" * 100 + " | list | length }}",
    "selected": "{{ range(1, 100000)" + " | select" * 150 + " | list | length }}",
    "selected, for the largest": "{{ range(1, 100000)" + " | select" * 30 + " | max }}",
    "recursion, wide": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loops over a variable": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
}
DEEP = {
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursion of a loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "recursion of a caller": "{% macro f(n) %}{{ caller(n) }}{% endmacro %}{% macro g(n) %}{% call(m) f(n) %}{{ g(m) }}"
    "{% endcall %}{% endmacro %}{{ g(1) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "nested loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "operators": "{{ " + "+".join(["1"] * 1500) + " }}",
    "attributes": "{{ a" + ".b" * 1500 + " }}",
}


@pytest.fixture
def measured() -> Iterator[None]:
    """Fails when the test takes more memory than a small device has to spare."""
    tracemalloc.start()
    try:
        yield
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 150e6


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in LARGE.items()])
def test_a_template_that_makes_something_large_is_stopped(source: str) -> None:
    with pytest.raises(ModelError, match="chat template") as caught:
        ChatTemplate(source).render(HELLO)
    assert "it may run for" not in str(caught.value), "it was the clock that stopped it"
    assert "MemoryError" not in str(caught.value), "it was the machine that stopped it"
    assert len(str(caught.value)) < 700
    assert caught.value.__context__ is None, "the error keeps what the template made"


@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in NUMEROUS.items()])
def test_a_template_that_makes_many_things_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SIZE", module.MAX_SIZE // 10)
    monkeypatch.setattr(module, "MAX_TOTAL", module.MAX_TOTAL // 10)
    with pytest.raises(ModelError, match=r"a value may have a size of 400000|a total size of 6400000"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.usefixtures("looks", "measured")
@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in LONG.items()])
def test_a_template_that_runs_too_long_is_stopped(source: str) -> None:
    with pytest.raises(ModelError, match=r"it may run for 2\.0 s"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize(
    "step",
    [
        "{{ 1 + 1 }}",
        "{{ 'a' ~ 'b' }}",
        "{{ 'a' | upper }}",
        "{{ dict() }}",
        "{{ 'a'.upper() }}",
        "{{ 'abc'[1:] }}",
        "{{ [1] }}{{ (1, 2) }}",
        "{{ {'a': 1} }}",
        "{% if 'a' in 'b' %}{% endif %}",
        "{% if 'a' is lower %}{% endif %}",
        "{% for i in messages %}{% endfor %}",
    ],
)
def test_each_step_looks_at_the_clock(step: str) -> None:
    """So the time between two looks is that of a single step, whatever the template does."""
    assert ChatTemplate(step * 50).render(HELLO) is not None
    with pytest.raises(ModelError, match=r"it may run for 2\.0 s"):
        ChatTemplate(step * 300).render(HELLO)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in DEEP.items()])
def test_a_template_that_is_too_deep_is_stopped(source: str) -> None:
    with pytest.raises(ModelError, match=r"RecursionError|IndentationError|SyntaxError|MemoryError"):
        ChatTemplate(source).render(HELLO)


def test_it_is_stopped_in_any_thread_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.1)
    errors: list[str] = []

    def work() -> None:
        try:
            ChatTemplate(LONG["loops"]).render(HELLO)
        except ModelError as error:
            errors.append(str(error))

    before, trace = threading.active_count(), sys.gettrace()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["the chat template failed at line 1: it may run for 0.1 s"] * 2
    assert (threading.active_count(), sys.gettrace()) == (before, trace)


def test_one_template_serves_several_threads() -> None:
    template = ChatTemplate(QWEN3)
    prompts: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            prompts[number] = template.render([{"role": "user", "content": f"{number}"}] * 20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert prompts[number] == template.render([{"role": "user", "content": f"{number}"}] * 20)


@pytest.mark.parametrize(
    "source", [*TEMPLATES.values(), "{{ messages.clear() }}", "{{ tools[0].function.pop('name') }}"]
)
def test_the_callers_data_stay_as_they_are(source: str) -> None:
    messages, tools, variables = copy.deepcopy([*CALLS]), copy.deepcopy(TOOLS), {"x": [1, {"y": 2}]}
    template = ChatTemplate(source, special_tokens=TOKENS)
    first: list[str] = []
    for _ in range(2):
        try:
            first.append(template.render(messages, tools=tools, variables=variables))
        except (ModelError, UserError) as error:
            first.append(str(error))
    assert (messages, tools, variables) == (CALLS, TOOLS, {"x": [1, {"y": 2}]})
    assert first[0] == first[1], "a render changed what the next one saw"


def test_special_tokens_are_copied() -> None:
    tokens = dict(TOKENS)
    template = ChatTemplate("{{ bos_token }}", special_tokens=tokens)
    tokens["bos_token"] = "other"
    assert template.render([]) == "<s>"


class Spy:
    def __str__(self) -> str:
        raise AssertionError("a template must not reach it")


class Text(str):
    def upper(self) -> str:
        raise AssertionError("a template must not reach it")


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{"content": "no role"}], r"messages\[0\] is \{'content': 'no role'"),
        ([{"role": 7, "content": ""}], r"messages\[0\] is \{'role': 7"),
        (["hello"], r"messages\[0\] is 'hello'"),
        ([{"role": "user", "content": Spy()}], r"messages\[0\].content is of type Spy"),
        ([{"role": "user", "content": [{"x": {1, 2}}]}], r"messages\[0\].content\[0\].x is of type set"),
        ([{"role": "user", "content": "x" * 5_000_000}], "too large.*shorten it"),
        ([{"role": "user", "content": ""}] * 60_000, "too large"),
    ],
)
def test_data_that_is_not_json_or_too_much_is_refused(messages: list[dict[str, object]], place: str) -> None:
    with pytest.raises(UserError, match=place):
        ChatTemplate(SMOLLM2).render(messages)


def test_cyclic_data_is_refused() -> None:
    cycle: dict[str, object] = {"role": "user"}
    cycle["content"] = cycle
    with pytest.raises(UserError, match="nested 64 deep"):
        ChatTemplate(SMOLLM2).render([cycle])


def test_a_subclass_of_str_is_text_only() -> None:
    assert ChatTemplate("{{ messages[0].content.upper() }}").render([{"role": "x", "content": Text("abc")}]) == "ABC"


def test_a_long_conversation_is_within_the_limits() -> None:
    messages: list[Message] = [{"role": ("user", "assistant")[at % 2], "content": "word " * 600} for at in range(601)]
    for source in (SMOLLM2, LLAMA3, QWEN3, MISTRAL):
        prompt = ChatTemplate(source, special_tokens=TOKENS).render(messages)
        assert prompt.count("word") == 600 * 601
