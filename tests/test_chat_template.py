"""Chat templates: against transformers' own rendering, and against templates that misbehave."""

from __future__ import annotations

import json
import time
from datetime import datetime

import pytest

from coordinator.chat_template import ChatTemplate
from coordinator.conversation import question
from sequoia.errors import InvalidArgument

HI = question("hi").messages
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "<|im_start|>{{ message.role }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RENDERED_ALIKE = (
    CHATML,
    "{%- if tools is not none %}tools{% endif -%}{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    {% generation %}{{ loop.index0 }}: {{ m.content }}{% endgeneration %}\n"
    "{% set ns.n = ns.n + 1 %}{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}{{ messages | tojson(indent=2) }}",
    "{% macro turn(m) %}[{{ m.role | upper }}] {{ m.content.split('<')[-1] }}{% endmacro %}\n"
    "{% for m in messages[1:] %}  {{ turn(m) }}\n  {% endfor %}{{ missing_token }}{{ strftime_now('<>') }}",
)


@pytest.mark.parametrize("source", RENDERED_ALIKE)
def test_rendering_equals_that_of_transformers(source: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    said = [("system", "be <b>kind</b> & 'brief'"), ("user", "  hi 世\n"), ("assistant", "a<b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in said]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=True,
        **tokens,
    )
    assert ChatTemplate(source, tokens).render(messages) == expected


def test_template_is_told_the_time() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2024, 7, 26))
    assert template.render(HI) == "26 Jul 2024"


BROKEN_TEMPLATES = {
    "reaches for the class": ("{{ ().__class__.__mro__ }}", "unsafe"),
    "reaches through a filter": ("{{ (messages | attr('__class__')).mro() }}", "unsafe"),
    "reaches through a format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "reaches for globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "changes the messages": ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "does not parse": ("{% for %}", "Expected"),
    "divides by zero": ("{{ 1 / 0 }}", "division"),
    "adds a number to a string": ("{{ messages[0].content + 1 }}", "str"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "takes a huge range": ("{% for i in range(10**9) %}{% endfor %}", "Range"),
    "loops in silence": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 0.1 s",
    ),
    "loops in a filter": ("{{ range(99999) | map('center', 9999) | map('length') | sum }}" * 9, "more than 0.1 s"),
    "writes without end": (f"{{% for i in range(99999) %}}{'x' * 100_000}{{% endfor %}}", "characters"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN_TEMPLATES.values(), ids=BROKEN_TEMPLATES)
def test_template_is_refused_when_it(source: str, reason: str) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidArgument, match=reason) as error:
        ChatTemplate(source, {}, max_seconds=0.1).render(HI)
    assert error.value.field == "chat"
    assert time.perf_counter() - started < 5


def test_tojson_writes_what_json_reads() -> None:
    rendered = ChatTemplate("{{ messages | tojson }}", {}).render(question("<世> \"quoted\" 'single'").messages)
    assert json.loads(rendered) == [{"role": "user", "content": "<世> \"quoted\" 'single'"}]
    assert "<世>" in rendered
