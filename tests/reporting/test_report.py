"""The report shows what it was given, loads and runs nothing, and is readable on a screen, on a phone and on paper."""

import getpass
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from soteria.errors import UserError
from soteria.grid.grid_file import read_grid
from soteria.languages import PAPER_LANGUAGES
from soteria.reporting import output, write_up
from soteria.reporting.report import Section, environment_facts, render_report
from soteria.storage import files, paths

NAMES = [language.name for language in PAPER_LANGUAGES]
CHANGE = "28.1% [20%, 38%]"
HOSTILE = """<script>window.hacked = 1</script>"><img src=x onerror='window.hacked = 1'>{{ 7 * 7 }}&amp;"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PRINTED_WIDTH = 680  # CSS pixels of an A4 page between margins of 15 mm


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """2600 × 400 dots: wider than any screen that the page is shown on."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    plt.imsave(path, np.linspace(0, 1, 400 * 2600).reshape(400, 2600))
    return path


def matrix() -> pd.DataFrame:
    table = pd.DataFrame(np.arange(144).reshape(12, 12) / 144, index=NAMES, columns=NAMES)
    table.iloc[3, 4] = np.nan
    return table


def long_table() -> pd.DataFrame:
    """Sixty rows, wider than a phone."""
    rows = [{"language": name, "heads": f"{i} heads", "ASR": CHANGE, "n": 96} for name in NAMES for i in range(5)]
    return pd.DataFrame(rows).assign(**{f"rate {i}": "-11.8% [-19.1%, -4.0%]" for i in range(5)})


def answers() -> pd.DataFrame:
    texts = ["مرحبا بالعالم", "สวัสดีชาวโลก " * 9, "नमस्ते दुनिया", "你好" * 60, "x" * 300, HOSTILE]
    return pd.DataFrame({"model": [f"an-organization/a-model-{i}" for i in range(6)], "answer": texts})


def some_report(picture: Path, **changes) -> str:
    sections = [
        Section("Attack success rate", "Judged by a proxy.\n\nTwice.", long_table(), "Sixty rows.", files=("a/b.csv",)),
        Section("Overlap", table=matrix(), picture=picture, alt="a matrix"),
        Section("Effects", picture=picture, caption="Effects of heads.", alt="maps of heads"),
        Section("Answers", table=answers()),
        Section("A title of many words that has to wrap on a narrow screen, and " + "long" * 20),
    ]
    parts = {
        "title": "A report",
        "summary": ["ASR falls.", "Damage is small."],
        "sections": sections,
        "facts": {"torch": "2.13.0", "commit": "0" * 40},
        "grid_text": "languages: all # " + "a long comment " * 20,
        "commands": ["bash scripts/reproduce.sh " + "--language Hindi " * 20],
        "not_run": ["Llama: no GPU."],
    }
    return render_report(**parts | changes)


class Reader(HTMLParser):
    """A page's elements with their attributes, its tables' cells, and all its text except the style's."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.rows, self.text, self._open, self._cell = [], [], "", [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._open.pop()
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data.replace("\u00a0", " ")  # within intervals
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def read_table(table: pd.DataFrame) -> Reader:
    return Reader(render_report("t", [], [Section("s", table=table)], {}, "", [], []))


# What the page holds


def test_cells_are_as_given_and_an_index_of_names_is_the_first_column():
    rows = read_table(matrix().iloc[:2, :2]).rows
    assert rows == [["", "English", "Spanish"], ["English", "0.0000", "0.0069"], ["Spanish", "0.0833", "0.0903"]]
    assert read_table(long_table()).rows[1:] == long_table().astype(str).to_numpy().tolist()
    named = pd.DataFrame({"English": ["1.2 (+0.0031)"]}, index=pd.RangeIndex(1, 2, name="rank"))
    assert read_table(named).rows == [["rank", "English"], ["1", "1.2 (+0.0031)"]]
    index = pd.MultiIndex.from_tuples([("x", "y")], names=["a", None])
    twice = pd.DataFrame([["1", "2"]], columns=["a", "a"], index=index)
    assert read_table(twice).rows == [["a", "", "a", "a"], ["x", "y", "1", "2"]]
    for empty in (pd.DataFrame(), pd.DataFrame({"a": [], "b": []}), pd.DataFrame(index=[0, 1])):
        assert "Table 1." in read_table(empty).text


def test_only_cells_that_were_not_run_are_empty_and_they_are_counted():
    table = pd.DataFrame({"heads": ["top", "", "all"], "ASR": ["1%", "", "–"], "KL": [0.1, None, np.nan]})
    page = read_table(table)
    assert page.rows[1:] == [["top", "1%", "0.1000"], [" ", "", ""], ["all", "–", ""]]
    assert "3 empty cells were not run." in page.text
    assert "1 empty cell was not run." in read_table(table[["heads", "ASR"]]).text
    assert "not run." not in read_table(table[["heads"]]).text
    assert "2 empty cells were not run." in read_table(pd.DataFrame({"heads": ["a", "b"], "KL": ["", ""]})).text


def test_columns_of_numbers_are_told_from_words():
    for text in ("96", "0.024", "1.5e-08", "100% → 97.6%", CHANGE, "+1.2 ± 0.3", "< 0.001", "−0.4"):
        assert "1 empty cell was" in read_table(pd.DataFrame({"b": [text, "–", ""]})).text, text
    for text in ("Llama-3.1-8B", "4 heads", "e5", "Hindi"):
        assert "empty cell" not in read_table(pd.DataFrame({"b": [text, "–", ""]})).text, text


def test_the_same_input_gives_the_same_page_with_numbered_captions_and_described_pictures(picture):
    html = some_report(picture)
    assert html == some_report(picture)
    page = Reader(html)
    labels = re.findall(r"(?:Table|Figure) \d\. [\w ]+", page.text)
    tables = ["Table 1. Sixty rows", "Table 2. Overlap", "Table 3. Answers"]
    assert sorted(labels) == ["Figure 1. Overlap", "Figure 2. Effects of heads", *tables]
    assert [image["alt"] for image in page.all("img")] == ["a matrix", "maps of heads"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "Llama: no GPU." in page.text
    assert "Nothing was left out." in Reader(some_report(picture, not_run=[])).text


def test_a_picture_that_is_not_a_png_is_refused_by_name(tmp_path):
    files.write_text(tmp_path / "picture.png", "<svg onload='alert(1)'/>")
    with pytest.raises(UserError, match=r"picture\.png.*PNG"):
        render_report("t", [], [Section("s", picture=tmp_path / "picture.png")], {}, "", [], [])


def everywhere(text: str, picture: Path) -> str:
    """A report with the text in every place that takes one."""
    cell = text.encode("utf-8", "replace").decode("utf-8")  # pandas takes no other text
    table = pd.DataFrame({cell: [cell, "y"], f"{cell} 2": ["x", cell], "n": ["1", "2"]})
    section = Section(text, text, table, text, picture, text, (text,))
    return render_report(text, [text], [section], {text: text}, text, [text], [text])


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Z"])))  # lines and spaces: a blank line separates paragraphs
@example(HOSTILE)
@example("\x00\x1b[31m\ud800\uffff")
@example("</code></pre></style></title><!--")
@example("' onerror=alert(1) x='")
def test_no_text_becomes_an_element_or_an_attribute(picture, text):
    def shape(page: str) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in Reader(page).elements]

    page = everywhere(f"x{text}", picture)
    assert shape(page) == shape(everywhere("x" * (1 + len(text)), picture))
    page.encode("utf-8")


def test_what_looks_like_markup_is_shown_letter_for_letter(picture):
    page = Reader(everywhere(HOSTILE, picture))
    assert page.rows[0][:2] == [HOSTILE, f"{HOSTILE} 2"] and page.rows[1][:2] == [HOSTILE, "x"]
    assert page.all("img")[0]["alt"] == HOSTILE
    # Title of the page, heading, contents, section, paragraph, captions of picture and table, file, four cells, fact
    # and its name, grid, command, summary, not run.
    assert page.text.count(HOSTILE) == 18


# The machine


def test_the_facts_name_versions_and_machine_but_no_user_host_or_folder():
    facts = environment_facts()
    assert facts["Python"] == platform.python_version() and facts["pandas"] == pd.__version__
    assert {"soteria", "torch", "commit", "system", "processor", "cores", "GPUs"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
    words = set(re.split(r"[\s,]+", "\n".join(facts.values())))
    assert not words & {getpass.getuser(), platform.node(), platform.release()}
    assert not any(word.startswith("/") for word in words)


def test_the_commit_is_named_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert environment_facts()["commit"] == "unknown"
    git("init")
    assert environment_facts()["commit"] == "unknown"
    files.write_text(tmp_path / "a", "a")
    git("add", "a")
    git("commit", "-m", "a")
    assert environment_facts()["commit"] == git("rev-parse", "HEAD")
    files.write_text(tmp_path / "a", "b")
    assert environment_facts()["commit"] == git("rev-parse", "HEAD") + " with uncommitted changes"
    (tmp_path / "within").mkdir()
    monkeypatch.setattr(paths, "ROOT", tmp_path / "within")  # an archive unpacked in another repository
    assert environment_facts()["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment_facts()["commit"] == "unknown"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium, or a skipped test; a failed one in CI, where nothing may be skipped."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(f"no browser, none of {', '.join(BROWSERS)}: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path) -> Iterator[Callable]:
    """`show(html, width, **options of a browser context)`: the page, opened from a file.

    On it, `requests` are the addresses that it asked for, and `complaints` what it said on the console.
    """
    contexts = []

    def open_page(html: str, width: int = 1280, **options):
        path = tmp_path / "report.html"
        files.write_text(path, html)
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(path.as_uri(), wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_the_page_loads_and_runs_nothing_even_where_markup_slips_in(show, picture):
    page = show(everywhere(HOSTILE, picture))
    itself, *others = [address for address in page.requests if not address.startswith("data:")]
    assert itself == page.url and others == [] and page.complaints == []
    assert page.evaluate("[window.hacked, document.scripts.length]") == [None, 0]
    assert page.title() == page.locator("h1").inner_text() == HOSTILE
    slipped = "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/a.png'>"
    slipped += "<link rel=stylesheet href='http://127.0.0.1:9/a.css'><iframe src='http://127.0.0.1:9/a.html'></iframe>"
    html = some_report(picture).replace("<main>", f"<main>{slipped}")
    page = show(html)
    assert page.evaluate("window.hacked") is None and len(page.complaints) >= 4
    assert all("Content Security Policy" in complaint for complaint in page.complaints)
    # Without the policy it would have run.
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert show(policy.sub("", html)).evaluate("window.hacked") == 1


def test_the_report_that_a_grid_writes_opens_with_its_tables_and_pictures(show, tmp_path):
    """Of a grid that was not run: all its numbers are blank, and its tables are there."""
    grid_file = tmp_path / "small.yaml"
    files.write_text(
        grid_file,
        "name: small\nmodels: [{base: some/base, tuned: some/tuned}]\nlanguages: [hi, th]\nprompt_sets: [policy]\n"
        "scaling_factor: 2\nablations: {shares: [0.25, 0.5, 1], bottom: true, scaling_factors: [1], transfer: true}\n",
    )
    found = write_up.compose(read_grid(grid_file), tmp_path / "results")
    output.write_grid(found.grid, grid_file, found.results)
    html = paths.report_file(found.results).read_text(encoding="utf-8")
    page = show(html, 375)
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator("table").count() == len(found.tables) == 6
    assert page.locator("img").count() == len(found.pictures) >= 4
    assert "cells were not run yet" in page.inner_text("body")


def test_the_page_fits_every_screen_and_shows_pictures_whole(show, picture):
    for html in (some_report(picture), everywhere("a_word_without_a_break" * 30, picture)):
        page = show(html)
        for width in (320, 375, 768, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for box in (shown.bounding_box() for shown in page.locator("img").all()):
                assert box["x"] >= 0 and box["x"] + box["width"] <= width
                assert box["width"] / box["height"] == pytest.approx(2600 / 400, rel=0.02)


def test_on_a_phone_a_wide_table_scrolls_and_the_names_of_its_rows_stay(show, picture):
    page = show(some_report(picture), 375)
    box = page.locator(".scroll").first
    hidden = box.evaluate("box => box.scrollWidth - box.clientWidth")
    first = box.locator("tbody tr").nth(1).locator("td").first
    before = first.bounding_box()
    box.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    assert hidden > 200 and box.evaluate("box => box.scrollLeft") == pytest.approx(hidden, abs=2)
    assert first.inner_text() == "English" and before["width"] < 0.45 * 375
    assert first.bounding_box()["x"] == pytest.approx(before["x"], abs=1)
    caption = page.locator("figcaption").first.bounding_box()
    assert caption["x"] >= 0 and caption["x"] + caption["width"] <= 375


def test_every_part_is_in_the_contents_and_its_link_leads_there(show, picture):
    page = show(some_report(picture))
    names = page.locator("nav a").all_inner_texts()
    assert names == page.locator("main h2").all_inner_texts()
    assert names[0] == "Attack success rate" and names[5:] == ["Not run", "Grid", "Commands", "Environment"]
    for place, link in enumerate(page.locator("nav a").all()):
        link.click()
        top = page.locator("main h2").nth(place).bounding_box()["y"]
        at_the_end = page.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
        assert 0 <= top < (800 if at_the_end else 60)


def test_numbers_are_aligned_right_blank_cells_are_hatched_and_others_are_not(show):
    table = pd.DataFrame({"name": ["a", ""], "ASR": ["1.1%", ""], "word": ["c", "dd"]})
    page = show(render_report("t", [], [Section("s", table=table)], {}, "", [], []))
    style = "cells => cells.map(cell => [getComputedStyle(cell).textAlign, getComputedStyle(cell).backgroundImage])"
    (_, _), (number, plain), (word, _), (_, named), (_, blank), _ = page.locator("td").evaluate_all(style)
    assert (number, word) == ("right", "left")
    assert (plain, named) == ("none", "none") and "gradient" in blank


def test_on_a_narrow_screen_intervals_go_below_their_numbers_and_no_column_is_hidden(show):
    names = ["base", "language-specific", "tier-shared", "universal", "language-specific − base", "universal − base"]
    row = (
        {"language": "English", "tier": "High"}
        | dict.fromkeys(names[:4], CHANGE)
        | dict.fromkeys(names[4:], f"-1{CHANGE}")
    )
    page = show(render_report("t", [], [Section("s", table=pd.DataFrame([row]))], {}, "", [], []), width=1000)
    assert page.locator(".scroll").evaluate("box => box.scrollWidth <= box.clientWidth")


CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(rgb(getComputedStyle(document.body).backgroundColor));
  return [page, ...Array.from(document.querySelectorAll('h1, h2, p, li, a, figcaption, th, td, dt, dd, code'), e => {
    const pair = [light(rgb(getComputedStyle(e).color)), page].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  })];
}"""


def test_text_is_readable_in_light_and_dark_and_pictures_are_on_white(show, picture):
    for scheme in ("light", "dark"):
        page = show(some_report(picture), color_scheme=scheme)
        ground, *contrasts = page.evaluate(CONTRAST)
        assert min(contrasts) >= 4.5  # what WCAG asks of small text
        assert (ground > 0.5) == (scheme == "light")
        behind = page.locator("img").first.evaluate("image => getComputedStyle(image).backgroundColor")
        assert behind == "rgb(255, 255, 255)"


def test_printed_pages_cut_off_no_table_picture_or_command(show, picture, tmp_path):
    plt.imsave(tmp_path / "tall.png", np.zeros((4000, 800)))
    tall = Section("s", picture=tmp_path / "tall.png")
    for html in (some_report(picture), render_report("t", [], [tall], {}, "", [], [])):
        page = show(html, PRINTED_WIDTH, color_scheme="dark")
        page.emulate_media(media="print")
        right = "elements => Math.max(...elements.map(element => element.getBoundingClientRect().right))"
        assert page.locator("table, th, td, img, code, p").evaluate_all(right) <= PRINTED_WIDTH + 1
        over = "elements => elements.filter(element => element.scrollWidth > element.clientWidth + 1).length"
        assert page.locator(".scroll, pre, main").evaluate_all(over) == 0
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("img").last.bounding_box()["height"] < 261 / 25.4 * 96  # between margins of 18 mm
        sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", page.pdf(prefer_css_page_size=True))
        assert {tuple(round(float(side)) for side in size) for size in sizes} == {(595, 842)}
