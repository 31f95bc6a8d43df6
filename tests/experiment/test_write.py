"""The files of a report."""

import json

import pytest

from nibble.errors import DiskError
from nibble.experiment import plots, write


def test_all_files_are_written_and_written_again(report_of, tmp_path):
    for _ in range(2):
        page = write.write_report(report_of(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "report.json", "report.md", "report.html", "loss.png", "memory.png", "speed.png",
    }  # fmt: skip
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["version"] == 1
    assert values["answer"] == " ".join(page.answer)
    assert values["facts"]["model"] == "some/model"
    assert values["notes"] == list(page.notes)
    assert values["summary"]["Memory"]["lora"] == page.summary.rows[2][1]
    assert page.answer[0] in (tmp_path / "report.md").read_text()
    assert page.answer[0] in (tmp_path / "report.html").read_text()


def test_without_matplotlib_the_report_says_so(report_of, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    monkeypatch.setattr(write, "has_matplotlib", lambda: False)
    page = write.write_report(report_of(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html"}
    assert 'pip install "nibble[plot]"' in page.notes[-1]
    assert "data:image/png" not in (tmp_path / "report.html").read_text()


def test_a_folder_that_is_gone_is_a_disk_error(report_of, tmp_path):
    with pytest.raises(DiskError, match="the report cannot be written"):
        write.write_report(report_of(), tmp_path / "none")
