"""Tar files in webdataset's layout as a source of captioned pictures: `KEY.jpg` beside `KEY.txt` or `KEY.json`.

Nothing is unpacked: a shard's headers are read once, and a picture is a stretch of the tar file. A key is a member's
path up to the first dot of its name (dots in folders count for nothing) in the convention, up to the last where people
put files with dots in their names into a tar. Both are served: a picture has the captions of `NAME.txt` for its own
NAME, whatever dots that has; `KEY.left.jpg` without any has those of `KEY.txt`, unless there is a `KEY.jpg`, to which
they belong.
"""

import functools
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from diffjax.data.captions import Captioned, gather, lines, stamps
from diffjax.data.images import SUFFIXES, looks_like_picture
from diffjax.data.rows import captions_in, json_in, text_in
from diffjax.data.tables import parts
from diffjax.data.walk import composed, is_apples
from diffjax.utils.errors import UserError
from diffjax.utils.progress import track

TEXTS = frozenset({".txt", ".json"})
MOST_BYTES = {**dict.fromkeys(SUFFIXES, 64 * 2**20), **dict.fromkeys(TEXTS, 2**20)}
"""What is read of each kind of member; longer ones are left out."""


class _Member(NamedTuple):
    """A file of a shard: its path, and where its bytes are; `target` is the path that a link leads to."""

    name: str
    start: int = 0
    size: int = 0
    target: str = ""
    problem: str = ""

    @property
    def split(self) -> tuple[str, str, str]:
        """Its folder, its name up to the last dot, and its ending."""
        folder, slash, name = self.name.rpartition("/")
        stem, dot, suffix = name.rpartition(".")
        return (folder + slash, stem, (dot + suffix).lower()) if dot else (folder + slash, name, "")


@dataclass
class _Captions:
    """What the texts of one name say."""

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
        shards = track(self.files, "reading the shards", len(self.files))
        return [picture for shard in shards for picture in self.index(shard)]

    def index(self, shard: Path) -> list[Captioned]:
        """The pictures of one shard. Raises `UserError` when it is no tar file, or ends too early."""
        top = self.path if self.path.is_dir() else self.path.parent
        return _index(shard, os.path.relpath(shard, top))


def _index(shard: Path, called: str) -> list[Captioned]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = _resolved(_members(tar))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"{shard} is no tar file, or damaged ({error}); download it again, and uncompress it"
        ) from error
    with shard.open("rb") as file:
        return list(_pictures(shard, called, [_checked(member, file) for member in members]))


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    """Everything but folders."""
    for member in tar:
        if member.issym() or member.islnk():
            base = os.path.dirname(member.name) if member.issym() else ""
            yield _Member(member.name, target=os.path.normpath(os.path.join(base, member.linkname)))
        elif member.isreg():
            yield _Member(
                member.name, member.offset_data, member.size, problem="is a sparse file" if member.issparse() else ""
            )
        elif not member.isdir():
            yield _Member(member.name, problem="is no regular file")
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  it would remember every header
    tar.fileobj.seek(tar.offset)
    while rest := tar.fileobj.read(2**20):
        if rest.count(0) < len(rest):
            raise ValueError("another tar file follows its end: join them with tar --concatenate")


def _resolved(members: Iterable[_Member]) -> list[_Member]:
    """The members, links replaced by what they lead to; only what is in the same shard can be meant."""
    members = list(members)
    places = {os.path.normpath(member.name): member for member in members}
    found = []
    for member in members:
        end, steps = member, 0
        while end.target and steps < 10:
            end, steps = (
                places.get(
                    end.target, _Member(end.name, problem=f"is a link to {end.target}, which is not in the tar")
                ),
                steps + 1,
            )
        problem = "is a link that leads to itself" if end.target else end.problem
        found.append(end._replace(name=member.name, target="", problem=problem))
    return found


def _checked(member: _Member, file: BinaryIO) -> _Member:
    """The member with its problem, if it may be a picture or a text and cannot be used."""
    _, stem, suffix = member.split
    if suffix not in MOST_BYTES:
        file.seek(member.start)
        named = not member.size or not looks_like_picture(file.read(12))
        return member._replace(
            problem="" if named else "is a picture whose name does not end like one's: rename it to end in .jpg"
        )
    if member.problem:
        return member
    if not stem or stem.startswith("."):
        return member._replace(problem="is hidden: its name begins with a dot")
    if member.size > MOST_BYTES[suffix]:
        return member._replace(problem=f"{member.name} has more than {MOST_BYTES[suffix] // 2**20} MiB")
    return member


def _pictures(shard: Path, called: str, members: list[_Member]) -> Iterator[Captioned]:
    """The pictures with their captions, and whatever else may be one with its problem."""
    members = [member for member in members if not is_apples(os.path.basename(member.name))]
    rounds = _rounds(members)
    told = _texts(shard, zip(members, rounds))
    plain = {_key(member) for member in members if member.split[2] in SUFFIXES and "." not in member.split[1]}
    for member, number in zip(members, rounds):
        if member.split[2] not in SUFFIXES and (member.split[2] in TEXTS or not member.problem):
            continue
        own = told.get((_stem(member), number)) or told.get((composed(member.name), 0))
        of_key = told.get((_key(member), number))
        problem = member.problem
        if of_key and not own and _key(member) in plain:
            problem = problem or "is another picture of its key, without captions of its own"
        text = own or of_key or _Captions()
        place = {"start": member.start, "length": member.size, "problem": problem or text.problem}
        yield Captioned(f"{called}/{member.name}", shard, tuple(text.captions), **place)


def _stem(member: _Member) -> str:
    """A member's path up to the last dot of its name."""
    folder, stem, _ = member.split
    return composed(folder + stem)


def _key(member: _Member) -> str:
    """A member's path up to the first dot of its name, webdataset's key."""
    folder, stem, _ = member.split
    return composed(folder + stem.partition(".")[0])


def _rounds(members: list[_Member]) -> list[int]:
    """How often the name of each member, without its ending, has been another sample's before, as in shards that
    were joined.

    A sample ends where an ending comes again, or where its name does after others once it had a picture and a text.
    """
    rounds, seen, last = [], {}, ""
    for member in members:
        name, suffix = _stem(member), member.split[2]
        number, endings = seen.get(name, (0, set()))
        whole = endings & TEXTS and endings & SUFFIXES
        if suffix in endings or (whole and name != last):
            number, endings = number + 1, set()
        seen[name] = number, endings | {suffix}
        rounds.append(number)
        last = name
    return rounds


def _texts(shard: Path, members: Iterable[tuple[_Member, int]]) -> dict[tuple[str, int], _Captions]:
    """What the texts say, by their path up to the last dot and their round."""
    found: dict[tuple[str, int], _Captions] = defaultdict(_Captions)
    with shard.open("rb") as file:
        for member, number in members:
            if member.split[2] in TEXTS:
                _add(found[_stem(member), number], member, file)
    return dict(found)


def _add(text: _Captions, member: _Member, file: BinaryIO) -> None:
    """Add the captions of a member, or its problem."""
    file.seek(member.start)
    try:
        if member.problem:
            raise ValueError(member.problem)
        content = text_in(file.read(member.size))
        gather(text.captions, captions_in(json_in(content)) if member.split[2] == ".json" else lines(content))
    except ValueError as error:
        text.problem = member.problem or f"{member.name} cannot be read: {error}"
