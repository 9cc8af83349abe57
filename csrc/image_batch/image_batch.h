// output[b] = images[indices[b]], mirrored and normalised: a batch from a dataset kept as bytes.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// How output [B, 3, H, W] lies in memory: as that, or as [B, H, W, 3].
enum class BatchLayout { kContiguous, kChannelsLast };

struct ImageBatch {
  const uint8_t* images;   // [N, H, W, 3]
  const int64_t* indices;  // [B]
  const uint8_t* flips;    // [B], or null
  const float* scale;      // [3]
  const float* shift;      // [3]
  int64_t num_images, batch, height, width;
  BatchLayout layout;
};

// The bits of a flip.
constexpr int kLeftRight = 1;
constexpr int kTopBottom = 2;

// Where a row of the batch comes from.
struct ImageRow {
  const uint8_t* pixels;  // [W, 3]; null where the index names no image
  bool mirrored;          // read from right to left
};

SKINFAST_HOST_DEVICE ImageRow image_row(const ImageBatch& call, int64_t b, int64_t h) {
  const int64_t index = call.indices[b];
  if (index < 0 || index >= call.num_images) return {nullptr, false};
  const int flip = call.flips == nullptr ? 0 : call.flips[b];
  const int64_t row = (flip & kTopBottom) != 0 ? call.height - 1 - h : h;
  return {call.images + (index * call.height + row) * call.width * 3, (flip & kLeftRight) != 0};
}

// The source's column of the batch's column w.
SKINFAST_HOST_DEVICE int64_t image_column(const ImageRow& row, int64_t width, int64_t w) {
  return row.mirrored ? width - 1 - w : w;
}

// `byte` is an int, since a vector of those is converted in one instruction on every machine.
template <typename T>
SKINFAST_HOST_DEVICE T image_value(int32_t byte, accumulate_t<T> scale, accumulate_t<T> shift) {
  return store<T>(static_cast<accumulate_t<T>>(byte) * scale + shift);
}

// CPU kernel, on the rows [begin, end) of all images.
SKINFAST_DECLARE_KERNEL(void image_batch(DType dtype, const ImageBatch& call, void* output,
                                         int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "core/tensor.h"

namespace skinfast {

inline BatchLayout batch_layout_of(const std::string& layout) {
  if (layout == "contiguous") return BatchLayout::kContiguous;
  SKINFAST_CHECK(layout == "channels_last", "image_batch: layout is '", layout,
                 "'; it needs 'contiguous' or 'channels_last'");
  return BatchLayout::kChannelsLast;
}

// `launch(call, output)` sees an output that is not empty.
template <typename Launch>
Tensor image_batch_host(const Tensor& images, const Tensor& indices, const Tensor& scale,
                        const Tensor& shift, const std::optional<Tensor>& flips,
                        const std::string& layout, ScalarType dtype, const Launch& launch) {
  constexpr const char* op = "image_batch";
  check_dtype(op, "images", images, ScalarType::Byte);
  SKINFAST_CHECK(images.dim() == 4 && images.size(3) == 3, op, ": images has shape ",
                 shape_string(images), "; it needs [N, H, W, 3]");
  // Copied here, a dataset would be copied for every batch.
  SKINFAST_CHECK(images.is_contiguous(), op,
                 ": images has gaps or another order in memory; it needs to be contiguous");
  check_dtype(op, "indices", indices, ScalarType::Long);
  check_dim(op, "indices", indices, 1, "[B]");
  check_same_device(op, "indices", indices, "images", images);
  const auto check_argument = [&](const char* name, const Tensor& tensor, ScalarType dtype,
                                  int64_t size) {
    check_dtype(op, name, tensor, dtype);
    check_shape(op, name, tensor, {size});
    check_same_device(op, name, tensor, "images", images);
  };
  check_argument("scale", scale, ScalarType::Float, 3);
  check_argument("shift", shift, ScalarType::Float, 3);
  if (flips) check_argument("flips", *flips, ScalarType::Byte, indices.size(0));
  check_floating(op, "the result", dtype, images.is_cuda());

  const Tensor dense_indices = dense(indices, MemoryFormat::Contiguous);
  const Tensor dense_scale = dense(scale, MemoryFormat::Contiguous);
  const Tensor dense_shift = dense(shift, MemoryFormat::Contiguous);
  std::optional<Tensor> dense_flips;
  if (flips) dense_flips = dense(*flips, MemoryFormat::Contiguous);
  const ImageBatch call{
      static_cast<const uint8_t*>(images.const_data_ptr()),
      static_cast<const int64_t*>(dense_indices.const_data_ptr()),
      flips ? static_cast<const uint8_t*>(dense_flips->const_data_ptr()) : nullptr,
      static_cast<const float*>(dense_scale.const_data_ptr()),
      static_cast<const float*>(dense_shift.const_data_ptr()),
      images.size(0),
      indices.size(0),
      images.size(1),
      images.size(2),
      batch_layout_of(layout)};
  const MemoryFormat format = call.layout == BatchLayout::kChannelsLast ? MemoryFormat::ChannelsLast
                                                                        : MemoryFormat::Contiguous;
  const Tensor output = empty_in(images, {call.batch, 3, call.height, call.width}, format, dtype);
  if (output.numel() > 0) launch(call, output);
  return output;
}

}  // namespace skinfast
#endif
