"""What a method may measure of a block: Grams of the inputs of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..anatomy import Experts
from ..calibration.statistics import gram
from .blocks import real_tokens
from .experts import ExpertStatistics, collect_experts


@dataclass
class InputStatistics:
    """Sums over calibration tokens, float64.

    Args:
        grams: Gram of the inputs of every matrix by its path, (columns, columns); matrices that see the same tensor
            share one.
        drift: of the matrix at `drift_path`, `Σ xᵀ (y_dense − y)` with the block's outputs y, (columns, d_model): what
            the residual stream has lost until here and this matrix could give back.
        experts: what the experts of the block see.
    """

    drift_path: str | None = None
    grams: dict[str, Float[Tensor, "columns columns"]] = field(default_factory=dict)
    drift: Float[Tensor, "columns d_model"] | None = None
    experts: ExpertStatistics | None = None
    _first_of: dict[str, str] = field(default_factory=dict)
    _inputs: dict[str, Tensor] = field(default_factory=dict)

    def observe_input(self, path: str, matrix: nn.Module, tensor: Tensor) -> None:
        """Add a batch's input of a matrix, once for all matrices that are handed the same tensor."""
        if path in self._inputs:
            self._inputs.clear()  # the next batch
        if isinstance(matrix, nn.Conv2d):  # others may look at other patches of the same images
            self._inputs[path] = tensor
            self._add(path, patch_gram(matrix, tensor))
            return
        first = next((other for other, seen in self._inputs.items() if seen is tensor), path)
        self._inputs[path] = tensor
        if first != path and self._first_of.get(path, first) == first:
            self._first_of[path] = first
            return
        self._add(path, gram(real_tokens(tensor)))

    def _add(self, path: str, product: Float[Tensor, "columns columns"]) -> None:
        self.grams[path] = self.grams[path].add_(product) if path in self.grams else product

    def observe_drift(self, output: Tensor, dense_output: Tensor) -> None:
        """After a batch: its output of the block beside the dense model's."""
        if self.drift_path is None or self.drift_path not in self._inputs:
            return
        inner = real_tokens(self._inputs[self.drift_path]).float()
        lost = real_tokens(dense_output.float() - output.float())
        product = (inner.T @ lost).double()
        self.drift = product if self.drift is None else self.drift.add_(product)

    def sums(self) -> dict[str, Tensor]:
        """Everything that adds up over calibration data, by name; a Gram that matrices share once."""
        found = {path: product for path, product in self.grams.items() if path not in self._first_of}
        if self.experts is not None:
            found.update({f"experts {name}": tensor for name, tensor in self.experts.sums().items()})
        return found if self.drift is None else {**found, "drift": self.drift}

    def finish(self) -> None:
        """Give every matrix its Gram and let go of the last batch."""
        self._inputs.clear()
        for path, first in self._first_of.items():
            self.grams[path] = self.grams[first]


@contextmanager
def collect_inputs(
    model: nn.Module,
    paths: list[str],
    drift_path: str | None,
    run_elsewhere: Callable[[], None] | None = None,
    elsewhere: Mapping[str, Sequence[str]] | None = None,
    experts: Experts | None = None,
) -> Iterator[InputStatistics]:
    """Attach hooks to matrices; padding tokens are left out.

    Args:
        run_elsewhere: runs the model at other places that use the same matrices, before the context is entered.
        elsewhere: those places by the path of the matrix.
        experts: of the block, to be measured as well.
    """
    statistics = InputStatistics(drift_path)
    if run_elsewhere is not None and elsewhere:
        with _observed(model, [(path, other) for path in paths for other in elsewhere.get(path, ())], statistics):
            run_elsewhere()
    try:
        with ExitStack() as stack:
            stack.enter_context(_observed(model, [(path, path) for path in paths], statistics))
            if experts is not None:
                statistics.experts = stack.enter_context(collect_experts(experts, ("input", "inner")))
            yield statistics
    finally:
        statistics.finish()


@contextmanager
def _observed(model: nn.Module, places: list[tuple[str, str]], statistics: InputStatistics) -> Iterator[None]:
    """Count the inputs of the module at the second path for the matrix at the first."""
    handles = []
    for path, place in places:

        def observe(module: nn.Module, inputs: tuple[Tensor, ...], _path: str = path) -> None:
            statistics.observe_input(_path, module, inputs[0].detach() if inputs[0].requires_grad else inputs[0])

        handles.append(model.get_submodule(place).register_forward_pre_hook(observe))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def patch_gram(matrix: nn.Conv2d, images: Float[Tensor, "*batch channels height width"]) -> Float[Tensor, "n n"]:
    """Gram of the patches that a convolution's filters see, n = channels / groups · kh · kw. The groups are added up:
    their filters share it."""
    grams = [gram(patches(matrix, image)) for image in images.reshape(-1, *images.shape[-3:])]
    return torch.stack(grams).sum(dim=0)


def patches(matrix: nn.Conv2d, image: Float[Tensor, "channels height width"]) -> Float[Tensor, "patches n"]:
    """What the filters of a convolution see of an image, group by group."""
    mode = "constant" if matrix.padding_mode == "zeros" else matrix.padding_mode
    padded = nn.functional.pad(image[None], matrix._reversed_padding_repeated_twice, mode=mode)
    by_group = padded.view(matrix.groups, -1, *padded.shape[-2:])
    size, dilation, stride = matrix.kernel_size, matrix.dilation, matrix.stride
    found: Tensor = nn.functional.unfold(by_group, size, dilation, 0, stride)
    return found.mT.reshape(-1, found.shape[1])
