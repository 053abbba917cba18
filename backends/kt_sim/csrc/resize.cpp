#include "resize.hpp"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <utility>

#include "current.hpp"
#include "device_memory.hpp"

namespace kt_sim {

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> format) {
  if (self.sizes() != sizes) {
    auto* implementation = self.unsafeGetTensorImpl();
    implementation->set_sizes_contiguous(sizes);
    const size_t bytes = at::detail::computeStorageNbytesContiguous(
        sizes, self.itemsize(), static_cast<size_t>(self.storage_offset()));
    if (bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  }
  if (format.has_value()) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  const int before = current_device();
  set_current_device(storage.device().index());
  c10::DataPtr other = device_memory().allocate(bytes);
  const size_t kept = std::min(bytes, storage.nbytes());
  if (kept > 0) device_memory().copy_data(other.mutable_get(), storage.data(), kept);
  set_current_device(before);
  storage.set_data_ptr_noswap(std::move(other));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

}  // namespace kt_sim
