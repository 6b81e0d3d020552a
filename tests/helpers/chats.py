"Chat templates, and toy models that have one"

from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.foundations.adapters import toy_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


def lm_of(template, special, eos, words=()):
    "A toy of characters and `words`, with special tokens and a chat template"
    names = ['<pad>', '<unk>', '<s>', *dict.fromkeys(['</s>', *special]), '\n', *map(chr, range(32, 127)), *words]
    tok = Tokenizer(WordLevel({c: i for i, c in enumerate(names)}, unk_token='<unk>'))
    tok.pre_tokenizer = Split(Regex('|'.join([*words, r'[\s\S]'])), 'isolated')
    tok.decoder = Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token='<pad>',
        bos_token='<s>',
        eos_token=eos,
        unk_token='<unk>',
        additional_special_tokens=special,
        padding_side='left',
    )
    tok.chat_template = template
    model = toy_model(vocab=len(tok))
    model.generation_config.eos_token_id = tok.eos_token_id
    return LM(model, tok, name='toy')


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

# old answers lose their thoughts, the last one gets an empty thought where it has none
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' "
    "+ ('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '') "
    "+ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

IM = ['<|im_start|>', '<|im_end|>']
HEADER = ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']


def chat_lm():
    return lm_of(CHATML, IM, '<|im_end|>')
