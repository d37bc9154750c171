"""What pyproject.toml cannot say: the experiments are installed as a part of the package."""

from setuptools import find_packages, setup

experiments = ["diffjax.experiments", *(f"diffjax.experiments.{name}" for name in ("minimagen",))]
setup(
    packages=[*find_packages(include=["diffjax", "diffjax.*"]), *experiments],
    package_dir={"diffjax.experiments": "experiments"},
)
