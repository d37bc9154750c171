"""A job in words: the table of its parts, its peak memory and its time."""

import textwrap
from collections.abc import Mapping, Sequence

from diffjax.plan import rates
from diffjax.plan.cost import Estimate, Part, estimate
from diffjax.plan.programs import Job, Way
from diffjax.utils.progress import counted

WIDTH = 60
"""Letters in a line."""

FEW = 20
"""The number of steps that a sampling job of more is compared with."""


def report(job: Job, device: str | None, exact: bool = False) -> str:
    """The table of a job, what it needs of memory, and its sum, in lines of at most `WIDTH` letters.

    Operations and time are those of all calls.
    """
    name, speed = rates.of_device(device)
    figures = [estimate(part, exact) for part in job.parts]
    rows = [("part", "params", "bytes", "calls", "FLOPs", "time")]
    rows += [_row(figure, speed) for figure in figures]
    room = rates.memory(device)
    how = "as compiled" if exact else "estimated; --compile measures it"
    memory = _ways(job, room, exact, how) if job.ways else [_peak(figures, room, how)]
    title, note = (textwrap.wrap(text, WIDTH, break_long_words=False) for text in (job.title, job.note))
    return "\n".join([*title, "", *_aligned(rows), *note, "", *memory, summary(job, figures, name, speed)])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _peak(figures: Sequence[Estimate], room: float | None, how: str) -> str:
    memory = sum(figure.held for figure in figures) + max(figure.temporary for figure in figures)
    fits = "" if room is None else f" of {si(room)}B" + ("" if memory < room else ": too much")
    return f"peak memory: {si(memory)}B{fits}\n({how})"


def _ways(job: Job, room: float | None, exact: bool, how: str) -> list[str]:
    """The peak memory of every way on each device, and the first way that fits."""
    parts = {id(part): part for way in job.ways for stage in way.stages for part in stage}
    figures = {key: estimate(part, exact) for key, part in parts.items()}
    peaks = {way.name: peak(way, figures, job.loop) for way in job.ways}
    fits = lambda memory: "" if room is None else "fits" if memory < room else "too much"
    width = max(map(len, peaks))
    lines = ["peak memory of a device", f"({how}):"]
    lines += [f"  {name:{width}}  {si(memory):>8}B  {fits(memory)}".rstrip() for name, memory in peaks.items()]
    if room is None:
        return [*lines, ""]
    first = next(
        (name for name, memory in peaks.items() if memory < room), "nothing here: draw fewer or smaller pictures"
    )
    return [*lines, *textwrap.wrap(f"what fits {si(room)}B: {first}", WIDTH), ""]


def peak(way: Way, figures: Mapping[int, Estimate], loop: str) -> float:
    """The most bytes at once on one device, from the figures of all parts by their `id`."""

    def bytes_of(stage: tuple[Part, ...]) -> float:
        known = [figures[id(part)] for part in stage]
        held = sum(figure.held / (way.devices if figure.name == loop else 1) for figure in known)
        return held + max(figure.temporary for figure in known)

    return max(map(bytes_of, way.stages))


def _row(figure: Estimate, speed: rates.Rates) -> tuple[str, ...]:
    total = figure.cost.times(figure.calls)
    return (
        figure.name,
        si(figure.parameters).strip(),
        f"{si(figure.held)}B",
        f"{figure.calls:g}",
        si(total.flops).strip(),
        duration(speed.seconds(total)),
    )


def summary(job: Job, figures: Sequence[Estimate], name: str, speed: rates.Rates) -> str:
    """Such as `1000 steps: 31 min on this CPU; 20 steps: 38 s`."""
    seconds = {figure.name: speed.seconds(figure.cost.times(figure.calls)) for figure in figures}
    line = f"{counted(job.steps, 'step')}: {duration(sum(seconds.values()))} on {name}"
    if job.loop == "training":
        return f"{line}\n({si(job.images * job.steps / seconds['training']).strip()} images/s)"
    rest = sum(seconds.values()) - seconds[job.loop]
    fewer = f"; {FEW} steps: {duration(rest + seconds[job.loop] * FEW / job.steps)}" if job.steps > FEW else ""
    return line + fewer


def si(value: float) -> str:
    """Three digits with a prefix: 113.7e6 is `114 M`."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds in words: `0.4 s`, `38 s`, `31 min`, `2.1 h`, `3.5 days`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min" if seconds > 600 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
