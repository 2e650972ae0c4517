"""The recipe of layer sharing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ...configuration import MethodConfig, register_method_config

SharedKind = Literal["query_key", "value_output", "mlp", "other"]
SHARED_KINDS: tuple[SharedKind, ...] = get_args(SharedKind)
Solver = Literal["euler", "adams_bashforth"]


@register_method_config
class LayerSharingConfig(MethodConfig):
    """Blocks that share their matrices, and fewer, larger steps through them at inference.

    Steps after W. Chen et al., "Boosting Inference Efficiency: Unleashing the Power of Parameter-Shared Pre-trained
    Language Models" (arXiv 2310.12818); conversion after S. Bae et al., "Relaxed Recursive Transformers" (arXiv
    2410.20672). A *loop* is one run of a shared block in the full model, an *iteration* one block evaluation at
    inference.

    Args:
        unique_layers (`int`, *optional*): blocks that are kept; the others use their matrices. Not given for a model
            that shares already (ALBERT, or one made with this method), of which only the steps change.
        order (`"cycle"` or `"sequence"`): which block a layer uses: layer `i` uses `i mod unique_layers`, or runs of
            layers use one.
        initialization (`str`, *optional*): the matrices of the kept blocks are those of layers in equal distances
            (`"stepwise"`), of the lowest layers (`"lower"`), or the mean over the layers that share
            (`"average"`). By default average with `lora_rank`, stepwise without. `"activation_aware"` needs
            calibration data and pays with `lora_rank`: those matrices and corrections that lose least of what the
            layers put out.
        lora_rank (`int`, defaults to 0): rank of a correction that every loop has of its own: the truncated SVD of the
            difference to its original matrix, for `"activation_aware"` in the metric of its inputs.
        share (`list[str]`): kinds of matrices that are shared: `"query_key"`, `"value_output"`, `"mlp"`, `"other"`.
        share_norms (`bool`, defaults to `False`): share norms and biases as well, instead of one set a loop.
        uneven_groups (`bool`, defaults to `False`): allow `unique_layers` that does not divide the depth.
        group_sizes (`list[int]`, *optional*): how many layers in a row share each kept block, in place of
            `unique_layers` and `order`, e.g. `[1, 1, 3, 3, 3, 2, 1]`. First and last layers change most and are worth
            a block of their own.
        inference_iterations (`int`, *optional*): block evaluations at inference, from the number of groups to the
            depth; `set_iterations` changes it at any time.
        steps (`list[float]`, *optional*): their step sizes, which sum to the depth. Equal if not given.
        solver (`"euler"` or `"adams_bashforth"`): how an iteration goes on: by its block alone, or extrapolated with
            the block before (second order, no further evaluation; pre-norm blocks only).
    """

    method: ClassVar[str] = "sharing"

    unique_layers: int | None = Field(default=None, ge=1)
    order: Literal["cycle", "sequence"] = "cycle"
    initialization: Literal["stepwise", "average", "lower", "activation_aware"] | None = None
    lora_rank: int = Field(default=0, ge=0)
    share: tuple[SharedKind, ...] = SHARED_KINDS
    share_norms: bool = False
    uneven_groups: bool = False
    group_sizes: tuple[int, ...] | None = None
    inference_iterations: int | None = Field(default=None, ge=1)
    steps: tuple[float, ...] | None = None
    solver: Solver = "euler"

    @property
    def needs_data(self) -> bool:
        return self.initialization == "activation_aware"

    @property
    def start(self) -> Literal["stepwise", "average", "lower", "activation_aware"]:
        """The initialisation, chosen where it is not given."""
        return self.initialization or ("average" if self.lora_rank else "stepwise")

    @model_validator(mode="before")
    @classmethod
    def _of_group_sizes(cls, fields: Any) -> Any:
        """Groups of given sizes are blocks in sequence."""
        sizes = fields.get("group_sizes") if isinstance(fields, dict) else None
        if not isinstance(sizes, (list, tuple)):
            return fields
        return {"unique_layers": len(sizes), "order": "sequence", **fields}

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        if self.unique_layers is None:
            for name in ("initialization", "lora_rank", "share_norms", "uneven_groups"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` has no effect without `unique_layers`")
            if self.inference_iterations is None and self.steps is None:
                raise ValueError("give `unique_layers`, `inference_iterations` or `steps`; there is nothing to do")
        if self.group_sizes is not None:
            if not self.group_sizes or any(size < 1 for size in self.group_sizes):
                raise ValueError("`group_sizes` must be whole numbers from 1 on")
            if self.unique_layers != len(self.group_sizes) or self.order != "sequence":
                raise ValueError(
                    f"`group_sizes` names {len(self.group_sizes)} groups in sequence, and `unique_layers` is "
                    f"{self.unique_layers}, `order` {self.order!r}; leave these out"
                )
        if not self.share:
            raise ValueError("`share` names no kind of matrices")
        if self.steps is not None:
            if any(not step > 0 for step in self.steps):
                raise ValueError("`steps` must be positive")
            if self.inference_iterations not in (None, len(self.steps)):
                raise ValueError(f"`steps` has {len(self.steps)} steps and `inference_iterations` says another number")
        return self
