"Writing on a ring and to disk: stopped, killed, refused, shared out, and always what transformers would say"

import copy, itertools, json, os, random, signal, subprocess, sys, time, types
from dataclasses import replace
from pathlib import Path
import pytest, torch
from peft import PeftModel
from transformers.modeling_utils import AttentionInterface
from npu_lora_decoding.hass import ring_cache as ring
from npu_lora_decoding.hass import self_chat as write
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.hass.chat_data import encode_all, read_conversations
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.models import FAMILIES, encode_one
from npu_lora_decoding.decoding.loop import LM, load
from npu_lora_decoding.hass.ring_cache import Ring
from npu_lora_decoding.hass.continuous_batching import (
    Dialogue,
    WriteConfig,
    after_question,
    draw_blocks,
    self_dialogues,
    prompted_dialogues,
    turn_edges,
    generate_dialogues,
)
from npu_lora_decoding.hass.self_chat import write_conversations
from helpers.chats import CHATML, GEMMA, IM, LLAMA2, LLAMA3, HEADER, MISTRAL, lm_of
from helpers.toys import toy_folder, toy_lm
from helpers.chats import chat_lm

CONFIG = WriteConfig(shards=3, per_shard=5, batch=3, user_tokens=60, new_tokens=16, openers=('', 'Hi '), min_p=0.0)


def dialogues_of(steps):
    return sorted((t for ended in steps for t in ended), key=lambda t: t.index)


def answers(lm, prompts, new_tokens, batch, temperatures=(0.0,), seed=0):
    config = WriteConfig(batch=batch, user_tokens=60, new_tokens=new_tokens)
    return [
        t.tokens[t.answer_start :]
        for t in dialogues_of(
            generate_dialogues(lm, prompted_dialogues(lm, prompts, temperatures), len(prompts), config, generator(seed))
        )
    ]


def generated(lm, prompts, new_tokens, model=None):
    out = []
    for ids in (encode_one(lm, p)[None] for p in prompts):
        new = (
            (model or lm.model)
            .generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=lm.eos_ids,
                pad_token_id=0,
            )[0, ids.shape[1] :]
            .tolist()
        )
        out.append(new[:-1] if new[-1] in lm.eos_ids else new)
    return out


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_greedy_equals_generate(family, attention):
    if (family, attention) == ('gemma2', 'sdpa'):
        pytest.skip('it has none')
    window = dict(sliding_window=120) if family in ('mistral', 'gemma2', 'gemma3_text') else {}
    lm = toy_lm(family, vocab=76, attn_implementation=attention, **window)
    prompts = [f'say {i} words ' * (1 + i % 4) for i in range(9)]
    mine = answers(lm, prompts, 24, 2)
    assert mine == generated(lm, prompts, 24) and len({tuple(a) for a in mine}) > 1


def test_one_query_attention_serves_plain_families_and_is_put_back(monkeypatch):
    "The families whose attention is scores, mask and softmax use it; others keep their own; the model's setting survives errors"
    calls = []
    real = ring.one_query_attention
    AttentionInterface.register('one_query', lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    try:
        for family, uses in (('llama', True), ('mistral', True), ('qwen2', True), ('qwen3', True), ('gemma', False)):
            model = toy_model(family, attn_implementation='sdpa')
            calls.clear()
            r = Ring(model, 2, 12, [5])
            r.begin(0, 1)
            r.begin(1, 1)
            r.forward(torch.tensor([6, 7]))
            assert bool(calls) == uses and model.config._attn_implementation == 'sdpa', family
        model = toy_model('llama', attn_implementation='eager')
        calls.clear()
        r = Ring(model, 1, 12, [5])
        r.begin(0, 1)
        r.forward(torch.tensor([6]))
        assert not calls and model.config._attn_implementation == 'eager'

        def broken(*_, **__):
            raise RuntimeError('broken')

        AttentionInterface.register('one_query', broken)
        model = toy_model('llama', attn_implementation='sdpa')
        r = Ring(model, 1, 12, [5])
        r.begin(0, 1)
        with pytest.raises(RuntimeError, match='broken'):
            r.forward(torch.tensor([6]))
        assert model.config._attn_implementation == 'sdpa'
    finally:
        AttentionInterface.register('one_query', real)


@pytest.mark.parametrize('b,g,share,s,k', [(1, 1, 1, 1, 4), (3, 2, 3, 7, 8), (2, 4, 1, 5, 6), (5, 1, 9, 33, 16)])
def test_one_query_attention_is_attention(b, g, share, s, k):
    "fp64 against the sum written out, with a mask of its own for each row"
    gen = generator(0)
    q, keys, values = (
        torch.randn(b, h, t, k, generator=gen, dtype=torch.float64) for h, t in ((g * share, 1), (g, s), (g, s))
    )
    mask = torch.where(torch.rand(b, 1, 1, s, generator=gen) < 0.3, -1e30, 0.0).double()
    mask[..., -1] = 0
    got, none = ring.one_query_attention(None, q, keys, values, mask)
    want = torch.stack(
        [
            torch.stack(
                [
                    ((keys[i, h // share] @ q[i, h, 0]) * k**-0.5 + mask[i, 0, 0]).softmax(0) @ values[i, h // share]
                    for h in range(g * share)
                ]
            )[None]
            for i in range(b)
        ]
    )
    assert none is None and got.shape == (b, 1, g * share, k)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('seed', range(10))
def test_any_schedule_gives_the_same_answers(seed):
    "However many rows there are and whoever ends first, with a head and system messages that share a part of it"
    lm = chat_lm()
    chosen = random.Random(seed)
    batch = chosen.randint(1, 7)
    n = chosen.randint(1, 12)
    prompts = [
        [
            dict(role=chosen.choice(['user', 'system']), content='a' * chosen.randint(1, 9)),
            dict(role='user', content='b' * chosen.randint(1, 30)),
        ]
        for _ in range(n)
    ]
    assert answers(lm, prompts, 12, batch) == generated(lm, prompts, 12)


def test_adapter_on_every_row(tmp_path):
    lm = chat_lm()
    folder = toy_adapter(lm.model, tmp_path / 'a')
    tuned = LM(lm.model, lm.tokenizer, load_adapter(folder, lm.model), 'toy')
    prompts = [f'word {i}' for i in range(7)]
    mine = answers(tuned, prompts, 20, 3)
    assert (
        mine
        == generated(lm, prompts, 20, PeftModel.from_pretrained(copy.deepcopy(lm.model), folder))
        != answers(lm, prompts, 20, 3)
    )


def test_a_row_reads_the_proper_tokens_of_its_question():
    "Drawn `a` + `b` where the tokenizer has `ab`: the answer must follow `ab`"
    lm = load()
    head, _ = turn_edges(lm)
    pieces = [lm.tokenizer(c, add_special_tokens=False).input_ids[0] for c in 'Hello']
    dialogue = after_question(lm, Dialogue(0, 0.0, head + pieces), head)
    assert (
        dialogue.messages == [dict(role='user', content='Hello')]
        and dialogue.tokens == encode_one(lm, 'Hello').tolist() != head + pieces
    )
    assert (
        after_question(lm, Dialogue(0, 0.0, head + [lm.tokenizer(' ').input_ids[-1]]), head) is None
    )  # nothing was asked
    assert (
        after_question(lm, Dialogue(0, 0.0, head + pieces + [lm.tokenizer.convert_tokens_to_ids('<|im_start|>')]), head)
        is None
    )


@pytest.mark.slow
def test_a_question_drawn_in_odd_pieces_is_answered_as_text():
    lm = lm_of(CHATML, IM, '<|im_end|>', words=['ab', 'cd'])
    head, _ = turn_edges(lm)
    dialogues = (
        Dialogue(i, 0.0, head + lm.tokenizer.convert_tokens_to_ids(list(w)))
        for i, w in enumerate(itertools.cycle(['abcd', 'ab', 'xcdx']))
    )
    found = dialogues_of(generate_dialogues(lm, dialogues, 9, replace(CONFIG, batch=2), generator(0)))
    assert [t.tokens[t.answer_start :] for t in found] == generated(lm, [t.messages for t in found], CONFIG.new_tokens)


def test_columns_of_the_logits_without_a_token():
    "Models round their vocabulary up; such a column must never be generated"
    lm = toy_lm(vocab=97)
    lm.model.get_output_embeddings().weight.data[80:] *= 9
    generated = answers(lm, ['word', 'other'], 20, 2, (0.0, 1.0))
    assert max(map(max, generated)) < len(lm.tokenizer) == 76


@pytest.mark.parametrize(
    'template,special,eos,head,ends',
    [
        (CHATML, IM, '<|im_end|>', '<|im_start|>user\n', {'<|im_end|>'}),
        (LLAMA2, [], '</s>', '<s>[INST] ', {' ', '</s>'}),
        (GEMMA, ['<start_of_turn>', '<end_of_turn>'], '<end_of_turn>', '<s><start_of_turn>user\n', {'<end_of_turn>'}),
        (LLAMA3, HEADER, '<|eot_id|>', '<s><|start_header_id|>user<|end_header_id|>\n\n', {'<|eot_id|>'}),
        (MISTRAL, ['[INST]', '[/INST]'], '</s>', '<s>[INST] ', {'[/INST]', '</s>'}),
    ],
)
def test_edges_of_the_users_turn(template, special, eos, head, ends):
    lm = lm_of(template, special, eos)
    a, b = turn_edges(lm)
    assert (''.join(lm.tokenizer.convert_ids_to_tokens(a)), set(lm.tokenizer.convert_ids_to_tokens(b))) == (head, ends)


def test_a_written_conversation_is_what_the_target_says():
    "Data-free, greedy: each answer equals generate's for the question as text"
    lm = chat_lm()
    config = replace(CONFIG, temperatures=(0.0,))
    dialogues = dialogues_of(generate_dialogues(lm, self_dialogues(lm, config, 0), 12, config, generator(3)))
    questions = [t.messages[0]['content'] for t in dialogues]
    assert len(dialogues) == 12 == len(set(questions)) and [t.tokens[t.answer_start :] for t in dialogues] == generated(
        lm, questions, config.new_tokens
    )
    assert sum(q.startswith('Hi ') for q in questions) > 2


def test_failed_questions_are_replaced():
    "As many conversations as asked for, though many questions never end"
    lm = chat_lm()
    config = replace(CONFIG, user_tokens=6, openers=('abc',))
    dialogues = dialogues_of(generate_dialogues(lm, self_dialogues(lm, config, 0), 4, config, generator(0)))
    assert len(dialogues) == 4 and dialogues[-1].index > 10  # index counts attempts
    lm.model.get_output_embeddings().weight.data[list(turn_edges(lm)[1])] = 0  # the end of turn becomes unlikely
    lm.model.get_output_embeddings().weight.data[:5] = 0
    never = replace(config, openers=('a',), user_tokens=2)
    with pytest.raises(DecodingError, match='never ends the user'):
        list(generate_dialogues(lm, self_dialogues(lm, never, 0), 4, replace(never, min_p=0.9), generator(0)))


def chi2(sample, p):
    expected = len(sample) * p
    seen = torch.tensor(sample).bincount(minlength=len(p)).float()
    keep = expected >= 5
    o, e = (torch.cat([x[keep], x[~keep].sum()[None]]) for x in (seen, expected))
    e = e.clamp(min=1e-9)
    return float(((o - e) ** 2 / e).sum()), len(o) - 1


@pytest.mark.slow
@pytest.mark.parametrize('min_p', [0.0, 0.1])
def test_draws_follow_the_softmax_at_each_rows_temperature(min_p):
    g = generator(1)
    logits = 2 * torch.randn(700, generator=g)
    n = 20000  # three blocks, the last one short
    for t in (0.4, 1.0, 1.7):
        p = (logits / t).softmax(-1)
        p = torch.where(p < min_p * p.max(), 0.0, p)
        p = p / p.sum()
        warm = torch.tensor([t, 9.0]).repeat(n // 2)  # the other rows have another temperature
        drawn = draw_blocks(logits.expand(n, -1), warm, torch.full((n,), min_p), torch.rand(n, 2, generator=g))
        x, free = chi2(drawn[::2].tolist(), p)
        assert x < free + 5 * (2 * free) ** 0.5, (t, x, free)  # five standard deviations
        assert (p[drawn[::2]] > 0).all()
        x, free = chi2(drawn[1::2].tolist(), p)
        assert x > 2 * free


@pytest.mark.slow
def test_neighbours_draw_at_their_own_temperatures():
    lm = chat_lm()
    warm = (0.4, 1.5)
    n = 2000
    first = torch.tensor([(a or lm.eos_ids)[0] for a in answers(lm, ['a'] * n, 1, 50, warm)])
    with torch.no_grad():
        logits = lm.model(encode_one(lm, 'a')[None]).logits[0, -1]
    for i, t in enumerate(warm):
        x, free = chi2(first[i::2].tolist(), (logits / t).softmax(-1))
        assert x < free + 5 * (2 * free) ** 0.5, (t, x, free)


def test_greedy_and_drawn_rows_mixed():
    "A greedy row is not disturbed by its neighbours' draws"
    lm = chat_lm()
    mixed = answers(lm, ['word'] * 30, 8, 4, (0.0, 1.0, 0.0))
    best = answers(lm, ['word'], 8, 1)[0]
    assert all(a == best for i, a in enumerate(mixed) if i % 3 != 1) and len({tuple(a) for a in mixed[1::3]}) > 5


def test_refusals_by_name():
    with pytest.raises(DecodingError, match='mistral sees 20 tokens at most, but a conversation may have 21'):
        Ring(toy_model('mistral', sliding_window=20), 1, 21, [5])
    with pytest.raises(DecodingError, match="the cache of the family 'mamba'"):
        Ring(toy_model('mamba', state_size=4), 1, 21, [5])
    model = toy_model()
    model.config._attn_implementation = 'flash_attention_2'
    with pytest.raises(DecodingError, match="attn_implementation='sdpa'"):
        Ring(model, 1, 21, [5])
    Ring(toy_model('qwen2', use_sliding_window=False, sliding_window=20), 1, 21, [5])
    with pytest.raises(DecodingError, match='but the context holds 256'):
        write_conversations(chat_lm(), 'never', replace(CONFIG, new_tokens=300), quiet=True)
    with pytest.raises(DecodingError, match='no chat template'):
        write_conversations(toy_lm(), 'never', CONFIG, quiet=True)
    assert not Path('never').exists()


@pytest.mark.parametrize(
    'bad',
    [
        dict(batch=0),
        dict(per_shard=0),
        dict(shards=0),
        dict(temperatures=()),
        dict(temperatures=(-1.0,)),
        dict(min_p=2.0),
        dict(openers=()),
        dict(engine='fast'),
        dict(new_tokens=1.5),
    ],
)
def test_bad_settings(bad):
    with pytest.raises(DecodingError, match=next(iter(bad))):
        WriteConfig(**bad)


# ---- shards


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nobody disturbed: name -> text"
    folder = tmp_path_factory.mktemp('whole')
    write_conversations(chat_lm(), folder, CONFIG, quiet=True)
    return texts(folder)


def texts(folder):
    return {f.name: f.read_text() for f in sorted(Path(folder).glob('shard-*'))}


def leftovers(folder):
    return [f.name for f in Path(folder).iterdir() if f.name.endswith('.part')]


def test_the_output_can_be_learnt_from(whole, tmp_path):
    assert (
        sorted(whole) == ['shard-0000.jsonl', 'shard-0001.jsonl', 'shard-0002.jsonl'] and len(set(whole.values())) == 3
    )
    for n, t in whole.items():
        (tmp_path / n).write_text(t)
    found = read_conversations(tmp_path)
    examples, dropped = encode_all(chat_lm(), found)
    assert (
        len(found) == 15
        and len(examples) >= 5
        and {c['temperature'] for c in found} == {0.0, 1.0}
        and sum(dropped.values()) == 15 - len(examples)
    )


@pytest.mark.slow
@pytest.mark.parametrize('at', [0, 7, None])
def test_ctrl_c_and_more_of_the_same(whole, tmp_path, at, capsys):
    lm = chat_lm()
    passes = itertools.count()
    forward = lm.model.forward

    def interrupted(*args, **kwargs):
        if next(passes) == at or at is None and (tmp_path / 'shard-0001.jsonl').exists():
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    lm.model.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        write_conversations(lm, tmp_path, CONFIG, quiet=True)
    assert (
        'give the same command to go on' in capsys.readouterr().out
        and texts(tmp_path).items() < whole.items()
        and not leftovers(tmp_path)
    )
    torch.manual_seed(99)
    random.seed(99)  # the caller's generators have no say
    ages = {f: f.stat().st_mtime_ns for f in tmp_path.glob('shard-*')}
    write_conversations(chat_lm(), tmp_path, CONFIG, quiet=True)
    assert (
        texts(tmp_path) == whole
        and all(f.stat().st_mtime_ns == t for f, t in ages.items())
        and len(ages) == (2 if at is None else 0)
    )


@pytest.mark.slow
def test_kill_9(tmp_path):
    lm = chat_lm()
    toy_folder(tmp_path / 'model', lm.model, lm.tokenizer)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from npu_lora_decoding.decoding.loop import load\n"
        "from npu_lora_decoding.hass.continuous_batching import WriteConfig\n"
        "from npu_lora_decoding.hass.self_chat import write_conversations\n"
        "config = WriteConfig(shards=4, per_shard=12, batch=4, user_tokens=60, new_tokens=40, min_p=0.)\n"
        f"write_conversations(load({str(tmp_path/'model')!r}), sys.argv[1], config, quiet=True)"
    )
    p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'killed')])
    for _ in range(12000):
        if (tmp_path / 'killed' / 'shard-0001.jsonl').exists() or p.poll() is not None:
            break  # up to four minutes: a busy machine imports slowly
        time.sleep(0.02)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    kept = texts(tmp_path / 'killed')
    config = WriteConfig(shards=4, per_shard=12, batch=4, user_tokens=60, new_tokens=40, min_p=0.0)
    assert 2 <= len(kept) < 4
    for name in ('killed', 'whole'):
        write_conversations(load(tmp_path / 'model'), tmp_path / name, config, quiet=True)
    assert texts(tmp_path / 'killed') == texts(tmp_path / 'whole') and kept.items() < texts(tmp_path / 'whole').items()


@pytest.mark.slow
def test_full_disk(whole, tmp_path, monkeypatch):
    real = Path.write_text

    def full(self, text, *args, **kwargs):
        if 'shard-0001' in self.name:
            real(self, text[:100])
            raise OSError(28, 'No space left on device')
        return real(self, text, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(Path, 'write_text', full)
        with pytest.raises(
            DecodingError,
            match='cannot write shard-0001.jsonl .No space left on device.: make room or choose another folder',
        ):
            write_conversations(chat_lm(), tmp_path, CONFIG, quiet=True)
    assert sorted(texts(tmp_path)) == ['shard-0000.jsonl'] and not leftovers(tmp_path)
    write_conversations(chat_lm(), tmp_path, CONFIG, quiet=True)
    assert texts(tmp_path) == whole


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(DecodingError, match='cannot write'):
        write_conversations(chat_lm(), tmp_path / 'file' / 'run', CONFIG, quiet=True)


@pytest.mark.slow
def test_other_settings_are_refused(whole, tmp_path):
    write_conversations(chat_lm(), tmp_path, replace(CONFIG, shards=1), quiet=True)
    for change in (
        dict(seed=1),
        dict(min_p=0.1),
        dict(openers=('x',)),
        dict(temperatures=(1.0,)),
        dict(batch=2),
        dict(per_shard=4),
        dict(new_tokens=8),
        dict(user_tokens=8),
    ):
        with pytest.raises(DecodingError, match=f'was written with another {next(iter(change))}: '):
            write_conversations(chat_lm(), tmp_path, replace(CONFIG, **change), quiet=True)
    other = chat_lm()
    other.model.get_output_embeddings().weight.data += 0.1
    with pytest.raises(DecodingError, match='fingerprint'):
        write_conversations(other, tmp_path, CONFIG, quiet=True)
    other = chat_lm()
    other.tokenizer.chat_template = CHATML + ' '
    with pytest.raises(DecodingError, match='template'):
        write_conversations(other, tmp_path, CONFIG, quiet=True)
    tuned = chat_lm()
    tuned.adapter = load_adapter(toy_adapter(tuned.model, tmp_path / 'adapter'), tuned.model)
    with pytest.raises(DecodingError, match='adapter'):
        write_conversations(tuned, tmp_path, CONFIG, quiet=True)
    with pytest.raises(DecodingError, match='prompts'):
        write_conversations(chat_lm(), tmp_path, CONFIG, prompts=['Hi'], quiet=True)
    write_conversations(chat_lm(), tmp_path, CONFIG, quiet=True)  # only more shards
    assert texts(tmp_path) == whole
    (tmp_path / 'settings.json').write_text('{')
    with pytest.raises(DecodingError, match='settings.json is not valid JSON'):
        write_conversations(chat_lm(), tmp_path, CONFIG, quiet=True)


@pytest.mark.slow
def test_two_processes_share_the_shards(whole, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    shares = []
    for rank in '10':
        monkeypatch.setenv('RANK', rank)
        before = set(texts(tmp_path)) if tmp_path.exists() else set()
        write_conversations(chat_lm(), tmp_path, CONFIG, quiet=True)
        shares.append(set(texts(tmp_path)) - before)
    assert shares == [{'shard-0001.jsonl'}, {'shard-0000.jsonl', 'shard-0002.jsonl'}] and texts(tmp_path) == whole


def test_prompts_are_all_answered_in_order(tmp_path, capsys):
    lm = chat_lm()
    prompts = [f'ask {"x" * (40 - 3*i)} {i}' for i in range(12)]  # the last one begins to answer first
    write_conversations(
        lm, tmp_path, replace(CONFIG, shards=None, temperatures=(0.0,)), prompts=[*prompts, ' ', 'x' * 100]
    )
    found = read_conversations(tmp_path)
    assert len(texts(tmp_path)) == 3 and [c['messages'][0]['content'] for c in found] == prompts
    assert [lm.tokenizer.decode(a) for a in generated(lm, prompts, 16)] == [c['messages'][1]['content'] for c in found]
    printed = capsys.readouterr().out
    assert (
        '2 of 14 prompts are left out' in printed
        and '2 conversations, 3 of 3 shards are written, about 0 min left' in printed
        and printed.count('tokens/s; 15 conversations take 0 min') == 1
    )
    with pytest.raises(DecodingError, match='none of the 1 prompts is usable'):
        write_conversations(lm, tmp_path / 'b', CONFIG, prompts=[' '])


# ---- vLLM, or rather something with its interface


@pytest.fixture
def fake_vllm(monkeypatch):
    "A module `vllm` that answers greedily on the toy, and writes `Hi` + end for a user's turn"
    made = types.ModuleType('vllm')

    class SamplingParams:
        def __init__(self, *, temperature, min_p, max_tokens, stop_token_ids, detokenize, seed):
            self.__dict__.update(locals())

    class LLM:
        def __init__(self, model, dtype, max_model_len):
            made.built = (model, dtype, max_model_len)
            self.lm = chat_lm()

        def generate(self, prompts, params):
            made.calls.append(params)
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=self.say(p['prompt_token_ids'], q))])
                for p, q in zip(prompts, params)
            ]

        def say(self, ids, q):
            if q.temperature > 0 and q.min_p > 0:
                return (
                    self.lm.tokenizer.convert_tokens_to_ids([*f'Hi{q.seed % 7}', '<|im_end|>'])
                    if q.seed % 2
                    else self.lm.tokenizer.convert_tokens_to_ids(['x'] * q.max_tokens)
                )
            new = self.lm.model.generate(
                torch.tensor([ids]),
                max_new_tokens=q.max_tokens,
                do_sample=False,
                eos_token_id=q.stop_token_ids,
                pad_token_id=0,
            )[0, len(ids) :]
            return tuple(new.tolist())

    made.SamplingParams = SamplingParams
    made.LLM = LLM
    made.calls = []
    monkeypatch.setitem(sys.modules, 'vllm', made)
    find = write.importlib.util.find_spec
    monkeypatch.setattr(write.importlib.util, 'find_spec', lambda n, *a: object() if n == 'vllm' else find(n, *a))
    return made


def test_vllm_answers_prompts_as_the_ring(fake_vllm, tmp_path):
    config = replace(CONFIG, shards=None, temperatures=(0.0,))
    prompts = [f'ask {i}' for i in range(7)]
    write_conversations(chat_lm(), tmp_path / 'v', replace(config, engine='vllm'), prompts=prompts, quiet=True)
    write_conversations(chat_lm(), tmp_path / 'r', replace(config, engine='ring'), prompts=prompts, quiet=True)
    assert texts(tmp_path / 'v') == texts(tmp_path / 'r') and fake_vllm.built[1:] == ('float32', 256)
    with pytest.raises(DecodingError, match='was written with another engine'):
        write_conversations(chat_lm(), tmp_path / 'v', replace(config, engine='ring'), prompts=prompts, quiet=True)


def test_vllm_writes_both_turns(fake_vllm, tmp_path):
    write_conversations(chat_lm(), tmp_path, replace(CONFIG, engine='vllm', shards=1, min_p=0.05), quiet=True)
    found = read_conversations(tmp_path)
    assert len(found) == 5 and all(
        c['messages'][0]['content'].startswith('Hi') for c in found
    )  # the endless questions were replaced
    assert {c['temperature'] for c in found} == {0.0, 1.0} and fake_vllm.calls[-1][0].temperature in (0.0, 1.0)


def test_vllm_is_refused_or_left_alone(fake_vllm, tmp_path):
    lm = chat_lm()
    assert write._engine(lm, CONFIG) == 'ring'  # on a CPU
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'a'), lm.model)
    with pytest.raises(DecodingError, match='vLLM would write without the adapter'):
        write_conversations(lm, tmp_path / 'r', replace(CONFIG, engine='vllm'), quiet=True)


def test_vllm_is_not_installed(tmp_path):
    if write.importlib.util.find_spec('vllm'):
        pytest.skip('it is')
    with pytest.raises(DecodingError, match='vLLM is not installed'):
        write_conversations(chat_lm(), tmp_path, replace(CONFIG, engine='vllm'), quiet=True)
