"""What a run has learned: whether its pictures of training prompts are those of the training set, or, of a
super-resolution stage, how near its pictures come to those it was not trained on.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

import diffjax.data
from diffjax import config as configs
from diffjax.diffusion import cascade
from diffjax.evaluate import metrics
from diffjax.loading import load
from diffjax.models.model import Model, Recipe
from diffjax.models.options import Keywords, Method, changed
from diffjax.sampling.batches import Drawing, Picture, shown
from diffjax.train.preview import beside
from diffjax.utils import files, image, seeds
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

Sheet = UInt8[np.ndarray, "h w 3"]

COLUMNS = 8
SHOWN = 16


def measure(
    run: str | Path, num: int = 64, *, seed: int = 0, step: int | None = None, **given: Unpack[Keywords]
) -> dict[str, Any]:
    """Draw `num` pictures, measure, print a table; `evaluation.json` and `.png` in the run's folder keep it.

    They are of training prompts (`of_prompts`), those of a super-resolution stage of pictures that it was not trained
    on (`of_low_res`). It draws as the run's config says, but for what is `given` of a method (`options.Method`).

    Raises `UserError` for a run that is neither, and for what `load` cannot read.
    """
    if num < 1:
        raise UserError(f"--num is {num}: it must be at least 1")
    run = Path(run)
    method = changed(Method(), given, measure)
    model = load(run.absolute(), revision=None if step is None else str(step)).against(method.guide)
    if model.text is None and not model.low_res:
        raise UserError(
            f"{run} was trained without text: only pictures of prompts, or of a super-resolution stage, are measured"
        )
    config = configs.read(run).data
    how, recipe = model.defaults.but(method), model.recipe(method)
    of = of_low_res if model.low_res else of_prompts
    found, sheet = of(model, recipe, config, num, seed)
    guide = {"guide": dict(model.rule(how.guide))} if recipe.reads else {}
    sampling = how.said() | {"steps": len(recipe.grid), "seed": seed} | guide
    result = {"run": run.resolve().name, "step": int(model.revision), **found, "sampling": sampling}
    files.write_json(run / "evaluation.json", result)
    image.write_png(run / "evaluation.png", sheet)
    report(result, run)
    return result


def of_prompts(model: Model, recipe: Recipe, config: ConfigDict, num: int, seed: int) -> tuple[dict[str, Any], Sheet]:
    """The measures of pictures of training prompts, and a sheet of them, drawn above, true below."""
    data = diffjax.data.load(config)
    chosen, prompts = training_prompts(data, num, seed)
    drawn, seconds = draw(
        Drawing(model.with_encoded(prompts), recipe, seeds.key(seed), model.defaults.batch, {}), prompts
    )
    truth = data.examples(chosen)["image"]
    each = zip(prompts, image.psnr(drawn, truth).tolist(), strict=True)
    found = metrics.retrieval(drawn, truth, data) | {"seconds_per_image": seconds}
    found["prompts"] = [{"prompt": prompt, "psnr": psnr} for prompt, psnr in each]
    pairs = np.concatenate([drawn, np.full_like(drawn[:, :1], 255), truth], axis=1)
    return found, image.sheet(pairs, COLUMNS, prompts)


def of_low_res(model: Model, recipe: Recipe, config: ConfigDict, num: int, seed: int) -> tuple[dict[str, Any], Sheet]:
    """PSNR of pictures drawn of their own low-res ones, at noise augmentation level 0, and of bicubic interpolation;
    and a sheet of them (`preview.beside`).

    They are chosen by the seed from the split `held_out` of the data, without one from the training pictures.
    """
    held_out = config.get("held_out", "")
    data = diffjax.data.load(ConfigDict(config.to_dict() | {"split": held_out}) if held_out else config)
    chosen = sorted(np.random.default_rng(seed).permutation(len(data))[:num].tolist())
    examples = data.examples(chosen)
    truth, prompts = examples["image"], [captions[0] if captions else "" for captions in examples["captions"]]
    small = cascade.downsample(image.from_uint8(truth), model.low_res)
    low_res = {"low_res": lambda rows: small[np.asarray([row.number for row in rows])], "level": 0.0}
    drawing = Drawing(model.with_encoded(prompts), recipe, seeds.key(seed), model.defaults.batch, low_res)
    drawn, seconds = draw(drawing, prompts)
    bicubic = image.to_uint8(cascade.upsample(small, data.size))
    found = {
        "num": len(truth),
        "held_out": bool(held_out),
        "psnr": float(np.mean(image.psnr(drawn, truth))),
        "bicubic_psnr": float(np.mean(image.psnr(bicubic, truth))),
        "seconds_per_image": seconds,
    }
    preview = beside(small[:SHOWN], image.from_uint8(drawn[:SHOWN]), image.from_uint8(truth[:SHOWN]))
    return found, image.sheet(image.to_uint8(preview.images), preview.columns, preview.captions)


def training_prompts(data: diffjax.data.Dataset, num: int, seed: int) -> tuple[list[int], list[str]]:
    """Records that are the only one of their main caption, at most `num` drawn by the seed, and their prompts."""
    captions = [captions[0] if captions else "" for captions in data.captions()]
    counts = Counter(captions)
    unique = [i for i, caption in enumerate(captions) if caption and counts[caption] == 1]
    if not unique:
        raise UserError(f"{data.name} has no caption that belongs to one picture only: nothing can be compared")
    chosen = sorted(np.random.default_rng(seed).permutation(unique)[:num].tolist())
    return chosen, [data.config.templates[0].replace("{}", captions[i]) for i in chosen]


def draw(drawing: Drawing, prompts: Sequence[str]) -> tuple[metrics.Pictures, float | None]:
    """One picture of each prompt, number i of prompt i; seconds an image once compiled, None where one batch is all."""
    groups = drawing.groups(drawing.parts([Picture(i, prompt) for i, prompt in enumerate(prompts)]))
    found, times = [], []
    for stage in shown(drawing.stages(groups), groups, drawing.steps, counted(len(prompts), "prompt")):
        if stage.finished:
            found.append(drawing.images(stage))
            times.append(time.perf_counter())
    later = sum(map(len, found[1:]))
    return np.concatenate(found), (times[-1] - times[0]) / later if later else None


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
