from .._moved import getattr_of

__getattr__ = getattr_of('temp_lora')
