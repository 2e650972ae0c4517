"""The recipe of modular decomposition."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...configuration import MethodConfig, register_method_config

Kind = Literal["mlp", "query_key", "value_output"]
KINDS: tuple[Kind, ...] = ("mlp", "query_key", "value_output")


@register_method_config
class ModularDecompositionConfig(MethodConfig):
    """Modular decomposition (MoDeGPT, arXiv 2408.09632): smaller MLPs and attention heads in closed form, no training.

    Args:
        reduction (`float` or `dict[str, float]`): share of the blocks' weight matrices to remove, in [0, 1); 0 changes
            nothing. A dictionary gives every kind its own share of that kind's matrices, `{"mlp": 0.25}`.
        kinds (`"auto"` or `list[str]`, defaults to `"auto"`): the kinds of modules that give: `"mlp"`, `"query_key"`,
            `"value_output"`. `"auto"` measures on held-out calibration data what each costs and divides the
            reduction accordingly: in loss a token, or, of an encoder, in the relative error of its final hidden
            states. A list gives all its kinds the same share of a block (the paper).
        allocation (`"block_influence"`, `"uniform"` or `"search"`): how the reduction is spread over the blocks.
            `"search"` starts from block influence and improves it on held-out calibration sequences.
        temperature (`float` or `"auto"`, defaults to 0.05): ε of the allocation; a lower one concentrates the
            reduction on blocks of little influence. `"auto"` chooses it on held-out calibration sequences.
        max_module_reduction (`float`, defaults to 0.8): the most that one module may give.
        channel_score (`"output_error"` or `"ridge_leverage"`): which MLP channels stay. `"ridge_leverage"` is the
            paper's score; `"output_error"` also weighs how strongly the down projection listens to a channel.
        value_output (`"joint"` or `"per_head"`): SVD over the query heads of a group together, or the paper's variant.
        order (`"auto"`, `"dense"` or `"sequential"`): inputs of every block from the dense model, or from the blocks
            compressed before it, whose drift it then makes up for in part. Sequential is better and takes about twice
            the time; `"auto"` is sequential with `allocation="search"`, dense otherwise.
        ridge (`float`, defaults to 1e-3): relative to the mean diagonal of the Gram matrix.
        rank_multiple (`int`, *optional*): sizes are multiples of this. By default 32 for MLP widths and 8 for head
            sizes, less on small models: fast kernels want it. Widths of experts are multiples of 8 in any case.
        portable (`bool`, defaults to `False`): MLPs only, one width for all blocks. The result is an ordinary model of
            its class with a smaller width in its config, which needs no hf_compress to load.
        search_minutes (`float`, defaults to 10): wall time that `allocation="search"` may take.
    """

    method: ClassVar[str] = "modular_decomposition"

    reduction: float | dict[Kind, float]
    kinds: Literal["auto"] | tuple[Kind, ...] = "auto"
    allocation: Literal["block_influence", "uniform", "search"] = "block_influence"
    temperature: float | Literal["auto"] = 0.05
    max_module_reduction: float = Field(default=0.8, gt=0, lt=1)
    channel_score: Literal["output_error", "ridge_leverage"] = "output_error"
    value_output: Literal["joint", "per_head"] = "joint"
    order: Literal["auto", "dense", "sequential"] = "auto"
    ridge: float = Field(default=1e-3, gt=0, lt=1)
    rank_multiple: int | None = Field(default=None, ge=1)
    portable: bool = False
    search_minutes: float = Field(default=10.0, gt=0)

    @property
    def is_sequential(self) -> bool:
        return self.order == "sequential" or (self.order == "auto" and self.allocation == "search")

    @field_validator("reduction")
    @classmethod
    def _reduction_in_range(cls, value: Any) -> Any:
        shares = value.values() if isinstance(value, dict) else (value,)
        if isinstance(value, dict) and not value:
            raise ValueError('expected a share for at least one kind, e.g. {"mlp": 0.25}')
        for share in shares:
            if not 0 <= share < 1:
                raise ValueError("a reduction is a share in [0, 1); 0.2 removes 20 %")
        return value

    @field_validator("kinds", mode="before")
    @classmethod
    def _kinds_given(cls, value: Any) -> Any:
        if value == "auto":
            return value
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(kind, str) for kind in value):
            raise ValueError('expected "auto" or a list of kinds, e.g. ["mlp"]')
        if not value:
            raise ValueError("expected at least one kind")
        if len(set(value)) != len(value):
            raise ValueError("every kind at most once")
        return tuple(value)

    @field_validator("temperature")
    @classmethod
    def _temperature_positive(cls, value: Any) -> Any:
        if value != "auto" and not value > 0:
            raise ValueError('expected a number above 0 or "auto"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ModularDecompositionConfig:
        if isinstance(self.reduction, dict) and self.kinds != "auto":
            raise ValueError("give either one `reduction` with a list of `kinds`, or a dictionary of reductions")
        if self.portable:
            kinds = set(self.reduction) if isinstance(self.reduction, dict) else set(self.kinds)
            if self.kinds == "auto" and not isinstance(self.reduction, dict):
                kinds = {"mlp"}
            if kinds != {"mlp"}:
                raise ValueError('portable=True reduces MLPs only: leave `kinds` out or set kinds=["mlp"]')
            if self.allocation == "search":
                raise ValueError("portable=True has one width for all blocks: there is nothing to search")
        return self
