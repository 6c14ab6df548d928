// Memory for numbers that one computation needs: libtorch's, whose message says how much there was not.
#pragma once
#include <c10/core/CPUAllocator.h>

struct Buffer {
  c10::DataPtr data;
  size_t size = 0;

  // Room for so many numbers, of any content; it begins a line of the caches.
  float* of(size_t wanted) {
    if (size < wanted) {
      data.clear();
      size = 0;
      data = c10::GetCPUAllocator()->allocate(wanted * sizeof(float));
      size = wanted;
    }
    return static_cast<float*>(data.get());
  }
};
