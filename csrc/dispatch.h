// Calls through torch's dispatcher and the switch that sends an op to a back-end written in Python.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <atomic>

#include "types.h"

namespace fastlora {

// True while a back-end other than `native` is pinned for the process (fastlora/backends.py sets it).
inline std::atomic<bool> pinned_elsewhere{false};

template <size_t n>
struct Name {
  char text[n];
  constexpr Name(const char (&literal)[n]) { std::copy_n(literal, n, text); }
};

// The overload "python" walks the back-ends written in Python.
template <Name name, class Signature, Name overload = "", class... Args>
auto call(Args&&... args) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.text, overload.text).template typed<Signature>();
  return op.call(std::forward<Args>(args)...);
}

}  // namespace fastlora
