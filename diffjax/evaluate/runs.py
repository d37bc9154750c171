"""What a run has learned: whether its pictures of training prompts are those of the training set, or, of a stage of a
cascade, how near its enlarged pictures come to those it was not shown.

Retrieval top-1 is the share of prompts whose picture is nearer, pixel by pixel, to the prompt's own training picture
than to any other; PSNR compares with the same picture. Two floors say what no learning would reach: the mean picture,
and the nearest picture of another prompt.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

import diffjax.data
from diffjax import config as configs
from diffjax.diffusion import cascade
from diffjax.loading import load
from diffjax.models.model import Model, Recipe
from diffjax.models.options import Keywords, Method, changed
from diffjax.sampling.batches import Drawing, Picture, shown
from diffjax.utils import files, image, seeds
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

Pictures = UInt8[np.ndarray, "n h w c"]
Sheet = UInt8[np.ndarray, "h w 3"]

AT_ONCE = 256
COLUMNS = 8
SHOWN = 16


@dataclass(frozen=True)
class Nearest:
    """Squared distances of pictures to their own one in a training set, and to the nearest that differs from that."""

    own: Float[np.ndarray, " n"]
    other: Float[np.ndarray, " n"]


def evaluate(
    run: str | Path, num: int = 64, *, seed: int = 0, step: int | None = None, **given: Unpack[Keywords]
) -> dict[str, Any]:
    """Draw `num` pictures, measure, print a table; `evaluation.json` and `.png` in the run's folder keep it.

    Of a run with text its training prompts, of one that enlarges the pictures that it was not trained on
    (`enlargements`). It draws as the run's config says, but for what is `given` of a method (`options.Method`).

    Raises `UserError` for a run without either, and for what `load` cannot read.
    """
    if num < 1:
        raise UserError(f"--num is {num}: it must be at least 1")
    run = Path(run)
    method = changed(Method(), given, evaluate)
    model = load(run.absolute(), revision=None if step is None else str(step)).against(method.guide)
    if model.text is None and not model.low_res:
        raise UserError(f"{run} was trained without text: only pictures of prompts can be measured, or enlarged ones")
    config = configs.read(run).data
    how, recipe = model.defaults.but(method), model.recipe(method)
    measure = enlargements if model.low_res else recall
    found, sheet = measure(model, recipe, config, num, seed)
    guide = {"guide": dict(model.rule(how.guide))} if recipe.reads else {}
    sampling = how.said() | {"steps": len(recipe.grid), "seed": seed} | guide
    result = {"run": run.resolve().name, "step": int(model.revision), **found, "sampling": sampling}
    files.write_json(run / "evaluation.json", result)
    image.write_png(run / "evaluation.png", sheet)
    report(result, run)
    return result


def recall(model: Model, recipe: Recipe, config: ConfigDict, num: int, seed: int) -> tuple[dict[str, Any], Sheet]:
    """The measures of pictures of training prompts, and a sheet of them, drawn above, true below."""
    data = diffjax.data.load(config)
    chosen, prompts = training_prompts(data, num, seed)
    drawn, seconds = draw(
        Drawing(model.with_encoded(prompts), recipe, seeds.key(seed), model.defaults.batch, {}), prompts
    )
    truth = data.examples(chosen)["image"]
    each = zip(prompts, image.psnr(drawn, truth).tolist(), strict=True)
    found = measures(drawn, truth, data) | {"seconds_per_image": seconds}
    found["prompts"] = [{"prompt": prompt, "psnr": psnr} for prompt, psnr in each]
    pairs = np.concatenate([drawn, np.full_like(drawn[:, :1], 255), truth], axis=1)
    return found, image.sheet(pairs, COLUMNS, prompts)


def enlargements(model: Model, recipe: Recipe, config: ConfigDict, num: int, seed: int) -> tuple[dict[str, Any], Sheet]:
    """PSNR of pictures enlarged from their own small ones, without noise, and of bicubic interpolation; and a sheet
    of them.

    They are drawn by the seed from the split `held_out` of the data, without one from the training pictures. The
    sheet's rows are the small picture, interpolation, the model, the truth.
    """
    held_out = config.get("held_out", "")
    data = diffjax.data.load(ConfigDict(config.to_dict() | {"split": held_out}) if held_out else config)
    chosen = sorted(np.random.default_rng(seed).permutation(len(data))[:num].tolist())
    examples = data.examples(chosen)
    truth, prompts = examples["image"], [captions[0] if captions else "" for captions in examples["captions"]]
    small = cascade.downsample(image.from_uint8(truth), model.low_res)
    told = {"low_res": lambda rows: small[np.asarray([row.number for row in rows])], "level": 0.0}
    drawing = Drawing(model.with_encoded(prompts), recipe, seeds.key(seed), model.defaults.batch, told)
    drawn, seconds = draw(drawing, prompts)
    bicubic = image.to_uint8(cascade.upsample(small, data.size))
    found = {
        "num": len(truth),
        "held_out": bool(held_out),
        "psnr": float(np.mean(image.psnr(drawn, truth))),
        "bicubic_psnr": float(np.mean(image.psnr(bicubic, truth))),
        "seconds_per_image": seconds,
    }
    factor = data.size // model.low_res
    given = image.to_uint8(small).repeat(factor, axis=1).repeat(factor, axis=2)
    rows = np.stack([given, bicubic, drawn, truth], axis=1)[:SHOWN].reshape(-1, *truth.shape[1:])
    return found, image.sheet(rows, 4)


def training_prompts(data: diffjax.data.Dataset, num: int, seed: int) -> tuple[list[int], list[str]]:
    """Records that are the only one of their main caption, at most `num` drawn by the seed, and their prompts."""
    captions = [captions[0] if captions else "" for captions in data.captions()]
    counts = Counter(captions)
    unique = [i for i, caption in enumerate(captions) if caption and counts[caption] == 1]
    if not unique:
        raise UserError(f"{data.name} has no caption that belongs to one picture only: nothing can be compared")
    chosen = sorted(np.random.default_rng(seed).permutation(unique)[:num].tolist())
    return chosen, [data.config.templates[0].replace("{}", captions[i]) for i in chosen]


def draw(drawing: Drawing, prompts: Sequence[str]) -> tuple[Pictures, float | None]:
    """One picture of each prompt, number i of prompt i; seconds an image once compiled, None where one batch is all."""
    groups = drawing.groups(drawing.parts([Picture(i, prompt) for i, prompt in enumerate(prompts)]))
    found, times = [], []
    for stage in shown(drawing.stages(groups), groups, drawing.steps, counted(len(prompts), "prompt")):
        if stage.finished:
            found.append(drawing.images(stage))
            times.append(time.perf_counter())
    later = sum(map(len, found[1:]))
    return np.concatenate(found), (times[-1] - times[0]) / later if later else None


def measures(drawn: Pictures, truth: Pictures, data: diffjax.data.Dataset) -> dict[str, Any]:
    """Retrieval and PSNR of pictures of prompts whose training pictures are `truth`, and the floors."""
    found, floor, mean = compare(drawn, truth, data)
    pixels = truth[0].size
    return {
        "num": len(drawn),
        "training_pictures": len(data),
        "top1": float(np.mean(found.own <= found.other)),
        "psnr": float(np.mean(image.psnr(drawn, truth))),
        "floors": {
            "mean_picture_psnr": float(np.mean(image.psnr(truth, mean))),
            "nearest_other_psnr": float(np.median(10 * np.log10(255**2 * pixels / floor.other))),
        },
    }


def compare(
    drawn: Pictures, truth: Pictures, data: diffjax.data.Dataset
) -> tuple[Nearest, Nearest, Float[np.ndarray, "h w c"]]:
    """How near `drawn` and `truth` itself are to the whole training set, and the mean of that set."""
    rows = _rows(np.concatenate([drawn, truth]))
    own, others, total = np.tile(_rows(truth), (2, 1)), [], 0.0
    for first in range(0, len(data), AT_ONCE):
        block = data.examples(range(first, min(first + AT_ONCE, len(data))))["image"]
        total = total + block.sum(axis=0, dtype=np.float64)
        apart = squared_distances(own, _rows(block)) > 0
        others.append(np.where(apart, squared_distances(rows, _rows(block)), np.inf).min(axis=1))
    other = np.min(others, axis=0)
    distance = np.sum((rows - own) ** 2, axis=1)
    n = len(drawn)
    return Nearest(distance[:n], other[:n]), Nearest(distance[n:], other[n:]), total / len(data)


def squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """|a_i - b_j|^2, exact for pixel values."""
    return (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T


def report(result: dict[str, Any], run: Path) -> None:
    """Print the measures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", "without learning")
    if "top1" in result:
        floors, among = result["floors"], result["training_pictures"]
        what = "training prompt"
        table.add_row(f"retrieval top-1 among {among}", f"{result['top1']:.1%}", f"{1 / among:.1%} (chance)")
        table.add_row("PSNR", f"{result['psnr']:.1f} dB", f"{floors['mean_picture_psnr']:.1f} dB (the mean picture)")
        table.add_row("", "", f"{floors['nearest_other_psnr']:.1f} dB (the nearest other picture)")
    else:
        what = "held-out picture" if result["held_out"] else "training picture"
        table.add_row("PSNR", f"{result['psnr']:.1f} dB", f"{result['bicubic_psnr']:.1f} dB (bicubic interpolation)")
    if result["seconds_per_image"] is not None:
        table.add_row("time", f"{1000 * result['seconds_per_image']:.0f} ms an image", "")
    table.title = f"{run}, step {result['step']}, {counted(result['num'], what)}"
    Console().print(table)
    print(f"evaluation.json and evaluation.png (a row or column ends with the truth) are in {run}")


def _rows(pictures: Pictures) -> Float[np.ndarray, "n d"]:
    return pictures.reshape(len(pictures), -1).astype(np.float64)
