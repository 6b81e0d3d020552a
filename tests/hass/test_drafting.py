"Drafting: the batched chain and tree against loops that share no code with them, ties, fillers, faults"

import pytest, torch
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.head import DraftHead, head_config
from npu_lora_decoding.hass.drafting import HeadCache, draft_chain, draft_tree


def toy(family='llama', v=23, b=3, t=11, sharp=4.0):
    "A random head, tensors of a random target, tokens and features of `b` texts"
    model = toy_model(family, vocab=v)
    head = DraftHead(head_config(model.config)).requires_grad_(False)
    ids = torch.randint(0, v, (b, t))
    return (
        head,
        model.get_input_embeddings().weight,
        sharp * model.lm_head.weight,
        ids,
        model.model(ids).last_hidden_state,
    )


def plain(head, e, g):
    "The head's outputs of one text, all slots at once, with nothing but its forward"
    t = len(e)
    return head(e[None], g[None], torch.arange(t)[None], torch.ones(1, t, t, dtype=torch.bool).tril())[0][0]


def output(head, embed, ids, f, path):
    "Output after the committed text `ids`, whose last token is not yet read, and the draft tokens `path`: a recursion without any cache"
    n = len(ids) - 1
    own = [output(head, embed, ids, f, path[:j]) for j in range(len(path))]
    tokens = torch.cat([ids[1:], torch.tensor(path, dtype=torch.long)])
    return plain(head, embed[tokens], torch.cat([f[:n], *(o[None] for o in own)]))[-1]


def naive_tree(head, embed, lm_head, ids, f, vocab, depth, top_k, nodes):
    names = list(range(len(lm_head))) if vocab is None else vocab.tolist()
    top_k = min(top_k, len(lm_head))

    def children(path, value):
        logp, best = (output(head, embed, ids, f, path) @ lm_head.T).log_softmax(-1).topk(top_k)
        return [([*path, names[t]], value + l) for t, l in zip(best.tolist(), logp.tolist())]

    level = found = children([], 0.0)
    for _ in range(depth):
        level = [c for p in sorted(level, key=lambda c: -c[1])[:top_k] for c in children(*p)]
        found = found + level
    best = sorted(range(len(found)), key=lambda i: -found[i][1])[: nodes - 1]
    return [found[i][0] for i in best]  # the best first


def paths(tree, b):
    found = [[]]
    for t, p in zip(tree.tokens[b, 1:].tolist(), tree.parents[b, 1:].tolist()):
        if p >= 0:
            found.append([*found[p], t])
    return found[1:]


def prepared(head, embed, ids, f, lengths):
    "A cache with the committed slots of texts of `lengths` tokens, the outputs of the last ones and the last tokens"
    cache = HeadCache(len(ids), ids.device)
    count = torch.tensor(lengths) - 1
    outputs = cache.extend(head, embed[ids[:, 1:]], f[:, :-1], count)
    return cache, ids.gather(1, count[:, None])[:, 0], outputs


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3', 'mistral'])
def test_tree_equals_recursion(family):
    head, embed, lm_head, ids, f = toy(family)
    lengths = [2, 11, 6]  # the shortest has one slot
    cache, last, outputs = prepared(head, embed, ids, f, lengths)
    for vocab in (None, torch.tensor([19, 2, 5, 11, 8, 3])):
        rows = lm_head if vocab is None else lm_head[vocab]
        for depth, top_k, nodes in [(0, 1, 2), (0, 4, 4), (1, 1, 3), (2, 3, 10), (3, 2, 8), (2, 9, 25)]:
            tree = draft_tree(
                head,
                cache,
                last,
                outputs,
                embed=embed,
                lm_head=rows,
                vocab=vocab,
                depth=depth,
                top_k=top_k,
                nodes=nodes,
            )
            assert tree.tokens.shape == (3, nodes) and tree.tokens[:, 0].equal(last)
            for b, n in enumerate(lengths):
                assert paths(tree, b) == naive_tree(
                    head, embed, rows, ids[b, :n], f[b], vocab=vocab, depth=depth, top_k=top_k, nodes=nodes
                )


@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_chain_is_a_tree_of_one_child(family):
    head, embed, lm_head, ids, f = toy(family)
    cache, last, outputs = prepared(head, embed, ids, f, [3, 9, 11])
    for k in (1, 2, 5):
        chain = draft_chain(head, cache, last, outputs, embed, lm_head, k=k)
        tree = draft_tree(head, cache, last, outputs, embed, lm_head, depth=k - 1, top_k=1, nodes=k + 1)
        assert chain.tokens.equal(tree.tokens) and chain.parents.equal(tree.parents)
        assert paths(chain, 0) == naive_tree(
            head, embed, lm_head, ids[0, :3], f[0], vocab=None, depth=k - 1, top_k=1, nodes=k + 1
        )


def test_a_parent_that_ties_its_child_is_kept():
    head, embed, lm_head, ids, f = toy(sharp=1e5)  # every best draft token has probability 1, exactly
    cache, last, outputs = prepared(head, embed, ids, f, [4, 8, 11])
    chain = draft_chain(head, cache, last, outputs, embed, lm_head, k=6)
    for nodes in (3, 5, 7):  # the committed path from its start, not from its end
        tree = draft_tree(head, cache, last, outputs, embed, lm_head, depth=5, top_k=3, nodes=nodes)
        for b in range(3):
            assert paths(tree, b) == paths(chain, b)[: nodes - 1]


def test_rounding_does_not_put_a_child_above_its_parent(monkeypatch):
    head, embed, lm_head, ids, f = toy(sharp=1e5)
    cache, last, outputs = prepared(head, embed, ids, f, [4, 8, 11])
    chain = draft_chain(head, cache, last, outputs, embed, lm_head, k=6)
    exact = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor, 'logsumexp', lambda x, *a, **k: exact(x, *a, **k) - 1e-2
    )  # a device that rounds down
    tree = draft_tree(head, cache, last, outputs, embed, lm_head, depth=5, top_k=3, nodes=4)
    for b in range(3):
        assert paths(tree, b) == paths(chain, b)[:3]


def test_fillers_and_small_vocabularies():
    head, embed, lm_head, ids, f = toy(v=5)
    cache, last, outputs = prepared(head, embed, ids, f, [4, 8, 11])
    tree = draft_tree(head, cache, last, outputs, embed, lm_head, depth=1, top_k=10, nodes=60)  # 5 + 25 candidates
    assert tree.size == 60 and (tree.parents == -2).sum(-1).tolist() == [29] * 3
    for b in range(3):
        assert len({tuple(p) for p in paths(tree, b)}) == 30


def test_cache_in_pieces_equals_at_once_whatever_the_others_hold():
    head, embed, lm_head, ids, f = toy(b=4, t=40)
    e = embed[ids[:, 1:]]
    lengths = [0, 0, 0, 0]
    cache = HeadCache(4, ids.device)
    for step in range(12):
        count = torch.randint(0, 4, (4,))
        count[0] = max(1, int(count[0]))
        n = max(1, int(count.max()))
        new = [torch.full((4, n, 32), 50.0) for _ in range(2)]  # what is not real is large nonsense
        for b in range(4):
            for x, source in zip(new, (e, f)):
                x[b, : count[b]] = source[b, lengths[b] : lengths[b] + int(count[b])]
        out = cache.extend(head, *new, count)
        lengths = [l + int(c) for l, c in zip(lengths, count)]
        assert cache.length.tolist() == lengths and cache.columns == max(lengths)
        for b in range(4):
            if count[b]:
                torch.testing.assert_close(
                    out[b], plain(head, e[b, : lengths[b]], f[b, : lengths[b]])[-1], rtol=1e-4, atol=1e-5
                )  # fp32; sums in another order
    cache.select(torch.tensor([2, 0]))
    assert cache.length.tolist() == [lengths[2], lengths[0]]
    at = cache.length[:, None]
    pick = lambda x: x[[2, 0]].take_along_dim(at[..., None], 1)
    out = cache.extend(head, pick(e), pick(f))
    for i, b in enumerate((2, 0)):
        torch.testing.assert_close(
            out[i], plain(head, e[b, : lengths[b] + 1], f[b, : lengths[b] + 1])[-1], rtol=1e-4, atol=1e-5
        )


def test_drafting_leaves_the_cache_alone():
    head, embed, lm_head, ids, f = toy()
    cache, last, outputs = prepared(head, embed, ids, f, [4, 8, 11])
    before = [x.clone() for x in (cache.keys, cache.values, cache.length, cache.valid, outputs)]
    first = draft_tree(head, cache, last, outputs, embed, lm_head, depth=3, top_k=4, nodes=20)
    draft_chain(head, cache, last, outputs, embed, lm_head, k=4)
    for old, new in zip(before, (cache.keys, cache.values, cache.length, cache.valid, outputs)):
        assert torch.equal(old, new)
    again = draft_tree(head, cache, last, outputs, embed, lm_head, depth=3, top_k=4, nodes=20)
    assert first.tokens.equal(again.tokens) and first.parents.equal(again.parents)


def test_half_precision_gives_whole_trees():
    head, embed, lm_head, ids, f = toy()
    head = head.to(torch.bfloat16)
    embed = embed.bfloat16()
    lm_head = lm_head.bfloat16()
    f = f.bfloat16()
    cache, last, outputs = prepared(head, embed, ids, f, [4, 8, 11])
    tree = draft_tree(head, cache, last, outputs, embed, lm_head)
    for b in range(3):
        assert len({tuple(p) for p in paths(tree, b)}) == 59


def test_bad_input():
    head, embed, lm_head, ids, f = toy()
    cache, last, outputs = prepared(head, embed, ids, f, [4, 8, 11])
    with pytest.raises(DecodingError, match='at least 2 nodes'):
        draft_tree(head, cache, last, outputs, embed, lm_head, nodes=1)
    with pytest.raises(DecodingError, match='at least one draft token'):
        draft_chain(head, cache, last, outputs, embed, lm_head, k=0)
    with pytest.raises(DecodingError, match='rows of the draft vocabulary'):
        draft_chain(head, cache, last, outputs, embed=embed, lm_head=lm_head, vocab=torch.arange(4))
    with pytest.raises(DecodingError, match='take both from one target'):
        draft_tree(head, cache, last, outputs, embed, lm_head[:, :8])
    with pytest.raises(DecodingError, match='cache of 3 sequences'):
        cache.extend(head, embed[ids[:2, 1:]], f[:2, :-1])
