"Toys that several tests share: a tokenizer of characters, and a model that has one"

import string
from dataclasses import replace
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.decoding.loop import LM
from npu_lora_decoding.foundations.tasks import Item


def toy_tokenizer(extra=0):
    "One token a character; 76 tokens, and `extra` unused ones"
    names = [
        '<pad>',
        '<s>',
        '</s>',
        '<unk>',
        *string.ascii_letters,
        *string.digits,
        *' .,:;!?-+=',
        *(f'<extra {i}>' for i in range(extra)),
    ]
    tok = Tokenizer(WordLevel({c: i for i, c in enumerate(names)}, unk_token='<unk>'))
    tok.pre_tokenizer = Split('', 'isolated')
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token='<pad>',
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        padding_side='left',
    )


def toy_lm(family='llama', **config):
    return LM(toy_model(family, **config), toy_tokenizer(), name='toy')


def toy_folder(folder, model=None, tokenizer=None):
    "A model folder as save_pretrained writes it"
    (model or toy_model()).save_pretrained(folder)
    (tokenizer or toy_tokenizer()).save_pretrained(folder)
    return folder


def toy_items(n=24):
    return [Item(f'say {i} words', 'a' * (1 + i % 5) + str(i)) for i in range(n)]
