"""The memory of the executed kernels: global memory that knows its tensors byte by byte, and on-chip memory that starts as NaN

Every load and store passes `touch`. On-chip addresses pass through. In global memory a shadow byte says which tensor a byte
belongs to (0: none) and whether it was read or written: so bytes moved are counted exactly, and an access outside of the
arguments is reported with its tensor and redirected to a sink instead of crashing the process.
"""

import ctypes
import mmap
import torch

FIELDS = 'chip chip_size used gm gm_size shadow read written read_once written_once bad bad_write sink'.split()
# A shadow byte: two flags and the tensor's number
READ = 128
WRITTEN = 64
TENSOR = 63
GAP = 4096  # bytes between tensors: an access that far outside still tells which one was meant


class STATE(ctypes.Structure):
    "What the compiled code and this file share"

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def _field(name, register):
    return f'  %{register} = getelementptr i64, ptr @state, i64 {FIELDS.index(name)}\n'


def _get(name):
    return _field(name, f'{name}.p') + f'  %{name} = load i64, ptr %{name}.p\n'


def _count(name, block, after):
    "Return IR that adds the access to counter `name`, and to `name`_once where the shadow's flag is new"
    flag = READ if name == 'read' else WRITTEN
    return f'''{block}:
{_get(name)}  %{name}.n = add i64 %{name}, %size
  store i64 %{name}.n, ptr %{name}.p
  %{block}.flag = and i8 %first, {flag - 256 if flag > 127 else flag}
  %{block}.seen = icmp ne i8 %{block}.flag, 0
  br i1 %{block}.seen, label %{after}, label %{block}.new
{block}.new:
{_get(name + '_once')}  %{name}_once.n = add i64 %{name}_once, %size
  store i64 %{name}_once.n, ptr %{name}_once.p
  %{block}.set = or i8 %first, {flag - 256 if flag > 127 else flag}
  store i8 %{block}.set, ptr %shadow.first
  br label %{after}
'''


TOUCH = f'''
@state = global [{len(FIELDS)} x i64] zeroinitializer
define internal ptr @touch(ptr %p, i64 %size, i1 %write) {{
  %a = ptrtoint ptr %p to i64
{_get('chip')}{_get('used')}  %chip.at = sub i64 %a, %chip
  %chip.in = icmp ult i64 %chip.at, %used
  br i1 %chip.in, label %fine, label %global
global:
{_get('gm')}{_get('gm_size')}  %gm.at = sub i64 %a, %gm
  %gm.in = icmp ult i64 %gm.at, %gm_size
  br i1 %gm.in, label %owned, label %illegal
owned:
{_get('shadow')}  %shadow.at = add i64 %shadow, %gm.at
  %shadow.first = inttoptr i64 %shadow.at to ptr
  %shadow.last = getelementptr i8, ptr %shadow.first, i64 %size
  %shadow.end = getelementptr i8, ptr %shadow.last, i64 -1
  %first = load i8, ptr %shadow.first
  %last = load i8, ptr %shadow.end
  %tensor = and i8 %first, {TENSOR}
  %tensor.end = and i8 %last, {TENSOR}
  %none = icmp eq i8 %tensor, 0
  %other = icmp ne i8 %tensor, %tensor.end
  %outside = or i1 %none, %other
  br i1 %outside, label %illegal, label %inside
inside:
  br i1 %write, label %count_write, label %count_read
{_count('read', 'count_read', 'fine')}{_count('written', 'count_write', 'fine')}illegal:
{_get('bad')}{_get('sink')}  %bad.none = icmp eq i64 %bad, 0
  br i1 %bad.none, label %illegal.first, label %illegal.go
illegal.first:
  store i64 %a, ptr %bad.p
{_field('bad_write', 'bad_write.p')}  %write.n = zext i1 %write to i64
  store i64 %write.n, ptr %bad_write.p
  br label %illegal.go
illegal.go:
  %sink.p2 = inttoptr i64 %sink to ptr
  ret ptr %sink.p2
fine:
  ret ptr %p
}}
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
define internal ptr @malloc(i64 %size) {{
{_get('chip')}{_get('used')}  %at = add i64 %chip, %used
  %end = add i64 %used, %size
  store i64 %end, ptr %used.p
  %p = inttoptr i64 %at to ptr
{_get('chip_size')}  %fits = icmp ule i64 %end, %chip_size
  br i1 %fits, label %poison, label %full
poison:
  call void @llvm.memset.p0.i64(ptr %p, i8 -1, i64 %size, i1 false)
  ret ptr %p
full:
  store i64 %chip_size, ptr %used.p
  ret ptr null
}}
'''


def _region(size):
    "Return (mapping, address) of `size` zero bytes that take no memory until they are touched"
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, 'MAP_NORESERVE', 0))
    return region, ctypes.addressof(ctypes.c_char.from_buffer(region))


def _span(x):
    "Return the bytes from the first to the last element of `x`"
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))) * x.element_size() if x.numel() else 0


class Memory:
    "Global and on-chip memory of one simulated device"

    def __init__(self, gm=1 << 30, chip=1 << 30):
        self.sizes = (gm, chip)
        self.regions = [_region(n) for n in (gm, gm, chip, 64)]
        self.gm, self.shadow, self.chip, self.sink = (address for _, address in self.regions)

    def place(self, tensors):
        "Copy the tensors' storages into global memory, mark the arguments' bytes as theirs, return an address for each tensor"
        storages = {}
        end = GAP
        for s in {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}.values():
            storages[s.data_ptr()] = end
            end = (end + s.nbytes() + 2 * GAP - 1) // GAP * GAP
            if end > self.sizes[0]:
                raise MemoryError(f'{end} bytes of tensors, global memory has {self.sizes[0]}')
            ctypes.memmove(self.gm + storages[s.data_ptr()], s.data_ptr(), s.nbytes())
        ctypes.memset(self.shadow, 0, end)
        self.end = end
        self.tensors = tensors
        self.starts = [
            storages[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size() for x in tensors
        ]
        for number, (x, start) in enumerate(zip(tensors, self.starts)):
            ctypes.memset(self.shadow + start, number % TENSOR + 1, _span(x))  # a number comes again only far away
        return [self.gm + start for start in self.starts]

    def write(self, address, numbers):
        "Put int64 `numbers` at `address`"
        ctypes.memmove(address, (ctypes.c_int64 * len(numbers))(*numbers), 8 * len(numbers))

    def fetch(self):
        "Copy the storages back into the tensors"
        for x, start in zip(self.tensors, self.starts):
            s = x.untyped_storage()
            ctypes.memmove(s.data_ptr(), self.gm + start - x.storage_offset() * x.element_size(), s.nbytes())

    def contents(self):
        "Return what lies in global memory"
        return ctypes.string_at(self.gm, self.end)

    def attach(self, state):
        "Let compiled code use this memory, all counters at zero"
        gm_size, chip_size = self.sizes
        places = dict(chip=self.chip, gm=self.gm, shadow=self.shadow, sink=self.sink)
        fields = dict.fromkeys(FIELDS, 0) | places | dict(chip_size=chip_size, gm_size=gm_size)
        for name, value in fields.items():
            setattr(state, name, value)
        ctypes.memset(self.sink, 255, 64)

    def where(self, address, names):
        "Return in words where an illegal `address` lies: near which tensor, and how far outside"
        at = address - self.gm
        if not 0 <= at < self.sizes[0]:
            return 'far outside of its arguments'
        ends = [start + _span(x) for x, start in zip(self.tensors, self.starts)]
        spans = zip(self.starts, ends, names)
        away, name = min((start - at if at < start else at - end + 1, n) for start, end, n in spans)
        side = 'before' if at < self.starts[names.index(name)] else 'behind'
        return f'{away} bytes {side} {name}'
