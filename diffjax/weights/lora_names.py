"""What programs call the tensors of low-rank adapters: which layer of which component, and which of its tensors, a
key means.

A key is a component's prefix, a layer, and an ending. Layers have the names of diffusers' and transformers' modules, or
those of single files of SD3 (`single_file`), whose `qkv` are three layers here; with dots, or all `_` as kohya
writes them.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from flax import linen as nn

from diffjax.nets.mmdit import MMDiT
from diffjax.weights import names_of, shapes
from diffjax.weights.names import DENSE, Row, table
from diffjax.weights.single_file import Place, transformer_place

PREFIXES = {
    "text_encoder": r"text_encoder\.|text_encoders\.clip_l\.transformer\.|lora_te1_",
    "text_encoder_2": r"text_encoder_2\.|text_encoders\.clip_g\.transformer\.|lora_te2_",
    "text_encoder_3": r"text_encoder_3\.|text_encoders\.t5xxl\.transformer\.|lora_te3_",
    "transformer": r"transformer\.|(model\.)?diffusion_model\.|lora_(unet|transformer)_|lycoris_|",
}
"""How the keys of a component begin: in diffusers' files, in ComfyUI's, in those of kohya, OneTrainer and LyCORIS."""

WRAPPER = "base_model.model."
"""What PEFT puts before, or between prefix and layer."""

ENDS = {
    "bias": r"(lora_B|lora_up)(\.\w+)?\.bias",
    "a": r"(lora_A|lora_down|((lora|lora_linear_layer)\.)?down)(\.\w+)??(\.weight)?",
    "b": r"(lora_B|lora_up|((lora|lora_linear_layer)\.)?up)(\.\w+)??(\.weight)?",
    "magnitude": r"(lora_magnitude_vector(\.\w+)??(\.weight)?|dora_scale)",
    "alpha": r"alpha",
}
"""How keys end: B's bias, A, B, DoRA's magnitudes, alpha. PEFT may put the adapter's name between."""


class Meaning(NamedTuple):
    """What a key says: the component, its layer in the file's own words, and which tensor of it, a key of `ENDS`."""

    component: str
    layer: str
    kind: str


class Part(NamedTuple):
    """One layer of a leaf of ours, and its place in what a file calls one layer."""

    row: Row
    index: int
    place: Place


def meaning(key: str) -> Meaning | None:
    """What a tensor's name means, None where it is of no known form."""
    bare = key.replace(WRAPPER, "")
    for kind, end in ENDS.items():
        if found := re.fullmatch(rf"(?P<layer>.+?)[._]{end}", bare):
            component, prefix = next(
                (name, begin) for name, start in PREFIXES.items() if (begin := re.match(start, bare))
            )
            return Meaning(component, found["layer"][prefix.end() :], kind)
    return None


def plain(layer: str) -> str:
    """A layer's name as kohya writes it, which tells no dots from underscores."""
    return layer.replace(".", "_")


def linear(module: nn.Module) -> dict[str, Row]:
    """The kernels that can have an adapter, by path."""
    return {row.path: row for row in table(shapes(module), names_of(module)) if row.layout is DENSE}


def parts(module: nn.Module) -> Mapping[str, list[Part]]:
    """What each `plain` name of a layer is here."""
    found: dict[str, list[Part]] = {}
    for row in linear(module).values():
        for index, key in enumerate(row.keys):
            places = {
                Place(key),
                transformer_place(key, module.num_layers) if isinstance(module, MMDiT) else Place(key),
            }
            for place in places:
                found.setdefault(plain(place.key.removesuffix(".weight")), []).append(Part(row, index, place))
    return found
