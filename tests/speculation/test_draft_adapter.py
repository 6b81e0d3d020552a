"""Decoding with draft adapters: the same tokens, drafted as the merged head drafts them, on rows that carry different task adapters"""

from dataclasses import replace
import pytest, torch
from npu_lora_decoding.foundations import ops
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.lora import AdapterBank
from npu_lora_decoding.decoding.loop import Decoder
from npu_lora_decoding.decoding.runner import BatchRunner
from npu_lora_decoding.hass.checkpoint import load_head, save_head
from npu_lora_decoding.hass.draft_adapter import DraftAdapter, adapter_fingerprint, merge_draft_adapter
from npu_lora_decoding.hass.draft_adapter import load_draft_adapter, save_draft_adapter
from npu_lora_decoding.speculation.head_drafter import HASS
from npu_lora_decoding.speculation.joint import JointDrafter
from npu_lora_decoding.speculation.prompt_lookup import PromptLookup
from npu_lora_decoding.temp_lora.generation import TempLoRA
from helpers.heads import draft_adapter
from helpers.loops import COLD, PLAIN, count_drafted, generate, paying, same, toy, uncompiled  # `paying` is a fixture

compiled = pytest.mark.skipif(not ops.compiles(), reason='torch.compile finds no C++ compiler')


class Case:
    "A toy target with two task adapters, and a draft adapter on its head for each"

    def __init__(self, tmp):
        self.toy = toy(tmp)
        self.model = self.toy.model
        other = load_adapter(toy_adapter(self.model, tmp / 'other', seed=5, lora_alpha=1), self.model)
        self.tasks = [self.toy.bank.adapters[0], other]
        self.bank = AdapterBank(self.model, self.tasks, ops.lora)
        self.head = load_head(self.toy.folder, self.model)
        self.drafts = []
        self.merged = []
        for k, task in enumerate(self.tasks):
            draft = DraftAdapter(draft_adapter(self.head, seed=k), adapter_fingerprint(task))
            self.drafts.append(save_draft_adapter(draft, tmp / f'draft-{k}', self.head, torch.float32))
            merged = merge_draft_adapter(self.head, load_draft_adapter(self.drafts[k], self.head).adapter)
            self.merged.append(save_head(merged, tmp / f'merged-{k}', self.model, torch.float32))


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp('drafts'))


def prompts(lengths=(7, 3, 5)):
    t = max(lengths)
    mask = torch.stack([(torch.arange(t) >= t - n).long() for n in lengths])
    return torch.randint(3, 23, mask.shape, generator=generator(0)) * mask, mask


def run(case, drafter=None, target=PLAIN, lengths=(7, 3, 5), *, bank='own', rows=None, compile=False, **options):
    bank = case.bank if bank == 'own' else bank
    how = dict(return_dict_in_generate=True, max_new_tokens=20) | options
    decoder = Decoder(target, drafter, bank=bank, rows=rows, compile=compile, seed=7 if options else None)
    return generate(case.model, *prompts(lengths), decoder, **how)


def trees(out):
    "The draft tokens of all forward passes"
    return [step.tree.tokens.tolist() for step in out.steps[1:]]


DRAFTERS = dict(chain=dict(chain=True), tree=dict(), fixed=dict(adaptive=False))
DRAWN = dict(do_sample=True, top_k=0)


@pytest.mark.parametrize('compile', [False, True], ids=['growing', 'static'])
@pytest.mark.parametrize('drawn', [{}, DRAWN], ids=['greedy', 'drawn'])
@pytest.mark.parametrize('target', [PLAIN, COLD], ids=str)
@pytest.mark.parametrize('name', DRAFTERS)
def test_drafts_as_the_merged_head(case, monkeypatch, name, target, drawn, compile):
    uncompiled(monkeypatch)
    plain = run(case, None, target, **drawn)
    how = DRAFTERS[name]
    fast = run(case, HASS(case.toy.folder, adapter=case.drafts[0], **how), target, compile=compile, **drawn)
    merged = run(case, HASS(case.merged[0], **how), target, compile=compile, **drawn)
    base = run(case, HASS(case.toy.folder, **how), target, compile=compile, **drawn)
    for out in (fast, merged, base):
        same(out.sequences, plain.sequences)
    assert trees(fast) == trees(merged) != trees(base)
    assert count_drafted(fast) > 3


@pytest.mark.parametrize('compile', [False, True], ids=['growing', 'static'])
def test_rows_with_different_adapters(case, monkeypatch, compile):
    "Each row has the text and the draft that it has alone, whatever stands beside it"
    uncompiled(monkeypatch)
    how = dict(adaptive=False, chain=True)
    both = HASS(case.toy.folder, adapter=case.drafts, **how)
    rows = [1, -1, 0]
    out = run(case, both, rows=rows, compile=compile)
    same(out.sequences, run(case, rows=rows).sequences)
    heads = [*case.merged, case.toy.folder]
    ids, mask = prompts()
    for i, k in enumerate(rows):
        decoder = Decoder(PLAIN, HASS(heads[k], **how), bank=case.bank, rows=[k], compile=compile)
        alone = generate(
            case.model, ids[i : i + 1], mask[i : i + 1], decoder, return_dict_in_generate=True, max_new_tokens=20
        )
        same(out.sequences[i], alone.sequences[0])
        passes = [step for step in out.steps[1:] if step.tokens[i]]
        assert [s.tree.tokens[i].tolist() for s in passes] == [s.tree.tokens[0].tolist() for s in alone.steps[1:]]
    assert count_drafted(out) > 3


def test_one_draft_adapter_in_a_mixed_batch(case):
    "Rows of another adapter draft with the head as it is"
    how = dict(adaptive=False)
    rows = [0, 1, -1]
    mixed = run(case, HASS(case.toy.folder, adapter=case.drafts[0], **how), rows=rows)
    base = run(case, HASS(case.toy.folder, **how), rows=rows)
    same(mixed.sequences, base.sequences)
    first = [out.steps[1].tree.tokens for out in (mixed, base)]
    assert not torch.equal(first[0][0], first[1][0])
    same(first[0][1:], first[1][1:])


@pytest.mark.slow
@compiled
def test_compiled_drafts_read_their_adapters(case):
    "One program for all rows and draft adapters of these shapes"
    torch._dynamo.reset()
    drafter = HASS(case.toy.folder, adapter=case.drafts, adaptive=False, depth=1, top_k=5, nodes=6)
    for rows in ([0, 1], [1, -1]):
        out = run(case, drafter, COLD, (7, 3), rows=rows, compile=True)
        eager = run(case, replace(drafter), COLD, (7, 3), rows=rows)
        same(out.sequences, eager.sequences)
        assert trees(out) == trees(eager)
    [program] = drafter._bound.programs.values()
    assert len(program._runs) == 1


@pytest.mark.parametrize('first', [True, False])
def test_joined_with_a_lookup(case, first):
    hass = HASS(case.toy.folder, adapter=case.drafts[0])
    lookup = PromptLookup(min_ngram=1)
    drafter = JointDrafter((hass, lookup) if first else (lookup, hass), adaptive=False)
    for target in (PLAIN, COLD):
        out = run(case, drafter, target)
        same(out.sequences, run(case, None, target).sequences)
        assert count_drafted(out) > 3


def test_on_a_peft_model(case, tmp_path):
    import copy
    from peft import PeftModel

    folder = toy_adapter(case.model, tmp_path / 'a', lora_alpha=1)
    peft = PeftModel.from_pretrained(copy.deepcopy(case.model), folder).eval()
    drafter = HASS(case.toy.folder, adapter=case.drafts[0])
    out = generate(peft, *prompts(), Decoder(COLD, drafter), max_new_tokens=20, return_dict_in_generate=True)
    same(out.sequences, run(case, None, COLD).sequences)
    assert trees(out) == trees(run(case, HASS(case.merged[0]), COLD))


def test_below_a_memory(case):
    "The adapter that learns goes on from the task adapter, and drafts with its draft adapter"
    memory = TempLoRA(chunk=8, window=90, train_context=8, r=2, alpha=2.0, lr=1e-3)
    ids = torch.randint(3, 23, (1, 9), generator=generator(1))

    def read(drafter):
        decoder = Decoder(PLAIN, drafter, memory, bank=case.bank)
        return generate(case.model, ids, torch.ones_like(ids), decoder, max_new_tokens=30, return_dict_in_generate=True)

    how = dict(adaptive=False)
    fast = read(HASS(case.toy.folder, adapter=case.drafts[0], **how))
    same(fast.sequences, read(None).sequences)
    assert trees(fast) == trees(read(HASS(case.merged[0], **how)))


# --- refused, before any forward pass


@pytest.mark.parametrize(
    'what, message',
    dict(
        other='draft-0 is for another task adapter than that of the text: load the adapter that it was trained for',
        base='draft-0 is for a task adapter, but the text is decoded without one: ',
        twice='two draft adapters are for one task adapter: .*draft-0 and .*draft-0: give one of them',
        head='draft-0 was trained on another head: give the head that it was trained on',
        task='does not say which head and which task adapter it belongs to: ',
        number='adapter is 5: give the folder of a draft adapter, or a list of them',
        nothing='there is no adapter_config.json|has no adapter_config.json',
    ).items(),
)
def test_what_does_not_belong_is_refused(case, tmp_path, monkeypatch, what, message):
    draft = case.drafts[0]
    other = AdapterBank(case.model, [case.tasks[1]], ops.lora)
    task = toy_adapter(case.model, tmp_path / 'task')
    asked = dict(
        other=(case.toy.folder, draft, other),
        base=(case.toy.folder, draft, None),
        twice=(case.toy.folder, [draft, draft], case.bank),
        head=(case.merged[1], draft, case.bank),
        task=(case.toy.folder, task, case.bank),
        number=(case.toy.folder, 5, case.bank),
        nothing=(case.toy.folder, tmp_path / 'none', case.bank),
    )
    folder, adapter, bank = asked[what]
    monkeypatch.setattr(BatchRunner, 'prefill', None)
    with pytest.raises(DecodingError, match=message):
        run(case, HASS(folder, adapter=adapter), bank=bank)


@pytest.mark.parametrize(
    'rows, options, message',
    [
        ([0, 1], {}, '2 rows for 3 sequences: give the adapter of each'),
        ([0, 1, 2], {}, 'rows are .0, 1, 2., but the bank has 2 adapters: '),
        ([0, 1, 'a'], {}, 'rows are .*: give the place of each'),
        ([0, 1, -1], dict(bank=None), 'rows name adapters, but there is no bank: give a bank'),
    ],
)
def test_rows_that_do_not_fit(case, rows, options, message):
    with pytest.raises(DecodingError, match=message):
        run(case, rows=rows, **options)
