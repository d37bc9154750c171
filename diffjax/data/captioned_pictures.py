"""Pictures with captions from a folder, a table or tar files, as a TFDS dataset: read once, then trained from array_record.

The prepared copy holds every picture with its shorter side reduced to `size`. A changed source is prepared anew, an
unchanged one never.
"""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import tensorflow_datasets as tfds
from PIL import Image

from diffjax.data.captions import Captioned, label
from diffjax.data.images import check_size, colour, flatten, open_picture, shrink
from diffjax.data.prepare import in_parallel, track
from diffjax.data.skipped import Skipped
from diffjax.errors import UserError


class Source(Protocol):
    """Where captioned pictures come from."""

    path: Path
    refuses_small: bool
    """Whether a picture that is too small is an error, or left out."""

    def stamp(self) -> Iterable[str]:
        """Lines that are others when the pictures are."""

    def pictures(self) -> list[Captioned]:
        """All of them, each by another name."""


@dataclasses.dataclass(eq=False)
class PicturesConfig(tfds.core.BuilderConfig):
    """The pictures of one source at one size, on one background colour."""

    source: Source | None = None
    size: int = 64
    background: str = "white"
    enlarge: bool = False

    @functools.cached_property
    def pictures(self) -> list[Captioned]:
        return self.source.pictures()

    @property
    def classes(self) -> list[str]:
        """Their names, in order."""
        return sorted({picture.label for picture in self.pictures} - {""})

    @property
    def skipped(self) -> Skipped:
        return Skipped(f"captioned_pictures/{self.name}/{CaptionedPictures.VERSION}")


def config(source: Source, size: int, background: str, enlarge: bool) -> PicturesConfig:
    """The builder configuration of a source as it is now, named after its `stamp`."""
    stamp = hashlib.sha256(f"{type(source).__name__} {size} {colour(background)} {enlarge}".encode())
    for line in source.stamp():
        stamp.update(f"{line}\n".encode())
    return PicturesConfig(
        name=f"{label(source.path)}-{stamp.hexdigest()[:16]}",
        description=f"{source.path} at {size} pixels on {background}",
        source=source,
        size=size,
        background=background,
        enlarge=enlarge,
    )


def builder(settings: PicturesConfig, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The builder of these settings; one that has been prepared is read back without looking at the source again."""
    name = f"captioned_pictures/{settings.name}/{CaptionedPictures.VERSION}"
    if (data_dir / name / "dataset_info.json").exists():
        return tfds.builder_from_directory(data_dir / name)
    return CaptionedPictures(config=settings, data_dir=data_dir)


def _check_sizes(settings: PicturesConfig) -> None:
    """Raises `UserError` naming how many pictures are smaller than the size; unreadable ones are left for later."""
    small = []
    for picture in track(settings.pictures, "looking at the pictures", len(settings.pictures)):
        try:
            with Image.open(picture.file) as opened:
                found = opened.size
        except Exception:  # noqa: BLE001  a broken file raises nearly anything; preparation counts and names it
            continue
        if min(found) < settings.size:
            small.append((picture.file, found))
    if small:
        file, found = small[0]
        check_size(found, settings.size, False, f"{file} ({len(small)} of {len(settings.pictures)} pictures like it)")


def _stored(picture: Captioned, settings: PicturesConfig) -> bytes | Exception:
    """The file to keep of a picture: a JPEG stays a JPEG, anything else becomes PNG; or why it cannot be kept."""
    try:
        opened = open_picture(picture.read(), settings.size)
        check_size(opened.size, settings.size, settings.enlarge)
        encoding = {"format": "JPEG", "quality": 95, "subsampling": 0} if opened.format == "JPEG" else {"format": "PNG"}
        flat = flatten(opened, colour(settings.background))
        buffer = io.BytesIO()
        (shrink(flat, settings.size) if min(flat.size) > settings.size else flat).save(buffer, **encoding)
        return buffer.getvalue()
    except Exception as error:  # noqa: BLE001  a broken file raises nearly anything; each is counted and named
        return error


class CaptionedPictures(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `captioned_pictures`: `image`, `file` and, where there are any, `captions` and `label`; split `train`.

    Pictures that cannot be used, and those without a caption where others have one, are left out and named in
    `config.skipped`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "file": tfds.features.Text()}
        if any(picture.captions for picture in self.builder_config.pictures):
            features["captions"] = tfds.features.Sequence(tfds.features.Text())
        if self.builder_config.classes:
            features["label"] = tfds.features.ClassLabel(names=self.builder_config.classes)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures with captions.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        if self.builder_config.source.refuses_small and not self.builder_config.enlarge:
            _check_sizes(self.builder_config)
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        settings, captioned = self.builder_config, "captions" in self.info.features
        stored = in_parallel(lambda picture: _stored(picture, settings), settings.pictures, os.cpu_count() or 1)
        kept = 0
        for picture, data in track(stored, "preparing the pictures", len(settings.pictures)):
            if isinstance(data, Exception):
                settings.skipped.add(picture.name, str(data) if isinstance(data, UserError) else f"cannot be read: {data}")
            elif captioned and not picture.captions:
                settings.skipped.add(picture.name, "has no caption")
            else:
                kept += 1
                told = {"captions": list(picture.captions)} if captioned else {}
                told |= {"label": picture.label} if picture.label else {}
                yield picture.name, {"image": data, "file": picture.name} | told
        if not kept:
            raise UserError(f"none of the pictures in {settings.source.path} can be used; {settings.skipped.path} says why")
