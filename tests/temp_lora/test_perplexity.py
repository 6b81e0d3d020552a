"A book is scored before it is learned, and a run that is stopped anywhere goes on to the same bits"

import math, os, signal, subprocess, sys, textwrap
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings as examples, strategies as st
from npu_lora_decoding.foundations.adapters import load_adapter, toy_adapter
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.devices import generator
from npu_lora_decoding.temp_lora.perplexity import (
    Chunk,
    Progress,
    Reading,
    change,
    document_ids,
    read_document,
    read_text,
)
from npu_lora_decoding.temp_lora.generation import TempLoRA
from npu_lora_decoding.temp_lora.adapter import token_losses
from helpers.intervals import ERROR, N, SCORES, is_95
from helpers.processes import environment
from helpers.toys import toy_lm

S = TempLoRA(chunk=16, window=48, train_context=16, r=4, alpha=4.0, lr=3e-3)
TEXT = torch.randint(4, 76, (300,), generator=generator(0))
LM = toy_lm()


def scores(r):
    return [(c.start, c.stop, c.nll, c.tokens, c.version, c.first, repr(c.learn_loss)) for c in r.chunks]


@examples(max_examples=15)
@given(st.integers(49, 200), st.sampled_from(['chunk', 'window', 'every:2', 'drift:0.02']), st.integers(1, 32))
def test_every_token_is_predicted_once_before_it_is_learned(length, rule, context):
    r = read_document(LM, TEXT[:length], replace(S, recompute=rule, context=context))
    assert [c.start for c in r.chunks] == list(range(0, length, 16)) and r.chunks[-1].stop == length
    assert [math.isnan(c.learn_loss) for c in r.chunks] == [
        c.stop - c.start < 16 for c in r.chunks
    ]  # a rest is not learned
    assert (
        sum(c.tokens for c in r.chunks) == length - 1
        and [c.version for c in r.chunks] == list(range(len(r.chunks)))
        and r.finished
    )


def test_no_peeking():
    "What a chunk scores does not depend on anything after it"
    other = torch.cat([TEXT[:80], TEXT[200:]])
    a, b = (scores(read_document(LM, t, S)) for t in (TEXT, other))
    assert a[:5] == b[:5] and a[5] != b[5]  # the loss that chunk 4 is learned with included


def test_without_learning_it_is_the_base(tmp_path):
    lm = toy_lm()
    lm.adapter = load_adapter(toy_adapter(lm.model, tmp_path), lm.model)
    for model in (LM, lm):
        want = [c.nll for c in read_document(model, TEXT, replace(S, epochs=0)).chunks]
        got = [c.nll for c in read_document(model, TEXT, replace(S, lr=0.0)).chunks]
        torch.testing.assert_close(
            got, want, rtol=0 if model is LM else 1e-5, atol=0 if model is LM else 1e-4
        )  # joined ranks are summed in another order
    assert read_document(LM, TEXT[:33], replace(S, epochs=0, window=200)).perplexity() == pytest.approx(
        math.exp(token_losses(LM.model, TEXT[:32], TEXT[1:33]).mean()), rel=1e-4
    )


@pytest.mark.parametrize('rule', ['chunk', 'window', 'drift:0.02', 'slide:3'])
@pytest.mark.parametrize('epochs', [0, 2])
def test_stopped_by_ctrl_c_anywhere_and_continued(rule, epochs, tmp_path):
    s = replace(S, recompute=rule, context=16, epochs=epochs)
    file = tmp_path / 'state.safetensors'
    want = scores(read_document(LM, TEXT, s))

    def interrupt(r):
        if len(r.chunks) % 5 == 0:
            signal.raise_signal(signal.SIGINT)

    runs = []
    while len(runs) < 5 and not (runs and runs[-1].finished):
        runs.append(read_document(LM, TEXT, s, file, save_every=3, on_chunk=interrupt))
    assert len(runs) == 4 and scores(runs[-1]) == want and [f.name for f in tmp_path.iterdir()] == ['state.safetensors']


def test_an_error_in_the_middle_leaves_the_last_save(tmp_path):
    file = tmp_path / 'state.safetensors'

    def fail(r):
        if len(r.chunks) == 8:
            raise MemoryError

    with pytest.raises(MemoryError):
        read_document(LM, TEXT, S, file, save_every=3, on_chunk=fail)
    assert scores(read_document(LM, TEXT, S, file)) == scores(read_document(LM, TEXT, S))


@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    "A process that is killed without warning"
    code = textwrap.dedent(
        f'''
        import time, torch
        from helpers.processes import environment
from helpers.toys import toy_lm
        from npu_lora_decoding.temp_lora.generation import TempLoRA
        from npu_lora_decoding.temp_lora.perplexity import read_document
        torch.set_num_threads(1)
        def say(reading):
            print(len(reading.chunks), flush=True)
            time.sleep(.05)
        read_document(toy_lm(), torch.tensor({TEXT.tolist()}), {S!r}, {str(tmp_path/'state.safetensors')!r}, save_every=2, on_chunk=say)'''
    )
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=environment())
    for line in p.stdout:
        if int(line) >= 9:
            p.send_signal(signal.SIGKILL)
            break
    p.wait()
    r = read_document(LM, TEXT, S, tmp_path / 'state.safetensors')
    assert scores(r) == scores(read_document(LM, TEXT, S))


def test_a_text_that_grew_goes_on(tmp_path):
    file = tmp_path / 'state.safetensors'
    read_document(LM, TEXT[:150], S, file)
    assert scores(read_document(LM, TEXT, S, file)) == scores(read_document(LM, TEXT, S))
    file.unlink()
    read_document(LM, TEXT[:150], S, file)
    other = torch.cat([TEXT[:145], TEXT[:100]])  # changed where nothing was learned yet
    assert scores(read_document(LM, other, S, file)) == scores(read_document(LM, other, S))


def test_what_cannot_be_read(tmp_path):
    for args, what in (
        ((TEXT[:48], S), 'useless'),
        (('', S), 'empty'),
        ((TEXT, replace(S, window=4096)), 'smaller window'),
        ((TEXT, replace(S, train_context=4096)), 'train_context'),
        ((TEXT[None], S), 'expected the tokens of one document'),
        ((TEXT + 90, S), 'vocabulary'),
        ((TEXT, replace(S, recompute='x')), 'policy'),
        ((TEXT, replace(S, recompute='slide:32')), 'fewer sinks'),
    ):
        with pytest.raises(DecodingError, match=what):
            read_document(LM, *args)
    (tmp_path / 'book.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(DecodingError, match='not UTF-8'):
        read_text(tmp_path / 'book.txt')
    file = tmp_path / 'state.safetensors'
    read_document(LM, TEXT, S, file, stop_after=2)
    for other in (dict(window=64), dict(context=8), dict(recompute='chunk'), dict(epochs=1)):
        with pytest.raises(DecodingError, match='another|other settings'):
            read_document(LM, TEXT, replace(S, **other), file)
    with pytest.raises(DecodingError, match='another text'):
        read_document(LM, TEXT.flip(0), S, file)


def test_a_chunk_that_is_not_a_number_is_noted_and_read_over(monkeypatch):
    import npu_lora_decoding.temp_lora.adapter as t

    true = t.backward_chunk
    calls = []
    monkeypatch.setattr(
        t, 'backward_chunk', lambda *a: math.nan if calls.append(1) or len(calls) in (3, 8) else true(*a)
    )
    r = read_document(LM, TEXT, S)
    assert r.finished and len(r.notes) == 2 and r.chunks[-1].version == len(r.chunks) - 3
    assert all(math.isfinite(c.nll) for c in r.chunks)


def test_the_interval_of_a_change_is_that_of_95_percent():
    of = change((8 * (3 + 0.01 * SCORES)).tolist(), [24.0] * N, [8] * N)
    assert is_95(of.low, of.high, of.mean, ERROR)
