"""The page of an evaluation: what is in the file, and what it does in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_data import HOSTILE, METRICS, VARIANTS, example_page, hostile_prompts
from PIL import Image, ImageCms

from texforce_cli.core.comparison import win_matrix
from texforce_cli.errors import TexforceError
from texforce_cli.judging.votes import read_votes
from texforce_cli.report import page as page_module
from texforce_cli.report.page import Page, PageMetric, PageVariant, Picture, Row, Tab, pictures_hash, write_page
from texforce_cli.report.verdicts import ranking_tabs

SECTIONS = ("summary", "differences", "wins", "scores", "gains", "pictures", "blind")


class Parsed(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self.inside = self.text
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = {"script": self.scripts, "style": self.styles}.get(tag, self.text)
        if self.inside is not self.text:
            self.inside.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.text

    def handle_data(self, data: str) -> None:
        if self.inside is self.text:
            self.text.append(data)
        else:
            self.inside[-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for _, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")


def small_page(folder: Path, **changes: Any) -> Page:
    return dataclasses.replace(example_page(folder / "drawn", prompts=3, seeds=(0, 1), size=32), **changes)


def hostile_page(folder: Path) -> Page:
    variants = (
        PageVariant("base <b>&\u202e", "</dd></script><script>document.title = 'broken'</script>", frozenset()),
        PageVariant("x" * 300, "y" * 900, frozenset({"tiny-clip"})),
        PageVariant("c\nd\"'<!--", "", frozenset()),
    )
    title = "</title><script>document.title = 'broken'</script> " + "t" * 300
    return example_page(
        folder, prompts=hostile_prompts(), seeds=(0, 2**40), size=64, variants=variants, gaps=4, title=title
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single_file", [False, True])
def test_the_same_input_gives_the_same_bytes_without_a_path_of_this_machine(tmp_path: Path, single_file: bool) -> None:
    page = small_page(tmp_path)
    for name in ("a", "b/c"):
        assert write_page(page, tmp_path / name, single_file=single_file) == tmp_path / name / "index.html"
    assert files(tmp_path / "a") == files(tmp_path / "b/c")
    html = (tmp_path / "a" / "index.html").read_bytes()
    assert str(tmp_path).encode() not in html and b".png" not in html


def test_the_folder_has_a_file_for_each_picture_and_nothing_else(tmp_path: Path) -> None:
    page = small_page(tmp_path)
    write_page(page, tmp_path / "out")
    names = {name for name in files(tmp_path / "out") if name != "index.html"}
    assert names == {f"media/{large}" for large, _, _, _ in Parsed(tmp_path / "out" / "index.html").data["media"]}
    assert len(names) == len({picture.sha256 for picture in page.pictures.values()})


def test_a_large_picture_gets_a_thumbnail_and_one_in_between_does_not(tmp_path: Path) -> None:
    for size, count in ((400, 2), (200, 1)):
        page = example_page(tmp_path / str(size), prompts=1, seeds=(0,), size=size, variants=VARIANTS[:1])
        write_page(page, tmp_path / f"out{size}")
        sizes = sorted(Image.open(p).width for p in (tmp_path / f"out{size}" / "media").iterdir())
        assert sizes == [320, 400][-count:] if size == 400 else [200]
        assert Parsed(tmp_path / f"out{size}" / "index.html").data["media"][0][2:] == [size, size]


def test_a_second_page_draws_on_the_media_and_removes_only_what_it_does_not_need(tmp_path: Path) -> None:
    out = tmp_path / "out"
    page = small_page(tmp_path)
    write_page(page, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "media").iterdir()}
    assert len(before) == 24
    (out / "media" / f"{'0' * 24}.webp").write_bytes(b"of an earlier page")
    (out / "media" / "mine.webp").write_bytes(b"not of ours")
    (out / "media" / f".{'0' * 24}.0123abcd.tmp.webp").write_bytes(b"of a killed run")
    write_page(page, out)
    after = {path: path.stat().st_mtime_ns for path in (out / "media").iterdir()}
    assert after.pop(out / "media" / "mine.webp") and after == before
    write_page(page, out, single_file=True)
    assert [path.name for path in (out / "media").iterdir()] == ["mine.webp"]


def test_a_single_file_holds_its_pictures(tmp_path: Path) -> None:
    page = small_page(tmp_path)
    parsed = Parsed(write_page(page, tmp_path / "out", single_file=True))
    assert list(files(tmp_path / "out")) == ["index.html"]
    key = ("texforce", "p001", 1)
    index = parsed.data["pictures"][(1 * 3 + 1) * 2 + 1]
    head, encoded = parsed.data["media"][index][0].split(",")
    assert head == "data:image/webp;base64" and "img-src data:;" in parsed.policy
    (tmp_path / "one.webp").write_bytes(base64.b64decode(encoded))
    # 32 pixels: not one of them is changed
    assert Image.open(tmp_path / "one.webp").tobytes() == Image.open(page.pictures[key].path).tobytes()


def test_a_win_is_said_to_be_of_a_picture_as_it_is_counted(tmp_path: Path) -> None:
    text = write_page(example_page(tmp_path), tmp_path / "report").read_text(encoding="utf-8")
    assert win_matrix({"a": {"p": [1, 1, 0]}, "b": {"p": [0, 0, 3]}})["a"]["b"] == pytest.approx(2 / 3)
    assert len(re.findall("[Ss]hare of pictures [io]n which the variant", text)) == 2
    assert "hare of prompts" not in text


def test_a_seed_that_is_no_number_of_javascript_comes_back_in_a_vote_as_it_was(tmp_path: Path) -> None:
    seeds = [0, 2**53 - 1, 2**53 + 1]
    page = small_page(tmp_path, pictures={}, seeds=seeds)
    data = Parsed(write_page(page, tmp_path / "out")).data
    assert data["seeds"] == [0, 2**53 - 1, "9007199254740993"]
    votes = [{"prompt": "p000", "seed": seed, "left": "a", "right": "b", "winner": "tie"} for seed in data["seeds"]]
    file = tmp_path / "votes.json"
    file.write_text(json.dumps({"texforce_votes": 1, "data": data["hash"], "votes": votes}))
    assert [vote.seed for vote in read_votes(file).about({}, pictures_hash(page))] == seeds


def test_equal_pictures_of_two_variants_are_one_file(tmp_path: Path) -> None:
    page = small_page(tmp_path)
    one = page.pictures["base", "p000", 0]
    page = dataclasses.replace(page, pictures={("base", "p000", 0): one, ("ddpo", "p000", 0): one})
    data = Parsed(write_page(page, tmp_path / "out")).data
    assert len(data["media"]) == 1 and [index for index in data["pictures"] if index >= 0] == [0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
def test_a_picture_of_any_mode_is_shown_without_its_profile(tmp_path: Path, mode: str) -> None:
    picture = (
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
        if mode not in ("I;16", "CMYK")
        else Image.new(mode, (8, 8))
    )
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(path, icc_profile=profile)
    page = small_page(tmp_path, pictures={("base", "p000", 0): Picture(path, "0" * 64, {})})
    write_page(page, tmp_path / "out")
    (made,) = (tmp_path / "out" / "media").iterdir()
    with Image.open(made) as shown:
        assert shown.mode == "RGB" and not {"icc_profile", "exif", "xmp"} & set(shown.info)
        if mode in ("RGBA", "LA"):
            assert shown.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["absent", "text", "truncated"])
def test_a_picture_that_cannot_be_read_is_named_and_the_old_page_stays(tmp_path: Path, kind: str) -> None:
    page = small_page(tmp_path)
    old = write_page(page, tmp_path / "out").read_bytes()
    path = page.pictures["base", "p000", 0].path
    data = path.read_bytes()
    path.unlink()
    if kind != "absent":
        path.write_bytes(b"no picture" if kind == "text" else data[: len(data) // 2])
    broken = {**page.pictures, ("base", "p000", 0): Picture(path, "1" * 64, {})}
    with pytest.raises(TexforceError, match=re.escape(str(path))):
        write_page(dataclasses.replace(page, pictures=broken), tmp_path / "out")
    assert (tmp_path / "out" / "index.html").read_bytes() == old


def test_hostile_text_is_text(tmp_path: Path) -> None:
    script = "</ul>\"'><script>document.title = 'broken'</script>"
    page = hostile_page(tmp_path / "drawn")
    page = dataclasses.replace(
        page,
        missing=[script],
        metrics=[PageMetric(script, script, True, script)],
        rows=[row(variant=page.variants[1].name, metric=script, group=script, label=script)],
        wins={},
        extra_tabs=[Tab("rank", script, "")],
    )
    parsed = Parsed(write_page(page, tmp_path / "out"))
    assert [tag for tag, _ in parsed.elements].count("script") == len(parsed.scripts) == 2
    assert not {"img", "b", "iframe", "object", "link rel=stylesheet"} & {
        tag for tag, a in parsed.elements if not (tag == "b" and not a)
    }
    assert not any(name.startswith("on") or name == "style" for _, a in parsed.elements for name in a)
    assert not re.search("</|<!--|<script", parsed.scripts[0], re.IGNORECASE)
    shown = [prompt["text"] for prompt in parsed.data["prompts"]]
    assert shown[0] == HOSTILE[0] and shown[3] == HOSTILE[3]
    assert shown[2] == "a [U+202E]revoked tac[U+202C] and [U+2067]isolates[U+2069], שלום עולם, مرحبا"
    assert shown[5] == (
        "controls [U+0000][U+0001][U+0007][U+001B][31m[U+007F] tab here new line separator \ufffd surrogate"
    )
    # votes must be able to say which prompt: the id is what it was
    assert [prompt["id"] for prompt in parsed.data["prompts"]] == [prompt.id for prompt in page.prompts]


def test_the_page_may_do_nothing_but_run_itself(tmp_path: Path) -> None:
    path = write_page(small_page(tmp_path), tmp_path / "out")
    parsed = Parsed(path)

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert parsed.policy == (
        f"default-src 'none'; script-src 'sha256-{digest(parsed.scripts[1])}'; "
        f"style-src 'sha256-{digest(''.join(parsed.styles))}'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
    )
    addresses = set(re.findall(r"\w+://[^\"'\s]+", path.read_text(encoding="utf-8")))
    assert addresses == {"http://www.w3.org/2000/svg"}


def test_no_template_has_an_emoji_or_sets_html_from_text() -> None:
    for path in (Path(page_module.__file__).parent / "templates").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not [c for c in text if ord(c) >= 0x2600], path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\|\s*safe", text), path


def test_scores_that_are_no_numbers_and_gaps_are_nulls(tmp_path: Path) -> None:
    page = small_page(tmp_path)
    one = page.pictures["base", "p000", 0]
    odd = dataclasses.replace(one, scores={"tiny-clip": math.nan, "tiny-judge": math.inf})
    data = Parsed(write_page(dataclasses.replace(page, pictures={("base", "p000", 0): odd}), tmp_path / "out")).data
    assert data["scores"] == [[None] * 24] * 3 and data["pictures"] == [0] + [-1] * 23


def test_the_hash_of_votes_is_about_pictures_alone(tmp_path: Path) -> None:
    page = small_page(tmp_path)
    unscored = {key: dataclasses.replace(p, scores={}) for key, p in reversed(list(page.pictures.items()))}
    same = dataclasses.replace(
        page, title="x", metrics=(), rows=(), wins={}, pictures=unscored, variants=page.variants[::-1]
    )
    assert pictures_hash(same) == pictures_hash(page)
    other = {
        **page.pictures,
        ("base", "p000", 0): dataclasses.replace(page.pictures["base", "p000", 0], sha256="0" * 64),
    }
    assert pictures_hash(dataclasses.replace(page, pictures=other)) != pictures_hash(page)
    for single_file in (False, True):
        path = write_page(page, tmp_path / "out", single_file=single_file)
        assert Parsed(path).data["hash"] == pictures_hash(page)


def row(**changes: Any) -> Row:
    full = Row(
        group="all", variant="texforce", metric="tiny-clip", mean=0.25, low=0.22, high=0.28, difference=0.031,
        difference_low=0.012, difference_high=0.05, label="", win_rate=0.625, p=0.0004, p_holm=0.02, effect=0.5,
        detectable=0.04, prompts=20, pictures=40,
    )  # fmt: skip
    return dataclasses.replace(full, **changes)


@pytest.mark.parametrize(
    ("low", "high", "metric", "word"),
    [
        (0.1, 0.2, "tiny-clip", "better"),
        (-0.2, -0.1, "tiny-clip", "worse"),
        (0.1, 0.2, "jpeg-incompressibility", "worse"),
        (-0.2, -0.1, "jpeg-incompressibility", "better"),
        (-0.1, 0.1, "tiny-clip", "unclear"),
        (0.0, 0.0, "tiny-clip", "same"),
        (0.0, 0.2, "tiny-clip", "unclear"),
        (None, None, "tiny-clip", ""),
    ],
)
def test_the_verdict_follows_the_direction_of_the_metric(
    tmp_path: Path, low: float | None, high: float | None, metric: str, word: str
) -> None:
    line = row(metric=metric, difference_low=low, difference_high=high)
    parsed = Parsed(write_page(small_page(tmp_path, rows=[line]), tmp_path / "out"))
    words = [a["class"] for _, a in parsed.elements if (a.get("class") or "").startswith("verdict ")]
    assert words == ([f"verdict {word}"] if word else [])


def test_the_numbers_of_a_line_are_rounded_to_its_interval(tmp_path: Path) -> None:
    lines = [row(), row(difference=-0.0001, p=1.0, label="for this prompt only", group="in <snow>")]
    text = " ".join("".join(Parsed(write_page(small_page(tmp_path, rows=lines), tmp_path / "out")).text).split())
    # half of 0.012 to 0.050 is 0.019: two digits of it are three decimals
    assert "all prompts 0.250 0.220 to 0.280 +0.031 better +0.012 to +0.050 62.5 % <0.001 0.020 +0.50 0.040 20" in text
    assert "in <snow> 0.250 0.220 to 0.280 0.000 better" in text and "for this prompt only 62.5 % 1.000" in text
    assert "tiny-clip in-sample all prompts" in text


def test_a_page_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    page = small_page(tmp_path)
    for changes in (
        {"baseline": "other"},
        {"variants": [page.variants[0]] * 2},
        {"prompts": [*page.prompts, page.prompts[0]]},
        {"extra_tabs": [Tab("A b", "x", "")]},
    ):
        with pytest.raises(ValueError):
            write_page(dataclasses.replace(page, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_command_can_add_a_section(tmp_path: Path) -> None:
    page = small_page(tmp_path, extra_tabs=[Tab("rank", "Ranking <1>", "<h2 id='mine'>Ranks</h2>")])
    parsed = Parsed(write_page(page, tmp_path / "out"))
    assert ("h2", {"id": "mine"}) in parsed.elements and "Ranking <1>" in "".join(parsed.text)


def test_rankings_of_names_that_differ_in_signs_alone_have_a_section_each(tmp_path: Path) -> None:
    summary = {
        **{key: [] for key in ("models", "absent", "warnings", "criteria")},
        **{"judge": "clip", "mode": "pairwise", "rounds": 1, "answered": 0, "questions": 0, "pictures": ""},
        **{"spent": {}, "missing_by_variant": {}, "results": {}},
    }
    for name in ("clip-pairwise", "clip.pairwise", "clip pairwise"):
        folder = tmp_path / "ranks" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "verdicts.jsonl").write_text("")
    (tmp_path / "ranks" / "deep").mkdir()
    (tmp_path / "ranks/deep/summary.json").write_text("[" * 100_000)
    page = dataclasses.replace(small_page(tmp_path), extra_tabs=ranking_tabs(tmp_path))
    assert len(page.extra_tabs) == 3
    text = write_page(page, tmp_path / "out").read_text(encoding="utf-8")
    assert text.count('role="tab" id="tab-more-') == 3


def test_what_a_judge_answers_is_text(tmp_path: Path) -> None:
    script = "</p>\"'><script>document.title = 'broken'</script>\u202e"
    summary = {
        **{key: [script] for key in ("models", "absent", "warnings")},
        **{"judge": script, "mode": script, "rounds": 1, "answered": 1, "questions": 1, "pictures": "", "criteria": []},
        **{"spent": {"usd": script}, "missing_by_variant": {script: {script: 1}}, "results": {}, "variants": [script]},
    }
    verdict: dict[str, Any] = dict.fromkeys(("criterion", "prompt", "seed", "reason"), script)
    verdict |= {"placebo": False, "round": 0, "shown": [script, "b"], "hashes": [script, script], "scores": [1, 2]}
    folder = tmp_path / "ranks" / "one"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "verdicts.jsonl").write_text(json.dumps(verdict) + "\n")
    page = dataclasses.replace(small_page(tmp_path), extra_tabs=ranking_tabs(tmp_path))
    parsed = Parsed(write_page(page, tmp_path / "out"))
    assert "".join(parsed.text).count("document.title = 'broken'") >= 12
    assert [tag for tag, _ in parsed.elements].count("script") == len(parsed.scripts) == 2
    assert not [name for _, a in parsed.elements for name in a if name.startswith("on")]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_page(small_page(tmp_path), tmp_path / "out", progress=lambda done, of: told.append((done, of)))
    assert told == [(n, 24) for n in range(1, 25)]


# --- in a browser -----------------------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window: what the tests do with it, and what it must not have done."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.size(1280, 900)

    def size(self, width: int, height: int) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, path: Path, fresh: bool = True) -> None:
        self.driver.get("about:blank")
        self.driver.get(path.as_uri())
        if fresh and self.run("localStorage.clear(); return localStorage.length") == 0:
            self.driver.get("about:blank")
            self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return list(
            self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())", selector)
        )

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def section(self, name: str) -> None:
        self.click(f"#tab-{name}")

    def choose(self, section: str, label: str, text: str) -> None:
        """Choose `text` in the list that is called `label`."""
        found = self.run(
            """const label = [...document.querySelectorAll(`#${arguments[0]} label`)]
                 .find((l) => l.querySelector("select") && l.firstChild.textContent.trim() === arguments[1]);
               const select = label.querySelector("select");
               select.value = [...select.options].find((o) => o.text === arguments[2]).value;
               select.dispatchEvent(new Event("change"));
               return true;""",
            section,
            label,
            text,
        )
        assert found

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)
        return value

    def overflow(self) -> int:
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def problems(self) -> list[str]:
        """Errors of the console, and requests for anything but the page's own files."""
        found = [
            entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:///", "data:", "blob:", "about:")):
                    found.append(url)
        return found


def chromium() -> tuple[str, str]:
    """Chromium and its driver; skips where there is none."""
    pytest.importorskip("selenium", reason="needs selenium: pip install 'texforce[browser]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    return browser, driver


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Path]]:
    """One browser for all tests, and the folder that it downloads into."""
    binary, driver_path = chromium()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        allow = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", allow)
        yield Browser(driver), downloads
    finally:
        driver.quit()


@pytest.fixture
def browser(started: tuple[Browser, Path]) -> Iterator[Browser]:
    """The browser, on a desktop and in the light; afterwards nothing may have gone wrong or left the page."""
    it = started[0]
    it.size(1280, 900)
    it.scheme("light")
    it.problems()
    yield it
    assert it.problems() == []


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """A page with 30 prompts, two seeds and three missing pictures."""
    folder = tmp_path_factory.mktemp("example")
    page = example_page(folder / "drawn", prompts=30, seeds=(0, 7), size=96, gaps=3)
    return page, write_page(page, folder / "report")


in_browser = pytest.mark.slow
HEADS = ("Variant", "Metric", "Prompts", "Mean", "Difference", "Win rate")


def column(browser: Browser, number: int) -> list[str]:
    """What stands in a column of the summary, in the rows that are shown."""
    return [
        text.split("\n")[0] for text in browser.texts(f"table.summary tbody tr:not([hidden]) > :nth-child({number})")
    ]


@in_browser
def test_the_table_sorts_by_click_and_by_key(browser: Browser, example: tuple[Page, Path]) -> None:
    browser.open(example[1])
    browser.choose("summary", "Metric", "tiny-clip")
    head = "table.summary thead th:nth-child(4)"
    browser.click(f"{head} button")
    means = [float(text) for text in column(browser, 4)]
    assert means == sorted(means, reverse=True) and len(means) == 4
    assert browser.one(head).get_attribute("aria-sort") == "descending"
    browser.press("\ue007")  # Enter
    assert [float(text) for text in column(browser, 4)] == sorted(means)
    assert browser.one(head).get_attribute("aria-sort") == "ascending"
    # the baseline has no difference: it is last, whichever way
    for way in ("descending", "ascending"):
        browser.run("document.querySelector('table.summary thead th:nth-child(5) button').focus()")
        browser.press(" ")
        assert browser.one("table.summary thead th:nth-child(5)").get_attribute("aria-sort") == way
        assert column(browser, 5)[-1] == "baseline"
        assert len(browser.all("table.summary thead [aria-sort]")) == 1
    browser.click("table.summary thead th:nth-child(1) button")
    assert column(browser, 1) == sorted(column(browser, 1))


@in_browser
def test_the_table_is_filtered(browser: Browser, example: tuple[Page, Path]) -> None:
    page, path = example
    browser.open(path)
    # all prompts to begin with
    assert set(column(browser, 3)) == {"all prompts"} and len(column(browser, 1)) == 12
    browser.choose("summary", "Prompts", "every group")
    assert browser.texts("#summary .count")[0] == f"{len(page.rows)} of {len(page.rows)} rows"
    browser.choose("summary", "Variant", "ddpo")
    browser.choose("summary", "Prompts", "unseen prompts")
    assert column(browser, 1) == ["ddpo"] * 3
    assert column(browser, 2) == ["tiny-clip in-sample", "tiny-judge (points)", "jpeg-incompressibility (kB)"]
    assert browser.texts(".missing li") == list(page.missing)


@in_browser
def test_in_sample_is_explained_on_focus_and_escape_sends_it_away(browser: Browser, example: tuple[Page, Path]) -> None:
    browser.open(example[1])
    browser.run("document.querySelector('tr:not([hidden]) .badge').focus()")
    assert "trained on what this metric measures" in browser.one("#tip").text
    assert browser.run("return document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.press("\ue00c")  # Escape
    assert not browser.one("#tip").is_displayed()


@in_browser
def test_sections_are_tabs_for_mouse_keys_and_address(browser: Browser, example: tuple[Page, Path]) -> None:
    browser.open(example[1])
    browser.click("#tab-summary")
    browser.press("\ue014")  # right
    assert browser.run("return [document.activeElement.id, location.hash]") == ["tab-differences", "#differences"]
    browser.press("\ue010")  # End
    assert browser.one("#blind").is_displayed() and not browser.one("#differences").is_displayed()
    browser.press("\ue014")
    assert browser.run("return document.activeElement.id") == "tab-summary"
    browser.driver.get(example[1].as_uri() + "#wins")
    assert browser.one("#wins").is_displayed() and not browser.one("#summary").is_displayed()


@in_browser
def test_differences_have_a_line_each_about_one_zero(browser: Browser, example: tuple[Page, Path]) -> None:
    page, path = example
    browser.open(path)
    browser.section("differences")
    shown = [r for r in page.rows if r.difference is not None]
    assert len(browser.all("#differences tbody tr")) == len(shown)
    zeros = browser.run(
        "return [...document.querySelectorAll('.forest')].map((t) =>"
        " [...new Set([...t.querySelectorAll('.zero')].map((z) => Math.round(z.getBoundingClientRect().x)))].length)"
    )
    assert zeros == [1, 1, 1]
    browser.choose("differences", "Prompts", "all prompts")
    browser.choose("differences", "Metric", "tiny-clip")
    # right of zero, and as far as the number says
    place = browser.run(
        """return [...document.querySelectorAll("#differences tbody tr")].map((tr) => {
             const at = (name, end) => tr.querySelector(name)[end].baseVal.valueInSpecifiedUnits;
             return [at(".zero", "x1"), at(".span", "x1"), at("circle", "cx"), at(".span", "x2")];
           })"""
    )
    lines = [r for r in shown if r.group == "all" and r.metric == "tiny-clip"]
    assert len(place) == len(lines) == 3
    scale = (place[0][2] - place[0][0]) / lines[0].difference  # type: ignore[operator]
    for (zero, low, middle, high), line in zip(place, lines):
        for at, value in ((low, line.difference_low), (middle, line.difference), (high, line.difference_high)):
            assert at - zero == pytest.approx(value * scale, abs=0.1)  # type: ignore[operator]


@in_browser
def test_the_win_matrix_says_the_rates(browser: Browser, example: tuple[Page, Path]) -> None:
    page, path = example
    browser.open(path)
    browser.section("wins")
    cells = browser.texts("#wins .card:first-child tbody td")
    names = [variant.name for variant in page.variants]
    rates = page.wins["tiny-clip"]
    # JavaScript rounds halves up, Python to even
    expected = [f"{math.floor(100 * rates[a][b] + 0.5)}\u202f%" if a != b else "·" for a in names for b in names]
    assert cells == expected


@in_browser
def test_histograms_show_all_variants_and_take_one_out(browser: Browser, example: tuple[Page, Path]) -> None:
    page, path = example
    browser.open(path)
    browser.section("scores")
    assert len(browser.all("#scores .plot")) == 3 and len(browser.all("#scores .plot .outline")) == 12
    values = [
        one.scores["tiny-judge"]
        for (name, prompt, seed), one in page.pictures.items()
        if name == "base" and all((v.name, prompt, seed) in page.pictures for v in page.variants)
    ]
    assert f"base {sum(values) / len(values):.2f}" in browser.all("#scores .plot")[1].get_attribute("aria-label")
    browser.click("#scores .card:first-child .legend li:nth-child(2) input")
    assert [g.is_displayed() for g in browser.all("#scores .card:first-child .plot g")] == [True, False, True, True]
    browser.choose("scores", "Prompts", "unseen prompts")
    assert len(browser.all("#scores .plot .outline")) == 12


@in_browser
def test_what_one_variant_lacks_counts_in_no_plot(browser: Browser, tmp_path: Path) -> None:
    """The base has all 12 prompts, another variant only nine of them."""
    page = example_page(tmp_path, seeds=(0,), size=16, gaps=3)
    browser.open(write_page(page, tmp_path / "report"))
    browser.section("scores")
    shared = [page.pictures["base", p.id, 0].scores["tiny-judge"] for p in page.prompts[:9]]
    assert f"base {sum(shared) / 9:.2f}," in browser.all("#scores .plot")[1].get_attribute("aria-label")
    browser.section("gains")
    assert all(text.endswith("of 9 prompts") for text in browser.texts("#gains .halves h3"))


@in_browser
def test_gains_and_losses_are_the_extremes(browser: Browser, example: tuple[Page, Path]) -> None:
    page, path = example
    browser.open(path)
    browser.section("gains")
    browser.choose("gains", "Metric", "jpeg-incompressibility (kB)")

    def mean(variant: str, prompt: str) -> float:
        found = [page.pictures[variant, prompt, s].scores["jpeg-incompressibility"] for s in page.seeds]
        return sum(found) / len(found)

    gains = {p.text: mean("texforce", p.id) - mean("base", p.id) for p in page.prompts}
    best = sorted(gains, key=lambda text: gains[text])[:8]  # a smaller file is better
    half = "#gains .halves > :nth-child(1)"
    assert browser.texts(f"{half} .text") == best
    assert browser.texts(f"{half} .figure")[0] == f"{gains[best[0]]:.2f}".replace("-", "\u2212")
    assert len(browser.all(f"{half} .extreme:nth-of-type(1) .picture")) == 4
    worst = max(gains, key=lambda text: gains[text])
    assert browser.texts("#gains .halves > :nth-child(2) .text")[0] == worst


@in_browser
def test_the_grid_filters_sorts_and_makes_rows_as_one_scrolls(browser: Browser, example: tuple[Page, Path]) -> None:
    page, path = example
    browser.open(path)
    browser.section("pictures")
    assert browser.texts("#pictures .count") == ["60 of 60 rows"]
    assert len(browser.all("#pictures .row")) < 60
    browser.wait(
        lambda: (
            browser.run(
                "scrollTo(0, document.documentElement.scrollHeight); return document.querySelectorAll('#pictures .row').length"
            )
            == 60
        )
    )
    assert len(browser.all("#pictures .picture")) == 240 - 3 and len(browser.all("#pictures .gap")) == 3
    browser.choose("pictures", "Order", "largest gain first")
    browser.choose("pictures", "Gain of", "ddpo")
    gains = {
        (n, s): page.pictures["ddpo", p.id, seed].scores["tiny-clip"]
        - page.pictures["base", p.id, seed].scores["tiny-clip"]
        for n, p in enumerate(page.prompts)
        for s, seed in enumerate(page.seeds)
    }
    shown = browser.run(
        "return [...document.querySelectorAll('#pictures .row')].slice(0, 10).map((r) => [+r.dataset.prompt, +r.dataset.seed])"
    )
    assert [tuple(key) for key in shown] == sorted(gains, key=lambda key: -gains[key])[:10]
    browser.one("#pictures input[type=search]").send_keys("SNOW fox")
    wanted = [p for p in page.prompts if "snow" in p.text and "fox" in p.text]
    assert len(browser.all("#pictures .row")) == 2 * len(wanted) > 0
    browser.choose("pictures", "Seed", "7")
    assert len(browser.all("#pictures .row")) == len(wanted)
    browser.run("document.querySelector('#pictures .checks input').click()")
    assert len(browser.all("#pictures .row .name")) == 3 * len(wanted)
    browser.one("#pictures input[type=search]").clear()
    browser.one("#pictures input[type=search]").send_keys("no such words")
    assert browser.texts("#pictures .count") == ["0 of 60 rows"]


@in_browser
def test_a_click_zooms_arrows_step_and_escape_returns(browser: Browser, example: tuple[Page, Path]) -> None:
    browser.open(example[1])
    browser.section("pictures")
    browser.click("#pictures .row:nth-child(1) figure:nth-child(2) .picture")
    image = "#zoom .frame img"
    assert browser.one(image).get_attribute("alt").startswith("texforce, seed 0")
    browser.wait(lambda: browser.run("return document.querySelector(arguments[0]).naturalWidth", image) == 96)
    assert browser.one(image).size["width"] > 400  # few pixels, large
    assert (
        browser.run("return getComputedStyle(document.querySelector(arguments[0])).imageRendering", image)
        == "pixelated"
    )
    browser.press("\ue014")  # right
    assert browser.one(image).get_attribute("alt").startswith("ddpo, seed 0")
    browser.press("\ue012", "\ue012", "\ue012")  # left, past the first
    assert browser.one(image).get_attribute("alt").startswith("texforce + ddpo, seed 0")
    browser.press("\ue015")  # down
    assert browser.one(image).get_attribute("alt").startswith("texforce + ddpo, seed 7")
    assert browser.texts("#zoom .count") == ["2 of 60"]
    browser.press("\ue00c")  # Escape
    assert not browser.one("#zoom").is_displayed()
    assert browser.run("return document.activeElement.className") == "picture"


@in_browser
def test_the_slider_moves_by_keys_and_by_pointer(browser: Browser, example: tuple[Page, Path]) -> None:
    from selenium.webdriver import ActionChains

    browser.open(example[1])
    browser.section("pictures")
    browser.click("#pictures .row:nth-child(1) figure:nth-child(3) .picture")
    browser.press("c")
    assert browser.texts("#zoom .side") == ["base", "ddpo"]
    width = browser.one("#zoom .frame").size["width"]

    def cut() -> float:
        clip = browser.run("return getComputedStyle(document.querySelector('#zoom .over')).clipPath")
        return 100 - float(re.search(r"([\d.]+)%", clip.replace("calc(100% - ", ""))[1]) if "%" in clip else width  # type: ignore[index]

    start = browser.run("return document.querySelector('#zoom input[type=range]').valueAsNumber")
    assert start == 50
    browser.run("document.querySelector('#zoom input[type=range]').focus()")
    browser.press("\ue012" * 10)  # left: the slider, not the variant
    assert browser.one("#zoom input[type=range]").get_attribute("aria-valuetext") == "40 % base, 60 % ddpo"
    assert browser.run("return document.querySelector('#zoom .frame').style.getPropertyValue('--cut')") == "40%"
    line = browser.run(
        "const f = document.querySelector('#zoom .frame').getBoundingClientRect(), c ="
        " document.querySelector('#zoom .cut').getBoundingClientRect(); return (c.x + 1 - f.x) / f.width"
    )
    assert line == pytest.approx(0.4, abs=0.005)
    frame = browser.one("#zoom .frame")
    ActionChains(browser.driver).move_to_element_with_offset(frame, round(width * 0.3), 0).click().perform()
    assert browser.run("return document.querySelector('#zoom input[type=range]').valueAsNumber") == pytest.approx(
        80, abs=1
    )
    browser.run("document.querySelector('#zoom [data-key=compare]').focus()")
    browser.press("\ue014")  # right: the other side of the slider
    assert browser.texts("#zoom .side") == ["base", "texforce + ddpo"]


def ready(browser: Browser) -> None:
    browser.wait(lambda: browser.one("#blind .choices button").get_attribute("aria-disabled") == "false")


@in_browser
def test_blind_votes_are_kept_undone_and_downloaded(
    browser: Browser, started: tuple[Browser, Path], example: tuple[Page, Path]
) -> None:
    page, path = example
    browser.open(path)
    browser.section("blind")
    ready(browser)
    # no name in sight, nor in the pictures' texts and addresses
    seen = browser.run(
        "return document.querySelector('#blind .ballot').cloneNode(true).querySelector('.pairs').outerHTML"
    )
    assert not any(variant.name in seen for variant in page.variants)
    assert browser.all("#blind .pairs img")[0].get_attribute("alt") == "Left picture"
    total = browser.texts("#blind .count")[0]
    assert total == f"0 of {6 * 60 - 3 * 3} votes."
    shown: list[list[str]] = []
    for press in (
        lambda: browser.press("\ue012"),
        lambda: browser.press("\ue014"),
        lambda: browser.press("t"),
        lambda: browser.all("#blind .choices button")[2].click(),
    ):
        ready(browser)
        shown.append([image.get_attribute("src") for image in browser.all("#blind .pairs img")])
        browser.run("document.activeElement.blur()")
        press()
    browser.click("#blind .bar button")
    ready(browser)
    assert [image.get_attribute("src") for image in browser.all("#blind .pairs img")] == shown[3]
    assert browser.texts("#blind .count")[0].startswith("3 of ")
    browser.open(path, fresh=False)
    browser.section("blind")
    ready(browser)
    assert browser.texts("#blind .count")[0].startswith("3 of ")
    browser.click("#blind .bar .strong")
    file = started[1] / "votes.json"
    votes = json.loads(browser.wait(lambda: file.exists() and file.read_text(encoding="utf-8")))
    file.unlink()
    assert list(votes) == ["texforce_votes", "data", "votes"]
    assert votes["texforce_votes"] == 1 and votes["data"] == pictures_hash(page)
    assert [vote["winner"] for vote in votes["votes"]] == ["left", "right", "tie"]
    data = Parsed(path).data
    for vote, sources in zip(votes["votes"], shown):
        assert set(vote) == {"prompt", "seed", "left", "right", "winner", "pictures"} and vote["left"] != vote["right"]
        drawn = [page.pictures[vote[side], vote["prompt"], vote["seed"]].sha256 for side in ("left", "right")]
        assert vote["pictures"] == drawn
        for side, source in zip(("left", "right"), sources):
            place = [v.name for v in page.variants].index(vote[side]) * len(page.prompts)
            place = (place + [p.id for p in page.prompts].index(vote["prompt"])) * 2 + list(page.seeds).index(
                vote["seed"]
            )
            assert source.endswith(data["media"][data["pictures"][place]][0])
    browser.run("window.confirm = () => true; document.querySelectorAll('#blind .bar button')[3].click()")
    assert browser.texts("#blind .count")[0] == total


@in_browser
def test_votes_go_on_where_seeds_are_added_and_end_where_their_pictures_change(
    browser: Browser, tmp_path: Path
) -> None:
    page = small_page(tmp_path)
    key, one = next(iter(page.pictures.items()))
    other = {key: dataclasses.replace(one, sha256="0" * 64)}
    fewer = dataclasses.replace(page, seeds=page.seeds[:1], pictures={**page.pictures, **other})
    browser.open(write_page(fewer, tmp_path / "fewer"))
    browser.section("blind")
    while not browser.texts("#blind .count")[0].endswith("All done, thank you."):
        ready(browser)
        browser.run("document.querySelector('#blind .choices button').click()")
    cast = len(browser.run("return JSON.parse(localStorage.getItem(Object.keys(localStorage)[0])).votes"))
    browser.run("localStorage.setItem('texforce-votes:torn', '{')")
    browser.open(write_page(page, tmp_path / "out"), fresh=False)
    browser.section("blind")
    ready(browser)
    assert browser.texts("#blind .count")[0].startswith(f"{cast - len(page.variants) + 1} of ")
    browser.run("window.confirm = () => true; localStorage.removeItem('texforce-votes:torn')")
    browser.run(
        "[...document.querySelectorAll('#blind button')].find((b) => b.textContent === 'Delete all votes').click()"
    )
    again = dataclasses.replace(page, pictures={**page.pictures, key: dataclasses.replace(one, sha256="1" * 64)})
    browser.open(write_page(again, tmp_path / "again"), fresh=False)
    browser.section("blind")
    ready(browser)
    assert browser.texts("#blind .count")[0].startswith("0 of ")


@in_browser
def test_arrow_keys_vote_once_the_tab_was_pressed_with_a_pointer(browser: Browser, example: tuple[Page, Path]) -> None:
    browser.open(example[1])
    browser.section("blind")
    ready(browser)
    browser.press("\ue012")  # left
    assert browser.one("#blind").is_displayed()
    assert browser.texts("#blind .count")[0].startswith("1 of ")
    browser.run("document.getElementById('tab-blind').focus()")
    browser.press("\ue012")  # by keys alone one walks on
    assert browser.one("#pictures").is_displayed()


@in_browser
def test_the_questions_of_a_vote_are_fair(browser: Browser, example: tuple[Page, Path]) -> None:
    """Sides by chance, every question once, and each prompt before any comes again."""
    page, path = example
    browser.open(path)
    browser.section("blind")
    for _ in range(len(page.prompts)):
        ready(browser)
        browser.run("document.querySelector('#blind .choices button').click()")
    kept = browser.run("return JSON.parse(localStorage.getItem(Object.keys(localStorage)[0])).votes")
    assert len({vote["prompt"] for vote in kept}) == len(kept) == 30
    order = {variant.name: n for n, variant in enumerate(page.variants)}
    forward = sum(order[vote["left"]] < order[vote["right"]] for vote in kept)
    assert 4 <= forward <= 26  # 30 fair coins: beyond it once in ten thousand


@in_browser
def test_a_browser_that_keeps_nothing_says_so_and_still_votes(browser: Browser, example: tuple[Page, Path]) -> None:
    block = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    script = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": block})
    try:
        browser.open(example[1], fresh=False)
        browser.section("blind")
        ready(browser)
        browser.run("document.querySelector('#blind .choices button').click()")
        assert re.match("1 of .* This browser keeps nothing", browser.texts("#blind .count")[0])
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@in_browser
@pytest.mark.parametrize("hostile", [False, True], ids=["usual", "hostile"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_section_is_wider_than_the_screen(
    browser: Browser, example: tuple[Page, Path], tmp_path: Path, hostile: bool, width: int
) -> None:
    path = write_page(hostile_page(tmp_path / "drawn"), tmp_path / "out") if hostile else example[1]
    browser.size(width, 760)
    browser.open(path)
    title = browser.driver.title
    for name in SECTIONS:
        browser.section(name)
        if name == "blind":
            ready(browser)
        assert browser.overflow() <= 0, name
    browser.section("pictures")
    browser.run("document.querySelector('#pictures .picture').click()")
    browser.press("c")
    assert browser.overflow() <= 0
    wide = "const d = document.querySelector('#zoom'); return [d.scrollWidth - d.clientWidth, d.scrollHeight - d.clientHeight]"
    assert max(browser.run(wide)) <= 0
    assert browser.driver.title == title != "broken"


@in_browser
@pytest.mark.parametrize(
    ("text", "width", "is_cut"),
    [
        ("seven words that fit on any screen", 360, False),
        ("word " * 50, 360, True),
        ("word " * 50, 1280, False),
        ("word " * 120, 1280, True),
    ],
)
def test_a_prompt_that_is_cut_can_be_read_whole(
    browser: Browser, tmp_path: Path, text: str, width: int, is_cut: bool
) -> None:
    page = small_page(tmp_path)
    prompts = [dataclasses.replace(prompt, text=text) for prompt in page.prompts]
    browser.size(width, 900)
    browser.open(write_page(dataclasses.replace(page, prompts=prompts), tmp_path / "out"))
    browser.section("blind")
    ready(browser)
    hidden = "const text = document.querySelector('#blind .text'); return text.scrollHeight > text.clientHeight"
    browser.wait(lambda: browser.one("#blind .more").is_displayed() == is_cut)
    assert browser.run(hidden) == is_cut
    if is_cut:
        browser.click("#blind .more")
        assert not browser.run(hidden) and browser.one("#blind .more").text == "Show less"


@in_browser
def test_a_single_file_works_alone(browser: Browser, tmp_path: Path) -> None:
    page = small_page(tmp_path)
    made = write_page(page, tmp_path / "out", single_file=True)
    alone = tmp_path / "elsewhere" / "shared.html"
    alone.parent.mkdir()
    made.rename(alone)
    browser.open(alone)
    wait = "const i = [...document.querySelectorAll('.strip img')]; return i.length && i.every((one) => one.naturalWidth === 32)"
    browser.wait(lambda: browser.run(wait))
    browser.section("blind")
    ready(browser)


@in_browser
def test_a_script_of_another_section_is_blocked(started: tuple[Browser, Path], tmp_path: Path) -> None:
    browser = started[0]
    html = "<h2>More</h2><script>document.title = 'broken'</script>"
    browser.open(write_page(small_page(tmp_path, extra_tabs=[Tab("rank", "Ranks", html)]), tmp_path / "out"))
    browser.click("#tab-more-rank")
    assert browser.one("#more-rank h2").is_displayed() and browser.driver.title != "broken"
    assert any("Content Security Policy" in problem for problem in browser.problems())


@in_browser
@pytest.mark.parametrize("metrics", [METRICS, ()], ids=["unscored", "no metrics"])
def test_a_page_with_almost_nothing_opens(browser: Browser, tmp_path: Path, metrics: Any) -> None:
    page = small_page(tmp_path, variants=VARIANTS[:1], rows=(), wins={}, pictures={}, metrics=metrics)
    browser.open(write_page(page, tmp_path / "out"))
    for name in SECTIONS if metrics else ("summary", "pictures", "blind"):
        browser.section(name)
        assert browser.one(f"#{name}").is_displayed()


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255]; };
const poor = new Map();
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !e.checkVisibility() || e.closest(":disabled, script, option, .aside, [aria-disabled=true]")) continue;
  const style = getComputedStyle(e);
  const [a, b] = [light(rgba(e instanceof SVGElement ? style.fill : style.color)), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.set(`${e.tagName}.${e.className.baseVal ?? e.className}`, ratio);
}
return [...poor];
"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_in_the_light_and_in_the_dark(
    browser: Browser, example: tuple[Page, Path], scheme: str
) -> None:
    browser.scheme(scheme)
    browser.open(example[1])
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 600) == (scheme == "light")
    for name in SECTIONS:
        browser.section(name)
        if name == "blind":
            ready(browser)
        assert browser.run(CONTRAST) == [], name
    browser.section("pictures")
    browser.run("document.querySelector('#pictures .picture').click()")
    browser.press("c")
    assert browser.run(CONTRAST) == []


@in_browser
def test_everything_that_can_be_pressed_has_a_name(browser: Browser, example: tuple[Page, Path]) -> None:
    browser.open(example[1])
    nameless = (
        "return [...document.querySelectorAll('main button, main input, main select, nav button')].filter((e) =>"
        " e.checkVisibility() && !(e.innerText || e.ariaLabel || e.labels?.length || e.querySelector('img[alt]')))"
        ".map((e) => e.outerHTML)"
    )
    for name in SECTIONS:
        browser.section(name)
        assert browser.run(nameless) == []


@in_browser
def test_how_long_a_hundred_prompts_of_four_variants_take_to_open(
    browser: Browser,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured and reported, not judged: a busy machine is no failure. On an idle one it is well under two seconds.

    `pytest tests/test_page.py -m slow -k how_long -p no:xdist` shows the line.
    """
    page = example_page(tmp_path / "drawn", prompts=100, seeds=(0,), size=64)
    path = write_page(page, tmp_path / "out")
    best: dict[str, float] = {}
    for _ in range(3):
        browser.driver.get("about:blank")
        browser.driver.get(path.as_uri())
        measured = {
            "opens (ms)": browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd"),
            "pictures (ms)": browser.run(
                "const start = performance.now(); document.getElementById('tab-pictures').click();"
                "document.body.offsetHeight; return performance.now() - start"
            ),
        }
        best = {key: min(value, best.get(key, value)) for key, value in measured.items()}
    for key, value in best.items():
        record_property(key, round(value))
    with capsys.disabled():
        print("\n100 prompts, 4 variants:", ", ".join(f"{key} {value:.0f}" for key, value in best.items()))
    assert len(browser.all("#pictures .row")) >= 24
