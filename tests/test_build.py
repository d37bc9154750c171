import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import build
from diffjax.diffusion import predict, process
from diffjax.diffusion.denoise import Denoiser
from diffjax.diffusion.refine import heun
from diffjax.diffusion.sample import Sampler
from diffjax.models.model import Model
from diffjax.utils.errors import UserError

MUON = {"name": "muon", "learning_rate": 0.02, "adam_learning_rate": 2e-3, "weight_decay": 0.01}
ADAMW = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}
EPS = np.finfo(np.float32).eps
CONSTANT = {"clip": 1.0, "schedule": {"name": "linear", "warmup": 0, "hold": 1.0, "final": 1.0}}


def test_choices_become_objects():
    assert build.process({"name": "flow"}) == process.Flow()
    assert build.process({"name": "flow", "shift": 3.0}) == process.Shift(process.Flow(), 3.0)
    assert build.process({"name": "exploding", "sigma_max": 9.0}).sigma_max == 9.0
    table = build.process({"name": "discrete", "betas": "squared_cosine", "steps": 10, "zero_terminal_snr": True})
    assert table.steps == 10 and table.alpha2[-1] == 0
    assert build.prediction({"name": "edm", "sigma_data": 1.0}) == predict.EDM(1.0)
    assert build.make("weight", build.WEIGHTS, {"name": "plain"})(None, jnp.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: build.process({"name": "flwo"}), "unknown process flwo: did you mean flow"),
        (lambda: build.process({"name": "exploding", "sigma_mx": 1.0}), "did you mean sigma_max"),
        (lambda: build.process({"name": "flow", "rate": 1.0}), "unknown field of process flow rate"),
        (lambda: build.process({"name": "discrete", "betas": "linaer"}), "did you mean linear"),
        (lambda: build.make("weight", build.WEIGHTS, {"name": "min_snr", "gama": 5.0}), "did you mean gamma"),
        (lambda: build.sampler("dpmpp2m"), "unknown sampler dpmpp2m: did you mean dpmpp_2m"),
        (lambda: build.sampler("unipc", eta=0.5), "unipc is deterministic"),
        (lambda: build.grid("karas", process.Flow(), 5), "did you mean karras"),
        (lambda: build.grid("trailing", process.Flow(), 5), "Flow has none: take uniform"),
        (lambda: build.network({"network": "uunet", "classes": 0}), "did you mean unet"),
        (lambda: build.network({"network": "dit", "classes": 0, "dit": {"widht": 8}}), "did you mean width"),
        (lambda: build.network({"network": "dit", "classes": 0, "dit": {"dtype": "bf16"}}), "did you mean bfloat16"),
        (lambda: build.optimizer({**CONSTANT, **ADAMW, "name": "adam"}, 10), "did you mean adamw"),
        (
            lambda: build.optimizer({**CONSTANT, **ADAMW, "momentum": 0.9}, 10),
            "unknown field of optimizer adamw momentum",
        ),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest(wrong, said):
    with pytest.raises(UserError, match=said):
        wrong()


def test_samplers():
    assert build.sampler("ddpm").eta == 1.0 and build.sampler("ddim").eta == 0.0
    assert build.sampler("ddpm", eta=0.3).eta == 0.3 and build.sampler("unipc", eta=0.0).eta == 0.0
    assert build.sampler(heun("flow")) == Sampler(heun("flow"))
    assert build.sampler(build.SAMPLERS["euler"]) is build.SAMPLERS["euler"]


@pytest.mark.parametrize("name", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize(
    "of", [process.Flow(), process.Cosine(), process.Linear(), process.discrete(process.linear_betas())]
)
def test_grids_run_from_noise_to_image(name, of):
    grid = build.grid(name, of, 7)
    assert grid.shape == (7, 2)
    assert np.array_equal(grid[1:, 0], grid[:-1, 1]) and np.all(np.diff(grid) < 0)
    assert grid[0, 0] == 1 and grid[-1, 1] == 0


def test_grids_of_a_table_and_of_the_user():
    assert build.grid("trailing", process.discrete(process.linear_betas()), 4)[0, 0] == 1
    own = np.array([[1.0, 0.5], [0.5, 0.0]])
    assert np.array_equal(build.grid(own, process.Flow(), 9), own)


def labels(params):
    paths = jax.tree_util.tree_leaves_with_path(build.muon_or_adamw(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): label for path, label in paths}


def inputs(channels=3):
    x = jnp.zeros((1, 16, 16, channels))
    return dict(
        x=x, t=jnp.zeros(1), context=jnp.zeros((1, 4, 8)), mask=jnp.ones((1, 4), bool), pooled=jnp.zeros((1, 8))
    )


def test_muon_takes_the_matrices_of_the_transformers_blocks_and_nothing_else():
    module = build.network(
        {"network": "dit", "classes": 0, "dit": dict(patch=8, width=32, depth=3, heads=2, hidden=48, rank=4)},
        context_width=8, pooled_width=8,
    )  # fmt: skip
    params = jax.eval_shape(module.init, jax.random.key(0), **inputs())["params"]
    taken = {name for name, label in labels(params).items() if label == "muon"}
    assert taken == {
        f"blocks/{name}/kernel"
        for name in ("attention/q", "attention/k", "attention/v", "attention/out", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert params["blocks"]["attention"]["q"]["kernel"].ndim == 3


def test_muon_takes_the_convolutions_of_the_u_nets_blocks():
    module = build.network(
        {
            "network": "unet",
            "classes": 3,
            "unet": {
                "block_out_channels": [8, 16],
                "norm_num_groups": 4,
                "layers_per_block": 1,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            },
        }
    )
    x = inputs()
    params = jax.eval_shape(module.init, jax.random.key(0), x["x"], x["t"], label=jnp.zeros(1, jnp.int32))["params"]
    left = [name for name, label in labels(params).items() if label == "adamw" and name.endswith("kernel")]
    assert left and all("time_emb" in name or "embed" in name or name.startswith("conv_") for name in left)
    assert labels(params)["down_blocks_0/resnets_0/conv1/kernel"] == "muon"


@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_first_step_of_muon_is_that_of_optax(dtype, near):
    params = {"blocks": {"conv": {"kernel": jnp.zeros((3, 3, 8, 24))}, "out": {"kernel": jnp.zeros((2, 32, 16))}}}
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    axes = optax.contrib.MuonDimensionNumbers
    axes = {"blocks": {"conv": {"kernel": axes((0, 1, 2), 3)}, "out": {"kernel": axes(1, 2)}}}
    updates = []
    for optimizer in (
        build.optimizer(CONSTANT | MUON | {"clip": 0.0, "dtype": dtype}, 10)[0],
        optax.contrib.muon(0.02, muon_weight_dimension_numbers=axes),
    ):
        updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    for ours, theirs in zip(*map(jax.tree.leaves, updates)):
        assert jnp.linalg.norm(ours - theirs) < near * jnp.linalg.norm(theirs)


def test_muon_orthogonalises_each_layer_of_a_scanned_kernel():
    optimizer, _ = build.optimizer(CONSTANT | MUON, 10)
    params = {"blocks": {"out": {"kernel": jnp.zeros((3, 8, 8))}}, "head": {"kernel": jnp.zeros((8, 8))}}
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for layer in updates["blocks"]["out"]["kernel"]:
        values = np.linalg.svd(layer / 0.02, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.3
    assert np.allclose(np.abs(updates["head"]["kernel"]), 2e-3, rtol=1e-3)


@pytest.mark.parametrize("scale, expected", [(1e4, 1.0), (1e-3, 1e-3)])
def test_clipping_clips_the_global_norm(scale, expected):
    optimizer, _ = build.optimizer(CONSTANT | ADAMW | {"b1": 0.0}, 10)
    params = {"a": {"kernel": jnp.zeros((4, 4))}, "b": {"bias": jnp.zeros(4)}}
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    gradients = jax.tree.map(lambda x: scale * x / optax.tree.norm(gradients), gradients)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moments = optax.tree.get(state, "mu")
    assert np.isclose(optax.tree.norm(moments), expected, rtol=1e-5)


def test_a_clip_of_0_leaves_gradients_as_they_are():
    optimizer, _ = build.optimizer(CONSTANT | {"clip": 0.0} | ADAMW | {"b1": 0.0}, 10)
    params = {"kernel": jnp.zeros((4, 4))}
    _, state = optimizer.update({"kernel": jnp.full((4, 4), 7.0)}, optimizer.init(params), params)
    assert np.allclose(optax.tree.get(state, "mu")["kernel"], 7.0)


def test_only_kernels_decay():
    optimizer, _ = build.optimizer(CONSTANT | ADAMW, 10)
    params = {"layer": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "null": jnp.ones(4)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert np.allclose(updates["layer"]["kernel"], -1e-4)
    assert not np.any(updates["layer"]["bias"]) and not np.any(updates["null"])


def test_schedules():
    linear = build.warmup_constant_linear(1000, warmup=100, hold=0.5, final=0.02)
    assert np.allclose([linear(step) for step in (0, 49, 99, 300, 500, 750, 1000)], [0.01, 0.5, 1, 1, 1, 0.51, 0.02])
    cosine = build.warmup_cosine(1000, warmup=100, final=0.1)
    assert np.allclose([cosine(step) for step in (0, 99, 100, 550, 1000)], [0.01, 1, 1, 0.55, 0.1])


@pytest.mark.parametrize(
    "steps, warmup, hold, final",
    [
        *[(488, 100, 0.5, 0.02), (100000, 1000, 0.5, 0.0), (500000, 2000, 0.9, 0.02), (800000, 5000, 1.0, 1.0)],
        *[(9, 0, 0.5, 0.1), (9, 1, 1.0, 0.1), (9, 9, 0.0, 0.0), (9, 20, 0.5, 0.1)],
    ],
)
def test_a_linear_schedule_is_its_closed_formula_at_every_step(steps, warmup, hold, final):
    step = np.arange(steps)
    start = max(hold * steps, warmup)
    fall = 1 - (1 - final) * np.maximum(step - start, 0) / max(steps - start, 1)
    expected = np.minimum((step + 1) / max(warmup, 1), fall)
    found = jax.jit(jax.vmap(build.warmup_constant_linear(steps, warmup, hold, final)))(step)
    np.testing.assert_allclose(found, expected, rtol=0, atol=EPS)
    np.testing.assert_allclose(found[:warmup], expected[:warmup], rtol=2 * EPS)


@pytest.mark.parametrize(
    "steps, warmup, final", [(1000, 50, 0.1), (100000, 5000, 0.0), (9, 0, 0.0), (9, 1, 1.0), (9, 9, 0.1), (9, 20, 0.1)]
)
def test_a_cosine_schedule_is_its_closed_formula_at_every_step(steps, warmup, final):
    step = np.arange(steps)
    done = np.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
    expected = np.minimum((step + 1) / max(warmup, 1), final + (1 - final) * (1 + np.cos(np.pi * done)) / 2)
    found = jax.jit(jax.vmap(build.warmup_cosine(steps, warmup, final)))(step)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * EPS)
    np.testing.assert_allclose(found[:warmup], expected[:warmup], rtol=2 * EPS)


def test_the_schedule_scales_both_learning_rates():
    half = {"clip": 1.0, "schedule": {"name": "linear", "warmup": 2, "hold": 1.0, "final": 1.0}}
    params = {"blocks": {"out": {"kernel": jnp.zeros((8, 8))}}, "head": {"kernel": jnp.zeros((8, 8))}}
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    sizes = []
    for schedule in (half, CONSTANT):
        optimizer, _ = build.optimizer(schedule | MUON, 10)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        sizes.append(jax.tree.map(optax.tree.norm, updates))
    jax.tree.map(lambda small, full: np.testing.assert_allclose(full / small, 2, rtol=1e-4), *sizes)


def test_every_maker_can_be_asked_for_its_fields():
    for table in (build.PROCESSES, build.PREDICTIONS, build.WEIGHTS, build.TIMES, build.SCHEDULES, build.OPTIMIZERS):
        assert all(inspect.signature(maker) for maker in table.values())


@pytest.mark.parametrize("told", [predict.Eps(), predict.Score()])
@pytest.mark.parametrize("of", [process.Flow(), process.Cosine(), process.Shift(process.Flow(), 0.3)])
@pytest.mark.parametrize("name", ["uniform", "logsnr", "karras"])
def test_grids_begin_where_the_prediction_says_something(name, of, told):
    model = Model(Denoiser(of, told, None, lambda params, x, t: x), (2, 2, 1))
    first = model.recipe(grid=name, steps=200).grid[0, 0]
    assert 1 / 81 < 2 * of.alpha(first) and not predict.is_blind(told, of, first)
    with pytest.raises(UserError, match="pure noise, of which"):
        model.recipe(grid=np.array([[1.0, 0.0]]))
