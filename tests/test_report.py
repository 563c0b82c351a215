"""The report: what the page says of real runs, and how it looks in a real browser."""

import functools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_folders
from PIL import Image
from train_runs import Folder

from dde_fast import report, runs

FACES = Path(__file__).parent.parent / "benchmarks/results/faces.json"
HOSTILE = "<script>alert(1)</script> $x$ & \"'"
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of the trainer, whole and stopped."""
    folder = Folder(tmp_path_factory.mktemp("trained"))
    look = {"validation_pairs": folder.pairs, "validation_split": "train", "validation_every": 3}
    look |= {"grid_every": 6, "grid_prompts": folder.path / "prompts.txt", "grid_steps": 1}
    (folder.path / "prompts.txt").write_text("happy\nsad\n")
    look |= {"grid_images": 2, "save_every": 2, "keep": 0}
    jobs = [
        {"args": folder.args("runs", "runs/dde", **look)},
        {"args": folder.args("runs", "runs/sft", objective="sft", steps=2)},
    ]
    (folder.path / "runs").mkdir()
    folder.work(jobs, 1, "jobs")
    return folder.path / "runs"


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """A page of everything: real runs, runs of a trainer that ended badly, evaluations new and
    old, names and prompts that mean harm."""
    folder = tmp_path_factory.mktemp("all")
    report_folders.write_run(folder / "a" / "dde", steps=40)
    report_folders.write_run(folder / "b" / "tailorpo", "tailorpo")
    sick = report_folders.write_run(folder / HOSTILE.replace("/", "⁄"), "discounted")
    records = [report_folders.record(step, reward=0.2) for step in (1, 2, 3)]
    records[0] |= {"../<b>": 1.0, 'x" onload="alert(1)': 2.0, '"><script>': 3.0, "--<--": 4.0}
    records[1] |= {"warning": "images degrade <b>", "skipped_steps": 2.0}
    records[2] |= {"warning": "images degrade <b>", "skipped_steps": 3.0}
    (sick / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    begun = report_folders.write_run(folder / "begun")
    (begun / "metrics.jsonl").write_text("")
    models = {name: str(trained / name / "unet") for name in ("dde", "sft")}
    models |= {f"model-{i}": "x" for i in range(3)}
    judged = report_folders.write_evaluation(folder / "judged", models, prompt=HOSTILE)
    step = report_folders.step_result()
    step["rows"][1]["name"] = step["machine"]["device"] = HOSTILE
    (folder / "train-step-embedded.json").write_text(json.dumps(step))
    steps = [folder / "train-step-embedded.json"]
    steps.append(report_folders.write_step(folder / "train-step-sd15.json", "sd15"))
    places = [trained, folder / "a", folder / "b", sick, begun, judged, FACES, *steps]
    return report.write(places, folder / "report")


def test_the_page_says_what_was_run(trained, page):
    text = page.read_text(encoding="utf-8")
    (dde, sft), _ = runs.read([trained])
    identity = json.loads((trained / "dde/checkpoints/step-00000006/state.json").read_text())
    for said in (
        dde.settings["commit"],
        dde.settings["versions"]["torch"],
        identity["identity"]["model"],
        identity["identity"]["pairs"],
        str(dde.config["adam_eps"]),  # not the default
        "held-out accuracy",
        report.glance(dde, None)["numbers"]["accuracy"],
    ):
        assert said in text, said
    assert len(dde.held_out) == 2 and len(dde.ratios) == 3 and len(dde.grids) == 1
    pictures = {picture.stem for picture in page.parent.glob("*.png")}
    assert pictures >= {
        "curve-implicit-accuracy",
        "curve-sft-loss",
        "curve-pairs-per-second",
        "curve-memory-gib",
        "timestep-1-win-ratio",
        "credit-coefficient",
        "credit-gradient-weight",
        "credit-margin-1",
        "credit-convergence",
    }
    for picture in page.parent.glob("*.png"):
        with Image.open(picture) as image:
            image.verify()


def test_numbers_at_a_glance(tmp_path):
    folder = report_folders.write_run(tmp_path / "dde", steps=12)
    (run,), _ = runs.read([folder])
    numbers = report.glance(run, None)["numbers"]
    late = sum(0.5 * (1 + step / 100) for step in (9, 10, 11, 12)) / 4
    assert numbers["accuracy"] == f"{late:.2f}"
    assert numbers["held-out accuracy"] == "0.56"
    assert numbers["winner's error, × reference"] == "1.12"
    assert numbers["pairs per second"] == "20" and numbers["reward"] == ""


def test_a_table_as_text():
    """Columns as wide as what stands in them; differences of a set's score are not rounded away."""
    base = {"inception_score": {"mean": 2.53, "std": 0.1}, "distinct": {"mean": 86.0}}
    other = {
        "inception_score": {"mean": 3.01, "std": 0.1, "difference": 0.48},
        "distinct": {"mean": 66.0, "difference": -20.0},
    }
    lines = report.format_table({"base": base, "a-model-of-a-long-name": other}).splitlines()
    assert lines[0].split() == "reward model mean ± std win / tie / lose difference [95 %]".split()
    assert [line.split() for line in lines[1:]] == [
        ["inception_score", "base", "2.530", "±", "0.100"],
        ["inception_score", "a-model-of-a-long-name", "3.010", "±", "0.100", "+0.48"],
        ["distinct", "base", "86"],
        ["distinct", "a-model-of-a-long-name", "66", "-20"],
    ]
    assert (
        len({line.index(word) for line, word in zip(lines, ("model", "base"), strict=False)}) == 1
    )


def test_warnings_are_told_once():
    records = [report_folders.record(step) for step in (1, 2, 3, 4)]
    run = runs.Run("x", Path("x"), {}, records)
    assert report.warnings(run) == []
    for record in records[1:]:
        record["warning"] = f"bad at {record['step']}"
    records[-1]["skipped_steps"] = 7.0
    assert report.warnings(run) == [
        "step 4, and 2 times before, first at step 2: bad at 4",
        "7 optimizer steps skipped: their gradient was not finite",
    ]


def test_settings_shown_are_those_that_matter(tmp_path):
    report_folders.write_run(tmp_path / "a", lora_rank=4)
    report_folders.write_run(tmp_path / "b", seed=3)
    rows = dict(report.settings_table(runs.read([tmp_path])[0]))
    assert rows["lora_rank"] == ["4", "0"] and rows["seed"] == ["0", "3"]
    assert rows["content of model"] == ["weights 0123"] * 2
    assert rows["ZeRO stage"] == ["1", "1"] and rows["pairs per step"] == ["16", "16"]
    assert "ema_decay" not in rows and "output" not in rows


def test_models_have_the_colours_of_their_runs(page):
    """A model called anything, made by a run on the page, is drawn as that run's objective."""
    text = page.read_text(encoding="utf-8")
    row = re.search(r'<th scope="row">(<span[^>]*></span>)sft</th>', text)
    assert "var(--sft)" in row[1]
    row = re.search(r'<th scope="row">(<span[^>]*></span>)model-1</th>', text)
    assert "var(--other)" in row[1]


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.names = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.names |= {name for name, _ in attributes}
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_the_page_is_self_contained_and_escaped(page):
    text = page.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.links and all(link.startswith(("#", "data:")) for link in parser.links)
    assert not re.search(r"@import|url\((?!#|&#)|<script", text)
    assert not [name for name in parser.names if name.startswith("on")]
    names = {path.stem for path in page.parent.glob("*.png")}
    assert names >= {"curve-b", "curve-x-onload-alert-1", "curve-script", "curve-"}
    assert len(names) == len({name.lower() for name in names})
    assert "&lt;script&gt;" in text and "images degrade &lt;b&gt;" in text
    assert len(text) < 4_000_000


def test_an_old_page_stays_until_the_new_one_is_whole(page, tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/index.html").write_text("old")
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "report")])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("dde_fast: error: runs: expected folders of a training run")
    assert captured.err.count("\n") == 1
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["index.html"]
    assert (tmp_path / "report/index.html").read_text() == "old"


@pytest.mark.parametrize("args", [[], ["--runz", "x"]])
def test_a_wrong_command_line_gives_one_line_and_exit_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("dde_fast: error: ") and error.count("\n") == 1


def test_a_measured_step_is_shown_as_waterfall_and_table(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    pictures = {picture.stem for picture in page.parent.glob("*.png")}
    assert pictures >= {"step-1", "step-2"}
    for said in (
        "The training step",
        "40 [32, 50]",
        "0.125 + 1.5 + 0.25",
        "SD 1.5 (3.5 M parameters)",
    ):
        assert said in text, said
    assert text.count("<h3>Benchmark train-step-") == 2
    alone = report.write([report_folders.write_step(tmp_path / "step.json")], tmp_path / "page")
    text = alone.read_text(encoding="utf-8")
    assert (
        "40 [32, 50]" in text and "Against the base" not in text and "<code>c0ffee</code>" in text
    )
    assert text.count("<figure>") == 1


def test_a_damaged_step_leaves_the_page_that_was_there(tmp_path, capsys):
    path = report_folders.write_step(tmp_path / "step.json", rows=[])
    with pytest.raises(SystemExit) as stop:
        report.main([str(path), "--output", str(tmp_path / "page")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "step.json" in error
    assert not (tmp_path / "page").exists()


def test_where_a_report_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.default_output(["runs/a"]) == Path("runs/a/report")
    assert report.default_output(["runs/a", "runs/b/c"]) == Path("runs/report")
    assert report.default_output([str(FACES)]).resolve() == FACES.parent / "report"


def test_the_committed_evaluation_is_read(tmp_path):
    path = report.write([FACES], tmp_path / "report")
    text = path.read_text(encoding="utf-8")
    found = json.loads(FACES.read_text(encoding="utf-8"))["results"]["dde"]["human_score"]
    low, high = found["interval"]
    assert f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" in text
    assert " / ".join(f"{100 * found[key]:.0f}" for key in ("win", "tie", "lose")) in text
    assert "At a glance" not in text


# In a browser


@functools.cache
def browser_path() -> str | None:
    """A Chromium that starts."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    for path in filter(None, map(shutil.which, names)):
        version = subprocess.run([path, "--version"], capture_output=True, timeout=60)
        if version.returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser_path() is None:
        pytest.skip("no Chromium: not looked at in a browser")
    quiet = ["background-networking", "component-update", "sync", "quic", "gpu"]
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=browser_path(),
            chromium_sandbox=os.geteuid() != 0,
            args=["--no-first-run", *(f"--disable-{name}" for name in quiet)],
        )
        yield chromium
        chromium.close()


LOOK = """() => {
    const number = value => value.match(/[\\d.]+/g).map(Number)
    const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0)
    const paper = light(number(getComputedStyle(document.body).backgroundColor))
    const contrast = colour => {
        const ink = light(number(colour))
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)
    }
    const shown = e => e.checkVisibility() && !e.closest("details:not([open])")
    const size = e => e.getBoundingClientRect()
    const ids = [...document.querySelectorAll("[id]")].map(e => e.id)
    return {
        paper,
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        images: [...document.images].map(e => [e.alt, e.complete && e.naturalWidth,
            !shown(e) || size(e).width >= 40 && size(e).height >= 20]),
        charts: [...document.querySelectorAll("figure > svg")].map(e => [
            e.getAttribute("aria-label"), size(e).width, size(e).height,
            Math.min(...[...e.querySelectorAll("text")].map(t => size(t).height))]),
        pale: [...document.querySelectorAll("p, li, td, th, figcaption, h1, h2, h3, h4, a")]
            .filter(e => shown(e) && contrast(getComputedStyle(e).color) < 4.5).length,
        inks: [...new Set([...document.querySelectorAll('[style*="--ink"]')].flatMap(e =>
            ["fill", "stroke"].filter(part => e.style[part].includes("--ink"))
            .map(part => getComputedStyle(e)[part])))].map(contrast),
        twice: ids.filter((id, i) => ids.indexOf(id) != i),
        dangling: [...document.querySelectorAll('a[href^="#"]')]
            .filter(a => !document.getElementById(a.getAttribute("href").slice(1))).length,
    }
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 794, 1280])
def test_in_a_browser(page, browser, width, scheme, tmp_path):
    """On a phone and on a desk, light and dark, and (794 px, A4) in print: everything is there,
    fits, can be read, and nothing is asked of any network."""
    media = "print" if width == 794 else "screen"
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab, complaints, asked = context.new_page(), [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", lambda request: complaints.append(f"failed: {request.url:.80}"))
    tab.on("request", lambda request: asked.append(request.url))
    tab.emulate_media(media=media, color_scheme=scheme)
    tab.goto(page.as_uri(), wait_until="load")
    tab.wait_for_load_state("networkidle")
    seen = tab.evaluate(LOOK)
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert seen["overflow"] <= 0
    dark = scheme == "dark" and media == "screen"
    assert seen["paper"] < 0.02 if dark else seen["paper"] > 0.9
    assert len(seen["images"]) > 70 and len(seen["charts"]) > 40
    for alt, loaded, sized in seen["images"]:
        assert alt and loaded > 0 and sized, alt
    for label, chart_width, height, text in seen["charts"]:
        assert label and chart_width >= 250 and height >= 90 and text >= 8, label
    assert seen["pale"] == 0 and seen["inks"] and min(seen["inks"]) >= 4.5
    assert seen["twice"] == [] and seen["dangling"] == 0
    if media == "print":
        tab.pdf(path=tmp_path / "page.pdf", format="A4")
        assert (tmp_path / "page.pdf").stat().st_size > 100_000
    context.close()
