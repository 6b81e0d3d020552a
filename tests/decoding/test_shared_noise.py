"""Sampled texts are functions of model, prompt and seed: the same whoever drafts, in whatever batch, and drawn from the
target's distribution; checks of that distribution find planted bugs
"""

from dataclasses import replace
import pytest, torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
import npu_lora_decoding.decoding.sampling as sampling
import npu_lora_decoding.decoding.shared_noise as shared
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.decoding.sampling import DecodingState, Plain, SamplingRules, SharedNoise
from npu_lora_decoding.decoding.sampling import choose_tokens, sequence_key, shared_noise
from npu_lora_decoding.decoding.tree import Tree
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from helpers.loops import COLD, PLAIN, chi_square, count_drafted, generate, same, sampled
from helpers.loops import llama, paying, rows, small  # fixtures
from helpers.toys import toy_lm

LM = toy_lm()
DRAFTERS = dict(
    chain=lambda f, text=(): HASS(f, chain=True),
    tree=lambda f, text=(): HASS(f),
    fixed=lambda f, text=(): HASS(f, adaptive=False),
    lookup=lambda f, text=(): PromptLookup(min_ngram=1, corpus=[list(text)]),
    joined=lambda f, text=(): JointDrafter((HASS(f), PromptLookup(min_ngram=1, corpus=[list(text)]))),
)


PROMPTS = [[5, 9, 2, 5, 9], [7], [4, 4, 8], [5, 9, 2, 5, 9]]


def write(t, prompts, target=PLAIN, drafter=None, seed=7, rows={}, **options):
    "Texts after each prompt, padded on the left, and the output"
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    how = dict(do_sample=True, top_k=0, max_new_tokens=20, return_dict_in_generate=True) | options
    bank = None if target == PLAIN else t.bank
    out = generate(t.model, ids, mask, Decoder(target, drafter, bank=bank, seed=seed, **rows), **how)
    return out.sequences[:, width:].tolist(), out


# --- one seed, one text


@pytest.mark.parametrize('temperature', [0.7, 1.0])
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('name', DRAFTERS)
def test_no_drafter_changes_a_text(llama, rows, name, target, temperature):
    how = dict(target=target, temperature=temperature)
    alone = [write(llama, [p], **how)[0][0] for p in PROMPTS]
    drafter = DRAFTERS[name](llama.folder, alone[1])
    drafted = 0
    for batch in (PROMPTS, PROMPTS[1:], PROMPTS[:1]):
        texts, out = write(llama, batch, drafter=drafter, rows=rows, **how)
        assert texts == alone[-len(batch) :] if len(batch) > 1 else texts == alone[:1]
        drafted += count_drafted(out)
    assert drafted >= 20


@pytest.mark.parametrize('drafter', [None, 'tree'])
def test_a_text_does_not_depend_on_its_row(llama, drafter):
    made = drafter and DRAFTERS[drafter](llama.folder)
    first, _ = write(llama, PROMPTS, drafter=made)
    order = [2, 0, 3, 1]
    again, _ = write(llama, [PROMPTS[i] for i in order], drafter=made)
    assert again == [first[i] for i in order]
    assert first[0] == first[3] and len({tuple(x) for x in first}) == 3  # equal prompts, one seed


def test_seeds_and_copies_give_other_texts(llama):
    by_seed = [write(llama, PROMPTS[:1], seed=s)[0][0] for s in range(4)]
    assert len({tuple(x) for x in by_seed}) == 4
    batch, _ = write(llama, PROMPTS[:1] * 4, seed=(0, 1, 2, 3))
    assert batch == by_seed
    copies, _ = write(llama, PROMPTS[:2], seed=(0, 5), num_return_sequences=3)
    assert copies[0] == by_seed[0] and len({tuple(x) for x in copies}) == 6
    drafted, _ = write(llama, PROMPTS[:2], drafter=HASS(llama.folder), seed=(0, 5), num_return_sequences=3)
    assert drafted == copies


def test_lm_generate_takes_a_list_of_seeds():
    asked = dict(do_sample=True, max_new_tokens=8)
    texts = LM.generate(['ab', 'c'], seed=[4, 5], **asked).texts
    assert texts == [LM.generate(p, seed=s, **asked).text for p, s in (('ab', 4), ('c', 5))]
    lookup = PromptLookup(min_ngram=1)
    assert texts == LM.generate(['ab', 'c'], drafter=lookup, seed=torch.tensor([4, 5]), **asked).texts


def test_keys_are_frozen():
    "Else a text could not be repeated with another version"
    assert sequence_key(7, 0, torch.tensor([5, 6])) == (-2113556331, 954285786)
    assert sequence_key(2**63 - 1, 1, torch.tensor([])) == (1192676537, 1186176827)


@pytest.mark.parametrize('sample', [True, False])
@pytest.mark.parametrize('seed', [(1, 2), (1, 2, 3, 4), ()])
def test_a_wrong_number_of_seeds_is_refused(seed, sample):
    with pytest.raises(DecodingError, match='seed') as e:
        LM.generate(['a', 'b', 'c'], do_sample=sample, seed=seed, max_new_tokens=2)
    assert '\n' not in str(e.value) and ': ' in str(e.value)


@pytest.mark.parametrize('seed', [-1, 'x', True, 2**63, []])
def test_a_seed_that_is_set_later_is_checked_too(llama, seed):
    decoder = Decoder()
    decoder.seed = seed
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(DecodingError, match='seed is'):
        generate(llama.model, ids, torch.ones_like(ids), decoder, do_sample=True, max_new_tokens=2)


# --- without a seed


def drew(run):
    "How many numbers torch's global generator gave, counted by drawing until the states agree"
    torch.manual_seed(3)
    run()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for n in range(3):
        if torch.equal(torch.get_rng_state(), after):
            return n
        torch.randint(2**62, ())
    return n + 1


def test_a_drafter_without_a_seed_draws_once(llama):
    ids = torch.tensor(PROMPTS[:1] * 3)
    decode = lambda d, seed, sample: Decoder(drafter=d, seed=seed)(
        llama.model, ids, **_prepared(llama.model, ids, sample)
    )
    head = HASS(llama.folder)
    assert drew(lambda: decode(head, None, True)) == 1
    assert [drew(lambda: decode(*x)) for x in ((head, 5, True), (None, 5, True), (head, None, False))] == [0, 0, 0]


def _prepared(model, ids, sample):
    from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

    config = GenerationConfig(do_sample=sample, num_beams=1, max_length=9, pad_token_id=0)
    return dict(generation_config=config, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(9)]))


def test_equal_prompts_without_a_seed_are_draws_of_their_own(llama):
    texts, _ = write(llama, PROMPTS[:1] * 6, drafter=HASS(llama.folder), seed=None)
    assert len({tuple(x) for x in texts}) == 6


def test_rows_of_an_encoder_decoder_are_draws_of_their_own():
    "What the encoder has read is not among the ids, so rows differ by their numbers"
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    ids = torch.randint(3, 40, (4, 5), generator=generator(1))
    how = dict(do_sample=True, top_k=0, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids, custom_generate=Decoder(seed=3), **how)
    same(out, model.generate(ids, custom_generate=Decoder(seed=3), **how))
    assert len({tuple(x) for x in out[:, 1:].tolist()}) == 4


# --- all sequences together, or each alone


WARPERS = dict(
    temperature=[TemperatureLogitsWarper(0.6)],
    top_k=[TemperatureLogitsWarper(1.5), TopKLogitsWarper(4)],
    top_p=[TopPLogitsWarper(0.7)],
    min_p=[MinPLogitsWarper(0.2)],
    typical=[TypicalLogitsWarper(0.6)],
    epsilon=[EpsilonLogitsWarper(0.05)],
    eta=[EtaLogitsWarper(0.3)],
    top_h=[TopHLogitsWarper(0.5)],
    several=[TemperatureLogitsWarper(0.8), TopKLogitsWarper(8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)],
)


def forest(b, n, v, g):
    "Random trees whose siblings differ, fillers among their nodes"
    rows = []
    for _ in range(b):
        tokens = [0]
        parents = [-1]
        for i in range(1, n):
            up = int(torch.randint(-1, i, (), generator=g))
            token = int(torch.randint(0, v, (), generator=g))
            taken = any(p == up and t == token for p, t in zip(parents, tokens))
            is_filler = up < 0 or taken or parents[up] == -2
            tokens.append(token)
            parents.append(-2 if is_filler else up)
        rows.append((tokens, parents))
    return Tree(*(torch.tensor([row[k] for row in rows]) for k in (0, 1)))


@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('vocab', [None, 6])
@pytest.mark.parametrize('sample', [True, False])
@pytest.mark.parametrize('name', WARPERS)
def test_together_and_alone_choose_the_same_tokens(monkeypatch, name, sample, vocab, target):
    g = generator(0)
    deepest = 0
    for seed in range(30):
        tree = forest(3, 9, 6, g)
        logits = tuple(2 * torch.randn(3, 9, 7, generator=g) for _ in target.roles)
        texts = [torch.arange(n) for n in torch.randint(2, 9, (3,), generator=g).tolist()]
        done = torch.tensor([False, seed % 3 == 0, False])
        noise = shared_noise(torch.tensor([[3], [3], [4]]), torch.ones(3, 1), (seed, 1, 2))
        state = DecodingState(texts, done, 0, prompt=2, noise=noise)
        rules = SamplingRules(soft=WARPERS[name], sample=sample, noise=noise, vocab=vocab)
        assert sampling._reads_no_text(rules)
        together, _ = choose_tokens(target, tree, logits, state, rules)
        with monkeypatch.context() as m:
            m.setattr(sampling, '_reads_no_text', lambda rules: False)
            alone, _ = choose_tokens(target, tree, logits, state, rules)
        assert torch.equal(together, alone)
        deepest = max(deepest, int((together >= 0).sum(-1).max()))
    assert deepest >= 2


class Own(sampling.Target):
    "A target of somebody else, which only says how logits become scores"

    def combine(self, expert):
        return expert.float() / 2


@pytest.mark.parametrize('target', [PLAIN, COLD, Own()], ids=['plain', 'cold', 'own'])
@pytest.mark.parametrize('warpers', [[], WARPERS['temperature']], ids=['at 1', 'at 0.6'])
def test_one_operation_for_all_nodes_chooses_the_same_tokens(monkeypatch, warpers, target):
    "As on an accelerator; the generic scores, noise and maximum judge both"
    g = generator(0)
    for seed in range(30):
        tree = forest(3, 9, 6, g)
        logits = tuple(2 * torch.randn(3, 9, 7, generator=g) for _ in target.roles)
        noise = shared_noise(torch.tensor([[3], [3], [4]]), torch.ones(3, 1), (seed, 1, 2))
        state = DecodingState([torch.arange(n) for n in (3, 5, 2)], torch.zeros(3).bool(), 0, prompt=2, noise=noise)
        rules = SamplingRules(soft=warpers, sample=True, noise=noise)
        assert sampling._only_heats(rules)
        levels, _ = choose_tokens(target, tree, logits, state, rules)
        keys = sampling._keys_of_nodes(tree, noise.after(state.emitted, tree.size))
        at_once = sampling._drawn(target, rules, logits=logits, keys=keys)
        with monkeypatch.context() as m:
            m.setattr(sampling, '_only_heats', lambda rules: False)
            generic, _ = choose_tokens(target, tree, logits, state, rules)
        assert torch.equal(levels, generic)
        reached = levels >= 0
        assert torch.equal(at_once[reached], levels[reached]) and (at_once >= 0).all()


@pytest.mark.parametrize('target', [PLAIN, COLD, Own()], ids=['plain', 'cold', 'own'])
def test_a_draw_from_broken_logits_is_refused(target):
    rules = SamplingRules(sample=True, noise=SharedNoise(torch.zeros(2, 2, dtype=torch.int32)))
    logits = tuple(torch.randn(2, 1, 7, generator=generator(0)) for _ in target.roles)
    logits[0][1, 0, 3] = torch.nan
    state = DecodingState([torch.arange(3)] * 2, torch.zeros(2).bool(), 0, prompt=2, noise=rules.noise)
    tree = Tree(torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), -1))
    with pytest.raises(DecodingError, match=r'NaN or infinite logits in rows \[1\]'):
        choose_tokens(target, tree, logits, state, rules)


def test_the_keys_of_a_position_do_not_depend_on_what_was_asked_before():
    noise = SharedNoise(torch.randint(-(2**31), 2**31, (3, 2), generator=generator(0)).int())
    for emitted, n in (([0, 0, 0], 1), ([7, 300, 63], 5), ([2, 1, 0], 64), ([1000, 999, 0], 2)):
        positions = torch.tensor(emitted)[:, None] + torch.arange(n)
        assert torch.equal(noise.after(emitted, n), ops.position_keys(noise.keys, positions))


def test_only_a_temperature_is_left_to_the_operation():
    noise = SharedNoise(torch.zeros(1, 2, dtype=torch.int32))
    heat = TemperatureLogitsWarper(0.7)
    for soft, more in (
        ([heat, heat], {}),
        ([TopKLogitsWarper(3)], {}),
        ([heat], dict(vocab=9)),
        ([], dict(noise=None)),
    ):
        rules = SamplingRules(**dict(soft=soft, sample=True, noise=noise) | more)
        assert not sampling._only_heats(rules)


def test_what_reads_the_text_is_asked_with_each_text():
    class Mine(TemperatureLogitsWarper):
        "Derived from a class of transformers: it may do anything"

    noise = SharedNoise(torch.zeros(1, 2, dtype=torch.int32))
    for p in (RepetitionPenaltyLogitsProcessor(1.2), Mine(0.7), lambda text, scores: scores):
        assert not sampling._reads_no_text(SamplingRules(soft=[p], sample=True, noise=noise))
    assert not sampling._reads_no_text(SamplingRules(hard=[lambda t, s: s], sample=True, noise=noise))
    assert not sampling._reads_no_text(SamplingRules(sample=True))


@pytest.mark.parametrize('name', ['chain', 'fixed', 'joined'])
@pytest.mark.parametrize(
    'options',
    [dict(repetition_penalty=1.4), dict(no_repeat_ngram_size=2, top_p=0.9), dict(bad_words_ids=[[9], [5]], min_p=0.05)],
    ids=lambda o: next(iter(o)),
)
def test_processors_that_read_texts(llama, name, options):
    how = dict(temperature=0.9, **options)
    alone = [write(llama, [p], **how)[0][0] for p in PROMPTS]
    texts, out = write(llama, PROMPTS, drafter=DRAFTERS[name](llama.folder), **how)
    assert texts == alone and count_drafted(out) > 4


# --- the distribution, and bugs that a check of it must find

RUNS = 1500


def counted(t, target, drafter, **kw):
    "Counts of three tokens in one batch of rows with seeds of their own, their probabilities, accepted draft tokens"
    rows = dict(seed=tuple(range(RUNS)))
    return sampled(t, target, drafter, RUNS, batch=RUNS, rows=rows, **kw)


DRAWERS = dict(
    none=lambda f: None,
    chain=lambda f: HASS(f, chain=True, depth=2, adaptive=False),
    tree=lambda f: HASS(f, depth=2, nodes=6, adaptive=False),
    lookup=lambda f: PromptLookup(min_ngram=1, corpus=[[3, 1, 2, 1], [2, 2]], adaptive=False),
    joined=lambda f: JointDrafter((HASS(f, depth=2, nodes=6), PromptLookup(min_ngram=1)), nodes=7, adaptive=False),
)


@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('name', DRAWERS)
def test_three_tokens_have_the_target_s_distribution(small, name, target):
    counts, p, hits = counted(small, target, DRAWERS[name](small.folder))
    got, limit = chi_square(counts, p, RUNS)
    assert got < limit and (hits > 100 or name == 'none'), (got, limit, hits)


def is_off(t, drafter=None):
    "Whether the check above would fail"
    counts, p, _ = counted(t, PLAIN, drafter)
    got, limit = chi_square(counts, p, RUNS)
    return got > limit


@pytest.mark.parametrize('name', ['none', 'tree'])
def test_noise_reused_at_two_positions_is_found_out(small, monkeypatch, name):
    after = SharedNoise.after
    monkeypatch.setattr(
        SharedNoise, 'after', lambda self, emitted, n: after(self, [0] * len(emitted), 1).expand(-1, n, -1)
    )
    assert is_off(small, DRAWERS[name](small.folder))


def test_noise_shared_by_rows_is_found_out(small, monkeypatch):
    key = sampling.sequence_key
    monkeypatch.setattr(sampling, 'sequence_key', lambda seed, copy, prompt: key(seed // 8, copy, prompt))
    assert is_off(small)


def coupled(p, q):
    "Probability that two distributions draw the same token with the same Gumbel noise (Daliri et al. 2024)"
    ratio = torch.maximum(p[None] / p[:, None], q[None] / q[:, None])
    return (1 / ratio.sum(-1)).sum()


def acceptance(shift=0):
    "How often the first draft token is right, and the two probabilities that theory gives with and without shared noise"
    g = generator(5)
    p, q = (torch.randn(12, generator=g).mul(1.5).softmax(-1) for _ in range(2))
    p = (p + 2 * q) / 3
    rows = 4000
    noise = SharedNoise(torch.randint(-(2**31), 2**31, (rows, 2), generator=g).int(), 0.8)
    emitted = [2] * rows
    drafted = shared.draft_noise(noise, emitted, 2 + shift)
    proposed = drafted.added((q.log() * 0.8).expand(rows, 1, -1), shift)[:, 0].argmax(-1)
    drawn = (p.log() + ops.gumbel(noise.after(emitted, 1)[:, 0], 12)).argmax(-1)
    return float((proposed == drawn).float().mean()), float(coupled(p, q)), float((p * q).sum()), rows


def test_draft_tokens_are_right_as_often_as_theory_says():
    share, with_noise, without, rows = acceptance()
    margin = 4 * (with_noise * (1 - with_noise) / rows) ** 0.5
    assert abs(share - with_noise) < margin < (with_noise - without) / 4


def test_draft_noise_of_another_position_is_found_out():
    share, with_noise, without, rows = acceptance(shift=1)
    margin = 4 * (with_noise * (1 - with_noise) / rows) ** 0.5
    assert abs(share - with_noise) > margin and abs(share - without) < margin


@pytest.mark.parametrize('temperature', [1, 1.0, 0.7])
def test_inputs_of_a_draft_have_one_layout(temperature):
    "A program that was compiled for one temperature reads the bytes of every other"
    noise = shared.draft_noise(SharedNoise(torch.zeros(2, 2, dtype=torch.int32), temperature), [0, 3], 4)
    assert (noise.temperature.dtype, noise.temperature.shape) == (torch.float32, ())
    assert (noise.keys.dtype, noise.keys.shape, noise.keys.is_contiguous()) == (torch.int32, (2, 4, 2), True)
    assert isinstance(sampling.temperature_of([]), float)


@pytest.mark.slow
@pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')
def test_a_compiled_draft_has_the_tokens_of_every_temperature(llama):
    "One program for all temperatures, and as many accepted draft tokens as without a compiler"
    drafter = HASS(llama.folder, depth=2, top_k=3, nodes=5, adaptive=False)
    for temperature in (1.0, 0.6):
        how = dict(temperature=temperature, drafter=drafter, max_new_tokens=30)
        texts, out = write(llama, PROMPTS[:1], **how)
        again, fast = write(llama, PROMPTS[:1], rows=dict(compile=True), **how)
        assert again == texts and abs(count_drafted(fast) - count_drafted(out)) <= 1 < count_drafted(out)
    assert [len(p._runs) for p in drafter._bound.programs.values()] == [1]


def test_a_shift_costs_a_drafter_its_tokens_and_no_text(llama, monkeypatch):
    "By construction a drafter cannot change a text: what a bug in its noise costs is acceptance"
    texts, right = write(llama, PROMPTS, drafter=DRAWERS['tree'](llama.folder), max_new_tokens=60)
    draft = shared.draft_noise
    import npu_lora_decoding.speculation.head_drafter as head_drafter

    def shifted(noise, emitted, depth):
        noise = draft(noise, emitted, depth + 1)
        return replace(noise, keys=noise.keys[:, 1:])

    monkeypatch.setattr(head_drafter, 'draft_noise', shifted)
    again, wrong = write(llama, PROMPTS, drafter=DRAWERS['tree'](llama.folder), max_new_tokens=60)
    assert again == texts and count_drafted(wrong) < count_drafted(right)
