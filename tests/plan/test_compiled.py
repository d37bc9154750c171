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
    said = capsys.readouterr().out
    assert "training: " in said and "a call receives" in said and "bound by" in said and "(as compiled)" in said
