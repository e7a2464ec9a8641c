"""The page of runs in a real browser: its numbers are those of report.json, at any width, in the light and in the dark,
and nothing that a file says becomes a part of the page."""

import json
import shutil
from pathlib import Path

import pytest

import halfbyte
import tiny
from halfbyte.report import charts, written
from halfbyte.report.page import page
from halfbyte.report.summary import size
from halfbyte.report.types import Machine, Pace, Runtime, SpeedRecord, Spread

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path: apt install chromium")
pytestmark = pytest.mark.slow  # what is looked at takes ten runs to make
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e\x1b[31m{{7*7}}"


def speeds(path: Path) -> SpeedRecord:
    """As bench has it of two batches, with made-up figures."""

    def spread(median: float) -> Spread:
        return Spread(median=median, low=0.9 * median, high=1.1 * median)

    def paces(decode: float, **ratios: float) -> list[Pace]:
        return [
            Pace(
                batch=batch, prompt=64, prefill=spread(9 * decode), first_token=spread(0.5),
                decode=spread(decode * batch), prefill_share=0.25, decode_share=0.5 / batch, **ratios,
            )
            for batch in (1, 4)
        ]  # fmt: skip

    common = {"engine": "halfbyte", "version": "1", "size_bytes": 3000, "read_bytes": 2000, "head_bytes": 10}
    machine = Machine(device="cpu", threads=2, cores=2, bandwidth=spread(2e10), arithmetic={"float32": spread(1e11)})
    mine = Runtime(
        path=str(path), load_seconds=0.5, memory_bytes=7_000_000, paces=paces(40, decode_ratio=2.0), **common
    )
    original = Runtime(path=str(path.parent / "model"), load_seconds=1.5, memory_bytes=None, paces=paces(20), **common)
    return SpeedRecord(machine=machine, tokens=8, repeats=3, in_turn=True, models=[mine], reference=[original])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("page")
    tiny.make(home / "model")
    tiny.text(home / "text.txt")
    calibration = {"source": str(home / "text.txt"), "samples": 4, "length": 64}
    for name, asked in {
        "four": {"method": "gptq", "grid": "int4-g64", "calibration": calibration},
        "three": {"method": "nearest", "grid": "int3-g64"},
        "eight": {"method": "nearest", "grid": "w8a8-static", "calibration": calibration},
        "Q4_0.gguf": {"method": "nearest", "grid": "Q4_0"},
    }.items():
        halfbyte.quantize(home / "model", home / name, **asked)
    outputs = [home / name for name in ("four", "three", "eight", "Q4_0.gguf")]
    halfbyte.evaluate(outputs, home / "model", str(home / "text.txt"), 64, 3)
    halfbyte.evaluate(outputs[:1], home / "model", str(home / "text.txt"), 32, 2)
    halfbyte.needle(outputs[:1], home / "model", str(home / "text.txt"), [256], depths=2, facts=1)
    written.add(home / "four", speed=speeds(home / "four"))
    halfbyte.page(outputs, home / "report.html", device="rtx-4090", engine="vllm")
    (home / "broken").mkdir()
    report = json.loads((home / "three" / "report.json").read_text())
    report["recipe"] |= {"method": HOSTILE, "model": HOSTILE}
    report["warnings"] = [HOSTILE]
    report["weights"][0] |= {"name": f"model.layers.0.{HOSTILE}", "note": HOSTILE}
    report["weights"][1]["name"] = f"model.layers.{'9' * 5000}.mlp.down_proj"
    report["evaluation"]["text"] = report["evaluations"][0]["text"] = HOSTILE
    (home / "broken" / "report.json").write_text(json.dumps(report))
    halfbyte.page([home / "broken"], home / "broken.html")
    return home


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path: Path, width: int = 1280, scheme: str = "light"):
    """The page, and what it complains of or asks a network for."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    shown, wrong = context.new_page(), []
    shown.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("dialog", lambda dialog: wrong.append(dialog.message))
    shown.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    shown.goto(path.as_uri())
    shown.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
    return shown, wrong


def reports(home: Path) -> list[dict]:
    paths = [home / name / "report.json" for name in ("four", "three", "eight")] + [home / "Q4_0.report.json"]
    return [json.loads(path.read_text()) for path in paths]


@in_browser
def test_numbers_are_those_of_the_reports(home, chromium):
    shown, wrong = opened(chromium, home / "report.html")
    rows = shown.locator("#models tbody tr:visible")
    assert rows.count() == 4
    for row, report in zip(rows.all(), reports(home), strict=True):
        model = next(e for e in report["evaluations"] if e["length"] == 64)["model"]
        values = {
            cell.get_attribute("data-title"): float(cell.get_attribute("data-value"))
            for cell in row.locator("td.number[data-value]").all()
        }
        assert values.pop("memory") == report["peak_memory_bytes"]
        assert values == {
            "size": report["output"]["size_bytes"],
            "bits": report["output"]["bits_per_parameter"],
            "KL, nats": model["kl"],
            "perplexity": model["perplexity"],
            "same word": model["same_top"],
            "made in": report["seconds"],
        }
        assert f"{model['kl']:.4f} ± {model['kl_error']:.4f}" in row.inner_text()
    best = min(
        (e["model"] for r in reports(home) for e in r["evaluations"] if e["length"] == 64), key=lambda m: m["kl"]
    )
    assert f"KL {best['kl']:.4f} ± {best['kl_error']:.4f} nats" in shown.locator(".verdict").inner_text()
    assert not wrong


@in_browser
def test_charts_are_those_of_the_reports(home, chromium):
    shown, wrong = opened(chromium, home / "report.html")
    four = reports(home)[0]
    shown.select_option("#run", "0")
    shown.wait_for_function("state.run === 0 && views.size >= 6")
    drawn = """(name) => views.get(document.querySelector(`[data-chart=${name}] .chart`)).view
        .data(specs[name]?.data.name ?? 'models')"""
    points = {row["name"]: row["kl"] for row in shown.evaluate(drawn, "frontier")}
    for name, report in zip(points, reports(home), strict=True):
        assert points[name] == pytest.approx(next(e for e in report["evaluations"] if e["length"] == 64)["model"]["kl"])
    cells = {row["tensor"]: row["error"] for row in shown.evaluate(drawn, "errors")}
    assert cells == {row["name"]: pytest.approx(row["error"], rel=1e-6) for row in four["weights"]}
    by_position = next(e for e in four["evaluations"] if e["length"] == 64)["model"]["kl_by_position"]
    stretches = [row["kl"] for row in shown.evaluate(drawn, "positions") if row["run"] == 0]
    assert stretches == pytest.approx([part["kl"] for part in by_position])
    assert shown.locator("[data-chart=needle] .chart svg").count() == 2
    for chart in ("spreads", "reads"):
        assert shown.locator(f"[data-chart={chart}] svg").count() == 1
    assert shown.locator("[data-chart=blame]").is_hidden()  # nothing was blamed
    assert not wrong


@in_browser
def test_plan_is_that_of_advise_and_runs_say_what_they_took(home, chromium):
    shown, wrong = opened(chromium, home / "report.html")
    advice = halfbyte.advise(home / "model", device="rtx-4090", engine="vllm")
    rows = {row.scheme: row for row in advice.rows if not row.refused}
    listed = shown.locator("table.plans tbody tr").all()
    assert [row.locator("td").first.inner_text() for row in listed] == list(rows)
    for row, known in zip(listed, rows.values(), strict=True):
        values = {
            cell.get_attribute("data-title"): float(cell.get_attribute("data-value"))
            for cell in row.locator("td.number[data-value]").all()
        }
        assert values["file"] == known.file_bytes
        assert values["in memory, GiB"] == known.memory_bytes
        assert values.get("tokens/s") == known.decode_tokens
    assert "vLLM on NVIDIA GeForce RTX 4090" in shown.locator(".plan .note").first.inner_text()
    assert str(home) not in shown.locator(".plan").inner_text()
    shown.select_option("#run", "0")
    report = reports(home)[0]
    took, planned = (report[name]["disk_bytes"] for name in ("measured", "planned"))
    assert f"disk {size(took)} (planned {size(planned)}), time " in shown.locator(".of-run:visible").inner_text()
    assert not wrong


@in_browser
def test_speeds_are_those_of_bench_by_batch(home, chromium):
    shown, wrong = opened(chromium, home / "report.html")
    shown.select_option("#run", "0")
    speed = reports(home)[0]["speed"]
    timed = [(row, pace) for row in (*speed["reference"], *speed["models"]) for pace in row["paces"]]
    rows = shown.locator("table.speeds:visible tbody tr").all()
    for shown_row, (row, pace) in zip(rows, timed, strict=True):
        assert shown_row.locator("td").nth(2).inner_text() == str(pace["batch"])
        values = {
            cell.get_attribute("data-title"): float(cell.get_attribute("data-value"))
            for cell in shown_row.locator("td.number[data-value]").all()
        }
        known = {
            "prefill": pace["prefill"]["median"],
            "first token": pace["first_token"]["median"],
            "decode": pace["decode"]["median"],
            "of the arithmetic": pace["prefill_share"],
            "of the bandwidth": pace["decode_share"],
            "x original": pace.get("decode_ratio"),
            "memory": row["memory_bytes"],
            "load": row["load_seconds"],
        }
        assert values == {name: value for name, value in known.items() if value is not None}
    assert "20.0 GB/s" in shown.locator(".of-run:visible").inner_text()
    assert not wrong


@in_browser
def test_sorted_filtered_and_chosen(home, chromium):
    shown, wrong = opened(chromium, home / "report.html")
    shown.click("#models th:has-text('KL, nats')")
    found = [
        float(c.get_attribute("data-value")) for c in shown.locator("#models td[data-title='KL, nats']:visible").all()
    ]
    assert found == sorted(found)
    shown.fill("#filter", "gguf")
    assert shown.locator("#models tbody tr:visible").count() == 1
    shown.wait_for_function(
        "views.get(document.querySelector('[data-chart=frontier] .chart')).view.data('models').length === 1"
    )
    shown.fill("#filter", "")
    shown.click("button.choose:has-text('eight')")
    shown.wait_for_function("document.querySelector('#run').selectedOptions[0].textContent === 'eight'")
    eight = reports(home)[2]
    assert shown.locator("#weights tbody tr").count() == len(eight["weights"])
    worst = max(eight["weights"], key=lambda row: row["error"])
    assert shown.locator("#weights tbody tr").first.inner_text().split("\t")[0] == worst["name"]
    shown.fill("#find", "q_proj")
    assert shown.locator("#weights tbody tr").count() == sum("q_proj" in row["name"] for row in eight["weights"])
    shown.select_option("#conditions", "1")
    assert shown.locator("#models tbody tr:visible").count() == 1
    point = shown.locator("[data-chart=frontier] path[aria-roledescription=point]").first
    shown.wait_for_function(
        "views.get(document.querySelector('[data-chart=frontier] .chart')).view.data('models').length === 1"
    )
    point.hover()
    shown.wait_for_selector("#vg-tooltip-element.visible")
    kl = next(e for e in reports(home)[0]["evaluations"] if e["length"] == 32)["model"]["kl"]
    assert f"{kl:.5f}" in shown.locator("#vg-tooltip-element").inner_text()
    assert not wrong


@in_browser
@pytest.mark.parametrize(("width", "scheme"), [(380, "light"), (800, "light"), (1280, "dark")])
def test_narrow_and_wide_light_and_dark(width, scheme, home, chromium):
    shown, wrong = opened(chromium, home / "report.html", width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    for chart in shown.locator(".chart svg:visible").all():
        assert chart.bounding_box()["width"] <= width
    paper = "getComputedStyle(document.body).backgroundColor"
    rgb = tuple(bytes.fromhex(charts.PALETTES[scheme]["paper"][1:]))
    assert shown.evaluate(paper) == f"rgb{rgb}"
    shown.click("#theme")
    assert shown.evaluate(paper) != f"rgb{rgb}"
    shown.emulate_media(media="print")
    assert shown.evaluate(paper) == "rgb(255, 255, 255)"
    assert shown.locator(".controls:visible, #theme:visible").count() == 0
    assert not wrong


@in_browser
def test_what_files_say_is_only_text(home, chromium):
    shown, wrong = opened(chromium, home / "broken.html")
    assert shown.title() != "owned"
    assert shown.locator("img").count() == 0
    text = shown.locator("body").inner_text()
    assert "<img src=x onerror=alert(1)>\\u202e\\x1b[31m{{7*7}}" in text
    assert not set("\u202e\x1b") & set(shown.content())
    assert not wrong


def test_one_file_that_asks_for_nothing(home):
    text = (home / "report.html").read_text()
    assert len(text) < 2_000_000
    assert "default-src 'none'" in text
    assert not [tag for tag in ("<link", "<iframe", " src=", "@import") if tag in text.split("const n=/", 1)[0]]
    assert str(home) not in text  # it is sent to others


def test_refused(home, monkeypatch):
    tiny.refused(tiny.halfbyte("report", home / "model"), "report.json", "halfbyte quantize")
    tiny.refused(tiny.halfbyte("report", home / "four", "-o", home / "report.html"), "exists", "--overwrite")
    again = tiny.halfbyte("report", home / "four", "-o", home / "report.html", "--overwrite", "--quiet")
    assert (again.code, again.out) == (0, "")
    tiny.refused(tiny.halfbyte("report", home / "four", "-o", home / "model"), "is a folder")
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    tiny.refused(tiny.halfbyte("report", home / "four", "-o", home / "new.html"), "halfbyte[report]")
    assert not (home / "new.html").exists()


def test_runs_of_one_name_are_told_apart(home):
    (home / "other").mkdir()
    shutil.copytree(home / "four", home / "other" / "four")
    text = page([home / "four", home / "other" / "four"])
    assert f">{home / 'other' / 'four'}</button>" in text


def test_unmeasured(home, tmp_path):
    report = json.loads((home / "four" / "report.json").read_text())
    for entry in ("evaluation", "evaluations", "needle"):
        del report[entry]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "has not been measured" in page([tmp_path])


def test_no_divergence_is_a_point_too():
    assert charts.powers([0.1, 0.0])["type"] == "symlog"
    assert charts.powers([0.1, 0.2])["type"] == "log"


@in_browser
def test_what_broke_it(home, chromium, tmp_path):
    report = json.loads((home / "four" / "report.json").read_text())
    asked = {name: value for name, value in report["evaluations"][0].items() if name not in ("reference", "model")}
    parts = [
        {"name": "model.layers.1", "kind": "block", "kl": [0.02, 0.001], "error": 0.11},
        {"name": "lm_head", "kind": "head", "kl": [-0.001, None]},
    ]
    report["blame"] = {**asked, "path": "four", "kl": [0.03, 0.002], "parts": parts}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "page.html").write_text(page([tmp_path]))
    shown, wrong = opened(chromium, tmp_path / "page.html")
    drawn = "views.get(document.querySelector('[data-chart=blame] .chart')).view.data('blame')"
    assert [(row["part"], row["kl"]) for row in shown.evaluate(drawn)] == [
        ("model.layers.1", 0.02),
        ("lm_head", -0.001),
    ]
    assert not wrong
