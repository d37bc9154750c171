"""How a run was trained: its loss at each log-SNR, whether it learned and listens, and what its data look like."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.data import Dataset
from diffjax.diffusion.predict import determinant
from diffjax.explain.chart import COLOURS, Chart, Line
from diffjax.explain.nearest import chosen
from diffjax.explain.section import Block, Figure, Section, Shown, Strip, Text
from diffjax.explain.subject import Subject
from diffjax.train import finetune, sanity
from diffjax.train.checkpoint import load_run
from diffjax.train.experiment import Experiment
from diffjax.train.sanity import LEVELS, Panel
from diffjax.utils.progress import counted

SHEET = 24
HASHED = 4096
"""Pictures that are looked through for twins, at most."""


def section(subject: Subject) -> Section:
    """The curves of the run's own record, the sanity panel of its parameters, and a sheet of its data."""
    name, title = "training", "How it was trained"
    if subject.request.closed_form is not None:
        return Section(name, title, left_out="There was no training.")
    if subject.folder is None:
        return Section(name, title, left_out="This model was published; its training left no record here.")
    numbers: dict[str, Any] = {}
    seen, figures = _panel(subject, subject.folder), []
    if seen is not None:
        figures = [_losses(subject.folder, *seen, numbers), _sanity(seen[1], numbers)]
    if subject.data is not None:
        figures.append(_data(subject.data, subject.captions, numbers))
    left_out = "" if figures else "Neither this run's data nor what it has seen of them are here."
    return Section(name, title, tuple(filter(None, figures)), numbers, left_out)


def _panel(subject: Subject, folder: Path) -> tuple[Experiment, Panel] | None:
    """The run's experiment, and what it makes of pictures that it has seen; None where these are not kept."""
    if finetune.is_one(folder):
        return None
    experiment = Experiment.recall(folder)
    if experiment.seen is None or (experiment.config.text and experiment.text is None):
        return None
    params = load_run(folder, int(subject.model.revision), True).params
    return experiment, sanity.look(experiment, params)


def _losses(folder: Path, experiment: Experiment, panel: Panel, numbers: dict[str, Any]) -> Figure | None:
    """The loss of every log-SNR bin as a share of that of the mean picture, over the steps."""
    rows = _rows(folder / "metrics.jsonl")
    often = Counter(float(at) for row in rows for at in row.get("loss_by_logsnr", {}))
    bins = sorted(at for at, times in often.items() if 2 * times >= max(often.values()))
    if not bins:
        return None
    weight = _weights(experiment, np.array(bins))
    floor = dict(zip(bins, weight * panel.trivial["mean picture"]))
    lines = []
    for place, at in enumerate(bins[:: -(-len(bins) // (COLOURS - 1))]):
        points = [
            (row["step"], row["loss_by_logsnr"][f"{at:g}"] / floor[at])
            for row in rows
            if f"{at:g}" in row["loss_by_logsnr"]
        ]
        x, y = map(np.array, zip(*points))
        lines.append(Line(f"log-SNR {at:g}", x, y, place % COLOURS))
    numbers["loss"] = {line.label: {"step": line.x.tolist(), "share": line.y.tolist()} for line in lines}
    ends = np.array([min(line.x[0] for line in lines), max(line.x[-1] for line in lines)], float)
    lines.append(Line("the mean picture", ends, np.ones(2), COLOURS - 1, dashed=True))
    plain = (
        "While it was trained the network was shown pictures with much or little noise (low or high log-SNR) and "
        "corrected for each wrong guess. The lines say how wrong it was; at 1 it would be no better than answering "
        "with the average of all pictures every time."
    )
    says = "The loss at each log-SNR as a share of the loss of the mean picture, over the steps of training: it falls."
    exact = "E w(t) |x0_network - x0|^2 / (w(t) E |x0_mean - x0|^2), w in the middle of each bin"
    chart = Chart(says, "step of training", "loss / loss of the mean picture", tuple(lines), log_y=True)
    return Figure("What it learned, and when", plain, exact, "diffjax/diffusion/loss.py", (chart,))


def _weights(experiment: Experiment, logsnr: np.ndarray) -> np.ndarray:
    """The loss's weight of |dx0|^2 at each log-SNR."""
    objective = experiment.objective()
    denoiser = objective.denoiser({"network": None})
    t = objective.process.inverse(jnp.asarray(logsnr, jnp.float32))
    per_x0 = jnp.square(determinant(objective.prediction, objective.process, t) / objective.process.sigma(t))
    return np.asarray(objective.weight(denoiser, t) * per_x0)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a half-written one is left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _sanity(panel: Panel, numbers: dict[str, Any]) -> Figure:
    """The errors of the panel, and what there is to say."""
    levels = np.array(LEVELS)
    lines = [Line("this network", levels, panel.error, 0)]
    lines += [Line(f"given another's {name}", levels, of, i + 1) for i, (name, of) in enumerate(panel.swapped.items())]
    lines += [
        Line(f"without learning: {name}", levels, np.full(len(levels), of), i + 3, dashed=True)
        for i, (name, of) in enumerate(panel.trivial.items())
    ]
    numbers["sanity"] = {"logsnr": levels.tolist(), "error": panel.error.tolist(), "trivial": panel.trivial}
    numbers["sanity"]["swapped"] = {name: of.tolist() for name, of in panel.swapped.items()}
    plain = (
        "Training pictures were noised and given to the network: how wrong its guess is, and how much more so when it "
        "is given the words of another picture. A network that listens is more wrong then."
    )
    says = (
        "The error of the guessed picture at each log-SNR, with the right and with wrong words, and without learning."
    )
    chart = Chart(says, "log-SNR (much noise is on the left)", "error of x0", tuple(lines), log_y=True)
    said = tuple(Text(line[:1].upper() + line[1:]) for line in panel.lines())
    exact = "mean |x0_network(alpha x0 + sigma eps) - x0|^2"
    return Figure("Does it see, does it listen", plain, exact, "diffjax/train/sanity.py", (chart, *said))


def _data(data: Dataset, every: Sequence[tuple[str, ...]], numbers: dict[str, Any]) -> Figure:
    """Some of the pictures with their captions, the lengths of `every` caption, and twins."""
    some = np.unique(np.linspace(0, len(data) - 1, min(SHEET, len(data))).astype(int))
    examples = data.examples(some)
    names = [_named(data, group, label) for group, label in zip(examples["captions"], examples["label"])]
    shown = tuple(
        Shown(f"data-{i:02d}", pixels, name, f"a training picture: {name}")
        for i, (pixels, name) in enumerate(zip(examples["image"], names))
    )
    blocks: list[Block] = [Strip(shown, 8, 4)]
    said = [counted(len(data), "picture")]
    captions = [group[0] for group in every if group]
    if captions:
        words, same = Counter(len(caption.split()) for caption in captions), len(captions) - len(set(captions))
        x = np.arange(min(words), max(words) + 1)
        line = Line("captions", x.astype(float), np.array([words[int(n)] for n in x], float), 0)
        blocks.append(Chart("How many captions have how many words.", "words", "captions", (line,)))
        said.append(f"{counted(same, 'caption')} that another picture has too")
        numbers["caption_words"] = {str(n): words[int(n)] for n in x}
    looked, twins = _twins(data)
    said.append(f"{counted(twins, 'exact twin')} among {looked} pictures")
    numbers |= {"pictures": len(data), "twins": twins, "looked_through": looked}
    plain = "This is what it was shown: the network knows nothing of the world but these pictures and their words."
    blocks.append(Text(f"{', '.join(said)}."))
    return Figure(
        "What it was shown", plain, "x0 ~ p(x0), the distribution of the data", "diffjax/data/dataset.py", tuple(blocks)
    )


def _named(data: Dataset, captions: Sequence[str], label: int) -> str:
    """What a picture is called."""
    if captions:
        return captions[0]
    return data.class_names[label] if label >= 0 and data.class_names else "no caption"


def _twins(data: Dataset) -> tuple[int, int]:
    """How many pictures were looked through, and how many of them have the very pixels of an earlier one."""
    records = chosen(data)[:: -(-len(data) // HASHED)]
    digests = set()
    for record in records:
        digests.add(hashlib.sha256(data.examples([record])["image"].tobytes()).digest())
    return len(records), len(records) - len(digests)
