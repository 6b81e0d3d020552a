"""Count what makes code hard to read, and say where it is

    python tools/style.py                    the table: the package before, now and wanted, and every other kind of file
    python tools/style.py nbs/2_cold         the same counts of one folder, notebook or script
    python tools/style.py nbs/2_cold --list  every place: file, cell, line
    python tools/style.py nbs/2_cold --list --only long,words,dense
    python tools/style.py --shrink           write smaller counts to tools/style.json, which tests/test_style.py holds

Code lines are those with code on them: blank lines, comments and docstrings are none.
`--only` takes the names in brackets of the table, and `words`.
"""
import argparse
import ast
import io
import json
import re
import signal
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATCHET = ROOT/'tools'/'style.json'
# These quote the words and names that are gone
SELF = ('tools/style.py', 'tests/test_style.py', 'tests/test_front_door.py')
HARD = 140  # Characters that no line has more of
BUDGET = 120  # Characters that few lines have more of
MOST_ARGUMENTS = 6  # Positional ones in a call
MOST_LINES = 40  # Of code in a function
DENSE = 20  # Statements and expressions that begin on one line, to be listed

# What each measure is called in the table. Those of LIMITED have to be 0.
MEASURES = {
    'long': f'lines over {HARD} characters, comments and docstrings too',
    'semicolon': 'statements after `;`',
    'arguments': f'calls with {MOST_ARGUMENTS + 1} or more positional arguments',
    'function': f'functions over {MOST_LINES} code lines',
    'over_140': f'code lines over {HARD} characters, of 1,000',
    'over_120': f'code lines over {BUDGET} characters, of 1,000',
    'nodes': 'statements and expressions a code line',
    'tuple': 'assignments that unpack a literal tuple, %',
}
# Advice: counted and listed, not held
ADVICE = {
    'dense': f'lines on which over {DENSE} statements and expressions begin',
    'positional': 'calls with five or six positional arguments',
    'bool': 'calls with a bare True or False',
}
LIMITED = ['long', 'semicolon', 'arguments', 'function']
WANTED = dict(long=0, semicolon=0, arguments=0, function=0, over_140=0, over_120=10, nodes=6.7, tuple=5)

# Words of a private dialect, and what the field says instead (CONTRIBUTING.md, glossary)
GLOSSARY = {
    'guess': (r'guess(?:es|ed|ing|er|ers)?', 'draft, draft token, drafted'),
    'certain': (r'certain', 'committed, accepted'),
    'pass': (r'(?:an?|one|the|each|every|per|two|three|more|fewer|last|first|next|single|same|its|this|that|own|many|both) pass(?:es)?',
             'forward pass'),
    'dials': (r'dials?', 'alpha, beta'),
    'said, told, taught': (r'said|told|taught', 'answers, messages, targets'),
    'contestants': (r'contestants?', 'methods'),
    'anew': (r'anew', 'again'),
    'in sight': (r'in sight', 'in context'),
    'is no': (r'(?<!there )(?<!where )(?:is|are|was|were) no(?! (?:longer|more|other|better|less)\b)',
              'is not a, invalid, expected ... got ...'),
    'peer': (r'peers?', 'third party'),
    'favourite': (r'favou?rites?', 'top-1'),
    'what is written': (r'what is written', 'the output'),
}
WORDS = {word: re.compile(rf'\b(?:{pattern})\b', re.I) for word, (pattern, _) in GLOSSARY.items()}

# The package at commit 9d23502, measured with this file
BEFORE_COMMIT = '9d23502'
BEFORE = {
    'code_lines': 9176, 'long': 643, 'semicolon': 101, 'arguments': 46, 'function': 3, 'over_140': 67.7, 'over_120': 112.1,
    'nodes': 8.28, 'tuple': 18.1, 'dense': 983, 'positional': 116, 'bool': 22,
}
BEFORE_WORDS = {
    'guess': 181, 'certain': 31, 'pass': 65, 'dials': 14, 'said, told, taught': 63, 'contestants': 11, 'anew': 8, 'in sight': 9,
    'is no': 45, 'peer': 18, 'favourite': 4, 'what is written': 1,
}


# --- What is read

@dataclass
class Piece:
    "Some source that is parsed as a whole: a file, or one cell of a notebook"
    place:str  # How to name it to a reader
    source:str  # Its text
    is_code:bool=True  # Python, otherwise prose or shell
    is_exported:bool=False  # Whether the package holds it
    has_docs:bool=False  # Prose: its words count, its lines do not


def is_exported(source):
    "Return whether a notebook cell goes into the package"
    return bool(re.search(r'^#\| *exports?\b', source, re.M))


def without_magics(source):
    "Return a cell without what only IPython reads"
    if source.startswith('%%'):
        return ''
    return re.sub(r'^(\s*)[!%].*', r'\1pass', source, flags=re.M)


def cells_of(path):
    "Yield the pieces of a notebook"
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        place = f'{named(path)}#{cell["id"]}'
        if cell['cell_type'] == 'code':
            yield Piece(place, without_magics(source), is_exported=is_exported(source))
        else:
            yield Piece(place, source, is_code=False, has_docs=True)


def pieces_of(path):
    "Yield the pieces of any file"
    if path.suffix == '.ipynb':
        yield from cells_of(path)
    else:
        text = path.read_text(encoding='utf-8')
        yield Piece(named(path), text, is_code=path.suffix == '.py', has_docs=path.suffix == '.md')


def parsed(source, place='a cell'):
    "Return the syntax tree of Python source, which may await as notebooks do"
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return compile(source, place, 'exec', flags, dont_inherit=True)


def named(path):
    "Return a path as a reader of the checkout types it"
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def is_shell(path):
    "Return whether a file is a shell script"
    return path.suffix == '.sh' or (path.suffix == '' and path.read_bytes()[:2] == b'#!')


def files_under(path):
    "Return the files of a folder that are read here, or the file itself"
    if path.is_file():
        return [path]
    hidden = {'__pycache__', '_build', 'node_modules'}
    visible = [o for o in path.rglob('*') if o.is_file() and not any(p.startswith('.') or p in hidden for p in o.relative_to(path).parts)]
    return sorted(o for o in visible if o.suffix in ('.py', '.ipynb', '.md') or is_shell(o))


def groups(root=ROOT):
    "Return the files of each kind; the package itself is read from its notebooks"
    folders = {'tests': ['tests'], 'tools': ['tools', 'setup.py', 'setup.sh', '.ci'], 'kernels': ['kernels'],
               'results': ['results'], 'docs': ['docs', 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md']}
    found = {'notebooks': files_under(root/'nbs')}
    for name, paths in folders.items():
        found[name] = [f for path in paths if (root/path).exists() for f in files_under(root/path)]
    return found


# --- What is counted

@dataclass
class Counts:
    "Sums over pieces, and where each fault is"
    code_lines:int=0
    over_140:int=0
    over_120:int=0
    nodes:int=0
    assigned:int=0
    faults:Counter=field(default_factory=Counter)  # Of each measure
    words:Counter=field(default_factory=Counter)  # Of each (kind of text, word)
    places:list=field(default_factory=list)  # (measure or word, place, line, what)

    def fault(self, measure, place, line, what):
        "Note one fault"
        self.faults[measure] += 1
        self.places.append((measure, place, line, what))

    def add(self, other):
        "Add the sums of `other`"
        for name in ('code_lines', 'over_140', 'over_120', 'nodes', 'assigned', 'faults', 'words', 'places'):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def value(self, measure):
        "Return what the table says of a measure"
        if measure in LIMITED or measure in ADVICE:
            return self.faults[measure]
        lines = max(self.code_lines, 1)
        if measure == 'nodes':
            return round(self.nodes / lines, 2)
        if measure == 'tuple':
            return round(100 * self.faults['tuple'] / max(self.assigned, 1), 1)
        return round(1000 * getattr(self, measure) / lines, 1)


def docstrings(tree):
    "Return the docstring nodes of a parsed piece"
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return [o.value for o in firsts if isinstance(o, ast.Expr) and isinstance(o.value, ast.Constant) and isinstance(o.value.value, str)]


def tokens_of(source):
    "Return the tokens of Python source"
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def code_lines(tokens, docs):
    "Return the numbers of the lines with code on them"
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)}
    return lines - {n for o in docs for n in range(o.lineno, o.end_lineno + 1)}


def unpacks_a_literal(node):
    "Return whether an assignment gives the parts of one literal to several names"
    literal = (ast.Tuple, ast.List)
    return isinstance(node.value, literal) and any(isinstance(o, literal) for o in node.targets)


def count_call(counts, node, place):
    "Count what is wrong with the arguments of a call"
    positional = [o for o in node.args if not isinstance(o, ast.Starred)]
    shown = ast.unparse(node)[:100]
    if len(positional) > MOST_ARGUMENTS:
        counts.fault('arguments', place, node.lineno, shown)
    elif len(positional) > 4:
        counts.fault('positional', place, node.lineno, shown)
    if len(positional) > 1 and any(isinstance(o, ast.Constant) and isinstance(o.value, bool) for o in positional):
        counts.fault('bool', place, node.lineno, shown)


def count_tree(counts, tree, lines, place):
    "Count what the syntax tree shows"
    begun = Counter()
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr)):
            counts.nodes += 1
            begun[node.lineno] += 1
        if isinstance(node, ast.Assign):
            counts.assigned += 1
            if unpacks_a_literal(node):
                counts.fault('tuple', place, node.lineno, ast.unparse(node)[:100])
        elif isinstance(node, ast.Call):
            count_call(counts, node, place)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            if length > MOST_LINES:
                counts.fault('function', place, node.lineno, f'{node.name}: {length} lines')
    for line, n in begun.items():
        if n > DENSE:
            counts.fault('dense', place, line, f'{n} statements and expressions')


def count_semicolons(counts, tokens, place):
    "Count the statements that share a line with the one before"
    ends = (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER)
    for token, following in zip(tokens, tokens[1:]):
        if token.type == tokenize.OP and token.string == ';' and following.type not in ends:
            counts.fault('semicolon', place, token.start[0], token.line.strip()[:100])


def count_lines(counts, source, lines, place):
    "Count long lines: those with code for the rates, all of them for the limit"
    for number, line in enumerate(source.splitlines(), 1):
        counts.over_140 += len(line) > HARD and number in lines
        counts.over_120 += len(line) > BUDGET and number in lines
        if len(line) > HARD:
            counts.fault('long', place, number, f'{len(line)} characters: {line.strip()[:80]}')
        elif len(line) > BUDGET:
            counts.places.append(('over_120', place, number, f'{len(line)} characters: {line.strip()[:80]}'))


def names_in(tree):
    "Yield every name that is defined, as words, with its line"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno


def texts_of(tree, tokens, docs):
    "Yield every text of a piece of code: its kind, the text, its line"
    known = {id(o) for o in docs}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield ('docstrings' if id(node) in known else 'messages'), node.value, node.lineno
    for token in tokens:
        if token.type == tokenize.COMMENT and not token.string.startswith('#|'):
            yield 'docstrings', token.string, token.start[0]
    for name, line in names_in(tree):
        yield 'names', re.sub(r'_|(?<=[a-z])(?=[A-Z])', ' ', name), line


def count_words(counts, texts, place):
    "Count the words of the glossary's left column, but for the glossary itself"
    if place.startswith(SELF):
        return
    for kind, text, line in texts:
        for word, pattern in WORDS.items():
            for match in pattern.finditer(text):
                counts.words[kind, word] += 1
                around = text[max(match.start() - 40, 0):match.end() + 40].replace('\n', ' ')
                counts.places.append(('words', place, line + text[:match.start()].count('\n'), f'{word} ({kind}): ...{around}...'))


def measure(piece):
    "Return the counts of one piece"
    counts = Counts()
    if piece.is_code:
        tree = parsed(piece.source, piece.place)
        tokens = tokens_of(piece.source)
        docs = docstrings(tree)
        lines = code_lines(tokens, docs)
        counts.code_lines = len(lines)
        count_tree(counts, tree, lines, piece.place)
        count_semicolons(counts, tokens, piece.place)
        count_lines(counts, piece.source, lines, piece.place)
        count_words(counts, texts_of(tree, tokens, docs), piece.place)
    elif piece.has_docs:
        count_words(counts, [('prose', piece.source, 1)], piece.place)
    else:
        count_lines(counts, piece.source, set(), piece.place)
    return counts


def measure_files(files, keep=lambda piece: True):
    "Return the counts of many files together"
    total = Counts()
    for path in files:
        for piece in pieces_of(path):
            if keep(piece):
                total.add(measure(piece))
    return total


def count_stems(counts, files):
    "Count the words in the names of modules"
    for path in files:
        count_words(counts, [('names', re.sub(r'[_\d]+', ' ', path.stem).strip(), 1)], named(path))
    return counts


def measure_all(root=ROOT):
    "Return the counts of each kind of code: the package (exported cells), the rest of the notebooks, tests, tools, ..."
    files = groups(root)
    found = {'package': measure_files(files['notebooks'], lambda o: o.is_exported)}
    count_stems(found['package'], files['notebooks'])
    found['notebooks'] = measure_files(files.pop('notebooks'), lambda o: not o.is_exported)
    for name, members in files.items():
        found[name] = count_stems(measure_files(members), members)
    return found


# --- What is held

def totals(found):
    "Return what the ratchet holds: the faults, rates and words of each kind of code"
    return {name: {**{m: counts.value(m) for m in MEASURES}, 'words': word_counts(counts)} for name, counts in found.items()}


def word_counts(counts, kinds=('names', 'docstrings', 'messages')):
    "Return how often each word of the glossary stands in some kinds of text"
    return {word: sum(counts.words[kind, word] for kind in kinds) for word in GLOSSARY}


def allowed(measure_name, held):
    "Return what a measure may be: what is wanted, or what the ratchet still allows"
    return max(WANTED[measure_name], held)


def problems(found, held):
    "Return a sentence for everything above what the ratchet allows"
    none = {**dict.fromkeys(MEASURES, 0), 'words': {}}
    for name, counts in totals(found).items():
        was = held.get(name, none)
        for m in MEASURES:
            limit = allowed(m, was[m])
            if counts[m] > limit:
                yield f'{name}: {MEASURES[m]}: {counts[m]}, and at most {limit} are allowed: see python tools/style.py --list --only {m}'
        for word, n in counts['words'].items():
            if n > was['words'].get(word, 0):
                yield (f'{name}: "{word}" {n} times, and at most {was["words"].get(word, 0)} are allowed: '
                       f'write {GLOSSARY[word][1]} (python tools/style.py --list --only words)')


def shrunk(found, held):
    "Return the ratchet with every count that became smaller"
    new = totals(found)
    for name, counts in new.items():
        if was := held.get(name):
            counts.update({m: min(counts[m], was[m]) for m in MEASURES})
            counts['words'] = {word: min(n, was['words'].get(word, 0)) for word, n in counts['words'].items()}
        counts['words'] = {word: n for word, n in counts['words'].items() if n}
    return new


# --- What is shown

def rows(head, lines):
    "Return a Markdown table"
    bars = ['---'] + ['--:'] * (len(head) - 1)
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, bars, *lines])


def style_table(found):
    "Return the measures of each kind of code"
    head = ['code lines only', f'package at {BEFORE_COMMIT}', *(f'{name} now' for name in found), 'wanted']
    size = ['code lines', BEFORE.get('code_lines', ''), *(counts.code_lines for counts in found.values()), '']
    lines = []
    for m, text in (MEASURES | ADVICE).items():
        now = [counts.value(m) for counts in found.values()]
        lines.append([f'{text} (`{m}`)', BEFORE.get(m, ''), *now, WANTED.get(m, '')])
    return rows(head, [size, *lines])


def word_table(found):
    "Return how often each word of the glossary stands where"
    kinds = ('names', 'docstrings', 'messages')
    head = ['word', 'instead', f'package at {BEFORE_COMMIT}', *(f'{name} now' for name in found), 'prose now']
    prose = Counter()
    for counts in found.values():
        prose.update(word_counts(counts, ['prose']))
    lines = []
    for word, (_, instead) in GLOSSARY.items():
        now = [word_counts(counts, kinds)[word] for counts in found.values()]
        lines.append([word, instead, BEFORE_WORDS.get(word, ''), *now, prose[word]])
    return rows(head, lines)


def list_places(found, only):
    "Print every fault with its place"
    for counts in found.values():
        for measure_name, place, line, what in counts.places:
            if measure_name in only:
                print(f'{place}:{line}: {measure_name}: {what}')


def arguments(given=None):
    "Return the parsed command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='files or folders (default: everything)')
    parser.add_argument('--list', action='store_true', help='name every place')
    parser.add_argument('--only', default=','.join([*LIMITED, 'tuple', 'words']), help='what to list, by comma (default: %(default)s)')
    parser.add_argument('--shrink', action='store_true', help='write smaller counts to tools/style.json')
    return parser.parse_args(given)


def main(given=None):
    "Count and show"
    options = arguments(given)
    found = measure_all() if not options.paths else {}
    for path in options.paths:
        files = files_under(path.resolve())
        found[str(path)] = count_stems(measure_files(files), files)
    if options.list:
        list_places(found, options.only.split(','))
    if options.shrink:
        held = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
        RATCHET.write_text(json.dumps(shrunk(found, held), indent=1) + '\n')
    print(style_table(found), word_table(found), sep='\n\n')


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    main()
