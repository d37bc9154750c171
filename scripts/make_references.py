"""Write tests/references/*.npz: small outputs of torch, diffusers and transformers on the random checkpoints of
the tests.

python scripts/make_references.py [name ...]
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1] / "tests"
# name: (test module with `outputs(name)`, every n-th position that is kept)
REFERENCES = {
    "t5_relu": ("test_t5", 10),
    "t5_gated": ("test_t5", 10),
    "clip_legacy": ("test_clip", 4),
    "clip_eos": ("test_clip", 4),
    "bert": ("test_bert", 4),
    "vae_sd3": ("test_vae", 2),
    "vae_quant": ("test_vae", 2),
    "mmdit_large": ("test_mmdit", 1),
    "mmdit_medium": ("test_mmdit", 1),
    "mmdit_sd3": ("test_mmdit", 1),
    "unet_google": ("test_unet", 1),
    "unet_heads_left_out": ("test_unet", 1),
    "unet_scale_shift": ("test_unet", 1),
    "unet_resnet_resizing": ("test_unet", 1),
    "unet_bare": ("test_unet", 1),
    "sample_ddpm": ("test_ddpm", 1),
    "sample_ddpm_large": ("test_ddpm", 1),
    "sample_ddpm_v": ("test_ddpm", 1),
    "sample_ddim_half": ("test_ddpm", 1),
    "sample_dpmpp_2m": ("test_ddpm", 1),
    "sample_unipc": ("test_ddpm", 1),
    "sample_euler": ("test_ddpm", 1),
    "sd3_medium": ("test_sd3", 1),
}


def main(names):
    sys.path[:0] = [str(TESTS / folder) for folder in ("support", "nets", "models")]
    for name in names or REFERENCES:
        module, step = REFERENCES[name]
        outputs = __import__(module).outputs(name)
        kept = {key: value[:, ::step] if value.ndim > 2 else value for key, value in outputs.items()}
        np.savez_compressed(TESTS / "references" / f"{name}.npz", **kept)


if __name__ == "__main__":
    main(sys.argv[1:])
