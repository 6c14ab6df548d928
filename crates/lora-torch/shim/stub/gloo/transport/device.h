// What ProcessGroupGloo.hpp holds by pointer: see docs/adr/0002-stub-headers-of-gloo.md.
#pragma once

namespace gloo {
namespace transport {
class Device;
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};
}  // namespace transport
}  // namespace gloo
