"""The NEON kernel on any machine: cross-compiled and run by qemu, against float64."""

from __future__ import annotations

import itertools
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
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Reads blocks of bytes, each after its size: the matrix, its five tensors, x, the bias, then the type and rows of x.
DRIVER = r"""
#include "codebook.h"
#include <stdio.h>
#include <stdlib.h>

int32_t hfc_configure(int32_t, void *);
int32_t hfc_linear(const hfc_matrix *, const void *, const void *, void *, int64_t, int32_t, int32_t);
int32_t hfc_dequantize(const hfc_matrix *, void *, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t);

static void *block(void) {
    int64_t size;
    if (fread(&size, sizeof size, 1, stdin) != 1 || !size) return NULL;
    void *content = malloc((size_t)size);
    return fread(content, 1, (size_t)size, stdin) == (size_t)size ? content : NULL;
}

int main(void) {
    if (!hfc_configure(1, NULL)) return 1;
    for (hfc_matrix *matrix; (matrix = block());) {
        for (int i = 0; i < 5; i++) ((void **)matrix)[i] = block();
        const void *x = block(), *bias = block();
        const int32_t *call = block();
        const size_t bytes = hfc_type_bytes(call[0]), rows = (size_t)matrix->rows;
        void *y = malloc((size_t)call[1] * rows * bytes), *weight = malloc(rows * (size_t)matrix->columns * bytes);
        if (hfc_linear(matrix, x, bias, y, call[1], call[0], 1)) return 2;
        if (hfc_dequantize(matrix, weight, 0, matrix->rows, 0, matrix->columns, call[0], 1)) return 3;
        fwrite(y, bytes, (size_t)call[1] * rows, stdout);
        fwrite(weight, bytes, rows * (size_t)matrix->columns, stdout);
    }
    return 0;
}
"""


def block(content: bytes | Tensor | None) -> bytes:
    if isinstance(content, Tensor):
        content = content.flatten().view(torch.uint8).numpy().tobytes()
    return len(content or b"").to_bytes(8, "little") + (content or b"")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    path = tmp_path_factory.mktemp("neon") / "driver"
    path.with_suffix(".c").write_text(DRIVER)
    flags = ["-O2", "-static", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-o", path]
    subprocess.run([compiler, *flags, path.with_suffix(".c"), *SOURCES.glob("*.c")], check=True)
    return [emulator, str(path)]


@pytest.mark.parametrize("scales", ["float16", "uint8"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_neon_equals_the_reference(program: list[str], bits: int, scales: str) -> None:
    given, cases = b"", []
    for columns, dtype, count in itertools.product((1, 33, 100, 111, 576, 2048), DTYPES, (1, 2, 5)):
        case, x = make_case(bits, columns, scales=scales, group=64), random(count, columns, dtype=dtype)
        bias = random(ROWS, dtype=dtype) if count == 2 else None
        call = torch.tensor([library.TYPES[dtype], count], dtype=torch.int32)
        given += b"".join(map(block, (bytes(prepare(case.matrix).structure), *case.arguments[:5], x, bias, call)))
        cases.append((case, x, bias))
    output = bytearray(subprocess.run(program, input=given, capture_output=True, check=True).stdout)
    start = 0
    for case, x, bias in cases:
        sizes = len(x) * ROWS, case.weight.numel()
        values = torch.frombuffer(output, dtype=x.dtype, offset=start, count=sum(sizes))
        start += values.numel() * values.element_size()
        y, weight = values.split(sizes)
        assert_product(y.view(len(x), ROWS), x, case.weight, bias)
        assert torch.equal(weight.view_as(case.weight), case.weight.float().to(x.dtype))
    assert start == len(output)
