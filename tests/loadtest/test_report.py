"""A report has every figure in JSON, and in a page that needs nothing from anywhere."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="requirements/loadtest.txt is not installed")

from loadtest.report import as_html, as_json, write_report
from loadtest.result import Sweep
from tests.support.outcomes import failed, holding, late, point, sweep


@pytest.fixture
def found() -> Sweep:
    dead = point(4.0, [failed()] * 3)
    return sweep(**{"mixed": [holding(2.0), late(4.0)], "a <b>": [holding(2.0), dead]})


def test_json_has_all_and_no_nan(found: Sweep, tmp_path: Path) -> None:
    write_report(found, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read == as_json(found)
    mixed, other = read["results"]
    assert (mixed["name"], mixed["best_rps"], other["best_rps"]) == ("mixed", 2.0, 2.0)
    assert read["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert mixed["points"][0]["ttft"]["p50_s"] == 0.5
    assert len(mixed["points"][0]["ttft"]["cdf_s"]) == 101
    assert other["points"][1]["ttft"]["p50_s"] is None
    assert other["points"][1]["errors"] == {"HTTP 503: busy": 3}
    assert read["verdict"].startswith("No winner")


def test_page_stands_alone_and_escapes(found: Sweep) -> None:
    page = as_html(found)
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert "a <b>" not in page
    assert "one that &lt;counts&gt;" in page
    assert "3 × HTTP 503: busy" in page


def test_pictures_are_whole_and_the_same_for_the_same_figures(found: Sweep) -> None:
    pictures = re.findall(r"<svg.*?</svg>", as_html(found), re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        assert "nan" not in ElementTree.fromstring(picture).get("viewBox", "")
    assert pictures == re.findall(r"<svg.*?</svg>", as_html(found), re.DOTALL)


def test_no_stages_told_is_no_picture_of_them() -> None:
    page = as_html(sweep(endpoint=[point(1.0, [failed()])]))
    assert page.count("<svg") == 5
    assert "none told" in page
