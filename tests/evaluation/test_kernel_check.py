"The device check: it refuses where there is no device, and finds kernels that are wrong"

from types import SimpleNamespace
import pytest, torch
from npu_lora_decoding.evaluation import kernel_check as doctor
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import has_device
from npu_lora_decoding.decoding.loop import LM
from helpers.toys import toy_items, toy_tokenizer

cpu = torch.device('cpu')


@pytest.mark.parametrize('kind', ['npu', 'cuda'])
def test_no_device_no_report(kind, tmp_path):
    if has_device(kind):
        pytest.skip('there is one here')
    with pytest.raises(DecodingError, match=f'no {kind} device is here, so there is nothing to report'):
        run(['doctor', '--kernels', '--device', kind, '--json', str(tmp_path / 'r.json')])
    assert not list(tmp_path.iterdir())


def test_references_are_not_reported_as_kernels():
    with pytest.raises(DecodingError, match='these operators have no kernel on cpu'):
        doctor.kernel_report(cpu, None, [])


def case(host, mutates=(), dtypes=(torch.float32,)):
    "A case as the kernels' are: it compares what `host` returns and changes"

    def check(dtype, host):
        x = torch.arange(4, dtype=dtype)
        y = host(x)
        torch.testing.assert_close(y, torch.arange(4, dtype=dtype) * 2, rtol=0, atol=0)
        torch.testing.assert_close(x, torch.arange(4, dtype=dtype) + (1 if mutates else 0), rtol=0, atol=0)

    return SimpleNamespace(family='toy', name='case', dtypes=dtypes, host=host, mutates=mutates, check=check)


def test_wrong_results_and_broken_starts_are_found_and_the_rest_goes_on():
    def broken(x):
        raise RuntimeError('no kernel image')

    logged = []
    found = doctor.check_cases(
        [case(broken), case(lambda x: x * 3), case(lambda x: x * 2, dtypes=(torch.float32, torch.bfloat16))],
        cpu,
        logged.append,
    )
    assert [o.problem is None for o in found] == [False, False, True, True] and len(logged) == 2
    assert 'no kernel image' in found[0].problem and 'not equal' in found[1].problem


def test_arguments_travel_and_changes_come_back(monkeypatch):
    "On another device the arguments are copies; what a kernel changes in them must reach the comparison"
    monkeypatch.setattr(doctor, '_moved', lambda x, device: x.clone() if isinstance(x, torch.Tensor) else x)

    def changes(x):
        y = x * 2
        x += 1
        return y

    assert doctor.check_cases([case(changes, mutates=(0,))], cpu)[0].problem is None
    assert doctor.check_cases([case(lambda x: x * 2, mutates=(0,))], cpu, lambda _: None)[0].problem is not None


@pytest.mark.slow
def test_every_way_of_the_benchmark_does_the_same_work():
    torch.manual_seed(0)
    problem = doctor.lora_problem(5, 24, 4, torch.float32, cpu)
    with torch.no_grad():
        out = {n: f() for n, f in doctor.lora_ways(*problem).items()}
    assert set(out) == {'ours', 'loop', 'gather', 'peft'}
    for y in out.values():
        torch.testing.assert_close(y, out['loop'], rtol=1e-4, atol=1e-4)
    rows = doctor.measure_lora(
        cpu, widths=(24,), ranks=(4,), rows=(2,), dtype=torch.float32, times=1, rounds=2, log=lambda _: None
    )
    assert len(rows) == 1 and 0 < rows[0]['share_of_copy'] and rows[0]['loop'] > 0


@pytest.fixture
def kernel_on_cpu(monkeypatch):
    "Register a kernel for `lora` on the CPU for the length of a test"
    library = torch.library.Library('npu_lora', 'IMPL')

    def register(kernel):
        library.impl('lora', kernel, 'CPU')
        monkeypatch.setitem(ops._KERNELS, 'cpu', dict(lora='toy'))

    yield register
    library._destroy()


@pytest.mark.parametrize('wrong', [0.0, 0.1])
def test_tokens_of_kernels_and_references(tmp_path, kernel_on_cpu, wrong):
    "A kernel that adds a little too much is seen in the tokens; the other side of the comparison does not run it"
    model = toy_model()
    calls = []
    lm = LM(model, toy_tokenizer(), load_adapter(toy_adapter(model, tmp_path), model))

    def kernel(y, x, A, B, scale, ranks, ids):
        calls.append(1)
        return [o + wrong for o in ops.lora_torch(y, x, A=A, B=B, scale=scale, ranks=ranks, ids=ids)]

    kernel_on_cpu(kernel)
    checks = doctor.check_tokens(lm, toy_items(4), 8)
    layers = 2 * 4  # two blocks: q, k, v together, o, gate and up together, down
    steps, rest = divmod(len(calls), layers)
    assert rest == 0 and (
        16 < steps < 24 or wrong and steps == 24
    ), 'kernels run for greedy, for CoLD, and for trees, in fewer steps where draft tokens are accepted; not for their references'
    assert [bool(c.differences) for c in checks] == [bool(wrong)] * 3
