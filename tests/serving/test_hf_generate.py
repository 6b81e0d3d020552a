"The folder that transformers' custom_generate= takes: the tokens of lm.generate, its own settings, and a sentence where it cannot be"

import json
from pathlib import Path
import pytest, torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter, toy_model
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, adapter_fingerprint, save_draft_adapter
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding.sampling import Plain
from npu_lora_decoding.cli.main import run
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.serving.hf_generate import Settings, decoder_of, read_settings, write_custom_generate
from npu_lora_decoding.foundations.models import embedded_folder, load_tokenizer
from npu_lora_decoding.decoding.loop import Decoder, load
import npu_lora_decoding.cli.main  # registers its commands
from helpers.heads import draft_adapter, random_head
from helpers.toys import toy_folder, toy_tokenizer

PROMPTS = [[5, 6, 7, 5, 6], [9, 10, 11]]
N = 14


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    toy_folder(home / 'model', tokenizer=toy_tokenizer())
    toy_adapter(load(home / 'model').model, home / 'adapter')
    return home


@pytest.fixture(scope='module')
def lm(home):
    return load(home / 'model', home / 'adapter', 'cpu')


def batch(lm):
    "Prompts padded left, and their mask"
    out = lm.tokenizer.pad(dict(input_ids=PROMPTS), return_tensors='pt')
    return dict(input_ids=out.input_ids, attention_mask=out.attention_mask)


def options(lm, **kw):
    return (
        dict(max_new_tokens=N, do_sample=False, pad_token_id=lm.pad_id, eos_token_id=None, tokenizer=lm.tokenizer) | kw
    )


def written(lm, *how, **kw):
    return [
        [t.id for t in row]
        for row in lm.generate(
            [torch.tensor(p) for p in PROMPTS], *how, max_new_tokens=N, eos_token_id=None, **kw
        ).tokens
    ]


def by_name(model, lm, out, **kw):
    return model.generate(**batch(lm), custom_generate=str(out), trust_remote_code=True, **options(lm, **kw))[
        :, 5:
    ].tolist()


@pytest.mark.parametrize(
    'settings,target',
    [
        (Settings('greedy'), Plain()),
        (Settings(alpha=0.05, beta=1.0), CoLD(0.05, 1.0)),
        (Settings(alpha=0.05, beta=1.0, drafter='lookup'), CoLD(0.05, 1.0)),
    ],
    ids=str,
)
def test_the_tokens_of_lm_generate(lm, home, tmp_path, settings, target):
    "By name on a bare model, and where the model's own folder holds it"
    want = written(lm, target)
    assert want != written(load(home / 'model', device='cpu'))
    write_custom_generate(tmp_path / 'out', settings, home / 'adapter')
    assert by_name(lm.model, lm, tmp_path / 'out') == want
    write_custom_generate(tmp_path / 'served', settings, home / 'adapter', model=home / 'model')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'served', trust_remote_code=True).eval()
    inputs = batch(lm)
    assert (
        model.generate(inputs.pop('input_ids'), **inputs, **options(lm))[:, 5:].tolist() == want
    )  # ids in their place, as people write it


def test_each_folder_has_its_own_settings(lm, home, tmp_path):
    "transformers keeps one copy of the code for all of them; folders of one name, and one that is written again"
    outs = {beta: tmp_path / f'{beta}' / 'out' for beta in (0.0, 1.0, 3.0)}
    for beta, out in outs.items():
        write_custom_generate(out, Settings(alpha=0.01, beta=beta), home / 'adapter')
    wants = {beta: written(lm, CoLD(0.01, beta)) for beta in outs}
    assert wants[0.0] != wants[1.0] != wants[3.0]
    for _ in range(2):
        for beta, out in outs.items():
            assert by_name(lm.model, lm, out) == wants[beta]
    write_custom_generate(outs[0.0], Settings(alpha=0.01, beta=3.0), home / 'adapter')
    assert by_name(lm.model, lm, outs[0.0]) == wants[3.0]
    kept = decoder_of(outs[0.0] / 'custom_generate', lm.model)
    by_name(lm.model, lm, outs[0.0])
    assert decoder_of(outs[0.0] / 'custom_generate', lm.model) is kept


def test_what_else_is_asked_reaches_the_loop(tmp_path, capsys):
    "A streamer, strings that end the text given in both places, another method, refusals"
    tokenizer = load_tokenizer(embedded_folder())  # stop strings need one of bytes
    toy_folder(tmp_path / 'model', toy_model(vocab=len(tokenizer), context=64), tokenizer)
    lm = load(tmp_path / 'model', device='cpu')
    write_custom_generate(tmp_path / 'served', Settings('greedy'), model=tmp_path / 'model')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'served', trust_remote_code=True).eval()
    ids = torch.tensor(PROMPTS[:1])
    free = written(lm)[0]
    word = lm.tokenizer.decode(free[3:4])
    for kw in (
        dict(stop_strings=[word]),
        dict(
            generation_config=GenerationConfig(
                stop_strings=[word], max_new_tokens=N, do_sample=False, pad_token_id=lm.pad_id
            )
        ),
    ):
        usual = dict(tokenizer=lm.tokenizer) if 'generation_config' in kw else options(lm)
        assert (
            model.generate(ids, streamer=TextStreamer(lm.tokenizer, skip_prompt=True), **usual, **kw)[0, 5:].tolist()
            == free[: free.index(free[3]) + 1]
        )
        assert capsys.readouterr().out == lm.tokenizer.decode(free[: free.index(free[3]) + 1]) + '\n'
    early = lambda ids, scores, **kw: torch.full(
        (len(ids),), ids.shape[1] >= 7
    )  # a criterion beside the strings counts too
    assert (
        model.generate(ids, stopping_criteria=[early], stop_strings=['never written'], **options(lm))[0, 5:].tolist()
        == free[:2]
    )
    assert (
        model.generate(ids, custom_generate=lambda model, input_ids, **kw: input_ids, **options(lm)).tolist()
        == ids.tolist()
    )
    with pytest.raises(DecodingError, match='use a drafter'):
        model.generate(ids, assistant_model=toy_model(), **options(lm))
    with pytest.raises(ValueError, match='max_new_tokns'):
        model.generate(ids, max_new_tokns=3)


def test_no_code_runs_without_trust(lm, home, tmp_path):
    write_custom_generate(tmp_path / 'served', Settings(alpha=0.01, beta=3.0), home / 'adapter', model=home / 'model')
    with pytest.raises(ValueError, match='trust_remote_code'):
        lm.model.generate(**batch(lm), custom_generate=str(tmp_path / 'served'), trust_remote_code=False, **options(lm))
    wary = AutoModelForCausalLM.from_pretrained(tmp_path / 'served').eval()
    assert wary.generate(**batch(lm), **options(lm))[:, 5:].tolist() == written(load(home / 'model', device='cpu'))


def test_the_vocabulary_of_the_tokenizer(home, tmp_path):
    "Contrast may raise a column without a token; with the tokenizer at hand it is left out, as in lm.generate"
    model = toy_model()  # 97 columns, 76 tokens
    toy_folder(tmp_path / 'model', model)
    toy_adapter(model, tmp_path / 'adapter')
    lm = load(tmp_path / 'model', tmp_path / 'adapter', 'cpu')
    write_custom_generate(tmp_path / 'out', Settings(alpha=0.001, beta=4.0), tmp_path / 'adapter')
    assert by_name(lm.model, lm, tmp_path / 'out') == written(lm, CoLD(0.001, 4.0))
    assert max(map(max, by_name(lm.model, lm, tmp_path / 'out', tokenizer=None))) >= 76  # without it


@pytest.mark.parametrize(
    'settings', ['{', '[]', '{"method": "beam"}', '{"speed": 3}', '{"beta": "1"}', '{"drafter": "hass_tree"}']
)
def test_settings_of_nonsense_are_named(tmp_path, settings):
    folder = write_custom_generate(tmp_path / 'out', Settings('greedy'))
    assert read_settings(folder) == Settings('greedy')
    (folder / 'settings.json').write_text(settings)
    with pytest.raises(DecodingError):
        read_settings(folder)


def test_a_folder_without_settings_is_named(lm, tmp_path):
    (write_custom_generate(tmp_path / 'out', Settings('greedy')) / 'settings.json').unlink()
    with pytest.raises(DecodingError, match='nld custom-generate wrote'):
        by_name(lm.model, lm, tmp_path / 'out')


def test_nothing_is_replaced_but_our_own_and_nothing_half_written(home, tmp_path):
    out = tmp_path / 'out'
    (out / 'custom_generate').mkdir(parents=True)
    (out / 'custom_generate' / 'generate.py').write_text('theirs')
    with pytest.raises(DecodingError, match='somebody else'):
        write_custom_generate(out)
    assert (out / 'custom_generate' / 'generate.py').read_text() == 'theirs'
    ours = write_custom_generate(tmp_path / 'ours', Settings('greedy'), home / 'adapter')
    before = {f.name: f.read_bytes() for f in ours.rglob('*') if f.is_file()}
    for kw in (
        dict(adapter=home / 'model'),
        dict(head=home / 'adapter'),
        dict(model=home / 'model'),
        dict(settings=Settings('greedy'), model=tmp_path),
    ):
        with pytest.raises(DecodingError):
            write_custom_generate(tmp_path / 'ours', **kw)
    assert {f.name: f.read_bytes() for f in ours.rglob('*') if f.is_file()} == before and [
        f.name for f in (tmp_path / 'ours').iterdir()
    ] == ['custom_generate']


def test_the_command(home, tmp_path, capsys):
    run(
        [
            'custom-generate',
            str(tmp_path / 'out'),
            '--adapter',
            str(home / 'adapter'),
            '--beta',
            '0.5',
            '--lookup',
            '--model',
            str(home / 'model'),
        ]
    )
    assert 'transformers serve' in capsys.readouterr().out
    assert json.loads((tmp_path / 'out' / 'custom_generate' / 'settings.json').read_text()) == dict(
        method='cold', alpha=0.1, beta=0.5, drafter='lookup', adapter=True, head=False, compile=False
    )
    run(['custom-generate', str(tmp_path / 'plain'), '--method', 'greedy'])
    assert 'custom_generate=' in capsys.readouterr().out
    with pytest.raises(DecodingError, match='use greedy or cold'):
        run(['custom-generate', str(tmp_path / 'x'), '--method', 'beam'])


def test_a_seed_reaches_the_loop(lm, tmp_path):
    "The text of a Decoder with that seed, drafter or not; the seed of one call is not that of the next"
    write_custom_generate(tmp_path / 'out', Settings('greedy', drafter='lookup'))
    how = dict(do_sample=True, top_k=0)
    draw = lambda **seed: by_name(lm.model, lm, tmp_path / 'out', **how, **seed)
    plain = options(lm, **how)
    del plain['tokenizer']
    want = lm.model.generate(**batch(lm), custom_generate=Decoder(seed=7), **plain)[:, 5:].tolist()
    assert draw(seed=7) == want and draw(seed=[7, 7]) == want and draw(seed=8) != want
    assert draw() != draw()
    for seed in (-1, True, 'x', 2**63, 1.5, [], [1]):
        with pytest.raises(DecodingError, match='seed') as e:
            draw(seed=seed)
        assert '\n' not in str(e.value) and ': ' in str(e.value)


@pytest.fixture(scope='module')
def drafting(lm, home):
    "A head, and a draft adapter on it for the adapter"
    head = random_head(lm)
    save_head(head, home / 'head', lm.model)
    task = adapter_fingerprint(load_adapter(home / 'adapter', lm.model))
    save_draft_adapter(DraftAdapter(draft_adapter(head), task), home / 'draft', head, torch.float32)
    return home


@pytest.mark.parametrize('drafter', ['hass_chain', 'hass_tree', 'hass_lookup'])
def test_a_draft_adapter_goes_with_the_folder(lm, drafting, tmp_path, drafter):
    want = written(lm, Plain())
    parts = dict(adapter=drafting / 'adapter', head=drafting / 'head')
    inside = write_custom_generate(
        tmp_path / 'out', Settings('greedy', drafter=drafter, head=True), draft_adapter=drafting / 'draft', **parts
    )
    assert read_settings(inside).draft_adapter and (inside / 'draft_adapter' / 'adapter_config.json').exists()
    assert by_name(lm.model, lm, tmp_path / 'out') == want
    drafter = decoder_of(inside, lm.model).drafter
    hass = drafter.drafters[0] if isinstance(drafter, JointDrafter) else drafter
    assert [Path(draft.name).name for draft in hass._bound.drafts] == ['draft_adapter']
    inside = write_custom_generate(tmp_path / 'plain', Settings('greedy', drafter='hass_tree', head=True), **parts)
    assert not read_settings(inside).draft_adapter


def test_a_draft_adapter_that_does_not_belong_is_refused(lm, drafting, tmp_path):
    tree = Settings('greedy', drafter='hass_tree', head=True)
    both = dict(head=drafting / 'head', draft_adapter=drafting / 'draft')
    for settings, parts in [
        (tree, dict(draft_adapter=drafting / 'draft')),
        (Settings('greedy', drafter='lookup'), both),
    ]:
        with pytest.raises(DecodingError, match='(a draft adapter changes a draft head|unknown drafter)'):
            write_custom_generate(tmp_path / 'out', settings, **parts)
    with pytest.raises(DecodingError, match='holds a whole model'):
        write_custom_generate(tmp_path / 'out', tree, head=drafting / 'head', draft_adapter=drafting / 'head')
    other = toy_adapter(lm.model, tmp_path / 'other', seed=5)
    write_custom_generate(tmp_path / 'out', tree, adapter=other, **both)
    with pytest.raises(DecodingError, match='the draft adapter .*draft_adapter is for another task adapter'):
        by_name(lm.model, lm, tmp_path / 'out')
    write_custom_generate(tmp_path / 'none', tree, **both)
    with pytest.raises(DecodingError, match='the draft adapter .*draft_adapter is for a task adapter, but the text is'):
        by_name(lm.model, lm, tmp_path / 'none')
    save_head(random_head(lm, seed=1), tmp_path / 'head', lm.model)
    parts = dict(adapter=drafting / 'adapter', head=tmp_path / 'head', draft_adapter=drafting / 'draft')
    write_custom_generate(tmp_path / 'head out', tree, **parts)
    with pytest.raises(DecodingError, match='was trained on another head'):
        by_name(lm.model, lm, tmp_path / 'head out')


def test_settings_of_an_earlier_version_are_read(lm, home, tmp_path):
    inside = write_custom_generate(tmp_path / 'out', Settings('greedy'), home / 'adapter')
    about = json.loads((inside / 'settings.json').read_text())
    assert 'draft_adapter' not in about
    assert read_settings(inside) == Settings('greedy', adapter=True)


def test_the_command_takes_a_draft_adapter(lm, drafting, tmp_path, capsys):
    given = ['--adapter', str(drafting / 'adapter'), '--head', str(drafting / 'head'), '--method', 'greedy']
    run(['custom-generate', str(tmp_path / 'out'), *given, '--draft-adapter', str(drafting / 'draft')])
    assert by_name(lm.model, lm, tmp_path / 'out') == written(lm, Plain())
    assert read_settings(tmp_path / 'out' / 'custom_generate').draft_adapter
