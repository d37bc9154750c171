"""Damaged and hostile files: each is read, or refused by one clear line, and its memory is bounded by its size."""

import copy
import json
import random
import tracemalloc

import jax
import numpy as np
import pytest
import sd3_folder
import torchfile

from diffjax import weights
from diffjax.nets.unet import UNet
from diffjax.utils.errors import UserError
from diffjax.weights import lora, safetensors, torchzip, unet2d
from diffjax.weights.folder import read_tensors
from diffjax.weights.peft import METADATA
from diffjax.weights.scheduler import Scheduler, read_scheduler, write_scheduler

MANY = pytest.mark.parametrize("rounds", [150, pytest.param(10_000, marks=pytest.mark.slow)])
TENSORS = {f"layers.{i}.weight": np.arange(12, dtype=np.float32).reshape(3, 4) + i for i in range(4)}
VALUES = [None, True, False, -1, 0, 1, 2, 3, 8, 10**9, 2**63, 10**400, 0.5, -1e308, 1e-3, float("nan"), float("inf")]
VALUES += ["", "silu", "F64", "BF16", "default", "\ud800", "x" * 300, [], [1], [8, 8], [2**62, 2**62], {}, [[[]]]]
VALUES += ["AttnDownBlock2D", "linear", "v_prediction"]
MODULE = UNet(
    block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
)


def outcome(read, *arguments):
    """What `read` returns, or None when it refuses with one line; any other error passes through."""
    try:
        return read(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error).encode()) < 2000
        return None


def damaged(draw, data):
    """The bytes with one to three things done to them."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(data) + 1), draw.choice([1, 1, 2, 4, 8, 40])
        part = data[at : at + length]
        noise = draw.randbytes(len(part))
        extreme = draw.choice([b"\0", b"\xff", b"\x7f"]) * len(part)
        data[at : at + length] = draw.choice([noise, extreme, b"", part * 3, noise + part, part[::-1]])
        if draw.random() < 0.1:
            del data[at:]
    return bytes(data)


def nodes(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


def altered(draw, value):
    """A JSON value with one or two of its nodes replaced, removed, renamed or repeated."""
    value = {"root": copy.deepcopy(value)}
    for _ in range(draw.randint(1, 2)):
        path = draw.choice([path for path in nodes(value) if path])
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw.choice(["replace", "replace", "remove", "rename"])
        if kind == "remove" and len(path) > 1:
            del parent[path[-1]]
        elif kind == "rename" and isinstance(parent, dict) and len(path) > 1:
            parent[draw.choice(["new", "dtype", "_x", "norm_eps"])] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    return value["root"]


def reads_within(path, read):
    """Reads the file; the peak of memory is bounded by its size."""
    tracemalloc.start()
    try:
        outcome(read, path)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 100 * path.stat().st_size
    finally:
        tracemalloc.stop()


@MANY
def test_safetensors(tmp_path, rounds):
    path = tmp_path / "model.safetensors"
    safetensors.write(path, TENSORS, {"format": "pt"})
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header, rest = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    for seed in range(rounds):
        draw = random.Random(seed)
        if seed % 2:
            text = json.dumps(altered(draw, header)).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        else:
            path.write_bytes(damaged(draw, sound[: 8 + length]) + rest)
        reads_within(path, safetensors.read)


@MANY
@pytest.mark.filterwarnings("ignore:invalid escape")
def test_pickles(tmp_path, rounds):
    path = tmp_path / "model.bin"
    storages = dict(zip("0123", TENSORS.values()))
    state = {name: torchfile.tensor(key, array) for (key, array), name in zip(storages.items(), TENSORS)}
    program = torchfile.dumps(state)
    torchfile.write(path, program, storages)
    sound = path.read_bytes()
    for seed in range(rounds):
        draw = random.Random(seed)
        if seed % 2:
            torchfile.write(path, damaged(draw, program), storages)
        else:
            path.write_bytes(damaged(draw, sound))
        reads_within(path, torchzip.read)


@MANY
def test_unet_configurations(tmp_path, rounds):
    shapes = weights.param_shapes(MODULE, unet2d.FORMAT)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    weights.save(tmp_path, MODULE, params)
    sound, seen = unet2d.FORMAT.config(MODULE), set()
    for seed in range(rounds):
        (tmp_path / "config.json").write_text(json.dumps(altered(random.Random(seed), sound)))
        found = outcome(lambda: unet2d.FORMAT.module(weights.read_json(tmp_path / "config.json"), "config.json"))
        if found is not None and found not in seen:
            seen.add(found)
            outcome(weights.load, tmp_path)


@MANY
def test_scheduler_configurations(tmp_path, rounds):
    write_scheduler(tmp_path, Scheduler(trained_betas=(0.1, 0.2, 0.3), num_train_timesteps=3))
    path = tmp_path / "scheduler" / "scheduler_config.json"
    sound = [json.loads(path.read_text()), {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}]
    for seed in range(rounds):
        path.write_text(json.dumps(altered(random.Random(seed), sound[seed % 2])))
        found = outcome(read_scheduler, tmp_path)
        assert found is None or np.all(np.isfinite(found.betas()))


@MANY
def test_indices_of_shards(tmp_path, rounds):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = list(TENSORS)
    for name, part in zip(names, (keys[:2], keys[2:])):
        safetensors.write(tmp_path / name, {key: TENSORS[key] for key in part})
    sound = {"metadata": {"total_size": 1}, "weight_map": {key: names[i // 2] for i, key in enumerate(keys)}}
    for seed in range(rounds):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(altered(random.Random(seed), sound)))
        outcome(read_tensors, tmp_path)


@MANY
def test_adapters(tmp_path, rounds):
    """A file's header and its settings changed at random; what is read is finite."""
    path, draw = tmp_path / "some.safetensors", np.random.RandomState(0)
    tensors = {}
    for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_k", "proj_out"):
        a, b = draw.standard_normal((2, 2, 16)).astype(np.float32)
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b.T}
    tensors |= {
        "transformer.proj_out.alpha": np.float32(2),
        "transformer.proj_out.dora_scale": np.ones((16, 1), np.float32),
    }
    said = {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,
        "transformer.alpha_pattern": {"to_q": 1.5},
        "transformer.use_rslora": False,
    }
    safetensors.write(path, tensors, {"format": "pt", METADATA: json.dumps(said)})
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header, rest, read_some = json.loads(sound[8 : 8 + length]), sound[8 + length :], 0
    for seed in range(rounds):
        draw, changed = random.Random(seed), copy.deepcopy(header)
        if seed % 3 == 0:
            changed["__metadata__"][METADATA] = json.dumps(altered(draw, said))
        elif seed % 3 == 1:
            changed = altered(draw, header)
        text = json.dumps(changed).encode() if seed % 3 < 2 else damaged(draw, sound[8 : 8 + length])
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        found = outcome(lora.read, path, {"transformer": sd3_folder.TRANSFORMERS["medium"]})
        read_some += found is not None
        plain = [getattr(one, "adapter", one) for of in (found or {}).values() for one in of.values()]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    assert read_some > rounds / 20
