"A module's public names as a page: signature, docstring, and fastcore's docments as a table"
import ast
import inspect
import re
import textwrap
from dataclasses import is_dataclass
from inspect import Parameter
from fastcore.docments import docments
from notebook_markdown import fenced

STARS = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}
WIDTH = 100  # Characters of a signature on one line


def described(o):
    "Whether `o` has a signature of its own: a class or a function"
    return callable(o) and (inspect.isclass(o) or inspect.isfunction(inspect.unwrap(o)))


# --- Parameters

def our_classes(cls):
    "Return the classes of this library that give `cls` its parameters, the nearest first"
    def top(o):
        return o.__module__.partition('.')[0]

    ours = [c for c in cls.__mro__ if top(c) == top(cls)]
    if is_dataclass(cls):
        return ours
    return [c for c in ours if '__init__' in vars(c)]


def field_docs(cls):
    "Return the docments of a dataclass's fields, those of its base classes first"
    ours = our_classes(cls)
    found = {}
    for c in reversed(ours):
        for name, doc in docments(c, full=True, returns=False, args_kwargs=True).items():
            if doc.docment or name not in found:
                found[name] = doc
    fields = {name for c in ours for name in vars(c).get('__annotations__', {})}
    return {name: doc for name, doc in found.items() if name in fields}


def lines_of_parameters(f):
    "Return the source line of each parameter of a function"
    source = textwrap.dedent(inspect.getsource(f))
    args = ast.parse(source).body[0].args
    every = (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg)
    return {arg.arg: arg.lineno for arg in every if arg}


def function_docs(o):
    "Return the docments of a function's or constructor's parameters; a comment speaks for all parameters of its line"
    found = docments(o, full=True, returns=False, args_kwargs=True)
    line = lines_of_parameters(o.__init__ if inspect.isclass(o) else o)
    comments = {line[name]: doc.docment for name, doc in found.items() if name in line and doc.docment}
    for name, doc in found.items():
        doc.docment = doc.docment or comments.get(line.get(name))
    return found


def params(o):
    "Return fastcore's docments of what a caller of `o` gives, without what another library's base class asks for"
    if not inspect.isclass(o):
        found = function_docs(o)
    elif is_dataclass(o):
        found = field_docs(o)
    else:
        nearest = our_classes(o)[:1]
        found = function_docs(nearest[0]) if nearest else {}
    return {name: doc for name, doc in found.items() if name not in ('self', 'cls')}


def gaps_of(name, o):
    "Return what one public class or function leaves unsaid"
    if not (o.__doc__ or '').strip():
        yield f'{name} has no docstring'
    for parameter, doc in params(inspect.unwrap(o)).items():
        if not (doc.docment or '').strip():
            yield f'{name}: parameter {parameter} has no comment'


def undocumented(module):
    "Return what the public names of a module leave unsaid: a docstring, a parameter"
    found = []
    for name in module.__all__:
        o = getattr(module, name)
        if described(o):
            found += gaps_of(f'{module.__name__}.{name}', o)
    return found


# --- Their text

def brief(o, most=60):
    "Return a short text for a default or a value"
    if inspect.isfunction(o) or inspect.isclass(o):
        return o.__name__
    text = re.sub(r'<function (\S+) at 0x\w+>', r'\1', repr(o))
    return text if len(text) <= most else f'{type(o).__name__}(...)'


def type_of(doc):
    "Return the text of an annotation, without the names of modules"
    if doc.anno is Parameter.empty:
        return ''
    text = inspect.formatannotation(doc.anno)
    return re.sub(r'\b(?:\w+\.)+(?=\w)', '', text).strip("'")


def code(text):
    return f'`{text}`' if text else ''


def default_of(doc):
    return '' if doc.default is Parameter.empty else brief(doc.default)


def cell(text):
    "Return the text of a table's cell: outside of code a bar would end it"
    parts = re.split('(`[^`]*`)', text.replace('\n', ' '))
    parts[::2] = [part.replace('|', '\\|') for part in parts[::2]]
    return ''.join(parts)


def table(rows):
    "Return rows of cells, the heading first, as a table without its empty columns"
    columns = [column for column in zip(*rows) if any(column[1:])]
    if len(columns) < 2:
        return ''
    head, *body = zip(*columns)
    rule = ['---'] * len(head)
    return '\n'.join(f'| {" | ".join(map(cell, row))} |' for row in (head, rule, *body))


def parameter_table(found):
    "Return the docments of parameters as a table"
    rows = [('parameter', 'type', 'default', 'notes')]
    for name, doc in found.items():
        rows.append((code(name), code(type_of(doc)), code(default_of(doc)), doc.docment or ''))
    return table(rows)


def signature(name, found):
    "Return a call of `name` with its parameters and defaults, on one line where it fits"
    shown = []
    for parameter, doc in found.items():
        default = default_of(doc)
        shown.append(STARS.get(doc.kind, '') + parameter + (f'={default}' if default else ''))
    if len(str(shown)) < WIDTH:
        return f'{name}({", ".join(shown)})'
    inner = ',\n    '.join(shown)
    return f'{name}(\n    {inner},\n)'


def value_entry(name, o, head, source):
    "Return the entry of a value: its text, and the comment beside it in the source"
    comments = re.findall(rf'(?m)^{name}\s*=.*?  #\s*(.*)$', source)
    shown = fenced(f'{name} = {brief(o, 400)}', 'python')
    return '\n\n'.join([head, shown, *comments])


def methods(cls):
    "Return the documented public methods of a class, by name"
    found = {}
    for name, member in vars(cls).items():
        method = inspect.unwrap(getattr(member, '__func__', member))
        if name[0] != '_' and inspect.isfunction(method) and method.__doc__:
            found[name] = method
    return found


def returned(f):
    "Return a line on what a function returns, or ''"
    back = docments(f, full=True)['return']
    if not back or not (back.docment or type_of(back)):
        return ''
    kind = f'Returns {code(type_of(back))}'
    return f'{kind}: {back.docment}' if back.docment else kind


def entry(name, o, source, level=2):
    "Return the entry of a public name: signature, docstring, docment table; below a class its documented methods"
    head = f'{"#" * level} {name} {{ #{name} }}'
    if not described(o):
        return value_entry(name, o, head, source)
    f = inspect.unwrap(o)
    found = params(f)
    parts = [head, fenced(signature(name, found), 'python'), (o.__doc__ or '').strip()]
    if found:
        parts.append(parameter_table(found))
    if inspect.isclass(o):
        parts += [entry(f'{name}.{k}', method, source, level + 1) for k, method in methods(o).items()]
    else:
        parts.append(returned(f))
    return '\n\n'.join(filter(None, parts))


def module_md(module, lesson):
    "Return the page of a module: classes and functions in the order of the lesson, values last; `lesson` is a link to it"
    source = inspect.getsource(module)
    objects = {name: getattr(module, name) for name in module.__all__}
    names = sorted(objects, key=lambda name: not described(objects[name]))
    title = module.__name__.partition('.')[2]
    head = [f'# {title}', (module.__doc__ or '').strip(), f'`{module.__name__}`, exported by the lesson {lesson}.']
    entries = [entry(name, objects[name], source) for name in names]
    return '\n\n'.join([*filter(None, head), *entries]) + '\n'
