"""How prompts are read by a model that knows the words of its captions."""

import sys
import unicodedata

import pytest

from diffjax.text import reading
from diffjax.text.learned import CaptionTokenizer
from diffjax.utils.errors import UserError

CAPTIONS = [
    "red heart", "heart", "pizza", "cat face", "rocket", "dog face", "dog", "T-Rex", "cherries", "snowman", "hot dog",
    "smiling face with sunglasses", "pile of poo", "green apple", "flag: Côte d’Ivoire", "knife", "jack-o-lantern",
    "dog on car",
]  # fmt: skip


def words(captions=CAPTIONS, **options):
    return CaptionTokenizer.train(captions, 12, **options).words


KNOWN = words()

READ = {
    "a rocket": "rocket",
    "The Rocket.": "rocket",
    "rockets": "rocket",
    "draw me a picture of a rocket, please!": "rocket",
    "heart, red": "red heart",
    "hearts red": "red heart",
    "a cherry": "cherries",
    "knives": "knife",
    "snow man": "snowman",
    "hotdogs": "hot dog",
    "hot-dog": "hot dog",
    "t rex": "T-Rex",
    "poo pile": "pile of poo",
    "flag of Cote d'Ivoire": "flag: Côte d’Ivoire",
    "apple (green)": "green apple",
    "🐶": "dog face",
    "a 🍕!": "pizza",
    "🚀🚀": "rocket",
    "❤️": "red heart",
    "the dog's face": "dog face",
    "smiling face, with sunglasses": "smiling face with sunglasses",
    "the red face with a heart": "red face with heart",
}


@pytest.mark.parametrize("prompt", READ)
def test_a_prompt_is_read_as_the_captions_say_it(prompt):
    if not prompt.isascii():
        pytest.importorskip("emoji")
    found = KNOWN.read(prompt)
    assert found.text == READ[prompt] and not found.unknown
    assert found.said == f'"{prompt}" is read as "{READ[prompt]}"'


@pytest.mark.parametrize("prompt", [*CAPTIONS, "RED heart", " red  heart", "red face", "car on dog", "", "flag: côte"])
def test_what_the_captions_can_say_stays_as_it_is(prompt):
    assert KNOWN.read(prompt) == reading.Reading(prompt, prompt)
    assert KNOWN.read(prompt).said == ""


def test_words_that_no_caption_has_are_left_out_and_said():
    found = KNOWN.read("a rocket on xylo with a haert")
    assert (found.text, found.unknown, found.near) == ("rocket on with", ("xylo", "haert"), ("heart",))
    assert found.said.endswith('is read as "rocket on with": no caption has "xylo" or "haert" (near: heart)')


@pytest.mark.parametrize("prompt", ["zebra", "a the", "!?", "a zebra of the", "日本", "\U0001f9ff", "of"])
def test_a_prompt_without_a_known_word_is_refused(prompt):
    with pytest.raises(UserError, match="no caption has a word of .*diffjax words --run RUN"):
        KNOWN.read(prompt)


def test_a_word_spelled_wrong_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r'"piza" \(near: pizza\)'):
        KNOWN.read("piza")


def test_emoji_are_named_by_unicode_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    read = {"🐶": "dog face", "a 🍕": "pizza", "🚀": "rocket", "❤️": "heart", "🐶\U0001f3fd\ufe0f": "dog face"}
    assert {prompt: KNOWN.read(prompt).text for prompt in read} == read
    assert unicodedata.name("🍕") == "SLICE OF PIZZA" and KNOWN.read("a 🍕").unknown == ("slice",)


def test_emoji_of_the_captions_stay():
    assert words(["❤️ 🐶", "🍕 time"]).read("🐶 🍕").text == "🐶 🍕"


def test_articles_stay_where_captions_have_them():
    natural = words([f"a photo of a {name}" for name in ("cat", "dog", "red car")] + ["the cat of a dog"])
    assert natural.read("the dog and a cat").text == "the dog a cat"
    assert natural.read("cat").text == natural.read("a cat!").text == "a photo of a cat"
    seldom = words([f"thing{i}" for i in range(200)] + ["a button", "dog house", "big"])
    assert seldom.read("a big dog").text == "big dog" and seldom.read("button").text == "a button"


def test_order_is_kept_where_it_says_something():
    of_four = words(["red square blue circle", "dog on car", "cat, dog, red"])
    for prompt in ("blue square red circle", "car on dog"):
        assert of_four.read(prompt).text == prompt
    assert of_four.read("dog red cat").text == "cat, dog, red"


THINGS = ("panda", "snowman", "smiling face with sunglasses", "hot dog", "cat face", "cat")
PAIRS = [f"{colour} {thing}" for colour in ("red", "blue", "gray") for thing in THINGS]
COLOURED = words([*THINGS, *PAIRS, "purple cat", "purple hot dog"])
COMPOSED = {
    "purple panda": "purple panda",
    "a purple panda": "purple panda",
    "purple pandas": "purple panda",
    "panda, purple": "purple panda",
    "violet panda": "purple panda",
    "a lilac 🐼!": "purple panda",
    "a panda that is purple": "purple panda",
    "the purple-coloured panda": "purple panda",
    "purple snow man": "purple snowman",
    "face with sunglasses, smiling purple": "face with sunglasses smiling purple",
    "smiling face with sunglasses, purple": "purple smiling face with sunglasses",
    "Purple Smiling Face With Sunglasses": "Purple Smiling Face With Sunglasses",
}


@pytest.mark.parametrize("prompt", COMPOSED)
def test_a_leading_word_goes_before_a_caption_that_is_not_known_with_it(prompt):
    if not prompt.isascii():
        pytest.importorskip("emoji")
    found = COLOURED.read(prompt)
    assert found.text == COMPOSED[prompt]
    assert found.composed == (
        found.text.lower() in {"purple panda", "purple snowman", "purple smiling face with sunglasses"}
    )


def test_a_colour_is_read_as_the_nearest_that_captions_have():
    read = {
        "crimson cat": "red cat",
        "grey panda": "gray panda",
        "Azure pandas": "blue panda",
        "cat, scarlet": "red cat",
    }
    assert {prompt: COLOURED.read(prompt).text for prompt in read} == read
    assert words(["grey cat", "violet dog"]).read("gray cat").text == "grey cat"
    assert words(["grey cat", "violet dog"]).read("purple dog").text == "violet dog"
    assert words(["lemon", "gold ring", "yellow dog"]).read("gold").text == "gold"


def test_a_leading_word_alone_is_nothing_to_draw():
    with pytest.raises(UserError, match=r'"purple pandaa": no caption has "pandaa" \(near: panda\)'):
        COLOURED.read("purple pandaa")
    assert COLOURED.read("purple").text == "purple"
    assert COLOURED.read("red and blue panda").text == "red blue panda"


def test_what_is_composed_is_said_in_one_line():
    readings = [COLOURED.read(prompt) for prompt in ("violet panda", "red panda", "purple panda", "purple snowman")]
    assert reading.remarks(readings) == [
        '"violet panda" is read as "purple panda"',
        'composed, since no training picture is captioned so: "purple panda", "purple snowman"',
    ]


def test_scripts_without_spaces_are_read_by_their_letters():
    assert words(["日本の猫", "赤い花"]).read("日本の花").text == "日本の花"


def test_a_run_from_before_captions_were_kept_reads_as_well_but_for_order():
    trained = CaptionTokenizer.train(CAPTIONS, 12)
    old = CaptionTokenizer(trained.rules, 12).words
    assert old.counts == KNOWN.counts and old.complete and not old.captions
    assert [old.read(prompt).text for prompt in ("a rocket!", "cherry", "heart, red")] == [
        "rocket",
        "cherries",
        "heart red",
    ]
    with pytest.raises(UserError, match="near: heart"):
        old.read("haert")


def test_words_that_were_cut_off_are_spelled_and_said():
    few = words(words=4)
    assert not few.complete and set(few.counts) == {"dog", "-", "face", "heart"}
    found = few.read("zebra hearts")
    assert found.text == "zebra hearts" and found.spelled
    assert found.said == '"zebra hearts": the frequent words of the captions have no "zebra"'


def test_many_captions_are_not_kept(monkeypatch):
    monkeypatch.setattr("diffjax.text.learned.CAPTIONS", 3)
    assert not words().captions and words(CAPTIONS[:3]).captions == dict.fromkeys(CAPTIONS[:3], 1)


def test_the_list_of_words():
    lines = reading.listing(words(["red heart", "red apple!", "a pear"])).splitlines()
    assert lines == [
        "      2  red",
        "      1  a",
        "      1  apple",
        "      1  heart",
        "      1  pear",
        "5 words of 3 captions",
    ]
    assert "others are read letter by letter" in reading.listing(words(words=2))
