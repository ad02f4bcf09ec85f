"""The page: one file, no network, both colour schemes, and texts that cannot act."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nayer_edge.artefacts import RunFolder, sha256_of
from nayer_edge.pipelines.recipe import recipe_of
from nayer_edge.pipelines.report import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '\x1b[2J</p></title><script>document.title="owned"</script><img src=x onerror=alert(1)>"\' {{ 7*7 }}'
LOADING = {
    "src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "manifest", "ping",
}  # fmt: skip
VOID = {"meta", "link", "br", "hr", "img", "input", "source"}


class Page(HTMLParser):
    """Everything in a page that matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.styles = ""
        self.text = ""
        self.by_id: dict[str, str] = {}
        self._id = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in LOADING:
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "style":
                self.styles += value or ""
            if name == "id":
                self._id = value or ""

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


def page_of(root: Path) -> Page:
    return Page((root / "report.html").read_text(encoding="utf-8"))


def assert_self_contained(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert page.handlers == []
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "#")), link
    for url in re.findall(r"url\(([^)]*)\)", page.styles):
        assert url.strip("'\"").startswith("#"), url
    assert "@import" not in page.styles
    assert page.open == []


def test_the_page_loads_nothing(tiny_run: Path) -> None:
    page = page_of(tiny_run)
    assert_self_contained(page)
    text = (tiny_run / "report.html").read_text(encoding="utf-8")
    for address in re.findall(r"https?://[^\s\"'<>]+", text):
        assert address.startswith("http://www.w3.org/"), "names of XML, which nothing loads"


def test_the_verdict_is_in_it(tiny_run: Path) -> None:
    verdict = json.loads((tiny_run / "gate" / "verdict.json").read_text())
    page = page_of(tiny_run)
    assert page.by_id["verdict"] == verdict["verdict"] == "fail"
    for check in verdict["checks"]:
        assert check["detail"] in page.text
    assert "Measured on 600 labelled hold-out images" in page.text


def test_both_colour_schemes(tiny_run: Path) -> None:
    page = page_of(tiny_run)
    light, dark = page.styles.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--[a-z]+):", light))
    assert names
    assert names == set(re.findall(r"(--[a-z]+):", dark.split("}")[0])), "every colour has both"
    assert "#000000" not in (tiny_run / "report.html").read_text(), "no black lines on black"


def test_the_picture_is_the_one_of_the_run(tiny_run: Path) -> None:
    (link,) = [link for link in page_of(tiny_run).links if link.startswith("data:")]
    assert base64.b64decode(link.split(",")[1]) == (tiny_run / "generator" / "synthetic.png").read_bytes()


def test_numbers_are_those_of_the_report(tiny_run: Path) -> None:
    report, text = json.loads((tiny_run / "validate" / "report.json").read_text()), page_of(tiny_run).text
    for part in (report["teacher"], report["student"], *report["artifacts"]):
        assert f"{100 * part['top1']:.2f} %" in text
    assert f"{report['teacher']['params']:,}" in text


def test_lineage_names_every_file_but_the_page(tiny_run: Path) -> None:
    text = page_of(tiny_run).text
    for name, entry in RunFolder.open(tiny_run).manifest.files.items():
        assert (name in text) == (name != "report.html")
        assert (entry.sha256[:16] in text) == (name != "report.html")


def hostile_page(finished: Path) -> str:
    """The page of a run in which everything that comes from outside is hostile."""
    run = RunFolder.open(finished)
    report = json.loads((finished / "validate" / "report.json").read_text())
    for artifact in report["artifacts"]:
        for each in artifact["per_class"]:
            each["label"] = HOSTILE
    report["dataset"]["name"] = HOSTILE
    report["hardware"] = {"cpu": HOSTILE, "cores": HOSTILE}
    report["artifacts"][0].update(status="unavailable", reason=HOSTILE)
    verdict = json.loads((finished / "gate" / "verdict.json").read_text())
    for check in verdict["checks"]:
        check.update(name=HOSTILE, artifact=HOSTILE, detail=HOSTILE)
    (finished / "validate" / "report.json").write_text(json.dumps(report))
    (finished / "gate" / "verdict.json").write_text(json.dumps(verdict))
    run.manifest.versions[HOSTILE] = HOSTILE
    values = run.manifest.recipe
    values["description"] = HOSTILE
    values["teacher"]["classes"] = [f"{HOSTILE}{number}" for number in range(10)]
    record = run.manifest.files["validate/report.json"]
    digest = sha256_of(finished / "validate" / "report.json")
    run.manifest.files["validate/report.json"] = record.model_copy(update={"sha256": digest})
    return render(recipe_of(values), run)


def test_hostile_texts_are_shown_and_do_nothing(finished: Path) -> None:
    text = hostile_page(finished)
    page = Page(text)
    assert_self_contained(page)
    assert "alert(1)" in page.text, "shown as text"
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "\x1b" not in text
    assert "49" not in re.findall(r"\{\{ 7\*7 \}\}|\b49\b", page.text), "not a template"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, and there is none")
def test_a_browser_reads_it(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(hostile_page(finished), encoding="utf-8")
    for page, expected in ((finished / "report.html", "digits: fail"), (path, "digits: fail")):
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        dom = Page(done.stdout)
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title is not None
        assert title[1] == expected, "no script has run"
        assert not {"script", "iframe"} & set(dom.tags)
        assert dom.tags.count("img") == 1
        assert "svg" in dom.tags
