"""Starting from another run's weights: what fits by name and shape is taken, and all that is not is named.

A row of a table belongs to a word, or to a class: rows are taken by what they stand for, whatever their number in
either run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from diffjax import build
from diffjax.text.learned import CaptionTokenizer
from diffjax.train import facts
from diffjax.train.checkpoint import Run, load_run
from diffjax.train.experiment import Experiment
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.utils.provenance import differences

FILE = "init.json"
SHOWN = 5
WORDS, CLASSES = ("text/words/embedding",), ("network/label_embedding", "network/class_embedding")


def start(params: PyTree, experiment: Experiment, choice: Mapping[str, Any], workdir: Path) -> PyTree:
    """`params` with those of the run `choice["run"]` where they fit: its newest checkpoint, or that of `step`.

    `weights` is `ema` or `raw`. Prints what is not taken, and writes all of it to `WORKDIR/init.json`.
    Raises `UserError` when there is no such run, or nothing of it fits.
    """
    averaged = build.named("init_from.weights", {"ema": True, "raw": False}, choice.get("weights", "ema"))
    run = load_run(choice["run"], choice.get("step") or None, averaged)
    new: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    old: dict[str, Any] = traverse_util.flatten_dict(run.params, sep="/")
    tables = _tables(experiment, run)
    merged, taken, left = {}, [], dict.fromkeys(old.keys() - new.keys(), "this run has none")
    for name, leaf in new.items():
        found, why = _taken(leaf, old.get(name), tables.get(name))
        merged[name] = leaf if found is None else np.asarray(found, leaf.dtype)
        if found is not None:
            taken.append(name)
        if why:
            left[name] = why
    if not taken:
        raise UserError(
            f"nothing of {run.workdir} fits this network: start from a run of the same one, or leave init_from out"
        )
    source = {"run": str(run.workdir), "step": run.step, "weights": choice.get("weights", "ema")}
    configs = _meanings(run.config.to_dict(), experiment.config.to_dict())
    files.write_json(workdir / FILE, source | {"taken": sorted(taken), "not_taken": left, "other_meaning": configs})
    _say(run, taken, left, configs, workdir)
    return traverse_util.unflatten_dict(merged, sep="/")


def _taken(new: Any, old: Any, rows: tuple[Sequence[str], Sequence[str]] | None) -> tuple[Any, str]:
    """What is taken for an array (None: nothing), and what is to be said of it."""
    if old is None:
        return None, "that run has none"
    if rows is not None and rows[0] != rows[1] and new.shape[1:] == old.shape[1:]:
        return _by_row(np.asarray(new), old, *rows)
    if new.shape != old.shape:
        return None, f"its shape is {tuple(old.shape)} there and {tuple(new.shape)} here"
    return old, ""


def _by_row(new: np.ndarray, old: np.ndarray, here: Sequence[str], there: Sequence[str]) -> tuple[np.ndarray, str]:
    """The rows of `new` that stand for the same as one of `old`'s; rows past both lists (that of no class) are the
    last ones.
    """
    places = {name: place for place, name in enumerate(there)}
    both = [(place, places[name]) for place, name in enumerate(here) if name in places]
    if len(new) > len(here) and len(old) > len(there):
        both.append((len(here), len(there)))
    merged = new.copy()
    merged[[place for place, _ in both]] = old[[place for _, place in both]]
    unknown = [name for name in here if name not in places]
    shown = ", ".join(map(repr, unknown[:SHOWN])) + (", ..." if len(unknown) > SHOWN else "")
    return merged, f"{len(unknown)} of its {len(new)} rows are new: {shown}" if unknown else ""


def _tables(experiment: Experiment, run: Run) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """What the rows of the tables of words and of classes stand for, here and there."""
    tables = {}
    own = experiment.tokenize
    if isinstance(own, CaptionTokenizer) and (run.workdir / facts.TOKENIZER).is_file():
        tables |= dict.fromkeys(WORDS, (_vocabulary(own), _vocabulary(facts.tokenizer(run.workdir))))
    if experiment.classes and (run.workdir / facts.DATA).is_file():
        tables |= dict.fromkeys(CLASSES, (experiment.classes, facts.shape_and_classes(run.workdir)[1]))
    return tables


def _vocabulary(tokenizer: CaptionTokenizer) -> list[str]:
    known = tokenizer.rules.get_vocab()
    return sorted(known, key=known.__getitem__)


def _meanings(there: dict, here: dict) -> list[str]:
    """In what the same numbers mean something else: what is predicted, of which process."""

    def part(config: dict) -> dict:
        text = (config.get("text") or {}).get("name")
        return {name: config.get(name) for name in ("process", "prediction", "network")} | {"text.name": text}

    return differences(part(there), part(here))


def _say(run: Run, taken: list[str], left: dict[str, str], configs: list[str], workdir: Path) -> None:
    where = f"(all are named in {workdir / FILE})"
    print(f"starting from {run.workdir}, step {run.step}: {len(taken)} arrays are taken {where}")
    for name, why in list(left.items())[:SHOWN]:
        print(f"  {name}: {why}")
    if len(left) > SHOWN:
        print(f"  and {len(left) - SHOWN} more are not taken")
    for line in configs:
        print(f"  note that {line}")
