"""Serves the embedded model with the shipped draft head in vLLM on a CPU

    bash tests/vllm-cpu/run [--prompts 12] [--new-tokens 64] [--chain 3,5] [--json FILE]

No part of `tests/run`: it needs an environment of its own (`setup.sh`, one to two gigabytes), and two or three engines one
after the other. The head is exported as `nld export-head` exports it. Then, in fp32 and greedy: vLLM alone answers held-out
prompts; vLLM with the head must give the same answers (where our target's two best scores lie within 1e-4, a difference is a
tie and is listed); and its counters, how many drafts reached which length, must be those of a replay of our own head over the
same answers. Our draft vocabulary means nothing to vLLM, so the replay drafts from all tokens. The exit code is 1 where
something disagrees.
"""

import argparse, json, multiprocessing, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
HEADS = HERE.parent.parent / 'results' / 'heads'
# A tie of scores; how far shares of accepted draft tokens may lie apart (sums in another order turn near-ties)
TIE = 1e-4
RATE = 0.02


def say(*words):
    print(*words, flush=True)


def serve(target, prompts, new_tokens, speculative=None, ignore_eos=False):
    "Return vLLM's greedy answers (lists of ids) and its counters of speculation"
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + new_tokens
    llm = LLM(
        target,
        dtype='float32',
        enforce_eager=True,
        max_model_len=longest + 64,
        max_num_seqs=8,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        speculative_config=speculative,
    )
    outputs = llm.generate(
        [dict(prompt_token_ids=p) for p in prompts],
        SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=ignore_eos, detokenize=False),
        use_tqdm=False,
    )
    counts = {
        m.name.removeprefix('vllm:spec_decode_num_'): getattr(m, 'values', None) or getattr(m, 'value', None)
        for m in llm.get_metrics()
        if 'spec_decode_num' in m.name
    }
    return [list(o.outputs[0].token_ids) for o in outputs], counts


def alone(f, *args):
    "Run `f` in a process of its own: two engines in one would share memory and settings"
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(f, *args).result()


def until_end(answer, eos, new_tokens):
    "Return what is left of an endless answer where decoding would have stopped"
    end = next((i + 1 for i, t in enumerate(answer) if t in eos), new_tokens)
    return answer[: min(end, new_tokens)]


def differences(lm, prompts, want, got):
    "Return one dictionary for each answer that differs: where, and how far the two tokens' scores lie apart for our target"
    import torch

    out = []
    for i, (p, a, b) in enumerate(zip(prompts, want, got)):
        if a == b:
            continue
        at = next((j for j, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        found = dict(prompt=i, place=at, gap=None)
        if at < min(len(a), len(b)):
            with torch.no_grad():
                scores = lm.model(torch.tensor([p + a[:at]])).logits[0, -1]
            found['gap'] = float((scores[a[at]] - scores[b[at]]).abs())
        out.append(found)
    return out


def counted(lengths, start, emitted, k):
    """Return drafts and how many reached each length, for a text that decoding stops after `emitted` tokens

    Unlike in `replay`, draft tokens beyond the stop count, because vLLM's counters see them.
    """
    drafts = 0
    reached = [0] * k
    slot = start
    done = 1  # the prefill emits the first token
    while done < emitted:
        right = min(int(lengths[slot]), k)
        drafts += 1
        for j in range(right):
            reached[j] += 1
        slot += right + 1
        done += right + 1
    return drafts, reached


def replayed(lm, head, texts, emitted, k):
    "Return drafts and how many reached each length, over all texts"
    import torch
    from npu_lora_decoding.hass.acceptance import chain_lengths
    from npu_lora_decoding.hass.head import target_weights

    frozen = target_weights(lm.model)
    drafts = 0
    reached = [0] * k
    for text, n in zip(texts, emitted):
        lengths = chain_lengths(
            head,
            frozen.embed,
            frozen.lm_head,
            ids=text.ids[None],
            features=text.features[None],
            segments=torch.zeros(1, len(text.ids), dtype=torch.long),
            k=k,
        )[0]
        d, r = counted(lengths, text.prompt - 1, n, k)
        drafts += d
        reached = [a + b for a, b in zip(reached, r)]
    return drafts, reached


def texts_of(lm, prompts, answers):
    "Return prompts and answers as texts with our target's features"
    import torch
    from npu_lora_decoding.hass.acceptance import Text
    from npu_lora_decoding.hass.features import target_features

    ids = [torch.tensor(p + a) for p, a in zip(prompts, answers)]
    return [Text(x, len(p), f) for x, p, f in zip(ids, prompts, target_features(lm, ids, batch=8))]


def check_chain(lm, head, prompts, endless, *, target, folder, new_tokens, k):
    "Serve with a chain of `k` and return rows and failures"
    want = [until_end(a, set(lm.eos_ids), new_tokens) for a in endless]
    got, counts = alone(
        serve, target, prompts, new_tokens, dict(method='eagle', model=str(folder), num_speculative_tokens=k)
    )
    differ = differences(lm, prompts, want, got)
    broken = [d for d in differ if d['gap'] is None or d['gap'] > TIE]
    drafts, reached = replayed(lm, head, texts_of(lm, prompts, endless), list(map(len, want)), k)
    theirs = [a / max(1, counts['drafts']) for a in counts['accepted_tokens_per_pos']]
    ours = [r / max(1, drafts) for r in reached]
    measured = measured_chain(lm, head, texts_of(lm, prompts, want), k)
    rows = [
        dict(
            method='vllm_equality',
            chain=k,
            prompts=len(prompts),
            tokens=sum(map(len, want)),
            equal=len(prompts) - len(differ),
            ties=[d for d in differ if d not in broken],
            broken=broken,
        ),
        dict(
            method='vllm_acceptance',
            chain=k,
            drafts=counts['drafts'],
            replay_drafts=drafts,
            reached=counts['accepted_tokens_per_pos'],
            replay_reached=reached,
            rates=theirs,
            replay_rates=ours,
            tau=1 + sum(theirs),
            replay_tau=1 + sum(ours),
            measured_tau=measured.tau,
            measured_interval=measured.interval,
        ),
    ]
    say(f'chain {k}: {summary(*rows)}')
    return rows, [f'chain {k}: {o}' for o in failures_of(broken, counts, theirs, ours)]


def measured_chain(lm, head, texts, k):
    "Return the acceptance of a chain of `k` over texts, as the package measures it"
    from npu_lora_decoding.hass.acceptance import measure_acceptance
    from npu_lora_decoding.hass.head import target_weights

    frozen = target_weights(lm.model)
    return measure_acceptance(head, frozen.embed, frozen.lm_head, texts, vocab=None, chain=(k,))[f'chain {k}']


def failures_of(broken, counts, theirs, ours):
    "Return what is wrong with a chain: answers that differ, no drafts, or rates of acceptance that are not ours"
    failures = [f'{len(broken)} answers differ: {broken[:3]}'] if broken else []
    if not counts['drafts']:
        failures.append('vLLM drafted nothing')
    for j, (a, b) in enumerate(zip(theirs, ours), 1):
        if abs(a - b) > RATE:
            failures.append(f'draft token {j} is accepted in {a:.3f} of vLLM\'s drafts but {b:.3f} of ours')
    return failures


def summary(equality, acceptance):
    "Return in words what a chain's rows say"
    reached, replayed = (' '.join(f'{x:.3f}' for x in acceptance[k]) for k in ('rates', 'replay_rates'))
    measured = f'mean over answers, by measure_acceptance, {acceptance["measured_tau"]:.3f}'
    return '; '.join(
        [
            f'{equality["equal"]} of {equality["prompts"]} answers equal, {len(equality["ties"])} ties',
            f'drafts {acceptance["drafts"]} (replay {acceptance["replay_drafts"]})',
            f'reached {reached} (replay {replayed})',
            f'tokens a forward pass {acceptance["tau"]:.3f} (replay {acceptance["replay_tau"]:.3f}; {measured})',
        ]
    )


def check(options):
    "Return rows and failures"
    import torch, vllm
    from npu_lora_decoding.hass.checkpoint import load_head
    from npu_lora_decoding.serving.head_export import export_head
    from npu_lora_decoding.evaluation.benchmark import environment
    from npu_lora_decoding.foundations.models import embedded_folder, encode_one
    from npu_lora_decoding.decoding.loop import load

    torch.set_num_threads(1)
    lm = load(device='cpu', dtype='fp32')
    target = str(embedded_folder())
    head = load_head(options.head, lm.model, torch.float32)
    prompts = [
        encode_one(lm, json.loads(line)['prompt']).tolist()
        for line in (HEADS / 'questions.jsonl').read_text(encoding='utf-8').splitlines()[: options.prompts]
    ]
    chains = [int(k) for k in options.chain.split(',')]
    with tempfile.TemporaryDirectory() as work:
        say('exported:', export_head(options.head, Path(work) / 'head', lm, 'vllm'))
        endless, _ = alone(serve, target, prompts, options.new_tokens + max(chains) + 1, None, True)
        found = [
            check_chain(
                lm,
                head,
                prompts,
                endless,
                target=target,
                folder=Path(work) / 'head',
                new_tokens=options.new_tokens,
                k=k,
            )
            for k in chains
        ]
    return [r for rows, _ in found for r in rows] + [environment() | dict(vllm=vllm.__version__)], [
        f for _, failures in found for f in failures
    ]


def main():
    from npu_lora_decoding.foundations.files import save_rows

    parser = argparse.ArgumentParser(
        prog='run', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--head', default=str(HEADS / 'smollm2-135m'), help='folder of the head (default: the shipped one)'
    )
    parser.add_argument('--prompts', type=int, default=24, help='how many of the 40 held-out prompts')
    parser.add_argument('--new-tokens', type=int, default=64, help='longest answer')
    parser.add_argument('--chain', default='3,5', help='draft tokens a forward pass, separated by commas')
    parser.add_argument('--json', help='write the rows here')
    options = parser.parse_args()
    rows, failures = check(options)
    if options.json:
        save_rows(rows, options.json)
    for f in failures:
        say('FAILED', f)
    say(f'{len(failures)} failures' if failures else 'vLLM and our replay agree')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
