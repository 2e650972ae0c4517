"""The report: its numbers, its safety, its figures, and how headless Chromium renders it by day and by night."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import compress_with
from PIL import Image

from hf_compress.engine.report import CompressionReport, ModuleReport
from hf_compress.errors import ConfigurationError
from hf_compress.evaluation import (
    AgreementResult,
    Comparison,
    LayerLatency,
    Measurement,
    MemoryResult,
    PerplexityResult,
    Score,
    SizeOnDisk,
    SpeedResult,
    measure,
    write_report,
)
from hf_compress.evaluation.figures import Point, _Axis, bars, human_bytes, letter, pareto_front, scatter
from hf_compress.evaluation.report import kept_share, render_report

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&'
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge"))), None
)
VOID = {"meta", "img", "br", "hr", "input", "link"}


def compression(kept: float, blocks: int) -> CompressionReport:
    rows = [
        ModuleReport(
            block,
            f"model.layers.{block}.{path}",
            kind,
            1536,
            round(1536 * share),
            2654208,
            round(2654208 * share),
            0.002 * (1 + block) * (1 + number),
        )
        for block in range(2, blocks)
        for number, (kind, path) in enumerate(
            (("mlp", "mlp"), ("query_key", "self_attn"), ("value_output", "self_attn"))
        )
        for share in (max(0.05, min(1.0, kept - 0.3 + 0.02 * block + 0.1 * number)),)
    ]
    notes = {"probe": "0.31", "choice": HOSTILE}
    return CompressionReport(
        rows, 106168320, round(106168320 * kept), 134515008, 121000000, 269030016, 242000000, notes, ["lm_head: tied"]
    )


def measurement(name: str, size: float, loss: float, speed: float, kept: float | None = None) -> Measurement:
    """A model as large, as bad and as fast as the test wants it."""
    first = kept is None
    return Measurement(
        name,
        parameters=round(134_515_008 * size),
        size=SizeOnDisk(round(269_060_552 * size), round(272_000_000 * size)),
        perplexity=PerplexityResult(22.06 * loss, 3.09, 12_282, 2048, 2048),
        speed=SpeedResult(764 * speed, 25.2 * speed, speed, speed, 670 / speed, 1 / speed, 512, 64, 1, 5),
        memory=MemoryResult(round(269_030_016 * size), 90_000_000, "a prompt of 1×512 tokens", "cpu"),
        agreement=None if first else AgreementResult(0.3 * loss - 0.28, 1 - 0.14 * loss, 12_288, 2048),
        scores=(
            Score("LAMBADA accuracy", 0.42 / loss, 500, 0.022),
            Score("LAMBADA perplexity", 30.1 * loss**2, 500, higher_is_better=False),
        ),
        compression=None if kept is None else compression(kept, 30),
    )


def sample() -> Comparison:
    return Comparison(
        (
            measurement("models/SmolLM2-135M-Instruct", 1.0, 1.0, 1.0),
            measurement("out/modular-20-percent", 0.84, 1.18, 1.12, 0.8),
            measurement("out/modular-30-percent-without-attention", 0.76, 1.71, 1.2, 0.7),
            measurement("out/a-worse-one-of-thirty-percent", 0.8, 1.9, 1.15, 0.7),
            measurement("out/codebook-3-bits", 0.29, 1.33, 2.03, 0.9),
        )
    )


class Page(HTMLParser):
    """Tags, attributes and text as a browser would take them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_every_figure_of_the_table_and_of_every_module(tmp_path: Path) -> None:
    comparison = sample()
    write_report(comparison, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " ".join(page.text.split())
    for row in comparison.rows:
        for own in comparison.measurements:
            assert row.cell(own, comparison.measurements[0]) in text
    for own in comparison.measurements:
        assert own.name in text
        for row in own.compression.modules if own.compression else ():
            assert row.path in text
            assert f"{row.error:.4f}" in text
            assert f"{kept_share([row]):.1%}" in text
    for note in comparison.notes:
        assert note in text
    json.dumps(comparison.to_dict(), allow_nan=False)
    # Measures of quality; size twice, memory and three speeds; compressed models.
    assert sum(value == "front" for _, value in page.attributes) == 5
    assert page.text.count("is better") == 6
    assert sum(value == "heat" for _, value in page.attributes) == 4


def test_the_page_asks_nothing_of_the_network() -> None:
    page = Page(render_report(sample()))
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "action", "data"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", render_report(sample()))
    assert "default-src 'none'" in render_report(sample())


def test_hostile_names_stay_text() -> None:
    hostile = [measurement(HOSTILE, 1.0, 1.0, 1.0), measurement(f"org/{HOSTILE}2", 0.5, 1.2, 1.5, 0.8)]
    scores = (Score(HOSTILE, 0.5, 10, note=HOSTILE),)
    module = ModuleReport(0, HOSTILE, HOSTILE, 1, 1, 10, 5, 0.1)
    report = CompressionReport([module], 10, 5, 10, 5, 10, 5, {HOSTILE: HOSTILE}, [HOSTILE])
    layer = LayerLatency(HOSTILE, 2, HOSTILE, 2.0, 1.0)
    last = Measurement(HOSTILE + "3", 10, scores=scores, layers=(layer,), compression=report)
    page = Page(render_report(Comparison((*hostile, last)), title=HOSTILE))
    plain = Page(render_report(sample()))
    assert set(page.tags) <= set(plain.tags)
    assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes}
    assert HOSTILE in page.text


def test_terminal_names_stay_text() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Comparison((measurement("[red]model[/red]", 1.0, 1.0, 1.0),)).table())
    assert "[red]model[/red]" in console.export_text()


def test_a_real_report_of_a_compressed_model(tmp_path: Path) -> None:
    models = {name: compress_with(name, "llama") for name in ("modular", "codebook", "pruning", "sharing")}
    comparison = Comparison(tuple(measure(name, model) for name, model in models.items()))
    page = Page(render_report(comparison))
    assert sum(value == "heat" for _, value in page.attributes) == 4
    for own in comparison.measurements:
        assert own.compression is models[own.name].compression_report
        assert own.to_dict()["compression"]["modules"][0]["path"] in page.text


def test_one_model_with_nothing_measured() -> None:
    page = Page(render_report(Comparison((Measurement("alone", 1234),))))
    assert "1,234" in page.text
    assert "Size against quality" not in page.text


def test_what_is_not_finite_is_in_the_table_alone() -> None:
    models = [measurement("a", 1.0, 1.0, 1.0), measurement("b", 0.5, 1.2, 1.0, 0.8)]
    bad = Measurement("c", 10, perplexity=PerplexityResult(float("inf"), 800.0, 10, 8, 8))
    comparison = Comparison((*models, bad))
    page = Page(render_report(comparison))
    assert "inf" in page.text
    assert comparison.to_dict()["c"]["perplexity"]["perplexity"] is None
    assert not any(value and re.search(r"\b(inf|nan)\b", value) for name, value in page.attributes if name == "d")


def test_kept_share_of_stages() -> None:
    shrunk = ModuleReport(0, "mlp", "mlp", 64, 48, 1000, 750, 0.1)
    coded = [
        ModuleReport(0, "mlp.up", "mlp", 32, 3, 375, 375, 0.1, 1500, 150),
        ModuleReport(0, "mlp.down", "mlp", 32, 3, 375, 375, 0.1, 1500, 300),
    ]
    assert kept_share([shrunk]) == 0.75
    assert kept_share(coded) == pytest.approx(450 / 3000)
    assert kept_share([shrunk, *coded]) == pytest.approx(0.75 * 0.15)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_pareto_front_equals_brute_force(higher_is_better: bool) -> None:
    grid = [(float(x), float(y)) for x, y in itertools.product(range(3), repeat=2)]
    sign = -1 if higher_is_better else 1

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and sign * a[1] <= sign * b[1] and a != b

    for points in itertools.combinations_with_replacement(grid, 4):
        expected = {index for index, own in enumerate(points) if not any(beats(other, own) for other in points)}
        front = pareto_front(points, higher_is_better)
        assert set(front) == expected
        assert len(front) == len(expected)
        assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [3.0, 4.0], [-2.0, 5.0], [1.0, 1e6], [1e-9, 1.0], [22.06, 22.061], [0.99, 1e12]]
)
def test_axes_hold_their_values_and_have_ticks(values: list[float]) -> None:
    axis = _Axis.over(values, 0.0, 100.0)
    places = [axis.place(value) for value in values]
    assert all(0 < place < 100 for place in places)
    assert places == sorted(places)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(-1e-9 <= axis.place(tick) <= 100 + 1e-9 for tick in ticks)


def test_points_in_one_place_keep_their_letters() -> None:
    points = [Point(index, f"a model with a rather long name {index}", 1.0, 1.0, "") for index in range(12)]
    figure = scatter(points, x_title="x", y_title="y", higher_is_better=True, x_label=str)
    assert all(f">{letter(index)}" in figure for index in range(12))


def test_bars_are_as_long_as_their_values() -> None:
    figure = bars([Point(0, "a", 10.0, 0, "10"), Point(7, "b", 2.5, 0, "2.5")], title="t", higher_is_better=True)
    lengths = [float(length) for length in re.findall(r'class="bar".*?width="([\d.]+)"', figure)]
    assert lengths[1] == pytest.approx(lengths[0] / 4, abs=0.1)


def test_letters_and_sizes_for_people() -> None:
    assert [letter(index) for index in (0, 25, 26, 52)] == ["A", "Z", "A1", "A2"]
    assert [human_bytes(size) for size in (12, 41_300_000, 2_523_000_000)] == ["12 B", "41.3 MB", "2.52 GB"]


def test_write_report_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a folder"):
        write_report(sample(), tmp_path)
    with pytest.raises(ConfigurationError, match="no folder"):
        write_report(sample(), tmp_path / "none" / "report.html")
    with pytest.raises(ConfigurationError, match="at least one"):
        write_report(Comparison(()), tmp_path / "report.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_chromium_renders_it_by_day_and_by_night(width: int, tmp_path: Path) -> None:
    write_report(sample(), tmp_path / "report.html")
    shots = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        chromium(
            tmp_path,
            f"--blink-settings=preferredColorScheme={number}",
            f"--window-size={width},4000",
            f"--screenshot={picture}",
        )
        shots[scheme] = Image.open(picture).convert("RGB")
    corners = {scheme: shot.getpixel((2, 2)) for scheme, shot in shots.items()}
    assert corners == {"light": (255, 255, 255), "dark": (20, 22, 27)}
    for shot in shots.values():
        # Text, lines and series colours: a page whose style sheet or figures fail has a handful.
        assert len(shot.getcolors(2**20) or ()) > 200
        # Nothing runs over the right edge: the last columns of pixels are the page's ground.
        edge = shot.crop((shot.width - 3, 0, shot.width, shot.height))
        assert len(edge.getcolors() or ()) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_runs_nothing_of_a_hostile_name(tmp_path: Path) -> None:
    write_report(Comparison((measurement(HOSTILE, 1.0, 1.0, 1.0),)), tmp_path / "report.html", title=HOSTILE)
    page = Page(chromium(tmp_path, "--dump-dom"))
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in page.text


def chromium(folder: Path, *options: str) -> str:
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            *options,
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
