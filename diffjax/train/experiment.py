"""Our own runs: what a config and its data make of each other, and a run's folder as a model."""

import contextlib
import functools
import itertools
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict

from diffjax import build, config as configs
from diffjax.data.pipeline import Tokenize
from diffjax.diffusion import cascade
from diffjax.diffusion.cascade import LowRes
from diffjax.diffusion.denoise import Apply, Denoiser, standard_time
from diffjax.diffusion.predict import Prediction, is_blind
from diffjax.diffusion.process import Discrete, Process
from diffjax.diffusion.refine import Clip, Refine, Threshold
from diffjax.models.model import Defaults, Model
from diffjax.text import frozen
from diffjax.text.learned import CaptionTokenizer, Prompts
from diffjax.text.reading import Words
from diffjax.train.checkpoint import load_run
from diffjax.train.state import create
from diffjax.train.step import Objective, make_step
from diffjax.utils import files, image, seeds
from diffjax.utils.errors import UserError

TOKENIZER = "tokenizer.json"
ENCODER = "encoder.json"
SEEN = "seen.npz"
SHOWN, AVERAGED = 8, 256
VOCABULARY = 8192


class Seen(NamedTuple):
    """Pictures of the data set with a caption ("" without) and a label (-1 without) each, and the mean of more, in
    [-1, 1].
    """

    image: UInt8[np.ndarray, "n h w c"]
    caption: list[str]
    label: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, "h w c"]


class Preview(NamedTuple):
    """Pictures in [-1, 1] that are shown in so many columns, each above what is said of it, if anything is."""

    images: Float[np.ndarray, "n h w c"]
    columns: int
    captions: list[str]


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step: mathematics, networks, and what they were told of the data.

    `shape` is that of one picture, `classes` the classes' names, `tokenize` turns captions into arrays, None without
    text: tokens for the encoder `text` that is trained too, or the states of a frozen one. A stage of a cascade has
    `low_res`. What a run has `seen` are some of its pictures, by which it is judged.
    """

    config: ConfigDict
    process: Process
    prediction: Prediction
    network: nn.Module
    text: nn.Module | None
    tokenize: Tokenize | None
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    low_res: LowRes | None = None
    seen: Seen | None = None
    frozen = None

    @property
    def conditions(self) -> tuple[str, ...]:
        """What of a batch the network is told."""
        if self.config.text:
            return ("tokens", "mask") if self.text else ("context", "mask")
        return ("label",) if self.classes else ()

    def blank(self) -> dict[str, np.ndarray]:
        """A batch's conditions of one example that is told nothing."""
        if self.text:
            return self.tokenize([""])
        if self.config.text:
            tokens = (1, self.config.text.tokens)
            states = np.zeros((*tokens, frozen.width(self.config.text)), np.float16)
            return {"context": states, "mask": np.zeros(tokens, bool)}
        return {"label": np.zeros(1, np.int32)} if self.classes else {}

    def blank_low_res(self) -> dict[str, np.ndarray]:
        """What one example of a stage of a cascade is told besides."""
        return (
            {"low_res": np.zeros((1, *self.shape), np.float32), "level": np.zeros(1, np.float32)}
            if self.low_res
            else {}
        )

    def init(self, key: Key[Array, ""]) -> PyTree:
        """New parameters: `network`, and `text` where there is a text encoder that is trained too."""
        network_key, text_key = jax.random.split(key)
        params, told = {}, jax.tree.map(jnp.asarray, self.blank())
        if self.text:
            params["text"] = self.text.init(text_key, told["tokens"], told["mask"])["params"]
        cond = self.encode(params, told) | self.blank_low_res()
        params["network"] = self.network.init(network_key, jnp.zeros((1, *self.shape)), jnp.zeros(1), **cond)["params"]
        return params

    def start(self, key: Key[Array, ""]) -> PyTree:
        """`init` as one program."""
        return jax.jit(self.init)(key)

    def encode(self, params: PyTree, cond: dict[str, Array]) -> dict[str, Array]:
        """What the network reads of a batch's conditions: tokens become states."""
        if not self.text:
            return frozen.conditions(**cond) if self.config.text else cond
        return self.text.apply({"params": params["text"]}, cond["tokens"], cond["mask"])

    def objective(self) -> Objective:
        """What training minimises."""
        config = self.config.loss
        return Objective(
            self.process,
            self.prediction,
            apply=Apply(self.network),
            encode=self.encode,
            weight=build.make("weight", build.WEIGHTS, config.weight),
            times=build.make("times", build.TIMES, config.times),
            uniforms=build.named("uniforms", build.UNIFORMS, config.uniforms),
            drop=config.drop if self.conditions else 0.0,
            low_res=self.low_res,
        )

    def defaults(self) -> Defaults:
        """The config's sampling."""
        config = self.config.sample
        return Defaults(
            config.steps,
            config.sampler,
            config.grid,
            config.guidance if self.conditions and self.config.loss.drop else None,
            bound=_bound(config),
            unit_start=isinstance(self.process, Discrete),
            level=config.get("level", 0.0),
            guide=config.guide.to_dict() if config.get("guide") else None,
        )

    def model(self, params: PyTree) -> Model:
        """The model that `params` make."""
        text = frozen.Remembered(self.tokenize) if self.tokenize else None
        text = Prompts(params["text"], self.text, self.tokenize) if self.text else text
        denoiser = Denoiser(self.process, self.prediction, params["network"], Apply(self.network), standard_time)
        told = {"classes": self.classes, "name": self.config.name, "low_res": self.low_res.size if self.low_res else 0}
        told |= {"multiple": multiple(self.network), "has_null": self.config.loss.drop > 0}
        return Model(denoiser, self.shape, self.defaults(), text=text, **told)

    def prompts(self) -> list[str]:
        """The config's prompts that can be read; without any, captions of pictures that were seen."""
        given = list(self.config.sample.prompts)
        return [prompt for prompt in given if not self.text or _can_read(self.tokenize, prompt)] or self.seen.caption

    def preview(self, params: PyTree) -> Preview:
        """Pictures of the config's prompts (without any, of captions it has seen), of the first classes, or of nothing.
        Autoguidance is left out, since the checkpoint that it needs may not be there yet.

        The noise is the same every time. Of a stage of a cascade, `panel` of the pictures it has seen.
        """
        if self.low_res:
            return panel(self.model(params), self.seen, seeds.key(self.config.seed))
        config = self.config.sample
        told: dict[str, Any] = {}
        if self.config.text:
            told["prompt"] = self.prompts()
        elif self.classes:
            told["label"] = [i % len(self.classes) for i in range(config.num)]
        num = len(told["prompt"]) if self.config.text else config.num
        model = self.model(params)
        if model.rule()["name"] == "autoguidance":
            told["guidance"] = 1.0
        images = model.sample(seeds.key(self.config.seed), num=num, **told)
        return Preview(np.asarray(images), math.isqrt(num - 1) + 1, [])


def _can_read(tokenize: CaptionTokenizer, prompt: str) -> bool:
    try:
        tokenize.read(prompt)
    except UserError:
        return False
    return True


def multiple(network: nn.Module) -> int:
    """Of what number of pixels a network's pictures are a multiple on each side; 1 of one that does not say."""
    return getattr(network, "multiple", 1)


def _bound(config: ConfigDict) -> Refine | None:
    """What keeps x0 in range: `threshold`, a quantile, or `clip`, a radius; 0, or neither, is nothing."""
    if quantile := config.get("threshold", 0.0):
        return Threshold(quantile)
    return Clip(radius) if (radius := config.get("clip", 0.0)) else None


def panel(model: Model, seen: Seen, key: Key[Array, ""]) -> Preview:
    """A row for each picture: what the model is given, interpolation, the model, and the truth, with the PSNR
    of each.
    """
    truth, size = jnp.asarray(image.from_uint8(seen.image)), model.shape[0]
    small = cascade.downsample(truth, model.low_res)
    told = {} if model.text is None else {"prompt": seen.caption}
    drawn = model.sample(key, num=len(truth), low_res=small, **told)
    given = small.repeat(size // model.low_res, axis=1).repeat(size // model.low_res, axis=2)
    rows = np.stack([given, cascade.upsample(small, size), drawn, truth], axis=1)
    quality = image.psnr(image.to_uint8(rows), seen.image[:, None])
    named = [
        [f"{name} {value:.1f} dB" for name, value in zip(("given", "bicubic", "ours"), row)] + ["truth"]
        for row in quality
    ]
    return Preview(rows.reshape(-1, *model.shape), 4, list(itertools.chain.from_iterable(named)))


def check_conditions(config: ConfigDict) -> None:
    """Raises `UserError` for an experiment of both text and classes, which no network here is trained for."""
    if config.get("text") and config.get("classes"):
        raise UserError(
            f"classes={config.classes} and text={config.text.name} are both set, and a run is told one of them: set "
            "text to None to train by class, or classes to 0 to train by text (a picture without captions is captioned "
            "by its class)"
        )


def plan(config: ConfigDict, workdir: Path, data: Any) -> Plan:
    """The plan of a run on a data set; what it takes from the data is kept in `workdir`, where `load` finds it.

    Raises `UserError` when the config asks for classes or text that the data have not, and for a run of which no
    preview could be drawn.
    """
    if config.classes and config.classes != data.num_classes:
        raise UserError(f"classes is {config.classes} and {data.name} has {data.num_classes}: set classes to that")
    names = data.class_names if config.classes else ()
    if not (workdir / "data.json").exists():
        files.write_json(workdir / "data.json", {"shape": [data.size, data.size, data.channels], "classes": names})
    if seen(workdir) is None:
        _keep_seen(workdir / SEEN, data)
    if frozen.is_frozen(config.text):
        digest = frozen.digest(frozen.folder(config.text))
        files.write_json(workdir / ENCODER, {"name": config.text.name, "digest": digest})
        return _drawn(_plan(config, workdir, frozen.encoded(config.text, frozen.captions(data, config.sample.prompts))))
    if config.text and not (workdir / TOKENIZER).exists():
        files.write_atomic(
            workdir / TOKENIZER, tokenizer(config, data.captions(), data.config.templates).to_json().encode()
        )
    found = _drawn(_plan(config, workdir))
    if lost := [prompt for prompt in config.sample.prompts if config.text and not _can_read(found.tokenize, prompt)]:
        warnings.warn(
            f"no caption has a word of {', '.join(map(repr, lost))} in sample.prompts: previews go without",
            stacklevel=2,
        )
    return found


def tokenizer(config: ConfigDict, captions: Iterable[Sequence[str]], templates: Sequence[str]) -> CaptionTokenizer:
    """The tokenizer of the captions of all pictures, in all templates."""
    filled = (
        template.replace("{}", text) for text in itertools.chain.from_iterable(captions) for template in templates
    )
    return CaptionTokenizer.train(filled, config.text.tokens)


def _drawn(made: Plan) -> Plan:
    """The plan. Raises `UserError` when its sampler, grid and steps do not go together with its process and
    prediction.
    """
    made.model({"network": None, "text": None}).recipe()
    return made


def _keep_seen(path: Path, data: Any) -> None:
    every = np.linspace(0, len(data) - 1, min(AVERAGED, len(data))).astype(int)
    mean = image.from_uint8(data.examples(every)["image"]).mean(axis=0)
    examples = data.examples(range(min(SHOWN, len(data))))
    texts = [data.config.templates[0].replace("{}", group[0]) if group else "" for group in examples["captions"]]
    with files.open_atomic(path) as file:
        np.savez(file, image=examples["image"], caption=np.array(texts), label=examples["label"], mean=mean)


def load(workdir: str | Path, step: int | None = None, ema: bool = True) -> Model:
    """The model of a run's newest checkpoint (or that of `step`), its averaged parameters or the raw ones.

    Raises `UserError` as `load_run` does.
    """
    run = load_run(workdir, step, ema)
    model = _plan(run.config, run.workdir).model(jax.tree.map(jnp.asarray, run.params))
    if frozen.is_frozen(run.config.text):
        model = model.replace(text=_frozen(run.config.text, run.workdir))
    return model.replace(revision=str(run.step), earlier=functools.partial(_earlier, run.workdir, ema))


def _earlier(workdir: Path, ema: bool, step: int) -> Model:
    """The model of the checkpoint of a step; without text where the encoder is frozen, since that is the same at
    every step.
    """
    run = load_run(workdir, step, ema)
    return _plan(run.config, run.workdir).model(jax.tree.map(jnp.asarray, run.params))


def _frozen(choice: ConfigDict, workdir: Path) -> frozen.Frozen:
    """The frozen encoder of a run."""
    encoder_folder(choice, workdir)
    return frozen.load(choice)


def encoder_folder(choice: ConfigDict, workdir: Path) -> Path:
    """Where the frozen encoder of a run lies. Raises `UserError` when it is not the one that the run was
    trained with.
    """
    folder, known = frozen.folder(choice), files.read_json(workdir / ENCODER)
    if frozen.digest(folder) != known["digest"]:
        raise UserError(f"{folder} is not the {choice.name} that {workdir} was trained with: put that one back")
    return folder


def words(workdir: str | Path) -> Words:
    """The words that a run's prompts can have. Raises `UserError` for a run that learned none."""
    plan = recalled(Path(workdir))
    if plan.text is None:
        reads = (
            "any words" if plan.config.text else f"classes: {', '.join(plan.classes)}" if plan.classes else "no text"
        )
        raise UserError(f"{workdir} learned no words from captions: it reads {reads}")
    return plan.tokenize.words


def recalled(workdir: Path) -> Plan:
    """The plan of a run that was begun; no checkpoint is read. Raises `UserError` when there is none."""
    if not (workdir / "data.json").is_file():
        raise UserError(f"{workdir} holds no run (no data.json); train one with: diffjax train --workdir {workdir}")
    return _plan(configs.read(workdir), workdir)


def _plan(config: ConfigDict, workdir: Path, table: frozen.Table | None = None) -> Plan:
    told = files.read_json(workdir / "data.json")
    own = config.text and not frozen.is_frozen(config.text)
    tokenize = own_tokenizer(workdir) if own else table
    return planned(config, tuple(told["shape"]), tuple(told["classes"]), tokenize, seen(workdir))


def own_tokenizer(workdir: Path) -> CaptionTokenizer:
    """The tokenizer that a run was trained with. Raises `UserError` when it cannot be read."""
    try:
        return CaptionTokenizer.from_json((workdir / TOKENIZER).read_text(encoding="utf-8"))
    except Exception as error:  # the parser of a damaged file raises no one kind
        raise UserError(f"{workdir / TOKENIZER} is damaged: put it back from a copy") from error


def seen(workdir: Path) -> Seen | None:
    """What a run has seen; None where that is not kept or can no longer be read, which its pictures do not
    depend on.
    """
    try:
        with np.load(workdir / SEEN) as file:
            return Seen(file["image"], file["caption"].tolist(), file["label"], file["mean"])
    except FileNotFoundError:
        return None
    except Exception:  # a damaged archive raises no one kind
        logging.getLogger("diffjax").warning("%s is damaged; the next training writes it anew", workdir / SEEN)
        return None


def planned(
    config: ConfigDict, shape: tuple[int, int, int], classes: tuple[str, ...], tokenize: Any, seen: Seen | None = None
) -> Plan:
    """The plan of a config for data of that shape and those classes; `tokenize.size` is the vocabulary's.

    Raises `UserError` for a low-res size that does not divide the pictures', and for a table that ends in pure noise
    with a prediction that says nothing of the picture there.
    """
    is_frozen = frozen.is_frozen(config.text)
    text = build.text(config.text, tokenize.size) if config.text and not is_frozen else None
    width = text.width if text else frozen.width(config.text) if is_frozen else 0
    low_res = LowRes(**config.low_res) if config.get("low_res") else None
    build.scale(config.sample.get("guidance"))
    build.guide(config.sample.get("guide") or "cfg")
    if low_res and shape[0] % low_res.size:
        raise UserError(f"low_res.size={low_res.size} does not divide data.size={shape[0]}: choose one that does")
    widths = {"context_width": width, "pooled_width": width} if width else {}
    process, prediction = build.process(config.process), build.prediction(config.prediction)
    if isinstance(process, Discrete) and is_blind(prediction, process, 1.0):
        raise UserError(
            f"the table of process ends in pure noise, of which prediction.name={config.prediction.name} says nothing: "
            "set prediction.name to v or x0, or process.zero_terminal_snr to False"
        )
    network = build.network(config, **widths, **({"low_res": True} if low_res else {}))
    if shape[0] % multiple(network):
        said = f"data.size={shape[0]}: this {config.network} reads multiples of {multiple(network)} pixels"
        raise UserError(f"{said}; change data.size, or the fields of {config.network}")
    return Plan(
        config,
        process,
        prediction,
        network,
        text,
        tokenize,
        shape,
        classes,
        low_res,
        seen,
    )


@dataclass(frozen=True)
class Blank:
    """A tokenizer of the largest size, of which only the shapes of its tokens are known."""

    length: int
    size: int = VOCABULARY

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        return {
            "tokens": np.zeros((len(captions), self.length), np.int32),
            "mask": np.ones((len(captions), self.length), bool),
        }


def without_data(config: ConfigDict, tokenize: Any = None) -> Plan:
    """The plan of a config before its data are there: colour pictures unless it says otherwise, and the largest
    vocabulary.
    """
    tokenize = tokenize or (Blank(config.text.tokens) if config.text else None)
    shape = (config.data.size, config.data.size, config.data.get("channels", 0) or 3)
    classes = tuple(map(str, range(config.classes)))
    return planned(config, shape, classes, tokenize)


def rehearse(config: ConfigDict) -> None:
    """Make everything that a training needs but its data, and go through its first step and its sampling on shapes.

    Raises `UserError` for what cannot be.
    """
    plan, train = without_data(config), config.train
    optimizer, _ = build.optimizer(config.optimizer, train.steps)
    step, key = make_step(plan.objective(), optimizer, train.ema, train.accumulate), jax.random.key(0)
    with _saying(
        f"network {config.network} cannot be made for these pictures",
        f"change the fields of {build.table_of(config.network)}",
    ):
        params = jax.eval_shape(plan.init, key)
    batch = {name: jnp.zeros((train.accumulate, *rows.shape[1:]), rows.dtype) for name, rows in plan.blank().items()}
    batch["image"] = jnp.zeros((train.accumulate, *plan.shape), jnp.uint8)
    with _saying("loss, process, prediction and optimizer do not go together", "change one"):
        jax.eval_shape(lambda params: step(create(params, optimizer, key), batch), params)
    plan.model(params).recipe()


@contextlib.contextmanager
def _saying(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever libraries say of numbers that do not fit
        first = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{what} ({type(error).__name__}: {first}): {remedy}") from error
