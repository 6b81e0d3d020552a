"CoLD: one forward pass against two and against PEFT's mixed batch, its identities, and the order of constraints"

import copy, math
import pytest, torch
from transformers import LogitsProcessorList, MinPLogitsWarper
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.decoding.baseline import greedy_cached
from npu_lora_decoding.decoding.sampling import HARD_CONSTRAINTS, Plain, split_processors
from npu_lora_decoding.cold.rule import CoLD, cold_two_pass
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.adapters import Adapter, load_adapter, LoraWeights, toy_adapter, toy_model
from npu_lora_decoding.foundations.models import FAMILIES
from npu_lora_decoding.decoding.loop import LM
from helpers.toys import toy_tokenizer

TARGETS = (CoLD(), CoLD(0.05, 1.0), CoLD(0.3, -0.7), CoLD(0.01, 2.0))
WINDOWED = ('mistral', 'gemma2', 'gemma3_text')
N = 12


def prompts(lengths=(7, 3, 5), seed=0):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) >= t - n).long() for n in lengths])
    return torch.randint(3, 97, mask.shape, generator=generator(seed)) * mask, mask


def run(model, ids, mask, target, bank, decoder={}, n=N, **kw):
    kw = dict(do_sample=False, eos_token_id=None, pad_token_id=0) | kw
    return model.generate(
        ids, attention_mask=mask, custom_generate=Decoder(target, bank=bank, **decoder), max_new_tokens=n, **kw
    )


def same(a, b):
    assert a.shape == b.shape and torch.equal(a, b), f'\n{a}\n{b}'


def one_adapter(model, folder, **config):
    path = toy_adapter(model, folder, **config)
    return path, AdapterBank(model, [load_adapter(path, model)], ops.lora)


@pytest.fixture(scope='module', params=FAMILIES)
def pair(request, tmp_path_factory):
    "A toy of each family, its adapter's bank and folder; windows shorter than the sequences, so that they matter"
    model = toy_model(request.param, **(dict(sliding_window=6) if request.param in WINDOWED else {}))
    path, bank = one_adapter(model, tmp_path_factory.mktemp('adapter'))
    return model, bank, path


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    model = toy_model()
    return model, one_adapter(model, tmp_path_factory.mktemp('adapter'))[1]


# --- against the oracles


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_one_forward_pass_is_two(pair, target, lengths):
    model, bank, _ = pair
    ids, mask = prompts(lengths)
    ours = run(model, ids, mask, target, bank)
    same(ours, cold_two_pass(model, bank, ids, mask, N, target))
    for row, prompt, real in zip(ours, ids, mask.bool()):
        alone = prompt[real][None]
        same(row[ids.shape[1] :], run(model, alone, torch.ones_like(alone), target, bank)[0, alone.shape[1] :])


def test_alpha_and_beta_matter(pair):
    "The equalities above compare different texts"
    model, bank, _ = pair
    ids, mask = prompts()
    texts = [run(model, ids, mask, t, bank) for t in TARGETS] + [
        run(model, ids, mask, Plain(), b) for b in (bank, None)
    ]
    assert len({tuple(t.flatten().tolist()) for t in texts}) >= 4


@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_one_forward_pass_is_pefts_mixed_batch(pair, target):
    from npu_lora_decoding.evaluation.methods import _peft_mixed

    model, bank, path = pair
    ids, mask = prompts()
    theirs = _peft_mixed(target)(LM(model, toy_tokenizer(extra=21)), path)(ids, mask, N)
    same(run(model, ids, mask, target, bank)[:, ids.shape[1] :], theirs)


def test_several_seeds_against_two_forward_passes(llama):
    model, bank = llama
    for seed in range(6):
        ids, mask = prompts((4, 9, 1, 6), seed)
        same(
            run(model, ids, mask, CoLD(0.02, 1.5), bank, n=24),
            cold_two_pass(model, bank, ids, mask, 24, CoLD(0.02, 1.5)),
        )


# --- identities


def merged(model, bank):
    expert = copy.deepcopy(model)
    for path, w in bank.adapters[0].layers.items():
        expert.get_submodule(path).weight += w.scale * w.B @ w.A
    return expert


@pytest.mark.parametrize('target', [CoLD(beta=0.0), CoLD(alpha=1.0, beta=3.0), CoLD(alpha=1.0, beta=-2.0)], ids=str)
def test_is_the_expert(pair, target):
    model, bank, _ = pair
    ids, mask = prompts()
    want = greedy_cached(merged(model, bank), ids, mask, N)
    same(run(model, ids, mask, target, bank), want)
    assert not torch.equal(run(model, ids, mask, CoLD(0.05, 1.0), bank), want) or not torch.equal(
        run(model, ids, mask, CoLD(0.01, 2.0), bank), want
    )


@pytest.mark.parametrize('beta', [-1.0, 0.0, 0.5, 7.0])
def test_an_adapter_of_zeros_is_the_base(llama, beta):
    model, bank = llama
    zero = Adapter(
        'zero', {p: LoraWeights(w.A, torch.zeros_like(w.B), w.scale) for p, w in bank.adapters[0].layers.items()}
    )
    ids, mask = prompts()
    same(
        run(model, ids, mask, CoLD(0.05, beta), AdapterBank(model, [zero], ops.lora)),
        greedy_cached(model, ids, mask, N),
    )


def logits(seed=0, b=6, v=50, scale=3):
    g = generator(seed)
    return torch.randn(b, v, generator=g) * scale, torch.randn(b, v, generator=g) * scale


@pytest.mark.parametrize('alpha', [0.01, 0.1, 0.5, 1.0])
def test_without_contrast_it_is_min_p(alpha):
    e, a = logits()
    torch.testing.assert_close(CoLD(alpha, 0.0).combine(e, a), MinPLogitsWarper(alpha)(None, e), rtol=0, atol=0)


def test_sampling_without_contrast_is_min_p_sampling(llama):
    model, bank = llama
    ids, mask = prompts()
    torch.manual_seed(3)
    ours = run(model, ids, mask, CoLD(0.2, 0.0), bank, do_sample=True, temperature=1.0, top_k=0)
    torch.manual_seed(3)
    theirs = merged(model, bank).generate(
        ids,
        attention_mask=mask,
        max_new_tokens=N,
        do_sample=True,
        min_p=0.2,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    same(ours, theirs)


def test_minus_one_scores_by_the_base():
    e, a = logits()
    s = CoLD(0.1, -1.0).combine(e, a)
    torch.testing.assert_close(s[s.isfinite()], a[s.isfinite()], rtol=0, atol=1e-5)  # e - (e - a)
    assert torch.equal(s.isfinite(), CoLD(0.1).plausible(e)) and 1 < s.isfinite().sum() < s.numel()


@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_select_is_the_best_of_combine(target):
    for seed in range(20):
        e, a = (x.round() for x in logits(seed, scale=2))  # whole numbers: many ties
        assert torch.equal(target.select(e, a), target.combine(e, a).argmax(-1))
        assert torch.equal(
            target.select(e, a), target.select(e + 3.0, a - 2.0)
        )  # a constant a row moves all scores alike


def test_ties_go_to_the_lowest_token():
    e = torch.tensor([[0.0, 5, 5, 5]])
    assert (
        CoLD().select(e, torch.zeros_like(e)).item() == 1
        and CoLD().combine(e, torch.zeros_like(e)).argmax().item() == 1
    )


def test_half_precision_is_combined_in_fp32():
    e, a = (x.bfloat16() for x in logits())
    torch.testing.assert_close(CoLD().combine(e, a), CoLD().combine(e.float(), a.float()), rtol=0, atol=0)


def test_minus_infinity_of_the_base_is_its_finite_minimum():
    e = torch.tensor([[5.0, 5.0, 0.0]])
    a = torch.tensor([[1.0, -torch.inf, -2.0]])
    s = CoLD(0.1, 1.0).combine(e, a)
    assert s.tolist() == [[9.0, 12.0, -math.inf]] and CoLD(0.1, 1.0).select(e, a).item() == 1


# --- one value for each sequence, and the end of each


def test_alpha_and_beta_for_each_sequence(pair):
    model, bank, _ = pair
    ids, mask = prompts()
    target = CoLD((0.05, 0.1, 0.3), (1.0, 0.0, -0.7))
    ours = run(model, ids, mask, target, bank)
    same(ours, cold_two_pass(model, bank, ids, mask, N, target))
    for b, real in enumerate(mask.bool()):
        alone = ids[b][real][None]
        same(
            ours[b, ids.shape[1] :], run(model, alone, torch.ones_like(alone), target.of(b), bank)[0, alone.shape[1] :]
        )
    others = run(model, ids, mask, CoLD((0.05, 0.1, 0.3), (-0.7, 1.0, 1.0)), bank)
    assert (ours != others).any()  # alpha and beta of the wrong sequence would show


def test_alpha_and_beta_for_each_sequence_with_processors(llama):
    model, bank = llama
    ids, mask = prompts()
    target = CoLD((0.05, 0.1, 0.3), (1.0, 0.0, -0.7))
    ours = run(model, ids, mask, target, bank, repetition_penalty=1.5)
    for b, real in enumerate(mask.bool()):
        padded = run(model, ids[b : b + 1], mask[b : b + 1], target.of(b), bank, repetition_penalty=1.5)
        same(ours[b], padded[0])


def test_a_wrong_number_of_alphas_or_betas_is_named(llama):
    with pytest.raises(DecodingError, match='2 values of alpha or beta for 3 sequences'):
        run(llama[0], *prompts(), CoLD(beta=(0.1, 0.2)), llama[1])


@pytest.mark.parametrize('eos', ['one', 'several'])
def test_each_pair_ends_by_itself(pair, eos):
    model, bank, _ = pair
    ids, mask = prompts()
    t = ids.shape[1]
    target = CoLD(0.05, 1.0)
    free = run(model, ids, mask, target, bank)
    ends = [free[0, t + 2].item()] + ([free[1, t + 5].item()] if eos == 'several' else [])
    ours = run(model, ids, mask, target, bank, eos_token_id=ends)
    same(ours, cold_two_pass(model, bank, ids, mask, new_tokens=N, target=target, eos_ids=ends))
    stop = [next((i + 1 for i, x in enumerate(row[t:].tolist()) if x in ends), N) for row in free]
    assert min(stop) < max(stop)  # one ends early, another goes on
    for row, full, n in zip(ours, free, stop):
        same(row[t : t + n], full[t : t + n])
        assert not row[t + n :].any()


# --- sampling


def chi_square(counts, p):
    "Return the statistic over tokens expected at least five times, the others as one, and its 99.9% point"
    want = counts.sum() * p
    big = want >= 5
    c, w = (torch.cat([x[big], x[~big].sum()[None]]) for x in (counts.double(), want.double()))
    c = c[w > 0]
    w = w[w > 0]
    k = len(c) - 1
    return ((c - w) ** 2 / w).sum().item(), k * (
        1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))
    ) ** 3  # Wilson-Hilferty


def first_tokens(model, bank, target, temperature, runs=3000):
    ids = torch.tensor([[5, 6, 7]]).repeat(runs, 1)
    torch.manual_seed(0)
    return run(model, ids, torch.ones_like(ids), target, bank, n=1, do_sample=True, temperature=temperature, top_k=0)[
        :, -1
    ]


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_sampling_draws_from_the_scores(llama, temperature):
    model, bank = llama
    target = CoLD(0.02, 0.5)
    with torch.no_grad(), bank.attached([0, -1]):
        e, a = model(torch.tensor([[5, 6, 7]]).repeat(2, 1)).logits[:, -1:]
    p = (target.combine(e, a)[0] / temperature).softmax(-1)
    assert (p > 0.01).sum() >= 3
    honest = torch.bincount(first_tokens(model, bank, target, temperature), minlength=97)
    stat, limit = chi_square(honest, p)
    assert stat < limit and not honest[p == 0].any()
    for wrong in (
        CoLD(0.02, 0.0),
        CoLD(0.02, 0.8),
        CoLD(0.1, 0.5),
    ):  # a bug: contrast forgotten or too strong, tail cut off
        stat, limit = chi_square(torch.bincount(first_tokens(model, bank, wrong, temperature), minlength=97), p)
        assert stat > limit
    stat, limit = chi_square(torch.bincount(first_tokens(model, bank, target, temperature * 1.3), minlength=97), p)
    assert stat > limit  # a bug: temperature applied wrongly


def test_a_seed_of_ours_leaves_the_global_one_alone(llama):
    model, bank = llama
    before = torch.get_rng_state()
    a, b, c = (run(model, *prompts(), CoLD(0.02), bank, dict(seed=s), do_sample=True) for s in (1, 1, 2))
    same(a, b)
    assert not torch.equal(a, c)
    same(torch.get_rng_state(), before)


# --- broken input


@pytest.mark.parametrize('who', ['expert', 'base'])
@pytest.mark.parametrize('row', [0, 3, 5])
def test_nan_is_named(who, row):
    e, a = logits()
    (e if who == 'expert' else a)[row, 11] = torch.nan
    with pytest.raises(DecodingError, match=rf'the {who} gave NaN or infinite logits in rows \[{row}\]'):
        CoLD().combine(e, a)
    with pytest.raises(DecodingError, match=rf'NaN or infinite logits in rows \[{row}\]'):
        CoLD().select(e, a)


@pytest.mark.parametrize('options', [{}, dict(repetition_penalty=1.2)], ids=['select', 'combine'])
def test_nan_in_the_loop_is_named(llama, options):
    model, bank = llama
    layers = dict(bank.adapters[0].layers)
    path = 'model.layers.1.mlp.down_proj'
    layers[path] = LoraWeights(layers[path].A, layers[path].B * torch.nan, 1.0)
    with pytest.raises(DecodingError, match=r'NaN or infinite logits in rows \[0, 1, 2\]'):
        run(model, *prompts(), CoLD(), AdapterBank(model, [Adapter('nan', layers)]), **options)
    assert not any('forward' in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    'bad',
    [
        dict(alpha=0),
        dict(alpha=-0.1),
        dict(alpha=1.01),
        dict(alpha=math.nan),
        dict(beta=math.inf),
        dict(beta=math.nan),
        dict(alpha=(0.1, 0.0)),
        dict(beta=(0.0, math.nan)),
    ],
)
def test_bad_alphas_and_betas_are_named(bad):
    with pytest.raises(DecodingError, match=f'{next(iter(bad))} is '):
        CoLD(**bad)


# --- the order: constraints on the expert, then the contrast, then the others


class Offset:
    "Adds a row to the logits; stands for a constraint of ours"

    def __init__(self, row, before_contrast):
        self.row = row
        self.before_contrast = before_contrast

    def __call__(self, ids, scores):
        return scores + self.row


def next_logits(model, bank, ids):
    with torch.no_grad(), bank.attached([0, -1]):
        return model(ids.repeat(2, 1)).logits[:, -1:]


def test_banning_the_whole_plausible_set_leaves_the_best_of_the_rest(llama):
    model, bank = llama
    ids = torch.tensor([[5, 6, 7, 8]])
    e, _ = next_logits(model, bank, ids)
    target = CoLD(0.95, 0.5)
    banned = target.plausible(e)[0].nonzero().flatten().tolist()
    rest = e[0].index_fill(0, torch.tensor(banned), -torch.inf)
    assert (rest >= math.log(0.95) + rest.max()).sum() == 1  # so the answer is its maximum
    for rule in (
        dict(suppress_tokens=banned),
        dict(bad_words_ids=[[t] for t in banned]),
        dict(begin_suppress_tokens=banned),
    ):
        out = run(model, ids, torch.ones_like(ids), target, bank, n=1, **rule)
        assert out[0, -1] == rest.argmax()


def test_constraints_come_before_the_maximum_and_penalties_after(llama):
    model, bank = llama
    ids = torch.tensor([[5, 6, 7, 8]])
    target = CoLD(0.05, 1.0)
    e, a = next_logits(model, bank, ids)
    row = -4.0 * target.plausible(e)[0]  # others become plausible (log 0.05 is -3.0), if it comes first
    before = target.combine(e + row, a)
    after = target.combine(e, a) + row
    assert before.argmax() != after.argmax()
    for scores, first in (before, True), (after, False):
        out = run(
            model,
            ids,
            torch.ones_like(ids),
            target,
            bank,
            n=1,
            logits_processor=LogitsProcessorList([Offset(row, first)]),
        )
        assert out[0, -1] == scores.argmax()


def test_repetition_penalty_acts_on_the_combined_scores(llama):
    from transformers import RepetitionPenaltyLogitsProcessor

    model, bank = llama
    target = CoLD(0.3, 1.5)
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    other = 0
    for seed in range(4):
        text = ids = prompts((4,), seed)[0]
        for _ in range(N):
            e, a = next_logits(model, bank, text)
            token = penalty(text, target.combine(e, a)).argmax(-1)
            other += (target.combine(penalty(text, e), a).argmax(-1) != token).item()
            text = torch.cat([text, token[:, None]], 1)
        same(run(model, ids, torch.ones_like(ids), target, bank, repetition_penalty=1.8), text)
    assert other > 0  # before the contrast it would give other tokens


def test_forbidding_everything_says_so(llama):
    model, bank = llama
    with pytest.raises(DecodingError, match='the constraints forbid every token: loosen them'):
        run(model, *prompts(), CoLD(), bank, suppress_tokens=list(range(97)))
    only_one = LogitsProcessorList([Offset(torch.tensor([[0.0], [-torch.inf], [0.0]]).expand(3, 97), True)])
    with pytest.raises(DecodingError, match='forbid every token'):
        run(model, *prompts(), CoLD(), bank, logits_processor=only_one)


def test_known_constraints_are_transformers_classes():
    import transformers.generation.logits_process as known

    assert not [n for n in HARD_CONSTRAINTS if not hasattr(known, n)]


def test_split_keeps_order_and_every_processor():
    rows = [Offset(0, x) for x in (True, False, True, False)]
    assert split_processors(rows) == ([rows[0], rows[2]], [rows[1], rows[3]])


# --- padded vocabulary


@pytest.fixture(scope='module')
def padded(tmp_path_factory):
    "A model whose logits have 7 columns more than its tokenizer, the first of them always the largest"
    model = toy_model(vocab=104, tie_word_embeddings=False)
    path, bank = one_adapter(model, tmp_path_factory.mktemp('adapter'))

    def last_wins(module, args, out):
        return out.index_fill(-1, torch.tensor([97]), 99.0)

    model.lm_head.register_forward_hook(last_wins)
    return model, bank


@pytest.mark.parametrize(
    'kw', [{}, dict(do_sample=True), dict(repetition_penalty=1.3)], ids=['greedy', 'sample', 'penalty']
)
@pytest.mark.parametrize('target', [CoLD(0.05, 1.0), CoLD(1e-6, 0.2), Plain()], ids=str)
def test_padding_of_the_vocabulary_is_never_chosen(padded, target, kw):
    model, bank = padded
    ids, mask = prompts()
    assert (run(model, ids, mask, target, bank, n=4, **kw)[:, 7:] >= 97).any()  # it would be
    assert (run(model, ids, mask, target, bank, dict(vocab=97), n=8, **kw)[:, 7:] < 97).all()


def test_padding_of_the_vocabulary_is_excluded_before_the_maximum(padded):
    model, bank = padded
    ids = torch.tensor([[5, 6, 7, 8]])
    e, a = next_logits(model, bank, ids)
    out = run(model, ids, torch.ones_like(ids), CoLD(0.05, 1.0), bank, dict(vocab=97), n=1)
    want = CoLD(0.05, 1.0).combine(e[:, :97], a[:, :97])
    assert out[0, -1] == want.argmax() and want.isfinite().sum() > 1


def test_the_record_counts_the_plausible_set_after_the_constraints(padded):
    "`plausible`, `expert_top1` and `logp` of a token describe the distribution it was chosen from"
    model, bank = padded
    ids = torch.tensor([[5, 6, 7, 8]])
    e, _ = next_logits(model, bank, ids)
    token = (
        run(model, ids, torch.ones_like(ids), CoLD(0.05, 1.0), bank, dict(vocab=97), n=1, return_dict_in_generate=True)
        .steps[0]
        .tokens[0][0]
    )
    assert (token.plausible, token.expert_top1) == (
        CoLD(0.05).plausible(e[:, :97]).sum().item(),
        e[0, :97].argmax().item(),
    )
