"""Held-out verses whose answers are long enough to be measured over, as a file of prompts

python results/verses.py OUT.jsonl [VERSES] [TOKENS]
"""
import json, sys
from npu_lora_decoding.models import embedded_folder, load_tokenizer
from npu_lora_decoding.tasks import king_james

def main(out, verses=8, tokens=48):
    tokenizer = load_tokenizer(embedded_folder())
    long = [i for i in king_james().test if len(tokenizer(i.answer).input_ids) >= int(tokens)][:int(verses)]
    with open(out, 'w', encoding='utf-8') as f: f.writelines(json.dumps(dict(system=i.system, prompt=i.prompt)) + '\n' for i in long)

if __name__ == '__main__': main(*sys.argv[1:])
