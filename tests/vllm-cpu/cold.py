"""CoLD inside vLLM on a CPU, with the shipped King James adapter

    bash tests/vllm-cpu/run cold [--prompts 50] [--batches 1,4,16] [--new-tokens 24] [--skip speed,server] [--json FILE]

Prompts are held-out verses, as `nld verify` takes them; everything in fp32 and eager. In one engine that is started as
`engine_options` says: the probe must pass, and fail for a base twin without an adapter; twins that do not belong together must
be refused, rows of other requests left alone; sampled twins must generate the same; and greedy answers must be those of our
own loop, with 1, 4 and 16 pairs at once (where our scores of the two tokens lie within 1e-4, a difference is a tie and is
listed). Then contrast, the adapter alone and the model alone (in an engine without LoRA) take turns, and a server on this
machine is asked. The exit code is 1 where something disagrees.
"""

import argparse, contextlib, multiprocessing, os, shlex, socket, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ADAPTER = HERE.parent.parent / 'results' / 'adapters' / 'king_james'


def say(*words):
    print(*words, flush=True)


# --- in an engine's process


def start(target, options):
    "Make the engine of this process"
    global LLM
    import torch, vllm

    torch.set_num_threads(1)
    LLM = vllm.LLM(target, dtype='float32', enforce_eager=True, enable_prefix_caching=False, seed=0, **options)


def contrasted(prompts, batch, n, how, **options):
    "Return CoLD's answers, `batch` pairs at once"
    from npu_lora_decoding.serving.vllm_client import generate

    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return [
        list(o.outputs[0].token_ids)
        for g in groups
        for o in generate(
            LLM,
            g,
            how['adapter'],
            how['zeros'],
            how['refusal'],
            target=how['target'],
            vocab=how['vocab'],
            max_tokens=n,
            detokenize=False,
            **options,
        )
    ]


def plain(prompts, batch, n, adapter=None, number=1):
    "Return greedy answers of vLLM alone, `batch` at once"
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    lora = adapter and LoRARequest(str(adapter), number, str(adapter))
    params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
    return [
        list(o.outputs[0].token_ids)
        for g in groups
        for o in LLM.generate([dict(prompt_token_ids=p) for p in g], params, lora_request=lora, use_tqdm=False)
    ]


def guards(prompts, how):
    "Return what the engine does with good and bad pairs: name -> what happened"
    from npu_lora_decoding.foundations.errors import DecodingError
    from npu_lora_decoding.serving.vllm_client import generate, probe

    def answer_or_error(f):
        try:
            return f() or 'answered'
        except DecodingError as e:
            return str(e)

    a = how['adapter']
    z = how['zeros']
    r = how['refusal']
    # zeros into the first slot, so that the expert has the last: the one that a row without an adapter is answered from
    plain(prompts[:1], 1, 1, z, 2)
    found = dict(
        probe=answer_or_error(lambda: f'apart by {probe(LLM, prompts[0], a, z, r):.3f}'),
        probe_without_zeros=answer_or_error(lambda: probe(LLM, prompts[0], a, None, r)),
        without_zeros=answer_or_error(lambda: generate(LLM, prompts[:1], a, None, r, max_tokens=4) and 'answered'),
    )
    alone = plain(prompts[1:2], 1, 8, a)
    stops, beside = mixed(prompts, a, z, r)
    drawn = [contrasted(prompts[:4], 4, 16, how, temperature=1.0, seed=s) for s in (1, 1, 2)]
    return found | dict(
        unlike_twins_stopped_by=stops,
        request_beside_unchanged=beside == alone[0],
        sampled_again_equal=drawn[0] == drawn[1],
        other_seed_differs=drawn[0] != drawn[2],
    )


def mixed(prompts, adapter, zeros, refusal):
    "Return what stopped twins with different prompts, and what a request without contrast wrote beside them"
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from npu_lora_decoding.serving.vllm_pairing import PairRequest

    twin = lambda role: SamplingParams(
        temperature=0.0,
        max_tokens=8,
        stop_token_ids=[refusal],
        extra_args=PairRequest('unlike', role, 0.1, 0.5, refusal).args,
    )
    e = LoRARequest(str(adapter), 1, str(adapter))
    z = LoRARequest(str(zeros), 2, str(zeros))
    out = LLM.generate(
        [dict(prompt_token_ids=p) for p in (prompts[0], prompts[1], prompts[2])],
        [twin('expert'), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), twin('base')],
        lora_request=[e, e, z],
        use_tqdm=False,
    )
    return [out[0].outputs[0].stop_reason, out[2].outputs[0].stop_reason], list(out[1].outputs[0].token_ids)


@contextlib.contextmanager
def engine(*args):
    "Yield `call(f, *args)`, which runs a function beside an engine in a process of its own: two in one would share memory and settings"
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), start, args) as pool:
        yield lambda f, *a, **kw: pool.submit(f, *a, **kw).result()


# --- in ours


def ours(lm, prompts, n, target, batch=10):
    "Return our own answers, in padded batches: that these write what one prompt alone writes is `nld verify`'s to show"
    return [
        [t.id for t in row]
        for i in range(0, len(prompts), batch)
        for row in lm.generate(prompts[i : i + batch], target, max_new_tokens=n, record=False).tokens
    ]


def compared(lm, target, prompts, want, got, refusal):
    "Return a row of equality: ties, and other differences"
    import torch
    from npu_lora_decoding.evaluation.equivalence import first_difference

    def difference(i, p, a, b):
        longer = max(len(a), len(b))
        a, b = (x + [refusal] * (longer - len(x)) for x in (a, b))
        return first_difference(lm, target, torch.tensor(p), b, a, i)

    found = [difference(i, *each) for i, each in enumerate(zip(prompts, want, got))]
    found = [d for d in found if d]
    return dict(
        prompts=len(prompts),
        tokens=sum(map(len, want)),
        equal=len(prompts) - len(found),
        ties=[vars(d) for d in found if d.tie],
        broken=[vars(d) for d in found if not d.tie],
    )


def speed(lora, alone, prompts, how, *, batch, n, rounds):
    "Return a row of times in turns: contrast, the adapter alone, the model alone"
    runs = dict(cold=[], lora=[], plain=[])
    ways = dict(
        cold=lambda: lora(contrasted, prompts, batch, n, how, ignore_eos=True),
        lora=lambda: lora(plain, prompts, batch, n, how['adapter']),
        plain=lambda: alone(plain, prompts, batch, n),
    )
    for i in range(rounds + 1):
        for name, f in ways.items():
            began = time.perf_counter()
            wrote = f()
            assert all(len(w) == n for w in wrote), (name, [len(w) for w in wrote])
            if i:
                runs[name].append(time.perf_counter() - began)
    turns = lambda a, b: sorted(y / x for x, y in zip(runs[a], runs[b]))  # ratios of throughput, of neighbours in time
    ratios = dict(
        throughput_to_plain=turns('cold', 'plain'),
        throughput_to_lora=turns('cold', 'lora'),
        lora_to_plain=turns('lora', 'plain'),
    )
    per_token = {f'{name}_ms_per_token': 1000 * statistics.median(r) / (len(prompts) * n) for name, r in runs.items()}
    return (
        dict(
            method='vllm_cold_speed',
            batch=batch,
            prompts=len(prompts),
            new_tokens=n,
            rounds=rounds,
            **{k: statistics.median(r) for k, r in ratios.items()},
            spread={k: [r[0], r[-1]] for k, r in ratios.items()},
        )
        | per_token
    )


def ask_server(target, how, prompts, messages, *, n, pairs, context):
    "Return what a server on this machine answers to pairs of ids, and to one of messages, after its probe"
    from npu_lora_decoding.serving.vllm_client import ask, probe_server, server_bodies
    from npu_lora_decoding.serving.vllm_plugin import serve_command

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = (
        shlex.split(serve_command(target, how['adapter'], how['zeros'], context=context, pairs=pairs))
        + f'--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --no-enable-prefix-caching'.split()
    )
    # the script `vllm` looks for a package of that name, which vllm-cpu is not
    command[:3] = [sys.executable, '-m', 'vllm.entrypoints.openai.api_server', '--model', command[2]]
    url = f'http://127.0.0.1:{port}'
    bodies = [
        server_bodies(p, how['refusal'], how['target'], how['vocab'], max_tokens=n, return_token_ids=True)
        for p in prompts
    ]
    server = subprocess.Popen(
        command, env=os.environ | dict(VLLM_ENABLE_V1_MULTIPROCESSING='1'), start_new_session=True
    )
    try:
        wait_for(server, url)
        probe_server(url, bodies[0])
        chat = ask(url, server_bodies(messages, how['refusal'], how['target'], how['vocab'], max_tokens=n))
        return [ask(url, b)['choices'][0]['token_ids'] for b in bodies], chat['choices'][0]['message']['content']
    finally:
        server.terminate()
        server.wait(60)


def wait_for(server, url, seconds=1800):
    "Wait until the server is ready"
    import urllib.request

    for _ in range(seconds):
        if server.poll() is not None:
            sys.exit(f'the server ended with status {server.returncode}')
        try:
            urllib.request.urlopen(url + '/health', timeout=5)
            return
        except OSError:
            time.sleep(1)
    sys.exit('the server did not start')


def check_answers(lm, call, prompts, options, how, want):
    "Return rows and failures of guards and of equality"
    found = call(guards, prompts, how)
    failures = []
    r = how['refusal']
    good = dict(
        probe=lambda x: x.startswith('apart by'),
        probe_without_zeros=lambda x: 'as if one adapter served both rows' in x,
        without_zeros=lambda x: 'vLLM refused the pair' in x,
        unlike_twins_stopped_by=lambda x: x == [r, r],
    )
    for name, x in found.items():
        say(f'{name}: {x}')
        if not good.get(name, bool)(x):
            failures.append(f'{name}: {x}')
    rows = [dict(method='vllm_cold_guards') | found]
    for b in options.batches:
        rows.append(
            dict(method='vllm_cold_equality', batch=b, alpha=how['target'].alpha, beta=how['target'].beta)
            | compared(lm, how['target'], prompts, want, call(contrasted, prompts, b, options.new_tokens, how), r)
        )
        say(
            f'{b} pairs at once: {rows[-1]["equal"]} of {len(prompts)} answers equal, {rows[-1]["tokens"]} tokens, '
            f'ties {rows[-1]["ties"]}'
        )
        if rows[-1]['broken']:
            failures.append(f'{b} pairs at once: answers differ: {rows[-1]["broken"][:3]}')
    return rows, failures


def check_server(lm, how, prompts, want, got, chat):
    "Return the row and the failures of a server's answers, to ids and to messages"
    text = lm.tokenizer.decode(want[0], skip_special_tokens=True)
    same = compared(lm, how['target'], prompts, want, got, how['refusal'])
    row = dict(method='vllm_cold_server') | same | dict(chat_equal=chat == text)
    messages = 'equal' if chat == text else f'{chat!r} and not {text!r}'
    say(f'server: {row["equal"]} of {row["prompts"]} answers equal, ties {row["ties"]}; as messages {messages}')
    broken = row['broken'] or chat != text
    return row, [f'server: answers differ: {row["broken"] or chat}'] if broken else []


def settings(lm, options):
    "Return what both implementations decode with, but for the zeros"
    from npu_lora_decoding.cold.rule import CoLD
    from npu_lora_decoding.serving.vllm_client import refusal_token

    return dict(
        adapter=str(ADAPTER),
        refusal=refusal_token(lm.tokenizer, lm.eos_ids),
        target=CoLD(options.alpha, options.beta),
        vocab=lm.vocab,
    )


def check(options):
    "Return rows and failures"
    import torch, vllm
    from npu_lora_decoding.decoding.sampling import Plain
    from npu_lora_decoding.evaluation.benchmark import environment
    from npu_lora_decoding.foundations.models import embedded_folder, encode_one
    from npu_lora_decoding.decoding.loop import load
    from npu_lora_decoding.foundations.tasks import king_james
    from npu_lora_decoding.serving.vllm_plugin import engine_options, null_adapter

    torch.set_num_threads(1)
    lm = load(adapter=ADAPTER, device='cpu', dtype='fp32')
    target = str(embedded_folder())
    items = king_james().test[: options.prompts]
    prompts = [encode_one(lm, i.messages).tolist() for i in items]
    how = settings(lm, options)
    pairs = max(options.batches)
    context = max(map(len, prompts)) + options.new_tokens + 16
    with tempfile.TemporaryDirectory() as work:
        how['zeros'] = str(null_adapter(ADAPTER, Path(work) / 'zeros'))
        want = ours(lm, prompts, options.new_tokens, how['target'])
        changed = sum(a != b for a, b in zip(want, ours(lm, prompts[:8], options.new_tokens, Plain())))
        say(f'our loop is done; contrast changed {changed} of the first {min(8, len(prompts))} greedy answers')
        with engine(target, engine_options(context, pairs, 8)) as lora:
            rows, failures = check_answers(lm, lora, prompts, options, how, want)
            if 'speed' not in options.skip:
                rows += speeds(lora, target, context, prompts, options, how)
        if 'server' not in options.skip:
            answered = ask_server(
                target, how, prompts[:4], items[0].messages, n=options.new_tokens, pairs=pairs, context=context
            )
            row, wrong = check_server(lm, how, prompts[:4], want[:4], *answered)
            rows.append(row)
            failures += wrong
    return [r | dict(dtype='float32') for r in rows] + [
        environment() | dict(vllm=vllm.__version__, contrast_changed=changed)
    ], failures


def speeds(lora, target, context, prompts, options, how):
    "Return the rows of all batches"
    rows = []
    with engine(target, dict(max_model_len=context, max_num_seqs=2 * max(options.batches))) as alone:
        for b in options.batches:
            some = prompts[: max(2, b)]
            rows.append(speed(lora, alone, some, how, batch=b, n=options.new_tokens, rounds=options.rounds))
            say(
                f'{b} at once: contrast has {rows[-1]["throughput_to_lora"]:.2f} of the adapter\'s throughput and '
                f'{rows[-1]["throughput_to_plain"]:.2f} of the model\'s alone'
            )
    return rows


def main():
    from npu_lora_decoding.foundations.files import save_rows

    parser = argparse.ArgumentParser(
        prog='run cold', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--prompts', type=int, default=50, help='how many held-out verses')
    parser.add_argument(
        '--batches',
        type=lambda s: [int(x) for x in s.split(',')],
        default=[1, 4, 16],
        help='pairs at once, separated by commas',
    )
    parser.add_argument('--new-tokens', type=int, default=24, help='longest answer')
    parser.add_argument('--alpha', type=float, default=0.1, help='CoLD\'s plausibility')
    parser.add_argument('--beta', type=float, default=0.5, help='CoLD\'s strength')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each method')
    parser.add_argument('--skip', type=lambda s: s.split(','), default=[], help='speed, server, or both')
    parser.add_argument('--json', help='write the rows here')
    options = parser.parse_args()
    rows, failures = check(options)
    if options.json:
        save_rows(rows, options.json)
    for f in failures:
        say('FAILED', f)
    say(f'{len(failures)} failures' if failures else 'vLLM and our loop agree')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
