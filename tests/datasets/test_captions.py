"""Test templates, captions, tag shuffling and drop-out."""

import numpy as np
import pytest

from dreamfleet.datasets.captions import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    TEMPLATE_SETS,
    NoCaption,
    caption_from_filename,
    choose_caption,
    drop_tags,
    fill_template,
    make_caption,
    shuffle_tags,
)
from dreamfleet.datasets.config import DataConfig
from dreamfleet.datasets.errors import DataError

PLAIN = DataConfig(instance_data_dir="x")


def rng(seed=0):
    return np.random.default_rng(seed)


def test_every_template_contains_its_placeholder():
    assert len(OBJECT_TEMPLATES) == 27
    assert len(STYLE_TEMPLATES) == 19
    assert all("[name]" in template for template in OBJECT_TEMPLATES + STYLE_TEMPLATES)
    assert all("[filewords]" in template for template in TEMPLATE_SETS["style_filewords"])


@pytest.mark.parametrize(
    ("file_name", "words"),
    [
        ("01-a red apple.png", "a red apple"),
        ("a/b/0003 cat, black.jpg", "cat, black"),
        ("cat.v2.png", "cat.v2"),
        ("12345.png", ""),
        ("-7-x.png", "x"),
    ],
)
def test_caption_from_filename_as_the_webui_does(file_name, words):
    assert caption_from_filename(file_name) == words


def test_fill_template_replaces_filewords_then_name():
    assert fill_template("[name] with [filewords]", "sks", "a [name] hat") == "sks with a sks hat"
    assert fill_template("a photo of {}", "sks", "") == "a photo of sks"


def test_shuffling_keeps_the_first_tags_and_drops_none():
    tags = "a, b,c ,, d, e, f, g"
    got = shuffle_tags(tags, rng(), keep_tokens=2)
    assert got.startswith("a, b, ")
    assert sorted(got.split(", ")) == list("abcdefg")
    assert got != "a, b, c, d, e, f, g"
    assert got == shuffle_tags(tags, rng(), keep_tokens=2)


def test_drop_rates():
    tags = ", ".join(str(i) for i in range(2000))
    assert abs(len(drop_tags(tags, rng(), 0.3).split(", ")) - 1400) < 80
    assert drop_tags("a, b, c", rng(), 1.0, keep_tokens=1) == "a"
    assert drop_tags("a, b, c", rng(), 0.0) == "a, b, c"


def test_lines_are_alternative_captions():
    seen = {choose_caption("one\n\n two \nthree", rng(seed)) for seed in range(30)}
    assert seen == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("caption", "given", "expected"),
    [
        ("a cat", {"template": "photo of [name], [filewords]"}, "photo of sks, a cat"),
        ("a cat", {"template": "photo of [name]"}, "photo of sks"),
        ("a cat", {"prompt": "a photo of sks dog"}, "a cat"),
        ("a cat", {"prompt": "sks, [filewords]"}, "sks, a cat"),
        (None, {"prompt": "a photo of sks dog"}, "a photo of sks dog"),
        (None, {"prompt": "a sks cat [filewords]"}, "a sks cat"),
        (None, {"template": "photo of [filewords]", "prompt": "a sks cat"}, "photo of a sks cat"),
        ("", {"prompt": "p"}, "p"),
    ],
)
def test_priority_of_caption_prompt_and_template(caption, given, expected):
    assert make_caption(caption, name="sks", rng=rng(), config=PLAIN, **given) == expected


def test_file_names_are_captions_only_with_the_option():
    asked = PLAIN.model_copy(update={"caption_from_filename": True})
    named = {"file_name": "01-a blue cat.png", "rng": rng()}
    for given in ({}, {"template": "photo of [name], [filewords]"}):
        with pytest.raises(NoCaption, match="01-a blue cat"):
            make_caption(None, config=PLAIN, **given, **named)
    assert make_caption(None, config=asked, **named) == "a blue cat"
    assert make_caption(None, prompt="sks", config=asked, **named) == "a blue cat"
    assert make_caption("its own", config=asked, **named) == "its own"
    filled = make_caption(None, template="[name], [filewords]", name="sks", config=asked, **named)
    assert filled == "sks, a blue cat"
    with pytest.raises(NoCaption, match="no caption"):
        make_caption(None, config=asked, file_name="0001.png", rng=rng())


def test_caption_options_do_not_apply_to_class_images():
    config = DataConfig(
        instance_data_dir="x",
        caption_prefix="sks",
        caption_suffix="at noon",
        shuffle_tags=True,
        tag_dropout=1.0,
        caption_dropout=1.0,
        caption_from_filename=True,
    )
    given = {"rng": rng(), "config": config, "of_subject": False, "file_name": "IMG_1.png"}
    assert make_caption("a cat, red, small", **given) == "a cat, red, small"
    assert make_caption(None, prompt="a cat", **given) == "a cat"


def test_captions_can_be_ignored():
    config = DataConfig(instance_data_dir="x", use_captions=False)
    assert make_caption("a cat", prompt="p", rng=rng(), config=config) == "p"


def test_a_missing_caption_is_an_error_with_a_remedy():
    with pytest.raises(DataError, match=r"12\.png.*instance_prompt"):
        make_caption(None, file_name="12.png", rng=rng(), config=PLAIN)


def test_caption_dropout_rate():
    config = DataConfig(instance_data_dir="x", proportion_empty_prompts=0.25)
    made = [make_caption("a cat", rng=rng(seed), config=config) for seed in range(1000)]
    assert set(made) == {"", "a cat"}
    assert abs(made.count("") - 250) < 50


def test_tags_are_shuffled_and_dropped_by_the_options():
    config = DataConfig(
        instance_data_dir="x", shuffle_caption=True, keep_tokens=1, caption_tag_dropout_rate=0.5
    )
    made = {make_caption("a, b, c, d", rng=rng(seed), config=config) for seed in range(50)}
    assert len(made) > 10
    assert all(text.split(", ")[0] == "a" for text in made)


def test_prefix_and_suffix_are_part_of_the_caption():
    config = DataConfig(instance_data_dir="x", caption_prefix="a sks cat", caption_suffix="at noon")
    assert make_caption("on the beach", rng=rng(), config=config) == "a sks cat on the beach at noon"
    assert make_caption("one\ntwo", rng=rng(1), config=config) in {
        "a sks cat one at noon",
        "a sks cat two at noon",
    }
    assert make_caption("x", prompt="see [filewords]", rng=rng(), config=config) == "see a sks cat x at noon"
    assert make_caption(None, prompt="a cat", rng=rng(), config=config) == "a cat"
    kept = config.model_copy(update={"keep_tokens": 1, "tag_dropout": 1.0})
    assert make_caption("face, b, c", rng=rng(), config=kept) == "a sks cat face"


def test_tags_before_and_after_the_separator_stay():
    config = DataConfig(
        instance_data_dir="x", shuffle_caption=True, keep_tokens=3, keep_tokens_separator="|||"
    )
    made = {make_caption("a, b ||| c, d, e, f ||| g", rng=rng(seed), config=config) for seed in range(40)}
    assert len(made) > 10
    assert all(text.startswith("a, b, ") and text.endswith(", g") for text in made)
    assert {"".join(sorted(text.split(", "))) for text in made} == {"abcdefg"}
    assert all(
        text.startswith("a, b, c, ") for text in [make_caption("a, b, c, d, e", rng=rng(), config=config)]
    )
    bare = DataConfig(instance_data_dir="x", keep_tokens_separator="|||")
    assert make_caption("a, b ||| c", rng=rng(), config=bare) == "a, b, c"
