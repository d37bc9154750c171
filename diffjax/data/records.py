"""Random access to the examples of a prepared TFDS dataset, their pictures still encoded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.data.prepare import damaged
from diffjax.utils.errors import UserError

CAPTION_FEATURES = ("captions", "caption", "text", "description", "sentence", "prompt", "title")


SAMPLED = 1000


class Record(NamedTuple):
    """One example: an encoded picture, its captions and its class, -1 where there is none.

    Without captions of its own, a picture with a class is captioned by the class's name.
    """

    picture: bytes
    captions: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Roles:
    """Which feature is the picture, which the captions and which the class; None where there is none."""

    image: str
    captions: str | None
    label: str | None


def roles(features: Mapping[str, Any]) -> Roles:
    """The roles of a TFDS dataset's features, told by their types.

    The picture is `image` or else the first `Image`; the class is `label` or else the first `ClassLabel`; captions are
    the first of `CAPTION_FEATURES` that is a `Text` or a `Sequence` of it. Raises `UserError` when there is no picture.
    """
    import tensorflow_datasets as tfds

    def first(kind: type, preferred: str) -> str | None:
        names = [name for name, feature in features.items() if type(feature) is kind]
        return preferred if preferred in names else next(iter(names), None)

    def is_text(feature: Any) -> bool:
        if isinstance(feature, tfds.features.Sequence):
            return isinstance(feature.feature, tfds.features.Text)
        return isinstance(feature, tfds.features.Text)

    image = first(tfds.features.Image, "image")
    if image is None:
        raise UserError(f"the data set has no pictures, only {', '.join(features)}; set data.name to one that has")
    captions = next((name for name in CAPTION_FEATURES if name in features and is_text(features[name])), None)
    return Roles(image, captions, first(tfds.features.ClassLabel, "label"))


class Records:
    """The records of one split of a prepared builder, `records[0]` to `records[len - 1]`; workers can be sent them.

    Raises `UserError` when the split does not exist, is empty, or was prepared in another format than array_record.
    """

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        self.roles, self._place = roles(builder.info.features), Path(builder.data_path)
        wanted = {self.roles.image, self.roles.captions, self.roles.label} - {None}
        self._features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in wanted})
        names = builder.info.features[self.roles.label].names if self.roles.label else ()
        spaced = tuple(name.replace("_", " ") for name in names)
        self.class_names = spaced if len({*spaced}) == len(names) else tuple(names)
        self._decoders = {self.roles.image: tfds.decode.SkipDecoding()}
        self._content = (builder.info.metadata or {}).get("content")
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._source = builder.as_data_source(split=split, deserialize_method=raw).data_source
        except NotImplementedError as error:  # what TFDS says of other kinds of files
            remedy = "set data.data_dir to another folder, where it will be prepared anew"
            raise UserError(f"{builder.data_path} does not hold array_record files; {remedy}") from error
        except (ValueError, KeyError) as error:
            splits = ", ".join(builder.info.splits)
            reason = f"{str(error).splitlines()[0]} {builder.info.name} has {splits}"
            raise UserError(f'data.split="{split}" cannot be read: {reason}') from error

    def __len__(self) -> int:
        return len(self._source)

    @property
    def has_captions(self) -> bool:
        return self.roles.captions is not None or self.roles.label is not None

    def digest(self) -> str:
        """A hash of what the records hold and of their order, the same wherever the data were prepared from.

        Of our own builders, by the digest of all pictures, captions and classes that they keep; of others, by `SAMPLED`
        whole records, evenly spaced. The order is that of as many captions.
        Raises `UserError` for one that cannot be read.
        """
        total = hashlib.sha256(repr((self._content, len(self), self.class_names)).encode())
        for index in np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int):
            with damaged(self._place):
                record = self[int(index)]
            total.update(repr((record.captions, record.label, None if self._content else record.picture)).encode())
        return total.hexdigest()[:32]

    def __getitem__(self, index: int) -> Record:
        example: Any = self._features.deserialize_example_np(self._source[index], decoders=self._decoders)
        label = int(example[self.roles.label]) if self.roles.label else -1
        picture = bytes(example[self.roles.image])
        if self.roles.captions is None:
            return Record(picture, self.class_names[label : label + 1] if label >= 0 else (), label)
        captions = example[self.roles.captions]
        captions = [captions] if isinstance(captions, bytes) else captions
        return Record(picture, tuple(text.decode() for text in captions), label)
