"""diffjax: diffusion models in pure JAX."""
