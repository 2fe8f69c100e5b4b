"""Chat templates that tell of tools, each in the manner of a family of models."""

from __future__ import annotations

from typing import Any

HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, a json object within <tool_call></tool_call>:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Arguments as text, an id and a name with every result, calls in another form.
NAMED = """{%- if tools is not none %}{{- '[TOOLS]' + (tools | tojson) }}{%- endif %}
{%- for m in messages %}
    {%- if m['tool_calls'] is defined %}
        {%- if m['content'] is none %}{{- '[NOTHING]' }}{%- endif %}
        {%- for c in m['tool_calls'] %}
            {%- if c['id'] | length != 9 %}{{- raise_exception('ids have nine letters') }}{%- endif %}
            {{- '[CALL ' + c['id'] + ']' + c['function']['name'] + ' ' + c['function']['arguments'] }}
        {%- endfor %}
    {%- elif m['role'] == 'tool' %}{{- '[RESULT ' + m['tool_call_id'] + ' ' + m['name'] + ']' + m['content'] }}
    {%- else %}{{- '[' + m['role'] + ']' + m['content'] }}
    {%- endif %}
{%- endfor %}"""

# The calls of Qwen3-Coder stand in the same marks, and are no JSON.
XML = """{% if tools %}{{ tools | tojson }}
<tool_call>\n<function=example_function>\n<parameter=name>arguments</parameter>\n</function>\n</tool_call>{% endif %}
{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls %}
<tool_call>\n<function={{ c.function.name }}>
{% for key, value in c.function.arguments.items() %}<parameter={{ key }}>{{ value }}</parameter>{% endfor %}</function>
{% endfor %}{% endfor %}"""

# Says "tools", and tells none.
DEAF = (
    "{% set tools = [] %}{# tools #}{% for m in messages %}{% if m.role != 'tool' %}[{{ m.role }}] {{ m.content }} "
    "the tools{% endif %}{% endfor %}"
)

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place; <b>now</b>.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}, "unit": {"enum": ["C", "F"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
            "$defs": {"Place": {"type": "string", "maxLength": 8}},
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set-clock",
        "parameters": {
            "type": "object",
            "properties": {"at": {"$ref": "#/$defs/Place"}},
            "required": ["at"],
            "additionalProperties": False,
            "$defs": {
                "Place": {
                    "type": "object",
                    "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}},
                    "required": ["hour"],
                    "additionalProperties": False,
                }
            },
        },
    },
}
TOOLS = [WEATHER, CLOCK]


def call(name: str, arguments: Any, call_id: str = "abcdef123") -> dict[str, Any]:
    """As an assistant's message has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
