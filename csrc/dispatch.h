// Calls through torch's dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>

#include "types.h"

namespace fastlora {

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
