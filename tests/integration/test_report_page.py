"""The page in a real browser: it renders, sorts and shows masks, and fetches nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_models import tiny_llama

import hf_sparse
from hf_sparse import SparseConfig
from hf_sparse.publish.html.masks import view_mask

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

selenium = pytest.importorskip("selenium", reason="the browser is driven by selenium")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="neither chromium and chromedriver, nor chrome, are installed"
)


@contextmanager
def browser(profile: Path) -> Iterator["selenium.webdriver.Chrome"]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        running.get("about:blank")
        running.get_log("performance")  # those of the new tab
        yield running
    finally:
        running.quit()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny pruned model, and the file of its page."""
    import torch

    model, dense = (tiny_llama(num_hidden_layers=12) for _ in range(2))
    ids = list(torch.randint(3, 61, (4, 16)))
    sparsity = {rf"layers\.{i}": 0.3 + 0.05 * i for i in range(12)}
    report = hf_sparse.prune(model, SparseConfig(dataset=ids, sparsity=sparsity))
    measured = hf_sparse.evaluate(model, dense, None, ids)
    path = tmp_path_factory.mktemp("page") / "page.html"
    hf_sparse.write_report(report, path, masks=model, evaluation=measured)
    return model, path


@pytest.fixture(scope="module")
def tab(pruned, tmp_path_factory):
    """A browser with the page."""
    with browser(tmp_path_factory.mktemp("profile")) as running:
        running.get(pruned[1].as_uri())
        yield running


def column(tab, table: str, index: int) -> list[str]:
    script = """
        return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]
          .map((row) => row.cells[arguments[1]].textContent);
    """
    return tab.execute_script(script, table, index)


def click(tab, table: str, index: int) -> str:
    """Click a heading; returns its aria-sort."""
    (heading,) = tab.find_elements("css selector", f"#{table} th:nth-child({index + 1})[aria-sort]")
    tab.execute_script("arguments[0].scrollIntoView()", heading)
    heading.find_element("tag name", "button").click()
    return heading.get_attribute("aria-sort")


def requests(tab) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in tab.get_log("performance")]
    sent = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [message["params"]["request"]["url"] for message in sent]


def test_the_page_renders_without_an_error_and_fetches_nothing(pruned, tab):
    assert requests(tab) == [pruned[1].as_uri()]
    assert tab.get_log("browser") == []
    for id in ("sparsity-map", "error-map", "error-chart", "depth-chart", "layers", "measures"):
        assert tab.find_element("id", id).is_displayed(), id
    assert len(tab.find_elements("css selector", "#sparsity-map tbody tr")) == 12
    shades = tab.execute_script("""
        return [...document.querySelectorAll("#sparsity-map tbody td:nth-child(2)")]
          .map((cell) => getComputedStyle(cell).backgroundColor);
    """)
    assert len(set(shades)) == 10  # the styles are applied: from the palest to the darkest


def test_the_policy_stops_what_a_page_could_fetch_or_run(tab):
    # The page's own script may do nothing of this, were something to get into it.
    refused = tab.execute_async_script("""
        const done = arguments[0];
        const refused = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          refused.push(event.effectiveDirective);
          if (refused.length === 2) done(refused.sort());
        });
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        const image = new Image();
        image.src = "http://127.0.0.1:9/picture.png";
    """)
    assert refused == ["img-src", "script-src-elem"]
    assert tab.execute_script("return window.ran") is None
    tab.get_log("browser")


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_it_round(tab):
    before = column(tab, "blocks", 0)
    assert click(tab, "blocks", 2) == "ascending"
    values = [float(text) for text in column(tab, "blocks", 2)]
    assert values == sorted(values)
    assert click(tab, "blocks", 2) == "descending"
    assert [float(text) for text in column(tab, "blocks", 2)] == values[::-1]
    # Words are sorted with their numbers as numbers: 2 before 10.
    assert click(tab, "blocks", 0) == "ascending"
    assert column(tab, "blocks", 0) == before
    states = tab.execute_script("""
        return [...document.querySelectorAll("#blocks th[aria-sort]")]
          .map((heading) => heading.getAttribute("aria-sort"));
    """)
    assert states == ["ascending", *["none"] * 6]


def test_numbers_of_layers_sort_as_numbers_and_by_keyboard(tab):
    from selenium.webdriver.common.keys import Keys

    (button,) = tab.find_elements("css selector", "#layers th:nth-child(6) button")
    button.send_keys(Keys.ENTER)
    errors = [float(text) for text in column(tab, "layers", 5)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_choosing_a_layer_shows_its_mask(pruned, tab):
    from selenium.webdriver.support.select import Select

    model, _ = pruned
    choice = Select(tab.find_element("id", "mask-layer"))
    for name in ("model.layers.11.mlp.down_proj", "model.layers.3.self_attn.q_proj"):
        choice.select_by_visible_text(name)
        layer = model.get_submodule(name)
        view = view_mask(name, layer.weight)
        assert tab.find_element("id", "mask-text").text.startswith(name)
        drawn = tab.execute_script("""
            const canvas = document.getElementById("mask-corner");
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, [...pixels.data].filter((_, i) => i % 4 === 0)];
        """)
        rows, columns, reds = drawn
        assert (rows, columns) == view.corner == layer.shape
        kept = [red < 128 for red in reds]
        assert kept == (layer.weight != 0).flatten().tolist()
    tab.get_log("browser")  # chromium's hint that reading pixels back is slow


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "light")])
def test_it_fits_the_width_in_both_colour_schemes(tab, tmp_path, width, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert tab.execute_script("return document.documentElement.scrollWidth") <= width
    script = "return getComputedStyle(document.body).backgroundColor"
    light = tab.execute_script(script) == "rgb(251, 251, 249)"
    assert light == (scheme == "light")
    assert tab.get_log("browser") == []
