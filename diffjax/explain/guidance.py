"""What guidance did: the difference that the text or class makes at each step, and what more of it would do.

Classifier-free guidance draws with `u + w (c - u)`, c the estimate with the text or class and u the one without
(`diffusion/guide.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffjax import build
from diffjax.explain import pictures
from diffjax.explain.attention import ask
from diffjax.explain.chart import Chart, Line
from diffjax.explain.section import Figure, Section, Shown, Strip, Text
from diffjax.explain.subject import Subject
from diffjax.explain.walk import Step, draw, look

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
USUAL = 3.0
"""A scale at which a run that draws without guidance is asked for both branches."""

MOMENTS = 6
"""Steps at which the difference is shown at most."""

MANY = 25
"""The number of steps beside the request's own."""


def section(
    subject: Subject, steps: Sequence[Step], target: Float[np.ndarray, "1 h w c"] | None, each: float
) -> Section:
    """Size and place of `w (c - u)` at each step, and what other scales lead to.

    `target` is the training picture of the prompt, where there is one; `each` the seconds of an evaluation.
    """
    name, title = "guidance", "What guidance did"
    if not subject.is_conditional:
        return Section(
            name,
            title,
            left_out="This model was not trained with and without a text or class, so there is nothing to guide by.",
        )
    if "weak" in subject.recipe().reads:
        return Section(
            name, title, left_out="This picture was led away from a weaker network, not from no text or class."
        )
    own = build.scale(subject.request.guidance) or 1.0
    numbers: dict[str, Any] = {"scale": own}
    figures = [_difference(subject, steps, own, numbers)]
    seconds = each * (steps[-1].index + 1 + MANY) * 2 * len(SCALES)
    if not (put_off := subject.put_off("More and less of it", seconds)):
        figures.append(_scales(subject, steps[-1].index + 1, target, numbers))
    return Section(name, title, tuple(figures), numbers, put_off)


def pairs(subject: Subject, steps: Sequence[Step]) -> list[Float[np.ndarray, "2 b ..."]]:
    """x0 with and without the text or class at every step: as guidance had them, or else the latter asked for now."""
    if steps[0].seen.est.branches:
        return [np.stack([branch.x0 for branch in step.seen.est.branches[:2]]) for step in steps]
    null = subject.inputs(subject.recipe(guidance=USUAL, guide="cfg")).cond["null"]
    return [np.stack([step.seen.est.x0, ask(subject.model.denoiser, step, null)[0]]) for step in steps]


def _difference(subject: Subject, steps: Sequence[Step], own: float, numbers: dict[str, Any]) -> Figure:
    """Maps and sizes of w (c - u)."""
    cause, found = subject.cause, [own * (c - u)[0] for c, u in pairs(subject, steps)]
    size = np.array([np.sqrt(np.mean(of**2)) for of in found])
    at = np.array([step.t for step in steps])
    numbers["difference"] = {"t": at.tolist(), "rms": size.tolist()}
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MOMENTS, len(steps))).round().astype(int))
    maps = [np.abs(found[k]).mean(axis=-1) for k in chosen]
    most, shape = max(map(np.max, maps)), look(subject, steps[-1].after).shape[:2]
    shown = tuple(
        Shown(
            f"guidance-{steps[k].index + 1:04d}",
            pictures.heat(of, shape, most),
            f"step {steps[k].index + 1}",
            f"where the {cause} makes a difference at step {steps[k].index + 1}",
        )
        for k, of in zip(chosen, maps)
    )
    says = f"How much the {cause} changes the guessed picture, at each time of the walk."
    chart = Chart(
        says, "time t", "w (c - u), rms", (Line(f"how much the {cause} changes the guess", at, size, 0),), falling=True
    )
    plain = (
        f"At every step the network can be asked twice, with the {cause} and without; the difference is what that "
        "wants changed there and then, and guidance adds it w times. Bright is where that is much."
    )
    said = f"This picture was drawn with w = {own:g}" + (f": with the {cause}, and nothing added." if own == 1 else ".")
    blocks = (Strip(shown, len(shown), len(shown) if len(shown) < 5 else 3), chart, Text(said))
    return Figure(f"What the {cause} adds", plain, "x0 = u + w (c - u)", "diffjax/diffusion/guide.py", blocks)


def _scales(
    subject: Subject, usual: int, target: Float[np.ndarray, "1 h w c"] | None, numbers: dict[str, Any]
) -> Figure:
    """Pictures of other scales, and their distance to the training picture, or to that without guidance."""
    drawn = {
        steps: [draw(subject, subject.recipe(guidance=scale, steps=steps)) for scale in SCALES]
        for steps in sorted({usual, MANY})
    }
    known = target is not None
    error = {
        steps: [float(np.sqrt(np.mean((x - (target if known else of[0])) ** 2))) for x in of]
        for steps, of in drawn.items()
    }
    numbers["scales"] = {"w": SCALES, "error": error, "against": "training picture" if known else "w = 1"}
    lines = [Line(f"{steps} steps", np.array(SCALES), np.array(of), i) for i, (steps, of) in enumerate(error.items())]
    shown = tuple(
        Shown(f"guidance-scale-{scale:g}", look(subject, x), f"w = {scale:g}", f"the picture drawn with w = {scale:g}")
        for scale, x in zip(SCALES, drawn[usual])
    )
    to = f"the training picture of this {subject.cause}" if known else "the picture without guidance"
    says = f"The distance to {to} against the scale of guidance."
    chart = Chart(says, "scale w", "distance (rms)", tuple(lines))
    best = SCALES[int(np.argmin(error[usual]))]
    answer = f"Nearest to the training picture is w = {best:g} here; more than that hurts."
    plain = (
        f"Too little guidance and the {subject.cause} counts for little; too much and colours burn. This is the same "
        f"noise with more and more of it, and how far each is from {to}."
    )
    blocks = (
        Strip(shown, len(SCALES), 3),
        chart,
        *([Text(answer, strong=True)] if known and best < SCALES[-1] else []),
    )
    exact = "x0 = u + w (c - u); distance: sqrt(mean (x - x_known)^2)"
    return Figure("More and less of it", plain, exact, "diffjax/diffusion/guide.py", blocks)
