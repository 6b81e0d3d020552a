"""The harness itself can fail: planted faults in small kernels, each of which it must report"""

import subprocess
import pytest
import torch
import triton
import triton.language as tl
from npu_lora_kernels.launch import launch
from npu_lora_kernels.cases import compare
from verify import cost, lower as lowering, report
from npu_lora_kernels.cases import Case
from verify.lower import lower
from verify.plan import ARCHS, PlanError, plan, planned
from verify.runner import IllegalAccess, OrderMatters, Runner, take


@triton.jit
def scale_kernel(y, x, d, factor, extra, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < d + extra, other=0.0).to(tl.float32) * factor, mask=at < d + extra)


@triton.jit
def shift_kernel(y, x, d, back, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at - back, mask=at < d, other=0.0), mask=at < d)


@triton.jit
def partial_kernel(y, x, d, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < d // 2, care_padding=False), mask=at < d)


@triton.jit
def chain_kernel(y, d):
    i = tl.program_id(0)
    tl.store(y + i + 1, tl.load(y + i) + 1)


@triton.jit
def double_kernel(y, x, big, d, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < d, other=0) + big, mask=at < d)


def scale(y, x, factor=2.0, extra=0):
    "Write `factor * x` into `y`, and `extra` elements after it"
    arguments = dict(y=y, x=x, d=x.numel(), factor=factor, extra=extra)
    launch(scale_kernel, (triton.cdiv(x.numel(), 64),), arguments, BLOCK=64)


def scaled(x, factor=2.0, extra=0):
    y = torch.empty_like(x)
    scale(y, x, factor, extra)
    return y


def case(host, reference, mutates=(), tolerance=None):
    def make(dtype, generator):
        return (torch.randn(150, generator=generator).to(dtype),)

    return Case('harness', host.__name__, host, reference, make, mutates=mutates, tolerance=tolerance)


def run(case, dtype=torch.float32, runner=None):
    take(runner or Runner(), 'Ascend910B3', compare.check, case, dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_right_kernel_passes(dtype):
    run(case(scaled, lambda x: 2 * x), dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_wrong_kernel_fails(dtype):
    with pytest.raises(compare.Mismatch, match='150 of 150 differ'):
        run(case(scaled, lambda x: 3 * x), dtype)


def test_rounding_is_the_devices():
    "One third in each dtype: conversions round to nearest even"
    run(case(lambda x: scaled(x, 1 / 3), lambda x: (x.float() * torch.tensor(1 / 3)).to(x.dtype)), torch.float16)
    run(case(lambda x: scaled(x, 1 / 3), lambda x: (x.float() * torch.tensor(1 / 3)).to(x.dtype)), torch.bfloat16)


def test_sign_of_zero_counts():
    with pytest.raises(compare.Mismatch):
        run(case(lambda x: scaled(x, 0.0), lambda x: x.abs() * 0))


def test_other_dtype_or_count_fails():
    with pytest.raises(compare.Mismatch, match='the reference gives torch.float64'):
        run(case(scaled, lambda x: 2.0 * x.double()))
    with pytest.raises(compare.Mismatch, match='1 results, the reference gives 2'):
        run(case(scaled, lambda x: (2 * x, x)))


def test_a_change_in_place_is_seen():
    def host(x):
        return scaled(x.mul_(2), 1.0)

    run(case(host, lambda x: x.mul_(2), mutates=(0,)))
    with pytest.raises(compare.Mismatch, match='result 1'):
        run(case(host, lambda x: 2 * x, mutates=(0,)))


@pytest.mark.parametrize('extra', [1, 40])
def test_outside_is_reported(extra):
    with pytest.raises(IllegalAccess, match='behind x'):
        run(case(lambda x: scaled(x, 2.0, extra), lambda x: 2 * x))


def test_inside_a_storage_but_outside_an_argument():
    def host(x):
        return scaled(x[:100], 2.0, 1)

    with pytest.raises(IllegalAccess, match='1 bytes behind x'):
        run(case(host, lambda x: 2 * x[:100]))


def test_before_is_reported():
    def host(x):
        y = torch.empty_like(x)
        launch(shift_kernel, (3,), dict(y=y, x=x, d=x.numel(), back=1), BLOCK=64)
        return y

    with pytest.raises(IllegalAccess, match='4 bytes before x'):
        run(case(host, lambda x: x))


def test_on_chip_memory_starts_as_nan():
    def host(x):
        y = torch.empty_like(x)
        launch(partial_kernel, (1,), dict(y=y, x=x, d=x.numel()), BLOCK=256)
        return y

    run(
        case(host, lambda x: torch.where(torch.arange(150) < 75, x, torch.nan), tolerance={torch.float32: (0, 0)})
    )  # NaN of any payload


def test_what_a_kernel_leaves_out_is_nan():
    with pytest.raises(compare.Mismatch, match='first at \\(140,\\): nan'):
        run(case(lambda x: scaled(x, 2.0, -10), lambda x: 2 * x))


def test_order_of_programs_must_not_matter():
    def host(x):
        launch(chain_kernel, (8,), dict(y=x, d=x.numel()))
        return x

    with pytest.raises(OrderMatters):
        run(case(host, lambda x: x))


def test_wide_integers_and_views():
    "An integer beyond 32 bits is passed as 64, and a view keeps its offset"

    def host(x):
        y = torch.empty(60, dtype=torch.int64)
        launch(double_kernel, (1,), dict(y=y, x=torch.arange(100)[40:], big=1 << 40, d=60), BLOCK=64)
        return y

    run(case(host, lambda x: torch.arange(40, 100) + (1 << 40)))


def test_bytes_are_counted():
    runner = Runner()
    run(case(scaled, lambda x: 2 * x), torch.float16, runner)
    assert [(l.moved, l.distinct) for l in runner.launches] == [((256, 256, 88), 600)]


def large(block):
    return lower(scale_kernel, (torch.ones(8), torch.ones(8), 8, 2.0, 0), dict(BLOCK=block)).text


@pytest.mark.parametrize('arch', ARCHS)
def test_overflow_is_refused(arch):
    assert cost.cost(plan(large(1024), arch)).ub <= 192 << 10
    with pytest.raises(PlanError, match='ub overflow, requires'):
        plan(large(1 << 18), arch)


def test_planned_means_a_file_and_no_complaint(tmp_path):
    "The exit code says nothing, so no code path looks at it"
    with pytest.raises(PlanError, match='no HIVM file'):
        planned(tmp_path, '')
    hivm = tmp_path / 'module.hivm.opt.mlir'
    hivm.write_text('')
    with pytest.raises(PlanError):
        planned(tmp_path, '')
    hivm.write_text('module {}')
    assert planned(tmp_path, "error: Cannot find hivmc") == 'module {}'
    with pytest.raises(PlanError):
        planned(tmp_path, 'error: Failed to run BiShengHIR pipeline')


def test_high_water_mark():
    hivm = '''
  func.func @kernel() {
    %c64_i64 = arith.constant 64 : i64
    %c512_i64 = arith.constant 512 : i64
    %0 = hivm.hir.pointer_cast(%c64_i64) : memref<4x16xf16, #hivm.address_space<ub>>
    %1 = hivm.hir.pointer_cast(%c512_i64) : memref<100xi1, strided<[1]>, #hivm.address_space<ub>>
    %2 = hivm.hir.pointer_cast(%c64_i64) : memref<2x16x16xf32, #hivm.address_space<cc>>
    %3 = arith.select %9, %0, %1 : memref<4x16xf16, #hivm.address_space<ub>>'''
    found = cost.cost(hivm)
    assert (found.ub, found.l0c, found.l1, found.doubled) == (512 + 13, 64 + 2048, 0, 1)


def test_report_goes_between_its_markers():
    text = report.written('# Title\n', 'old')
    assert report.committed(text) == 'old' and report.committed(report.written(text + 'after\n', 'new')) == 'new'
    assert report.written(text + 'after\n', 'new').endswith('after\n') and report.committed('# Title') == ''


def test_a_changed_input_is_reported():
    def host(x):
        y = scaled(x)
        x.fill_(7)
        return y

    with pytest.raises(compare.Mismatch, match='argument 0 was changed'):
        run(case(host, lambda x: 2 * x))


def test_an_input_that_a_kernel_writes_is_reported():
    def host(x):
        y = torch.empty_like(x)
        scale(y, x)
        scale(x, y)
        return y

    with pytest.raises(compare.Mismatch, match='argument 0 was changed'):
        run(case(host, lambda x: 2 * x))


@pytest.mark.parametrize('code, deaths, dies', [(-11, 2, False), (-11, 3, True), (1, 1, True)])
def test_only_a_death_by_signal_is_tried_again(monkeypatch, code, deaths, dies):
    calls = []

    def tool(*_, **__):
        calls.append(1)
        if len(calls) <= deaths:
            raise subprocess.CalledProcessError(code, 'tool')
        return 'text'

    monkeypatch.setattr(lowering.ascend, 'ttir_to_linalg', tool)
    if dies:
        with pytest.raises(subprocess.CalledProcessError):
            lowering._to_linalg(None, {}, None)
        assert len(calls) == (3 if code < 0 else 1)
    else:
        assert lowering._to_linalg(None, {}, None) == 'text'
