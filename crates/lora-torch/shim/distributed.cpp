// Processes that train together: libtorch's own store and process group (c10d), behind plain C functions.
//
// A handle is one process's membership. Nothing of c10d crosses the border: Rust holds a pointer, and gives it back.
#include "shim.h"
#include <mutex>
#include <string>

#ifdef LORA_GLOO
#define USE_C10D_GLOO
#include "member.h"
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

// The header is read with stubs of gloo's. The library's own code allocates so many bytes for the class; where a version
// of libtorch has another layout this must not compile (docs/adr/0002-stub-headers-of-gloo.md).
static_assert(sizeof(c10d::ProcessGroupGloo) == 488, "another libtorch: look at the layout of ProcessGroupGloo first");

using Milliseconds = std::chrono::milliseconds;

// Whether there are groups at all.
extern "C" Message lt_group_available() { return nullptr; }

// Whether exchanges take tensors of CUDA devices as they are; otherwise they go through the host.
extern "C" int32_t lt_group_takes_cuda() {
#ifdef LORA_NCCL
  return 1;
#else
  return 0;
#endif
}

// The group that exchanges such a tensor.
static c10d::Backend& group_for(Membership* member, const at::Tensor& tensor) {
#ifdef LORA_NCCL
  if (tensor.is_cuda()) {
    if (!member->on_device) member->on_device = nccl_group(*member);
    return *member->on_device;
  }
#endif
  return *member->group;
}

// Begins an exchange on the host. libtorch keeps one record of exchanges for the process (c10d's flight recorder) and puts a new
// group into it without a lock: members that are threads of one process must not do so at once. Nothing waits under this lock.
template <typename Begin>
static c10::intrusive_ptr<c10d::Work> begun(const at::Tensor& tensor, const Begin& begin) {
  static std::mutex recording;
  std::unique_lock<std::mutex> lock(recording, std::defer_lock);
  if (!tensor.is_cuda()) lock.lock();
  return begin();
}

// NCCL's work is only put in order with the device's own unless a time is given; then the host waits, and hears of errors.
static void waited(const c10::intrusive_ptr<c10d::Work>& work, Milliseconds timeout = kNoTimeout) {
  if (!work->wait(timeout)) throw std::runtime_error("the exchange was not completed");
}

// Opens the store, as its host or as a client of it.
extern "C" Message lt_store_open(
    const char* host, uint16_t port, int32_t hosts, int64_t timeout_ms, const char* prefix, Membership** out) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = hosts != 0;
    // Who is missing is found out, and told better, by src/distributed.
    options.waitWorkers = false;
    options.timeout = Milliseconds(timeout_ms);
    auto store = c10::make_intrusive<c10d::TCPStore>(std::string(host), options);
    *out = new Membership{c10::make_intrusive<c10d::PrefixStore>(std::string(prefix), std::move(store)), {}, {}};
  });
}

// Adds to a counter, which is 0 at first, and tells what it is then.
extern "C" Message lt_store_add(Membership* member, const char* key, int64_t amount, int64_t* out) {
  return guarded([&] { *out = member->store->add(std::string(key), amount); });
}

// Connects the members with each other; every one of them must call it.
extern "C" Message lt_group_open(Membership* member, int32_t rank, int32_t world, int64_t timeout_ms) {
  return guarded([&] {
    auto options = c10d::ProcessGroupGloo::Options::create_default(Milliseconds(timeout_ms));
    auto store = c10::make_intrusive<c10d::PrefixStore>(std::string("gloo"), member->store);
    member->group = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, std::move(options));
    member->rank = rank;
    member->world = world;
    member->timeout = Milliseconds(timeout_ms);
  });
}

extern "C" Message lt_group_sum(Membership* member, CTensor tensor) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    auto work = begun(*tensor, [&] { return group_for(member, *tensor).allreduce(tensors); });
    waited(work, tensor->is_cuda() ? member->timeout : kNoTimeout);
  });
}

extern "C" Message lt_group_broadcast(Membership* member, CTensor tensor, int64_t root) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    auto work = begun(*tensor, [&] { return group_for(member, *tensor).broadcast(tensors, options); });
    waited(work, tensor->is_cuda() ? member->timeout : kNoTimeout);
  });
}

// A transfer between two members that was begun.
struct Transfer {
  c10::intrusive_ptr<c10d::Work> work;
};

// Begins to give a tensor to another member. It leaves when that one has begun to take it, and must stay as it is until then.
extern "C" Message lt_group_send(Membership* member, CTensor tensor, int32_t to, Transfer** out) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    *out = new Transfer{begun(*tensor, [&] { return member->group->send(tensors, to, 0); })};
  });
}

// Begins to take what another member gives.
extern "C" Message lt_group_receive(Membership* member, CTensor tensor, int32_t from, Transfer** out) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    *out = new Transfer{begun(*tensor, [&] { return member->group->recv(tensors, from, 0); })};
  });
}

// Waits for the end of a transfer.
extern "C" Message lt_transfer_wait(Transfer* transfer) {
  return guarded([&] { waited(transfer->work); });
}

extern "C" Message lt_transfer_close(Transfer* transfer) {
  return guarded([&] { delete transfer; });
}

extern "C" Message lt_store_close(Membership* member) {
  return guarded([&] { delete member; });
}

#else

static Message absent() {
  return strdup("this libtorch was built without gloo; use the wheel of torch, or a libtorch that has ProcessGroupGloo");
}

extern "C" Message lt_group_available() { return absent(); }
extern "C" int32_t lt_group_takes_cuda() { return 0; }
extern "C" Message lt_store_open(const char*, uint16_t, int32_t, int64_t, const char*, void**) { return absent(); }
extern "C" Message lt_store_add(void*, const char*, int64_t, int64_t*) { return absent(); }
extern "C" Message lt_group_open(void*, int32_t, int32_t, int64_t) { return absent(); }
extern "C" Message lt_group_sum(void*, CTensor) { return absent(); }
extern "C" Message lt_group_broadcast(void*, CTensor, int64_t) { return absent(); }
extern "C" Message lt_group_send(void*, CTensor, int32_t, void**) { return absent(); }
extern "C" Message lt_group_receive(void*, CTensor, int32_t, void**) { return absent(); }
extern "C" Message lt_transfer_wait(void*) { return absent(); }
extern "C" Message lt_transfer_close(void*) { return absent(); }
extern "C" Message lt_store_close(void*) { return absent(); }

#endif
