"""Files of random adapters as programs write them, and in float64 the weights that each makes of a checkpoint's."""

import functools
import math
from typing import NamedTuple

import numpy as np
import sd3_folder
from flax import traverse_util

from diffjax.nets import lora
from diffjax.weights.lora_names import linear

MODULE = sd3_folder.TRANSFORMERS["medium"]

# What single files call layers of MODULE, and the layers of diffusers that these are. `~`: the halves change places.
SINGLE = {
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "joint_blocks.1.x_block.attn2.qkv": [f"transformer_blocks.1.attn2.to_{x}" for x in "qkv"],
    "joint_blocks.2.context_block.attn.qkv": [f"transformer_blocks.2.attn.add_{x}_proj" for x in "qkv"],
    "joint_blocks.2.x_block.attn.proj": ["transformer_blocks.2.attn.to_out.0"],
    "joint_blocks.0.x_block.attn2.proj": ["transformer_blocks.0.attn2.to_out.0"],
    "joint_blocks.1.context_block.attn.proj": ["transformer_blocks.1.attn.to_add_out"],
    "joint_blocks.1.x_block.mlp.fc1": ["transformer_blocks.1.ff.net.0.proj"],
    "joint_blocks.2.x_block.mlp.fc2": ["transformer_blocks.2.ff.net.2"],
    "joint_blocks.0.context_block.mlp.fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
    "joint_blocks.0.x_block.adaLN_modulation.1": ["transformer_blocks.0.norm1.linear"],
    "joint_blocks.1.context_block.adaLN_modulation.1": ["transformer_blocks.1.norm1_context.linear"],
    "joint_blocks.2.context_block.adaLN_modulation.1": ["~transformer_blocks.2.norm1_context.linear"],
    "final_layer.adaLN_modulation.1": ["~norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}


class Naming(NamedTuple):
    """How a program writes: what begins a key, whether layers are a single file's, how they are joined, and
    the endings.
    """

    prefix: str
    single: bool
    dot: str
    a: str
    b: str
    alpha: bool = False


NAMINGS = {
    "diffusers": Naming("transformer.", False, ".", "lora_A.weight", "lora_B.weight"),
    "diffusers_bare": Naming("", False, ".", "lora_A.weight", "lora_B.weight"),
    "diffusers_old": Naming("transformer.", False, ".", "lora.down.weight", "lora.up.weight", True),
    "down_up": Naming("transformer.", False, ".", "down.weight", "up.weight"),
    "peft": Naming("base_model.model.", False, ".", "lora_A.weight", "lora_B.weight"),
    "peft_named": Naming("base_model.model.", False, ".", "lora_A.default.weight", "lora_B.default.weight"),
    "peft_within": Naming("transformer.base_model.model.", False, ".", "lora_A.weight", "lora_B.weight"),
    "onetrainer": Naming("lora_transformer_", False, "_", "lora_down.weight", "lora_up.weight", True),
    "lycoris": Naming("lycoris_", False, "_", "lora_down.weight", "lora_up.weight", True),
    "kohya": Naming("lora_unet_", True, "_", "lora_down.weight", "lora_up.weight", True),
    "comfy": Naming("diffusion_model.", True, ".", "lora_A.weight", "lora_B.weight", True),
    "comfy_whole": Naming("model.diffusion_model.", True, ".", "lora_down.weight", "lora_up.weight", True),
    "comfy_diffusers": Naming("diffusion_model.", False, ".", "lora_A.weight", "lora_B.weight"),
}


class Change(NamedTuple):
    """What an adapter makes of a weight (o, i), in float64."""

    delta: np.ndarray
    magnitude: np.ndarray | None = None

    def __call__(self, weight, strength=1.0):
        rows, columns = self.delta.shape  # heads of zeros may follow
        own = np.asarray(weight, np.float64)[:rows, :columns]
        whole = own + self.delta
        if self.magnitude is not None:
            whole = self.magnitude[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        made = np.array(weight, np.float64)
        made[:rows, :columns] += strength * (whole - own)
        return made


def widths(module=MODULE):
    """Outputs and inputs of every linear layer."""
    return {
        key.removesuffix(".weight"): row.leaf.shape[-2:][::-1] for row in linear(module).values() for key in row.keys
    }


def write(naming, seed=0, dora=False, module=MODULE):
    """The tensors of a file, ranks of 1 to 4 and random alphas in it, and the changes by the layers of diffusers."""
    random, size = np.random.RandomState(seed), widths(module)
    tensors, changes = {}, {}
    layers = (
        SINGLE if naming.single else {name.strip("~"): [name.strip("~")] for names in SINGLE.values() for name in names}
    )
    for layer, ours in layers.items():
        outputs, inputs = size[ours[0].strip("~")]
        rank, outputs = random.randint(1, 5), outputs * len(ours)
        a, b = random.standard_normal((rank, inputs)), random.standard_normal((outputs, rank)) / math.sqrt(inputs)
        a, b = a.astype(np.float32), b.astype(np.float32)
        stem = naming.prefix + layer.replace(".", naming.dot)
        tensors |= {f"{stem}.{naming.a}": a, f"{stem}.{naming.b}": b}
        scale = 1.0
        if naming.alpha:
            tensors[f"{stem}.alpha"] = np.float32(random.choice([0.5, 1, 3])).reshape((1,) * random.randint(0, 2))
            scale = tensors[f"{stem}.alpha"].item() / rank
        delta, magnitude = scale * (b.astype(np.float64) @ a), None
        if dora and random.randint(4):
            magnitude = random.uniform(0.5, 2, outputs).astype(np.float32)
            if "lora_A" in naming.a:
                tensors[f"{stem}.lora_magnitude_vector{naming.a.removeprefix('lora_A')}"] = magnitude
            else:
                tensors[f"{stem}.dora_scale"] = magnitude[:, None]
        for i, name in enumerate(ours):
            cut = functools.partial(_part, name, i, len(ours))
            changes[name.strip("~")] = Change(cut(delta), None if magnitude is None else cut(magnitude))
    return tensors, changes


def _part(name, i, count, rows):
    """The rows of the i-th of the `count` layers that a file joins; for a name with `~`, its halves swapped."""
    return np.concatenate(np.split(rows, 2)[::-1]) if name[0] == "~" else np.split(rows, count)[i]


def kernels(params, module=MODULE):
    """What linear layers multiply by, (o, i) by the layers of diffusers, whatever the parameters are kept in; with an
    adapter `gain W + A scale B`, in float64.
    """
    leaves, found = traverse_util.flatten_dict(params, sep="/"), {}
    number = lambda leaf: np.asarray(leaf, np.float64)
    for path, row in linear(module).items():
        leaf = leaves[path]
        whole = number((leaf.kernel if isinstance(leaf, lora.LowRank) else leaf).astype(np.float32))
        if isinstance(leaf, lora.LowRank):
            adapter = leaf.adapter
            gain = 1 if adapter.gain is None else number(adapter.gain)[..., None, :]
            whole = gain * whole + number(adapter.a) * number(adapter.scale)[..., None, :] @ number(adapter.b)
        found |= {
            key.removesuffix(".weight"): layer.T for key, layer in zip(row.keys, whole if row.stacked else whole[None])
        }
    return found


def wrong(params, before, changes, strengths=None):
    """The largest error of a kernel, relative to its largest number, against all `changes` of those `before`."""
    strengths = strengths or [1.0] * len(changes)
    worst = 0.0
    for layer, kernel in kernels(params).items():
        of_layer = [(made[layer], strength) for made, strength in zip(changes, strengths) if layer in made]
        expected = before[layer] + sum(change(before[layer], strength) - before[layer] for change, strength in of_layer)
        worst = max(worst, np.abs(kernel - expected).max() / np.abs(expected).max())
    return worst
