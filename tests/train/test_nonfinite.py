"""The report of a step that went wrong says where."""

import json

import pytest
import torch
from torch import nn

from nibble.data.chat import Example
from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.train.nonfinite import REPORT_FILE, write_report


class Model(nn.Module):
    """Two trained values and a frozen one; the loss is their product."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.b = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def token_loss(self, batch):
        return (self.a * self.b * self.frozen).sum(), batch.num_target_tokens


def _batches():
    rows = pack([Example([1, 2, 3], [1, 2, 3], "", 0)] * 3, max_seq_len=4, packing=False)
    return [rows_to_batch(rows, [0, 1]), rows_to_batch(rows, [2])]


def _report(tmp_path, model):
    path = write_report(
        tmp_path, model, model.token_loss, _batches(), step=7, reason="the loss is nan"
    )
    assert path == tmp_path / REPORT_FILE
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_rows_and_norms_of_every_pass(tmp_path):
    report = _report(tmp_path, Model())
    assert (report["step"], report["reason"]) == (7, "the loss is nan")
    assert [each["rows"] for each in report["passes"]] == [[0, 1], [2]]
    first = report["passes"][0]
    assert first["modules"]["a"] == {
        "norm": pytest.approx(13**0.5),
        "num_not_finite": 0,
        "grad_norm": pytest.approx(2**0.5),
        "grad_num_not_finite": 0,
    }
    assert "frozen" not in first["modules"]


def test_what_is_no_number_is_named(tmp_path):
    model = Model()
    model.b.data[1] = torch.nan
    first = _report(tmp_path, model)["passes"][0]
    assert first["loss"] == "nan"
    assert first["modules"]["b"]["num_not_finite"] == 1
    assert first["modules"]["a"]["grad_num_not_finite"] == 1
    assert first["modules"]["a"]["grad_norm"] == "nan"
    assert first["modules"]["b"]["grad_num_not_finite"] == 0


def test_gradients_of_earlier_passes_do_not_count(tmp_path):
    model = Model()
    model.a.grad = torch.full((2,), torch.inf)
    report = _report(tmp_path, model)
    assert {each["modules"]["a"]["grad_num_not_finite"] for each in report["passes"]} == {0}
