"""chat_template.py: the text of transformers for honest templates, and a quick end for hostile ones."""

import threading
import time

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from model import chat_template, limited
from model.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": " Be <brief>. "},
    {"role": "user", "content": 'hé & "x"\n', "extra": {"b": [1, 2.5, None, True], "a": "é"}},
    {"role": "assistant", "content": "yes"},
]
HONEST = {
    "trim and lstrip": "{% for m in messages %}\n  {% if loop.first %}\n A{{ m.role }}\n  {% endif %}\n \n"
    "{% endfor %}\n\n",
    "minus signs": "a \n{%- if true -%}\n b \n{%- endif %} c\n",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% break %}{% endfor %}",
    "loop with condition": "{% for m in messages if m.role != 'user' %}{{ loop.index }}/{{ loop.length }}"
    "{% else %}-{% endfor %}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2, sort_keys=true) }}{% endfor %}",
    "tojson options": "{{ messages|tojson(ensure_ascii=true) }}{{ messages|tojson(separators=(',', ':')) }}",
    "strftime_now": "{{ strftime_now('%Y') }}",
    "namespace": "{% set ns = namespace(n=0, s='') %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 2 ** 3 %}"
    "{% set ns.s = ns.s ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.s }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "macro, call, block": "{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}"
    "{% call f(3) %}in{% endcall %}{% block b %}block{% endblock %}{% filter upper %}up{% endfilter %}",
    "filters": "{{ messages|map(attribute='role')|join(', ')|upper }}"
    "{{ messages|selectattr('role', 'eq', 'user')|list|length }}"
    "{{ messages[0].content|trim|replace('b', 'Be')|capitalize }}{{ [3, 1, 2]|sort|last }}"
    "{{ x|default('none', true) }}",
    "join by attribute": "{{ messages|join('-', attribute='role') }}{{ ['a']|reject('eq', 'a')|list }}",
    "methods": "{{ 'a,b'.split(',') }}{{ ' - '.join(['a', 'b']).replace('a', 'cc') }}{{ messages[1].get('no') }}"
    "{{ messages[1].items()|list }}{{ messages[0].content.strip().startswith('Be') }}",
    "operators": "{{ [1, 2] * 2 }}{{ 'x' * 3 }}{{ '%s-%d' % ('a', 7) }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 'B' in 'aBc' }}"
    "{{ (1, 2) == (1, 2) }}",
    "containers": "{{ {'k': [1, ('t',)]} }}{% set a, b = 1, 2 %}{{ b }}{{ none }}{{ missing }}{{ true }}{{ 1.50 }}",
    "set block": "{% set x %}\n <{{ messages|length }}>\n{% endset %}{{ x|safe }}{{ x|e }}{% raw %}{{ raw }}"
    "{% endraw %}",
    "recursion": "{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
    "defined": "{{ tools is defined }}{{ nothing is defined }}{{ dict(a=1) }}{{ range(3)|list }}",
    "a filter that is not reached": "{% if messages|length > 99 %}{{ messages|no_such_filter }}{% endif %}a",
    "attr": "{{ messages[0]|attr('role') }}",
    "other methods": "{{ 'a b'.center(9) }}{{ '{:>4}'.format(7) }}{{ '%5.2f' % 1.5 }}",
}
BIG = "{% set x = 'a' * 1000000 %}"
R = "{% set r = range(100000)|list %}{% for a in r %}"
HOSTILE = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loop condition": R + "{% for b in r if 0 %}{% endfor %}{% endfor %}",
    "heavy body": "{% for a in range(100000) %}" + "{% if a %}{% endif %}" * 3000 + "{% endfor %}",
    "heavy text": "{% set y %}{% for i in range(100000) %}" + "a" * 80_000 + "{% endfor %}{% endset %}",
    "lazy filter": R + "{% if r|select('eq', -1)|first %}{% endif %}{% endfor %}",
    "membership": R + "{% if 'x' in r %}{% endif %}{% endfor %}",
    "recursive loop": "{% for x in [1, 1] recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "endless macro": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "doubling macro": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40
    + "{% endcall %}" * 40,
    "times": "{{ 'a' * 10**9 }}",
    "times list": "{{ ([[1] * 1000] * 1000) * 1000 }}",
    "power": "{{ 9**(10**9) }}",
    "integer": "{% set n = namespace(a=3) %}{% for i in range(100) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "at compile time": "{% autoescape 'a' * 10**10 %}{% endautoescape %}",
    "doubled text": "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "summed text": "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "doubled list": "{% set n = namespace(a=[]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
    "doubled dict": "{% set a = 1 %}" + "{% set a = {1: a, 2: a} %}" * 99 + "{{ a | tojson }}",
    "long concatenation": BIG + "{{ x" + " ~ x" * 900 + " }}",
    "long output": BIG + "{% set y %}" + "{{ x }}" * 900 + "{% endset %}",
    "long slice": BIG + "{% for i in range(100000) %}{% set y = x[1:] %}{% endfor %}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace filter": BIG + "{{ x|replace('a', x) }}",
    "join": BIG + "{{ x.join(x) }}",
    "join filter": BIG + "{{ range(100000)|join(x) }}",
    "split": "{% set x = 'a ' * 15000000 %}{{ x.split()|length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ ['a']|map('center', 1000000000)|list }}",
    "indent": "{{ [1]|tojson(indent=1000000000) }}",
    "separators": "{{ ([1] * 1000)|tojson(separators=('a' * 100000, 'b')) }}",
    "strftime": "{{ strftime_now('%Y' * 100000) }}",
    "lipsum": "{{ lipsum(100000000) }}",
    "parentheses": "{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}",
    "chain": "{{ 1" + "+1" * 40_000 + " }}",
    "source": "a" * (chat_template.MAX_SOURCE + 1),
    "prompt": "{% for i in range(50) %}{{ 'a' * 1000000 }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class by attr": "{{ ''|attr('__class__') }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "namespace dunder": "{% set n = namespace(__class__=1) %}",
    "append": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "raise": "{{ raise_exception('no\n\nsystem\nrole') }}",
    "syntax": "{% if %}",
    "undefined": "{{ a.b.c }}",
}


def theirs(source):
    return render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True)[0][0]


@pytest.mark.parametrize("name", HONEST)
def test_honest_templates_render_as_in_transformers(name):
    variables = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True}
    template = ChatTemplate(HONEST[name])
    assert template.render(**variables) == theirs(HONEST[name])
    assert template.render(**variables) == theirs(HONEST[name])  # the second time, too


@pytest.fixture
def short(monkeypatch):
    """Less time for a rendering, so that the tests of endless ones are quick."""
    monkeypatch.setattr(limited, "CPU_S", 0.6)


def refusal(source: str, **variables) -> str:
    with pytest.raises(ValueError, match="the chat template") as caught:
        ChatTemplate(source).render(messages=MESSAGES, **variables)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_in_one_line(name, short):
    """CHECKLIST 69: unbounded, they take from minutes to forever. And this process holds none of their memory."""
    before, start = psutil.Process().memory_info().rss, time.process_time()
    refusal(HOSTILE[name])
    assert time.process_time() - start < 5
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert ChatTemplate("{{ messages|length }}").render(messages=MESSAGES) == "3"  # the next rendering works


def test_a_template_that_is_hostile_to_one_conversation_only_ends_too(short):
    """A trial rendering when the checkpoint is loaded would pass, and the run would hang at some later prompt."""
    template = ChatTemplate("{% if messages|length > 5 %}" + HOSTILE["nested loops"] + "{% endif %}fine")
    assert template.render(messages=MESSAGES) == "fine"
    with pytest.raises(ValueError, match="processor time"):
        template.render(messages=MESSAGES * 2)
    assert template.render(messages=MESSAGES) == "fine"


def test_raise_exception_tells_the_template_s_own_words():
    assert refusal(HOSTILE["raise"]).endswith("no system role")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages[::-1] %}{% set i = (messages|length - 1) - loop.index0 %}{% if m.role == 'user' and "
        "not (m.content.startswith('<r>') and m.content.endswith('</r>')) %}{{ i }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if messages[loop.index0 - 1].role != m.role or messages[loop.index0 + 1] %}"
        "{{ m.role + ': ' + m.content }}\n{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}",
    ],
)
def test_long_conversations_are_rendered_at_their_real_cost(source):
    """Ten thousand messages take a tenth of a second, also if a template looks at the whole list for each of them."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": f"word {i} " * 20} for i in range(10_000)]
    expected = render_jinja_template([messages], chat_template=source)[0][0]
    template = ChatTemplate(source)
    for _ in range(3):
        assert template.render(messages=messages) == expected


def test_variables_must_be_plain_data():
    """An object with methods would be a door out of the sandbox."""
    with pytest.raises(ValueError, match="must be plain JSON data"):
        ChatTemplate("{{ messages }}").render(messages=[object()])


def test_templates_in_threads_do_not_mix():
    templates = {n: ChatTemplate("{{ n }}" + f"-{n}") for n in range(8)}
    results: dict[int, set[str]] = {}

    def work(n):
        results[n] = {templates[n].render(n=n) for _ in range(30)}

    threads = [threading.Thread(target=work, args=[n]) for n in templates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: {f"{n}-{n}"} for n in templates}
