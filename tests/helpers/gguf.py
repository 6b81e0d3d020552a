"Small GGUF files, written as llama.cpp's converter writes them"

from pathlib import Path
import numpy as np
from gguf import GGUFWriter, MODEL_ARCH, MODEL_ARCH_NAMES, TokenType, get_tensor_name_map
from tokenizers.pre_tokenizers import ByteLevel
from npu_lora_decoding.foundations.adapters import toy_model

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
WORDS = ['ĠĠ', 'Ġa', 'th', 'the', 'Ġthe', 'Ġ1', '12']
MERGES = ['Ġ Ġ', 'Ġ a', 't h', 'th e', 'Ġ the', 'Ġ 1', '1 2']
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + WORDS


def permuted(w, heads):
    "The rows of a query or key projection in the order of llama.cpp's rotary embedding"
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_settings(writer, config):
    "What the header says of the model"
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters['rope_theta'])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def write_tokenizer(writer, splits):
    "What the header says of the tokenizer"
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def toy_gguf(file, family='llama', *, splits='smollm', dtype=np.float32, named=None, without=None, **config):
    "Write a random model of a family into a file, and return it; the file calls its family `named` and lacks the weight `without`"
    fields = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16) | config
    model = toy_model(family, vocab=len(TOKENS), **fields)
    writer = GGUFWriter(Path(file), named or family)
    write_settings(writer, model.config)
    write_tokenizer(writer, splits)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names = get_tensor_name_map(MODEL_ARCH(arch), model.config.num_hidden_layers)
    heads = dict(q_proj=model.config.num_attention_heads, k_proj=model.config.num_key_value_heads)
    for name, w in model.state_dict().items():
        if name == without or name == 'lm_head.weight' and model.config.tie_word_embeddings:
            continue
        w = w.numpy()
        part = name.split('.')[-2]
        if family == 'llama' and part in heads:
            w = permuted(w, heads[part])
        writer.add_tensor(names.get_name(name, try_suffixes=('.weight', '.bias')), w.astype(np.float32 if w.ndim == 1 else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
