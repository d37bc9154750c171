"""One page that shows what happened when a model drew a picture, for a person who has never heard of diffusion.

    write(request, out)   `out/index.html`, which needs nothing beside it, its pictures as PNG, its numbers as JSON

The modules, from what is shown to how:

    subject      what the page is about: a model, a request, the data it was trained on
    walk         from noise to the picture, step by step, with the numbers of the move
    words        what each word did: attention, and the picture without it
    attention    where a network looks, read off it
    guidance     what the text adds at each step, and what more of it would do
    frequencies  large shapes first: when each octave of frequencies was settled
    nearest      where the picture comes from: the nearest training pictures, and a verdict
    features     what the network itself sees in a picture
    closed_form  the network beside the machine without one, from the same noise
    cost         evaluations, operations, bytes and seconds
    training     the run's losses, whether it learned and listens, its data
    section      what a page is made of
    chart        line charts as SVG
    formula      formulas as HTML
    pictures     arrays as pictures
    page         all of it as one HTML file
"""

import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from diffjax.diffusion.denoise import Denoiser
from diffjax.explain import closed_form, cost, frequencies, guidance, nearest, page, subject, training, walk, words
from diffjax.explain.section import Section, Shown
from diffjax.explain.subject import PATIENCE, Subject
from diffjax.explain.walk import Step
from diffjax.loading import run_folder
from diffjax.models.model import Inputs, Recipe
from diffjax.models.options import Request, given
from diffjax.sampling.job import configured, preset
from diffjax.utils import files, image
from diffjax.utils.errors import UserError
from diffjax.utils.progress import track

LEAD = (
    "This picture was made out of noise by a network that has learned what pictures look like. The page shows, step by "
    "step and with the very numbers, how that happened; under every figure stand its formula and the file of diffjax "
    "in which it is computed."
)

FORMULA = (
    "Here there is none: where the page says network, read the formula of diffjax/diffusion/local.py, which looks up "
    "training pictures."
)


def write(request: Request, out: str | Path, patience: float = PATIENCE) -> Path:
    """Draw what is asked for once more and write the page about it; its path.

    Figures that would take longer than `patience` seconds are put off, in words. Raises `UserError` for what cannot be
    drawn, for a request of several pictures, where jinja2 is not installed, and for a file in the place of the folder.
    """
    page.check_installed()
    out = files.local(out)
    if out.is_file():
        raise UserError(f"{out} is a file: give --out a folder")
    about = dataclasses.replace(subject.find(preset(request)), patience=patience)
    recipe = about.recipe()
    inputs = about.inputs(recipe)
    steps = walk.run(recipe, inputs)
    picture = walk.look(about, steps[-1].after)
    result = Shown("result", picture, "", f"the picture that was drawn: {about.called or 'of nothing in particular'}")
    lead = LEAD if isinstance(about.model.denoiser, Denoiser) else f"{LEAD} {FORMULA}"
    return page.write(out, title(about), lead, footer(about), result, sections(about, recipe, inputs, steps))


def requested(args: Namespace) -> Request:
    """The request of the command line's arguments: one picture.

    They win over what a config says. Raises `UserError` for numbers that cannot be, and for a run that is not there.
    """
    if args.config:
        return dataclasses.replace(configured(args.config, given(Request, args)), num=1)
    asked = given(Request, args)
    asked["model"] = run_folder(args.workdir) if args.workdir else args.model
    return Request(**asked)


def sections(about: Subject, recipe: Recipe, inputs: Inputs, steps: Sequence[Step]) -> list[Section]:
    """All sections, in the order in which the page is read."""
    picture, known = walk.look(about, steps[-1].after), nearest.target(about)
    target = None if known is None else image.from_uint8(known)[None]
    bill = cost.section(about, recipe, inputs)
    each = bill.numbers["seconds"] / bill.numbers["evaluations"]
    makers = (
        lambda: walk.section(about, recipe, inputs, steps),
        lambda: words.section(about, recipe, inputs, steps),
        lambda: guidance.section(about, steps, target, each),
        lambda: frequencies.section(about, recipe, frequencies.finer(about, recipe, inputs, steps)),
        lambda: nearest.section(about, picture, each),
        lambda: closed_form.section(about, steps[-1].after),
        lambda: bill,
        lambda: training.section(about),
    )
    return [make() for make in track(makers, "explaining", len(makers))]


def name(about: Subject) -> str:
    """The model's name: a folder's, without where it lies, or a hub id."""
    path = Path(about.model.name)
    return path.name if path.exists() else about.model.name


def title(about: Subject) -> str:
    """What was drawn, and by what."""
    called = f"class {about.called}" if (about.called or "").isdecimal() else about.called
    quoted = f"\N{LEFT DOUBLE QUOTATION MARK}{called}\N{RIGHT DOUBLE QUOTATION MARK}"
    return f"How {name(about)} drew {quoted if called else 'a picture'}"


def footer(about: Subject) -> str:
    """How the picture was drawn."""
    request = about.request
    how = f"{request.sampler}, {request.steps} steps, guidance {request.guidance or 1:g}, seed {request.seed}"
    checkpoint = f", checkpoint {about.model.revision}" if about.model.revision else ""
    return f"Written by diffjax explain: {name(about)}{checkpoint}; {how}."
