// What every launcher asks of its arguments: the first objection is the status that it returns.
#pragma once
#include "params.h"

class Check {
 public:
  Check();
  void refuse(bool wrong, int reason) {
    if (wrong && !status) status = reason;
  }
  void size(long long n);
  void pointer(const void* p, int alignment);
  void matrix(const Matrix& m, long long rows, long long columns, int element);
  void output(const Matrix& m, long long rows, long long columns, int element);
  void dropout(const long long* seed, int dropped);
  int launched();  // the runtime's word on the launch just made
  int status = FASTLORA_OK;

 private:
  int device = 0;
};
