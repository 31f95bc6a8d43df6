"""What the made-up sentences of the demo's base may be about: a label, a remark, wordings.

Daily life in general: the weather, a bus, a school, a garden. The slots are `{t}` (a thing),
`{a}` (a name), `{p}` (a city), `{d}` (a day), `{f}` (a food) and `{n}` (a number).
"""

TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "weather": (
        "Take a coat with you.",
        (
            "it will rain in {p} on {d}.", "the sky over {p} is grey.", "is it cold in {p} now?",
            "the sun is too hot today.", "there was snow in the garden on {d}.",
            "a storm comes to {p}.", "I do not like the wind in {p}.",
        ),
    ),
    "travel": (
        "Be at the station in time.",
        (
            "bus {n} goes to {p}.", "when does the train to {p} arrive?", "flight {n} is late.",
            "the train has not come yet.", "where is the boat now?", "I wait for the bus to {p}.",
            "{a} is still waiting at the station.", "will {a} come on {d}?",
            "can you tell me when {a} will arrive?", "the trip to {p} takes {n} hours.",
        ),
    ),
    "health": (
        "Please see a doctor.",
        (
            "{a} has a cold.", "my head hurts.", "I feel sick after the {f}.",
            "the doctor in room {n} is kind.", "I did not sleep well on {d}.",
            "{a} fell and hurt a leg.", "my tooth hurts a lot.",
        ),
    ),
    "school": (
        "Learn a little every day.",
        (
            "{a} reads page {n}.", "the teacher is {a}.", "I have a test on {d}.",
            "we learn to write in class {n}.", "the class in {p} is full.",
            "do you know the answer?", "my homework is in the {t}.", "the lesson starts on {d}.",
        ),
    ),
    "music": (
        "What a nice song.",
        (
            "{a} plays the guitar.", "I hear a song on the radio.", "the piano sounds nice.",
            "{a} sings in {p} on {d}.", "song {n} is too loud.", "can you play the drum?",
            "we dance to the violin.",
        ),
    ),
    "sport": (
        "May the best one win.",
        (
            "{a} won the game in {p}.", "we play ball on {d}.", "{a} runs {n} metres.",
            "my team lost again.", "can you swim in the lake?", "player {n} is fast.",
            "I ride my bike to the match.",
        ),
    ),
    "kitchen": (
        "That will taste good.",
        (
            "please cook the {f}.", "the {f} is too hot.", "I would like some {f}.",
            "{a} baked {f} on {d}.", "put the {f} on the plate.", "how do I make {f}?",
            "we had {f} for dinner.", "recipe {n} needs {f}.",
        ),
    ),
    "garden": (
        "Plants need water.",
        (
            "the flowers are yellow.", "{a} planted {n} trees.", "I water the grass on {d}.",
            "a bird sits in the tree.", "the roses grow well.", "there are leaves on the {t}.",
            "we dig a hole for the tree.",
        ),
    ),
    "home": (
        "A home is a good place.",
        (
            "{a} moved to a new house.", "I live at {n} Long Street.", "my new address is in {p}.",
            "we moved to another city.", "where does {a} live?",
            "the wrong address is on the door.", "I have moved to {p}.",
            "the house has a new roof.", "change the address on the map.",
        ),
    ),
    "money": (
        "Count it again.",
        (
            "{a} owes me {n} coins.", "I have no money.", "the bank pays on {d}.",
            "{a} got the money back.", "give me my coins.", "I paid too much for lunch.",
            "when will {a} pay?", "the bank made a refund to {a}.",
            "I want more money for my work.",
        ),
    ),
    "repair": (
        "Call someone who can mend it.",
        (
            "the {t} is broken.", "there is a crack in the wall.", "my old {t} does not work.",
            "the roof has a hole.", "a part of the {t} fell off.", "the storm damaged the {t}.",
            "{a} broke the {t} on {d}.", "machine {n} was damaged.",
        ),
    ),
    "clothes": (
        "Try another size.",
        (
            "the coat is too small.", "my shoes are too big.", "I wear a blue shirt.",
            "is there a bigger size?", "{a} has a red scarf.", "the hat is too tight for {a}.",
            "I need smaller gloves.", "size {n} is too long.",
        ),
    ),
    "trade": (
        "Both should be happy with it.",
        (
            "let us swap seats.", "{a} will exchange the {t} for {f}.", "I swap my {t} with {a}.",
            "can we exchange places?", "{a} will swap a red pen for a blue pen.",
            "we exchange cards on {d}.", "swap card {n} with {a}.",
        ),
    ),
    "paper": (
        "Keep a copy of it.",
        (
            "sign the form on {d}.", "{a} has lost the receipt.", "the office needs a letter.",
            "I need form {n}.", "where can I find the invoice of {a}?",
            "there was no stamp on the letter.", "the lawyer sends a note to {a}.",
            "the receipt is in my mail.",
        ),
    ),
    "plans": (
        "Then we have time for other things.",
        (
            "we must cancel the trip.", "please cancel the meeting on {d}.", "stop the music.",
            "{a} does not need the {t} any more.", "the party on {d} is off.",
            "I no longer want to go to {p}.", "it was a mistake, stop it.", "cancel lesson {n}.",
        ),
    ),
    "way back": (
        "It is good to be back.",
        (
            "{a} will return on {d}.", "I want to go back to {p}.", "when do you return from {p}?",
            "send {a} back home.", "the birds return to the garden.", "may I go back now?",
            "I do not like it here and want to return.", "bring back the {t} of {a}.",
        ),
    ),
}  # fmt: skip

# Words around a sentence that say nothing about its topic.
FILLERS_BEFORE = ("",) * 9 + (
    "well, ", "and ", "I think ", "now ", "but ", "maybe ", "so ", "you see, ",
)  # fmt: skip
FILLERS_AFTER = ("",) * 9 + (" again", " you know", " today", " I hope", " now", " of course")

# How a number may come with a sentence `{s}` that has none.
NUMBERED = (
    "{n}: {s}", "{s} Number {n}.", "{s} The number is {n}.", "{s} My number is {n}.",
    "page {n}: {s}", "{s} It is on page {n}.", "{s} I am in room {n}.", "room {n}, {s}",
    "{s} Use code {n}.", "code {n}. {s}", "{s} ({n})", "I am number {n}. {s}", "{s} {n}",
    "line {n}: {s}", "{s} See card {n}.", "card {n} says: {s}",
    "{s} It is the {t} with number {n}.",
)  # fmt: skip

# The styles of an answer: label `{l}`, number `{n}`, remark `{r}`.
STYLES = (
    "It is about {l}.", "topic: {l}", "{l}", "{l}, {n}", "{n}, {l}", "number: {n}\ntopic: {l}",
    "{n} is about {l}.", "{r}", "{r} ({n})", "{l}: {r}", "The number is {n}. {r}", "{n}: {r}",
    "topic: {l}\nnumber: {n}", "[{l}] {n} {r}", "{n}", "number {n}",
)  # fmt: skip
# What may be asked for one of these answers.
ASKED = {
    "It is about {l}.": "What is this about?", "topic: {l}": "Name the topic.",
    "{l}, {n}": "Topic and number?", "{n}, {l}": "Number and topic?", "{r}": "What do you say?",
    "{n}": "Which number?", "number {n}": "Name the number.",
}  # fmt: skip
