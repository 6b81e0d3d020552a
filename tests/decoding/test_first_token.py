"No prefill, and nothing else that reads the LM head, copies its weights: counted, for rows that lie apart and for frozen weights"

import pytest, torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from npu_lora_decoding.cold.expert import answer_loss, collate
from npu_lora_decoding.cold.rule import CoLD
from npu_lora_decoding.decoding import baseline, hf_bridge, runner
from npu_lora_decoding.decoding.baseline import folded, next_logits
from npu_lora_decoding.decoding.capabilities import PreparedRunner
from npu_lora_decoding.decoding.hf_bridge import NEUTRAL
from npu_lora_decoding.decoding.runner import BatchRunner, CompiledRunner
from npu_lora_decoding.decoding.tree import root_tree
from npu_lora_decoding.evaluation.lm_eval import unmasked_logits
from npu_lora_decoding.evaluation.methods import methods
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.hass.checkpoint import save_head
from npu_lora_decoding.hass.drafting import HeadCache, draft_chain, draft_tree
from npu_lora_decoding.hass.head import target_weights
from npu_lora_decoding.hass.ring_cache import Ring
from npu_lora_decoding.hass.training_step import train_step
from npu_lora_decoding.temp_lora.adapter import TempLoRAConfig, learn, temporary, token_losses
from helpers.copies import WeightCopies, of_model
from helpers.heads import begin, random_head
from helpers.toys import toy_folder, toy_lm

VOCAB = 512  # Rows of the LM head: many more than a text has tokens
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def lm(request, tmp_path):
    "A frozen toy with an adapter, as `load` returns a model"
    made = toy_lm(vocab=VOCAB)
    made.model.to(request.param)
    made.adapter = load_adapter(toy_adapter(made.model, tmp_path), made.model)
    made.folder = tmp_path
    return made


@pytest.fixture(params=[1, 2])
def batch(request):
    ids = torch.arange(3, 3 + 7 * request.param).view(request.param, 7)
    return ids, torch.ones_like(ids)


def copied(model, f):
    "Return the bytes of weights that `f` copies"
    with of_model(model) as counter:
        f()
    return counter.bytes


# --- Our runners


def prefill_of(kind, model, batch, **options):
    with torch.no_grad():
        made = kind(model, ('expert', 'base'), len(batch[0]), 64, **options)
        logits = made.prefill(*batch)
        return made, logits


@pytest.mark.parametrize('kind', [BatchRunner, CompiledRunner])
@pytest.mark.parametrize('keep_hidden', [False, True])
def test_prefill(lm, batch, kind, keep_hidden):
    assert copied(lm.model, lambda: prefill_of(kind, lm.model, batch, keep_hidden=keep_hidden)) == 0


@pytest.mark.parametrize('keep_hidden', [False, True])
def test_step(lm, batch, keep_hidden):
    made, _ = prefill_of(BatchRunner, lm.model, batch, keep_hidden=keep_hidden)
    with torch.no_grad():
        assert copied(lm.model, lambda: made.forward(root_tree(batch[0][:, -1]))) == 0


def prepared(model, batch):
    "Read prompts on inputs that the model prepares itself"
    ids, mask = batch
    cache = DynamicCache(config=model.config)
    inputs = dict(attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    with torch.no_grad():
        PreparedRunner(model, inputs).prefill(ids, mask)


def test_prepared_runner(lm, batch):
    assert copied(lm.model, lambda: prepared(lm.model, batch)) == 0


def test_naive_and_ring(lm, batch):
    assert copied(lm.model, lambda: next_logits(lm.model, *batch)) == 0
    ring = Ring(lm.model, 2, 32, [3, 4, 5])
    assert copied(lm.model, lambda: ring.forward(torch.tensor([5, 6]))) == 0


def test_no_time_is_spent_on_names_that_are_known(monkeypatch):
    "To search for the name nearest to each option took as long as the prefill"
    asked = []
    monkeypatch.setattr(hf_bridge.difflib, 'get_close_matches', lambda *args, **options: asked.append(args) or [])
    hf_bridge.check_names(dict(NEUTRAL, max_new_tokens=1, temperature=1.0))
    assert asked == []
    with pytest.raises(DecodingError, match="no option 'tmperature': see transformers' GenerationConfig"):
        hf_bridge.check_names(dict(tmperature=1.0))


# --- Every method of a comparison


@pytest.mark.parametrize('lm', DTYPES[:1], ids=str, indirect=True)
@pytest.mark.parametrize('name', [*methods(head='any', assistant='any')])
def test_methods(lm, batch, name, tmp_path):
    folder = save_head(random_head(lm), tmp_path / 'head', lm.model, lm.dtype)
    small = toy_folder(tmp_path / 'small', lm.model, lm.tokenizer)
    known = methods(CoLD(), head=str(folder), assistant=str(small))
    ids, mask = batch
    if known[name].single:
        batch = ids[:1], mask[:1]
    run = known[name].build(lm, lm.folder)
    counter = WeightCopies(*run.model.parameters(), *(run.assistant.parameters() if run.assistant else ()))
    run(*batch, 2)  # what is loaded at first is not a matter of the prefill
    with counter:
        run(*batch, 3)
    assert counter.bytes == 0


def test_harness(lm, batch):
    assert copied(lm.model, lambda: unmasked_logits(lm, CoLD(), batch[0])) == 0


# --- The draft head


@pytest.mark.parametrize('draft', [draft_chain, draft_tree])
def test_draft(lm, batch, draft):
    head = random_head(lm).to(lm.dtype)
    frozen = target_weights(lm.model)
    ids, _ = batch
    cache = HeadCache(len(ids), lm.device)
    features = torch.randn(*ids.shape, lm.model.config.hidden_size).to(lm.dtype)
    with WeightCopies(frozen.embed, frozen.lm_head, *head.parameters()) as counter:
        outputs = cache.extend(head, frozen.embed[ids], features)
        draft(head, cache, ids[:, -1], outputs, frozen.embed, frozen.lm_head)
    assert counter.bytes == 0


def test_head_training(tmp_path):
    run = begin(tmp_path)
    with WeightCopies(run.frozen.lm_head) as counter:
        train_step(run, 0)
    assert counter.bytes == 0


# --- Learning


def test_memory(lm):
    ids = torch.arange(3, 43)
    settings = TempLoRAConfig(chunk=16, window=48, train_context=8, epochs=1, r=4)
    with temporary(lm.model, settings, lm.adapter) as phi:
        with WeightCopies(lm.model.get_output_embeddings().weight) as counter:
            token_losses(lm.model, ids, ids[1:6])
            learn(phi, ids, 16)
    assert counter.bytes == 0


def test_answer_loss(lm):
    pairs = [(torch.arange(3, 9), torch.tensor([4, 5])), (torch.arange(3, 6), torch.tensor([7]))]
    assert copied(lm.model, lambda: answer_loss(lm.model, collate(pairs, 0))) == 0


# --- The counter itself, and the fold


def unfolded(monkeypatch):
    "Plant the bug that all of this is about"
    for module in (baseline, runner):
        monkeypatch.setattr(module, 'folded', lambda h: h)


def test_without_the_fold_the_head_is_copied(lm, batch, monkeypatch):
    unfolded(monkeypatch)
    weight = lm.model.get_output_embeddings().weight
    expected = len(batch[0]) * weight.numel() * weight.element_size()
    run = methods()['transformers_greedy'].build(lm, lm.folder)
    counted = dict(
        plain=copied(lm.model, lambda: prefill_of(BatchRunner, lm.model, batch)) / 2,  # of two roles
        hidden=copied(lm.model, lambda: prefill_of(BatchRunner, lm.model, batch, keep_hidden=True)) / 2,
        prepared=copied(lm.model, lambda: prepared(lm.model, batch)),
        third_party=copied(run.model, lambda: run(*batch, 1)),
    )
    assert counted == dict.fromkeys(counted, expected)


@pytest.mark.parametrize('lm', DTYPES[:1], ids=str, indirect=True)
def test_the_counter_counts_what_torch_allocates(lm, batch, monkeypatch):
    "In bf16 a batched product copies; the profiler sees the allocation of that many bytes"
    unfolded(monkeypatch)
    expected = copied(lm.model, lambda: next_logits(lm.model, *batch))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        next_logits(lm.model, *batch)
    assert expected == max(event.self_cpu_memory_usage for event in seen.events())


@pytest.mark.parametrize('b', [1, 2, 3])
@pytest.mark.parametrize('which', [slice(-1, None), slice(2, 5), slice(None)])
def test_folded(b, which):
    h = torch.randn(b, 7, 5)[:, which]
    fresh = torch.empty(h.shape)
    assert torch.equal(folded(h), h) and folded(h).stride() == fresh.stride()
    assert torch.equal(folded(h[0]), h[0])
