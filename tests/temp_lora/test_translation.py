"Translating a document: plain decoding where nothing is learned, no peeking, every token learned once, no trace"

from dataclasses import replace
import pytest, torch
from hypothesis import given, settings as examples, strategies as st
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing
from npu_lora_decoding.temp_lora import translation as translating
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.translation import MODES, Form, one_line, translate_document
from npu_lora_decoding.temp_lora.generation import repetition
from helpers.memories import traces
from helpers.toys import toy_lm


def fused_lm(opening=False, **config):
    "Characters that decode without blanks between them; with `opening`, every text begins with <s>"
    lm = toy_lm(vocab=76, **config)
    backend = lm.tokenizer.backend_tokenizer
    backend.decoder = decoders.Fuse()
    if opening:
        backend.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return lm


TOY = fused_lm()
PLAIN = Form('={source}: {target};')
N = 16
STILL = TempLoRA(chunk=32, window=128, context=64, train_context=16, r=4, alpha=4.0, lr=0.0)
LEARNS = replace(STILL, lr=0.02, dropout=0.0)
WORDS = 'in the beginning was a word and it was with him who made all things and without him was nothing made'.split()
SOURCES = [' '.join(WORDS[i : i + 2]) for i in range(16)]
GOLD = [s.upper() + '.' for s in SOURCES]


def translate(mode='own', s=STILL, lm=TOY, sources=SOURCES, references=GOLD, form=PLAIN, new_tokens=N, **options):
    return translate_document(
        lm, sources, s, mode=mode, references=references, form=form, new_tokens=new_tokens, **options
    )


def document(mode, translated, sources=SOURCES, references=GOLD, form=PLAIN):
    "The text that a mode keeps, pair by pair"
    if mode == 'source':
        return [form.alone(x) for x in sources]
    return [form.pair(x, y) for x, y in zip(sources, translated if mode == 'own' else references) if y]


def naive(mode, s, lm, sources=SOURCES, references=GOLD, form=PLAIN, n=N):
    "All numbers of pairs tried, and everything in context from scratch for every token"
    tokens = lambda t: lm.tokenizer(t, add_special_tokens=False).input_ids
    translated = []
    opening = lm.tokenizer('').input_ids
    for i, source in enumerate(sources):
        pairs = document(mode, translated, sources[:i], references[:i], form)
        ask = form.prompt(source)
        size = lambda k: len(tokens(''.join(pairs[k:])))
        k = min(
            k
            for k in range(len(pairs) + 1)
            if size(k) <= s.latest and size(k) + len(opening) + len(tokens(ask)) + n <= s.window
        )
        ids = opening + tokens(''.join(pairs[k:]) + ask)
        text = ''
        for _ in range(n):
            with torch.no_grad():
                ids.append(lm.model(torch.tensor([ids])).logits[0, -1].argmax().item())
            text += lm.tokenizer.decode(ids[-1:], skip_special_tokens=True)
            if form.after in text or ids[-1] == 2:
                break
        translated.append(one_line(text.partition(form.after)[0]))
    return translated


@pytest.fixture
def learned_chunks(monkeypatch):
    "The ids and the length of every chunk that is learned"
    calls = []
    true = translating.learn
    monkeypatch.setattr(
        translating, 'learn', lambda phi, ids, n: (calls.append((ids.tolist(), n)), true(phi, ids, n))[1]
    )
    return calls


@pytest.fixture
def asked(monkeypatch):
    "Prompt and new tokens of every sentence"
    calls = []
    true = LM.generate

    def generate(self, ids, **options):
        out = true(self, ids, **options)
        calls.append((ids.tolist(), [t.id for t in out.tokens[0]], options['max_new_tokens']))
        return out

    monkeypatch.setattr(LM, 'generate', generate)
    return calls


@pytest.mark.parametrize('opening', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_rate_zero_is_plain_decoding_of_the_same_prompts(mode, opening):
    lm = fused_lm(opening)
    assert translate(mode, lm=lm).texts == naive(mode, STILL, lm)


shapes = st.integers(4, 60).flatmap(
    lambda d: st.integers(max(d + 1, 50), 160).flatmap(
        lambda w: st.tuples(st.just(d), st.just(w), st.integers(1, w - d))
    )
)


@examples(max_examples=6)
@given(shapes, st.sampled_from(MODES))
def test_rate_zero_in_any_window(shape, mode):
    d, w, c = shape
    s = replace(STILL, chunk=d, window=w, context=c)
    assert translate(mode, s, sources=SOURCES[:8], references=GOLD[:8]).texts == naive(
        mode, s, TOY, SOURCES[:8], GOLD[:8]
    )


@pytest.mark.parametrize('mode', MODES)
def test_drafters_contrast_and_task_adapters_pass_through(mode, tmp_path):
    lm = LM(TOY.model, TOY.tokenizer, load_adapter(toy_adapter(TOY.model, tmp_path), TOY.model), 'toy')
    want = translate(mode, lm=lm).texts
    assert want != translate(mode).texts
    assert translate(mode, lm=lm, drafter=PromptLookup()).texts == want
    learned = translate(mode, LEARNS, lm=lm)
    assert translate(mode, LEARNS, lm=lm, drafter=PromptLookup()).texts == learned.texts != want and learned.learned > 2
    cold = CoLD(beta=0.9)
    task = replace(STILL, amateur='task')
    contrast = translate(mode, lm=lm, target=cold).texts
    assert (
        contrast != want and translate(mode, task, lm=lm, target=cold).texts == want
    )  # nothing learned: expert and amateur are one
    assert translate(mode, replace(STILL, amateur='phi'), lm=lm, target=cold).texts == contrast  # and phi is the base
    assert translate(mode, replace(LEARNS, amateur='task'), lm=lm, target=cold).texts != learned.texts


def test_sampling_repeats_by_seed():
    a, b, c = (translate(s=LEARNS, do_sample=True, seed=seed).texts for seed in (3, 3, 4))
    assert a == b != c


@pytest.mark.parametrize('s', [STILL, LEARNS])
@pytest.mark.parametrize('i', [0, 5, 15])
def test_a_reference_never_reaches_its_own_translation(s, i):
    other = GOLD[:i] + [r[::-1] + '!' for r in GOLD[i:]]
    a = translate('gold', s)
    b = translate('gold', s, references=other)
    assert a.texts[: i + 1] == b.texts[: i + 1] and (i == 15 or a.texts[i + 1 :] != b.texts[i + 1 :])


@pytest.mark.parametrize('mode', ['own', 'source'])
def test_without_feedback_references_are_never_read(mode):
    assert (
        translate(mode, LEARNS)
        == translate(mode, LEARNS, references=[x[::-1] for x in GOLD])
        == translate(mode, LEARNS, references=None)
    )


@pytest.mark.parametrize('opening', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_every_token_is_learned_once_in_order_behind_its_prefix(mode, opening, learned_chunks):
    lm = fused_lm(opening)
    out = translate(mode, LEARNS, lm=lm)
    first = lm.tokenizer('').input_ids
    pairs = [lm.tokenizer(p, add_special_tokens=False).input_ids for p in document(mode, out.texts)]
    text = sum(pairs, [])
    at = 0
    ends = [sum(map(len, pairs[:k])) for k in range(1, len(pairs) + 1)]
    for ids, n in learned_chunks:
        assert ids == first + text[max(0, at - 16) : at + n]
        at = at + n
        assert at == next(
            e for e in ends if e - (at - n) >= 32
        )  # as soon as a chunk is complete, to the end of its last pair
    assert out.learned == len(learned_chunks) > 2 and [n for n, _ in out.chunks] == [n for _, n in learned_chunks]
    assert at < len(text) and ends[-2] - at < 32  # nothing complete is left but what the last sentence completed


@pytest.mark.parametrize('mode', MODES)
def test_the_context_is_whole_pairs_in_the_window(mode, asked):
    s = replace(
        LEARNS, chunk=20, window=80, context=60
    )  # question and answer take more than a chunk: now the window decides, now the context
    out = translate(mode, s)
    for i, ((prompt, new, longest), x) in enumerate(zip(asked, out.sentences)):
        assert len(prompt) + longest <= s.window and len(new) <= longest and x.stop - x.first <= s.latest
        ids = [TOY.tokenizer(p).input_ids for p in document(mode, out.texts, SOURCES[:i], GOLD[:i])]
        assert prompt == sum(ids, [])[x.first :] + TOY.tokenizer(PLAIN.prompt(SOURCES[i])).input_ids
        assert x.first in [sum(map(len, ids[:k])) for k in range(len(ids) + 1)] and x.stop == sum(map(len, ids))
    assert len({x.first for x in out.sentences}) > 5


def test_a_pair_that_just_fits_is_in_context():
    size = len(PLAIN.pair('aa', 'bb'))
    for room, pairs in ((3 * size, 3), (3 * size - 1, 2)):
        window = room + len(PLAIN.prompt('aa')) + N
        by_context = replace(STILL, chunk=64, context=room)
        by_window = replace(STILL, chunk=1, window=window, context=window - 1)
        for s in (by_context, by_window):
            out = translate('gold', s, sources=['aa'] * 8, references=['bb'] * 8)
            assert [(x.stop - x.first) // size for x in out.sentences] == [min(i, pairs) for i in range(8)]


def test_what_pends_beyond_the_context_is_learned_in_pieces(learned_chunks):
    long = ['A' * 700, *GOLD[1:]]
    out = translate('gold', LEARNS, references=long)
    text = TOY.tokenizer(''.join(document('gold', out.texts, references=long))).input_ids
    assert max(len(ids) for ids, _ in learned_chunks) <= TOY.context and [n for _, n in learned_chunks][:3] == [
        240,
        240,
        len(PLAIN.pair(SOURCES[0], long[0])) - 480,
    ]
    assert sum([ids[-n:] for ids, n in learned_chunks], []) == text[: sum(n for _, n in learned_chunks)]
    assert (
        out.sentences[1].version == 3 and out.sentences[1].first == out.sentences[1].stop
    )  # the pair is out of sight, but learned


def test_a_rest_too_short_for_a_chunk_waits(learned_chunks):
    long = ['A' * (240 + 20 - len(PLAIN.pair(SOURCES[0], ''))), *GOLD[1:]]
    translate('gold', LEARNS, references=long)
    assert (
        learned_chunks[0][1] == 240
        and 32 <= learned_chunks[1][1] < 240
        and len(learned_chunks[1][0]) == 16 + learned_chunks[1][1]
    )


def test_no_updates_learn_nothing(learned_chunks):
    out = translate(s=replace(LEARNS, epochs=0))
    assert learned_chunks == [] and out.texts == translate().texts
    assert out.learned == 0 and out.chunks == [] and {x.learned for x in out.sentences} == {0}


@pytest.mark.slow
def test_what_was_learned_matters_and_repeats():
    for mode in MODES:
        a = translate(mode, LEARNS)
        b = translate(mode, LEARNS)
        assert a == b and a.texts != translate(mode).texts


def test_the_last_sentence_is_not_learned(learned_chunks):
    translate('gold', LEARNS, sources=SOURCES[:2], references=['A' * 40, 'B' * 40])
    assert len(learned_chunks) == 1


def test_the_guard_passes_over_what_the_model_repeats_and_nothing_it_was_given(learned_chunks):
    out = translate(s=replace(LEARNS, max_repetition=0.05), new_tokens=24)
    chunks = []
    pending = []
    for x, y in [(x, y) for x, y in zip(SOURCES[:-1], out.texts) if y]:
        pair = TOY.tokenizer(PLAIN.pair(x, y)).input_ids
        asks = len(TOY.tokenizer(PLAIN.prompt(x)).input_ids)
        pending += [(t, k >= asks) for k, t in enumerate(pair)]
        if len(pending) >= 32:
            chunks.append(pending)
            pending = []
    worth = [[t for t, _ in c] for c in chunks if repetition(torch.tensor([t for t, own in c if own])) <= 0.05]
    assert [ids[-n:] for ids, n in learned_chunks] == worth and 0 < len(worth) == out.learned < len(chunks)
    assert sum('repeats itself' in n for n in out.notes) == len(chunks) - len(worth)
    learned_chunks.clear()
    same = ['AAAAAAAA'] * 16
    assert translate('gold', replace(LEARNS, max_repetition=0.05), references=same).learned == len(learned_chunks) > 5


def test_an_empty_translation_is_not_kept(monkeypatch):
    true = LM.generate

    def silent(self, ids, **options):
        out = true(self, ids, **options)
        if TOY.tokenizer.decode(ids).endswith(PLAIN.prompt(SOURCES[3])):
            out.texts = [' ;']
        return out

    monkeypatch.setattr(LM, 'generate', silent)
    out = translate()
    assert (
        out.texts[3] == ''
        and out.sentences[4].stop == out.sentences[3].stop
        and any('translations are empty' in n for n in out.notes)
    )
    assert translate('gold').sentences[4].stop > out.sentences[4].first


def test_a_translation_ends_with_the_form_the_sequence_or_the_tokens(asked):
    out = translate()
    common = max(set(''.join(out.texts)), key=''.join(out.texts).count)
    asked.clear()
    ends = translate(form=Form('={source}: {target}' + common))
    for _, new, _ in asked:
        assert common not in TOY.tokenizer.decode(new[:-1])  # nothing is written after it has ended
    assert sum(TOY.tokenizer.decode(new).endswith(common) for _, new, _ in asked) > 3 and any(
        x.whole for x in ends.sentences
    )
    for x in out.sentences:
        assert PLAIN.after not in x.text and '\n' not in x.text
    assert any(x.whole for x in out.sentences) and not all(x.whole for x in out.sentences)
    assert f'{sum(not x.whole for x in out.sentences)} of 16 translations did not end within 16 tokens' in out.notes[0]
    ended = translate(eos_token_id=list(range(97)))
    assert all(x.whole and len(x.text) <= 1 for x in ended.sentences)


def test_a_stop_spread_over_tokens_and_one_that_stands_in_the_question():
    form = Form(';{source};{target};')  # the question ends with what ends a translation
    assert translate(form=form).texts == naive('own', STILL, TOY, form=form)
    letters = sorted({a + b for x in translate().texts for a, b in zip(x, x[1:])})
    form = Form('={source}: {target}' + letters[0])
    assert translate('source', form=form).texts == naive('source', STILL, TOY, form=form)


def test_each_sentence_is_reported_before_anything_is_learned_of_a_sentence(learned_chunks):
    reported = []
    out = translate(s=LEARNS, on_sentence=lambda o: reported.append((len(o.texts), o.learned, len(learned_chunks))))
    assert [t[0] for t in reported] == list(range(1, 17)) and [t[1] for t in reported] == [t[2] for t in reported] == [
        x.version for x in out.sentences
    ]


def test_a_document_within_the_context_gets_a_note():
    out = translate(s=replace(LEARNS, window=250, context=200), sources=SOURCES[:3], references=GOLD[:3])
    assert 'useless' in out.notes[-1] and 'useless' not in ''.join(translate(s=LEARNS).notes)


@pytest.mark.parametrize('error', [None, RuntimeError('x'), KeyboardInterrupt(), torch.OutOfMemoryError('x')])
@pytest.mark.parametrize('where', ['learning', 'decoding', 'saying'])
def test_no_trace(error, where, monkeypatch, tmp_path):
    import npu_lora_decoding.temp_lora.adapter as t

    lm = fused_lm()
    lm.model.train()
    lm.model.model.norm.weight.requires_grad_()
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path), lm.model)
    before = traces(lm.model)
    calls = []

    def failing(true):
        def f(*a, **k):
            calls.append(1)
            if len(calls) == 4 and error is not None:
                raise error
            return true(*a, **k)

        return f

    if where == 'learning':
        monkeypatch.setattr(t, 'backward_chunk', failing(t.backward_chunk))
    if where == 'decoding':
        monkeypatch.setattr(lm.model.model, 'forward', failing(lm.model.model.forward))
    say = failing(lambda out: None) if where == 'saying' else None
    if error is None:
        translate(s=LEARNS, lm=lm, on_sentence=say)
    else:
        with pytest.raises(type(error)):
            translate(s=LEARNS, lm=lm, on_sentence=say)
    monkeypatch.undo()
    lm.model.model.__dict__.pop('forward', None)
    assert len(calls) >= 4 and traces(lm.model) == before


@pytest.mark.parametrize(
    'options, what',
    [
        (dict(sources=[]), 'no sources'),
        (dict(sources='a text'), 'got str'),
        (dict(sources=None), 'got NoneType'),
        (dict(sources=['a', ' \n\t']), 'source 1'),
        (dict(sources=['a', 3]), 'source 1'),
        (dict(mode='both'), 'unknown mode'),
        (dict(mode='gold', references=None), 'there are none'),
        (dict(references=GOLD[1:]), '15 references for 16 sources'),
        (dict(mode='gold', references=[*GOLD[1:], ' ']), 'reference 15'),
        (dict(mode='gold', references=[*GOLD[1:], 'a;b']), 'which ends a translation'),
        (dict(sources=['a', 'b' * 111], references=None), 'sentence 1'),
        (dict(new_tokens=0), 'at least 1'),
        (dict(s=replace(STILL, window=999)), 'smaller window'),
        (dict(s=replace(STILL, train_context=225)), 'train_context'),
        (dict(s=replace(STILL, file='x')), 'leave file out'),
        (dict(compile=True), 'compile=False'),
        (dict(memory=STILL), 'leave it out'),
        (dict(stop_strings=['a'], chat=True), 'chat, stop_strings'),
        (dict(s=replace(STILL, amateur='task'), target=CoLD()), 'task adapter'),
    ],
)
def test_what_is_refused(options, what, learned_chunks, asked):
    with pytest.raises(DecodingError, match=what):
        translate(**options)
    assert not learned_chunks and not asked


def test_the_longest_sentence_that_fits():
    assert len(translate(sources=['b' * (128 - N - 2), 'a'], references=None).texts) == 2
    opened = fused_lm(True)
    with pytest.raises(DecodingError, match='sentence 0'):
        translate(sources=['b' * (128 - N - 2)], references=None, lm=opened)
    with pytest.raises(DecodingError, match='opening'):
        translate(s=replace(STILL, train_context=224), lm=opened)


texts = st.text(max_size=30).filter(lambda t: t.strip() != '')


@given(texts, texts)
def test_no_sentence_breaks_the_form(source, target):
    form = Form()
    lines = form.pair(source, target).split('\n')
    assert (
        len(lines) == 4
        and lines[2:] == ['', '']
        and lines[0] == f'Source: {one_line(source)}'
        and lines[1] == f'Translation: {one_line(target)}'
    )
    assert (
        form.pair(source, target).startswith(form.prompt(source))
        and not form.prompt(source).endswith(' ')
        and form.after not in form.pair(source, target)[:-2]
    )
    assert form.alone(source) == f'Source: {one_line(source)}\n\n'


def test_fields_inside_sentences_are_only_words():
    odd = '{source} {target} {0} {{'
    assert Form().pair(odd, odd) == f'Source: {odd}\nTranslation: {odd}\n\n'


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{source}',
        '{target}\n',
        '{target}{source}\n',
        '{source}{source}{target}\n',
        '{source}{target}{target}\n',
        '{source}{target}',
    ],
)
def test_forms_that_are_none(text):
    with pytest.raises(DecodingError, match='form'):
        Form(text)
