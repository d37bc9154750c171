"""What a picture cost: evaluations, operations, bytes and seconds, and what fewer or more of them would have given."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffjax import plan
from diffjax.explain.chart import Chart, Line
from diffjax.explain.section import Block, Figure, Section, Table, Text
from diffjax.explain.subject import Subject, advance
from diffjax.explain.walk import draw, witnessed
from diffjax.models.model import Inputs, Recipe
from diffjax.plan import rates
from diffjax.plan.cost import Estimate, estimate
from diffjax.plan.programs import drawing, evaluations
from diffjax.plan.report import duration, si
from diffjax.train.experiment import Experiment
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

COUNTS, FINE = (1, 2, 4, 8, 16, 32), 64
"""Numbers of steps that are compared with a fine solution."""


@dataclass(frozen=True)
class Measured:
    """Seconds of drawing one picture once compiled, and how often the network was called."""

    seconds: float
    calls: int

    @property
    def each(self) -> float:
        """Seconds of a call."""
        return self.seconds / self.calls


def measure(subject: Subject, recipe: Recipe, inputs: Inputs) -> Measured:
    """The time of the run, drawn again."""
    recipe = witnessed(recipe, inputs)
    run = lambda: advance(recipe, inputs, recipe.begin(inputs), recipe.grid)
    run()
    begin = time.perf_counter()
    run()
    return Measured(time.perf_counter() - begin, len(recipe.grid) * _evaluations(subject))


def _evaluations(subject: Subject) -> int:
    return evaluations(subject.model.defaults.but(plan.Asked(sampler=subject.request.sampler)))


def section(subject: Subject, recipe: Recipe, inputs: Inputs) -> Section:
    """The table of parts, and the error against the number of evaluations."""
    measured = measure(subject, recipe, inputs)
    figures = _planned(subject)
    device, speed = rates.of_device()
    rows = 2 if recipe.reads else 1
    numbers = {"evaluations": measured.calls, "branches": rows, "seconds": measured.seconds, "device": device}
    numbers["parts"] = [
        {"part": of.name, "parameters": of.parameters, "bytes": of.held, "calls": of.calls, "flops": of.cost.flops}
        for of in figures
    ]
    shown = [_parts(figures, measured, device, speed, numbers)]
    seconds = measured.each * (sum(COUNTS) + FINE) * _evaluations(subject)
    if not (put_off := subject.put_off("What more steps would give", seconds)):
        shown.append(_errors(subject, numbers))
    return Section("cost", "What it cost", tuple(shown), numbers, put_off)


def _planned(subject: Subject) -> list[Estimate]:
    """The parts of the job of one picture; none of a model that cannot be planned."""
    request, size = subject.request, subject.request.size
    if isinstance(size, tuple):
        return []
    names = ("steps", "guidance", "guide", "sampler", "dtype")
    asked = plan.Asked(**{name: getattr(request, name) for name in names}, size=size, num=1, batch=1)
    try:
        if subject.folder:
            job = drawing(Experiment.recall(subject.folder), asked, str(subject.folder))
        else:
            job = plan.model(subject.model.name, asked)[-1]
        return [estimate(part) for part in job.parts]
    except UserError:
        return []


def _parts(figures: Sequence[Estimate], measured: Measured, device: str, speed: rates.Rates, numbers: dict) -> Figure:
    rows = tuple(
        (
            of.name,
            si(of.parameters).strip(),
            f"{si(of.held)}B",
            f"{of.calls:g}",
            si(of.cost.times(of.calls).flops).strip(),
        )
        for of in figures
    )
    blocks: list[Block] = [Table(("part", "parameters", "memory", "calls", "FLOPs"), rows)] if rows else []
    said = f"{counted(measured.calls, 'evaluation')} of the network in {duration(measured.seconds)}"
    network = next((of for of in figures if of.name in ("network", "transformer")), None)
    if network is not None:
        numbers["share_of_peak"] = share = speed.computing(network.cost) / measured.each
        said += f", at {share:.0%} of what {device} can do"
    plain = (
        "Almost all of the work is the network's, which is called once at every step: that is how a picture comes to "
        "take the time that it takes."
    )
    exact = "2 FLOPs for every multiply-add of a product; share = FLOPs / (seconds · FLOPs a second of a large product)"
    return Figure("The bill", plain, exact, "diffjax/plan/cost.py", (Text(f"{said}.", strong=True), *blocks))


def _errors(subject: Subject, numbers: dict) -> Figure:
    """The distance to a fine solution of the same noise, by steps; of a sampler with fresh noise, of DDIM."""
    is_plain = not subject.request.eta
    how = {"sampler": subject.request.sampler if is_plain else "ddim", "eta": 0.0}
    fine = _drawn(subject, FINE, how)
    found = {steps: x for steps in COUNTS if (x := _drawn(subject, steps, how)) is not None} if fine is not None else {}
    error = np.array([np.sqrt(np.mean((x - fine) ** 2)) for x in found.values()])
    each = evaluations(subject.model.defaults.but(plan.Asked(sampler=how["sampler"])))
    numbers["error"] = {"sampler": how["sampler"], "fine": FINE, "steps": list(found), "rms": error.tolist()}
    calls = each * np.array(list(found), float)
    line = Line(f"{how['sampler']}, against {FINE} steps of it", calls, error, 0)
    says = f"The distance to the picture of {FINE} steps, against evaluations of the network: it falls as these grow."
    chart = Chart(says, "evaluations of the network", "distance (rms)", (line,), log_x=True, log_y=True)
    plain = (
        "Fewer steps are faster and less exact: this is how far the picture is from the one that very many small steps "
        "lead to from the same noise (0.1 is hardly seen, 1 is another picture)."
    )
    exact = f"sqrt(mean (x - x_fine)^2), x in [-1, 1], from the same noise; x_fine has {FINE} steps"
    return Figure("What more steps would give", plain, exact, "diffjax/diffusion/refine.py", (chart,))


def _drawn(subject: Subject, steps: int, how: dict) -> np.ndarray | None:
    """The last state of so many steps; None where the model's grid has not so many."""
    try:
        return draw(subject, subject.recipe(**how, steps=steps))
    except UserError:
        return None
