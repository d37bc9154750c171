"""The sampling job: from a request to a folder of pictures that can be continued, and replayed to the same bytes."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from diffjax import build, loading
from diffjax.data import images
from diffjax.loading import run_folder
from diffjax.models import closed_form
from diffjax.models.model import Encoded, Model
from diffjax.models.options import EACH, FILES, Method, Request, given, names, read_lines, tupled
from diffjax.models.prompt_cache import MANY, OnDisk
from diffjax.models.sd3 import SkipLayers
from diffjax.parallel import hosts
from diffjax.sampling.batches import Drawing, Part, Picture, Stage, shown
from diffjax.sampling.folder import (
    PROVENANCE,
    Background,
    Gallery,
    files_of,
    listed,
    read_manifest,
    sha256,
    unlike,
    whole,
    with_places,
)
from diffjax.sampling.shards import Shards
from diffjax.text.learned import Prompts
from diffjax.utils import files, image, seeds
from diffjax.utils.errors import UserError, unknown
from diffjax.utils.interrupt import stop_on_signal
from diffjax.utils.progress import Every, counted
from diffjax.utils.provenance import checksum
from diffjax.weights import lora as lora_file

SAVE_SECONDS = 10.0
PREVIEW_SECONDS = 3.0
KEPT_STRENGTH = 0.6
CHECKED = 1000
"""How many prompts and labels are tried before anything is written."""

NUM = 4
"""Pictures of each prompt that the command line draws when nothing is said."""


def configured(config: ConfigDict, beside: Mapping[str, Any] = MappingProxyType({})) -> Request:
    """The request of a sampling experiment: a config of fields of `Request`, but for what is given `beside` it.

    Raises `UserError` for any other config.
    """
    if "model" not in config:
        raise UserError("this experiment names no published model: `diffjax train` it, then sample with --run")
    if wrong := next((name for name in config if name not in names(Request)), None):
        raise unknown("field of a sampling experiment", wrong, names(Request))
    asked = config.to_dict() | dict(beside)
    if asked.get("closed_form"):
        asked["closed_form"] = closed_form.settled(asked["closed_form"])
    return asked_for(asked)


def whole_paths(given: dict[str, Any]) -> dict[str, Any]:
    """The same with the files that it names by their whole path, those of adapters with their strength."""
    paths = {name: str(Path(given[name]).resolve()) for name in FILES if name != "lora" and given.get(name)}
    loras = {"lora": tuple(map(str, lora_file.sources(given["lora"])))} if given.get("lora") else {}
    return given | paths | loras


def asked_for(given: dict[str, Any]) -> Request:
    """The request of these fields; without a `num`, as many pictures as the files of each have lines."""
    request = Request(**whole_paths(given))
    return dataclasses.replace(request, num=len(request.each)) if request.each and "num" not in given else request


def requested(args: Namespace) -> Request:
    """The request of the command line's arguments, files named by their whole path.

    They win over what a config says; what `--quality` stands for fills in what they do not say. Raises `UserError` for
    numbers that cannot be, a run or a prompt file that is not there, and a file without prompts.
    """
    if args.preview is not None and args.preview < 0:
        raise UserError(f"--preview is {args.preview}: give a number of steps, or 0 for none")
    asked = given(Request, args)
    chosen = build.QUALITIES[args.quality] if args.quality else {}
    read = read_lines(args.prompt_file) if args.prompt_file else []
    if prompts := (*asked.get("prompts", ()), *read):
        asked["prompts"] = prompts
    if args.config:
        return configured(args.config, chosen | asked)
    model = {"model": run_folder(args.workdir)} if args.workdir else {}
    num = {} if {*EACH} & asked.keys() else {"num": NUM}
    return asked_for(num | chosen | asked | model)


def preset(request: Request) -> Request:
    """The request with the command line's choice of dtype: bfloat16 for published models on accelerators."""
    is_run = (Path(request.model) / "run.json").exists()
    if request.dtype or is_run or request.closed_form or jax.default_backend() == "cpu":
        return request
    return dataclasses.replace(request, dtype="bfloat16")


def generate(
    request: Request,
    out: str | Path,
    *,
    preview: int | None = None,
    overwrite: bool = False,
    save_seconds: float = SAVE_SECONDS,
    expected: dict[str, Any] | None = None,
) -> Gallery:
    """Draw what is asked for into the folder `out`, going on where an earlier call stopped.

    Previews are written every `preview` steps (0: never; None: every few seconds). Every `save_seconds` the state is
    kept, so that a killed job goes on from there with the same bits. Raises `UserError` for what cannot be drawn, when
    `out` holds something else, and when the recipe is not the `expected` one; `KeyboardInterrupt` once all is saved
    after Ctrl-C.
    """
    out = files.local(out)
    model = loading.requested(request, request.texts).against(request.guide)
    request = completed(request, model)
    drawing = prepared(request, model)
    recipe = recipe_of(request, model)
    if expected is not None and (lines := unlike(expected, recipe)):
        raise UserError(f"this is not what the manifest was made with: {'; '.join(lines)}")
    kind = Gallery if request.format == "png" else Shards
    gallery = kind(out, recipe, listed(request))
    fill(gallery, drawing, overwrite, preview, save_seconds)
    return gallery


def fill(gallery: Gallery, drawing: Drawing, overwrite: bool, preview: int | None, save_seconds: float) -> None:
    """Draw what a gallery lacks. Each process looks at what is its own to draw before any begins, so that none sees
    what another has just drawn; the first one makes the folder and finishes it.
    """
    hosts.first(lambda: gallery.claim(overwrite))
    mine = gallery.owned(hosts.index(), hosts.count())
    gallery.mend(mine)
    parts = to_draw(gallery, drawing, mine)
    hosts.meet()
    if parts:
        Job(drawing, gallery, preview, save_seconds).run(parts)
    elif mine:
        print(f"{gallery.folder} has {counted(len(mine), 'image')} already: nothing to draw; --overwrite draws again")
    hosts.meet()
    gallery.settle(mine)
    hosts.meet()
    hosts.first(gallery.finish)


def replay(
    manifest: str | Path,
    out: str | Path,
    model: str | None = None,
    *,
    preview: int | None = None,
    overwrite: bool = False,
) -> bool:
    """Draw again what a manifest lists, and compare: whether all files have the same bytes.

    `model` is where the model is now, if it was moved. Raises `UserError` when it is not there, or not the one of the
    manifest.
    """
    there = read_manifest(Path(manifest))
    recipe = with_places(there["recipe"], Path(manifest).parent, whole)
    recipe["model"] = model or recipe["model"]
    if recipe["checksum"] is not None and not recipe.get("closed_form") and not Path(recipe["model"]).exists():
        raise UserError(f"{recipe['model']} is not there: say with --run or --model where it is now")
    request = Request(**{name: tupled(recipe[name]) for name in names(Request) if name in recipe})
    gallery = generate(request, out, preview=preview, overwrite=overwrite, expected=there["recipe"])
    entries = files_of(there)
    differ = [entry["file"] for entry in entries if sha256(gallery.folder / entry["file"]) != entry.get("sha256")]
    but = f"; not {', '.join(differ[:5])}" if differ else ""
    total = counted(len(entries), "image" if there["images"] else "file")
    print(f"{len(entries) - len(differ)} of {total}: the same, byte for byte{but}")
    return not differ


def completed(request: Request, model: Model) -> Request:
    """The request with the model's choices filled in, so that it means the same whatever the defaults become."""
    if request.skip_layers and request.guidance is None:
        request = dataclasses.replace(request, guidance=SkipLayers.guidance)
    request = dataclasses.replace(request, **model.defaults.but(request).said())
    if request.strength is None:
        request = dataclasses.replace(request, strength=KEPT_STRENGTH if request.image and not request.mask else 1.0)
    return dataclasses.replace(
        request,
        model=model.name,
        revision=model.revision,
        grid=request.grid if isinstance(request.grid, str) else None,
        eta=float(model.recipe(method(request)).sampler.eta),
        batch=request.batch or model.defaults.batch,
    )


def prepared(request: Request, model: Model) -> Drawing:
    """How to draw a completed request, prompts encoded. Raises `UserError` for conditioning that the model lacks."""
    recipe = model.recipe(method(request), size=request.size, strength=request.strength)
    model = encoded(model, request.texts)
    height, width, channels = recipe.shape
    picture, mask = masked(
        request, (height * model.factor, width * model.factor), channels if model.encode is None else 3
    )
    common = conditions(request, model) | ({} if picture is None else {"image": model.known(picture)})
    common |= {} if mask is None else {"mask": mask}
    paste = model.paste(picture, mask, request.feather)
    batch = request.batch or model.defaults.batch
    drawing = Drawing(model, recipe, seeds.key(request.seed), batch, common, paste)
    first = {picture[1:]: picture for picture in reversed(listed(request))}
    for picture in itertools.islice(reversed(first.values()), CHECKED):
        drawing.inputs(Part((picture,)))
    return drawing


def method(request: Request) -> Method:
    """The method of a request, its guide in two passes or without layers where it asks for that.

    Raises `UserError` for what is about guidance, without any.
    """
    asked = Method(**request.said())
    if build.scale(request.guidance) is None and not request.skip_layers and (request.two_passes or request.guide):
        flag = "--two-passes" if request.two_passes else "--guide"
        raise UserError(f"{flag} is about guidance, and this draws without: give --guidance above 1, or leave it out")
    if request.two_passes:
        asked = dataclasses.replace(asked, guide={**build.rule(request.guide or "cfg"), "two_passes": True})
    if request.skip_layers:
        skip = SkipLayers(build.scale(request.guidance) or 1.0, guide=asked.guide or "cfg")
        asked = dataclasses.replace(asked, guidance=skip, guide=None)
    return asked


def encoded(model: Model, prompts: Sequence[str]) -> Model:
    """The model with the prompts encoded, but for a closed form, whose captions remain, and for more than `MANY`, which
    a model that has its text encoder reads batch by batch. Raises `UserError` for a prompt that is longer than the
    encoder of a run reads, or that names no training picture.
    """
    if isinstance(model.text, closed_form.Captions):
        model.text(["", *prompts])
        return model
    if isinstance(model.text, OnDisk):
        return model
    with warnings.catch_warnings():
        if isinstance(model.text, Prompts):
            warnings.simplefilter("error", UserWarning)
        try:
            if len(prompts) <= MANY:
                return model.with_encoded(prompts)
            if isinstance(model.text, Prompts):
                for i in range(0, len(prompts), MANY):
                    model.with_encoded(prompts[i : i + MANY])
            return model
        except UserWarning as cut:
            raise UserError(f"{cut}: say it in fewer words") from cut


def masked(request: Request, size: tuple[int, int], channels: int) -> tuple[Array | None, Array | None]:
    """The picture to start from, in [-1, 1], and its mask, 1 where it is drawn anew, both of `size` pixels, with a
    first axis of 1.

    Raises `UserError` for a mask that is black everywhere.
    """
    if request.image is None:
        return None, None
    picture = jnp.asarray(image.from_uint8(images.read(request.image, size, channels)[None]))
    if request.mask is None:
        return picture, None
    mask = images.read(request.mask, size, 1)[None]
    if not mask.any():
        raise UserError(
            f"{request.mask} is black everywhere, so nothing would be drawn: make white what is to be drawn anew"
        )
    return picture, jnp.asarray(mask / 255, jnp.float32)


def conditions(request: Request, model: Model) -> dict[str, Any]:
    """The conditioning that all pictures of a request have in common."""
    common: dict[str, Any] = {}
    if request.negative_prompt is not None:
        common["negative_prompt"] = request.negative_prompt
    if request.low_res is not None:
        names = listed(dataclasses.replace(request, format="png"))
        common["low_res"] = functools.partial(earlier, Path(request.low_res), names, model)
    if request.level is not None:
        common["level"] = request.level
    return common


def earlier(
    folder: Path, names: Mapping[Picture, str], model: Model, pictures: Sequence[Picture]
) -> Float[np.ndarray, "b h w c"]:
    """The low-res picture of each: one file for all, or the picture of the same name in an earlier job's folder.

    Raises `UserError` when it is not there.
    """
    if folder.is_file():
        size = model.low_res, model.low_res
        return image.from_uint8(images.read(folder, size, model.shape[-1]))[None]
    pngs = [folder / names[picture] for picture in pictures]
    if absent := next((file for file in pngs if not file.is_file()), None):
        raise UserError(
            f"{folder} does not hold {absent.name}: draw the same prompts, and as many of each, there first, as png"
        )
    return image.from_uint8(np.stack([image.read_png(file)[0] for file in pngs]))


def recipe_of(request: Request, model: Model) -> dict[str, Any]:
    """All that the pixels depend on, in JSON types: the request, and checksums of the model and of files it names.

    A model of the hub is known by its commit.
    """
    read_whole = {name: path for name in ("image", "mask", *EACH) if (path := getattr(request, name))}
    named: dict[str, Any] = {name: sha256(Path(path)) for name, path in read_whole.items()}
    if request.lora:
        named["lora"] = [(source.digest, source.strength) for source in lora_file.sources(request.lora)]
    if request.low_res:
        named["low_res"] = drawn_in(Path(request.low_res))
    recipe = dataclasses.asdict(request) | {"checksum": None, "files": named}
    if request.closed_form or Path(model.name).exists():
        without_text = isinstance(model.text, Encoded | OnDisk | closed_form.Captions)
        recipe["checksum"] = int(checksum(dataclasses.replace(model, text=None) if without_text else model))
    return json.loads(json.dumps(recipe | read(request, model)))


def read(request: Request, model: Model) -> dict[str, Any]:
    """The prompts that the text encoder of a run reads in other words (see `reading`), as `read`; nothing
    without any.
    """
    if not isinstance(model.text, Prompts | closed_form.Captions):
        return {}
    texts = {prompt: model.text.read(prompt).text for prompt in request.texts}
    changed = {prompt: text for prompt, text in texts.items() if text != prompt}
    return {"read": changed} if changed else {}


def drawn_in(path: Path) -> str:
    """The checksum of a picture, or of all that a job has drawn."""
    if path.is_file():
        return sha256(path)
    return hashlib.sha256(json.dumps(read_manifest(path / "manifest.json")["images"]).encode()).hexdigest()


def to_draw(gallery: Gallery, drawing: Drawing, mine: Sequence[Picture]) -> list[Part]:
    """Of the pictures of this process, the batches that an earlier call left under way, then the rest."""
    saved = gallery.saved(drawing.blank)
    begun, own = {picture for part in saved for picture in part.pictures}, set(mine)
    fresh = [picture for picture in gallery.missing(mine) if picture not in begun]
    return [part for part in saved if part.pictures[0] in own] + drawing.parts(fresh)


class Job:
    """Drawing parts into a gallery: pictures at once, previews and states when they are due."""

    def __init__(self, drawing: Drawing, gallery: Gallery, preview: int | None, save_seconds: float):
        self.drawing, self.gallery, self.preview = drawing, gallery, preview
        self.background = Background()
        self.saves, self.previews = Every(save_seconds), Every(PREVIEW_SECONDS)

    def run(self, parts: Sequence[Part]) -> None:
        """Draw all of them. Raises `KeyboardInterrupt` after a signal, once what is under way is kept."""
        groups, begin = self.drawing.groups(parts), time.perf_counter()
        total = sum(len(part.pictures) for part in parts)
        stages = self.drawing.stages(groups, self.preview or 0)
        with stop_on_signal() as stop, contextlib.closing(self.background):
            for stage in shown(stages, groups, self.drawing.steps, counted(total, "image")):
                self.take(stage)
                if stop.is_set():
                    if not stage.finished:
                        self.background.write(self.keep, stage)
                    break
        print(f"{counted(total, 'image')} in {time.perf_counter() - begin:.1f} s: {self.gallery.folder}")

    def take(self, stage: Stage) -> None:
        """Hand over what is due of a stage to the thread that writes."""
        if stage.finished:
            self.background.write(self.finish, stage, self.drawing.images(stage))
            return
        if self.previews.due() if self.preview is None else self.preview and stage.done % self.preview == 0:
            self.background.offer("preview", self.show, stage)
        if self.saves.due():
            self.background.offer("state", self.keep, stage)

    def finish(self, stage: Stage, images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Write the pictures of a finished stage."""
        self.gallery.write(stage.pictures, images)
        if isinstance(self.drawing.model.text, closed_form.Captions):
            self.trace(stage.pictures, images)
        self.gallery.forget(stage.parts)

    def trace(self, pictures: Sequence[Picture], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Write where the pixels of a closed form are from."""
        model = self.drawing.model
        for picture, pixels in zip(pictures, images, strict=True):
            cond = model.condition(1, picture.prompt)
            found = closed_form.sources(model, image.from_uint8(pixels), cond)
            self.gallery.write_beside(PROVENANCE, picture, closed_form.mosaic(model, pixels, found))

    def show(self, stage: Stage) -> None:
        """Write its previews: the estimates of x0."""
        self.gallery.preview(stage.pictures, self.drawing.previews(stage))

    def keep(self, stage: Stage) -> None:
        """Write its state."""
        self.gallery.save(stage.standing())
