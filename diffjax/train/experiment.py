"""An experiment is a config with its data: what training, sampling, evaluating and planning read."""

import contextlib
import functools
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from diffjax import build, config as configs
from diffjax.data.pipeline import Batches
from diffjax.diffusion.cascade import LowRes
from diffjax.diffusion.denoise import Apply, Denoiser, standard_time
from diffjax.diffusion.predict import is_blind
from diffjax.diffusion.process import Discrete
from diffjax.diffusion.refine import Clip, Refine, Threshold
from diffjax.models.model import Defaults, Model
from diffjax.text import frozen
from diffjax.text.learned import Prompts
from diffjax.text.reading import Words
from diffjax.train import facts, preview
from diffjax.train.checkpoint import load_run
from diffjax.train.preview import Preview
from diffjax.train.state import create
from diffjax.train.step import Objective, Step, make_step
from diffjax.utils import seeds
from diffjax.utils.errors import UserError


@dataclass(frozen=True)
class Experiment:
    """A config with what it takes from its data; all else follows from the two.

    `shape` is that of one picture, `classes` are the names of the classes. `tokenize` turns captions into arrays, None
    without text: tokens for the text encoder that is trained too, or the states of a frozen one. `seen` are some of the
    training pictures, by which the experiment is judged. `data` is what training reads, as `dataset.Dataset`.

    Made by `begin` where a run begins, by `recall` from a run's folder, by `before_data` to plan and to rehearse.
    Raises `UserError` for parts that do not go together.
    """

    config: ConfigDict
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    tokenize: Any = None
    seen: facts.Seen | None = None
    data: Any = None

    def __post_init__(self):
        size, denoiser = self.shape[0], self.denoiser
        build.scale(self.config.sample.get("guidance"))
        build.guide(self.config.sample.get("guide") or "cfg")
        if self.low_res and size % self.low_res.size:
            raise UserError(f"low_res.size={self.low_res.size} does not divide data.size={size}: choose one that does")
        if isinstance(denoiser.process, Discrete) and is_blind(denoiser.prediction, denoiser.process, 1.0):
            raise UserError(
                f"the table of process ends in pure noise, of which prediction.name={self.config.prediction.name} says "
                "nothing: set prediction.name to v or x0, or process.zero_terminal_snr to False"
            )
        if size % multiple(denoiser.apply.module):
            network = self.config.network
            raise UserError(
                f"data.size={size}: this {network} reads multiples of {multiple(denoiser.apply.module)} pixels; "
                f"change data.size, or the fields of {network}"
            )

    @classmethod
    def begin(cls, config: ConfigDict, workdir: Path, data: Any) -> Self:
        """The experiment of a run that begins on a data set, or goes on: what it takes from the data is kept in
        `workdir`, where `recall` finds it.

        Raises `UserError` when the config asks for classes or text that the data have not, and for a run of which no
        preview could be drawn.
        """
        facts.keep(config, workdir, data)
        table = None
        if frozen.is_frozen(config.text):
            table = frozen.encoded(config.text, frozen.captions(data, config.sample.prompts))
        experiment = cls._kept(config, workdir, table, data)
        experiment.check_sampling()
        if lost := [prompt for prompt in config.sample.prompts if not experiment.can_read(prompt)]:
            warnings.warn(
                f"no caption has a word of {', '.join(map(repr, lost))} in sample.prompts: previews go without",
                stacklevel=2,
            )
        return experiment

    @classmethod
    def recall(cls, workdir: Path) -> Self:
        """The experiment of a run that was begun, without its data and without the states of a frozen text encoder; no
        checkpoint is read. Raises `UserError` when there is none.
        """
        return cls._kept(configs.read(workdir), workdir)

    @classmethod
    def _kept(cls, config: ConfigDict, workdir: Path, table: Any = None, data: Any = None) -> Self:
        shape, classes = facts.shape_and_classes(workdir)
        learned = config.text and not frozen.is_frozen(config.text)
        tokenize = facts.tokenizer(workdir) if learned else table
        return cls(config, shape, classes, tokenize, facts.seen(workdir), data)

    @classmethod
    def before_data(cls, config: ConfigDict, tokenize: Any = None) -> Self:
        """The experiment of a config before its data are there: pictures in colour unless it says otherwise, and the
        largest vocabulary unless `tokenize` is known.
        """
        tokenize = tokenize or (facts.Blank(config.text.tokens) if config.text else None)
        shape = (config.data.size, config.data.size, config.data.get("channels", 0) or 3)
        return cls(config, shape, tuple(map(str, range(config.classes))), tokenize)

    @functools.cached_property
    def text(self) -> nn.Module | None:
        """The text encoder that is trained with the network, if there is one."""
        choice = self.config.text
        return build.text(choice, self.tokenize.size) if choice and not frozen.is_frozen(choice) else None

    @functools.cached_property
    def low_res(self) -> LowRes | None:
        """How the low-res pictures of a super-resolution stage are made; None of anything else."""
        return LowRes(**self.config.low_res) if self.config.get("low_res") else None

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The denoiser, still without parameters."""
        config = self.config
        width = self.text.width if self.text else frozen.width(config.text) if config.text else 0
        given = {"context_width": width, "pooled_width": width} if width else {}
        given |= {"low_res": True} if self.low_res else {}
        network = build.network(config, **given)
        process, prediction = build.process(config.process), build.prediction(config.prediction)
        return Denoiser(process, prediction, None, Apply(network), standard_time)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditioning in a batch."""
        if self.config.text:
            return ("tokens", "mask") if self.text else ("context", "mask")
        return ("label",) if self.classes else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """What of a batch a training step reads."""
        return ("image", *self.conditions)

    def batches(self, shard: tuple[int, int]) -> Batches:
        """The stream of training batches, of which this process takes its share: `shard` as in `Dataset.batches`."""
        return self.data.batches(self.config.train.batch, self.config.seed, self.tokenize, shard)

    def batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what a step reads of a batch of `size` pictures."""
        rows = {"image": np.zeros((1, *self.shape), np.uint8)} | self.blank()
        return {name: jax.ShapeDtypeStruct((size, *row.shape[1:]), row.dtype) for name, row in rows.items()}

    def blank(self) -> dict[str, np.ndarray]:
        """The conditioning of a batch of one example, of which only the shapes mean something."""
        if self.text:
            return self.tokenize([""])
        if self.config.text:
            tokens = (1, self.config.text.tokens)
            states = np.zeros((*tokens, frozen.width(self.config.text)), np.float16)
            return {"context": states, "mask": np.zeros(tokens, bool)}
        return {"label": np.zeros(1, np.int32)} if self.classes else {}

    def blank_cond(self, params: PyTree) -> dict[str, Array]:
        """What the network reads of `blank` beside x and t; of a super-resolution stage, a low-res picture too."""
        cond = self.encode(params, jax.tree.map(jnp.asarray, self.blank()))
        if self.low_res:
            cond |= {"low_res": jnp.zeros((1, *self.shape)), "level": jnp.zeros(1)}
        return cond

    def encode(self, params: PyTree, cond: dict[str, Array]) -> dict[str, Array]:
        """What the network reads of a batch's conditioning: tokens become states."""
        if not self.text:
            return frozen.conditions(**cond) if self.config.text else cond
        states: Any = self.text.apply({"params": params["text"]}, cond["tokens"], cond["mask"])
        return states

    @property
    def frozen_params(self) -> PyTree:
        """The parameters that never change: none here."""
        return None

    def holding(self, frozen_params: PyTree) -> Self:
        """The same experiment with its frozen parameters where they are now."""
        return self

    def whole(self, params: PyTree, frozen_params: PyTree) -> PyTree:
        """The parameters that the network reads: those that are trained, joined with those that are frozen."""
        return params

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The parameters to begin with: `network`, and `text` where there is a text encoder that is trained too."""
        network = self.config.network
        remedy = f"change the fields of {build.table_of(network)}"
        with _saying(f"network {network} cannot be made for these pictures", remedy):
            return jax.jit(self._init)(key)

    def _init(self, key: Key[Array, ""]) -> PyTree:
        network_key, text_key = jax.random.split(key)
        params, x, t = {}, jnp.zeros((1, *self.shape)), jnp.zeros(1)
        if self.text:
            tokens = jax.tree.map(jnp.asarray, self.blank())
            params["text"] = self.text.init(text_key, tokens["tokens"], tokens["mask"])["params"]
        module = self.denoiser.apply.module
        return params | {"network": module.init(network_key, x, t, **self.blank_cond(params))["params"]}

    def objective(self) -> Objective:
        """What training minimises."""
        config, denoiser = self.config.loss, self.denoiser
        return Objective(
            denoiser.process,
            denoiser.prediction,
            apply=denoiser.apply,
            encode=self.encode,
            weight=build.make("weight", build.WEIGHTS, config.weight),
            times=build.make("times", build.TIMES, config.times),
            uniforms=build.named("uniforms", build.UNIFORMS, config.uniforms),
            network_time=denoiser.network_time,
            drop=config.get("drop", 0.0) if self.conditions else 0.0,
            low_res=self.low_res,
            whole=self.whole,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """What makes updates of gradients."""
        return build.optimizer(self.config.optimizer, self.config.train.steps)[0]

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """The factor of every learning rate at a step."""
        return build.optimizer(self.config.optimizer, self.config.train.steps)[1]

    def step(self) -> Step:
        """One step of training, as a pure function."""
        return make_step(self.objective(), self.optimizer, self.config.train.ema, self.config.train.accumulate)

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """A block that traces the first state or the first step, in which what does not go together is a
        `UserError`.
        """
        with _uncollected(), _saying("loss, process, prediction and optimizer do not go together", "change one"):
            yield

    def rehearse(self) -> None:
        """Go through the first step and the sampling on shapes, which computes nothing.

        Raises `UserError` for what cannot be.
        """
        step, key = self.step(), jax.random.key(0)
        params = jax.eval_shape(self.init, key)
        with self.fitting():
            state = jax.eval_shape(lambda params: create(params, self.optimizer, key), params)
            jax.eval_shape(step, state, self.batch_shapes(self.config.train.accumulate))
        self.check_sampling()

    def check_sampling(self) -> None:
        """Raises `UserError` when sampler, grid and steps do not go together with process and prediction."""
        self.model({"network": None, "text": None}).recipe()

    def defaults(self) -> Defaults:
        """The config's sampling."""
        config = self.config.sample
        return Defaults(
            config.steps,
            config.sampler,
            config.grid,
            config.guidance if self.conditions and self.config.loss.drop else None,
            bound=_bound(config),
            unit_start=isinstance(self.denoiser.process, Discrete),
            level=config.get("level", 0.0),
            guide=config.guide.to_dict() if config.get("guide") else None,
        )

    def model(self, params: PyTree) -> Model:
        """The model that `params` make."""
        text = frozen.Remembered(self.tokenize) if self.tokenize else None
        return Model(
            replace(self.denoiser, params=params["network"]),
            self.shape,
            self.defaults(),
            text=Prompts(params["text"], self.text, self.tokenize) if self.text else text,
            classes=self.classes,
            name=self.config.name,
            low_res=self.low_res.size if self.low_res else 0,
            multiple=multiple(self.denoiser.apply.module),
            has_null=self.config.loss.drop > 0,
        )

    def can_read(self, prompt: str) -> bool:
        """Whether the captions have a word of a prompt, where the words are learned from them."""
        if self.text:
            try:
                self.tokenize.read(prompt)
            except UserError:
                return False
        return True

    def prompts(self) -> list[str]:
        """The config's prompts that can be read; without any, captions of pictures that were seen."""
        given = [prompt for prompt in self.config.sample.prompts if self.can_read(prompt)]
        return given or (self.seen.caption if self.seen else [])

    def subjects(self) -> dict[str, Any]:
        """What previews show, as arguments of `Model.sample`: the prompts, the first classes, or only a number."""
        if self.config.text:
            return {"num": len(self.prompts()), "prompt": self.prompts()}
        num = self.config.sample.num
        return {"num": num, "label": [i % len(self.classes) for i in range(num)]} if self.classes else {"num": num}

    def preview(self, params: PyTree) -> Preview:
        """Pictures of the `subjects`, from the same noise every time; of a super-resolution stage, `comparison`.

        Autoguidance is left out, since the checkpoint that it needs may not be there yet.
        """
        model, key = self.model(params), seeds.key(self.config.seed)
        if self.low_res and self.seen:
            return preview.comparison(model, key, self.seen)
        guidance: dict[str, Any] = {"guidance": 1.0} if model.rule()["name"] == "autoguidance" else {}
        return preview.square(model, key, **self.subjects(), **guidance)


def multiple(network: nn.Module) -> int:
    """Of what number of pixels a network's pictures are a multiple on each side; 1 of one that does not say."""
    return getattr(network, "multiple", 1)


def _bound(config: ConfigDict) -> Refine | None:
    """What keeps x0 in range: `threshold`, a quantile, or `clip`, a radius; 0, or neither, is nothing."""
    if quantile := config.get("threshold", 0.0):
        return Threshold(quantile)
    return Clip(radius) if (radius := config.get("clip", 0.0)) else None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """A block without Python's garbage collector: tracing makes so many objects, and so few of them garbage, that a
    fifth of its time would go into looking for it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _saying(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the last two of what is computed, not of a shape
        raise
    except Exception as error:  # whatever libraries say of numbers that do not fit
        first = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{what} ({type(error).__name__}: {first}): {remedy}") from error


def check_conditions(config: ConfigDict) -> None:
    """Raises `UserError` for an experiment of both text and classes, which no network here is trained for."""
    if config.get("text") and config.get("classes"):
        raise UserError(
            f"classes={config.classes} and text={config.text.name} are both set, and a network is conditioned on one: "
            "set text to None to train by class, or classes to 0 to train by text (a picture without captions is "
            "captioned by its class)"
        )


def load(workdir: str | Path, step: int | None = None, ema: bool = True) -> Model:
    """The model of a run's newest checkpoint (or that of `step`), its averaged parameters or the raw ones.

    Raises `UserError` as `load_run` does.
    """
    run = load_run(workdir, step, ema)
    experiment = Experiment.recall(run.workdir)
    model = experiment.model(jax.tree.map(jnp.asarray, run.params))
    if frozen.is_frozen(run.config.text):
        facts.encoder_folder(run.config.text, run.workdir)
        model = replace(model, text=frozen.load(run.config.text))
    return replace(model, revision=str(run.step), earlier=functools.partial(_earlier, experiment, run.workdir, ema))


def _earlier(experiment: Experiment, workdir: Path, ema: bool, step: int) -> Model:
    """The model of the checkpoint of a step; without text where the encoder is frozen, since that is the same at
    every step.
    """
    return experiment.model(jax.tree.map(jnp.asarray, load_run(workdir, step, ema).params))


def words(workdir: str | Path) -> Words:
    """The words that a run's prompts can have. Raises `UserError` for a run that learned none."""
    experiment = Experiment.recall(Path(workdir))
    if experiment.text is None:
        classes = f"classes: {', '.join(experiment.classes)}" if experiment.classes else "no text"
        reads = "any words" if experiment.config.text else classes
        raise UserError(f"{workdir} learned no words from captions: it reads {reads}")
    return experiment.tokenize.words
