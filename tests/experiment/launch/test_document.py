"""Values come back from a YAML file as they were."""

import yaml
from hypothesis import given
from hypothesis import strategies as st

from nibble.experiment.launch.document import to_text

from .conftest import UGLY

# What YAML can hold; names with other characters are refused before.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"))


@given(st.lists(TEXTS), st.dictionaries(TEXTS.filter(bool), TEXTS))
def test_any_text_comes_back(words, values):
    document = {"words": words, "values": values, "numbers": [1, 0.5, True, None]}
    assert list(yaml.safe_load_all(to_text(document, document))) == [document, document]


def test_text_of_several_lines_stands_as_such():
    assert to_text({"run": "first\nsecond\n"}).splitlines()[1:] == ["run: |", "  first", "  second"]
    assert yaml.safe_load(to_text({"run": UGLY})) == {"run": UGLY}
