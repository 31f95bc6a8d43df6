"""Templates render as transformers renders them, and cannot harm."""

import copy
import resource
import time

import pytest

from nibble.data.template import PLAIN_TEMPLATE, TemplateError, render

TURNS = [{"role": "user", "content": "<b> é"}, {"role": "assistant", "content": "Yes"}]


def text_of(source, **variables):
    return render(source, TURNS, variables=variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n    {% if loop.first %}\n{{ m.content }}\n  {% endif %}\n"
        "{% endfor %}\n",
        "{%- for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m }}"
        "{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% break %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}",
        "{% macro f(x) %}[{{ x ~ '!' ~ 3 }}]{% endmacro %}{{ f(messages[0].content) }}",
        "{{ messages[0]['content'].split(' ')[-1].strip().upper() }}{{ messages | length }}",
        "{{ '%05d|%s' % (42, 'x') }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ 2 ** 10 }}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{{ missing }}|{{ messages[0].missing is defined }}|{{ 'x' | indent(4, first=True) }}",
        "{% set a %}{{ messages[0].role }}{% endset %}{{ a | trim | capitalize }}",
        "{{ '{} {:>4} {x!r}'.format(113542617735902, 'a', x=1) }}",
        "{{ '**%s** in %d' % ('a', 113542617735902) }}{{ [1, (2, 3), {'a': 4}] | tojson }}",
        "{% set a, b = (1, 2) %}{{ a }}{{ b }}{{ ['a', 'b'] | join('-') }}{{ 'a-b'.split('-') }}",
        "{{ 'a\\nb' | indent(2) }}{{ messages | map(attribute='role') | list | join }}",
        "{{ 113542617735902 | string }}{{ 113542617735902 | tojson }}",
    ],
)
def test_equals_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template([TURNS], chat_template=source)
    assert text_of(source) == expected[0]


def test_date_is_fixed():
    assert text_of("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


def test_plain_template():
    turns = [{"role": "system", "content": "S"}, *TURNS]
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert render(PLAIN_TEMPLATE, turns, variables=variables) == (
        "<s>### System:\nS\n\n### User:\n<b> é\n\n### Assistant:\nYes</s>\n\n### Assistant:\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages | indent }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ ''['__cl' ~ 'ass__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ ['__class__'] | map('attr', 'x') | list }}{{ dict.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ environment.filters }}{{ self._TemplateReference__context }}",
        "{{ '%(x)s' | format(x=messages.__class__) }}",
        "{{ (messages | first).pop('role') }}{{ messages.sort() }}",
        "{{ joiner.__call__.__globals__ }}{{ range.__class__ }}",
        "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
        "{% extends '/etc/passwd' %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_sandbox_holds(source):
    before = copy.deepcopy(TURNS)
    try:
        text = text_of(source)
    except TemplateError:
        text = ""
    assert "root:" not in text
    assert "<class" not in text
    assert "module" not in text
    assert before == TURNS


# Each makes gigabytes or takes minutes in one step of the sandbox of jinja2.
BOMBS_OF_BIG = (
    "{{ big.replace('a', big) }}",
    "{{ big | replace('a', big) }}",
    "{{ big.join(b * 1000) }}",
    "{{ (b * 1000) | join(big) }}",
    "{{ ([big] * 1000) }}",
    "{{ ([big] * 1000) | join }}",
    "{{ ([big] * 1000) | tojson }}",
    "{{ " + " ~ ".join(["big"] * 1000) + " }}",
    "{{ ('%s' * 1000) % ((big,) * 1000) }}",
    "{{ ('{0}' * 1000).format(big) }}",
    "{{ ('\\n' * 1000000) | indent(100000) }}",
    "{{ ('\\t' * 1000000).expandtabs(100000) }}",
    "{{ 'aaaa'.translate({97: big}) }}",
    "{% set x %}" + "{{ big }}" * 1000 + "{% endset %}",
    "{{ ('<!---->' * 2000000) | striptags }}",
    "".join(f"{{% set a{i} = big ~ {i} %}}" for i in range(300)),
    "{{ ('a b ' * 4000000) | title }}",
)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=1000000000) }}",
        "{{ 9 ** 999999999 }}",
        "{{ range(10000000000) | list }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        *(f"{{% set big = 'ab' * 4000000 %}}{{% set b = ['x'] %}}{bomb}" for bomb in BOMBS_OF_BIG),
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ 'a'.encode().ljust(1000000000) }}",
        "{{ lipsum(n=1000000) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ strftime_now('%1000000000Y') }}",
        "{% set n = namespace(x=[]) %}{% for i in range(64) %}"
        "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
        "{% set n.x = n.x + ['a' * 9000000 ~ i] %}{% endfor %}",
        "{% set n = namespace(x=[0]) %}{% for i in range(99) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ ([[1]] * 100000) | sum(start=[]) }}",
    ],
)
def test_caps_stop_bombs(source, monkeypatch):
    monkeypatch.setattr("nibble.data.template.MAX_RENDER_S", 0.3)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError):
        text_of(source)
    assert time.monotonic() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_generation_marks():
    source = "a{% generation %}b{% endgeneration %}c"
    assert text_of(source) == "abc"
    assert text_of(source, generation_marks="<>") == "a<b>c"
