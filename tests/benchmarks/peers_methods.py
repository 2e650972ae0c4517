"""The quantizers that `codebook_peers.py` compares, each on the same matrices: those of the blocks.

A quantizer changes the matrices of a model in place and returns how many bits it stores for them, the biases left out.
Where a peer keeps its scales in the model's dtype they are rounded to fp16 and counted so: a float32 model must not
make a peer look larger.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hf_compress
from hf_compress import CalibrationConfig, CodebookConfig
from hf_compress.anatomy import resolve_anatomy

GROUP = 64


@dataclass(frozen=True)
class Inputs:
    """What a quantizer may use beside the weights.

    Args:
        source: what to calibrate on; `None` for a start without data.
        processing_class: tokenizer of the source, if it has one.
    """

    source: CalibrationConfig | None
    processing_class: Any = None


Quantizer = Callable[[Any, list[str], int, Inputs], float]


@dataclass(frozen=True)
class Method:
    """A row of the table: its name, the bits that it knows, and the function."""

    name: str
    bits: tuple[int, ...]
    quantize: Quantizer


def block_matrices(model: Any) -> list[str]:
    """Paths of every `nn.Linear` of the blocks; embeddings and heads are not among them."""
    anatomy = resolve_anatomy(model)
    return [path for index in range(len(anatomy)) for path, _ in anatomy.block_matrices(index)]


def weight_count(model: Any, paths: list[str]) -> int:
    return sum(model.get_submodule(path).weight.numel() for path in paths)


def ours(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    learning = "joint" if inputs.source is not None else "none"
    config = CodebookConfig(bits=bits, learning=learning, calibration=inputs.source)
    hf_compress.compress(model, config, processing_class=inputs.processing_class)
    coded = [row for row in model.compression_report.modules if row.bytes_after]
    assert {row.path for row in coded} == set(paths)
    return 8 * sum(row.bytes_after for row in coded)


def round_to_nearest(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    """Ours, affine. Stored would be the codes, and for every group an fp16 scale and a zero point of `bits` bits."""
    stored = 0.0
    for path in paths:
        weight = model.get_submodule(path).weight.data
        groups = weight.float().reshape(-1, GROUP)
        low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=torch.finfo(torch.float16).tiny)
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
        codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
        weight.copy_(((codes - zero) * scale).reshape(weight.shape))
        stored += bits * weight.numel() + (16 + bits) * len(groups)
    return stored


def nf4(model: Any, paths: list[str], bits: int, inputs: Inputs, *, double: bool = False) -> float:
    """What bitsandbytes writes to a file: codes, scales a block of 64 (fp32, or 8 bits of two levels), tables."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    stored = 0
    for path in paths:
        dense = model.get_submodule(path)
        options = {"compress_statistics": double, "quant_type": "nf4"}
        layer = Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=dense.weight.dtype,
            device="meta",
            **options,
        )
        weight = Params4bit(dense.weight.data, requires_grad=False, blocksize=64, module=layer, **options)
        layer.weight, layer.bias = weight.to("cpu"), dense.bias
        model.set_submodule(path, layer.eval())
        stored += _bits([layer.weight.data, *layer.weight.quant_state.as_dict(packed=True).values()])
    return stored


def nf4_double(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    return nf4(model, paths, bits, inputs, double=True)


def hqq(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    """Packed codes (3 bits: ten in 32 bits), and for every group a scale and a zero point."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    stored = 0
    for path in paths:
        dense = model.get_submodule(path)
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        layer = HQQLinear(dense, config, compute_dtype=dense.weight.dtype, device="cpu")
        tables = [layer.meta["scale"], layer.meta["zero"]]
        stored += _bits([layer.W_q]) + _round_to_half(tables)
        model.set_submodule(path, layer)
    return stored


def quanto(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    """Packed codes, and for every group (128 columns, fewer where they do not divide the row) a scale and a shift."""
    from optimum.quanto import freeze, qint2, qint4, quantize

    quantize(model, weights={2: qint2, 4: qint4}[bits], include=paths)
    freeze(model)
    stored = 0
    for path in paths:
        layer = model.get_submodule(path)
        tensors = {name: tensor for name, tensor in layer.state_dict().items() if name.startswith("weight.")}
        tables = [tensors.pop("weight._scale"), tensors.pop("weight._shift")]
        stored += _bits(tensors.values()) + _round_to_half(tables)
    return stored


def torchao(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    """Integer weights with a scale and an 8-bit zero point a group. On this route torchao holds every code in int8
    whatever its bits; counted are `bits` a code, as in its packed formats."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(GROUP),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )
    chosen = set(paths)
    quantize_(model, config, filter_fn=lambda _module, name: name in chosen)
    stored = 0
    for path in paths:
        weight = model.get_submodule(path).weight
        stored += bits * weight.qdata.numel() + _bits([weight.scale, weight.zero_point])
    return stored


def gptq(model: Any, paths: list[str], bits: int, inputs: Inputs) -> float:
    """GPTQ by GPTQModel, calibrated on the same rows; packed codes, fp16 scales, packed zero points.

    It loads the model itself and is only fit to run once saved and loaded again; its layers then replace those of
    `model`. `g_idx` is not counted: without act-order it follows from the group size.
    """
    # Its pool of threads refuses to start with one worker, which is what it takes on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    if inputs.source is None or inputs.source.kind != "tokens":
        raise NotImplementedError("GPTQModel is run here for language models only")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in inputs.source.dataset]
    config = QuantizeConfig(bits=bits, group_size=GROUP, desc_act=False)
    # Its tables of progress would stand among our lines.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        quantized = GPTQModel.load(model.name_or_path, config, device="cpu")
        quantized.quantize(rows, batch_size=1)
        quantized.save(folder)
        quantized = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
    stored = 0
    for path in paths:
        layer = quantized.model.get_submodule(path)
        stored += _bits([layer.qweight, layer.qzeros, layer.scales])
        model.set_submodule(path, layer)
    return stored


def _bits(tensors: Iterable[Tensor]) -> int:
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _round_to_half(tables: list[Tensor]) -> int:
    """Round in place what is wider than fp16; the bits of it."""
    for table in tables:
        # HQQ makes inference tensors, which may only be changed in inference mode.
        with torch.inference_mode(table.is_inference()):
            table.copy_(table.half() if table.element_size() > 2 else table)
    return 16 * sum(table.numel() for table in tables)


# By the word on the command line; every package may bring several rows.
METHODS: dict[str, tuple[Method, ...]] = {
    "ours": (Method("hf_compress", (4, 3, 2), ours),),
    "rtn": (Method(f"round to nearest, group {GROUP}", (4, 3, 2), round_to_nearest),),
    "bnb": (
        Method("bitsandbytes NF4, block 64", (4,), nf4),
        Method("bitsandbytes NF4, double quantization", (4,), nf4_double),
    ),
    "hqq": (Method(f"HQQ, group {GROUP}", (4, 3, 2), hqq),),
    "quanto": (Method("optimum-quanto", (4, 2), quanto),),
    "torchao": (Method(f"torchao intx, group {GROUP}", (4, 3, 2), torchao),),
    "gptq": (Method(f"GPTQModel, group {GROUP}", (4, 3, 2), gptq),),
}
