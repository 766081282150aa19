// SPDX-License-Identifier: Apache-2.0
// Since 2.10, torch provides a table of C functions, DLPack's exchange API (dlpack.h, version 1.3). `__dlpack__` gives
// the same through Python code and a capsule, which takes 2 us: as long as a reduction of 32 KiB.
#include "bindings/tensor.hpp"

#include <nanobind/ndarray.h>

#include <cstdint>

namespace nb = nanobind;

namespace dtrain {
namespace {

struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  int (*allocate)(void*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*object_from_managed)(void*, void**);
  int (*tensor_from_object)(void* object, nb::dlpack::dltensor* out);
  int (*current_stream)(std::int32_t, std::int32_t, void**);
};
constexpr std::uint32_t known_major_version = 1;

const ExchangeApi& exchange_api_of(nb::handle tensor) {
  const nb::object capsule = nb::getattr(tensor.type(), "__dlpack_c_exchange_api__", nb::none());
  if (!nb::isinstance<nb::capsule>(capsule)) throw nb::type_error("expected a tensor of torch 2.10 or newer");
  const auto* api = static_cast<const ExchangeApi*>(nb::cast<nb::capsule>(capsule).data("dlpack_exchange_api"));
  while (api != nullptr && api->version.major != known_major_version) api = api->previous;
  if (api == nullptr) throw nb::type_error("this torch provides tensors through a newer DLPack than version 1");
  return *api;
}

DataType dtype_of(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  if (dtype.lanes != 1) return DataType::other;
  switch (static_cast<Code>(dtype.code)) {
    case Code::Float:
      if (dtype.bits == 32) return DataType::float32;
      if (dtype.bits == 64) return DataType::float64;
      if (dtype.bits == 16) return DataType::float16;
      break;
    case Code::Bfloat:
      if (dtype.bits == 16) return DataType::bfloat16;
      break;
    case Code::Int:
      if (dtype.bits == 8) return DataType::int8;
      if (dtype.bits == 16) return DataType::int16;
      if (dtype.bits == 32) return DataType::int32;
      if (dtype.bits == 64) return DataType::int64;
      break;
    case Code::UInt:
      if (dtype.bits == 8) return DataType::uint8;
      if (dtype.bits == 16) return DataType::uint16;
      if (dtype.bits == 32) return DataType::uint32;
      if (dtype.bits == 64) return DataType::uint64;
      break;
    case Code::Complex:
      if (dtype.bits == 64) return DataType::complex64;
      if (dtype.bits == 128) return DataType::complex128;
      break;
    case Code::Bool: return DataType::boolean;
    default: break;
  }
  return DataType::other;
}

}  // namespace

TensorMemory memory_of(nb::handle tensor) {
  nb::dlpack::dltensor view;
  if (exchange_api_of(tensor).tensor_from_object(tensor.ptr(), &view) != 0) throw nb::python_error();
  if (view.device.device_type != nb::device::cpu::value && view.device.device_type != nb::device::cuda_host::value) {
    throw nb::type_error("the engine takes tensors on the CPU only");
  }
  std::int64_t count = 1;
  bool is_contiguous = true;
  for (std::int32_t d = view.ndim - 1; d >= 0; --d) {
    is_contiguous = is_contiguous && (view.strides == nullptr || view.shape[d] == 1 || view.strides[d] == count);
    count *= view.shape[d];
  }
  if (!is_contiguous && count != 0) throw nb::type_error("the engine takes contiguous tensors only");
  auto* const data = static_cast<std::byte*>(view.data) + view.byte_offset;
  const std::size_t element_bytes = (std::size_t{view.dtype.bits} * view.dtype.lanes + 7) / 8;
  return {{data, static_cast<std::size_t>(count) * element_bytes}, dtype_of(view.dtype)};
}

TensorMemory reducible_memory_of(nb::handle tensor) {
  const TensorMemory memory = memory_of(tensor);
  if (is_reducible(memory.dtype)) return memory;
  throw nb::type_error(
      "reductions take float32, float64, bfloat16, float16, int8, int16, int32, int64, uint8 and bool tensors");
}

}  // namespace dtrain
