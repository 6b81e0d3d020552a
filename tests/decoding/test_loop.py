"The loop: transformers' tokens when nothing is plugged in, the same tokens whatever is drafted, and a model left as it was"

import copy, math
import pytest, torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)
import npu_lora_decoding.decoding.runner as rows_module
from npu_lora_decoding.foundations import ops, programs
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.decoding.loop import Decoder, Drafter, Output, bank_of
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.models import FAMILIES, embedded_folder, load_tokenizer
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.decoding.tree import Tree
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from helpers.loops import EndsOn, N, Pair, eager_dynamo, generate, same, uncompiled
from helpers.loops import rows  # a fixture

WINDOWED = ('mistral', 'gemma2', 'gemma3_text')
compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')


def toy(family='llama', **kw):
    "Windows shorter than the sequences, so that they matter"
    return toy_model(family, **(dict(sliding_window=6) if family in WINDOWED else {}), **kw)


@pytest.fixture(scope='module', params=FAMILIES)
def model(request):
    return toy(request.param)


@pytest.fixture(scope='module')
def llama():
    return toy()


@pytest.fixture(scope='module')
def folder(llama, tmp_path_factory):
    return toy_adapter(llama, tmp_path_factory.mktemp('adapter'))


@pytest.fixture(scope='module')
def bank(llama, folder):
    return AdapterBank(llama, [load_adapter(folder, llama)], ops.lora)


def prompts(lengths=(7, 3, 5), seed=0):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) >= t - n).long() for n in lengths])
    return torch.randint(3, 97, mask.shape, generator=generator(seed)) * mask, mask


def loop_is_transformers(model, ids, mask, **kw):
    theirs = generate(model, ids, mask, **kw)
    same(generate(model, ids, mask, Decoder(), **kw), theirs)
    return theirs


# --- the loop is transformers; no mismatch is excused

SAMPLED = dict(do_sample=True, temperature=1.3, top_k=0)


@pytest.mark.parametrize('ends', ['none', 'several'])
@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('how', [dict(), SAMPLED], ids=['greedy', 'sampled'])
def test_tokens_of_transformers(model, how, lengths, ends):
    ids, mask = prompts(lengths)
    t = ids.shape[1]
    for seed in range(2):
        written = loop_is_transformers(model, ids, mask, seed=seed, **how)
        if ends == 'none':
            continue
        eos = [written[0, t + 3].item(), written[-1, t + 6].item(), 96]
        assert not torch.equal(loop_is_transformers(model, ids, mask, seed=seed, eos_token_id=eos, **how), written)


def test_sampling_depends_on_the_seed(llama):
    a, b = (generate(llama, *prompts(), Decoder(), seed=s, **SAMPLED) for s in (0, 1))
    assert not torch.equal(a, b)


PROCESSORS = dict(
    repetition_penalty=dict(repetition_penalty=20.0),
    no_repeat_ngram_size=dict(no_repeat_ngram_size=2),
    bad_words_ids=dict(bad_words_ids='seen'),
    min_new_tokens=dict(min_new_tokens=8, eos_token_id='seen'),
    suppress_tokens=dict(suppress_tokens='seen'),
    begin_suppress_tokens=dict(begin_suppress_tokens='seen'),
    temperature=SAMPLED | dict(temperature=0.4),
    top_k=SAMPLED | dict(top_k=3),
    top_p=SAMPLED | dict(top_p=0.4),
    min_p=SAMPLED | dict(min_p=0.4),
    several=SAMPLED
    | dict(
        temperature=2.0,
        top_k=9,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        suppress_tokens='seen',
    ),
)


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('name', PROCESSORS)
@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_processors_of_transformers(family, name, lengths):
    model = toy(family)
    ids, mask = prompts(lengths)
    kw = dict(PROCESSORS[name])
    usual = {k: kw[k] for k in ('do_sample', 'eos_token_id') if k in kw} | (SAMPLED if kw.get('do_sample') else {})
    written = generate(model, ids, mask, max_new_tokens=20)[:, ids.shape[1] : ids.shape[1] + 4].unique().tolist()
    fill = lambda o: {
        k: ([[t] for t in written] if k == 'bad_words_ids' else written) if v == 'seen' else v for k, v in o.items()
    }
    got = loop_is_transformers(model, ids, mask, max_new_tokens=20, **fill(kw))
    plain = generate(model, ids, mask, max_new_tokens=20, **fill(usual))
    assert got.shape != plain.shape or not torch.equal(got, plain)  # the processor did something


@pytest.mark.parametrize(
    'kw',
    [
        dict(max_new_tokens=1),
        dict(max_new_tokens=None, max_length=12),
        dict(max_new_tokens=None, max_length=8),
        dict(max_new_tokens=1, **SAMPLED),
    ],
    ids=str,
)
def test_lengths_of_transformers(model, kw):
    ids, mask = prompts()
    assert loop_is_transformers(model, ids, mask, **kw).shape[1] == (kw.get('max_length') or 8)


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
def test_guidance_of_transformers(llama, bank, lengths):
    "Its forward passes are its own, so it goes with plain decoding alone"
    assert not torch.equal(
        loop_is_transformers(llama, *prompts(lengths), guidance_scale=1.5), generate(llama, *prompts(lengths))
    )
    for decoder in (Decoder(CoLD(), bank=bank), Decoder(drafter=Drafter())):
        with pytest.raises(DecodingError, match='passes of its own'):
            generate(llama, *prompts(lengths), decoder, guidance_scale=1.5)


def test_several_answers_a_prompt(llama):
    assert len(loop_is_transformers(llama, *prompts(), num_return_sequences=2, **SAMPLED)) == 6


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
def test_a_criterion_of_ours(model, lengths):
    ids, mask = prompts(lengths)
    t = ids.shape[1]
    written = generate(model, ids, mask)
    stop = StoppingCriteriaList([EndsOn([written[0, t + 2].item(), written[-1, t + 4].item()])])
    # With an end token transformers pads what has ended, as we always do; without one it goes on writing there.
    assert not torch.equal(loop_is_transformers(model, ids, mask, stopping_criteria=stop, eos_token_id=96), written)
    free = generate(model, ids, mask, stopping_criteria=stop)
    ours = generate(model, ids, mask, Decoder(), stopping_criteria=stop)
    assert free.shape == ours.shape
    for a, b in zip(free[:, t:], ours[:, t:]):
        end = next((i + 1 for i, x in enumerate(a) if x in stop[0].tokens), len(a))
        same(a[:end], b[:end])
        assert not b[end:].any()


class Sees(StoppingCriteria):
    "Remembers the texts it is shown"

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores, **kw):
        self.seen.append(ids.tolist())
        return torch.zeros(len(ids), dtype=torch.bool)


def test_criteria_and_processors_see_the_same_texts(model):
    "Also those of sequences that have ended: they are padded"
    ids, mask = prompts()
    eos = generate(model, ids, mask)[0, 9].item()
    seen = []
    for decoder in (None, Decoder()):
        seen.append((stop := Sees(), processed := []))

        def look(text, scores):
            processed.append(text.tolist())
            return scores

        generate(
            model,
            ids,
            mask,
            decoder,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([look]),
            eos_token_id=eos,
        )
    assert seen[0][0].seen == seen[1][0].seen and seen[0][1] == seen[1][1]
    assert seen[0][0].seen[-1][0][10:12] == [0, 0]


@pytest.fixture(scope='module')
def tokenizer():
    return load_tokenizer(embedded_folder())


@pytest.fixture(scope='module')
def speaker(tokenizer):
    return toy(vocab=len(tokenizer), context=64)


@pytest.mark.slow
@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
def test_stop_strings(speaker, tokenizer, lengths):
    ids, mask = prompts(lengths)
    t = ids.shape[1]
    written = generate(speaker, ids, mask, eos_token_id=2)
    words = [tokenizer.decode(written[0, t + 3 : t + 5])[1:], tokenizer.decode(written[-1, t + 5 : t + 6])]
    assert all(words)
    theirs = generate(speaker, ids, mask, stop_strings=words, tokenizer=tokenizer, eos_token_id=2)
    same(
        generate(
            speaker,
            ids,
            mask,
            Decoder(),
            stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, words)]),
            eos_token_id=2,
        ),
        theirs,
    )
    assert theirs.shape[1] < written.shape[1] or not torch.equal(theirs, written)


NO_TOKENIZER = (
    'transformers drops tokenizer= when custom_generate is a callable, so stop_strings raises: there a user '
    'gives StopStringCriteria; lm.generate makes it'
)


def test_stop_strings_of_generate(speaker, tokenizer):
    with pytest.raises(ValueError, match='tokenizer'):
        generate(speaker, *prompts(), Decoder(), stop_strings=['a'], tokenizer=tokenizer, eos_token_id=2)


# --- inside transformers: PEFT, streaming, outputs, refusals


@pytest.fixture(scope='module')
def peft(llama, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()


@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)], ids=str)
def test_on_a_peft_model(llama, bank, peft, target):
    ids, mask = prompts()
    same(generate(peft, ids, mask, Decoder(target)), want := generate(llama, ids, mask, Decoder(target, bank=bank)))
    if target == Plain():
        same(generate(peft, ids, mask), want)
    assert not torch.equal(generate(llama, ids, mask), want)


@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)], ids=str)
def test_on_a_model_with_an_injected_adapter(llama, folder, peft, target):
    model = copy.deepcopy(llama)
    model.load_adapter(str(folder))
    same(generate(model, *prompts(), Decoder(target)), generate(peft, *prompts(), Decoder(target)))
    if target == Plain():
        same(generate(model, *prompts(), Decoder(target)), generate(model, *prompts()))


def test_the_active_adapter_counts(llama, folder, tmp_path):
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    model.load_adapter(toy_adapter(llama, tmp_path, seed=9), 'second')
    first = generate(model, *prompts(), Decoder())
    model.set_adapter('second')
    same(generate(model, *prompts(), Decoder()), second := generate(model, *prompts()))
    assert not torch.equal(first, second)


def test_a_disabled_adapter_stays_off(peft):
    with peft.disable_adapter():
        same(generate(peft, *prompts(), Decoder()), generate(peft, *prompts()))


def test_two_active_adapters_act_or_are_refused(llama, folder, tmp_path):
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    model.load_adapter(toy_adapter(llama, tmp_path, seed=9), 'second')
    model.base_model.set_adapter(['default', 'second'])
    try:
        ours = generate(model, *prompts(), Decoder())
    except DecodingError:
        return
    same(ours, generate(model, *prompts()))


def test_names_of_adapters_act_or_are_refused(peft):
    names = dict(adapter_names=['default', '__base__', 'default'])
    try:
        ours = generate(peft, *prompts(), Decoder(), **names)
    except DecodingError:
        return
    same(ours, generate(peft, *prompts(), **names))


def test_plain_decoding_of_a_merged_adapter(llama, folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    model.merge_adapter()
    same(generate(model, *prompts(), Decoder()), generate(model, *prompts()))


def test_a_merged_adapter_has_no_base(llama, folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    model.merge_adapter()
    with pytest.raises(DecodingError, match='merged into the weights'):
        generate(model, *prompts(), Decoder(CoLD()))


@pytest.mark.parametrize('drafts', [False, True])
def test_streamed_text_is_the_answer(speaker, tokenizer, capsys, drafts):
    ids, mask = prompts((5,))
    answer = generate(speaker, ids, mask)
    drafter = PlantedDrafter(answer, 5, 0.9) if drafts else None
    generate(speaker, ids, mask, Decoder(drafter=drafter, streamer=TextStreamer(tokenizer, skip_prompt=True)))
    assert capsys.readouterr().out == tokenizer.decode(answer[0, 5:]) + '\n'


class Collects:
    "A streamer that keeps what it is given"

    def __init__(self):
        self.got = []

    def put(self, x):
        self.got.append(x.flatten().tolist())

    def end(self):
        self.got.append('end')


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('where', ['bound', 'given', 'both', 'peft', 'wrapped'])
def test_a_streamer_gets_what_transformers_gives_it(llama, peft, where, lengths):
    "The prompt once, then the tokens one by one, then the end: wherever it was given, and on a model in PEFT's wrapper"
    model = peft if where == 'peft' else llama
    ids, mask = prompts(lengths)
    answer = generate(model, ids, mask, streamer=(theirs := Collects()))
    assert theirs.got == [ids.flatten().tolist(), *answer.T[ids.shape[1] :].tolist(), 'end']
    for drafter in (None, PlantedDrafter(answer, 5, 0.9)):
        ours = Collects()
        decoder = Decoder(drafter=drafter, streamer=ours if where in ('bound', 'both') else None)
        called = (lambda *args, **kw: decoder(*args, **kw)) if where == 'wrapped' else decoder
        same(generate(model, ids, mask, called, **(dict(streamer=ours) if where != 'bound' else {})), answer)
        assert ours.got == theirs.got


@pytest.mark.parametrize('drafter', [None, PromptLookup(adaptive=False)], ids=['plain', 'lookup'])
def test_ended_texts_are_filled_in_a_stream(llama, drafter):
    ids, mask = prompts((7, 3, 5))
    free = generate(llama, ids, mask)
    ends = torch.stack([free[0, 9], free[2, 15]])  # `generate` takes a tensor as well as a list
    answer = generate(llama, ids, mask, streamer=(theirs := Collects()), eos_token_id=ends)
    ended = (answer[:, 7:, None] == ends).any(-1).int().argmax(-1)
    assert len(set(ended.tolist())) > 1  # one ends before another
    ours = Collects()
    same(generate(llama, ids, mask, Decoder(drafter=drafter), streamer=ours, eos_token_id=ends), answer)
    assert ours.got == theirs.got


def test_one_streamer_a_call(llama):
    with pytest.raises(DecodingError, match='two streamers'):
        generate(llama, *prompts((5,)), Decoder(streamer=Collects()), streamer=Collects())
    decoder = Decoder()
    first = Collects()
    generate(llama, *prompts((5,)), decoder, streamer=first)
    n = len(first.got)
    generate(llama, *prompts((5,)), decoder)
    assert len(first.got) == n  # nothing is kept from call to call


@pytest.mark.parametrize(
    'what,kw',
    [
        ('use a drafter', lambda m: dict(assistant_model=m)),
        ('leave synced_gpus out', lambda m: dict(synced_gpus=True)),
        ('leave use_mtp out', lambda m: dict(use_mtp=True)),
    ],
)
def test_what_transformers_keeps_back_is_refused(llama, peft, what, kw):
    for model in (llama, peft):
        with pytest.raises(DecodingError, match=what):
            generate(model, *prompts((5,)), Decoder(), **kw(llama))
    generate(llama, *prompts((5,)), Decoder(), synced_gpus=False)


def test_somebody_elses_call_is_not_ours(llama):
    "A decoder called directly, inside the generate of another model"
    ids, mask = prompts((5,))
    seen = Collects()
    inner = lambda model, input_ids, generation_config=None, stopping_criteria=None, **kw: Decoder()(
        llama, ids, None, stopping_criteria, generation_config
    )
    same(generate(toy(), ids, mask, inner, streamer=seen), generate(llama, ids, mask))
    assert seen.got == [ids.flatten().tolist()]


def test_output_has_sequences_and_steps(llama, bank):
    ids, mask = prompts()
    out = generate(llama, ids, mask, Decoder(CoLD(0.05, 1.0), bank=bank), return_dict_in_generate=True)
    assert isinstance(out, Output) and out.scores is None and len(out.steps) == N
    same(out.sequences, generate(llama, ids, mask, Decoder(CoLD(0.05, 1.0), bank=bank)))
    written = torch.tensor([[t.id for s in out.steps for t in s.tokens[b]] for b in range(3)])
    same(written, out.sequences[:, 7:])
    for s in out.steps:
        for (t,) in s.tokens:
            assert (
                t.proposer == 'target' and t.logp <= 0 and t.base_logp <= 0 and 1 <= t.plausible <= 97 and s.seconds > 0
            )


def test_records_are_the_models_own_numbers(llama, bank):
    ids, mask = prompts((5,))
    target = CoLD(0.05, 1.0)
    out = generate(llama, ids, mask, Decoder(target, bank=bank), return_dict_in_generate=True)
    with torch.no_grad(), bank.attached([0, -1]):
        e, a = llama(out.sequences.repeat(2, 1)).logits[:, 4:-1]
    tokens = [t for s in out.steps for t in s.tokens[0]]
    for t, x, y in zip(tokens, e, a):
        assert t.logp == pytest.approx(x.log_softmax(-1)[t.id].item(), abs=1e-3) and t.base_logp == pytest.approx(
            y.log_softmax(-1)[t.id].item(), abs=1e-3
        )
        assert (t.expert_top1, t.plausible) == (x.argmax().item(), target.plausible(x[None]).sum().item())
    assert any(t.id != t.expert_top1 for t in tokens)


def test_nothing_is_recorded_unless_asked(llama):
    out = generate(llama, *prompts(), Decoder(record=False), return_dict_in_generate=True)
    assert all(t.logp is None and t.expert_top1 is None for s in out.steps for row in s.tokens for t in row)
    same(out.sequences, generate(llama, *prompts()))


def filled(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompts()[0][:, :3], past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    'error,what,kw',
    [
        (DecodingError, 'beam search cannot be combined', lambda m: dict(num_beams=2)),
        (DecodingError, 'does not return scores', lambda m: dict(output_scores=True, return_dict_in_generate=True)),
        (DecodingError, 'does not return scores', lambda m: dict(output_logits=True, return_dict_in_generate=True)),
        (
            DecodingError,
            'does not return scores',
            lambda m: dict(output_hidden_states=True, return_dict_in_generate=True),
        ),
        (DecodingError, 'cannot continue from a filled cache', lambda m: dict(past_key_values=filled(m))),
        (ValueError, 'max_new_tokns', lambda m: dict(max_new_tokns=3)),
        (ValueError, 'temprature', lambda m: dict(temprature=3)),
    ],
)
def test_what_we_cannot_do_is_named(llama, error, what, kw):
    with pytest.raises(error, match=what):
        generate(llama, *prompts(), Decoder(), **kw(llama))


def test_contrast_needs_an_adapter(llama):
    with pytest.raises(DecodingError, match='there is no adapter'):
        generate(llama, *prompts(), Decoder(CoLD()))


def test_embeddings_as_input_are_named(llama):
    with pytest.raises(DecodingError):
        llama.generate(inputs_embeds=torch.zeros(1, 4, 32), custom_generate=Decoder(), max_new_tokens=3)


def test_transformers_own_drafter_is_named(llama):
    with pytest.raises((DecodingError, ValueError)):
        generate(llama, *prompts((5,)), Decoder(), prompt_lookup_num_tokens=3)


def test_positions_of_ours_act_or_are_refused(llama):
    ids, mask = prompts((5,))
    positions = dict(position_ids=torch.tensor([[0, 3, 9, 20, 50]]))
    assert not torch.equal(theirs := generate(llama, ids, mask, **positions), generate(llama, ids, mask))
    try:
        ours = generate(llama, ids, mask, Decoder(), **positions)
    except DecodingError:
        return
    same(ours, theirs)


# --- the model is left as it was


class Breaks(StoppingCriteria):
    "Raises at the third token"

    def __init__(self, error):
        self.error = error
        self.calls = 0

    def __call__(self, ids, scores, **kw):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize('where', ['bank', 'peft'])
@pytest.mark.parametrize('error', [None, ValueError, KeyboardInterrupt])
def test_no_trace_in_the_model(llama, bank, peft, where, error):
    model, decoder = (
        (llama, Decoder(CoLD(0.05, 1.0), bank=bank)) if where == 'bank' else (peft, Decoder(CoLD(0.05, 1.0)))
    )
    before = copy.deepcopy(model.state_dict())
    plain = generate(model, *prompts())
    stop = Breaks(error)
    if error is None:
        generate(model, *prompts(), decoder)
    else:
        with pytest.raises(error):
            generate(model, *prompts(), decoder, stopping_criteria=StoppingCriteriaList([stop]))
        assert stop.calls == 3
    assert not [n for n, m in model.named_modules() if 'forward' in m.__dict__]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[k].view(torch.int32), before[k].view(torch.int32)) for k in before
    )
    same(generate(model, *prompts()), plain)


# --- trees change nothing but the number of forward passes


class PlantedDrafter(Drafter):
    "Random trees whose nodes continue the known answer with probability `p`; `n` nodes at most"

    def __init__(self, answers, first, p=0.7, seed=0, n=9):
        self.answers = answers.tolist()
        self.first = first
        self.p = p
        self.g = generator(seed)
        self.n = n

    def _random(self, n):
        return int(torch.randint(0, n, (), generator=self.g))

    def _true(self, b, k):
        return self.answers[b][k] if k < len(self.answers[b]) else 3 + self._random(90)

    def _row(self, b, text):
        tokens = [int(text[-1])]
        parents = [-1]
        depth = {0: 0}  # depth of the nodes that are right
        for i in range(1, 1 + self._random(self.n)):
            last = max(depth)
            lucky = float(torch.rand((), generator=self.g)) < self.p
            parent = last if lucky else self._random(i)
            token = self._true(b, len(text) + depth[parent]) if lucky else 3 + self._random(90)
            if any(p == parent and t == token for p, t in zip(parents, tokens)):
                continue  # siblings differ
            if lucky:
                depth[len(tokens)] = depth[parent] + 1
            tokens.append(token)
            parents.append(min(parent, len(parents) - 1))
        return tokens, parents

    def propose(self, state, rows):
        made = [self._row(b, t) for b, t in enumerate(state.text)]
        n = max(len(t) for t, _ in made)
        fill = lambda x, v: torch.tensor([o + [v] * (n - len(o)) for o in x])
        return Tree(fill([t for t, _ in made], 0), fill([p for _, p in made], -2), 'planted')


def trees_change_nothing(model, bank, ids, mask, target, rows, seed=0, p=0.7, drafter=None, **kw):
    options = dict(max_new_tokens=24, return_dict_in_generate=True) | kw
    plain = generate(model, ids, mask, Decoder(target, bank=bank), **options)
    fast = generate(
        model,
        ids,
        mask,
        Decoder(target, drafter or PlantedDrafter(plain.sequences, ids.shape[1], p, seed), bank=bank, **rows),
        **options,
    )
    same(fast.sequences, plain.sequences)
    return plain, fast


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)], ids=str)
@pytest.mark.parametrize('p', [0.1, 0.6, 0.95])
def test_trees_change_nothing(llama, bank, rows, target, lengths, p):
    for seed in range(3):
        plain, fast = trees_change_nothing(llama, bank, *prompts(lengths, seed), target, rows, seed, p)
        assert len(fast.steps) <= len(plain.steps)
    if p > 0.5:
        assert len(fast.steps) < len(plain.steps) - 4


@pytest.mark.parametrize('family', ['qwen2', 'qwen3', 'gemma'])
def test_trees_change_nothing_in_other_families(family, rows):
    trees_change_nothing(toy(family), None, *prompts(), Plain(), rows)


@pytest.mark.parametrize('family', [*WINDOWED, 'qwen2', 'qwen3'])
def test_trees_change_nothing_within_a_window(family, rows):
    # layers with a window and layers without one (qwen), a window smaller than the prompts, sequences that accept different lengths
    model = toy(
        family,
        **(dict(use_sliding_window=True, sliding_window=6, max_window_layers=1) if family.startswith('qwen') else {}),
    )
    for seed in range(2):
        trees_change_nothing(model, None, *prompts((7, 3, 9), seed), Plain(), rows, seed, 0.7)


def test_trees_change_nothing_for_any_attention(rows):
    for attention in ('eager', 'sdpa'):  # the eager one adds its mask to the scores, whatever it is
        model = toy()
        model.set_attn_implementation(attention)
        trees_change_nothing(model, None, *prompts((7, 3, 9)), Plain(), rows)


def test_trees_need_attention_that_reads_a_mask():
    model = toy()
    model.config._attn_implementation = 'flash_attention_2'
    with pytest.raises(DecodingError, match='load the model with attn_implementation'):
        rows_module.BatchRunner(model, ('expert',), 1, 9, draft_capacity=4)


def test_a_text_that_has_ended_takes_no_columns(llama, rows):
    "Sequence 0 is over at once, and a lucky drafter goes on drafting for it: the static cache would be full before the others are done"
    ids, mask = prompts((100, 3))
    kept = []

    class Lucky(PlantedDrafter):
        def propose(self, state, rows):
            kept.append(rows.valid.sum(-1).tolist())
            return super().propose(state, rows)

    plain = generate(llama, ids, mask, Decoder(), max_new_tokens=24, return_dict_in_generate=True)
    end = int(plain.sequences[0, ids.shape[1]])  # the first token that sequence 0 writes
    options = dict(max_new_tokens=24, return_dict_in_generate=True, eos_token_id=end)
    want = generate(llama, ids, mask, Decoder(), **options)
    fast = generate(llama, ids, mask, Decoder(drafter=Lucky(plain.sequences, ids.shape[1], 1.0), **rows), **options)
    same(fast.sequences, want.sequences)
    assert len(kept) > 2 and {k[0] for k in kept} == {100}


def test_records_survive_drafting(llama, bank, rows):
    plain, fast = trees_change_nothing(llama, bank, *prompts(), CoLD(0.05, 1.0), rows)
    drafted = 0
    for b in range(3):
        ours, theirs = ([t for s in o.steps for t in s.tokens[b]] for o in (fast, plain))
        for x, y in zip(ours, theirs, strict=True):
            assert (x.id, x.expert_top1, x.plausible) == (y.id, y.expert_top1, y.plausible)
            assert x.logp == pytest.approx(y.logp, abs=1e-3) and x.base_logp == pytest.approx(y.base_logp, abs=1e-3)
            drafted += x.proposer == 'planted'
    assert drafted > 10


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)], ids=str)
def test_an_end_inside_an_accepted_run(llama, bank, rows, target, lengths):
    ids, mask = prompts(lengths)
    free = generate(llama, ids, mask, Decoder(target, bank=bank), max_new_tokens=24)
    inside = 0
    for at in range(2, 12, 3):
        eos = [row[ids.shape[1] + at + i].item() for i, row in enumerate(free)]
        drafter = PlantedDrafter(free, ids.shape[1], 0.95, at)
        _, fast = trees_change_nothing(llama, bank, ids, mask, target, rows, drafter=drafter, eos_token_id=eos)
        last = [[t for s in fast.steps for t in s.tokens[b]][-1] for b in range(len(ids))]
        inside += sum(t.id in eos and t.proposer == 'planted' for t in last)
    assert inside > 0


@pytest.mark.parametrize('n', [1, 2, 5, 11])
def test_the_length_limit_inside_a_tree(llama, bank, rows, n):
    ids, mask = prompts()
    longer = generate(llama, ids, mask, Decoder(CoLD(0.05, 1.0), bank=bank), max_new_tokens=24)
    for seed in range(3):
        _, fast = trees_change_nothing(
            llama,
            bank,
            ids,
            mask,
            CoLD(0.05, 1.0),
            rows,
            drafter=PlantedDrafter(longer, 7, 0.95, seed),
            max_new_tokens=n,
        )
        assert fast.sequences.shape[1] == 7 + n


@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
def test_a_criterion_across_accepted_tokens(llama, rows, lengths):
    ids, mask = prompts(lengths)
    free = generate(llama, ids, mask, max_new_tokens=24)
    inside = 0
    for at in range(2, 12, 3):
        pairs = {tuple(row[ids.shape[1] + at + i :][:2].tolist()) for i, row in enumerate(free)}
        _, fast = trees_change_nothing(
            llama,
            None,
            ids,
            mask,
            Plain(),
            rows,
            drafter=PlantedDrafter(free, ids.shape[1], 0.95, at),
            stopping_criteria=StoppingCriteriaList([Pair(pairs)]),
        )
        assert fast.sequences.shape[1] < free.shape[1] or (fast.sequences == 0).any()
        for b in range(len(ids)):
            inside += [t.proposer for s in fast.steps for t in s.tokens[b]][-2:] == ['planted', 'planted']
    assert inside > 0


class Counts(StoppingCriteria):
    """Keeps notes for each row and for the batch: row b ends after about five odd or ten even tokens and `b`
    more, later the more calls there were
    """

    def __init__(self):
        self.seen = []
        self.hits = None

    def __call__(self, ids, scores, **kw):
        self.seen.append(ids.tolist())
        self.hits = (torch.zeros(len(ids)) if self.hits is None else self.hits) + 1 + ids[:, -1] % 2
        return self.hits >= 10 + torch.arange(len(ids)) + len(self.seen) // 8


@pytest.mark.parametrize('ends', [False, True])
@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)], ids=str)
@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
def test_a_criterion_that_keeps_notes(llama, bank, rows, target, lengths, ends):
    "It is called as often as in plain decoding, with the same texts; sequences that are done are padded"
    ids, mask = prompts(lengths)
    free = generate(llama, ids, mask, Decoder(target, bank=bank), max_new_tokens=24)

    def run(drafter=None):
        decoder = Decoder(target, drafter, bank=bank, **(rows if drafter else {}))
        out = generate(
            llama,
            ids,
            mask,
            decoder,
            max_new_tokens=24,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([stop := Counts()]),
            eos_token_id=free[0, -20].item() if ends else None,
        )
        return out, stop.seen

    plain, seen = run()
    drafted = 0
    assert plain.sequences.shape[1] < free.shape[1] and (len(ids) == 1 or (plain.sequences[:, 7:] == 0).any())
    for seed in range(3):
        fast, shown = run(PlantedDrafter(free, ids.shape[1], 0.8, seed))
        same(fast.sequences, plain.sequences)
        assert shown == seen
        drafted += sum(t.proposer == 'planted' for s in fast.steps for row in s.tokens for t in row)
    assert ends or drafted > 3


def test_criteria_of_transformers_leave_each_text_its_own_pace(llama, tokenizer):
    ids, mask = prompts()
    free = generate(llama, ids, mask, Decoder(), max_new_tokens=24)
    run = lambda stop: generate(
        llama,
        ids,
        mask,
        Decoder(drafter=PlantedDrafter(free, 7, 0.7)),
        max_new_tokens=24,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    own = run(StopStringCriteria(tokenizer, ['<|im_end|>']))
    waits = run(Sees())
    same(own.sequences, waits.sequences)
    gains = lambda out: [{len(row) for row in s.tokens if row} for s in out.steps]
    assert max(map(len, gains(own))) > 1 and max(map(len, gains(waits))) == 1 and len(own.steps) < len(waits.steps)


def test_the_criterion_of_the_harness(speaker, tokenizer, rows):
    utils = pytest.importorskip('lm_eval.models.utils_hf')
    ids, mask = prompts()
    free = generate(speaker, ids, mask, Decoder(), max_new_tokens=24)
    words = tokenizer.decode(free[0, 12:13]), tokenizer.decode(free[2, 15:16])
    outs = [
        generate(
            speaker,
            ids,
            mask,
            Decoder(drafter=d, **(rows if d else {})),
            max_new_tokens=24,
            stopping_criteria=utils.stop_sequences_criteria(tokenizer, [*words], 7, 3),
        )
        for d in (None, PlantedDrafter(free, 7, 0.8), PlantedDrafter(free, 7, 0.95))
    ]
    for out in outs[1:]:
        same(out, outs[0])


@pytest.mark.parametrize(
    'kw',
    [
        dict(logits_processor='penalty'),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=12, eos_token_id=[5, 8, 37, 20, 61]),
    ],
    ids=str,
)
@pytest.mark.parametrize('lengths', [(5,), (7, 3, 5)])
@pytest.mark.parametrize('target', [Plain(), CoLD(0.05, 1.0)], ids=str)
def test_processors_that_read_the_text(llama, bank, rows, target, lengths, kw):
    ids, mask = prompts(lengths)
    if 'logits_processor' in kw:
        kw = dict(logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)]))
    for seed in range(2):
        plain, fast = trees_change_nothing(llama, bank, ids, mask, target=target, rows=rows, seed=seed, **kw)
        assert len(fast.steps) < len(plain.steps)


def test_alpha_and_beta_for_each_sequence_with_drafting(llama, bank, rows):
    for kw in ({}, dict(logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)]))):
        trees_change_nothing(llama, bank, *prompts(), CoLD((0.05, 0.1, 0.3), (1.0, 0.0, -0.7)), rows, **kw)


ONE_ROW = 'the node-by-node path gives processors one row, so those that know their place in the batch refuse it or take sequence 0'


def test_repetition_penalty_of_a_padded_batch_with_drafting(llama, rows):
    trees_change_nothing(llama, None, *prompts(), Plain(), rows, repetition_penalty=1.8)


def test_a_grammar_for_each_sequence_with_drafting(llama, rows):
    allowed = [list(range(3, 40)), list(range(40, 70)), list(range(70, 97))]
    trees_change_nothing(llama, None, *prompts(), Plain(), rows, prefix_allowed_tokens_fn=lambda b, text: allowed[b])


class DeadEnd:
    "Forbids a token, and everything after it"

    before_contrast = True

    def __init__(self, token):
        self.token = token

    def __call__(self, text, scores):
        scores = scores.index_fill(-1, torch.tensor(self.token), -torch.inf)
        return scores.masked_fill((text == self.token).any(-1, keepdim=True), -torch.inf)


def test_a_draft_token_into_a_dead_end_is_only_rejected(llama):
    class Wrong(Drafter):
        def propose(self, state, rows):
            return Tree(
                torch.tensor([[int(t[-1]), 96] for t in state.text]),
                torch.tensor([[-1, 0]] * len(state.text)),
                'planted',
            )

    trees_change_nothing(
        llama, None, *prompts((5,)), Plain(), {}, drafter=Wrong(), logits_processor=LogitsProcessorList([DeadEnd(96)])
    )


def chi_square_limit(k):
    "The 99.9% point of chi-square with `k` degrees of freedom, by Wilson and Hilferty"
    return k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


def test_sampled_draft_tokens_follow_the_distribution(llama):
    "Chi-square of the second token, given the first, over runs whose draft tokens favour one token"
    ids = torch.tensor([[5, 6, 7]])
    runs = 1500
    with torch.no_grad():
        p = llama(ids).logits[0, -1].softmax(-1)
    first = int(p.argmax())
    with torch.no_grad():
        q = llama(torch.tensor([[5, 6, 7, first]])).logits[0, -1].softmax(-1)
    expert_top1 = int(q.topk(2).indices[1])

    class Favours(Drafter):
        def propose(self, state, rows):
            return Tree(
                torch.stack([torch.tensor([int(t[-1]), expert_top1]) for t in state.text]),
                torch.tensor([[-1, 0]] * len(state.text)),
                'planted',
            )

    class First:
        "Gives the first token probability 1"

        keeps_state = False

        def __call__(self, text, scores):
            if text.shape[1] > 3:
                return scores
            return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(first), 0.0)

    batch = ids.repeat(runs, 1)
    decoder, first_only = Decoder(drafter=Favours(), record=False), LogitsProcessorList([First()])
    options = dict(max_new_tokens=2, do_sample=True, top_k=0, logits_processor=first_only)
    out = generate(llama, batch, torch.ones_like(batch), decoder, **options)
    assert (out[:, 3] == first).all()
    counts = torch.bincount(out[:, 4], minlength=97).double()
    want = q.double() * runs
    big = want >= 5
    c, w = (torch.cat([x[big], x[~big].sum()[None]]) for x in (counts, want))
    limit = chi_square_limit(len(c) - 1)
    assert ((c - w) ** 2 / w).sum() < limit
    c = c + 0.0
    shift = 0.1 * c
    c = c - shift
    c[big.nonzero().flatten().tolist().index(expert_top1)] += shift.sum()
    assert ((c - w) ** 2 / w).sum() > limit  # a bug: one draft token in ten accepted without being drawn


@pytest.mark.parametrize('lengths', [(200,), (200, 198, 199)])
def test_trees_near_the_end_of_a_static_cache(lengths, monkeypatch):
    "A tree, or rows that accept different numbers of draft tokens, must not run over the columns of the cache"
    uncompiled(monkeypatch)
    ids, mask = prompts(lengths)
    trees_change_nothing(toy(context=512), None, ids, mask, Plain(), dict(compile=True), max_new_tokens=56)


# --- the compiled path


def compiled_is_eager(model, bank, target, lengths, **kw):
    ids, mask = prompts(lengths)
    want = generate(model, ids, mask, Decoder(target, bank=bank), **kw)
    same(generate(model, ids, mask, Decoder(target, bank=bank, compile=True), **kw), want)
    return want


@pytest.mark.slow
def test_no_stale_program(llama, bank, peft, tmp_path, monkeypatch):
    "With and without adapter, another adapter, another model, in any order"
    eager_dynamo(monkeypatch)
    other = AdapterBank(llama, [load_adapter(toy_adapter(llama, tmp_path, seed=9), llama)], ops.lora)
    cold = CoLD(0.05, 1.0)
    written = []
    for b, target in (
        (None, Plain()),
        (bank, cold),
        (bank, Plain()),
        (None, Plain()),
        (other, cold),
        (other, Plain()),
        (bank, cold),
        (bank, CoLD(0.3, -0.7)),
        (None, Plain()),
    ):
        written.append(compiled_is_eager(llama, b, target, (7, 3)))
    same(written[0], written[3])
    same(written[0], written[8])
    same(written[1], written[6])
    assert len({tuple(s.flatten().tolist()) for s in written}) >= 5
    compiled_is_eager(peft, None, cold, (7, 3))


def test_a_peft_model_keeps_its_program_until_its_weights_change(peft, monkeypatch):
    "One Decoder, several calls: compiled once; after training, however the weights were written, the new weights count"
    eager_dynamo(monkeypatch)
    ids, mask = prompts((7, 3))
    cold = CoLD(0.05, 1.0)
    peft = copy.deepcopy(peft)
    decoder = Decoder(cold, compile=True)
    first = generate(peft, ids, mask, decoder)
    bank = decoder._last_bank
    compiled = torch._dynamo.utils.counters['stats']['unique_graphs']
    same(generate(peft, ids, mask, decoder), first)
    assert decoder._last_bank is bank and torch._dynamo.utils.counters['stats']['unique_graphs'] == compiled
    for name, p in peft.named_parameters():
        if 'lora_B' in name:
            p.data.mul_(-1.5)
            break  # `.data` leaves no trace in autograd's version counter
    changed = generate(peft, ids, mask, decoder)
    same(changed, generate(peft, ids, mask, Decoder(cold)))
    assert decoder._last_bank is not bank


@pytest.mark.slow
def test_many_shapes_in_one_process(monkeypatch):
    eager_dynamo(monkeypatch)
    model = toy(num_hidden_layers=1)
    for b in range(1, 11):
        compiled_is_eager(model, None, Plain(), (5,) * b, max_new_tokens=3)


@pytest.mark.parametrize('family', WINDOWED)
def test_the_static_path_keeps_a_window(family, monkeypatch):
    eager_dynamo(monkeypatch)
    compiled_is_eager(toy(family), None, Plain(), (9, 3), max_new_tokens=12)


def test_without_a_compiler_steps_run_as_they_are(llama, monkeypatch):
    "In one sentence, once; and the tokens are the same"
    monkeypatch.setattr(programs, 'compiles', lambda: False)
    monkeypatch.setattr(programs, '_WARNED', set())
    monkeypatch.setattr(programs, '_PROGRAMS', {})
    monkeypatch.setattr(programs, '_found', lambda name: None)
    with pytest.warns(UserWarning, match='steps run uncompiled, because torch.compile finds no compiler: install'):
        fast = generate(llama, *prompts(), Decoder(compile=True))
    same(fast, generate(llama, *prompts(), Decoder()))


def test_a_whole_model_needs_a_compiler(llama, monkeypatch):
    "Where layers cannot share programs"
    monkeypatch.setattr(rows_module, 'layer_programs', lambda model: None)
    monkeypatch.setattr(ops, 'compiles', lambda device=None: False)
    with pytest.raises(DecodingError, match='finds no compiler'):
        generate(llama, *prompts(), Decoder(compile=True))


@pytest.mark.slow
@compiled
@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_compiled_tokens_are_eager_tokens(family, tmp_path):
    torch._dynamo.reset()
    model = toy(family)
    bank = AdapterBank(model, [load_adapter(toy_adapter(model, tmp_path), model)], ops.lora)
    plain = Plain()
    cold = CoLD(0.05, 1.0)
    runs = (
        [(None, plain), (bank, cold), (bank, plain), (None, plain)]
        if family == 'llama'
        else [(bank, cold), (None, plain)]
    )  # each new pair costs 15 s
    written = [compiled_is_eager(model, b, t, (7, 3)) for b, t in runs]
    compiled_is_eager(model, bank, cold, (4, 9))
    assert not torch.equal(written[0], written[1])


# --- lm.generate


@pytest.fixture(scope='module')
def lm(speaker, tokenizer, tmp_path_factory):
    return LM(
        speaker, tokenizer, load_adapter(toy_adapter(speaker, tmp_path_factory.mktemp('adapter')), speaker), 'toy'
    )


MESSAGES = [dict(role='user', content='Say a word.')]


def ids_of(out, b=0):
    return [t.id for t in out.tokens[b]]


def test_prompts_of_every_kind(lm):
    ids = lm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    want = ids_of(lm.generate(ids, max_new_tokens=N))
    for prompt in ('Say a word.', MESSAGES, torch.tensor(ids), torch.tensor([ids])):
        assert ids_of(lm.generate(prompt, max_new_tokens=N)) == want
    assert (
        ids_of(lm.generate('Say a word.', chat=False, max_new_tokens=N))
        == ids_of(lm.generate(lm.tokenizer('Say a word.').input_ids, max_new_tokens=N))
        != want
    )
    with bank_of(lm).attached([0]):
        theirs = generate(lm.model, torch.tensor([ids]), None, eos_token_id=lm.eos_ids)
    assert theirs[0, len(ids) :].tolist() == want


def test_a_batch_is_its_prompts(lm):
    batch = [MESSAGES, 'Another, longer prompt than the first one.', [5, 6, 7]]
    for target in (Plain(), CoLD(0.01, 1.0)):
        out = lm.generate(batch, target, max_new_tokens=N)
        assert len(out.texts) == len(out.tokens) == 3 and out.text == out.texts[0]
        for b, prompt in enumerate(batch):
            alone = lm.generate(prompt, target, max_new_tokens=N)
            assert ids_of(alone) == ids_of(out, b) and alone.text == out.texts[b]
            assert alone.text == lm.tokenizer.decode(ids_of(alone), skip_special_tokens=True)


def test_a_full_context_ends_the_answer(lm):
    for n in (5, 60, 63):
        out = lm.generate(torch.arange(3, 3 + n), eos_token_id=96)
        assert len(out.tokens[0]) == 64 - n
    with pytest.raises(DecodingError, match='64 tokens but the context holds 64'):
        lm.generate(torch.arange(3, 67))


def test_stop_strings_of_text(lm):
    free = lm.generate([5, 6, 7], max_new_tokens=N, eos_token_id=96)
    word = lm.tokenizer.decode(ids_of(free)[4])
    out = lm.generate([5, 6, 7], max_new_tokens=N, stop_strings=[word], eos_token_id=96)
    assert len(ids_of(out)) <= 5 and word in out.text and ids_of(out) == ids_of(free)[: len(ids_of(out))]


def test_streaming(lm, capsys):
    out = lm.generate([5, 6, 7], max_new_tokens=N, stream=True)
    assert capsys.readouterr().out == out.text + '\n'
    with pytest.raises(DecodingError, match='only one answer can be streamed'):
        lm.generate([[5, 6], [7, 8]], stream=True)


@pytest.mark.parametrize('target', [Plain(), CoLD(0.01, 1.0)], ids=str)
def test_result_fields(lm, target):
    out = lm.generate([[5, 6, 7], [8, 9]], target, max_new_tokens=N, eos_token_id=96)
    assert (
        out.tau == 1.0
        and math.isfinite(out.ms_per_token)
        and out.ms_per_token > 0
        and math.isfinite(out.tokens_per_s)
        and out.tokens_per_s > 0
    )
    assert out.changed == (
        0.0 if target == Plain() else pytest.approx(sum(t.id != t.expert_top1 for r in out.tokens for t in r) / (2 * N))
    )
    assert str(out) == '\n\n'.join(out.texts)
    assert lm.generate([5, 6], target, max_new_tokens=2, record=False).changed is None
    short = lm.generate([5, 6], target, max_new_tokens=1)
    assert short.tau == 1.0 and math.isfinite(short.ms_per_token) and math.isfinite(short.tokens_per_s)


def test_tau_counts_accepted_draft_tokens(lm):
    answers = torch.tensor([[5, 6, 7] + ids_of(lm.generate([5, 6, 7], max_new_tokens=24, eos_token_id=96))])
    out = lm.generate([5, 6, 7], drafter=PlantedDrafter(answers, 3, 0.95), max_new_tokens=24, eos_token_id=96)
    assert out.tau == pytest.approx(23 / (len(out.steps) - 1)) and out.tau > 1.5


def test_seeds_of_text(lm):
    a, b, c = (
        ids_of(lm.generate([5, 6, 7], do_sample=True, temperature=2.0, top_k=0, seed=s, max_new_tokens=N))
        for s in (1, 1, 2)
    )
    assert a == b != c


def test_wishes_of_text_that_are_named(lm):
    for what, kw in (
        ('does not search beams', dict(num_beams=2)),
        ('there are two streamers', dict(stream=True, streamer=TextStreamer(lm.tokenizer))),
        ('give max_new_tokens', dict(max_length=9)),
    ):
        with pytest.raises(DecodingError, match=what):
            lm.generate('Hello', **kw)


def test_several_answers_to_each_text(lm):
    "All of them, those of one prompt side by side"
    how = dict(do_sample=True, temperature=2.0, top_k=0, max_new_tokens=N, eos_token_id=96)
    out = lm.generate([[5, 6, 7], [8, 9]], num_return_sequences=2, seed=1, **how)
    assert len(out.texts) == len(out.tokens) == 4 and len({tuple(ids_of(out, b)) for b in range(4)}) == 4
    alone = [lm.generate(prompt, num_return_sequences=2, seed=1, **how) for prompt in ([[5, 6, 7]], [[8, 9]])]
    assert [ids_of(out, b) for b in range(4)] == [ids_of(one, b) for one in alone for b in range(2)]
    equal = lm.generate([[5, 6, 7]] * 2, seed=1, **how)  # equal prompts, equal texts: copies are asked for by number
    assert ids_of(equal, 0) == ids_of(equal, 1) == ids_of(out, 0)


def test_the_embedded_model_is_transformers(tokenizer):
    "The one test on real weights: merged by PEFT and decoded by transformers, against our loop"
    from pathlib import Path
    from peft import PeftModel
    from npu_lora_decoding.decoding.loop import load

    adapter = Path(__file__).parents[2] / 'results' / 'adapters' / 'king_james'
    if not adapter.exists():
        pytest.skip('results/adapters/king_james is not in this checkout')
    lm = load(adapter=adapter)
    verse = [
        dict(role='system', content='Rewrite the verse in the English of the King James Bible.'),
        dict(role='user', content='You shall not go up, because I am not with you.'),
    ]
    ours = lm.generate(verse, max_new_tokens=16)
    ids = tokenizer.apply_chat_template(verse, add_generation_prompt=True, return_tensors='pt', return_dict=False)
    peft = PeftModel.from_pretrained(lm.model, adapter).eval()
    theirs = peft.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
    assert theirs[0, ids.shape[1] :].tolist() == ids_of(ours)


@pytest.mark.parametrize('b,h,g,t,s', [(1, 4, 4, 1, 1), (3, 6, 2, 5, 9), (2, 8, 1, 4, 4)])
@pytest.mark.parametrize('kind', ['bool', 'added'])
def test_grouped_attention_is_torchs(b, h, g, t, s, kind):
    q = torch.randn(b, h, t, 8)
    k = torch.randn(b, g, s, 8)
    v = torch.randn(b, g, s, 8)
    see = torch.rand(b, t, s) < 0.6
    see[..., 0] = True
    mask = see if kind == 'bool' else torch.zeros(b, t, s).masked_fill(~see, torch.finfo(torch.float32).min)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=see[:, None], enable_gqa=True)
    torch.testing.assert_close(rows_module.grouped_attention(q, k, v, mask), want, rtol=1e-5, atol=1e-5)
