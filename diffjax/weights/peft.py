"""What PEFT's `LoraConfig` says of adapters: the scale of each layer, and what would make them something else.

diffusers writes it into the header of its files, as JSON under `lora_adapter_metadata`, its fields named
`transformer.lora_alpha`, `text_encoder.lora_alpha` or without a component; PEFT writes `adapter_config.json`
beside them.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffjax.utils.errors import UserError
from diffjax.weights import safetensors
from diffjax.weights.config import read_json

METADATA = "lora_adapter_metadata"
CONFIG = "adapter_config.json"

SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
# How adapters were trained, not what they compute. `bias` and `modules_to_save` are tensors, which are refused by name.
TRAINED = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
    ),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *(
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "modules_to_tie",
        "peft_type",
        "peft_version",
        "qalora_group_size",
    ),
    *("revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices"),
)
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
"""The values of `init_lora_weights` that leave the base's weights as they are."""

LARGE = 1e9
PATTERN = r"(?!.*\)[*+])(?!([^(*+]*[(*+]){4})[\w^$.|()\\*+-]{1,300}"
"""A pattern of layers' names that cannot take long to match: at most three groups or repetitions, no repeated group."""


@dataclass(frozen=True)
class Settings:
    """The fields for one component of the file `source`; none of them where it says nothing."""

    fields: Mapping[str, Any]
    source: Path

    def __post_init__(self):
        kind, begun = self.fields.get("peft_type", "LORA"), self.fields.get("init_lora_weights")
        if kind != "LORA":
            raise UserError(f"{self.source} holds adapters of type {kind!a}: only LORA and DoRA are read")
        if begun not in BEGINNINGS:
            raise UserError(
                f"{self.source}: init_lora_weights = {begun!a} changes the weights that adapters are added to: save "
                "them for the original weights (PEFT's path_initial_model_for_weight_conversion)"
            )
        if wrong := next(
            (name for name, value in self.fields.items() if value and name not in (*SCALES, *TRAINED)), None
        ):
            raise UserError(f"{self.source}: the adapters' field {wrong!a} is not implemented")

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """alpha / r, with rank-stabilised adapters (arXiv:2312.03732) alpha / sqrt(r), for a layer of that rank; 1
        where nothing says alpha. `alpha` is what the layer's own tensor says.

        Raises `UserError` where this is of other adapters.
        """
        if not self.fields:
            return 1.0 if alpha is None else alpha / rank
        said = self._number("rank_pattern", "r", layer)
        if said != rank:
            raise UserError(
                f"{self.source} says r = {said:g} of {layer!a}, and its tensors have rank {rank}: download both again"
            )
        stable = self.fields.get("use_rslora")
        scale = self._number("alpha_pattern", "lora_alpha", layer) / (math.sqrt(rank) if stable else rank)
        if alpha is not None and not math.isclose(scale, alpha / rank, rel_tol=1e-3):
            own = alpha / rank
            raise UserError(
                f"{self.source} says two scales of {layer!a}: {scale:g} in its settings, {own:g} by its alpha"
            )
        return scale

    @property
    def needed(self) -> list[str]:
        """The tensors that every layer must have."""
        more = {"magnitude": "use_dora", "bias": "lora_bias"}
        return ["a", "b", *(kind for kind, field in more.items() if self.fields.get(field))]

    def _number(self, patterns: str, common: str, layer: str) -> float:
        """What the first pattern that matches the end of a layer's name has, else the value for all."""
        table = self.fields.get(patterns) or {}
        if not isinstance(table, dict):
            raise UserError(f"{self.source}: {patterns} is no table of layers")
        value = next((table[pattern] for pattern in table if self._matches(pattern, layer)), self.fields.get(common))
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGE:
            raise UserError(
                f"{self.source}: {common} of {layer!a} is {json.dumps(value)[:40]}, which is no sensible number"
            )
        return value

    def _matches(self, pattern: str, layer: str) -> bool:
        try:
            if not re.fullmatch(PATTERN, pattern):
                raise re.error("it has too many groups or repetitions, or characters that no name has")
            return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None
        except re.error as error:
            raise UserError(
                f"{self.source}: {pattern[:60]!a} is no pattern of layers that can be read: {error}"
            ) from error


def read_settings(path: Path, components: Iterable[str]) -> dict[str, Settings]:
    """The settings of a file of adapters, by component.

    Raises `UserError` where they are damaged, or of other components.
    """
    source, said = _said(path)
    if not isinstance(said, dict):
        raise UserError(f"the metadata of {path} do not say alpha as diffusers does: {METADATA} is no JSON object")
    split = {name: name.rpartition(".") for name in said}
    known = list(components)
    if wrong := next((whose for whose, _, _ in split.values() if whose and whose not in known), None):
        raise UserError(
            f"{source} says how {wrong!a} was adapted, which diffjax does not know: it may be {', '.join(known)}"
        )
    fields = lambda whose: {field: said[name] for name, (of, _, field) in split.items() if of in ("", whose)}
    return {name: Settings(fields(name), source) for name in known}


def config_of(path: Path) -> Path | None:
    """The `adapter_config.json` that is beside a file."""
    beside = path.parent / CONFIG
    return beside if beside.is_file() else None


def _said(path: Path) -> tuple[Path, Any]:
    """The settings' file and content: the header where it says them, else what lies beside."""
    text = safetensors.metadata(path).get(METADATA)
    if text is not None:
        try:
            return path, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the metadata of {path} do not say alpha as diffusers does: {error}") from error
    beside = config_of(path)
    return (path, {}) if beside is None else (beside, read_json(beside))
