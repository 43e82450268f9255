"""Pictures are drawn from their text alone, and a text that cannot be drawn is told by its line."""

import re
import xml.etree.ElementTree as ET

import pytest

from workers.documentation.pictures import PictureError, draw

TEXT = """
title Two boxes & an arrow
event one 0,0 asked | <twice>
state two 1,0 answered
bad three 1,1 refused
arrow one -> two : yes
arrow one ~> three : no
"""


def test_a_picture_has_its_boxes_arrows_and_words() -> None:
    """Well-formed, with all words as they were written, every corner inside, and the same each time."""
    svg = draw(TEXT, name="picture.txt")
    root = ET.fromstring(svg)
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Two boxes & an arrow", "asked", "<twice>", "answered", "refused", "yes", "no"} <= set(
        words
    )
    assert svg.count('class="arrow"') == 2
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for x, y in re.findall(r'x="([\d.-]+)" y="([\d.-]+)"', svg):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    assert draw(TEXT, name="picture.txt") == svg


def test_a_picture_loads_nothing() -> None:
    """No script, no font, no picture from elsewhere."""
    svg = draw(TEXT, name="picture.txt")
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|<script|@import|<image", svg) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title T\nbox a 0,0 words", "p.txt:2: neither a box"),
        ("title T\nstate a 0,0 words\narrow a -> b", "p.txt:3: there is no box b"),
        ("state a 0,0 words", "p.txt: a picture has a title"),
        ("title T", "p.txt: a picture has a title"),
        ("title T\nstate a 0,0 words\nstate b 1.5,0 between", "between two columns"),
    ],
)
def test_what_cannot_be_drawn_is_told(text: str, told: str) -> None:
    """With the file and the line."""
    with pytest.raises(PictureError, match=re.escape(told)):
        draw(text, name="p.txt")
