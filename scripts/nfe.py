"""Error against the number of network evaluations: every deterministic solver on every grid, on an analytic mixture and
on a model.

    python scripts/nfe.py                                       the mixture alone, a minute on 2 cores
    python scripts/nfe.py --model RUN --name CIFAR-10 --fitted 10

The error is the root mean square difference, over all values of the images, from the same model's own fine solution
from the same noise: UniPC in `--fine` steps, even in log-SNR; its own error is estimated by halving its steps and
printed first. Images, clipping and the start are those of `Model.sample`. Writes docs/nfe.json and docs/nfe.png.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax.diffusion import analytic, process
from diffjax.models import fitted
from diffjax.models.model import Defaults, Inputs, Model
from diffjax.utils.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
SAMPLERS = ("ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm")
GRIDS = ("uniform", "trailing", "logsnr", "karras", fitted.FITTED)
COUNTS = (5, 8, 10, 15, 20, 25, 35, 50)
REFERENCE = "unipc"


def mixture() -> Model:
    """Two narrow clusters and a wide one in the plane, under the linear table of DDPM."""
    means, variances = [[1.0, 1], [-1, 0.5], [0, -1]], [[0.05, 0.05], [0.02, 0.1], [0.3, 0.3]]
    table = process.discrete(process.linear_betas())
    return Model(
        analytic.Mixture(table, jnp.zeros(3), jnp.asarray(means), jnp.asarray(variances)),
        (2,),
        Defaults(batch=256),
        name="mixture",
    )


def solve(model: Model, inputs: Inputs, sampler: str, grid: str, steps: int, length: int) -> np.ndarray:
    """The images after `steps` steps; one program for all that are at most `length`."""
    recipe = model.recipe(sampler=sampler, grid=grid, steps=steps)
    rows = np.concatenate([recipe.grid, np.zeros((length - steps, 2), recipe.grid.dtype)])
    return np.asarray(recipe.replace(grid=rows).advance_part(inputs, recipe.begin(inputs)).x)


def steps_of(sampler: str, evaluations: int) -> int:
    """Steps that cost so many evaluations: Heun makes two in each."""
    return evaluations // 2 if sampler == "heun" else evaluations


def cases(model: Model, counts: list[int]) -> Iterator[tuple[str, str, int]]:
    """Sampler, grid and evaluations; fitted grids where one was made for the model."""
    for sampler, grid, count in itertools.product(SAMPLERS, GRIDS, COUNTS):
        if grid != fitted.FITTED or (
            count in counts and fitted.path(model.name, sampler, count, fitted.fitted_to(model)).exists()
        ):
            yield sampler, grid, count


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square difference."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64) - b))))


def measure(
    model: Model, images: int, fine: int, fitted: list[int], title: str
) -> dict[str, dict[str, list[float | None]]]:
    """Errors by sampler and grid, one for each of `COUNTS`."""
    from rich.progress import track

    inputs = model.inputs(jax.random.key(1), np.arange(images))
    truth = solve(model, inputs, REFERENCE, "logsnr", fine, fine)
    coarser = rms(solve(model, inputs, REFERENCE, "logsnr", fine // 2, fine), truth)
    print(f"{title}: the fine solution moves by {coarser:.1e} when its steps are halved", flush=True)
    errors = {}
    for sampler, grid, count in track(list(cases(model, fitted)), title):
        row = errors.setdefault(sampler, {}).setdefault(grid, [None] * len(COUNTS))
        found = solve(model, inputs, sampler, grid, steps_of(sampler, count), max(COUNTS))
        row[COUNTS.index(count)] = rms(found, truth)
    return errors


def best(errors: dict[str, dict[str, list[float | None]]], i: int) -> list[tuple[float, str, str]]:
    """Error, sampler and grid at the i-th count, the best first."""
    return sorted(
        (row[i], sampler, grid)
        for sampler, grids in errors.items()
        for grid, row in grids.items()
        if row[i] is not None
    )


def table(errors: dict[str, dict[str, list[float | None]]]) -> str:
    """A line a sampler and grid, in Markdown."""
    shown = [i for i, count in enumerate(COUNTS) if count in (5, 10, 25, 50)]
    lines = ["| solver | grid | " + " | ".join(str(COUNTS[i]) for i in shown) + " |", "|---|---|" + "---|" * len(shown)]
    for sampler, grids in errors.items():
        for grid, row in grids.items():
            cells = [
                "" if row[i] is None else ("**{:.2g}**" if row[i] == best(errors, i)[0][0] else "{:.2g}").format(row[i])
                for i in shown
            ]
            lines.append(f"| {sampler} | {grid} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(problems: dict[str, dict], path: Path) -> None:
    """Above: every solver on its best grid at each count; below: every grid with the solver that is best on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(problems), figsize=(5 * len(problems), 7.4), layout="constrained", squeeze=False
    )
    for column, (title, errors) in enumerate(problems.items()):
        by_grid = {grid: [row[grid] for row in errors.values() if grid in row] for grid in GRIDS}
        groups = (
            {name: list(rows.values()) for name, rows in errors.items()},
            {name: rows for name, rows in by_grid.items() if rows},
        )
        for axis, lines, of in zip(
            axes[:, column], groups, ("each solver on its best grid", "each grid with its best solver")
        ):
            for (name, rows), marker in zip(lines.items(), "o^v<>sD"):
                known = {count: [row[i] for row in rows if row[i] is not None] for i, count in enumerate(COUNTS)}
                least = {count: min(values) for count, values in known.items() if values}
                axis.loglog(list(least), list(least.values()), marker=marker, markersize=4, linewidth=1.2, label=name)
            axis.set(title=f"{title}: {of}", xlabel="network evaluations", xticks=COUNTS, xticklabels=COUNTS)
            axis.title.set_size(9)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        axes[0, column].set_ylabel("RMS error of the images in [-1, 1]")
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def main() -> None:
    """Measure, print the tables, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a run, a folder in the layout of diffusers, or a hub id")
    parser.add_argument("--name", help="what the plot calls it")
    parser.add_argument("--images", type=int, default=8, help="images of the model (default 8)")
    parser.add_argument("--fine", type=int, default=400, help="steps of the model's fine solution (default 400)")
    parser.add_argument(
        "--fitted", type=int, nargs="*", default=[], metavar="N", help="counts for which fit-grid was run"
    )
    args = parser.parse_args()
    problems = {"analytic mixture": measure(mixture(), 256, 2000, [], "analytic mixture")}
    if args.model:
        try:
            model = diffjax.load(args.model)
        except UserError as error:
            raise SystemExit(f"nfe.py: {error}") from error
        title = args.name or Path(args.model).name
        problems[title] = measure(model, args.images, args.fine, args.fitted, title)
    for title, errors in problems.items():
        print(f"\n{title}\n\n{table(errors)}\n")
        for i, count in enumerate(COUNTS):
            print(
                f"{count:3} evaluations:",
                *(f"{sampler}/{grid} {error:.3g}" for error, sampler, grid in best(errors, i)[:3]),
                sep="  ",
            )
    (DOCS / "nfe.json").write_text(json.dumps({"evaluations": COUNTS, "errors": problems}, indent=1) + "\n")
    draw(problems, DOCS / "nfe.png")


if __name__ == "__main__":
    main()
