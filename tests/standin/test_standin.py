"""A device called npu without an NPU: every way of decoding writes the CPU's tokens there, and host reads are counted

Nothing has run on an NPU. The stand-in has the CPU's kernels: it shows only that tensors lie where they should, and how
often the host waits.
"""

import json
import pytest
from helpers.processes import TESTS
from helpers.standin import run

WAYS = (
    'greedy',
    'cold',
    'cold, batch',
    'processors',
    'sampling, seed',
    'sampling, generator',
    'lookup',
    'lookup, adaptive',
    'hass',
    'hass, adaptive',
    'hass chain, cold',
    'hass, cold, seed',
    'joined, batch',
    'joined, batch, cold',
    'joined, batch, adaptive',
    'temp-lora',
    'temp-lora, cold, hass',
)


@pytest.fixture(scope='module')
def found():
    return json.loads(run(TESTS / 'standin' / 'ways.py'))


@pytest.fixture(scope='module')
def planted():
    return json.loads(run(TESTS / 'standin' / 'planted.py'))


def test_every_way_is_looked_at(found):
    assert tuple(found) == WAYS


@pytest.mark.parametrize('way', WAYS)
def test_the_tokens_are_those_of_the_cpu(found, way):
    assert found[way]['same'] and found[way]['passes'] > 3


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
