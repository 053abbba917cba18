// Giving a tensor another shape, and its storage more bytes where it needs them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace kt_sim {

// Keeps strides where the shape is the same already, and what was stored in front.
const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> format = std::nullopt);

// Gives the storage so many bytes; the first ones are copied, in stream order.
void resize_storage(const c10::Storage& storage, size_t bytes);

}  // namespace kt_sim
