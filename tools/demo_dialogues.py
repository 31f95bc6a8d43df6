"""The dialogues that the demo's base learns from: short, made up, drawn from a seeded generator.

Greetings, facts, looking things up, copying names and numbers, telling what a sentence is
about. None is a letter to a shop.
"""

import random
from collections.abc import Callable

from demo_topics import ASKED, FILLERS_AFTER, FILLERS_BEFORE, NUMBERED, STYLES, TOPICS

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Karen",
    "Leo", "Maria", "Nina", "Oscar", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor",
    "Wendy", "Zoe", "Amir", "Bella", "Carlos", "Dina", "Elias", "Fatima", "Hugo", "Iris",
    "Jonas", "Kofi",
]  # fmt: skip
CITIES = [
    "Paris", "London", "Rome", "Berlin", "Madrid", "Oslo", "Vienna", "Lisbon", "Athens",
    "Dublin", "Prague", "Cairo", "Tokyo", "Lima", "Boston", "Chicago", "Delhi", "Sydney",
    "Nairobi", "Geneva", "Milan", "Warsaw", "Helsinki", "Toronto",
]  # fmt: skip
THINGS = [
    "mug", "lamp", "chair", "clock", "kettle", "jacket", "phone", "table", "camera", "radio",
    "guitar", "blanket", "mirror", "bottle", "basket", "pillow", "hammer", "ladder", "printer",
    "shirt", "watch", "bag", "book", "knife", "cup", "plate", "sofa", "rug", "fan", "tent",
    "bike", "drum", "scarf", "hat", "belt", "desk", "shelf", "vase", "bowl", "torch", "box",
    "key", "door", "car", "boat", "coin", "spoon", "fork", "pen", "letter", "map", "ball",
    "stone", "ring", "coat", "shoe", "glove", "wheel", "rope", "candle", "brush", "towel",
    "carpet", "window", "bed", "bench", "piano", "violin", "paper", "pencil", "ticket", "stamp",
    "picture", "garden", "house", "room", "bridge",
]  # fmt: skip
COLOURS = [
    "red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "orange",
    "purple", "silver",
]  # fmt: skip
ANIMALS = [
    "cat", "dog", "horse", "cow", "bird", "fish", "mouse", "lion", "tiger", "bear", "wolf",
    "sheep", "goat", "duck", "frog",
]  # fmt: skip
FOODS = [
    "bread", "rice", "soup", "cheese", "apples", "tea", "coffee", "milk", "cake", "fish",
    "beans", "pasta", "honey", "salad",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
JOBS = [
    "doctor", "teacher", "baker", "farmer", "driver", "painter", "nurse", "cook", "writer",
    "singer", "builder",
]  # fmt: skip
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
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((2, 3, 4, 4, 5, 5, 5, 5, 6))))


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


def find(rng: random.Random) -> Turns:
    """A number among words in no order, asked for alone or with the word beside it."""
    words = [rng.choice(THINGS + COLOURS + NAMES + FOODS + DAYS) for _ in range(rng.randint(1, 8))]
    number, place = _number(rng), rng.randrange(len(words) + 1)
    beside = words[max(0, place - 1)]
    text = " ".join([*words[:place], number, *words[place:]])
    ask, answer = rng.choice(
        (
            ("Which number is in it?", number),
            ("Number?", f"number: {number}"),
            ("Find the number.", f"It is {number}."),
            ("Give number and word.", f"{number} {beside}"),
            ("Give word and number.", f"word: {beside}\nnumber: {number}"),
        )
    )
    asked = rng.choice((f"{text}. {ask}", f"{ask} {text}", f"{ask}\n{text}"))
    return [("user", asked), ("assistant", answer)]


def _filled(rng: random.Random, sentence: str) -> str:
    """The sentence, now and then with a word before or after it that changes nothing."""
    before, after = rng.choice(FILLERS_BEFORE), rng.choice(FILLERS_AFTER)
    return f"{before}{sentence[:-1]}{after}{sentence[-1]}"


def _about(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence about some topic with one number in it, and what its answer may name."""
    label = rng.choice(sorted(TOPICS))
    remark, wordings = TOPICS[label]
    sentence = " ".join(_filled(rng, text) for text in rng.sample(wordings, rng.choice((1, 1, 2))))
    if "{n}" not in sentence:
        sentence = rng.choice(NUMBERED).replace("{s}", sentence)
    words = {"t": rng.choice(THINGS), "a": rng.choice(NAMES), "p": rng.choice(CITIES)}
    words |= {"d": rng.choice(DAYS), "f": rng.choice(FOODS), "n": _number(rng)}
    text = sentence.format(**words)
    hello = rng.choice(("", "", "", "Hi, ", "Hello, ", "Good morning, ", "Dear {}, "))
    if not hello:
        text = text[0].upper() + text[1:]
    text = hello.format(rng.choice(NAMES)) + text
    return text + rng.choice(("", "", "", " Thanks.", " Thank you.", " Bye.")), {
        "l": label,
        "r": remark,
        "n": words["n"],
    }


def tell_topic(rng: random.Random) -> Turns:
    """What a sentence is about, its number or a remark on it, as asked."""
    text, words = _about(rng)
    style, ask = rng.choice(sorted(ASKED.items()))
    asked = rng.choice((f"{ask} {text}", f"{text} {ask}", f"{ask}\n{text}"))
    return [("user", asked), ("assistant", style.format(**words))]


def go_on(rng: random.Random) -> Turns:
    """Sentences that nobody explains, all answered in the same style."""
    style = rng.choice(STYLES)
    turns = []
    for _ in range(rng.randint(1, 4)):
        text, words = _about(rng)
        turns += [("user", text), ("assistant", style.format(**words))]
    return turns


DIALOGUES = (repeat, look_up, extract, extract, classify, remember, state, know, choose, find, find,
             tell_topic, tell_topic, go_on, go_on, go_on)  # fmt: skip


def dialogue(rng: random.Random) -> Turns:
    """One dialogue; one in five goes on with another."""
    turns = rng.choice(DIALOGUES)(rng)
    return turns + rng.choice(DIALOGUES)(rng) if rng.random() < 0.2 else turns


def turn_text(role: str, content: str) -> str:
    """A turn in the chat format."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"
