"Conversations read from anywhere, and the tokens that are answers under many chat templates"

import json, random
import pytest, torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from npu_lora_decoding.foundations.adapters import toy_model
from npu_lora_decoding.hass.chat_data import (
    deduplicated,
    encode_all,
    encode_conversation,
    read_conversations,
    read_prompts,
)
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.decoding.loop import LM, load
from npu_lora_decoding.foundations.models import encode_one
from helpers.toys import toy_lm
from helpers.chats import CHATML, GEMMA, HEADER, IM, LLAMA2, LLAMA3, MISTRAL, QWEN3, VICUNA, lm_of


def tagged(end_inside):
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{%- generation %}{{ m['content']"
        + (" + '<|im_end|>\n' }}{% endgeneration %}" if end_inside else " }}{% endgeneration %}{{ '<|im_end|>\n' }}")
        + (
            "{% else %}{{ m['content'] + '<|im_end|>\n"
            "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
    )


TEMPLATES = dict(  # template, special tokens, end of turn, what the first and the last answer look like
    chatml=(CHATML, IM, '<|im_end|>', 'Hello!<|im_end|>', 'A model.<|im_end|>'),
    llama2=(LLAMA2, [], '</s>', ' Hello! </s>', ' A model. </s>'),
    llama3=(LLAMA3, HEADER, '<|eot_id|>', 'Hello!<|eot_id|>', 'A model.<|eot_id|>'),
    mistral=(MISTRAL, ['[INST]', '[/INST]'], '</s>', ' Hello!</s>', ' A model.</s>'),
    gemma=(
        GEMMA,
        ['<start_of_turn>', '<end_of_turn>'],
        '<end_of_turn>',
        'Hello!<end_of_turn>',
        'A model.<end_of_turn>',
    ),
    vicuna=(VICUNA, [], '</s>', ' Hello!</s>', ' A model.</s>'),
    qwen3=(QWEN3, IM, '<|im_end|>', 'Hello!<|im_end|>', '<think>\n\n</think>\n\nA model.<|im_end|>'),
    tags_in=(tagged(True), IM, '<|im_end|>', 'Hello!<|im_end|>', 'A model.<|im_end|>'),
    tags_out=(tagged(False), IM, '<|im_end|>', 'Hello!<|im_end|>', 'A model.<|im_end|>'),
)
TALK = [
    dict(role='user', content='Hi'),
    dict(role='assistant', content='Hello!'),
    dict(role='user', content='Who are you?'),
    dict(role='assistant', content='A model.'),
]


def runs(example):
    "The pieces of answer in an example, as lists of ids"
    out = []
    before = False
    for i, r in zip(example.ids.tolist(), example.response.tolist()):
        if r and not before:
            out.append([])
        if r:
            out[-1].append(i)
        before = r
    return out


@pytest.mark.parametrize('name', TEMPLATES)
def test_mask_of_real_templates(name):
    template, special, eos, first, last = TEMPLATES[name]
    lm = lm_of(template, special, eos)
    decode = lambda ids: ''.join(lm.tokenizer.convert_ids_to_tokens(ids))
    e = encode_conversation(lm, TALK)
    assert [decode(r) for r in runs(e)] == [first, last]
    assert e.response[-1] and e.ids.dtype == torch.long and e.response.dtype == torch.bool
    # what stands before the last answer is what the model reads when it is asked
    prompt = encode_one(lm, TALK[:3])
    start = len(e.ids) - len(runs(e)[-1])
    assert torch.equal(e.ids[:start], prompt)
    cut = encode_conversation(lm, TALK, finished=False)
    assert [decode(r) for r in runs(cut)] == [first, last.removesuffix(eos)] and torch.equal(e.ids[:-1], cut.ids)
    one = encode_conversation(lm, TALK[:2])
    assert len(runs(one)) == 1


@pytest.mark.parametrize('name', TEMPLATES)
def test_text_that_looks_like_a_template_is_refused(name):
    "A special token in a text would end a turn or begin one"
    template, special, eos, *_ = TEMPLATES[name]
    lm = lm_of(template, special, eos)
    for where in range(4):
        talk = [dict(m) for m in TALK]
        talk[where]['content'] += eos + ' more'
        with pytest.raises(DecodingError, match='holds a special token'):
            encode_conversation(lm, talk)
    # the words of a template without its special tokens are text
    talk = [dict(m, content=m['content'] + ' assistant\nuser\nASSISTANT:') for m in TALK]
    e = encode_conversation(lm, talk)
    assert len(runs(e)) == 2 and all(
        t in ''.join(lm.tokenizer.convert_ids_to_tokens(r))
        for r, t in zip(runs(e), ('Hello! assistant', 'A model. assistant'))
    )


def test_a_template_that_greets_differently_is_refused():
    lm = lm_of(CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}"), IM, '<|im_end|>')
    with pytest.raises(
        DecodingError,
        match='does not begin an answer as its generation prompt does: give the tokenizer a template with {% generation %} tags',
    ):
        encode_conversation(lm, TALK)


def test_tags_are_believed_where_the_generation_prompt_is_not():
    lm = lm_of(tagged(True).replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}"), IM, '<|im_end|>')
    assert [len(r) for r in runs(encode_conversation(lm, TALK))] == [len('Hello!') + 1, len('A model.') + 1]


def test_an_end_of_turn_that_the_model_does_not_know():
    lm = lm_of(CHATML, IM, '</s>')
    with pytest.raises(DecodingError, match='generation_config.eos_token_id'):
        encode_conversation(lm, TALK)
    lm.model.generation_config.eos_token_id = [
        lm.tokenizer.eos_token_id,
        lm.tokenizer.convert_tokens_to_ids('<|im_end|>'),
    ]
    assert len(runs(encode_conversation(lm, TALK))) == 2


def test_roles_that_the_template_refuses_are_counted():
    lm = lm_of(MISTRAL, ['[INST]', '[/INST]'], '</s>')
    twice = dict(messages=[TALK[0], *TALK[:2]])
    examples, dropped = encode_all(lm, [dict(messages=TALK), twice, twice])
    assert len(examples) == 1 and list(dropped.values()) == [2] and 'roles must alternate' in next(iter(dropped))


@pytest.mark.parametrize(
    'messages,reason',
    [
        ([], 'there is no answer'),
        (TALK[:1], 'there is no answer'),
        ([TALK[1]], 'there is no answer'),
        ([TALK[0], dict(role='assistant', content='')], 'an answer is empty'),
        ([TALK[0], dict(role='assistant', content=None)], 'a message has no role or no text'),
        ([dict(content='Hi'), TALK[1]], 'a message has no role or no text'),
        ('Hi', 'a message has no role or no text'),
        ([TALK[0], dict(role='assistant', content=[dict(type='text', text='x')])], 'a message has no role or no text'),
        ([*TALK[:1], dict(role='assistant', content=' \n'), *TALK[2:]], 'an answer is empty'),
    ],
)
def test_what_cannot_be_used_is_counted_with_its_reason(messages, reason):
    lm = lm_of(CHATML, IM, '<|im_end|>')
    examples, dropped = encode_all(lm, [dict(messages=TALK), dict(messages=messages, finished=True)])
    assert len(examples) == 1 and dropped == {reason: 1}
    with pytest.raises(DecodingError, match=f'no conversation can be used .1 times: {reason}'):
        encode_all(lm, [dict(messages=messages)])


def test_length_limits():
    lm = lm_of(CHATML, IM, '<|im_end|>')
    n = len(encode_conversation(lm, TALK).ids)
    assert encode_all(lm, [dict(messages=TALK)], n)[1] == {}
    with pytest.raises(DecodingError, match=f'longer than {n-1} tokens'):
        encode_all(lm, [dict(messages=TALK)], n - 1)
    long = [TALK[0], dict(role='assistant', content='x' * 300)]
    assert encode_all(lm, [dict(messages=TALK), dict(messages=long)], 10**6)[1] == {
        f'longer than {lm.context} tokens': 1
    }


def test_a_user_after_the_last_answer_is_left_out():
    lm = lm_of(CHATML, IM, '<|im_end|>')
    assert torch.equal(encode_conversation(lm, TALK[:3]).ids, encode_conversation(lm, TALK[:2]).ids)


def test_without_a_chat_template():
    lm = toy_lm()
    e = encode_conversation(lm, TALK[:2])
    assert (
        lm.tokenizer.decode(e.ids[~e.response]).replace(' ', '') == 'Hi'
        and e.ids[-1] == lm.eos_ids[0]
        and int(e.response.sum()) == len('Hello!') + 1
    )
    assert len(encode_conversation(lm, TALK[:2], finished=False).ids) == len(e.ids) - 1
    with pytest.raises(DecodingError, match='no chat template'):
        encode_conversation(lm, TALK)


def test_the_embedded_model_reads_back_what_it_says():
    "Prompt and greedy answer as tokens, and the same as text read back"
    lm = load()
    out = lm.generate('Name a colour.', max_new_tokens=12)
    e = encode_conversation(
        lm, [dict(role='user', content='Name a colour.'), dict(role='assistant', content=out.text)], finished=False
    )
    answer = [t.id for t in out.tokens[0] if t.id not in lm.eos_ids]
    assert e.ids.tolist() == encode_one(lm, 'Name a colour.').tolist() + answer


# ---- reading


def line(user='Hi', answer='Hello', **more):
    return (
        json.dumps(dict(messages=[dict(role='user', content=user), dict(role='assistant', content=answer)], **more))
        + '\n'
    )


def test_shards_are_read_in_order_and_leftovers_are_not(tmp_path):
    for i in (1, 0, 10):
        (tmp_path / f'shard-{i:04d}.jsonl').write_text(line(f'u{i}', finished=i == 1, temperature=0.5))
    (tmp_path / '.shard-0002.jsonl.77.part').write_text('{"mess')
    (tmp_path / 'settings.json').write_text('{}')
    found = read_conversations(tmp_path)
    assert (
        [c['messages'][0]['content'] for c in found] == ['u0', 'u1', 'u10']
        and [c['finished'] for c in found] == [False, True, False]
        and found[0]['temperature'] == 0.5
    )


@pytest.mark.parametrize(
    'text,error',
    [
        ('{"messages": [', 'line 1 of .* is not valid JSON'),
        (line() + '[1]\n', 'line 2 of .* is not a JSON object'),
        ('{"text": "x"}\n', "there is no column 'messages': choose one of text"),
        ('', 'holds no conversation'),
        ('{"messages": "Hi"}\n', 'holds no list of messages'),
    ],
)
def test_broken_files_are_named(tmp_path, text, error):
    (tmp_path / 'x.jsonl').write_text(text)
    with pytest.raises(DecodingError, match=error):
        read_conversations(tmp_path / 'x.jsonl')


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(DecodingError, match='there is no file'):
        read_conversations(tmp_path / 'none.jsonl')
    with pytest.raises(DecodingError, match='holds no shard'):
        read_conversations(tmp_path)
    with pytest.raises(DecodingError, match="cannot read 'nobody/nothing'"):
        read_conversations('nobody/nothing')


def test_datasets(tmp_path):
    datasets = pytest.importorskip('datasets')
    data = datasets.Dataset.from_list([dict(talk=TALK, n=1), dict(talk=TALK[:2], n=2)])
    data.save_to_disk(tmp_path / 'one')
    datasets.DatasetDict(train_sft=data).save_to_disk(tmp_path / 'split')
    assert (
        [c['messages'] for c in read_conversations(tmp_path / 'one', 'talk')]
        == [TALK, TALK[:2]]
        == [c['messages'] for c in read_conversations(f'{tmp_path}/split:train_sft', 'talk')]
    )
    assert len(read_conversations(data, 'talk')) == 2
    with pytest.raises(DecodingError, match="there is no column 'messages': choose one of talk, n"):
        read_conversations(tmp_path / 'one')
    with pytest.raises(DecodingError, match='one of train_sft'):
        read_conversations(tmp_path / 'split', 'talk')
    assert read_prompts(data, 'talk') == [TALK[:1], TALK[:1]]


def test_prompts(tmp_path):
    (tmp_path / 'p.jsonl').write_text('{"prompt": "Hi"}\n{"prompt": [{"role": "user", "content": "Ho"}]}\n')
    assert read_prompts(tmp_path / 'p.jsonl') == ['Hi', [dict(role='user', content='Ho')]] and read_prompts(
        ['a', 'b']
    ) == ['a', 'b']
    with pytest.raises(DecodingError, match="there is no column 'question'"):
        read_prompts(tmp_path / 'p.jsonl', 'question')
    for bad in ([], [''], [[dict(content='x')]], [[1, 2]], [dict(prompt=3)]):
        with pytest.raises(DecodingError, match='neither text nor messages'):
            read_prompts(bad)


def test_deduplicated_against_pairs():
    "The same as comparing every conversation with every one before it"
    rng = random.Random(0)
    word = lambda: rng.choice(['a', 'A ', ' b', 'b', 'c d', 'C  D', 'e', 'f', 'g'])
    talks = [
        dict(
            messages=[
                dict(role='user', content=word() + str(rng.randrange(9))),
                dict(role='assistant', content=word() + str(rng.randrange(9))),
            ]
        )
        for _ in range(120)
    ]
    held = talks[100:]
    fold = lambda c, i: ' '.join(c['messages'][i]['content'].lower().split())
    kept = []
    for c in talks[:100]:
        if not any(fold(c, i) == fold(o, i) for o in kept + held for i in (0, 1)):
            kept.append(c)
    mine, dropped = deduplicated(talks[:100], without=held)
    assert mine == kept and sum(dropped.values()) == 100 - len(kept) and len(kept) > 10
