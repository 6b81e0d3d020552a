"""The accept rule loses nothing: over random trees and random targets, all draws are enumerated,
so the distribution of what is emitted is known exactly
"""

from itertools import product
import pytest, torch
from hypothesis import given, strategies as st
from npu_lora_decoding.decoding.tree import Tree, accept, root_tree

V = 3  # Tokens


@st.composite
def trees(draw):
    "One tree of up to five nodes whose siblings differ, fillers among them"
    tokens = [0]
    parents = [-1]
    for i in range(draw(st.integers(0, 4))):
        up = draw(st.sampled_from([-2, *(j for j in range(len(parents)) if parents[j] != -2 and parents.count(j) < V)]))
        taken = [t for t, p in zip(tokens, parents) if p == up]
        tokens.append(draw(st.sampled_from([t for t in range(V) if up == -2 or t not in taken])))
        parents.append(up)
    return Tree(torch.tensor([tokens]), torch.tensor([parents])).checked()


class Target:
    "A random distribution of the next token after every text; some tokens are impossible"

    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)
        self.known = {}

    def __call__(self, text):
        if text not in self.known:
            p = torch.rand(V, generator=self.g, dtype=torch.float64) * (torch.rand(V, generator=self.g) < 0.8)
            self.known[text] = (p / p.sum()).tolist() if p.sum() else [1.0] + [0.0] * (V - 1)
        return self.known[text]

    def joint(self, n, text=()):
        "Probability of each text of `n` tokens that begins with `text`"
        if len(text) == n:
            return {text: 1.0}
        return {t: p * q for y, p in enumerate(self(text)) for t, q in self.joint(n, (*text, y)).items()}


def path(tree, i):
    return () if i == 0 else (*path(tree, int(tree.parents[0, i])), int(tree.tokens[0, i]))


def emitted(tree, target, rule):
    "Probability of each text of `depth + 1` tokens, where one forward pass with `rule` begins it and the target alone goes on"
    real = [i for i in range(tree.size) if tree.parents[0, i] != -2]
    n = int(tree.depths[0, tree.parents[0] != -2].max()) + 1
    found = dict.fromkeys(target.joint(n), 0.0)
    for draws in product(*(range(V) if i in real else (0,) for i in range(tree.size))):
        weight = 1.0
        for i in real:
            weight *= target(path(tree, i))[draws[i]]
        for text, share in rule(tree, torch.tensor([draws]), target) if weight else ():
            for t, q in target.joint(n, text).items():
                found[t] += weight * share * q
    return found, target.joint(n)


def ours(tree, drawn, target):
    accepted, final = accept(tree, drawn)
    return [((*path(tree, int(accepted[0].nonzero()[-1])), int(final)), 1.0)]


def draws_again(tree, drawn, target):
    "A wrong residual: where all draft tokens were rejected, the target draws once more, draft tokens included"
    accepted, final = accept(tree, drawn)
    last = int(accepted[0].nonzero()[-1])
    if (tree.parents[0] != last).all():
        return ours(tree, drawn, target)  # nothing was rejected
    return [((*path(tree, last), y), p) for y, p in enumerate(target(path(tree, last)))]


def ends_with_the_root_s_draw(tree, drawn, target):
    accepted, _ = accept(tree, drawn)
    return [((*path(tree, int(accepted[0].nonzero()[-1])), int(drawn[0, 0])), 1.0)]


def draft_tokens_without_their_parents(tree, drawn, target):
    agrees = (tree.tokens == drawn.gather(1, tree.parents.clamp(min=0))) & (tree.parents >= 0)
    last = int(agrees[0].nonzero()[-1]) if agrees.any() else 0
    return [((*path(tree, last), int(drawn[0, last])), 1.0)]


def distance(tree, seed, rule):
    found, want = emitted(tree, Target(seed), rule)
    return max(abs(found[t] - want[t]) for t in want)


@given(trees(), st.integers(0, 2**31))
def test_what_is_emitted_has_the_target_s_distribution(tree, seed):
    assert distance(tree, seed, ours) < 1e-12


@pytest.mark.parametrize('rule', [draws_again, ends_with_the_root_s_draw, draft_tokens_without_their_parents])
def test_wrong_rules_are_found_out(rule):
    tree = Tree(torch.tensor([[0, 1, 2, 1]]), torch.tensor([[-1, 0, 0, 1]]))
    assert max(distance(tree, seed, rule) for seed in range(5)) > 0.01
    assert max(distance(tree, seed, ours) for seed in range(5)) < 1e-12


def test_a_root_alone_is_cut_to_any_depth():
    tree = root_tree(torch.tensor([4, 5]))
    assert tree.truncate_depth(0) is tree and tree.truncate_depth(3) is tree
