"The notebooks are one book: Next leads through all of them, and none imports what stands later"

import json
import shutil
import pytest
import book

# How a planted `0_first/02_b` begins, and how it ends
B = ['#| default_exp first.b']
C = 'Next: `1_second/01_c`'


def write(path, *cells, metadata=dict(kernelspec=book.KERNELSPEC)):
    "Write a notebook of code cells, but for texts that begin with a hash and a space, or that say Next"
    kinds = ['markdown' if o.startswith('# ') or 'Next: ' in o else 'code' for o in cells]
    made = [dict(cell_type=kind, source=o, id=str(i), metadata={}) for i, (kind, o) in enumerate(zip(kinds, cells))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, metadata=metadata, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def small(tmp_path):
    "A book of three notebooks and a tutorial, in order"
    first = tmp_path / 'nbs' / '0_first'
    write(first / '01_a.ipynb', '#| default_exp first.a', '#| export\nx = 1', 'Next: `0_first/02_b`, more.')
    write(
        first / '02_b.ipynb', *B, '#| export\nfrom npu_lora_decoding.first.a import x', 'Limits. Next: `1_second/01_c`.'
    )
    last = tmp_path / 'nbs' / '1_second'
    write(last / '01_c.ipynb', '#| default_exp second.c', 'import npu_lora_decoding.first.b', 'Next: `tutorials/tour`.')
    write(tmp_path / 'nbs' / 'tutorials' / 'tour.ipynb', 'from npu_lora_decoding.second import c')
    return tmp_path


def test_the_book_is_in_order():
    assert book.problems() == []


def test_next_visits_every_numbered_notebook_once():
    chapters = book.book()
    assert book.walk(chapters) == [nb.name for nb in chapters]


def test_a_small_book_is_in_order(small):
    assert book.problems(small) == []
    assert book.walk(book.book(small)) == ['0_first/01_a', '0_first/02_b', '1_second/01_c']


@pytest.mark.parametrize(
    'cells, problem',
    [
        (
            [*B, '#| export\nfrom npu_lora_decoding.second.c import y', C],
            'imports second.c, which stands later, in 1_second/01_c',
        ),
        ([*B, 'def show():\n    from npu_lora_decoding.second import c', C], 'imports second.c, which stands later'),
        ([*B, '#| export\ndef f():\n    from npu_lora_decoding.first.a import x', C], 'a function hides'),
        ([*B, '# Nothing more'], 'its last section does not say where to go on'),
        ([*B, 'Next: `0_first/01_a`'], 'leads to `0_first/01_a`, expected `1_second/01_c`'),
        (['#| default_exp b', C], 'expected `#| default_exp first.b`'),
        ([*B, '# See `0_first/09_z`', C], 'refers to `0_first/09_z`'),
        ([*B, '# See `12e_pairs`', C], 'refers to `12e_pairs` without its chapter'),
    ],
)
def test_what_breaks_the_order_is_named(small, cells, problem):
    write(small / 'nbs' / '0_first' / '02_b.ipynb', *cells)
    found = book.problems(small)
    assert any(o.startswith(f'0_first/02_b: {problem}') for o in found), found


def test_a_number_left_out_is_named(small):
    write(small / 'nbs' / '1_second' / '03_d.ipynb', '#| default_exp second.d', 'Next: `tutorials/tour`')
    assert '1_second/03_d: expected number 02' in book.problems(small)


def test_a_reason_beside_a_hidden_import_lets_it_be(small):
    hidden = '#| export\ndef f():\n    # heavy\n    from npu_lora_decoding.first.a import x\n    import npu_lora_decoding.first.a  # heavy'
    write(small / 'nbs' / '0_first' / '02_b.ipynb', *B, hidden, C)
    assert book.problems(small) == []


def test_names_of_the_front_door_stand_where_they_are_made(small):
    (small / 'npu_lora_decoding').mkdir()
    (small / 'npu_lora_decoding' / '__init__.py').write_text("_NAMES = {'y': 'second.c'}")
    write(small / 'nbs' / '0_first' / '02_b.ipynb', *B, 'from npu_lora_decoding import y', C)
    assert any(o.startswith('0_first/02_b: imports second.c') for o in book.problems(small))


def test_kernels_are_given(small):
    write(small / 'nbs' / 'tutorials' / 'tour.ipynb', 'x = 1', metadata={})
    assert book.problems(small) == ['tutorials/tour: has no kernel: run python tools/book.py --kernelspec']
    book.set_kernels(small)
    assert book.problems(small) == []


def test_a_planted_notebook_of_this_book_fails_by_name(tmp_path):
    shutil.copytree(book.ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('.*'))
    path = tmp_path / 'nbs' / '2_cold' / '01_rule.ipynb'
    nb = json.loads(path.read_text())
    nb['cells'].insert(
        1, dict(cell_type='code', id='planted', metadata={}, source='from npu_lora_decoding.hass.losses import *')
    )
    path.write_text(json.dumps(nb))
    assert [o for o in book.problems(tmp_path) if 'planted' in o or o.startswith('2_cold/01_rule: imports hass.losses')]
