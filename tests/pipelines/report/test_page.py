"""The page: its figures are the report's, it is whole, accessible, inert, and says what a run lacks."""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nayer_edge.errors import IntegrityError
from nayer_edge.labels import embeddings as lte
from nayer_edge.memory_bank import MemoryBank
from nayer_edge.pipelines.cli import main
from nayer_edge.pipelines.gate.statistics import drop_lower, drop_upper
from nayer_edge.pipelines.recipes.loading import load_recipe, recipe_of
from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.report.page import render
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import RunFolder

HOSTILE = (
    '\x1b[2J</p></title><script>document.title="owned"</script><img src=x onerror=alert(1)>"\' {{ 7919*7907 }}\u202e'
)
LOADING = {
    "src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "manifest", "ping",
}  # fmt: skip
VOID = {"meta", "link", "br", "hr", "img", "input", "source"}


class Page(HTMLParser):
    """Everything in a page that matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html = text
        self.tags: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.styles = ""
        self.text = ""
        self.by_id: dict[str, str] = {}
        self._id = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in LOADING]
        self.styles += "".join(value or "" for name, value in attrs if name == "style")
        self._id = dict(attrs).get("id") or self._id

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
            return
        self.text += data
        if self._id:
            self.by_id[self._id] = self.by_id.get(self._id, "") + data
            self._id = ""


class Altered:
    """A copy of a finished run whose files say something else; its hashes agree again."""

    def __init__(self, root: Path) -> None:
        self.run = RunFolder.open(root)
        self.root = root
        self.report: dict[str, Any] = json.loads((root / "validate" / "report.json").read_text())
        self.verdict: dict[str, Any] = json.loads((root / "gate" / "verdict.json").read_text())

    @property
    def recipe(self) -> dict[str, Any]:
        """The values in the manifest."""
        return self.run.manifest.recipe

    def note(self, name: str) -> str:
        """Enters a file's hash into the manifest."""
        digest = sha256_of(self.root / name)
        record = self.run.manifest.files[name]
        size = (self.root / name).stat().st_size
        self.run.manifest.files[name] = record.model_copy(update={"sha256": digest, "bytes": size})
        return digest

    def predictions(self, arrays: dict[str, np.ndarray]) -> None:
        """Other answers."""
        np.savez(self.root / "validate" / "predictions.npz", **arrays)  # pyright: ignore[reportArgumentType]
        self.report["predictions_sha256"] = self.note("validate/predictions.npz")

    def classes(self, names: list[str]) -> None:
        """Other classes: random embeddings, images and answers, a tenth of which are wrong."""
        random = np.random.default_rng(0)
        self.recipe["teacher"]["classes"] = names
        made = lte.LabelEmbeddings(torch.randn(len(names), 8), "random", "1", "{label}", tuple(names))
        lte.save(made, self.root / "lte.safetensors")
        bank = MemoryBank((3, 32, 32), 10**6, torch.device("cpu"))
        labels = torch.arange(20) % len(names)
        bank.add(torch.from_numpy(random.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)), labels)
        bank.save(self.root / "bank.safetensors")
        truth = np.arange(600, dtype=np.int32) % len(names)
        answers = {
            name: np.where(random.random(600) < 0.1, random.integers(0, len(names), 600), truth)[:, None].astype("i4")
            for name in ("teacher", "student", *(a["name"] for a in self.report["artifacts"]))
        }
        self.predictions({"labels": truth, **answers})

    def synthetic(self) -> None:
        """Measured on synthetic images, where nobody knows the truth, and passed."""
        self.report["dataset"].update(kind="synthetic", n=600, name="drawn from the trained generator")
        for part in (self.report["teacher"], self.report["student"], *self.report["artifacts"]):
            part["top1"] = None
        for artifact in self.report["artifacts"]:
            counts = {"n": 600, "both_right": 590, "lost": 2, "gained": 1, "both_wrong": 7}
            alone = {"n": 600, "both_right": 591, "lost": 9, "gained": 0, "both_wrong": 0}
            artifact.update(agreement=0.985, per_class=[], paired={"vs_fp32": None, "vs_teacher": None})
            artifact["paired_synthetic"] = {"vs_fp32": counts, "vs_teacher": alone}
        held = np.load(self.root / "validate" / "predictions.npz", allow_pickle=False)
        self.predictions({name: held[name] for name in held.files if name != "labels"})
        self.decide("pass")
        for check in self.verdict["checks"]:
            check["synthetic"] = check["name"].startswith("accuracy")

    def decide(self, outcome: str) -> None:
        """Every check has this outcome."""
        self.verdict["verdict"] = outcome
        for check in self.verdict["checks"]:
            check["verdict"] = outcome

    @property
    def html(self) -> str:
        """The page that was written about it."""
        return (self.root / "report.html").read_text(encoding="utf-8")

    def page(self) -> str:
        """The page about it."""
        (self.root / "validate" / "report.json").write_text(json.dumps(self.report))
        (self.root / "gate" / "verdict.json").write_text(json.dumps(self.verdict))
        self.note("validate/report.json")
        self.run.save()
        return render(self.config(), self.run)

    def config(self) -> Recipe:
        """The recipe."""
        return recipe_of(self.recipe, self.root)


@pytest.fixture
def altered(finished: Path) -> Altered:
    """A finished run to be altered."""
    return Altered(finished)


@pytest.fixture(scope="module")
def page(tiny_run: Path) -> Page:
    """The page that the pipeline wrote."""
    return Page((tiny_run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def variant(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """The run in one of the `VARIANTS`, its page written once."""

    @functools.cache
    def make(name: str) -> Altered:
        root = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp(name) / "runs" / "digits"))
        made = VARIANTS[name](Altered(root))
        (root / "report.html").write_text(made.page(), encoding="utf-8")
        return made

    return make


def hostile(altered: Altered) -> Altered:
    """A run in which everything that comes from outside is hostile."""
    altered.report["dataset"]["name"] = HOSTILE
    altered.report["hardware"] = {"cpu": HOSTILE, "cores": HOSTILE, "instructions": [HOSTILE]}
    altered.report["artifacts"][0].update(status="unavailable", reason=HOSTILE)
    for check in altered.verdict["checks"]:
        check.update(name=HOSTILE, artifact=HOSTILE, detail=HOSTILE)
    altered.run.manifest.versions[HOSTILE] = HOSTILE
    altered.classes([f"{HOSTILE}{number}" for number in range(9)] + ["x" * 300, "猫" * 150, "שלום", "a\u0301" * 80])
    altered.recipe["description"] = HOSTILE * 3
    altered.recipe["lte"]["prompt"] = HOSTILE + "{label}"
    card = altered.root / "teacher" / "teacher.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"trained_on": HOSTILE, "images": 3}))
    quantization = altered.root / "export" / "quantization.json"
    records = json.loads(quantization.read_text())
    for record in records.values():
        record["ranges"][HOSTILE] = [-1.0, 2.0]
        record["sensitivity"] = [{"node": HOSTILE, "sqnr_db": 10.0, "alone": None}]
        record["float_nodes"] = [HOSTILE]
    quantization.write_text(json.dumps(records))
    return altered


def many(altered: Altered) -> Altered:
    """A hundred classes, and an inconclusive verdict."""
    altered.classes([f"class_name_{number:03d}" for number in range(100)])
    altered.decide("inconclusive")
    return altered


def synthetic(altered: Altered) -> Altered:
    """Synthetic images, and a pass."""
    altered.synthetic()
    return altered


def several(altered: Altered) -> Altered:
    """Thirty classes, whose matrices are wider than a phone."""
    altered.classes([f"a class with a name {number}" for number in range(30)])
    return altered


Variant = Callable[[str], Altered]
VARIANTS: dict[str, Callable[[Altered], Altered]] = {
    "as it is": lambda altered: altered,
    "hostile": hostile,
    "many": many,
    "several": several,
    "synthetic": synthetic,
}


def resolve(document: Any, pointer: str) -> Any:
    """What a JSON pointer of plain keys names."""
    for key in pointer.strip("/").split("/"):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def leaves(value: Any, at: str = "") -> dict[str, float]:
    """Every number in a document, by pointer."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{at}/{key}").items()}
    if isinstance(value, list):
        return {k: v for number, item in enumerate(value) for k, v in leaves(item, f"{at}/{number}").items()}
    return {at: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def assert_rounded(text: str, value: float) -> None:
    """The text is the value, rounded to the digits that it shows."""
    match = re.search(r"[−-]?[\d.,]+(?:e[+-]?\d+)?", text)
    assert match, text
    shown = Decimal(match[0].replace(",", "").replace("−", "-"))
    scale = next((s for unit, s in (("%", 100), ("points", 100), ("kB", 1e-3), ("MB", 1e-6)) if unit in text), 1)
    half = 0.5 * 10 ** float(shown.as_tuple().exponent)
    assert abs(float(shown) - scale * value) <= half * (1 + 1e-9), f"{text} for {value}"


def figures(html: str) -> list[tuple[str, str, str, str]]:
    return re.findall(r'<data value="([^"]+)" data-of="([a-z.]+)#([^"]+)">([^<]+)</data>', html)


@pytest.mark.parametrize("name", ["as it is", "synthetic", "many"])
def test_every_figure_is_the_one_in_its_file(name: str, variant: Variant) -> None:
    altered = variant(name)
    html = altered.html
    documents = {"report.json": altered.report, "verdict.json": altered.verdict}
    found = figures(html)
    assert html.count("data-of=") == len(found)
    for value, file, pointer, text in found:
        actual = resolve(documents[file], pointer)
        assert float(value) == actual, pointer
        assert_rounded(text, actual)


def test_no_figure_of_the_report_is_left_out(page: Page, tiny_run: Path) -> None:
    report = json.loads((tiny_run / "validate" / "report.json").read_text())
    verdict = json.loads((tiny_run / "gate" / "verdict.json").read_text())
    shown = {f"{file}{pointer}" for _, file, pointer, _ in figures(page.html)}
    # Counts per class are counted again from the predictions; see test_predictions.py.
    expected = {
        f"report.json{at}" for at in leaves(report) if "/per_class/" not in at and not at.startswith("/hardware")
    }
    expected |= {f"verdict.json{at}" for at in leaves(verdict)}
    assert shown == expected
    assert f"{report['hardware']['cores']} cores usable" in page.text


def test_drops_and_their_bounds(page: Page, tiny_run: Path) -> None:
    report = json.loads((tiny_run / "validate" / "report.json").read_text())
    cells = re.findall(
        r'<data value="([^"]+)" data-drop="([^"]+)">([^<]+)</data> <span class="soft">([^<]+)<', page.html
    )
    assert {at for _, at, _, _ in cells} == {
        f"/artifacts/{number}/paired/{key}"
        for number, artifact in enumerate(report["artifacts"])
        for key, counts in artifact["paired"].items()
        if counts and (artifact["name"], key) != ("fp32", "vs_fp32")
    }
    for value, at, text, bounds in cells:
        counts = resolve(report, at)
        drop = (counts["lost"] - counts["gained"]) / counts["n"]
        assert float(value) == pytest.approx(drop)
        assert_rounded(f"{text} points", drop)
        low, high = bounds.split(" … ")
        three = (counts["lost"], counts["gained"], counts["n"])
        assert_rounded(f"{low} points", drop_lower(*three, 0.05))
        assert_rounded(f"{high} points", drop_upper(*three, 0.05))


def test_the_verdict_comes_first_with_its_reason(page: Page, tiny_run: Path) -> None:
    verdict = json.loads((tiny_run / "gate" / "verdict.json").read_text())
    assert page.by_id["verdict"] == verdict["verdict"] == "fail"
    failing = [check for check in verdict["checks"] if check["verdict"] == "fail"]
    assert page.by_id["reason"].startswith(f"{len(failing)} of {len(verdict['checks'])} checks fail")
    for check in verdict["checks"]:
        assert check["detail"] in page.text
    before_checks = page.text.partition("Policy from the recipe")[0]
    assert failing[0]["detail"] in before_checks
    assert "Measured on 600 labelled hold-out images" in before_checks


def test_sections_stand_in_the_promised_order(page: Page) -> None:
    wanted = [
        "checks",
        "artifacts",
        "lineage",
        "images",
        "training",
        "labels",
        "classes",
        "int8",
        "machine",
        "reproduce",
    ]
    assert [a["id"] for tag, a in page.elements if tag == "h2" and a["id"] in wanted] == wanted


def test_a_synthetic_verdict_says_what_it_is_worth(variant: Variant) -> None:
    page = Page(variant("synthetic").html)
    first = page.text.partition("Policy from the recipe")[0]
    assert page.by_id["verdict"] == "pass"
    assert "Measured on 600 synthetic images" in first
    assert "What it cannot promise" in first
    assert "Top-1" not in page.text, "nobody knows the truth"
    for tile in re.findall(r'<dt>Agrees.*?class="note">([^<]+)<', page.html):
        assert "synthetic" in tile
    for label in re.findall(r'data-label="((?:Agreement|Drop)[^"]*)"', page.html):
        assert "synthetic" in label
    assert "Drop vs FP32 (synthetic)" in page.text
    assert "/paired_synthetic/vs_fp32/lost" in page.html
    assert "on synthetic images, the teacher's prediction counts as right" in page.text
    assert "the teacher's prediction is used instead" in page.text


def test_an_inconclusive_verdict_over_many_classes(variant: Variant) -> None:
    page = Page(variant("many").html)
    assert page.by_id["verdict"] == "inconclusive"
    assert "inconclusive" in page.by_id["reason"]
    # Pairs enter whole: the last place may stay empty.
    assert re.search(r"(29|30) of 100 classes in the closest pairs", page.text)
    assert "100 classes are too many for a matrix" in page.text
    assert "the worst 20 of 100 classes" in page.text
    assert "20 of 100 classes are shown" in page.text
    assert len(page.html) < 2_000_000


def test_the_page_is_small_and_loads_nothing(page: Page) -> None:
    assert_self_contained(page)
    assert len(page.html) < 1_000_000
    assert not re.findall(r"https?://[^\s\"'<>]+", page.html)
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "Security" in a.get("http-equiv", ""))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def assert_self_contained(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "data:application/toml;base64,", "#")), link
    for url in re.findall(r"url\(([^)]*)\)", page.styles):
        assert url.strip("'\"").startswith("#"), url
    assert "@import" not in page.styles
    assert page.open == []


@pytest.mark.parametrize("name", VARIANTS)
def test_it_can_be_read_without_seeing_it(name: str, variant: Variant) -> None:
    page = Page(variant(name).html)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    ids = [a["id"] for _, a in page.elements if "id" in a]
    captions = re.findall(r"<caption>(.*?)</caption>", page.html)
    assert all(re.sub(r"<[^>]+>", "", caption).strip() for caption in captions)
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "rowgroup")
        if tag == "img":
            assert "synthetic image" in attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 10
        for reference in ("href", "aria-labelledby", "xlink:href"):
            if (target := attributes.get(reference, "")) and not target.startswith("data:"):
                assert target.removeprefix("#") in ids
    for name in re.findall(r"url\(#([^)]+)\)", page.html):
        assert name in ids
    assert ("html", {"lang": "en"}) in page.elements


def test_equal_runs_give_equal_pages(page: Page, finished: Path) -> None:
    """No date, no random name, no folder: the page of a copy is the page."""
    run = RunFolder.open(finished)
    assert render(recipe_of(run.manifest.recipe, finished), run) == page.html


def test_hostile_texts_are_shown_and_do_nothing(variant: Variant) -> None:
    text = variant("hostile").html
    page = Page(text)
    assert_self_contained(page)
    assert "alert(1)" in page.text, "shown as text"
    assert "<script" not in text
    assert "<img src=x" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert str(7919 * 7907) not in page.text, "not a template"
    assert "猫猫" in page.text


def test_the_pictures_are_images_of_the_bank(page: Page, tiny_run: Path) -> None:
    bank = MemoryBank.load(tiny_run / "bank.safetensors", torch.device("cpu"))
    newest, labels = bank.newest(20)
    strips = [a["src"] for tag, a in page.elements if tag == "img"]
    assert len(strips) == 10
    for number, source in enumerate(strips):
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
            pixels = np.asarray(picture)
        mine = newest[labels == number].numpy()
        assert pixels.shape == (16, 17 * len(mine) - 1, 2)
        for place, image in enumerate(mine):
            assert (pixels[:, 17 * place : 17 * place + 16, 0] == image[0]).all()
            assert (pixels[:, 17 * place : 17 * place + 16, 1] == 255).all()


def test_lineage_names_every_file_but_the_page(page: Page, tiny_run: Path) -> None:
    for name, entry in RunFolder.open(tiny_run).manifest.files.items():
        assert (f"<code>{name}</code>" in page.html) == (name != "report.html")
        assert (entry.sha256 in page.text) == (name != "report.html")
    chain = re.findall(r'<span class="role">([^<]+)</span>.*?<code>([0-9a-f]{64})</code>', page.html)
    files = RunFolder.open(tiny_run).manifest.files
    assert chain[0] == ("teacher", files["teacher/teacher.safetensors"].sha256)
    assert chain[-1] == ("quantized", files["export/student.int8.cpu.onnx"].sha256)


def test_what_was_not_measured_is_named(page: Page, altered: Altered) -> None:
    assert "Not measured in this run. To measure it" in page.text
    assert "--set export.sensitivity=true" in page.text
    artifact = altered.report["artifacts"][1]
    artifact.update(status="not_run", reason="The device is elsewhere.", top1=None, agreement=None, latency_ms=None)
    other = Page(altered.page())
    assert re.search(r"Not run\.\s+The device is elsewhere\.", other.text)


def test_sensitivity_is_shown_where_it_was_measured(altered: Altered) -> None:
    path = altered.root / "export" / "quantization.json"
    records = json.loads(path.read_text())
    alone = {"n": 20, "top1": 0.95, "mean_kl": 0.1}
    rows = [("fc", 20.0), ("quiet", None), ("conv1", 12.5)]
    records["cpu"]["sensitivity"] = [{"node": name, "sqnr_db": sqnr, "alone": alone} for name, sqnr in rows]
    path.write_text(json.dumps(records))
    page = Page(altered.page())
    rows = re.findall(
        r"<bdi>(conv1|fc|quiet)</bdi>.*?width:([\d.]+)%.*?>([\d.]+ dB)</td><td[^>]*>([\d.]+ %)<", page.html
    )
    assert rows == [("conv1", "62.5", "12.5 dB", "95.00 %"), ("fc", "100.0", "20.0 dB", "95.00 %")], "noisiest first"
    assert "2 of 3 layers" in page.text
    assert "Not measured" not in page.text


def test_sensitivity_without_noise_ratios(altered: Altered) -> None:
    """As runtimes record it that quantize a network themselves."""
    path = altered.root / "export" / "quantization.json"
    records = json.loads(path.read_text())
    alone = {"fc": 0.9, "conv1": 0.6, "quiet": 1.0}
    records["cpu"]["sensitivity"] = [
        {"node": name, "sqnr_db": None, "alone": {"n": 20, "top1": top1, "mean_kl": 0.1}}
        for name, top1 in alone.items()
    ]
    path.write_text(json.dumps(records))
    page = Page(altered.page())
    rows = re.findall(r"<bdi>(conv1|fc|quiet)</bdi>.*?width:([\d.]+)%.*?>([\d.]+ %)<", page.html)
    assert rows == [("conv1", "100.0", "60.00 %"), ("fc", "25.0", "90.00 %"), ("quiet", "0.0", "100.00 %")]
    assert "SQNR" not in page.text


def test_qat_is_shown_if_it_was_run(page: Page, altered: Altered) -> None:
    assert "Quantization-aware training" not in page.text
    path = altered.root / "export" / "quantization.json"
    records = json.loads(path.read_text())
    before, after = ({"n": 20, "top1": top1, "mean_kl": 0.1} for top1 in (0.9, 0.95))
    records["cpu"]["finetune"] = {"chosen": True, "calibrated": before, "finetuned": after}
    path.write_text(json.dumps(records))
    assert "kept: agreement with FP32 90.00 % before, 95.00 % after, on synthetic images" in Page(altered.page()).text


def test_the_commands_and_the_recipe_reproduce_the_run(
    page: Page, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (link,) = [link for link in page.links if link.startswith("data:application/toml")]
    text = base64.b64decode(link.split(",")[1]).decode()
    assert text == page.by_id["recipe"]
    (tmp_path / "digits.toml").write_text(text)
    here = load_recipe(str(tmp_path / "digits.toml"))
    assert here == recipe_of(RunFolder.open(finished).manifest.recipe, finished)
    lines = [shlex.split(line) for line in page.by_id["commands"].splitlines()]
    assert [line[1] for line in lines] == ["verify", "gate", "run"]
    monkeypatch.chdir(tmp_path)
    assert finished == tmp_path / "runs" / "digits"
    for line, code in zip(lines[:2], (0, 1), strict=True):
        with pytest.raises(SystemExit) as ended:
            main(line[1:])
        assert (ended.value.code or 0) == code, line
    assert lines[2][2:] == ["digits.toml", "--out", "runs/digits-again"]


def test_no_folder_of_this_machine_is_in_it(altered: Altered) -> None:
    folder = Path("/srv/a secret project")
    altered.recipe["validate"]["data"] = str(folder / "holdout")
    altered.recipe["teacher"] |= {"weights": str(folder / "w.safetensors"), "model": f"python:{folder}/n.py:make"}
    altered.recipe["teach"] = None
    html = altered.page()
    assert "secret" not in html
    assert "python:n.py:make" in html
    assert "<bdi>w.safetensors, holdout, n.py</bdi> next to the recipe" in html


def test_damaged_predictions(altered: Altered) -> None:
    altered.predictions({"teacher": np.full((600, 1), 10, np.int32)})
    with pytest.raises(IntegrityError, match="none of the 10"):
        altered.page()


def test_colours_of_both_themes_can_be_read(page: Page) -> None:
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{([^}]*--ink[^}]*)\}", page.styles)
    )
    assert set(light) == set(dark)
    for theme in (light, dark):
        for ground in ("paper", "card"):
            for ink in ("ink", "soft", "link", "good", "fail", "open"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
            for series in ("series1", "series2", "series3"):
                assert contrast(theme[series], theme[ground]) >= 3, (series, ground)
        for badge in ("good", "fail", "open"):
            assert contrast(theme["badge"], theme[badge]) >= 4.5
        # Numbers stand on the cells of a matrix, on the fullest ones too.
        cells = re.findall(r"\.matrix td\.\w+ .*?var\(--(\w+)\) calc\((\d+)% \+ (\d+)% \*", page.styles)
        assert len(cells) == 3
        for cell, least, more in cells:
            full = (int(least) + int(more)) / 100
            assert contrast(theme["ink"], mixed(theme[cell], theme["paper"], full)) >= 4.5, cell
    assert not re.findall(r"(?:fill|stroke)[:=] ?\"?#[0-9a-f]{6}", page.html), "every colour of a plot is the page's"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser; browser.py beside this file, found wherever pytest was started."""
    specification = importlib.util.spec_from_file_location("nayer_edge_browser", Path(__file__).with_name("browser.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if module.CHROMIUM is None:
        pytest.skip("needs chromium, and there is none")
    with module.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


OVERFLOWING = """
[...document.querySelectorAll("main *, header *, footer *")].filter(e => !e.closest(".scroll") && !e.closest(".hidden")
  && !e.closest("thead") && !e.closest("svg") && (e.getBoundingClientRect().right > innerWidth + 1
  || e.getBoundingClientRect().left < -1)).map(e => e.tagName + "." + e.className + " " + e.textContent.slice(0, 40))
"""

FAINT = """
(() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number), of = c.startsWith("color(srgb") ? 255 : 1;
    return [n[0] * of, n[1] * of, n[2] * of, n[3] ?? 1]; };
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const l = c.slice(0, 3).map(linear);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode, e = node.parentElement;
    if (!node.textContent.trim() || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), ink = parse(e instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [light(ink), light(ground(e))].sort((a, b) => a - b), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(ratio.toFixed(2) + " " + node.textContent.trim().slice(0, 40));
  }
  return found;
})()
"""


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((name, 360) for name in VARIANTS),
        *(("as it is", width) for width in (768, 1280)),
        *(
            pytest.param(name, width, marks=pytest.mark.slow)
            for name in VARIANTS
            for width in (768, 1280)
            if name != "as it is"
        ),
    ],
)
def test_a_browser_shows_it(tab: Any, variant: Variant, name: str, width: int) -> None:
    altered = variant(name)
    tab.open(altered.root / "report.html", width=width)
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.title") == f"digits: {altered.verdict['verdict']}", "no script has run"
    assert tab.evaluate("document.getElementById('verdict').checkVisibility()")
    for _ in ("folded", "unfolded"):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(OVERFLOWING) == []
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.messages == []
    assert {url.split(":")[0] for url in tab.requests} == {"file", "data"}
    assert [url for url in tab.requests if url.startswith("file:")] == [(altered.root / "report.html").as_uri()]


@pytest.mark.parametrize("name", ["as it is", "synthetic", "many"])
def test_both_themes_can_be_read(tab: Any, variant: Variant, name: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        tab.open(variant(name).root / "report.html", scheme=scheme)
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.evaluate(FAINT) == [], scheme
        grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(16, 20, 28)"]


@pytest.mark.parametrize("name", ["as it is", "several"])
def test_on_paper_it_is_light_and_unfolded(tab: Any, variant: Variant, name: str) -> None:
    paper = 718  # A4 within Chromium's margins, CSS pixels
    tab.open(variant(name).root / "report.html", width=paper, scheme="dark")
    height = "document.getElementById('recipe').closest('details').getBoundingClientRect().height"
    folded = tab.evaluate(height)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    tab.call("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.evaluate(height) > 5 * folded
    assert tab.evaluate("document.documentElement.scrollWidth") <= paper, "nothing is cut off"
    tab.call("Emulation.setEmulatedMedia", media="")
    assert tab.printed().startswith(b"%PDF")


def test_a_keyboard_shows_where_it_is(tab: Any, variant: Variant) -> None:
    tab.open(variant("several").root / "report.html", width=360)
    for kind in ("a[href]", "summary", ".scroll"):
        outline = tab.evaluate(f"""(() => {{
            const e = [...document.querySelectorAll("{kind}")].find(e => e.checkVisibility());
            e.focus({{focusVisible: true}});
            return document.activeElement === e && getComputedStyle(e).outlineStyle; }})()""")
        assert outline == "solid", kind


def test_the_policy_of_the_page_stops_what_could_be_smuggled_in(tab: Any, variant: Variant) -> None:
    tab.open(variant("as it is").root / "report.html")
    tab.evaluate("""document.body.insertAdjacentHTML("beforeend", '<img src="https://example.org/a.png">'
        + '<img src=x onerror="document.title = 1">')""")
    blocked = tab.evaluate("new Promise(done => setTimeout(() => done(document.title), 300))")
    assert blocked == "digits: fail"
    stopped = " ".join(tab.messages)
    assert re.search(r"'https://example.org/a.png' violates the following Content Security Policy", stopped)
    assert re.search("inline event handler violates", stopped)


def channels(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def mixed(above: str, below: str, opacity: float) -> str:
    pairs = zip(channels(above), channels(below), strict=True)
    return "#" + "".join(f"{round(255 * (opacity * a + (1 - opacity) * b)):02x}" for a, b in pairs)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
