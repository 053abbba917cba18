#include "span.hpp"

#include <ATen/ops/from_blob.h>

#include "arena.hpp"

namespace kt_sim {

Span::Span(const at::Tensor& tensor)
    : sizes(tensor.sizes().begin(), tensor.sizes().end()),
      strides(tensor.strides().begin(), tensor.strides().end()),
      dtype(tensor.scalar_type()),
      numel(tensor.numel()),
      element_bytes(tensor.itemsize()),
      is_conjugate(tensor.is_conj()),
      is_negative(tensor.is_neg()) {
  // Not data_ptr(): a tensor without elements may have none.
  const void* start = tensor.unsafeGetTensorImpl()->storage().data();
  const auto* first = static_cast<const char*>(start) +
                      static_cast<ptrdiff_t>(element_bytes) * tensor.storage_offset();
  data = start == nullptr ? nullptr : arena().host_address(first);
}

at::Tensor Span::on_host() const {
  at::Tensor view = at::from_blob(data, sizes, strides, at::TensorOptions().dtype(dtype));
  if (is_conjugate) view._set_conj(true);
  if (is_negative) view._set_neg(true);
  return view;
}

}  // namespace kt_sim
