"""bitsandbytes as the engine runs it: layer by layer, without data."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...anatomy import ModelAnatomy
from ...engine.exclusion import is_excluded
from ...engine.registry import register_method
from ...engine.report import ModuleReport
from ...engine.session import BlockResult, Expectation, Method, Session
from ...errors import ConfigurationError
from ...resized import ResizedLinear
from .configuration import BitsAndBytesStage


@register_method
class BitsAndBytes(Method[BitsAndBytesStage, None]):
    """bitsandbytes' layers in place of dense ones."""

    config_class = BitsAndBytesStage
    needs_calibration = False
    needs_whole_model = "makes tensors that bitsandbytes has to place itself"
    continues = ("linear", "conv1d", "experts", "attention")
    leaves = ("bnb_linear4bit", "bnb_linear8bit")

    def __init__(self, config: BitsAndBytesStage, anatomy: ModelAnatomy) -> None:
        super().__init__(config, anatomy)
        if find_spec("bitsandbytes") is None:
            raise ConfigurationError(
                "a bitsandbytes stage needs the package: pip install 'hf_compress[bitsandbytes]'."
            )
        self.parts: list[tuple[int, str, str]] = []
        self.left_alone: list[str] = []
        for block in range(len(anatomy)):
            for path, kind in anatomy.block_matrices(block):
                module = anatomy.model.get_submodule(path)
                if is_excluded(path, config.modules_to_not_convert):
                    self.left_alone.append(f"{path}: excluded")
                elif not isinstance(module, nn.Linear):
                    self.left_alone.append(f"{path}: a {type(module).__name__} is not quantized")
                else:
                    self.parts.append((block, path, kind))
        if not self.parts:
            raise ConfigurationError("the recipe leaves every matrix of this model alone; there is nothing to do.")

    def expect(self) -> Expectation:
        config, layout = self.config, []
        for _, path, _ in self.parts:
            dense = self.anatomy.model.get_submodule(path)
            assert isinstance(dense, nn.Linear)
            spec: dict[str, Any] = {"threshold": config.llm_int8_threshold}
            if config.load_in_4bit:
                double = config.bnb_4bit_use_double_quant
                spec = {
                    "quant_type": config.bnb_4bit_quant_type,
                    "dtype": str(dense.weight.dtype).removeprefix("torch."),
                    "double": double,
                    "offset": 0.0 if double else None,
                    "compute_dtype": config.bnb_4bit_compute_dtype,
                }
            if isinstance(dense, ResizedLinear):
                spec |= dense.spec()
            kind = "bnb_linear4bit" if config.load_in_4bit else "bnb_linear8bit"
            layout.append({"path": path, "type": kind, "spec": spec})
        return Expectation(layout)

    def survey(self, session: Session) -> None:
        session.left_alone.extend(self.left_alone)

    def decisions(self) -> dict[str, Any]:
        return {}

    def restore(self, decisions: dict[str, Any]) -> None:
        """There is nothing to decide."""

    def collect(self, block: int) -> AbstractContextManager[None]:
        return nullcontext()

    def compress_block(self, block: int, statistics: None) -> BlockResult:
        result = BlockResult({}, [])
        for at, path, kind in self.parts:
            if at != block:
                continue
            module = self.anatomy.model.get_submodule(path)
            assert isinstance(module, nn.Linear)
            layer = self._quantized(module)
            weight = module.weight.detach().double()
            lost = (weight - layer.matrix().to(weight)).square().sum() / weight.square().sum().clamp_min(1e-300)
            count, width = weight.numel(), module.weight.element_size()
            sizes = (8 * width, 4 if self.config.load_in_4bit else 8)
            stored = (count * width, layer.stored_bytes())
            result.modules[path] = layer
            result.rows.append(ModuleReport(block, path, kind, *sizes, count, count, float(lost), *stored))
        return result

    def _quantized(self, module: nn.Linear) -> Any:
        # Importing bitsandbytes takes a second, which only those pay who use it.
        from .modules import BnbLinear4bit, BnbLinear8bit

        config = self.config
        if config.load_in_8bit:
            return BnbLinear8bit.in_place_of(module, threshold=config.llm_int8_threshold)
        name = config.bnb_4bit_compute_dtype
        return BnbLinear4bit.in_place_of(
            module,
            quant_type=config.bnb_4bit_quant_type,
            double=config.bnb_4bit_use_double_quant,
            compute_dtype=None if name is None else getattr(torch, name),
        )
