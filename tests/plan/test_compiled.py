"""Programs as the compilers of absent devices make them: what is read off them, and that a plan says it."""

from pathlib import Path

import pytest

from diffjax import cli, config, plan
from diffjax.plan import compiled, hlo, rates
from diffjax.plan.report import measured
from diffjax.utils.errors import UserError

EMOJI = str(Path(__file__).parents[2] / "experiments" / "emoji.py")

LOOP = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused (p: bf16[8,64]) -> bf16[8,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %big = bf16[800,64]{1,0} broadcast(%p), dimensions={}
}

%body (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %state = (s32[], bf16[8,64]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %sum = bf16[8,64]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %gathered = (bf16[2,64]{1,0}, bf16[8,64]{1,0}) all-gather-start(%part), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %y = f32[8,64]{1,0} fusion(%sum), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/net/mul"}
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%i, %y)
}

%condition (state: (s32[], bf16[8,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  %x.1 = bf16[8,64]{1,0} parameter(0)
  %loop = (s32[], bf16[8,64]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %moved = bf16[8,64]{1,0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}
}
"""  # fmt: skip  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run():
    one = 8 * 64 * 2
    found = hlo.collectives(hlo.read(LOOP), 8)
    assert found == {"all-reduce": 10 * 2 * 3 / 4 * one, "all-gather": 10 * 3 / 4 * one, "collective-permute": one}


def test_a_loop_whose_number_of_rounds_stands_in_its_condition():
    counted = LOOP.replace(', backend_config={"known_trip_count":{"n":"10"}}', "")
    said = counted.replace("  %state.1 =", "  %n = s32[]{:T(128)} constant(7)\n  %state.1 =")
    sums = lambda text: hlo.collectives(hlo.read(text), 8)["all-reduce"]
    assert sums(said) == 7 * sums(counted) > 0


@pytest.mark.parametrize("groups, size", [("[2,4]<=[8]", 4), ("{{0,1},{2,3}}", 2), ("mesh['a'=2,'b'=4] {'b'}", 4)])
def test_how_many_devices_take_part_in_a_collective(groups, size):
    assert hlo.Instruction("all-reduce", "f32[8]", f"%x), replica_groups={groups}, to_apply=%add").group == size


def test_what_comes_while_the_device_works_on_a_product():
    """Asynchronous in a GPU's loop; one a TPU starts once and two fusions move on; one beside nothing; one at once."""
    text = """
%work (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %y = bf16[8,8]{1,0} dot(%p, %p)
}

%moved (p: bf16[8,8]) -> bf16[16,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  %y.1 = bf16[8,8]{1,0} convolution(%p.1, %p.1)
  ROOT %part = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%moved.2 (p: bf16[8,8]) -> bf16[16,8] {
  %p.2 = bf16[8,8]{1,0} parameter(0)
  %y.2 = bf16[8,8]{1,0} convolution(%p.2, %p.2)
  ROOT %part.2 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %s = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %w = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%work
  %d = bf16[16,8]{1,0} all-gather-done(%s)
  %s.1 = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %c = bf16[8,8]{1,0} copy(%w)
  %d.1 = bf16[16,8]{1,0} all-gather-done(%s.1)
  %m = bf16[16,8]{1,0} fusion(%c), kind=kOutput, calls=%moved
  %m.1 = bf16[16,8]{1,0} fusion(%m), kind=kOutput, calls=%moved.2
  ROOT %r = bf16[16,8]{1,0} all-gather(%x), channel_id=3, replica_groups={{0,1}}, dimensions={0}
}
"""
    read, one = hlo.read(text), 8 * 8 * 2
    assert hlo.collectives(read, 2) == {"all-gather": 4 * one}
    assert hlo.overlapped(read, 2) == 2 * one


def test_a_tpu_scatters_sums_in_a_fusion_of_an_all_reduce():
    text = """
%all-reduce-scatter.3 (p: f32[16,8]) -> f32[4,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %sum = f32[16,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: f32[16,8]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  ROOT %y = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    assert hlo.collectives(hlo.read(text), 4) == {"reduce-scatter": 3 / 4 * 16 * 8 * 4}


def test_slices_of_stacked_weights_that_loops_copy():
    body = """
%taken (w: bf16[10,8,64], i: s32[]) -> bf16[1,8,64] {
  %w = bf16[10,8,64]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %slice = bf16[1,8,64]{2,1,0} dynamic-slice(%w, %i.1), dynamic_slice_sizes={1,8,64}
}
"""
    call = "  %part = bf16[1,8,64]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%taken\n  ROOT %t ="
    text = body + LOOP.replace("  ROOT %t =", call)
    assert hlo.copied(hlo.read(LOOP)) == 0 and hlo.copied(hlo.read(text)) == 10 * 8 * 64 * 2
    used = text.replace("  ROOT %slice = ", "  %slice = ").replace(
        "sizes={1,8,64}", "sizes={1,8,64}\n  ROOT %d = bf16[8,8]{1,0} dot(%slice, %slice)"
    )
    assert hlo.copied(hlo.read(used)) == 0


def test_the_largest_tensors_are_those_with_memory_of_their_own():
    shape, size, place = hlo.largest(hlo.read(LOOP))[0]
    assert (shape, size, place) == ("f32[8,64]", 8 * 64 * 4, "jit(step)/net/mul")
    assert not any("800" in shape for shape, *_ in hlo.largest(hlo.read(LOOP), 9))


@pytest.mark.parametrize(
    "words, size",
    [
        ("RESOURCE_EXHAUSTED: the total memory required (17.12G) exceeds available HBM (15.75G).", 17.12 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 900M of 15.75G hbm", 900 * 2**20),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_what_a_compiler_without_room_says(words, size):
    assert compiled._said(words) == int(size)


def test_devices_in_words():
    assert plan.Target.parse("v5e-8", "tensor") == plan.Target("v5e", 8, "tensor")
    assert plan.Target.parse("h100").name == "one H100" and plan.Target.parse("a100-2").name == "2 A100"
    assert plan.Target.parse(None).is_here and plan.Target.parse(None).devices() is None
    for words, said in (("v5e-", "as v5e-8"), ("v5e-0", "as v5e-8"), ("cpu-2", "can several be planned for")):
        with pytest.raises(UserError, match=said):
            plan.Target.parse(words)
    with pytest.raises(UserError, match="over 3 devices: it takes a multiple of 2"):
        plan.Target.parse("h100-3", "fsdp")
    with pytest.raises(UserError, match="nothing here compiles for t4"):
        plan.Target.parse("t4").devices()


def test_without_the_compiler_a_plan_says_what_to_install(monkeypatch, capsys):
    from diffjax.parallel import targets

    monkeypatch.setattr(targets, "has_compiler", lambda platform: False)
    assert cli.main(["plan", "--config", EMOJI, "--device", "v5e-4", "--compile"]) == 2
    assert capsys.readouterr().err.startswith("diffjax: the compiler for v5e is not installed: ")


def test_several_devices_share_a_training_and_its_estimate():
    job = plan.experiment(config.load(EMOJI), plan.Asked(), "fsdp")[0]
    one, four = (measured(job, job.parts[0], plan.Target("v6e", count), False) for count in (1, 4))
    speed = rates.NAMED["v6e"]
    assert four.seconds(speed) == one.seconds(speed) / 4 and four.estimate.held == one.estimate.held // 4


@pytest.mark.accelerators
@pytest.mark.parametrize("device, shard", [("v5e-4", "fsdp"), ("h100-4", "both"), ("h100-4", "tensor")])
def test_training_compiled_for_devices_that_are_not_here(device, shard, compiler, capsys):
    compiler(device.partition("-")[0])
    small = ["--config.dit.width=64", "--config.dit.depth=1", "--config.dit.heads=2", "--config.dit.hidden=128"]
    command = ["plan", "--config", EMOJI, *small, "--device", device, "--shard", shard, "--compile"]
    assert cli.main(command) == 0
    said, progress = capsys.readouterr()
    assert progress.startswith(f"compiling training for 4 {device.partition('-')[0].upper()}: ")
    assert "training: " in said and "a call receives" in said and "bound by" in said and "(as compiled)" in said


@pytest.mark.accelerators
def test_a_state_in_the_memory_of_hosts_is_none_of_what_devices_hold(compiler):
    compiler("v5e")
    settings = config.decided(config.load(EMOJI), lambda _: "bfloat16")
    settings.dit.update(width=64, depth=1, heads=2, hidden=128)
    settings.train.update(batch=8, offload=True)
    (part,) = plan.experiment(settings, plan.Asked(), "fsdp")[0].parts
    found = plan.compile_part(part, plan.Target.parse("v5e-4").devices() or [])
    assert 0 < found.held < 0.5 * found.hosted and found.hosted < 0.5 * part.hosted
    assert plan.estimate(part).held == plan.tree_bytes(part.held) - part.hosted


@pytest.mark.accelerators
def test_absent_gpus_have_no_host_to_keep_a_state(compiler):
    compiler("h100")
    settings = config.load(EMOJI)
    settings.train.offload = True
    (part,) = plan.experiment(settings, plan.Asked(), "fsdp")[0].parts
    with pytest.raises(UserError, match="no GPU that is not here: leave --compile out"):
        plan.compile_part(part, plan.Target.parse("h100-4").devices() or [])


@pytest.mark.accelerators
def test_the_estimate_of_a_training_step_is_near_what_a_gpu_s_compiler_says(compiler):
    compiler("h100")
    settings = config.decided(config.load(EMOJI), lambda _: "bfloat16")
    settings.dit.update(width=64, depth=3, heads=2, hidden=128)
    settings.train.batch = 512
    (part,) = plan.experiment(settings, plan.Asked())[0].parts
    found = plan.compile_part(part, plan.Target("h100").devices() or [])
    assert 1 / 1.5 < plan.estimate(part, "cuda").temporary / found.temporary < 1.5
