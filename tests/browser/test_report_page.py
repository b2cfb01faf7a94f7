"""The page as a reader meets it: opened from a disk, clicked through, printed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chosen_run import PAIR, make_chosen_run
from PIL import Image
from synthetic_run import BAD_CASE, make_run

from autoseg.report.gallery import SIDE_FOLDER
from autoseg.report.page import write_report

pytestmark = [pytest.mark.slow, pytest.mark.browser]

NUM_CASES = 14
"""More than are shown in pictures, so that some volumes lie beside the page."""

SLOW_MS = 120_000
"""For what WebGL does in software on a busy machine."""


@pytest.fixture(scope="session")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("browser"), num_cases=NUM_CASES))


@dataclass
class Opened:
    """An open page and what it complained about or asked for."""

    page: Any
    troubles: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def rows(self) -> list[list[str]]:
        """Texts of the rows of the table of cases that are to be seen, in their order."""
        texts = "rows => rows.filter(r => !r.hidden).map(r => [...r.cells].map(c => c.innerText.trim()))"
        found: list[list[str]] = self.page.eval_on_selector_all("#case-table tbody tr", texts)
        return found


def open_page(browser: Any, path: Path, **options: Any) -> Opened:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True, **options)
    opened = Opened(context.new_page())
    opened.page.set_default_timeout(SLOW_MS)
    troubles = opened.troubles
    opened.page.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
    opened.page.on("pageerror", lambda error: opened.troubles.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(path.as_uri())
    return opened


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    found = open_page(browser, page_file)
    yield found
    found.page.context.close()


def picture(opened: Opened, selector: str) -> np.ndarray:
    shot = opened.page.locator(selector).screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), np.int16)


def case_in(side_file: Path) -> str:
    """The case whose volumes a side file holds."""
    content: dict[str, Any] = json.loads(side_file.read_text("utf-8").split(",", 1)[1].rsplit(")", 1)[0])
    return str(content["case"])


def wait_for_viewer(opened: Opened, case: str) -> None:
    opened.page.locator("#viewer-note").filter(has_text=f"{case}, ").wait_for()


def test_it_opens_without_errors_and_asks_for_nothing(opened: Opened, page_file: Path) -> None:
    assert opened.page.title() == "Balls <b>& noise</b> – autoseg report"
    # A dot for each of two configurations and each case with each class; one case lacks the second class.
    assert opened.page.locator("#chart-metric a circle").count() == 2 * (NUM_CASES + NUM_CASES - 1)
    assert opened.page.locator(".charts svg, .chart svg").count() >= 5
    opened.page.click(f"#cases a:text-is('{BAD_CASE}') >> nth=0")
    wait_for_viewer(opened, BAD_CASE)
    assert opened.troubles == []
    asked = [url for url in opened.requests if not url.startswith(("data:", "blob:"))]
    assert all(url.startswith(page_file.as_uri()) for url in asked), asked


def test_the_table_sorts_both_ways_by_value(opened: Opened) -> None:
    scores = [float(row[3]) for row in opened.rows()]
    assert scores == sorted(scores)
    opened.page.click("#case-table th:nth-child(4) button")
    assert [float(row[3]) for row in opened.rows()] == sorted(scores, reverse=True)
    opened.page.click("#case-table th:nth-child(1) button")
    names = [row[0] for row in opened.rows()]
    assert names == sorted(names)
    assert opened.page.get_attribute("#case-table th:nth-child(1)", "aria-sort") == "ascending"
    # HD95 of a false alarm is not defined: it is last, whichever way.
    heads = opened.page.locator("#case-table thead th").all_inner_texts()
    column = 1 + next(place for place, text in enumerate(heads) if "HD95" in text and "Posterior" in text)
    for _ in range(2):
        opened.page.click(f"#case-table th:nth-child({column}) button")
        assert opened.rows()[-1][column - 1] == "–"
        assert opened.rows()[0][column - 1] != "–"


def test_filters_narrow_the_table_and_the_downloads(opened: Opened) -> None:
    opened.page.select_option("#configuration", "3d_fullres")
    assert {row[1] for row in opened.rows()} == {"3d_fullres"}
    assert len(opened.rows()) == NUM_CASES
    opened.page.fill("#find", "case_03")
    assert [row[0] for row in opened.rows()] == ["case_03"]
    assert opened.page.inner_text("#count") == f"1 of {2 * NUM_CASES} rows"
    with opened.page.expect_download() as waiting:
        opened.page.click("#download-csv")
    lines = list(csv.DictReader(Path(waiting.value.path()).read_text("utf-8").splitlines()))
    assert [(line["case"], line["configuration"], line["class"]) for line in lines] == [
        ("case_03", "3d_fullres", "Anterior"),
        ("case_03", "3d_fullres", "Posterior"),
    ]
    opened.page.fill("#find", "")
    opened.page.check("#flagged")
    assert {row[0] for row in opened.rows()} == {f"case_{NUM_CASES - 1:02d}"}
    with opened.page.expect_download() as waiting:
        opened.page.click("#download-json")
    (row,) = json.loads(Path(waiting.value.path()).read_text("utf-8"))
    assert [item["presence"] for item in row["classes"]] == ["both", "spurious"]
    opened.page.uncheck("#flagged")
    opened.page.fill("#below", "0.8")
    assert all(float(row[3]) < 0.8 for row in opened.rows())
    assert opened.rows()


def test_a_click_on_a_dot_shows_its_case(opened: Opened) -> None:
    found = opened.page.locator("#case-table tbody tr").filter(has_text="case_05").filter(has_text="3d_fullres")
    row = "#" + found.get_attribute("id")
    dot = opened.page.locator(f"#chart-metric a[*|href='{row}']").nth(1)
    dot.click()
    wait_for_viewer(opened, "case_05")
    assert opened.page.inner_text("#case-title").startswith("case_05")
    assert opened.page.url.endswith(row)
    assert "case_05" in opened.page.inner_text("tr.chosen")
    assert opened.page.locator("#case-figures tbody tr").count() == 2
    opened.page.go_back()
    opened.page.click(f"#short a:text-is('{BAD_CASE}') >> nth=0")
    wait_for_viewer(opened, BAD_CASE)


def test_the_viewer_draws_image_labels_and_errors(opened: Opened) -> None:
    opened.page.click(f"#cases a:text-is('{BAD_CASE}') >> nth=0")
    wait_for_viewer(opened, BAD_CASE)

    def coloured() -> dict[str, int]:
        pixels = picture(opened, "#canvas")
        red, green, blue = np.moveaxis(pixels, -1, 0)
        return {
            "grey": int(((np.abs(red - green) < 8) & (np.abs(green - blue) < 8) & (red > 40)).sum()),
            "anterior": int(((blue > red + 60) & (blue > green + 10) & (green > red + 30)).sum()),
            "missed": int(((red > green + 60) & (red > blue + 60)).sum()),
        }

    def with_layers(*names: str) -> dict[str, int]:
        for name in ("reference", "prediction", "error"):
            opened.page.set_checked(f"input[data-layer={name}]", name in names)
        opened.page.wait_for_timeout(300)
        return coloured()

    bare, predicted, wrong = with_layers(), with_layers("prediction"), with_layers("error")
    assert bare["grey"] > 20_000
    assert predicted["anterior"] > bare["anterior"] + 1_000
    assert wrong["missed"] > bare["missed"] + 1_000
    with_layers("prediction")
    opened.page.check("input[value=RENDER]")
    opened.page.wait_for_timeout(500)
    assert coloured()["anterior"] > 500


def test_volumes_beside_the_page_are_read_from_a_disk(opened: Opened, page_file: Path) -> None:
    beside = sorted((page_file.parent / SIDE_FOLDER).glob("*.js"))
    assert beside
    case = case_in(beside[0])
    assert opened.page.locator(f"#volumes-{beside[0].stem}").count() == 0
    opened.page.click(f"#cases a:text-is('{case}') >> nth=0")
    wait_for_viewer(opened, case)
    assert picture(opened, "#canvas").max() > 100
    assert opened.troubles == []


def test_a_side_file_that_is_gone_is_told(browser: Any, page_file: Path, tmp_path: Path) -> None:
    alone = tmp_path / "index.html"
    alone.write_bytes(page_file.read_bytes())
    gone = next((page_file.parent / SIDE_FOLDER).glob("*.js"))
    case = case_in(gone)
    opened = open_page(browser, alone)
    opened.page.click(f"#cases a:text-is('{case}') >> nth=0")
    told = opened.page.wait_for_selector("#stage p:has-text('is not beside this page')")
    assert f"{gone.name} is not beside this page" in told.inner_text()
    opened.page.context.close()


def test_the_print_view_is_whole(opened: Opened) -> None:
    opened.page.fill("#find", "case_03")  # what is filtered on the screen is still printed
    opened.page.emulate_media(media="print")
    opened.page.set_viewport_size({"width": 760, "height": 1000})
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.locator("#case-table tbody tr:visible").count() == 2 * NUM_CASES
    assert opened.page.locator("nav, .tools, #viewer").filter(visible=True).count() == 0
    assert opened.page.locator("details:not([open])").count() == 0
    sections = "short classes configurations cases pictures agreement training data plan method"
    for section in sections.split():
        assert opened.page.locator(f"#{section} > h2").is_visible(), section
    scrolls = "boxes => boxes.filter(b => getComputedStyle(b).overflowY !== 'visible').length"
    assert opened.page.eval_on_selector_all(".scroll", scrolls) == 0
    assert opened.page.pdf(format="A4")[:5] == b"%PDF-"
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.locator("details[open]").count() == 0


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    opened = open_page(browser, page_file, color_scheme=scheme)
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.page.evaluate("document.querySelector('h1').textContent = 'A_data_set_with_a_name_of_one_very_long_word'")
    long = "new Option('a_case_with_a_name_of_some_length, 3d_fullres + 2d, post-processed, Dice 0.123')"
    opened.page.evaluate(f"document.getElementById('case-choice').append({long})")
    opened.page.wait_for_timeout(400)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    ink, back = (
        [int(part) for part in opened.page.evaluate(f"getComputedStyle(document.body).{name}")[4:-1].split(",")]
        for name in ("color", "backgroundColor")
    )
    assert (sum(ink) > sum(back)) == (scheme == "dark")
    assert opened.troubles == []
    opened.page.context.close()


def test_the_cases_of_what_was_chosen_come_first(browser: Any, tmp_path: Path) -> None:
    opened = open_page(browser, write_report(make_chosen_run(tmp_path, 4)))
    assert {row[1] for row in opened.rows()} == {PAIR}
    assert PAIR in opened.page.inner_text("#case-title")
    # From case to case, and not to another configuration of the same case.
    for row in opened.rows()[1:3]:
        opened.page.click("#next-case")
        title = opened.page.locator("#case-title").filter(has_text=row[0])
        title.wait_for()
        assert PAIR in title.inner_text()
    opened.page.select_option("#configuration", "")
    assert {f"{PAIR}, post-processed", PAIR} < {row[1] for row in opened.rows()}
    assert opened.troubles == []
    opened.page.context.close()


def test_it_can_be_used_by_keyboard(opened: Opened) -> None:
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.innerText") == "To the content"
    opened.page.focus("#case-table th:nth-child(1) button")
    opened.page.keyboard.press("Enter")
    assert opened.page.get_attribute("#case-table th:nth-child(1)", "aria-sort") == "ascending"
    opened.page.focus("#case-table tbody tr:nth-child(3) a")
    opened.page.keyboard.press("Enter")
    wait_for_viewer(opened, opened.rows()[2][0])
    # Hundreds of dots are not in the way of the Tab key, and every control has a name.
    assert opened.page.locator("#chart-metric a:not([tabindex='-1'])").count() == 0
    has_no_name = "i => !(i.innerText || i.getAttribute('aria-label') || i.labels?.length)"
    nameless = f"items => items.filter({has_no_name}).map(i => i.outerHTML)"
    assert opened.page.eval_on_selector_all("button, input, select, canvas, svg[role=img]", nameless) == []


def test_numbers_are_there_without_scripts(browser: Any, page_file: Path) -> None:
    opened = open_page(browser, page_file, java_script_enabled=False)
    text = opened.page.locator("#case-table").inner_text()
    assert BAD_CASE in text
    assert opened.page.locator("noscript").count() == 1
    opened.page.context.close()
