"""Write masks.json and masks_base16m.json: the targets of 5 formats, 4 templates, 5 shapes.

    python tests/golden/make_masks.py

Alpaca rows cannot hold tool messages and text rows have one shape; the last template refuses
system and tool turns, as Gemma's does. Each value is the decoded row with the trained part
between double brackets. Read the files before committing a change: they are the expected truth
of tests/data/test_chat.py, which also checks every value against `expected_targets`, written
without the code under test.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BASE_16M = FOLDER.parents[2] / "shared" / "models" / "base-16m"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + ' [/TOOL_RESULTS]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<start_of_turn>",
    "<end_of_turn>",
]

# shape: turns of (role, text); the same words stand in several turns on purpose
SHAPES = {
    "single": [("user", "Say hi."), ("assistant", "Hi, grüß dich 🙂!")],
    "multi-turn": [
        ("user", "Hi."),
        ("assistant", "Hi."),
        ("user", "assistant"),
        ("assistant", " Two\n\nlines, outer space \n"),
    ],
    "system": [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2")],
    "empty assistant": [("user", "Say nothing."), ("assistant", "")],
    "tool message": [
        ("user", "Weather?"),
        ("assistant", "I look it up."),
        ("tool", '{"sky": "blue"}'),
        ("assistant", "Blue sky."),
    ],
}


def byte_tokenizer():
    """A byte-level tokenizer of 256 bytes, two merges and the special tokens of TEMPLATES."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*symbols, "He", "ĠH"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("H", "e"), ("Ġ", "H")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def row(format, turns):
    """The turns as a row of a format, or None where the format cannot say them."""
    roles = [role for role, _ in turns]
    if format == "messages":
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    if format == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names.get(r, r), "value": t} for r, t in turns]}
    if format == "text":
        return {"text": turns[-1][1]} if len(turns) == 2 and turns[-1][1] else None
    if "tool" in roles and format == "alpaca":
        return None
    if "tool" in roles:  # prompt and completion as turns: only the completion is trained
        said = [{"role": role, "content": text} for role, text in turns]
        return {"prompt": said[:-1], "completion": said[-1:]}
    values = {"system": turns[0][1]} if roles[0] == "system" else {}
    talk = [text for role, text in turns if role != "system"]
    if talk[:-2]:
        values["history"] = [talk[i : i + 2] for i in range(0, len(talk) - 2, 2)]
    if format == "alpaca":
        return values | {"instruction": talk[-2], "input": "", "output": talk[-1]}
    return values | {"prompt": talk[-2], "completion": talk[-1]}


def cases():
    """Name, template, format, row and turns of every case."""
    for template in TEMPLATES:
        for format in ("messages", "sharegpt", "alpaca", "prompt-completion", "text"):
            for shape, turns in SHAPES.items():
                values = row(format, turns)
                if values is not None:
                    yield f"{template} / {format} / {shape}", template, format, values, turns


def expected_targets(template, format, turns, eos):
    """What must be trained of each turn, by the definition of the templates above."""
    answers = [text for role, text in turns if role == "assistant"]
    if format == "text":
        return [answers[0] + eos]
    if format == "prompt-completion" and "tool" in dict(turns):
        answers = answers[-1:]
    if template == "chatml":
        return [answer + ENDS["chatml"] for answer in answers]
    if template == "mistral":
        return [f"{answer.strip()} {eos}" for answer in answers]
    return [answer.strip() + ENDS[template] for answer in answers]


def tokenized(tokenizer, template, format, values):
    """The example that nibble makes of a row with a template."""
    from nibble.data.chat import tokenize
    from nibble.data.formats import row_to_conversation

    tokenizer.chat_template = TEMPLATES[template]
    conversation = row_to_conversation(values, format=format, path="golden", line=1)
    return tokenize(conversation, tokenizer)


def masks(tokenizer):
    """Case name to decoded row with its targets between double brackets."""
    from nibble.data.check import show

    return {
        name: show(tokenized(tokenizer, template, format, values), tokenizer).marked()
        for name, template, format, values, _ in cases()
    }


def main():
    from transformers import AutoTokenizer

    sys.path.insert(0, str(FOLDER.parents[1]))
    files = {"masks.json": byte_tokenizer()}
    if BASE_16M.is_dir():
        files["masks_base16m.json"] = AutoTokenizer.from_pretrained(BASE_16M)
    for name, tokenizer in files.items():
        text = json.dumps(masks(tokenizer), ensure_ascii=False, indent=1)
        (FOLDER / name).write_text(text + "\n", encoding="utf-8")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
