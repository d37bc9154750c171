"""From a configuration to a data set that can be trained on."""

import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Float

from diffjax.data.captions import Classes, Folder
from diffjax.data.images import check_size, colour
from diffjax.data.pipeline import Batches, Pictures, Tokenize, batches
from diffjax.data.prepare import damaged, prepared
from diffjax.data.records import Records
from diffjax.data.skipped import Skipped
from diffjax.data.tables import Table
from diffjax.data.webdataset import Shards
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted, track


def default_config() -> ml_collections.ConfigDict:
    """Every field of `config.data` with its default; `diffjax.config.base` says what each means."""
    return ml_collections.ConfigDict(
        {
            "name": "openmoji",
            "path": "",
            "data_dir": "",
            "split": "train",
            "held_out": "",
            "subset": "no_skin_tones",
            "size": 32,
            "channels": 0,
            "background": "white",
            "crop": "center",
            "flip": False,
            "enlarge": False,
            "caption": "any",
            "templates": ("{}",),
            "tag_dropout": 0.0,
            "workers": 0,
        }
    )


def _complete(config: Any) -> ml_collections.ConfigDict:
    """`config` with the missing fields filled in. Raises `UserError` for a field or value that does not exist."""
    complete = default_config()
    for field, value in config.items():
        if field not in complete:
            nearest = difflib.get_close_matches(field, list(complete), 1)
            raise UserError(f"data.{field} does not exist" + (f"; did you mean data.{nearest[0]}?" if nearest else ""))
        try:
            complete[field] = value
        except TypeError as error:
            kind = type(complete[field]).__name__
            raise UserError(f"data.{field}={value!r} is of the wrong kind; write a value of type {kind}") from error
    choices = {"crop": ("center", "random"), "caption": ("any", "first"), "channels": (0, 1, 3)}
    for field, allowed in choices.items():
        if complete[field] not in allowed:
            raise UserError(f'data.{field}="{complete[field]}" must be {" or ".join(map(str, allowed))}')
    for field, fine in {"size": complete.size > 0, "workers": complete.workers >= 0}.items():
        if not fine:
            raise UserError(f"data.{field}={complete[field]} is too small")
    if not complete.templates or not all("{}" in template for template in complete.templates):
        raise UserError('data.templates must be texts with a {} for the caption, such as "a picture of {}"')
    colour(complete.background)
    return complete


SHOWN = 3
"""How many of the pictures that are left out are named on the screen."""


@dataclass(frozen=True)
class Dataset:
    """Pictures of one size with captions, classes, both or neither.

    With classes and no captions, a picture's caption is the name of its class.
    """

    name: str
    config: ml_collections.ConfigDict
    records: Records
    channels: int
    skipped: Skipped
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.records)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.config.size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty when the data has no classes."""
        return self.records.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def has_captions(self) -> bool:
        return self.records.has_captions

    def captions(self) -> list[tuple[str, ...]]:
        """Every record's captions, the main one first; none for a record that cannot be read."""
        return [self.pictures.captions(index) for index in track(range(len(self)), "reading the captions", len(self))]

    def examples(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """`image` uint8 (n, size, size, channels), `captions` n tuples, `label` int32 (n,), -1 where there is none."""
        found = [self.pictures.example(int(index)) for index in indices]
        return {
            "image": np.stack([example.image for example in found]),
            "captions": [example.captions for example in found],
            "label": np.array([example.label for example in found], np.int32),
        }

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n size size channels"]:
        """The pictures alone, in [-1, 1]."""
        from diffjax.utils import image

        return image.from_uint8(self.examples(indices)["image"])

    def batches(
        self, batch_size: int, seed: int, tokenize: Tokenize | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Batches:
        """The endless, shuffled stream of batches (see `pipeline`).

        `batch_size` counts all processes' rows; `shard` is (this process, number of processes). `tokenize` maps b
        captions to arrays with b rows, such as `tokens` int32 (b, l) and `mask` bool (b, l). Raises `UserError` when it
        is given and the data has no captions.
        """
        if tokenize is not None and not self.has_captions:
            raise UserError(f"{self.name} has no captions to condition on; add some, or train without text")
        identity = {"split": self.config.split, "examples": len(self), "content": self.records.digest()}
        return batches(self.pictures, self.config, batch_size, seed, tokenize, shard, identity)


OPENMOJI = ("openmoji", "tinted_openmoji")


def _openmoji(config: ml_collections.ConfigDict, folder: Path, before: Callable[[], None]) -> Any:
    from diffjax.data import openmoji, tinted_openmoji

    kind = openmoji.Openmoji if config.name == "openmoji" else tinted_openmoji.TintedOpenmoji
    settings = openmoji.config(config.size, config.background, config.subset)
    return prepared(lambda: kind(config=settings, data_dir=folder), before)


def _captioned_pictures(config: ml_collections.ConfigDict, folder: Path, before: Callable[[], None]) -> Any:
    from diffjax.data import captioned_pictures

    settings = _settings(config)
    return prepared(lambda: captioned_pictures.builder(settings, folder), before)


def _settings(config: ml_collections.ConfigDict) -> Any:
    from diffjax.data import captioned_pictures

    return captioned_pictures.config(_source(config), config.size, config.background, config.enlarge)


def _source(config: ml_collections.ConfigDict) -> Any:
    if not config.path:
        raise UserError(f"data.path is empty; set it to where the pictures of {config.name} are")
    return SOURCES[config.name](Path(config.path).expanduser())


def _named(config: ml_collections.ConfigDict, folder: Path, before: Callable[[], None]) -> Any:
    """Any other TFDS dataset, found in `folder` or downloaded to it."""
    import tensorflow_datasets as tfds

    try:
        return prepared(lambda: tfds.builder(config.name, data_dir=folder), before, quiet=False)
    except tfds.core.DatasetNotFoundError as error:
        names = [*BUILDERS, *tfds.list_builders(with_community_datasets=False)]
        nearest = difflib.get_close_matches(config.name, names, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see tensorflow.org/datasets/catalog"
        raise UserError(f'data.name="{config.name}" is no data set; {hint}') from error
    except UserError:
        raise
    except Exception as error:
        remedy = "check the network, or set data.data_dir to a folder that holds it"
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot prepare {config.name}: {reason}; {remedy}") from error


SOURCES = {"captioned_folder": Folder, "class_folder": Classes, "captioned_table": Table, "webdataset": Shards}
BUILDERS = {**dict.fromkeys(OPENMOJI, _openmoji), **dict.fromkeys(SOURCES, _captioned_pictures)}


def fetch(config: ml_collections.ConfigDict, retry: bool = False) -> None:
    """Fetch the pictures that a table has on the web, which `load` never does; with `retry` also those that
    failed before.
    """
    config = _complete(config)
    if config.name == "captioned_table":
        _source(config).fetch(retry)


def prepare_by_beam(config: ml_collections.ConfigDict, options: str) -> None:
    """Prepare what `load` reads by Apache Beam, with pipeline options in words (empty: all cores of this machine).

    Raises `UserError` as `load` does, and for a data set that is not made of one's own pictures.
    """
    from diffjax.data import by_beam

    config = _complete(config)
    if config.name not in SOURCES:
        raise UserError(f"--beam prepares {', '.join(SOURCES)}: leave it out for {config.name}")
    by_beam.prepare(_settings(config), _folder(config), options or by_beam.LOCAL)


def captions(config: ml_collections.ConfigDict) -> list[tuple[str, ...]] | None:
    """Every picture's captions, of all splits, before anything is prepared; None where only preparing tells them.

    Raises `UserError` as `load` does for what is not there.
    """
    config = _complete(config)
    if config.name == "openmoji":
        from diffjax.data import openmoji

        return [emoji.names for emoji in openmoji.select(config.subset)]
    if config.name == "tinted_openmoji":
        from diffjax.data import tinted_openmoji

        return tinted_openmoji.captions(config.subset)
    return [picture.captions for picture in _source(config).pictures()] if config.name in SOURCES else None


def _channels(config: ml_collections.ConfigDict, depth: int | None, metadata: Any) -> int:
    """1 for data that are grey, else 3."""
    if metadata is not None and dict(metadata.items()).get("grey"):
        message = "all pictures of %s are grey and have one channel; data.channels=3 makes it three"
        logging.getLogger("diffjax").warning(message, config.name)
        return 1
    return 1 if depth == 1 else 3


def _say(skipped: Skipped, name: str) -> None:
    """How many pictures are left out, and the first of them."""
    if left_out := skipped.read():
        shown = "".join(f"\n  {picture}: {why}" for picture, why in left_out[:SHOWN]) + "\n  ..." * (
            len(left_out) > SHOWN
        )
        verb = "is" if len(left_out) == 1 else "are"
        message = f"%s of {name} {verb} left out; %s says which and why:%s"
        logging.getLogger("diffjax").warning(message, counted(len(left_out), "picture"), skipped.path, shown)


def _folder(config: ml_collections.ConfigDict) -> Path:
    """Where prepared data are."""
    return Path(config.data_dir or os.environ.get("TFDS_DATA_DIR") or files.home() / "data").expanduser()


def load(config: ml_collections.ConfigDict | Mapping[str, Any], before: Callable[[], None] = lambda: None) -> Dataset:
    """The data set that `config` describes (`default_config` has its fields), prepared on first use: `before()` is
    called then, to refuse what need not be prepared.

    What is prepared or downloaded goes to `config.data_dir`, else `$TFDS_DATA_DIR`, else the cache folder's `data`.
    Raises `UserError` for anything in the configuration or the data that the user can mend.
    """
    config = _complete(config)
    builder = BUILDERS.get(config.name, _named)(config, _folder(config), before)
    place = Path(builder.data_path)
    with damaged(place):
        records = Records(builder, config.split)
        *shape, depth = builder.info.features[records.roles.image].shape
        channels = config.channels or _channels(config, depth, builder.info.metadata)
    if None not in shape:
        check_size(tuple(shape), config.size, config.enlarge, f"a picture of {config.name}")
    skipped = Skipped(place)
    _say(skipped, config.name)
    pictures = Pictures(records, config, channels, skipped)
    return Dataset(config.name, config, records, channels, skipped, pictures)
