"Models in GGUF files: what is loaded is what was written, and what cannot be loaded is refused before work begins"

import shutil
import numpy as np
import pytest, torch
from gguf import GGUFWriter
from npu_lora_decoding.decoding.loop import load
from npu_lora_decoding.foundations import gguf
from npu_lora_decoding.foundations.adapters import toy_adapter, toy_model
from npu_lora_decoding.foundations.errors import DecodingError
from helpers.gguf import toy_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "An empty cache folder"
    monkeypatch.setenv('NLD_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def refused(name, match):
    with pytest.raises(DecodingError, match=match):
        load(name)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3'])
def test_a_file_loads_as_the_model_it_was_written_from(family, tmp_path):
    config = dict(head_dim=128) if family == 'qwen3' else {}  # transformers reads no other width of its heads
    model = toy_gguf(tmp_path / 'toy.gguf', family, splits='qwen2', **config)
    lm = load(tmp_path / 'toy.gguf')
    assert lm.name == 'toy' and lm.eos_ids == [2]
    ids = torch.arange(5, 25)[None]
    assert torch.equal(logits(lm.model, ids), logits(model, ids))
    again = load(tmp_path)
    first, second = (one.generate('the 12', max_new_tokens=5, chat=False) for one in (lm, again))
    assert first.text == second.text


def test_weights_of_sixteen_bits_stay_as_they_are(tmp_path):
    model = toy_gguf(tmp_path / 'toy.gguf', dtype=np.float16)
    lm = load(tmp_path / 'toy.gguf')
    for name, w in model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], w.half().float()), name


def test_it_is_converted_once(tmp_path, monkeypatch, cache):
    toy_gguf(tmp_path / 'toy.gguf')
    load(tmp_path / 'toy.gguf')
    write = gguf._write
    monkeypatch.setattr(gguf, '_write', lambda *_: pytest.fail('converted again'))
    load(tmp_path / 'toy.gguf')
    shutil.copy(tmp_path / 'toy.gguf', tmp_path / 'toy2.gguf')
    weights = next(cache.rglob('model.safetensors'))
    weights.write_bytes(weights.read_bytes()[:-9])
    made = []
    monkeypatch.setattr(gguf, '_write', lambda *a: made.append(a) or write(*a))
    load(tmp_path / 'toy.gguf')
    assert len(made) == 1, 'a copy that was cut short is made again'


def test_another_file_of_the_same_name_is_another_model(tmp_path):
    toy_gguf(tmp_path / 'toy.gguf', 'llama')
    first = load(tmp_path / 'toy.gguf')
    size = (tmp_path / 'toy.gguf').stat().st_size
    toy_gguf(tmp_path / 'toy.gguf', 'llama', seed=1)
    assert (tmp_path / 'toy.gguf').stat().st_size == size
    second = load(tmp_path / 'toy.gguf')
    name = 'model.layers.1.mlp.up_proj.weight'
    assert not torch.equal(second.model.state_dict()[name], first.model.state_dict()[name])


@pytest.mark.parametrize('splits, tokens', [
    ('smollm', ['ĠĠ', '1', '2']),
    ('gpt-2', ['Ġ', 'Ġ1', '2']),
    ('qwen2', ['Ġ', 'Ġ', '1', '2'])])
def test_text_is_split_by_the_rule_that_the_file_names(splits, tokens, tmp_path):
    toy_gguf(tmp_path / 'toy.gguf', splits=splits)
    assert load(tmp_path / 'toy.gguf').tokenizer.tokenize('  12') == tokens


def test_an_unknown_rule_is_refused_unless_the_tokenizer_lies_beside(tmp_path):
    toy_gguf(tmp_path / 'toy.gguf', splits='mystery')
    refused(tmp_path / 'toy.gguf', "splits text by the rule 'mystery', which is not known here: put the model's own")
    toy_gguf(tmp_path / 'known.gguf', splits='smollm')
    lm = load(tmp_path / 'known.gguf')
    lm.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path / 'toy.gguf').tokenizer.tokenize('  12') == ['ĠĠ', '1', '2']


def test_a_tokenizer_of_another_model_beside_the_file_is_refused(tmp_path):
    toy_gguf(tmp_path / 'toy.gguf')
    tokenizer = load(tmp_path / 'toy.gguf').tokenizer
    tokenizer.add_tokens(['another'])
    tokenizer.save_pretrained(tmp_path)
    toy_gguf(tmp_path / 'toy.gguf', 'qwen2')
    refused(tmp_path / 'toy.gguf', 'the tokenizer beside toy.gguf has other tokens than the file')


@pytest.mark.parametrize('share', [.02, .3, .9, .999])
def test_a_file_that_was_cut_short_is_refused(share, tmp_path, cache):
    whole = tmp_path / 'whole.gguf'
    toy_gguf(whole)
    cut = tmp_path / 'cut.gguf'
    cut.write_bytes(whole.read_bytes()[:int(whole.stat().st_size * share)])
    refused(cut, 'cut.gguf is not a whole GGUF file .*: copy or download it again')
    assert not list(cache.rglob('*.safetensors'))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / 'text.gguf').write_text('not a model at all')
    refused(tmp_path / 'text.gguf', 'text.gguf is not a whole GGUF file')
    (tmp_path / 'empty.gguf').write_bytes(b'')
    refused(tmp_path / 'empty.gguf', 'empty.gguf is not a whole GGUF file')


def test_a_file_without_weights_is_refused(tmp_path):
    writer = GGUFWriter(tmp_path / 'header.gguf', 'llama')
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / 'header.gguf', 'header.gguf holds no weights: give a file with a whole language model')


def test_an_unknown_family_is_refused(tmp_path):
    toy_gguf(tmp_path / 'toy.gguf', named='mystery')
    refused(tmp_path / 'toy.gguf', "family 'mystery', which transformers does not read from GGUF: give a folder")


def test_weights_that_do_not_fit_or_are_missing_are_refused(tmp_path, cache):
    toy_gguf(tmp_path / 'toy.gguf', 'qwen3')
    refused(tmp_path / 'toy.gguf', 'transformers cannot read the weights of toy.gguf .*: give a file with the whole model')
    toy_gguf(tmp_path / 'toy.gguf', without='model.layers.1.mlp.up_proj.weight')
    refused(tmp_path / 'toy.gguf', 'lacks weights of the model, first .*layers.1.mlp.up_proj')
    assert not list(cache.rglob('*.safetensors'))


def test_what_could_mean_several_files_is_refused(tmp_path):
    refused(tmp_path / 'none.gguf', "there is no file .*none.gguf")
    for name in ('a.gguf', 'b.gguf', 'c-00001-of-00002.gguf'):
        (tmp_path / name).write_bytes(b'GGUF')
    refused(tmp_path, 'holds 3 GGUF files, among them a.gguf and b.gguf: give the path of the one to load')
    refused(tmp_path / 'c-00001-of-00002.gguf', 'one part of a model that was split: join the parts')
    (tmp_path / 'folder.gguf').mkdir()
    refused(tmp_path / 'folder.gguf', 'is a folder: give the path of the GGUF file in it')


def test_too_little_disk_or_memory_is_named_before_the_work(tmp_path, monkeypatch, cache):
    toy_gguf(tmp_path / 'toy.gguf')
    monkeypatch.setattr(gguf, '_write', lambda *_: pytest.fail('began'))
    with monkeypatch.context() as m:
        m.setattr(gguf, '_disk_free', lambda folder: 1000)
        refused(tmp_path / 'toy.gguf', 'and .*cache has 0.0 GB free: free some, or set NLD_CACHE')
    with monkeypatch.context() as m:
        m.setattr(gguf, '_memory_free', lambda: 1000)
        refused(tmp_path / 'toy.gguf', 'of memory, and 0.0 GB are free: close other programs')
    assert not cache.exists() or not list(cache.rglob('*.safetensors'))


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch, cache):
    toy_gguf(tmp_path / 'toy.gguf')
    write = gguf._write

    def fills(file, header, folder):
        write(file, header, folder)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(gguf, '_write', fills)
    refused(tmp_path / 'toy.gguf', 'No space left on device.: make room')
    assert not list(cache.rglob('*.safetensors'))


def test_an_adapter_for_another_size_is_refused(tmp_path):
    toy_gguf(tmp_path / 'toy.gguf')
    adapter = toy_adapter(toy_model(hidden_size=32), tmp_path / 'adapter')
    with pytest.raises(DecodingError, match='mismatch'):
        load(tmp_path / 'toy.gguf', adapter)


def test_a_folder_with_other_weights_is_not_taken_for_a_gguf(tmp_path):
    (tmp_path / 'a.gguf').write_bytes(b'GGUF')
    (tmp_path / 'model.safetensors').write_bytes(b'')
    assert gguf.gguf_file(tmp_path) is None
    assert gguf.gguf_file(None) is None and gguf.gguf_file('') is None and gguf.gguf_file('org/model') is None
