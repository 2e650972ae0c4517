"""The codebook kernels: every instruction set of this machine and the torch fallback against float64."""

from __future__ import annotations

import _ctypes
import ctypes
import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import ROWS, as_multiplied, assert_product, make_case, random, reference
from torch import Tensor

from hf_compress.errors import CompressionError, ConfigurationError
from hf_compress.kernels import (
    available_kernels,
    check_matrix,
    codebook_linear,
    dequantize,
    forced_kernel,
    kernel_name,
    library,
    matrix,
    pack_codes,
    products,
    tiles,
    unpack_codes,
    use_kernel,
    words_per_row,
)

BITS = (2, 3, 4)
COLUMNS = (576, 1536, 100, 33, 64, 2048)
COUNTS = (1, 2, 4, 7, 9, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SOURCES = Path(library.__file__).parent / "csrc"
compiled = pytest.mark.skipif(kernel_name() == "torch", reason="without the compiled kernel")


@pytest.fixture(params=available_kernels())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_kernel(request.param):
        yield request.param


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_product_equals_the_reference(kernel: str, bits: int, columns: int) -> None:
    for scales in ("float16", "uint8"):
        for group, codebooks in ((32, 3), (columns, 1)):
            case = make_case(bits, columns, scales=scales, group=group, codebooks=codebooks)
            for dtype in DTYPES:
                bias = random(ROWS, dtype=dtype) if group == 32 else None
                for count in COUNTS:
                    x = random(count, columns, dtype=dtype, seed=count)
                    assert_product(codebook_linear(x, case.matrix, bias), x, as_multiplied(case, x), bias)


@pytest.mark.parametrize("bits", BITS)
def test_written_out_rows_are_exact(kernel: str, bits: int) -> None:
    for columns in COLUMNS:
        for scales in ("float16", "uint8"):
            case = make_case(bits, columns, scales=scales, group=64)
            for dtype in DTYPES:
                expected = (case.weight if dtype == torch.float64 else case.weight.float()).to(dtype)
                assert torch.equal(dequantize(case.matrix, dtype), expected)
                assert torch.equal(dequantize(case.matrix, dtype, 7, 12), expected[7:12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_matrix_goes_through_tiles(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By columns too, except where partial sums would be rounded."""
    monkeypatch.setattr(tiles, "_TILE", 1 << 19)
    case = make_case(columns=9001, rows=70, group=96)
    x, bias = random(100, 9001, dtype=dtype), random(70, dtype=dtype)
    assert_product(codebook_linear(x, case.matrix, bias), x, as_multiplied(case, x), bias)


def test_bfloat16_is_multiplied_as_this_processor_can(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, x = make_case(), random(64, 100, dtype=torch.bfloat16)
    for native in (False, True):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda native=native: native)
        weight = case.weight.bfloat16().double() if native else case.weight
        assert_product(products._tiled_linear(x, case.matrix, None), x, weight)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_tables_of_other_float_types(kernel: str, name: str) -> None:
    dtype = getattr(torch, name)
    case = make_case(scales="uint8")
    assert case.matrix.row_scales is not None
    cast = case.matrix._replace(codebooks=case.matrix.codebooks.to(dtype), row_scales=case.matrix.row_scales.to(dtype))
    x = random(5, 100)
    assert_product(codebook_linear(x, cast), x, reference(cast, case.codes))


def test_wide_row_codebook_and_scales_that_spread(kernel: str) -> None:
    case = make_case(4, 576, rows=70, codebooks=70, group=576)
    assert case.matrix.row_codebook is not None
    wide = case.matrix._replace(row_codebook=case.matrix.row_codebook.int())
    x = random(3, 576)
    assert_product(codebook_linear(x, wide), x, case.weight)


@pytest.mark.parametrize("rows", [64, 65, 70])
@pytest.mark.parametrize("bits", BITS)
def test_codebooks_in_turn_are_those_of_an_index(kernel: str, bits: int, rows: int) -> None:
    case = make_case(bits, 576, rows=rows, codebooks=5, scales="uint8")
    index = (torch.arange(rows) // -(-rows // 5)).short()
    chosen, in_turn = case.matrix._replace(row_codebook=index), case.matrix._replace(row_codebook=None)
    assert torch.equal(dequantize(in_turn, torch.float32), dequantize(chosen, torch.float32))
    assert torch.equal(dequantize(in_turn, torch.float32, 20, 50), dequantize(chosen, torch.float32, 20, 50))
    for count in (1, 3, 40):
        x = random(count, 576)
        assert torch.equal(codebook_linear(x, in_turn), codebook_linear(x, chosen))


@pytest.mark.parametrize("columns", [*COLUMNS, 1])
@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_packing(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, words_per_row(columns, bits)) and packed.dtype == torch.int32
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    if columns in (576, 1536):
        assert packed.numel() * 32 == bits * codes.numel()


def test_places_of_the_codes() -> None:
    for bits in BITS:
        for column in range(64):
            codes = torch.zeros(1, 64, dtype=torch.uint8)
            codes[0, column] = (1 << bits) - 1
            words = [word & 0xFFFFFFFF for word in pack_codes(codes, bits)[0].tolist()]
            unit, place = divmod(column, 32)
            half, lane = divmod(place, 16)
            expected = [0] * len(words)
            if bits == 4:
                expected[4 * unit + 2 * half + lane % 2] = 15 << 4 * (lane // 2)
            else:
                expected[bits * unit + half] = 3 << 2 * lane
            if bits == 3:
                expected[3 * unit + 2] = 1 << place
            assert words == expected


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="with 2 bits the largest is 3"):
        pack_codes(torch.full((1, 4), 4, dtype=torch.uint8), 2)
    with pytest.raises(ConfigurationError, match="must be 2, 3 or 4"):
        pack_codes(torch.zeros(1, 4, dtype=torch.uint8), 5)
    with pytest.raises(ConfigurationError, match="take 6 words a row, got 3"):
        unpack_codes(torch.zeros(1, 3, dtype=torch.int32), 3, 64)


def test_shapes_of_x(kernel: str) -> None:
    case = make_case()
    x = random(2, 3, 100)
    assert_product(codebook_linear(x, case.matrix), x, case.weight)
    assert_product(codebook_linear(x[0, 0], case.matrix), x[0, 0], case.weight)
    assert_product(codebook_linear(x[:, 1], case.matrix), x[:, 1], case.weight)
    strided = random(100, 6).T
    assert_product(codebook_linear(strided, case.matrix), strided, case.weight)
    assert codebook_linear(x[:, :0], case.matrix).shape == (2, 0, ROWS)
    empty = codebook_linear(x[:0].requires_grad_(), case.matrix)
    empty.sum().backward()
    assert empty.shape == (0, 3, ROWS)


@compiled
def test_number_of_threads_and_of_rows_change_no_bit() -> None:
    case = make_case(4, 1536, rows=333, group=64)
    x = random(40, 1536)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(codebook_linear(x, case.matrix))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert torch.equal(results[0][:1], codebook_linear(x[:1], case.matrix))


@compiled
def test_work_is_divided_between_the_threads_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of GOMP_parallel: a function that runs the work in as many Python threads, and counts."""
    asked: list[int] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function: int, data: int, threads: int, _: int) -> None:
        asked.append(threads)
        work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
        team = [threading.Thread(target=work, args=(data,)) for _ in range(threads)]
        for member in team:
            member.start()
        for member in team:
            member.join()

    loaded = library.active_library()
    assert loaded is not None
    case, small = make_case(4, 1536, rows=333), make_case(4, 64)
    x, short = random(3, 1536), random(1, 64)
    expected = codebook_linear(x, case.matrix)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loaded, "_parallel", ctypes.cast(parallel, ctypes.c_void_p))
            loaded.select(kernel_name())
            assert torch.equal(codebook_linear(x, case.matrix), expected)
            assert asked == [3]
            codebook_linear(short, small.matrix)
            assert asked == [3], "small work must stay in one thread"
    finally:
        loaded.select(kernel_name())


@compiled
def test_threads_are_those_of_torch() -> None:
    loaded = library.active_library()
    assert loaded is not None
    if "OpenMP" in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        assert loaded._parallel is not None
    # In a process of its own: here other tests may have loaded libraries that bring a runtime along.
    code = (
        "from pathlib import Path; from hf_compress.kernels import library; assert library.active_library(); "
        "maps = Path('/proc/self/maps').read_text().splitlines(); "
        "print(len({line.split()[-1] for line in maps if 'libgomp' in line or 'libomp' in line}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) <= 1


def bad_inputs() -> dict[str, tuple[dict[str, Any], Tensor, str]]:
    x = random(2, 100)
    return {
        "bits": ({"bits": 5}, x, "`bits` must be 2, 3 or 4"),
        "group": ({"column_group": 48}, x, "must be a multiple of 32 or cover all columns"),
        "packed shape": ({"packed": torch.zeros(ROWS, 9, dtype=torch.int32)}, x, "`packed` must have shape"),
        "packed dtype": ({"packed": torch.zeros(ROWS, 12, dtype=torch.int64)}, x, "and dtype int32"),
        "codebooks": ({"codebooks": torch.zeros(3, 4).half()}, x, "`codebooks` must have shape"),
        "scales": ({"scales": torch.zeros(ROWS, 3).half()}, x, "`scales` must have shape"),
        "uint8 scales": ({"scales": torch.zeros(ROWS, 4, dtype=torch.uint8)}, x, "`scales` must have shape"),
        "row_scales": ({"row_scales": torch.zeros(ROWS).half()}, x, "`scales` must have shape"),
        "row_codebook": ({"row_codebook": torch.zeros(ROWS, dtype=torch.int64)}, x, "dtype int16 or int32"),
        "no codebook": ({"codebooks": torch.zeros(0, 8).half()}, x, "there is no codebook"),
        "codebooks without rows": (
            {"codebooks": torch.zeros(ROWS + 1, 8).half(), "row_codebook": None},
            x,
            f"{ROWS + 1} codebooks for {ROWS} rows, and no `row_codebook`",
        ),
        "strides": ({"codebooks": torch.zeros(8, 3).half().T}, x, "`codebooks` must be contiguous"),
        "device": ({"codebooks": torch.zeros(3, 8, device="meta").half()}, x, "`codebooks` is on meta"),
        "features": ({}, random(2, 96), "last dimension is 100"),
        "integers": ({}, torch.zeros(2, 100, dtype=torch.int32), "must be a float tensor"),
        "scalar": ({}, torch.tensor(1.0), "last dimension is 100"),
    }


@pytest.mark.parametrize("what", sorted(bad_inputs()))
def test_what_does_not_fit_is_named(kernel: str, what: str, unchecked_types: None) -> None:
    fields, x, message = bad_inputs()[what]
    broken = make_case().matrix._replace(**fields)
    with pytest.raises(ConfigurationError, match=message):
        codebook_linear(x, broken)
    if fields:
        with pytest.raises(ConfigurationError, match=message):
            check_matrix(broken)


def test_bias_and_rows_that_do_not_fit(kernel: str) -> None:
    case = make_case()
    with pytest.raises(ConfigurationError, match=r"the bias must have shape \(45,\)"):
        codebook_linear(random(2, 100), case.matrix, random(44))
    with pytest.raises(ConfigurationError, match="rows 40 to 46"):
        dequantize(case.matrix, torch.float32, 40, 46)
    mixed = codebook_linear(random(2, 100), case.matrix, random(ROWS, dtype=torch.bfloat16))
    assert_product(mixed, random(2, 100), case.weight, random(ROWS, dtype=torch.bfloat16))


@pytest.mark.parametrize("index", [-1, 3])
def test_codebook_that_is_not_there(kernel: str, index: int) -> None:
    case = make_case()
    assert case.matrix.row_codebook is not None
    check_matrix(case.matrix)
    case.matrix.row_codebook[40] = index
    with pytest.raises(ConfigurationError, match="`row_codebook` goes from"):
        check_matrix(case.matrix)
    if kernel != "torch":
        with pytest.raises(CompressionError, match="names a codebook that is not there"):
            codebook_linear(random(2, 100), case.matrix)
        with pytest.raises(CompressionError, match="names a codebook that is not there"):
            dequantize(case.matrix)


def test_loaded_values_must_be_finite() -> None:
    case = make_case(scales="uint8")
    assert case.matrix.row_scales is not None
    case.matrix.row_scales[0] = torch.inf
    with pytest.raises(ConfigurationError, match="`row_scales` has values that are not finite"):
        check_matrix(case.matrix)


def test_changed_tensors_are_noticed(kernel: str) -> None:
    case, other = make_case(), make_case(codebooks=3, scales="float16", rows=ROWS)
    x = random(2, 100)
    codebook_linear(x, case.matrix)
    case.matrix.codebooks.mul_(2)
    assert_product(codebook_linear(x, case.matrix), x, 2 * case.weight)
    case.matrix.codebooks.data = other.matrix.codebooks.clone().float()
    assert_product(codebook_linear(x, case.matrix), x, case.weight)
    swapped = case.matrix._replace(scales=3 * case.matrix.scales)
    assert_product(codebook_linear(x, swapped), x, reference(swapped, case.codes))


def test_nothing_stays_behind_when_a_matrix_goes() -> None:
    case = make_case()
    codebook_linear(random(1, 100), case.matrix)
    key = id(case.matrix.packed)
    assert kernel_name() == "torch" or key in matrix._prepared
    del case
    gc.collect()
    assert key not in matrix._prepared


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As at the start of a process."""
    for name, value in (("library", None), ("problem", None), ("searched", False), ("active", None), ("name", None)):
        monkeypatch.setattr(library._State, name, value)
    monkeypatch.setattr(library._State, "warned", False)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    return monkeypatch


def test_missing_kernel_warns_once_and_works(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(library, "_path", lambda: None)
    case, x = make_case(), random(2, 100)
    with pytest.warns(RuntimeWarning, match="Install a C compiler"):
        y = codebook_linear(x, case.matrix)
    assert_product(y, x, case.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(codebook_linear(x, case.matrix), y)
    assert kernel_name() == "torch" and available_kernels() == ("torch",)
    with pytest.raises(ConfigurationError, match="it was not built"):
        use_kernel("avx2")


@pytest.mark.parametrize("broken", ["no library", "another architecture", "another library", "another version"])
def test_broken_kernel_warns_once_and_works(fresh: pytest.MonkeyPatch, tmp_path: Path, broken: str) -> None:
    path, expected = library._path(), "cannot be used"
    if broken == "no library":
        (tmp_path / "_codebook.so").write_text("not for this machine")
        path = tmp_path / "_codebook.so"
    elif broken == "another library":
        path = Path(_ctypes.__file__)
    elif path is None:
        pytest.skip("without the compiled kernel")
    elif broken == "another version":
        fresh.setattr(library, "VERSION", -1)
        expected = "expected -1"
    else:
        content = bytearray(path.read_bytes())
        if not content.startswith(b"\x7fELF"):
            pytest.skip("not an ELF library")
        content[18:20] = b"\x16\x00"  # e_machine: IBM S/390
        path = tmp_path / path.name
        path.write_bytes(content)
    fresh.setattr(library, "_path", lambda: path)
    case, x = make_case(), random(2, 100)
    with pytest.warns(RuntimeWarning, match=expected):
        y = codebook_linear(x, case.matrix)
    assert_product(y, x, case.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(codebook_linear(x, case.matrix), y)
    assert kernel_name() == "torch"


def test_environment_chooses_the_kernel(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(library.VARIABLE, "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_name() == "torch"
    fresh.setattr(library._State, "name", None)
    fresh.setenv(library.VARIABLE, "mmx")
    with pytest.raises(ConfigurationError, match="kernel 'mmx' is not there"):
        kernel_name()


def test_installation_without_a_compiler_goes_on() -> None:
    """The extension is optional, and the source distribution has all its files."""
    build = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extension = build.split("[[tool.setuptools.ext-modules]]")[1].split("\n[")[0]
    assert "optional = true" in extension
    for path in (*SOURCES.glob("*.c"), *SOURCES.glob("*.h")):
        assert f"csrc/{path.name}" in extension
