"Tiny random models of every family of transformers' causal language models, and of variants that change how a family attends"

import copy
from dataclasses import dataclass, field
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCAB = 97
MAX_PARAMETERS = 20_000_000

# Fields of configurations and a small value; a family gets those that it has. Windows are shorter than the texts of the sweep.
SMALL = dict(
    # sizes, in the words of each generation of models
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    max_position_embeddings=256,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    n_inner=64,
    n_ctx=256,
    d_model=32,
    d_inner=64,
    d_kv=8,
    d_ff=64,
    n_layers=2,
    n_heads=4,
    emb_dim=32,
    ffn_dim=64,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=64,
    num_encoder_layers=2,
    num_encoder_attention_heads=4,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    num_decoder_layers=2,
    num_decoder_attention_heads=4,
    num_layers=2,
    num_heads=4,
    ffn_hidden_size=64,
    max_sequence_length=256,
    max_seq_len=256,
    word_embed_proj_dim=32,
    embedding_size=32,
    dim_model=32,
    dim_ff=64,
    dim_head=8,
    rotary_dim=8,
    attention_head_size=8,
    # texts
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
    is_decoder=True,
    # windows
    sliding_window=8,
    attention_window_size=8,
    window_size=8,
    attention_chunk_size=16,
    original_max_position_embeddings=128,
    # experts
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    shared_experts_intermediate_size=16,
    shared_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    moe_num_experts=4,
    moe_topk=2,
    moe_k=2,
    # latent attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_topk=8,
    index_head_dim=8,
    index_n_heads=2,
    # recurrent states and convolutions
    state_size=8,
    conv_kernel=4,
    time_step_rank=4,
    attention_hidden_size=32,
    lru_width=32,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_ssm=64,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_n_groups=1,
    use_mamba_kernels=False,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    block_auto_adjust_ff_dim=False,
    # pictures and sound, of which the sweep gives none
    image_size=32,
    patch_size=8,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCAB,
    num_mel_bins=16,
    max_source_positions=64,
)

DEFAULT = 'default'  # Leaves a field as the family has it

_ROPE = dict(rope_type='default', rope_theta=10_000.0)
_SHARED_BLOCK = dict(
    num_hidden_layers=5,
    layers_block_type=['linear_attention', 'linear_attention', 'hybrid', 'linear_attention', 'hybrid'],
)
_SHARED_STATES = dict(
    num_hidden_layers=4, layer_types=['sliding_attention', 'full_attention'] * 2, num_kv_shared_layers=2
)
_DOTS3 = dict(
    head_dim=16,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_q_lora_rank=16,
    swa_kv_lora_rank=16,
    swa_head_dim=16,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
)
_INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=1)
_QWEN4 = dict(hc_lowrank=8, ngram_vocab_size_base=64, **_INDEXER)


def _of_part(part, fields):
    "Return fields that belong to a part of the configuration"
    return {f'{part}.{name}': value for name, value in fields.items()}


# What a family needs instead. A dotted name is a field of a part of the configuration.
OVERRIDES: dict[str, dict] = dict(
    bamba=dict(attn_layer_indices=[1]),
    cohere_compass_text=dict(rope_parameters=dict(full_attention=dict(_ROPE, mrope_section=[2, 1, 1]))),
    dbrx={
        'attn_config.rope_theta': 10_000.0,
        'attn_config.clip_qkv': 8.0,
        'ffn_config.hidden_size': 32,
        'ffn_config.ffn_hidden_size': 64,
    },
    deepseek_v4=dict(o_lora_rank=16),
    dots3_note={
        **_of_part('text_config', _DOTS3),
        **_of_part('vision_config', dict(adapter_in_dim=32, adapter_out_dim=32)),
        **_of_part('audio_config', dict(adapter_input_size=32, adapter_out_dim=32)),
    },
    dots3_note_text=_DOTS3,
    gemma3n_text=_SHARED_STATES,
    gpt_neo=dict(attention_types=[[['global', 'local'], 1]]),
    granitemoehybrid=dict(layer_types=['linear_attention', 'full_attention']),
    hrm_text=dict(
        H_cycles=1, L_cycles=1, L_bp_cycles=[1]
    ),  # more cycles through the same random layers amplify roundings
    lfm2_moe=dict(layer_types=['conv', 'full_attention']),
    longcat_flash=dict(head_dim=8, zero_expert_num=4),
    mamba2=dict(num_heads=8, n_groups=1),
    nemotron_h=dict(mamba_num_heads=8, mamba_head_dim=8, moe_shared_expert_intermediate_size=16),
    qwen4_exp=_of_part('text_config', _QWEN4),
    qwen4_exp_text=_QWEN4,
    recurrent_gemma=dict(num_hidden_layers=3),
    reformer=dict(axial_pos_embds=False, attn_layers=['local', 'local'], local_attn_chunk_length=8),
    roc_bert=dict(pronunciation_vocab_size=16, shape_vocab_size=16, pronunciation_embed_dim=8, shape_embed_dim=8),
    xlstm=dict(hidden_size=128, autocast_kernel_dtype='float32'),
    xmod=dict(default_language='en_XX', languages=['en_XX']),
    zamba=dict(_SHARED_BLOCK, attention_hidden_size=64, head_dim=16),
    zamba2=dict(_SHARED_BLOCK, attention_hidden_size=DEFAULT, head_dim=DEFAULT),
    zaya=dict(num_experts_per_tok=1, router_hidden_size=16),
)

# --- Variants: the same family, another mechanism

_BERTS = (
    'bert', 'big_bird', 'camembert', 'data2vec-text', 'electra', 'ernie', 'megatron-bert', 'rembert', 'roberta', 'roc_bert',
    'roformer', 'xlm-roberta',
)  # fmt: skip
_SEQ2SEQ = ('bart', 'blenderbot', 'marian', 'mbart', 'mt5', 'pegasus', 'prophetnet', 't5', 't5gemma', 'umt5')


def _rope(kind, **parameters):
    "Return fields for a rotary embedding that was trained on texts shorter than those of the sweep"
    rope = dict(rope_type=kind, rope_theta=10_000.0, original_max_position_embeddings=16, **parameters)
    if kind in ('linear', 'dynamic'):
        del rope['original_max_position_embeddings']
    return dict(rope_parameters=rope, max_position_embeddings=16 if kind == 'dynamic' else 256)


_YARN = _rope('yarn', factor=16.0)
_LONG = _rope('longrope', short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=16.0)
_SECOND_LAYER = dict(use_sliding_window=True, max_window_layers=1, layer_types=DEFAULT)
VARIANTS: dict[str, tuple[str, dict]] = {
    'big_bird (blocks)': ('big_bird', dict(block_size=2, num_random_blocks=1)),
    'bloom (residual after norm)': ('bloom', dict(apply_residual_connection_post_layernorm=True)),
    'cohere (QK norm)': ('cohere', dict(use_qk_norm=True)),
    'deepseek_v3 (YaRN)': ('deepseek_v3', _YARN),
    'falcon (ALiBi)': ('falcon', dict(alibi=True)),
    'falcon (key heads)': ('falcon', dict(multi_query=False)),
    'falcon (new architecture)': ('falcon', dict(new_decoder_architecture=True, num_kv_heads=2)),
    'gpt2 (scaled by layer)': ('gpt2', dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    'gpt_bigcode (key heads)': ('gpt_bigcode', dict(multi_query=False)),
    'gpt_neo (global)': ('gpt_neo', dict(attention_types=[[['global'], 2]])),
    'gpt_neox (sequential)': ('gpt_neox', dict(use_parallel_residual=False)),
    'lfm2 (convolutions)': ('lfm2', dict(layer_types=['conv', 'full_attention'])),
    'llama (biases)': ('llama', dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    'llama (eager attention)': ('llama', dict(attn_implementation='eager')),
    'llama (dynamic rope)': ('llama', _rope('dynamic', factor=2.0)),
    'llama (linear rope)': ('llama', _rope('linear', factor=2.0)),
    'llama (Llama 3 rope)': ('llama', _rope('llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    'llama (YaRN)': ('llama', _YARN),
    'mistral (no window)': ('mistral', dict(sliding_window=None)),
    'mixtral (no window)': ('mixtral', dict(sliding_window=None)),
    'mpt (no ALiBi)': ('mpt', {'attn_config.alibi': False}),
    'olmo (clipped)': ('olmo', dict(clip_qkv=0.5)),
    'opt (norm after)': ('opt', dict(do_layer_norm_before=False)),
    'opt (projected embeddings)': ('opt', dict(word_embed_proj_dim=16)),
    'phi (QK norm)': ('phi', dict(qk_layernorm=True)),
    'phi3 (LongRoPE)': ('phi3', dict(_LONG, original_max_position_embeddings=16)),
    'qwen2 (window)': ('qwen2', _SECOND_LAYER),
    'qwen3 (window)': ('qwen3', _SECOND_LAYER),
    'smollm3 (window)': ('smollm3', dict(use_sliding_window=True, layer_types=DEFAULT)),
    'stablelm (parallel)': ('stablelm', dict(use_parallel_residual=True, qk_layernorm=True)),
    **{f'{family} (sees both ways)': (family, dict(is_decoder=False)) for family in _BERTS},
}

# Families that cannot be built small, or not alone, and why
UNBUILT = dict(
    blt='transformers 5.23 cannot make its cache: BltConfig has no num_hidden_layers',
    gemma3n='its vision tower needs timm',
    gemma4_assistant='a draft model, which reads the states of the model that it drafts for',
    gemma4_unified_assistant='a draft model, which reads the states of the model that it drafts for',
    musicgen='its decoder writes sound, from a configuration that is not that of the family',
    musicgen_melody='its decoder writes sound, from a configuration that is not that of the family',
)


@dataclass(frozen=True)
class Case:
    "A model to build: a family, or a variant of one"

    name: str
    family: str
    fields: dict = field(default_factory=dict, hash=False)
    auto: type = AutoModelForCausalLM

    def __str__(self):
        return self.name


def cases():
    "Return every model of the sweep: the families that can be built, encoder-decoders, and variants"
    alone = [Case(family, family) for family in FAMILIES if family not in UNBUILT]
    pairs = [Case(f'{family} (encoder-decoder)', family, auto=AutoModelForSeq2SeqLM) for family in _SEQ2SEQ]
    return alone + pairs + [Case(name, family, fields) for name, (family, fields) in VARIANTS.items()]


# --- Building


def _cycled(values, n):
    "Return `n` values in which each kind occurs that occurs in `values`"
    kinds = list(dict.fromkeys(values))
    return (kinds * n)[:n]


def _small_fields(config):
    "Return the fields of a configuration, or of a part of one, that become small"
    fields = config.to_dict()
    aliases = type(config).attribute_map
    known = {k: v for k, v in SMALL.items() if k in fields or k in aliases}
    small = {k: v for k, v in known.items() if aliases.get(k) not in known}
    if 'qk_rope_head_dim' in fields:
        small.pop('head_dim', None)  # follows from those of the parts
        small['num_key_value_heads'] = small['num_attention_heads']
    patterns = {k: v for k, v in fields.items() if k.endswith('layer_types') and v}
    n = max([2, *(len(set(v)) for v in patterns.values())])
    if patterns:
        small['num_hidden_layers'] = n
    return small | {k: _cycled(v, n) for k, v in patterns.items()}


def _fields(config):
    "Return small values of a configuration and of its parts"
    small = _small_fields(config)
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            small[name] = dict(model_type=part.model_type) | _fields(part)
    return small


def _given(fields, overrides):
    "Return the fields with overrides, in which `part.field` means a field of a part"
    fields = copy.deepcopy(fields)
    for name, value in overrides.items():
        *parts, last = name.split('.')
        place = fields
        for part in parts:
            place = place.setdefault(part, {})
        if value == DEFAULT:
            place.pop(last, None)
        else:
            place[last] = value
    return fields


def config_of(case):
    "Return the configuration of a small model"
    kind = type(AutoConfig.for_model(case.family))
    fields = _given(_fields(kind()), OVERRIDES.get(case.family, {}))
    return kind(**_given(fields, case.fields))


def build(case, seed=0):
    "Return a small model with random weights, in fp32"
    config = config_of(case)
    with torch.device('meta'):
        size = sum(p.numel() for p in case.auto.from_config(copy.deepcopy(config)).parameters())
    assert size <= MAX_PARAMETERS, f'{size / 1e6:.0f} million parameters'
    torch.manual_seed(seed)
    model = case.auto.from_config(config).float().eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, bos_token_id=1)
    return model
