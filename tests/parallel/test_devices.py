import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from diffjax.parallel import devices, layout
from diffjax.utils.errors import UserError


@pytest.fixture
def eight():
    return devices.data_mesh()


def test_data_mesh_takes_all_devices_or_some(eight):
    assert dict(eight.shape) == {"data": 8}
    assert dict(devices.data_mesh(jax.devices()[:2]).shape) == {"data": 2}


def test_batch_is_split_and_parameters_are_copied(eight):
    batch = {"x": np.arange(32.0).reshape(16, 2), "label": np.arange(16)}
    batch, params = layout.shard_batch(batch, eight), devices.replicate({"w": jnp.ones((2, 3))}, eight)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}
    assert {shard.data.shape for shard in params["w"].addressable_shards} == {(2, 3)}
    y = jax.jit(lambda params, x: x @ params["w"])(params, batch["x"])
    assert y.sharding.is_equivalent_to(NamedSharding(eight, P("data")), 2)
    np.testing.assert_array_equal(y, np.arange(32.0).reshape(16, 2) @ np.ones((2, 3)))


def test_batch_that_cannot_be_split_is_refused(eight):
    with pytest.raises(UserError, match="a batch of 12 cannot be split over 8 devices: choose a multiple of 8"):
        layout.shard_batch(np.zeros((12, 2)), eight)


def test_first_rule_that_matches_places_a_leaf():
    grid = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    tree = {"block": {"query": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}, "scale": jnp.zeros(3)}}
    rules = [("query/kernel$", P("data", "model")), ("kernel|bias", P("model"))]
    placed = jax.tree.map(lambda sharding: sharding.spec, devices.shard_by_rules(tree, rules, grid))
    assert placed == {"block": {"query": {"kernel": P("data", "model"), "bias": P("model")}, "scale": P()}}
    shapes = jax.eval_shape(lambda: tree)
    assert devices.shard_by_rules(shapes, rules, grid) == devices.shard_by_rules(tree, rules, grid)
    kernel = jax.device_put(tree, devices.shard_by_rules(tree, rules, grid))["block"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data"), P("data", None, None)])
def test_rule_that_does_not_fit_names_the_leaf(eight, spec):
    with pytest.raises(UserError, match=r"a/kernel of shape \(6, 16\) cannot be split as"):
        devices.shard_by_rules({"a": {"kernel": jnp.zeros((6, 16))}}, [("kernel", spec)], eight)


@pytest.mark.parametrize(
    "shape, spec", [((8, 16), P(None, "data")), ((24, 16), P("data", None)), ((8, 99), P("data", None)), ((3,), P())]
)
def test_fsdp_splits_the_largest_axis_that_divides(eight, shape, spec):
    placed = devices.shard_by_rules({"w": jnp.zeros(shape)}, [(".*", devices.largest_axis("data"))], eight)
    assert placed["w"].spec == spec


def test_device_line(capsys, monkeypatch):
    monkeypatch.setattr(devices, "nvidia_driver", lambda: None)
    devices.announce()
    line = capsys.readouterr().err
    assert line == f"device: CPU ({os.cpu_count()} cores, as 8 devices), jax {jax.__version__}\n"


def test_unused_gpu_is_warned_about(capsys, monkeypatch):
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "580.95.05")
    devices.announce()
    assert (
        "warning: NVIDIA driver 580.95.05 is here but jax uses the CPU: run `diffjax doctor`" in capsys.readouterr().err
    )


def test_driver_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.nvidia_smi() is None


def run_python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_compiled_programs_are_kept_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    code = """
import jax, diffjax.parallel.devices
diffjax.parallel.devices.start()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((4, 4)))
print(any(hits))
"""
    answers = [run_python(code, DIFFJAX_HOME=str(tmp_path)).communicate()[0] for _ in range(2)]
    assert answers == ["False\n", "True\n"]
    assert any((tmp_path / "xla").iterdir())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_freed_memory_is_kept_for_the_next_step():
    pages = "int(open('/proc/self/statm').read().split()[1])"
    script = f"""
import numpy as np
from diffjax.parallel import devices
devices.keep_memory()
before = {pages}
x = np.ones(2**27, np.uint8)
del x
print(({pages} - before) * {os.sysconf("SC_PAGE_SIZE")})
"""
    kept = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert kept > 2**26


def test_two_hosts_share_one_batch(tmp_path):
    code = """
import jax, numpy as np
from diffjax.parallel import devices, layout
devices.start()
world = devices.data_mesh()
rows = np.arange(4.0)[:, None] + 10 * jax.process_index()
batch = layout.shard_batch(rows, world)
weight = devices.replicate(np.float32(2), world)
total = jax.jit(lambda w, x: (w * x).sum(), out_shardings=weight.sharding)(weight, batch)
print(len(jax.devices()), batch.shape, float(total))
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = dict(
        JAX_COORDINATOR_ADDRESS=address,
        JAX_NUM_PROCESSES="2",
        DIFFJAX_HOME=str(tmp_path),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    hosts = [run_python(code, JAX_PROCESS_ID=str(i), **shared) for i in range(2)]
    outputs = [host.communicate(timeout=120) for host in hosts]
    assert [out.splitlines()[-1:] for out, _ in outputs] == [["4 (8, 1) 104.0"]] * 2, outputs[0][1][-2000:]
    assert "device: CPU" in outputs[0][1] and "device:" not in outputs[1][1]


def test_half_told_about_hosts_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        devices.join_hosts()


def test_a_platform_that_is_not_there_is_said(tmp_path):
    code = """
from diffjax.parallel import devices
from diffjax.utils.errors import UserError
try:
    devices.start()
except UserError as error:
    print(error)
"""
    out, _ = run_python(code, JAX_PLATFORMS="tpu", DIFFJAX_HOME=str(tmp_path)).communicate()
    assert (
        out == "jax finds no device to run on (JAX_PLATFORMS=tpu lets it use nothing else): `diffjax doctor` says why\n"
    )


@pytest.mark.parametrize("platform", ["cuda", "gpu"])
def test_every_command_that_computes_says_in_one_line_that_there_is_no_gpu(platform, tmp_path):
    emoji = Path(__file__).parents[2] / "experiments" / "emoji.py"
    code = f"""
from diffjax import cli
for command in (["train", "--config", {str(emoji)!r}, "--workdir", "w"], ["plan", "--config", {str(emoji)!r}],
                ["sample", "--model", ".", "--out", "o"], ["evaluate", "--run", {str(tmp_path)!r}],
                ["convert", "w", "o"], ["fit-grid", "--run", {str(tmp_path)!r}, "--steps", "2"]):
    assert cli.main(command) == 2, command
"""
    process = run_python(code, JAX_PLATFORMS=platform, DIFFJAX_HOME=str(tmp_path))
    out, err = process.communicate()
    lines = err.splitlines()
    assert process.returncode == 0 and out == "" and len(lines) == 6
    assert set(lines) == {
        f"diffjax: jax finds no device to run on (JAX_PLATFORMS={platform} lets it use nothing else): "
        "`diffjax doctor` says why"
    }


def test_a_cluster_that_is_not_there_is_said(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFJAX_MULTIHOST", "1")
    with pytest.raises(
        UserError, match="jax does not find a cluster .*DIFFJAX_MULTIHOST=1 asks for: unset it, or set JAX_COORD"
    ):
        devices.join_hosts()
