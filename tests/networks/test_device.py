"""The choice of device and number type: what is asked for is honoured, what is wrong or slow is not taken."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg.errors import UsageError
from medseg.networks import device as devices
from medseg.networks.device import Device, choose_device, keep_freed_memory, place, place_batch

CPU = Device(torch.device("cpu"), torch.float32, "test")


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def convolve_double(half_s: float, change=lambda result: result):
    """A stand-in for ``_convolve``: float32 takes 1 s, bfloat16 ``half_s`` and its result is changed."""

    def convolve(x, weight):
        result = [torch.arange(12.0), torch.ones(5), torch.full((3,), 2.0)]
        if x.dtype == torch.float32:
            return result, 1.0
        return [r.bfloat16() for r in change(result)], half_s

    return convolve


def test_float32_asked_for_is_float32_without_a_self_test(no_cuda, monkeypatch):
    monkeypatch.setattr(devices, "_convolve", lambda x, weight: pytest.fail("no test was asked for"))
    chosen = choose_device("cpu", "float32")
    assert (chosen.torch_device.type, chosen.dtype, chosen.half) == ("cpu", torch.float32, False)


def test_float32_asked_for_on_a_gpu_means_all_of_its_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    chosen = choose_device("cuda", "float32")
    assert (chosen.torch_device.type, chosen.dtype) == ("cuda", torch.float32)
    assert not torch.backends.cudnn.allow_tf32


def test_bfloat16_asked_for_is_bfloat16(no_cuda):
    chosen = choose_device("cpu", "bfloat16")
    assert (chosen.dtype, chosen.half) == (torch.bfloat16, True)


def test_cuda_asked_for_and_not_there_is_a_usage_error(no_cuda):
    with pytest.raises(UsageError, match="E0001") as caught:
        choose_device("cuda")
    assert "--device cpu" in str(caught.value)


def test_one_of_several_gpus_is_asked_for_by_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1", "float32").torch_device == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    for name in ("cuda:2", "cuda:x", "cuda:", "tpu"):
        with pytest.raises(UsageError, match="E0001"):
            choose_device(name, "float32")


def test_auto_without_cuda_is_the_cpu(no_cuda):
    assert choose_device("auto", "float32").torch_device.type == "cpu"


def test_cpu_asked_for_is_the_cpu_though_cuda_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cpu", "float32").torch_device.type == "cpu"


def test_half_precision_is_taken_if_it_is_right_and_faster(no_cuda, monkeypatch):
    monkeypatch.setattr(devices, "_convolve", convolve_double(half_s=0.5))
    chosen = choose_device()
    assert chosen.dtype == torch.bfloat16
    assert "2.0 times" in chosen.reason


@pytest.mark.parametrize("half_s", [0.9, 1.0, 30.0])
def test_half_precision_is_not_taken_if_it_gains_little_or_loses(no_cuda, monkeypatch, half_s):
    monkeypatch.setattr(devices, "_convolve", convolve_double(half_s))
    chosen = choose_device()
    assert chosen.dtype == torch.float32
    assert "not faster" in chosen.reason


@pytest.mark.parametrize("position", [0, 1, 2], ids=["output", "input gradient", "weight gradient"])
@pytest.mark.parametrize("factor", [1.05, 0.0, float("nan"), float("inf")])
def test_half_precision_is_not_taken_if_output_or_a_gradient_is_wrong(no_cuda, monkeypatch, position, factor):
    def damage(result):
        return [r * factor if i == position else r for i, r in enumerate(result)]

    monkeypatch.setattr(devices, "_convolve", convolve_double(0.1, damage))
    chosen = choose_device()
    assert chosen.dtype == torch.float32
    assert "wrong" in chosen.reason


def test_half_precision_is_not_taken_if_it_does_not_run(no_cuda, monkeypatch):
    def refuse(result):
        raise RuntimeError("could not create a primitive\nwith a second line")

    monkeypatch.setattr(devices, "_convolve", convolve_double(0.1, refuse))
    chosen = choose_device()
    assert chosen.dtype == torch.float32
    assert "could not create a primitive" in chosen.reason
    assert "second line" not in chosen.reason


def timed(seconds: dict[torch.dtype, float]):
    """A stand-in for ``_convolve`` that takes these seconds, and 1 in float32; a type without seconds does not run."""

    def convolve(x, weight):
        result = [torch.arange(12.0), torch.ones(5)]
        if x.dtype != torch.float32 and x.dtype not in seconds:
            raise RuntimeError("no kernel")
        return [r.to(x.dtype) for r in result], seconds.get(x.dtype, 1.0)

    return convolve


@pytest.mark.parametrize(
    ("bfloat16_s", "float16_s", "expected"),
    [
        (0.5, 0.45, torch.bfloat16),  # hardly faster: the range of bfloat16 is worth more
        (0.5, 0.2, torch.float16),
        (0.95, 0.2, torch.float16),
        (None, 0.2, torch.float16),
        (0.5, None, torch.bfloat16),
        (30.0, 0.95, torch.float32),
        (None, None, torch.float32),
    ],
)
def test_float16_is_taken_where_it_is_faster_than_float32_and_bfloat16(monkeypatch, bfloat16_s, float16_s, expected):
    seconds = {torch.bfloat16: bfloat16_s, torch.float16: float16_s}
    monkeypatch.setattr(devices, "_convolve", timed({t: s for t, s in seconds.items() if s is not None}))
    monkeypatch.setitem(devices.HALVES, "cpu", devices.HALVES["cuda"])
    chosen = choose_device("cpu")
    assert chosen.dtype == expected
    if expected == torch.float32:
        assert "bfloat16" in chosen.reason
        assert "float16" in chosen.reason.replace("bfloat16", "")


def test_what_is_convolved_is_of_variance_one_and_larger_on_a_gpu():
    assert math.prod(devices.SIZES["cuda"]) > 10 * math.prod(devices.SIZES["cpu"])
    x, weight = devices._test_case(torch.device("cpu"))
    y = F.conv3d(x, weight, padding=1)[:, :, 1:-1, 1:-1, 1:-1]
    assert float(y.detach().var()) == pytest.approx(1, abs=0.1)


def test_float16_asked_for_is_float16(no_cuda):
    chosen = choose_device("cpu", "float16")
    assert (chosen.dtype, chosen.half, chosen.precision) == (torch.float16, True, "float16")


@pytest.mark.parametrize("asked", ["bfloat16", "float16"])
def test_a_number_type_asked_for_that_a_gpu_does_not_have_is_refused(monkeypatch, asked):
    on_cpu = devices._test_case(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_test_case", lambda device: on_cpu)
    monkeypatch.setattr(devices, "_convolve", timed({}))
    with pytest.raises(UsageError, match=rf"E0001.*--precision {asked}.*does not run here.*no kernel"):
        choose_device("cuda", asked)
    monkeypatch.setattr(devices, "_convolve", timed({torch.bfloat16: 2.0, torch.float16: 2.0}))
    assert choose_device("cuda", asked).precision == asked


def test_the_self_test_runs_here_and_says_why(no_cuda):
    chosen = choose_device()
    assert chosen.dtype in (torch.float32, torch.bfloat16)
    assert any(word in chosen.reason for word in ("self-test", "not faster", "wrong", "does not run"))


def test_what_the_self_test_compares_are_output_and_gradients_of_a_convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 5, 4, generator=generator).requires_grad_()
    weight = torch.randn(3, 2, 3, 3, 3, generator=generator).requires_grad_()
    found, seconds = devices._convolve(x, weight)
    y = F.conv3d(x.double(), weight.double(), padding=1)
    (0.5 * (y * y).sum()).backward()  # its gradient in y is y
    assert seconds > 0
    for a, b in zip(found, (y.detach(), x.grad, weight.grad), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_the_self_test_counts_work_and_not_waiting_for_other_work(monkeypatch):
    convolve = F.conv3d

    def held_up(*arguments, **more):
        time.sleep(0.3)
        return convolve(*arguments, **more)

    monkeypatch.setattr(F, "conv3d", held_up)
    x, weight = torch.randn(1, 2, 3, 5, 4).requires_grad_(), torch.randn(3, 2, 3, 3, 3).requires_grad_()
    assert devices._convolve(x, weight)[1] < 0.3


def test_half_precision_that_is_slow_at_first_is_given_more_rounds(no_cuda, monkeypatch):
    seconds = iter([30.0, 30.0, 0.4])
    fast = convolve_double(0.5)
    monkeypatch.setattr(
        devices,
        "_convolve",
        lambda x, weight: (fast(x, weight)[0], 1.0 if x.dtype == torch.float32 else next(seconds)),
    )
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert choose_device().dtype == torch.bfloat16
    assert threads == [1, torch.get_num_threads()]


def test_3d_networks_and_batches_are_laid_out_channels_last():
    network = place(nn.Conv3d(4, 6, (1, 3, 3)), CPU, 3)
    batch = place_batch(torch.zeros(2, 4, 3, 6, 5), CPU)
    assert network.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert batch.is_contiguous(memory_format=torch.channels_last_3d)


def test_2d_networks_and_batches_are_contiguous_on_the_cpu():
    network = place(nn.Conv2d(4, 6, (1, 3)), CPU, 2)
    assert network.weight.is_contiguous()
    assert place_batch(torch.zeros(2, 4, 6, 5), CPU).is_contiguous()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_allocator_is_left_alone_off_linux(monkeypatch, platform):
    monkeypatch.setattr(devices.sys, "platform", platform)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: pytest.fail("no glibc there"))
    keep_freed_memory()


def test_the_allocator_is_left_alone_without_glibc(monkeypatch):
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: pytest.fail("no glibc there"))
    keep_freed_memory()
