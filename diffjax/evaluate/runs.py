"""What a run has learned: whether its pictures of training prompts are those of the training set, and of held-out
prompts those that it was not shown; or, of a super-resolution stage, how near its pictures come to held-out ones.
"""

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

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
from diffjax.parallel import hosts
from diffjax.sampling.batches import Drawing, Picture, shown
from diffjax.text.learned import Prompts
from diffjax.text.reading import Reworded
from diffjax.train.preview import beside
from diffjax.utils import files, image, seeds
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

if TYPE_CHECKING:
    from rich.table import Table

Sheet = UInt8[np.ndarray, "h w 3"]
Split = diffjax.data.Dataset

COLUMNS = 8
ON_SHEET = 32
SHOWN = 16


@dataclass(frozen=True)
class Found:
    """Measures, and sheets of pictures by the names of their files."""

    measures: dict[str, Any]
    sheets: dict[str, Sheet]


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
    found = of(model, recipe, config, num, seed)
    guide = {"guide": dict(model.rule(how.guide))} if recipe.reads else {}
    sampling = how.said() | {"steps": len(recipe.grid), "seed": seed} | guide
    if hosts.index():
        return found.measures
    result = {"run": run.resolve().name, "step": int(model.revision), **found.measures, "sampling": sampling}
    files.write_json(run / "evaluation.json", result)
    for name, sheet in found.sheets.items():
        image.write_png(run / name, sheet)
    report(result, run)
    return result


def of_prompts(model: Model, recipe: Recipe, config: ConfigDict, num: int, seed: int) -> Found:
    """The measures of pictures of training prompts; where the data have a split `held_out`, also of its prompts, which
    no training picture has, both among the pictures of both splits.
    """
    splits = [diffjax.data.load(config), *_held_out(config)]
    captions = [[said[0] if said else "" for said in split.captions()] for split in splits]
    counts = Counter(itertools.chain.from_iterable(captions))
    found = []
    for data, texts in zip(splits, captions):
        unique = [text if counts[text] == 1 else "" for text in texts]
        found.append(recalled(model, recipe, data, splits, chosen_prompts(model, data, unique, num, seed), seed))
    measures, sheets = found[0].measures, found[0].sheets
    if splits[1:]:
        measures = measures | {"held_out_prompts": found[1].measures}
        sheets = sheets | {"held_out.png": found[1].sheets["evaluation.png"]}
    return Found(measures, sheets)


def _held_out(config: ConfigDict) -> list[Split]:
    """The data's split `held_out`, if they have one."""
    split = config.get("held_out", "")
    return [diffjax.data.load(ConfigDict(config.to_dict() | {"split": split}))] if split else []


def recalled(
    model: Model, recipe: Recipe, data: Split, among: Sequence[Split], chosen: dict[int, str], seed: int
) -> Found:
    """The measures of pictures of the `chosen` records' prompts among the pictures of several splits, and a sheet of
    them, drawn above, true below.
    """
    prompts = list(chosen.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Reworded)
        model = model.with_encoded(prompts)
    drawn, seconds = draw(Drawing(model, recipe, seeds.key(seed), model.defaults.batch, {}), prompts)
    own = data.examples(list(chosen))
    each = zip(prompts, image.psnr(drawn, own["image"]).tolist(), strict=True)
    found = metrics.retrieval(drawn, own, among) | {"seconds_per_image": seconds}
    found["prompts"] = [{"prompt": prompt, "psnr": psnr} for prompt, psnr in each]
    pairs = np.concatenate([drawn, np.full_like(drawn[:, :1], 255), own["image"]], axis=1)
    return Found(found, {"evaluation.png": image.sheet(pairs[:ON_SHEET], COLUMNS, prompts[:ON_SHEET])})


def of_low_res(model: Model, recipe: Recipe, config: ConfigDict, num: int, seed: int) -> Found:
    """PSNR of pictures drawn of their own low-res ones, at noise augmentation level 0, and of bicubic interpolation;
    and a sheet of them (`preview.beside`).

    They are chosen by the seed from the split `held_out` of the data, without one from the training pictures.
    """
    held_out = _held_out(config)
    data = held_out[0] if held_out else diffjax.data.load(config)
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
    sheet = image.sheet(image.to_uint8(preview.images), preview.columns, preview.captions)
    return Found(found, {"evaluation.png": sheet})


def chosen_prompts(model: Model, data: Split, captions: Sequence[str], num: int, seed: int) -> dict[int, str]:
    """The prompts of records by their captions ("": not to be asked for), at most `num`, drawn by the seed from those
    that the model can read. Raises `UserError` where there is none.
    """
    prompts = {i: data.config.templates[0].replace("{}", text) for i, text in enumerate(captions) if text}
    able = [i for i, prompt in prompts.items() if _can_read(model, prompt)]
    if not able:
        raise UserError(f"{data.name} has no caption that belongs to one picture only: nothing can be compared")
    return {i: prompts[i] for i in sorted(np.random.default_rng(seed).permutation(able)[:num].tolist())}


def _can_read(model: Model, prompt: str) -> bool:
    try:
        return not isinstance(model.text, Prompts) or bool(model.text.read(prompt))
    except UserError:
        return False


def draw(drawing: Drawing, prompts: Sequence[str]) -> tuple[metrics.Pictures, float | None]:
    """One picture of each prompt, number i of prompt i, drawn by all hosts; seconds an image once compiled, None where
    one batch is all.
    """
    parts = drawing.parts([Picture(i, prompt) for i, prompt in enumerate(prompts)])
    groups = drawing.groups(parts[hosts.index() :: hosts.count()])
    found, times = np.zeros((len(prompts), *drawing.recipe.shape), np.uint8), []
    for stage in shown(drawing.stages(groups), groups, drawing.steps, counted(len(prompts), "prompt")):
        if stage.finished:
            found[[picture.number for picture in stage.pictures]] = drawing.images(stage)
            times.append((time.perf_counter(), len(stage.pictures)))
    later = sum(number for _, number in times[1:])
    return hosts.total(found), (times[-1][0] - times[0][0]) / later / hosts.count() if later else None


def report(result: dict[str, Any], run: Path) -> None:
    """Print the measures as a table."""
    from rich.console import Console

    table = _of_prompts(result) if "top1" in result else _of_low_res(result)
    if result["seconds_per_image"] is not None:
        table.add_row("time", f"{1000 * result['seconds_per_image']:.0f} ms an image")
    table.title = f"{run}, step {result['step']}"
    Console().print(table)
    print(f"evaluation.json and evaluation.png (a row or column ends with the truth) are in {run}")


def _of_prompts(result: dict[str, Any]) -> "Table":
    """A column for training prompts, one for held-out prompts where they were measured, one without learning."""
    from rich.table import Table

    measured = {"training": result} | ({"held-out": held} if (held := result.get("held_out_prompts")) else {})
    headings = [counted(of["num"], f"{name} prompt") for name, of in measured.items()]
    table = Table("measure", *headings, "without learning")
    row = lambda what, name, how, floor: table.add_row(what, *(how(of[name]) for of in measured.values()), floor)
    percent, decibel = "{:.1%}".format, "{:.1f} dB".format
    row(f"retrieval top-1 among {result['among']}", "top1", percent, f"{1 / result['among']:.1%} (chance)")
    if "class" in result:
        row("class right", "class", percent, "")
    row("PSNR", "psnr", decibel, f"{decibel(result['floors']['mean_picture_psnr'])} (mean picture)")
    blank = [""] * (1 + len(measured))
    table.add_row(*blank, f"{decibel(result['floors']['nearest_other_psnr'])} (nearest other)")
    return table


def _of_low_res(result: dict[str, Any]) -> "Table":
    from rich.table import Table

    kind = "held-out picture" if result["held_out"] else "training picture"
    table = Table("measure", counted(result["num"], kind), "without learning")
    table.add_row("PSNR", f"{result['psnr']:.1f} dB", f"{result['bicubic_psnr']:.1f} dB (bicubic interpolation)")
    return table
