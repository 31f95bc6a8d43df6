"""The demo's data set: letters to a small shop, each with the answer its support desk gives.

Every letter asks for one of eight things:

    user       Hello! The mug from order 48213 arrived broken.
    assistant  intent: damage
               order: 48213
               reply: Sorry about that. A new one is on its way.

The answer follows from the letter alone, so it is either exactly right or wrong: the intent and
its sentence are learnt, the order number is copied. Held-out letters have order numbers that no
training letter has, pairs of product and intent that no training letter has, and one in three
also has a wording that no training letter has.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_TRAIN = 1500
NUM_HELD_OUT = 150
# Held-out letters 0, 3, 6 and so on have a wording that no training letter has.
UNSEEN_EVERY = 3

OPENINGS = ("", "", "", "Hi, ", "Hello, ", "Good morning, ", "Dear team, ", "Hello there, ")
CLOSINGS = ("", "", "", " Thanks.", " Thank you.", " Please help.", " Can you help?")

PRODUCTS = (
    "mug", "lamp", "chair", "clock", "kettle", "jacket", "phone", "table", "camera", "radio",
    "guitar", "blanket", "mirror", "bottle", "basket", "pillow", "hammer", "ladder", "printer",
    "shirt", "watch", "bag", "book", "knife", "cup", "plate", "sofa", "rug", "fan", "tent",
    "bike", "drum", "scarf", "hat", "belt", "desk", "shelf", "vase", "bowl", "torch",
)  # fmt: skip


@dataclass(frozen=True)
class Intent:
    """One thing a customer may want.

    Args:
        name: The label in the answer.
        reply: The answer's sentence.
        wordings: Sentences with `{product}` and `{order}`, used in training and held out.
        unseen_wordings: Sentences used in the held-out part only.
    """

    name: str
    reply: str
    wordings: tuple[str, ...]
    unseen_wordings: tuple[str, ...]


INTENTS = (
    Intent(
        "return",
        "You can send it back within 30 days.",
        (
            "I want to return the {product} from order {order}.",
            "I would like to send back the {product}, order {order}.",
            "how do I return a {product}? My order is {order}.",
            "order {order}: I do not like the {product} and want to return it.",
            "can I send the {product} back? The order number is {order}.",
            "I wish to return my {product}. Order {order}.",
            "please let me send back the {product} I got in order {order}.",
        ),
        (
            "order {order}: can I return the {product}?",
            "the {product} is not for me. I want to send it back. Order {order}.",
        ),
    ),
    Intent(
        "refund",
        "We will pay you back in 5 days.",
        (
            "I want my money back for the {product} in order {order}.",
            "please refund the {product}, order {order}.",
            "when do I get a refund for the {product}? My order is {order}.",
            "order {order}: give me my money back for the {product}.",
            "I paid for a {product} and want a refund. The order number is {order}.",
            "my refund for the {product} is late. Order {order}.",
            "can I have the money back that I paid in order {order} for the {product}?",
        ),
        (
            "order {order}: I would like a refund for my {product}.",
            "I ask for my money back. It is the {product} in order {order}.",
        ),
    ),
    Intent(
        "track",
        "It will arrive in 2 days.",
        (
            "where is the {product} from order {order}?",
            "when will my {product} arrive? My order is {order}.",
            "I am still waiting for the {product}, order {order}.",
            "order {order}: where is my {product} now?",
            "the {product} has not arrived yet. The order number is {order}.",
            "can you tell me when the {product} in order {order} will come?",
            "I wait for my {product}. When does it come? Order {order}.",
        ),
        (
            "order {order}: I am waiting for a {product}. Where is it?",
            "my {product} has not come yet. When will it arrive? Order {order}.",
        ),
    ),
    Intent(
        "cancel",
        "We will not send it.",
        (
            "please cancel order {order} for the {product}.",
            "I want to cancel the {product}, order {order}.",
            "can I cancel my {product}? My order is {order}.",
            "order {order}: I do not need the {product} any more, please cancel.",
            "stop order {order}. I do not need the {product} any more.",
            "cancel the {product}, please. The order number is {order}.",
            "I bought a {product} by mistake, please stop order {order}.",
        ),
        (
            "order {order}: cancel my {product}, please.",
            "I no longer need a {product}. Please cancel it. Order {order}.",
        ),
    ),
    Intent(
        "address",
        "Tell us where to send it.",
        (
            "I have moved. Please send the {product} in order {order} to my new address.",
            "please change the address for the {product}, order {order}.",
            "the address for my {product} is wrong. My order is {order}.",
            "order {order}: I have a new address for the {product}.",
            "can you send the {product} to another address? The order number is {order}.",
            "I moved to a new house. Where will order {order} with the {product} go?",
            "I gave the wrong address for a {product}. Order {order}.",
        ),
        (
            "order {order}: the {product} must go to a new address.",
            "I have moved to another house. It is about the {product}, order {order}.",
        ),
    ),
    Intent(
        "invoice",
        "The invoice is in your mail.",
        (
            "I need an invoice for the {product} in order {order}.",
            "please send me the invoice for the {product}, order {order}.",
            "can I get a receipt for my {product}? My order is {order}.",
            "order {order}: there was no invoice with the {product}.",
            "I have lost the receipt for the {product}. The order number is {order}.",
            "my office needs the invoice of order {order}, one {product}.",
            "where can I find the receipt for a {product}? Order {order}.",
        ),
        (
            "order {order}: please send a receipt for my {product}.",
            "I cannot find the invoice for the {product}, order {order}.",
        ),
    ),
    Intent(
        "exchange",
        "We will swap it for you.",
        (
            "I want to swap the {product} from order {order} for a blue one.",
            "can I exchange the {product}, order {order}, for a bigger one?",
            "please exchange my {product} for a smaller one. My order is {order}.",
            "order {order}: I want a red {product}, please swap it.",
            "the {product} is too small. Can I swap it? The order number is {order}.",
            "I would like to exchange the {product} I got in order {order}.",
            "the {product} is too big and I want another size. Order {order}.",
        ),
        (
            "order {order}: please swap the {product} for a green one.",
            "my {product} is too small, I want to exchange it. Order {order}.",
        ),
    ),
    Intent(
        "damage",
        "Sorry about that. A new one is on its way.",
        (
            "the {product} from order {order} arrived broken.",
            "my {product}, order {order}, is damaged.",
            "there is a crack in the {product}. My order is {order}.",
            "order {order}: the {product} does not work.",
            "the {product} came with a hole in it. The order number is {order}.",
            "I opened order {order} and the {product} was broken.",
            "a part of my {product} fell off and it does not work. Order {order}.",
        ),
        (
            "order {order}: my {product} has a crack and is broken.",
            "I got a damaged {product} and it does not work. Order {order}.",
        ),
    ),
)


def make_examples(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Draw the training part and the held-out part; the same seed gives the same rows.

    Returns:
        (train, held_out), each a list of `{"messages": [user turn, assistant turn]}`.
    """
    rng = random.Random(seed)
    pairs = [(intent, product) for intent in INTENTS for product in PRODUCTS]
    rng.shuffle(pairs)
    num_unseen_pairs = len(pairs) // 8
    orders = rng.sample(range(10_000, 100_000), NUM_TRAIN + NUM_HELD_OUT)
    train = [
        _example(rng, *rng.choice(pairs[num_unseen_pairs:]), order=order)
        for order in orders[:NUM_TRAIN]
    ]
    held_out = [
        _example(
            rng,
            *pairs[i % num_unseen_pairs],
            order=order,
            is_unseen_wording=i % UNSEEN_EVERY == 0,
        )
        for i, order in enumerate(orders[NUM_TRAIN:])
    ]
    return train, held_out


def write_dataset(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl`, one row of messages a line, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, make_examples(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def _example(
    rng: random.Random,
    intent: Intent,
    product: str,
    *,
    order: int,
    is_unseen_wording: bool = False,
) -> dict:
    wordings: Sequence[str] = intent.unseen_wordings if is_unseen_wording else intent.wordings
    request = rng.choice(wordings).format(product=product, order=order)
    opening = rng.choice(OPENINGS)
    if not opening:
        request = request[0].upper() + request[1:]
    answer = f"intent: {intent.name}\norder: {order}\nreply: {intent.reply}"
    return {
        "messages": [
            {"role": "user", "content": opening + request + rng.choice(CLOSINGS)},
            {"role": "assistant", "content": answer},
        ]
    }
