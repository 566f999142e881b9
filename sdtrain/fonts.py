"""Installed fonts that have the letters of a text: captions and names come in every script."""

import contextlib
import functools
import unicodedata

from sdtrain.console import warn

BASE = "DejaVu Sans"
"""matplotlib's own font, which is always there."""

UNSEEN = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp")
"""Categories of characters that have no picture of their own."""


def families(text: str) -> list[str]:
    """Names of fonts, BASE first, that have between them all letters of a text that an installed
    font has. Warns once of others, which are drawn as boxes.
    """
    names = [BASE]
    missing = []
    for letter in sorted(set(text)):
        if unicodedata.category(letter) in UNSEEN:
            continue
        name = _family_of(letter)
        if name is None:
            missing.append(letter)
        elif name not in names:
            names.append(name)
    if missing:
        _warn_of("".join(missing))
    return names


def font_file(text: str) -> str:
    """The file of the one font that has most letters of a text."""
    letters = {letter for letter in text if unicodedata.category(letter) not in UNSEEN}

    def count(name: str) -> int:
        return sum(ord(letter) in _letters_of(_files()[name]) for letter in letters)

    return _files()[max(families(text), key=count)]


@functools.cache
def _files() -> dict[str, str]:
    """{name: file} of BASE and of the upright fonts of this machine that have any size."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts, fontManager
    from matplotlib.ft2font import FT2Font

    known = {entry.fname for entry in fontManager.ttflist}
    for file in sorted(set(findSystemFonts()) - known):  # installed since matplotlib last looked
        with contextlib.suppress(OSError, RuntimeError):  # what it cannot read
            fontManager.addfont(file)
    found = {}
    for entry in sorted(fontManager.ttflist, key=lambda each: (each.name, each.fname)):
        is_plain = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        # matplotlib's others are for formulas.
        is_own = entry.fname.startswith(matplotlib.get_data_path()) and entry.name != BASE
        if is_plain and not is_own and entry.name not in found and FT2Font(entry.fname).scalable:
            found[entry.name] = entry.fname
    return found


@functools.cache
def _letters_of(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())


@functools.cache
def _family_of(letter: str) -> str | None:
    for name in (BASE, *_files()):
        if ord(letter) in _letters_of(_files()[name]):
            return name
    return None


@functools.cache
def _warn_of(letters: str) -> None:
    warn(f"no installed font has {letters}: boxes stand for them in pictures.")
