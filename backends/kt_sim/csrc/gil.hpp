// Python's lock, around waits: what is waited for may need it.
#pragma once

#include <Python.h>

namespace kt_sim {

class GilRelease {
 public:
  GilRelease() {
    if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) saved_ = PyEval_SaveThread();
  }
  ~GilRelease() {
    if (saved_ != nullptr) PyEval_RestoreThread(saved_);
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* saved_ = nullptr;
};

}  // namespace kt_sim
