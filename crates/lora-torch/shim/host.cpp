// Moving tensors between a device and pinned memory of the host, on a stream of its own beside what the device computes.
#include "shim.h"
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <map>
#include <mutex>
#include <optional>

// A copy on its way.
struct HostCopy {
  at::Tensor to;
  std::optional<c10::Event> made;
};

namespace {

// One for each device: what went out comes back on the same stream, so always after it.
c10::Stream own_stream(const c10::impl::VirtualGuardImpl& guard, at::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = streams.find(device.index());
  if (found != streams.end()) return found->second;
  return streams.emplace(device.index(), guard.getStreamFromGlobalPool(device, /*isHighPriority=*/false)).first->second;
}

}  // namespace

// Begins to copy a tensor to the device `index`, or to the host where that is negative. The source may be let go of at once.
extern "C" Message lt_begin_copy(CTensor from, int64_t index, HostCopy** out) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    const at::Tensor source = from->detach();
    const bool to_host = index < 0;
    if (source.is_cpu() && to_host) {
      *out = new HostCopy{source.contiguous().is_same(source) ? source.clone() : source.contiguous(), std::nullopt};
      return;
    }
    const at::Device device = to_host ? source.device() : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
    const c10::DeviceGuard on_device(device);
    const c10::impl::VirtualGuardImpl guard(device.type());
    const c10::Stream computing = guard.getStream(device), own = own_stream(guard, device);
    const at::TensorOptions options = source.options();
    const at::Tensor to = at::empty(source.sizes(), to_host ? options.device(at::kCPU).pinned_memory(true) : options.device(device).pinned_memory(false));
    // What is copied has been computed, and what lay where the copy goes has been used.
    c10::Event before(device.type());
    before.record(computing);
    before.block(own);
    {
      const c10::StreamGuard on(own);
      to.copy_(source, /*non_blocking=*/true);
    }
    // The allocator gives neither memory to anybody else before the copy has been made.
    if (source.is_cuda()) source.record_stream(own);
    if (to.is_cuda()) to.record_stream(own);
    HostCopy copy{to, c10::Event(device.type())};
    copy.made->record(own);
    *out = new HostCopy(std::move(copy));
  });
}

// The copy. What the device computes from here on waits for it; a copy on the host is for going back only.
extern "C" Message lt_end_copy(HostCopy* copy, CTensor* out) {
  return guarded([&] {
    if (copy->made && !copy->to.is_cpu()) {
      const at::Device device = copy->to.device();
      copy->made->block(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    }
    *out = new at::Tensor(copy->to);
  });
}

extern "C" void lt_forget_copy(HostCopy* copy) { delete copy; }

// Lets `tensor`, and whoever else holds it, have the numbers of another, which may be elsewhere.
extern "C" Message lt_set_data(CTensor tensor, CTensor data) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    tensor->set_data(*data);
  });
}

extern "C" Message lt_pinned(CTensor from, CTensor* out) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    const at::Tensor source = from->detach();
    const at::Tensor to = at::empty(source.sizes(), source.options().device(at::kCPU).pinned_memory(true));
    *out = new at::Tensor(to.copy_(source));
  });
}
