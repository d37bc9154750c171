"""Where a published model keeps its parts: component folders, and the files that hold their tensors.

A folder may hold its weights in several forms: whole or in shards with an index, as safetensors or as pickles, plain or
as a variant (`model.fp16.safetensors`, `model.ema.safetensors`). `choose` says which is read, and never guesses.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffjax.utils.errors import UserError, unknown
from diffjax.weights import foreign, safetensors, torchzip
from diffjax.weights.config import read_json

STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")
SHARD = r"-\d{5}-of-\d{5}"
FILE = re.compile(
    rf"({'|'.join(STEMS)})([._](?P<variant>[\w.-]+?))?((?P<shard>{SHARD})(\.(?P<late>\w+))?)?"
    r"\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<last>[\w-]+))?\.json)?"
)
"""A variant's name stands before the shard's number, behind it, or in an index behind `.index`: all three are
published.
"""

PRECISION = re.compile(r"(fp|bf|float|bfloat)\d+(_\w+)?")
"""Variants of these names are the plain weights, rounded; all others are other weights."""


@dataclass(frozen=True)
class Form:
    """One of the forms in which a folder holds its weights: the file `name`, or the index of its shards."""

    name: str
    variant: str = ""
    pickled: bool = False


def component(folder: str | Path, name: str) -> Path:
    """The folder of one component: `folder/name`, or `folder` itself where everything lies at the root."""
    folder = Path(folder)
    return folder / name if (folder / name).is_dir() else folder


def variant_of(name: str) -> str | None:
    """The variant that a file of weights, a shard or an index belongs to ("" is the plain one); None for
    other files.
    """
    found = FILE.fullmatch(name)
    return found and (found["variant"] or found["late"] or found["last"] or "")


def forms(names: Iterable[str]) -> list[Form]:
    """The forms of the weights among the names of a folder's files; a shard is none by itself."""
    matches = [found for name in sorted(names) if (found := FILE.fullmatch(name)) and not found["shard"]]
    return [Form(found[0], variant_of(found[0]) or "", found["kind"] == "bin") for found in matches]


def is_weights(name: str) -> bool:
    """Whether a file of a repository is one of weights, by whatever name, or an index of such files."""
    return bool(re.search(r"\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?$", name))


def belongs(name: str, form: Form) -> bool:
    """Whether a file is of a form: the file itself, or one of its shards."""
    found = FILE.fullmatch(name)
    if found is None or not found["shard"] or ".index." not in form.name:
        return name == form.name
    kind = (variant_of(name), found["kind"] == "bin")
    return kind == (form.variant, form.pickled) and form.name.startswith(f"{found[1]}.")


def choose(found: Sequence[Form], variant: str | None, where: str) -> Form | None:
    """The form to read: of `variant`, the name of a variant or of a file; else the plain one. Safetensors go
    before pickles.

    A folder without that variant gives its usual form: parts of a model need not all have it. Raises `UserError` where
    it cannot be known which is meant: a whole file beside an index of shards, averaged weights (ema) beside others, two
    variants without a plain form. `where` names the folder.
    """
    if named := [form for form in found if form.name == variant]:
        return named[0]
    best = _best(found)
    if variant in best:
        rivals = best[variant]
    else:
        other = [name for name in best if name and not ("" in best and PRECISION.fullmatch(name))]
        rivals = [form for name in ("", *other) for form in best.get(name, ())]
    if len(rivals) > 1:
        names = [form.name for form in rivals]
        ways = [form.variant if len(best[form.variant]) == 1 and form.variant else form.name for form in rivals]
        raise UserError(
            f"{where} holds {' and '.join(names)}, which need not be the same weights: keep one, or choose with "
            f"--variant {' or --variant '.join(ways)}"
        )
    return rivals[0] if rivals else None


def _best(found: Sequence[Form]) -> dict[str, list[Form]]:
    """The forms of each variant, without pickles where there are others."""
    of = {form.variant: [other for other in found if other.variant == form.variant] for form in found}
    return {variant: [form for form in same if not form.pickled] or same for variant, same in of.items()}


def check_variant(variant: str | None, found: Iterable[Form], where: str) -> None:
    """Raise `UserError` when no folder of a model has the variant, naming the nearest."""
    known = list(found)
    if variant and not any(variant in (form.variant, form.name) for form in known):
        names = sorted({form.variant for form in known if form.variant}) or sorted({form.name for form in known})
        raise unknown(f"variant of {where}", variant, names) if names else UserError(f"{where} holds no weights")


def forms_within(folder: Path) -> list[Form]:
    """The forms of the weights of a model's folder and of its components'."""
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())] if folder.is_dir() else []
    return [form for place in places for form in forms(path.name for path in place.iterdir())]


def read_tensors(folder: str | Path, variant: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a component folder, as views of its mapped files: of the form that `choose` chooses.

    Warns of forms that are left out. Raises `UserError` when there is none or one is damaged.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = forms(names)
    form = choose(found, variant, str(folder))
    if form is None:
        raise UserError(f"{folder} {nothing(names)}")
    more = [other.name for other in found if other is not form]
    if more and variant not in (form.variant, form.name):
        warnings.warn(f"{folder}: {form.name} is read, not {', '.join(more)} (--variant chooses)", stacklevel=2)
    path = folder / form.name
    return _read_sharded(path) if ".index." in path.name else _read_file(path)


def nothing(names: Iterable[str]) -> str:
    """What to say of a folder of files that has no form of weights."""
    names = list(names)
    if shards := [name for name in sorted(names) if variant_of(name) is not None]:
        return (
            f"holds {shards[0]} without the index that says what is in which shard: download the .index.json beside it"
        )
    return foreign.instead(names)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    tensors = torchzip.read(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, np.ndarray) for key, tensor in tensors.items()
    ):
        raise UserError(f"{path} holds more than named tensors; save the model's state_dict alone")
    return tensors


def _read_sharded(index: Path) -> dict[str, np.ndarray]:
    """The tensors of all files that an index names, each of them in the file where the index says it is."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) for name in places.values()
    ):
        raise UserError(f"{index} does not say which file holds which tensor; download it again")
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}: {len(missing)} of the {len(names)} shards that {index.name} "
            "names; download them into it"
        )
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        shard = _read_file(index.parent / name)
        absent = [key for key, place in places.items() if place == name and key not in shard]
        if absent:
            raise UserError(f"{index.parent / name} lacks {absent[0]!a}, which {index.name} promises; download both")
        tensors |= shard
    return tensors
