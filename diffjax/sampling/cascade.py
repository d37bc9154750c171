"""Drawing with a cascade of runs: each stage is a sampling job of its own; super-resolution stages begin with the
pictures of the stage before.
"""

import dataclasses
from argparse import Namespace
from pathlib import Path

from diffjax.models.cascade import Cascade
from diffjax.sampling.job import Request, generate, requested
from diffjax.text import frozen
from diffjax.train import facts
from diffjax.train.experiment import Experiment
from diffjax.utils.errors import UserError


def draw(args: Namespace) -> None:
    """Draw as `diffjax sample --cascade` asks: the pictures go to `args.out`, those of stage i to its folder
    `stage_i`.

    Raises `UserError` for runs that do not fit together, before anything is drawn.
    """
    asked = [requested(Namespace(**vars(args) | {"workdir": run})) for run in args.cascade]
    stages = Cascade(tuple(outline(request) for request in asked)).stages
    if stages[0].low_res and not args.low_res:
        raise UserError(
            f"{stages[0].name} is a super-resolution stage: begin with a run that draws small pictures, "
            "or give --low-res"
        )
    if (asked[0].prompts or asked[0].each_prompt) and not any(stage.text for stage in stages):
        raise UserError("no run of this cascade was trained with text: leave the prompt out")
    folders = [Path(args.out) / f"stage_{i}" for i in range(1, len(stages))] + [Path(args.out)]
    before = asked[0].low_res
    for i, (request, stage, folder) in enumerate(zip(asked, stages, folders)):
        request = dataclasses.replace(request, seed=request.seed + i, low_res=before)
        request = request if i == 0 or request.mask else dataclasses.replace(request, image=None, strength=None)
        request = request if i + 1 == len(stages) else dataclasses.replace(request, feather=None, format="png")
        generate(suited(request, stage), folder, preview=args.preview, overwrite=args.overwrite)
        before = str(folder.resolve())


@dataclasses.dataclass(frozen=True)
class Outline:
    """What of a stage says whether it fits the others. Its parameters are in memory only while it draws."""

    name: str
    shape: tuple[int, int, int]
    low_res: int
    text: bool | None
    classes: tuple[str, ...]


def outline(request: Request) -> Outline:
    """A run as a stage. Raises `UserError` where it has no checkpoint, or not the text encoder of its training."""
    folder = Path(request.model)
    experiment = Experiment.recall(folder)
    steps = [path.name for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    if not steps or request.revision not in ("", *steps):
        raise UserError(f"{folder} holds no checkpoint {request.revision or 'yet'}: let the training reach it")
    text = experiment.config.text
    if frozen.is_frozen(text):
        facts.encoder_folder(text, folder)
    low_res = experiment.low_res.size if experiment.low_res else 0
    return Outline(str(folder), experiment.shape, low_res, bool(text) or None, experiment.classes)


def suited(request: Request, stage: Outline) -> Request:
    """The request without what this stage has no use for: a low-res picture and its noise augmentation level, or what
    acts through a text or class.
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
