"""The page: what it shows is right, small, safe and readable; tests/integration has a browser."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import hf_sparse
from conftest import ROOT, layer_report
from hf_sparse import EvaluationError, PruningReport, SaveError, SparseConfig, write_report
from hf_sparse.evaluation import Evaluation, Texts
from hf_sparse.pruning.report import LayerReport
from hf_sparse.publish.html import masks, page
from hf_sparse.publish.html.charts import line_chart
from hf_sparse.publish.html.masks import MaskView, read_masks, view_mask
from hf_sparse.publish.html.tables import heat_map
from hf_sparse.publish.html.write import ASSETS, render


def layer(name: str, block: str, **changes) -> LayerReport:
    return layer_report(name, block=block, **({"relative_error": 0.1} | changes))


class Elements(HTMLParser):
    """All elements with their attributes, and the text of those that hold raw text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_data(self, data):
        if self.cdata_elem in self.raw:
            self.raw[self.cdata_elem][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


# --- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (50, 131), (200, 97)])
def test_a_view_counts_each_part_and_copies_the_corner(shape):
    weight = torch.randn(shape) * (torch.rand(shape) > 0.4)
    view = view_mask("some.layer", weight)
    kept = (weight != 0).tolist()
    assert view.grid == (min(48, shape[0]), min(48, shape[1]))
    # The parts' edges: as equal as they can be, the larger ones first.
    edges = []
    for side, parts in zip(shape, view.grid, strict=True):
        sizes = [side // parts + (i < side % parts) for i in range(parts)]
        edges.append([sum(sizes[:i]) for i in range(parts + 1)])
    for i in range(view.grid[0]):
        for j in range(view.grid[1]):
            part = [
                kept[r][c]
                for r in range(edges[0][i], edges[0][i + 1])
                for c in range(edges[1][j], edges[1][j + 1])
            ]
            found = view.density[i * view.grid[1] + j]
            assert abs(found - 255 * sum(part) / len(part)) <= 0.5001
    assert view.corner == (min(128, shape[0]), min(128, shape[1]))
    for i in range(view.corner[0]):
        for j in range(view.corner[1]):
            at = i * view.corner[1] + j
            assert (view.bits[at // 8] >> (7 - at % 8) & 1) == kept[i][j]


@pytest.mark.parametrize(
    "settings",
    [{"sparsity": 0.6}, {"pattern": "2:4"}, {"method": "sparsegpt", "bits": 4, "low_rank": 2}],
    ids=str,
)
def test_a_model_and_its_checkpoint_have_the_same_masks(tiny, token_ids, tmp_path, settings):
    settings = {"method": "magnitude", **settings}
    if settings["method"] != "magnitude":
        settings["dataset"] = list(token_ids)
    report = hf_sparse.prune(tiny, SparseConfig(**settings))
    tiny.save_pretrained(tmp_path, max_shard_size="20KB")
    names = [entry.name for entry in report.layers]
    of_model, of_folder = read_masks(tiny, names), read_masks(tmp_path, names)
    assert of_model == of_folder
    assert [view.name for view in of_folder] == names
    for view, entry in zip(of_folder, report.layers, strict=True):
        zeros = view.corner[0] * view.corner[1] - sum(byte.bit_count() for byte in view.bits)
        assert zeros == entry.zeros  # no side is longer than the corner


def test_of_more_layers_than_a_page_shows_it_takes_some_at_even_distances(tiny, monkeypatch):
    report = hf_sparse.prune(tiny, SparseConfig(method="magnitude"))
    names = [entry.name for entry in report.layers]
    monkeypatch.setattr(masks, "LAYERS", 7)
    assert [view.name for view in read_masks(tiny, names)] == names[::2]
    assert read_masks(tiny, ["lm_head"]) == []


# --- values ---------------------------------------------------------------------------------


def test_a_heat_map_has_means_and_shades_from_the_lowest_to_the_highest():
    values = {("0", "a.x"): [1.0], ("0", "b.y"): [2.0, 4.0], ("1", "a.x"): [6.0]}
    found = heat_map("id", "caption", values, "{:.0f}".format)
    assert found.columns == ["x", "y"]
    texts = [[cell.text for cell in cells] for _, cells in found.rows]
    assert texts == [["1", "3"], ["6", ""]]
    steps = [[cell.step for cell in cells] for _, cells in found.rows]
    assert steps == [[0, 4], [9, None]]
    assert (found.low, found.high) == ("1", "6")
    assert heat_map("id", "caption", {}, str) is None


def test_columns_of_one_last_name_keep_the_whole_one():
    values = {("0", "attn.proj"): [1.0], ("0", "mlp.proj"): [2.0]}
    assert heat_map("id", "", values, str).columns == ["attn.proj", "mlp.proj"]


def test_values_that_differ_by_rounding_have_one_shade():
    values = {("0", "a"): [0.59999], ("0", "b"): [0.60001]}
    cells = heat_map("id", "", values, "{:.3f}".format).rows[0][1]
    assert len({cell.step for cell in cells}) == 1


@pytest.mark.parametrize("values", [[0.0], [0.1, 0.2, 0.3], [3.0, 7.0], [1e-6, 5e-6], [250.0]])
def test_a_chart_keeps_all_points_between_its_axis_and_its_highest_tick(values):
    chart = line_chart("id", "", "block", values, [str(v) for v in values])
    heights = [float(text) for _, text in chart.ticks]
    assert heights[0] == 0
    assert heights == sorted(heights)
    assert 2 <= len(heights) <= 9
    assert heights[-1] >= max(values) * 0.999
    at = {float(text): y for y, text in chart.ticks}
    for value, point in zip(values, chart.points, strict=True):
        expected = at[0] + (at[heights[-1]] - at[0]) * value / heights[-1]
        assert point.y == pytest.approx(expected, abs=0.2)
        assert chart.left <= point.x <= chart.right


def test_experts_of_a_block_share_a_column_and_their_tokens_have_a_map_of_their_own():
    layers = [layer("m.0.q", "m.0", relative_error=0.3)]
    for expert in (0, 1, 10, 2):
        for name in ("up", "down"):
            error = 0.1 if expert else 0.5
            layers.append(
                layer(
                    f"m.0.experts.{expert}.{name}",
                    "m.0",
                    relative_error=error,
                    tokens=100 + expert,
                )
            )
    values = page.page_values(PruningReport(tuple(layers)), [], None)
    _, errors, tokens = values["heat_maps"]
    assert errors.columns == ["q", "up", "down"]
    assert [cell.text for cell in errors.rows[0][1]] == ["0.300", "0.200", "0.200"]
    assert tokens.columns == ["0", "1", "2", "10"]
    assert [cell.text for cell in tokens.rows[0][1]] == ["100", "101", "102", "110"]


def test_of_very_many_layers_the_table_has_those_with_the_largest_errors(monkeypatch):
    monkeypatch.setattr(page, "ROWS", 3)
    errors = [0.1, 0.5, 0.2, 0.9, 0.4]
    layers = [layer(f"l.{i}", f"l.{i}", relative_error=error) for i, error in enumerate(errors)]
    table = page.page_values(PruningReport(tuple(layers)), [], None)["layers"]
    assert [row[0].text for row in table.rows] == ["l.1", "l.3", "l.4"]
    assert table.left_out == 2
    assert "2 others are in pruning_report.json" in render(PruningReport(tuple(layers)), [])


def test_an_empty_report_and_one_without_data_are_pages_too():
    assert "no layer was pruned" in render(PruningReport(()), [])
    html = render(PruningReport((layer("a.b", "a", relative_error=None, tokens=None),)), [])
    assert "error-map" not in html
    assert "sparsity-map" in html


# --- the file -------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


def evil_page() -> str:
    report = PruningReport(
        (layer(EVIL, EVIL, pattern=EVIL, format=EVIL, kernel=EVIL, notes=(EVIL,)),),
        {EVIL: EVIL},
        hf_sparse.DataRecord(EVIL, EVIL, 1, 1),
        model=EVIL,
        config={EVIL: EVIL, "method": EVIL},
        environment=hf_sparse.Environment(EVIL, 1, 1, EVIL, EVIL, EVIL, {EVIL: EVIL}),
        date=EVIL,
    )
    view = MaskView(EVIL, (1, 1), (1, 1), b"\xff", (1, 1), b"\x80")
    return render(report, [view], Evaluation(texts=(Texts(EVIL, EVIL, EVIL),)))


def test_nothing_from_a_checkpoint_becomes_markup():
    html = evil_page()
    elements = Elements(html)
    assert len(elements.of("script")) == 2
    assert elements.of("img") == []
    assert not [k for _, attributes in elements.found for k in attributes if k.startswith("on")]
    assert json.loads(elements.raw["script"][0])[0]["name"] == EVIL
    assert "49" not in re.sub(r"<style>.*?</style>|<script.*?</script>", "", html, flags=re.S)


def test_the_page_of_a_report_that_lies_is_small_and_can_be_written():
    layers = [
        layer(f"\u202e{i}.experts.{'9' * 5000}.x", f"b{i}", tokens=1, notes=("\ud800\x1b",))
        for i in range(300)
    ]
    layers += [layer(f"c{i}.d{i}", f"c{i}") for i in range(2000)]
    html = render(PruningReport(tuple(layers), {"\0": "\x85"}), [])
    assert len(html.encode()) < 20_000_000
    assert not re.search("[\u202e\x1b\x85\0]", html)
    assert "other blocks are in pruning_report.json" in html


def test_the_policy_allows_this_style_and_this_script_and_nothing_else():
    elements = Elements(evil_page())
    (policy,) = [m["content"] for m in elements.of("meta") if m.get("http-equiv")]

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src {digest(elements.raw['style'][0])}",
        f"script-src {digest(elements.raw['script'][1])}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert not [a for _, a in elements.found if {"src", "href", "style"} & set(a)]


def test_the_page_of_a_model_of_7_billion_weights_stays_below_2_mb():
    names = [f"model.layers.{b}.mlp.projection_{i}" for b in range(32) for i in range(7)]
    report = PruningReport(tuple(layer(n, n.rpartition(".mlp")[0]) for n in names))
    view = view_mask("", torch.randn(200, 200).relu())
    html = render(report, [dataclasses.replace(view, name=name) for name in names])
    assert len(html.encode()) < 2_000_000


def test_every_asset_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = content["tool"]["setuptools"]["package-data"]["hf_sparse"]
    package = ROOT / "src" / "hf_sparse"
    listed = {path for pattern in patterns for path in package.glob(pattern)}
    assets = {path for path in package.rglob("*") if path.suffix in (".html", ".css", ".js", ".md")}
    assert len(assets) == 4
    assert assets <= listed


def test_the_page_of_a_folder_counts_its_zeros(tiny, tmp_path):
    report = hf_sparse.prune(tiny, SparseConfig(method="magnitude", sparsity=0.75))
    tiny.save_pretrained(tmp_path / "model")
    lies = tuple(dataclasses.replace(x, zeros=0, sparsity=0.0) for x in report.layers)
    told = dataclasses.replace(report, layers=lies)
    pages = {"true": report, "told": told}
    for name, each in pages.items():
        hf_sparse.write_report(each, tmp_path / name, masks=tmp_path / "model")
    assert (tmp_path / "true").read_text() == (tmp_path / "told").read_text()
    assert "75.00%" in (tmp_path / "told").read_text()


def test_a_page_that_can_not_be_written_leaves_what_was_there(tmp_path):
    report = PruningReport((layer("a.b", "a"),))
    hf_sparse.write_report(report, tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == render(report, [])
    with pytest.raises(SaveError, match=r"new.*could not be written"):
        hf_sparse.write_report(report, tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "page.html"]


# --- reading it -----------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """WCAG 2: relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_aa_asks_for(scheme):
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", css, flags=re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    pairs = [(text, ground) for text in ("text", "soft") for ground in ("page", "card")]
    for step in range(10):
        (used,) = re.findall(
            rf"\.s{step} {{ background: var\(--s{step}\); color: var\(--(\w+)\)", css
        )
        pairs.append((used, f"s{step}"))
    for text, ground in pairs:
        low, high = sorted(luminance(colours[name]) for name in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("highest", [0.0, 5e-324, 1e-301])
def test_values_too_small_to_see_are_drawn_at_the_bottom(highest):
    chart = line_chart("c", "c", "x", [0.0, highest], ["a", "b"])
    assert {point.y for point in chart.points} == {chart.base}


def test_without_a_report_an_error_says_what_to_pass(tmp_path):
    with pytest.raises(EvaluationError, match="report=None is no report: pass what prune returned"):
        write_report(None, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
