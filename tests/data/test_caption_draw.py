"""Several captions of a picture, tags, and pictures smaller than the crop: keyed, and as they were
where nobody asks for it.
"""

import json

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from sdtrain.config.trusted import ADDED_ARGUMENTS, upgrade_config
from sdtrain.data.caption_draw import CaptionDraw
from sdtrain.data.decode import PIXEL_LIMIT
from sdtrain.data.headers import Headers, Unusable
from sdtrain.data.images import Images
from sdtrain.errors import DataError, UserError

LINES = ["a cat", "a red cat, asleep", "one cat"]
TAGS = "cat, red, asleep,  indoors, , one"


@pytest.fixture
def folder(tmp_path):
    """Four pictures; each .txt holds LINES."""
    for i in range(4):
        Image.new("RGB", (20, 20), (i * 5, 20, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("\r\n".join([*LINES, " ", ""]))
    return tmp_path


def load(folder, **options):
    return Images(path=str(folder), image_size=16, **options)


def drawn(data, visits=60, split="train"):
    return [data.split(split)[0, ordinal].caption for ordinal in range(visits)]


def test_one_of_several_captions_is_drawn_at_each_visit(folder):
    data = load(folder, captions="one")
    captions = drawn(data)
    counts = [captions.count(line) for line in LINES]
    assert sum(counts) == 60 and min(counts) > 10
    assert captions == drawn(load(folder, captions="one"))
    assert captions != drawn(load(folder, captions="one", seed=1))
    assert set(drawn(data, split="validation")) == {LINES[0]}
    assert data.example_prompts(3) == [LINES[0]] * 3
    train = data.split("train")
    order = [(0, ordinal) for ordinal in range(60)]
    workers = DataLoader(train, batch_size=None, sampler=order, num_workers=2)
    assert [row.caption for row in workers] == captions
    assert train.captions == LINES * 3  # all of them are counted where they are too long


def test_all_captions_are_joined_unless_asked_otherwise(folder):
    for data in (load(folder), load(folder, captions="all")):
        assert set(drawn(data)) == {"a cat a red cat, asleep one cat"}
        assert len(data.split("train").captions) == 3
    # The listing of single captions is the same: a run may be gone on with.
    for file in folder.glob("*.txt"):
        file.write_text("a cat\n")
    assert load(folder).sha256 == load(folder, captions="one").sha256


def test_a_list_in_metadata_holds_several(folder):
    beside = load(folder, captions="one")
    rows = [{"file_name": f"{i}.png", "text": ["", *LINES]} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert drawn(load(folder, captions="one")) == drawn(beside)
    for wrong in (["a", 3], [["a"]], {"a": "b"}):
        rows[2]["text"] = wrong
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match="line 3"):
            load(folder)


def test_tags_are_shuffled_and_dropped(folder):
    for file in folder.glob("*.txt"):
        file.write_text(TAGS)
    tags = ["cat", "red", "asleep", "indoors", "one"]

    def seen(**options):
        return [caption.split(", ") for caption in drawn(load(folder, **options))]

    assert set(drawn(load(folder))) == {"cat, red, asleep, indoors, , one"}
    shuffled = seen(shuffle_tags=True)
    assert all(sorted(each) == sorted(tags) for each in shuffled)
    assert {each[0] for each in shuffled} == {each[-1] for each in shuffled} == set(tags)
    kept = seen(shuffle_tags=True, keep_tags=2)
    assert all(each[:2] == tags[:2] for each in kept)
    assert len({tuple(each) for each in kept}) == 6
    dropped = seen(drop_tags=0.4)
    assert all(each == [tag for tag in tags if tag in each] for each in dropped)
    assert abs(sum(map(len, dropped)) / 60 / 5 - 0.6) < 0.1
    rarely_dropped = seen(drop_tags=0.2)
    assert abs(sum(map(len, rarely_dropped)) / 60 / 5 - 0.8) < 0.1
    assert all(each[0] == "cat" for each in seen(drop_tags=0.9, keep_tags=1))
    assert all(len(each) > 0 and each != [""] for each in seen(drop_tags=0.99))
    both = seen(shuffle_tags=True, drop_tags=0.4)
    assert [set(each) for each in both] != [set(each) for each in shuffled]
    # A tag's place does not tell whether it is dropped.
    with_cat_first = [
        after for before, after in zip(shuffled, both, strict=True) if before[0] == "cat"
    ]
    assert sum("cat" in each for each in with_cat_first) > 0.3 * len(with_cat_first)
    assert set(drawn(load(folder, shuffle_tags=True), split="validation")) == {
        "cat, red, asleep, indoors, , one"
    }


def test_no_tag_goes_across_the_end_of_a_line():
    draw = CaptionDraw(captions="all", shuffle_tags=True, drop_tags=0.0, keep_tags=0, seed=0)
    (joined,) = draw.candidates(["a, b, c", "d, e"])
    assert sorted(draw([joined], 3).split(", ")) == ["a", "b", "c", "d", "e"]


def test_a_long_thin_picture_is_not_scaled_up_beyond_what_may_be_read():
    small = Unusable("thin", 1, "mark", pixels_scaled_up=PIXEL_LIMIT + 1)
    gif = Unusable("small", 4, "mark", pixels_scaled_up=64, has_frames=True)
    headers = Headers(unusable={"thin": small, "gif": gif})
    headers.accept_small()
    assert list(headers.fingerprints) == headers.scaled_up == headers.frames == ["gif"]
    assert headers.unusable["thin"].scale is None  # so it is refused, or left out with skip


def test_smaller_pictures_are_scaled_up_where_that_is_asked_for(folder):
    Image.new("RGB", (9, 12), (10, 20, 30)).save(folder / "0.png")
    with pytest.raises(DataError, match=r"data\.upscale"):
        load(folder)
    data = load(folder, upscale=True)
    assert any("0.png" in note and "scaled up" in note for note in data.notes)
    shapes = set()
    for split in map(data.split, ("train", "validation")):
        for index in range(len(split)):
            shapes.add(tuple(split[index, 3].image.shape))
    assert shapes == {(3, 16, 16)}
    skipping = load(folder, on_error="skip")
    assert len(skipping.split("train")) == 3 - 1
    assert any("data.upscale" in note for note in skipping.notes)
    with pytest.raises(DataError, match=r"data\.upscale") as refused:
        load(folder, on_error="skip", max_skipped=0)
    assert refused.value.key == "data.max_skipped"
    (folder / "1.png").write_bytes(b"broken")  # that is another matter
    with pytest.raises(DataError, match=r"1\.png"):
        load(folder, upscale=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("captions", "two"), ("drop_tags", 1.0), ("drop_tags", -0.1), ("keep_tags", -1)],
)
def test_bad_options(folder, key, value):
    with pytest.raises(UserError) as caught:
        load(folder, **{key: value})
    assert (caught.value.exit_code, caught.value.key) == (2, f"data.{key}")


def test_keep_tags_alone_has_no_effect_and_is_refused(folder):
    with pytest.raises(UserError) as caught:
        load(folder, keep_tags=1)
    assert caught.value.key == "data.keep_tags"


def test_a_run_of_an_earlier_version_has_todays_defaults(composed):
    today = composed("data=images", "data.path=x")["data"]
    target = today["_target_"]
    assert {key: today[key] for key in ADDED_ARGUMENTS[target]} == ADDED_ARGUMENTS[target]
    before = {key: value for key, value in today.items() if key not in ADDED_ARGUMENTS[target]}
    assert upgrade_config({"data": before})["data"] == today
    assert upgrade_config({"data": before | {"captions": "one"}})["data"]["captions"] == "one"
