"""A checkpoint is data: whatever is in it, it is refused with an error or loaded, and nothing else happens."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import KINDS, attempt, run, save
from support.mutation import TYPES, Checkpoint, mutate, nested
from support.tensor_mutation import read_tensors, write_tensors
from support.watching import Watch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_compress
from hf_compress import CheckpointError, CompressionError, ConfigurationError, PruningConfig
from hf_compress.hub import folder_card
from hf_compress.layout import replay
from hf_compress.methods.pruning.modules import SparseLinear
from hf_compress.methods.pruning.state import TrainingState
from hf_compress.quantizer import CompressedModelConfig
from hf_compress.training.teacher_cache import TeacherCache

MUTATIONS = 24  # a kind of checkpoint


@pytest.fixture(autouse=True)
def checks_of_shapes_are_off() -> Iterator[None]:
    """Users have none: the package's own checks have to do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root, found = tmp_path_factory.mktemp("seeds"), {}
    for name in KINDS:
        save(name, root / name)
        found[name] = Checkpoint.read(root / name)
    return found


def changed(seeds: dict[str, Checkpoint], name: str, folder: Path, change: Any) -> Path:
    """The checkpoint of a kind with its quantization_config changed."""
    config = json.loads(seeds[name].config)
    change(config["quantization_config"])
    Checkpoint(json.dumps(config).encode(), seeds[name].weights).write(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_every_module_type_is_among_the_seeds(seeds: dict[str, Checkpoint]) -> None:
    layouts = [json.loads(seed.config)["quantization_config"]["layout"] for seed in seeds.values()]
    assert {entry["type"] for layout in layouts for entry in layout} == set(TYPES)


@pytest.mark.filterwarnings("ignore:the checkpoint's compression report")
@pytest.mark.parametrize("name", sorted(KINDS))
def test_mutated_checkpoints(name: str, seeds: dict[str, Checkpoint], tmp_path: Path, watch: Watch) -> None:
    seeds[name].write(tmp_path)
    assert attempt(tmp_path, name) == ("loaded", "")
    refused = 0
    for number in range(MUTATIONS):
        mutate(seeds[name], f"test:{number}").write(tmp_path)
        with watch.listening():
            outcome, detail = attempt(tmp_path, name)
        assert outcome in ("refused", "loaded", "forward raised"), f"test:{number} {detail}"
        # Python's and the libraries' own modules come when an error is made of them for the first time.
        assert [event for event in watch.events if not event.startswith("import ")] == [], f"test:{number}"
        refused += outcome == "refused"
    assert refused > MUTATIONS / 3


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "model", "model.layers.0", "model.layers.1.mlp.down_proj", "gaps", "nf4", "euler", "é\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "in_features",
    "out_features",
    "query_key_dim",
    "value_dim",
    "output_bias",
    "bits",
    "books",
    "column_group",
    "integer_scales",
    "trainable",
    "source",
    "rank",
    "bias",
    "nonzeros",
    "positions",
    "stream",
    "values",
    "assigned",
    "order",
    "solver",
    "scaled",
    "loops",
    "steps",
    "quant_type",
    "dtype",
    "double",
    "offset",
    "compute_dtype",
    "threshold",
]
SMALL = st.integers(-1, 70) | st.booleans() | st.sampled_from([1.58, "gaps", "mask", "all", "int8", "float16", None])
SPECS = st.dictionaries(st.sampled_from(FIELDS), SMALL | VALUES, max_size=6)
# Whole specs of right fields, so that most of the code is reached.
SOUND = st.sampled_from(
    [
        ("linear", {"in_features": 48, "out_features": 64}),
        ("attention", {"query_key_dim": 8, "value_dim": 8, "output_bias": False}),
        ("codebook_linear", {"bits": 3, "books": 4, "column_group": 32, "integer_scales": True}),
        ("codebook_embedding", {"bits": 2, "books": 1, "column_group": 48, "integer_scales": False}),
        ("sparse_linear", {"nonzeros": 9, "positions": "gaps", "stream": 9, "values": "float16"}),
        ("shared_linear", {"source": "model.layers.0.mlp.up_proj", "rank": 2, "bias": False}),
        ("shared_module", {"source": "model.layers.0.input_layernorm"}),
        ("codebook_tied_linear", {"source": "model.embed_tokens"}),
        (
            "shared_blocks",
            {
                "assigned": [0, 0],
                "order": "cycle",
                "solver": "euler",
                "scaled": None,
                "loops": [0],
                "steps": [1],
            },
        ),
    ]
)
PLACES = [
    "model",
    "model.layers",
    "model.layers.0",
    "model.layers.0.mlp",
    "model.layers.0.self_attn",
    "model.layers.1.mlp.up_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.self_attn.q_proj",
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    "layers.0",
    "model.layers.1.input_layernorm",
    "model.base_model.layers.0",
    "model..norm",
    ".",
    "_modules",
]
PATHS = st.sampled_from(PLACES)
ENTRIES = st.one_of(
    st.builds(lambda path, typed: {"path": path, "type": typed[0], "spec": dict(typed[1])}, PATHS, SOUND),
    st.builds(
        lambda path, typed, more: {"path": path, "type": typed[0], "spec": {**typed[1], **more}}, PATHS, SOUND, SPECS
    ),
    st.builds(
        lambda path, kind, spec: {"path": path, "type": kind, "spec": spec},
        PATHS | VALUES,
        st.sampled_from(TYPES) | VALUES,
        SPECS | VALUES,
    ),
)
MANY = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@MANY
@given(st.lists(ENTRIES, min_size=1, max_size=4) | VALUES)
def test_any_layout_is_refused_or_makes_nothing_larger(layout: Any) -> None:
    config = KINDS["pruned, gaps"].dense().config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    before, refusal = sum(tensor.numel() for tensor in skeleton.state_dict().values()), None
    try:
        replay(skeleton, layout)
    except CheckpointError as error:
        refusal = str(error)
    if refusal is not None:
        assert len(refusal) < 3000
        return
    after = skeleton.state_dict()
    assert all(tensor.is_meta for tensor in after.values())
    # Corrections of full rank are twice as large as the matrix, and one codebook a row as large as its codes.
    assert sum(tensor.numel() for tensor in after.values()) <= 4 * before + 4096


@MANY
@given(st.dictionaries(st.sampled_from(["recipe", "layout", "provenance", "format_version", "self", "x"]), VALUES))
def test_any_quantization_config_is_refused_or_kept(fields: dict[str, Any]) -> None:
    try:
        config = CompressedModelConfig(**fields)
    except CheckpointError:
        return
    assert isinstance(config.recipe, dict) and isinstance(config.provenance, dict) and isinstance(config.layout, list)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("modular", lambda q: q["layout"].append(copy.deepcopy(q["layout"][0])), "twice"),
        ("modular", lambda q: q["layout"].extend([copy.deepcopy(q["layout"][0])] * 5000), "twice"),
        ("modular", lambda q: q["layout"][0].update(path="model.base_model.layers.0.mlp.up_proj"), "does not have"),
        ("modular", lambda q: q["layout"][0].update(path="a" * 10**6), "must be a module path"),
        ("modular", lambda q: q["layout"][0].update(type=[]), "module type"),
        ("modular", lambda q: q.update(layout={"a": 1}), "is a dict, expected a list"),
        ("modular", lambda q: q.update(recipe=[1]), "is a list, expected a dict"),
        ("modular", lambda q: q["provenance"].update(x=nested(90)), "nested deeper"),
        ("modular", lambda q: q.update(format_version=True), "format_version"),
        ("modular, coded", lambda q: q["layout"].sort(key=lambda entry: -len(entry["path"])), "after a part of it"),
        ("pruned, gaps", lambda q: q["layout"][0]["spec"].update(nonzeros=True), "nonzeros"),
        ("pruned, gaps", lambda q: q["layout"][0]["spec"].update(values=["int8"]), "values"),
        ("pruned, gaps", lambda q: q["layout"][0]["spec"].update(stream=10**30), "stream"),
        ("shared", lambda q: q["layout"][0]["spec"].update(steps=[float("inf")] * 3), "positive and finite"),
        ("shared", lambda q: q["layout"][0]["spec"].update(steps=[10**400] * 3), "positive and finite"),
        ("shared", lambda q: q["layout"][0]["spec"].update(loops=[0, 0, 0]), "must ascend"),
        ("shared", lambda q: q["layout"][0]["spec"].update(loops=[True, 2, 3]), "not there"),
        ("shared", lambda q: q["layout"][0]["spec"].update(assigned=[7, 0, 0, 0]), "not there"),
        ("shared", lambda q: q["layout"][0]["spec"].update(scaled=["mlp.nothing"]), "no shared layer"),
        ("shared", lambda q: q["layout"][0]["spec"].update(scaled=["mlp.down_proj"] * 9), "twice"),
        ("shared", lambda q: q["layout"][0]["spec"].update(scaled=None), "need the modules"),
        ("bitsandbytes, 8 bits", lambda q: q["layout"][0]["spec"].update(threshold=float("nan")), "threshold"),
        ("bitsandbytes, 8 bits", lambda q: q["layout"][0]["spec"].update(threshold=10**400), "threshold"),
        ("bitsandbytes, 4 bits", lambda q: q["layout"][0]["spec"].update(offset=float("inf")), "offset"),
    ],
)
def test_what_the_fields_of_a_layout_may_be(
    name: str, change: Any, message: str, seeds: dict[str, Checkpoint], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(changed(seeds, name, tmp_path, change))


@pytest.mark.parametrize(
    "source", ["model", "model.layers.1", "model.layers.0.mlp", "model.layers.1.input_layernorm", "model.embed_tokens"]
)
def test_a_shared_module_is_no_way_round_in_a_circle(
    source: str, seeds: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def change(stored: dict[str, Any]) -> None:
        entry = next(entry for entry in stored["layout"] if entry["type"] == "shared_module")
        entry["spec"]["source"] = source

    with pytest.raises(CheckpointError, match="uses a|tied to"):
        load(changed(seeds, "shared with norms", tmp_path, change))


def test_another_type_of_tensor_is_refused(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    """64-bit positions could say that a matrix has more rows than memory has room for."""
    tensors = read_tensors(seeds["pruned, gaps"].weights)
    stream = tensors["model.layers.0.mlp.down_proj.weight"]
    count = stream.shape[0]
    stream.dtype = "I64"
    stream.data = torch.tensor([10**14, -(10**14), *[0] * (count - 2)]).numpy().tobytes()
    Checkpoint(seeds["pruned, gaps"].config, write_tensors(tensors)).write(tmp_path)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight' is of torch\.int64, expected torch\.uint8"):
        load(tmp_path)


def test_a_norm_of_integers_is_refused(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    tensors = read_tensors(seeds["modular"].weights)
    norm = tensors["model.norm.weight"]
    norm.dtype, norm.data = "I8", bytes(norm.shape[0])
    Checkpoint(seeds["modular"].config, write_tensors(tensors)).write(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' is of torch\.int8, expected torch\.float32"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("seed", "name", "expected"),
    [("coded, tied", "weight", "int32"), ("coded, tied", "scales", "uint8"), ("pruned, gaps", "weight", "uint8")],
)
def test_codes_and_positions_that_are_floats_are_refused(
    seeds: dict[str, Checkpoint], tmp_path: Path, seed: str, name: str, expected: str
) -> None:
    """Transformers would cast them."""
    tensors = read_tensors(seeds[seed].weights)
    path = f"model.layers.0.mlp.down_proj.{name}"
    tensor = tensors[path]
    tensor.dtype, tensor.data = "F32", bytes(4 * torch.Size(tensor.shape).numel())
    Checkpoint(seeds[seed].config, write_tensors(tensors)).write(tmp_path)
    with pytest.raises(CheckpointError, match=rf"down_proj\.{name}' is of torch\.float32, expected torch\.{expected}"):
        load(tmp_path)


def test_pickled_tensors_are_not_read(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(seeds["modular"].config)
    torch.save({"model.norm.weight": torch.ones(48)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin', expected safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("rows", [2**31, 2**40])
def test_matrices_beyond_32_bits_have_no_sparse_form(rows: int) -> None:
    dense = torch.nn.Linear(4, rows, bias=False, device="meta")
    spec = {"nonzeros": 0, "positions": "gaps", "stream": 0, "values": "float16"}
    with pytest.raises(ValueError, match="32 bits cannot number"):
        SparseLinear.from_spec(dense, spec)


def test_rows_that_the_file_does_not_hold_take_no_memory() -> None:
    rows = 1 << 24
    dense = torch.nn.Linear(4, rows, bias=False, device="meta")
    spec = {"nonzeros": 2, "positions": "gaps", "stream": 2, "values": "float16"}
    layer = SparseLinear.from_spec(dense, spec).to_empty(device="cpu")
    layer.get_buffer("weight").copy_(torch.tensor([5, 2]))
    layer.values.data.fill_(1)
    layer.row_starts = layer.column_indices = torch.empty(0, dtype=torch.int32)
    layer.check_tensors()
    assert layer.row_starts.numel() == 0
    assert layer(torch.ones(1, 4)).nonzero().tolist() == [[0, 1], [0, 2]]


def test_cards_and_reports_show_names_as_text(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    evil = "<script>x</script> ![y](http://z) `code` \x1b[2J \u202e | \ud800"

    def change(stored: dict[str, Any]) -> None:
        report = stored["provenance"]["report"]
        report["left_alone"] = [evil, "<!-- hf_compress: end -->"]
        report["modules"][0]["kind"] = evil
        stored["provenance"] |= {
            "base_model": evil,
            "base_commit": "main; touch here",
            "versions": {"torch": "2; touch here", "evil; touch here": "1", "transformers": "5.23.0"},
            "calibration": [7, {"dataset": 3}, {"dataset": evil, "fingerprint": evil, "parts": "x"}],
        }

    changed(seeds, "modular", tmp_path, change)
    card = folder_card(tmp_path)
    body = card.partition("\n---\n")[2]
    assert "&lt;script&gt;" in body and "<script>" not in body
    assert re.search(r"(?<!\\)\]\(http", body) is None, "a link or an image"
    assert "touch here" not in body and "pip install transformers==5.23.0" in body
    assert body.count("<!-- hf_compress: end -->") == 1
    shown = str(load(tmp_path).compression_report)
    assert "<script>" in shown and "\x1b" not in shown + card and "\u202e" not in shown + card


@pytest.mark.parametrize(
    "report",
    [
        {"modules": 3},
        {"block_linear_before": 0},
        {"parameters_before": "many"},
        {"bytes_after": 10**300},
        {"left_alone": "x"},
        {"notes": []},
        {"modules": [{"block": "x"}]},
    ],
)
def test_a_report_that_is_none_is_left_out(report: Any, seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    changed(seeds, "modular", tmp_path, lambda stored: stored["provenance"]["report"].update(report))
    with pytest.warns(UserWarning, match="report cannot be read"):
        model = load(tmp_path)
    assert model.compression_report is None
    with pytest.warns(UserWarning, match="report cannot be read"):
        assert "The report of the compression was not recorded" in folder_card(tmp_path)


@pytest.mark.parametrize("evaluation", [{"a": {"parameters": 1, "scores": [1], "perplexity": 3, "speed": {}}}, [1]])
def test_evaluations_of_strange_types(evaluation: Any, seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    seeds["modular"].write(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    if isinstance(evaluation, dict):
        assert "Before and after" in folder_card(tmp_path)
    else:
        with pytest.raises(ConfigurationError, match="hf-compress eval"):
            folder_card(tmp_path)


def test_a_card_full_of_marks_is_left_alone(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    """With a search that begins anew at every mark this would take hours."""
    seeds["modular"].write(tmp_path)
    (tmp_path / "README.md").write_text("<!-- hf_compress: begin {} -->\n" * 100_000)
    with pytest.warns(UserWarning, match="marks of our section are damaged"):
        folder_card(tmp_path)


@pytest.mark.parametrize(("place", "value"), [(0, -1), (4, 0x7FF8 << 48), (4, 0x7FF0 << 48)])
def test_counters_of_a_training_are_numbers(place: int, value: int) -> None:
    recipe = PruningConfig(sparsity=0.5)
    layer = torch.nn.Linear(2, 2)
    state = TrainingState(layer, recipe, 0)
    state.check(0, recipe)
    layer.get_buffer("pruning_state")[place] = value
    with pytest.raises(CheckpointError, match="counters"):
        state.check(0, recipe)


def test_damaged_answers_of_a_teacher_are_asked_for_again(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cache = TeacherCache(tmp_path, {"classes": 2})
    cache.keep("ab", torch.tensor([[1, 2]]), torch.zeros(1, 2))
    assert cache.load("ab") is not None
    for tensors in (
        {"classes": torch.tensor([[-1, 2]], dtype=torch.int32), "log_probabilities": torch.zeros(1, 2)},
        {"classes": torch.tensor([[1, 2]], dtype=torch.int32), "log_probabilities": torch.zeros(1, 3)},
        {"classes": torch.zeros(1, 2), "log_probabilities": torch.zeros(1, 2)},
        {"other": torch.zeros(1)},
    ):
        save_file(tensors, tmp_path / "ab" / "ab.safetensors")
        assert cache.load("ab") is None
    (tmp_path / "teacher.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="damaged"):
        TeacherCache(tmp_path, {"classes": 2})


def test_a_whole_checkpoint_still_gives_the_same_answers(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Mutations that change nothing: the files written anew, with a part that nobody knows in the provenance."""
    for name in ("modular", "coded, tied", "pruned, mask in int8", "shared"):
        seeds[name].write(tmp_path)
        reference = run(load(tmp_path), name)
        changed(seeds, name, tmp_path, lambda stored: stored["provenance"].update(unknown=[{"x": 1}]))
        weights = write_tensors(read_tensors(seeds[name].weights))
        (tmp_path / "model.safetensors").write_bytes(weights)
        assert torch.equal(run(load(tmp_path), name), reference)


def test_a_hostile_checkpoint_is_not_gone_on_with(seeds: dict[str, Checkpoint], tmp_path: Path) -> None:
    for layout in ([3], [{"path": "x", "type": [], "spec": {}}], "x"):
        changed(seeds, "shared", tmp_path, lambda stored, layout=layout: stored.update(layout=layout))
        with pytest.raises(CompressionError):
            AutoModelForCausalLM.from_pretrained(
                tmp_path, compression_config=hf_compress.LayerSharingConfig(inference_iterations=2)
            )
