"""What int8 and int4 kernels cost in accuracy and save in bytes: a table in Markdown.

    python scripts/quantization_table.py             about two minutes on two cores, 8 GB

Two layers of real width with random weights, float32 against the same with kernels in whole numbers; the error is that
of the output, root mean square relative to the output's own. Bytes are those of the whole network, bfloat16 where not
quantised.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import plan, weights
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.quantize import SCHEMES, quantize_kernels
from diffjax.nets.t5 import T5Encoder
from diffjax.weights import mmdit, t5

LARGE = MMDiT()
MEDIUM = MMDiT(num_layers=24, num_attention_heads=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
NETWORKS = {
    # name: (the whole network, two of its layers, its format)
    "SD3.5 large": (LARGE, LARGE.clone(num_layers=2, pos_embed_max_size=64), mmdit.FORMAT),
    "SD3.5 medium": (
        MEDIUM,
        MEDIUM.clone(num_layers=2, pos_embed_max_size=64, dual_attention_layers=(0,)),
        mmdit.FORMAT,
    ),
    "T5 XXL": (T5Encoder(), T5Encoder(num_layers=2, vocab_size=256), t5.FORMAT),
}
LATENT, TOKENS = 32, 333


def drawn(module, kind):
    """Random parameters: kernels of unit gain, scales 1, biases 0; T5's queries and tokens as it draws them itself."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("scale", "bias")):
            return jnp.full(leaf.shape, float(name.endswith("scale")))
        gain = {"blocks/attention/q/kernel": 1 / 8, "shared/embedding": leaf.shape[-2] ** 0.5}.get(name, 1)
        return jnp.asarray(random.standard_normal(leaf.shape, np.float32) * np.float32(gain / leaf.shape[-2] ** 0.5))

    return jax.tree_util.tree_map_with_path(draw, weights.param_shapes(module, kind))


def inputs(module):
    """Two rows: latents of 256 px, a time, text of 333 tokens and its vector; for T5, 256 tokens."""
    random = np.random.default_rng(1)
    if isinstance(module, T5Encoder):
        return (random.integers(0, module.vocab_size, (2, 256)),)
    shapes = (2, LATENT, LATENT, 16), (2, TOKENS, module.joint_attention_dim), (2, module.pooled_projection_dim)
    x, context, pooled = (random.standard_normal(shape, np.float32) for shape in shapes)
    return x, np.float32([900, 300]), context, pooled


def error(ours, exact):
    """Root mean square, relative."""
    return float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))


def main():
    print("| network | kernels | bytes | error of the output |\n|---|---|---|---|")
    for name, (whole, part, kind) in NETWORKS.items():
        shapes = weights.param_shapes(whole.clone(param_dtype=jnp.bfloat16), kind)
        params, given = drawn(part, kind), inputs(part)
        call = jax.jit(lambda params, part=part, given=given: part.apply({"params": params}, *given))
        exact = call(params)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
        print(
            f"| {name} | bfloat16 | {plan.tree_bytes(shapes) / 1e9:.2f} GB | {error(call(half), exact):.2%} |",
            flush=True,
        )
        for scheme in SCHEMES:
            kept = jax.eval_shape(lambda params, scheme=scheme: quantize_kernels(params, SCHEMES[scheme]), shapes)
            loss = error(call(quantize_kernels(params, SCHEMES[scheme])), exact)
            print(f"| {name} | {scheme} | {plan.tree_bytes(kept) / 1e9:.2f} GB | {loss:.2%} |", flush=True)


if __name__ == "__main__":
    main()
