"""The options of sampling, each of them once: its default, its meaning and its flag.

`Method` is how a model draws, `Asked` adds how many pictures and of what size, which decides what a job costs, and
`Request` is all that a sampling job is asked for. Their fields make the flags of the command line, the config of a
sampling experiment and the recipe in a manifest; `Model.sample`, `Model.recipe` and `evaluate` take those of `Method`
by name. None is the model's own choice.

jax is not imported with this module, so that `diffjax --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from diffjax.utils.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from diffjax.diffusion.refine import Refine
    from diffjax.diffusion.sample import Sampler

Guide = float | Callable[[Any], Any]
"""The scale of guidance (0 and 1 are none), or a guide of one's own: a function from a denoiser to a denoiser."""

Rule = str | Mapping[str, Any]
"""How guidance combines the branches: a name of `build.GUIDES`, or a table of its name and fields."""

Size = int | tuple[int, int]
"""Pixels a side, or (height, width)."""

M = TypeVar("M", bound="Method")


def one_of(kind: str, *names: str) -> Callable[[str], str]:
    """An argparse type: one of the names; the error for another one names the nearest."""

    def convert(word: str) -> str:
        if word not in names:
            raise argparse.ArgumentTypeError(str(unknown(kind, word, names)))
        return word

    return convert


def pixels(word: str) -> Size:
    """An argparse type: a side, or (height, width) of WIDTHxHEIGHT."""
    sides = word.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{word!r} is no size: give 1024, or 1344x768 for width x height")
    return int(word) if len(sides) == 1 else (int(sides[1]), int(sides[0]))


def sides(size: Size) -> tuple[int, int]:
    """The height and width of a size."""
    return (size, size) if isinstance(size, int) else size


class Table(argparse.Action):
    """Words NAME FIELD=VALUE ... as a table such as `{"name": "apg", "momentum": -0.5}`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, *rest = values
        table = {"name": name}
        for word in rest:
            key, is_field, value = word.partition("=")
            if not is_field:
                parser.error(f"{option_string}: {word} is no FIELD=VALUE")
            try:
                table[key] = int(value) if key == "step" else float(value)
            except ValueError:
                parser.error(f"{option_string}: {key} is {value!r}: it must be a number")
        setattr(namespace, self.dest, table)


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of that default; `help` and `how` are what `argparse`'s `add_argument` takes for its flag.

    The flag is `--name`, or `flag` where it has another name; None where it has none.
    """
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a model draws.

    `guidance` is a scale, 0 and 1 none; in Python it can be a guide of one's own, `sampler` a refinement and `grid` the
    (t, s) of every step. `guide` is how the scale combines the branches (`build.guide`).
    """

    steps: int | None = option(None, "steps of the sampler", type=int, metavar="N")
    sampler: str | Refine | Sampler | None = option(
        None,
        "ddpm, ddim, euler, heun (two evaluations a step), dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, unipc or ipndm",
        metavar="NAME",
    )
    grid: str | Float[np.ndarray, "steps 2"] | Callable[[int], np.ndarray] | None = option(
        None, "the times: uniform, logsnr, karras, leading, linspace, trailing or fitted", metavar="NAME"
    )
    guidance: Guide | None = option(
        None,
        "guidance scale: 0 or 1 is none (half the evaluations), 2 to 8 follow the prompt or class more closely",
        type=float,
        metavar="W",
    )
    guide: Rule | None = option(
        None,
        "how guidance combines its branches: cfg, cfg_zero [still=T], apg [momentum=M radius=R parallel=P], or "
        "autoguidance step=N (an earlier checkpoint of the run); each with [low=T high=T] to act at these times only, "
        "and [rescale=PHI]",
        nargs="+",
        action=Table,
        metavar=("NAME", "FIELD=VALUE"),
    )
    eta: float | None = option(None, "fresh noise in each step, from 0 to 1", type=float)

    def said(self) -> dict[str, Any]:
        """What it says of the method; nothing of what is the model's own choice."""
        return {name: value for name in names(Method) if (value := getattr(self, name)) is not None}


class Keywords(TypedDict, total=False):
    """The fields of `Method` as the keywords of a function."""

    steps: int | None
    sampler: str | Refine | Sampler | None
    grid: str | Float[np.ndarray, "steps 2"] | Callable[[int], np.ndarray] | None
    guidance: Guide | None
    guide: Rule | None
    eta: float | None


@dataclass(frozen=True, kw_only=True)
class Asked(Method):
    """How much is drawn, and how: `num` images of each prompt or label, of `size` pixels. Raises `UserError` for
    numbers that cannot be.
    """

    num: int = option(1, "pictures of each prompt or label (default 1)", type=int, metavar="N")
    batch: int | None = option(
        None, "pictures at once on each device; another number rounds otherwise", type=int, metavar="N"
    )
    size: Size | None = option(
        None, "pixels a side, or WIDTHxHEIGHT (default: what the model was trained on)", type=pixels
    )
    dtype: str | None = option(None, "what to compute in", type=one_of("dtype", "float32", "bfloat16"))

    def __post_init__(self):
        from diffjax import build

        for name in ("num", "steps", "batch"):
            _check_least(name, getattr(self, name), 1)
        if self.eta is not None:
            build.within("--eta", self.eta, 0.0, 1.0)
        build.scale(self.guidance)
        build.guide(self.guide or "cfg")


@dataclass(frozen=True, kw_only=True)
class Request(Asked):
    """All that a sampling job is asked for: `num` images of each prompt, or label, or pair of both.

    `each_prompt` and `each_label` are files of which line i is what picture i is of, from the first line again after
    the last; then `num` are all pictures. `format` and `per_file` say what files they are kept in.
    `image` is where to start from, `strength` how much of it may change; `mask` is white where it is drawn anew, and
    `feather` how many pixels around that pass over into the kept ones. A super-resolution model draws from the picture
    `low_res`, or from those of an earlier job in that folder, with noise of `level`. `revision`, `variant`,
    `quantize`, `shard` and `lora` are those of `diffjax.load`, `closed_form` is the table of `models.closed_form`.
    Raises `UserError` for what cannot go together.
    """

    model: str = field(kw_only=False)
    closed_form: Mapping[str, Any] | None = option(
        None, "the closed form that draws: data, machine, windows, mixing, process", flag=None
    )
    revision: str = option("", "the step of a run's checkpoint; a branch, tag or commit of the hub")
    variant: str | None = option(
        None, "which of several forms of the weights: fp16, ema or the like, or a file's name", metavar="NAME"
    )
    quantize: str | None = option(None, "keep large weights in fewer bits (SD3.5)", type=one_of("kind", "int8", "int4"))
    shard: str | None = option(
        None, "split the weights over all devices (SD3.5)", type=one_of("way", "fsdp", "tensor", "both")
    )
    lora: tuple[str, ...] | None = option(
        None,
        "add the low-rank adapters of a file, folder or hub id, times STRENGTH (SD3.5); can be repeated",
        action="append",
        metavar="FILE[:STRENGTH]",
    )
    prompts: tuple[str, ...] = option(
        (), "what is drawn; can be repeated", flag="--prompt", action="append", metavar="TEXT"
    )
    negative_prompt: str | None = option(None, "what guidance leads away from", metavar="TEXT")
    labels: tuple[str, ...] = option((), "a class by name or number", flag="--label", action="append")
    each_prompt: str | None = option(
        None,
        "picture i is of line i of this file, from the first line again after the last; --num pictures in all",
        metavar="FILE",
    )
    each_label: str | None = option(None, "the same with a class on each line", metavar="FILE")
    format: str = option(
        "png",
        "png: a file for each picture; webdataset: tar files of many; array_record: a TFDS data set (default png)",
        type=one_of("format", "png", "webdataset", "array_record"),
    )
    per_file: int = option(1000, "pictures in a file of such a format (default 1000)", type=int, metavar="N")
    image: str | None = option(None, "start from this picture", metavar="FILE")
    strength: float | None = option(
        None, "how much of --image may change, above 0 to 1 (default 0.6, with a mask 1)", type=float
    )
    mask: str | None = option(
        None, "draw --image anew where this picture is white; where it is black its pixels stay", metavar="FILE"
    )
    feather: int | None = option(
        None,
        "pixels around the white over which the drawn passes into the kept (default 0)",
        type=int,
        metavar="N",
    )
    low_res: str | None = option(
        None, "super-resolution: the low-res picture, or the folder of an earlier job", metavar="PATH"
    )
    level: float | None = option(None, "noise augmentation level of the low-res picture, from 0 to below 1", type=float)
    seed: int = option(0, "picture i of a seed is always the same (default 0)", type=int, metavar="N")
    two_passes: bool = option(False, "guidance's two branches in turn: less memory", action="store_true")
    skip_layers: bool = option(
        False, "guide away from the network without layers 7 to 9 too (SD3.5 medium)", action="store_true"
    )

    def __post_init__(self):
        from diffjax import build

        super().__post_init__()
        _check_least("seed", self.seed, 0)
        _check_least("per-file", self.per_file, 1)
        if (self.each_prompt or self.each_label) and (self.prompts or self.labels):
            raise UserError(
                "--each-prompt and --each-label say what each picture is of: leave other prompts and labels out"
            )
        if any(not prompt.strip() for prompt in self.prompts):
            raise UserError("a prompt is empty: say what to draw, or leave --prompt out to draw without a text")
        if self.image is None and (self.mask is not None or self.strength not in (None, 1.0)):
            raise UserError("--mask and --strength say what may change of a picture: give the picture with --image")
        if self.mask is None and self.feather:
            raise UserError("--feather softens the edge of a mask: give the mask with --mask")
        if self.strength is not None:
            build.within("--strength", self.strength, 0.0, 1.0)

    @property
    def texts(self) -> list[str]:
        """All that a text encoder reads, the prompts of a file each once."""
        each = dict.fromkeys(prompt for prompt, _ in self.each if prompt)
        return [*self.prompts, *each, *([] if self.negative_prompt is None else [self.negative_prompt])]

    @property
    def subjects(self) -> list[tuple[str | None, str | None]]:
        """Every prompt with every label; with files of them each pair once."""
        if self.each:
            return list(dict.fromkeys(self.each))
        prompts, labels = dict.fromkeys(self.prompts or [None]), dict.fromkeys(self.labels or [None])
        return list(itertools.product(prompts, labels))

    @functools.cached_property
    def each(self) -> list[tuple[str | None, str | None]]:
        """What picture 0, 1, ... is of, by the lines of the files, as many as the longer one has; none without a file.

        Raises `UserError` for a file that cannot be read or has no lines.
        """
        files = [read_lines(path) if path else None for path in (self.each_prompt, self.each_label)]
        longest = max((len(lines) for lines in files if lines), default=0)
        columns = [[lines[i % len(lines)] if lines else None for i in range(longest)] for lines in files]
        return list(zip(*columns))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file, but for empty ones. Raises `UserError` when there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file with one prompt on a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: save it as such, one prompt on a line") from error
    if found := [line.strip() for line in lines if line.strip()]:
        return found
    raise UserError(f"{path} is empty: write one prompt on a line")


EACH = ("each_prompt", "each_label")
FILES = ("image", "mask", "low_res", "lora", *EACH)
"""What of a request names a file, or a folder of an earlier job; adapters, several with their strengths."""


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"--{name} is {value}: it must be at least {least}")


def names(of: type[Method]) -> list[str]:
    """The options of a class."""
    return [field.name for field in dataclasses.fields(of)]


def added(of: type[Method], to: type[Method]) -> list[str]:
    """The options of a class that another has not, but for those without a flag of their own: what the model is."""
    return [name for name in _flags(of) if name not in names(to)]


def _flags(of: type[Method]) -> dict[str, Mapping[str, Any]]:
    """The options of a class that have a flag, with what `option` says of them."""
    known = {field.name: field.metadata for field in dataclasses.fields(of) if field.metadata}
    return {name: how for name, how in known.items() if how.get("flag", name)}


def defaults(of: type[Method]) -> dict[str, Any]:
    """The options of a class that have a default, with it."""
    found = {field.name: field.default for field in dataclasses.fields(of)}
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


def changed(method: M, given: Mapping[str, Any], by: Callable[..., Any]) -> M:
    """The method with the keywords that are `given` to a function `by` in place of its own.

    Raises `UserError` for one that the function does not take, naming the nearest.
    """
    if wrong := next((name for name in given if name not in names(Method)), None):
        parameters = inspect.signature(by).parameters.values()
        others = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        raise unknown(f"argument of {by.__name__}", wrong, [*names(Method), *others])
    return dataclasses.replace(method, **given)


def add_flags(
    parser: argparse.ArgumentParser, of: type[Method], only: Iterable[str] = (), **others: dict[str, Any]
) -> None:
    """Flags for the options of a class, or `only` for these, in their order.

    `others` are arguments of `add_argument` for some of them in place of their own.
    """
    known = _flags(of)
    for name in only or known:
        how = {"flag": f"--{name.replace('_', '-')}", "default": None, **known[name], **others.get(name, {})}
        parser.add_argument(how.pop("flag"), dest=name, **how)


def given(of: type[Method], args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of a command say of the options of a class."""
    found = {name: getattr(args, name, None) for name in names(of)}
    return {name: tupled(value) for name, value in found.items() if value is not None}


def tupled(value: Any) -> Any:
    """A list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value
