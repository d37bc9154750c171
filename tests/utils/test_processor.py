import jax
import pytest

from diffjax.utils import processor

AVX512 = "\n".join(f"processor : {i}\nflags\t\t: fpu sse avx2 avx512f avx512_bf16\n" for i in range(2))
AVX2 = "processor : 0\nflags\t\t: fpu sse avx2 fma\n"
MIXED = AVX512 + AVX2
SAPPHIRE = "flags : fpu avx512f avx512_bf16 amx_bf16 amx_tile\n"
GRAVITON3 = "processor : 0\nFeatures : fp asimd sve bf16 i8mm\n"
GRAVITON2 = "processor : 0\nFeatures : fp asimd evtstrm aes\n"


@pytest.mark.parametrize(
    "cpuinfo, name",
    [
        (AVX512, "bfloat16"),
        (SAPPHIRE, "bfloat16"),
        (GRAVITON3, "bfloat16"),
        (AVX2, "float32"),
        (MIXED, "float32"),
        (GRAVITON2, "float32"),
        ("", "float32"),
        ("model name : bf16 deluxe\n", "float32"),
    ],
)
def test_auto_is_float32_where_bfloat16_would_be_emulated(cpuinfo, name, monkeypatch):
    monkeypatch.setattr(processor, "flags", lambda: processor.flags_of(cpuinfo))
    assert processor.dtype() == name


@pytest.mark.parametrize("answer, name", [("1", "bfloat16"), ("0", "float32"), ("", "float32")])
def test_macos_is_asked_by_sysctl(answer, name, monkeypatch):
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(processor, "_sysctl", lambda _: answer)
    assert processor.dtype() == name


def test_accelerators_compute_in_bfloat16(monkeypatch):
    monkeypatch.setattr(processor, "flags", frozenset)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert processor.dtype() == "bfloat16" and "no CPU" in processor.reason()
