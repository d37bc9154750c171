"""How a prompt is read by a model that knows no words but those of its captions.

Such a model draws "red heart" well if its captions say so, and has never seen "A red heart!", "hearts, red" or "❤️". A
prompt is therefore read as what the captions say of the same thing; words that no caption has are left out and said,
never spelled.
"""

import difflib
import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

FILLERS = frozenset(
    "a an the some any this that these those my your our of s please draw paint show make me us emoji icon picture "
    "pictures image images photo photos photograph drawing painting".split()
)
"""Words that say nothing of what is drawn: dropped where the captions do not have them."""

RELATIONS = frozenset(
    "on in under over above below behind beside before after between near with without to from into onto at by for and "
    "or not is are has holding wearing riding eating".split()
)
"""Words that make order matter: a dog on a car is no car on a dog."""

ANY_ORDER = 3
"""A caption of at most so many words is recognised in any order."""

SELDOM = 0.01
"""A filler that fewer captions have than this share is dropped where it does not belong to a caption."""

SAME = tuple(
    words.split()
    for words in (
        "red crimson scarlet ruby vermilion maroon burgundy",
        "orange amber apricot tangerine",
        "yellow golden gold",
        "green emerald lime olive",
        "blue azure navy cobalt sapphire indigo cyan turquoise teal",
        "purple violet lilac lavender mauve",
        "pink magenta fuchsia salmon rosy",
        "gray grey silver slate",
        "brown chestnut",
        "black ebony",
        "white ivory",
    )
)
"""Names of nearly one colour, the plainest first: one that no caption has is read as another that they have."""

IRREGULAR = {
    "man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "die": "dice", "cactus": "cacti",
}  # fmt: skip

JOINERS = "\ufe0e\ufe0f\u200d\u20e3"
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
NEAR = 3


class Reworded(Warning):
    """A prompt is read in other words than it was given in, or as what no caption says."""


@dataclass(frozen=True)
class Reading:
    """The `text` that a prompt is read as, and its words that the captions do not have.

    `spelled`: those words are read letter by letter, since the captions may have had them; else they are left out.
    `composed`: it is a caption behind a word that other captions begin with, which no caption says.
    """

    prompt: str
    text: str
    unknown: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    spelled: bool = False
    composed: bool = False

    @property
    def said(self) -> str:
        """What the user is told, in one line; "" when the prompt is read as it stands."""
        lost = f"no caption has {_listed(self.unknown)}{_near(self.near)}" if self.unknown else ""
        if self.unknown and self.spelled:
            return (
                f'"{self.prompt}": the frequent words of the captions have no {_listed(self.unknown)}{_near(self.near)}'
            )
        if self.text == self.prompt:
            return ""
        return f'"{self.prompt}" is read as "{self.text}"' + (f": {lost}" if lost else "")


def remarks(readings: Sequence[Reading]) -> list[str]:
    """What to say of prompts: each that is read in other words, then in one line those that no caption says."""
    said = [reading.said for reading in readings if reading.said]
    composed = list(dict.fromkeys(f'"{reading.text}"' for reading in readings if reading.composed))
    if composed:
        more = f" and {len(composed) - NEAR} more" if len(composed) > NEAR else ""
        said.append(f"composed, since no training picture is captioned so: {', '.join(composed[:NEAR])}{more}")
    return list(dict.fromkeys(said))


@dataclass(frozen=True)
class Words:
    """The words of the captions that a model was trained on.

    `counts` has the pieces that `split` makes of a caption, words and other signs, and how often each occurs;
    `complete`: none is missing. `captions` are the different captions and how often each occurs; empty where they are
    too many to be kept.
    """

    counts: Mapping[str, int]
    captions: Mapping[str, int]
    complete: bool
    split: Callable[[str], list[str]]

    def read(self, prompt: str) -> Reading:
        """What the model reads; "" is read as nothing.

        Articles, plurals, accents, punctuation and emoji become what the captions say; a caption of a few words is
        recognised in any order. Raises `UserError` when the captions have no word of it.
        """
        if not prompt.strip() or self._plain(prompt) in self._exact:
            return Reading(prompt, prompt.strip() and prompt)
        pieces = self.split(self._named(prompt))
        if found := self._by_letters.get(_joined(pieces)):
            return Reading(prompt, found)
        kept, unknown = self._known(self._respelled(pieces))
        ordered = not RELATIONS.isdisjoint(pieces)
        caption = self._caption(kept, ordered)
        composed = None if caption else self._composed(kept, ordered)
        text = caption or composed or " ".join(self._usual(kept))
        near = tuple(dict.fromkeys(word for lost in unknown if lost not in RELATIONS for word in self.near(lost)))
        near = near[:NEAR]
        if not self.complete:
            return Reading(prompt, prompt if unknown else text, unknown, near, spelled=True)
        self._check(prompt, kept, unknown, near)
        text = prompt if self._plain(text) == self._plain(prompt) else text
        return Reading(prompt, text, unknown, near, composed=bool(composed))

    def near(self, word: str) -> list[str]:
        """Known words that are spelled alike, the nearest first."""
        known = [known for known in self.counts if _is_word(known) and len(known) > 2]
        return difflib.get_close_matches(word, known, NEAR, 0.6) or difflib.get_close_matches(word, known, NEAR, 0.5)

    def _check(self, prompt: str, kept: list[str], unknown: tuple[str, ...], near: tuple[str, ...]) -> None:
        """Raises `UserError` for a prompt of which nothing is known, or only what stands before a thing."""
        content = self._content(kept)
        hint = "say what the captions of its training say; `diffjax words --run RUN` lists their words"
        if not content and (unknown or all(map(_is_word, kept))):
            raise UserError(f'no caption has a word of "{prompt}"{_near(near)}: {hint}')
        if unknown and self._leading.issuperset(content):
            raise UserError(f'"{prompt}": no caption has {_listed(unknown)}{_near(near)}: {hint}')

    def _known(self, pieces: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
        """The pieces as the captions write them, and the words among them that they do not have."""
        kept, unknown = [], []
        for piece in pieces:
            if (word := self._form(piece)) is not None:
                kept.append(word)
            elif _says(piece):
                unknown.append(piece)
        return kept, tuple(dict.fromkeys(unknown))

    def _form(self, piece: str) -> str | None:
        """The piece as the captions write it: itself, with accents, in the singular or the plural."""
        if piece in self.counts or not _is_word(piece):
            return piece if piece in self.counts else None
        if not piece.isascii() and any(map(_has_no_spaces, piece)):
            return piece if set(piece) <= self._letters else None
        if piece in FILLERS:
            return None
        plain = _fold(piece)
        same = next((names for names in SAME if plain in names), ())
        return next((self._forms[form] for form in (plain, *plurals(plain), *same) if form in self._forms), None)

    def _caption(self, words: list[str], ordered: bool) -> str | None:
        """The caption that says the same in the same words, or, unless they are `ordered`, in any order if it
        is short.
        """
        content = self._content(words)
        return self._by_words.get(content) or (None if ordered else self._by_bag.get(_bag(content)))

    def _composed(self, words: list[str], ordered: bool) -> str | None:
        """A leading word and the caption that says the others: "panda purple" becomes "purple panda"."""
        leading, others = self._parted(words)
        caption = self._caption(others, ordered) if leading else None
        return f"{leading} {caption}" if caption else None

    def _respelled(self, pieces: list[str]) -> list[str]:
        """The pieces; those beside a leading word as a caption has them, if that is of the same letters."""
        leading, others = self._parted(pieces)
        caption = self._by_letters.get(_joined(others)) if leading else None
        return [leading, *self.split(caption)] if leading and caption else pieces

    def _parted(self, pieces: list[str]) -> tuple[str | None, list[str]]:
        """The one leading word of the pieces as captions write it, or None without or with several, and the rest."""
        leading = {self._form(piece) for piece in pieces} & self._leading
        if len(leading) != 1:
            return None, pieces
        return next(iter(leading)), [piece for piece in pieces if self._form(piece) not in leading]

    def _usual(self, words: list[str]) -> list[str]:
        """The words without the fillers that the captions seldom have."""
        seldom = SELDOM * sum(self.captions.values())
        return [word for word in words if word not in FILLERS or self.counts[word] >= seldom]

    def _content(self, pieces: Iterable[str]) -> tuple[str, ...]:
        """The words that say what is drawn, each once, in the singular where the captions have that too."""
        return tuple(dict.fromkeys(self._singular.get(piece, piece) for piece in pieces if _says(piece)))

    def _plain(self, text: str) -> str:
        return " ".join(self.split(text))

    def _named(self, prompt: str) -> str:
        """The prompt with the names of its emoji in their place, but for those that the captions have."""
        if all(unicodedata.category(sign) not in ("So", "Sk", "Cn") for sign in prompt):
            return prompt
        return names_of_emoji(prompt, keep=lambda sign: sign.strip(JOINERS) in self.counts)

    @functools.cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(map(self._plain, self.captions))

    @functools.cached_property
    def _letters(self) -> frozenset[str]:
        return frozenset("".join(self.counts))

    @functools.cached_property
    def _forms(self) -> dict[str, str]:
        """Known words by how they may be written: without accents, and in the plural."""
        found: dict[str, str] = {}
        frequent = sorted(filter(_is_word, self.counts), key=lambda word: -self.counts[word])
        for word in frequent:
            found.setdefault(_fold(word), word)
        for word in frequent:
            for form in plurals(_fold(word)):
                found.setdefault(form, word)
        return found

    @functools.cached_property
    def _singular(self) -> dict[str, str]:
        return {form: word for word in self.counts if _is_word(word) for form in plurals(word) if form in self.counts}

    @functools.cached_property
    def _ranked(self) -> list[tuple[str, tuple[str, ...]]]:
        """The captions, the most frequent first, with what they say."""
        ranked = sorted(self.captions, key=lambda caption: (-self.captions[caption], caption))
        return [(caption, self._content(self.split(caption))) for caption in ranked]

    @functools.cached_property
    def _leading(self) -> frozenset[str]:
        """The words that begin every longer caption that has them, two at least: the colours of coloured things."""
        longer = [content for _, content in self._ranked if len(content) > 1]
        begun = Counter(content[0] for content in longer)
        later = {word for content in longer for word in content[1:]}
        return frozenset(word for word, captions in begun.items() if captions > 1 and word not in later)

    @functools.cached_property
    def _by_words(self) -> dict[tuple[str, ...], str]:
        return {content: caption for caption, content in reversed(self._ranked) if content}

    @functools.cached_property
    def _by_letters(self) -> dict[str, str]:
        """The captions by their letters, whatever is between the words, in the plural too."""
        joined = [(_joined(self.split(caption)), caption) for caption, _ in reversed(self._ranked)]
        found = {form: caption for letters, caption in joined for form in plurals(letters)}
        return found | {letters: caption for letters, caption in joined if letters}

    @functools.cached_property
    def _by_bag(self) -> dict[tuple[str, ...], str]:
        bags = ((_bag(content), caption) for caption, content in reversed(self._ranked))
        return {bag: caption for bag, caption in bags if bag}


def plurals(word: str) -> Iterator[str]:
    """How English may write a word in the plural."""
    if word in IRREGULAR:
        yield IRREGULAR[word]
    if len(word) < 3 or not word.isalpha():
        return
    if word[-1] == "y" and word[-2] not in "aeiou":
        yield f"{word[:-1]}ies"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        yield f"{word}es"
    else:
        yield f"{word}s"
        if word[-1] == "o":
            yield f"{word}es"
    if word.endswith(("f", "fe")):
        yield f"{word.rstrip('e')[:-1]}ves"


def names_of_emoji(text: str, keep: Callable[[str], bool] = lambda sign: False) -> str:
    """The text with the English name of each emoji in its place, but for those to `keep`.

    The names are Unicode's own, or those of the package `emoji` where it is installed, which knows joined ones too.
    """
    try:
        import emoji
    except ImportError:
        return "".join(_name_of_sign(sign, keep) for sign in text)
    named = lambda sign, about: sign if keep(sign) else f" {about.get('en', '').strip(':').replace('_', ' ')} "
    return "".join(_name_of_sign(sign, keep) for sign in emoji.replace_emoji(text, named))


def _name_of_sign(sign: str, keep: Callable[[str], bool]) -> str:
    if sign in JOINERS or ord(sign) in SKIN_TONES:
        return ""
    if unicodedata.category(sign) != "So" or keep(sign):
        return sign
    return f" {unicodedata.name(sign, '').lower()} "


def _bag(content: tuple[str, ...]) -> tuple[str, ...]:
    """The words in an order of their own; none where their order says something."""
    ordered = len(content) > ANY_ORDER or not RELATIONS.isdisjoint(content)
    return () if ordered else tuple(sorted(content))


def _joined(pieces: Iterable[str]) -> str:
    return "".join(_fold(piece) for piece in pieces if _says(piece))


def _says(piece: str) -> bool:
    return _is_word(piece) and piece not in FILLERS


def _is_word(piece: str) -> bool:
    return any(letter.isalnum() for letter in piece)


def _has_no_spaces(letter: str) -> bool:
    """Whether its script writes words without spaces between them."""
    name = unicodedata.name(letter, "")
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


def _fold(word: str) -> str:
    letters = unicodedata.normalize("NFKD", word.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _listed(words: Iterable[str]) -> str:
    return " or ".join(f'"{word}"' for word in words)


def _near(words: tuple[str, ...]) -> str:
    return f" (near: {', '.join(words)})" if words else ""


def listing(words: Words) -> str:
    """A line for each word, with how many times the captions have it, the most frequent first; then their sum."""
    counts = {word: count for word, count in words.counts.items() if _is_word(word)}
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    lines = [f"{counts[word]:7d}  {word}" for word in ranked]
    kept = "" if words.complete else ", the most frequent ones: others are read letter by letter"
    captions = f" of {counted(len(words.captions), 'caption')}" if words.captions else ""
    return "\n".join([*lines, f"{counted(len(lines), 'word')}{captions}{kept}"])
