"""What a job will cost, said before it runs: parameters, bytes, memory, floating-point operations and time.

A job is a list of parts: programs, and how often each is called. They are traced on shapes: of a model's files only the
configurations are read, and nothing is computed.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from diffjax import config as configs
from diffjax.loading import is_run
from diffjax.models.options import Asked
from diffjax.plan import latent
from diffjax.plan.compiled import Compiled, compile_part
from diffjax.plan.cost import Part, compiled_bytes, estimate, tree_bytes, tree_size
from diffjax.plan.memory import live_bytes
from diffjax.plan.programs import Job, experiment, published, run
from diffjax.plan.report import duration, peak, table
from diffjax.plan.target import Target
from diffjax.train import finetune
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import hub

__all__ = [
    "Asked",
    "Compiled",
    "Job",
    "Part",
    "Target",
    "compile_part",
    "compiled_bytes",
    "config",
    "duration",
    "estimate",
    "experiment",
    "live_bytes",
    "model",
    "of_run",
    "peak",
    "published",
    "run",
    "table",
    "tree_bytes",
    "tree_size",
]


def model(
    name: str, asked: Asked, revision: str | None = None, variant: str | None = None, shard: str | None = None
) -> list[Job]:
    """The job of drawing with a published model: a folder, or a hub id, of which only JSON files are fetched.

    The configurations of well-known models come with the package, and need no network. Raises `UserError` as
    `diffjax.load` does.
    """
    if is_run(Path(name)):
        return of_run(name, asked, shard)
    folder = hub.configs(name, revision, variant=variant)
    if folder.is_file():
        return [latent.of_file(folder, asked, shard)]
    if (folder / "transformer").is_dir():
        return [latent.drawing(folder, asked, name, shard)]
    if shard:
        raise UserError(f"{name} fits one device: only Stable Diffusion 3 is split; leave --shard out")
    return [published(folder, asked, name)]


def of_run(folder: str, asked: Asked, shard: str | None = None) -> list[Job]:
    """The jobs of training a run, from its first step, and of drawing with it, or what it trains on from.

    Raises `UserError` when there is none.
    """
    workdir = Path(folder)
    if not finetune.is_one(workdir):
        return run(folder, asked, shard)
    return latent.finetuning(configs.read(workdir), asked, shard, files.read_json(workdir / finetune.BASE)["commit"])


def config(settings: ConfigDict, asked: Asked, shard: str | None = None) -> list[Job]:
    """The jobs of an experiment: training and drawing, or drawing alone where it only samples; what is asked
    for wins.
    """
    if settings.get("closed_form"):
        raise UserError("a closed form has no network to plan for: `diffjax sample --config` draws with it in seconds")
    if "train" in settings and "model" in settings:
        return latent.finetuning(settings, asked, shard)
    if "train" in settings:
        return experiment(settings, asked, shard)
    own = [field.name for field in dataclasses.fields(Asked) if getattr(asked, field.name) == field.default]
    asked = dataclasses.replace(asked, **{name: settings[name] for name in own if name in settings})
    return model(settings.model, asked, settings.get("revision"), settings.get("variant"), shard)
