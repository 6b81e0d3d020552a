"Progress: what a listener hears, a log file that stays plain, a bar that leaves the output alone"

import io, os, pty, subprocess, sys, time
import pytest
from npu_lora_decoding.foundations import progress
from npu_lora_decoding.foundations.errors import DecodingError
from npu_lora_decoding.foundations.progress import (
    Bar,
    Lines,
    Stage,
    Status,
    compiling,
    is_watched,
    shown,
    track,
    watching,
)
from helpers.processes import environment


def stage(doing, done=0, total=None, first=0):
    made = Stage(doing, total, 'items', first=first)
    made.done = done
    return made


# --- what a listener hears


def test_a_listener_hears_each_stage_and_nobody_else_does():
    heard = []
    with watching(heard.append):
        assert is_watched()
        with Stage('loading'):
            assert list(track('ab', 'reading', 'letters')) == ['a', 'b']
    with Stage('later'):
        assert not is_watched()
    assert [str(s).split(', about')[0] for s in heard] == [
        'loading',
        'loading, reading 0 of 2 letters',
        'loading, reading 1 of 2 letters',
        'loading, reading 2 of 2 letters',
        '',
    ]


def test_a_status_is_as_it_was_then():
    heard = []
    with watching(heard.append):
        list(track(range(3), 'counting'))
    assert [s.stages[0].done for s in heard if s.stages] == [0, 1, 2, 3]


def test_parts_of_parts_make_one_share():
    inside = Status((stage('arms', 1, 4), stage('loading'), stage('items', 5, 10)), 60.0)
    assert inside.share == pytest.approx(1 / 4 + 1 / 4 / 2)
    assert inside.left == pytest.approx(60 * (1 - 0.375) / 0.375)
    assert Status((stage('loading'),), 60.0).left is None and Status().share is None
    assert Status((stage('items', 12, 10),)).share == 1  # more than was expected


def test_an_estimate_knows_what_was_done_before():
    "A run that continues at 600 of 1000 made 100 steps in 10 seconds: 300 more take 30"
    assert Status((stage('training', 700, 1000, first=600),), 10.0).left == pytest.approx(30)
    assert Status((stage('training', 600, 1000, first=600),), 10.0).left is None


def test_a_loop_that_is_left_or_fails_is_over():
    heard = []
    with watching(heard.append):
        for i in track(range(9), 'searching'):
            if i == 2:
                break
        with pytest.raises(KeyError), Stage('failing'):
            raise KeyError
        with Stage('next'):
            pass
    assert [str(s) for s in heard if 'next' in str(s)] == ['next']


def test_what_a_listener_raises_ends_the_work():
    def refuse(status):
        raise RuntimeError('enough')

    with pytest.raises(RuntimeError, match='enough'), watching(refuse):
        list(track(range(3), 'counting'))
    assert not is_watched()


def test_compiling_names_the_program():
    assert str(compiling(2, 3)) == 'compiling program 2 of 3'
    assert str(compiling(1, name='LM head')) == 'compiling program 1 (LM head)'


def test_a_notebook_shows_a_bar_only_where_nobody_listens(monkeypatch):
    made = []
    monkeypatch.setattr(progress, 'in_notebook', lambda: True)
    monkeypatch.setattr(progress, '_notebook_bar', lambda stage: made.append(stage.doing))
    list(track(range(2), 'here'))
    with watching(lambda status: None):
        list(track(range(2), 'there'))
    assert made == ['here']


# --- a log file


def drawn(show, moments):
    for now, stages in moments:
        show.draw(Status(tuple(stages)), now)
    return show.stream.getvalue()


def test_lines_are_few_and_the_first_comes_at_once():
    "An hour of work that reports every tenth of a second"
    moments = [(i / 10, [stage('answering', i, 36_000)]) for i in range(36_000)]
    written = drawn(Lines(io.StringIO(), 'nld'), moments).splitlines()
    assert written[0] == 'nld: answering 0 of 36,000 items' and 350 <= len(written) <= 361


def test_something_new_is_named_soon_and_the_same_once_a_minute():
    moments = [(i / 4, [stage('loading' if i < 4 else 'timing')]) for i in range(4 * 125)]
    assert drawn(Lines(io.StringIO(), 'nld'), moments) == 'nld: loading\n' + 3 * 'nld: timing\n'


def test_a_command_that_is_over_at_once_says_nothing():
    show = Lines(io.StringIO(), 'nld', wait=0.7)
    assert drawn(show, [(100.0, [stage('loading')]), (100.6, [stage('loading')])]) == ''
    assert drawn(show, [(100.8, [stage('loading')])]) == 'nld: loading\n'


def test_a_name_cannot_write_what_a_terminal_obeys():
    text = drawn(Lines(io.StringIO(), 'nld'), [(0.0, [stage('loading \x1b[2Jx\r\ny')])])
    assert text.count('\n') == 1 and '\x1b' not in text and '\r' not in text and '\\x1b[2Jx' in text


# --- a terminal


@pytest.mark.parametrize('width', [40, 80, 200])
def test_a_bar_fits_the_terminal(width):
    bar = Bar(io.StringIO(), 'nld compare')
    for stages in ([stage('x' * 300, 1, 3)], [stage('x' * 300)], [stage('timing', 1, 3)], [stage('字' * 100, 1, 3)]):
        line = bar.line(Status(tuple(stages), 9.0), 10.0, width)
        assert len(line) <= width and '\n' not in line
    assert '33%, 18 s left' in bar.line(Status((stage('timing', 1, 3),), 9.0), 10.0, width)


def test_a_bar_waits_until_a_line_of_text_is_finished():
    show = Bar(io.StringIO(), 'nld')
    show.at_start = False
    show.draw(Status((stage('answering'),)), 1.0)
    assert not show.is_drawn
    show.at_start = True
    show.draw(Status((stage('answering'),)), 2.0)
    assert show.is_drawn


WORK = '''
import sys, time
from npu_lora_decoding.foundations.progress import Stage, shown, track
with shown('nld work'):
    for i in track(range(3), 'counting', 'numbers'):
        print('out', i, flush=True)
        time.sleep(1.)
print('over', file=sys.stderr)
'''


def in_terminal(code, out_too=False, **more):
    "Run code with stderr (and stdout) on a terminal; return what the terminal shows, and what a pipe was given"
    ours, theirs = pty.openpty()
    env = environment(NLD_PROGRESS='', TERM='xterm', COLUMNS='80') | more
    out = theirs if out_too else subprocess.PIPE
    child = subprocess.Popen([sys.executable, '-c', code], stdout=out, stderr=theirs, env=env)
    os.close(theirs)
    shown_there = b''
    while True:
        try:
            more_there = os.read(ours, 2**16)
        except OSError:  # how Linux names the end of a terminal
            break
        if not more_there:
            break
        shown_there += more_there
    os.close(ours)
    piped = b'' if out_too else child.stdout.read()
    assert child.wait(60) == 0
    return shown_there.decode(), piped.decode()


def test_a_terminal_shows_a_bar_and_a_pipe_only_the_output():
    terminal, piped = in_terminal(WORK)
    assert piped == 'out 0\nout 1\nout 2\n'
    assert 'nld work: counting 0 of 3 numbers' in terminal and '█' in terminal and ' 33%' in terminal
    last = terminal.replace('\r\n', '\n').splitlines()[-1]
    assert last.split('\r')[-1] == 'over'  # nothing of the bar is left


def test_output_on_the_same_terminal_is_whole():
    terminal, _ = in_terminal(WORK, out_too=True)
    seen = [line.split('\r')[-1] for line in terminal.replace('\r\n', '\n').split('\n')]
    assert seen == ['out 0', 'out 1', 'out 2', 'over', ''] and '█' in terminal


@pytest.mark.parametrize('how', [dict(TERM='dumb'), dict(NLD_PROGRESS='lines')])
def test_a_simple_terminal_gets_lines(how):
    terminal, piped = in_terminal(WORK, **how)
    lines = terminal.split('\r\n')
    assert lines[0] == 'nld work: counting 0 of 3 numbers' and lines[-2:] == ['over', '']
    assert '\r' not in ''.join(lines) and '\x1b' not in terminal and piped == 'out 0\nout 1\nout 2\n'


@pytest.mark.parametrize('how', [dict(NLD_PROGRESS='none'), dict(RANK='1')])
def test_nothing_where_nothing_is_wanted(how):
    assert in_terminal(WORK, **how)[0] == 'over\r\n'


def test_an_unknown_way_is_refused(monkeypatch):
    monkeypatch.setenv('NLD_PROGRESS', 'loud')
    with pytest.raises(DecodingError, match="NLD_PROGRESS is 'loud': use one of none, lines, bar"), shown('nld'):
        pass


def test_the_work_goes_on_when_nobody_reads(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setenv('NLD_PROGRESS', 'lines')
    monkeypatch.setattr(sys, 'stderr', Closed())
    monkeypatch.setattr(progress.Lines, 'NEW', 0.0)
    with shown('nld'):
        time.sleep(0.8)
        assert list(track(range(3), 'counting')) == [0, 1, 2]
