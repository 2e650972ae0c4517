"""Layer sharing as the engine runs it: matrices of other blocks, corrections, and the list that runs the loops."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.albert.modeling_albert import AlbertTransformer

from ...anatomy import ModelAnatomy, dense_rows, join
from ...engine.activations import filed, read
from ...engine.blocks import warn_unreached
from ...engine.exclusion import is_excluded
from ...engine.freed import return_freed_memory
from ...engine.input_grams import collect_inputs
from ...engine.registry import register_method
from ...engine.report import ModuleReport
from ...engine.session import BlockResult, Expectation, Method, Session
from ...errors import ConfigurationError, NumericalError, UnsupportedModelError
from . import mathematics
from .blocks import SharedAlbertTransformer, SharedBlocks
from .configuration import LayerSharingConfig
from .fitting import fit
from .modules import SharedLinear, SharedModule
from .stepping import check_layer_types, running_blocks, schedule_of


@register_method
class LayerSharing(Method[LayerSharingConfig, None]):
    """Few blocks, run many times."""

    config_class = LayerSharingConfig
    survey_reads_all = True
    needs_whole_model = "makes one matrix of those of several blocks"
    leaves = (
        SharedLinear.layout_type,
        SharedModule.layout_type,
        SharedBlocks.layout_type,
        SharedAlbertTransformer.layout_type,
    )
    continues = leaves

    def __init__(self, config: LayerSharingConfig, anatomy: ModelAnatomy) -> None:
        super().__init__(config, anatomy)
        self.needs_calibration = config.needs_data
        self.running = running_blocks(anatomy.model)
        self.albert = _albert(anatomy.model)
        # Matrices that are kept, by their places; corrections and what they lose, by those of the layers.
        self._initial: dict[str, Tensor] = {}
        self._fitted: dict[str, tuple[tuple[Tensor, Tensor] | None, float]] = {}
        if len(anatomy.stacks) > 1:
            first = [repr(anatomy.block_paths[own.start]) for own in anatomy.stacks]
            raise UnsupportedModelError(
                f"layers are shared within one list of blocks, and {type(anatomy.model).__name__} has {len(first)}: "
                f"from {' and '.join(first)} on."
            )
        steps = None if config.steps is None else list(config.steps)
        if config.unique_layers is None:
            self.assigned = self._assigned_before()
            self.order = self.running.order if self.running is not None else "sequence"
        elif self.running is not None or self.albert is not None:
            raise ConfigurationError(
                f"{type(anatomy.model).__name__} shares its layers already; leave `unique_layers` out."
            )
        else:
            self.order = config.order
            self.assigned = self._assign(config.unique_layers)
            self._require_one_shape()
            self._require_owners()
        self.schedule = schedule_of(self.assigned, self.order, config.inference_iterations, steps)
        self.scaled = self._scaled()
        if any(step != 1.0 for step in self.schedule.steps) and self.scaled is None:
            raise ConfigurationError(
                f"fewer iterations need blocks of {type(anatomy.model).__name__} all of whose matrices are shared and "
                "whose two outputs go to the residual stream with no norm between."
            )
        check_layer_types(anatomy.model, self.schedule)

    def _assigned_before(self) -> list[int]:
        if self.running is not None:
            before: list[int] = self.running.assigned
            return before
        if self.albert is None:
            raise ConfigurationError(
                f"{type(self.anatomy.model).__name__} does not share its layers yet: give `unique_layers`, how many "
                "blocks are kept."
            )
        depth, groups = self.albert.config.num_hidden_layers, self.albert.config.num_hidden_groups
        return [int(layer / (depth / groups)) for layer in range(depth)]

    def _assign(self, unique: int) -> list[int]:
        depth, sizes = len(self.anatomy), self.config.group_sizes
        if sizes is not None:
            if sum(sizes) != depth:
                raise ConfigurationError(f"`group_sizes` are {sum(sizes)} layers in all, and the model has {depth}.")
            return [block for block, size in enumerate(sizes) for _ in range(size)]
        if unique > depth:
            raise ConfigurationError(f"`unique_layers` is {unique}, and the model has {depth} layers.")
        if depth % unique and not self.config.uneven_groups:
            near = [count for count in range(1, depth + 1) if depth % count == 0]
            raise ConfigurationError(
                f"`unique_layers` {unique} does not divide the depth {depth}: some blocks would be used more often. "
                f"Take one of {near}, or uneven_groups=True."
            )
        return mathematics.assignment(depth, unique, self.config.order)

    def _require_one_shape(self) -> None:
        """Raises `UnsupportedModelError` for blocks that cannot stand for each other."""
        reference = {name: tensor.shape for name, tensor in self.anatomy.block(0).state_dict().items()}
        for index in range(1, len(self.anatomy)):
            shapes = {name: tensor.shape for name, tensor in self.anatomy.block(index).state_dict().items()}
            if shapes != reference:
                different = sorted(
                    name for name in reference.keys() | shapes.keys() if reference.get(name) != shapes.get(name)
                )
                raise UnsupportedModelError(
                    f"the layers are not of one shape: {different[0]!r} is {_shape(reference, different[0])} in the "
                    f"first and {_shape(shapes, different[0])} in layer {index}. Layers can only be shared where they "
                    "are alike."
                )

    def _require_owners(self) -> None:
        """Raises `ConfigurationError` where a layer is to use a matrix of a layer that is to keep its own."""
        for block in range(len(self.anatomy)):
            owner = self.assigned.index(self.assigned[block])
            kept = {path for path, _ in self._shared(owner)}
            for path, _ in self._shared(block):
                wanted = self._path_in(owner, path, block)
                if wanted not in kept:
                    raise ConfigurationError(
                        f"`modules_to_not_convert` leaves {wanted!r} out, whose matrix {path!r} would use. Name that "
                        "of every layer, or only of layers that use another's."
                    )

    def _scaled(self) -> list[str] | None:
        """The two matrices of a block whose outputs a step scales, relative to the block; `None` if there is more."""
        if self.running is not None:
            before: list[str] | None = self.running.scaled
            return before
        record, block = self.anatomy.record, self.anatomy.block_paths[0]
        if any(mlp.output_normed for mlp in record.mlps):
            return None
        wanted = []
        for kind in ("value_output", "mlp"):
            wanted += [path for path, own in self.anatomy.matrices_of_kind(0) if own == kind][-1:]
        blocks = range(len(self.anatomy) if self.albert is None else 0)
        some = any(len(self._shared(index)) != len(self.anatomy.block_matrices(index)) for index in blocks)
        if len(wanted) != 2 or some:
            return None
        return [path.removeprefix(f"{block}.") for path in wanted]

    def _shared(self, block: int) -> list[tuple[str, str]]:
        """Paths and kinds of a block's matrices that are shared."""
        return [
            (path, kind)
            for path, kind in self.anatomy.block_matrices(block)
            if kind in self.config.share and not is_excluded(path, self.config.modules_to_not_convert)
        ]

    @property
    def collects(self) -> bool:
        # The survey has been through the blocks.
        return False

    def expect(self) -> Expectation:
        if self.config.unique_layers is None:
            return Expectation()
        layout: list[dict[str, Any]] = []
        copies = 0  # of the matrices that are kept, beside those of all layers
        largest = corrections = 0
        for block in range(len(self.anatomy)):
            owner = self.assigned.index(self.assigned[block])
            for path, _ in self._shared(block):
                module: Any = self.anatomy.model.get_submodule(path)
                (rows, columns), rank = dense_rows(module).shape, self._rank(block, dense_rows(module))
                spec = {
                    "source": None if owner == block else self._path_in(owner, path, block),
                    "rank": rank,
                    "bias": module.bias is not None and (owner == block or not self.config.share_norms),
                }
                layout.append({"path": path, "type": SharedLinear.layout_type, "spec": spec})
                corrections += rank * (rows + columns) * module.weight.element_size()
                copies += int(module.weight.numel() * module.weight.element_size()) if owner == block else 0
                largest = max(largest, columns)
            if self.config.share_norms and owner != block:
                for path, _ in self._norms(block):
                    spec = {"source": self._path_in(owner, path, block)}
                    layout.append({"path": path, "type": SharedModule.layout_type, "spec": spec})
        if not self.needs_calibration:
            return Expectation(layout, statistics_bytes=copies)
        return Expectation(layout, largest_gram=largest, statistics_bytes=copies + corrections + self._fitting_bytes())

    def _fitting_bytes(self) -> int:
        """The Grams of the layers that wait for the last of their group, a little more as matrices of one input share
        theirs; and what a group is solved with, in float64: matrices, differences and roots of all its layers, and a
        few more of one."""
        shapes = [dense_rows(self.anatomy.model.get_submodule(path)).shape for path, _ in self._shared(0)]
        group = max(self.assigned.count(kept) for kept in self.assigned)
        waiting = group if self.order == "sequence" else len(self.anatomy)
        held = waiting * sum(8 * columns**2 for _, columns in shapes)
        solved = [(group + 3) * (columns**2 + 2 * rows * columns) for rows, columns in shapes]
        return held + 8 * max(solved, default=0)

    def _norms(self, block: int) -> list[tuple[str, nn.Module]]:
        """Modules of a block with vectors of their own: no matrices, routers or experts."""
        matrices = {path for path, _ in self.anatomy.block_matrices(block)}
        return [
            (path, module)
            for name, module in self.anatomy.block(block).named_modules()
            for path in [join(self.anatomy.block_paths[block], name)]
            if name and path not in matrices and _own_dimensions(module) == 1
        ]

    def survey(self, session: Session) -> None:
        if self.config.unique_layers is None:
            return
        if self.needs_calibration:
            self._fit_initial(session)
        else:
            self._take_initial()
        session.notes["unique_layers"] = self.config.unique_layers
        for block in range(len(self.anatomy)):
            shared = {path for path, _ in self._shared(block)}
            session.left_alone.extend(
                f"{path}: not shared" for path, _ in self.anatomy.block_matrices(block) if path not in shared
            )

    def decisions(self) -> dict[str, Any] | None:
        # What is fitted to data is as large as the model.
        return None if self.needs_calibration else {}

    def restore(self, decisions: dict[str, Any]) -> None:
        if self.config.unique_layers is not None:
            self._take_initial()

    def _rank(self, block: int, matrix: Tensor) -> int:
        """Of a layer's correction. One that shares with no other has nothing to correct."""
        alone = self.assigned.count(self.assigned[block]) == 1
        return 0 if alone else min(self.config.lora_rank, *matrix.shape)

    def _groups(self) -> list[list[int]]:
        """For every kept block the layers that use it."""
        layers = range(len(self.anatomy))
        return [[layer for layer in layers if self.assigned[layer] == kept] for kept in range(max(self.assigned) + 1)]

    def _fit_initial(self, session: Session) -> None:
        """The matrices that are kept and all corrections, group by group on one dense pass over the data."""
        groups, grams = self._groups(), dict[str, Any]()
        unreached: list[str] = []
        stream = session.stream(session.batches)
        for block in session.progress(range(len(self.anatomy)), "survey"):
            paths = [path for path, _ in self._shared(block)]
            with collect_inputs(self.anatomy.model, paths, None) as statistics:
                stream.advance(block)
            grams.update(filed(statistics.grams, session.activations))
            if block == groups[self.assigned[block]][-1]:
                self._fit_group(groups[self.assigned[block]], grams, unreached)
        if unreached:
            warn_unreached(unreached)

    def _fit_group(self, layers: list[int], grams: dict[str, Any], unreached: list[str]) -> None:
        """What some layers share; their Grams go, and those that have seen nothing but zeros are named."""
        get = self.anatomy.model.get_submodule
        sharing = {path for layer in layers for path, _ in self._shared(layer)}
        for path, _ in self._shared(layers[0]):
            places = [self._path_in(layer, path, layers[0]) for layer in layers]
            places = [place for place in places if place in sharing]
            seen = [read(grams.pop(place, None)) for place in places]
            seen = [gram if gram is not None and gram.any() else None for gram in seen]
            unreached += [place for place, gram in zip(places, seen, strict=True) if gram is None]
            rank = self._rank(layers[0], dense_rows(get(path)))
            found = fit([dense_rows(get(place)) for place in places], seen, rank, places)
            self._initial[path] = found.matrix
            self._fitted.update(zip(places, zip(found.corrections, found.errors, strict=True), strict=True))

    def _take_initial(self) -> None:
        """The matrices that are kept, by their places, while all layers are as they were."""
        depth, unique, start = len(self.anatomy), max(self.assigned) + 1, self.config.start
        assert start != "activation_aware"
        layers = mathematics.initial_layers(depth, unique, self.assigned, start)
        for kept in range(unique):
            owner = self.assigned.index(kept)
            for path, _ in self._shared(owner):
                self._initial[path] = mean = torch.empty_like(dense_rows(self.anatomy.model.get_submodule(path)))
                total = torch.zeros(mean.shape, dtype=torch.float64, device=mean.device)
                for layer in layers[kept]:
                    other = dense_rows(self.anatomy.model.get_submodule(self._path_in(layer, path, owner)))
                    total += other.to(total.device)
                mean.copy_(total.div_(len(layers[kept])))
            return_freed_memory()

    def collect(self, block: int) -> AbstractContextManager[None]:
        return nullcontext()

    def compress_block(self, block: int, statistics: None) -> BlockResult:
        result = BlockResult({}, [])
        if self.config.unique_layers is None:
            if self.albert is not None and self.running is None and block == 0:
                self._scale_albert(result)
            return result
        owner = self.assigned.index(self.assigned[block])
        for path, kind in self._shared(block):
            module = self.anatomy.model.get_submodule(path)
            layer, error = self._linear(path, block, owner)
            result.modules[path] = layer
            count = dense_rows(module).numel()
            owns = int(owner == block)
            result.rows.append(ModuleReport(block, path, kind, 1, owns, count, layer.kept_weights, error))
        if self.config.share_norms and owner != block:
            for path, _ in self._norms(block):
                result.modules[path] = SharedModule(self._path_in(owner, path, block))
        return result

    def _path_in(self, other: int, path: str, block: int) -> str:
        return join(self.anatomy.block_paths[other], path.removeprefix(f"{self.anatomy.block_paths[block]}."))

    def _linear(self, path: str, block: int, owner: int) -> tuple[SharedLinear, float]:
        """The layer in place of the matrix at `path`, and the relative squared error of its matrix."""
        module = self.anatomy.model.get_submodule(path)
        dense, bias = dense_rows(module), getattr(module, "bias", None)
        own_bias = bias is not None and (owner == block or not self.config.share_norms)
        rank = self._rank(block, dense)
        source = None if owner == block else self._path_in(owner, path, block)
        layer = SharedLinear(
            dense.shape[1], dense.shape[0], own_bias, source=source, rank=rank, device=dense.device, dtype=dense.dtype
        )
        if source is None:
            layer.weight.copy_(self._initial[path].unsqueeze(0))
        if own_bias and layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        if path in self._fitted:
            correction, lost = self._fitted.pop(path)
            if correction is not None and layer.lora_A is not None and layer.lora_B is not None:
                layer.lora_A.copy_(correction[0])
                layer.lora_B.copy_(correction[1])
            return layer, lost
        initial = self._initial[self._path_in(owner, path, block)].to(dense.device)
        difference = dense.double() - initial.double()
        if layer.lora_A is not None and layer.lora_B is not None:
            if not torch.isfinite(difference).all():
                raise NumericalError(f"{path}: weights that are not finite.")
            first, second = mathematics.low_rank(difference, rank)
            layer.lora_A.copy_(first)
            layer.lora_B.copy_(second)
            difference = difference - second @ first
        error = difference.square().sum() / dense.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        return layer, float(error)

    def _scale_albert(self, result: BlockResult) -> None:
        """ALBERT's two output matrices as layers that know a step."""
        assert self.albert is not None
        for block in range(len(self.anatomy)):
            for path in self.scaled or []:
                at = join(self.anatomy.block_paths[block], path)
                module = self.anatomy.model.get_submodule(at)
                assert isinstance(module, nn.Linear)
                layer = SharedLinear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    source=None,
                    rank=0,
                    device=module.weight.device,
                    dtype=module.weight.dtype,
                )
                layer.weight.copy_(module.weight.unsqueeze(0))
                if layer.bias is not None and module.bias is not None:
                    layer.bias.copy_(module.bias)
                result.modules[at] = layer

    def finish(self) -> None:
        """The list that runs the loops, in place of the model's own."""
        self._initial.clear()
        model = self.anatomy.model
        running = running_blocks(model)
        if running is None:
            path, dense = self._list_of_blocks()
            spec = {
                "assigned": self.assigned,
                "order": self.order,
                "solver": self.config.solver,
                "scaled": self.scaled,
                "loops": list(self.schedule.loops),
                "steps": list(self.schedule.steps),
            }
            kind: Any = SharedAlbertTransformer if self.albert is not None else SharedBlocks
            running = kind.from_spec(dense, spec)
            running.train(dense.training)
            model.set_submodule(path, running)
        running.set_schedule(self.schedule, self.config.solver)

    def _list_of_blocks(self) -> tuple[str, nn.Module]:
        if self.albert is not None:
            return next((path, module) for path, module in self.anatomy.model.named_modules() if module is self.albert)
        path = self.anatomy.block_paths[0].rpartition(".")[0]
        return path, self.anatomy.model.get_submodule(path)


def _own_dimensions(module: nn.Module) -> int:
    """Of the parameters that are no child's, the most; 0 without any."""
    return max((parameter.dim() for parameter in module.parameters(recurse=False)), default=0)


def _albert(model: nn.Module) -> Any:
    return next((module for module in model.modules() if isinstance(module, AlbertTransformer)), None)


def _shape(shapes: dict[str, Any], name: str) -> Any:
    return tuple(shapes[name]) if name in shapes else "absent"
