"""A device called npu without an NPU: every way of decoding writes the CPU's tokens there, and host reads are counted

Nothing has run on an NPU. The stand-in has the CPU's kernels: it shows only that tensors lie where they should, and how
often the host waits.
"""

import json
import pytest
from helpers.processes import TESTS
from helpers.standin import run

# Most host reads a forward pass; None: rules that read a text, or a draw at each level, look at values on their way
READS = {
    'greedy': 1,
    'cold': 1,
    'cold, batch': 3,  # two of them in transformers, which looks at the padding
    'processors': None,
    'sampling, seed': None,
    'sampling, generator': None,
    'lookup': 2,
    'lookup, adaptive': 3,
    'hass': 3,
    'hass, adaptive': 4,
    'hass chain, cold': 3,
    'hass, cold, seed': None,
    'joined, batch': 4,
    'joined, four, cold': 4,
    'joined, batch, adaptive': 6,
    'temp-lora': 1,
    'temp-lora, cold, hass': 3,
}
LEARNING = 'npu_lora_decoding/temp_lora/adapter.py'  # of an update, not of a forward pass
ONCE = 3  # reads that a text needs once, such as the padding of its prompt


@pytest.fixture(scope='module')
def found():
    return json.loads(run(TESTS / 'standin' / 'ways.py'))


@pytest.fixture(scope='module')
def planted():
    return json.loads(run(TESTS / 'standin' / 'planted.py'))


def test_every_way_is_looked_at(found):
    assert tuple(found) == tuple(READS)


@pytest.mark.parametrize('way', READS)
def test_the_tokens_are_those_of_the_cpu(found, way):
    assert found[way]['same'] and found[way]['passes'] > 3


@pytest.mark.parametrize('way', [way for way, most in READS.items() if most is not None])
def test_the_host_waits_no_more_than_so_often(found, way):
    "Waits for the clock of a drafter that measures itself are not among them"
    reads = {site: n for site, n in found[way]['reads'].items() if not site.startswith('synchronize')}
    reads = {site: n for site, n in reads.items() if LEARNING not in site}
    assert sum(reads.values()) <= READS[way] * found[way]['passes'] + ONCE, reads


@pytest.mark.parametrize('way', ['greedy', 'hass', 'joined, batch', 'temp-lora'])
def test_only_a_drafter_that_measures_itself_waits_for_a_clock(found, way):
    assert not any(site.startswith('synchronize') for site in found[way]['reads'])


def test_reads_by_the_host_are_counted(planted):
    assert min(planted['reads'].values()) >= 1, planted['reads']
    assert set(planted['silent'].values()) == {0}, planted['silent']


def test_tensors_of_two_devices_are_an_error(planted):
    assert 'generator' in planted['mixed'].pop('draw')
    assert all('two devices' in str(error) for error in planted['mixed'].values()), planted['mixed']


def test_a_generator_of_the_device_goes_on_from_its_seed(planted):
    once, again, first, second = planted['draws']
    assert once == again == first != second


def test_the_best_device_is_the_npu(planted):
    assert planted['device'] == 'npu'


def test_a_planted_read_is_counted_and_named(planted):
    loop = planted['loop']
    named = [count for site, count in loop['reads'].items() if site.startswith('item tests/standin/planted.py')]
    assert named == [loop['passes']]


def test_a_planted_tensor_of_the_cpu_is_an_error(planted):
    assert 'two devices' in planted['loop']['stray']
