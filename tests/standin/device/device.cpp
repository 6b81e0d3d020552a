// A stand-in for an NPU: tensors of a device called npu (torch's PrivateUse1) in host memory, with the CPU's kernels.
//
// It shows whether tensors lie where they should (an operator with tensors of two devices is an error), and how often the
// host waits for a value of the device: each such read calls `on_read` with the operator's name.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>
#include <set>

namespace {
constexpr auto NPU = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(NPU, 0);

bool on_npu(const at::Tensor& t) { return t.defined() && t.device().type() == NPU; }

// --- host reads

thread_local int inside = 0;  // copies of the fallback itself are not reads
struct Inside {
  Inside() { inside++; }
  ~Inside() { inside--; }
};

pybind11::function* reader = nullptr;  // never freed: the interpreter may be gone before this library is

void note_read(const std::string& op) {
  if (inside || reader == nullptr) return;
  pybind11::gil_scoped_acquire held;
  (*reader)(op);
}

// --- memory, streams, generators

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    return {p, p, &release, DEVICE};
  }
  static void release(void* p) { if (p) c10::free_cpu(p); }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(NPU, &memory);

// Everything is done when a call returns, so there is one stream, and an event has always happened
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = NPU;
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceType type() const override { return NPU; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream given) const override { return given; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(uint64_t seed = c10::detail::getNonDeterministicRandom()) : at::CPUGeneratorImpl(seed) {
    device_ = DEVICE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

void grow(const c10::Storage& storage, size_t n) {
  auto larger = memory.allocate(n);
  if (storage.data()) std::memcpy(larger.get(), storage.data(), std::min(storage.nbytes(), n));
  auto* impl = storage.unsafeGetStorageImpl();
  impl->set_data_ptr_noswap(std::move(larger));
  impl->set_nbytes(n);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto g = at::make_generator<Generator>();
    return g;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(at::kCPU); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override { grow(storage, n); }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// --- the few operators that a device must have of its own

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor as_host(const at::Tensor& t) {  // the same memory, as a tensor of the CPU
  if (!on_npu(t)) return t;
  auto* start = static_cast<char*>(t.storage().data_ptr().get());
  if (start) start += t.storage_offset() * t.element_size();
  auto seen = at::from_blob(start, t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
  return t.is_conj() ? seen.conj() : t.is_neg() ? seen._neg_view() : seen;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  at::NoGradGuard guard;
  if (on_npu(from) && !on_npu(to)) note_read("copy");
  if (to.numel()) as_host(to).copy_(as_host(from).expand(to.sizes()));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& t) {
  note_read("item");
  return as_host(t).item();
}

at::Tensor as_strided(
    const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto first = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), first);
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(t, size, stride, c10::SymInt(t.storage_offset()));
}

const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  size_t bytes = (t.storage_offset() + c10::multiply_integers(wanted)) * t.element_size();
  if (t.storage().nbytes() < bytes) grow(t.storage(), bytes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  return t;
}

at::Tensor& set_storage(at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}

at::Tensor& set_source(at::Tensor& t, at::Storage storage) {
  int64_t n = storage.nbytes() / t.element_size();
  return set_storage(t, std::move(storage), 0, {n}, {1});
}

// --- everything else: the CPU's kernels

// Their results have as many elements as a device has counted
const std::set<std::string> SIZED_BY_VALUES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::_unique", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::repeat_interleave"};

std::vector<at::Tensor> tensors_of(const c10::IValue& x) {
  std::vector<at::Tensor> found;
  if (x.isTensor()) found.push_back(x.toTensor());
  else if (x.isTensorList()) for (const at::Tensor& t : x.toTensorList()) found.push_back(t);
  else if (x.isOptionalTensorList())
    for (const auto& t : x.toOptionalTensorList()) if (std::optional<at::Tensor> given = t) found.push_back(*given);
  return found;
}

void check_devices(const std::string& name, const std::vector<at::Tensor>& tensors) {
  bool npu = false, cpu = false;
  for (auto& t : tensors) {
    if (on_npu(t)) npu = true;
    else if (t.defined() && t.dim() > 0) cpu = true;  // a single number of the CPU may stand beside any tensor
  }
  TORCH_CHECK(!(npu && cpu), "stand-in device: ", name, " got tensors of two devices");
}

bool is_sized_by_values(const std::string& name, const std::vector<at::Tensor>& tensors) {
  if (SIZED_BY_VALUES.count(name)) return true;
  if (name != "aten::index" && name != "aten::index_put_" && name != "aten::_index_put_impl_") return false;
  for (size_t i = 1; i < tensors.size(); i++) if (tensors[i].scalar_type() == at::kBool && on_npu(tensors[i])) return i;
  return false;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name().name;
  std::vector<at::Tensor> tensors;
  for (auto& x : torch::jit::last(*stack, op.schema().arguments().size()))
    for (auto& t : tensors_of(x)) tensors.push_back(t);
  check_devices(name, tensors);
  if (is_sized_by_values(name, tensors)) note_read(name.substr(6));
  at::Generator ours, twin;  // the CPU's kernels refuse a generator of another device: a twin draws
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    auto& x = (*stack)[i];
    if (!x.isGenerator()) continue;
    TORCH_CHECK(x.toGenerator().device().type() == NPU, "stand-in device: ", name, " got a generator of the CPU");
    ours = x.toGenerator();
    twin = at::detail::createCPUGenerator();
    twin.set_state(ours.get_state());
    x = twin;
  }
  Inside copies;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/false);
  if (ours.defined()) ours.set_state(twin.get_state());
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

PYBIND11_MODULE(npu_standin, m) {
  m.def("on_read", [](pybind11::function f) { reader = new pybind11::function(f); }, "Call a function at each host read");
}
