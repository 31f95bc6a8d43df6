"""Make the demo's base model: a tiny Llama, its tokenizer and chat template.

    python tools/make_demo_base.py [--out nibble/demo/base] [--seconds 660]

Trained from nothing, on one CPU thread, on two kinds of text:

1. prose that ships with Python: docstrings of the standard library, the help topics of
   pydoc, the licence, the Zen;
2. short dialogues that this script makes up: greetings, facts, looking things up, copying
   names and numbers. None of them is a letter to a shop, and none has the demo's answer
   format: what the demo teaches is not in here.

The second kind is what lets so small a model copy a number out of its context at all.
"""

import argparse
import ast
import codecs
import contextlib
import importlib
import io
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END_OF_TEXT, IM_END, PAD = 0, 2, 3
VOCAB_SIZE = 2048
ROW_TOKENS = 128
ROWS_PER_STEP = 16
PROSE_SHARE = 0.125
CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Nina",
    "Oscar",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tina",
    "Uma",
    "Victor",
    "Wendy",
    "Zoe",
    "Amir",
    "Bella",
    "Carlos",
    "Dina",
    "Elias",
    "Fatima",
    "Hugo",
    "Iris",
    "Jonas",
    "Kofi",
]
CITIES = [
    "Paris",
    "London",
    "Rome",
    "Berlin",
    "Madrid",
    "Oslo",
    "Vienna",
    "Lisbon",
    "Athens",
    "Dublin",
    "Prague",
    "Cairo",
    "Tokyo",
    "Lima",
    "Boston",
    "Chicago",
    "Delhi",
    "Sydney",
    "Nairobi",
    "Geneva",
    "Milan",
    "Warsaw",
    "Helsinki",
    "Toronto",
]
THINGS = [
    "mug",
    "lamp",
    "chair",
    "clock",
    "kettle",
    "jacket",
    "phone",
    "table",
    "camera",
    "radio",
    "guitar",
    "blanket",
    "mirror",
    "bottle",
    "basket",
    "pillow",
    "hammer",
    "ladder",
    "printer",
    "shirt",
    "watch",
    "bag",
    "book",
    "knife",
    "cup",
    "plate",
    "sofa",
    "rug",
    "fan",
    "tent",
    "bike",
    "drum",
    "scarf",
    "hat",
    "belt",
    "desk",
    "shelf",
    "vase",
    "bowl",
    "torch",
    "box",
    "key",
    "door",
    "car",
    "boat",
    "coin",
    "spoon",
    "fork",
    "pen",
    "letter",
    "map",
    "ball",
    "stone",
    "ring",
    "coat",
    "shoe",
    "glove",
    "wheel",
    "rope",
    "candle",
    "brush",
    "towel",
    "carpet",
    "window",
    "bed",
    "bench",
    "piano",
    "violin",
    "paper",
    "pencil",
    "ticket",
    "stamp",
    "picture",
    "garden",
    "house",
    "room",
    "bridge",
]
COLOURS = [
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "brown",
    "grey",
    "pink",
    "orange",
    "purple",
    "silver",
]
ANIMALS = [
    "cat",
    "dog",
    "horse",
    "cow",
    "bird",
    "fish",
    "mouse",
    "lion",
    "tiger",
    "bear",
    "wolf",
    "sheep",
    "goat",
    "duck",
    "frog",
]
FOODS = [
    "bread",
    "rice",
    "soup",
    "cheese",
    "apples",
    "tea",
    "coffee",
    "milk",
    "cake",
    "fish",
    "beans",
    "pasta",
    "honey",
    "salad",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
JOBS = [
    "doctor",
    "teacher",
    "baker",
    "farmer",
    "driver",
    "painter",
    "nurse",
    "cook",
    "writer",
    "singer",
    "builder",
]
OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("old", "new"), ("long", "short"), ("fast", "slow"),
    ("open", "closed"), ("early", "late"), ("full", "empty"), ("light", "dark"), ("up", "down"),
    ("wet", "dry"), ("rich", "poor"), ("first", "last"), ("right", "wrong"), ("good", "bad"),
)  # fmt: skip
FACTS = (
    ("What colour is the grass?", "The grass is green."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is snow?", "Snow is white."),
    ("How many days are in a week?", "A week has 7 days."),
    ("How many legs has a dog?", "A dog has 4 legs."),
    ("How many hours are in a day?", "A day has 24 hours."),
    ("What do bees make?", "Bees make honey."),
    ("Where do fish live?", "Fish live in water."),
    ("What is the opposite of yes?", "The opposite of yes is no."),
    ("Who are you?", "I am a small model. I can chat a little."),
    ("What can you do?", "I can chat, answer small questions and repeat what you say."),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Good night.", "Good night. Sleep well."),
    ("Thank you.", "You are welcome."),
    ("Thanks for your help.", "You are welcome."),
    ("Can you help?", "I will try to help. What is it about?"),
    ("Goodbye.", "Goodbye. See you soon."),
)
FIELDS: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    "name": (lambda rng: rng.choice(NAMES), ("I am {}", "my name is {}", "this is {} speaking")),
    "city": (
        lambda rng: rng.choice(CITIES),
        ("I live in {}", "I moved to {}", "I am waiting in {}", "I will arrive in {}"),
    ),
    "thing": (
        lambda rng: rng.choice(THINGS),
        ("I have a {}", "the {} is mine", "I got a {} from a friend", "I need the {}",
         "my {} is new", "I like the {}", "I opened the {}", "I paid for one {}"),
    ),
    "code": (lambda rng: _number(rng), ("the code is {}", "code {} is mine", "use code {}")),
    "number": (
        lambda rng: _number(rng),
        ("my number is {}", "the number {} is right", "number {} came up", "I saw {}"),
    ),
    "age": (lambda rng: str(rng.randint(5, 99)), ("I am {} years old", "my age is {}")),
    "day": (lambda rng: rng.choice(DAYS), ("I will come on {}", "it was on {}", "{} is fine")),
    "food": (lambda rng: rng.choice(FOODS), ("I like {}", "I want {}", "please bring {}")),
    "colour": (lambda rng: rng.choice(COLOURS), ("I like {}", "it is {}", "the colour is {}")),
    "job": (lambda rng: rng.choice(JOBS), ("I work as a {}", "I am a {}", "I met a {}")),
}  # fmt: skip
GROUPS = {
    "people": NAMES, "place": CITIES, "object": THINGS, "colour": COLOURS, "animal": ANIMALS,
    "food": FOODS, "time": DAYS, "work": JOBS,
}  # fmt: skip
STATEMENTS = (
    ("I lost my {t}.", "I am sorry about your {t}. Where did you see it last?"),
    ("I want to sell my {t}.", "Why do you want to sell your {t}?"),
    ("I want a new {t}.", "What is wrong with the old {t}?"),
    ("My {t} is {c}.", "A {c} {t} sounds nice."),
    ("I have a {c} {t}.", "So your {t} is {c}."),
    ("The {t} is in the {u}.", "So I will find the {t} in the {u}."),
    ("Please bring the {t}.", "I cannot carry a {t}. I can only chat."),
    ("Can you see the {t}?", "No, I cannot see the {t}."),
    ("I like my {t} and my {u}.", "Do you like the {t} more than the {u}?"),
    ("The {t} costs {n} coins.", "{n} coins for a {t} is a fair price."),
    ("I have {n} coins in the {t}.", "You have {n} coins."),
    ("There is a {t} on page {n}.", "I will look at page {n}."),
    ("{a} has a {t}.", "I hope {a} likes the {t}."),
    ("{a} gave {b} a {t}.", "So {b} has the {t} now."),
    ("{a} lives in {p}.", "{p} is a nice city for {a}."),
    ("{a} and {b} are here.", "Hello {a} and hello {b}."),
    ("Tell me about the {t}.", "I know little about the {t}."),
    ("When does {a} come to {p}?", "I do not know when {a} comes to {p}."),
)

Turns = list[tuple[str, str]]


def _number(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((2, 3, 4, 4, 5, 5, 5, 6))))


def repeat(rng: random.Random) -> Turns:
    """Say it again: a number, a word or a short list."""
    said = rng.choice((_number, _number, _words, lambda r: r.choice(THINGS) + " " + _number(r)))(
        rng
    )
    ask, answer = rng.choice(
        (
            ("Repeat: {}", "{}"),
            ("Say {} please.", "{}"),
            ("Say {} twice.", "{0} {0}"),
            ("Please write {}", "You wrote {}"),
            ("Copy this: {}", "copy: {}"),
            ("Is it {}?", "Yes, it is {}."),
        )
    )
    return [("user", ask.format(said)), ("assistant", answer.format(said))]


def _words(rng: random.Random) -> str:
    return " ".join(rng.choice(THINGS + COLOURS + NAMES) for _ in range(rng.randint(1, 5)))


def look_up(rng: random.Random) -> Turns:
    """Which value stands beside which key."""
    keys = rng.sample(rng.choice((THINGS, NAMES, COLOURS, ANIMALS)), rng.randint(2, 4))
    values = [rng.choice((_number, lambda r: r.choice(THINGS)))(rng) for _ in keys]
    form, mark = rng.choice((("{}: {}", "\n"), ("{} has {}", ", "), ("{} = {}", "; ")))
    table = mark.join(form.format(*pair) for pair in zip(keys, values, strict=True))
    i = rng.randrange(len(keys))
    ask, answer = rng.choice(
        (
            (f"What belongs to {keys[i]}?", f"{values[i]} belongs to {keys[i]}."),
            (f"What is with {keys[i]}?", values[i]),
            (f"Where is {values[i]}?", f"With {keys[i]}."),
            (f"Find {keys[i]}.", f"{keys[i]}: {values[i]}"),
        )
    )
    return [("user", f"{table}\n{ask}"), ("assistant", answer)]


def extract(rng: random.Random) -> Turns:
    """A few statements, then some of their values as lines `key: value`."""
    keys = rng.sample(sorted(FIELDS), rng.randint(2, 4))
    values = {key: FIELDS[key][0](rng) for key in keys}
    parts = [rng.choice(FIELDS[key][1]).format(values[key]) for key in keys]
    text = rng.choice((", ", " and ", ". ")).join(parts)
    wanted = rng.sample(keys, rng.randint(1, len(keys)))
    ask = rng.choice(("Give {}: ", "Write {}. ", "Find {} in this: ")).format(" and ".join(wanted))
    answer = "\n".join(f"{key}: {values[key]}" for key in wanted)
    return [("user", ask + text[0].upper() + text[1:] + "."), ("assistant", answer)]


def classify(rng: random.Random) -> Turns:
    """Which group a word belongs to, and the word again."""
    group = rng.choice(sorted(GROUPS))
    word = rng.choice(GROUPS[group])
    ask, answer = rng.choice(
        (
            (f"What is {word}?", f"{word} is of the kind {group}."),
            (f"Kind of {word}?", f"kind: {group}"),
            (f"Label this: {word}", f"kind: {group}\nword: {word}"),
            (f"Label this: I see {word} here.", f"kind: {group}\nword: {word}"),
        )
    )
    return [("user", ask), ("assistant", answer)]


def remember(rng: random.Random) -> Turns:
    """A name or a number said first and asked for later."""
    name, number, thing = rng.choice(NAMES), _number(rng), rng.choice(THINGS)
    turns = [
        ("user", rng.choice(("My name is {}.", "I am {}.", "Hello, {} here.")).format(name)),
        ("assistant", rng.choice(("Hello {}.", "Nice to meet you, {}.")).format(name)),
    ]
    if rng.random() < 0.5:
        said = f"The {thing} has the number {number}."
        turns += [("user", said), ("assistant", f"I will remember {number} for the {thing}.")]
        ask, answer = "What was the number?", f"It was {number}, for the {thing}."
    else:
        ask, answer = rng.choice(
            (("What is my name?", f"Your name is {name}."), ("Bye.", f"Bye {name}."))
        )
    return [*turns, ("user", ask), ("assistant", answer)]


def state(rng: random.Random) -> Turns:
    """A remark and a polite answer that takes up its words."""
    thing, other = rng.sample(THINGS, 2)
    one, two = rng.sample(NAMES, 2)
    words = {"t": thing, "u": other, "a": one, "b": two}
    words |= {"c": rng.choice(COLOURS), "n": _number(rng), "p": rng.choice(CITIES)}
    ask, answer = rng.choice(STATEMENTS)
    hello = rng.choice(("", "", "Hi, ", "Hello, ", "Good morning, "))
    ask = hello + (ask[0].lower() + ask[1:] if hello and ask[:2] not in ("I ", "{a") else ask)
    return [("user", ask.format(**words)), ("assistant", answer.format(**words))]


def know(rng: random.Random) -> Turns:
    """A small fact, a sum, an opposite, the day after."""
    low, high = rng.choice(OPPOSITES)
    a, b, day = rng.randint(0, 9), rng.randint(0, 9), rng.randrange(7)
    ask, answer = rng.choice(
        (
            *rng.sample(FACTS, 4),
            (f"What is {a} + {b}?", f"{a} + {b} = {a + b}"),
            (f"What is the opposite of {low}?", f"The opposite of {low} is {high}."),
            (f"What is the opposite of {high}?", f"The opposite of {high} is {low}."),
            (f"What comes after {DAYS[day]}?", f"After {DAYS[day]} comes {DAYS[(day + 1) % 7]}."),
        )
    )
    return [("user", ask), ("assistant", answer)]


def choose(rng: random.Random) -> Turns:
    """The first or last of a list, or how many it holds."""
    items = rng.sample(rng.choice((THINGS, NAMES, FOODS, CITIES)), rng.randint(2, 5))
    listed = ", ".join(items)
    ask, answer = rng.choice(
        (
            ("Which is first?", f"{items[0]} is first."),
            ("Which is last?", f"{items[-1]} is last."),
            ("How many?", str(len(items))),
            ("One a line.", "\n".join(items)),
        )
    )
    return [("user", f"{listed}. {ask}"), ("assistant", answer)]


DIALOGUES = (repeat, look_up, look_up, extract, extract, extract, classify, remember, state, state,
             know, choose)  # fmt: skip


def dialogue_text(rng: random.Random) -> str:
    """One dialogue in the chat format; one in five has a second exchange."""
    turns = rng.choice(DIALOGUES)(rng)
    if rng.random() < 0.2:
        turns = turns + rng.choice(DIALOGUES)(rng)
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def prose_texts() -> list[str]:
    """The prose that ships with this Python, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    texts = [codecs.decode(_quiet_import("this").s, "rot13")]
    texts += _quiet_import("pydoc_data.topics").topics.values()
    texts += [path.read_text("utf-8") for path in sorted(library.glob("LICENSE*"))]
    for path in sorted(library.rglob("*.py")):
        if not skipped & set(path.parts):
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):
                texts.append("\n\n".join(_docstrings(path.read_text("utf-8"))))
    return [text for text in texts if len(text) > 100]


def _quiet_import(name: str) -> object:
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name)


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class Rows:
    """Draws rows of ROW_TOKENS: pieces of prose, or dialogues laid end to end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prose: list[int], seed: int) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.prose = prose
        self.rng = random.Random(seed)

    def prose_row(self) -> list[int]:
        start = self.rng.randrange(len(self.prose) - ROW_TOKENS)
        return self.prose[start : start + ROW_TOKENS]

    def dialogue_row(self) -> list[int]:
        row: list[int] = []
        while len(row) < ROW_TOKENS:
            row += [*self.encode(dialogue_text(self.rng)), END_OF_TEXT]
        return row[:ROW_TOKENS]

    def batch(self) -> torch.Tensor:
        num_prose = round(ROWS_PER_STEP * PROSE_SHARE)
        rows = [self.prose_row() for _ in range(num_prose)]
        rows += [self.dialogue_row() for _ in range(ROWS_PER_STEP - num_prose)]
        return torch.tensor(rows)


def build_model() -> LlamaForCausalLM:
    """The architecture: 4 layers, width 192, 6 query heads over 2 key heads, tied head."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=IM_END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over rows (B, S)."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def fit(model: LlamaForCausalLM, rows: Rows, seconds: float) -> int:
    """Train until the time is over; the learning rate follows the clock. Returns the steps."""
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, step, share = time.monotonic(), 0, 0.0
    while share < 1.0:
        rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - share) / 0.5)
        loss = mean_loss(model, rows.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {share:.0%}", flush=True)
        share = (time.monotonic() - start) / seconds
    return step


def held_out_perplexity(model: LlamaForCausalLM, rows: list[torch.Tensor]) -> float:
    """Perplexity per token over batches that training did not see."""
    model.eval()
    with torch.no_grad():
        losses = [mean_loss(model, batch).item() for batch in rows]
    model.train()
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nibble/demo/base"))
    parser.add_argument("--seconds", type=float, default=660)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = prose_texts()
    rng = random.Random(0)
    tokenizer = train_tokenizer(texts + [dialogue_text(rng) for _ in range(20_000)])
    prose: list[int] = []
    for text in texts:
        prose += [*tokenizer.encode(text, add_special_tokens=False), END_OF_TEXT]
    num_held_out = len(prose) // 20
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(prose):,} tokens")
    steps = fit(model, Rows(tokenizer, prose[num_held_out:], seed=1), arguments.seconds)
    unseen = Rows(tokenizer, prose[:num_held_out], seed=2)
    rows = [torch.tensor([unseen.prose_row() for _ in range(8)]) for _ in range(8)]
    talks = [torch.tensor([unseen.dialogue_row() for _ in range(8)]) for _ in range(8)]
    print(f"{steps} steps; held-out perplexity: prose {held_out_perplexity(model, rows):.2f}")
    print(f"dialogues {held_out_perplexity(model, talks):.2f}")
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
