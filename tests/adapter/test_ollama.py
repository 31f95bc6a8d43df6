"""Go templates that say what the chat template says, and Modelfiles."""

import re

import pytest

from nibble.adapter.ollama import find_wrapping, modelfile
from nibble.data.chat import render_prompt
from nibble.model.tokenizer import load_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(shared):
    return load_tokenizer(shared / "models" / "base-16m")


def _go(text, turns):
    """What Ollama makes of the template: only the actions that nibble writes."""
    head, _, rest = text.partition("{{ range .Messages }}")
    body, _, prompt = rest.partition("{{ end }}{{ end }}")
    around = dict(
        (role, (before, after))
        for role, before, after in re.findall(
            r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}'
            r"(.*?)(?=\{\{ else if|\Z)",
            body,
            re.DOTALL,
        )
    )
    parts = [around[t["role"]][0] + t["content"] + around[t["role"]][1] for t in turns]
    return head + "".join(parts) + prompt


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is 2 + 2?"},
]


@pytest.mark.parametrize("name", ["own", "llama3", "gemma", "plain"])
def test_go_template_gives_the_text_of_jinja(tokenizer, name):
    templates = {"own": tokenizer.chat_template, "llama3": LLAMA3, "gemma": GEMMA, "plain": None}
    tokenizer.chat_template = templates[name]
    wrapping = find_wrapping(tokenizer, adds_bos=False)
    text = modelfile(["FROM ./model.gguf"], tokenizer, wrapping, context_length=1024)
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    turns = TURNS if "system" in wrapping.around else TURNS[1:]
    assert ("system" in wrapping.around) == (name != "gemma")
    assert _go(template, turns) == render_prompt(turns, tokenizer)


def test_bos_of_the_tokenizer_is_left_out(tokenizer):
    tokenizer.chat_template = LLAMA3
    wrapping = find_wrapping(tokenizer, adds_bos=True)
    assert wrapping.start == ""
    assert wrapping.around["user"][0] == "<|start_header_id|>user<|end_header_id|>\n\n"


@pytest.mark.parametrize("source", [MISTRAL, QWEN_DEFAULT, "{% for m in messages %}x{% endfor %}"])
def test_no_template_where_it_cannot_be_right(tokenizer, source):
    tokenizer.chat_template = source
    assert find_wrapping(tokenizer, adds_bos=False) is None
    assert "TEMPLATE" not in modelfile(["FROM x"], tokenizer, None, context_length=8)


def test_modelfile_as_a_whole(tokenizer):
    wrapping = find_wrapping(tokenizer, adds_bos=False)
    lines = ["FROM base", "ADAPTER ./adapter.gguf"]
    assert modelfile(lines, tokenizer, wrapping, context_length=1024) == (
        "FROM base\n"
        "ADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER num_ctx 1024\n"
    )
