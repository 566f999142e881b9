"""Captions and names in any script: drawn where an installed font has their letters, else said."""

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from sdtrain import fonts
from sdtrain.pictures import grid
from sdtrain.plots import draw_curves

LETTER = "\ue123"
"""For private use: no installed font has it."""


@pytest.fixture(autouse=True)
def looked_anew(monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    caches = (fonts._installed_fonts, fonts._family_with, fonts._warn_of_missing)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def install(path) -> None:
    """A font of one letter, a bar."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (300, 700), (300, 0)):
        pen.lineTo(corner)
    pen.closePath()
    bar = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "bar"])
    builder.setupCharacterMap({ord(LETTER): "bar"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "bar": bar})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "bar": (400, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Bar", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    fontManager.addfont(path)


def captioned(text: str) -> np.ndarray:
    return np.asarray(grid(torch.zeros(1, 3, 8, 8), [text]))


def plotted(text: str) -> np.ndarray:
    return np.asarray(draw_curves([0, 1], {text: [0, 1]}, x_label="x", y_label="y"))


def test_a_letter_is_drawn_by_the_font_that_has_it(tmp_path, capsys):
    without = [drawn(LETTER) for drawn in (captioned, plotted)]
    assert fonts.font_families(LETTER) == [fonts.BASE]
    assert capsys.readouterr().err.count(LETTER) == 1
    fonts._installed_fonts.cache_clear()
    fonts._family_with.cache_clear()
    install(tmp_path / "bar.ttf")
    assert fonts.font_families(f"a{LETTER}\u200d") == [fonts.BASE, "Bar"]
    for drawn, boxed in zip((captioned, plotted), without, strict=True):
        assert not np.array_equal(drawn(LETTER), boxed)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("drawn", [captioned, plotted])
def test_letters_of_another_script_are_told_apart(drawn, capsys):
    """They are no boxes, which are all alike."""
    for one, other in (("é", "è"), ("ش", "ق")):
        assert not np.array_equal(drawn(one), drawn(other))
    assert not capsys.readouterr().err
