"""What each word, or the class, did: where the network looked at it, and the picture without it.

Attention says where a word was looked at, not what came of it; that is what the picture without the word says, drawn
from the same noise.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffjax.explain import pictures
from diffjax.explain.attention import looked, places, tokenized
from diffjax.explain.section import Block, Figure, Section, Shown, Strip, Text
from diffjax.explain.subject import Subject, knocked_out
from diffjax.explain.walk import Step, draw, look
from diffjax.models.model import Inputs, Recipe
from diffjax.utils.errors import UserError

WORDS = 8
"""Words that are shown at most."""

MOMENTS = 6
"""Steps at which attention is shown at most."""

ALIKE = 0.02
"""The distance (rms, in [-1, 1]) below which two pictures are called the same."""


def section(subject: Subject, recipe: Recipe, inputs: Inputs, steps: Sequence[Step]) -> Section:
    """Heat maps of attention, and the pictures without each word."""
    name, title = "words", "What the class did" if subject.label and not subject.prompt else "What each word did"
    if not subject.prompt and subject.label is None:
        return Section(name, title, left_out="This picture was drawn without words.")
    numbers: dict[str, Any] = {"prompt": subject.prompt, "label": subject.label}
    found = _looked_at(subject, recipe, inputs, steps, numbers), _without(subject, recipe, steps, numbers)
    figures = tuple(filter(None, found))
    return Section(name, title, figures, numbers, "" if figures else "This model cannot draw without its class.")


def _looked_at(
    subject: Subject, recipe: Recipe, inputs: Inputs, steps: Sequence[Step], numbers: dict[str, Any]
) -> Figure | None:
    """Heat maps of each word: of all steps, and of some of them."""
    words = places(subject.prompt, tokenized(subject.model)) if subject.prompt else []
    words = [(word, at) for word, at in words if at][:WORDS]
    cond = inputs.cond["cond"] if recipe.reads else inputs.cond
    weights = looked(subject.model.denoiser, steps, cond) if words else None
    if weights is None:
        return None
    maps = np.stack([weights[..., at].sum(axis=-1) for _, at in words], axis=1)
    share = maps.mean(axis=(0, 2, 3))
    every = [{"word": word, "tokens": at, "share": float(part)} for (word, at), part in zip(words, share)]
    numbers["attention"] = {"words": every, "text": float(weights.sum(-1).mean()), "maps": maps.round(6).tolist()}
    picture = look(subject, steps[-1].after)
    blocks: list[Block] = [_summed(words, maps, picture)]
    blocks += [_by_step(words, maps, steps, picture)] if len(steps) > 1 else []
    blocks.append(Text(_shares(numbers["attention"])))
    plain = (
        "While it works, the network looks back at the words: bright is where it looked at this word most, dark where "
        "it did not. A word that is looked at everywhere alike says something of the whole picture."
    )
    exact = "A_(uj) = softmax(q_u k_j / sqrt(h)), the mean over heads, layers and steps, summed over a word's tokens j"
    return Figure("Where the network looked", plain, exact, "diffjax/nets/layers.py", tuple(blocks))


def _heat(values: Float[np.ndarray, "r c"], among: Float[np.ndarray, "..."], picture: np.ndarray) -> np.ndarray:
    """A heat map, dark at the least and bright at the most of `among`."""
    return pictures.heat(values - among.min(), picture.shape[:2], float(among.max() - among.min()))


def _shares(attention: dict[str, Any]) -> str:
    """Where all attention went."""
    words = sum(of["share"] for of in attention["words"])
    rest = max(0.0, attention["text"] - words)
    other = f", the rest of the text (its begin and end, and what fills it up) {rest:.1%}" if rest >= 0.001 else ""
    return f"Of all attention, these words have {words:.1%}{other}, and the picture itself {1 - attention['text']:.1%}."


def _summed(words: Sequence[tuple[str, Any]], maps: Float[np.ndarray, "k n r c"], picture: np.ndarray) -> Strip:
    mean = maps.mean(axis=0)
    shown = [
        Shown(
            f"words-{i:02d}-attention",
            pictures.veiled(picture, _heat(of, of, picture)),
            f"{word}: {of.mean():.1%} of all attention",
            f"where the network looked at {word}",
        )
        for i, ((word, _), of) in enumerate(zip(words, mean))
    ]
    return Strip(tuple(shown), columns=4)


def _by_step(
    words: Sequence[tuple[str, Any]], maps: Float[np.ndarray, "k n r c"], steps: Sequence[Step], picture: np.ndarray
) -> Strip:
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MOMENTS, len(steps))).round().astype(int))
    shown = [
        Shown(
            f"words-{i:02d}-step-{steps[k].index + 1:04d}",
            _heat(maps[k, i], maps[:, i], picture),
            f"{word}, step {steps[k].index + 1}",
            f"where the network looked at {word} at step {steps[k].index + 1}",
        )
        for i, (word, _) in enumerate(words)
        for k in chosen
    ]
    return Strip(tuple(shown), len(chosen), len(chosen) if len(chosen) < 5 else 3)


def _without(subject: Subject, recipe: Recipe, steps: Sequence[Step], numbers: dict[str, Any]) -> Figure | None:
    """The picture without each word, and where it differs; None where nothing can be left out."""
    final, shown, found = steps[-1].after, [], []
    picture = look(subject, final)
    for i, (word, prompt, x) in enumerate(_drawn_without(subject, recipe)):
        other, distance = look(subject, x), float(np.sqrt(np.mean((x - final) ** 2)))
        change = np.abs(other.astype(np.float32) - picture).mean(axis=-1) / 255
        map_ = pictures.heat(change, picture.shape[:2], 0.5)
        left, what = _quoted(prompt) if prompt else "nothing", _quoted(word) if subject.prompt else word
        shown += [
            Shown(f"words-{i:02d}-without", other, f"without {what}: of {left}", f"the picture drawn of {left}"),
            Shown(
                f"words-{i:02d}-change", map_, f"what {what} changed: {distance:.2f}", f"where {what} made a difference"
            ),
        ]
        found.append({"word": word, "prompt": prompt, "distance": distance})
    numbers["without"] = found
    if not found:
        return None
    plain = (
        "The only sure way to know what a word did is to leave it out: here is the picture from the very same noise, "
        "without it, and beside that, bright, where the two differ."
    )
    exact = "|x(c) - x(c without j)| from the same noise, and its root mean square"
    blocks = (Strip(tuple(shown), columns=4), Text(_verdict(found), strong=True))
    return Figure("The picture without it", plain, exact, "diffjax/explain/words.py", blocks)


def _quoted(text: str) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"


def _drawn_without(subject: Subject, recipe: Recipe) -> Iterator[tuple[str, str, np.ndarray]]:
    """Each word, the prompt without it, and the state drawn with that; with "" where none of the rest can be read."""
    parts = knocked_out(subject.prompt)[:WORDS] if subject.prompt else [("the class", "")]
    for word, prompt in parts:
        try:
            yield word, prompt, draw(subject, recipe, prompt)
        except UserError:
            if subject.model.has_null:
                yield word, "", draw(subject, recipe, "")


def _verdict(found: Sequence[dict[str, Any]]) -> str:
    """Which word did most, in words."""
    idle = [of["word"] for of in found if of["distance"] < ALIKE]
    most = max(found, key=lambda of: of["distance"])
    if len(idle) == len(found):
        return "Leaving out a single one changes nothing in this picture."
    said = f"What did most: {most['word']}"
    return said + (f"; without {' or '.join(idle)} the picture is the same." if idle else ".")
