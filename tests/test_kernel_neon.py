"""The NEON kernel on any machine: cross-compiled and run by qemu, against float64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_cases import ROWS, assert_product, make_case, random
from torch import Tensor

from hf_compress.kernels import library
from hf_compress.kernels.matrix import prepare

SOURCES = Path(library.__file__).parent / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
DRIVER = r"""
#include "codebook.h"
#include <stdio.h>
#include <stdlib.h>

int32_t hfc_configure(int32_t set, void *function);
int32_t hfc_linear(const hfc_matrix *, const void *, const void *, void *, int64_t, int32_t, int32_t);
int32_t hfc_dequantize(const hfc_matrix *, void *, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t);

static void *read_block(void) {
    int64_t size = 0;
    if (fread(&size, sizeof size, 1, stdin) != 1 || !size) return NULL;
    void *block = malloc((size_t)size);
    return fread(block, 1, (size_t)size, stdin) == (size_t)size ? block : NULL;
}

int main(void) {
    hfc_matrix matrix;
    int64_t type_and_count[2];
    if (!hfc_configure(1, NULL)) return 1;
    while (fread(&matrix, sizeof matrix, 1, stdin) == 1) {
        const void **pointers = (const void **)&matrix;
        for (int i = 0; i < 5; i++) pointers[i] = read_block();
        const void *x = read_block(), *bias = read_block();
        if (fread(type_and_count, sizeof type_and_count, 1, stdin) != 1) return 2;
        const int32_t type = (int32_t)type_and_count[0];
        const size_t y = (size_t)(type_and_count[1] * matrix.rows) * hfc_type_bytes(type);
        const size_t weight = (size_t)(matrix.rows * matrix.columns) * hfc_type_bytes(type);
        char *out = malloc(y + weight);
        if (hfc_linear(&matrix, x, bias, out, type_and_count[1], type, 1)) return 3;
        if (hfc_dequantize(&matrix, out + y, 0, matrix.rows, 0, matrix.columns, type, 1)) return 4;
        fwrite(out, 1, y + weight, stdout);
        free(out);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which(COMPILER) and EMULATOR):
        pytest.skip(f"needs {COMPILER} and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    folder = tmp_path_factory.mktemp("neon")
    (folder / "driver.c").write_text(DRIVER)
    flags = ["-O2", "-static", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *flags, "-o", folder / "driver", folder / "driver.c", *SOURCES.glob("*.c")], check=True)
    return folder / "driver"


def stored(tensor: Tensor | None) -> bytes:
    content = b"" if tensor is None else tensor.flatten().view(torch.uint8).numpy().tobytes()
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize("scales", ["float16", "uint8"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_neon_equals_the_reference(program: Path, bits: int, scales: str) -> None:
    assert EMULATOR is not None
    matrices = [make_case(bits, columns, scales=scales, group=64) for columns in (1, 33, 100, 111, 576, 2048)]
    cases = [
        (case, random(count, case.matrix.columns, dtype=dtype), random(ROWS, dtype=dtype) if count == 2 else None)
        for case in matrices
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for count in (1, 2, 5)
    ]
    given = b""
    for case, x, bias in cases:
        tensors = (*case.arguments[:5], x, bias)
        numbers = b"".join(value.to_bytes(8, "little") for value in (library.TYPES[x.dtype], len(x)))
        given += bytes(prepare(case.matrix).structure) + b"".join(map(stored, tensors)) + numbers
    output = bytearray(subprocess.run([EMULATOR, program], input=given, capture_output=True, check=True).stdout)
    values = memoryview(output)
    for case, x, bias in cases:
        shapes = (len(x), ROWS), (ROWS, case.matrix.columns)
        y, weight = (torch.empty(shape, dtype=x.dtype) for shape in shapes)
        for tensor in (y, weight):
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(torch.frombuffer(values[:size], dtype=x.dtype).view_as(tensor))
            values = values[size:]
        assert_product(y, x, case.weight, bias)
        assert torch.equal(weight, case.weight.float().to(x.dtype))
    assert not values
