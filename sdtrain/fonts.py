"""Find installed fonts for a text: captions and names may be in any script."""

import contextlib
import functools
import unicodedata

from sdtrain.console import warn

BASE = "DejaVu Sans"
"""matplotlib's own font, which is always available."""

INVISIBLE = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp")
"""Unicode categories of characters that have no glyph of their own."""


def font_families(text: str) -> list[str]:
    """Return the names of fonts, BASE first, that together have the characters of a text.

    Warns once about characters that no installed font has; they are drawn as boxes.
    """
    names = [BASE]
    missing = []
    for character in sorted(set(text)):
        if unicodedata.category(character) in INVISIBLE:
            continue
        name = _family_with(character)
        if name is None:
            missing.append(character)
        elif name not in names:
            names.append(name)
    if missing:
        _warn_of_missing("".join(missing))
    return names


def font_file(text: str) -> str:
    """Return the file of the font that has the most characters of a text."""
    codes = {ord(letter) for letter in text if unicodedata.category(letter) not in INVISIBLE}

    def covered(name: str) -> int:
        return len(codes & _character_codes(_installed_fonts()[name]))

    return _installed_fonts()[max(font_families(text), key=covered)]


@functools.cache
def _installed_fonts() -> dict[str, str]:
    """Return {name: file} of BASE and of this machine's upright, scalable fonts."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts, fontManager
    from matplotlib.ft2font import FT2Font

    known = {entry.fname for entry in fontManager.ttflist}
    for file in sorted(set(findSystemFonts()) - known):  # newer than matplotlib's own list
        with contextlib.suppress(OSError, RuntimeError):  # unreadable for matplotlib
            fontManager.addfont(file)
    files = {}
    for entry in sorted(fontManager.ttflist, key=lambda each: (each.name, each.fname)):
        is_upright = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        # Of the fonts that matplotlib brings, those other than BASE are for formulas.
        is_bundled = entry.fname.startswith(matplotlib.get_data_path()) and entry.name != BASE
        if not is_upright or is_bundled or entry.name in files:
            continue
        if FT2Font(entry.fname).scalable:
            files[entry.name] = entry.fname
    return files


@functools.cache
def _character_codes(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())


@functools.cache
def _family_with(character: str) -> str | None:
    for name in (BASE, *_installed_fonts()):
        if ord(character) in _character_codes(_installed_fonts()[name]):
            return name
    return None


@functools.cache
def _warn_of_missing(characters: str) -> None:
    warn(f"no installed font has {characters}: pictures show boxes instead.")
