"""The page: switches become arguments, steps become HTML, a text can be left in the middle;
and once, where gradio and a Chromium are installed, all of it in a real browser
"""

import importlib.util, threading
from pathlib import Path
import pytest, torch
from helpers.browser import Browser, chromium, wait_for
from npu_lora_decoding.serving import web_demo as P
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, adapter_fingerprint, save_draft_adapter
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.evaluation.draft_plots import COLOURS, proposer_html
from npu_lora_decoding.speculation.head_drafter import HASS
from helpers.heads import draft_adapter, random_head
from helpers.toys import toy_lm

HOSTILE = (
    '</span><script>document.title="bad"</script><img src=x '
    'onerror="document.title=\'bad\'">${document.title="bad"}{{value}}\x1b\u202e'
)
PROMPT = 'say it again'
STEADY = {
    (False, False): None,
    (False, True): PromptLookup(adaptive=False),
}  # how much an adaptive one drafts depends on clocks


def forgetful_lm(folder=None):
    "A model whose next token depends on the last one only, so that its text must go round in circles, where copies are right"
    lm = toy_lm()
    with torch.no_grad():
        for l in lm.model.model.layers:
            l.self_attn.o_proj.weight.zero_()
            l.mlp.down_proj.weight.zero_()
    lm.model.generation_config.eos_token_id = 96
    if folder:
        lm.adapter = load_adapter(toy_adapter(lm.model, folder / 'adapter', target_modules=['down_proj']), lm.model)
    return lm


def pages_of(writer, choice, made=STEADY):
    return list(P.answer(writer, made, PROMPT, '', choice))


# --- without a browser


@pytest.mark.parametrize(
    'choice,target,kind',
    [
        (P.Choice(), Plain(), type(None)),
        (P.Choice(lookup=True), Plain(), PromptLookup),
        (P.Choice(True, 0.3, 0.7), CoLD(0.3, 0.7), type(None)),
        (P.Choice(True, head=True), CoLD(0.1, 0.1), HASS),
        (P.Choice(head=True, lookup=True), Plain(), JointDrafter),
    ],
)
def test_switches_are_arguments(choice, target, kind):
    got = P.arguments(choice, P.make_drafters('a folder'))
    assert (
        got['target'] == target
        and type(got['drafter']) is kind
        and got['memory'] is None
        and got['max_new_tokens'] == 128
    )


def test_one_drafter_for_the_whole_page():
    made = P.make_drafters('a folder')
    assert made[True, True].drafters == (made[True, False], made[False, True])


@pytest.mark.parametrize('window', [64, 256.0, 1024])
def test_a_memory_fits_into_its_window(window):
    memory = P.arguments(P.Choice(memory=True, window=window), P.make_drafters())['memory']
    assert memory.window == window and memory.chunk == window // 4 and isinstance(memory.chunk, int)


def test_an_instruction_comes_first():
    lm = toy_lm()
    assert P.question(lm, 'a', 'b') == 'b\na' and P.question(lm, 'a') == 'a'
    lm.tokenizer.chat_template = 'any'
    assert P.question(lm, 'a', 'b') == [dict(role='system', content='b'), dict(role='user', content='a')]


def test_the_answer_grows_in_the_colours_of_its_proposers():
    lm = forgetful_lm()
    pages = pages_of(P.Writer(lm), P.Choice(lookup=True, new_tokens=60))
    out = lm.generate(PROMPT, drafter=STEADY[False, True], max_new_tokens=60)
    assert (
        'lookup' in {t.proposer for t in out.tokens[0]}
        and pages[-1].startswith(proposer_html(out))
        and COLOURS['lookup'] in pages[-1]
        and COLOURS['lookup'] not in pages[0]
    )
    assert len(pages) == len(out.steps) + 1 and [p.count('title="') for p in pages] == sorted(
        p.count('title="') for p in pages
    )


def test_what_a_model_says_stays_text():
    lm = toy_lm()
    lm.tokenizer.decode = lambda ids, **_: HOSTILE
    for changed in (False, True):
        whole = list(P.answer(P.Writer(lm), P.make_drafters(), PROMPT, '', P.Choice(new_tokens=3), changed))[-1]
        assert (
            '<script' not in whole
            and '<img' not in whole
            and '&lt;script&gt;' in whole
            and not {'\x1b', '\u202e'} & set(whole)
        )


def test_a_text_that_nobody_reads_ends_with_its_next_step():
    lm = forgetful_lm()
    writer = P.Writer(lm)
    seen = []
    gate = threading.Event()
    generate = lm.generate
    lm.generate = lambda *a, stream, **k: generate(
        *a, stream=lambda s: (stream(s), seen.append(s), gate.wait(60)), **k
    )  # waits after the first step
    text = P.answer(writer, STEADY, PROMPT, '', P.Choice(new_tokens=50))
    next(text)
    writer.over.set()
    gate.set()
    text.close()
    assert len(seen) == 1 and not writer.thread.is_alive()
    gate.clear()
    text = P.answer(writer, STEADY, PROMPT, '', P.Choice(new_tokens=50))
    next(text)
    over = writer.over
    threading.Timer(0.2, gate.set).start()
    text.close()
    assert over.is_set() and len(seen) == 2


def test_leaving_in_the_middle_frees_the_model():
    lm = forgetful_lm()
    writer = P.Writer(lm)
    for _ in range(2):
        text = P.answer(writer, P.make_drafters(), PROMPT, '', P.Choice(new_tokens=1000))
        next(text)
        text.close()
        assert not writer.thread.is_alive()
    unread = writer(PROMPT, max_new_tokens=1000)
    next(unread)  # nobody closes it
    assert pages_of(writer, P.Choice(new_tokens=9))[-1].startswith(proposer_html(lm.generate(PROMPT, max_new_tokens=9)))
    unread.close()
    assert not [t for t in threading.enumerate() if '_write' in t.name]


def test_mistakes_are_sentences_and_defects_are_raised(monkeypatch):
    lm = toy_lm()
    writer = P.Writer(lm)
    assert pages_of(writer, P.Choice(head=True)) == [
        '<p class="refused">this model has no draft head here: start the page with --head FOLDER, or switch the head off.</p>'
    ]
    assert 'there is no adapter' in pages_of(writer, P.Choice(contrast=True))[-1]
    monkeypatch.setattr(lm.model, 'forward', lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pages_of(writer, P.Choice())


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(P.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DecodingError, match=r"gradio, which is not installed: pip install 'npu_lora_decoding\[page\]'"):
        run(['page', '--model', '/no/such'])


# --- in a browser

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec('gradio') is None, reason="gradio is not installed: pip install 'npu_lora_decoding[page]'"
)
needs_chromium = pytest.mark.skipif(
    chromium() is None, reason='no Chromium is installed (Debian: apt install chromium)'
)
needs_websocket = pytest.mark.skipif(
    importlib.util.find_spec('websocket') is None, reason='websocket-client is not installed'
)


@pytest.fixture
def shown(tmp_path, monkeypatch):
    "A page on the air and a browser that has opened it"
    lm = forgetful_lm(tmp_path)
    first = lm.generate(PROMPT, max_new_tokens=1).tokens[0][0].id
    decode = lm.tokenizer.decode
    lm.tokenizer.decode = lambda ids, **kw: HOSTILE if list(ids) == [first] else decode(ids, **kw)
    monkeypatch.setattr(P, 'make_drafters', lambda *_: STEADY)
    page = P.build(lm)
    url = P.serve(page, 0)
    try:
        browser = Browser(tmp_path)
        try:
            browser.open(url)
            yield lm, url, browser
        finally:
            browser.close()
    finally:
        page.close()


def spans(browser):
    return (
        browser.js(
            '[...document.querySelectorAll("#answer span")].map(e => [e.title, e.style.backgroundColor, e.textContent])'
        )
        or []
    )


def rgb(hexed):
    return 'rgb({}, {}, {})'.format(*(int(hexed[i : i + 2], 16) for i in (1, 3, 5)))


def refuses_an_empty_prompt(browser):
    browser.type('#prompt textarea', ' ')
    browser.click('#go')
    wait_for(
        lambda: 'there is no prompt: type one.'
        in (browser.js('document.querySelector("#answer .refused")?.textContent') or ''),
        'the refusal',
    )


@needs_gradio
@needs_chromium
@needs_websocket
def test_a_reader_types_presses_and_switches(shown, tmp_path):
    lm, url, browser = shown

    def press_and_wait(tokens):
        browser.click('#go')
        wait_for(
            lambda: f'{tokens} tokens in' in (browser.js('document.querySelector("#answer").textContent') or ''),
            f'an answer of {tokens} tokens',
        )
        return [(who, colour, text) for who, colour, text in spans(browser)][:tokens]

    browser.type('#prompt textarea', PROMPT)
    browser.type('#new-tokens input[type=number]', '64')
    browser.click('#prompt textarea')  # leaves the number
    plain = press_and_wait(64)
    assert {(who, colour) for who, colour, _ in plain} == {('target', rgb(COLOURS['target']))}
    assert (
        plain[0][2].startswith('</span><script>') and '${document.title="bad"}{{value}}' in plain[0][2]
    )  # text, not markup
    assert (
        browser.js('document.title') == 'npu_lora_decoding'
        and browser.js('document.querySelectorAll("#answer script, #answer img").length') == 0
    )
    browser.click('#lookup input')
    browser.js('document.querySelector("#answer .facts").remove()')  # what comes is new
    copied = press_and_wait(64)
    want = lm.generate(PROMPT, drafter=STEADY[False, True], max_new_tokens=64)
    assert [(who, colour) for who, colour, _ in copied] == [
        (t.proposer, rgb(COLOURS[t.proposer])) for t in want.tokens[0]
    ] and [t for *_, t in copied] == [t for *_, t in plain]
    browser.click('#contrast input')
    browser.js('document.querySelector("#answer .facts").remove()')
    assert [t for *_, t in press_and_wait(64)] and len(
        lm.generate(PROMPT, CoLD(0.1, 0.1), STEADY[False, True], max_new_tokens=64).tokens[0]
    ) == 64
    refuses_an_empty_prompt(browser)
    browser.picture(tmp_path / 'page.png')
    elsewhere = [u for u in browser.asked if not u.startswith((url, url.replace('http', 'ws'), 'data:', 'blob:'))]
    assert elsewhere == [] and len(browser.asked) > 5 and [s for s in browser.console if 'Content Security' in s] == []


@needs_gradio
@needs_chromium
@needs_websocket
def test_the_page_is_for_this_computer_and_loads_nothing_from_elsewhere(shown):
    "The policy of the page is sent, and the browser obeys it: a picture from elsewhere is refused before anybody is asked"
    lm, url, browser = shown
    browser.find('#go')
    assert url.startswith('http://127.0.0.1:')
    browser.js(
        'new Promise(done => { const i = new Image(); i.onerror = i.onload = () => done(1); i.src = "http://example.invalid/x.png" })'
    )
    browser.call('Runtime.evaluate', expression='1')
    assert any('Content Security Policy' in s and 'example.invalid' in s for s in browser.console)


def test_the_page_drafts_with_a_draft_adapter(tmp_path):
    lm = toy_lm()
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path / 'task'), lm.model)
    head = random_head(lm)
    folder = save_head(head, tmp_path / 'head', lm.model)
    draft = DraftAdapter(draft_adapter(head), adapter_fingerprint(lm.adapter))
    save_draft_adapter(draft, tmp_path / 'draft', head, torch.float32)
    made = P.make_drafters(folder, tmp_path / 'draft')
    for lookup in (False, True):
        choice = P.Choice(head=True, lookup=lookup, new_tokens=6)
        texts = [lm.generate('ab ab', eos_token_id=None, **P.arguments(choice, made))]
        texts.append(lm.generate('ab ab', eos_token_id=None, max_new_tokens=6))
        assert texts[0].text == texts[1].text
    assert [Path(draft.name).name for draft in made[True, False]._bound.drafts] == ['draft']
    with pytest.raises(DecodingError, match='a draft adapter changes a draft head: give that head as --head'):
        P.make_drafters(None, tmp_path / 'draft')
    lm.adapter = None
    (refused,) = P.answer(P.Writer(lm), made, 'ab', '', P.Choice(head=True))
    assert 'draft is for a task adapter, but the text is decoded without one' in refused
