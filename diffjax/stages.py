"""Drawing with a cascade of runs: each stage is a sampling job of its own, which enlarges the pictures of the one before."""

import dataclasses
from argparse import Namespace
from pathlib import Path

from diffjax.cascade import Cascade
from diffjax.errors import UserError
from diffjax.generate import Request, generate, requested
from diffjax.loading import load


def draw(args: Namespace) -> None:
    """Draw as `diffjax sample --cascade` was told: the pictures go to `args.out`, those of stage i to its folder `stage_i`.

    Raises `UserError` for runs that do not fit together, before anything is drawn.
    """
    asked = [requested(Namespace(**vars(args) | {"workdir": run})) for run in args.cascade]
    stages = Cascade(tuple(load(request.model) for request in asked)).stages
    if stages[0].low_res and not args.low_res:
        raise UserError(f"{stages[0].name} enlarges pictures: begin with a run that draws small ones, or give --low-res")
    folders = [Path(args.out) / f"stage_{i}" for i in range(1, len(stages))] + [Path(args.out)]
    before = asked[0].low_res
    for i, (request, stage, folder) in enumerate(zip(asked, stages, folders)):
        request = dataclasses.replace(request, seed=request.seed + i, low_res=before)
        request = request if i == 0 or request.mask else dataclasses.replace(request, image=None, strength=None)
        generate(told(request, stage.low_res > 0, stage.text is not None), folder, preview=args.preview, overwrite=args.overwrite)
        before = str(folder.resolve())


def told(request: Request, enlarges: bool, reads: bool) -> Request:
    """The request without what this stage cannot be told: a level, a low-res picture, or what acts through a text."""
    if not enlarges:
        request = dataclasses.replace(request, low_res=None, level=None)
    return request if reads else dataclasses.replace(request, negative_prompt=None, guidance=None, two_passes=False)
