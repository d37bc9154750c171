"""A folder of pictures with captions, as a TFDS dataset: read once, then trained from array_record like any other.

The prepared copy holds every picture with its shorter side reduced to `size`. A changed folder is prepared anew, an
unchanged one never.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from diffjax.data.captions import Captioned, listing, scan
from diffjax.data.images import check_size, colour, flatten, open_picture, shrink
from diffjax.data.prepare import track
from diffjax.data.skipped import Skipped
from diffjax.errors import UserError


@dataclasses.dataclass(eq=False)
class CaptionedFolderConfig(tfds.core.BuilderConfig):
    """The pictures of one folder at one size, on one background colour."""

    folder: Path = Path()
    size: int = 64
    background: str = "white"
    enlarge: bool = False

    @functools.cached_property
    def pictures(self) -> list[Captioned]:
        return scan(self.folder)

    @property
    def skipped(self) -> Skipped:
        return Skipped(f"captioned_folder/{self.name}/{CaptionedFolder.VERSION}")


def config(folder: Path, size: int, background: str, enlarge: bool) -> CaptionedFolderConfig:
    """The builder configuration of a folder as it is now, named after its files' paths, sizes and times of change."""
    stamp = hashlib.sha256(f"{size} {colour(background)}".encode())
    for file in listing(folder):
        status = file.stat()
        stamp.update(f"{os.path.relpath(file, folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return CaptionedFolderConfig(
        name=f"{folder.resolve().name}-{stamp.hexdigest()[:16]}",
        description=f"{folder} at {size} pixels on {background}",
        folder=folder,
        size=size,
        background=background,
        enlarge=enlarge,
    )


def builder(settings: CaptionedFolderConfig, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The builder of these settings; one that has been prepared is read back without looking at the folder again."""
    name = f"captioned_folder/{settings.name}/{CaptionedFolder.VERSION}"
    if (data_dir / name / "dataset_info.json").exists():
        return tfds.builder_from_directory(data_dir / name)
    return CaptionedFolder(config=settings, data_dir=data_dir)


def _check_sizes(settings: CaptionedFolderConfig) -> None:
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


def _stored(picture: Captioned, settings: CaptionedFolderConfig) -> bytes | Exception:
    """The file to keep of a picture: a JPEG stays a JPEG, anything else becomes PNG; or why it cannot be read."""
    try:
        opened = open_picture(picture.file.read_bytes(), settings.size)
        encoding = {"format": "JPEG", "quality": 95, "subsampling": 0} if opened.format == "JPEG" else {"format": "PNG"}
        flat = flatten(opened, colour(settings.background))
        buffer = io.BytesIO()
        (shrink(flat, settings.size) if min(flat.size) > settings.size else flat).save(buffer, **encoding)
        return buffer.getvalue()
    except Exception as error:  # noqa: BLE001  a broken file raises nearly anything; each is counted and named
        return error


class CaptionedFolder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `captioned_folder`: `image`, `file` and, where the folder has any, `captions`; split `train`.

    Unreadable pictures, and pictures without a caption in a folder that has captions, are left out and named in
    `config.skipped`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "file": tfds.features.Text()}
        if any(picture.captions for picture in self.builder_config.pictures):
            features["captions"] = tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description="A folder of pictures.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        if not self.builder_config.enlarge:
            _check_sizes(self.builder_config)
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        settings, captioned = self.builder_config, "captions" in self.info.features
        kept = 0
        for picture, data in track(self._read(), "preparing the pictures", len(settings.pictures)):
            file = os.path.relpath(picture.file, settings.folder)
            if isinstance(data, Exception):
                settings.skipped.add(file, f"cannot be read: {data}")
            elif captioned and not picture.captions:
                settings.skipped.add(file, "has no caption")
            else:
                kept += 1
                yield file, {"image": data, "file": file} | ({"captions": list(picture.captions)} if captioned else {})
        if not kept:
            raise UserError(f"none of the pictures in {settings.folder} can be used; {settings.skipped.path} says why")

    def _read(self) -> Iterator[tuple[Captioned, bytes | Exception]]:
        """The pictures with their stored form, worked on by all cores, a few at a time."""
        pictures = iter(self.builder_config.pictures)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while some := list(itertools.islice(pictures, 64)):
                yield from zip(some, pool.map(lambda picture: _stored(picture, self.builder_config), some), strict=True)
