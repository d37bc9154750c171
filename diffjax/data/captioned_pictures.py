"""Pictures with captions from a folder, a table or tar files, as a TFDS dataset: read once, then trained from
array_record.

The prepared copy holds every picture with its shorter side reduced to `size`. A changed source is prepared anew, an
unchanged one never.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds
from PIL import Image

from diffjax.data.captions import Captioned, label
from diffjax.data.images import check_size, colour, flatten, formats, frames, open_picture, shrink
from diffjax.data.prepare import damaged, in_parallel
from diffjax.data.skipped import Skipped
from diffjax.data.walk import printable
from diffjax.utils.errors import UserError
from diffjax.utils.progress import track


class Source(Protocol):
    """Where captioned pictures come from."""

    path: Path
    refuses_small: bool
    """Whether a picture that is too small is an error, or left out."""

    def stamp(self) -> Iterable[str]:
        """Lines that are others when the pictures are."""
        ...

    def pictures(self) -> list[Captioned]:
        """All of them, those that cannot be used too."""
        ...


@dataclasses.dataclass(eq=False)
class PicturesConfig(tfds.core.BuilderConfig):
    """The pictures of one source at one size, on one background colour."""

    source: Source = dataclasses.field(kw_only=True)
    size: int = 64
    background: str = "white"
    enlarge: bool = False

    @functools.cached_property
    def pictures(self) -> list[Captioned]:
        """Those of the source, each by another name."""
        return distinct(self.source.pictures())

    @property
    def classes(self) -> list[str]:
        """Their names, in order."""
        return sorted({picture.label for picture in self.pictures} - {""})

    def for_workers(self) -> "PicturesConfig":
        """The same without the list of pictures, to be sent to other processes."""
        return dataclasses.replace(self)


def distinct(pictures: list[Captioned]) -> list[Captioned]:
    """The pictures, those of the same name numbered."""
    taken: set[str] = set()
    found = []
    for picture in pictures:
        called = printable(picture.name)
        name = next(
            name
            for name in itertools.chain([called], (f"{called}#{i}" for i in itertools.count(2)))
            if name not in taken
        )
        taken.add(name)
        found.append(dataclasses.replace(picture, name=name))
    return found


def config(source: Source, size: int, background: str, enlarge: bool) -> PicturesConfig:
    """The builder configuration of a source as it is now, named after its `stamp`."""
    stamp = hashlib.sha256(f"{type(source).__name__} {size} {colour(background)} {enlarge}".encode())
    for line in source.stamp():
        stamp.update(os.fsencode(f"{line}\n"))
    return PicturesConfig(
        name=f"{label(source.path)}-{stamp.hexdigest()[:16]}",
        description=f"{printable(str(source.path))} at {size} pixels on {background}",
        source=source,
        size=size,
        background=background,
        enlarge=enlarge,
    )


def builder(settings: PicturesConfig, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The builder of these settings; one that has been prepared is read back without looking at the source again."""
    place = data_dir / f"captioned_pictures/{settings.name}/{CaptionedPictures.VERSION}"
    if (place / "dataset_info.json").exists():
        with damaged(place):
            return tfds.builder_from_directory(place)
    return CaptionedPictures(config=settings, data_dir=data_dir)


def _check_sizes(settings: PicturesConfig) -> None:
    """Raises `UserError` naming how many pictures are smaller than the size; unreadable ones are left for later."""
    small = []
    usable = [picture for picture in settings.pictures if not picture.problem]
    for picture in track(usable, "looking at the pictures", len(usable)):
        try:
            with Image.open(picture.file, formats=formats()) as opened:
                found = opened.size
        except Exception:
            continue
        if min(found) < settings.size:
            small.append((picture.file, found))
    if small:
        file, found = small[0]
        check_size(found, settings.size, False, f"{file} ({len(small)} of {len(settings.pictures)} pictures like it)")


class Stored(NamedTuple):
    """What is kept of a picture: the file's bytes, a digest of its pixels, whether it is grey, and how many its
    file held.
    """

    data: bytes
    pixels: bytes
    grey: bool
    frames: int


def _stored(picture: Captioned, settings: PicturesConfig) -> Stored | str:
    """A JPEG stays a JPEG, anything else becomes PNG; or why it cannot be kept."""
    if picture.problem:
        return picture.problem
    try:
        opened = open_picture(picture.read(), settings.size)
        check_size(opened.size, settings.size, settings.enlarge)
        photo, held = opened.format in ("JPEG", "MPO"), frames(opened)
        flat = flatten(opened, colour(settings.background))
        flat = shrink(flat, settings.size) if min(flat.size) > settings.size else flat
        buffer = io.BytesIO()
        flat.save(buffer, **({"format": "JPEG", "quality": 95, "subsampling": 0} if photo else {"format": "PNG"}))
        pixels = hashlib.sha256(f"{flat.mode} {flat.size} {photo}".encode() + flat.tobytes()).digest()
        return Stored(buffer.getvalue(), pixels, flat.mode == "L", held)
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"cannot be read: {error}"


class Judged(NamedTuple):
    """A picture as an example, None where it is left out; the (name, reason) of what is; whether it is grey, and a
    digest of its name, pixels, captions and class.
    """

    example: dict[str, Any] | None
    left_out: list[tuple[str, str]]
    grey: bool = True
    digest: int = 0


def judged(picture: Captioned, settings: PicturesConfig, features: Collection[str]) -> Judged:
    """What becomes of a picture in a data set of these features."""
    stored = _stored(picture, settings)
    lack = "has no class" if "label" in features and not picture.label else ""
    lack = "has no caption" if "captions" in features and not picture.captions else lack
    if isinstance(stored, str) or lack:
        return Judged(None, [(picture.name, stored if isinstance(stored, str) else lack)])
    more = f"holds {stored.frames} pictures, of which the first is used"
    left_out = [(f"{picture.name} after its first", more)] if stored.frames > 1 else []
    captions = {"captions": list(picture.captions)} if "captions" in features else {}
    told = {"file": picture.name} | captions | ({"label": picture.label} if picture.label else {})
    digest = hashlib.sha256(repr((picture.name, told)).encode() + stored.pixels).digest()
    return Judged({"image": stored.data} | told, left_out, stored.grey, int.from_bytes(digest))


def features(captioned: bool, classes: list[str]) -> dict[str, tfds.features.FeatureConnector]:
    """Those of a data set with or without captions and classes."""
    captions = {"captions": tfds.features.Sequence(tfds.features.Text())} if captioned else {}
    label = {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    return {"image": tfds.features.Image(), "file": tfds.features.Text(), **captions, **label}


class CaptionedPictures(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `captioned_pictures`: `image`, `file` and, where there are any, `captions` and `label`;
    split `train`.

    Pictures that cannot be used, and those without a caption where others have one, are left out and named in
    `Skipped`. The metadata say whether all are `grey`, and have a digest of the `content`: names, pixels, captions
    and classes.
    """

    VERSION = tfds.core.Version("1.1.0")
    builder_config: PicturesConfig

    @functools.cached_property
    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        pictures = self.builder_config.pictures
        return features(any(picture.captions for picture in pictures), self.builder_config.classes)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures with captions.",
            features=tfds.features.FeaturesDict(self._features),
            metadata=self._metadata,
        )

    @functools.cached_property
    def _metadata(self) -> tfds.core.MetadataDict:
        return tfds.core.MetadataDict()

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        self._check_sizes()
        return {"train": self._generate_examples(Skipped(Path(self.data_path)))}

    def _check_sizes(self) -> None:
        if self.builder_config.source.refuses_small and not self.builder_config.enlarge:
            _check_sizes(self.builder_config)

    def _generate_examples(self, skipped: Skipped) -> Iterator[tuple[str, dict]]:
        settings, left_out, grey, content = self.builder_config, [], True, 0
        work = in_parallel(
            lambda picture: judged(picture, settings, self._features), settings.pictures, os.cpu_count() or 1
        )
        for picture, found in track(work, "preparing the pictures", len(settings.pictures)):
            left_out += found.left_out
            if found.example is not None:
                grey, content = grey and found.grey, content + found.digest
                yield picture.name, found.example
        if not content:
            raise self._nothing(left_out)
        if left_out:
            skipped.add(sorted(left_out))
        self._metadata.update(grey=grey, content=f"{content % 2**256:064x}")

    def _nothing(self, left_out: list[tuple[str, str]]) -> UserError:
        """The error when no picture can be used."""
        path = self.builder_config.source.path
        if not left_out:
            return UserError(f"{path} names no pictures; set data.path to something that does")
        skipped = Skipped(Path(self.data_dir_root) / self.info.full_name)
        skipped.add(left_out)
        why = ": ".join(left_out[0])
        return UserError(f"none of the pictures in {path} can be used; {skipped.path} says why, of the first: {why}")
