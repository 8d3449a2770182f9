"""Precision as the machine has it, whatever machine these tests run on."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pruning_utils import models, runtime

CPU = torch.device("cpu")
MACHINES = {  # flags that torch names, its capability, what the environment allows: what is native
    "AVX2 alone": (["avx2"], "AVX2", {}, set()),
    "AVX-512 without bfloat16": (["avx512_f", "avx512_bw"], "AVX512", {}, set()),
    "AVX512_BF16": (["avx512_bf16"], "AVX512", {}, {"bfloat16"}),
    "AMX": (["avx512_bf16", "amx_bf16", "avx512_fp16"], "AVX512", {}, {"bfloat16", "float16"}),
    "Arm with bf16": (["neon", "bf16", "fp16_arith"], "DEFAULT", {}, {"bfloat16", "float16"}),
    "Arm without": (["neon"], "DEFAULT", {}, set()),
    "AMX that torch plays as AVX2": (["avx512_bf16", "amx_bf16"], "AVX2", {}, set()),
    "AMX that oneDNN plays as AVX2": (
        ["amx_bf16"],
        "AVX512",
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        set(),
    ),
    "AMX held to AVX512_CORE": (
        ["amx_bf16"],
        "AVX512",
        {"ONEDNN_MAX_CPU_ISA": "avx512_core"},
        set(),
    ),
    "AMX held to bf16": (
        ["amx_bf16"],
        "AVX512",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        {"bfloat16"},
    ),
}


@pytest.fixture
def machine(monkeypatch):
    """Lets torch describe a processor of our own."""

    def play(flags, capability: str, variables: dict) -> None:
        monkeypatch.setattr(
            torch.cpu,
            "get_capabilities",
            lambda: dict.fromkeys(flags, True) | {"cpu_name": "A CPU"},
        )
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    runtime._warn_of_emulation.cache_clear()
    yield play
    runtime._warn_of_emulation.cache_clear()


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_processor_multiplies(name, machine):
    flags, capability, variables, native = MACHINES[name]
    machine(flags, capability, variables)
    for dtype in ("bfloat16", "float16"):
        assert runtime.multiplies_natively(getattr(torch, dtype), CPU) == (dtype in native)
    assert runtime.multiplies_natively(torch.float32, CPU)
    expected = torch.bfloat16 if "bfloat16" in native else torch.float32
    assert runtime.resolve_dtype("auto", CPU) == runtime.resolve_dtype(device="cpu") == expected


@pytest.mark.parametrize("capability, native", [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_what_a_gpu_multiplies(capability, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert runtime.multiplies_natively(torch.bfloat16, gpu) == native
    assert runtime.multiplies_natively(torch.float16, gpu)


def test_an_emulated_precision_is_obeyed_with_one_warning(machine):
    machine(*MACHINES["AVX2 alone"][:3])
    with pytest.warns(
        runtime.EmulatedPrecision,
        match=r"bfloat16 is emulated here: A CPU \(AVX2\) .* \d+ times as "
        r"long as in float32; dtype='auto'",
    ) as caught:
        assert runtime.resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            runtime.resolve_dtype("bfloat16", CPU)
            == runtime.resolve_dtype(torch.bfloat16, CPU)
            == torch.bfloat16
        )
        assert (
            runtime.resolve_dtype("auto", CPU)
            == runtime.resolve_dtype("float32", CPU)
            == torch.float32
        )


def test_a_native_precision_warns_of_nothing(machine):
    machine(*MACHINES["AMX"][:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            runtime.resolve_dtype("bfloat16", CPU)
            == runtime.resolve_dtype("auto", CPU)
            == torch.bfloat16
        )


@pytest.mark.parametrize(
    "dtype", ["bf16", "Auto", "", None, 16, torch.int8, torch.float64, ["auto"]]
)
def test_unknown_precisions_are_refused(dtype):
    with pytest.raises(
        ValueError, match="dtype must be one of auto, bfloat16, float16, float32, got"
    ):
        runtime.resolve_dtype(dtype)


def test_float32_holds_the_very_weights_of_bfloat16():
    with warnings.catch_warnings(action="ignore", category=runtime.EmulatedPrecision):
        exact, rounded = (
            models.load_model(dtype=dtype)[0].state_dict() for dtype in ("float32", "bfloat16")
        )
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name], rounded[name].float()) for name in exact)


def test_waiting_threads_sleep_in_every_process():
    """OpenMP reads the variable when torch is imported, so the package must have set it before."""
    program = (
        "import os, sys; import pruning_utils; assert 'torch' not in sys.modules; "
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1000"


def test_the_processor_is_named(machine):
    machine(*MACHINES["AMX"][:3])
    assert runtime.processor() == "A CPU (AVX512, amx_bf16, avx512_bf16)"


def test_the_clock_waits_for_the_device_that_is_measured(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    times = [runtime.clock(torch.device(name)) for name in ("cpu", "cuda:1", "mps")]
    assert waited == [torch.device("cuda:1"), torch.device("mps")] and times == sorted(times)


def test_peak_memory_is_0_where_the_system_keeps_no_mark(monkeypatch):
    """As on Windows, which has neither the kernel's file nor the module ``resource``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.peak_memory_bytes() > 10**7
    monkeypatch.setattr(runtime.Path, "is_file", lambda path: False)
    assert runtime.peak_memory_bytes() > 10**7
    monkeypatch.setattr(runtime.sys, "platform", "win32")
    monkeypatch.setitem(runtime.sys.modules, "resource", None)
    assert runtime.peak_memory_bytes() == 0


@pytest.mark.parametrize("seed", ["3", True, 1.0, -1, 2**32, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295, got"):
        runtime.setup(seed)


def test_the_folder_of_results_stays_where_the_run_began(tmp_path, monkeypatch):
    """A notebook's kernel works in another folder than the one that the variable was set in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", "out")
    assert runtime.output_root("cpu") == tmp_path / "out"
    monkeypatch.setenv("PRUNING_UTILS_OUTPUT", "~/out")
    assert runtime.output_root("cpu") == Path.home() / "out"
