"Writing with a memory: the base where nothing is learned, whatever is plugged in; and no trace, whatever happens"

from dataclasses import replace
import pytest, torch
from hypothesis import given, settings as examples, strategies as st
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.temp_lora import generation as writing
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.temp_lora.budget import BUDGETS
from npu_lora_decoding.decoding.runner import BatchRunner
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.budget import plan_memory
from npu_lora_decoding.temp_lora.generation import repetition
from helpers.memories import traces
from helpers.toys import toy_lm
from helpers.memories import MODEL, PROMPT, STILL, plain_model, write

RULES = dict(window=None, chunk=1)


def windowed_greedy(ids, n, s, every=None):
    "All tokens in context through the model, from scratch for every token"
    d = s.chunk
    learned = len(ids) // s.chunk * s.chunk
    first = max(0, learned - s.latest)
    served = 1
    for _ in range(n):
        with torch.no_grad():
            ids = torch.cat([ids, MODEL(ids[None, first:]).logits[0, -1:].argmax(-1)])
        if len(ids) - learned >= d:
            learned += d
            if learned - first + d > s.window or served == every:
                first = max(0, learned - s.latest)
                served = 1
            else:
                served += 1
    return ids


shapes = st.integers(2, 9).flatmap(
    lambda d: st.integers(d + 1, 40).flatmap(lambda w: st.tuples(st.just(d), st.just(w), st.integers(1, w - d)))
)


@pytest.mark.slow
@examples(max_examples=12)
@given(
    shapes,
    st.sampled_from([('window', None), ('chunk', 1), ('every:2', 2), ('every:3', 3), ('drift:0.5', None)]),
    st.integers(1, 90),
)
def test_rate_zero_is_the_base_in_the_same_window(shape, rule, t):
    d, w, c = shape
    s = replace(STILL, chunk=d, window=w, context=c, recompute=rule[0])
    assert torch.equal(write(s, 24, t), windowed_greedy(PROMPT[:t], 24, s, rule[1]))


@pytest.fixture(scope='module')
def head(tmp_path_factory):
    head = DraftHead(head_config(MODEL.config)).requires_grad_(False)
    g = generator(0)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    return save_head(head, tmp_path_factory.mktemp('head') / 'toy', MODEL)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('t', [5, 21, 90])
@pytest.mark.parametrize('who', ['lookup', 'hass'])
def test_drafters_change_nothing(who, t, rule, head):
    "All in context, in a small window, and while learning: no forward pass reaches across the end of a chunk"
    roomy = replace(STILL, window=200, context=192, recompute=rule)
    learns = replace(STILL, lr=0.01, recompute=rule)
    plain = {s: write(s, 50, t) for s in (None, learns)}
    drafter = (
        PromptLookup(min_ngram=1, corpus=[x[t:] for x in plain.values()])
        if who == 'lookup'
        else HASS(head, nodes=4, depth=2, top_k=2, adaptive=False)
    )
    assert torch.equal(write(roomy, 50, t, drafter=drafter), plain[None]) and torch.equal(
        write(learns, 50, t, drafter=drafter), plain[learns]
    )
    assert not torch.equal(plain[learns], plain[None])


def test_repetition_is_the_share_of_n_grams_seen_before():
    naive = lambda ids, n=4: sum(
        ids[i : i + n] in [ids[j : j + n] for j in range(i)] for i in range(len(ids) - n + 1)
    ) / max(1, len(ids) - n + 1)
    for seed in range(20):
        ids = torch.randint(0, 2 + seed % 3, (seed + 1,), generator=generator(seed))
        assert repetition(ids) == pytest.approx(naive(ids.tolist()))


@pytest.mark.parametrize('t', [5, 21, 90])
def test_the_guard_skips_what_the_model_repeats_and_nothing_it_was_given(t, monkeypatch):
    learned = []
    monkeypatch.setattr(writing, 'learn', lambda phi, ids, n: learned.append(ids[-n:].tolist()))
    long = replace(STILL, chunk=20, window=60, context=20)
    text = write(replace(long, max_repetition=0.1), 150, t).tolist()
    chunks = [text[a : a + 20] for a in range(0, len(text) - 19, 20)]
    share = lambda k: repetition(torch.tensor(text[max(20 * k, t) : 20 * k + 20]))
    worth = [c for k, c in enumerate(chunks) if share(k) <= 0.1]
    assert (
        learned == worth[: len(learned)] and len(worth) - len(learned) <= 1
    )  # the very last chunk may end with the text
    assert learned[: t // 20] == chunks[: t // 20] and any(share(k) > 0.1 for k in range(len(chunks)))
    learned.clear()
    write(long, 150, t)
    assert len(learned) >= len(chunks) - 1


def test_a_text_that_fits_its_window_gets_a_note():
    "How long a text will be is known when it ends"
    lm = toy_lm()
    notes = lambda n: lm.generate([5] * 20, memory=replace(STILL, window=60, context=30), max_new_tokens=n).notes
    assert any('fits into the window of 60' in n for n in notes(10)) and not notes(50)


def test_what_was_given_is_learned_even_where_it_repeats_itself(monkeypatch):
    learned = []
    ids = torch.full((1, 20), 7)
    monkeypatch.setattr(writing, 'learn', lambda phi, ids, n: learned.append(ids[-n:].tolist()))
    MODEL.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=Decoder(memory=replace(STILL, max_repetition=0.05)),
        max_new_tokens=3,
        pad_token_id=0,
    )
    assert learned == [[7] * 8] * 2


def test_a_head_reads_what_is_in_context_of_a_long_prompt(head):
    "Its draft tokens are those for the prompt's end alone, so every feature stood beside the token that follows it"

    def drafted(memory, ids):
        trees = []

        class Spy(HASS):
            def bind(self, rows):
                drafter = super().bind(rows)
                propose = drafter.propose

                def spying(*args):
                    trees.append(propose(*args))
                    return trees[-1]

                drafter.propose = spying
                return drafter

        MODEL.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=Decoder(memory=memory, drafter=Spy(head, nodes=4, depth=2, top_k=2, adaptive=False)),
            max_new_tokens=5,
            pad_token_id=0,
        )
        return [x.tokens.tolist() for x in trees]

    ids = PROMPT[None, :90]
    assert drafted(STILL, ids) == drafted(None, ids[:, 88 - STILL.latest :])


@pytest.mark.parametrize('amateur', ['base', 'task', 'phi'])
def test_amateurs(amateur, tmp_path):
    "With nothing learned, phi is the base, and task is the expert"
    bank = AdapterBank(MODEL, [load_adapter(toy_adapter(MODEL, tmp_path), MODEL)])
    roomy = replace(STILL, window=200, context=192, amateur=amateur)
    cold = CoLD(beta=0.7)
    want = write(None, bank=bank) if amateur == 'task' else write(None, target=cold, bank=bank)
    assert torch.equal(write(roomy, target=cold, bank=bank), want)
    assert not torch.equal(
        write(replace(roomy, lr=0.02), 60, target=cold, bank=bank), write(replace(roomy), 60, target=cold, bank=bank)
    )


def test_contrast_with_what_was_learned_needs_no_task_adapter():
    assert not torch.equal(
        write(replace(STILL, lr=0.02), 60, target=CoLD(beta=1.0)), write(replace(STILL, lr=0.02), 60)
    )


def test_sampling_is_that_of_the_base_and_repeats_by_seed():
    roomy = replace(STILL, window=200, context=192)
    assert torch.equal(write(roomy, do_sample=True, seed=3), write(None, do_sample=True, seed=3))
    a, b = (write(replace(STILL, lr=0.01), do_sample=True, seed=3) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt(), torch.OutOfMemoryError('x')])
def test_no_trace(error, monkeypatch, tmp_path):
    import npu_lora_decoding.temp_lora.adapter as t

    model = plain_model()
    before = traces(model)
    true = t.backward_chunk
    calls = []
    kept = replace(STILL, lr=0.01, file=str(tmp_path / 'story.safetensors'))

    def failing(*a):
        calls.append(1)
        if len(calls) == 6:
            raise error
        return true(*a)

    monkeypatch.setattr(t, 'backward_chunk', failing)
    with pytest.raises(type(error)):
        write(kept, 60, model=model)
    assert traces(model) == before and [f.name for f in tmp_path.iterdir()] == [
        'story.safetensors'
    ]  # what was learned before it is kept
    monkeypatch.undo()
    write(replace(kept, file=None), model=model)
    assert traces(model) == before


def test_an_abandoned_stream_leaves_no_trace():
    model = plain_model()
    before = traces(model)
    from npu_lora_decoding.decoding.sampling import SamplingRules

    ids = PROMPT[None, :21]
    steps = Decoder(memory=replace(STILL, lr=0.01)).steps(
        model, ids, torch.ones_like(ids), rules=SamplingRules(), max_length=80, pad_id=0
    )
    for _ in range(15):
        next(steps)
    steps.close()
    assert traces(model) == before


def test_a_memory_that_has_ended_holds_nothing():
    memory = replace(STILL, lr=0.01).start(MODEL, None, ('expert',), PROMPT[None], False)
    with memory:
        assert memory.phi.A and memory.bank is not None
    assert not (memory.phi.A or memory.phi.B or memory.phi.opt or memory.phi.bank or memory.bank)


def test_a_head_still_reads_the_last_forward_pass_after_rows_began_again():
    rows = BatchRunner(MODEL, ('expert',), 1, 64, keep_hidden=True)
    with torch.no_grad():
        rows.prefill(PROMPT[None, :9], torch.ones(1, 9))
        rows.commit(None)
        before = rows.hidden
        rows.reset_prefix(PROMPT[None, 4:9])
    assert rows.hidden is before and rows.valid.shape[1] == rows.cache.get_seq_length() == 5


def test_a_prompt_longer_than_the_context_is_read_in_chunks():
    lm = toy_lm()
    ids = torch.randint(4, 76, (700,), generator=generator(4))
    with pytest.raises(DecodingError, match='context holds 256'):
        lm.generate(ids, max_new_tokens=4)
    out = lm.generate(ids, memory=replace(STILL, lr=0.01, chunk=64, window=160, context=64), max_new_tokens=300)
    assert 0 < len(out.tokens[0]) <= 300


def test_end_of_sequence_ends_it():
    lm = toy_lm()
    text = lm.generate(PROMPT[:21] % 70 + 4, memory=STILL, max_new_tokens=40, eos_token_id=list(range(97)))
    assert len(text.tokens[0]) == 1


def test_sessions(tmp_path):
    s = replace(STILL, lr=0.02, recompute='chunk')
    whole = write(s, 59)
    kept = replace(s, file=str(tmp_path / 'story.safetensors'))
    half = write(kept, 43)
    again = MODEL.generate(
        half[None],
        attention_mask=torch.ones_like(half[None]),
        custom_generate=Decoder(memory=kept),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
    )[0]
    assert torch.equal(again, whole)
    with pytest.raises(DecodingError, match='another text'):
        write(replace(kept), 4, 20)


def test_what_is_refused():
    two = PROMPT[None, :21].repeat(2, 1)
    with pytest.raises(DecodingError, match='one document'):
        MODEL.generate(
            two,
            attention_mask=torch.ones_like(two),
            custom_generate=Decoder(memory=STILL),
            max_new_tokens=4,
            pad_token_id=0,
        )
    for s, options, what in (
        (STILL, dict(compile=True), 'compile=False'),
        (replace(STILL, window=999), {}, 'smaller window'),
        (replace(STILL, train_context=999), {}, 'train_context'),
        (replace(STILL, amateur='task'), dict(target=CoLD()), 'task adapter'),
        (replace(STILL, recompute='x'), {}, 'policy'),
        (replace(STILL, recompute='slide:4'), {}, 'for reading'),
    ):
        with pytest.raises(DecodingError, match=what):
            write(s, **options)


def test_plans_keep_their_budget():
    lm = toy_lm(max_position_embeddings=4096)
    for priority in BUDGETS:
        for budget in (0.8, 2.0, 20.0):
            try:
                p = plan_memory(lm, 50_000, priority, budget)
            except DecodingError as e:
                assert 'allow' in str(e)
                continue
            assert (p.memory if priority == 'memory' else p.work) <= budget and p.settings.window <= 4096
    with pytest.raises(DecodingError, match='useless'):
        plan_memory(lm, 4096)
    with pytest.raises(DecodingError, match='unknown priority'):
        plan_memory(lm, 50_000, 'speed')
