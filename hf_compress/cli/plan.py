"""`hf-compress plan`: what a recipe would do, before doing it."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigurationError
from . import recipe as options
from .console import command, stdout
from .loading import check_source


@command
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its id on the Hub.")],
    recipe_file: options.RecipeFile = None,
    method: options.Method = "modular",
    reduction: options.Reduction = None,
    bits: options.Bits = None,
    average_bits: options.AverageBits = None,
    learning: options.Learning = None,
    column_group: options.ColumnGroup = None,
    reorder_channels: options.ReorderChannels = None,
    sparsity: options.Sparsity = None,
    criterion: options.Criterion = None,
    scope: options.Scope = None,
    structured: options.Structured = None,
    values: options.Values = None,
    base_model: options.BaseModel = None,
    unique_layers: options.UniqueLayers = None,
    layer_order: options.LayerOrder = None,
    group_sizes: options.GroupSizes = None,
    initialization: options.Initialization = None,
    lora_rank: options.LoraRank = None,
    inference_iterations: options.InferenceIterations = None,
    kinds: options.Kinds = None,
    allocation: options.Allocation = None,
    temperature: options.Temperature = None,
    search_minutes: options.SearchMinutes = None,
    rank_multiple: options.RankMultiple = None,
    portable: options.Portable = None,
    order: options.Order = None,
    value_output: options.ValueOutput = None,
    modules_to_not_convert: options.Skip = None,
    num_samples: Annotated[int | None, typer.Option(help="Sequences that will be calibrated on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Rehearse on two blocks of random weights to tell the time.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(help="Also time, memory and network traffic on so many accelerators, on paper: 1,8,64."),
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="With --devices: a100, h100, h200, or this to measure the CPU.")
    ] = "h100",
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="With --devices: another number for a device, memory=40GB or gram_share=0.4; may be repeated."
        ),
    ] = None,
    verbose: options.Verbose = False,
) -> None:
    """Show what would be compressed and how small MODEL would become. Nothing is loaded or written."""
    counts = _device_counts(devices)
    if assume and not counts:
        raise ConfigurationError("--assume is about devices: say how many with --devices 1,8,64.")
    from ..engine.scaling import Hardware

    paper_hardware = Hardware.named(hardware).assuming(assume or ()) if counts else None
    check_source(model)
    recipe, data = options.chosen_recipe(
        recipe_file,
        method,
        reduction=options.parse_reduction(reduction),
        bits=options.parse_bits(bits),
        average_bits=average_bits,
        learning=learning,
        column_group=column_group,
        reorder_channels=reorder_channels,
        sparsity=sparsity,
        criterion=criterion,
        scope=scope,
        structured=structured,
        values=values,
        base_model=base_model,
        unique_layers=unique_layers,
        group_sizes=options.parse_group_sizes(group_sizes),
        initialization=initialization,
        lora_rank=lora_rank,
        inference_iterations=inference_iterations,
        kinds=options.parse_kinds(kinds),
        allocation=allocation,
        temperature=options.parse_temperature(temperature),
        search_minutes=search_minutes,
        rank_multiple=rank_multiple,
        portable=portable,
        order=order if layer_order is None else layer_order,
        value_output=value_output,
        modules_to_not_convert=modules_to_not_convert,
    )

    import hf_compress

    numbers = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    given = {name: value for name, value in numbers.items() if value is not None}
    calibration = hf_compress.CalibrationConfig("not read", **given) if given else data
    planned = hf_compress.plan(model, recipe, calibration=calibration, measure_time=time or None)
    stdout().print(str(planned), highlight=False, markup=False)
    if paper_hardware is not None:
        stdout().print(str(planned.on_paper(counts, paper_hardware)), highlight=False, markup=False)


def _device_counts(devices: str | None) -> list[int]:
    """Numbers separated by commas. Raises `ConfigurationError`."""
    parts = devices.split(",") if devices is not None else []
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigurationError(f"--devices {devices!r}: expected numbers of 1 or more such as 1,8,64.")
    return [int(part) for part in parts]
