"""The bundled base: small enough for the repository, and it has not seen what the demo teaches."""

import random
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from nibble.demo import BASE_FOLDER
from nibble.demo.data import INTENTS, make_examples

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def talks(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import demo_dialogues

    rng = random.Random(0)
    return [turn for _ in range(5000) for turn in demo_dialogues.dialogue(rng)]


def test_size():
    assert sum(path.stat().st_size for path in Path(BASE_FOLDER).iterdir()) <= 6e6
    with safe_open(Path(BASE_FOLDER) / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert sum(rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in shapes) <= 3e6


def test_dialogues_have_no_letter(talks):
    asked = {content for role, content in talks if role == "user"}
    letters = {row["messages"][0]["content"] for rows in make_examples() for row in rows}
    assert not asked & letters
    assert not any(re.search(r"\border \d", text, re.IGNORECASE) for text in asked)


def test_dialogues_have_no_answer_of_the_demo(talks):
    answers = [content for role, content in talks if role == "assistant"]
    assert not any(re.search(r"^(intent|order|reply):", text, re.MULTILINE) for text in answers)
    assert not any(intent.reply in text for intent in INTENTS for text in answers)
