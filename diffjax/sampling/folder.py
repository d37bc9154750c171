"""The folder that a sampling job fills: pictures as they come, previews, states under way, a sheet and the manifest.

NAME.png          a finished picture, with all that made it in its metadata
preview/NAME.png  what a picture under way looks like; gone once the picture is there
.state/NAME.npz   a batch under way, named after its first picture; gone once its pictures are there
provenance/NAME.png  which training pictures it is made of, of a closed form
grid.png          all pictures with their prompts
manifest.json     the recipe, the versions, and every picture with its checksum
"""

import hashlib
import io
import json
import logging
import math
import os
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
IN_METADATA = ("negative_prompt", "seed", *names(Method), "strength", "batch", "dtype", "revision", "checksum")

Recipe = dict[str, Any]
Subject = tuple[str | None, str | None]


class Gallery:
    """The folder of a job: `num` pictures of each subject (prompt, label), drawn by `recipe`, all in JSON types."""

    def __init__(self, folder: Path, recipe: Recipe, subjects: Sequence[Subject], num: int):
        self.folder, self.recipe, self.num, self.subjects = folder, recipe, num, subjects
        self.names = {
            Picture(number, *subject): file_name(place, subject, number)
            for place, subject in enumerate(subjects)
            for number in range(num)
        }

    def path(self, picture: Picture) -> Path:
        """Where a finished picture is."""
        return self.folder / self.names[picture]

    def missing(self) -> list[Picture]:
        """The pictures that are not there yet."""
        return [picture for picture in self.names if not self.path(picture).exists()]

    def claim(self, overwrite: bool) -> None:
        """Make the folder this job's, writing the manifest.

        Raises `UserError` when it holds pictures of another recipe, or such names without a manifest, unless
        `overwrite`: then they are removed.
        """
        manifest = read_manifest(self.folder / "manifest.json") if (self.folder / "manifest.json").exists() else None
        if overwrite:
            self._clear(manifest)
        elif manifest is not None:
            self._refuse_another(manifest["recipe"])
        elif there := next((path for path in map(self.path, self.names) if path.exists()), None):
            raise UserError(f"{there} is there and was not drawn by diffjax: choose another --out, or --overwrite")
        self._write_manifest()

    def write(self, pictures: Sequence[Picture], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Write finished pictures; what is there stays, and their previews go."""
        for picture, pixels in zip(pictures, images, strict=True):
            if not self.path(picture).exists():
                image.write_png(self.path(picture), pixels, self._metadata(picture))
            self._preview(picture).unlink(missing_ok=True)

    def write_beside(self, kind: str, picture: Picture, shown: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write something that is shown of a finished picture, by its name in the folder `kind`."""
        image.write_png(self.folder / kind / self.names[picture], shown, {"prompt": picture.prompt or ""})

    def preview(self, pictures: Sequence[Picture], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Write what pictures under way look like."""
        for picture, pixels in zip(pictures, images, strict=True):
            _write_lightly(
                self._preview(picture), image.png(pixels, {"prompt": picture.prompt or "", "preview": "yes"})
            )

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
        return [part for part in found if part and not all(self.path(picture).exists() for picture in part.pictures)]

    def finish(self) -> None:
        """Write the sheet and the checksums, and remove the folders that were for what was under way."""
        pictures = list(self.names)[:ON_SHEET]
        pixels = np.stack([image.read_png(self.path(picture))[0] for picture in pictures])
        captions = [picture.prompt or picture.label or "" for picture in pictures]
        columns = sheet_columns(len(self.subjects), min(self.num, ON_SHEET))
        image.write_png(self.folder / "grid.png", image.sheet(pixels, columns, captions if any(captions) else ()))
        self._write_manifest(checksums=True)
        for name in (".state", "preview"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

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
        free = {"num": None}
        if lines := unlike(there | free, self.recipe | free):
            found = f"{self.folder} holds pictures of another recipe: {'; '.join(lines)}"
            raise UserError(f"{found}; choose another --out, or --overwrite")

    def _clear(self, manifest: dict[str, Any] | None) -> None:
        listed = [entry["file"] for entry in manifest["images"]] if manifest else []
        for name in {*listed, *self.names.values(), "grid.png", "manifest.json"}:
            (self.folder / name).unlink(missing_ok=True)
        for name in (".state", "preview", PROVENANCE):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _metadata(self, picture: Picture) -> dict[str, str]:
        about = {"prompt": picture.prompt, "label": picture.label, "number": picture.number}
        about |= {"read": self.recipe.get("read", {}).get(picture.prompt)}
        about |= {"model": Path(self.recipe["model"]).name} | {name: self.recipe[name] for name in IN_METADATA}
        return {name: str(value) for name, value in about.items() if value not in (None, "")}

    def _write_manifest(self, checksums: bool = False) -> None:
        images = [{"file": name, **picture._asdict()} for picture, name in self.names.items()]
        if checksums:
            images = [entry | {"sha256": sha256(self.folder / entry["file"])} for entry in images]
        files.write_json(
            self.folder / "manifest.json",
            {
                "recipe": with_places(self.recipe, self.folder, relative),
                "made_by": description(devices.describe()),
                "images": images,
            },
        )


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


def _write_lightly(path: Path, data: bytes) -> None:
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
    return hashlib.sha256(path.read_bytes()).hexdigest()
