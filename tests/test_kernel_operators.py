"""The operators of the codebook kernels under autograd, torch.compile and other tracers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import ROWS, assert_product, make_case, random, reference, rounded
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from hf_compress.kernels import CodebookMatrix, available_kernels, codebook_linear, dequantize, forced_kernel


@pytest.fixture(params=available_kernels())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_kernel(request.param):
        yield request.param


@pytest.mark.parametrize("scales", ["float16", "uint8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operators_fulfil_torchs_contract(scales: str, dtype: torch.dtype, unchecked_types: None) -> None:
    case = make_case(scales=scales)
    operators = torch.ops.hf_compress
    x, bias = random(2, 3, 100, dtype=dtype).requires_grad_(), random(ROWS, dtype=dtype).requires_grad_()
    gradient = random(2, 3, ROWS, dtype=dtype).requires_grad_()
    packed, codebooks, scales_, row_scales, row_codebook, *numbers = case.arguments
    trained = [
        tensor.float().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in (codebooks, scales_, row_scales)
    ]
    opcheck(operators.codebook_linear, (x, *case.arguments[:5], bias, *numbers))
    opcheck(operators.codebook_linear, (x, packed, *trained, row_codebook, None, *numbers))
    opcheck(operators.codebook_input_gradient, (gradient, *case.arguments))
    opcheck(operators.codebook_dequantize, (*case.arguments, dtype, 3, None))
    opcheck(operators.codebook_dequantize, (packed, *trained, row_codebook, *numbers, dtype, 0, 9))
    opcheck(operators.codebook_table_gradients, (gradient.detach(), x.detach(), *case.arguments, 0))


@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("scales", ["float16", "uint8"])
def test_gradients_equal_those_through_the_dense_matrix(kernel: str, scales: str, codebooks: int) -> None:
    case = make_case(scales=scales, codebooks=codebooks)
    x, bias = random(2, 5, 100).requires_grad_(), random(ROWS).requires_grad_()
    tables = {
        name: tensor.float().requires_grad_()
        for name in ("codebooks", "scales", "row_scales")
        if (tensor := getattr(case.matrix, name)) is not None and tensor.is_floating_point()
    }
    trained = case.matrix._replace(**tables)
    leaves, seed = [x, bias, *tables.values()], random(2, 5, ROWS, seed=4)
    y = codebook_linear(x, trained, bias)
    found = torch.autograd.grad(y, leaves, seed)
    dense = x.double() @ reference(trained, case.codes).T + bias
    for got, expected in zip(found, torch.autograd.grad(dense, leaves, seed.double()), strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-4)
    rows = torch.autograd.grad(dequantize(trained, torch.float32, 3, 10), leaves[2:], random(7, 100))
    dense_rows = torch.autograd.grad(reference(trained, case.codes)[3:10], leaves[2:], random(7, 100).double())
    for got, expected in zip(rows, dense_rows, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-4)


def test_second_derivative() -> None:
    case = make_case()
    x = random(3, 100).requires_grad_()
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0].pow(2).sum(),
            x,
        )[0]
        for y in (codebook_linear(x, case.matrix), x @ case.weight.float().T)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_half_precision_gradient_keeps_its_dtype() -> None:
    case = make_case()
    x = random(3, 100, dtype=torch.bfloat16).requires_grad_()
    y = codebook_linear(x, case.matrix)
    y.backward(random(3, ROWS, dtype=torch.bfloat16))
    assert x.grad is not None
    assert_product(x.grad, random(3, ROWS, dtype=torch.bfloat16), rounded(case.weight.T, torch.bfloat16))


def test_compiled_without_a_graph_break(unchecked_types: None) -> None:
    case = make_case()

    def function(x: Tensor) -> Tensor:
        return codebook_linear(x, case.matrix).relu() @ dequantize(case.matrix)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, again = random(4, 100).requires_grad_(), random(4, 100).requires_grad_()
    torch.testing.assert_close(compiled(x), function(again))
    compiled(x).sum().backward()
    function(again).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(random(6, 100)), function(random(6, 100)))


def test_tracing_sees_the_operator(unchecked_types: None) -> None:
    case = make_case()
    graph = make_fx(lambda x: codebook_linear(x, case.matrix))(random(2, 100))
    assert "hf_compress.codebook_linear" in graph.code
    x = random(5, 100)
    torch.testing.assert_close(graph(random(2, 100)), codebook_linear(random(2, 100), case.matrix))
    vmapped = torch.vmap(lambda row: codebook_linear(row, case.matrix))(x)
    torch.testing.assert_close(vmapped, codebook_linear(x, case.matrix))


def test_meta_tensors(unchecked_types: None) -> None:
    case = make_case()
    empty = CodebookMatrix(*(value.to("meta") if isinstance(value, Tensor) else value for value in case.matrix))
    y = codebook_linear(torch.empty(2, 100, device="meta", dtype=torch.bfloat16), empty)
    assert y.shape == (2, ROWS) and y.dtype == torch.bfloat16 and y.is_meta
    assert dequantize(empty, torch.float16).shape == (ROWS, 100)
