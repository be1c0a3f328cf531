"""Generated sections of result pages, and the pages in docs/results/ themselves."""

import datetime
import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks import (
    compression,
    feedback,
    full_size,
    gallery,
    latency,
    miniature,
    pairs,
    paper,
    precision,
    recipes,
    samplers,
    traffic,
    training,
    words,
    words_resident,
)
from benchmarks.pages import RESULTS, command, empty_page, machine, markers, provenance, table, write_section

PAGE = """# Title

by hand

<!-- generated: a -->
old
<!-- end: a -->

below

<!-- generated: b -->
<!-- end: b -->
"""
MODULES = (
    compression,
    feedback,
    full_size,
    gallery,
    latency,
    miniature,
    pairs,
    paper,
    precision,
    recipes,
    samplers,
    traffic,
    training,
    words,
    words_resident,
)


def test_only_the_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)

    write_section(page, "a", "new\n", "")
    write_section(page, "a", "newer\n", "")

    assert page.read_text() == PAGE.replace("\nold\n", "\n\nnewer\n\n")


def test_a_page_is_created_with_its_folder_and_all_its_sections(tmp_path: Path) -> None:
    page = tmp_path / "results" / "page.md"
    new_page = empty_page("Title", "by hand", "a", "b")

    write_section(page, "b", "second", new_page)
    write_section(page, "a", "first", new_page)

    assert page.read_text() == (
        "# Title\n\nby hand\n\n<!-- generated: a -->\n\nfirst\n\n<!-- end: a -->\n\n"
        "<!-- generated: b -->\n\nsecond\n\n<!-- end: b -->\n"
    )


@pytest.mark.parametrize(
    "broken",
    [
        PAGE.replace("<!-- generated: a -->", ""),
        PAGE.replace("<!-- end: a -->", ""),
        PAGE.replace("<!-- generated: a -->", "<!-- generated: a -->\n<!-- generated: a -->"),
        PAGE.replace("<!-- end: a -->", "<!-- end: a -->\n<!-- end: a -->"),
        PAGE.replace("generated: a", "x").replace("end: a", "generated: a").replace("x", "end: a"),
    ],
    ids=["no beginning", "no end", "two beginnings", "two ends", "end first"],
)
def test_a_page_without_exactly_one_pair_of_markers_is_refused_and_left_unchanged(tmp_path: Path, broken: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(broken)

    with pytest.raises(SystemExit, match=r"page\.md has \d times '<!-- generated: a -->' .* should have each once"):
        write_section(page, "a", "new", "")

    assert page.read_text() == broken
    assert list(tmp_path.iterdir()) == [page]


def test_a_table_has_its_first_column_to_the_left() -> None:
    assert table(["", "x"], [["a", 1], ["b", "2"]]) == "|  | x |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx512_bf16 amx_tile", "with"), ("fpu avx512f", "without")])
def test_the_machine_is_named_in_plain_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr("benchmarks.pages.CPUINFO", cpuinfo)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    assert machine() == f"2 CPU cores (Fast CPU) {expected} bfloat16"


def test_the_command_hides_paths_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--old", "/home/me/old", "--write", "--work=/tmp/x", "--sizes", "one size"])

    expected = "python -m benchmarks.traffic --old PATH --write --work=PATH --sizes 'one size'"
    assert command("traffic") == expected


def test_results_of_a_resumed_benchmark_have_the_date_of_the_last_measurement(tmp_path: Path) -> None:
    stored = tmp_path / "results.jsonl"
    stored.write_text("{}\n")
    noon = datetime.datetime(2020, 5, 17, 12).timestamp()
    os.utime(stored, (noon, noon))

    assert provenance("paper", stored=stored).startswith("2020-05-17, ")
    assert provenance("paper").startswith(f"{datetime.date.today()}, ")


def test_numbers_have_enough_digits_to_show_a_missed_target() -> None:
    assert latency.digits(1.0347, 1.03) == "1.035"
    assert latency.digits(1.0038, 1) == "1.004"
    assert latency.digits(0.000853, 0.03) == "0.000853"
    assert latency.digits(2.5, 2.5) == "2.5"


def test_every_section_that_a_benchmark_writes_has_its_markers_in_its_page() -> None:
    for module in MODULES:
        if module is latency:
            continue  # its page depends on the processor
        content = module.PAGE.read_text()
        for name in re.findall(r"<!-- generated: ([\w-]+) -->", module.NEW_PAGE):
            assert [content.count(marker) for marker in markers(name)] == [1, 1], (module.PAGE, name)
    for page in ("latency.md", "latency-float32.md"):
        content = (RESULTS / page).read_text()
        for name in re.findall(r"<!-- generated: ([\w-]+) -->", latency.NEW_PAGE):
            assert [content.count(marker) for marker in markers(name)] == [1, 1], (page, name)


def test_links_and_pictures_of_the_results_exist() -> None:
    for page in RESULTS.glob("*.md"):
        links = re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_every_page_of_results_is_listed_in_their_table_of_contents() -> None:
    contents = (RESULTS / "README.md").read_text()

    assert [
        page.name for page in RESULTS.glob("*.md") if f"({page.name}" not in contents and page.stem != "README"
    ] == []
