"""The tokenizer of captions, and the text encoder that is trained with the network."""

import functools
import re
import unicodedata
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.text.learned import CaptionTokenizer, TextTransformer

CAPTIONS = ["red heart", "Smiling face with heart-eyes", "flag: Côte d’Ivoire", "dog face", "red apple", "keycap: #"]


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.train(CAPTIONS, length=8)


def words(tokenizer, text):
    return tokenizer.rules.encode(text).tokens


def test_words_of_the_captions_are_one_token_each(tokenizer):
    assert words(tokenizer, "a RED heart") == [" ", "a", " red", " heart"]
    assert words(tokenizer, "heart-eyes") == words(tokenizer, " heart - eyes ") == [" heart", " -", " eyes"]
    assert words(tokenizer, "hearts") == [" heart", "s"]


@pytest.mark.parametrize(
    "text",
    ["red heart", "日本の猫", "👩\u200d🚀 and \x00", "<pad> <0x41>", "▁ _ \u0301a", "ÅÉ e\u0301", "a\tb\u2003c"],
)
def test_any_text_comes_back_but_for_case_and_spacing(tokenizer, text):
    plain = tokenizer.rules.normalizer.normalize_str(text)
    assert plain == unicodedata.normalize("NFC", text).lower()
    back = tokenizer.rules.decode(tokenizer.rules.encode(text).ids)
    assert re.sub(r"\s", "", back) == re.sub(r"\s", "", plain)


def test_random_unicode_comes_back(tokenizer):
    draw = np.random.default_rng(0)
    for _ in range(200):
        codes = [code for code in draw.integers(1, 0x30000, 12) if not 0xD800 <= code <= 0xDFFF]
        plain = tokenizer.rules.normalizer.normalize_str("".join(map(chr, codes)))
        back = tokenizer.rules.decode(tokenizer.rules.encode(plain).ids)
        assert re.sub(r"\s", "", back) == re.sub(r"\s", "", plain)


def test_the_same_captions_give_the_same_tokenizer(tokenizer):
    assert CaptionTokenizer.train(iter(CAPTIONS), 8).to_json() == tokenizer.to_json()
    back = CaptionTokenizer.from_json(tokenizer.to_json())
    assert back.to_json() == tokenizer.to_json() and back.size == tokenizer.size
    np.testing.assert_array_equal(back(CAPTIONS)["tokens"], tokenizer(CAPTIONS)["tokens"])


def test_rows_are_padded_and_an_empty_text_has_no_token(tokenizer):
    told = tokenizer(["red heart", "", "dog"])
    assert told["tokens"].shape == told["mask"].shape == (3, 8) and told["tokens"].dtype == np.int32
    np.testing.assert_array_equal(told["mask"].sum(1), [2, 0, 1])
    assert not told["tokens"][~told["mask"]].any() and told["tokens"][told["mask"]].all()
    assert told["tokens"].max() < tokenizer.size


def test_a_text_that_is_too_long_is_cut_with_a_warning(tokenizer):
    long = "red heart " * 4 + "dog face"
    with pytest.warns(UserWarning, match="'red heart .* has 10 tokens of which 8 are read: it loses 'dog face'"):
        told = tokenizer(["dog", long])
    np.testing.assert_array_equal(told["tokens"][1], tokenizer([long[:39]])["tokens"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([long[:39]])


def test_only_the_frequent_words_are_kept():
    tokenizer = CaptionTokenizer.train(CAPTIONS, 16, words=3)
    assert words(tokenizer, "heart") == [" heart"] and len(words(tokenizer, "apple")) == 6


@functools.partial(jax.jit, static_argnums=0)
def run(module, variables, tokens, mask):
    return module.apply(variables, tokens, mask)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    module = TextTransformer(tokenizer.size, width=32, depth=2, heads=2, hidden=48)
    told = tokenizer(["red heart", "", "dog face"])
    return module, jax.jit(module.init)(jax.random.key(0), **told), told


def test_what_the_encoder_gives(encoder):
    module, variables, told = encoder
    given = run(module, variables, **told)
    assert given["context"].shape == (3, 8, 32) and given["pooled"].shape == (3, 32)
    np.testing.assert_array_equal(given["mask"], told["mask"])
    np.testing.assert_allclose(given["pooled"][0], given["context"][0, :2].mean(0), atol=1e-6)
    assert not np.any(given["pooled"][1])


def test_padding_is_not_seen_and_order_is(encoder):
    module, variables, told = encoder
    given = run(module, variables, **told)
    other = run(module, variables, np.where(told["mask"], told["tokens"], 5), told["mask"])
    np.testing.assert_allclose(other["pooled"], given["pooled"], atol=1e-6)
    wider = {name: np.pad(value, ((0, 0), (0, 3))) for name, value in told.items()}
    np.testing.assert_allclose(run(module, variables, **wider)["pooled"], given["pooled"], atol=1e-6)
    turned = told["tokens"].copy()
    turned[0, :2] = turned[0, 1::-1]
    assert np.abs(run(module, variables, turned, told["mask"])["pooled"][0] - given["pooled"][0]).max() > 1e-3


def test_gradients_are_finite_where_a_text_is_empty(encoder):
    module, variables, told = encoder
    slope = jax.grad(lambda variables: jnp.sum(run(module, variables, **told)["pooled"] ** 2))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert np.any(slope["params"]["words"]["embedding"])
