"""A tokenizer as llama.cpp keeps it, and back.

    read_vocabulary(tokenizer, size)    tokens, types, merges or scores, the name of the splitting
    build_tokenizer(vocabulary)         what llama.cpp makes of them, through the tokenizers library
    check_ids(vocabulary, tokenizer)    both give the same ids, or there is no file

    gpt2     bytes as letters; text is split by one of llama.cpp's patterns, then pairs are merged
    llama    characters, spaces as ▁, then the pair whose token has the highest score

llama.cpp knows the splitting by a name (tokenizer.ggml.pre). Here it follows from the patterns in
tokenizer.json, so a vocabulary that nobody has seen before gets the right one, or none.

Source:
    llama.cpp, release of llama-cpp-python 0.3.36: src/llama-vocab.cpp, the patterns of each name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from nibble.data.chat import chat_template_of, render_prompt
from nibble.data.template import PLAIN_TEMPLATE, TemplateError
from nibble.errors import UnavailableError

# Types of tokens, as llama.cpp numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
# Phi-3's tokens take the white space after them, these excepted; llama.cpp asks for all of them.
_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_TAIL}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (f"{_START}{_UPPER}*{_LOWER}+", f"{_START}{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{'|'.join(_WORDS)}|\p{{N}}|{_SIGNS}[\r\n/]*|{_TAIL}"
_GPT4O = "|".join(f"{words}{_CONTRACTIONS}?" for words in _WORDS)
_GPT4O += rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_TAIL}"
_GPT2 = "gpt2"
# Steps of the splitting, and whether whole words are taken before merges -> llama.cpp's name.
_PRE = {
    ((_GPT2,), False): "gpt-2",
    (("digit", _GPT2), False): "smollm",
    (("punctuation", _GPT2, "digits", "[0-9][0-9][0-9]"), False): "falcon",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
PROBE = (
    "I've said 3 times: 12,345.67 (no more)!\n\n\n\tDon't  stop...   def f(x):\r\n        return x"
    "  # 1000 2025\nПривет, мир. 東京タワー ñandú Ærø 🙂🚀 «quoted» — x'LL WE'RE end  "
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; the index of a token is its id.

    Args:
        model: "gpt2" or "llama".
        pre: llama.cpp's name of the splitting.
        scores: Of "llama": the token of highest score is merged first.
        merges: Of "gpt2": pairs with a space between, first to last.
        special: Ids by llama.cpp's name: bos, eos, unknown, padding, eot.
        takes_space: Whether special tokens take the white space after them, as Phi-3's do.
        template: Chat template in Jinja, as other programs can render it.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    takes_space: bool
    template: str


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """What llama.cpp needs of a fast tokenizer of transformers.

    Args:
        size: Rows of the embedding; ids without a token become unused ones.

    Raises:
        UnavailableError: If llama.cpp would read some texts otherwise, as far as this can tell.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _unknown(f"it is a {model['type']} model")
    tokens, types = _tokens(parts, size)
    is_llama = bool(model.get("byte_fallback")) or _escapes_spaces(parts)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if is_llama:
        _check_llama(parts)
        types = [BYTE if _is_byte(t) else kind for t, kind in zip(tokens, types, strict=True)]
        pre, scores = "default", _scores(tokens, types, merges)
    else:
        pre, scores = _pre_of(parts), []
    vocabulary = Vocabulary(
        model="llama" if is_llama else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=[] if is_llama else merges,
        special=_special_ids(tokenizer),
        adds_bos=adds_bos(tokenizer),
        adds_eos=_adds(tokenizer, first=False),
        adds_space=is_llama and _adds_space(parts),
        takes_space=_takes_space(parts["added_tokens"]),
        template=portable_template(tokenizer),
    )
    check_ids(vocabulary, tokenizer)
    return vocabulary


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer that cuts text as llama.cpp does, special tokens in it recognised."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    added = [
        AddedToken(
            token,
            special=kind == CONTROL,
            normalized=False,
            rstrip=vocabulary.takes_space and token not in _KEEP_SPACE,
        )
        for token, kind in kinds
        if kind in (CONTROL, USER_DEFINED)
    ]
    if vocabulary.model == "llama":
        pairs = list(_pairs_by_score(vocabulary))
        unknown = next((t for t, k in zip(ids, vocabulary.types, strict=True) if k == UNKNOWN), "")
        model = models.BPE(ids, pairs, byte_fallback=True, fuse_unk=True, unk_token=unknown or None)
        built = Tokenizer(model)
        prefix = [normalizers.Prepend(_SPACE)] if vocabulary.adds_space else []
        built.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    else:
        pairs = [(left, right) for left, _, right in (m.partition(" ") for m in vocabulary.merges)]
        steps, takes_words = next(key for key, name in _PRE.items() if name == vocabulary.pre)
        built = Tokenizer(models.BPE(ids, pairs, ignore_merges=takes_words))
        built.pre_tokenizer = pre_tokenizers.Sequence([*_steps(steps)])
    built.add_special_tokens([token for token in added if token.special])
    built.add_tokens([token for token in added if not token.special])
    return built


def check_ids(vocabulary: Vocabulary, tokenizer: Any, texts: Sequence[str] = ()) -> None:
    """Compare the ids of the chat template's text, of a text of many scripts, and of `texts`.

    Raises:
        UnavailableError: If llama.cpp would give others.
    """
    built = build_tokenizer(vocabulary)
    for text in (*_rendered(tokenizer), PROBE, *texts):
        ours = built.encode(text, add_special_tokens=False).ids
        theirs = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
            raise _unknown(f"llama.cpp cuts {text[:40]!r} otherwise, from token {at} on")


def portable_template(tokenizer: Any) -> str:
    """The chat template in Jinja that gives the trained text in other programs too."""
    template = chat_template_of(tokenizer)
    if template.source != PLAIN_TEMPLATE or template.variables.get("bos_token"):
        return template.source
    return template.source.replace("{{ bos_token }}", "")


def adds_bos(tokenizer: Any) -> bool:
    """Whether llama.cpp is to put BOS first: where the tokenizer and the chat template both do.

    llama.cpp takes away the BOS of a template where it adds one itself.
    """
    is_first = next(_rendered(tokenizer)).startswith(tokenizer.bos_token or "\0")
    return is_first and _adds(tokenizer, first=True)


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the special token that the template puts after an answer; None without one."""
    template = chat_template_of(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "@@"}]
    try:
        marker = template.end_marker(template.render(turns).rpartition("@@")[2]).strip()
    except TemplateError:
        return None
    number = tokenizer.convert_tokens_to_ids(marker) if marker else None
    return number if number in tokenizer.added_tokens_decoder else None


def _rendered(tokenizer: Any) -> Iterator[str]:
    """Prompts as the template makes them, of one turn and of three."""
    turns = [
        {"role": "user", "content": "What is 12 x 12?"},
        {"role": "assistant", "content": "144."},
        {"role": "user", "content": "  And\n\nthen? "},
    ]
    for count in (1, 3):
        yield render_prompt(turns[:count], tokenizer)


def _adds(tokenizer: Any, *, first: bool) -> bool:
    ids = tokenizer("a", verbose=False).input_ids
    number = tokenizer.bos_token_id if first else tokenizer.eos_token_id
    return bool(ids) and number is not None and ids[0 if first else -1] == number


def _tokens(parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    unknown = parts["model"].get("unk_token")
    named = [(number, token, NORMAL) for token, number in parts["model"]["vocab"].items()]
    named += [
        (token["id"], token["content"], CONTROL if token["special"] else USER_DEFINED)
        for token in parts["added_tokens"]
    ]
    for number, token, kind in named:
        if number >= size:
            raise _unknown(f"token {number} has no row in the embedding of {size:,}")
        if types[number] != UNUSED and tokens[number] != token:
            raise _unknown(f"{tokens[number]!r} and {token!r} are both token {number}")
        tokens[number] = token
        types[number] = UNKNOWN if token == unknown and kind != USER_DEFINED else kind
    return tokens, types


def _special_ids(tokenizer: Any) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": end_of_turn(tokenizer),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: int(number) for name, number in found.items() if number is not None}


def _pre_of(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of how text is split before pairs are merged."""
    normalizer = parts["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(f"it changes text by {normalizer['type']}")
    found: Any = parts["pre_tokenizer"] or {"type": "none"}
    whole = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    names = tuple(name for step in whole if (name := _step_name(step)))
    pre = _PRE.get((names, bool(parts["model"].get("ignore_merges"))))
    if pre is None:
        kinds = " and ".join(step["type"] for step in whole)
        raise _unknown(f"llama.cpp has no way of splitting text by {kinds} as it does")
    return pre


def _step_name(step: Mapping[str, Any]) -> str:
    """A step of the splitting in one word or pattern; empty where it splits nothing."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else ""
    if kind == "Digits":
        return "digit" if step["individual_digits"] else "digits"
    if kind == "Punctuation" and step["behavior"] == "Contiguous":
        return "punctuation"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "?")
    return "?"


def _steps(names: Sequence[str]) -> Iterator[Any]:
    for name in names:
        if name == _GPT2:
            yield pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        elif name in ("digit", "digits"):
            yield pre_tokenizers.Digits(individual_digits=name == "digit")
        elif name == "punctuation":
            yield pre_tokenizers.Punctuation("contiguous")
        else:
            yield pre_tokenizers.Split(Regex(name), "isolated")
    if _GPT2 not in names:
        yield pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _check_llama(parts: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's sentencepiece model does not do: it escapes spaces, no more."""
    steps: Any = parts["normalizer"] or {"type": "none"}
    steps = steps["normalizers"] if steps["type"] == "Sequence" else [steps]
    wrong = [s["type"] for s in steps if s["type"] not in ("Prepend", "Replace", "none")]
    split = (parts["pre_tokenizer"] or {"type": "none"})["type"]
    if wrong or split not in ("none", "Metaspace", "Split"):
        raise _unknown(f"it changes text by {(wrong or [split])[0]}")
    if "<0x0A>" not in parts["model"]["vocab"]:
        raise _unknown("it has no tokens for single bytes")


def _escapes_spaces(parts: Mapping[str, Any]) -> bool:
    return _SPACE in json.dumps(parts["normalizer"], ensure_ascii=False)


def _adds_space(parts: Mapping[str, Any]) -> bool:
    text = json.dumps([parts["normalizer"], parts["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text


def _takes_space(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the tokens take white space as llama.cpp has it for Phi-3, or none does."""
    names = {token["content"] for token in added}
    taking = {token["content"] for token in added if token["rstrip"]}
    if taking and (taking != names - _KEEP_SPACE or not {*_KEEP_SPACE, "</s>"} <= names):
        raise _unknown(f"{min(taking)} takes the white space after it")
    return bool(taking)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> list[float]:
    """A score per token: that of the first merge that makes it, -0, -1, -2 and so on.

    llama.cpp merges any two tokens that make a third, so every such pair has to be a merge.
    """
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault(merge.replace(" ", "", 1), len(order))
    known = set(merges)
    normal = {t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for token in normal:
        for left, right in _splits(token, normal):
            if f"{left} {right}" not in known:
                raise _unknown(f"it never merges {left!r} and {right!r}, which llama.cpp would")
    return [-float(order.get(token, 0)) for token in tokens]


def _pairs_by_score(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    kinds = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
    normal = {token: score for token, kind, score in kinds if kind == NORMAL}
    for token in sorted(normal, key=lambda token: -normal[token]):
        yield from _splits(token, normal)


def _splits(token: str, known: Any) -> Iterator[tuple[str, str]]:
    for at in range(1, len(token)):
        if token[:at] in known and token[at:] in known:
            yield token[:at], token[at:]


def _unknown(why: str) -> UnavailableError:
    return UnavailableError(
        f"llama.cpp would not read text as this tokenizer does: {why}",
        fix="serve the adapter by `nibble serve` or vLLM, or convert with llama.cpp's own scripts",
    )
