"""The folder that a sampling job fills: pictures as they come, previews, states under way, a sheet and the manifest.

NAME.png          a finished picture, with all that made it in its metadata (or in files of many: `shards`)
preview/NAME.png  what a picture under way looks like; gone once the picture is there
.state/NAME.npz   a batch under way, named after its first picture; gone once its pictures are there
provenance/NAME.png  which training pictures it is made of, of a closed form
grid.png          all pictures with their prompts
manifest.json     the recipe, the versions, and every picture with its checksum
"""

import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import jax
import numpy as np
from jaxtyping import PyTree, UInt8

from diffjax.models.options import FILES, Method, Request, defaults, names
from diffjax.parallel import devices
from diffjax.sampling.batches import Part, Picture
from diffjax.utils import files, image
from diffjax.utils.errors import UserError
from diffjax.utils.provenance import description, differences

log = logging.getLogger(__name__)

ON_SHEET = 400
PROVENANCE = "provenance"
UNDER_WAY = (".state", "preview", ".drawn")
ABOUT = ("grid.png", "manifest.json")

IN_METADATA = ("negative_prompt", "seed", *names(Method), "strength", "batch", "dtype", "revision", "checksum")

Recipe = dict[str, Any]
Subject = tuple[str | None, str | None]


def listed(request: Request) -> dict[Picture, str]:
    """All pictures of a request in their order, each with the name of its file."""
    if request.each:
        subjects = itertools.islice(itertools.cycle(request.each), request.num)
        return {Picture(i, *subject): f"{i:08d}.png" for i, subject in enumerate(subjects)}
    named = {
        Picture(number, *subject): file_name(place, subject, number)
        for place, subject in enumerate(request.subjects)
        for number in range(request.num)
    }
    return named if request.format == "png" else {picture: f"{i:08d}.png" for i, picture in enumerate(named)}


class Gallery:
    """The folder of a job: the pictures of `names`, drawn by `recipe`, which is in JSON types."""

    free: ClassVar[tuple[str, ...]] = ("num",)
    """What of a recipe may be another when a job is gone on with."""

    def __init__(self, folder: Path, recipe: Recipe, names: dict[Picture, str]):
        self.folder, self.recipe, self.names = folder, recipe, names

    @property
    def unit(self) -> int:
        """How many pictures in a row the same process draws."""
        return self.recipe["batch"]

    def owned(self, process: int, processes: int) -> list[Picture]:
        """The pictures that are one process's to draw, whatever is there already."""
        return [picture for i, picture in enumerate(self.names) if i // self.unit % processes == process]

    def path(self, picture: Picture) -> Path:
        """Where a finished picture is."""
        return self.folder / self.names[picture]

    def missing(self, among: Sequence[Picture] | None = None) -> list[Picture]:
        """The pictures that are not there yet."""
        has = self.has()
        return [picture for picture in (self.names if among is None else among) if not has(picture)]

    def has(self) -> Callable[[Picture], bool]:
        """Whether a picture is there: a function."""
        return lambda picture: self.path(picture).exists()

    def mend(self, mine: Sequence[Picture]) -> None:
        """Remove what is there and damaged, so that it is drawn again."""
        for path in map(self.path, mine):
            if path.exists() and not image.is_whole(path):
                remove_damaged(path)

    def settle(self, mine: Sequence[Picture]) -> None:
        """Bring what is drawn into its last form: nothing for pictures in files of their own."""

    def claim(self, overwrite: bool) -> None:
        """Make the folder this job's, writing the manifest.

        Raises `UserError` when it holds pictures of another recipe, or such names without a manifest, unless
        `overwrite`: then they are removed.
        """
        path = self.folder / "manifest.json"
        try:
            manifest = read_manifest(path) if path.exists() else None
        except UserError as error:
            if not overwrite:
                raise UserError(f"{path} is damaged: put it back, or --overwrite draws all again") from error
            manifest = None
        if overwrite:
            self._clear(manifest)
        elif manifest is not None:
            self._refuse_another(manifest["recipe"])
        elif there := next((path for path in self._files() if path.exists()), None):
            raise UserError(f"{there} is there and was not drawn by diffjax: choose another --out, or --overwrite")
        files.sweep(self.folder)
        self._write_manifest()

    def put(self, path: Path, png: bytes) -> None:
        """Write the file of a picture."""
        files.write_atomic(path, png)

    def write(self, pictures: Sequence[Picture], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Write finished pictures; what is there stays, and their previews go."""
        for picture, pixels in zip(pictures, images, strict=True):
            if not self.path(picture).exists():
                self.put(self.path(picture), image.png(pixels, self._metadata(picture)))
            self._preview(picture).unlink(missing_ok=True)

    def write_beside(self, kind: str, picture: Picture, shown: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write something that is shown of a finished picture, by its name in the folder `kind`."""
        image.write_png(self.folder / kind / self.names[picture], shown, {"prompt": picture.prompt or ""})

    def preview(self, pictures: Sequence[Picture], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Write what pictures under way look like."""
        for picture, pixels in zip(pictures, images, strict=True):
            write_lightly(self._preview(picture), image.png(pixels, {"prompt": picture.prompt or "", "preview": "yes"}))

    def save(self, parts: Sequence[Part]) -> None:
        """Keep batches under way, for `saved`."""
        for part in parts:
            data, leaves = io.BytesIO(), jax.tree.leaves(part.state)
            about = json.dumps({"pictures": part.pictures, "done": part.done})
            np.savez(data, about=np.asarray(about), **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)})
            files.write_atomic(self._state(part), data.getvalue())

    def forget(self, parts: Sequence[Part]) -> None:
        """Remove what `save` kept of them."""
        for part in parts:
            self._state(part).unlink(missing_ok=True)

    def saved(self, blank: Callable[[Part], PyTree]) -> list[Part]:
        """The batches that were kept and are of use; `blank` gives the shapes of a part's state."""
        found = (self._read(path, blank) for path in sorted((self.folder / ".state").glob("*.npz")))
        has = self.has()
        return [part for part in found if part and not all(map(has, part.pictures))]

    def finish(self) -> None:
        """Write the sheet and the checksums, and remove the folders that were for what was under way."""
        shown = list(self.names)[:ON_SHEET]
        self._write_sheet(shown, map(self.path, shown))
        self._write_manifest(checksums=True)
        for name in UNDER_WAY:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _write_sheet(self, pictures: Sequence[Picture], pngs: Iterable[Path | BinaryIO]) -> None:
        """The pictures with their prompts in rows, each prompt's side by side."""
        pixels = np.stack([image.read_png(png)[0] for png in pngs])
        captions = [picture.prompt or picture.label or "" for picture in pictures]
        num = max(picture.number for picture in self.names) + 1
        columns = sheet_columns(-(-len(self.names) // num), min(num, len(pictures)))
        image.write_png(self.folder / "grid.png", image.sheet(pixels, columns, captions if any(captions) else ()))

    def _files(self) -> list[Path]:
        """The files that hold finished pictures."""
        return [self.folder / name for name in self.names.values()]

    def _preview(self, picture: Picture) -> Path:
        return self.folder / "preview" / self.names[picture]

    def _state(self, part: Part) -> Path:
        return self.folder / ".state" / f"{Path(self.names[part.pictures[0]]).stem}.npz"

    def _read(self, path: Path, blank: Callable[[Part], PyTree]) -> Part | None:
        try:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                leaves = [file[f"leaf{i}"] for i in range(len(file.files) - 1)]
            part = Part(tuple(Picture(*picture) for picture in about["pictures"]), about["done"])
            if not all(picture in self.names for picture in part.pictures):
                return None
            shapes, structure = jax.tree.flatten(blank(part))
            if [(leaf.shape, leaf.dtype) for leaf in leaves] != [(leaf.shape, leaf.dtype) for leaf in shapes]:
                raise ValueError("its arrays have other shapes")
            return part._replace(state=jax.tree.unflatten(structure, leaves))
        except Exception as error:
            log.warning("%s cannot be used (%s): its pictures are drawn from their first step", path, error)
            return None

    def _refuse_another(self, there: Recipe) -> None:
        free = dict.fromkeys(self.free)
        if lines := unlike(there | free, self.recipe | free):
            found = f"{self.folder} holds pictures of another recipe: {'; '.join(lines)}"
            raise UserError(f"{found}; choose another --out, or --overwrite")

    def _clear(self, manifest: dict[str, Any] | None) -> None:
        listed = [self.folder / entry["file"] for entry in files_of(manifest)] if manifest else []
        for path in {*listed, *self._files(), *(self.folder / name for name in ABOUT)}:
            path.unlink(missing_ok=True)
        for name in (*UNDER_WAY, PROVENANCE):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _metadata(self, picture: Picture) -> dict[str, str]:
        about = {"prompt": picture.prompt, "label": picture.label, "number": picture.number}
        about |= {"read": self.recipe.get("read", {}).get(picture.prompt)}
        about |= {"model": Path(self.recipe["model"]).name} | {name: self.recipe[name] for name in IN_METADATA}
        return {name: str(value) for name, value in about.items() if value not in (None, "")}

    def _write_manifest(self, checksums: bool = False) -> None:
        recipe = with_places(self.recipe, self.folder, relative)
        about = {"recipe": recipe, "made_by": description(devices.describe())}
        files.write_json(self.folder / "manifest.json", about | self._listing(checksums))

    def _listing(self, checksums: bool) -> dict[str, Any]:
        """What a manifest says of the files."""
        images = [{"file": name, **picture._asdict()} for picture, name in self.names.items()]
        if checksums:
            images = [entry | {"sha256": sha256(self.folder / entry["file"])} for entry in images]
        return {"images": images}


class Background:
    """A thread that writes while the devices compute."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "writer")
        self._due: list[Future] = []
        self._offered: dict[str, Future] = {}

    def write(self, function: Callable, *arguments: Any) -> None:
        """Call the function there. Raises what an earlier one raised."""
        self._check([future for future in self._due if future.done()])
        self._due.append(self._thread.submit(function, *arguments))

    def offer(self, kind: str, function: Callable, *arguments: Any) -> bool:
        """Call the function there unless one of its kind still waits; what it raises is logged, and the job goes on."""
        if kind in self._offered and not self._offered[kind].done():
            return False
        self._offered[kind] = self._thread.submit(_or_warn, function, *arguments)
        return True

    def close(self) -> None:
        """Wait for all of it. Raises what one of them raised."""
        self._thread.shutdown()
        self._check(self._due)

    def _check(self, futures: list[Future]) -> None:
        for future in futures:
            self._due.remove(future)
            future.result()


def write_lightly(path: Path, data: bytes) -> None:
    """All or nothing for those who look, but unlike `write_atomic` without waiting for the disk."""
    part = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space") from error


def _or_warn(function: Callable, *arguments: Any) -> None:
    try:
        function(*arguments)
    except UserError as error:
        log.warning("%s", error)


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest. Raises `UserError` when the file is none."""
    try:
        manifest = json.loads(path.read_text())
        if {"recipe", "images"} <= manifest.keys():
            return manifest
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the manifest.json of a sampling job") from error
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is no manifest of a sampling job: give the manifest.json that `diffjax sample` wrote")


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a manifest that are files: pictures, or files of many."""
    return manifest["images"] or manifest.get("shards", [])


def unlike(there: Recipe, here: Recipe) -> list[str]:
    """In what two recipes differ, in words; a place says nothing where a checksum says what is there, and an option
    that is newer than a recipe has its default in it.
    """
    plain = json.loads(json.dumps(defaults(Request)))
    known = lambda recipe: {name: value for name, value in (plain | recipe).items() if name not in _places(recipe)}
    return differences(known(there), known(here))


def with_places(recipe: Recipe, folder: Path, path: Callable[[str, Path], str]) -> Recipe:
    """The recipe with `path(place, folder)` for each place: in a manifest they are relative to its folder, so that
    both move.
    """
    moved = lambda place: [moved(one) for one in place] if isinstance(place, list) else path(place, folder.resolve())
    return recipe | {name: moved(recipe[name]) for name in _places(recipe)}


def relative(place: str, folder: Path) -> str:
    """A whole path as seen from a folder, with a dot before it, by which it differs from a hub id, which stays."""
    seen = os.path.relpath(place, folder)
    return place if not os.path.isabs(place) else seen if seen.startswith(os.pardir) else os.path.join(os.curdir, seen)


def whole(place: str, folder: Path) -> str:
    """The whole path of what `relative` wrote."""
    return str((folder / place).resolve()) if place.startswith(os.curdir) else place


def _places(recipe: Recipe) -> list[str]:
    """What of a recipe is a place whose content has a checksum: a model that is no hub's, and files."""
    local = ["model"] if recipe.get("checksum") is not None else []
    return local + [name for name in FILES if recipe.get(name) and name in recipe.get("files", {})]


def file_name(place: int, subject: Subject, number: int) -> str:
    """`PLACE_WORDS_NUMBER.png`, or `NUMBER.png` for pictures of nothing in particular."""
    words = "-".join(word for word in subject if word)
    if not words:
        return f"{number:04d}.png"
    slug = "".join(character if _in_names(character) else " " for character in words.lower())
    slug = "-".join(slug.split())[:40].strip("-")
    return f"{place:03d}_{slug}_{number:04d}.png"


def _in_names(character: str) -> bool:
    """Letters, digits, their marks, and pictographs: what every file system takes and no shell reads otherwise."""
    kind = unicodedata.category(character)
    return character in "_\u200d" or kind[0] in "LNM" or (kind in ("So", "Sk") and not character.isascii())


def sheet_columns(subjects: int, num: int) -> int:
    """Columns of a sheet that is about square, the pictures of a subject side by side."""
    if subjects == 1:
        return math.ceil(math.sqrt(num))
    return num * max(1, round(math.sqrt(subjects / num)))


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_damaged(path: Path) -> None:
    """Remove a file that is not as it was written, and say so."""
    log.warning("%s is damaged: it is drawn again", path)
    path.unlink()
