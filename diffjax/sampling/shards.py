"""The pictures of a large job in files of many: tar files as webdataset reads them, or a TFDS data set of array_record.

00000.tar                                   KEY.png, KEY.txt (the prompt), KEY.cls (the class) of each picture
drawn-train.array_record-00000-of-00050     an example of each: image, caption, label, number
.drawn/KEY.png                              a finished picture of a file that is not whole yet
.state/NAME.json                            the checksum of a file, written before the file stands there

KEY is the place of a picture among all of the job. A file is written once all of its pictures are there, and stands
there whole or not at all; the same pictures give the same bytes.
"""

import errno
import io
import itertools
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

import numpy as np
from jaxtyping import UInt8

from diffjax.sampling.batches import Picture
from diffjax.sampling.folder import (
    ON_SHEET,
    UNDER_WAY,
    Gallery,
    Recipe,
    read_manifest,
    remove_damaged,
    sha256,
    write_lightly,
)
from diffjax.utils import files, image


class Entry(NamedTuple):
    """A picture as it goes into a file of many: its place among all, and the PNG file that holds it."""

    place: int
    picture: Picture
    png: Path


Shape = tuple[int, ...]


class Webdataset:
    """Tar files whose members are in the order of the pictures."""

    beside: ClassVar[tuple[str, ...]] = ()

    def name(self, folder: Path, index: int, total: int) -> str:
        """That of file `index` of `total`."""
        return f"{index:05d}.tar"

    def write(self, path: Path, entries: Sequence[Entry], shape: Shape) -> None:
        """Write a file of pictures of a shape (h, w, c)."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, picture, png in entries:
                texts = {"txt": picture.prompt, "cls": picture.label}
                members = {"png": png.read_bytes()} | {name: said.encode() for name, said in texts.items() if said}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{place:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    def read(self, path: Path, count: int) -> list[bytes]:
        """The first PNG files of a file, so many or as many as there are."""
        with tarfile.open(path) as tar:
            pngs = (member for member in tar if member.name.endswith(".png"))
            return [cast(BinaryIO, tar.extractfile(member)).read() for member in itertools.islice(pngs, count)]

    def describe(self, folder: Path, lengths: Sequence[int], picture: Picture, shape: Shape) -> None:
        """Write what readers need beside the files, which hold so many pictures each, all like this one."""


class ArrayRecord:
    """The files of a TFDS data set: `tfds.builder_from_directory(folder)`. The methods are those of `Webdataset`."""

    beside: ClassVar[tuple[str, ...]] = ("dataset_info.json", "features.json")

    def name(self, folder: Path, index: int, total: int) -> str:
        return _template(folder).sharded_filepath(shard_index=index, num_shards=total).name

    def write(self, path: Path, entries: Sequence[Entry], shape: Shape) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        features = _features(entries[0].picture, shape)
        try:
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for place, picture, png in entries:
                example = {"image": png.read_bytes(), "number": place} | _said(picture)
                data = _example().FromString(features.serialize_example(example))
                writer.write(data.SerializeToString(deterministic=True))
            writer.close()
        except RuntimeError as error:  # array_record says what the system said in its message alone
            number = next((number for number in errno.errorcode if os.strerror(number) in str(error)), errno.EIO)
            raise OSError(number, os.strerror(number)) from error

    def read(self, path: Path, count: int) -> list[bytes]:
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(path))
        examples = map(_example().FromString, reader.read(0, min(count, reader.num_records())))
        return [example.features.feature["image"].bytes_list.value[0] for example in examples]

    def describe(self, folder: Path, lengths: Sequence[int], picture: Picture, shape: Shape) -> None:
        import tensorflow_datasets as tfds

        template = _template(folder)
        split = tfds.core.SplitInfo(name="train", shard_lengths=list(lengths), num_bytes=0, filename_template=template)
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=_features(picture, shape),
            split_infos=[split],
            filename_template=template,
            check_data=False,
        )


FORMATS = {"webdataset": Webdataset(), "array_record": ArrayRecord()}


def _example() -> Any:
    """The protocol buffer of a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    proto: Any = tf_example_pb2
    return proto.Example


def _template(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder), dataset_name="drawn", split="train", filetype_suffix="array_record"
    )


def _features(picture: Picture, shape: Shape) -> Any:
    """The features of examples such as this picture."""
    import tensorflow_datasets as tfds

    texts = {name: tfds.features.Text() for name in _said(picture)}
    number = tfds.features.Scalar(np.int64)
    return tfds.features.FeaturesDict({"image": tfds.features.Image(shape=shape), "number": number, **texts})


def _said(picture: Picture) -> dict[str, str]:
    said = {"caption": picture.prompt, "label": picture.label}
    return {name: value for name, value in said.items() if value is not None}


class Shards(Gallery):
    """The folder of a job whose pictures are kept `per_file` in a file, in the `format` of the recipe."""

    free: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path, recipe: Recipe, names: dict[Picture, str]):
        super().__init__(folder, recipe, names)
        pictures, size = list(names), self.unit
        self.format = FORMATS[recipe["format"]]
        self.shards = [pictures[i : i + size] for i in range(0, len(pictures), size)]
        self.place = {picture: i for i, picture in enumerate(pictures)}
        self._waiting: dict[int, set[Picture]] = {}

    @property
    def unit(self) -> int:
        """The pictures of a file are all of one process."""
        return self.recipe["per_file"]

    def path(self, picture: Picture) -> Path:
        """Where a finished picture is until its file is written."""
        return self.folder / ".drawn" / self.names[picture]

    def file(self, index: int) -> Path:
        """Where the pictures `shards[index]` are in the end."""
        return self.folder / self.format.name(self.folder, index, len(self.shards))

    def has(self) -> Callable[[Picture], bool]:
        """As `Gallery.has`: a picture is in its file, or waits for it."""
        written = {index for index in range(len(self.shards)) if self.file(index).exists()}
        return lambda picture: self.place[picture] // self.unit in written or self.path(picture).exists()

    def mend(self, mine: Sequence[Picture]) -> None:
        """As `Gallery.mend`; a file is damaged when its checksum is another one than when it was written."""
        known = self._known()
        for index in self._indices(mine):
            path = self.file(index)
            if path.exists() and sha256(path) != known.get(path.name, {}).get("sha256"):
                remove_damaged(path)
        super().mend(mine)
        has = self.has()
        for index in self._indices(mine):
            self._waiting[index] = {picture for picture in self.shards[index] if not has(picture)}

    def put(self, path: Path, png: bytes) -> None:
        """Write a picture without waiting for the disk: one that a power cut spoils is drawn again, see `mend`."""
        write_lightly(path, png)

    def write(self, pictures: Sequence[Picture], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """As `Gallery.write`, and the files that are whole with these."""
        super().write(pictures, images)
        for index in self._indices(pictures):
            if waiting := self._waiting.get(index):
                waiting -= set(pictures)
                if not waiting:
                    self._pack(index)

    def settle(self, mine: Sequence[Picture]) -> None:
        """Write the files whose pictures were all drawn before."""
        for index in self._indices(mine):
            if not self.file(index).exists():
                self._pack(index)

    def finish(self) -> None:
        """Write the checksums of all files and what TFDS needs, and remove what was for pictures under way; a sheet
        that is damaged is made again.
        """
        if not image.is_whole(self.folder / "grid.png"):
            self._show()
        self._write_manifest(checksums=True)
        lengths = [len(shard) for shard in self.shards]
        self.format.describe(self.folder, lengths, self.shards[0][0], self._known()[self.file(0).name]["shape"])
        for name in UNDER_WAY:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _indices(self, pictures: Sequence[Picture]) -> list[int]:
        return sorted({self.place[picture] // self.unit for picture in pictures})

    def _pack(self, index: int) -> None:
        pictures, path = self.shards[index], self.file(index)
        entries = [Entry(self.place[picture], picture, self.path(picture)) for picture in pictures]
        shape = image.read_png(entries[0].png)[0].shape
        with files.replacing(path) as part:
            self.format.write(part, entries, shape)
            about = {"file": path.name, "images": len(pictures), "shape": shape, "sha256": sha256(part)}
            files.write_json(self.folder / ".state" / f"{path.name}.json", about)
        if index == 0:
            self._show()
        for entry in entries:
            entry.png.unlink()

    def _show(self) -> None:
        """Write the sheet of the first file's pictures."""
        pngs = self.format.read(self.file(0), ON_SHEET)
        self._write_sheet(self.shards[0][: len(pngs)], map(io.BytesIO, pngs))

    def _files(self) -> list[Path]:
        written = [self.file(index) for index in range(len(self.shards))]
        return written + [self.folder / name for name in self.format.beside]

    def _known(self) -> dict[str, Any]:
        """What is known of the files that were written, by their names."""
        path = self.folder / "manifest.json"
        listed = read_manifest(path).get("shards", []) if path.exists() else []
        noted = [files.read_json(path) for path in sorted((self.folder / ".state").glob("*.json"))]
        return {entry["file"]: entry for entry in (*listed, *noted)}

    def _listing(self, checksums: bool) -> dict[str, Any]:
        known = self._known()
        names = [self.file(index).name for index in range(len(self.shards))]
        return {"images": [], "shards": [known.get(name, {"file": name}) for name in names]}
