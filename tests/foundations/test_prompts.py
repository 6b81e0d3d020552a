"Conversations that a chat template does not take are refused in one sentence; an adapter's own tokenizer is looked at"

import copy, warnings
import pytest, torch
from npu_lora_decoding.decoding.loop import LM, load
from npu_lora_decoding.foundations.adapters import toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.models import encode, encode_one
from npu_lora_decoding.hass.chat_data import deduplicated, encode_conversation
from helpers.chats import CHATML, LLAMA2, LLAMA3, MISTRAL, lm_of

SYSTEM = dict(role='system', content='be brief')
USER = dict(role='user', content='hi')
ANSWER = dict(role='assistant', content='yes')
CALL = dict(role='assistant', content=None, tool_calls=[dict(function=dict(name='f', arguments='{}'))])
TEMPLATES = dict(chatml=CHATML, llama2=LLAMA2, llama3=LLAMA3, mistral=MISTRAL)
TOOLS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% else %}"
    "{{ m['content'] }}{% endif %}{% endfor %}"
)


def part(text):
    return dict(role='user', content=[dict(type='text', text=text)])


def lm(template):
    return lm_of(template, ['<|im_start|>', '<|im_end|>'], '<|im_end|>')


def refused(call):
    with pytest.raises(DecodingError) as e:
        call()
    sentence = str(e.value)
    assert '\n' not in sentence and sentence.endswith('.') and ': ' in sentence
    return sentence


ODD = {
    'no content': [dict(role='user')],
    'nothing as content': [dict(role='user', content=None)],
    'a number': [dict(role='user', content=3)],
    'two parts': [dict(role='user', content=[dict(type='text', text='a'), dict(type='text', text='b')])],
    'a picture': [dict(role='user', content=[dict(type='image', url='x')])],
    'a part without text': [dict(role='user', content=[dict(type='text')])],
    'no parts': [dict(role='user', content=[])],
    'a role that is a number': [dict(role=1, content='x')],
    'no role': [dict(content='x')],
    'a call of tools': [USER, CALL, USER],
    'an empty call of tools': [USER, dict(CALL, tool_calls=[]), USER],
    'empty': [],
    'empty text': [dict(role='user', content=' ')],
}


@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('what', ODD)
def test_odd_messages(template, what):
    model = lm(TEMPLATES[template])
    for call in (encode, encode_one):
        refused(lambda: call(model, ODD[what]))
    refused(lambda: model.generate(ODD[what], max_new_tokens=1))
    refused(lambda: model.generate([ODD[what], [USER]], max_new_tokens=1))
    if what != 'empty text':  # which a user may have sent
        refused(lambda: encode_conversation(model, [*ODD[what], ANSWER]))
    deduplicated([dict(messages=[*ODD[what], ANSWER]), dict(messages=[USER, ANSWER])])


def test_what_templates_refuse():
    for name, messages in (('llama2', [SYSTEM, USER]), ('mistral', [USER, USER]), ('mistral', [SYSTEM, USER])):
        assert 'the chat template refuses' in refused(lambda: encode_one(lm(TEMPLATES[name]), messages))
    broken = lm('{{ messages[7].content.strip() }}')
    assert 'the chat template refuses' in refused(lambda: encode_one(broken, [USER]))
    assert 'the chat template refuses' in refused(lambda: encode_one(lm('{% if %}'), [USER]))


@pytest.mark.parametrize('template', TEMPLATES)
def test_one_part_is_its_text(template):
    model = lm(TEMPLATES[template])
    assert torch.equal(encode_one(model, [part('hello')]), encode_one(model, [dict(role='user', content='hello')]))


def test_calls_of_tools_reach_a_template_that_knows_them():
    model = lm(TOOLS)
    without = {k: v for k, v in CALL.items() if k != 'content'}
    for call in (CALL, without):
        assert 'CALL f' in model.tokenizer.decode(encode_one(model, [USER, call, USER]))


# --- the tokenizer beside an adapter


@pytest.fixture
def saved(tmp_path):
    "A model's folder and an adapter's, and a function that loads both and returns the model and the warnings"
    model = lm(CHATML)
    model.model.save_pretrained(tmp_path / 'base')
    model.tokenizer.save_pretrained(tmp_path / 'base')
    toy_adapter(model.model, tmp_path / 'adapter')

    def loaded(own=None):
        if own is not None:
            own.save_pretrained(tmp_path / 'adapter')
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            found = load(tmp_path / 'base', tmp_path / 'adapter', device='cpu')
        return found, [str(w.message) for w in heard if 'tokenizer of its own' in str(w.message)]

    loaded.tokenizer = model.tokenizer
    loaded.folder = tmp_path
    return loaded


def test_the_same_tokenizer_says_nothing(saved):
    assert saved()[1] == [] and saved(saved.tokenizer)[1] == []


def test_another_template_is_used(saved):
    own = copy.deepcopy(saved.tokenizer)
    own.chat_template = LLAMA2.replace('bos_token', "'<s>'")
    found, heard = saved(own)
    assert len(heard) == 1 and 'chat template differs' in heard[0]
    assert '[INST] hi [/INST]' in found.tokenizer.decode(encode_one(found, 'hi'))


def test_a_template_alone_is_used(saved):
    (saved.folder / 'adapter' / 'chat_template.jinja').write_text('[{{ messages[0].content }}]', encoding='utf-8-sig')
    found, heard = saved()
    assert len(heard) == 1 and found.tokenizer.decode(encode_one(found, 'hi')) == '[hi]'


def test_another_end_token_is_named(saved):
    own = copy.deepcopy(saved.tokenizer)
    own.eos_token = '</s>'
    assert 'end token differs' in saved(own)[1][0] and f'eos_token_id={own.eos_token_id}' in saved(own)[1][0]


def test_more_tokens_than_the_model_has_are_refused(saved):
    own = copy.deepcopy(saved.tokenizer)
    own.add_tokens(['<call>'])
    assert "first ['<call>']" in refused(lambda: saved(own))


def test_a_padding_token_more_is_nothing(saved):
    own = copy.deepcopy(saved.tokenizer)
    own.add_special_tokens(dict(pad_token='[PAD]'))
    found, heard = saved(own)
    assert heard == [] and len(found.tokenizer) == len(saved.tokenizer)


def test_moved_tokens_are_refused(saved):
    other = lm_of(CHATML, ['<|im_end|>', '<|im_start|>'], '<|im_end|>').tokenizer
    assert 'other tokens' in refused(lambda: saved(other))
