"""Every network trains alike, whatever splits its state over eight devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_step import distance

from diffjax import build
from diffjax.config.kinds import ddpm, pixels
from diffjax.diffusion import loss, predict, process
from diffjax.diffusion.denoise import Apply
from diffjax.nets.mmdit import MMDiT
from diffjax.parallel import layout
from diffjax.parallel.devices import placement
from diffjax.train import facts, loop, sums
from diffjax.train.experiment import Experiment
from diffjax.train.parallel import by_jit
from diffjax.train.state import create
from diffjax.train.step import Objective, make_step
from diffjax.utils.errors import UserError

STEPS, ROWS = 2, 8
DATA = {"name": "captioned_folder", "size": 8, "channels": 3}
WORDS = {"name": "words", "tokens": 4, "width": 24, "depth": 1, "heads": 2, "hidden": 40, "dtype": "float32"}
CONFIGS = {
    "dit": {
        "text": WORDS,
        "dit": {"patch": 4, "width": 36, "depth": 1, "heads": 3, "hidden": 40, "rank": 5, "dtype": "float32"},
    },
    "imagen": {
        "classes": 3,
        "imagen": {
            **dict(dim=24, mults=(1, 2), blocks=(1, 1), attention=(False, True), cross_attention=(False, False)),
            **dict(heads=3, head_dim=4, groups=4, dtype="float32"),
        },
    },
    "subpixel": {
        "low_res": {"size": 4},
        "subpixel": {"patch": 2, "width": 20, "depth": 2, "groups": 4, "dtype": "float32"},
    },
}
UNET = {
    **dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
    **dict(block_out_channels=(12, 24), layers_per_block=1, attention_head_dim=6, norm_num_groups=4, dtype="float32"),
}
MODES = {"data": 1, "fsdp": 1, "tensor": 1, "both": 1, "fsdp, two copies": 2, "tensor, two copies": 2}
NETWORKS = ("dit", "imagen", "subpixel", "unet", "mmdit")


def optimizer(name):
    """Adam's epsilon is large, since the sign of a gradient that is zero but for rounding is anybody's."""
    adamw = optax.adamw(1e-2, eps=1e-3)
    turn = optax.stateless(lambda updates, _: jax.tree.map(build.orthogonal_kernel, updates))
    by_matrix = optax.chain(optax.trace(0.95, nesterov=True), turn, optax.scale(-1e-2))
    muon = optax.partition({"muon": by_matrix, "adamw": adamw}, build.muon_or_adamw)
    return optax.chain(optax.clip_by_global_norm(0.5), {"adamw": adamw, "muon": muon}[name])


def latents():
    """Flow matching of a transformer of latents, as in fine-tuning."""
    module = MMDiT(
        **dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4),
        **dict(num_attention_heads=3, joint_attention_dim=20, pooled_projection_dim=12, pos_embed_max_size=8),
    )
    shapes = {"image": (ROWS, 8, 8, 4), "context": (ROWS, 3, 20), "pooled": (ROWS, 12)}

    def init(key):
        image, context, pooled = (jnp.zeros(shape) for shape in shapes.values())
        return {"network": module.init(key, image, jnp.zeros(ROWS), context, pooled)["params"]}

    plain = {"weight": loss.plain(), "times": loss.uniform(), "uniforms": loss.antithetic}
    encode = lambda params, cond: cond
    return Objective(process.Flow(), predict.Velocity(), Apply(module), encode, **plain), init, shapes


@functools.cache
def experiment(network):
    """What is trained and its first parameters as a function of a key."""
    if network == "mmdit":
        return latents()
    kind = functools.partial(ddpm, name="toy", data=DATA, train={"batch": ROWS, "steps": STEPS})
    if network == "unet":
        config = kind(network="unet", classes=3, unet=UNET, loss={"drop": 0.2})
    else:
        config = pixels(
            name="toy", data=DATA, train={"batch": ROWS, "steps": STEPS}, network=network, **CONFIGS[network]
        )
    found = Experiment.before_data(config, facts.Blank(4, 30) if network == "dit" else None)
    return found.objective(), found.init, found


def batch_of(network, seed):
    draw = np.random.default_rng(seed)
    _, _, about = experiment(network)
    if network == "mmdit":
        return {name: draw.normal(size=shape).astype(np.float32) for name, shape in about.items()}
    batch = {"image": draw.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)}
    if network == "dit":
        batch |= {"tokens": draw.integers(0, 30, (ROWS, 4)).astype(np.int32), "mask": draw.random((ROWS, 4)) < 0.7}
    return batch | ({"label": draw.integers(0, 3, ROWS).astype(np.int32)} if network in ("imagen", "unet") else {})


def trained(network, name, accumulate=1, mode="data", replicas=1, devices=None, offload=False):
    """The state after a few steps, the losses, and the number of bytes of the first state on each device."""
    aim, init, _ = experiment(network)
    mesh, update = layout.mesh(mode, replicas, devices), optimizer(name)
    parallel = by_jit(make_step(aim, update, 0.9, accumulate), mesh, layout.RULES[mode], offload)
    state = parallel.create(lambda key: create(init(key), update, jax.random.key(1)), jax.random.key(0))
    held, losses = held_by_each(state), []
    for seed in range(STEPS):
        state, metrics = parallel.step(state, parallel.feed(batch_of(network, seed)))
        losses.append(float(metrics["loss"]))
    assert held_by_each(state) == held
    return jax.device_get(state.replace(key=None)), losses, held


def held_by_each(state):
    leaves = [leaf for leaf in jax.tree.leaves(state.replace(key=None)) if not is_hosted(leaf)]
    return max(sum(leaf.addressable_data(i).nbytes for leaf in leaves) for i in range(len(leaves[0].devices())))


@functools.cache
def alone(network, name):
    return trained(network, name, devices=tuple(jax.devices()[:1]))


SPACE = [
    (network, name, accumulate, mode)
    for (network, mode), (name, accumulate) in zip(
        itertools.product(NETWORKS, MODES), itertools.cycle([("adamw", 1), ("muon", 2), ("adamw", 2), ("muon", 1)])
    )
]
"""Every network in every mode, with optimizers and micro-batches in turn."""


@pytest.mark.parametrize(
    "network, name, accumulate, mode",
    [case if case[::3] == ("dit", "both") else pytest.param(*case, marks=pytest.mark.slow) for case in SPACE],
)
def test_eight_devices_agree_with_one(network, name, accumulate, mode):
    expected, losses, whole = alone(network, name)
    state, again, held = trained(network, name, accumulate, mode.partition(",")[0], MODES[mode])
    assert distance(state.params, expected.params) < 1e-6
    assert distance(state.ema, expected.ema) < 1e-6
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    if (network, mode) in (("imagen", "fsdp"), ("imagen", "both"), ("dit", "both")):  # it divides most arrays
        assert held < 0.2 * whole


def test_what_lies_in_the_memory_of_hosts_is_trained_alike():
    expected, losses, whole = alone("dit", "muon")
    state, again, held = trained("dit", "muon", 1, "fsdp", offload=True)
    assert distance(state, expected.replace(key=None)) < 1e-6
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    assert held < 0.2 * whole / 2  # an average and a moment of each parameter are elsewhere


def test_a_state_in_the_memory_of_hosts_is_fetched_for_what_reads_it():
    update, weights = optimizer("adamw"), {"network": {"q": {"kernel": jnp.arange(32.0).reshape(4, 8)}}}
    mesh = layout.mesh("fsdp", 1, jax.devices()[:4])
    parallel = by_jit(lambda state, batch: (state, {}), mesh, layout.RULES["fsdp"], offload=True)
    made = parallel.create(lambda: create(weights, update, jax.random.key(3)))
    for state in (made, parallel.place(jax.device_get(made.replace(key=None)).replace(key=made.key))):
        hosted = {is_hosted(leaf): leaf.ndim for leaf in jax.tree.leaves(state.optimizer)}
        assert hosted == {True: 2, False: 0} and all(map(is_hosted, jax.tree.leaves(state.ema)))
        assert not any(map(is_hosted, jax.tree.leaves((state.params, parallel.own(state.ema)))))
        assert sums.by_place(state.ema) == sums.by_place(weights)


def is_hosted(leaf):
    return layout.is_hosted(leaf.sharding)


def test_pairs_of_products_are_split_by_outputs_then_inputs():
    place = placement(layout.RULES["tensor"], layout.mesh("tensor"))
    blocks = {"attention/q": P(None, None, "model"), "attention/out": P(None, "model", None)}
    blocks |= {"mlp/up": P(None, None, "model"), "mlp/down": P(None, "model", None), "adapt_in": P()}
    for name, spec in blocks.items():
        for tree in ("params", "ema", "optimizer/1/0/mu"):
            assert place(f"{tree}/network/blocks/{name}/kernel", (2, 16, 16)).spec == spec
    assert place("params/network/down_blocks_0/resnets_0/conv1/kernel", (3, 3, 4, 16)).spec[-1] == "model"
    assert place("params/network/blocks/attention/q/kernel", (2, 16, 12)).spec == P()


@pytest.mark.parametrize(
    "mode, replicas, shape",
    [
        ("data", 1, (8, 1, 1)),
        ("fsdp", 1, (1, 8, 1)),
        ("fsdp", 2, (2, 4, 1)),
        ("tensor", 2, (2, 1, 4)),
        ("both", 1, (1, 4, 2)),
    ],
)
def test_the_mesh_of_a_mode(mode, replicas, shape):
    found = layout.mesh(mode, replicas)
    assert tuple(found.shape.values()) == shape
    assert layout.parts(found) == shape[0] * shape[1] and layout.share(found) == (0, 1)


@pytest.mark.parametrize(
    "mode, replicas, number, message",
    [
        ("data", 2, 8, "leave train.replicas at 1, or take fsdp"),
        ("fsdp", 3, 8, "train.replicas=3 does not divide 8 devices: choose a divisor"),
        ("both", 1, 7, "cannot split 7 devices in two ways: take fsdp or tensor"),
        ("both", 4, 8, "cannot split 2 devices in two ways"),
    ],
)
def test_what_a_mesh_cannot_be_is_refused(mode, replicas, number, message):
    with pytest.raises(UserError, match=message):
        layout.mesh(mode, replicas, jax.devices()[:number])


@pytest.mark.parametrize("mode", layout.RULES)
def test_what_is_placed_lies_where_it_is_made(mode):
    """A state that is read from a checkpoint, as one that is made here; two devices would divide the bits of a key."""
    update, weights = optimizer("adamw"), {"network": {"q": {"kernel": jnp.arange(32.0).reshape(4, 8)}}}
    parallel = by_jit(lambda state, batch: (state, {}), layout.mesh(mode, 1, jax.devices()[:4]), layout.RULES[mode])
    made = parallel.create(lambda: create(weights, update, jax.random.key(3)))
    again = parallel.place(jax.device_get(made.replace(key=None)).replace(key=made.key))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), made, again))
    assert distance(jax.device_get(again.params), jax.device_get(weights)) == 0 and jax.random.key_data(
        again.key
    ).tolist() == [0, 3]


def test_what_keeps_nothing_in_the_memory_of_hosts_is_refused(monkeypatch):
    config = pixels(name="toy", data=DATA, train={"batch": 8, "steps": 1, "parallel": "pmap", "offload": True})
    with pytest.raises(UserError, match="keeps nothing in the memory of hosts: set train.parallel=jit"):
        loop.mesh(config)
    config.train.parallel = "jit"
    assert loop.mesh(config).size == 8
    monkeypatch.setattr(layout, "HOST", "memory of none")
    with pytest.raises(UserError, match="reaches no memory of its host: set train.offload=False"):
        loop.mesh(config)


def test_pmap_splits_no_state():
    config = pixels(name="toy", data=DATA, train={"batch": 8, "steps": 1, "parallel": "pmap", "shard": "fsdp"})
    with pytest.raises(UserError, match="train.parallel=pmap cannot split a state .*: set train.parallel=jit"):
        loop.mesh(config)
