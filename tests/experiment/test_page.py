"""The page in a real browser: it stands alone, fits small and large screens, and says no error."""

import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from nibble.experiment.page import to_html
from nibble.experiment.plots import draw
from nibble.experiment.tables import build_page

from .browser import tab

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(1)>"&'


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_is_loaded_and_nothing_runs(report_of):
    report = report_of()
    tags = Tags(to_html(build_page(report), draw(report))).found
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "object", "base")]
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/png;base64,").startswith(
                "data:image/png;base64,"
            )
    assert all(attributes["alt"] for tag, attributes in tags if tag == "img")
    assert ("html", {"lang": "en"}) in tags


def test_text_of_runs_is_text(report_of):
    page = build_page(report_of())
    page = replace(page, title=HOSTILE, notes=(HOSTILE,), facts=((HOSTILE, HOSTILE),))
    text = to_html(page, [])
    assert HOSTILE not in text
    assert not [tag for tag, _ in Tags(text).found if tag in ("script", "img")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A tab, and where to put pages."""
    folder = tmp_path_factory.mktemp("browser")
    with tab(folder) as one:
        yield one, folder


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_shows_it_whole(opened, report_of, width, is_dark):
    one, folder = opened
    report = report_of()
    pictures = draw(report)
    assert len(pictures) == 3
    path = folder / "report.html"
    path.write_text(to_html(build_page(report), pictures), encoding="utf-8")
    one.complaints.clear()
    one.requested.clear()
    one.open(path, width=width, is_dark=is_dark)
    assert one.complaints == []
    assert [url for url in one.requested if not url.startswith("data:")] == [path.as_uri()]
    # The page itself never scrolls sideways; what is wide does so in its own box.
    assert one.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert one.value(
        "[...document.querySelectorAll('.box')].every(b => b.clientWidth <= innerWidth)"
    )
    assert (
        one.value("[...document.images].map(i => i.naturalWidth > 400 && i.width > 250)")
        == [True] * 3
    )
    assert (
        one.value(
            "Math.min(...[...document.querySelectorAll('p, li, td, dd')].map("
            "e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 14
    )
    _looks_right(one.screenshot(), width, is_dark)


def _looks_right(content, width, is_dark):
    """As wide as the screen, of the right paper, and with something on it from top to bottom."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(content))[..., :3]
    assert abs(pixels.shape[1] - width) <= 20
    assert pixels.shape[0] > 1500
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    assert (paper.mean() < 0.2) == is_dark
    for part in np.array_split(pixels, 8):
        assert np.abs(part - paper).max(axis=-1).mean() > 0.005
