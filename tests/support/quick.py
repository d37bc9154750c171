"""Flags by which XLA compiles quickly for a CPU, for what runs once and briefly."""

from importlib.metadata import version

QUICK = "--xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later ones have only the new emitters
    QUICK = f"--xla_cpu_use_fusion_emitters=false {QUICK}"
