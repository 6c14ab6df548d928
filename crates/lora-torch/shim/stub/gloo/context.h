// What ProcessGroupGloo.hpp names of a context: see docs/adr/0002-stub-headers-of-gloo.md.
#pragma once
#include <chrono>

namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
