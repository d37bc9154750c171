"""Where the numbers of a run go: a list of writers, each with `write(row)`, `picture(step, path)` and `close()`.

A row is `{"step": 100, "loss": 0.1, ..., "loss_by_logsnr": {"0": 0.2, ...}}`; a bin is named by the middle of its interval.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from diffjax import files
from diffjax.errors import UserError
from diffjax.train.step import BIN_EDGES

Row = dict[str, Any]


class Writer(Protocol):
    """One place for numbers and pictures."""

    def write(self, row: Row) -> None:
        """Take the numbers of a step."""

    def picture(self, step: int, path: Path) -> None:
        """Take a picture that was saved."""

    def close(self) -> None:
        """Finish."""


class JsonLines:
    """`metrics.jsonl`, one row a line; rows after `step`, and a half-written one, are removed when a run is resumed."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
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
    """Event files in `WORKDIR/tensorboard`."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Row) -> None:
        for name, value in flat(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def picture(self, step: int, path: Path) -> None:
        from PIL import Image

        self.writer.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases in the project `log.wandb`; the same run again when training is resumed."""

    def __init__(self, workdir: Path, config: ConfigDict):
        import wandb

        path = workdir / "wandb.json"
        name = json.loads(path.read_text()) if path.exists() else None
        self.run = wandb.init(
            project=config.log.wandb, id=name, resume="allow", dir=str(workdir), config=json.loads(config.to_json_best_effort())
        )
        files.write_json(path, self.run.id)

    def write(self, row: Row) -> None:
        self.run.log(flat(row), step=row["step"])

    def picture(self, step: int, path: Path) -> None:
        import wandb

        self.run.log({"samples": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def writers(workdir: Path, config: ConfigDict, step: int) -> list[Writer]:
    """The writers of a run that goes on from `step`. Raises `UserError` when wandb is asked for and not installed."""
    chosen: list[Writer] = [JsonLines(workdir / "metrics.jsonl", step)]
    if config.log.tensorboard:
        chosen.append(TensorBoard(workdir / "tensorboard", step))
    if config.log.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("log.wandb is set and wandb is not installed: pip install wandb, or leave log.wandb empty")
        chosen.append(Wandb(workdir, config))
    return chosen


def summary(rows: Sequence[Row]) -> Row:
    """The steps' metrics (numpy, as `make_step` returns them) as one row: means over the steps, losses over the examples."""
    mean = lambda name: float(np.mean([row[name] for row in rows], dtype=np.float64))
    total, count = (np.sum([row[name] for row in rows], axis=0, dtype=np.float64) for name in ("bin_sum", "bin_count"))
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
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
