"""`nld train-head`, `nld accept` and `nld export-head` on a toy model:
every kind of source, stopped and continued, and each thing a user can get wrong
"""

import json
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import save_file
from npu_lora_decoding.hass import features, pipeline as mh
from npu_lora_decoding.foundations.adapters import fingerprint, load_adapter, toy_adapter, toy_model
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.acceptance import measure_acceptance
from npu_lora_decoding.hass.chat_data import encode_all, read_conversations
from npu_lora_decoding.hass.head import DraftHead, head_config, target_weights
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, adapter_fingerprint, load_draft_adapter
from npu_lora_decoding.hass.draft_adapter import merge_draft_adapter, save_draft_adapter
from npu_lora_decoding.hass.fused_checkpoint import save_fused_head
from npu_lora_decoding.hass.pipeline import acceptance_gain, texts_of
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.hass.config import HeadTraining
from helpers.chats import CHATML, IM, lm_of
from helpers.fused import random_fused
from helpers.heads import draft_adapter, random_head
from helpers.toys import toy_folder, toy_lm

SMALL = (
    '--steps 4 --tokens 256 --heldout 4 --save-every 2 --eval-every 2 --write-batch 4 --user-tokens 24 '
    '--new-tokens 10 --dtype fp32 --device cpu'
).split()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    lm = lm_of(CHATML, IM, '<|im_end|>')
    return str(toy_folder(tmp_path_factory.mktemp('model') / 'toy', lm.model, lm.tokenizer))


def lines(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return str(path)


def talk(i, answer=None):
    return dict(
        messages=[
            dict(role='user', content=f'say {i} words'),
            dict(role='assistant', content=f'{i} words are written ' * 2 if answer is None else answer),
        ]
    )


def prompt(i):
    return dict(prompt=f'say {i} words')


@pytest.mark.parametrize('source', ['data', 'prompts', 'nothing'])
def test_every_source(model, tmp_path, source, capsys):
    rows = dict(data=[talk(i) for i in range(20)], prompts=[prompt(i) for i in range(20)], nothing=None)[source]
    given = ['--conversations', '12'] if rows is None else [f'--{source}', lines(tmp_path / 'rows.jsonl', rows)]
    try:
        run(['train-head', str(tmp_path / 'out'), '--model', model, *given, *SMALL])
    except DecodingError as e:  # a random toy may never end the user's turn, and must say so
        assert source == 'nothing' and 'never ends' in str(e)
        return
    target = load(model, dtype='fp32', device='cpu').model
    for name in ('last', 'best'):
        assert load_head(tmp_path / 'out' / name, target).fc.weight.isfinite().all()
    log = [json.loads(l) for l in (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log if 'losses' in r] == [1, 2, 3, 4] and [r['step'] for r in log if 'chain_5' in r] == [
        2,
        4,
    ]


def test_stopped_and_continued(model, tmp_path, capsys):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    go = lambda out, *more: run(['train-head', str(tmp_path / out), '--model', model, '--data', data, *SMALL, *more])
    go('a')
    go('b', '--stop-after', '1')
    assert 'stopped after 1 of 4 steps' in capsys.readouterr().out
    go('b')
    assert (tmp_path / 'a' / 'last' / 'model.safetensors').read_bytes() == (
        tmp_path / 'b' / 'last' / 'model.safetensors'
    ).read_bytes()


def test_trackers_are_closed_whatever_happens(model, tmp_path, monkeypatch):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    real = mh.new_accelerator
    closed = []

    def tracked(*args):
        acc = real(*args)
        acc.trackers = [SimpleNamespace(name='noted', log=lambda *_, **__: None, finish=lambda: closed.append(True))]
        return acc

    monkeypatch.setattr(mh, 'new_accelerator', tracked)
    go = lambda: run(['train-head', str(tmp_path / 'out'), '--model', model, '--data', data, *SMALL])
    go()
    assert closed == [True]

    def train(*_, **__):
        raise DecodingError('the loss is not finite')

    monkeypatch.setattr(mh, 'train', train)
    with pytest.raises(DecodingError, match='not finite'):
        go()
    assert closed == [True] * 2


def test_runs_share_a_folder_and_an_adapter_counts(model, tmp_path, capsys):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    go = lambda *more: run(['train-head', str(tmp_path / 'out'), '--model', model, '--data', data, *SMALL, *more])
    go('--name', 'hass', '--vocab', '40')
    go('--name', 'eagle2', '--recipe', 'eagle2', '--vocab', '40')
    assert {'hass', 'eagle2', 'features', 'heldout'} <= {f.name for f in (tmp_path / 'out').iterdir()}
    adapter = toy_adapter(toy_model(vocab=load(model, device='cpu').model.config.vocab_size), tmp_path / 'adapter')
    with pytest.raises(DecodingError, match='with another'):
        go('--name', 'lora', '--adapter', str(adapter))
    heads = ','.join(str(tmp_path / 'out' / n / 'last') for n in ('hass', 'eagle2'))
    run(
        [
            'accept',
            heads,
            str(tmp_path / 'out' / 'heldout'),
            '--model',
            model,
            '--tree',
            '8',
            '--dtype',
            'fp32',
            '--device',
            'cpu',
            '--json',
            str(tmp_path / 'rows.json'),
        ]
    )
    rows = [r for r in json.loads((tmp_path / 'rows.json').read_text()) if r['method'] == 'acceptance']
    assert len(rows) == 2 * 3 and all(1 <= r['tau'] <= 7 and len(r['taus']) == r['questions'] for r in rows)


@pytest.mark.parametrize(
    'rows, options, message',
    [
        ([dict(text='a')] * 9, ['--data'], "there is no column 'messages': choose one of text"),
        ([dict(question='a')] * 9, ['--prompts'], "there is no column 'prompt': choose one of question"),
        ([talk(i, '') for i in range(9)], ['--data'], r'no conversation can be used \(1 times: an answer is empty'),
        (
            [talk(i, 'a' * 400) for i in range(9)],
            ['--data'],
            r'no conversation can be used \(1 times: longer than 256 tokens',
        ),
        ([talk(i) for i in range(3)], ['--data'], 'there are 3 conversations, of which 4 would be held out'),
        (None, ['--data', 'nowhere.jsonl'], 'there is no file nowhere.jsonl'),
        (None, ['--data', 'a', '--prompts', 'b'], 'conversations and prompts are both given'),
        (None, ['--recipe', 'eagle3'], "unknown recipe 'eagle3'"),
        (None, ['--optimizer', 'sgd'], "optimizer is 'sgd'"),
        (None, ['--conversations', '0'], '--conversations is 0'),
        (None, ['--loss', 'nla', '--topk', '1'], 'loss and topk are both given: give the weight of topk in loss'),
        (None, ['--loss', 'kl'], "there is no loss 'kl': use one of soft_ce"),
        (None, ['--loss', 'nla:'], "expected names and weights for --loss, got 'nla:'"),
        (None, ['--loss', 'nla:x'], "expected numbers for --loss, got 'x'"),
        (None, ['--loss', 'nla:1,nla'], "a loss is named twice in 'nla:1,nla'"),
        (None, ['--loss', 'nla:-1'], 'the weights of the losses are'),
        (None, ['--recipe', 'eagle2', '--own-tokens'], 'own_tokens changes alignment steps after the first'),
        (None, ['--states', 'x', '--data', 'y'], 'hidden states are given beside conversations or prompts'),
        (None, ['--states', 'nowhere'], 'there is no folder nowhere'),
    ],
)
def test_refused(model, tmp_path, rows, options, message):
    if rows is not None:
        options = [*options, lines(tmp_path / 'rows.jsonl', rows)]
    with pytest.raises(DecodingError, match=message):
        run(['train-head', str(tmp_path / 'out'), '--model', model, *SMALL, *options])
    assert not (tmp_path / 'out' / 'state.safetensors').exists()


def test_a_head_for_another_vocabulary_is_named(model, tmp_path):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    run(['train-head', str(tmp_path / 'out'), '--model', model, '--data', data, *SMALL])
    other = lm_of(CHATML, IM, '<|im_end|>', words=('zz', 'qq'))
    folder = str(toy_folder(tmp_path / 'other', other.model, other.tokenizer))
    with pytest.raises(DecodingError, match='knows .* tokens but the target'):
        run(
            [
                'train-head',
                str(tmp_path / 'more'),
                '--model',
                folder,
                '--data',
                data,
                *SMALL,
                '--init',
                str(tmp_path / 'out' / 'last'),
            ]
        )


EVERY_OPTION = (
    '--recipe align --steps 7 --tokens 99 --alignment-steps 2 --k 4 --topk .5 --feature .2 --step-weights 2,1 '
    '--own-tokens --sample-one-step --cache-targets --vocab 20 --optimizer adamw --lr .01 --noise .3 --row 64 --seed 5 '
    '--save-every 3 --eval-every 2 --name mine --online --init old --stop-after 4 --track tensorboard --tree '
    '8 --conversations 30 --heldout 6 --write-batch 9 --user-tokens 11 --new-tokens 13 --dtype fp32 --device '
    'cpu'
).split()


def test_every_option_of_training_arrives(model, tmp_path, monkeypatch):
    "Each option of `nld train-head` that names a setting, with a value that is not its default"
    import npu_lora_decoding.cli.head as cli_head

    got = []
    monkeypatch.setattr(cli_head, 'make_head', lambda *args, **options: got.append((args, options)))
    run(['train-head', str(tmp_path), '--model', model, *EVERY_OPTION])
    (((_, out, config, source), options),) = got
    assert config == HeadTraining(
        steps=7,
        tokens=99,
        alignment_steps=2,
        k=4,
        losses=(('soft_ce', 1.0), ('topk', 0.5)),
        feature=0.2,
        step_weights=(2.0, 1.0),
        own_tokens=True,
        sample_one_step=True,
        cache_targets=True,
        vocab=20,
        optimizer='adamw',
        lr=0.01,
        noise=0.3,
        row=64,
        seed=5,
        save_every=3,
        eval_every=2,
        precision='no',
    )
    assert out == str(tmp_path)
    assert options == dict(
        name='mine', online=True, tree=dict(depth=6, top_k=10, nodes=8), init='old', stop_after=4, track='tensorboard'
    )
    assert (
        source.conversations,
        source.heldout,
        source.write.batch,
        source.write.user_tokens,
        source.write.new_tokens,
        source.write.seed,
    ) == (30, 6, 9, 11, 13, 5)


@pytest.mark.parametrize(
    'earlier, current, setting',
    [
        (['--n', '2'], ['--alignment-steps', '2'], dict(alignment_steps=2)),
        (['--drawn'], ['--sample-one-step'], dict(sample_one_step=True)),
        (['--remember'], ['--cache-targets'], dict(cache_targets=True)),
    ],
)
def test_earlier_names_of_options_work_and_hint(model, tmp_path, monkeypatch, capsys, earlier, current, setting):
    import npu_lora_decoding.cli.head as cli_head

    got = []
    monkeypatch.setattr(cli_head, 'make_head', lambda *args, **options: got.append(args[2]))
    for options in (earlier, current):
        run(['train-head', str(tmp_path), '--model', model, *SMALL, *options])
        hint = capsys.readouterr().err
        assert (f'{earlier[0]} is now {current[0]}' in hint) == (options is earlier) and hint.count('\n') <= 1
    assert got[0] == got[1]
    assert {name: getattr(got[0], name) for name in setting} == setting


def test_sampled_cached_and_watched(model, tmp_path):
    argv = [
        'train-head',
        str(tmp_path / 'out'),
        '--model',
        model,
        '--data',
        lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)]),
        *SMALL,
        '--sample-one-step',
        '--cache-targets',
        '--alignment-steps',
        '2',
        '--step-weights',
        '2,1',
    ]
    run(argv)
    assert (tmp_path / 'out' / 'last').exists()
    with pytest.raises(DecodingError, match='unknown tracker'):
        run([*argv, '--track', 'nothing'])


def test_gains_are_ratios_of_means_over_the_texts_both_have():
    rows = [
        dict(method='acceptance', head=h, set=s, draft='chain 5', taus=t)
        for h, s, t in (('a', 'x', [2.0, 4.0, None, 6.0]), ('b', 'x', [1.0, 2.0, 9.0, 3.0]), ('a', 'y', [1.0, 1.0]))
    ] + [dict(method='environment')]
    (got,) = acceptance_gain(rows, 'a', 'b')
    assert got == dict(set='x', draft='chain 5', gain=1.0, interval=(1.0, 1.0))  # every text: twice
    (same,) = acceptance_gain(rows, 'b', 'b')
    assert same['gain'] == 0 and same['interval'] == (0, 0)
    with pytest.raises(DecodingError, match='no head .*c.*: choose of a, b'):
        acceptance_gain(rows, 'a', 'c')
    noisy = [
        dict(rows[0], taus=[float(1 + i % 5) for i in range(60)]),
        dict(rows[1], taus=[float(1 + i % 7) for i in range(60)]),
    ]
    (got,) = acceptance_gain(noisy, 'a', 'b')
    assert got['interval'][0] < got['gain'] < got['interval'][1] and got['interval'][1] - got['interval'][0] < 0.8


def test_a_full_disk_leaves_no_half_of_a_shard(model, tmp_path, monkeypatch):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    out = tmp_path / 'out'
    argv = ['train-head', str(out), '--model', model, '--data', data, *SMALL]

    def full(tensors, path, *_):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(features, 'save_tensors', full)
        with pytest.raises(DecodingError, match='make room or choose another folder, then give the same command again'):
            run(argv)
    assert not list((out / 'features').glob('*.safetensors')) and not list((out / 'features').glob('.*'))
    run(argv)
    assert (out / 'last').exists()


def test_the_target_is_as_it_was(model, tmp_path, monkeypatch):
    import npu_lora_decoding.cli.head as cli_head

    lm = load(model, dtype='fp32', device='cpu')
    monkeypatch.setattr(cli_head, 'load_target', lambda *_: (lm, None))
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    run(
        [
            'train-head',
            str(tmp_path / 'out'),
            '--model',
            model,
            '--data',
            lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)]),
            *SMALL,
        ]
    )
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items()) and not any(
        p.requires_grad for p in lm.model.parameters()
    )


def test_write_and_accept_at_two_temperatures(model, tmp_path, capsys):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    run(['train-head', str(tmp_path / 'out'), '--model', model, '--data', data, *SMALL])
    asked = lines(tmp_path / 'asked.jsonl', [prompt(i) for i in range(5)])
    options = '--temperatures 0,1 --conversations 3 --new-tokens 9 --user-tokens 24 --dtype fp32 --device cpu'.split()
    run(['write', str(tmp_path / 'written'), '--model', model, '--prompts', asked, *options])
    conversations = [json.loads(l) for l in (tmp_path / 'written' / 'shard-0000.jsonl').read_text().splitlines()]
    assert [(c['messages'][0]['content'], c['temperature']) for c in conversations] == [
        (f'say {i} words', t) for i in range(3) for t in (0.0, 1.0)
    ]
    capsys.readouterr()
    folders = [str(tmp_path / 'out' / 'last'), str(tmp_path / 'written')]
    run(['accept', *folders, '--model', model, *'--tree 0 --dtype fp32 --device cpu'.split()])
    shown = capsys.readouterr().out
    assert 'written T=0' in shown and 'written T=1' in shown


@pytest.fixture(scope='module')
def toy_head(model, tmp_path_factory):
    "An untrained head with a draft vocabulary, in a folder"
    target = load(model, dtype='fp32', device='cpu').model
    folder = tmp_path_factory.mktemp('head') / 'head'
    head = DraftHead(head_config(target.config))
    head.vocab = torch.arange(12)
    return str(save_head(head, folder, target))


@pytest.mark.parametrize('engine', ['vllm', 'sglang'])
def test_export_says_what_it_checked_and_how_to_serve(model, toy_head, tmp_path, engine, capsys):
    run(
        [
            'export-head',
            toy_head,
            str(tmp_path / 'out'),
            '--engine',
            engine,
            '--tokens',
            '3',
            '--model',
            model,
            '--device',
            'cpu',
        ]
    )
    first, line = capsys.readouterr().out.strip().splitlines()
    assert 'tensors agree' in first and 'tolerance 1e-04' in first
    assert (
        line.startswith(f'vllm serve {model} ' if engine == 'vllm' else 'python -m sglang.launch_server')
        and str(tmp_path / 'out') in line
        and ('"num_speculative_tokens": 3' in line or '--speculative-num-steps 3' in line)
    )
    assert ('--speculative-token-map' in line) == (engine == 'sglang') == (tmp_path / 'out' / 'hot_tokens.pt').exists()


def test_a_fused_head_is_served_by_its_folder_alone(tmp_path, capsys):
    "vLLM finds target and number of draft tokens in the folder; SGLang is given both"
    lm = toy_lm(num_hidden_layers=7)
    folder = toy_folder(tmp_path / 'toy', lm.model, lm.tokenizer)
    target = load(str(folder), dtype='fp32', device='cpu').model
    head = str(save_fused_head(random_fused(target, layers=(2, 3, 4)), tmp_path / 'head', target))
    out = tmp_path / 'out'
    for engine, line in dict(vllm=f'vllm serve {out}', sglang='--speculative-algorithm EAGLE3').items():
        asked = ['--engine', engine, '--tokens', '3', '--model', str(folder), '--device', 'cpu']
        run(['export-head', head, str(out), *asked])
        first, shown = capsys.readouterr().out.strip().splitlines()
        assert 'tensors agree' in first and 'tolerance 1e-04' in first
        assert shown == line if engine == 'vllm' else line in shown and '--speculative-token-map' not in shown
        named = json.loads((out / 'config.json').read_text())
        if engine == 'vllm':
            beside = named['speculators_config']
            assert beside['verifier']['name_or_path'] == str(folder.resolve())
            assert beside['proposal_methods'][0]['speculative_tokens'] == 3


def test_every_option_of_export_arrives(model, toy_head, tmp_path, monkeypatch, capsys):
    import npu_lora_decoding.cli.head as cli_head

    got = []
    adapter = toy_adapter(load(model, device='cpu').model, tmp_path / 'adapter')
    monkeypatch.setattr(
        cli_head,
        'write_export',
        lambda *args, **more: got.append((*args, more)) or dict(tensors=1, slots=2, error=0.0, tolerance=1.0),
    )
    run(
        [
            'export-head',
            toy_head,
            'out',
            '--engine',
            'sglang',
            '--dtype',
            'fp16',
            '--full',
            '--tokens',
            '2',
            '--model',
            model,
            '--adapter',
            str(adapter),
            '--device',
            'cpu',
        ]
    )
    ((head, out, lm, engine, dtype, more),) = got
    assert (head, out, engine, dtype) == (toy_head, 'out', 'sglang', torch.float16) and lm.adapter is not None
    assert more == dict(full=True, tokens=2, verifier='')  # the merged model has no name yet
    shown = capsys.readouterr().out
    assert 'merged into it' in shown and '--model-path TARGET' in shown


@pytest.mark.parametrize(
    'options, message',
    [
        (['--engine', 'tgi'], "unknown engine 'tgi': use one of vllm, sglang"),
        (['--dtype', 'int4'], "unknown dtype 'int4'"),
        (['--tokens', '0'], '--tokens is 0'),
    ],
)
def test_export_refused(model, toy_head, tmp_path, options, message):
    with pytest.raises(DecodingError, match=message):
        run(['export-head', toy_head, str(tmp_path / 'out'), '--model', model, '--device', 'cpu', *options])
    assert not (tmp_path / 'out').exists()


def test_a_draft_adapter_from_training_to_decoding(model, tmp_path, capsys):
    "Trained on a head that stays as it is, refused for another adapter, decoded with, and merged"
    target = load(model, dtype='fp32', device='cpu').model
    task, other = (
        str(toy_adapter(target, tmp_path / name, seed=seed, lora_alpha=0.1))
        for name, seed in (('task', 1), ('other', 2))
    )
    head = str(save_head(random_head(load(model, dtype='fp32', device='cpu')), tmp_path / 'head', target))
    before = {f.name: f.read_bytes() for f in (tmp_path / 'head').iterdir()}
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    out = tmp_path / 'out'
    go = ['train-head', str(out), '--model', model, '--data', data, *SMALL, '--onto', head]
    run([*go, '--rank', '4', '--adapter', task])
    assert before == {f.name: f.read_bytes() for f in (tmp_path / 'head').iterdir()}
    draft = str(out / 'last')
    assert json.loads((out / 'last' / 'adapter_config.json').read_text())['r'] == 4
    size = (out / 'last' / 'adapter_model.safetensors').stat().st_size
    assert size < (tmp_path / 'head' / 'model.safetensors').stat().st_size
    with pytest.raises(DecodingError, match='there is no adapter to draft for: '):
        run(go)
    given = ['--model', model, '--dtype', 'fp32', '--device', 'cpu', '--new-tokens', '9', '--method', 'greedy']
    texts = []
    for more in ([], ['--head', head, '--draft-adapter', draft]):
        capsys.readouterr()
        run(['generate', 'say 3 words', '--adapter', task, *given, *more])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ''
    with pytest.raises(DecodingError, match='last is for another task adapter than that of the text: '):
        run(['generate', 'say 3 words', '--adapter', other, *given, '--head', head, '--draft-adapter', draft])
    with pytest.raises(DecodingError, match='a draft adapter changes a draft head: give that head as --head'):
        run(['generate', 'say 3 words', '--adapter', task, *given, '--draft-adapter', draft])
    merge = ['merge-head', head, draft, str(tmp_path / 'merged'), '--model', model, '--device', 'cpu', '--adapter']
    with pytest.raises(DecodingError, match='last is for another task adapter: '):
        run([*merge, other])
    run([*merge, task])
    merged = load_head(tmp_path / 'merged', target).state_dict()
    assert any(not torch.equal(x, merged[name]) for name, x in load_head(head, target).state_dict().items())


@pytest.mark.parametrize(
    'given, message',
    [
        (['--onto', 'a', '--init', 'b'], 'onto and init are both given: '),
        (['--rank', '4'], 'rank is that of a LoRA on a head: give that head as onto'),
        (['--onto', 'a', '--rank', '0'], 'rank is 0: give at least 1'),
        (['--onto', 'a', '--vocab', '9'], 'vocab is 9, but the head stays as it is: '),
        (['--onto', 'nowhere', '--adapter', 'TASK'], 'there is no folder nowhere'),
    ],
)
def test_what_does_not_go_with_onto(model, tmp_path, given, message):
    task = str(toy_adapter(load(model, dtype='fp32', device='cpu').model, tmp_path / 'task'))
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(20)])
    given = [task if x == 'TASK' else x for x in given]
    with pytest.raises(DecodingError, match=message):
        run(['train-head', str(tmp_path / 'out'), '--model', model, '--data', data, *SMALL, *given])


def answers_of_kinds(tmp_path, **more):
    rows = [dict(talk(i), **({} if i % 3 == 0 else dict(kind=('sums', 'tales')[i % 3 - 1])), **more) for i in range(12)]
    return lines(tmp_path / 'mixed.jsonl', rows)


def rows_of(path):
    rows = [r for r in json.loads(path.read_text()) if r['method'] == 'acceptance']
    return {(r['head'], r['set'], r['draft']): r for r in rows}


def accepting(model, *argv):
    run(['accept', *map(str, argv), '--model', model, *'--tree 6 --dtype fp32 --device cpu'.split()])


def test_accept_by_kind_and_all_together(model, toy_head, tmp_path, capsys):
    data = answers_of_kinds(tmp_path)
    accepting(model, toy_head, data, '--lookup', '--json', tmp_path / 'rows.json')
    shown = capsys.readouterr().out
    assert shown.startswith(
        'tau: tokens a forward pass of the target after the prefill, accepted draft tokens and its own'
    )
    found = rows_of(tmp_path / 'rows.json')
    assert len(shown.splitlines()) == 1 + len(found)
    kinds = ['mixed T=0', 'sums T=0', 'tales T=0']
    drafts = [
        ('head', 'chain 3'),
        ('head', 'chain 5'),
        ('head', 'tree 6'),
        ('head', 'tree 6 + lookup'),
        ('none', 'lookup 8'),
    ]
    assert set(found) == {(head, kind, draft) for kind in [*kinds, 'all T=0'] for head, draft in drafts}
    for head, draft in drafts:
        parts = [found[head, kind, draft] for kind in kinds]
        whole = found[head, 'all T=0', draft]
        assert whole['taus'] == [tau for part in parts for tau in part['taus']]
        assert [part['questions'] for part in parts] == [4, 4, 4] and whole['questions'] == 12
        assert (whole['tokens'], whole['passes']) == tuple(sum(p[k] for p in parts) for k in ('tokens', 'passes'))
        assert whole['tau'] == pytest.approx(sum(whole['taus']) / 12)
        assert whole['interval'][0] <= whole['tau'] <= whole['interval'][1]
    assert all(row['tau'] >= 1 for row in found.values())
    several = [found['head', 'all T=0', 'tree 6'], found['head', 'all T=0', 'tree 6 + lookup']]
    assert several[0]['tokens'] == several[1]['tokens']


def test_several_files_are_kinds_and_a_single_one_is_not(model, toy_head, tmp_path):
    files = []
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        files.append(lines(tmp_path / name / 'heldout.jsonl', [talk(i) for i in range(4)]))
    accepting(model, *[toy_head, ','.join(files), '--json', tmp_path / 'rows.json', '--chain', '3'])
    sets = {name for _, name, _ in rows_of(tmp_path / 'rows.json')}
    assert sets == {'a/heldout T=0', 'b/heldout T=0', 'all T=0'}
    accepting(model, *[toy_head, files[0], '--json', tmp_path / 'rows.json', '--texts', '2'])
    one = rows_of(tmp_path / 'rows.json')
    assert {name for _, name, _ in one} == {'heldout T=0'} and {r['questions'] for r in one.values()} == {2}


@pytest.mark.parametrize(
    'more, message',
    [
        (dict(kind=3), r'the kind of a conversation in .*mixed.jsonl is 3: give a name'),
        (dict(kind=' '), "the kind of a conversation in .* is ' ': give a name"),
        (dict(kind='all'), 'a kind of prompt is called all: give it another name'),
        (dict(temperature='hot'), "the temperature of a conversation in .* is 'hot': give a number from 0"),
        (dict(temperature=-1), 'the temperature of a conversation in .* is -1: give a number from 0'),
    ],
)
def test_answers_that_cannot_be_sorted_are_named(model, toy_head, tmp_path, more, message):
    rows = [dict(talk(0)), dict(talk(1), **more)]
    with pytest.raises(DecodingError, match=message):
        accepting(model, toy_head, lines(tmp_path / 'mixed.jsonl', rows))


def test_accept_refuses_by_name(model, toy_head, tmp_path):
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(3)])
    for argv, message in [
        (['none', data], 'there is nothing that drafts: name a head, or give --lookup'),
        ([toy_head, f'{data},{data}'], 'rows.jsonl.* is given twice'),
        ([toy_head, tmp_path / 'nowhere.jsonl'], 'there is no file .*nowhere.jsonl'),
        ([tmp_path / 'nowhere', data], 'there is no .*nowhere'),
        ([toy_head, data, '--draft-adapter', tmp_path / 'nowhere'], 'nowhere has no adapter_config.json'),
        (['none', data, '--lookup', '--draft-adapter', 'x'], 'a draft adapter changes a draft head: name that head'),
    ]:
        with pytest.raises(DecodingError, match=message):
            accepting(model, *argv)


def test_accept_says_what_it_leaves_out(model, toy_head, tmp_path, capsys):
    accepting(model, toy_head, lines(tmp_path / 'rows.jsonl', [talk(0), talk(1), talk(2, '')]))
    assert 'answers: 1 left out (an answer is empty)' in capsys.readouterr().out


def test_accept_with_draft_adapters(model, tmp_path):
    "Each on its own head, equal to the merged head, and refused for another head or task adapter"
    lm = load(model, dtype='fp32', device='cpu')
    task, other = (str(toy_adapter(lm.model, tmp_path / f'task {s}', seed=s, lora_alpha=0.1)) for s in (1, 2))
    number = adapter_fingerprint(load_adapter(task, lm.model))
    heads = []
    drafts = []
    for seed in (0, 1):
        head = random_head(lm, seed=seed)
        heads.append(str(save_head(head, tmp_path / f'head {seed}', lm.model)))
        draft = DraftAdapter(draft_adapter(head, seed), number)
        drafts.append(str(save_draft_adapter(draft, tmp_path / f'draft {seed}', head, torch.float32)))
    data = answers_of_kinds(tmp_path)
    given = ['--lookup', '--adapter', task, '--json', tmp_path / 'rows.json', '--draft-adapter']
    accepting(model, ','.join(heads), data, *given, ','.join(reversed(drafts)))
    found = rows_of(tmp_path / 'rows.json')
    assert {head for head, _, _ in found} == {'head 0', 'head 1', 'head 0 + draft 0', 'head 1 + draft 1', 'none'}
    adapted = load(model, dtype='fp32', device='cpu', adapter=task)
    frozen = target_weights(adapted.model)
    texts = texts_of(adapted, [c for c in read_conversations(data) if c.get('kind') == 'sums'])
    for seed in (0, 1):
        head = load_head(heads[seed], adapted.model)
        merged = merge_draft_adapter(head, load_draft_adapter(drafts[seed], head).adapter)
        want = measure_acceptance(merged, frozen.embed, frozen.lm_head, texts, tree=dict(depth=6, top_k=10, nodes=6))
        for draft, a in want.items():
            assert found[f'head {seed} + draft {seed}', 'sums T=0', draft]['taus'] == list(a.taus)
    alone, with_draft = (found[name, 'all T=0', 'tree 6']['taus'] for name in ('head 1', 'head 1 + draft 1'))
    assert alone != with_draft
    for argv, message in [
        ([heads[0], data, '--adapter', task, '--draft-adapter', drafts[1]], 'was trained on another head'),
        ([heads[0], data, '--adapter', other, '--draft-adapter', drafts[0]], 'draft 0 is for another task adapter'),
        ([heads[0], data, '--draft-adapter', drafts[0]], 'draft 0 is for a task adapter, but the target has none'),
    ]:
        with pytest.raises(DecodingError, match=message):
            accepting(model, *argv)


def states_folder(model, folder, n=12, layers=4, change=lambda i, tensors: tensors):
    "Hidden states of texts, a file each, as speculators writes them: several layers, the last one before the final norm"
    lm = load(model, dtype='fp32', device='cpu')
    folder.mkdir()
    for i in range(n):
        (example,), _ = encode_all(lm, [talk(i)])
        seen = []
        hook = lm.model.base_model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with torch.no_grad():
            lm.model.base_model(example.ids[None])
        hook.remove()
        states = torch.stack([torch.zeros_like(seen[0][0])] * (layers - 1) + [seen[0][0]], 1)
        tensors = dict(input_ids=example.ids, loss_mask=example.response.to(torch.uint8), hidden_states=states)
        save_file(change(i, tensors), folder / f'hs_{i}.safetensors')
    return folder


def test_trained_on_hidden_states_of_another_program(model, tmp_path, capsys):
    "The same run as with conversations, to the bit, where both see the same texts"
    folder = states_folder(model, tmp_path / 'states')
    go = ['train-head', '--model', model, *SMALL, '--loss', 'soft_ce:1,lk_hybrid:.5', '--vocab', '30', '--own-tokens']
    run([*go, str(tmp_path / 'a'), '--states', str(folder)])
    assert '8 conversations' in capsys.readouterr().out
    data = lines(tmp_path / 'rows.jsonl', [talk(i) for i in range(12)])
    run([*go, str(tmp_path / 'b'), '--data', data])
    logs = [[json.loads(l) for l in (tmp_path / x / 'log.jsonl').read_text().splitlines()] for x in 'ab']
    losses = [torch.tensor([r['losses'] for r in log if 'losses' in r]) for log in logs]
    assert losses[0].shape == (4, 3)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert [r['chain_5'] for r in logs[0] if 'chain_5' in r]
    assert 'hidden states in states' in (tmp_path / 'a' / 'last' / 'README.md').read_text()
    run([*go, str(tmp_path / 'a'), '--states', str(folder)])  # a finished run is left as it is
    with pytest.raises(DecodingError, match='hidden states are stored already: leave online out'):
        run([*go, str(tmp_path / 'c'), '--states', str(folder), '--online'])
    with pytest.raises(DecodingError, match='there are 3 files of hidden states, of which 4 would be held out'):
        run([*go, str(tmp_path / 'c'), '--states', str(states_folder(model, tmp_path / 'few', 3))])
