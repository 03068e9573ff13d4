"""The compiled operations are loaded only where they run; the package works without them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.config import HeadConfig
from models.cpu import library
from models.cpu.library import why_unavailable
from models.errors import ConfigError
from models.kernels import resolve_kernel
from tests.models import tiny
from tests.models.kernels import needs_library

CPU = torch.device("cpu")
HEADS = HeadConfig(4, 2, 8)


@pytest.fixture
def asked_again() -> Iterator[None]:
    """The machine is asked, and is asked again after the test."""
    why_unavailable.cache_clear()
    yield
    why_unavailable.cache_clear()


def fail_to_load(path: object) -> None:
    raise AssertionError(f"{path} is loaded")


@pytest.mark.parametrize(
    ("has", "reason"),
    [
        ({"avx2"}, "the processor lacks fma3"),
        (set(), "the processor lacks avx2, fma3"),
    ],
    ids=["old", "another"],
)
def test_a_processor_without_the_instructions_never_loads_it(
    has: set[str], reason: str, monkeypatch: pytest.MonkeyPatch, asked_again: None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    monkeypatch.setattr(torch.ops, "load_library", fail_to_load)
    assert str(why_unavailable()).endswith(reason)
    assert resolve_kernel("auto", HEADS, torch.float32, CPU) == "dense"


def test_a_torch_that_does_not_know_the_processor_never_loads_it(
    monkeypatch: pytest.MonkeyPatch, asked_again: None
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.ops, "load_library", fail_to_load)
    assert str(why_unavailable()).startswith("the processor lacks avx2")


@pytest.fixture
def able_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    able = dict.fromkeys(("avx2", "fma3"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize(
    ("lacks", "compiled", "stem"),
    [
        (set(), "all", "_operations_avx512_bf16"),
        ({"avx512_bf16"}, "all", "_operations_avx512"),
        ({"avx512_vnni"}, "all", "_operations_avx2"),
        (set(), "_operations_avx2", "_operations_avx2"),
    ],
)
def test_a_processor_gets_the_best_library_that_was_compiled(
    lacks: set[str], compiled: str, stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {name for names in library.LIBRARIES.values() for name in names} - lacks
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(Path, "exists", lambda path: compiled in ("all", path.name.split(".")[0]))
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert why_unavailable() is None
    assert [path.name.split(".")[0] for path in loaded] == [stem]


@pytest.mark.usefixtures("able_processor", "asked_again")
def test_a_package_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", lambda: None)
    assert why_unavailable() == "it was not compiled when the package was installed"
    with pytest.raises(ConfigError, match="it was not compiled when the package was installed"):
        resolve_kernel("paged_cpu", HEADS, torch.float32, CPU)


@pytest.mark.usefixtures("able_processor", "asked_again")
def test_a_library_that_does_not_load_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled for another torch, for example."""
    broken = tmp_path / "_operations_avx2.so"
    broken.write_text("no library")
    monkeypatch.setattr(library, "_library", lambda: broken)
    assert str(why_unavailable()).startswith("it does not load: ")
    assert str(broken) in str(why_unavailable())
    model = tiny.model(tiny.llama())
    assert model.kernel_name == "dense"
    tokens = torch.arange(9)
    (logits,) = tiny.paged_logits(model, [tokens], [[5], [1], [3]])
    assert (logits - model.logits(tokens[None])[0]).abs().max() <= 1e-5


# In processes of their own


def run_python(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


RUN_MODEL = """
import torch
from models.cpu import library
from tests.models import tiny

{before}
model = tiny.model(tiny.llama())
tokens = torch.arange(30)
(logits,) = tiny.paged_logits(model, [tokens], [[20], *[[1]] * 10])
assert (logits - model.logits(tokens[None])[0]).abs().max() <= 1e-5
print(model.kernel_name)
{after}
"""


def test_without_the_library_the_package_attends_with_torch() -> None:
    before = "library._library = lambda: None"
    assert run_python(RUN_MODEL.format(before=before, after="")).split() == ["dense"]


COMPARE_BFLOAT16 = """
import torch
from models.cpu import library

library.runnable = lambda: ["{library}"]
assert library.why_unavailable() is None
from models.cpu.linear import pack

torch.manual_seed(0)
with torch.inference_mode():
    for rows, inputs, outputs in ((1, 64, 40), (7, 130, 16), (50, 256, 100)):
        x = torch.randn(rows, inputs).bfloat16()
        weight = torch.randn(outputs, inputs).bfloat16()
        exact = x.double() @ weight.double().T
        error = (pack(weight).multiply(x).double() - exact).abs().max()
        assert error <= 2**-8 * exact.abs().max(), error
    # The sum of two, in float32, to the nearest bfloat16: at all distances, and no numbers.
    x = torch.stack([torch.randn(4096).exp(), torch.randn(4096)], dim=1).bfloat16()
    x[:4] = torch.tensor([[torch.inf, 1], [torch.nan, 1], [torch.inf, -torch.inf], [-0.0, -0.0]])
    ones = pack(torch.ones(16, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(
        ones.multiply(x)[:, :1], x.float().sum(1, keepdim=True).bfloat16(),
        rtol=0, atol=0, equal_nan=True,
    )
"""


@pytest.mark.parametrize("name", library.LIBRARIES)
def test_all_libraries_multiply_bfloat16(name: str) -> None:
    """Those for other processors too, where this one can run them."""
    if name not in library.runnable():
        pytest.skip("this processor lacks its instructions")
    if not list(Path(library.__file__).parent.glob(f"{name}.*")):
        pytest.skip("it was not compiled")
    run_python(COMPARE_BFLOAT16.replace("{library}", name))


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="the libraries of a process are read in /proc")
def test_a_process_has_one_openmp() -> None:
    """A second one would keep threads of its own that fight for the cores."""
    after = "print(open('/proc/self/maps').read())"
    kernel, *maps = run_python(RUN_MODEL.format(before="", after=after)).splitlines()
    assert kernel == "paged_cpu"
    libraries = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
    names = [Path(library).name for library in libraries]
    assert [name for name in names if name.startswith("_operations")]
    kinds = [
        kind for name in names for kind in ("libgomp", "libiomp", "libomp") if name.startswith(kind)
    ]
    assert kinds == ["libgomp"]
