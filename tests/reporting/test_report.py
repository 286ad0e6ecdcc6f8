"""The report: it shows what it was given, loads and runs nothing, and can be read on a screen, a phone and paper."""

import getpass
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from soteria.errors import UserError
from soteria.grid.grid_file import read_grid
from soteria.languages import PAPER_LANGUAGES
from soteria.reporting import write_up
from soteria.reporting.report import Section, environment_facts, render_report
from soteria.storage import files, paths

NAMES = [language.name for language in PAPER_LANGUAGES]
HEADS = ["top heads", "random heads", "bottom heads", "all heads", "base"]
CHANGE = "28.1% [20%, 38%] → 11.8% [9%, 14%]"
HOSTILE = """<script>window.hacked = 1</script>"><img src=x onerror='window.hacked = 1'>{{ 7 * 7 }}&amp;"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PRINTED_WIDTH = 680  # CSS pixels of an A4 page between margins of 15 mm


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """2600 × 400 points: wider than any screen that the page is shown on."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    plt.imsave(path, np.linspace(0, 1, 400 * 2600).reshape(400, 2600))
    return path


def matrix() -> pd.DataFrame:
    table = pd.DataFrame(np.arange(144).reshape(12, 12) / 144, index=NAMES, columns=NAMES)
    table.iloc[3, 4] = np.nan
    return table


def long_table() -> pd.DataFrame:
    """Sixty rows, wider than a phone."""
    rows = [{"language": name, "heads": heads, "ASR": CHANGE, "questions": 96} for name in NAMES for heads in HEADS]
    return pd.DataFrame(rows).assign(**{f"rate {i}": "0.5% → 12.7%" for i in range(6)})


def answers_table() -> pd.DataFrame:
    answers = ["مرحبا بالعالم", "สวัสดีชาวโลก " * 9, "नमस्ते दुनिया", "你好" * 60, "x" * 300, HOSTILE]
    return pd.DataFrame({"model": [f"an-organisation/a-model-{i}" for i in range(6)], "answer": answers})


def some_report(picture: Path, **changes) -> str:
    sections = [
        Section("Attack success rate", "Judged by a proxy.\n\nTwice.", long_table(), "Sixty rows.", files=("a/b.csv",)),
        Section("Overlap", table=matrix(), picture=picture, alt="a matrix"),
        Section("Effects", picture=picture, caption="Effects of heads.", alt="maps of heads"),
        Section("Answers", table=answers_table()),
        Section("A title of many words that has to be broken into lines on a narrow screen, and " + "long" * 20),
    ]
    parts = {
        "title": "A report",
        "summary": ["ASR falls.", "Damage is small."],
        "sections": sections,
        "facts": {"torch": "2.13.0", "commit": "0" * 40},
        "grid_text": "languages: all # " + "a long comment " * 20,
        "commands": ["bash scripts/demo.sh --all", "python src/make_tables.py " + "--language Hindi " * 20],
        "not_run": ["Llama: no GPU."],
    }
    return render_report(**parts | changes)


def with_table(table: pd.DataFrame) -> str:
    return render_report("t", [], [Section("s", table=table)], {}, "", [], [])


class Reader(HTMLParser):
    """A page's elements with their attributes, the cells of its tables, and all its text but the style's."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.rows, self.texts, self._open, self._cell = [], [], [], [], False
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
            self.rows[-1][-1] += data
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.texts)


# What the page holds


def test_the_same_input_gives_the_same_bytes(picture):
    assert some_report(picture) == some_report(picture)


def test_cells_are_text_as_given_and_an_index_of_names_is_the_first_column():
    rows = Reader(with_table(matrix().iloc[:2, :2])).rows
    assert rows == [["", "English", "Spanish"], ["English", "0.0000", "0.0069"], ["Spanish", "0.0833", "0.0903"]]
    assert Reader(with_table(long_table())).rows[1:] == long_table().astype(str).to_numpy().tolist()
    named = pd.DataFrame({"English": ["1.2 (+0.0031)"]}, index=pd.RangeIndex(1, 2, name="rank"))
    assert Reader(with_table(named)).rows == [["rank", "English"], ["1", "1.2 (+0.0031)"]]


def test_columns_of_one_name_and_an_index_of_several_levels_are_all_shown():
    table = pd.DataFrame([[1, 2]], columns=["a", "a"], index=pd.MultiIndex.from_tuples([("x", "y")], names=["a", None]))
    assert Reader(with_table(table)).rows == [["a", "", "a", "a"], ["x", "y", "1", "2"]]


@pytest.mark.parametrize("table", [pd.DataFrame(), pd.DataFrame({"a": [], "b": []}), pd.DataFrame(index=[0, 1])])
def test_a_table_without_cells_is_no_error(table):
    assert "Table 1." in with_table(table)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.5, 0.25, 1.0], ["0.50", "0.25", "1.00"]),
        ([96.0, np.nan, 12.0], ["96", "", "12"]),
        ([1 / 3, 0.5], ["0.3333", "0.5000"]),
        ([0.25, 1.5e-8, -2e-4, 0.0], ["0.25", "1.5e-08", "-2.0e-04", "0.00"]),
        (np.array([0.5, 0.125], np.float32), ["0.500", "0.125"]),
        ([1, 1152], ["1", "1152"]),
        ([float("inf"), 0.5], ["inf", "0.5"]),
    ],
)
def test_floats_have_as_many_decimals_as_their_column_needs_and_four_at_most(values, texts):
    assert [row[1] for row in Reader(with_table(pd.DataFrame({"a": "x", "b": values}))).rows[1:]] == texts


def test_missing_numbers_are_empty_cells_that_say_so_and_are_counted():
    table = pd.DataFrame({"heads": ["top", "", "all"], "ASR": ["1%", "", "2%"], "KL": [0.1, None, np.nan]})
    page = Reader(with_table(table))
    # The empty name is no number.
    assert [cell["title"] for cell in page.all("td") if "title" in cell] == ["not run"] * 3
    assert page.rows[1:] == [["top", "1%", "0.1"], ["", "", ""], ["all", "2%", ""]]
    assert "3 empty cells were not run." in page.text
    assert "1 empty cell was not run." in Reader(with_table(table[["heads", "ASR"]])).text
    assert "not run." not in Reader(with_table(table[["heads"]])).text
    assert "2 empty cells were not run." in Reader(with_table(pd.DataFrame({"heads": ["a", "b"], "KL": ["", ""]}))).text


@pytest.mark.parametrize("text", ["96", "0.024", "1.5e-08", "100% → 97.6%", CHANGE, "+1.2 ± 0.3", "< 0.001", "−0.4"])
def test_columns_of_numbers_are_set_apart_from_text(text):
    cells = Reader(with_table(pd.DataFrame({"a": ["x", "y"], "b": [text, "–"]}))).all("td")
    assert [cell["class"] for cell in cells] == ["n", "n"]


@pytest.mark.parametrize("text", ["Llama-3.1-8B", "4 heads", "e5", "–", "→", "Hindi"])
def test_columns_of_words_are_not_taken_for_numbers(text):
    cells = Reader(with_table(pd.DataFrame({"a": ["x", "y"], "b": [text, "word"]}))).all("td")
    assert [cell["class"] for cell in cells] == ["", ""]


def test_tables_and_pictures_are_numbered_captioned_and_described(picture):
    page = Reader(some_report(picture))
    labels = re.findall(r"(?:Table|Figure) \d\. [\w ]+", page.text)
    tables = ["Table 1. Sixty rows", "Table 2. Overlap", "Table 3. Answers"]
    assert sorted(labels) == ["Figure 1. Overlap", "Figure 2. Effects of heads", *tables]
    assert [image["alt"] for image in page.all("img")] == ["a matrix", "maps of heads"]
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert {cell.get("scope") for cell in page.all("th")} == {"row", "col"}
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_not_run_is_said(picture):
    assert "Llama: no GPU." in Reader(some_report(picture)).text
    assert "Nothing was left out." in Reader(some_report(picture, not_run=[])).text


def test_a_picture_that_is_no_png_is_refused_by_name(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("<svg onload='alert(1)'/>")
    with pytest.raises(UserError, match=r"picture\.png is not a PNG"):
        render_report("t", [], [Section("s", picture=path)], {}, "", [], [])


def everywhere(text: str, picture: Path) -> str:
    """A report with the text in every place that takes one."""
    cell = text.encode("utf-8", "replace").decode("utf-8")  # pandas takes no other text
    table = pd.DataFrame({cell: [cell, "y"], f"{cell} 2": ["x", cell], "n": ["1", "2"]})
    section = Section(text, text, table, text, picture, text, (text,))
    return render_report(text, [text], [section], {text: text}, text, [text], [text])


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Z"])))  # lines and spaces: a blank line parts paragraphs
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
    assert page.rows[1][:2] == [HOSTILE, "x"]
    assert page.all("img")[0]["alt"] == HOSTILE
    # Title of the page, heading, contents, section, paragraph, caption of picture and table, file, five cells,
    # fact and its name, grid, command, summary, not run.
    assert page.text.count(HOSTILE) >= 18


# The machine


def test_the_facts_name_versions_and_machine_but_no_user_host_or_folder():
    facts = environment_facts()
    assert facts["Python"] == platform.python_version()
    assert facts["pandas"] == pd.__version__
    assert {"soteria", "torch", "commit", "system", "processor", "cores", "GPUs"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
    words = set(re.split(r"[\s,]+", "\n".join(facts.values())))
    assert not words & {getpass.getuser(), platform.node(), platform.release()}
    assert not any(word.startswith("/") for word in words)


def test_the_commit_is_named_and_whether_files_are_other_ones(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert environment_facts()["commit"] == "unknown"
    git("init")
    assert environment_facts()["commit"] == "unknown"
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-m", "a")
    assert environment_facts()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("b")
    assert environment_facts()["commit"] == git("rev-parse", "HEAD") + " with uncommitted changes"
    (tmp_path / "within").mkdir()
    monkeypatch.setattr(paths, "ROOT", tmp_path / "within")  # an archive unpacked in somebody's repository
    assert environment_facts()["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment_facts()["commit"] == "unknown"


# In a browser


def not_here(reason: str) -> None:
    """Skip, but fail where tests have to be whole."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium, ended with this file: as long as playwright runs, asyncio takes this thread for its own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        not_here("no playwright: pip install -r requirements.txt")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        not_here(f"no browser, none of {', '.join(BROWSERS)}: apt-get install chromium")
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
        page.goto(path.as_uri(), wait_until="networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server on this machine; `server.asked` are the paths that it was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    # In threads: a browser opens connections ahead of need, and one that it leaves open would hold up the others.
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_page_asks_for_nothing_but_itself_and_does_not_complain(show, picture):
    page = show(some_report(picture))
    assert page.complaints == []
    itself, *others = [address for address in page.requests if not address.startswith("data:")]
    assert itself == page.url
    assert others == []


def test_the_policy_of_the_page_stops_what_might_have_slipped_in(show, picture, server):
    address = f"http://127.0.0.1:{server.server_port}"
    slipped = f"<script>window.hacked = 1</script><img src='{address}/a.png'><iframe src='{address}/a.html'></iframe>"
    slipped += f"<link rel=stylesheet href='{address}/a.css'><p style='background: url({address}/b.png)'>a</p>"
    html = some_report(picture)
    page = show(html.replace("<main>", f"<main>{slipped}"))
    assert page.evaluate("window.hacked") is None
    assert server.asked == []
    assert len(page.complaints) >= 5  # so a complaint would be heard
    # Without the policy it would all have happened.
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    page = show(policy.sub("", html).replace("<main>", f"<main>{slipped}"))
    assert page.evaluate("window.hacked") == 1
    assert {"/a.png", "/a.css", "/a.html", "/b.png"} <= set(server.asked)


def test_text_that_is_markup_runs_nothing(show, picture):
    page = show(everywhere(HOSTILE, picture))
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.scripts.length") == 0
    assert page.title() == HOSTILE
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.complaints == []


def test_the_report_that_a_grid_writes_opens_with_its_tables_and_pictures(show, tmp_path):
    """Of a grid that was not run: all its numbers are blank, and its tables are there."""
    grid_file = tmp_path / "small.yaml"
    grid_file.write_text(
        "name: small\nmodels: [{base: some/base, tuned: some/tuned}]\nlanguages: all\nprompt_sets: [policy]\n"
        "scaling_factor: 2\nablations: {shares: [0.25, 0.5, 1], bottom: true, scaling_factors: [1], transfer: true}\n"
    )
    found = write_up.compose(read_grid(grid_file), tmp_path / "results")
    page_file = write_up.write(found, grid_file)[-1]
    for width in (375, 1280):
        page = show(page_file.read_text(encoding="utf-8"), width)
        assert [address for address in page.requests if not address.startswith(("file:", "data:"))] == []
        assert page.complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("table").count() == len(found.tables) == 5
        widths = [picture.evaluate("image => image.naturalWidth") for picture in page.locator("img").all()]
        assert len(widths) == len(found.pictures) >= 4 and min(widths) > 500
        assert "cells were not run yet" in page.inner_text("body")


def test_pictures_are_seen_whole(show, picture):
    for width in (375, 1280):
        for shown in show(some_report(picture), width).locator("img").all():
            assert shown.evaluate("image => image.naturalWidth") == 2600
            box = shown.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            assert box["width"] / box["height"] == pytest.approx(2600 / 400, rel=0.02)


@pytest.mark.parametrize("width", [320, 375, 768, 1100, 1280, 1920])
def test_the_page_does_not_scroll_sideways(show, picture, width):
    page = show(some_report(picture), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    hostile = show(everywhere("a_word_without_a_break" * 30, picture), width)
    assert hostile.evaluate("document.documentElement.scrollWidth") <= width


def test_a_wide_table_scrolls_in_its_box_and_the_names_of_its_rows_stay(show, picture):
    page = show(some_report(picture), 375)
    box = page.locator(".scroll").first
    hidden = box.evaluate("box => box.scrollWidth - box.clientWidth")
    assert hidden > 200
    first = box.locator("tbody tr").nth(1).locator("th").first
    before = first.bounding_box()
    box.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    assert box.evaluate("box => box.scrollLeft") == pytest.approx(hidden, abs=2)
    assert first.bounding_box()["x"] == pytest.approx(before["x"], abs=1)
    assert before["width"] < 0.45 * 375
    # On a phone all that names a row stands in one cell.
    assert first.inner_text() == "English"
    assert not box.locator("tbody tr").nth(1).locator("th").nth(1).is_visible()
    assert first.evaluate("cell => getComputedStyle(cell, '::after').content") == '"random heads"'
    # The caption, too, can be read without scrolling.
    caption = box.locator("caption > span").bounding_box()
    assert caption["x"] >= 0 and caption["x"] + caption["width"] <= 375


def test_a_long_caption_does_not_widen_a_narrow_table(show):
    table = pd.DataFrame({"name": ["a"], "asr": ["1.1%"]})
    page = show(render_report("t", [], [Section("s", table=table, caption="many words " * 30)], {}, "", [], []))
    assert page.locator("table").bounding_box()["width"] < 200
    assert page.locator("caption > span").bounding_box()["width"] > 600


def test_on_a_wide_screen_all_columns_of_names_are_seen(show, picture):
    row = show(some_report(picture)).locator("tbody tr").nth(1)
    assert [cell.inner_text() for cell in row.locator("th").all()] == ["English", "random heads"]
    assert all(cell.is_visible() for cell in row.locator("th").all())


@pytest.mark.parametrize("width", [375, 1280])
def test_every_part_is_in_the_contents_and_its_link_leads_there(show, picture, width):
    page = show(some_report(picture), width)
    names = [name.inner_text() for name in page.locator("nav .name").all()]
    headings = "Array.from(document.querySelectorAll('main h2'), h => h.lastChild.textContent)"
    assert names == page.evaluate(headings)
    assert names[0] == "Attack success rate"
    assert names[5:] == ["Not run", "Grid", "Commands", "Environment"]
    for place, link in enumerate(page.locator("nav a").all()):
        link.click()
        top = page.locator("main h2").nth(place).bounding_box()["y"]
        at_the_end = page.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
        assert 0 <= top < (800 if at_the_end else 60)
    assert len(page.requests) == 1


def test_numbers_stand_in_line_at_the_right(show):
    table = pd.DataFrame({"name": ["a", "b"], "asr": ["1.1%", "28.8%"], "word": ["c", "dd"]})
    page = show(with_table(table))
    ends = "cells => cells.map(cell => { const r = document.createRange(); r.selectNodeContents(cell);"
    ends += " const box = r.getBoundingClientRect(); return [box.left, box.right]; })"
    (_, one), (_, two) = page.locator("td:nth-child(2)").evaluate_all(ends)
    assert one == pytest.approx(two, abs=0.1)
    (one, _), (two, _) = page.locator("td:nth-child(3)").evaluate_all(ends)
    assert one == pytest.approx(two, abs=0.1)
    numeric = page.locator("td").first.evaluate("cell => getComputedStyle(cell).fontVariantNumeric")
    assert "tabular-nums" in numeric


CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  return Array.from(document.querySelectorAll('h1, h2, .number, p, li, a, figcaption, th, td, dt, dd, code'), e => {
    const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark_and_pictures_lie_on_white(show, picture, scheme):
    page = show(some_report(picture), color_scheme=scheme)
    assert min(page.evaluate(CONTRAST)) >= 4.5  # what WCAG asks of small text
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 600) == (scheme == "light")
    card = page.locator(".card").first.evaluate("card => getComputedStyle(card).backgroundColor")
    assert card == "rgb(255, 255, 255)"


def test_printed_pages_cut_no_table_picture_or_command(show, picture, tmp_path):
    page = show(some_report(picture), PRINTED_WIDTH, color_scheme="dark")
    page.emulate_media(media="print")
    right = "elements => Math.max(...elements.map(element => element.getBoundingClientRect().right))"
    assert page.locator("table, th, td, img, code, p").evaluate_all(right) <= PRINTED_WIDTH + 1
    over = "elements => elements.filter(element => element.scrollWidth > element.clientWidth + 1).length"
    assert page.locator(".scroll, pre, main").evaluate_all(over) == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("tr").first.evaluate("row => getComputedStyle(row).breakInside") == "avoid"
    pdf = tmp_path / "report.pdf"
    page.pdf(path=str(pdf), prefer_css_page_size=True)
    assert pdf.read_bytes().startswith(b"%PDF")
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf.read_bytes())
    assert len(sizes) > 3
    assert {tuple(round(float(side)) for side in size) for size in sizes} == {(595, 842)}


def test_a_tall_picture_is_printed_on_one_page_in_its_proportions(show, tmp_path):
    path = tmp_path / "tall.png"
    plt.imsave(path, np.zeros((4000, 800)))
    page = show(render_report("t", [], [Section("s", picture=path)], {}, "", [], []), PRINTED_WIDTH)
    page.emulate_media(media="print")
    shown = page.locator("img")
    assert shown.bounding_box()["height"] < 261 / 25.4 * 96  # between margins of 18 mm
    assert shown.evaluate("image => getComputedStyle(image).objectFit") == "contain"


def test_the_page_needs_no_torch():
    program = "import sys, soteria.report; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
