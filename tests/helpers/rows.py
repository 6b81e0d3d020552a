"Rows of a comparison, made up"


def row(name, ms=30.0, scores=None, same_as=None, third_party=False, over='greedy', **more):
    "One made-up row, complete"
    over = None if name == 'greedy' else over
    q = scores and sum(scores) / len(scores)
    return (
        dict(
            method=name,
            peer=third_party,
            model='toy',
            device='cpu',
            dtype='float32',
            batch=1,
            new_tokens=8,
            ms_per_token=ms,
            ms_spread=[ms * 0.9, ms * 1.2],
            tokens_per_s=1000 / ms,
            ms_to_first=9.0,
            ms_runs=[[ms * (1 + 0.1 * b) for b in range(5)]] * 3,
            speedup_over=over,
            speedup=over and 30.0 / ms,
            speedup_interval=over and [27.0 / ms, 33.0 / ms],
            tau=1.0,
            quality=q,
            quality_interval=q and [q - 1, q + 1],
            metric='chrf',
            items=scores and len(scores),
            gain=None,
            gain_over=None,
            gain_interval=None,
            scores=scores,
            flops_per_token=1e9,
            peak_mb=100.0,
            same_as=same_as,
            equal_tokens=1.0,
            compiled=False,
        )
        | more
    )
