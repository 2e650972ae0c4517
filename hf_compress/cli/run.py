"""`hf-compress run`: compress a model and save it with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigurationError
from ..output import check_output, check_working_directory, whole_folder
from . import recipe as options
from .console import command, say, stdout

if TYPE_CHECKING:
    from ..engine.report import CompressionReport


@command
def run(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its id on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist or be empty.")],
    recipe_file: options.RecipeFile = None,
    method: options.Method = "modular",
    reduction: options.Reduction = None,
    bits: options.Bits = None,
    average_bits: options.AverageBits = None,
    learning: options.Learning = None,
    block_epochs: options.BlockEpochs = None,
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
    dataset: Annotated[
        list[str] | None, typer.Option(help="Calibration data: a file, a folder or a Hub id; repeated, a mixture.")
    ] = None,
    dataset_name: Annotated[list[str] | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    dataset_weight: Annotated[list[float] | None, typer.Option(help="Share of each dataset of a mixture.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split of a Hub dataset.")] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column of texts or messages; a,b: each text of both a sequence.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Sequences to calibrate on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the sequences.")] = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    working_directory: Annotated[
        Path | None, typer.Option(help="Keeps finished blocks, so that an interrupted run resumes.")
    ] = None,
    keep_activations: Annotated[
        bool, typer.Option(help="Keep hidden states in the working directory: resuming runs no finished block again.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Go through the checkpoint block by block, and take no more than e.g. 6GB in all."),
    ] = None,
    revision: options.Revision = None,
    gguf_file: options.GgufFile = None,
    verbose: options.Verbose = False,
) -> None:
    """Compress MODEL and write the result, with its tokenizer, to OUT."""
    check_output(out)
    check_working_directory(working_directory, out)
    recipe, data = options.chosen_recipe(
        recipe_file,
        method,
        reduction=options.parse_reduction(reduction),
        bits=options.parse_bits(bits),
        average_bits=average_bits,
        learning=learning,
        block_epochs=block_epochs,
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
        seed=seed,
    )

    for stage in recipe.stages:
        stage.check_in_one_call()
    calibration = data
    if dataset or (data is None and any(stage.needs_data for stage in recipe.stages)):
        calibration = options.build_calibration(
            dataset or [],
            dataset_name,
            split,
            text_column,
            dataset_weight,
            num_samples=num_samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
        )

    import hf_compress

    from ..calibration.sources import check_local_data
    from ..engine.distributed import (
        Processes,
        process_device,
        process_state,
        processes_here,
        processes_started,
        several_processes,
    )
    from ..engine.freed import keep_heap_small
    from .loading import is_compressed, load_model, load_processing_class

    if max_memory is not None:
        keep_heap_small()
    if calibration is not None:
        check_local_data(calibration)
    # The tokenizer first: it is small, and calibration and saving fail without it.
    processing_class = load_processing_class(model, revision=revision, gguf_file=gguf_file)
    if max_memory is not None:
        if device_map is not None or gguf_file is not None:
            raise ConfigurationError("--max-memory goes without --device-map and --gguf-file.")
        report = hf_compress.compress_checkpoint(
            model,
            out,
            recipe,
            processing_class=processing_class,
            calibration=calibration,
            working_directory=working_directory,
            max_memory=max_memory,
            keep_activations=keep_activations,
            dtype=dtype,
            revision=revision,
        )
        if process_state().is_main_process:
            _finish(report, out)
        return
    if device_map is None and gguf_file is None and not is_compressed(model, revision):
        planned = hf_compress.plan(
            model,
            recipe,
            calibration=calibration,
            measure_time=False,
            dtype=dtype,
            processes=processes_started(),
            revision=revision,
        )
        planned.require_memory(processes=processes_here())
    dense = load_model(
        model, dtype=dtype, device_map=device_map, revision=revision, gguf_file=gguf_file, of_any_class=True
    )
    if several_processes() and device_map is None:
        dense.to(process_device())
    compressed = hf_compress.compress(
        dense,
        recipe,
        processing_class=processing_class,
        calibration=calibration,
        working_directory=working_directory,
        keep_activations=keep_activations,
    )

    def save() -> None:
        with whole_folder(out) as scratch:
            compressed.save_pretrained(scratch)
            processing_class.save_pretrained(scratch)
        _finish(compressed.compression_report, out)

    with Processes.of_launcher() as processes:
        processes.once(save)


def _finish(report: CompressionReport, out: Path) -> None:
    from ..evaluation import size_on_disk

    stdout().print(str(report), highlight=False, markup=False)
    say(f"Saved to {out} ({size_on_disk(out).weights:,} bytes of weights)")
