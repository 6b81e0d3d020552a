"Toy heads with fused features, and a second way from a folder to draft tokens"

import json, torch
from pathlib import Path
from safetensors.torch import load_file
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.hass.fused_head import FusedHead, Fusion, fused_config

LAYERS = (1, 3, 5)
FLAGS = ('norm_before_residual', 'norm_before_fc', 'fc_norm', 'norm_output')


def random_fused(model, seed=0, w=20, layers=LAYERS, family='llama', round=True, width=None, **flags):
    "A head with random weights everywhere, norms too, at a scale at which every part counts"
    config = fused_config(model.config)
    if family != 'llama' or width:
        named = config.to_dict() | dict(model_type=family) | (dict(hidden_size=width) if width else {})
        config = type(config)(**named) if family == 'llama' else qwen3_config(named)
    v = config.vocab_size
    fusion = Fusion(layers, model.config.hidden_size, w or v, own_embedding=bool(width), **flags)
    head = FusedHead(config, fusion).requires_grad_(False)
    g = generator(seed)
    for p in head.parameters():
        x = torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0)
        p.copy_(x.bfloat16() if round else x)
    if w:
        head.vocab = torch.randperm(v, generator=g)[:w].sort().values
    return head.eval()


def qwen3_config(named):
    "A layer with norms on queries and keys"
    from transformers import Qwen3Config

    return Qwen3Config(**{name: x for name, x in named.items() if name != 'architectures'})


class Reference:
    """What an engine drafts from a folder, written down from the equations: hidden state and residual as a pair,
    scores over the whole vocabulary, the text read again for every token
    """

    def __init__(self, folder, target):
        folder = Path(folder)
        self.named = json.loads((folder / 'config.json').read_text())
        self.layer = self.named.get('transformer_layer_config', self.named)
        found = load_file(folder / 'model.safetensors')
        self.w = {name.replace('midlayer.', 'layers.0.'): x for name, x in found.items()}
        self.w = {
            name.removeprefix('layers.0.'): x if name in ('d2t', 't2d') else x.float() for name, x in self.w.items()
        }
        self.target = target
        self.embed = self.w.get('embed_tokens.weight', target.get_input_embeddings().weight)

    def norm(self, name, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.layer['rms_norm_eps'])
        return x * scale * self.w[f'{name}.weight']

    def linear(self, name, x):
        y = x @ self.w[f'{name}.weight'].T
        return y + self.w[f'{name}.bias'] if f'{name}.bias' in self.w else y

    def features(self, ids):
        "One feature a token, from what the layers read"
        # not with `output_hidden_states`, whose hooks stay on the model: layers with hooks cannot share programs
        base = self.target.base_model
        x = base.embed_tokens(ids[None])
        rotations = base.rotary_emb(x, torch.arange(len(ids))[None])
        read = []
        for layer in base.layers:
            read.append(x[0])
            x = layer(x, attention_mask=None, position_embeddings=rotations)
        states = [read[i] for i in self.named['eagle_aux_hidden_state_layer_ids']]
        if self.named['fc_norm']:
            states = [self.norm(f'fc_norm.{i}', x) for i, x in enumerate(states)]
        joined = torch.cat(states, -1)
        return self.linear('fc', self.norm('input_norm', joined) if self.named['norm_before_fc'] else joined)

    def heads(self, name, x):
        k = self.layer['head_dim']
        x = self.linear(f'self_attn.{name}_proj', x).view(len(x), -1, k)
        if f'self_attn.{name}_norm.weight' in self.w:
            x = self.norm(f'self_attn.{name}_norm', x)
        if name == 'v':
            return x
        frequency = self.layer['rope_theta'] ** (-torch.arange(0, k, 2) / k)
        angle = torch.arange(len(x))[:, None] * frequency
        cos = angle.cos().repeat(1, 2)[:, None]
        sin = angle.sin().repeat(1, 2)[:, None]
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, tokens, hidden):
        "What is scored and what is fed back, for each slot"
        embeds = self.norm('input_layernorm', self.embed[tokens])
        residual = hidden
        hidden = self.norm('hidden_norm', hidden)
        if self.named['norm_before_residual']:
            residual = hidden
        both = torch.cat([embeds, hidden], -1)
        q, k, v = (self.heads(name, both) for name in 'qkv')
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        scores = torch.einsum('thk,shk->hts', q, k) / self.layer['head_dim'] ** 0.5
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        p = scores.masked_fill(later, -torch.inf).softmax(-1)
        attended = self.linear('self_attn.o_proj', torch.einsum('hts,shk->thk', p, v).flatten(1))
        residual = residual + attended
        hidden = self.norm('post_attention_layernorm', residual)
        gate = torch.nn.functional.silu(self.linear('mlp.gate_proj', hidden))
        residual = residual + self.linear('mlp.down_proj', gate * self.linear('mlp.up_proj', hidden))
        scored = self.norm('norm', residual)
        return scored, scored if self.named['norm_output'] else residual

    def logits(self, scored):
        out = self.linear('lm_head', scored)
        if 'd2t' not in self.w:
            return out
        whole = out.new_full((len(out), len(self.w['t2d'])), -torch.inf)
        whole[:, torch.arange(out.shape[1]) + self.w['d2t']] = out
        return whole

    @torch.no_grad()
    def next(self, ids, drafted=()):
        "Log-probabilities of the token after a text and the draft tokens behind it `(v,)`"
        hidden = self.features(ids)[:-1]
        tokens = ids[1:]
        for token in (*drafted, None):
            scored, fed_back = self.forward(tokens, hidden)
            if token is None:
                return self.logits(scored[-1:])[0].log_softmax(-1)
            tokens = torch.cat([tokens, torch.tensor([token])])
            hidden = torch.cat([hidden, fed_back[-1:]])

    def chain(self, ids, k):
        "The `k` best draft tokens after a text, and the probability of each with those before it"
        tokens = []
        scores = []
        for _ in range(k):
            logp, best = self.next(ids, tokens).max(-1)
            scores.append((scores[-1] if scores else 0.0) + float(logp))
            tokens.append(int(best))
        return tokens, torch.tensor(scores).exp()


def check_tree(reference, ids, tokens, parents, scores=None, every=1, top=1):
    """Assert that each node of one tree has the probability of its path, or, in a tree without scores, that it is among the
    `top` best after its parent; return how many nodes were compared
    """
    paths = {0: []}
    nodes = 0
    for i, (token, parent) in enumerate(zip(tokens.tolist(), parents.tolist())):
        if parent < 0:
            continue
        path = paths[i] = [*paths[parent], token]
        if i % every:
            continue
        if scores is None:
            assert token in reference.next(ids, path[:-1]).topk(top).indices.tolist()
        else:
            logp = sum(float(reference.next(ids, path[:j])[token]) for j, token in enumerate(path))
            torch.testing.assert_close(scores[i].log(), torch.tensor(logp), rtol=1e-3, atol=1e-3)
        nodes += 1
    return nodes
