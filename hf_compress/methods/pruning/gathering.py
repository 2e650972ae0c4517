"""Scores that a training gathers, step by step, in buffers beside the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from .configuration import PruningConfig
from .masks import SCORE, START, VALUE, mask_of
from .mathematics import all_finite
from .scores import scores_now

#: Criteria whose scores are sums over steps.
GATHERED = ("sensitivity", "movement")


class Gathering:
    """The criterion's view of a training.

    `"delta"` and `"movement"` judge a weight that was pruned by the value that it had, which it comes back with, as in
    movement pruning (Sanh et al., arXiv 2005.07683). Judged by its zero it would have changed more than any weight
    that is kept, and once it grew from there it would only ever move away from zero.

    Args:
        config: criterion and its constants.
        modules: the dense modules that are pruned, by path.

    Attributes:
        terms: sums of |w·g| and of α w² when `"snip_magnitude"` was last worked out.
    """

    def __init__(self, config: PruningConfig, modules: dict[str, nn.Module]) -> None:
        self.config, self.modules = config, modules
        self.terms: tuple[float, float] | None = None
        self.close()  # what a training left that was not finished
        for module in modules.values():
            weight = module.get_parameter("weight")
            if config.criterion in GATHERED:
                module.register_buffer(SCORE, torch.zeros_like(weight, dtype=torch.float32))
            elif config.criterion == "delta":
                module.register_buffer(START, weight.detach().clone())
            if self.keeps_values:
                module.register_buffer(VALUE, weight.detach().clone())

    @property
    def keeps_values(self) -> bool:
        """Whether a pruned weight has a value that stands beside its zero: in a single shot nothing returns."""
        return self.config.schedule == "cubic" and self.config.criterion in ("delta", "movement")

    @property
    def looks_at_this_step(self) -> bool:
        """Whether scores are of the gradients of the step they are worked out in, not of what was gathered."""
        return self.config.needs_gradients and self.config.criterion not in GATHERED

    def _judged(self, module: nn.Module) -> Tensor:
        """A module's weight, with the values that pruned ones had."""
        weight, mask = module.get_parameter("weight").detach(), mask_of(module)
        if mask is None or not self.keeps_values:
            return weight
        return torch.where(mask, weight, module.get_buffer(VALUE))

    @torch.no_grad()
    def exchange(self, masks: Mapping[str, Tensor]) -> None:
        """Before `masks` take the place of the modules' own: keep the values of what goes, give back those of what
        returns."""
        for path, new in masks.items() if self.keeps_values else ():
            module = self.modules[path]
            own, value = mask_of(module), module.get_buffer(VALUE)
            assert own is not None
            value.copy_(self._judged(module))
            weight, returns = module.get_parameter("weight"), new.to(own.device) & ~own
            weight.copy_(torch.where(returns, value, weight))

    def gradients(self) -> dict[str, Tensor] | None:
        """Of the step just made; `None` where one is not finite.

        A layer that this step has left out, as LayerDrop does, has a gradient of zero.

        Raises:
            NumericalError: there are none: the matrices are frozen, or the gradients were cleared before.
        """
        weights = {path: module.get_parameter("weight") for path, module in self.modules.items()}
        found = {path: weight.grad for path, weight in weights.items() if weight.grad is not None}
        missing = [path for path, weight in weights.items() if weight.grad is None]
        frozen = [path for path in missing if not weights[path].requires_grad]
        if frozen or not found:
            raise NumericalError(
                f"{(frozen or missing)[0]!r} has no gradient. Call update() after optimizer.step() and before "
                "optimizer.zero_grad(), and let the matrices of the blocks train."
            )
        if not all_finite(found.values()):
            return None
        return {path: found[path] if path in found else torch.zeros_like(w) for path, w in weights.items()}

    @torch.no_grad()
    def observe(self) -> bool | None:
        """Take in a step; whether its gradients were finite, or `None` where the criterion gathers nothing."""
        if self.config.criterion not in GATHERED:
            return None
        gradients = self.gradients()
        if gradients is None:
            return False
        for path, gradient in gradients.items():
            module = self.modules[path]
            score = module.get_buffer(SCORE)
            if score.dtype != torch.float32:  # the model was cast: small steps would be lost
                score = module._buffers[SCORE] = score.float()
            product = self._judged(module).float() * gradient
            if self.config.criterion == "movement":
                score.sub_(product)
            else:
                score.mul_(self.config.decay).add_(product.abs_(), alpha=1 - self.config.decay)
        return True

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor] | None:
        """As they are now, the same on all processes; `None` where this step's gradients say nothing."""
        scores = self._own_scores()
        if scores is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            for path, score in scores.items():
                mean = score.clone() if score is self.modules[path]._buffers.get(SCORE) else score
                torch.distributed.all_reduce(mean)
                scores[path] = mean / torch.distributed.get_world_size()
        return scores

    def _own_scores(self) -> dict[str, Tensor] | None:
        config = self.config
        if config.criterion in GATHERED:
            return {path: module.get_buffer(SCORE) for path, module in self.modules.items()}
        weights = {path: self._judged(module) for path, module in self.modules.items()}
        if config.criterion == "delta":
            start = {path: module.get_buffer(START) for path, module in self.modules.items()}
            return scores_now(config, weights, start=start)[0]
        gradients = self.gradients() if config.needs_gradients else None
        if config.needs_gradients and gradients is None:
            return None
        scores, self.terms = scores_now(config, weights, gradients=gradients)
        return scores

    def close(self) -> None:
        """Free what was gathered."""
        for module in self.modules.values():
            for name in (SCORE, START, VALUE):
                module._buffers.pop(name, None)
