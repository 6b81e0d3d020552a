"""Times decoding with the shipped draft head beside vLLM with and without it, taking turns in one run

    bash tests/vllm-cpu/run speed [--prompts 8] [--new-tokens 64] [--json FILE]

The methods of `nld compare`, and two more that live in vLLM's environment: vLLM's engine alone, and with the head as
`nld export-head` exports it. All take turns on the same prompts, in bf16; vLLM with its own compilation, as it comes.
"""

import argparse, multiprocessing, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
HEADS = HERE.parent.parent / 'results' / 'heads'


def start(target, longest, speculative):
    "Make the engine of this process"
    global LLM
    import vllm

    LLM = vllm.LLM(
        target,
        dtype='bfloat16',
        max_model_len=longest,
        max_num_seqs=16,
        enable_prefix_caching=False,
        seed=0,
        speculative_config=speculative,
    )


def answer(prompts, n):
    "Return `n` tokens for each prompt, greedily"
    from vllm import SamplingParams

    out = LLM.generate(
        [dict(prompt_token_ids=p) for p in prompts],
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return [list(o.outputs[0].token_ids) for o in out]


def engine(target, longest, head=None, draft_tokens=5):
    "Return a function that decodes ids `(b, t)` with a vLLM engine in a process of its own: two in one would share their settings"
    import torch

    speculative = head and dict(method='eagle', model=str(head), num_speculative_tokens=draft_tokens)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), start, (target, longest, speculative))

    def run(ids, mask, n):
        return torch.tensor(pool.submit(answer, [r[m.bool()].tolist() for r, m in zip(ids, mask)], n).result())

    return run


def speed(options):
    "Return the rows of a comparison"
    import torch, vllm
    from npu_lora_decoding.serving.head_export import export_head
    from npu_lora_decoding.evaluation.methods import Method
    from npu_lora_decoding.evaluation.benchmark import compare
    from npu_lora_decoding.foundations.models import embedded_folder
    from npu_lora_decoding.decoding.loop import load
    from npu_lora_decoding.foundations.tasks import read_jsonl

    lm = load(device='cpu', dtype='bf16')
    target = str(embedded_folder())
    prompts = read_jsonl(options.questions, answer=None)[: options.prompts]
    with tempfile.TemporaryDirectory() as work:
        export_head(options.head, Path(work) / 'head', lm, 'vllm')
        longest = 1024 + options.new_tokens
        head = Path(work) / 'head'
        others = dict(
            vllm=Method(lambda *_: engine(target, longest), third_party=True),
            vllm_head=Method(lambda *_: engine(target, longest, head), third_party=True, hides_tau=True),
        )
        rows = compare(
            lm,
            None,
            prompts,
            options.methods.split(','),
            new_tokens=options.new_tokens,
            batch=options.batch,
            rounds=options.rounds,
            compile=True,
            head=options.head,
            others=others,
        )

    # an engine's memory is another process's
    def more(name):
        if name == 'environment':
            return dict(vllm=vllm.__version__)
        return dict(peak_mb=None) if name in others else {}

    return [r | more(r['method']) for r in rows]


def main():
    from npu_lora_decoding.evaluation.benchmark import table
    from npu_lora_decoding.foundations.files import save_rows

    parser = argparse.ArgumentParser(
        prog='run speed', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--head', default=str(HEADS / 'smollm2-135m'), help='folder of the head (default: the shipped one)'
    )
    parser.add_argument('--questions', default=str(HEADS / 'questions.jsonl'), help='JSON lines with prompt')
    parser.add_argument(
        '--methods',
        default='transformers_greedy,transformers_lookup,greedy,lookup,hass_chain,hass_tree,hass_lookup,vllm,vllm_head',
        help='methods, separated by commas',
    )
    parser.add_argument('--prompts', type=int, default=8, help='how many of the questions')
    parser.add_argument('--new-tokens', type=int, default=64, help='tokens each method writes')
    parser.add_argument('--batch', type=int, default=1, help='prompts at once')
    parser.add_argument('--rounds', type=int, default=3, help='turns on every prompt')
    parser.add_argument('--json', help='write the rows here')
    options = parser.parse_args()
    rows = speed(options)
    print(table(rows, 'transformers_greedy'))
    if options.json:
        save_rows(rows, options.json)


if __name__ == '__main__':
    main()
