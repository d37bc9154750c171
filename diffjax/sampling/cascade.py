"""Drawing with a cascade of runs: each stage is a sampling job of its own, which enlarges the pictures of the
one before.
"""

import dataclasses
from argparse import Namespace
from pathlib import Path

from diffjax.models.cascade import Cascade
from diffjax.sampling.job import Request, generate, requested
from diffjax.text import frozen
from diffjax.train import experiment
from diffjax.utils.errors import UserError


def draw(args: Namespace) -> None:
    """Draw as `diffjax sample --cascade` was told: the pictures go to `args.out`, those of stage i to its folder
    `stage_i`.

    Raises `UserError` for runs that do not fit together, before anything is drawn.
    """
    asked = [requested(Namespace(**vars(args) | {"workdir": run})) for run in args.cascade]
    stages = Cascade(tuple(outline(request) for request in asked)).stages
    if stages[0].low_res and not args.low_res:
        raise UserError(
            f"{stages[0].name} enlarges pictures: begin with a run that draws small ones, or give --low-res"
        )
    if asked[0].prompts and not any(stage.text for stage in stages):
        raise UserError("no run of this cascade was trained with text: leave the prompt out")
    folders = [Path(args.out) / f"stage_{i}" for i in range(1, len(stages))] + [Path(args.out)]
    before = asked[0].low_res
    for i, (request, stage, folder) in enumerate(zip(asked, stages, folders)):
        request = dataclasses.replace(request, seed=request.seed + i, low_res=before)
        request = request if i == 0 or request.mask else dataclasses.replace(request, image=None, strength=None)
        request = request if i + 1 == len(stages) else dataclasses.replace(request, feather=None)
        generate(told(request, stage), folder, preview=args.preview, overwrite=args.overwrite)
        before = str(folder.resolve())


@dataclasses.dataclass(frozen=True)
class Outline:
    """What of a stage says whether it fits the others; its parameters are read when it draws, and only then
    in memory.
    """

    name: str
    shape: tuple[int, int, int]
    low_res: int
    text: bool | None
    classes: tuple[str, ...]


def outline(request: Request) -> Outline:
    """A run as a stage. Raises `UserError` where it has no checkpoint, or another text encoder than it was
    trained with.
    """
    folder = Path(request.model)
    plan = experiment.recalled(folder)
    steps = [path.name for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    if not steps or request.revision not in ("", *steps):
        raise UserError(f"{folder} holds no checkpoint {request.revision or 'yet'}: let the training reach it")
    if frozen.is_frozen(plan.config.text):
        experiment.encoder_folder(plan.config.text, folder)
    return Outline(
        str(folder), plan.shape, plan.low_res.size if plan.low_res else 0, bool(plan.config.text) or None, plan.classes
    )


def told(request: Request, stage: Outline) -> Request:
    """The request without what this stage cannot be told: a level, a low-res picture, or what acts through a text
    or class.
    """
    if not stage.low_res:
        request = dataclasses.replace(request, low_res=None, level=None)
    if not stage.text:
        request = dataclasses.replace(request, negative_prompt=None)
    return (
        request
        if stage.text or stage.classes
        else dataclasses.replace(request, guidance=None, guide=None, two_passes=False)
    )
