"""The tracker on real tensors, against bytes and operations that are known by hand."""

import pytest
import torch
import torch.nn.functional as F

from nibble.kernels.target import host_empty
from nibble.plan.tracker import MOST_EXPERTS, WORKING, MemoryTracker, Operation, Peak

KB = 1000  # 250 float32 values


def values(kilobytes=1):
    return torch.ones(250 * kilobytes)


def counted(tracker, kind):
    """The operations of one kind, over all phases, without their bytes."""
    return [
        (operation.flops, times)
        for work in tracker.work.values()
        for operation, times in work.items()
        if operation.kind == kind
    ]


class TestMemory:
    def test_live_bytes_and_the_peak_of_a_small_computation(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            a = values(4)
            b = a * 2
            assert tracker.total == 8 * KB
            del b
            assert tracker.total == 4 * KB
            c = a.exp().sum()  # the exponentials live until they are summed
            assert tracker.total == 4 * KB + 4
        assert tracker.peaks == {"step": Peak(8 * KB + 4, {WORKING: 8 * KB + 4})}
        del a, c
        assert tracker.total == 0

    def test_a_view_costs_nothing_and_keeps_its_storage_alive(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            a = values(4)
            part = a.view(10, 100)[3:].T.unsqueeze(0)
            assert tracker.total == 4 * KB
            del a
            assert tracker.total == 4 * KB
            del part
            assert tracker.total == 0

    def test_work_in_place_costs_nothing(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            a = values()
            a.mul_(2).add_(a)
        assert tracker.peaks["step"].bytes == KB

    def test_what_was_there_before_is_not_counted_until_it_is_named(self):
        before = values()
        with MemoryTracker() as tracker:
            tracker.begin("step")
            assert tracker.total == 0
            tracker.name([before, before.view(10, 25)], "weights")
            assert tracker.live == {WORKING: 0, "weights": KB}

    def test_several_outputs_are_counted_one_by_one(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            values, indices = torch.sort(torch.ones(100))
            assert tracker.live[WORKING] == 400 + 800
        del values, indices

    def test_saved_activations_live_until_backward(self):
        weight = torch.ones(250, requires_grad=True)
        with MemoryTracker() as tracker:
            tracker.begin("forward")
            loss = weight.exp().exp().sum()
            assert tracker.total == 2 * KB + 4  # both results of exp
            tracker.begin("backward")
            loss.backward()
        assert weight.grad is not None
        del loss
        assert tracker.total == KB  # the gradient

    def test_each_phase_starts_from_what_is_alive(self):
        with MemoryTracker() as tracker:
            tracker.begin("first")
            a = values(2)
            b = values(3)
            del b
            tracker.begin("second")
            c = values(1)
        assert [peak.bytes for peak in tracker.peaks.values()] == [5 * KB, 3 * KB]
        assert list(tracker.peaks) == ["first", "second"]
        del a, c

    def test_a_phase_that_comes_again_keeps_its_highest_peak(self):
        with MemoryTracker() as tracker:
            for phase, size in (("a", 3), ("b", 1), ("a", 2)):
                tracker.begin(phase)
                kept = values(size)
                del kept
        assert {phase: peak.bytes for phase, peak in tracker.peaks.items()} == {
            "a": 3 * KB,
            "b": KB,
        }

    @pytest.mark.parametrize(("num_values", "expected"), [(1, 512), (128, 512), (129, 1024)])
    def test_storages_are_rounded_up(self, num_values, expected):
        with MemoryTracker(granularity=512) as tracker:
            tracker.begin("step")
            a = torch.empty(num_values)
            assert tracker.total == expected
            del a
            assert tracker.total == 0


class TestLabels:
    def test_settle_labels_what_was_allocated_since_and_is_still_alive(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            a, b = values(2), values(3)
            del b
            tracker.settle("saved")
            c = values(4)
            assert tracker.live == {"saved": 2 * KB, WORKING: 4 * KB}
            tracker.settle("saved")
            assert tracker.live == {"saved": 6 * KB, WORKING: 0}
        del a, c

    def test_a_name_outlasts_a_later_settling(self):
        with MemoryTracker() as tracker:
            tracker.begin("step", "weights")
            a = values(2)
            tracker.settle("weights")
            tracker.begin("step")
            tracker.name([a], "trained")
            b = values(1)
            tracker.settle("saved")
            assert tracker.live == {"weights": 0, "trained": 2 * KB, WORKING: 0, "saved": KB}
        del b

    def test_the_peak_tells_what_it_was_for(self):
        with MemoryTracker() as tracker:
            tracker.begin("step", "weights")
            a = values(2)
            tracker.label = "logits"
            b = values(3)
            del b
        assert tracker.peaks["step"] == Peak(5 * KB, {"weights": 2 * KB, "logits": 3 * KB})
        del a


class TestHost:
    def test_host_memory_is_counted_apart(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            page = host_empty(250, dtype=torch.float32)
            on_device = values(2)
            assert (tracker.host_bytes, tracker.total) == (KB, 2 * KB)
            assert "host" not in tracker.live
            del page
            assert (tracker.host_bytes, tracker.host_peak) == (0, KB)
        assert tracker.peaks["step"].bytes == 2 * KB
        del on_device

    def test_host_memory_keeps_its_place_whatever_it_is_called(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            page = host_empty(250, dtype=torch.float32)
            tracker.name([page], "weights")
            tracker.settle("saved")
            assert (tracker.host_bytes, tracker.total) == (KB, 0)

    def test_a_copy_to_the_host_is_no_device_memory(self):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            a = values()
            page = host_empty(250, dtype=torch.float32).copy_(a)
            assert (tracker.host_bytes, tracker.total) == (KB, KB)
        del page


def test_scratch_raises_the_peak_and_leaves_nothing():
    with MemoryTracker() as tracker:
        tracker.begin("step")
        a = values(2)
        tracker.count_scratch(5 * KB)
        assert tracker.total == 2 * KB
    assert tracker.peaks["step"] == Peak(7 * KB, {WORKING: 7 * KB})
    del a


def test_an_answer_replaces_the_operation():
    answers = {"aten::exp": torch.zeros(250)}
    tracker = MemoryTracker(intercept=lambda func, args, kwargs: answers.get(func._schema.name))
    a = values()
    with tracker:
        tracker.begin("step")
        assert a.exp() is answers["aten::exp"]
        assert float(a.neg()[0]) == -1.0


class TestOperations:
    def test_a_product_takes_two_operations_for_each_multiplication(self):
        m, n, k = 3, 5, 7
        with MemoryTracker() as tracker:
            tracker.begin("step")
            torch.ones(m, k) @ torch.ones(k, n)
        assert counted(tracker, "product") == [(2 * m * n * k, 1)]
        num_bytes = 4 * (m * k + k * n + m * n)
        assert tracker.work["step"][Operation("product", 2 * m * n * k, num_bytes)] == 1

    @pytest.mark.parametrize(
        ("product", "flops"),
        [
            (lambda: F.linear(torch.ones(3, 7), torch.ones(5, 7)), 2 * 3 * 5 * 7),
            (lambda: F.linear(torch.ones(3, 7), torch.ones(5, 7), torch.ones(5)), 2 * 3 * 5 * 7),
            (lambda: torch.bmm(torch.ones(4, 3, 7), torch.ones(4, 7, 5)), 4 * 2 * 3 * 5 * 7),
            (
                lambda: torch.baddbmm(
                    torch.ones(4, 3, 5), torch.ones(4, 3, 7), torch.ones(4, 7, 5)
                ),
                4 * 2 * 3 * 5 * 7,
            ),
            (lambda: torch.ones(3, 5).addmm_(torch.ones(3, 7), torch.ones(7, 5)), 2 * 3 * 5 * 7),
        ],
    )
    def test_every_kind_of_product(self, product, flops):
        with MemoryTracker() as tracker:
            tracker.begin("step")
            product()
        assert counted(tracker, "product") == [(flops, 1)]

    def test_equal_operations_are_counted_together(self):
        a = torch.ones(4, 4)
        with MemoryTracker() as tracker:
            tracker.begin("step")
            for _ in range(3):
                a @ a
        assert counted(tracker, "product") == [(2 * 4**3, 3)]

    def test_causal_attention_is_half_of_two_products_and_of_five_in_backward(self):
        batch, heads, length, width = 1, 2, 16, 8
        q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
        with MemoryTracker() as tracker:
            tracker.begin("forward")
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            tracker.begin("backward")
            out.sum().backward()
        product = 2 * batch * heads * length * length * width
        forward, backward = (
            [op.flops for op in tracker.work[phase] if op.kind == "attention"]
            for phase in ("forward", "backward")
        )
        assert (forward, backward) == ([2 * product // 2], [5 * product // 2])

    def test_other_operations_are_what_they_read_and_write(self):
        a = values()
        with MemoryTracker() as tracker:
            tracker.begin("step")
            a * a
        assert tracker.work["step"] == {Operation("other", 0, 3 * KB): 1}

    def test_views_and_empty_memory_are_no_work(self):
        a = values()
        with MemoryTracker() as tracker:
            tracker.begin("step")
            torch.empty(100)
            a.view(10, 25).T.unsqueeze(0).expand(3, -1, -1).detach()
        assert not tracker.work["step"]

    @pytest.mark.parametrize(("num_parts", "times"), [(1, 1), (7, 1), (8, 1), (64, 8), (128, 16)])
    def test_a_kernel_of_many_parts_stands_for_several(self, num_parts, times):
        tracker = MemoryTracker()
        tracker.begin("step")
        tracker.count_kernel("decode", 0, 1000, num_parts)
        assert tracker.work["step"] == {Operation("decode", 0, 1000): times}
        assert times == max(1, num_parts // MOST_EXPERTS)
