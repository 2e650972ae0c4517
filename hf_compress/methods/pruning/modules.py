"""The layer that keeps a pruned matrix as positions and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from ...anatomy import dense_rows
from ...errors import CompressionError
from ...kernels.library import multiplies_bfloat16
from ...kernels.sparse import sparse_linear
from ...layout import is_sharded, register_module_type
from ...resized import resized, shape_spec, stood_on, widened
from .format import DTYPES, SparseFormat, SparseMatrix, checksum_of
from .mathematics import all_finite
from .positions import decoded

# Rows of a matrix that are numbered on loading however few weights are kept: a file of nothing may say that there are
# more rows than memory has room for.
FREE_ROWS = 1 << 16
# Torch multiplies compressed rows on a CPU only with MKL.
SPARSE_ON_CPU = torch.backends.mkl.is_available()
# The largest share of kept weights at which compressed rows are faster than a dense product: on a CPU in float32, for
# matrices so small that the call takes longer than the product, in bfloat16 where a CPU has instructions for it, and
# on other devices.
SPARSE_BELOW = {"cpu": 0.15, "cpu, small": 0.05, "cpu, bfloat16": 0.03, "other": 0.01}
# Weights up to which a matrix is small: one of 384 × 384 is, one of 1536 × 384 is not.
SMALL = 1 << 18


class _OptimizerSteps:
    """How many steps any optimizer of this process has made: fused ones change parameters unseen by autograd."""

    count = 0
    handle: Any = None

    @classmethod
    def seen(cls) -> int:
        if cls.handle is None:
            cls.handle = register_optimizer_step_post_hook(lambda *_: cls._increase())
        return cls.count

    @classmethod
    def _increase(cls) -> None:
        cls.count += 1


def _state_of(tensor: Tensor | None) -> Any:
    """What changes with a tensor's contents, as far as autograd sees it."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.device, 0 if tensor.is_inference() else tensor._version


@register_module_type
class SparseLinear(nn.Linear):
    """`y = x Ŵᵀ + b` with a sparse Ŵ, in place of an `nn.Linear` or of the Conv1D of GPT-2.

    Attributes:
        weight: the positions as bytes, uint8 (bytes,).
        values: the kept weights row by row, (nonzeros,): a parameter in the model's dtype that trains, or int8 with
            `scales` (rows,) in bfloat16.
        row_starts, column_indices: the same positions as compressed rows, made from `weight` and never saved.
    """

    layout_type: ClassVar[str] = "sparse_linear"
    #: `weight` holds positions: nothing may be added to it.
    packs_weight: ClassVar[bool] = True
    _is_hf_initialized: ClassVar[bool] = True
    #: Whether it stands for a layer that was smaller than the dense model's.
    resized: int = 0
    row_starts: Tensor
    column_indices: Tensor
    scales: Tensor | None
    values: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        format: SparseFormat,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear's: it would make a dense weight. The class is one all the same, for PEFT's "all-linear".
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.model_dtype = dtype or torch.get_default_dtype()

        def empty(count: int, kind: torch.dtype | None) -> Tensor:
            return torch.empty(count, dtype=kind, device=device)

        self.register_buffer("weight", empty(format.stream, torch.uint8))
        if format.is_quantized:
            self.register_buffer("values", empty(format.nonzeros, torch.int8))
            self.register_buffer("scales", empty(out_features, torch.bfloat16))
        else:
            self.register_parameter("values", nn.Parameter(empty(format.nonzeros, dtype)))
            self.register_buffer("scales", None)
        self.register_parameter("bias", nn.Parameter(empty(out_features, dtype)) if bias else None)
        for name in ("row_starts", "column_indices"):
            self.register_buffer(name, empty(0, torch.int32), persistent=False)
        # A dense copy, where that is faster, with what it was made from.
        self.__dict__["_dense"] = None

    @classmethod
    def in_place_of(cls, dense: nn.Module, matrix: SparseMatrix) -> SparseLinear:
        """A filled layer on the dense one's device and in its dtype."""
        rows, columns = dense_rows(dense).shape
        weight, bias = dense.get_parameter("weight"), getattr(dense, "bias", None)
        layer = cls(columns, rows, bias is not None, format=matrix.format, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.get_buffer("weight").copy_(matrix.stream)
            layer.values.copy_(matrix.values)
            if layer.scales is not None and matrix.scales is not None:
                layer.scales.copy_(matrix.scales)
            if bias is not None:
                layer.bias.copy_(bias)
        layer.expand_positions()
        layer.resized = resized(dense)
        return layer.train(dense.training)

    def spec(self) -> dict[str, Any]:
        return {**self.format.spec(), **shape_spec(self)}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> SparseLinear:
        if not isinstance(dense, (nn.Linear, Conv1D)):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear or a Conv1D")
        dense, rest = stood_on(dense, spec)
        rows, columns = dense_rows(dense).shape
        weight: Any = dense.weight
        format = SparseFormat.from_spec(rest, rows, columns)
        layer = cls(columns, rows, dense.bias is not None, format=format, device=weight.device, dtype=weight.dtype)
        layer.resized = resized(dense)
        return layer

    @property
    def dense_weights(self) -> int:
        """Weights of the dense layer."""
        return self.in_features * self.out_features

    @property
    def kept_weights(self) -> int:
        """Weights that are stored."""
        return self.format.nonzeros

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.format.nonzeros / self.dense_weights

    def stored_bytes(self) -> int:
        """Bytes in a file of everything that stands for the matrix, without the bias."""
        scales = 2 * self.out_features if self.format.is_quantized else 0
        return self.format.stream + self.format.nonzeros * DTYPES[self.format.values].itemsize + scales

    @torch.no_grad()
    def expand_positions(self) -> None:
        """Compressed rows from the positions. Raises `ValueError` where they are damaged."""
        if self.get_buffer("weight").is_meta:
            return
        starts = torch.zeros(self.out_features + 1, dtype=torch.int32, device=self.get_buffer("weight").device)
        columns = torch.empty(self.format.nonzeros, dtype=torch.int32, device=starts.device)
        done = 0
        for kept in self._positions():
            rows = torch.div(kept, self.in_features, rounding_mode="floor")
            columns[done : done + len(kept)] = kept - rows * self.in_features
            done += len(kept)
            present, counts = torch.unique_consecutive(rows, return_counts=True)
            starts[1 + present] += counts.to(torch.int32)
        self.row_starts, self.column_indices = starts.cumsum_(0), columns
        self.__dict__["_dense"] = None

    def _positions(self) -> Iterator[Tensor]:
        stream = self.get_buffer("weight")
        return decoded(self.format.positions, stream, self.format.nonzeros, self.dense_weights)

    def kept_values(self) -> Float[Tensor, "nonzeros"]:
        """The weights that `matrix` holds, row by row; with a gradient to `values`."""
        if self.scales is None:
            return self.values
        return self.values.float() * self.scales.float().repeat_interleave(torch.diff(self._rows()[0]))

    def mask(self) -> Bool[Tensor, "rows columns"]:
        """What is kept."""
        return self._scattered(torch.ones_like(self._rows()[1], dtype=torch.bool))

    def matrix(self) -> Float[Tensor, "rows columns"]:
        """`Ŵ`, dense."""
        return self._scattered(self.kept_values())

    def _scattered(self, values: Tensor) -> Tensor:
        row_starts, column_indices = self._rows()
        rows = torch.arange(self.out_features, device=values.device).repeat_interleave(torch.diff(row_starts))
        dense = values.new_zeros(self.out_features, self.in_features)
        return dense.index_put((rows, column_indices.long()), values)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The compressed rows; made at the first call where positions are offloaded or most rows are empty."""
        if len(self.row_starts) == 0:
            self.expand_positions()
        return self.row_starts, self.column_indices

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        row_starts, column_indices = self._rows()
        if self.runs_sparse(input):
            return sparse_linear(input, self.kept_values(), row_starts, column_indices, self.in_features, self.bias)
        return nn.functional.linear(input, self._dense_weight(input.dtype), self.bias)

    def runs_sparse(self, input: Tensor) -> bool:
        """Whether the product runs on compressed rows; a dense copy is faster where many weights are kept."""
        if input.device.type != "cpu":
            limit = "other"
        elif not SPARSE_ON_CPU:
            return False
        else:
            narrow = input.dtype == torch.bfloat16 and multiplies_bfloat16()
            wide = "cpu, small" if self.dense_weights <= SMALL else "cpu"
            limit = "cpu, bfloat16" if narrow else wide
        return self.density <= SPARSE_BELOW[limit]

    def _dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """`Ŵ` in a dtype: kept between calls while the values stay the same, made afresh where they are trained."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self.values.requires_grad):
            return self.matrix().to(dtype)
        made_from = (dtype, _OptimizerSteps.seen(), _state_of(self.values), _state_of(self.scales))
        held = self.__dict__["_dense"]
        if held is None or held[0] != made_from:
            # A copy made in inference mode could not be used in a training.
            with torch.inference_mode(False), torch.no_grad():
                held = (made_from, self.matrix().to(dtype))
            self.__dict__["_dense"] = held
        weight: Tensor = held[1]
        return weight

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        """The dense matrix with its zeros."""
        weight = self.matrix().T if isinstance(dense, Conv1D) else self.matrix()
        return widened(
            {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias},
            dense,
            self.resized or 1,
        )

    def check_tensors(self) -> None:
        """After loading: positions that fit, finite values. Raises `ValueError`."""
        if self.get_buffer("weight").is_meta or self.values.is_meta:
            return  # offloaded
        if self.out_features <= max(FREE_ROWS, self.format.nonzeros):
            self.expand_positions()
        else:
            for _ in self._positions():  # looked at; their rows are numbered when they are used
                pass
        found = checksum_of(self.get_buffer("weight"))
        if self.format.checksum not in (None, found):
            raise ValueError(f"the positions have the checksum {found}, expected {self.format.checksum}")
        if self.scales is None and self.values.dtype != self.model_dtype:
            # Transformers leaves what it loads for a quantizer in the file's dtype.
            self.values.data = self.values.data.to(self.model_dtype)
        numbers = self.values if self.scales is None else self.scales
        if not all_finite([numbers]):
            raise ValueError("a kept weight is not finite")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What is saved is what the format says, whatever the model computes in.
        if not keep_vars:
            name, kind = f"{prefix}values", DTYPES[self.format.values]
            found = destination[name]
            if kind.is_floating_point and not found.is_meta and len(found):
                largest = found.abs().max()
                # Of a part on each process, all have to come to the same conclusion.
                largest = float(largest.full_tensor() if is_sharded(largest) else largest)
                if not math.isfinite(largest):
                    raise CompressionError(
                        f"{prefix.removesuffix('.')!r} has a weight of {largest}: it could not be loaded again. "
                        "Go back to a checkpoint from before the training diverged."
                    )
                if kind == torch.float16 and largest > torch.finfo(kind).max:
                    raise CompressionError(
                        f"{prefix.removesuffix('.')!r} has a weight of {largest:.3g}, beyond the float16 that it is "
                        'stored in. Prune again with values="bfloat16".'
                    )
            destination[name] = found.to(kind)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.expand_positions()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.__dict__["_dense"] = None
        return self

    def train(self, mode: bool = True) -> SparseLinear:
        """As of any module; changes of `values.data`, which nothing else shows, are seen from here on."""
        self.__dict__["_dense"] = None
        super().train(mode)
        return self

    def reset_parameters(self) -> None:
        raise CompressionError(f"a {type(self).__name__} has no dense weight to initialise.")

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, density={self.density:.4f}, values={self.format.values}"
