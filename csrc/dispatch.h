// Calls through torch's dispatcher, and the switch that sends an op to a back-end written in Python.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>

#include "types.h"

namespace fastlora {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// True while a back-end other than `native` is pinned for the process (fastlora/backends.py sets it).
inline std::atomic<bool> pinned_elsewhere{false};

// fastlora::<name>.python, which walks the back-ends written in Python.
template <class Signature>
c10::TypedOperatorHandle<Signature> in_python(const char* name) {
  return find_op<Signature>(name, "python");
}

}  // namespace fastlora
