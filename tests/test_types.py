"""What a data set may have beside what it must."""

from types import SimpleNamespace

from sdtrain.types import DataExtras, captions_of, extras_of


def test_what_a_data_set_does_not_have_is_nothing():
    assert extras_of(SimpleNamespace()) == DataExtras((), None, None)
    assert list(captions_of(SimpleNamespace())) == []


def test_what_it_has_is_read():
    data = SimpleNamespace(notes=["one is left out"], max_skipped=3, sha256="ab")
    assert extras_of(data) == DataExtras(("one is left out",), 3, "ab")
    assert captions_of(SimpleNamespace(captions=["a star"])) == ["a star"]
