// A simulated CUDA device for a CPU-only build of torch: dispatch key, device guard, allocators, generators, streams,
// hooks, and a model of NCCL. Kernels run on the host over the same bytes, so values are real. It refuses what a real
// device refuses (mixed devices, wrong generators, too much memory) and records what makes the host wait.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <unordered_set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

namespace {

constexpr int kMaxDevices = 16;
int num_devices = 1;
thread_local DeviceIndex current = 0;
thread_local std::map<DeviceIndex, c10::StreamId> current_stream;
std::atomic<int64_t> next_stream{1};
std::atomic<bool> has_context[kMaxDevices];  // whether anything was allocated on a device

struct Usage { std::atomic<int64_t> now{0}, peak{0}, limit{-1}; } usage[kMaxDevices];
int64_t total_bytes = int64_t(80) << 30;  // the memory of every device

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

// Operators by name: those that check devices themselves, have no CUDA kernel, make the host wait. See install().
std::unordered_set<std::string> unchecked, cpu_only, waiting;

PyObject* recorder = nullptr;  // called with (kind, detail, bytes)
std::atomic<bool> recording{false};

void record_event(const std::string& kind, const std::string& detail, int64_t bytes = 0) {
  if (!recording.load() || !recorder) return;
  py::gil_scoped_acquire gil;
  try {
    py::reinterpret_borrow<py::function>(recorder)(kind, detail, bytes);
  } catch (py::error_already_set& error) {
    error.restore();
    PyErr_WriteUnraisable(recorder);
  }
}

// Copies that nobody has waited for. Data from the device reads as NaN on the host until something waits; data for the
// device must not change on the host until then.
struct PendingCopy { Tensor host, bytes; bool to_host; };
std::vector<PendingCopy> pending;
std::mutex pending_lock;
constexpr size_t kMaxPending = 64;

void finish_copies() {
  std::vector<PendingCopy> now;
  {
    std::lock_guard<std::mutex> lock(pending_lock);
    now.swap(pending);
  }
  for (auto& one : now) {
    if (one.to_host) memcpy(one.host.data_ptr(), one.bytes.data_ptr(), one.bytes.nbytes());
    else if (memcmp(one.host.data_ptr(), one.bytes.data_ptr(), one.bytes.nbytes()) != 0)
      record_event("race", "changed on the host before it was sent", one.bytes.nbytes());
  }
}

void record_wait(const std::string& detail, int64_t bytes = 0, const char* kind = "wait") {
  finish_copies();
  record_event(kind, detail, bytes);
}

DeviceIndex resolve(DeviceIndex index) { return index < 0 ? current : index; }

// ------------------------------------------------------------------ guard

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device d) const override {
    Device old(static_type, current);
    setDevice(d);
    return old;
  }
  Device getDevice() const override { return Device(static_type, current); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() >= 0 && d.index() < num_devices, "CUDA error: invalid device ordinal ", int(d.index()));
    current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  Stream getStream(Device d) const noexcept override {
    auto index = resolve(d.index());
    auto found = current_stream.find(index);
    return Stream(Stream::UNSAFE, Device(static_type, index), found == current_stream.end() ? 0 : found->second);
  }
  Stream getDefaultStream(Device d) const override {
    return Stream(Stream::DEFAULT, Device(static_type, resolve(d.index())));
  }
  Stream getNewStream(Device d, int = 0) const override {
    return Stream(Stream::UNSAFE, Device(static_type, resolve(d.index())), next_stream++);
  }
  Stream getStreamFromGlobalPool(Device d, bool = false) const override { return getNewStream(d); }
  Stream exchangeStream(Stream s) const noexcept override {
    auto old = getStream(s.device());
    current_stream[s.device_index()] = s.id();
    return old;
  }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(num_devices); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<int*>(event); }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new int(0);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { record_wait("stream.synchronize"); }
  void synchronizeEvent(void*) const override { record_wait("event.synchronize", 0, "event"); }
  void synchronizeDevice(const DeviceIndex) const override { record_wait("synchronize"); }
  void* getStreamNativeHandle(const Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ------------------------------------------------------------------ memory

int64_t rounded(size_t bytes) { return (int64_t(bytes) + 511) / 512 * 512; }

void take_memory(DeviceIndex device, size_t bytes) {
  auto& use = usage[device];
  has_context[device] = true;
  auto now = use.now += rounded(bytes);
  const int64_t limit = use.limit, most = limit < 0 ? total_bytes : std::min(limit, total_bytes);
  if (now > most) {
    use.now -= rounded(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ",
                     int(device), " is simulated; ", now, " of ", most, " bytes would be in use.");
  }
  auto peak = use.peak.load();
  while (now > peak && !use.peak.compare_exchange_weak(peak, now)) {}
}

struct Block { void* data; size_t bytes; DeviceIndex device; };
void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  memset(block->data, 0xff, block->bytes);  // a later read gives NaN
  usage[block->device].now -= rounded(block->bytes);
  ::free(block->data);
  delete block;
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    Device device(c10::kCUDA, current);
    if (!bytes) return {nullptr, nullptr, &free_nothing, device};
    take_memory(current, bytes);
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 512, rounded(bytes)) == 0, "no host memory");
    memset(data, 0xff, bytes);  // uninitialised memory reads as NaN
    return {data, new Block{data, bytes, current}, &free_block, device};
  }
  static void free_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override { record_event("wait", "empty_cache"); }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex d) override { usage[d].peak = usage[d].now.load(); }
} device_memory;

void free_pinned(void* context) {
  {
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned.erase(static_cast<const char*>(context));
  }
  ::free(context);
}

struct PinnedMemory final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &none, c10::kCPU};
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 512, rounded(bytes)) == 0, "no host memory");
    memset(data, 0xff, bytes);
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &free_pinned, c10::kCPU};
  }
  static void none(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  auto p = static_cast<const char*>(data);
  auto next = pinned.upper_bound(p);
  if (next == pinned.begin()) return false;
  auto found = std::prev(next);
  return p < found->first + found->second;
}

// ------------------------------------------------------------------ generators

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) {
    device_ = Device(c10::kCUDA, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
  static c10::DeviceType device_type() { return c10::kCUDA; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }

 private:
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device_.index());
    copy->set_state(*get_state());
    return copy;
  }
};

at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < kMaxDevices; ++i) made.push_back(at::make_generator<DeviceGenerator>(DeviceIndex(i)));
    return made;
  }();
  return all.at(resolve(index));
}

// ------------------------------------------------------------------ hooks

std::atomic<bool> is_installed{false};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return is_installed; }
  bool hasCUDA() const override { return is_installed; }
  bool hasCUDART() const override { return false; }
  bool hasPrimaryContext(DeviceIndex index) const override { return has_context[resolve(index)]; }
  DeviceIndex deviceCount() const override { return is_installed ? DeviceIndex(num_devices) : 0; }
  int getNumGPUs() const override { return deviceCount(); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex d) const override { Guard().setDevice(Device(c10::kCUDA, d)); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override {
    return Guard().exchangeDevice(Device(c10::kCUDA, d)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  Device getDeviceFromPtr(void*) const override { return Device(c10::kCUDA, current); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(resolve(index));
  }
  void deviceSynchronize(DeviceIndex) const override { record_wait("synchronize"); }
};

}  // namespace

namespace at {
using SimulatedHooks = Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, SimulatedHooks)
}  // namespace at

namespace {

// ------------------------------------------------------------------ operators

struct HostBlock { c10::Storage storage; size_t bytes; DeviceIndex device; };
void free_host_block(void* context) {
  auto* kept = static_cast<HostBlock*>(context);
  usage[kept->device].now -= rounded(kept->bytes);
  delete kept;
}

// Shows the tensors of one operator as CPU tensors over the same bytes, and its results as CUDA tensors.
struct HostViews {
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;
  std::unordered_map<c10::StorageImpl*, c10::Storage> back;  // from a CPU storage to the device's
  std::vector<std::pair<Tensor, Tensor>> pairs;              // the view, and the tensor that it shows

  Tensor to_host(const Tensor& t) {
    for (auto& [view, mine] : pairs)
      if (mine.is_same(t)) return view;
    auto* impl = t.storage().unsafeGetStorageImpl();
    auto found = storages.find(impl);
    if (found == storages.end()) {
      c10::Storage cpu(c10::Storage::use_byte_size_t(), impl->nbytes(),
                       c10::DataPtr(impl->mutable_data(), c10::kCPU), c10::GetCPUAllocator(), true);
      found = storages.emplace(impl, cpu).first;
      back.emplace(cpu.unsafeGetStorageImpl(), t.storage());
    }
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    pairs.emplace_back(view, t);
    return view;
  }

  Tensor to_device(const Tensor& cpu, Device device) {
    if (!cpu.defined()) return cpu;
    for (auto& [view, mine] : pairs)
      if (view.is_same(cpu)) return mine;
    auto* impl = cpu.storage().unsafeGetStorageImpl();
    auto found = back.find(impl);
    if (found == back.end()) {
      take_memory(device.index(), impl->nbytes());
      auto* kept = new HostBlock{cpu.storage(), impl->nbytes(), device.index()};
      c10::Storage mine(c10::Storage::use_byte_size_t(), impl->nbytes(),
                        c10::DataPtr(impl->mutable_data(), kept, &free_host_block, device), &device_memory, true);
      found = back.emplace(impl, mine).first;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CUDA), cpu.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    return made;
  }

  void resize_outputs() {  // out tensors that the kernel gave another size
    for (auto& [view, mine] : pairs) {
      auto* cpu = view.storage().unsafeGetStorageImpl();
      if (view.sizes() == mine.sizes() && view.strides() == mine.strides() &&
          view.data_ptr() == mine.data_ptr())
        continue;
      auto* impl = mine.unsafeGetTensorImpl();
      impl->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
      c10::OptionalDeviceGuard guard(mine.device());
      if (cpu->nbytes() > mine.storage().nbytes()) at::native::maybe_resize_storage_cpu(impl, cpu->nbytes());
      if (cpu->data() != mine.storage().data()) memcpy(mine.storage().mutable_data(), cpu->data(), cpu->nbytes());
    }
  }
};

// Lends the device's generator to an operator that draws from the default one.
struct LentGenerator {
  at::Generator mine, cpu, kept;
  explicit LentGenerator(DeviceIndex index) : mine(default_generator(index)), cpu(at::detail::getDefaultCPUGenerator()) {
    kept = cpu.clone();
    cpu.set_state(at::Tensor(mine.unsafeGetGeneratorImpl()->get_state()));
  }
  ~LentGenerator() {
    mine.set_state(at::Tensor(cpu.unsafeGetGeneratorImpl()->get_state()));
    cpu.set_state(at::Tensor(kept.unsafeGetGeneratorImpl()->get_state()));
  }
};

bool draws(const std::string& name) {
  static const std::unordered_set<std::string> some = {
      "aten::native_dropout", "aten::_fused_dropout", "aten::rrelu_with_noise", "aten::multinomial",
      "aten::_scaled_dot_product_flash_attention_for_cpu"};
  return some.count(name) > 0;
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const std::string full = schema.overload_name().empty() ? name : name + "." + schema.overload_name();
  TORCH_CHECK_NOT_IMPLEMENTED(!cpu_only.count(full), "Could not run '", full,
                              "' with arguments from the 'CUDA' backend: it has a kernel for the CPU only");
  const auto num_args = schema.arguments().size();
  const auto begin = stack->size() - num_args;
  const bool is_unchecked = unchecked.count(full) > 0;
  const bool is_foreach = name.rfind("aten::_foreach", 0) == 0;
  const bool takes_indices = name == "aten::_index_put_impl_" || name == "aten::index_put_" || name == "aten::index";
  std::optional<Device> device;
  std::string on_host;
  auto see = [&](const Tensor& t, const std::string& arg, bool in_list) {
    if (!t.defined()) return;
    if (t.is_cuda()) {
      if (device && *device != t.device())
        TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", arg, " is on ", t.device(),
                    ", different from other tensors on ", *device, " (when checking argument in method wrapper_CUDA_",
                    full.substr(6), ")");
      device = t.device();
    } else if (t.device().is_cpu()) {
      if (is_unchecked && t.dim() == 0 && (!in_list || is_foreach)) return;
      if (takes_indices && in_list) { record_event("send", full + ": index from the host", t.nbytes()); return; }
      on_host = arg;
    }
  };
  for (size_t i = 0; i < num_args; ++i) {
    const auto& value = (*stack)[begin + i];
    const auto& arg = schema.arguments()[i].name();
    if (value.isTensor()) see(value.toTensor(), arg, false);
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) see(t, arg, true);
    else if (value.isOptionalTensorList())
      for (const auto& t : value.toOptionalTensorVector()) { if (t) see(*t, arg, true); }
    else if (value.isDevice() && !device) device = value.toDevice();
  }
  if (!device) device = Device(c10::kCUDA, current);
  if (device->is_cuda() && !device->has_index()) device = Device(c10::kCUDA, current);
  if (!on_host.empty())
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", on_host,
                " is on cpu, different from other tensors on ", *device,
                " (when checking argument in method wrapper_CUDA_", full.substr(6), ")");
  if (waiting.count(full)) record_wait(full);
  if (name.rfind("aten::_fused_adam", 0) == 0) {  // CUDA's kernels need one layout for all four
    std::vector<std::vector<Tensor>> lists;
    for (size_t i = 0; i < 4; ++i) lists.push_back((*stack)[begin + i].toTensorVector());
    for (size_t i = 1; i < 4; ++i)
      for (size_t j = 0; j < lists[0].size(); ++j) {
        const auto &one = lists[0][j], &other = lists[i][j];
        bool same = one.sizes() == other.sizes() && one.dtype() == other.dtype();
        for (int64_t d = 0; same && d < one.dim(); ++d) same = one.size(d) == 1 || one.stride(d) == other.stride(d);
        TORCH_CHECK(same, "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout");
      }
  }

  HostViews views;
  std::vector<std::pair<at::Generator, at::Generator>> lent;
  for (size_t i = 0; i < num_args; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      if (value.toTensor().defined() && value.toTensor().is_cuda()) value = views.to_host(value.toTensor());
    } else if (value.isTensorList()) {
      auto all = value.toTensorVector();
      for (auto& t : all)
        if (t.defined() && t.is_cuda()) t = views.to_host(t);
      value = c10::IValue(c10::List<Tensor>(all));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const auto& t : value.toOptionalTensorVector()) {
        if (t && t->defined() && t->is_cuda()) all.push_back(views.to_host(*t));
        else all.push_back(t);
      }
      value = c10::IValue(all);
    } else if (value.isDevice()) {
      if (value.toDevice().is_cuda()) value = Device(c10::kCPU);
    } else if (value.isGenerator()) {
      auto mine = value.toGenerator();
      TORCH_CHECK(mine.device().type() == c10::kCUDA,
                  "Expected a 'cuda' device type for generator but found 'cpu' (", full, ")");
      auto cpu = at::detail::createCPUGenerator();
      cpu.set_state(at::Tensor(mine.unsafeGetGeneratorImpl()->get_state()));
      lent.emplace_back(mine, cpu);
      value = cpu;
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      auto mine = default_generator(device->index());
      auto cpu = at::detail::createCPUGenerator();
      cpu.set_state(at::Tensor(mine.unsafeGetGeneratorImpl()->get_state()));
      lent.emplace_back(mine, cpu);
      value = cpu;
    }
  }
  {
    std::optional<LentGenerator> drawn;
    if (draws(full)) drawn.emplace(device->index());
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (auto& [mine, cpu] : lent) mine.set_state(at::Tensor(cpu.unsafeGetGeneratorImpl()->get_state()));
  views.resize_outputs();
  const auto num_returns = schema.returns().size();
  const auto from = stack->size() - num_returns;
  for (size_t i = 0; i < num_returns; ++i) {
    auto& value = (*stack)[from + i];
    if (value.isTensor()) value = views.to_device(value.toTensor(), *device);
    else if (value.isTensorList()) {
      auto all = value.toTensorVector();
      for (auto& t : all) t = views.to_device(t, *device);
      value = c10::IValue(c10::List<Tensor>(all));
    }
  }
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  Device place(c10::kCUDA, device ? resolve(device->index()) : current);
  c10::OptionalDeviceGuard guard(place);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  Device place(c10::kCUDA, device ? resolve(device->index()) : current);
  c10::OptionalDeviceGuard guard(place);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(self.device());
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& copy(Tensor& self, const Tensor& src, bool non_blocking) {
  if (!self.defined() || !src.defined() || self.is_same(src)) return self;
  const auto bytes = int64_t(src.nbytes());
  bool later = false, kept = false;
  if (self.is_cuda() && src.device().is_cpu() && src.numel()) {
    const bool locked = is_pinned(src.const_data_ptr());
    // A change of type or layout happens on the host first, in memory that is not page-locked.
    const bool changed = src.dtype() != self.dtype() || !src.is_contiguous();
    if (!non_blocking) record_wait("host to GPU, waited for", bytes, "send");
    else if (!locked || changed) record_event("send pageable", "host to GPU, from pageable memory", bytes);
    else { record_event("send pinned", "host to GPU, not waited for", bytes); kept = src.is_contiguous(); }
  } else if (self.device().is_cpu() && src.is_cuda() && src.numel()) {
    const bool locked = is_pinned(self.const_data_ptr());
    if (!non_blocking || !locked) record_wait("GPU to host", bytes);
    else record_event("fetch pinned", "GPU to host, not waited for", bytes);
    later = non_blocking && locked && self.is_contiguous();
  }
  HostViews views;
  Tensor to = self.is_cuda() ? views.to_host(self) : self, from = src.is_cuda() ? views.to_host(src) : src;
  at::AutoDispatchBelowADInplaceOrView below;
  if (later) {
    Tensor bytes_there = at::empty_like(to, at::MemoryFormat::Contiguous);
    bytes_there.copy_(from);
    memset(to.data_ptr(), 0xff, to.nbytes());
    std::lock_guard<std::mutex> lock(pending_lock);
    pending.push_back({to.detach(), bytes_there, true});
    return self;
  }
  to.copy_(from);
  if (kept) {
    std::unique_lock<std::mutex> lock(pending_lock);
    pending.push_back({from.detach(), from.detach().clone(), false});
    if (pending.size() > kMaxPending) {  // a real device would have caught up
      lock.unlock();
      finish_copies();
    }
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device \"",
              self.device(), "\" to a storage on different device \"", source.device(), "\"");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  impl->set_storage_offset(offset.expect_int());
  at::native::resize_impl_cpu_(
      impl, sizes, strides.empty() && !sizes.empty() ? std::nullopt : std::optional<at::IntArrayRef>(strides));
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  int64_t count = int64_t(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, c10::SymIntArrayRef({c10::SymInt(count)}), {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  if (self.is_same(source)) return self;
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_nothing(Tensor& self) {
  at::Storage fresh(c10::Storage::use_byte_size_t(), 0, &device_memory, true);
  return set_storage(self, fresh, 0, c10::SymIntArrayRef({c10::SymInt(0)}), {});
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("copy_", &copy);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("record_stream", &record_stream);
  // Composite operators that would decompose without a kernel of their own.
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm", "native_layer_norm",
                           "native_layer_norm_backward", "native_group_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace

namespace {

// ------------------------------------------------------------------ NCCL

struct FinishedWork : c10d::Work {
  explicit FinishedWork(std::vector<Tensor> tensors, c10d::OpType type) : c10d::Work(0, type) {
    std::vector<Device> devices;
    for (const auto& t : tensors)
      if (std::find(devices.begin(), devices.end(), t.device()) == devices.end()) devices.push_back(t.device());
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
    future_->markCompleted(c10::IValue(tensors));
    tensors_ = std::move(tensors);
    finish();
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  std::vector<Tensor> result() override { return tensors_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  std::vector<Tensor> tensors_;
};

Tensor host_view(const Tensor& t) {  // the same bytes as a CPU tensor; must not outlive t
  if (t.device().is_cpu()) return t;
  TORCH_CHECK(t.is_cuda() && !t.is_sparse(), "Tensors must be CUDA and dense");
  TORCH_CHECK(t.is_contiguous() || t.is_non_overlapping_and_dense(), "Tensors must be contiguous");
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

using Tensors = std::vector<Tensor>;

// Runs collectives of CUDA tensors over Gloo, adding 16-bit numbers in float32. As NCCL it refuses two ranks on one
// device; as Gloo (`shares`), which copies through the host, it does not.
struct Collectives : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> gloo;
  bool shares;
  Collectives(c10::intrusive_ptr<c10d::Backend> inner, int rank, int size, bool shares_)
      : c10d::Backend(rank, size), gloo(inner), shares(shares_) {}
  const std::string getBackendName() const override { return shares ? "gloo" : "nccl"; }
  bool supportsCoalescing() const override { return false; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence; }
  uint64_t sequence = 0;

  void begin(const Tensors& tensors, const char* what) {
    std::optional<Device> device;
    int64_t bytes = 0;
    for (const auto& t : tensors) {
      TORCH_CHECK(t.is_cuda(), "No backend type associated with device type cpu");
      TORCH_CHECK(!device || *device == t.device(), "Tensor list must be on the same device");
      device = t.device();
      bytes += t.nbytes();
    }
    if (device) {
      if (!group_device && !shares) {
        group_device = device;
        Tensors mine{at::full({1}, int64_t(device->index()), at::kLong)};
        std::vector<Tensors> all(1);
        for (int rank = 0; rank < getSize(); ++rank) all[0].push_back(at::zeros({1}, at::kLong));
        gloo->allgather(all, mine)->wait();
        for (int rank = 0; rank < getSize(); ++rank)
          TORCH_CHECK(rank == getRank() || all[0][rank].item<int64_t>() != device->index(),
                      "NCCL error: invalid usage. Duplicate GPU detected : rank ", getRank(), " and rank ", rank,
                      " both on CUDA device ", int(device->index()));
      }
      if (!group_device) group_device = device;
      TORCH_CHECK(*group_device == *device, "this group's communicator is on ", *group_device, ", the tensors on ", *device);
    }
    ++sequence;
    record_event("collective", what, bytes);
  }
  std::optional<Device> group_device;

  void add(Tensor& t, c10d::AllreduceOptions options) {
    bool mean = options.reduceOp == c10d::ReduceOp::AVG;
    if (mean) options.reduceOp = c10d::ReduceOp::SUM;
    Tensor cpu = host_view(t);
    bool narrow = cpu.scalar_type() == at::kHalf || cpu.scalar_type() == at::kBFloat16;
    bool odd = cpu.scalar_type() == at::kBool;
    Tensors wide{narrow ? cpu.to(at::kFloat) : odd ? cpu.to(at::kByte) : cpu.contiguous()};
    gloo->allreduce(wide, options)->wait();
    if (mean) wide[0].div_(getSize());
    if (!wide[0].is_alias_of(cpu)) cpu.copy_(wide[0]);
  }

  c10::intrusive_ptr<c10d::Work> allreduce(Tensors& tensors, const c10d::AllreduceOptions& o) override {
    begin(tensors, "allreduce");
    for (auto& t : tensors) add(t, o);
    return c10::make_intrusive<FinishedWork>(tensors, c10d::OpType::ALLREDUCE);
  }
  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& o) override {
    begin(tensors, "allreduce_coalesced");
    for (auto& t : tensors) add(t, o);
    return c10::make_intrusive<FinishedWork>(tensors, c10d::OpType::ALLREDUCE_COALESCED);
  }
  c10::intrusive_ptr<c10d::Work> broadcast(Tensors& tensors, const c10d::BroadcastOptions& o) override {
    begin(tensors, "broadcast");
    for (auto& t : tensors) {
      Tensors cpu{host_view(t)};
      gloo->broadcast(cpu, o)->wait();
    }
    return c10::make_intrusive<FinishedWork>(tensors, c10d::OpType::BROADCAST);
  }
  c10::intrusive_ptr<c10d::Work> reduce(Tensors& tensors, const c10d::ReduceOptions& o) override {
    begin(tensors, "reduce");
    c10d::AllreduceOptions all;
    all.reduceOp = o.reduceOp;
    for (auto& t : tensors) {
      if (getRank() == o.rootRank) add(t, all);
      else { Tensor copy = t.clone(); add(copy, all); }
    }
    return c10::make_intrusive<FinishedWork>(tensors, c10d::OpType::REDUCE);
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    begin(in, "allgather");
    for (const auto& list : out) begin(list, "allgather");
    for (size_t i = 0; i < in.size(); ++i) {
      Tensors cpu{host_view(in[i])};
      std::vector<Tensors> all(1);
      for (auto& t : out[i]) all[0].push_back(host_view(t));
      gloo->allgather(all, cpu, o)->wait();
    }
    return c10::make_intrusive<FinishedWork>(out.at(0), c10d::OpType::ALLGATHER);
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& o) override {
    begin({out, in}, "_allgather_base");
    TORCH_CHECK(out.is_contiguous() && in.is_contiguous() && out.numel() == in.numel() * getSize(),
                "output tensor size must be equal to world_size times input tensor size");
    Tensor whole = host_view(out).view(-1);
    std::vector<Tensors> all(1);
    for (auto& part : whole.chunk(getSize())) all[0].push_back(part);
    Tensors cpu{host_view(in).view(-1).clone()};
    gloo->allgather(all, cpu, o)->wait();
    return c10::make_intrusive<FinishedWork>(Tensors{out}, c10d::OpType::_ALLGATHER_BASE);
  }
  c10::intrusive_ptr<c10d::Work> allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    for (size_t i = 0; i < in.size(); ++i) _allgather_base(out[i], in[i], o);
    return c10::make_intrusive<FinishedWork>(out, c10d::OpType::COALESCED);
  }
  void scatter_sum(Tensor& out, const Tensor& in, const c10d::ReduceOp& op) {
    Tensor copy = in.contiguous().view(-1).clone();
    c10d::AllreduceOptions all;
    all.reduceOp = op;
    add(copy, all);
    out.view(-1).copy_(copy.chunk(getSize())[getRank()]);
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& o) override {
    begin({out, in}, "_reduce_scatter_base");
    scatter_sum(out, in, o.reduceOp);
    return c10::make_intrusive<FinishedWork>(Tensors{out}, c10d::OpType::_REDUCE_SCATTER_BASE);
  }
  c10::intrusive_ptr<c10d::Work> reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) override {
    for (size_t i = 0; i < in.size(); ++i) _reduce_scatter_base(out[i], in[i], o);
    return c10::make_intrusive<FinishedWork>(out, c10d::OpType::COALESCED);
  }
  c10::intrusive_ptr<c10d::Work> reduce_scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ReduceScatterOptions& o) override {
    begin(out, "reduce_scatter");
    for (size_t i = 0; i < out.size(); ++i) {
      Tensors flat;
      for (auto& t : in[i]) flat.push_back(t.contiguous().view(-1));
      scatter_sum(out[i], at::cat(flat), o.reduceOp);
    }
    return c10::make_intrusive<FinishedWork>(out, c10d::OpType::REDUCE_SCATTER);
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions&) override {
    record_wait("barrier");
    std::vector<uint8_t> none(1, 0);
    Tensors cpu{at::zeros({1})};
    gloo->allreduce(cpu)->wait();
    return c10::make_intrusive<FinishedWork>(Tensors{}, c10d::OpType::BARRIER);
  }
};

}  // namespace

namespace c10d {
class SimulatedTimer final : public Timer {  // DDP's
 public:
  explicit SimulatedTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    auto from = getTimestamp(start), to = getTimestamp(end);
    return from && to && *to > *from ? std::optional<int64_t>(*to - *from) : std::nullopt;
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, SimulatedTimer)
}  // namespace c10d

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::module_::import("torch.distributed");
  py::class_<Collectives, c10d::Backend, c10::intrusive_ptr<Collectives>>(m, "Collectives")
      .def(py::init([](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size, bool shares) {
        return c10::make_intrusive<Collectives>(gloo, rank, size, shares);
      }))
      .def("_set_default_timeout", [](Collectives&, py::object) {});
  m.def("install", [](int devices, std::vector<std::string> unchecked_, std::vector<std::string> cpu_only_,
                      std::vector<std::string> waiting_, py::object recorder_) {
    num_devices = devices;
    unchecked.insert(unchecked_.begin(), unchecked_.end());
    cpu_only.insert(cpu_only_.begin(), cpu_only_.end());
    waiting.insert(waiting_.begin(), waiting_.end());
    recorder = recorder_.release().ptr();
    c10::SetAllocator(c10::kCUDA, &device_memory, 100);
    at::setHostAllocator(c10::kCUDA, &pinned_memory, 100);
    is_installed = true;
    // torch asks for the hooks during its import and keeps the object. It has no members, so replacing its vtable
    // pointer makes it one of ours.
    static Hooks hooks{at::CUDAHooksArgs{}};
    auto& kept = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
    if (!kept.hasCUDA()) memcpy(static_cast<void*>(&kept), static_cast<void*>(&hooks), sizeof(void*));
    return at::detail::getCUDAHooks().hasCUDA();
  });
  m.def("record", [](bool on) { recording = on; });
  m.def("is_recording", [] { return recording.load(); });
  m.def("get_device", [] { return int(current); });
  m.def("set_device", [](int d) { Guard().setDevice(Device(c10::kCUDA, DeviceIndex(d))); });
  m.def("exchange_device", [](int d) {
    int old = current;
    if (d >= 0) Guard().setDevice(Device(c10::kCUDA, DeviceIndex(d)));
    return old;
  });
  m.def("usage", [](int d) { return std::make_pair(usage[d].now.load(), usage[d].peak.load()); });
  m.def("reset_peak", [](int d) { usage[d].peak = usage[d].now.load(); });
  m.def("limit", [](int d, int64_t bytes) { usage[d].limit = bytes; });
  m.def("limit_of", [](int d) { return usage[d].limit < 0 ? total_bytes : usage[d].limit.load(); });
  m.def("total", [] { return total_bytes; });
  m.def("set_total", [](int64_t bytes) { total_bytes = bytes; });
  m.def("finish_copies", &finish_copies);
  m.def("touch", [](int d) { has_context[d] = true; });
  m.def("has_context", [](int d) { return has_context[d].load(); });
  m.def("default_generator", [](int d) { return default_generator(DeviceIndex(d)); });
  m.def("stream", [](int d) {
    auto s = Guard().getStream(Device(c10::kCUDA, DeviceIndex(d)));
    return std::make_tuple(int64_t(s.id()), int(s.device_index()), int64_t(s.device_type()));
  });
  m.def("set_stream", [](int64_t id, int d) {
    Guard().exchangeStream(Stream(Stream::UNSAFE, Device(c10::kCUDA, DeviceIndex(d)), id));
  });
}
