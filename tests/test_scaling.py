"""Plans for several accelerators: the counts against what really runs, and the table that they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import ALL_KINDS, calibration, make_model, token_ids
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hf_compress
from hf_compress import CodebookConfig, ConfigurationError, ModularDecompositionConfig
from hf_compress.anatomy import resolve_anatomy
from hf_compress.calibration.statistics import gram, strip_width
from hf_compress.cli import app
from hf_compress.engine.blocks import BlockStream
from hf_compress.engine.costs import StageCosts, SurveyCosts, block_shape
from hf_compress.engine.registry import create_method
from hf_compress.engine.scaling import HARDWARE, Hardware, gram_flops, this_machine
from hf_compress.methods.modular.statistics import collect_statistics

LENGTH = 32
# Hidden, inner, blocks, heads and parameters of Llama 3.1.
SHAPES = {
    "8B": (4096, 14336, 32, 32, 8.03),
    "70B": (8192, 28672, 80, 64, 70.55),
    "405B": (16384, 53248, 126, 128, 405.85),
}


def wide_model(attention: str = "eager") -> LlamaForCausalLM:
    """With an MLP of several strips. Eager attention is made of products that the counter sees."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=450,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def everything(reduction: float = 0.25, **fields: Any) -> ModularDecompositionConfig:
    return ModularDecompositionConfig(
        reduction=reduction, kinds=ALL_KINDS, allocation="uniform", calibration=calibration(), **fields
    )


def counted(model: Any, config: Any) -> StageCosts:
    (costs,) = hf_compress.plan(model, config, measure_time=False).count()
    return costs


def flops(work: Any, **mapping: Any) -> int:
    with FlopCounterMode(display=False, **mapping) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("dtype", "size"), list(itertools.product((torch.float32, torch.bfloat16), (100, 192, 450, 1700)))
)
def test_strips_of_a_gram_make_a_whole(dtype: torch.dtype, size: int) -> None:
    rows = torch.randn(300, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, exact = gram(rows), rows.double().T @ rows.double()
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-6 * float(exact.abs().max()))
    assert gram_flops(300, size) == flops(lambda: gram(rows)) <= 2 * 300 * size**2
    assert size <= strip_width(size) or gram_flops(1, size) < 1.8 * size**2


@pytest.mark.parametrize("order", ["dense", "sequential"])
def test_the_blocks_and_their_statistics_are_counted_as_they_run(order: str) -> None:
    model = wide_model()
    anatomy = resolve_anatomy(model)
    ids = token_ids(4, LENGTH)
    stream = BlockStream(anatomy, [{"input_ids": ids}])
    forward = flops(lambda: stream.run(0, 0))
    sums: dict[str, torch.Tensor] = {}

    def collect() -> None:
        with collect_statistics(anatomy, 0, set(ALL_KINDS)) as statistics:
            output = stream.run(0, 0)
            if order == "sequential":
                statistics.observe_drift(output, output)
        sums.update(create_method(everything(order=order), anatomy).sums(statistics))

    gathered = flops(collect) - forward
    costs = counted(model, everything(order=order))
    passes = 3 if order == "sequential" else 1
    assert costs.forward_flops == 2 * passes * forward // ids.numel()
    assert costs.statistics_flops == 2 * gathered // ids.numel()
    assert costs.sum_bytes == (sum(tensor.numel() * tensor.element_size() for tensor in sums.values()),) * 2


def test_the_factorisations_are_counted_as_they_run() -> None:
    aten = torch.ops.aten
    model = wide_model("sdpa")
    config = everything()
    anatomy = resolve_anatomy(model)
    method: Any = create_method(config, anatomy)
    stream = BlockStream(anatomy, [{"input_ids": token_ids(16, LENGTH)}])
    sizes = {"mlp": 320, "query_key": 8, "value_output": 8}
    method.sizes = [sizes] * 2
    with method.collect(0) as statistics:
        stream.run(0, 0)

    def cube(share: float) -> Any:
        return lambda a_shape, *_, **__: int(share * a_shape[-1] ** 3 * (a_shape[0] if len(a_shape) > 2 else 1))

    mapping = {
        aten.linalg_cholesky_ex: cube(1 / 3),
        aten.cholesky_inverse: cube(2 / 3),
        aten._linalg_eigh: cube(9),
        aten.linalg_solve_triangular: lambda a_shape, b_shape, *_, **__: a_shape[-1] ** 2 * b_shape[-1],
    }
    found = flops(lambda: method.compress_block(0, statistics), custom_mapping=mapping)
    shape = block_shape(anatomy, 0, method.expect().layout)
    assert sum(shape.tasks(sizes, False)) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("order", ["dense", "sequential"])
def test_results_weigh_what_the_new_modules_weigh(order: str) -> None:
    config = everything(order=order)
    costs = counted(make_model("llama"), config)
    model = hf_compress.compress(make_model("llama"), config)
    modules = [model.get_submodule(entry["path"]) for entry in model.config.quantization_config.layout]
    weight = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
    assert costs.result_bytes == weight
    dense = make_model("llama")
    assert costs.model_bytes == sum(p.numel() * p.element_size() for p in dense.parameters())


def ring_bytes(size: int, devices: int) -> int:
    """What each sends in an all-reduce, step by step: a part to its neighbour, summed up, then handed round."""
    part = size / devices
    return round(sum(part for _ in range(devices - 1)) + sum(part for _ in range(devices - 1)))


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
def test_traffic_and_turns(devices: int) -> None:
    dense, sequential = (counted(make_model("llama"), everything(order=order)) for order in ("dense", "sequential"))
    blocks, total = len(dense.tasks), sum(sequential.sum_bytes)
    solve = sum(dense.tasks[0])
    assert dense.solved_in_turn(devices) == -(-blocks // devices) * solve
    mlp, attention = sequential.tasks[0]
    assert sequential.solved_in_turn(devices) == blocks * (mlp + attention if devices == 1 else max(mlp, attention))
    if devices == 1:
        assert dense.traffic(1) == sequential.traffic(1) == 0
        return
    assert dense.traffic(devices) == sum(dense.sum_bytes) + dense.result_bytes
    expected = ring_bytes(total, devices) + sequential.result_bytes
    assert sequential.traffic(devices) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("name", SHAPES)
def test_large_models_from_their_config_alone(name: str, tmp_path: Path) -> None:
    hidden, inner, blocks, heads, billions = SHAPES[name]
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    config = ModularDecompositionConfig(reduction=0.3, kinds=["mlp"], allocation="uniform")
    plan = hf_compress.plan(tmp_path, config, measure_time=False)
    assert plan.parameters_before / 1e9 == pytest.approx(billions, abs=0.01)
    one, eight, many, spare = plan.on_paper((1, 8, 64, 256)).rows
    tokens, rate = 128 * 2048, HARDWARE["h100"].forward_flops * HARDWARE["h100"].forward_share
    # Two operations a weight and token, and the scores of 2048 tokens.
    matrices = 2 * plan.block_linear_before + 4 * 2048 * hidden * blocks
    assert one.forward == pytest.approx(tokens * matrices / rate)
    assert eight.forward == pytest.approx(one.forward / 8) and many.statistics == pytest.approx(one.statistics / 64)
    assert many.factorisation == pytest.approx(one.factorisation * -(-blocks // 64) / blocks, rel=0.01)
    # 128 sequences do not go round 256 processes: one does the work and hands the result to the others.
    assert spare.forward == one.forward and 0 < spare.traffic < many.traffic
    assert one.traffic == 0 and one.network == 0 and eight.traffic == many.traffic > blocks * 8 * inner**2
    assert not eight.survey and many.seconds < eight.seconds < one.seconds
    assert one.streamed == (2 * billions > 80)
    # Sums of the largest model, with their factor and inverse, are more than an accelerator of 80 GB holds.
    assert eight.fits == (name != "405B")
    # So much more that of eight each would still want the largest in smaller batches: it keeps sums of its own block.
    alone, together = plan.on_paper([1, 8], "h200").rows
    assert alone.fits and together.fits == (name != "405B")


@pytest.mark.parametrize("name", ["bart", "clip", "dinov3_vit"])
def test_encoders_on_paper(name: str) -> None:
    config = ModularDecompositionConfig(reduction=0.2, calibration=families.calibration(name))
    one, eight = hf_compress.plan(families.make(name), config, measure_time=False).on_paper((1, 8)).rows
    assert 0 < eight.seconds < one.seconds and one.traffic == 0 < eight.traffic


@pytest.mark.parametrize("dealt", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 3, 7])
def test_the_busiest_in_a_survey(devices: int, dealt: bool) -> None:
    """The sequences are dealt out one by one, as trial.py does."""
    survey = SurveyCosts(
        length=10, influence_tokens=50, probe_tokens=40, judged_tokens=50, allocations=(4, 3), forward_flops=10**4,
        head_flops=10**2, statistics_flops=1, solve_flops=(1, 5, 2, 3), sum_bytes=8, dealt=dealt,
    )  # fmt: skip
    judged = 0
    for streams in survey.allocations:
        hands = Counter(
            (stream * 5 + sequence) % devices if dealt else sequence % devices
            for stream, sequence in itertools.product(range(streams), range(5))
        )
        judged += 10 * max(hands.values())
    looked, probed = 10 * -(-5 // devices), 2 * 10 * -(-4 // devices)
    solved = 2 * {1: 1 + 5 + 2 + 3, 2: 5 + 3, 3: 5 + 3, 7: 5}[devices]
    assert survey.flops(devices) == {
        "forward_flops": (looked + probed) * 10**4 + judged * (10**4 + 10**2),
        "statistics_flops": probed,
        "solve_flops": solved,
    }
    assert survey.passes == 3 and survey.traffic(100) == 2 * 8 + 7 * 100


def test_a_survey_is_shared() -> None:
    config = ModularDecompositionConfig(reduction=0.3, calibration=calibration(num_samples=16))
    paper = hf_compress.plan(make_model("llama"), config, measure_time=False).on_paper((1, 16))
    assert 0 < paper.rows[1].survey < paper.rows[0].survey / 3
    text = str(paper)
    for word in (
        "H100 SXM",
        "67 TFLOP/s, of which 60% are reached",
        "16 sequences of 32 tokens",
        "devices",
        "guesses",
    ):
        assert word in text


def test_rates_of_this_machine_are_measured() -> None:
    found = this_machine(size=256)
    assert found.forward_flops > 1e8 and found.gram_flops > 1e8 and found.solve_flops > 1e7
    assert found.forward_share == 1 and "threads" in found.name and "measured" in found.source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("memory", "no size"),
        ("colour=3", "none of"),
        ("memory=much", "no size"),
        ("gram_share=2", "a share in"),
    ],
)
def test_assumptions_that_make_no_sense(change: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HARDWARE["h100"].assuming([change])


def test_assumptions_can_be_changed() -> None:
    found = HARDWARE["a100"].assuming(["memory=40GB", "solve_share=0.1", "node=4"])
    assert (found.memory, found.solve_share, found.node) == (40 * 10**9, 0.1, 4)
    assert found == dataclasses.replace(
        HARDWARE["a100"], memory=40 * 10**9, solve_share=0.1, node=4, source=found.source
    )
    assert "memory=40GB" in str(found.assumptions()) and HARDWARE["a100"].assuming([]) is HARDWARE["a100"]
    with pytest.raises(ConfigurationError, match="known: a100"):
        Hardware.named("abacus")


def test_what_is_not_counted_is_refused() -> None:
    plan = hf_compress.plan(make_model("llama"), CodebookConfig(bits=3, learning="none"), measure_time=False)
    with pytest.raises(ConfigurationError, match="modular decomposition alone"):
        plan.on_paper()
    plan = hf_compress.plan(make_model("llama"), everything(), measure_time=False)
    with pytest.raises(ConfigurationError, match="1 or more"):
        plan.on_paper([0])


def test_the_command(tmp_path: Path) -> None:
    make_model("llama").config.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--reduction", "0.2", "--devices"]
    done = CliRunner().invoke(app, [*arguments, "1,8", "--hardware", "a100", "--assume", "bandwidth=100GB"])
    assert done.exit_code == 0, done.output
    assert "A100 SXM" in done.output and "100 GB/s a device" in done.output
    wrong = CliRunner().invoke(app, [*arguments, "1,none"])
    assert wrong.exit_code == 2 and "such as 1,8,64" in wrong.output
