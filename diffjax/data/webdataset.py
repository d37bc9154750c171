"""Tar files in webdataset's layout as a source of captioned pictures: `KEY.jpg` beside `KEY.txt` or `KEY.json`.

Nothing is unpacked: a shard's headers are read once, and a picture is a stretch of the tar file.
"""

import functools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from diffjax.data.captions import Captioned, captions_in, gather, lines, stamps
from diffjax.data.images import SUFFIXES
from diffjax.data.prepare import track
from diffjax.data.tables import parts
from diffjax.errors import UserError

MOST_BYTES = {**dict.fromkeys(SUFFIXES, 64 * 2**20), ".txt": 2**20, ".json": 2**20}
"""What is read of each kind of member; longer ones are left out."""


@dataclass
class _Sample:
    """What the members of one key say."""

    picture: tarfile.TarInfo | None = None
    captions: list[str] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Shards:
    """The pictures of one shard, of a folder of shards, or of a pattern such as `shards/*.tar`.

    A picture that is broken or too small is left out.
    """

    path: Path
    refuses_small: ClassVar[bool] = False

    @functools.cached_property
    def files(self) -> list[Path]:
        return parts(self.path, {".tar"})

    def stamp(self) -> Iterator[str]:
        """The shards' paths, sizes and times of change."""
        return stamps(self.files, self.path.parent)

    def pictures(self) -> list[Captioned]:
        return [picture for shard in track(self.files, "reading the shards", len(self.files)) for picture in _index(shard)]


def _index(shard: Path) -> list[Captioned]:
    """The pictures of a shard. Raises `UserError` when it is no tar file, or ends too early."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                _take(tar, member, samples)
                tar.members.clear()  # it would remember every header
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is no tar file, or damaged ({error}); download it again, and uncompress it") from error
    return [_captioned(shard, key, sample) for key, sample in samples.items() if sample.picture]


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, _Sample]) -> None:
    """Note what a member says of its sample: its key is its path up to the first dot of its name."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    most = MOST_BYTES.get((dot + suffix).lower())
    if most is None or not member.isreg() or member.issparse() or not stem:
        return
    sample = samples.setdefault(folder + slash + stem, _Sample())
    if member.size > most:
        sample.problem = f"{member.name} has more than {most // 2**20} MiB"
    elif suffix.lower() in ("txt", "json"):
        _add_captions(sample, member.name, tar.extractfile(member).read())
    elif sample.picture is None:
        sample.picture = member


def _add_captions(sample: _Sample, name: str, data: bytes) -> None:
    try:
        text = data.decode("utf-8-sig")
        gather(sample.captions, captions_in(json.loads(text)) if name.lower().endswith(".json") else lines(text))
    except ValueError as error:
        sample.problem = f"{name} cannot be read: {error}"


def _captioned(shard: Path, key: str, sample: _Sample) -> Captioned:
    start, length = sample.picture.offset_data, sample.picture.size
    return Captioned(f"{shard.name}/{key}", shard, tuple(sample.captions), start, length, problem=sample.problem)
