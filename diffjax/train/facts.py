"""What a run takes from its data before the first step, and keeps in its folder:

data.json        the shape of a picture, and the names of the classes
tokenizer.json   the words of the captions, where a text encoder is trained too
encoder.json     which text encoder it is, where that is frozen
seen.npz         some of the pictures, by which the run is judged
"""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from diffjax.text import frozen
from diffjax.text.learned import CaptionTokenizer
from diffjax.utils import files
from diffjax.utils.errors import UserError

DATA, TOKENIZER, ENCODER, SEEN = "data.json", "tokenizer.json", "encoder.json", "seen.npz"

SHOWN, AVERAGED = 8, 256
"""How many pictures are kept, and of how many the mean."""

VOCABULARY = 8192
"""The size of a vocabulary that is not known yet: the most that it can be, but for single letters."""


class Seen(NamedTuple):
    """Pictures of the data set with a caption ("" without) and a label (-1 without) each, and the mean of more, in
    [-1, 1].
    """

    image: UInt8[np.ndarray, "n h w c"]
    caption: list[str]
    label: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, "h w c"]


@dataclass(frozen=True)
class Blank:
    """A tokenizer of the largest size, of which only the shapes of its tokens are known."""

    length: int
    size: int = VOCABULARY

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        return {
            "tokens": np.zeros((len(captions), self.length), np.int32),
            "mask": np.ones((len(captions), self.length), bool),
        }


def keep(config: ConfigDict, workdir: Path, data: Any) -> None:
    """Write what is not there yet. Raises `UserError` when the config asks for classes that the data have not."""
    if config.classes and config.classes != data.num_classes:
        raise UserError(f"classes is {config.classes} and {data.name} has {data.num_classes}: set classes to that")
    if not (workdir / DATA).exists():
        names = data.class_names if config.classes else ()
        files.write_json(workdir / DATA, {"shape": [data.size, data.size, data.channels], "classes": names})
    if seen(workdir) is None:
        _keep_seen(workdir / SEEN, data)
    if frozen.is_frozen(config.text):
        digest = frozen.digest(frozen.folder(config.text))
        files.write_json(workdir / ENCODER, {"name": config.text.name, "digest": digest})
    elif config.text and not (workdir / TOKENIZER).exists():
        learned = learn_tokenizer(config, data.captions(), data.config.templates)
        files.write_atomic(workdir / TOKENIZER, learned.to_json().encode())


def _keep_seen(path: Path, data: Any) -> None:
    every = np.linspace(0, len(data) - 1, min(AVERAGED, len(data))).astype(int)
    mean = data.images(every).mean(axis=0)
    examples = data.examples(range(min(SHOWN, len(data))))
    texts = [data.config.templates[0].replace("{}", group[0]) if group else "" for group in examples["captions"]]
    with files.open_atomic(path) as file:
        np.savez(file, image=examples["image"], caption=np.array(texts), label=examples["label"], mean=mean)


def learn_tokenizer(
    config: ConfigDict, captions: Iterable[Sequence[str]], templates: Sequence[str]
) -> CaptionTokenizer:
    """The tokenizer of the captions of all pictures, in all templates."""
    texts = itertools.chain.from_iterable(captions)
    filled = (template.replace("{}", text) for text in texts for template in templates)
    return CaptionTokenizer.train(filled, config.text.tokens)


def shape_and_classes(workdir: Path) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """The shape of a picture, and the names of the classes. Raises `UserError` where no run was begun."""
    if not (workdir / DATA).is_file():
        raise UserError(f"{workdir} holds no run (no {DATA}); train one with: diffjax train --workdir {workdir}")
    kept = files.read_json(workdir / DATA)
    return tuple(kept["shape"]), tuple(kept["classes"])


def tokenizer(workdir: Path) -> CaptionTokenizer:
    """The tokenizer that a run was trained with. Raises `UserError` when it cannot be read."""
    try:
        return CaptionTokenizer.from_json((workdir / TOKENIZER).read_text(encoding="utf-8"))
    except Exception as error:  # the parser of a damaged file raises no one kind
        raise UserError(f"{workdir / TOKENIZER} is damaged: put it back from a copy") from error


def encoder_folder(choice: ConfigDict, workdir: Path) -> Path:
    """Where the frozen encoder of a run lies. Raises `UserError` when it is not the one that the run was
    trained with.
    """
    folder, known = frozen.folder(choice), files.read_json(workdir / ENCODER)
    if frozen.digest(folder) != known["digest"]:
        raise UserError(f"{folder} is not the {choice.name} that {workdir} was trained with: put that one back")
    return folder


def seen(workdir: Path) -> Seen | None:
    """The pictures that a run has seen; None where they are not kept or can no longer be read, which what it draws
    does not depend on.
    """
    try:
        with np.load(workdir / SEEN) as file:
            return Seen(file["image"], file["caption"].tolist(), file["label"], file["mean"])
    except FileNotFoundError:
        return None
    except Exception:  # a damaged archive raises no one kind
        logging.getLogger("diffjax").warning("%s is damaged; the next training writes it anew", workdir / SEEN)
        return None
