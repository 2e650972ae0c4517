"""From command-line options to recipes and calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..calibration.configuration import CalibrationConfig
    from ..configuration import CompressionConfig, MethodConfig

RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="A YAML file with the stages, in place of all options of methods."),
]
# Options that several commands share. One that is not given is not passed on: the defaults stand in the recipes alone.
Method = Annotated[
    str,
    typer.Option(help="modular (modular decomposition), codebook (learned codebooks), pruning or sharing (layers)."),
]
Reduction = Annotated[
    str | None,
    typer.Option(help="Fraction of block-linear weights to remove, or one a kind: mlp=0.25,query_key=0.1."),
]
Bits = Annotated[
    str | None,
    typer.Option(help="codebook: 2, 3, 4 or 1.58 a weight, one a kind (mlp=2,embedding=4), or auto."),
]
AverageBits = Annotated[float | None, typer.Option(help="codebook: bits a weight on average with --bits auto.")]
Learning = Annotated[
    str | None,
    typer.Option(help="codebook: none (needs no data), feedback, joint, proximal, distance or latent."),
]
BlockEpochs = Annotated[int | None, typer.Option(help="codebook: passes of block tuning; worth their time at 2 bits.")]
ColumnGroup = Annotated[int | None, typer.Option(help="codebook: columns that share a scale, a multiple of 32.")]
ReorderChannels = Annotated[
    bool | None, typer.Option(help="codebook: sort the channels between matrices; adapters of the base no longer fit.")
]
Sparsity = Annotated[float | None, typer.Option(help="pruning: share of the matrices' weights to remove.")]
Criterion = Annotated[
    str | None,
    typer.Option(help="pruning: snip_magnitude, snip, gradient, sensitivity, delta, magnitude, wanda or random."),
]
Scope = Annotated[str | None, typer.Option(help="pruning: compare weights globally (global), by layer or by row.")]
Structured = Annotated[
    bool | None, typer.Option("--structured/--unstructured", help="pruning: remove whole heads and MLP columns.")
]
Values = Annotated[
    str | None, typer.Option(help="pruning: store kept weights as auto, float16, bfloat16, float32 or int8.")
]
BaseModel = Annotated[str | None, typer.Option(help="pruning: the checkpoint that --criterion delta compares with.")]
UniqueLayers = Annotated[int | None, typer.Option(help="sharing: blocks that are kept; the others use theirs.")]
LayerOrder = Annotated[str | None, typer.Option(help="sharing: cycle or sequence.")]
GroupSizes = Annotated[
    str | None, typer.Option(help="sharing: layers in a row that share each kept block, such as 1,1,3,3,1.")
]
Initialization = Annotated[
    str | None, typer.Option(help="sharing: stepwise, average, lower, or activation_aware, which needs data.")
]
LoraRank = Annotated[int | None, typer.Option(help="sharing: rank of every loop's own correction.")]
InferenceIterations = Annotated[int | None, typer.Option(help="sharing: block evaluations at inference.")]
Kinds = Annotated[str | None, typer.Option(help="auto, or some of mlp,query_key,value_output.")]
Allocation = Annotated[str | None, typer.Option(help="block_influence, uniform or search.")]
Temperature = Annotated[str | None, typer.Option(help="Temperature of the allocation, or auto.")]
SearchMinutes = Annotated[float | None, typer.Option(help="Wall time that --allocation search may take.")]
RankMultiple = Annotated[int | None, typer.Option(help="Ranks are multiples of this; by default the device's.")]
Portable = Annotated[
    bool | None,
    typer.Option("--portable/--no-portable", help="Write a plain model that loads without hf_compress (MLP alone)."),
]
Order = Annotated[
    str | None, typer.Option(help="auto, dense (one pass) or sequential (inputs from the compressed prefix).")
]
ValueOutput = Annotated[str | None, typer.Option(help="joint (one SVD a group of heads) or per_head.")]
Skip = Annotated[
    list[str] | None, typer.Option("--modules-to-not-convert", help="A module to leave as it is; may be repeated.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of a GGUF file in the model's folder or repository.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")]
DeviceMap = Annotated[str | None, typer.Option(help="Where the model goes: auto, or a device.")]
# What a card is told, when it is printed and when it is pushed.
Evaluation = Annotated[Path | None, typer.Option(help="What `hf-compress eval BASE PATH --json` printed, in a file.")]
EvaluationData = Annotated[str | None, typer.Option(help="Name of the text that was measured on.")]
License = Annotated[
    str | None, typer.Option("--license", help="License of the base, such as apache-2.0, where no card says it.")
]
Base = Annotated[Path | None, typer.Option(help="Folder of the base, whose card names license, task and language.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


def build_recipe(method: str, **options: Any) -> MethodConfig:
    """The configuration of `method`, without data; options that are None are left to its defaults.

    Raises:
        ConfigurationError: for an unknown method, or a value that the method refuses.
    """
    from ..methods.codebook.configuration import CodebookConfig
    from ..methods.modular.configuration import ModularDecompositionConfig
    from ..methods.pruning.configuration import PruningConfig
    from ..methods.sharing.configuration import LayerSharingConfig

    known = (ModularDecompositionConfig, CodebookConfig, PruningConfig, LayerSharingConfig)
    recipes: dict[str, type[MethodConfig]] = {config.method: config for config in known}
    # The method's own name may be longer than what one likes to type.
    recipes["modular"] = ModularDecompositionConfig
    if method not in recipes:
        raise ConfigurationError(f"unknown --method {method!r}; known: {', '.join(sorted(recipes))}.")
    if options.get("modules_to_not_convert") is not None:
        options["modules_to_not_convert"] = tuple(options["modules_to_not_convert"])
    given = {name: value for name, value in options.items() if value is not None}
    return recipes[method](**given)


def chosen_recipe(
    file: Path | None, method: str, **options: Any
) -> tuple[CompressionConfig, CalibrationConfig | None]:
    """The recipe of a file with its calibration data, or of the options.

    Raises:
        ConfigurationError: a file and options of methods, which would be two recipes; or as `build_recipe`.
    """
    from ..configuration import CompressionConfig
    from .recipe_file import load_recipe

    if file is None:
        return CompressionConfig.wrap(build_recipe(method, **options)), None
    # The seed also chooses the sequences.
    given = [name for name, value in options.items() if value is not None and name != "seed"]
    if given or method != "modular":
        raise ConfigurationError(
            f"--recipe says what is done; leave out --{(given or ['method'])[0].replace('_', '-')}, or write it into "
            "the file."
        )
    return load_recipe(file)


def parse_reduction(text: str | None) -> float | dict[str, float] | None:
    """`"0.2"` or `"mlp=0.25,query_key=0.1"`; raises `ConfigurationError` for anything else."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {kind.strip(): float(value) for kind, value in pairs}
    except ValueError:
        raise ConfigurationError(
            f"--reduction {text!r} is no fraction such as 0.2, and not one a kind such as mlp=0.25,query_key=0.1."
        ) from None


def parse_bits(text: str | None) -> float | str | dict[str, float] | None:
    """`"3"`, `"auto"` or `"mlp=2,query_key=3"`; raises `ConfigurationError` for anything else."""
    if text is None or text == "auto":
        return text

    def number(part: str) -> float:
        return int(part) if part.strip().isdecimal() else float(part)

    try:
        if "=" not in text:
            return number(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {kind.strip(): number(value) for kind, value in pairs}
    except ValueError:
        raise ConfigurationError(
            f"--bits {text!r} is no number such as 3, not auto, and not one a kind such as mlp=2,query_key=3."
        ) from None


def parse_kinds(text: str | None) -> str | list[str] | None:
    """`"auto"` or a comma-separated list."""
    if text is None or text == "auto":
        return text
    return [kind.strip() for kind in text.split(",") if kind.strip()]


def parse_group_sizes(text: str | None) -> list[int] | None:
    """`"1,1,3"`; raises `ConfigurationError` for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(
            f"--group-sizes {text!r}: expected whole numbers with commas between, such as 1,1,3."
        ) from None


def parse_temperature(text: str | None) -> float | str | None:
    """`"auto"` or a number; raises `ConfigurationError` for anything else."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"--temperature {text!r} is neither a number nor auto.") from None


def build_calibration(
    datasets: Sequence[str],
    names: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    text_columns: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> CalibrationConfig:
    """Calibration data from options; several datasets are a mixture.

    Names, splits and columns are given once for all datasets, or once for each, where `-` stands for none.

    Raises:
        ConfigurationError: without a dataset, or where an option is given another number of times.
    """
    from ..calibration.configuration import CalibrationConfig

    if not datasets:
        raise ConfigurationError(
            "there is nothing to calibrate on: add --dataset FILE (.txt, .jsonl, .parquet, .csv), or a dataset of the "
            "Hub, such as --dataset Salesforce/wikitext --dataset-name wikitext-2-raw-v1."
        )
    columns: dict[str, list[Any]] = {
        "name": _spread("--dataset-name", names, len(datasets)),
        "split": _spread("--split", splits, len(datasets)),
        # a,b: of several columns each text is a sequence of its own.
        "text_column": [
            tuple(column.split(",")) if column and "," in column else column
            for column in _spread("--text-column", text_columns, len(datasets))
        ],
    }
    given = {name: value for name, value in options.items() if value is not None}
    parts: list[dict[str, Any]] = []
    for index, dataset in enumerate(datasets):
        chosen = {field: values[index] for field, values in columns.items()}
        parts.append({"dataset": dataset, **{field: value for field, value in chosen.items() if value is not None}})
    if len(parts) == 1 and not weights:
        return CalibrationConfig(**parts[0], **given)
    return CalibrationConfig(
        [CalibrationConfig(**part) for part in parts], weights=tuple(weights) if weights else None, **given
    )


def _spread(option: str, values: Sequence[str] | None, count: int) -> list[str | None]:
    if not values:
        return [None] * count
    if len(values) not in (1, count):
        raise ConfigurationError(
            f"{option} was given {len(values)} times for {count} datasets; give it once for all, or once for each "
            f"(- for none)."
        )
    return [None if value == "-" else value for value in (list(values) * count if len(values) == 1 else values)]
