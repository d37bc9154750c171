"""A job in words: the table of its parts, its peak memory and its time."""

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffjax.plan import rates
from diffjax.plan.compiled import Compiled, compile_part
from diffjax.plan.cost import Estimate, Part, compiled_bytes, estimate
from diffjax.plan.programs import Job, Way
from diffjax.plan.target import Target
from diffjax.utils.progress import counted

WIDTH = 60
"""Letters in a line."""

COPIED = 0.1
"""The share of what a program holds from which copies of weights are worth a line."""

FEW = 20
"""The number of steps that a sampling job of more is compared with."""


@dataclass(frozen=True)
class Figures:
    """A part's estimate on one of a target's devices, how many of these share its calls, how many of them
    each single one, and what the compiler says of it.
    """

    estimate: Estimate
    devices: int
    together: int = 1
    compiled: Compiled | None = None

    def seconds(self, speed: rates.Rates) -> float:
        """The time of all calls."""
        return speed.seconds(self.estimate.cost.times(self.estimate.calls)) / self.devices


def measured(job: Job, part: Part, target: Target, exact: bool) -> Figures:
    """A part's figures, from shapes alone, or, `exact`, with the memory that the compiler for the target allocates;
    for devices that are not here, whose compilers take minutes, stderr says how long each part took.
    """
    found, devices = estimate(part, target.platform), target.devices() if exact else None
    together = target.count if part.over else 1
    share = max(together, min(target.count, job.batches))
    if exact and devices is None:
        return Figures(replace(found, temporary=compiled_bytes(part)), share, together)
    if devices is None:
        held = found.held // (target.count if part.splits else 1)
        temporary = found.temporary // (target.count if part.replaces else 1)
        return Figures(replace(found, held=held, temporary=temporary), share, together)
    begin = time.monotonic()
    print(f"compiling {part.name} for {target.name}: ", end="", file=sys.stderr, flush=True)
    compiled = compile_part(part, devices)
    print(duration(time.monotonic() - begin), file=sys.stderr)
    return Figures(replace(found, held=compiled.held, temporary=compiled.temporary), share, together, compiled)


def table(job: Job, target: Target, exact: bool = False) -> str:
    """The table of a job, what it needs of memory, and its sum, in lines of at most `WIDTH` letters.

    Operations and time are those of all calls; bytes are those of one device. Raises `UserError` where `exact` is asked
    of a target for which nothing compiles here.
    """
    _, speed = rates.of_device(target.kind)
    parts = {id(part): part for part in job.parts}
    parts |= {
        id(part): part for way in job.ways for stage in way.stages for part in stage if not exact or target.is_here
    }
    figures = {key: measured(job, part, target, exact) for key, part in parts.items()}
    own = [figures[id(part)] for part in job.parts]
    rows = [("part", "params", "bytes", "calls", "FLOPs", "time")]
    rows += [_row(figure, speed) for figure in own]
    room = rates.memory(target.kind)
    how = "as compiled" if exact else "estimated; --compile measures it"
    memory = _ways(job, figures, room, how) if job.ways else [_peak(own, room, how)]
    details = [line for figure in own if figure.compiled for line in _details(figure, speed)]
    title, note = (textwrap.wrap(text, WIDTH, break_long_words=False) for text in (job.title, job.note))
    head = [*title, "", *_aligned(rows), *note, ""]
    return "\n".join([*head, *details, *memory, summary(job, own, target.name, speed)])


def _details(figure: Figures, speed: rates.Rates) -> list[str]:
    """What the compiler says of a part, and which limit its call meets first."""
    compiled, estimate = figure.compiled, figure.estimate
    assert compiled is not None
    hosted = f", {si(compiled.hosted)}B in its host" if compiled.hosted else ""
    lines = [f"{estimate.name}: {si(compiled.held)}B held, {si(compiled.temporary)}B beside{hosted}"]
    moved = ", ".join(f"{name} {si(size)}B" for name, size in compiled.collectives.most_common())
    if moved:
        lines += textwrap.wrap(f"a call receives {moved}: {si(compiled.overlapped)}B while it computes", WIDTH - 2)
    if compiled.copied > COPIED * compiled.held:
        lines.append(f"its loops copy {si(compiled.copied)}B of stacked weights")
    lines += [f"{shape} {si(size)}B{_place(place)}"[: WIDTH - 2] for shape, size, place in compiled.largest]
    share = figure.together
    copying = 2 * compiled.copied / speed.bandwidth
    moving = speed.moving(estimate.cost) / share + copying
    bounds = {"compute": speed.computing(estimate.cost) / share, "memory": moving}
    if compiled.collectives and speed.network:
        bounds["network"] = sum(compiled.collectives.values()) / speed.network
    said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in bounds.items())
    lines += textwrap.wrap(f"a call: {said}; bound by {max(bounds, key=bounds.__getitem__)}", WIDTH - 2)
    return [lines[0], *(f"  {line}" for line in lines[1:]), ""]


def _place(path: str) -> str:
    """The last two names of a place in the source, such as ` to_q/dot_general`."""
    names = [name for name in path.replace("]", "").split("/") if not name.startswith(("cond", "branch", "closed"))]
    return " " + "/".join(names[-2:])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _peak(figures: Sequence[Figures], room: float | None, how: str) -> str:
    memory = sum(figure.estimate.held for figure in figures) + max(figure.estimate.temporary for figure in figures)
    of = "" if room is None else f" of {si(room)}B"
    return f"peak memory: {si(memory)}B{of}\n({how})" + _too_much(memory, room)


def _too_much(memory: float, room: float | None) -> str:
    if room is None or memory < room:
        return ""
    return f"\ndoes not fit: needs {memory / 2**30:.1f} of {room / 2**30:.2f} GiB"


def _ways(job: Job, figures: Mapping[int, Figures], room: float | None, how: str) -> list[str]:
    """The peak memory of every way on each device, and the first way that fits."""
    known = {key: figure.estimate for key, figure in figures.items()}
    ways = [way for way in job.ways if all(id(part) in known for stage in way.stages for part in stage)]
    compiled = any(figure.compiled for figure in figures.values())
    peaks = {way.name: peak(way, known, job.loop) for way in ways if way.devices == 1 or not compiled}
    fits = lambda memory: "" if room is None else "fits" if memory < room else "too much"
    width = max(map(len, peaks))
    lines = ["peak memory of a device", f"({how}):"]
    lines += [f"  {name:{width}}  {si(memory):>8}B  {fits(memory)}".rstrip() for name, memory in peaks.items()]
    if room is None:
        return [*lines, ""]
    least = min(peaks.values())
    first = next((name for name, memory in peaks.items() if memory < room), "")
    if not first:
        return [*lines, _too_much(least, room).strip() + ": draw fewer or smaller pictures", ""]
    return [*lines, *textwrap.wrap(f"what fits {si(room)}B: {first}", WIDTH), ""]


def peak(way: Way, figures: Mapping[int, Estimate], loop: str) -> float:
    """The most bytes at once on one device, from the figures of all parts by their `id`."""

    def bytes_of(stage: tuple[Part, ...]) -> float:
        known = [figures[id(part)] for part in stage]
        held = sum(figure.held / (way.devices if figure.name == loop else 1) for figure in known)
        return held + max(figure.temporary for figure in known)

    return max(map(bytes_of, way.stages))


def _row(figure: Figures, speed: rates.Rates) -> tuple[str, ...]:
    found = figure.estimate
    return (
        found.name,
        si(found.parameters).strip(),
        f"{si(found.held)}B",
        f"{found.calls:g}",
        si(found.cost.times(found.calls).flops).strip(),
        duration(figure.seconds(speed)),
    )


def summary(job: Job, figures: Sequence[Figures], name: str, speed: rates.Rates) -> str:
    """Such as `1000 steps: 31 min on this CPU; 20 steps: 38 s`."""
    seconds = {figure.estimate.name: figure.seconds(speed) for figure in figures}
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
