"Let mypy know the methods that fastcore's `@patch` adds to a class of the same module"
from mypy.nodes import MDEF, CallExpr, Decorator, NameExpr, SymbolTableNode, Var
from mypy.plugin import Plugin
from mypy.types import AnyType, TypeOfAny, UnboundType

def is_patch(decorator):
    "Whether an expression is `patch` or `patch(...)`"
    if isinstance(decorator, CallExpr): decorator = decorator.callee
    return isinstance(decorator, NameExpr) and decorator.name == 'patch'

def patched(module, cls:str) -> list:
    "Return the names of the functions that `module` patches into the class `cls`"
    names = []
    for node in module.defs:
        if not isinstance(node, Decorator) or not any(map(is_patch, node.original_decorators)): continue
        owner = node.func.arguments[0].type_annotation
        if isinstance(owner, UnboundType) and owner.name == cls: names.append(node.func.name)
    return names

def add_patched(context):
    "Add an attribute for every patched method, so that a misspelt name is still an error"
    info = context.cls.info
    module = context.api.modules.get(info.module_name)
    if module is None: return
    for name in patched(module, info.name):
        if name in info.names: continue
        var = Var(name, AnyType(TypeOfAny.explicit))
        var.info = info
        var._fullname = f'{info.fullname}.{name}'
        info.names[name] = SymbolTableNode(MDEF, var, plugin_generated=True)

class PatchPlugin(Plugin):
    def get_customize_class_mro_hook(self, fullname): return add_patched

def plugin(version): return PatchPlugin
