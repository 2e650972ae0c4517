"""The layers that keep their weights as packed codes, and how they stand for dense ones."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...anatomy import dense_rows
from ...checked import is_path, short
from ...errors import CompressionError
from ...kernels import codebook as kernel
from ...layout import register_module_type, require_gathered
from ...resized import resized, stood_on, widened
from ..sharing.modules import SharedLinear
from .coded import Coded
from .weight import FORMAT_TENSORS, CodebookFormat, PackedWeight

DenseLayer: TypeAlias = nn.Linear | Conv1D | nn.Conv2d | nn.Embedding


def coded_layer(
    dense: nn.Module,
    coded: Coded | None,
    format: CodebookFormat,
    device: Any = None,
    rows: Int[Tensor, " rows"] | None = None,
) -> Any:
    """The packed layer in place of a dense one, filled if `coded` is given, on the dense one's device or another;
    `rows` are the dense one's in the order of the codes.

    Raises `ValueError` for a layer that has no packed form.
    """
    known = next((kind for kind in _LAYERS if isinstance(dense, kind)), None)
    if known is None:
        raise ValueError(f"replaces a {type(dense).__name__}, expected one of {_names()}")
    layer = _LAYERS[known].in_place_of(dense, format, dense.weight.device if device is None else device)
    layer.resized = resized(dense)
    if coded is not None:
        layer.fill(coded)
        beside = {name: own for name, own in layer.named_parameters() if name not in FORMAT_TENSORS}
        with torch.no_grad():
            for name, own in beside.items():
                beside_rows = dense.get_parameter(name)
                own.copy_(beside_rows if rows is None else beside_rows[rows])
    return layer


def _names() -> str:
    return ", ".join(kind.__name__ for kind in _LAYERS)


def _from_spec(cls: type[Any], dense: nn.Module, spec: dict[str, Any]) -> Any:
    if not isinstance(dense, tuple(_LAYERS)):
        raise ValueError(f"replaces a {type(dense).__name__}, expected one of {_names()}")
    dense, rest = stood_on(dense, spec)
    layer = coded_layer(dense, None, CodebookFormat.from_spec(rest, *dense_rows(dense).shape))
    if type(layer) is not cls:
        raise ValueError(f"replaces a {type(dense).__name__}, for which it is not made")
    return layer


@register_module_type
class CodebookLinear(PackedWeight, nn.Linear):
    """`y = x Ŵᵀ + b` in place of an `nn.Linear`, or of the Conv1D of GPT-2 (the same with a transposed weight).

    Args:
        in_features, out_features: as of the dense layer.
        bias: whether there is one.
        format: how the weight is kept.
    """

    layout_type: ClassVar[str] = "codebook_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        format: CodebookFormat,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear's: it would make a dense weight. The class is one all the same, for PEFT's "all-linear".
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.make_tensors(out_features, in_features, format, device)
        own = torch.empty(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(own) if bias else None)

    @classmethod
    def in_place_of(cls, dense: nn.Linear | Conv1D, format: CodebookFormat, device: Any) -> CodebookLinear:
        rows, columns = dense_rows(dense).shape
        bias = dense.bias is not None
        return cls(columns, rows, bias, format=format, device=device, dtype=dense.weight.dtype)

    from_spec = classmethod(_from_spec)

    @property
    def bits(self) -> float:
        return self.format.bits

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return kernel.codebook_linear(input, self.as_matrix(), self.bias)

    def with_weight(
        self, input: Float[Tensor, "*batch columns"], weight: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "*batch rows"]:
        """What the layer would give with another weight, for training."""
        return nn.functional.linear(input, weight, self.bias)

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        weight = self.matrix().T if isinstance(dense, Conv1D) else self.matrix()
        return widened(
            {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias},
            dense,
            self.resized or 1,
        )

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, bits={self.bits}, column_group={self.format.column_group}"


@register_module_type
class CodebookSharedLinear(PackedWeight, SharedLinear):
    """A matrix that several loops use, as codes; corrections, biases and steps of the loops stay as they are."""

    layout_type: ClassVar[str] = "codebook_shared_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        rank: int,
        format: CodebookFormat,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.make_tensors(out_features, in_features, format, device)
        self._make_own(in_features, out_features, bias, None, rank, device, dtype)

    @classmethod
    def in_place_of(cls, dense: SharedLinear, format: CodebookFormat, device: Any) -> CodebookSharedLinear:
        if dense.source_path is not None:
            raise ValueError("uses the matrix of another layer, which is the one to code")
        sizes, dtype = (dense.in_features, dense.out_features, dense.bias is not None), dense.weight.dtype
        return cls(*sizes, rank=dense.rank, format=format, device=device, dtype=dtype)

    def spec(self) -> dict[str, Any]:
        return {**self.format.spec(), "rank": self.rank, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> CodebookSharedLinear:
        if not isinstance(dense, (nn.Linear, Conv1D)):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear or a Conv1D")
        rows, columns = dense_rows(dense).shape
        rank, bias = cls.own_sizes(rows, columns, spec)
        own = {name: value for name, value in spec.items() if name not in ("rank", "bias")}
        format, weight = CodebookFormat.from_spec(own, rows, columns), dense.weight
        return cls(columns, rows, bias, rank=rank, format=format, device=weight.device, dtype=weight.dtype)

    def own_matrix(self) -> Float[Tensor, "rows columns"]:
        return self.matrix()

    def times_own_matrix(
        self, input: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None
    ) -> Float[Tensor, "*batch rows"]:
        matrix = self.as_matrix()
        # Loops may be placed on different devices: the codes stay where they are.
        local = input.to(matrix.packed.device)
        return kernel.codebook_linear(local, matrix, None if bias is None else bias.to(local.device)).to(input.device)

    def with_weight(
        self, input: Float[Tensor, "*batch columns"], weight: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "*batch rows"]:
        """What the layer would give with another weight, for training."""
        return self.corrected(input, nn.functional.linear(input, weight, self.bias))

    def extra_repr(self) -> str:
        return f"{SharedLinear.extra_repr(self)}, bits={self.format.bits}"


@register_module_type
class CodebookConv2d(PackedWeight, nn.Conv2d):
    """A convolution whose filters, flattened to (out_channels, in_channels / groups · kh · kw), are rows of codes.

    The filters are written out for every call: they are small beside the images.
    """

    layout_type: ClassVar[str] = "codebook_conv2d"

    def __init__(self, dense: nn.Conv2d, format: CodebookFormat, device: Any) -> None:
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))
        rows, columns = dense_rows(dense).shape
        self.filter_shape = tuple(dense.weight.shape[1:])
        self.make_tensors(rows, columns, format, device)
        own = torch.empty(rows, dtype=dense.weight.dtype, device=device)
        self.register_parameter("bias", nn.Parameter(own) if dense.bias is not None else None)

    @classmethod
    def in_place_of(cls, dense: nn.Conv2d, format: CodebookFormat, device: Any) -> CodebookConv2d:
        return cls(dense, format, device)

    from_spec = classmethod(_from_spec)

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        return self.with_weight(input, self.matrix(input.dtype))

    def with_weight(
        self, input: Float[Tensor, "*batch channels height width"], weight: Float[Tensor, "rows columns"]
    ) -> Tensor:
        """What the layer would give with another weight, for training."""
        convolved: Tensor = self._conv_forward(input, weight.unflatten(1, self.filter_shape), self.bias)
        return convolved

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        weight = self.matrix().unflatten(1, self.filter_shape)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias}


@register_module_type
class CodebookEmbedding(PackedWeight, nn.Embedding):
    """A table of token vectors as rows of codes; only the rows that are asked for are written out."""

    layout_type: ClassVar[str] = "codebook_embedding"

    def __init__(self, dense: nn.Embedding, format: CodebookFormat, device: Any) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(dense, name))
        # Gemma's table multiplies what it looks up.
        self.output_scale: float | None = getattr(dense, "scalar_embed_scale", None)
        self.make_tensors(dense.num_embeddings, dense.embedding_dim, format, device)
        # Codes have no dtype of the model's; this follows its casts.
        self.register_buffer("like", torch.empty(0, dtype=dense.weight.dtype, device=device), persistent=False)

    @classmethod
    def in_place_of(cls, dense: nn.Embedding, format: CodebookFormat, device: Any) -> CodebookEmbedding:
        own_lookup = type(dense).forward is not nn.Embedding.forward and not hasattr(dense, "scalar_embed_scale")
        if own_lookup or dense.max_norm is not None:
            raise ValueError(f"a {type(dense).__name__} does more than look vectors up; it has no packed form")
        return cls(dense, format, device)

    from_spec = classmethod(_from_spec)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        ids, matrix = input.reshape(-1), self.as_matrix()

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, ids)

        rows = matrix._replace(
            packed=matrix.packed.index_select(0, ids),
            scales=matrix.scales.index_select(0, ids),
            row_scales=chosen(matrix.row_scales),
            row_codebook=matrix.books_of(ids),
        )
        like = self.get_buffer("like")
        vectors = kernel.dequantize(rows, like.dtype).view(*input.shape, self.columns)
        if self.output_scale is None:
            return vectors
        # Rounded to the model's dtype first, as the dense table does.
        return vectors * torch.tensor(self.output_scale, dtype=like.dtype, device=vectors.device)

    def restore_buffers(self, dense: nn.Module) -> None:
        """What a dense table needs and no checkpoint holds."""
        if self.output_scale is not None:
            like = dense.get_buffer("embed_scale")
            like.fill_(self.output_scale)

    def tied_head(self, dense: nn.Module, path: str) -> CodebookTiedLinear:
        """The head that multiplies with this table, which is at `path`, in place of a dense one. Raises `ValueError`
        for what is no head of its shape."""
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"is a {type(dense).__name__}, expected an nn.Linear")
        head = CodebookTiedLinear(dense, path)
        if head.bias is not None:
            head.bias = dense.bias
        head.connect(self)
        return head

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        return {"weight": self.matrix()}


@register_module_type
class CodebookTiedLinear(nn.Linear):
    """A head that multiplies with the codes of the embedding it is tied to; it has no weight of its own."""

    layout_type: ClassVar[str] = "codebook_tied_linear"
    packs_weight: ClassVar[bool] = True
    _is_hf_initialized: ClassVar[bool] = True
    dense_weights: ClassVar[int] = 0
    source: Any

    def __init__(self, dense: nn.Linear, source: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.source_path = source
        own = torch.empty(dense.out_features, dtype=dense.weight.dtype, device=dense.weight.device)
        self.register_parameter("bias", nn.Parameter(own) if dense.bias is not None else None)
        # Not a child: the tensors belong to the embedding.
        self.__dict__["source"] = None

    def spec(self) -> dict[str, Any]:
        return {"source": self.source_path}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> CodebookTiedLinear:
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear")
        if not is_path(spec["source"]):
            raise ValueError(f"`source` must be a module path, got {short(spec['source'])}")
        return cls(dense, spec["source"])

    def connect(self, source: nn.Module) -> None:
        """Use the codes of `source`. Raises `ValueError` if it is no packed embedding of the same shape."""
        if not isinstance(source, CodebookEmbedding):
            raise ValueError(f"is tied to a {type(source).__name__}, expected a packed embedding")
        if (source.num_embeddings, source.embedding_dim) != (self.out_features, self.in_features):
            raise ValueError("has another shape than the embedding it is tied to")
        self.__dict__["source"] = source

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        require_gathered(self.source, self.source_path)
        matrix = self.source.as_matrix()
        if any(isinstance(part, Tensor) and part.is_meta for part in matrix):
            raise CompressionError(
                f"the head is tied to {self.source_path!r}, which is offloaded. Put it on a device in the device_map."
            )
        # The two may be placed on different devices: the codes stay where they are.
        local = input.to(matrix.packed.device)
        bias = None if self.bias is None else self.bias.to(local.device)
        return kernel.codebook_linear(local, matrix, bias).to(input.device)

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        weight = self.source.matrix()
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias}

    def reset_parameters(self) -> None:
        raise CompressionError("a CodebookTiedLinear has no dense weight to initialise.")


# The first that a layer is an instance of.
_LAYERS: dict[type[nn.Module], Any] = {
    SharedLinear: CodebookSharedLinear,
    nn.Linear: CodebookLinear,
    Conv1D: CodebookLinear,
    nn.Conv2d: CodebookConv2d,
    nn.Embedding: CodebookEmbedding,
}
