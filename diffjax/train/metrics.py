"""Where the numbers of a run go: a list of writers, each with `write(row)`, `picture(step, path)` and `close()`.

A row is `{"step": 100, "loss": 0.1, ..., "loss_by_logsnr": {"0": 0.2, ...}}`; a bin is named by the middle of its
interval.
"""

import contextlib
import functools
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffjax.parallel import devices
from diffjax.train.preview import Preview
from diffjax.train.sanity import Panel
from diffjax.train.step import BIN_EDGES
from diffjax.utils import files, image
from diffjax.utils.errors import UserError

Row = dict[str, Any]

COMPILING_SECONDS = 60.0

WARNING_STEPS = 1000
"""Steps after which a network is judged, whatever it has learned."""


class Writer(Protocol):
    """One place for numbers and pictures."""

    def write(self, row: Row) -> None:
        """Take the numbers of a step."""

    def picture(self, step: int, path: Path) -> None:
        """Take a picture that was saved."""

    def close(self) -> None:
        """Finish."""


class Terminal:
    """A live bar with the loss, images a second and the time left; a line for each row where there is no terminal."""

    def __init__(self, step: int, steps: int):
        from rich import progress
        from rich.console import Console

        self.steps, self.console = steps, Console(file=sys.stderr, quiet=jax.process_index() > 0)
        self.console.on_broken_pipe = lambda: None  # rich would end the process
        columns = [
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn(devices.describe()),
        ]
        self.bar = progress.Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", completed=step, total=steps, numbers="")
        self.bar.start()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A block that compiles: say so, and how long it has taken so far, until it is over."""
        over, begin = threading.Event(), time.perf_counter()
        every = 1 if self.console.is_terminal else COMPILING_SECONDS

        def tell() -> None:
            while not over.wait(every):
                seconds = time.perf_counter() - begin
                self.bar.update(self.task, numbers=f"compiling for {seconds:.0f} s")
                if not self.console.is_terminal:
                    self.say(f"still compiling after {seconds:.0f} s")

        self.say("compiling the training step")
        self.bar.update(self.task, numbers="compiling")
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()
        self.say(f"compiled in {time.perf_counter() - begin:.1f} s")

    def advance(self, step: int) -> None:
        """A step was started."""
        self.bar.update(self.task, completed=step)

    def say(self, text: str) -> None:
        """Print a line; where nobody can read it any more, training goes on without."""
        try:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            self.console.quiet = True

    def write(self, row: Row) -> None:
        numbers = f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s"
        self.bar.update(self.task, numbers=numbers)
        if not self.console.is_terminal:
            left = (self.steps - row["step"]) * row["seconds_per_step"]
            self.say(f"step {row['step']} of {self.steps}: {numbers}, {left:.0f} s left")

    def picture(self, step: int, path: Path) -> None:
        self.say(f"step {step}: {path}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.stop()


class JsonLines:
    """`metrics.jsonl`, one row a line; rows after `step`, and a half-written one, are removed when a run is resumed."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if _step(line) <= step]
            files.write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self.file = path.open("a")

    def write(self, row: Row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def picture(self, step: int, path: Path) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files in `WORKDIR/tensorboard`, opened when there is something to write."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    @functools.cached_property
    def writer(self) -> Any:
        """That of tensorboardX, which where torch is installed takes seconds to import."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=self.step + 1)

    def write(self, row: Row) -> None:
        for name, value in flat(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def picture(self, step: int, path: Path) -> None:
        self.writer.add_image(path.parent.name, image.read_png(path)[0], step, dataformats="HWC")

    def close(self) -> None:
        if "writer" in vars(self):
            self.writer.close()


class Wandb:
    """A run of Weights & Biases in the project `log.wandb`; the same run again when training is resumed."""

    def __init__(self, workdir: Path, config: ConfigDict):
        import wandb  # pyright: ignore[reportMissingImports]  no extra installs it

        path = workdir / "wandb.json"
        name = files.read_json(path) if path.exists() else None
        self.run = wandb.init(
            project=config.log.wandb,
            id=name,
            resume="allow",
            dir=str(workdir),
            config=json.loads(config.to_json_best_effort()),
        )
        files.write_json(path, self.run.id)

    def write(self, row: Row) -> None:
        self.run.log(flat(row), step=row["step"])

    def picture(self, step: int, path: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run.log({path.parent.name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Pending(NamedTuple):
    """A step whose numbers are still on the devices; `rows` are the record numbers of its batch."""

    step: int
    rows: np.ndarray
    values: dict[str, Any]


class Log:
    """The numbers of a run that goes on from `step`, read from the devices only when `flush` asks for them.

    `factor(step)` is the schedule of the learning rates.
    """

    def __init__(self, workdir: Path, config: ConfigDict, step: int, factor: Callable[[int], float]):
        self.config, self.factor, self.workdir = config, factor, workdir
        self.terminal = Terminal(step, config.train.steps)
        self.writers = [self.terminal, *writers(workdir, config, step)]
        self.pending: list[Pending] = []
        self.losses: list[float] = []
        self.since = time.perf_counter()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        for writer in self.writers:
            writer.close()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A block that compiles, which is said; the time it takes is no training's."""
        with self.terminal.compiling():
            yield
        self.since = time.perf_counter()

    def add(self, step: int, rows: np.ndarray, values: dict[str, Any]) -> None:
        """Take a step that was started."""
        self.pending.append(Pending(step, rows, values))
        self.terminal.advance(step)

    def flush(self) -> Pending | None:
        """Wait for the steps since the last time, write their summary, and return the first that is not finite, if
        one is.
        """
        if not self.pending:
            return None
        steps = [step._replace(values=jax.device_get(step.values)) for step in self.pending]
        seconds = (time.perf_counter() - self.since) / len(steps)
        self.pending, self.since = [], time.perf_counter()
        broken = next((step for step in steps if not step.values["finite"]), None)
        if broken is None:
            done = steps[-1].step
            row = {"step": done, **summary([step.values for step in steps])}
            row["learning_rate"] = self.config.optimizer.get("learning_rate", 1.0) * self.factor(done - 1)
            row |= {"images_per_second": self.config.train.batch / seconds, "seconds_per_step": seconds}
            self.losses += [float(step.values["loss"]) for step in steps]
            for writer in self.writers:
                writer.write(row)
        return broken

    def mean_loss(self) -> float:
        """The mean loss of the steps since the last time."""
        mean, self.losses = float(np.mean(self.losses)), []
        return mean

    def preview(self, step: int, shown: Preview) -> None:
        """Save a preview as one grid, `samples/STEP.png`."""
        self.picture(step, "samples", image.sheet(image.to_uint8(shown.images), shown.columns, shown.captions))

    def sanity(self, step: int, panel: Panel) -> None:
        """Save a panel, `sanity/STEP.png`, and say what it shows; it warns once something could have been learned."""
        self.picture(step, "sanity", panel.draw())
        for line in panel.lines(early=step < WARNING_STEPS and not panel.learned()):
            self.terminal.say(f"step {step}: {line}")

    def picture(self, step: int, kind: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Save a picture as `KIND/STEP.png`; the time it took is no training's."""
        path = self.workdir / kind / f"{step:07d}.png"
        image.write_png(path, picture)
        for writer in self.writers:
            writer.picture(step, path)
        self.since = time.perf_counter()


def writers(workdir: Path, config: ConfigDict, step: int) -> list[Writer]:
    """The files of a run that goes on from `step`; of several hosts, the first one writes them.

    Raises `UserError` as `check_installed` does.
    """
    check_installed(config)
    if jax.process_index():
        return []
    chosen: list[Writer] = [JsonLines(workdir / "metrics.jsonl", step)]
    if config.log.tensorboard:
        chosen.append(TensorBoard(workdir / "tensorboard", step))
    if config.log.wandb:
        chosen.append(Wandb(workdir, config))
    return chosen


def check_installed(config: ConfigDict) -> None:
    """Raises `UserError` when wandb is asked for and not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb is set and wandb is not installed: pip install wandb, or leave log.wandb empty")


def summary(rows: Sequence[Row]) -> Row:
    """The steps' metrics (numpy, as `make_step` returns them) as one row: means over the steps, losses over the
    examples.
    """
    mean = lambda name: float(np.mean([row[name] for row in rows], dtype=np.float64))
    total, count = (
        np.asarray([row[name] for row in rows], np.float64).sum(axis=0) for name in ("bin_sum", "bin_count")
    )
    middles = (BIN_EDGES[1:] + BIN_EDGES[:-1]) / 2
    by_logsnr = {f"{at:g}": float(s / n) for at, s, n in zip(middles, total, count) if n}
    return {"loss": mean("loss"), "grad_norm": mean("grad_norm"), "loss_by_logsnr": by_logsnr}


def flat(row: Row) -> dict[str, float]:
    """A row without its step, nested names joined by `/`."""
    named = {}
    for name, value in row.items():
        named |= {f"{name}/{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in named.items() if name != "step"}


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
