import json
from dataclasses import replace

import pytest

from diffjax import doctor
from diffjax.doctor import GIB, Device, Facts, Holder, HostGpu, problems
from diffjax.parallel import devices

VERSIONS = {"jax": "0.12.0", "jaxlib": "0.12.0"}
CUDA = VERSIONS | {"jax-cuda12-plugin": "0.12.0", "jax-cuda12-pjrt": "0.12.0"}
CARD = HostGpu("NVIDIA H100", used=GIB, total=80 * GIB)
HEALTHY = Facts(
    executable="/venv/bin/python",
    packages=CUDA,
    platform="gpu",
    summary="1 x NVIDIA H100",
    devices=(Device("NVIDIA H100", 60 * GIB),),
    driver="580.95.05",
    cuda="13.0",
    gpus=(CARD,),
    nvidia_card=True,
    home="/cache",
    free_disk=100 * GIB,
)
ON_CPU = replace(HEALTHY, platform="cpu", summary="CPU (8 cores)")

SICK = {
    "CPU-only jax": (
        replace(ON_CPU, packages=VERSIONS),
        "NVIDIA driver 580.95.05 is here but jax is the CPU-only build",
        "/venv/bin/python -m pip install 'jax[cuda12]==0.12.0'",
    ),
    "plugin of another version": (
        replace(ON_CPU, packages=CUDA | {"jax-cuda12-plugin": "0.11.0"}),
        "jax-cuda12-plugin 0.11.0 does not belong to jaxlib 0.12.0",
        "/venv/bin/python -m pip install 'jax[cuda12]==0.12.0'",
    ),
    "jaxlib of another version": (
        replace(HEALTHY, packages=CUDA | {"jax": "0.11.2"}),
        "jaxlib 0.12.0 does not belong to jax 0.11.2",
        "/venv/bin/python -m pip install jax==0.11.2 jaxlib==0.11.2",
    ),
    "card without driver": (
        replace(ON_CPU, packages=VERSIONS, driver=None, gpus=()),
        "an NVIDIA card is fitted but no driver is loaded",
        "sudo apt install nvidia-driver-580 && sudo reboot",
    ),
    "old driver": (
        replace(ON_CPU, driver="470.256.02"),
        "NVIDIA driver 470.256.02 is too old: jax for CUDA 12 needs 525 or newer",
        "sudo apt install nvidia-driver-580 && sudo reboot",
    ),
    "driver too old for CUDA 13": (
        replace(ON_CPU, driver="550.54.15", packages=VERSIONS | {"jax-cuda13-plugin": "0.12.0"}),
        "NVIDIA driver 550.54.15 is too old: jax for CUDA 13 needs 580 or newer",
        "sudo apt install nvidia-driver-580 && sudo reboot",
    ),
    "plugin that aborts": (
        replace(HEALTHY, platform=None, death="SIGABRT", error="SIGABRT ended the process"),
        "SIGABRT ends the process in which jax starts with jax-cuda12-plugin==0.12.0, jax-cuda12-pjrt==0.12.0",
        "/venv/bin/python -m pip install --force-reinstall --no-deps jax-cuda12-plugin==0.12.0 jax-cuda12-pjrt==0.12.0",
    ),
    "JAX_PLATFORMS": (
        replace(ON_CPU, environment={"JAX_PLATFORMS": "cpu"}),
        "JAX_PLATFORMS=cpu lets jax use nothing else",
        "unset JAX_PLATFORMS",
    ),
    "hidden GPUs": (
        replace(ON_CPU, environment={"CUDA_VISIBLE_DEVICES": ""}),
        "CUDA_VISIBLE_DEVICES=(empty) hides every GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "memory held": (
        replace(HEALTHY, gpus=(replace(CARD, used=70 * GIB),), holders=(Holder(42, "python3", 69 * GIB),)),
        "process 42 (python3) holds 70.0 GiB of 80.0 GiB on NVIDIA H100; jax takes 75% as it starts",
        "kill 42 (or, to share, export XLA_PYTHON_CLIENT_PREALLOCATE=false)",
    ),
    "memory held from outside the container": (
        replace(HEALTHY, gpus=(replace(CARD, used=70 * GIB),)),
        "a process that is not visible here holds 70.0 GiB of 80.0 GiB on NVIDIA H100; jax takes 75% as it starts",
        "export XLA_PYTHON_CLIENT_PREALLOCATE=false",
    ),
    "TPU without libtpu": (
        replace(ON_CPU, packages=VERSIONS, driver=None, gpus=(), nvidia_card=False, tpu_chip=True),
        "a TPU is attached but libtpu is not installed",
        "/venv/bin/python -m pip install 'jax[tpu]==0.12.0'",
    ),
    "another CUDA first": (
        replace(ON_CPU, environment={"LD_LIBRARY_PATH": "/usr/local/cuda-11/lib64"}),
        "jax has its CUDA build and the driver is fit, yet jax does not use the GPU: LD_LIBRARY_PATH may put another"
        " CUDA first",
        "unset LD_LIBRARY_PATH",
    ),
    "CUDA does not start": (
        replace(ON_CPU, platform=None, error="CUDA_ERROR_UNKNOWN"),
        "jax has its CUDA build and the driver is fit, yet jax does not use the GPU: CUDA_ERROR_UNKNOWN",
        "JAX_PLATFORMS=cuda /venv/bin/python -c 'import jax; jax.devices()'",
    ),
    "no accelerator": (
        replace(ON_CPU, packages=VERSIONS, driver=None, gpus=(), nvidia_card=False),
        "no NVIDIA GPU and no TPU on this machine: jax uses the CPU",
        "nothing to mend if there is none; for a container to see the host's: docker run --gpus all",
    ),
    "little disk": (
        replace(HEALTHY, free_disk=GIB),
        "only 1.0 GiB of disk are free",
        "rm -r /cache/xla (compiled programs: it fills again)",
    ),
}


def test_nothing_is_wrong_with_a_healthy_machine():
    assert problems(HEALTHY) == []


@pytest.mark.parametrize("facts, what, fix", SICK.values(), ids=SICK.keys())
def test_each_problem_alone_has_one_line_with_its_remedy(facts, what, fix):
    assert [(problem.what, problem.fix) for problem in problems(facts)] == [(what, fix)]
    assert doctor.report(facts).splitlines()[-1] == f"problem   {what} -> {fix}"


def test_a_broken_cpu_install_is_said():
    broken = replace(SICK["no accelerator"][0], platform=None, error="no module named jaxlib")
    assert "jax cannot start: no module named jaxlib" in [problem.what for problem in problems(broken)]


def test_memory_in_modest_use_is_no_problem():
    busy = replace(HEALTHY, gpus=(replace(CARD, used=10 * GIB),), holders=(Holder(42, "Xorg", 10 * GIB),))
    assert problems(busy) == []


def test_report_names_what_was_found():
    text = doctor.report(replace(HEALTHY, caches={"/cache/data": 5 * 2**20}, environment={"XLA_FLAGS": "--x"}))
    for part in (
        "jax 0.12.0",
        "jax-cuda12-plugin 0.12.0",
        "1 x NVIDIA H100 with 60.0 GiB",
        "NVIDIA 580.95.05, CUDA up to 13.0",
        "1.0 GiB of 80.0 GiB in use",
        "/cache/data: 5.0 MiB",
        "XLA_FLAGS=--x",
        "100.0 GiB free at /cache",
    ):
        assert part in text


FAKE_SMI = """#!/bin/bash
case "$1" in
    --query-gpu=driver_version) echo 580.95.05; echo 580.95.05 ;;
    --query-gpu=name*) echo "NVIDIA H100, 80GB, 70000, 81559" ;;
    --query-compute-apps=*) echo "4242, /usr/bin/python3, 69000"; echo "4243, [Not Found], [N/A]" ;;
    *) echo "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0  |" ;;
esac
"""


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(FAKE_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(devices, "nvidia_driver", lambda: devices.nvidia_smi("--query-gpu=driver_version").split()[0])


def test_facts_are_read_from_the_driver(fake_smi):
    facts = doctor.gather()
    assert (facts.driver, facts.cuda) == ("580.95.05", "13.0")
    assert facts.gpus == (HostGpu("NVIDIA H100, 80GB", 70000 * 2**20, 81559 * 2**20),)
    assert facts.holders == (Holder(4242, "/usr/bin/python3", 69000 * 2**20), Holder(4243, "[Not Found]", 0))
    assert facts.platform == "cpu" and facts.packages["jax"] and facts.free_disk > 0


def test_caches_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for path, size in {"home/data/a/x": 10, "home/data/y": 5, "home/runs/z": 7, "hub/w": 3}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"0" * size)
    sizes = {str(tmp_path / "home/data"): 15, str(tmp_path / "home/runs"): 7, str(tmp_path / "hub"): 3}
    assert doctor.gather().caches == sizes


def test_newer_drivers_name_cuda_otherwise():
    assert doctor.cuda_version("| Driver Version: 590.1   CUDA UMD Version: 13.1 |") == "13.1"
    assert doctor.cuda_version("") is None


@pytest.mark.parametrize("require, status", [(None, 0), ("gpu", 1), ("tpu", 1)])
def test_require_decides_the_status(require, status, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: ON_CPU)
    assert doctor.main(require) == status
    assert (f"no {require} in use" in capsys.readouterr().err) == bool(status)


def test_require_is_met_by_the_device_in_use(monkeypatch):
    monkeypatch.setattr(doctor, "gather", lambda: HEALTHY)
    assert doctor.main("gpu") == 0


def test_json_holds_facts_and_problems(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: SICK["JAX_PLATFORMS"][0])
    doctor.main(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["driver"] == "580.95.05" and found["gpus"][0]["name"] == "NVIDIA H100"
    assert found["problems"] == [{"what": "JAX_PLATFORMS=cpu lets jax use nothing else", "fix": "unset JAX_PLATFORMS"}]


def test_a_plugin_that_ends_the_process_does_not_end_the_doctor(monkeypatch):
    assert doctor._death(("-c", "import os; os.abort()")) == "SIGABRT"
    assert doctor._death(("-c", "raise SystemExit(3)")) == ""
    monkeypatch.setattr(doctor, "_death", lambda arguments: "SIGBUS")
    monkeypatch.setattr(doctor, "_versions", lambda: VERSIONS | {"libtpu": "0.0.50"})
    facts = replace(doctor.gather(), driver=None, nvidia_card=False, tpu_chip=False, free_disk=100 * GIB)
    assert (facts.platform, facts.death) == (None, "SIGBUS")
    assert "export JAX_PLATFORMS=cpu" in {problem.fix for problem in problems(replace(facts, environment={}))}
    assert "cannot start" not in doctor.report(facts)
