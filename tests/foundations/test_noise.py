"The shared noise: frozen bits, the distribution it draws from, and that positions, sequences and tokens have nothing in common"

import hashlib, math
import numpy as np
import pytest, torch
from torch import nn
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.errors import DecodingError

compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')


def random_keys(*shape, seed=0):
    return torch.randint(-(2**31), 2**31, (*shape, 2), generator=generator(seed)).int()


@pytest.fixture(scope='module')
def every():
    "Return a hash for each of the 2^23 values that the noise can tell apart"
    return (torch.arange(2**23) * 2 + 1 - 2**23).int() << 8


def test_table_and_formula_agree_on_every_value_and_are_frozen(every):
    "A changed bit is a changed text: whoever changes the noise on purpose changes this hash, and says so"
    noise = ops._gumbel_of(every)
    assert torch.equal(noise, ops._looked_up(every.clone()))
    assert torch.equal(noise, (noise * 2**16).round() / 2**16)  # exact in fixed point
    frozen = 'e32dc1ab064e13b47fc96d9cb8aa173ce6f5a8fede93f6c528291fc52b699e85'
    assert hashlib.sha256(noise.numpy().tobytes()).hexdigest() == frozen


def test_keys_and_hash_are_frozen():
    keys = ops.position_keys(torch.tensor([[1, 2], [-3, 2**31 - 1]]).int(), torch.tensor([[0, 1, 10**10]]))
    assert keys.tolist() == [
        [[-2032993677, 1870567865], [1580013426, 1499487131], [1259707692, -421497511]],
        [[2134332945, 763875789], [432272186, 1533174327], [-2119787884, -1457577363]],
    ]
    noise = ops.gumbel(keys, 3)[:, :2] * 2**16
    assert noise.int().tolist() == [
        [[-29767, -11651, -43959], [155790, 27479, -2557]],
        [[77218, 48899, 23713], [-54146, 34495, -59315]],
    ]


def test_the_lower_bits_of_a_hash_do_not_count(every):
    some = every[::1001]
    assert torch.equal(ops._gumbel_of(some), ops._gumbel_of(some | 0x1FF))


def fitted(f, low, high, degree):
    "Return integer coefficients of the Chebyshev interpolation of `f`"
    series = np.polynomial.chebyshev.Chebyshev.interpolate(f, degree, [low, high])
    return tuple(round(c * 2**16) for c in series.convert(kind=np.polynomial.Polynomial).coef)


def test_coefficients_can_be_derived_again():
    def correction(u):
        u = np.maximum(u, 1e-12)
        return np.log(-np.log1p(-u) / u)

    assert fitted(lambda m: np.log1p(m + 2.0**-12), 0, 1, 6) == ops._LOG
    assert fitted(correction, 0, 0.5, 5) == ops._CORRECTION
    assert round(math.log(2) * 2**16) == ops._LOG_2


def test_noise_is_gumbel_noise(every):
    noise = ops._gumbel_of(every).double()
    u = every.double() / 2**32
    u = torch.where(u > 0, u, u + 1)
    exact = -(-(-u).log1p()).log()
    assert (noise - exact).abs().max() < 5e-4 and (noise - exact).mean().abs() < 2e-5
    assert abs(noise.mean() - 0.5772157) < 2e-5 and abs(noise.var() - math.pi**2 / 6) < 1e-4


PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
N = 20000


def chi_square(tokens):
    expected = PROBABILITIES * len(tokens)
    return ((tokens.bincount(minlength=6) - expected) ** 2 / expected).sum().item()


SAME = 20.5  # Of 5 degrees of freedom: exceeded once in a thousand


def by_position():
    return ops.position_keys(random_keys(1), torch.arange(N)[None])[0]


def by_sequence():
    return ops.position_keys(random_keys(N), torch.zeros(N, 1, dtype=torch.long))[:, 0]


def by_neighbour():
    "Keys that differ by one"
    neighbours = torch.stack([torch.arange(N), torch.zeros(N, dtype=torch.long)], -1).int()
    return ops.position_keys(neighbours, torch.full((N, 1), 7))[:, 0]


@pytest.mark.parametrize('keys', [by_position, by_sequence, by_neighbour])
def test_the_best_token_is_a_draw_from_softmax(keys):
    assert chi_square((PROBABILITIES.log() + ops.gumbel(keys(), 6)).argmax(-1)) < SAME


@pytest.mark.parametrize(
    'planted',
    [
        lambda g: -g,  # the other tail
        lambda g: 1.1 * g,  # a temperature
        lambda g: torch.randn(g.shape, generator=generator(1)) * 1.28,  # of the same variance
        lambda g: g.roll(1, 0).where(torch.arange(N)[:, None] % 2 == 0, g[:1]),  # half of the positions share theirs
        lambda g: g - g.mean(-1, keepdim=True) * 0.5 * torch.arange(6),  # tokens that depend on one another
    ],
)
def test_another_noise_is_noticed(planted):
    assert chi_square((PROBABILITIES.log() + planted(ops.gumbel(by_position(), 6))).argmax(-1)) > SAME


def joint(first, second):
    "Return chi-square of pairs of draws against the product of their distributions"
    expected = (PROBABILITIES[:, None] * PROBABILITIES).flatten() * len(first)
    return (((first * 6 + second).bincount(minlength=36) - expected) ** 2 / expected).sum().item()


def test_draws_at_two_positions_are_independent():
    tokens = (PROBABILITIES.log() + ops.gumbel(by_position(), 6)).argmax(-1)
    limit = 66.6  # Of 35 degrees of freedom: exceeded once in a thousand
    for apart in (1, 2, 5, 64):
        assert joint(tokens[:-apart], tokens[apart:]) < limit
    assert joint(tokens, tokens) > limit
    reused = torch.where(torch.arange(N) % 4 == 0, tokens, tokens.roll(1))  # a quarter of the noise serves twice
    assert joint(tokens.roll(1), reused) > limit


def correlation(x, y):
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


def test_positions_sequences_and_tokens_are_uncorrelated():
    one = random_keys(1)
    keys = torch.cat([one, one + 1, one ^ torch.tensor([0, 1], dtype=torch.int32), random_keys(5, seed=3)])
    noise = ops.gumbel(ops.position_keys(keys, torch.arange(40).expand(8, 40)), 2000)
    limit = 4.5 / math.sqrt(noise.numel() / 8)
    for apart in (1, 2, 3, 8):
        assert abs(correlation(noise[:, apart:], noise[:, :-apart])) < limit, f'{apart} positions'
        assert abs(correlation(noise[:, :, apart:], noise[:, :, :-apart])) < limit, f'{apart} tokens'
        # the noise of the next position, shifted by as many tokens
        assert abs(correlation(noise[:, 1:, apart:], noise[:, :-1, :-apart])) < limit, f'{apart} tokens on'
    for i in range(8):
        for j in range(i):
            assert abs(correlation(noise[i], noise[j])) < limit, f'sequences {i} and {j}'
    assert abs(correlation(noise, noise)) > limit


@pytest.mark.parametrize('shape', [(), (1,), (3,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize('v', [1, 7, 70000])
def test_any_leading_shape(shape, v):
    keys = ops.position_keys(random_keys(*shape), torch.arange(4).expand(*shape, 4))
    assert keys.shape == (*shape, 4, 2) and keys.dtype == torch.int32
    noise = ops.gumbel(keys, v)
    assert noise.shape == (*shape, 4, v) and noise.dtype == torch.float32
    one = ops.gumbel(keys[..., 2:3, :].contiguous(), v)
    assert torch.equal(noise[..., 2:3, :], one)
    tokens = torch.randint(v, (*shape, 4, 9), generator=generator(1))
    assert torch.equal(ops.gumbel_at(keys, tokens), noise.gather(-1, tokens))


def test_no_rows():
    assert ops.gumbel(torch.zeros(0, 2, dtype=torch.int32), 5).shape == (0, 5)


def test_inputs_stay_as_they_are():
    keys = random_keys(3)
    tokens = torch.arange(5, dtype=torch.int32).expand(3, 5).contiguous()
    before = keys.clone(), tokens.clone()
    ops.gumbel_at(ops.position_keys(keys, tokens)[:, 0], tokens)
    assert torch.equal(keys, before[0]) and torch.equal(tokens, before[1])


def test_a_table_made_in_inference_mode_serves_elsewhere():
    ops._noise_table.cache_clear()
    with torch.inference_mode():
        noise = ops.gumbel(random_keys(1), 20)
    x = torch.zeros(1, 20, requires_grad=True)
    assert torch.equal(noise, ops.gumbel(random_keys(1), 20))
    ((x + ops.gumbel(random_keys(1), 20)).softmax(-1)[:, 3].sum()).backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('make', [lambda k: ops.gumbel(k, 5), lambda k: ops.position_keys(k, torch.arange(2))])
def test_keys_of_another_type_are_refused(make):
    with pytest.raises(DecodingError, match='the keys are torch.int64: '):
        make(torch.zeros(2, 2, dtype=torch.long))


class Drawing(nn.Module):
    def forward(self, keys, scores):
        return (scores + ops.gumbel(ops.position_keys(keys, torch.arange(4)), 3000)).argmax(-1), ops.gumbel(keys, 3000)


@compiled
@pytest.mark.parametrize('way', ['compile', 'export'])
def test_a_program_makes_the_same_noise(way):
    "By the formula: a program of another process has no table of ours"
    keys = random_keys(1)
    scores = torch.randn(4, 3000, generator=generator(2))
    want = Drawing()(keys, scores)
    torch._dynamo.reset()
    if way == 'compile':
        got = torch.compile(Drawing(), fullgraph=True)(keys, scores)
    else:
        exported = torch.export.export(Drawing(), (keys, scores), strict=False)
        assert not any('index_select' in str(node.target) for node in exported.graph.nodes)
        path = torch._inductor.aoti_compile_and_package(exported)
        got = torch._inductor.aoti_load_package(path)(keys, scores)
    torch._dynamo.reset()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
