// NVRTC and the driver of CUDA, both found at run time: the build needs neither, and where they are absent libtorch computes.
#include "device_kernels.h"
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#if defined(__unix__)
#include <dlfcn.h>
#endif

namespace {

constexpr unsigned THREADS_OF_A_BLOCK = 256;  // THREADS of the kernels

const char* const TEXT =
#include "device_kernels.inc"
    ;

// What the kernels' text asks for.
const char* const BEFORE = R"(
#define KERNEL extern "C" __global__
__device__ inline float from_bits(unsigned int bits) { return __uint_as_float(bits); }
__device__ inline unsigned int to_bits(float x) { return __float_as_uint(x); }
__device__ inline float from_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline unsigned short to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
)";

// As `DeviceKernels` in device_kernels.rs.
enum Kernels : uint8_t { LIBTORCH, COMPILED, EMULATED };

std::atomic<Kernels>& chosen() {
  static std::atomic<Kernels> kernels{LIBTORCH};
  return kernels;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("kernels of the device: " + what); }

#if defined(__unix__)

struct Library {
  // Of NVRTC: what a program and its compilation are asked.
  int (*create)(void**, const char*, const char*, int, const char* const*, const char* const*);
  int (*compile)(void*, int, const char* const*);
  int (*binary_size)(void*, size_t*);
  int (*binary)(void*, char*);
  int (*log_size)(void*, size_t*);
  int (*log)(void*, char*);
  int (*destroy)(void**);
  const char* (*text_of)(int);

  Library() {
    void* at = opened({"libnvrtc.so.13", "libnvrtc.so", "libcaffe2_nvrtc.so"});
    if (!at) fail("no libnvrtc.so.13 beside libtorch's CUDA libraries");
    find(at, "nvrtcCreateProgram", create);
    find(at, "nvrtcCompileProgram", compile);
    find(at, "nvrtcGetCUBINSize", binary_size);
    find(at, "nvrtcGetCUBIN", binary);
    find(at, "nvrtcGetProgramLogSize", log_size);
    find(at, "nvrtcGetProgramLog", log);
    find(at, "nvrtcDestroyProgram", destroy);
    find(at, "nvrtcGetErrorString", text_of);
  }

  // The first that is there. A symbol is found in it or in what it needs itself.
  static void* opened(std::initializer_list<const char*> names) {
    for (const char* name : names)
      if (void* at = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return at;
    return nullptr;
  }

  template <typename F>
  static void find(void* at, const char* name, F& f) {
    f = reinterpret_cast<F>(dlsym(at, name));
    if (!f) fail(std::string("no ") + name);
  }

  // The binary of all kernels for an architecture, such as 90.
  std::string compiled(int architecture) const {
    const std::string text = std::string(BEFORE) + TEXT, target = "--gpu-architecture=sm_" + std::to_string(architecture);
    void* program = nullptr;
    if (const int e = create(&program, text.c_str(), "device_kernels.cu", 0, nullptr, nullptr)) fail(text_of(e));
    // No product and sum in one rounding: what is unpacked has the bits that it has on the CPU.
    const char* options[] = {target.c_str(), "--std=c++17", "--fmad=false"};
    const int e = compile(program, 3, options);
    std::string made;
    size_t size = 0;
    if (e) {
      log_size(program, &size);
      made.resize(size);
      log(program, made.data());
    } else {
      binary_size(program, &size);
      made.resize(size);
      binary(program, made.data());
    }
    destroy(&program);
    if (e) fail(std::string(text_of(e)) + " for sm_" + std::to_string(architecture) + ": " + made.c_str());
    return made;
  }
};

// The driver's part, by its C names.
struct Driver {
  int (*context_device)(int*);
  int (*attribute)(int*, int, int);
  int (*load)(void**, const void*);
  int (*function)(void**, void*, const char*);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*name_of)(int, const char**);

  Driver() {
    void* at = Library::opened({"libcuda.so.1", "libcuda.so"});
    if (!at) fail("no libcuda.so.1");
    Library::find(at, "cuCtxGetDevice", context_device);
    Library::find(at, "cuDeviceGetAttribute", attribute);
    Library::find(at, "cuModuleLoadData", load);
    Library::find(at, "cuModuleGetFunction", function);
    Library::find(at, "cuLaunchKernel", launch);
    Library::find(at, "cuGetErrorName", name_of);
  }

  void check(int e, const char* what) const {
    const char* name = "an unknown error";
    if (e) name_of(e, &name), fail(std::string(what) + ": " + name);
  }
};

const Library& library() {
  static const Library library;
  return library;
}
const Driver& driver() {
  static const Driver driver;
  return driver;
}

// The architecture of the device that is current, such as 90.
int architecture() {
  constexpr int MAJOR = 75, MINOR = 76;
  int device = 0, major = 0, minor = 0;
  driver().check(driver().context_device(&device), "no device");
  driver().check(driver().attribute(&major, MAJOR, device), "its architecture");
  driver().check(driver().attribute(&minor, MINOR, device), "its architecture");
  return 10 * major + minor;
}

// A kernel on the device that is current; all are compiled when the first is asked for.
void* kernel(int index, const std::string& name) {
  struct Module {
    void* module = nullptr;
    std::map<std::string, void*> kernels;
  };
  static std::mutex mutex;
  static std::map<int, Module> modules;
  static std::map<int, std::string> binaries;
  const std::lock_guard<std::mutex> lock(mutex);
  Module& own = modules[index];
  if (!own.module) {
    std::string& binary = binaries[architecture()];
    if (binary.empty()) binary = library().compiled(architecture());
    driver().check(driver().load(&own.module, binary.data()), "loading them");
  }
  void*& found = own.kernels[name];
  if (!found) driver().check(driver().function(&found, own.module, name.c_str()), name.c_str());
  return found;
}

void on_device(const std::string& name, const at::Tensor& t, unsigned blocks, void** arguments) {
  const c10::DeviceGuard guard(t.device());
  void* stream = c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
  driver().check(driver().launch(kernel(t.device().index(), name), blocks, 1, 1, THREADS_OF_A_BLOCK, 1, 1, 0, stream, arguments, nullptr),
                 name.c_str());
}

#else

void on_device(const std::string&, const at::Tensor&, unsigned, void**) { fail("they are compiled on Linux only"); }

#endif

const char* suffix(at::ScalarType kind) {
  switch (kind) {
    case at::kFloat: return "_f32";
    case at::kDouble: return "_f64";
    case at::kHalf: return "_f16";
    case at::kBFloat16: return "_bf16";
    default: return nullptr;
  }
}

}  // namespace

bool device::served(const at::Tensor& t) {
  const Kernels kernels = chosen().load(std::memory_order_relaxed);
  return suffix(t.scalar_type()) && ((kernels == COMPILED && t.is_cuda()) || (kernels == EMULATED && t.is_cpu()));
}

void device::launch(const char* name, const at::Tensor& t, int64_t blocks, void** arguments) {
  const std::string own = std::string(name) + suffix(t.scalar_type());
  if (blocks == 0) return;
  if (t.is_cpu()) emulate(own, static_cast<unsigned>(blocks), arguments);
  else on_device(own, t, static_cast<unsigned>(blocks), arguments);
}

extern "C" Message lt_use_device_kernels(uint8_t kernels) {
  return guarded([&] { chosen().store(static_cast<Kernels>(kernels)); });
}

// Compiles them for an architecture, and says how many bytes that gave.
extern "C" Message lt_compile_device_kernels(int32_t architecture, uint64_t* bytes) {
  return guarded([&] {
#if defined(__unix__)
    *bytes = library().compiled(architecture).size();
#else
    fail("they are compiled on Linux only");
#endif
  });
}
